"""What vLLM finds of us: a light entry point. What it does there is tested in real_engine/."""

import re
from importlib import import_module
from pathlib import Path

from tests.support.models import fresh_python

PYPROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")


def test_the_entry_point_is_a_function_of_the_plugin():
    module, _, name = re.search(r'"vllm.general_plugins"\]\nmoe_precision = "(.+)"', PYPROJECT)[1].partition(":")
    assert callable(getattr(import_module(module), name))


def test_looking_it_up_imports_neither_torch_nor_transformers():
    code = "import sys, moe_precision.serving.vllm_plugin; print({'torch', 'transformers', 'vllm'} & {*sys.modules})"
    assert fresh_python(code).strip() == "set()"
