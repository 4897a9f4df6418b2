"""``moe-precision serve`` becomes an engine's server."""

import sys

import pytest

from moe_precision import allocate, quantize_model
from moe_precision.cli import main, serve
from moe_precision.serving.errors import ServingError
from tests.support.models import build


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    model = build("mixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=16)
    quantize_model(model, allocate(model, method="uniform", average_bits=2, group_size=32)).save_pretrained(folder)
    return str(folder)


def test_each_engine_is_started_as_it_wants(packed, monkeypatch):
    became = []
    monkeypatch.setattr(serve.os, "execv", lambda path, command: became.append((path, command)))
    monkeypatch.setattr(serve, "find_spec", lambda name: True)
    assert main(["serve", packed, "--port", "8001"]) == 0
    assert main(["serve", "--engine", "transformers", packed, "--port", "8001"]) == 0
    module = ["-m", "vllm.entrypoints.openai.api_server", "--model", packed, "--port", "8001"]
    assert became[0] == (sys.executable, [sys.executable, *module])
    assert became[1][1][1] == "-c"
    assert became[1][1][2].startswith("import moe_precision;")
    assert became[1][1][3:] == ["serve", packed, "--port", "8001"]


def test_the_first_engine_that_is_there_serves(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: name == "fastapi")
    assert serve.chosen_engine(None) == "transformers"
    with pytest.raises(ServingError, match=r'vllm cannot serve here.*pip install "moe-precision\[vllm\]"'):
        serve.chosen_engine("vllm")


def test_a_checkpoint_that_is_not_packed_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: True)
    monkeypatch.setattr(serve.os, "execv", lambda path, command: pytest.fail("started"))
    build("mixtral", hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    assert main(["serve", str(tmp_path)]) == 2
    assert "no quantization_config of moe_precision" in capsys.readouterr().err
