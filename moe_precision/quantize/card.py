"""The model card of a packed checkpoint: README.md with YAML front matter, the base's own card below.

huggingface_hub reads and writes the front matter. The base's card is kept whole, its front matter as a block of YAML,
so that dequantizing can restore it. One that would not come back byte for byte (not UTF-8, other line ends) is kept in
a file of its own too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..checkpoints.checkpoint import Checkpoint
from ..files import replaced_when_done
from ..plans.plan import PrecisionPlan
from ..plans.settings import BUDGETS
from ..version import __version__
from .config import PlanQuantizationConfig

CARD = "README.md"
KEPT_CARD = "README.base.md"
_TAGS = ("moe-precision", "mixture-of-experts", "quantized", "mixed-precision")
_KEPT = (
    "license",
    "license_name",
    "license_link",
    "language",
    "pipeline_tag",
    "datasets",
)  # true of the packed one too
_MORE = "<!-- moe-precision: what was done later is added above this line -->"
_BASE = "<!-- moe-precision: card of the base -->"
_BASE_KEPT = f"<!-- moe-precision: card of the base, byte for byte in {KEPT_CARD} -->"
_BELOW = "\n\n## Card of the base\n\n"
_FRONT_MATTER = re.compile(r"\A\ufeff?---\s*\n(?P<yaml>.*?\n)---\s*(?:\n|\Z)", re.S)
_IN_CACHE = re.compile(r"models--([^/]+)--([^/]+)$")  # folders of the Hub's cache


def write_card(source: Checkpoint, folder: Path, packed_bytes: int, quantization: PlanQuantizationConfig) -> None:
    """Writes the card of what was packed.

    Args:
        source: The float checkpoint; its own README.md, if there is one, goes below.
        folder: Where the card goes.
        packed_bytes: Of all tensors that were packed.
        quantization: How they were packed.
    """
    original = source.folder / CARD
    base = original.read_text(encoding="utf-8", errors="replace") if original.is_file() else ""
    known = _metadata(base)
    plan, hub_name = quantization.plan, _hub_name(source)
    data: dict[str, Any] = {key: known[key] for key in _KEPT if key in known}
    if hub_name is not None:
        data |= {"base_model": hub_name, "base_model_relation": "quantized"}
    elif "base_model" in known:  # of the float checkpoint, which is not on the Hub itself
        data["base_model"] = known["base_model"]
    tags = known["tags"] if isinstance(known.get("tags"), list) else []
    data |= {"library_name": "transformers", "tags": [*dict.fromkeys([*map(str, tags), *_TAGS, plan.model_type])]}
    body = _body(source, packed_bytes, hub_name, quantization)
    card = ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{body}")
    text = str(card).rstrip() + "\n"
    if base:
        below = f"{_BELOW}{_fenced(base)}"
        exact = original.read_bytes()
        if _unfenced(below).encode() == exact:
            text += f"\n{_BASE}{below}"
        else:
            text += f"\n{_BASE_KEPT}{below}"
            with replaced_when_done(folder / KEPT_CARD) as temporary:
                temporary.write_bytes(exact)
    _write(folder, text)


def has_card(folder: Path) -> bool:
    """Whether a folder has a card that was written here."""
    path = folder / CARD
    return path.is_file() and _MORE in path.read_text(encoding="utf-8", errors="replace")


def add_to_card(folder: Path, line: str) -> None:
    """Adds a line to what a card says of how its model was made; nothing where there is no card of ours."""
    if has_card(folder):
        text = (folder / CARD).read_text(encoding="utf-8")
        _write(folder, text.replace(_MORE, f"- {_line(line)}\n{_MORE}", 1))


def restore_base_card(folder: Path) -> None:
    """Puts the base's card in the place of ours, which is not true of a float model; removes ours where it had none."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if _MORE not in text:
        return
    kept = folder / KEPT_CARD
    if f"\n{_BASE_KEPT}{_BELOW}" in text and kept.is_file():
        kept.replace(path)
        return
    _, marker, below = text.partition(f"\n{_BASE}{_BELOW}")
    if marker:
        _write(folder, _unfenced(f"{_BELOW}{below}"))
    else:
        path.unlink()


def _write(folder: Path, text: str) -> None:
    with replaced_when_done(folder / CARD) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _metadata(text: str) -> dict[str, Any]:
    """The front matter of a card; empty where there is none, or none that can be read."""
    if _FRONT_MATTER.match(text) is None:
        return {}
    try:
        found = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return {}
    return dict(found)


def _fenced(card: str) -> str:
    """A card with its front matter as a block of code, so that a page has one front matter alone."""
    found = _FRONT_MATTER.match(card)
    return card if found is None else f"```yaml\n{found['yaml']}```\n\n{card[found.end() :]}"


def _unfenced(below: str) -> str:
    """The base's card again, from what stands below ours."""
    card = below.removeprefix(_BELOW)
    front, marker, rest = card.partition("```\n\n") if card.startswith("```yaml\n") else ("", "", card)
    return f"---\n{front.removeprefix('```yaml' + chr(10))}---\n{rest}" if marker else rest


