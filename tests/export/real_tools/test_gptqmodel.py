"""GPTQModel carries a plan out, expert by expert and projection by projection."""

from gptqmodel import GPTQModel
from gptqmodel.quantization import RTNConfig

from moe_precision.export import export
from tests.export.real_tools.conftest import check_experts, float_experts
from tests.support.models import fresh_python


def test_every_expert_gets_its_bits_and_the_model_loads(checkpoint, plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it writes logs where it runs
    layers = float_experts(checkpoint)
    found = export(plan, "gptqmodel")
    config = RTNConfig(bits=4, group_size=64, sym=True, dynamic=found.config)
    model = GPTQModel.load(str(checkpoint), config, device="cpu")
    model.quantize(None)
    model.save(str(tmp_path / "quantized"))
    plan.save(tmp_path / "plan.json")
    fresh_python(_READ, str(tmp_path / "quantized"), str(tmp_path / "plan.json"))
    check_experts(GPTQModel.load(str(tmp_path / "quantized"), device="cpu").model, layers, plan)


_READ = """
import sys
from moe_precision import PrecisionPlan
from moe_precision.checkpoints import Checkpoint
from moe_precision.export import plan_of_checkpoint
read = plan_of_checkpoint(sys.argv[1])
diff = read.diff(PrecisionPlan.load(sys.argv[2]))
assert not diff, diff
assert read.notes["group_sizes"] == [64]
others = [name for name in Checkpoint(sys.argv[1]).tensors if name.endswith("qweight") and "experts" not in name]
assert not others, others
"""
