"""Ours, AutoRound, GPTQModel, llm-compressor, HQQ and llama.cpp on one model, each by the real tool: KL and seconds.

    python -m benchmarks.peers ours [--run runs/demo]
    INSTALL_ONLY=1 tests/export/real_tools/run.sh autoround gptqmodel llm_compressor
    .venv-exports/autoround/bin/python -m benchmarks.peers autoround
    .venv-exports/gptqmodel/bin/python -m benchmarks.peers gptqmodel
    .venv-exports/llm_compressor/bin/python -m benchmarks.peers llm_compressor
    pip install -e '.[benchmarks]' && python -m benchmarks.peers hqq
    moe-precision fit --config pretrain_mixtral --trainer.default_root_dir runs/larger ...    # see docs/benchmarks.md
    python -m benchmarks.peers llama_cpp --run runs/larger    # builds llama.cpp once, as benchmarks.llama_cpp does

RUN may also be a folder of the study, such as runs/study/uneven/seed_0: then uniform widths alone are measured.
All tune on the training split of the run's text. Stored bits are counted from the bytes of the files. Other text is
Python's language reference, which neither training nor tuning has seen. Each checkpoint is measured in a process of its
own, which loads the float model first: AutoRound changes transformers for the whole process.
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

from benchmarks.peer_tools import auto_round, gptqmodel, hqq, llama_cpp, llm_compressor, loaded
from benchmarks.studies.study_models import language_reference, merged
from moe_precision import PrecisionPlan, allocate, distill_checkpoint, quantize_checkpoint
from moe_precision.checkpoints import Checkpoint, load_model
from moe_precision.judging.reference import Reference
from moe_precision.plans.beside import PlanFiles
from moe_precision.recipes import TextDataModule

GROUP_SIZE = 64
TUNING_TOKENS = 65_536
BLOCK = 128
TOOLS = {
    "autoround": ("AutoRound", auto_round),
    "gptqmodel": ("GPTQModel", gptqmodel),
    "llm_compressor": ("llm-compressor GPTQ", llm_compressor),
    "hqq": ("HQQ", hqq),
}


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
    packed = loaded(Path(checkpoint), Path(folder))
    found: dict[str, float] = {}
    for name, reference in references.items():
        result = reference.measure(packed)
        found[f"KL, {name}"] = result.divergence.kl
        if name == "own":
            found["loss"] = float((result.losses - result.float_losses).double().mean())
            found["top-1"] = result.divergence.top1
    return found


def compare(tool: str, run: Path) -> None:
    """Prints a tool's rows of the table, one at a time."""
    checkpoint = run / "checkpoint"
    files = PlanFiles.of(run / "precision_plan.json")
    known: dict[str, Any] = {"curvature": files.curvature, "statistics": files.statistics}
    training = list(text_of(str(checkpoint), max_train_tokens=1_500_000).train_dataloader())
    blocks = [row for batch in training for row in batch["input_ids"]][: TUNING_TOKENS // BLOCK]

    def uniform(bits: int) -> PrecisionPlan:
        return allocate(checkpoint, method="uniform", average_bits=bits, group_size=GROUP_SIZE)

    def by_statistics(bits: float, levels: tuple[int, ...] = (1, 2, 3, 4)) -> PrecisionPlan:
        return allocate(checkpoint, method="statistics", average_bits=bits, bits=levels, group_size=GROUP_SIZE, **known)

    def by(tool: Callable[..., None]) -> Callable[[PrecisionPlan, Path], None]:
        return lambda plan, out: tool(checkpoint, plan, out, blocks)

    def ours(plan: PrecisionPlan, out: Path) -> None:
        quantize_checkpoint(checkpoint, plan, out, **known)

    def distilled(through: Any, plan: PrecisionPlan, out: Path) -> None:
        ours(plan, out.with_name("undistilled"))
        distill_checkpoint(checkpoint, out.with_name("undistilled"), out, training, through=through)

    layers, logits = partial(distilled, "layers"), partial(distilled, "logits")
    two_and_three = partial(by_statistics, 2.5, (2, 3))
    one_and_a_half, two = partial(by_statistics, 1.5), partial(by_statistics, 2.0)
    rows: dict[str, list[tuple[str, Callable[[], PrecisionPlan], Callable[[PrecisionPlan, Path], None]]]] = {
        name: [
            (f"{what}, 2 bits", partial(uniform, 2), by(tool)),
            (f"{what}, 3 bits", partial(uniform, 3), by(tool)),
            (f"{what}, our plan of 2 and 3 bits", two_and_three, by(tool)),
        ]
        for name, (what, tool) in TOOLS.items()
    } | {
        "llama_cpp": [
            (f"llama.cpp, {kind} with importance matrix", partial(uniform, 2), by(partial(llama_cpp, kind)))
            for kind in ("iq2_xs", "iq2_s", "q2_K", "iq3_xxs", "q3_K")
        ],
        "ours": [
            ("ours, 2 bits", partial(uniform, 2), ours),
            ("ours, 3 bits", partial(uniform, 3), ours),
            ("ours, 2 bits, distilled by layer", partial(uniform, 2), layers),
            ("ours, our plan of 2 and 3 bits", two_and_three, ours),
            ("ours, plan of 1.5 bits", one_and_a_half, ours),
            ("ours, plan of 1.5 bits, distilled by layer", one_and_a_half, layers),
            ("ours, plan of 1.5 bits, distilled by logits", one_and_a_half, logits),
            ("ours, plan of 2 bits", two, ours),
            ("ours, plan of 2 bits, distilled by layer", two, layers),
            ("ours, plan of 2 bits, distilled by logits", two, logits),
            ("ours, plan of 2.5 bits, distilled by layer", partial(by_statistics, 2.5), layers),
        ],
    }
    print("| quantizer | stored bits | KL, own text | KL, other text | loss | top-1 | plan, s | quantize, s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, make, quantize in rows[tool]:
        if not files.statistics.is_file() and getattr(make, "func", None) is not uniform:
            continue  # a folder of the study, where there is no plan by statistics
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
    parser.add_argument("tool", nargs="?", default="ours", choices=["ours", *TOOLS, "llama_cpp"])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of `make demo`")
    parser.add_argument("--measure", nargs=2, metavar=("FLOAT", "QUANTIZED"), help="only measure, and print JSON")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measured(*options.measure)))
        return
    compare(options.tool, options.run)


if __name__ == "__main__":
    main()
