"""The synthetic data of the paper's theorems (arXiv 2604.06515): why the rule works, and when it fades.

    python -m benchmarks.studies.theory --output runs/theory

Two classes; a sample is a set of tokens of which one is relevant: one of two tokens of its class, a frequent and a rare
one. A two-layer mixture of experts with expert-choice routing learns to distinguish the classes by SGD on the hinge
loss; each expert starts aligned to one relevant token. At the moment when the data is learned, experts of rare tokens
have changed their router's norm least; with much longer training, the difference fades. Whether they also need the most
bits depends on the quantizer. Takes under a minute on a CPU.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from benchmarks.studies.quantizers import least_squares, rtn
from moe_precision.files import replaced_when_done
from moe_precision.judging.simulation import Quantizer
from moe_precision.judging.statistics import mean_of_runs
from moe_precision.present.tables import show
from moe_precision.quantize.codec.fitting import quantize_matrix
from moe_precision.quantize.kernels import scaled
from moe_precision.recording.signals import router_norm_change

WIDTH = 128  # of a token
TOKENS = 8  # in a sample
NEURONS = 16  # of an expert
CHOSEN = 2  # tokens that an expert takes from a sample
BATCH = 64
TESTED = 2000  # samples, as many of each relevant token
EXPERT_RATE, ROUTER_RATE = 0.05 * NEURONS, 0.01 * NEURONS
ROUTER_NOISE, EXPERT_SCALE = 0.1, 2.0
MOST_STEPS = 3000
LONGER = 20  # times as many steps, past the moment of learning
CLASS = torch.tensor([1.0, 1.0, -1.0, -1.0])  # of the four relevant tokens
RARE = torch.tensor([False, True, False, True])
PLANS = {"rare 3 bits, frequent 1": (3, 1), "rare 1 bit, frequent 3": (1, 3), "all 2 bits": (2, 2)}
QUANTIZERS: dict[str, Quantizer] = {
    "round to nearest": rtn,
    "least squares": least_squares,
    "unbiased gain": quantize_matrix,
}


@dataclass
class Mixture:
    """Eight experts, two for each relevant token.

    Attributes:
        router: ``(E, d)``.
        experts: ``(E, m, d)``.
        signs: Output sign of each expert, fixed, ``(E,)``.
        rare: Which experts start aligned to a rare token, ``(E,)``.
    """

    router: Tensor
    experts: Tensor
    signs: Tensor
    rare: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        """Score of each sample, ``(B,)``, for tokens ``(B, T, d)``: its sign is the class."""
        chosen = (tokens @ self.router.T).transpose(1, 2).topk(CHOSEN, dim=-1)  # (B, E, k): experts choose tokens
        gates = chosen.values.softmax(-1)  # (B, E, k)
        index = chosen.indices.unsqueeze(-1).expand(-1, -1, -1, WIDTH)
        taken = tokens.unsqueeze(1).expand(-1, len(self.router), -1, -1).gather(2, index)  # (B, E, k, d)
        hidden = torch.einsum("bekd,emd->bekm", taken, self.experts).relu().mean(-1)  # (B, E, k)
        return (self.signs * (gates * hidden).sum(-1)).sum(-1)

    def quantized(self, rare_bits: int, frequent_bits: int, quantizer: Quantizer) -> "Mixture":
        """This mixture with experts quantized, one group per neuron; the router is left alone."""
        bits = [rare_bits if rare else frequent_bits for rare in self.rare]
        pairs = zip(self.experts, bits, strict=True)
        experts = [scaled(*quantizer(expert.detach(), width, WIDTH, None)) for expert, width in pairs]
        return Mixture(self.router, torch.stack(experts), self.signs, self.rare)


@dataclass
class Moment:
    """Measurements at one moment of training.

    Attributes:
        step: SGD steps taken.
        auc: Chance that an expert of a frequent token has changed its router norm more than one of a rare token.
        errors: Quantizer and plan -> share of misclassified test samples, as many of each relevant token.
    """

    step: int
    auc: float
    errors: dict[str, float]


@dataclass
class Run:
    """One seed.

    Attributes:
        learned: When all test samples were classified correctly for the first time.
        later: After `LONGER` times as many steps.
        steps: Of the curve.
        changes: Change of every router norm at these steps, ``(steps, E)``.
        rare: As in `Mixture`.
    """

    learned: Moment
    later: Moment
    steps: list[int] = field(default_factory=list)
    changes: list[list[float]] = field(default_factory=list)
    rare: list[bool] = field(default_factory=list)


def sample(vocabulary: Tensor, relevant: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples around given relevant tokens.

    Args:
        vocabulary: ``(d, d)`` orthonormal rows; the first four are the relevant tokens.
        relevant: ``(B,)`` int64, 0 to 3.
        generator: Source of randomness.

    Returns:
        Tokens ``(B, T, d)`` and classes ``(B,)``, 1 or -1.
    """
    index = torch.randint(len(CLASS), WIDTH, (len(relevant), TOKENS), generator=generator)
    place = torch.randint(TOKENS, (len(relevant), 1), generator=generator)
    index.scatter_(1, place, relevant[:, None])
    return vocabulary[index], CLASS[relevant]


