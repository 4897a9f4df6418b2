"""Ours beside AutoRound on the demo's model, each carried out by the real tool, by KL to the float model and seconds.

    INSTALL_ONLY=1 tests/export/real_tools/run.sh autoround
    .venv-exports/autoround/bin/python -m benchmarks.peers [--run runs/demo]

Both tune on the training split of the run's text. Stored bits are counted from the bytes of the files. Other text is
Python's language reference, which neither training nor tuning has seen. AutoRound's checkpoints are measured in a
process of their own, which loads the float model first: AutoRound changes transformers for the whole process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.study_models import language_reference, merged
from moe_precision import PrecisionPlan, allocate, distill_checkpoint, quantize_checkpoint
from moe_precision.checkpoints import Checkpoint, load_model
from moe_precision.export.auto_round_backend import quantize_with_auto_round
from moe_precision.judging.reference import Reference
from moe_precision.plans.beside import PlanFiles
from moe_precision.recipes import TextDataModule

GROUP_SIZE = 64
TUNING_TOKENS = 65_536
BLOCK = 128
ITERATIONS = 200


def text_of(checkpoint: str, **settings: Any) -> Any:
    """A text in the checkpoint's tokens, set up."""
    data = TextDataModule(tokenizer=checkpoint, sequence_length=BLOCK, batch_size=8, max_val_tokens=60_000, **settings)
    data.setup("validate")
    return data


def measured(checkpoint: str, folder: str) -> dict[str, float]:
    """A quantized checkpoint beside the float one, on both texts."""
    model = load_model(checkpoint, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as topics:
        texts = {"own": text_of(checkpoint), "other": text_of(checkpoint, dataset=language_reference(Path(topics)))}
        references = {name: Reference(model, merged(text.val_dataloader())) for name, text in texts.items()}
    packed = load_model(folder, dtype=torch.float32)
    found: dict[str, float] = {}
    for name, reference in references.items():
        result = reference.measure(packed)
        found[f"KL, {name}"] = result.divergence.kl
        if name == "own":
            found["loss"] = float((result.losses - result.float_losses).double().mean())
            found["top-1"] = result.divergence.top1
    return found


def compare(run: Path) -> None:
    """Prints the table, a row at a time."""
    checkpoint = run / "checkpoint"
    files = PlanFiles.of(run / "precision_plan.json")
    known: dict[str, Any] = {"curvature": files.curvature, "statistics": files.statistics}
    training = list(text_of(str(checkpoint), max_train_tokens=1_500_000).train_dataloader())
    blocks = [row for batch in training for row in batch["input_ids"]][: TUNING_TOKENS // BLOCK]

    def uniform(bits: int) -> PrecisionPlan:
        return allocate(checkpoint, method="uniform", average_bits=bits, group_size=GROUP_SIZE)

    def by_statistics(bits: float, levels: tuple[int, ...] = (1, 2, 3, 4)) -> PrecisionPlan:
        return allocate(checkpoint, method="statistics", average_bits=bits, bits=levels, group_size=GROUP_SIZE, **known)

    def auto_round(plan: PrecisionPlan, out: Path) -> None:
        quantize_with_auto_round(checkpoint, plan, out, blocks, ITERATIONS)

    def ours(plan: PrecisionPlan, out: Path) -> None:
        quantize_checkpoint(checkpoint, plan, out, **known)

    def distilled(through: Any, plan: PrecisionPlan, out: Path) -> None:
        ours(plan, out.with_name("undistilled"))
        distill_checkpoint(checkpoint, out.with_name("undistilled"), out, training, through=through)

    layers, logits = partial(distilled, "layers"), partial(distilled, "logits")
    rows: list[tuple[str, Callable[[], PrecisionPlan], Callable[[PrecisionPlan, Path], None]]] = [
        ("AutoRound, 2 bits", partial(uniform, 2), auto_round),
        ("AutoRound, 3 bits", partial(uniform, 3), auto_round),
        ("AutoRound, our plan of 2 and 3 bits", partial(by_statistics, 2.5, (2, 3)), auto_round),
        ("ours, 2 bits", partial(uniform, 2), ours),
        ("ours, 3 bits", partial(uniform, 3), ours),
        ("ours, 2 bits, distilled by layer", partial(uniform, 2), layers),
        ("ours, plan of 1.5 bits", partial(by_statistics, 1.5), ours),
        ("ours, plan of 1.5 bits, distilled by layer", partial(by_statistics, 1.5), layers),
        ("ours, plan of 1.5 bits, distilled by logits", partial(by_statistics, 1.5), logits),
        ("ours, plan of 2 bits", partial(by_statistics, 2.0), ours),
        ("ours, plan of 2 bits, distilled by layer", partial(by_statistics, 2.0), layers),
        ("ours, plan of 2 bits, distilled by logits", partial(by_statistics, 2.0), logits),
        ("ours, plan of 2.5 bits, distilled by layer", partial(by_statistics, 2.5), layers),
    ]
    print("| quantizer | stored bits | KL, own text | KL, other text | loss | top-1 | plan, s | quantize, s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, make, quantize in rows:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "out")
            start = time.perf_counter()
            plan = make()
            planned = time.perf_counter()
            quantize(plan, out)
            times = f"{planned - start:.0f} | {time.perf_counter() - planned:.0f}"
            command = [sys.executable, "-m", "benchmarks.peers", "--measure", str(checkpoint), str(out)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(printed.splitlines()[-1])
            bits = Checkpoint(out).stored_bits_per_expert_weight(plan)
        kls = f"{found['KL, own']:.4f} | {found['KL, other']:.4f}"
        print(f"| {name} | {bits:.2f} | {kls} | {found['loss']:+.4f} | {found['top-1']:.3f} | {times} |", flush=True)


def main() -> None:
    """Compares, or measures one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of `make demo`")
    parser.add_argument("--measure", nargs=2, metavar=("FLOAT", "QUANTIZED"), help="only measure, and print JSON")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measured(*options.measure)))
        return
    compare(options.run)


if __name__ == "__main__":
    main()
