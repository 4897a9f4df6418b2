"""A layer's experts in ggml, for benchmarks/llama_cpp.py: run in the environment that holds llama.cpp, without torch.

ggml's C functions are called through ctypes, in the libraries that llama-cpp-python has built. Weights lie where
llama.cpp itself would put them: in a buffer that repacks them for this CPU, where there is one for their type.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TYPES = {"q4_0": 2, "q2_K": 10, "q3_K": 11, "iq2_xs": 17, "iq3_xxs": 18, "iq2_s": 22, "bf16": 30}  # ggml.h
STORED = {"q4_0": 4.5, "q2_K": 2.625, "q3_K": 3.4375, "iq2_xs": 2.3125, "bf16": 16}  # bits of a weight: ggml-common.h
_F32, _I32 = 0, 26
ROWS = 64  # that are quantized; the others repeat them, since values do not change the speed


class Layer(NamedTuple):
    """Sizes of a layer of experts."""

    hidden: int
    intermediate: int
    experts: int
    top: int


LAYER = Layer(2048, 4096, 8, 2)


def routes(tokens: int, turn: int, layer: Layer = LAYER) -> list[np.ndarray]:
    """The experts of each token, ``(tokens, top)`` int32, drawn at random.

    One token goes to all experts in turn, in several arrays, so that weights come from memory, as they do in a model
    with many layers.
    """
    random = np.random.default_rng(turn)
    if tokens == 1:
        return list(random.permutation(layer.experts).astype(np.int32).reshape(-1, 1, layer.top))
    chosen = random.random((tokens, layer.experts)).argsort(-1)[:, : layer.top]
    return [np.ascontiguousarray(chosen, np.int32)]


def activations(tokens: int, layer: Layer = LAYER) -> list[np.ndarray]:
    """Inputs of both products: ``(tokens, hidden)`` and ``(tokens, top, intermediate)`` float32."""
    random = np.random.default_rng(tokens)
    shapes = (tokens, layer.hidden), (tokens, layer.top, layer.intermediate)
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def cpu_seconds(run: Callable[[Any], object], inputs: list[Any], least: float = 0.1) -> float:
    """CPU time of a call, over all threads: as many rounds over the inputs as take a while."""
    run(inputs[0])
    start, count = time.process_time(), 0
    while (spent := time.process_time() - start) < least:
        for one in inputs:
            run(one)
        count += len(inputs)
    return spent / count


class _Settings(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("memory", c_void_p), ("no_alloc", c_bool))


_POINTERS = ["ggml_init", "ggml_new_tensor_2d", "ggml_new_tensor_3d", "ggml_mul_mat_id", "ggml_new_graph"]
_POINTERS += ["ggml_backend_cpu_init", "ggml_backend_get_device", "ggml_backend_dev_backend_reg"]
_POINTERS += ["ggml_backend_reg_get_proc_address", "ggml_backend_dev_buffer_type", "ggml_gallocr_new"]
_POINTERS += ["ggml_backend_alloc_ctx_tensors_from_buft"]


@cache
def ggml() -> Any:
    """The functions of the three libraries, by their names in C, with the types of what they return."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    libraries = [ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu")]

    class Functions:
        def __getattr__(self, name: str) -> Any:
            function = next(getattr(one, name) for one in libraries if hasattr(one, name))
            function.restype = c_void_p if name in _POINTERS else c_size_t
            setattr(self, name, function)
            return function

    return Functions()


