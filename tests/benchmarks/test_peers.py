"""What the benchmark against other quantizers computes by itself: the importance matrix that llama.cpp's types take."""

import pytest
import torch

from benchmarks.peer_tools import _importance
from tests.support.models import build


@torch.inference_mode()
def test_importance_is_the_mean_square_of_what_an_expert_sees():
    model = build("mixtral")
    blocks = list(torch.randint(0, model.config.vocab_size, (2, 64)))
    found = _importance(model, blocks)
    layer = model.model.layers[0]
    seen: dict[str, list[torch.Tensor]] = {"hidden": [], "chosen": []}

    def keep(module, args):
        seen["hidden"].append(args[0])
        seen["chosen"].append(args[1])

    hook = layer.mlp.experts.register_forward_pre_hook(keep)
    for block in blocks:
        model(input_ids=block[None])
    hook.remove()
    hidden, chosen = torch.cat(seen["hidden"]), torch.cat(seen["chosen"])
    for expert in range(model.config.num_local_experts):
        rows = hidden[[expert in of for of in chosen.tolist()]].double()
        gate, up = (rows @ layer.mlp.experts.gate_up_proj[expert].double().T).chunk(2, dim=1)
        inner = torch.nn.functional.silu(gate) * up
        for name, inputs in (("gate_up_proj", rows), ("down_proj", inner)):
            expected = (inputs**2).mean(0).float()
            torch.testing.assert_close(found[f"model.layers.0.mlp.experts.{name}"][expert], expected)


@torch.inference_mode()
def test_an_expert_without_tokens_has_no_importance():
    model = build("mixtral")
    with pytest.raises(AssertionError, match="saw no token"):
        _importance(model, [torch.tensor([1])])