def run(seed: int, rare_share: float) -> Run:
    """Train until learned, and beyond.

    Raises:
        RuntimeError: The data is not learned within `MOST_STEPS`.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    aligned = torch.arange(len(CLASS)).repeat_interleave(2)  # (E,)
    noise = torch.randn(len(aligned), WIDTH, generator=generator) / WIDTH**0.5
    first = vocabulary[aligned] + ROUTER_NOISE * noise
    experts = torch.randn(len(aligned), NEURONS, WIDTH, generator=generator) * EXPERT_SCALE / WIDTH**0.5
    model = Mixture(first.clone().requires_grad_(), experts.requires_grad_(), CLASS[aligned], RARE[aligned])
    test = sample(vocabulary, torch.arange(len(CLASS)).repeat(TESTED // len(CLASS)), generator)
    shares = torch.tensor([1 - rare_share, rare_share]).repeat(2)

    def error(of: Mixture) -> float:
        with torch.no_grad():
            return float((of.forward(test[0]) * test[1] <= 0).double().mean())

    def moment(step: int) -> Moment:
        change = router_norm_change(first, model.router.detach())
        frequent, rare = change[~model.rare], change[model.rare]
        auc = float((frequent[:, None] > rare[None, :]).double().mean())
        errors = {
            f"{quantizer}, {plan}": error(model.quantized(*bits, fit))
            for quantizer, fit in QUANTIZERS.items()
            for plan, bits in PLANS.items()
        }
        return Moment(step, auc, {"float": error(model)} | errors)

    optimizer = torch.optim.SGD(
        [{"params": [model.router], "lr": ROUTER_RATE}, {"params": [model.experts], "lr": EXPERT_RATE}]
    )
    learned, steps, changes, step = None, [0], [[0.0] * len(aligned)], 0
    while step < (MOST_STEPS if learned is None else LONGER * learned.step):
        relevant = torch.multinomial(shares, BATCH, replacement=True, generator=generator)
        tokens, labels = sample(vocabulary, relevant, generator)
        loss = (1 - labels * model.forward(tokens)).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if learned is None and error(model) == 0:
            learned = moment(step)
        if step % 10 == 0:
            steps.append(step)
            changes.append(router_norm_change(first, model.router.detach()).tolist())
    if learned is None:
        raise RuntimeError(f"seed {seed}: {error(model):.1%} of the test is still wrong after {MOST_STEPS} steps")
    return Run(learned, moment(step), steps, changes, model.rare.tolist())


def plot(first: Run, rare_share: float) -> Figure:
    """Change of every router norm of one run, frequent and rare experts separately."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for expert, rare in enumerate(first.rare):
        values = [change[expert] for change in first.changes]
        label = ("rare" if rare else "frequent") if first.rare.index(rare) == expert else None
        axis.plot(first.steps, values, color="C1" if rare else "C0", lw=1.2, label=label)
    axis.axvline(first.learned.step, color="0.5", ls="--", lw=1, label="just learned")
    axis.set_xscale("symlog", linthresh=10)
    axis.set_xlim(left=0)
    axis.set_xlabel("SGD step")
    axis.set_ylabel("change of router L2 norm")
    axis.set_title(f"experts of frequent and rare tokens, rare share {rare_share:g}", fontsize=9)
    axis.legend(fontsize=7)
    return figure


def table(runs: Sequence[Run]) -> Table:
    """Means over the seeds, at the moment of learning and long past it."""
    printed = Table(box=box.MARKDOWN)
    for column in ("", "just learned", f"{LONGER} x as long"):
        printed.add_column(column, justify="right" if column else "left")
    columns = [one.learned for one in runs], [one.later for one in runs]

    def add(title: str, form: str, values: Sequence[Sequence[float]]) -> None:
        printed.add_row(title, *(format(mean_of_runs(of_column).value, form) for of_column in values))

    add("SGD steps", ".0f", [[moment.step for moment in column] for column in columns])
    add("AUC of the change of router norm", ".2f", [[moment.auc for moment in column] for column in columns])
    for name in runs[0].learned.errors:
        add(f"error, {name}", ".2%", [[moment.errors[name] for moment in column] for column in columns])
    return printed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the seeds, print the table, and leave a plot and all numbers in the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/theory"), help="folder (default runs/theory)")
    parser.add_argument("--rare-share", type=float, default=0.1, help="of the samples, below 1/4 (default 0.1)")
    parser.add_argument("--seeds", type=int, default=8, help="number of runs (default 8)")
    options = parser.parse_args(arguments)
    if not 0 < options.rare_share < 0.25:
        parser.error(f"--rare-share {options.rare_share}: the theorems are for shares between 0 and 1/4")
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: expected at least 1")
    options.output.mkdir(parents=True, exist_ok=True)
    runs = [run(seed, options.rare_share) for seed in tqdm(range(options.seeds), desc="theory", unit="run")]
    show(table(runs))
    plot(runs[0], options.rare_share).savefig(options.output / "theory.png", dpi=120)
    with replaced_when_done(options.output / "theory.json") as temporary:
        temporary.write_text(json.dumps([asdict(one) for one in runs]), encoding="utf-8")
    print(f"wrote {options.output / 'theory.png'} and theory.json")


if __name__ == "__main__":
    main()
