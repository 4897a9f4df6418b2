"""Which part of the package may import which, and how long a file may be.

`ORDER` follows the data: a part may import those before it, never those after it, and no two modules import each other
in a circle. Every import counts, also those inside functions and under ``TYPE_CHECKING``.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "moe_precision"
ORDER = (
    "errors",
    "version",
    "compat",
    "files",
    "autocast",
    "registration",  # names what it imports later as text
    "layers",
    "plans",
    "checkpoints",
    "recording",
    "quantize",
    "allocation",
    "annealing",
    "judging",
    "export",
    "serving",
    "present",
    "callbacks",
    "recipes",
    "cli",
    "__main__",
    "__init__",  # the public names: it may import everything, and nothing imports it
)
FORBIDDEN = {
    ("plans", "checkpoints"),
    ("plans", "quantize"),
    ("recording", "quantize"),
}  # whatever happens to the order
LONGEST, LONGEST_TEST = 300, 500  # lines


def files() -> dict[str, Path]:
    """Every module by its dotted name under ``moe_precision``; a package's own file is ``a.__init__``."""
    folders = {"": ROOT / PACKAGE, "callbacks": ROOT / "callbacks", "recipes": ROOT / "recipes"}
    found = {}
    for prefix, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):  # rglob does not follow the two symlinks
            parts = path.relative_to(folder).with_suffix("").parts
            if not prefix and parts[0] in folders:
                continue
            found[".".join([prefix, *parts] if prefix else parts)] = path
    return found


FILES = files()
NAMES = frozenset(FILES)


def absolute(node: ast.ImportFrom, module: str) -> str | None:
    """The dotted name after ``from``, without ``moe_precision``; None where it is outside the package."""
    if not node.level:
        inside = node.module is not None and (node.module + ".").startswith(PACKAGE + ".")
        return node.module.removeprefix(PACKAGE).removeprefix(".") if inside and node.module else None
    here = module.split(".")[: -node.level]
    return ".".join([*here, *(node.module.split(".") if node.module else [])])


def module_of(name: str, names: frozenset[str]) -> str | None:
    """The module that a dotted name means, a package's own file included."""
    package = f"{name}.__init__" if name else "__init__"
    return name if name in names else package if package in names else None


def imports(source: str, module: str, names: frozenset[str] = NAMES) -> set[str]:
    """Modules of the package that a module's source imports, wherever in the source it does so."""
    found: set[str | None] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == PACKAGE or alias.name.startswith(PACKAGE + "."):
                    found.add(module_of(alias.name.removeprefix(PACKAGE).removeprefix("."), names))
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module)
            if base is None:
                continue
            for alias in node.names:
                found.add(module_of(f"{base}.{alias.name}".lstrip("."), names) or module_of(base, names))
    return {name for name in found if name is not None and name != module}


def part(module: str) -> str:
    """The station of the data that a module belongs to."""
    return module.split(".")[0]


def wrong(module: str, imported: str) -> bool:
    """Whether an import runs against the order."""
    ends = part(module), part(imported)
    return ORDER.index(ends[1]) > ORDER.index(ends[0]) or ends in FORBIDDEN


IMPORTS = {name: imports(path.read_text(encoding="utf-8"), name) for name, path in FILES.items()}


def test_every_part_has_its_place():
    assert {part(module) for module in FILES} <= set(ORDER)


def test_imports_follow_the_data():
    arrows = {(one, other) for one, all_ in IMPORTS.items() for other in all_}
    new = sorted(f"{one} imports {other}" for one, other in arrows if wrong(one, other))
    assert not new, "against the order of tests/test_architecture.py:\n" + "\n".join(new)


def test_no_import_cycle():
    known = IMPORTS
    try:
        TopologicalSorter(known).prepare()
    except CycleError as error:
        pytest.fail("modules import each other in a circle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("from .shapes import A", "plans.plan", {"plans.shapes"}),
        ("from . import shapes, absent", "plans.plan", {"plans.shapes", "plans.__init__"}),
        ("def f():\n    from ..quantize.codec import grid", "plans.plan", {"quantize.codec.grid"}),
        ("if TYPE_CHECKING:\n    from ..quantize import Thing", "plans.plan", {"quantize.__init__"}),
        ("from .plan import Plan", "plans.__init__", {"plans.plan"}),
        ("import moe_precision.plans.plan as p, json", "layers.find", {"plans.plan"}),
        ("from moe_precision import plans", "layers.find", {"plans.__init__"}),
        ("import moe_precision", "layers.find", {"__init__"}),
        ("from .. import PrecisionPlan", "layers.find", {"__init__"}),
        ("from moe_precision_other import x\nimport torch", "layers.find", set()),
    ],
)
def test_every_kind_of_import_is_seen(source, module, expected):
    modules = "__init__", "plans.__init__", "plans.plan", "plans.shapes", "quantize.__init__", "quantize.codec.grid"
    assert imports(source, module, frozenset(modules)) == expected


def test_arrows_against_the_order_are_seen():
    assert all(wrong(one, other) for one, other in pairwise(ORDER))
    assert not any(wrong(other, one) for one, other in pairwise(ORDER) if (other, one) not in FORBIDDEN)
    assert not wrong("cli.main", "layers.experts")
    assert not wrong("plans.plan", "plans.shape")
    assert wrong("recording.history", "quantize.codec.grid")
    assert wrong("layers.experts", "__init__")


def too_long(text: str, limit: int) -> bool:
    """Whether a file is above the limit and its first lines do not say why.

    The reason stands in a comment or docstring line among the first ten: ``Long because ...``.
    """
    lines = text.splitlines()
    return len(lines) > limit and not any("Long because " in line for line in lines[:10])


def test_files_stay_short():
    long = set()
    for folder in (PACKAGE, "callbacks", "recipes", "benchmarks", "tests"):
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.cpp")]:
            if too_long(path.read_text(encoding="utf-8"), LONGEST_TEST if folder == "tests" else LONGEST):
                long.add(path.relative_to(ROOT).as_posix())
    assert not long, f"split, or a line 'Long because ...' at the head: {sorted(long)}"


def test_a_reason_for_a_long_file_is_read():
    assert too_long("x = 1\n" * 11, 10)
    assert not too_long('"""Tables.\n\nLong because each row is a case.\n"""\n' + "x = 1\n" * 11, 10)
    assert not too_long("x = 1\n" * 10, 10)
