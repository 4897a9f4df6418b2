"""The cache of compiled libraries: made once, whoever asks, and made anew where one is damaged."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_precision.quantize.kernels import compiler


@pytest.fixture
def source(monkeypatch, tmp_path):
    """A small C++ file, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "small.cpp"
    file.write_text('extern "C" int answer() { return 42; }\n')
    return file


@pytest.fixture
def compilations(monkeypatch):
    """The commands that compile, as they are run."""
    run, found = compiler._run, []

    def keep(command):
        if "-E" not in command:
            found.append(command)
        return run(command)

    monkeypatch.setattr(compiler, "_run", keep)
    return found


def test_the_library_is_made_once(source, compilations):
    first, second = compiler.compiled(source), compiler.compiled(source)
    assert first.answer() == second.answer() == 42
    assert len(compilations) == 1
    assert [file.name for file in (source.parent / "moe_precision").glob("*.so")] == [first._name.rpartition("/")[2]]


def test_of_several_processes_one_compiles(source, compilations):
    """Threads here: each has its own lock on the file, as processes have."""
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(compiler.compiled, [source] * 4))
    assert len(compilations) == 1
    assert len({library._name for library in libraries}) == 1


def test_a_damaged_library_is_made_anew(source, compilations):
    compiler.compiled(source)
    (made,) = (source.parent / "moe_precision").glob("*.so")
    content = made.read_bytes()
    made.unlink()  # the one in use stays as it is
    made.write_bytes(content[: len(content) // 2])
    assert compiler.compiled(source).answer() == 42
    assert len(compilations) == 2
    assert made.read_bytes() == content


@pytest.mark.slow
def test_another_source_and_other_flags_are_other_libraries(source, compilations):
    first = compiler.compiled(source)._name
    assert compiler.compiled(source, "-DOTHER")._name != first
    source.write_text('extern "C" int answer() { return 43; }\n')
    assert compiler.compiled(source).answer() == 43
    assert len(compilations) == 3


def test_a_compiler_with_arguments(source, compilations, monkeypatch):
    monkeypatch.setenv("CXX", "g++ -g0")
    assert compiler.compiled(source).answer() == 42
    assert compilations[0][1] == "-g0"
