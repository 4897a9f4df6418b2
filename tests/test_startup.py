"""What is imported when: help needs neither torch nor transformers, and importing the package registers the quantizer.

Each case is a process of its own, since this one has imported everything.
"""

import subprocess
import sys

import pytest

import moe_precision
from moe_precision import allocate, quantize_model
from moe_precision.cli.commands import SUMMARIES
from moe_precision.cli.main import main, parser
from moe_precision.layers import LayerShape
from moe_precision.plans.layer_plan import LayerPlan
from moe_precision.plans.plan import PrecisionPlan
from tests.support.models import build

MAIN = (
    "from moe_precision.cli import main\n"
    "try:\n    main([{}])\nexcept SystemExit as stop:\n    assert stop.code in (0, 2)"
)
HEAVY = {"torch", "transformers", "pytorch_lightning", "matplotlib", "scipy", "numpy"}
REGISTERED = (
    "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs, "
    "AUTO_QUANTIZER_MAPPING as quantizers\n"
    "print('moe_precision' in configs and 'moe_precision' in quantizers)\n"
)


def printed(code):
    """What a new process prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import moe_precision",
        "import moe_precision; moe_precision.__version__, dir(moe_precision), moe_precision.MoEPrecisionError",
        MAIN.format("'--help'"),
        MAIN.format("'--version'"),
        MAIN.format("'plant'"),
        MAIN.format("'show', 'PLAN'"),
    ],
    ids=["import", "names", "help", "version", "misspelt", "show"],
)
def test_nothing_heavy_is_imported_before_it_is_used(code, tmp_path):
    shape = LayerShape("gate.weight", 4, {"up": (64, 64), "down": (64, 64)})
    bits = {"up": [2, 2, 3, 3], "down": [2, 2, 3, 3]}
    PrecisionPlan("x", {"layers.0": LayerPlan(shape, bits)}, 64, "uniform").save(tmp_path / "plan.json")
    code = code.replace("PLAN", str(tmp_path / "plan.json"))
    out = printed(f"{code}\nimport sys; print('imported:', sorted({HEAVY!r} & set(sys.modules)))")
    assert out.endswith("imported: []\n")


def test_help_lists_every_command_and_each_commands_help_its_options(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = " ".join(capsys.readouterr().out.split())
    for command, summary in SUMMARIES.items():
        assert f" {command} {summary.split()[0]}" in listed
    assert vars(parser(["export"]).parse_args(["export", "p.json", "--to", "gguf"]))["to"] == "gguf"
    with pytest.raises(SystemExit):  # only listed here: `main` imports the command that it runs
        parser(["show"]).parse_args(["export", "p.json", "--to", "gguf"])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    model = build("mixtral", num_hidden_layers=1)
    quantize_model(model, allocate(model, method="uniform", average_bits=2, group_size=64))
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import moe_precision\nfrom transformers import AutoModelForCausalLM",
        pytest.param(
            "import transformers.modeling_utils\nimport moe_precision\nfrom transformers import AutoModelForCausalLM",
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["before", "models first"],
)
def test_importing_the_package_is_enough_to_load_a_packed_checkpoint(imports, packed):
    model = f"AutoModelForCausalLM.from_pretrained({str(packed)!r})"
    out = printed(f"{imports}\nmodel = {model}\nprint('packed' in str(model))")
    assert out.splitlines()[-1] == "True"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "first",
    [
        "import transformers.core_model_loading, transformers.integrations.moe, transformers.modeling_layers",
        "import moe_precision.layers",  # one of ours loads the models, before it is complete itself
        "import moe_precision.compat",
        "import moe_precision.plans.settings, transformers.modeling_utils",
        "try:\n    from moe_precision import no_such_name\nexcept ImportError:\n    import transformers.modeling_utils",
        "import importlib.util as u; u.find_spec('moe_precision.callbacks'); import transformers.modeling_utils",
    ],
)
def test_the_quantizer_is_registered_whatever_loads_the_models_first(first):
    waiting = "import sys; print([f for f in sys.meta_path if type(f).__module__ == 'moe_precision.registration'])"
    assert printed(f"import moe_precision\n{first}\n{REGISTERED}{waiting}").splitlines()[-2:] == ["True", "[]"]


def test_every_public_name_is_there_and_a_wrong_one_is_an_attribute_error():
    for name in moe_precision.__all__:
        assert getattr(moe_precision, name) is not None
    assert {*moe_precision.__all__} <= {*dir(moe_precision)}
    assert set(moe_precision._MODULE_OF) == {*moe_precision.__all__} - {"__version__"}
    assert not hasattr(moe_precision, "alocate")
