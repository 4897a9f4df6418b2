"""Random packed matrices and projections, and the choice of kernels."""

import itertools
from pathlib import Path

import pytest
import torch

from moe_precision.quantize import kernels
from moe_precision.quantize.codec.packing import pack
from moe_precision.quantize.codec.scales import compress, expand
from moe_precision.quantize.kernels import Matrices, compiler
from moe_precision.quantize.matrices import PackedMatrices
from moe_precision.quantize.modules import PackedProjection


def use(monkeypatch, *only):
    monkeypatch.setattr(kernels, "KERNELS", only)


def compile_for(cpu, monkeypatch):
    """Has kernels compiled for another level of CPU than this one; skips the test if this one cannot run it."""
    wanted = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512f"}[cpu]
    if wanted not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {wanted}")
    monkeypatch.setattr(compiler, "_FLAGS", [f"-march={cpu}" if "march" in f else f for f in compiler._FLAGS])


def stored(scale, offset):
    """The nearest scales and offsets that can be stored."""
    return expand(*compress(scale)), expand(*compress(offset))


def bucket(bits, group_size, count=2, out=48, inp=192):
    """Random codes, scales and offsets, with one constant group, whose scale is 0."""
    torch.manual_seed(bits)
    matrices = PackedMatrices(count, out, inp, bits, group_size)
    codes = torch.randint(0, 2**bits, (count, out, inp), dtype=torch.uint8)
    codes[0, 0, :group_size] = 0
    matrices.codes.copy_(pack(codes, bits))
    scale, offset = torch.rand(matrices.scale.shape) + 0.1, torch.randn(matrices.offset.shape)
    scale[0, 0, 0] = 0
    for held, new in zip(matrices.held(), Matrices.of(matrices.codes, *stored(scale, offset)), strict=True):
        held.copy_(new)
    return matrices


def mixed_projection():
    torch.manual_seed(0)
    projection = PackedProjection([3, 2, 16, 2, 8], (48, 64), 32, torch.float32)
    projection.fill(torch.randn(5, 48, 64))
    x, starts = torch.randn(12, 64), torch.tensor([0, 2, 2, 5, 8, 9])  # the last three rows belong to no expert
    expected = torch.zeros(12, 48)
    for expert, (first, last) in enumerate(itertools.pairwise(starts.tolist())):
        expected[first:last] = x[first:last] @ projection.weight(expert).T
    return projection, x, starts, expected
