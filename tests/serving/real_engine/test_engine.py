"""Packed checkpoints in the real vLLM: its features, several processes, folders that are wrong, and its server.

run.sh makes the models and says where they are. Each engine is a process of its own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from safetensors.torch import load, load_file, save_file

from tests.serving.real_engine.engine import ENVIRONMENT, in_a_child

MODELS = Path(os.environ["SERVING_MODELS"])
ALL = "4 of 4"


def run(family="mixtral", expected="expected.json", **options):
    folder = MODELS / family
    return in_a_child(folder, "packed", json.loads((folder / expected).read_text()), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": False},
        {"max_num_seqs": 1},
        {"expected": "long.json", "max_model_len": 128, "max_num_batched_tokens": 32, "enable_chunked_prefill": True},
        {"expected": "long.json", "max_model_len": 128, "block_size": 32, "enable_prefix_caching": True, "times": 2},
        {"additional_config": {"moe_precision_activations": "bfloat16"}},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}},
    ],
    ids=["compiled", "one by one", "chunked prefill", "prefix caching", "activations", "speculation by n-grams"],
)
def test_tokens_are_those_of_transformers(options):
    assert run(**options).startswith(ALL)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("experts", [False, True], ids=["tensor parallel", "expert parallel"])
def test_two_processes_give_the_tokens_of_one(family, experts, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    assert run(family, tensor_parallel_size=2, enable_expert_parallel=experts).startswith(ALL)


def test_parameters_that_vllm_has_under_two_names():
    assert run("dots1").startswith(ALL)


def test_a_bias_that_the_router_for_cpus_leaves_out_is_an_error():
    answer = run("ernie4_5_moe")
    assert "leaves out its correction bias" in answer, answer
    assert run("ernie4_5_moe", model_impl="transformers").startswith(ALL)


def test_rotary_positions_that_are_wrong_on_a_cpu_are_an_error():
    answer = run("deepseek_v3")
    assert "operator for rotary positions is wrong" in answer, answer
    assert run("deepseek_v3", compilation_config={"custom_ops": ["-rotary_embedding"]}).startswith(ALL)


def test_lora_on_attention():
    adapter = str(MODELS / "mixtral" / "adapter")
    lora = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj", "v_proj"]}
    assert run(expected="adapted.json", adapter=adapter, **lora).startswith(ALL)
    assert "LoRA on experts is not supported" in run(enable_lora=True, max_lora_rank=8)


def in_config(change):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def flip(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def without_checksums(folder):
    file = folder / "model.safetensors"
    save_file(load(file.read_bytes()), file, {"format": "pt"})


def second_checkpoint(folder):
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    save_file({"lm_head.weight": head.clone().zero_()}, folder / "other.safetensors", {"format": "pt"})


def bits(config):
    return next(iter(config["quantization_config"]["plan"]["layers"].values()))["projections"]["down_proj"]["bits"]


def swap(widths):
    widths[0], widths[1] = widths[1], widths[0]


WRONG = {
    "another version": (in_config(lambda c: c["quantization_config"].update(format_version=2)), "format version 2"),
    "another plan": (in_config(lambda c: swap(bits(c))), "does not belong to the config.json"),
    "another model": (in_config(lambda c: c.update(intermediate_size=64)), "the plan is for another model"),
    "other layers packed": (in_config(lambda c: c["quantization_config"].update(non_expert_bits=8)), "experts only"),
    "no config": (in_config(lambda c: c.pop("quantization_config")), "has no quantization_config of moe_precision"),
    "a flipped bit": (flip, "is damaged"),
    "no checksums": (without_checksums, "has no checksums"),
    "a second checkpoint": (second_checkpoint, "is in the checkpoint twice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_folder_is_our_own_error(name, tmp_path):
    change, message = WRONG[name]
    folder = Path(shutil.copytree(MODELS / "mixtral" / "packed", tmp_path / "packed"))
    change(folder)
    answer = in_a_child(tmp_path, "packed", {"prompts": [[5, 6, 7]], "packed": {"tokens": [[]], "leads": [[]]}})
    assert message in answer, answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_format": "dummy"}, "default load format"),
        ({"quantization": "fp8"}, "does not match"),
        ({"additional_config": {"moe_precision_activations": "int4"}}, "activations='int4'"),
    ],
)
def test_a_wrong_request_is_an_error(options, message):
    answer = run(**options)
    assert message in answer, answer


def test_float_weights_are_not_served_as_packed_ones():
    folder = MODELS / "mixtral"
    expected = json.loads((folder / "expected.json").read_text())
    answer = in_a_child(folder, "float", expected, quantization="moe_precision")
    assert "has no quantization_config of moe_precision" in answer, answer


def post(port, path, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.fixture
def server(tmp_path):
    """``moe-precision serve`` on loopback, until the test ends."""
    port, folder = 8123, str(MODELS / "mixtral" / "packed")
    options = ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", "64", "--gpu-memory-utilization", "0.2", "--served-model-name", "packed"]
    command = [sys.executable, "-m", "moe_precision", "serve", "--engine", "vllm", folder, *options]
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(600):
                assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(1)
            yield port
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def test_the_server_answers_with_the_tokens_of_transformers(server):
    expected = json.loads((MODELS / "mixtral" / "expected.json").read_text())
    for prompt, tokens in zip(expected["prompts"], expected["packed"]["tokens"], strict=True):
        body = {"model": "packed", "prompt": prompt, "max_tokens": len(tokens), "temperature": 0, "ignore_eos": True}
        answer = post(server, "/v1/completions", body | {"return_token_ids": True})
        assert answer["choices"][0]["token_ids"] == tokens
    choice = {"structured_outputs": {"regex": "[0-9]{6}"}, "max_tokens": 12, "temperature": 0}
    answer = post(server, "/v1/completions", {"model": "packed", "prompt": "a b", **choice})
    assert re.fullmatch("[0-9]{6}", answer["choices"][0]["text"])
