"""What every export test starts from: a small Mixtral on disk with a tokenizer, and plans whose experts differ."""

import pytest
import torch

from moe_precision import MoELayer, PrecisionPlan, allocate, find_moe_layers
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.export.names import all_places
from moe_precision.recipes.text_data import train_tokenizer
from tests.support.models import build, with_bits

TEXT = "".join(f"def function_{i}(argument):\n    return argument + {i * i}\n" for i in range(400))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a float Mixtral of 2 layers and 8 experts, with its tokenizer; every input width is 256 or 512."""
    folder = tmp_path_factory.mktemp("float")
    tokenizer = train_tokenizer([TEXT], 300)
    model = build("mixtral", vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plan(checkpoint) -> PrecisionPlan:
    """Experts of one layer, and projections of one expert, at 2, 3, 4, 8 and 16 bits."""
    return mixed(checkpoint, (2, 3, 4, 8, 16))


@pytest.fixture(scope="session")
def by_layer(checkpoint) -> PrecisionPlan:
    """One width per layer and projection: 2, 3, 4 and 8."""
    widths = iter((2, 3, 4, 8))
    return with_bits(_any(checkpoint), lambda layer, projection, count: [next(widths)] * count)


@pytest.fixture(scope="session")
def uniform_layers(checkpoint) -> PrecisionPlan:
    """One width per layer, as inference engines need it: 8 and 4."""
    return with_bits(_any(checkpoint), lambda layer, projection, count: [(8, 4)[layer]] * count)


def mixed(checkpoint, widths) -> PrecisionPlan:
    """A plan that cycles through the widths from expert to expert, shifted by one from projection to projection."""

    def bits(layer: int, projection: int, count: int) -> list[int]:
        return [widths[(expert + layer + projection) % len(widths)] for expert in range(count)]

    return with_bits(_any(checkpoint), bits)


def _any(checkpoint) -> PrecisionPlan:
    return allocate(load_model(checkpoint), method="uniform", average_bits=4, bits=(4,), group_size=64)


# relative, of weights rounded to nearest in groups of 64; weights that have nothing to do with each other give 1.4
LARGEST_ERROR = {1: 1.2, 2: 0.8, 3: 0.35, 4: 0.17, 5: 0.08, 6: 0.04, 7: 0.03, 8: 0.02, 16: 0.005}


def float_experts(checkpoint) -> dict[str, MoELayer]:
    """The layers of the float model; load it before a tool that leaves transformers' conversion patched."""
    return {layer.name: layer for layer in find_moe_layers(load_model(checkpoint, dtype="float32"))}


def check_experts(model, layers: dict[str, MoELayer], plan: PrecisionPlan) -> None:
    """Checks that every unfused expert multiplies by the float checkpoint's weight, as closely as its bits allow."""
    for place in all_places(plan):
        for expert, bits in enumerate(plan.layers[place.layer].projection_bits[place.projection]):
            weight = layers[place.layer].expert_weights(expert)[place.projection]
            if place.projection == "gate_up_proj":
                weight = weight.chunk(2)[place.part == "up_proj"]
            module = model.get_submodule(place.module_of(expert))
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            with torch.no_grad():
                used = module(torch.eye(weight.shape[1], dtype=dtype)).float().T
            error = ((used - weight).norm() / weight.norm()).item()
            assert error < LARGEST_ERROR[bits], (place.module_of(expert), bits, error)
