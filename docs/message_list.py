"""Lists the error messages of the source on docs/messages.md, so that the page cannot miss one.

A section of that page has a comment ``<!-- messages: moe_precision/plans callbacks/x.py -->``; on the site the messages
that are raised in these folders and files take its place. A file counts where it is named most closely. Nothing of the
package is imported.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("moe_precision", "callbacks", "recipes")
PAGE = "messages.md"
_MARK = re.compile(r"<!-- messages: (.*?) -->", re.S)
_ESCAPED = re.compile(r"([\\`*_{}\[\]<>#|])")


def text_of(node: ast.expr) -> str:
    """A text in the source, with ``…`` for what is filled in; empty for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        return f"{left or '…'}{right or '…'}" if left or right else ""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def messages(source: str) -> list[str]:
    """What a source raises, each message once, in its order; without those that only pass another one on."""
    found: dict[str, None] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            text = next(filter(None, map(text_of, node.exc.args)), "")
            if re.search(r"[a-z]{3}", text):
                found[re.sub(r"…+", "…", " ".join(text.split()))] = None
    return list(found)


def by_file() -> dict[str, list[str]]:
    """Path in the repository -> what is raised there, of every file that raises something."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):  # rglob does not follow the two symlinks
            if said := messages(path.read_text(encoding="utf-8")):
                found[path.relative_to(ROOT).as_posix()] = said
    return found


def sections(page: str) -> list[list[str]]:
    """The folders and files of each section of the page."""
    return [found[1].split() for found in _MARK.finditer(page)]


def part_of(file: str, parts: list[str]) -> str:
    """The folder or file of the page that a source belongs to, the longest one that names it; empty if none does."""
    return max((part for part in parts if file == part or file.startswith(f"{part}/")), key=len, default="")


def filled(page: str) -> str:
    """The page with its messages, sorted within a section."""
    parts = [part for section in sections(page) for part in section]
    of_part: dict[str, list[str]] = {part: [] for part in parts}
    for file, said in by_file().items():
        of_part.setdefault(part_of(file, parts), []).extend(said)

    def listed(found: re.Match[str]) -> str:
        texts = {text for part in found[1].split() for text in of_part[part]}
        return "\n".join("- " + _ESCAPED.sub(r"\\\1", text) for text in sorted(texts, key=str.lower))

    return _MARK.sub(listed, page)


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Called by MkDocs for every page."""
    return filled(markdown) if page.file.src_uri == PAGE else markdown
