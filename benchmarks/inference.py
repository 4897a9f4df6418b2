"""Speed and memory of a quantized Mixtral against bfloat16 and against other quantizers, side by side.

Long because it is one command: every peer, its process and the table in one file.

    pip install -e .[benchmarks]
    INSTALL_ONLY=1 tests/export/real_tools/run.sh autoround gptqmodel   # peers with their own pins
    python -m benchmarks.inference [--rows bf16 "ours, 2 and 3 bits"]

One generated model, whose experts are 805 MB in bfloat16, is quantized by each tool (round to nearest where it needs no
data, which does not change speed), saved, and loaded again in a separate process. There the model runs one token
(decode, batch 1) and 32 tokens (prefill), with one thread and with two. The bfloat16 model is measured first and last:
the difference between the two is the noise of the machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GROUP = 128
CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "vocab_size": 1024,
    "tie_word_embeddings": False,
}
WIDTHS = {"2 and 3 bits": [2, 3] * 4, "2, 3 and 4 bits": [2, 2, 3, 3, 3, 3, 4, 4], "2 bits": [2] * 8, "4 bits": [4] * 8}
PYTHON = {"AutoRound": ".venv-exports/autoround/bin/python", "GPTQModel": ".venv-exports/gptqmodel/bin/python"}


def make(folder: Path) -> None:
    """The bfloat16 model, a tokenizer, which some tools need, and a plan for each set of widths."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from moe_precision import allocate
    from moe_precision.recipes.text_data import train_tokenizer

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**CONFIG)).to(torch.bfloat16)
    model.save_pretrained(folder)
    train_tokenizer(["a few words for a tokenizer"], 300).save_pretrained(folder)
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=GROUP)
    for name, widths in WIDTHS.items():
        for layer in plan.layers.values():
            for bits in layer.projection_bits.values():
                bits[:] = widths
        plan.save(folder / f"{name}.plan")


# -- each way: quantize `source` into `folder`, and load what is there ------------------------------------------------


def quantize_ours(source: Path, folder: Path, widths: str, non_expert_bits: int | None = None) -> None:
    from moe_precision.quantize.writer import quantize_checkpoint

    quantize_checkpoint(source, source / f"{widths}.plan", folder, non_expert_bits=non_expert_bits)


def load_ours(folder: Path, widths: str, only: str = "") -> Any:
    from moe_precision.checkpoints.checkpoint import load_model
    from moe_precision.quantize import kernels

    if only:
        kernels.KERNELS = tuple(kernel for kernel in kernels.KERNELS if kernel.name == only)
        sys.modules["moe_precision.quantize.kernels.ark"].is_intel = lambda: True  # type: ignore[attr-defined]
    return load_model(folder)


