"""Kernels: each multiplies right, gives the checkpoint's bits back, and is the only form of the weights in memory."""

import copy
import itertools
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from moe_precision import allocate, find_moe_layers, quantize_model
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.quantize import kernels
from moe_precision.quantize import matrices as packed_module
from moe_precision.quantize.codec.packing import pack
from moe_precision.quantize.codec.scales import compress, expand
from moe_precision.quantize.kernels import Matrices, compiler, grouped, native
from moe_precision.quantize.kernels.ark import Ark
from moe_precision.quantize.kernels.int4 import Int4
from moe_precision.quantize.kernels.native import Native
from moe_precision.quantize.matrices import DenseMatrices, PackedMatrices
from moe_precision.quantize.modules import PackedProjection
from tests.support.models import build, logits

EVERY = [
    *((Int4, bits, 64, torch.bfloat16) for bits in (1, 2, 3, 4)),
    *((Native, bits, 64, torch.bfloat16) for bits in range(1, 9)),
    *((Native, bits, 32, torch.float32) for bits in range(1, 9)),
    (Native, 3, 64, torch.float16),
    *((Ark, bits, 64, torch.bfloat16) for bits in (2, 3, 4, 8)),
    *((Ark, bits, 32, torch.float32) for bits in (5, 6, 7)),
]


@pytest.fixture
def any_cpu(monkeypatch):
    """ARK is taken on any CPU."""
    monkeypatch.setattr("moe_precision.quantize.kernels.ark.is_intel", lambda: True)


def use(monkeypatch, *only):
    monkeypatch.setattr(kernels, "KERNELS", only)


def stored(scale, offset):
    """The nearest that can be stored."""
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


@pytest.mark.parametrize(("kernel", "bits", "group_size", "dtype"), EVERY)
def test_products_and_the_way_back(kernel, bits, group_size, dtype, monkeypatch, any_cpu):
    if kernel is Ark:
        pytest.importorskip("auto_round_kernel")
    use(monkeypatch, kernel)
    matrices = bucket(bits, group_size)
    stored = [tensor.clone() for tensor in matrices.matrices([0, 1])]
    weight = matrices.weight(1)
    for tokens in (1, 3, 9):
        x = torch.randn(tokens, 192).to(dtype)
        product, exact = matrices.linear(1, x), x.float() @ weight.T
        assert product.dtype == dtype
        assert (product.float() - exact).norm() / exact.norm() < (1e-3 if dtype == torch.float32 else 0.01)
    assert type(matrices.kernel) is kernel
    assert matrices.codes is None  # in memory once
    assert torch.equal(matrices.weight(1), weight)
    for kept, before in zip(matrices.matrices([0, 1]), stored, strict=True):
        assert torch.equal(kept, before)
    for kept, before in zip(matrices.state_dict().values(), stored, strict=True):
        assert torch.equal(kept, before)
    assert matrices.kernel is None


def test_the_form_takes_little_more_memory_than_the_codes(monkeypatch, any_cpu):
    for kernel, bits in ((Int4, 4), *((Native, bits) for bits in (1, 2, 3, 4, 5, 7, 8)), (Ark, 2), (Ark, 3)):
        if kernel is Ark:
            pytest.importorskip("auto_round_kernel")
        use(monkeypatch, kernel)
        matrices = bucket(bits, 128, inp=2048, out=1024)
        packed = sum(buffer.nbytes for buffer in matrices.buffers())
        matrices.linear(0, torch.randn(1, 2048).bfloat16())
        assert sum(buffer.nbytes for buffer in matrices.buffers()) <= 1.2 * packed, (kernel, bits)


