"""Peak memory while a checkpoint is quantized, against the packed model plus its two largest float layers.

    python -m benchmarks.memory

Generates a Mixtral checkpoint with random weights, quantizes it in a process of its own and reads that process's peak.
What the libraries take before any weight is read is measured the same way and left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_precision import allocate
from moe_precision.checkpoints import tensor_bytes

CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "vocab_size": 32000,
}

# Peak resident memory, split by the kernel into anonymous memory and pages of mapped files, which it can drop.
WORKER = """
import sys, threading, time
import torch, transformers, moe_precision
from moe_precision.streaming import quantize_checkpoint

def now():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024, int(fields["VmRSS"].split()[0]) * 1024

start, peak, done = now(), [0, 0], False
def watch():
    while not done:
        for i, value in enumerate(now()):
            peak[i] = max(peak[i], value)
        time.sleep(0.002)
thread = threading.Thread(target=watch, daemon=True); thread.start()
if len(sys.argv) > 1:
    quantize_checkpoint(*sys.argv[1:4])
done = True; thread.join()
import json
print(json.dumps({"anonymous": peak[0] - start[0], "resident": peak[1] - start[1]}))
"""


def main() -> None:
    """Prints the peak and its bound."""
    with tempfile.TemporaryDirectory() as folder:
        source, plan_path, out = (Path(folder, name) for name in ("float", "plan.json", "packed"))
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**CONFIG)).to(torch.bfloat16)
        allocate(model, average_bits=2.5, bits=(2, 3), group_size=128).save(plan_path)
        model.save_pretrained(source)
        del model
        command = [sys.executable, "-c", WORKER, str(source), str(plan_path), str(out)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        peak = json.loads(result.stdout.splitlines()[-1])
        packed = sum(tensor_bytes(out).values())
        layer = sum(size for name, size in tensor_bytes(source).items() if ".layers.0." in name)
        total = sum(tensor_bytes(source).values())
    bound = packed + 2 * layer
    rows = {
        "float checkpoint": total,
        "packed model": packed,
        "one float layer": layer,
        "bound: packed model and two float layers": bound,
        "peak of anonymous memory while quantizing": peak["anonymous"],
        "peak resident memory while quantizing": peak["resident"],
    }
    print("| what | MB | of the bound |\n|---|---|---|")
    for name, size in rows.items():
        print(f"| {name} | {size / 1e6:.0f} | {size / bound:.2f} |")


if __name__ == "__main__":
    main()
