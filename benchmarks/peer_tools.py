"""Plans carried out by other tools, each in an environment of its own, for benchmarks/peers.py.

Every function writes a folder whose files are the tool's own, so that stored bits can be counted from them. Where
transformers cannot load it, what the tool's codes stand for is written below it too, in float32 (`DEQUANTIZED`).
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_precision import PrecisionPlan, find_moe_layers
from moe_precision.checkpoints import Checkpoint, load_model
from moe_precision.export import export
from moe_precision.export.auto_round_backend import quantize_with_auto_round
from moe_precision.export.names import all_places

ITERATIONS = 200  # of AutoRound
DEQUANTIZED = "dequantized/experts.safetensors"


def auto_round(checkpoint: Path, plan: PrecisionPlan, out: Path, blocks: list[Tensor]) -> None:
    """AutoRound, by our own backend."""
    quantize_with_auto_round(checkpoint, plan, out, blocks, ITERATIONS)


def gptqmodel(checkpoint: Path, plan: PrecisionPlan, out: Path, blocks: list[Tensor]) -> None:
    """GPTQModel's GPTQ."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=plan.group_size, sym=False, dynamic=export(plan, "gptqmodel").config)
    model = GPTQModel.load(str(checkpoint), config, device="cpu")
    model.quantize([{"input_ids": block, "attention_mask": torch.ones_like(block)} for block in blocks])
    model.save(str(out))


def hqq(checkpoint: Path, plan: PrecisionPlan, out: Path, blocks: list[Tensor]) -> None:
    """HQQ with its defaults, each expert matrix as a layer of its own; it takes no text."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = load_model(checkpoint, dtype=torch.float32)
    stored: dict[str, Tensor] = {}
    for layer in find_moe_layers(model):
        for projection, bank in layer.banks.items():
            for expert, bits in enumerate(plan.layers[layer.name].projection_bits[projection]):
                matrix = bank.read(expert)
                linear = nn.Linear(*reversed(matrix.shape), bias=False)
                linear.weight.data = matrix.clone()
                config = BaseQuantizeConfig(nbits=bits, group_size=plan.group_size)
                packed = HQQLinear(linear, config, device="cpu")
                name = f"{bank.weights[0].name}.{expert}"
                stored |= {f"{name}.{part}": packed.state_dict()[part] for part in ("W_q", "scale", "zero")}
                matrix.copy_(packed.dequantize())
    out.mkdir(parents=True)
    model.config.save_pretrained(out)
    save_file(stored, out / "model.safetensors")
    _save_dequantized(out, _experts(model))


def llm_compressor(checkpoint: Path, plan: PrecisionPlan, out: Path, blocks: list[Tensor]) -> None:
    """llm-compressor's GPTQ with its defaults."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from transformers import AutoModelForCausalLM

    own = load_model(checkpoint, dtype=torch.float32)
    layers = {layer.name: layer for layer in find_moe_layers(own)}
    recipe = yaml.safe_load(export(plan, "llm-compressor").text)
    stage = recipe["quant_stage"]["quant_modifiers"]
    stage["GPTQModifier"] = stage.pop("QuantizationModifier")
    out.mkdir(parents=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    rows = [{"input_ids": block.tolist(), "attention_mask": [1] * len(block)} for block in blocks]
    settings = {"num_calibration_samples": len(rows), "max_seq_length": len(blocks[0])}
    oneshot(model=model, dataset=Dataset.from_list(rows), recipe=str(out / "recipe.yaml"), **settings)
    model.to(torch.bfloat16)  # scales are stored in the model's dtype, 16 bits as in other tools' files
    for place in all_places(plan):
        for expert in range(layers[place.layer].num_experts):
            weight = layers[place.layer].banks[place.projection].read(expert)
            if place.projection == "gate_up_proj":
                weight = weight.chunk(2)[place.part == "up_proj"]
            with torch.no_grad():
                weight.copy_(
                    model.get_submodule(place.module_of(expert))(torch.eye(weight.shape[1], dtype=torch.bfloat16)).T
                )
    model.save_pretrained(out, save_compressed=True)
    _save_dequantized(out, _experts(own))


def loaded(checkpoint: Path, folder: Path) -> nn.Module:
    """What a tool has written, as a float32 model.

    Args:
        checkpoint: The float checkpoint.
        folder: What one of the functions above has written, or a packed checkpoint of ours.
    """
    if (folder / DEQUANTIZED).is_file():
        model = load_model(checkpoint, dtype=torch.float32)
        missing = model.load_state_dict(load_file(folder / DEQUANTIZED), strict=False).unexpected_keys
        assert not missing, missing
        return model
    if Checkpoint(folder).config.quantization_config.get("quant_method") != "gptq":
        return load_model(folder, dtype=torch.float32)
    from gptqmodel import GPTQModel

    own: nn.Module = GPTQModel.load(str(folder), device="cpu").model.float()
    return own


def _experts(model: nn.Module) -> dict[str, Tensor]:
    names = [
        weight.name for layer in find_moe_layers(model) for bank in layer.banks.values() for weight in bank.weights
    ]
    return {name: model.get_parameter(name).data for name in names}


def _save_dequantized(folder: Path, tensors: dict[str, Any]) -> None:
    (folder / DEQUANTIZED).parent.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / DEQUANTIZED)
