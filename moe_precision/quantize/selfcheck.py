"""Whether what this package compiles, or takes from others, multiplies right on this machine, and why not.

Every kernel is asked for a product whose result is known; what the package would do by itself at first use, with a
warning, is done here on purpose, with an answer for each.
"""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from ..compat import has_int4_kernel
from .codec import columns
from .codec.packing import pack
from .codec.scales import compress, expand
from .kernels import Kernel, Matrices, Request, dequantize, grouped, native
from .kernels.ark import Ark, is_intel
from .kernels.compiler import compiler_command
from .kernels.int4 import Int4
from .kernels.native import NativeInt8

State = Literal["works", "absent", "broken"]
_TOLERANCE = 2e-2  # of activations in bfloat16 or int8


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: What.
        state: ``works``; ``absent``, which costs speed and nothing else; or ``broken``: it is there and does not work.
        detail: What was found, or what is missing and what to do.
        use: What it is for.
    """

    name: str
    state: State
    detail: str
    use: str


def check_kernels() -> Iterator[Check]:
    """Tries the compiler and every kernel, in the order in which a packed model asks for them."""
    yield _compiler()
    yield _compiled("C++", native.library, "packed experts on a CPU, any width")
    yield _kernel("C++ in int8", NativeInt8, _int8_is_absent(), (1, 2, 3, 4), "packed experts on a CPU, 1 to 4 bits")
    yield _compiled("C++ rounding", columns.library, "rounding under statistics, in the quantize step")
    yield _kernel("ARK", Ark, _ark_is_absent(), (2, 3, 4), "packed experts on Intel CPUs, 2 to 4 bits")
    no_int4 = "" if has_int4_kernel() else "this torch was built without it"
    yield _kernel("torch int4", Int4, no_int4, (1, 2, 3, 4), "packed experts on a CPU without a compiler, to 4 bits")
    yield _triton()


def _compiler() -> Check:
    use = "compiles the two C++ kernels, once on this machine"
    try:
        command = compiler_command()
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60)
    except OSError as error:
        return Check("C++ compiler", "absent", f"{error}: install g++, or name a compiler in CXX", use)
    except subprocess.SubprocessError as error:
        return Check("C++ compiler", "broken", str(error), use)
    return Check("C++ compiler", "works", f"{command[0]}: {(done.stdout.splitlines() or [''])[0]}", use)


def _compiled(name: str, library: Any, use: str) -> Check:
    """A library that checks itself when it is made, and says in a warning why it is not there."""
    found, said = _with_warnings(library.__wrapped__)  # not the answer of an earlier call
    if found is not None:
        return Check(name, "works", "compiled, and its results are right", use)
    try:
        compiler_command()
    except OSError:
        return Check(name, "absent", "needs a C++ compiler", use)
    return Check(name, "broken", said, use)


def _kernel(name: str, kernel: type[Kernel], absent: str, widths: tuple[int, ...], use: str) -> Check:
    if absent:
        return Check(name, "absent", absent, use)
    try:
        errors = {bits: _error(kernel, bits) for bits in widths}
    except Exception as error:  # whatever somebody else's extension module raises
        return Check(name, "broken", f"{type(error).__name__}: {error}", use)
    wrong = [f"{bits} bits by {error:.2g}" for bits, error in errors.items() if not error <= _TOLERANCE]
    if wrong:
        return Check(name, "broken", f"its products are off at {', '.join(wrong)}: please report this", use)
    return Check(name, "works", f"its products are right at {', '.join(map(str, widths))} bits", use)


def _error(kernel: type[Kernel], bits: int) -> float:
    """Relative error of a product of bfloat16 activations with the second of two small matrices, ``(32, 128)``."""
    request = Request("cpu", torch.bfloat16, False, bits, 32, 128, 64)
    if not kernel.fits(request):
        raise ValueError(f"it takes no matrix of {request}")
    random = torch.Generator().manual_seed(0)
    codes = pack(torch.randint(0, 2**bits, (2, 32, 128), generator=random, dtype=torch.uint8), bits)
    scale, offset = (
        expand(*compress(torch.rand(2, 32, 2, generator=random, dtype=torch.float32) + 0.1)) for _ in range(2)
    )
    matrices = Matrices.of(codes, scale, offset)
    x = torch.randn(3, 128, generator=random, dtype=torch.float32).bfloat16()
    exact = x.float() @ dequantize(codes[1], scale[1], offset[1], bits, torch.float32).T
    product = kernel(matrices, bits, 64).linear(1, x)
    return float((product.float() - exact).norm() / exact.norm())


def _int8_is_absent() -> str:
    """Why no products are taken in int8 here; empty if they may be."""
    again: Any = native.library
    built, _ = _with_warnings(again.__wrapped__)  # not the answer of an earlier call
    if built is None:
        return "the C++ kernel is not there"
    return "" if built.most_bits_with_int8() else "needs AVX2, or AVX-512 with its instructions for bytes"


def _ark_is_absent() -> str:
    """Why ARK does not run here; empty if it may."""
    if not is_intel():
        return "made for Intel's CPUs, and this is none"
    if find_spec("auto_round_kernel") is None:
        return "auto-round-lib is not installed: pip install 'moe-precision[cpu]'"
    return ""


def _triton() -> Check:
    use = "packed experts on a GPU"
    if not torch.cuda.is_available():
        return Check("Triton", "absent", "torch finds no GPU", use)
    if find_spec("triton") is None:
        return Check("Triton", "absent", "triton is not installed, which comes with torch for GPUs", use)
    works: Any = grouped.works
    found, said = _with_warnings(lambda: works.__wrapped__(torch.device("cuda"), torch.bfloat16))
    name = torch.cuda.get_device_name()
    return Check("Triton", "works" if found else "broken", said or f"its products are right on {name}", use)


def _with_warnings(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns, and the warnings that it gave."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        found = call()
    return found, "; ".join(str(one.message) for one in given)
