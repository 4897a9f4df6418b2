"""Registers the quantizer with transformers, without importing transformers where nobody has asked for it yet.

``from_pretrained`` is a method of classes in `transformers.modeling_utils`. Where that module is loaded, the quantizer
is registered at once. Else a finder waits for that module, or for the first of ours that needs it, registers as soon as
it is complete, and is gone. So there is no moment at which a model could be loaded without the quantizer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MODELS = "transformers.modeling_utils"  # imports all that `quantize.hf` needs of transformers, before it ends
_QUANTIZER = "moe_precision.quantize.hf"  # registers where it is imported
_LIGHT = {  # need neither torch nor transformers where they are imported, and neither do those in `plans`
    *(
        "registration",
        "version",
        "errors",
        "files",
        "layers",
        "layers.naming",
        "layers.shape",
        "layers.prefixes",
        "plans",
    ),
    *("present", "present.plan_summary", "cli", "cli.__main__", "cli.main", "cli.commands", "cli.options", "cli.show"),
}
_LIGHT |= {f"serving{name}" for name in ("", ".errors", ".names", ".vllm_plugin", ".vllm_config", ".vllm_loading")}


class _Waiting(MetaPathFinder):
    """Lets the other finders find a module, and has the quantizer registered as soon as it is complete."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        ours = package == __package__ and rest not in _LIGHT and not rest.startswith("plans.")
        if not ours and name != _MODELS:
            return None
        others = (finder.find_spec(name, path, target) for finder in [*sys.meta_path] if finder is not self)
        spec = next(filter(None, others), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if self not in sys.meta_path:  # another module has registered, or is about to
                execute(module)
                return
            sys.meta_path.remove(self)  # only now: a module that is merely looked up, or missing, registers nothing
            try:
                execute(module)
            except BaseException:
                register_with_transformers()  # goes on waiting
                raise
            import_module(_QUANTIZER)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Registers now if transformers' models are loaded, else as soon as they are."""
    if _MODELS in sys.modules:
        import_module(_QUANTIZER)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
