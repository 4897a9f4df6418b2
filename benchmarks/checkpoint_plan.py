"""A plan from two checkpoints on disk: time against reading the same bytes, and peak memory.

    python -m benchmarks.checkpoint_plan

Generates two sharded Mixtral-shaped checkpoints of several GB. A plan from them reads the routers of both, and the gate
matrix of every expert of the second. Each plan is timed in turn with a loop that only reads exactly those tensors, with
the files dropped from the page cache before each round, and again with them in it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import MixtralConfig

from moe_precision import allocate

LAYERS, EXPERTS, WIDTH, HIDDEN, VOCABULARY = 8, 8, 2048, 5632, 32000
ROUNDS = 5


def write_checkpoint(folder: Path, seed: int, experts_from: Path | None = None) -> None:
    """One shard per layer and one for the rest; experts are linked from another checkpoint if there is one."""
    folder.mkdir()
    config = MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=EXPERTS,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        architectures=["MixtralForCausalLM"],
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.02).bfloat16()

    routers = {f"model.layers.{n}.block_sparse_moe.gate.weight": random(EXPERTS, WIDTH) for n in range(LAYERS)}
    rest = {"model.embed_tokens.weight": random(VOCABULARY, WIDTH), **routers}
    shards = {"rest.safetensors": list(rest)}
    save_file(rest, folder / "rest.safetensors", metadata={"format": "pt"})
    for layer in range(LAYERS):
        shard = f"layer-{layer}.safetensors"
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        shapes = {"w1": (HIDDEN, WIDTH), "w2": (WIDTH, HIDDEN), "w3": (HIDDEN, WIDTH)}
        names = [f"{prefix}.{expert}.{matrix}.weight" for expert in range(EXPERTS) for matrix in shapes]
        if experts_from is None:
            tensors = {name: random(*shapes[name.split(".")[-2]]) for name in names}
            save_file(tensors, folder / shard, metadata={"format": "pt"})
        else:
            os.link(experts_from / shard, folder / shard)
        shards[shard] = names
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_the_same_bytes(initial: Path, final: Path) -> int:
    """Reads what a plan needs, in the order of the files; returns the number of bytes."""
    total = 0
    for folder, wanted in ((initial, ".gate."), (final, ".gate."), (final, ".w1.")):
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt", backend="pread") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if wanted in name:
                        total += opened.get_tensor(name).nbytes
    return total


def drop_from_cache(*folders: Path) -> None:
    """Makes the kernel drop the files' pages."""
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def peak(code: str, *arguments: str) -> int:
    """Peak resident bytes of a separate process."""
    code += "\nprint(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return 1024 * int(done.stdout.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Prints ratios and bytes."""
    with tempfile.TemporaryDirectory() as base:
        initial, final = Path(base, "initial"), Path(base, "final")
        write_checkpoint(final, seed=1)
        write_checkpoint(initial, seed=2, experts_from=final)
        size = sum(file.stat().st_size for file in final.glob("*.safetensors"))
        read = read_the_same_bytes(initial, final)
        print(f"{size / 1e9:.2f} GB on disk, {read / 1e9:.2f} GB read for the plan, {torch.get_num_threads()} threads")
        for cache in ("cold", "warm"):
            times: dict[str, list[float]] = {"plan": [], "read": []}
            for _ in range(ROUNDS):
                for what, spent in times.items():
                    if cache == "cold":
                        drop_from_cache(initial, final)
                    start = time.perf_counter()
                    if what == "plan":
                        allocate(final, initial)
                    else:
                        read_the_same_bytes(initial, final)
                    spent.append(time.perf_counter() - start)
            plan, reading = (statistics.median(spent) for spent in times.values())
            ratio = statistics.median(p / r for p, r in zip(*times.values(), strict=True))
            print(
                f"page cache {cache}: plan {plan:.2f} s, reading {reading:.2f} s, ratio {ratio:.2f} ({ROUNDS} rounds)"
            )
        allocating = "import sys, moe_precision; moe_precision.allocate(sys.argv[2], sys.argv[1])"
        imports = peak("import moe_precision")
        of_plan = peak(allocating, str(initial), str(final))
        largest = 2 * VOCABULARY * WIDTH / 1e6
        print(f"peak {of_plan / 1e6:.0f} MB, of which the imports alone take {imports / 1e6:.0f} MB")
        bound = 2 * largest + 300
        print(f"bound, imports included: twice the largest tensor ({largest:.0f} MB) + 300 MB = {bound:.0f} MB")


if __name__ == "__main__":
    main()
