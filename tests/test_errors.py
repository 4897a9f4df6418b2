"""Every error class of the package has one base class, and the builtin that it had before."""

import inspect
import pkgutil
from importlib import import_module

import pytest

import moe_precision
from moe_precision import MoEPrecisionError

NEED_VLLM = {f"moe_precision.serving.vllm_{name}" for name in ("config", "loading", "method")}  # which is not installed


def own_exceptions() -> set[type[BaseException]]:
    """All exception classes that a module of the package defines, callbacks and recipes among them."""
    names = [found.name for found in pkgutil.walk_packages(moe_precision.__path__, "moe_precision.")]
    names = [name for name in names if name not in NEED_VLLM]
    assert {"moe_precision.callbacks.plan_recorder", "moe_precision.recipes.corpus"} <= set(names)
    return {
        value
        for module in map(import_module, names)
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, BaseException) and value.__module__.startswith("moe_precision")
    }


def test_every_error_has_the_one_base_class_and_a_builtin():
    found = own_exceptions()
    assert len(found) >= 16
    for error in found:
        assert issubclass(error, MoEPrecisionError), error
        if error is not MoEPrecisionError:
            assert issubclass(error, ValueError | NotImplementedError), error


@pytest.mark.parametrize("builtin", [ValueError, MoEPrecisionError])
def test_both_bases_catch_it(builtin):
    with pytest.raises(builtin, match="unknown method 'guess'"):
        moe_precision.allocate(method="guess")
