"""What the site does beyond MkDocs, Material and mkdocstrings.

Links that leave docs/ lead to the repository, or are plain text where pyproject.toml names none; links of the notebook,
which MkDocs does not look into, lead to the site's pages; examples in docstrings are shown as code.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath

import tomllib
from griffe import Extension

_OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]*)\)")


def repository(pyproject: Path) -> str:
    """The address under which GitHub shows the files of the main branch; empty where pyproject.toml names none."""
    urls = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {})
    return f"{url.rstrip('/')}/blob/main/" if (url := urls.get("Repository", "")) else ""


def rewritten(markdown: str, page: str, address: str) -> str:
    """A page whose links to files outside of docs/ lead to the repository, or keep their text alone.

    Args:
        markdown: The page's text.
        page: Its path in docs/.
        address: What `repository` returned.
    """

    def replaced(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = normpath(join("docs", dirname(page), target))
        if path.startswith("docs/"):
            return link[0]
        return f"[{text}]({address}{path})" if address else text

    return _OUTSIDE.sub(replaced, markdown)


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Called by MkDocs for every page."""
    pyproject = Path(config.config_file_path).with_name("pyproject.toml")
    return rewritten(markdown, page.file.src_uri, repository(pyproject))


def linked(html: str) -> str:
    """A notebook's page whose links to pages of docs/ lead to those of the site."""
    return re.sub(r'href="([\w-]+)\.md(#[^"]*)?"', lambda link: f'href="../{link[1]}/{link[2] or ""}"', html)


def on_page_content(html: str, page, config, files) -> str:
    """Called by MkDocs for every page."""
    return linked(html) if page.file.src_uri.endswith(".ipynb") else html


class Examples(Extension):
    """Has griffe take sections named ``Example``, which it does not know, for those named ``Examples``."""

    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