def quantized(kind: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Rows in one of ggml's types.

    Args:
        kind: Of `TYPES`.
        rows: ``(count, in)`` float32.
        importance: ``(in,)`` float32, mean squares of the inputs; None for equal ones where the type needs any.

    Returns:
        ``(count, bytes of a row)`` uint8.
    """
    g, (count, inp) = ggml(), rows.shape
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.empty((count, g.ggml_row_size(c_int(TYPES[kind]), c_int64(inp))), np.uint8)
    weighted = importance is not None or g.ggml_quantize_requires_imatrix(c_int(TYPES[kind])) & 1
    importance = np.ascontiguousarray(np.ones(inp) if importance is None else importance, np.float32)
    source, target, weights = (c_void_p(one.ctypes.data) for one in (rows, out, importance))
    sizes = c_int64(0), c_int64(count), c_int64(inp)
    g.ggml_quantize_chunk(c_int(TYPES[kind]), source, target, *sizes, weights if weighted else c_void_p(None))
    return out


class Experts:
    """The matrices of a layer's experts in one of ggml's types: gate and up in one, and down.

    Args:
        kind: Of `TYPES`.
        layer: Its sizes.

    Raises:
        AssertionError: Products are not those of the weights.
    """

    def __init__(self, kind: str, layer: Layer = LAYER) -> None:
        g = ggml()
        self.kind, self.layer = kind, layer
        self.backend = c_void_p(g.ggml_backend_cpu_init())
        self.shapes = [(layer.hidden, 2 * layer.intermediate), (layer.intermediate, layer.hidden)]
        self._graphs: dict[int, Any] = {}
        for buffer_type in self._buffer_types():
            context = c_void_p(g.ggml_init(_Settings(1 << 20, None, True)))
            self.weights = [
                c_void_p(g.ggml_new_tensor_3d(context, c_int(TYPES[kind]), *map(c_int64, (*shape, layer.experts))))
                for shape in self.shapes
            ]
            buffer = g.ggml_backend_alloc_ctx_tensors_from_buft(context, c_void_p(buffer_type))
            products = self._products(context, 1)[0]
            if all(g.ggml_backend_supports_op(self.backend, product) & 1 for product in products):
                break
            g.ggml_backend_buffer_free(c_void_p(buffer))
        for weight, (inp, out) in zip(self.weights, self.shapes, strict=True):
            data = np.tile(quantized(kind, self._rows(inp)), (out * layer.experts // ROWS, 1))
            g.ggml_backend_tensor_set(weight, c_void_p(data.ctypes.data), c_size_t(0), c_size_t(data.nbytes))
        self._check()

    @staticmethod
    def _rows(inp: int) -> np.ndarray:
        return np.random.default_rng(0).standard_normal((ROWS, inp), np.float32)

    def _check(self) -> None:
        """Both products are those of the rows that were quantized, up to what that costs."""
        given = activations(9, self.layer)
        self.prepare(given, 1)
        self.run(routes(9, 0, self.layer)[0])
        for x, y, (inp, _) in zip((given[0][:, None], given[1]), self.results(9), self.shapes, strict=True):
            expected = np.broadcast_to(x @ self._rows(inp).T, (9, self.layer.top, ROWS))
            error = np.linalg.norm(y[..., :ROWS] - expected) / np.linalg.norm(expected)
            assert error < 0.4, f"{self.kind} in ggml is off by {error:.2f}"

    def _buffer_types(self) -> list[int]:
        """Those for this CPU alone, then the usual one, as in llama.cpp's `make_cpu_buft_list`."""
        g = ggml()
        device = c_void_p(g.ggml_backend_get_device(self.backend))
        registry = c_void_p(g.ggml_backend_dev_backend_reg(device))
        extra = g.ggml_backend_reg_get_proc_address(registry, c_char_p(b"ggml_backend_dev_get_extra_bufts"))
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(extra)(device)
        found = []
        while listed[len(found)]:
            found.append(listed[len(found)])
        return [*found, g.ggml_backend_dev_buffer_type(device)]

    def _products(self, context: c_void_p, tokens: int) -> Any:
        """Both products as nodes, their inputs, and the experts of each token."""
        g, top = ggml(), self.layer.top
        ids = c_void_p(g.ggml_new_tensor_2d(context, c_int(_I32), c_int64(top), c_int64(tokens)))
        inputs = [
            c_void_p(g.ggml_new_tensor_3d(context, c_int(_F32), *map(c_int64, (inp, of_token, tokens))))
            for (inp, _), of_token in zip(self.shapes, (1, top), strict=True)
        ]
        products = [
            c_void_p(g.ggml_mul_mat_id(context, weight, x, ids)) for weight, x in zip(self.weights, inputs, strict=True)
        ]
        return products, inputs, ids

    def _graph(self, tokens: int) -> Any:
        if tokens not in self._graphs:
            g = ggml()
            context = c_void_p(g.ggml_init(_Settings(1 << 22, None, True)))
            products, inputs, ids = self._products(context, tokens)
            graph = c_void_p(g.ggml_new_graph(context))
            for tensor in (*inputs, ids):
                g.ggml_set_input(tensor)
            for product in products:
                g.ggml_set_output(product)
                g.ggml_build_forward_expand(graph, product)
            device = c_void_p(g.ggml_backend_get_device(self.backend))
            allocator = c_void_p(g.ggml_gallocr_new(c_void_p(g.ggml_backend_dev_buffer_type(device))))
            assert g.ggml_gallocr_alloc_graph(allocator, graph) & 1
            self._graphs[tokens] = graph, products, inputs, ids
        return self._graphs[tokens]

    def prepare(self, inputs: list[np.ndarray], threads: int) -> None:
        """Sets what is multiplied: ``(tokens, hidden)`` and ``(tokens, top, intermediate)`` float32."""
        g = ggml()
        g.ggml_backend_cpu_set_n_threads(self.backend, c_int(threads))
        for tensor, values in zip(self._graph(len(inputs[0]))[2], inputs, strict=True):
            values = np.ascontiguousarray(values, np.float32)
            g.ggml_backend_tensor_set(tensor, c_void_p(values.ctypes.data), c_size_t(0), c_size_t(values.nbytes))

    def run(self, chosen: np.ndarray) -> None:
        """Multiplies; `chosen` has the experts of each token, ``(tokens, top)`` int32."""
        g = ggml()
        graph, _, _, ids = self._graph(len(chosen))
        g.ggml_backend_tensor_set(ids, c_void_p(chosen.ctypes.data), c_size_t(0), c_size_t(chosen.nbytes))
        status = g.ggml_backend_graph_compute(self.backend, graph) & 0xFFFFFFFF
        assert status == 0, f"ggml's status {status}"

    def results(self, tokens: int) -> list[np.ndarray]:
        """The last products, ``(tokens, top, out)`` float32 each."""
        g, found = ggml(), []
        for tensor, (_, out) in zip(self._graph(tokens)[1], self.shapes, strict=True):
            values = np.empty((tokens, self.layer.top, out), np.float32)
            g.ggml_backend_tensor_get(tensor, c_void_p(values.ctypes.data), c_size_t(0), c_size_t(values.nbytes))
            found.append(values)
        return found
