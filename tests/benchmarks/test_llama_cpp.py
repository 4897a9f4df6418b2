"""What the benchmark against llama.cpp computes by itself: bits, routes, medians, tensors read without torch."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import llama_cpp, llama_models, llama_tools
from moe_precision.export.gguf import _TYPES


def test_stored_bits():
    bits = [pair.stored for pair in llama_cpp.PAIRS]
    assert bits == pytest.approx([2 + 18 / 128, 2.5 + 18 / 128, 3 + 18 / 128, 4 + 18 / 128])
    assert [pair.name for pair in llama_cpp.PAIRS] == ["2 bits", "2 and 3 bits", "3 bits", "4 bits"]
    exported = {name: stored for _, name, _, stored in _TYPES}
    known = {kind.lower(): bits for kind, bits in llama_tools.STORED.items()}
    assert exported.items() >= {kind: bits for kind, bits in known.items() if kind != "iq2_xs"}.items()
    assert known["iq2_xs"] == 8 * (2 + 2 * 256 / 8 + 256 / 16 / 2) / 256  # bytes: float16, 2 for 8 weights, half for 16


def test_every_token_has_its_experts():
    one = np.concatenate(llama_tools.routes(1, 0))
    assert sorted(one.flatten().tolist()) == list(range(8))
    (many,) = llama_tools.routes(512, 0)
    assert many.shape == (512, 2)
    assert many.dtype == np.int32
    assert (many[:, 0] != many[:, 1]).all()
    assert set(many.flatten().tolist()) == set(range(8))
    assert not np.array_equal(many, llama_tools.routes(512, 1)[0])


def test_a_cell_has_medians():
    cell = llama_cpp.Cell.of([(0.001, 0.002), (0.002, 0.002), (0.004, 0.012)])
    assert cell == pytest.approx((2.0, 2.0, 2.0))
    assert str(cell) == "2.0, 2.0: 2.00"


def test_tensors_are_read_without_torch(tmp_path):
    written = {"one": torch.randn(3, 5).bfloat16(), "two": torch.randn(7).bfloat16()}
    save_file(written, tmp_path / "model.safetensors", {"format": "pt"})
    read = llama_models.tensors(tmp_path)
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert np.array_equal(llama_models.floats(read[name]), tensor.float().numpy())


def test_rounds_are_timed_over_all_inputs():
    seen: list[int] = []
    assert llama_tools.cpu_seconds(seen.append, [1, 2, 3], least=1e-4) > 0
    assert seen[0] == 1
    assert seen[1:4] == [1, 2, 3]
    assert len(seen) % 3 == 1
