"""The table of ten published models: what follows from their configs is what was published, and docs show it."""

import pytest

from benchmarks import sizes
from tests.support.markdown import ROOT

OTHERWISE_COUNTED = {"GLM-4.5-Air", "Kimi K2"}  # with a further layer, and as "1 trillion"


@pytest.mark.slow
@pytest.mark.parametrize("name", sizes.MODELS)
def test_the_parameters_are_those_that_were_published(name):
    published = sizes.MODELS[name]
    found = sizes.sizes_of(published, name).parameters / 1e9
    assert found == pytest.approx(published.billions, rel=0.03 if name in OTHERWISE_COUNTED else 0.002)


@pytest.mark.slow
def test_docs_show_what_the_command_prints(capsys):
    sizes.main()
    rows = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    page = (ROOT / "docs" / "sizes.md").read_text(encoding="utf-8")
    assert len(rows) == 1 + len(sizes.MODELS)
    assert [row for row in rows if row not in page] == []
