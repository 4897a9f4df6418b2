"""Peak memory while a checkpoint is quantized and while the packed one is loaded.

    python -m benchmarks.memory

Generates a Mixtral checkpoint with random weights, does each in a separate process and reads that process's peak. What
the libraries take before any weight is read is measured the same way and subtracted.
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
from moe_precision.checkpoints import Checkpoint

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
import transformers.models.mixtral.modeling_mixtral
from moe_precision.checkpoints import load_model
from moe_precision.quantize.writer import quantize_checkpoint

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
if sys.argv[1] == "quantize":
    quantize_checkpoint(*sys.argv[2:5])
else:
    load_model(sys.argv[2])
done = True; thread.join()
import json
print(json.dumps({"anonymous": peak[0] - start[0], "resident": peak[1] - start[1]}))
"""


def measured(*arguments: str) -> dict[str, int]:
    """Peaks of a process, in bytes beyond its imports."""
    result = subprocess.run([sys.executable, "-c", WORKER, *arguments], check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Prints peaks and bounds."""
    with tempfile.TemporaryDirectory() as folder:
        source, plan_path, out = (Path(folder, name) for name in ("float", "plan.json", "packed"))
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**CONFIG)).to(torch.bfloat16)
        allocate(model, average_bits=2.5, bits=(2, 3), group_size=128).save(plan_path)
        model.save_pretrained(source)
        del model
        peak = measured("quantize", str(source), str(plan_path), str(out))
        loading = measured("load", str(out))
        packed, checkpoint = Checkpoint(out).nbytes, Checkpoint(source)
        layer = sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if ".layers.0." in name)
        total = checkpoint.nbytes
    print("| what | MB |\n|---|---|")
    print(f"| float checkpoint | {total / 1e6:.0f} |")
    print(f"| one float layer | {layer / 1e6:.0f} |")
    print(f"| bound while quantizing: two float layers and 500 MB | {2 * layer / 1e6 + 500:.0f} |")
    print(f"| peak resident memory while quantizing | {peak['resident'] / 1e6:.0f} |")
    print(f"| packed model | {packed / 1e6:.0f} |")
    print(
        f"| peak resident memory while loading it, files that are mapped included | {loading['resident'] / 1e6:.0f} |"
    )
    print(f"| the same as a share of the packed model | {loading['resident'] / packed:.2f} |")
    print(f"| of it anonymous | {loading['anonymous'] / 1e6:.0f} |")


if __name__ == "__main__":
    main()
