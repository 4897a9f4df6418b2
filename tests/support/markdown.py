"""Reads Markdown pages: code blocks with the comment before them, headings as GitHub names them, links, inline code."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(r"(?:^[ ]*<!--(?P<comment>.*?)-->\n)?^[ ]*```(?P<language>\w*)\n(?P<code>.*?)^[ ]*```", re.M | re.S)


@dataclass
class Block:
    """A fenced block of code.

    Attributes:
        language: The word after the fence, or the empty string.
        code: Its text without the indentation of the list that it stands in.
        line: The number of the fence's line in the page.
        comment: The HTML comment on the lines before it, if there is one.
    """

    language: str
    code: str
    line: int
    comment: str


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [
        Block(
            found["language"],
            textwrap.dedent(found["code"]),
            text.count("\n", 0, found.start("code")),
            (found["comment"] or "").strip(),
        )
        for found in _BLOCK.finditer(text)
    ]


def prose(text: str) -> str:
    """A page without its fenced blocks and without comments."""
    return re.sub(r"<!--.*?-->", "", _BLOCK.sub("", text), flags=re.S)


def anchors(text: str) -> set[str]:
    """What links can name after ``#``: each heading as GitHub writes it."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *#*$", prose(text), re.M):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        count = next(n for n in range(100) if (f"{slug}-{n}" if n else slug) not in found)
        found.add(f"{slug}-{count}" if count else slug)
    return found


def links(text: str) -> list[str]:
    """The targets of a page's links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def inline_code(text: str) -> list[str]:
    """The inline code in the text of a page, one line each."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]
