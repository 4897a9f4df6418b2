"""Plans carried out by other tools, each in an environment of its own, for benchmarks/peers.py.

Every function writes a folder whose files are the tool's own, so that stored bits can be counted from them. Where
transformers cannot load it, what the tool's codes stand for is written below it too, in float32 (`DEQUANTIZED`).
"""

import sys
from functools import partial
from importlib.util import find_spec
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


def llama_cpp(kind: str, checkpoint: Path, plan: PrecisionPlan, out: Path, blocks: list[Tensor]) -> None:
    """All experts in one of llama.cpp's types, under the importance matrix of llama-imatrix.

    That is the mean square of each input of each expert's matrices over the tokens that reach the expert. ggml's own
    quantizer is called, and gguf's own reader reads what it has written.

    Args:
        kind: Of `llama_tools.TYPES`.
        checkpoint: The float checkpoint, whose widths are multiples of 256.
        plan: Not read: the type decides.
        out: Folder to write.
        blocks: Token ids that the importance matrix is taken from, ``(tokens,)`` each.
    """
    from gguf import GGMLQuantizationType, dequantize

    from benchmarks.llama_cpp import installed
    from benchmarks.llama_tools import TYPES, quantized

    if find_spec("llama_cpp") is None:
        (site_packages,) = Path(installed()).parents[1].glob("lib/python*/site-packages")
        sys.path.append(str(site_packages))
    model = load_model(checkpoint, dtype=torch.float32)
    stored: dict[str, Tensor] = {}
    importance = _importance(model, blocks)
    for layer in find_moe_layers(model):
        for bank in layer.banks.values():
            name = bank.weights[0].name
            for expert in range(layer.num_experts):
                matrix = bank.read(expert)
                rows = quantized(kind, matrix.numpy(), importance[name][expert].numpy())
                stored[f"{name}.{expert}"] = torch.from_numpy(rows)
                matrix.copy_(torch.from_numpy(dequantize(rows, GGMLQuantizationType(TYPES[kind]))))
    out.mkdir(parents=True)
    model.config.save_pretrained(out)
    save_file(stored, out / "model.safetensors")
    _save_dequantized(out, _experts(model))


@torch.inference_mode()
def _importance(model: nn.Module, blocks: list[Tensor]) -> dict[str, Tensor]:
    """Mean squares of the inputs of each expert's matrices, ``(E, in)`` by the name of a Mixtral's fused weight."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def count(name: str, experts: nn.Module, inputs: tuple[Any, ...]) -> None:
        hidden, chosen = inputs[:2]
        for expert in chosen.unique():
            x = hidden[(chosen == expert).any(-1)]
            gate, up = nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, -1)
            for weight, seen in (("gate_up_proj", x), ("down_proj", experts.act_fn(gate) * up)):
                key, shape = f"{name}.{weight}", (len(experts.gate_up_proj), seen.shape[-1])
                sums.setdefault(key, torch.zeros(shape))[expert] += seen.square().sum(0)
                counts.setdefault(key, torch.zeros(shape[0], 1))[expert] += len(seen)

    hooks = []
    for layer in find_moe_layers(model):
        module = model.get_submodule(layer.experts)
        hooks.append(module.register_forward_pre_hook(partial(count, layer.experts)))
    for block in blocks:
        model(input_ids=block.unsqueeze(0))
    for hook in hooks:
        hook.remove()
    assert all((one > 0).all() for one in counts.values()), "an expert saw no token"
    return {name: total / counts[name] for name, total in sums.items()}


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