def test_the_order_of_choice(monkeypatch, any_cpu):
    def choice(bits, dtype=torch.bfloat16, device="cpu", training=False, out=64):
        return kernels.choose(kernels.Request(device, dtype, training, bits, out, 256, 128))

    use(monkeypatch, Native, Int4)
    assert {choice(bits) for bits in range(1, 9)} == {Native}
    assert choice(4, torch.float32) is choice(4, training=True) is Native
    assert choice(2, out=42) is None
    assert choice(2, device="cuda") is None
    monkeypatch.setattr(native, "library", lambda: None)
    assert choice(4) is choice(2) is Int4  # twice the memory at 2 bits, but fast
    assert choice(8) is choice(2, torch.float32) is None
    pytest.importorskip("auto_round_kernel")
    use(monkeypatch, Ark, Native, Int4)
    assert [choice(bits) for bits in (1, 2, 4, 8)] == [Int4, Ark, Ark, Ark]


# -- the kernel in C++ ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """Nothing is compiled yet, here or in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "moe_precision"
    native.library.cache_clear()


@pytest.mark.parametrize(
    ("compiler_is", "reason"),
    [("", "no C"), ("no-such-compiler", "no C"), ("false", "exit status 1"), ("true", "No such file")],
)
def test_without_a_compiler_one_is_told(compiler_is, reason, no_library, monkeypatch):
    monkeypatch.setenv("CXX", compiler_is)
    with pytest.warns(UserWarning, match=rf"({reason}).*install a C\+\+ compiler"):
        assert native.library() is None
    assert native.library() is None  # once
    assert kernels.choose(kernels.Request("cpu", torch.float32, False, 2, 64, 256, 128)) is None


def test_a_kernel_that_miscalculates_is_not_taken(no_library, monkeypatch, tmp_path):
    wrong = tmp_path / "native.cpp"
    text = native._SOURCE.read_text()
    assert text.count("(112 << 23)") == 1
    wrong.write_text(text.replace("(112 << 23)", "(113 << 23)"))
    monkeypatch.setattr(native, "_SOURCE", wrong)
    with pytest.warns(UserWarning, match="wrong products at 1 bits"):
        assert native.library() is None


