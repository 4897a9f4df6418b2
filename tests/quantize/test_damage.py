"""A damaged packed checkpoint is an error, or loads bit for bit: never silently wrong weights."""

import json
import random
import re
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM
from transformers.utils import logging

from moe_precision import allocate, quantize_model
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.quantize.checksums import DamagedCheckpointError, check_files
from tests.support.models import build

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 2, "vocab_size": 16, "num_hidden_layers": 1}


def two_and_three(model):
    """A plan of 2 bits for one expert and 3 for the other."""
    plan = allocate(model, method="uniform", average_bits=3, bits=(3,), group_size=32)
    for layer in plan.layers.values():
        for bits in layer.projection_bits.values():
            bits[0] = 2
    return plan


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A small packed checkpoint in several files: each file's bytes and the tensors of all."""
    folder = tmp_path_factory.mktemp("packed")
    model = build("mixtral", **SIZES)
    quantize_model(model, two_and_three(model)).save_pretrained(folder, max_shard_size="8KB")
    content = {file.name: file.read_bytes() for file in folder.iterdir() if "safetensors" in file.name}
    assert len(content) > 2
    return folder, content, model.state_dict()


def restore(folder, content):
    for name, data in content.items():
        (folder / name).write_bytes(data)


def mutate(data: bytes, random_: random.Random) -> bytes:
    """One kind of damage to files: a flipped bit, a wrong byte, a hole, a lost tail, two ranges exchanged."""
    at, kind = random_.randrange(len(data)), random_.randrange(5)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << random_.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + bytes([random_.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        hole = random_.randrange(1, 64)
        return data[:at] + bytes(min(hole, len(data) - at)) + data[at + hole :]
    if kind == 3:
        return data[:at]
    other, length = random_.randrange(len(data)), random_.randrange(1, 32)
    first, second = sorted((at, other))
    length = min(length, second - first, len(data) - second)
    return (
        data[:first]
        + data[second : second + length]
        + data[first + length : second]
        + data[first : first + length]
        + data[second + length :]
    )


@pytest.mark.slow
@pytest.mark.parametrize("mutations", [200, pytest.param(2000, marks=pytest.mark.thorough)])
def test_random_damage(mutations, packed):
    """Header, index and tensors; what loads is bit-identical."""
    folder, content, expected = packed
    random_ = random.Random(0)
    logging.disable_progress_bar()
    errors, kinds = 0, set()
    try:
        for number in range(mutations):
            name = random_.choice(sorted(content))
            data = content[name]
            header = 8 + int.from_bytes(data[:8], "little") if name.endswith(".safetensors") else len(data)
            part = data[:header] if number % 2 else data[header:] or data
            damaged = mutate(part, random_)
            (folder / name).write_bytes(
                damaged + data[header:] if number % 2 or part is data else data[:header] + damaged
            )
            try:
                load = load_model if number % 3 else MixtralForCausalLM.from_pretrained
                loaded = load(folder).state_dict()
            except Exception as error:  # any error prevents wrong logits; below: which ones are raised
                errors += 1
                kinds.add(type(error).__name__)
                continue
            finally:
                (folder / name).write_bytes(data)
            assert loaded.keys() == expected.keys()
            for key, tensor in expected.items():
                assert torch.equal(loaded[key], tensor), (number, name, key)
    finally:
        logging.enable_progress_bar()
    assert errors > mutations / 2
    of_transformers = {"UnicodeDecodeError", "JSONDecodeError", "KeyError"}  # it reads the index before we are asked
    assert kinds <= {"DamagedCheckpointError", "CheckpointError", "QuantizationError"} | of_transformers, kinds


@pytest.mark.parametrize(
    "suffix", ["codes", "scale", "offset", "ends", "gate.weight", "q_proj.weight", "embed_tokens.weight"]
)
def test_one_flipped_bit_in_any_tensor(suffix, packed):
    folder, content, _ = packed
    name = next(
        n
        for n in sorted(content)
        if n.endswith(".safetensors") and any(k.endswith(suffix) for k in load_file(folder / n))
    )
    data = content[name]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensor = next(key for key in header if key.endswith(suffix))
    at = 8 + length + header[tensor]["data_offsets"][0]
    (folder / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    try:
        with pytest.raises(DamagedCheckpointError, match=re.escape(f"{tensor!r} is not what was written")):
            load_model(folder)
    finally:
        restore(folder, content)


def alike(tensors):
    """Names of two tensors of one shape and dtype."""
    names = sorted(tensors)
    return [
        (one, other)
        for one, other in pairwise(names)
        if (tensors[one].shape, tensors[one].dtype) == (tensors[other].shape, tensors[other].dtype)
        and not torch.equal(tensors[one], tensors[other])
    ]


def test_tensors_exchanged_by_name(packed, tmp_path):
    """Two tensors of one shape, with their names swapped."""
    folder, content, _ = packed
    pairs = [(n, pair) for n in sorted(content) if n.endswith(".safetensors") for pair in alike(load_file(folder / n))]
    name, (one, other) = pairs[0]
    with safe_open(folder / name, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(folder / name)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, folder / name, metadata=metadata)
    with pytest.raises(DamagedCheckpointError, match="is not what was written"):
        load_model(folder)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    with pytest.raises(DamagedCheckpointError, match="has no checksums"):
        load_model(folder)
    restore(folder, content)


def test_a_tensor_in_two_files(packed):
    folder, content, _ = packed
    files = sorted(folder / n for n in content if n.endswith(".safetensors"))
    with safe_open(files[0], "pt") as opened:
        config = opened.metadata()["moe_precision.config"]
    check_files(files, config)
    with pytest.raises(DamagedCheckpointError, match="is not what was written"):
        check_files([files[0], files[0]], config)


def test_files_of_two_checkpoints(packed, tmp_path):
    """A file from another model with the same plan, and a config.json that exchanges the widths of two experts."""
    folder, content, _ = packed
    other = build("mixtral", **SIZES)
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj.mul_(2)
    quantize_model(other, two_and_three(other)).save_pretrained(tmp_path, max_shard_size="8KB")
    name = sorted(n for n in content if n.endswith(".safetensors"))[-1]
    (folder / name).write_bytes((tmp_path / name).read_bytes())
    with pytest.raises(DamagedCheckpointError, match="does not belong to"):
        load_model(folder)
    restore(folder, content)
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    for layer in config["quantization_config"]["plan"]["layers"].values():
        for projection in layer["projections"].values():
            projection["bits"] = projection["bits"][::-1]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedCheckpointError, match="does not belong to"):
        load_model(folder)
    (folder / "config.json").write_text(text)


def test_a_save_in_other_files_over_an_old_one(tmp_path):
    """From one file to several, transformers would keep reading the old one; the other way it deletes them."""
    model = build("mixtral", **SIZES)
    packed = quantize_model(model, two_and_three(model))
    for sizes in (("1GB", "8KB"), ("8KB", "1GB")):
        for size in sizes:
            packed.save_pretrained(tmp_path / sizes[0], max_shard_size=size)
    with pytest.raises(DamagedCheckpointError, match=r"holds two checkpoints.*delete the older one"):
        load_model(tmp_path / "1GB")
    assert load_model(tmp_path / "8KB").state_dict().keys() == packed.state_dict().keys()
