"""What a wheel holds is what the folders hold, under the names that are imported."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import moe_precision

ROOT = Path(__file__).parents[1]


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
    kinds = ("*.py", "*.cpp", "*.yaml", "*.json", "py.typed")
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


def test_public_names_exist():
    assert all(hasattr(moe_precision, name) for name in moe_precision.__all__)
