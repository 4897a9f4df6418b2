"""The kernel in Triton, in its interpreter, and compiled for GPUs without one."""

import os
import subprocess
import sys

import pytest
import torch

from moe_precision.quantize.kernels import Matrices, grouped
from moe_precision.quantize.matrices import PackedMatrices
from tests.support.packed import bucket, mixed_projection


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "bits", "group_size"),
    [
        *((torch.float32, bits, 64) for bits in range(1, 9)),
        *((torch.float32, *both) for both in ((3, 8), (3, 24), (5, 192))),
        *((torch.float16, *both) for both in ((2, 64), (3, 24), (8, 64))),
    ],
)
def test_triton(dtype, bits, group_size):
    """In Triton's interpreter, which cannot multiply bfloat16."""
    matrices, x = bucket(bits, group_size, count=3), torch.randn(90, 192).to(dtype)
    starts = torch.tensor([0, 3, 3, 5, 85])  # expert 0 is in another bucket, expert 1 has no row
    for rows in (slice(0, 5), slice(0, 90)):  # few rows and many
        y = torch.full((90, 48), 7.0, dtype=dtype)[rows]
        ends = starts.clamp(max=len(y))
        grouped.multiply(x[rows], ends, torch.tensor([1, 2, 3]), matrices.held(), bits, group_size, y)
        expected = torch.full((len(y), 48), 7.0)
        for index, expert in enumerate((1, 2, 3)):
            span = slice(ends[expert], ends[expert + 1])
            expected[span] = x[rows][span].float() @ matrices.weight(index, dtype).float().T
        assert (y.float() - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-3) * expected.norm()


@pytest.mark.slow
def test_buckets_through_triton(monkeypatch):
    projection, x, starts, expected = mixed_projection()
    asked = []
    monkeypatch.setattr(grouped, "fits", lambda x, matrices: asked.append(len(matrices.codes)) or True)
    monkeypatch.setattr(PackedMatrices, "kernel_for", lambda *_: None)  # as on a GPU
    torch.testing.assert_close(projection(x, starts), expected, atol=1e-4, rtol=1e-4)
    assert asked == [2, 1, 1]  # 2, 3 and 8 bits; the bucket of 16 bits is float


def test_one_matrix_through_triton():
    matrices = bucket(3, 64)
    x = torch.randn(2, 5, 192)
    one = Matrices(*(tensor[1:] for tensor in matrices.held()))
    torch.testing.assert_close(grouped.linear(x, one, 3, 64), x @ matrices.weight(1).T, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_triton_that_does_not_work_is_not_taken(monkeypatch):
    device = torch.device("cpu")
    grouped.works.cache_clear()
    assert grouped.works(device, torch.float32)
    assert not grouped.works(device, torch.float64)
    for failing, reason in ((lambda *_: None, "its products are off"), (lambda *_: 1 / 0, "ZeroDivisionError")):
        grouped.works.cache_clear()
        monkeypatch.setattr(grouped, "multiply", failing)
        with pytest.warns(UserWarning, match=reason):
            assert not grouped.works(device, torch.float32)
    grouped.works.cache_clear()


COMPILE_FOR_GPUS = """
import subprocess, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from moe_precision.quantize.kernels import grouped
from moe_precision.quantize.kernels.triton_grouped import multiply_rows
types = "*bf16 *bf16 *i64 *i64 *u8 *u8 *u8 *fp16 i32 i32 i32 i32".split()
for capability, bits, rows in ((80, 3, grouped._MANY), (90, 2, grouped._MANY), (90, 8, grouped._FEW)):
    sizes = (bits, 128, grouped.BLOCK, rows, grouped._COLUMNS, grouped._EIGHTS)
    signature = dict(zip(multiply_rows.arg_names, types + ["constexpr"] * len(sizes), strict=True))
    source = ASTSource(multiply_rows, signature, dict(zip(multiply_rows.arg_names[len(types) :], sizes, strict=True)))
    made = compile(source, GPUTarget("cuda", capability, 32), {"num_warps": grouped._WARPS})
    assert "bf16.bf16" in made.asm["ptx"]  # tensor cores
    with open(sys.argv[1], "wb") as file:
        file.write(made.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", sys.argv[1]]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "Function multiply_rows" in usage and " STACK:0 " in usage, usage  # no registers spilled
"""


@pytest.mark.thorough
def test_triton_compiles_for_gpus(tmp_path):
    """Down to machine code, which needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", COMPILE_FOR_GPUS, str(tmp_path / "cubin")]
    subprocess.run(command, check=True, env=environment)