def load_bf16(folder: Path, widths: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def quantize_autoround(source: Path, folder: Path, widths: str) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moe_precision import PrecisionPlan
    from moe_precision.export import export

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config = export(PrecisionPlan.load(source / f"{widths}.plan"), "autoround").config
    rtn = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
    rounder = AutoRound(
        model, AutoTokenizer.from_pretrained(source), bits=4, group_size=GROUP, layer_config=config, **rtn
    )
    rounder.quantize_and_save(str(folder), format="auto_round")


def load_autoround(folder: Path, widths: str) -> Any:
    from transformers import AutoModelForCausalLM

    (config,) = folder.glob("**/config.json")
    return AutoModelForCausalLM.from_pretrained(config.parent, dtype=torch.bfloat16)


def quantize_gptqmodel(source: Path, folder: Path, widths: str) -> None:
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import RTNConfig

    from moe_precision import PrecisionPlan
    from moe_precision.export import export

    plan = PrecisionPlan.load(source / f"{widths}.plan")
    config = RTNConfig(bits=4, group_size=GROUP, sym=True, dynamic=export(plan, "gptqmodel").config)
    model = GPTQModel.load(str(source), config, device="cpu")
    model.quantize(None)
    model.save(str(folder))


def load_gptqmodel(folder: Path, widths: str) -> Any:
    from gptqmodel import GPTQModel

    return GPTQModel.load(str(folder), device="cpu").model


def unfused(folder: Path) -> Any:
    """The bfloat16 model with one ``nn.Linear`` per matrix, for tools that quantize nothing else."""
    model = load_bf16(folder, "")
    for layer in model.model.layers:
        layer.mlp.experts = Unfused(layer.mlp.experts)
    return model


class Unfused(torch.nn.Module):
    """Experts as lists of linear layers, one expert at a time."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.act_fn = fused.act_fn
        for name in ("gate_up_proj", "down_proj"):
            layers = []
            for weight in getattr(fused, name).detach():
                layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
                layers.append(layer)
            self.add_module(name, torch.nn.ModuleList(layers))

    def forward(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in top_k_index.unique().tolist():
            token, place = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = self.gate_up_proj[expert](x[token]).chunk(2, dim=-1)
            result = self.down_proj[expert](self.act_fn(gate) * up) * top_k_weights[token, place, None]
            out.index_add_(0, token, result.to(out.dtype))
        return out


def load_hqq(folder: Path, widths: str) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = unfused(folder)
    for layer in model.model.layers:
        for matrices in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            for expert, bits in enumerate(WIDTHS[widths]):
                config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
                config["weight_quant_params"]["optimize"] = False  # minutes; the speed afterwards is the same
                matrices[expert] = HQQLinear(
                    matrices[expert], config, compute_dtype=torch.bfloat16, device="cpu", del_orig=True
                )
    return model


def load_quanto(folder: Path, widths: str) -> Any:
    from optimum.quanto import freeze, qint2, qint4, quantize

    model = unfused(folder)
    for expert, bits in enumerate(WIDTHS[widths]):
        quantize(model, weights={2: qint2, 4: qint4}[bits], include=[f"*experts.*_proj.{expert}"])
    freeze(model)
    return model


Way = tuple[Callable[..., None] | None, Callable[..., Any], dict[str, str]]
WAYS: dict[str, Way] = {
    "bf16": (None, load_bf16, {}),
    "ours": (quantize_ours, load_ours, {}),
    "ours, torch int4": (quantize_ours, load_ours, {"only": "torch int4"}),
    "ours, ARK": (quantize_ours, load_ours, {"only": "ARK"}),
    "AutoRound": (quantize_autoround, load_autoround, {}),
    "GPTQModel": (quantize_gptqmodel, load_gptqmodel, {}),
    "HQQ": (None, load_hqq, {}),
    "quanto": (None, load_quanto, {}),
    "bf16 again": (None, load_bf16, {}),
}
ROWS = {  # way -> widths that it is measured at
    "bf16": ["4 bits"],
    "ours": list(WIDTHS),
    "ours, torch int4": ["2 and 3 bits"],
    "ours, ARK": ["2 and 3 bits", "4 bits"],
    "AutoRound": ["2, 3 and 4 bits", "2 bits", "4 bits"],
    "GPTQModel": ["2, 3 and 4 bits", "2 bits", "4 bits"],
    "HQQ": ["2, 3 and 4 bits", "2 bits", "4 bits"],
    "quanto": ["2 bits", "4 bits"],
    "bf16 again": ["4 bits"],
}


# -- in a separate process ------------------------------------------------------------------------------------------


def memory() -> tuple[int, int]:
    """Anonymous memory of this process now, and the most it ever had resident, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def median_time(function: Callable[[], Any], seconds: float = 3.0) -> float:
    """Median over repeats, after two that are not counted."""
    function()
    function()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def held_bytes(module: torch.nn.Module) -> int:
    """Bytes of the tensors that a module itself holds, as parameters, buffers or attributes."""
    values = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    return sum(tensor_bytes(value) for value in values if isinstance(value, torch.Tensor))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of those inside a subclass."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


@torch.inference_mode()
def run(way: str, widths: str, folder: Path) -> dict[str, Any]:
    """Loads and times a model; seconds and bytes."""
    importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    before, _ = memory()
    start = time.perf_counter()
    _, load, options = WAYS[way]
    model = load(folder, widths, **options).eval()
    found: dict[str, Any] = {"load": time.perf_counter() - start}
    tokens = torch.randint(3, CONFIG["vocab_size"], (1, 32), generator=torch.Generator().manual_seed(0))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found[f"decode {threads}"] = median_time(lambda: model(input_ids=tokens[:, :1], use_cache=False))
        found[f"prefill {threads}"] = median_time(lambda: model(input_ids=tokens, use_cache=False))
    found["experts"] = sum(held_bytes(m) for name, m in model.named_modules() if ".experts" in name)
    found["resident"] = memory()[0] - before
    return found


def quantize(way: str, widths: str, source: Path, folder: Path) -> dict[str, Any]:
    """Quantizes and saves; seconds and bytes."""
    make_it = WAYS[way][0]
    assert make_it is not None
    before = memory()[1]
    start = time.perf_counter()
    make_it(source, folder, widths)
    return {"seconds": time.perf_counter() - start, "peak": memory()[1] - before}


# -- all of them -------------------------------------------------------------------------------------------------------


def in_process(way: str, *arguments: str) -> dict[str, Any]:
    """The last line that a process with the tool's own Python prints."""
    python = PYTHON.get(way, sys.executable)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, "-m", "benchmarks.inference", "--in-process", way, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise RuntimeError(reason[:160])
    return json.loads(result.stdout.strip().splitlines()[-1])


def main(only: list[str]) -> None:
    """Prints the tables."""
    rows, quantizing, failed = [], [], []
    weights = CONFIG["num_hidden_layers"] * 8 * 3 * CONFIG["hidden_size"] * CONFIG["intermediate_size"]
    float_gb = 2 * weights / 1e9
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "bf16")
        make(source)
        made: dict[tuple[Any, str], Path] = {}
        for way, widths in [(one, widths) for one, measured in ROWS.items() for widths in measured]:
            name = way if way.startswith("bf16") else f"{way}, {widths}"
            if only and name not in only and way not in only and way != "bf16":
                continue
            try:
                folder, key = source, (WAYS[way][0], widths)
                if WAYS[way][0] is not None:
                    if key not in made:
                        out = Path(temporary, name.replace(" ", "_"))
                        quantizing.append((name, in_process(way, widths, str(source), str(out))))
                        made[key] = out
                    folder = made[key]
                rows.append((name, in_process(way, widths, str(folder))))
            except (RuntimeError, FileNotFoundError) as error:
                failed.append(f"{name}: {error}")
            print(name, file=sys.stderr, flush=True)
    _print(rows, quantizing, failed, float_gb)