def _hub_name(source: Checkpoint) -> str | None:
    """The name on the Hub of a checkpoint in its cache; None of any other folder."""
    for folder in (source.folder.absolute(), *source.folder.absolute().parents):
        if (found := _IN_CACHE.search(folder.name)) is not None:
            return f"{found[1]}/{found[2]}"
    return None


def _body(source: Checkpoint, packed_bytes: int, hub_name: str | None, quantization: PlanQuantizationConfig) -> str:
    plan = quantization.plan
    of = f"[{hub_name}](https://huggingface.co/{hub_name})" if hub_name else f"the float checkpoint `{source.name}`"
    rest = "stay as they were" if quantization.non_expert_bits is None else f"have {quantization.non_expert_bits} bits"
    lines = [
        f"# {hub_name or source.name}, packed to {plan.average_bits:.4g} bits",
        "",
        f"{of[0].upper()}{of[1:]}, with its routed experts packed to {plan.average_bits:.4g} bits per weight on",
        f"average by moe-precision {__version__}. Other layers {rest}.",
        "",
        "## Use",
        "",
        "```",
        "pip install moe-precision",
        "```",
        "",
        "```python",
        *_use(source),
        "```",
        "",
        "## Size",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| all tensors, GiB | {source.nbytes / 2**30:.4g} | {packed_bytes / 2**30:.4g} |",
        f"| bits per expert weight | {8 * source.dtype.itemsize} | {plan.stored_bits:.4g} with scales and offsets |",
        "",
        "## How it was made",
        "",
        *[f"- {_line(line)}" for line in [*_of_plan(plan), *_of_rounding(quantization)]],
        _MORE,
        "",
        "`moe-precision show FOLDER` lists the bits of every expert. `moe-precision evaluate FOLDER --reference FLOAT",
        "--card` measures the loss and the KL divergence from the float model, and adds them here.",
    ]
    return "\n".join(lines) + "\n"


def _use(source: Checkpoint) -> list[str]:
    """Lines that load the model, by the auto class where transformers has one for it."""
    architecture = (source.config.architectures or ["AutoModel"])[0]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(source.config.model_type) == architecture
    loader = "AutoModelForCausalLM" if causal else architecture
    found = [
        "import moe_precision  # registers the format with transformers",
        f"from transformers import {loader}",
        "",
        f'model = {loader}.from_pretrained(".")  # this folder; elsewhere its path or its name on the Hub',
    ]
    if (source.folder / "tokenizer_config.json").is_file():
        found[1] = f"from transformers import {', '.join(sorted([loader, 'AutoTokenizer']))}"
        found.append('tokenizer = AutoTokenizer.from_pretrained(".")')
    return found


def _of_plan(plan: PrecisionPlan) -> list[str]:
    shares: Counter[int] = Counter()
    for layer in plan.layers.values():
        for projection, widths in layer.projection_bits.items():
            out, inp = layer.shape.projections[projection]
            shares.update({bits: out * inp * count for bits, count in Counter(widths).items()})
    total = sum(shares.values())
    of_width = {bits: f"at {bits}" if bits else "dropped" for bits in shares}
    by_bits = ", ".join(f"{count / total:.1%} {of_width[bits]}" for bits, count in sorted(shares.items()))
    steps = "" if plan.last_step is None else f", after {plan.last_step:,} steps of training"
    found = [f"Plan: method {plan.method}{_asked(plan)}, group size {plan.group_size}{steps}."]
    found.append(f"Expert weights by bits: {by_bits}.")
    tokens, cost = plan.notes.get("calibration_tokens"), plan.notes.get("predicted_cost")
    if tokens is not None and cost is not None:
        found.append(
            f"Predicted KL divergence from the float model: {cost:.4g} nats per token, by costs calibrated on "
            f"{tokens:,} tokens."
        )
    return found


def _asked(plan: PrecisionPlan) -> str:
    if plan.settings is None or all(getattr(plan.settings, key, None) is None for key in BUDGETS):
        return ""
    return f", asked for {plan.settings.budget} of levels {', '.join(map(str, plan.settings.levels))}"


def _of_rounding(quantization: PlanQuantizationConfig) -> Sequence[str]:
    if quantization.grid is not None:
        return ["Rounding: the grid that training ended on."]
    statistics, weighted = quantization.statistics, quantization.curvature is not None
    columns = "errors weighted by the curvature of the loss" if weighted else "errors of all columns count equally"
    if statistics is None:
        return [f"Rounding: least squares, {columns}."]
    text = statistics.text or "text that is not named"
    return [
        f"Rounding: under second moments of the experts' inputs, from {text} ({statistics.described()}); {columns}."
    ]


def _line(text: str) -> str:
    """Text on one line, which no name can break out of."""
    return " ".join(text.replace("<", "&lt;").split())
