"""The model card of a packed checkpoint, and what goes to the Hub with it."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers.utils.hub
from huggingface_hub import ModelCard

from moe_precision import allocate, dequantize_checkpoint, distill_checkpoint, load_model, quantize_checkpoint
from moe_precision.quantize.card import add_to_card, has_card
from tests.support.models import build

BASE = """---
license: apache-2.0
language: en
tags:
- chat
model-index:
- name: base
  results: []
---
# The base

Its own words: 100 % of them, with `code`, and
---
a rule.
"""


@pytest.fixture
def made(tmp_path):
    """A small float checkpoint, its plan, and a folder to write."""
    model = build("mixtral", num_hidden_layers=1, hidden_size=64, intermediate_size=64)
    model.save_pretrained(tmp_path / "float")
    plan = allocate(model, method="uniform", average_bits=2, group_size=64)
    return tmp_path / "float", plan.with_bits({"model.layers.0.mlp": [4, 2, 2, 2, 2, 2, 2, 4]}), tmp_path / "out"


def test_the_card_says_what_was_done_and_its_lines_load_the_model(made, monkeypatch):
    source, plan, out = made
    (source / "tokenizer_config.json").write_text("{}")
    quantize_checkpoint(source, plan, out)
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["moe-precision", "mixture-of-experts", "quantized", "mixed-precision", "mixtral"]
    assert card.data.base_model is None  # a folder is not a name on the Hub
    assert card.text.lstrip().startswith("# float, packed to 2.5 bits\n")
    assert "the float checkpoint `float`" in card.text.lower()
    assert "2.5 bits per weight on" in card.text  # (2 x 4 + 6 x 2) / 8
    assert "| bits per expert weight | 32 | 2.781 with scales and offsets |" in card.text  # 2.5 + 18 / 64
    assert "75.0% at 2, 25.0% at 4" in card.text
    assert "Rounding: least squares, errors of all columns count equally." in card.text
    before, after = map(float, re.search(r"all tensors, GiB \| (\S+) \| (\S+) ", card.text).groups())
    assert 0 < after < before
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    assert "AutoTokenizer" in code
    lines = [line for line in code.splitlines() if "okenizer" not in line]
    monkeypatch.chdir(out)
    names: dict = {}
    exec("from transformers import AutoModelForCausalLM\n" + "\n".join(lines), names)
    assert names["model"].is_quantized


def test_the_card_states_every_budget(made, tmp_path):
    source, _, out = made
    settings = {"method": "weight_error", "bits": (2, 8), "group_size": 64}
    quantize_checkpoint(source, allocate(source, total_gib=2.0, rest_gib=2 - 5e-5, **settings), out)
    assert "asked for 2 GiB in total of levels 2, 8" in ModelCard.load(out / "README.md").text


def test_the_bases_card_is_kept_below_and_comes_back(made, tmp_path):
    source, plan, out = made
    (source / "README.md").write_text(BASE)
    quantize_checkpoint(source, plan, out)
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.language) == ("apache-2.0", "en")
    assert card.data.tags[:2] == ["chat", "moe-precision"]
    assert card.data.eval_results is None  # they are the base's
    assert card.text.index("## How it was made") < card.text.index("# The base")
    assert card.text.endswith(BASE.partition("---\n# ")[2])
    assert (source / "README.md").read_text() == BASE
    dequantize_checkpoint(out, tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == BASE


@pytest.mark.slow
@pytest.mark.parametrize(
    "base", ["no front matter\n", "---\n: [\n---\ndamaged\n", "---\nlicense: [mit\n", "\ufeff---\n---\n"]
)
def test_any_card_of_the_base_is_kept(base, made, tmp_path):
    source, plan, out = made
    (source / "README.md").write_text(base, encoding="utf-8")
    quantize_checkpoint(source, plan, out)
    assert base.rstrip().splitlines()[-1] in (out / "README.md").read_text(encoding="utf-8")
    assert ModelCard.load(out / "README.md").data.library_name == "transformers"
    dequantize_checkpoint(out, tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8") == base


@pytest.mark.slow
@pytest.mark.parametrize(
    "base",
    [
        "Café: 100 % robusta\n".encode("latin-1"),
        b"---\r\nlicense: mit\r\n---\r\n# Lines end as on Windows\r\n",
        b"--- \nlicense: mit\n---\t\n# Spaces behind the rules\n",
        b"```yaml\nnot: front matter\n```\n\nbelow",
    ],
    ids=["not UTF-8", "CRLF", "spaces", "a block at the top"],
)
def test_a_card_of_the_base_comes_back_byte_for_byte(base, made, tmp_path):
    source, plan, out = made
    (source / "README.md").write_bytes(base)
    (source / "README.base.md").write_bytes(b"another file")
    quantize_checkpoint(source, plan, out)
    assert ModelCard.load(out / "README.md").data.library_name == "transformers"  # ours is UTF-8
    dequantize_checkpoint(out, tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_bytes() == base


def test_without_a_card_of_the_base_none_is_left_when_it_is_float_again(made, tmp_path):
    source, plan, out = made
    quantize_checkpoint(source, plan, out)
    dequantize_checkpoint(out, tmp_path / "again")
    assert not (tmp_path / "again" / "README.md").exists()


def test_the_name_on_the_hub_is_known_of_its_cache(made, tmp_path):
    source, plan, out = made
    snapshot = tmp_path / "models--some-org--Some-MoE" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    quantize_checkpoint(snapshot, plan, out)
    card = ModelCard.load(out / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("some-org/Some-MoE", "quantized")
    assert "[some-org/Some-MoE](https://huggingface.co/some-org/Some-MoE)" in card.text


@pytest.mark.slow
def test_distilling_is_noted(made, tmp_path):
    source, plan, out = made
    quantize_checkpoint(source, plan, out)
    batches = [{"input_ids": torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))}]
    found = distill_checkpoint(source, out, tmp_path / "distilled", batches, steps=1)
    text = (tmp_path / "distilled" / "README.md").read_text()
    assert f"- Distilled: scales and offsets trained for 1 steps, codes kept; {found.described()}." in text


def test_only_our_own_cards_are_added_to(tmp_path):
    assert not has_card(tmp_path)
    (tmp_path / "README.md").write_text("another")
    add_to_card(tmp_path, "a line")
    assert (tmp_path / "README.md").read_text() == "another"


@pytest.mark.slow
def test_pushing_a_packed_model_uploads_what_loads_again(made, monkeypatch, tmp_path):
    """A stand-in for the Hub's API keeps the files; the card that is on the Hub already stays."""
    source, plan, out = made
    quantize_checkpoint(source, plan, out)
    pushed = tmp_path / "pushed"

    class Hub:
        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, repo_id, operations, **_):
            for one in operations:
                target = pushed / one.path_in_repo
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(one.path_or_fileobj, "rb") as file:
                    target.write_bytes(file.read())

    monkeypatch.setattr(transformers.utils.hub, "hf_api", Hub)
    card = ModelCard.load(out / "README.md")  # as `hf upload` has left it there
    monkeypatch.setattr(ModelCard, "load", classmethod(lambda cls, repo_id, **_: card))
    load_model(out).push_to_hub("someone/packed")
    assert {file.name for file in pushed.iterdir()} >= {"README.md", "config.json", "model.safetensors"}
    assert "## How it was made" in (pushed / "README.md").read_text()
    again, packed = load_model(pushed).state_dict(), load_model(out).state_dict()
    assert again.keys() == packed.keys()
    assert all(torch.equal(again[name], packed[name]) for name in packed)
