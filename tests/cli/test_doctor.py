"""`doctor` says what works here, why a kernel is not there, and by its exit status whether that matters."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from moe_precision.cli import doctor
from moe_precision.cli.main import main
from moe_precision.quantize import selfcheck
from moe_precision.quantize.kernels.int4 import Int4

ROOT = Path(__file__).parents[2]


def by_name():
    return {check.name: check for check in selfcheck.check_kernels()}


@pytest.mark.slow
def test_every_kernel_is_tried(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in doctor.KERNELS:
        assert f"| {name} " in out
    assert "| torch " in out
    assert torch.__version__ in out
    assert "everything works" in out
    assert tuple(by_name()) == doctor.KERNELS


@pytest.mark.slow
def test_without_a_compiler_the_reason_is_given_and_required_kernels_fail(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = by_name()
    assert [found[name].state for name in ("C++ compiler", "C++", "C++ rounding")] == ["absent"] * 3
    assert "no C++ compiler 'no-such-compiler': install g++" in found["C++ compiler"].detail
    assert main(["doctor"]) == 0  # slower, not wrong
    assert "absent, which costs speed alone: C++ compiler, C++, C++ in int8, C++ rounding" in capsys.readouterr().out
    assert main(["doctor", "--require", "C++"]) == 1
    assert "C++: absent: needs a C++ compiler" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiler_that_fails_is_broken(monkeypatch, tmp_path, capsys):
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "fake 1.0" && exit 0\necho "error: no luck" >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    found = by_name()
    assert found["C++ compiler"].state == "works"
    assert "fake 1.0" in found["C++ compiler"].detail
    assert found["C++"].state == found["C++ rounding"].state == "broken"
    assert "no luck" in found["C++"].detail
    assert main(["doctor"]) == 1
    assert "C++: broken" in capsys.readouterr().err


def test_a_kernel_with_wrong_products_is_broken(monkeypatch, any_cpu_int4):
    multiply = Int4.multiply
    monkeypatch.setattr(Int4, "multiply", lambda self, index, x: multiply(self, index, x) * 1.05)
    check = by_name()["torch int4"]
    assert check.state == "broken"
    assert "off at 1 bits by 0.0" in check.detail
    assert "please report this" in check.detail


@pytest.fixture
def any_cpu_int4():
    if by_name()["torch int4"].state != "works":
        pytest.skip("torch has no int4 kernel here")


@pytest.mark.slow
def test_why_ark_and_triton_are_not_there(monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "is_intel", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = by_name()
    assert (found["ARK"].state, found["ARK"].detail) == ("absent", "made for Intel's CPUs, and this is none")
    assert (found["Triton"].state, found["Triton"].detail) == ("absent", "torch finds no GPU")
    monkeypatch.setattr(selfcheck, "is_intel", lambda: True)
    monkeypatch.setattr(selfcheck, "find_spec", lambda name: None)
    assert "pip install 'moe-precision[cpu]'" in by_name()["ARK"].detail
    main(["doctor"])
    assert "'moe-precision[cpu]'" in "".join(capsys.readouterr().out.split())  # and not taken for a style


def test_versions_outside_the_range_and_missing_packages_are_broken(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_kernels", lambda: iter(()))
    wanted = [Requirement(text) for text in ("torch<1", "rich", "no-such-package>=2", "absent-too>=3; extra == 'cpu'")]
    monkeypatch.setattr(doctor, "_requirements", lambda: wanted)
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert f"torch: broken: {version('torch')} is installed, expected <1" in err
    assert "no-such-package: broken: not installed; >=2" in err
    assert "absent-too" not in err
    assert "cpu: absent-too" in out


def test_used_from_a_folder_there_is_nothing_to_compare_versions_with(monkeypatch):
    def not_installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", not_installed)
    assert doctor._requirements() == []


def test_every_extra_says_what_it_is_for():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["optional-dependencies"]) == set(doctor.EXTRAS)