def test_the_library_is_made_once(no_library, monkeypatch):
    assert native.library() is not None
    (made,) = no_library.iterdir()
    native.library.cache_clear()
    run = compiler._run
    monkeypatch.setattr(compiler, "_run", lambda command: run(command) if "-E" in command else pytest.fail("compiled"))
    assert native.library() is not None
    assert list(no_library.iterdir()) == [made]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other names of CPUs")
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_older_cpus(cpu, no_library, monkeypatch):
    """SSE2, AVX2, and AVX-512 without bfloat16: the check after compiling is of every width and both dtypes."""
    wanted = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512f"}[cpu]
    if wanted not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {wanted}")
    monkeypatch.setattr(compiler, "_FLAGS", [f"-march={cpu}" if "march" in f else f for f in compiler._FLAGS])
    library = native.library()
    assert library.lanes() == {"x86-64": 4, "x86-64-v3": 8, "x86-64-v4": 16}[cpu]
    assert not library.knows_bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_depends_on_nothing_else(dtype, monkeypatch):
    """Not on the other tokens, and not on the number of threads."""
    use(monkeypatch, Native)
    matrices, x = bucket(3, 64), torch.randn(37, 192).to(dtype)
    expected, threads = matrices.linear(0, x), torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for first, last in ((0, 1), (1, 3), (4, 9), (9, 26), (0, 37)):
                assert torch.equal(matrices.linear(0, x[first:last]), expected[first:last])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_activation_that_meets_code_0(dtype, monkeypatch):
    """What a code is taken for in bfloat16 must not drown the others."""
    use(monkeypatch, Native)
    matrices, x = bucket(2, 64), torch.randn(3, 192)
    codes = torch.randint(0, 4, (2, 48, 192), dtype=torch.uint8)
    codes[..., 5] = 0
    flat = torch.ones(matrices.scale.shape).half()
    for held, new in zip(matrices.held(), Matrices.of(pack(codes, 2), flat, flat * 0), strict=True):
        held.copy_(new)
    x[:, 5] = 1e4
    x = x.to(dtype)
    expected = x.float() @ matrices.weight(0).T
    assert (matrices.linear(0, x).float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_that_are_no_numbers_stay_so(dtype, monkeypatch):
    use(monkeypatch, Native)
    for value in (float("inf"), float("-inf"), float("nan")):
        matrices = bucket(2, 64)
        matrices.ends.fill_(value)
        assert not matrices.weight(0).isfinite().any()
        assert not matrices.linear(0, torch.randn(3, 192).to(dtype)).isfinite().any()


def test_what_is_no_tensor_in_memory(monkeypatch):
    use(monkeypatch, Native)
    matrices, x = bucket(2, 64), torch.randn(3, 192)
    matrices.linear(0, x)
    projection, rows, starts, expected = mixed_projection()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with pytest.raises(TypeError, match="plain tensors, got Fake"):
            matrices.linear(0, mode.from_tensor(x))
        with pytest.raises(TypeError, match="plain tensors, got Fake"):
            projection(mode.from_tensor(rows), starts)
    torch.testing.assert_close(projection(rows, starts), expected, atol=1e-5, rtol=1e-5)
    with forward_ad.dual_level(), pytest.raises(TypeError, match="plain tensors"):
        matrices.linear(0, forward_ad.make_dual(x, x))


def test_a_damaged_library_is_made_anew(no_library):
    assert native.library() is not None
    (made,) = no_library.iterdir()
    content = made.read_bytes()
    for damaged in (b"", content[: len(content) // 2]):
        made.unlink()  # the one in use stays as it is
        made.write_bytes(damaged)
        native.library.cache_clear()
        assert native.library() is not None
        assert made.read_bytes() == content


def test_without_a_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    native.library.cache_clear()
    with pytest.warns(UserWarning, match="no home; name a folder in XDG_CACHE_HOME"):
        assert native.library() is None
    native.library.cache_clear()


def test_a_compiler_with_arguments(no_library, monkeypatch):
    monkeypatch.setenv("CXX", "g++ -O1")
    assert native.library() is not None


def test_the_smallest_scales(monkeypatch):
    """Subnormal float16 numbers, where the CPU is told to flush subnormal numbers."""
    use(monkeypatch, Native)
    matrices, x = bucket(2, 64), torch.randn(3, 192)
    tiny = torch.full(matrices.scale.shape, 2.0**-24)
    for held, new in zip(matrices.held(), Matrices.of(matrices.codes, tiny.half(), tiny.half() * 3), strict=True):
        held.copy_(new)
    expected = x @ matrices.weight(0).T
    assert expected.norm() > 0
    flushed = torch.set_flush_denormal(True)
    try:
        torch.testing.assert_close(matrices.linear(0, x), expected, atol=0, rtol=1e-3)
    finally:
        torch.set_flush_denormal(False)
    assert flushed


# -- the form that a bucket is in -------------------------------------------------------------------------------------


def test_the_form_follows_dtype_and_new_weights(monkeypatch, any_cpu):
    use(monkeypatch, Int4, Native)
    matrices, x = bucket(4, 64), torch.randn(3, 192)
    first = matrices.linear(0, x.bfloat16())
    assert isinstance(matrices.kernel, Int4)
    assert (matrices.linear(0, x) - first.float()).norm() / first.float().norm() < 0.01
    assert isinstance(matrices.kernel, Native)
    state = copy.deepcopy(matrices.state_dict())
    matrices.put(0, torch.randn(48, 192))
    assert not torch.equal(matrices.linear(0, x.bfloat16()), first)
    matrices.load_state_dict(state)
    assert torch.equal(matrices.linear(0, x.bfloat16()), first)


def test_gradients_pass(monkeypatch, any_cpu):
    use(monkeypatch, Int4, Native)
    matrices = bucket(4, 64)
    x = torch.randn(3, 192, requires_grad=True)
    matrices.linear(1, x).sum().backward()
    torch.testing.assert_close(x.grad, matrices.weight(1).sum(0).expand(3, -1))


@pytest.mark.parametrize("kernel", [Int4, Native])
def test_inputs_of_other_shapes(kernel, monkeypatch, any_cpu):
    use(monkeypatch, kernel)
    matrices = bucket(4, 64)
    weight = matrices.weight(0)
    x = torch.randn(192, 6).bfloat16()
    for odd in (x.T, x.T[:0], x.T[None, :, :], x.T[::2], x.T.new_zeros(2, 0, 192)):
        product, exact = matrices.linear(0, odd), odd.float() @ weight.T
        assert product.shape == exact.shape
        assert (product.float() - exact).norm() <= 0.01 * exact.norm()
    assert isinstance(matrices.kernel, kernel)


def test_as_many_matrices_as_rows(monkeypatch, any_cpu):
    use(monkeypatch, Native)
    matrices = bucket(2, 32, count=32, out=32, inp=64)
    weight, x = matrices.weight(31), torch.randn(2, 64)
    torch.testing.assert_close(matrices.linear(31, x), x @ weight.T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kernel", [Int4, Native])
def test_what_is_made_in_inference_mode_outlives_it(kernel, monkeypatch, any_cpu):
    use(monkeypatch, kernel)
    matrices, x = bucket(4, 64), torch.randn(3, 192).bfloat16()
    with torch.inference_mode():
        before = matrices.linear(0, x).clone()
        state = copy.deepcopy(matrices.state_dict())
    matrices.load_state_dict(state)
    matrices.put(1, torch.randn(48, 192))
    assert torch.equal(matrices.linear(0, x), before)


def test_a_pickle_holds_the_checkpoints_form(monkeypatch, any_cpu):
    """torch's int4 order depends on the CPU: a pickle must not carry it to another one."""
    use(monkeypatch, Int4)
    matrices, x = bucket(4, 64), torch.randn(3, 192).bfloat16()
    expected = matrices.linear(0, x)
    again = pickle.loads(pickle.dumps(matrices))
    assert again.kernel is None
    assert torch.equal(again.codes, matrices.codes)
    assert torch.equal(again.linear(0, x), expected)


def test_training_keeps_its_kernel(monkeypatch, any_cpu):
    """Gradient checkpointing runs forward without gradients and once more with them."""
    use(monkeypatch, Int4, Native)
    matrices, x = bucket(4, 64), torch.randn(3, 192).bfloat16()
    matrices.linear(0, x.clone().requires_grad_())
    kernel = matrices.kernel
    matrices.linear(0, x)
    assert matrices.kernel is kernel
    assert isinstance(kernel, Native)


# -- where there is no CPU --------------------------------------------------------------------------------------------


def mixed_projection():
    torch.manual_seed(0)
    projection = PackedProjection([3, 2, 16, 2, 8], (48, 64), 32, torch.float32)
    for expert in range(5):
        projection.put(expert, torch.randn(48, 64))
    x, starts = torch.randn(12, 64), torch.tensor([0, 2, 2, 5, 8, 9])  # the last three rows are no expert's
    expected = torch.zeros(12, 48)
    for expert, (first, last) in enumerate(itertools.pairwise(starts.tolist())):
        expected[first:last] = x[first:last] @ projection.weight(expert).T
    return projection, x, starts, expected


@pytest.mark.parametrize("only", [(), (Native,)])
def test_a_projection(only, monkeypatch):
    use(monkeypatch, *only)
    projection, x, starts, expected = mixed_projection()
    torch.testing.assert_close(projection(x, starts), expected, atol=1e-5, rtol=1e-5)
    assert {type(bucket_of.kernel) for bucket_of in projection.children() if isinstance(bucket_of, PackedMatrices)} == {
        *(only or [type(None)])
    }
    strided = torch.stack([x, x], dim=-1)[..., 0]
    torch.testing.assert_close(projection(strided, starts), expected, atol=1e-5, rtol=1e-5)
    assert projection(x[:0], torch.zeros(6, dtype=torch.int64)).shape == (0, 48)


def test_rows_that_do_not_fit(monkeypatch):
    projection, x, starts, _ = mixed_projection()
    for width in (32, 63, 100, 128):
        with pytest.raises(ValueError, match=f"got rows of width {width}, expected 64"):
            projection(torch.randn(12, width), starts)
        with pytest.raises(ValueError, match=f"got rows of width {width}, expected 64"):
            projection.linear(0, torch.randn(2, width))
    for wrong in (starts[:-1], starts.int(), torch.cat([starts, starts])):
        with pytest.raises(ValueError, match=r"starts is .* expected \(6,\) of torch.int64"):
            projection(x, wrong)
    with pytest.raises(ValueError, match="starts goes from 0 to 9, but there are 8 rows"):
        projection(x[:8], starts)


@pytest.mark.parametrize("only", [(), (Native,)])
@pytest.mark.parametrize("gradients", [False, True])
def test_modes_and_defaults_of_the_process(only, gradients, monkeypatch):
    """The kernel is chosen, compiled and checked under whatever the caller has set."""
    use(monkeypatch, *only)
    projection, x, starts, expected = mixed_projection()
    native.library.cache_clear()
    x.requires_grad_(gradients)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            product = projection(x, starts)
            assert native.library() is not None
    finally:
        torch.set_default_dtype(torch.float32)
    assert (product.float() - expected).norm() < 0.02 * expected.norm()
    if gradients:
        product.sum().backward()
        assert x.grad[:9].abs().min() > 0


def test_gradients_through_a_projection():
    projection, x, starts, _ = mixed_projection()
    projection(x.requires_grad_(), starts).sum().backward()
    for expert, (first, last) in enumerate(itertools.pairwise(starts.tolist())):
        torch.testing.assert_close(x.grad[first:last], projection.weight(expert).sum(0).expand(last - first, -1))
    assert x.grad[9:].abs().max() == 0


def test_dequantizing_a_bucket_for_one_launch(monkeypatch):
    """What runs on a device without a kernel."""
    projection, x, starts, expected = mixed_projection()
    asked = []

    def dequantized(module, x, starts, experts, y):
        weights = module.weights
        module.weights = lambda indices, dtype: asked.append(len(indices)) or weights(indices, dtype)
        packed_module.multiply_rows(module, x, starts, experts, y, together=True)

    for kind in (PackedMatrices, DenseMatrices):
        monkeypatch.setattr(kind, "grouped", dequantized)
    torch.testing.assert_close(projection(x, starts), expected)
    assert asked == [1, 1, 1, 1]  # expert 1 has no row
    assert projection(x[:0], torch.zeros(6, dtype=torch.int64)).shape == (0, 48)


@pytest.mark.parametrize(("bits", "group_size"), [*((bits, 64) for bits in range(1, 9)), (3, 8), (3, 24), (5, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton(bits, group_size, dtype):
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


def test_buckets_through_triton(monkeypatch):
    projection, x, starts, expected = mixed_projection()
    asked = []
    monkeypatch.setattr(grouped, "fits", lambda x, matrices: asked.append(len(matrices.codes)) or True)
    monkeypatch.setattr(PackedMatrices, "_enter_kernel", lambda *_: pytest.fail("by another kernel"))
    torch.testing.assert_close(projection(x, starts), expected, atol=1e-4, rtol=1e-4)
    assert asked == [2, 1, 1]  # 2, 3 and 8 bits; the bucket of 16 bits is float


def test_one_matrix_through_triton():
    matrices = bucket(3, 64)
    x = torch.randn(2, 5, 192)
    one = Matrices(*(tensor[1:] for tensor in matrices.held()))
    torch.testing.assert_close(grouped.linear(x, one, 3, 64), x @ matrices.weight(1).T, atol=1e-4, rtol=1e-4)


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


def test_triton_compiles_for_gpus(tmp_path):
    """Down to machine code, which needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", COMPILE_FOR_GPUS, str(tmp_path / "cubin")]
    subprocess.run(command, check=True, env=environment)


# -- whole models ----------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(any_cpu, monkeypatch, tmp_path):
    """A Mixtral in bfloat16 on two kernels."""
    use(monkeypatch, Int4, Native)
    build("mixtral").save_pretrained(tmp_path / "float")
    model = load_model(tmp_path / "float", dtype=torch.bfloat16)
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=64)
    for layer in plan.layers.values():
        for bits in layer.projection_bits.values():
            bits[:4] = [2, 2, 16, 2]
    return quantize_model(model, plan)


def test_the_model_says_what_runs_where(packed):
    expected = {
        "bits_2": "C++, 2 bits, 3 matrices of 256 x 64",
        "bits_4": "torch int4, 4 bits, 4 matrices of 256 x 64",
        "bits_16": "float, torch.bfloat16, 1 matrices of 256 x 64",
    }
    said = packed.moe_precision_kernels()
    prefix = "model.layers.0.mlp.experts.packed.gate_up_proj."
    assert {name: said[prefix + name] for name in expected} == expected
    logits(packed)
    assert packed.moe_precision_kernels() == said
    assert {type(m.kernel) for m in packed.modules() if isinstance(m, PackedMatrices)} == {Native, Int4}


def test_a_second_save_after_a_forward(packed, tmp_path):
    packed.save_pretrained(tmp_path / "first")
    expected = logits(packed)
    packed.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    assert torch.equal(logits(packed), expected)
    assert torch.equal(logits(type(packed).from_pretrained(tmp_path / "second")), expected)


def test_copies_pickles_and_moves(packed):
    expected = logits(packed)
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(logits(again), expected)
        assert again.moe_precision_kernels() == packed.moe_precision_kernels()
        assert again.moe_precision_kernels.args[0] is again
    assert torch.equal(logits(packed.to("cpu")), expected)
    nn.Module.float(packed)
    assert all(m.ends.dtype == torch.float16 for m in packed.modules() if isinstance(m, PackedMatrices))
    assert (logits(packed) - expected).norm() / expected.norm() < 0.02


def test_generating(packed):
    assert packed.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape[1] > 3


def test_the_rest_of_the_model_can_be_compiled(packed):
    expected = logits(packed)
    compiled = torch.compile(packed, backend="aot_eager")
    assert (logits(compiled) - expected).norm() / expected.norm() < 0.02
    assert isinstance(next(m for m in packed.modules() if isinstance(m, DenseMatrices)), DenseMatrices)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_experts_that_are_not_here(dtype):
    """Of another process: indices below 0, or from num_experts on, add nothing, whatever their weight."""
    model = build("gpt_oss")  # its experts have biases
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=32)
    experts = find_moe_layers(model)[0].container()
    quantize_model(model, plan)
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    index = torch.tensor([[0, 1], [2, 3], [4, 5]])
    there = torch.tensor([[True, False], [True, True], [False, False]])
    with torch.no_grad():
        for elsewhere in (-1, -7, experts.num_experts, experts.num_experts + 3):
            found = experts(x, index.masked_fill(~there, elsewhere).to(dtype), weights)
            torch.testing.assert_close(found, experts(x, index, weights * there), atol=1e-6, rtol=1e-5)


def test_device_map(packed, tmp_path):
    packed.save_pretrained(tmp_path / "packed")
    again = type(packed).from_pretrained(tmp_path / "packed", device_map="cpu")
    assert torch.equal(logits(again), logits(packed))
