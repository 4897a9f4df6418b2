"""DynQuant beside ours: both record the same training run, both choose widths by what they saw, at equal stored bits.

    pip install -e '.[benchmarks]'
    python -m benchmarks.rivals [--run runs/demo]

The model of ``make demo`` is trained on for some steps by transformers' Trainer, with DynQuant's callback and
`RouterNormTrainerCallback`. DynQuant chooses a width for every module, ours one for every matrix of an expert. Compared
are the experts: those of DynQuant's model are put into the trained one, whose other weights stay float, and ours get as
many stored bits as they take by DynQuant's own count.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from benchmarks.studies.study_models import merged
from moe_precision import allocate, find_moe_layers, quantize_model
from moe_precision.callbacks import RouterNormTrainerCallback
from moe_precision.checkpoints import load_model
from moe_precision.judging.reference import Reference
from moe_precision.plans.beside import PlanFiles
from moe_precision.recipes import TextDataModule
from moe_precision.recording.curvature import Curvature
from moe_precision.recording.history import RouterNormHistory
from moe_precision.recording.statistics import ExpertStatistics

GROUP_SIZE = 64
TARGETS = (2.75, 3.25, 3.75)  # average bits of the whole model, by DynQuant's count
LEVELS = {"bits": (1, 2, 3, 4), "granularity": "expert+projection"}
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # settings, and which files they are given
    "ours, `auto`": ({"method": "auto", **LEVELS}, ("curvature", "statistics")),
    "ours, `curvature`": ({"method": "curvature", **LEVELS}, ("curvature",)),
    "the paper's rule, `router_norm`": ({"method": "router_norm", "bits": (2, 3, 4)}, ()),
}


def trained(checkpoint: Path, folder: Path, steps: int) -> tuple[Any, TextDataModule]:
    """The model after some more steps, recorded by both; files are left in ``folder/ours`` and ``folder/theirs``."""
    from dynquant import DynQuantCallback  # pip install -e '.[benchmarks]'

    model = load_model(checkpoint, dtype=torch.float32)
    data = TextDataModule(
        tokenizer=str(checkpoint), sequence_length=128, batch_size=8, max_train_tokens=1_500_000, max_val_tokens=60_000
    )
    data.setup()
    (folder / "theirs").mkdir()  # else DynQuant takes the path for that of a file
    arguments = TrainingArguments(
        str(folder / "ours"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        warmup_steps=steps // 10,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
    )
    ours = RouterNormTrainerCallback(group_size=GROUP_SIZE)
    rows = data.train_dataloader().dataset
    Trainer(model, arguments, train_dataset=rows, callbacks=[DynQuantCallback(folder / "theirs"), ours]).train()
    model.eval().save_pretrained(folder / "checkpoint")
    data.tokenizer.save_pretrained(folder / "checkpoint")
    return model, data


def theirs(model: nn.Module, folder: Path, target: float) -> tuple[Any, float]:
    """The trained model with DynQuant's experts, and the bits that one of their weights takes."""
    from dynquant.quant.pack import stored_bits

    out = folder / f"theirs_{target}"
    command = [sys.executable, "-m", "dynquant", "quantize", str(folder / "checkpoint"), "--output", str(out)]
    recorded = ["--stats", str(folder / "theirs"), "--moments", str(folder / "theirs")]
    sizes = ["--target", str(target), "--group-size", str(GROUP_SIZE), "--device", "cpu", "--dtype", "float32"]
    subprocess.run([*command, *recorded, *sizes, "--quiet"], check=True, capture_output=True)
    (found,) = json.loads((out / "dynquant_allocation.json").read_text(encoding="utf-8"))["maps"].values()
    quantized, result = load_model(out, dtype=torch.float32), copy.deepcopy(model)
    stored, weights = 0.0, 0
    with torch.no_grad():
        for layer in find_moe_layers(result):
            for bank in layer.banks.values():
                for weight in bank.weights:
                    weight.parameter().copy_(quantized.get_parameter(weight.name))
                    numel = weight.parameter().numel()
                    width = found["bits"][weight.name.removesuffix(".weight")]
                    stored += stored_bits(numel // weight.shape[-1], weight.shape[-1], width, group_size=GROUP_SIZE)
                    weights += numel
    return result, stored / weights


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of `make demo` (default runs/demo)")
    parser.add_argument("--steps", type=int, default=300, help="further training steps (default 300)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = trained(options.run / "checkpoint", folder, options.steps)
        reference = Reference(model, merged(data.val_dataloader()))
        files = PlanFiles.of(folder / "ours" / "precision_plan.json")
        curvature, statistics = Curvature.load(files.curvature), ExpertStatistics.load(files.statistics)
        print("| stored bits | | KL | loss | top-1 |\n|---|---|---|---|---|")
        for target in TARGETS:
            rival, bits = theirs(model, folder, target)
            rows = [("DynQuant", rival, bits)]
            known: dict[str, Any] = {"curvature": curvature, "statistics": statistics}
            for what, (settings, read) in METHODS.items():
                history = RouterNormHistory.load(files.history)
                given = {kind: known[kind] for kind in read}
                plan = allocate(model, history, stored_bits=bits, group_size=GROUP_SIZE, **settings, **given)
                rows.append((what, quantize_model(copy.deepcopy(model), plan, **known), plan.stored_bits))
            for what, quantized, stored in rows:
                found = reference.measure(quantized.eval())
                loss = float((found.losses - found.float_losses).double().mean())
                far = found.divergence
                print(f"| {stored:.2f} | {what} | {far.kl:.4f} | {loss:+.4f} | {far.top1:.3f} |", flush=True)


if __name__ == "__main__":
    main()
