"""docs/models.md is of the newest transformers that the tests have seen."""

import re
from pathlib import Path

import transformers

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_page_is_not_older_than_the_installed_transformers():
    stated = re.search(r"Every config type of transformers (\d+)\.(\d+)", PAGE.read_text())
    installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    assert stated is not None
    assert tuple(map(int, stated.groups())) >= installed, (
        f"docs/models.md is of transformers {stated[1]}.{stated[2]}, and {transformers.__version__} is installed: "
        "python -m tests.support.model_zoo > docs/models.md"
    )
