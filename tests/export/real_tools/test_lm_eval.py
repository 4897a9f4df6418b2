"""lm-evaluation-harness runs a packed model through its ``hf`` model type after one import, on a local task."""

import json
import math
import sysconfig
from pathlib import Path

import torch
from transformers import AutoTokenizer

from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.quantize.writer import quantize_checkpoint
from tests.support.models import fresh_python

RUN = "import sys, moe_precision\nfrom lm_eval.__main__ import cli_evaluate\ncli_evaluate()"
TASK = """
task: local_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
"""


def test_byte_perplexity_is_that_of_the_packed_model(checkpoint, plan, tmp_path):
    quantize_checkpoint(checkpoint, plan, tmp_path / "packed")
    text = Path(sysconfig.get_paths()["stdlib"], "bisect.py").read_text(encoding="utf-8")[:1000]
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_text.yaml").write_text(TASK.format(data=tmp_path / "text.jsonl"))
    arguments = ["run", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'packed'},dtype=float32"]
    arguments += ["--tasks", "local_text", "--include_path", str(tmp_path / "tasks"), "--device", "cpu"]
    fresh_python(RUN, *arguments, "--batch_size", "1", "--output_path", str(tmp_path / "out"))
    (results,) = (tmp_path / "out").glob("**/results*.json")
    got = json.loads(results.read_text())["results"]["local_text"]["byte_perplexity,none"]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "packed")
    model = load_model(tmp_path / "packed", dtype="float32")
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids])[None]
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    assert math.isclose(got, math.exp(nats / len(text.encode())), rel_tol=1e-3)
