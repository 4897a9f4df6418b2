"""Speed of packed experts in vLLM against bfloat16 in the same engine, side by side.

    INSTALL_ONLY=1 tests/serving/real_engine/run.sh   # vLLM, in an environment of its own
    python -m benchmarks.serving [--rounds 5] [--device cuda --python PYTHON]

The generated Mixtral of `benchmarks.inference` (two layers, experts of 805 MB in bfloat16) is packed at 2 and 3 bits.
Two engines, one for each form, take the same requests in turn; a ratio is of one round, and the table has the median
ratio, with the least and the greatest. On a CPU each engine has one thread, and seconds are the process' own CPU time,
so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PYTHON = ".venv-serving/bin/python"
WIDTHS = "2 and 3 bits"
STEPS = 16  # of decoding, after the first token
SHAPES = {  # what is measured -> (requests at a time, tokens of a prompt)
    "decode, batch 1": (1, 8),
    "decode, batch 8": (8, 8),
    "prefill, 32 tokens": (1, 32),
    "prefill, 512 tokens": (1, 512),
}


def engine(folder: str, device: str) -> None:
    """One engine: answers each line of requests on stdin with the seconds that they took."""
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {"dtype": "bfloat16", "skip_tokenizer_init": True, "enable_prefix_caching": False}
    settings |= {"max_model_len": 1024, "gpu_memory_utilization": 0.2, "enforce_eager": device == "cpu"}
    clock = time.process_time if device == "cpu" else time.perf_counter
    model = LLM(folder, **settings)
    for line in sys.stdin:
        asked = json.loads(line)
        sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
        prompts: Any = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
        start = clock()
        model.generate(prompts, sampling, use_tqdm=False)
        print("SECONDS", clock() - start, flush=True)


class Engine:
    """An engine in a process of its own."""

    def __init__(self, python: str, folder: Path, device: str) -> None:
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        if device == "cpu":
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        command = [python, "-m", "benchmarks.serving", "--engine", str(folder), "--device", device]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | environment, **pipes)

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        """Sends requests and waits for all of them."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("SECONDS "):
                return float(line.split()[1])
        raise RuntimeError(f"the engine ended with status {self.process.wait()}; its messages are above")

    def measured(self, shape: str, seed: int) -> float:
        """Seconds of one shape: of `STEPS` steps of decoding, or of one prefill."""
        requests, length = SHAPES[shape]
        prompts = [
            [3 + (seed * 97 + row * 31 + place * 7) % 1000 for place in range(length)] for row in range(requests)
        ]
        if shape.startswith("prefill"):
            return self.seconds(prompts, 1)
        return self.seconds(prompts, 1 + STEPS) - self.seconds(prompts, 1)


def table(engines: dict[str, Engine], rounds: int) -> None:
    """Prints the median ratio of each shape."""
    print("| | times as fast as bf16 in vLLM | least | greatest |\n|---|---|---|---|", flush=True)
    for shape in SHAPES:
        ratios = []
        for turn in range(rounds + 1):
            took = {name: one.measured(shape, turn) for name, one in engines.items()}
            if turn:  # the first warms up
                ratios.append(took["bf16"] / took["packed"])
        print(f"| {shape} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--python", default=PYTHON, help=f"of an environment with vLLM (default {PYTHON})")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.engine:
        engine(options.engine, options.device)
        return
    if not Path(options.python).exists():
        parser.error(f"{options.python} is not there: INSTALL_ONLY=1 tests/serving/real_engine/run.sh makes it")
    from benchmarks.inference import make, quantize_ours

    with tempfile.TemporaryDirectory() as folder:
        source, packed = Path(folder) / "bf16", Path(folder) / "packed"
        make(source)
        quantize_ours(source, packed, WIDTHS)
        folders = {"bf16": source, "packed": packed}
        engines = {name: Engine(options.python, path, options.device) for name, path in folders.items()}
        try:
            table(engines, options.rounds)
        finally:
            for one in engines.values():
                one.process.kill()


if __name__ == "__main__":
    main()