def _print(
    rows: list[tuple[str, dict]], quantizing: list[tuple[str, dict]], failed: list[str], float_gb: float
) -> None:
    base = dict(rows).get("bf16")
    print(f"experts {1e3 * float_gb:.0f} MB in bfloat16; group {GROUP}; times in ms, in brackets as a ratio to bf16\n")
    head = ["model", "load, s", "experts MB", "process MB", "decode, 1 thread", "2", "prefill 32, 1 thread", "2"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, row in rows:
        cells = [name, f"{row['load']:.1f}", f"{row['experts'] / 1e6:.0f}", f"{row['resident'] / 1e6:.0f}"]
        for what in ("decode", "prefill"):
            for threads in (1, 2):
                key = f"{what} {threads}"
                ratio = "" if base is None else f" [{row[key] / base[key]:.2f}]"
                cells.append(f"{1e3 * row[key]:.1f}{ratio}")
        print("| " + " | ".join(cells) + " |")
    print(
        "\n| quantized by | s | GB of bfloat16 experts per minute and core | peak MB beyond imports |\n"
        "|---|---|---|---|"
    )
    for name, done in quantizing:
        print(f"| {name} | {done['seconds']:.1f} | {30 * float_gb / done['seconds']:.2f} | {done['peak'] / 1e6:.0f} |")
    for text in failed:
        print(f"\nleft out: {text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[], help="only these rows or ways")
    parser.add_argument("--in-process", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        way, widths, first, *rest = options.in_process
        answer = quantize(way, widths, Path(first), Path(rest[0])) if rest else run(way, widths, Path(first))
        print(json.dumps(answer))
    else:
        main(options.rows)
