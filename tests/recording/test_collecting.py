"""Second moments of the experts' inputs, against the experts run by hand from a capture of what the layer was given."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_precision import find_moe_layers
from moe_precision.recording.collecting import collect_statistics, memory_bytes
from moe_precision.recording.collector import Collector
from moe_precision.recording.statistics import StatisticsError, file_bytes
from tests.support.models import PlainMoE, build


def inputs(model, rows: int = 3, length: int = 11, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


def captured(model, layer, batches):
    """What the container of a layer's experts is called with: hidden, index (N, K), weights (N, K)."""
    calls = []
    handle = layer.container().register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((*args, *kwargs.values())[:3]), with_kwargs=True
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return calls


def gate_of(model_type, layer):
    """The first matrix and its gate, written down for each family."""
    weights = [layer.expert_weights(expert) for expert in range(layer.num_experts)]
    container = layer.container()
    if model_type == "gpt_oss":

        def inner(expert, x):
            y = x @ container.gate_up_proj[expert] + container.gate_up_proj_bias[expert]
            gate, up = y[:, ::2].clamp(max=container.limit), y[:, 1::2].clamp(-container.limit, container.limit)
            return (up + 1) * gate * torch.sigmoid(gate * container.alpha)

        return inner
    if model_type == "switch_transformers":
        return lambda expert, x: torch.relu(x @ weights[expert]["wi"].T)

    def silu(expert, x):
        gate, up = (x @ weights[expert]["gate_up_proj"].T).chunk(2, -1)
        return F.silu(gate) * up

    return silu


@torch.no_grad()
def by_hand(model, model_type, layer, batches, keep=None):
    """Second moments and tokens, from a dense loop over tokens and experts in float64."""
    first, last = layer.projections
    sums = {name: torch.zeros(layer.num_experts, inp, inp).double() for name, (_, inp) in layer.projections.items()}
    tokens = torch.zeros(layer.num_experts, dtype=torch.int64)
    inner = gate_of(model_type, layer)
    for call, (hidden, index, weights) in enumerate(captured(model, layer, batches)):
        if index.ndim == 3:  # a mask (N, 1, E)
            chosen = index.float() * weights.unsqueeze(-1)
            chosen = chosen.sum(1)
        else:
            chosen = torch.zeros(len(hidden), layer.num_experts).scatter(1, index, weights.float())
        for expert in range(layer.num_experts):
            for token in chosen[:, expert].nonzero().flatten().tolist():
                if keep is not None and not keep[call].flatten()[token]:
                    continue
                x, w = hidden[token : token + 1], float(chosen[token, expert])
                y = inner(expert, x)
                sums[first][expert] += w**2 * (x.T @ x).double()
                sums[last][expert] += w**2 * (y.T @ y).double()
                tokens[expert] += 1
    return {name: of_all / tokens.clamp(min=1).view(-1, 1, 1) for name, of_all in sums.items()}, tokens


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe", "switch_transformers"])
def test_against_experts_run_by_hand(model_type):
    model = build(model_type).train()
    if model_type == "gpt_oss":
        for name, parameter in model.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter, std=0.5)
    batches = [inputs(model, seed=seed) for seed in (1, 2)]
    statistics = collect_statistics(model, batches, text="random tokens")
    assert model.training
    assert statistics.text == "random tokens"
    model.eval()
    for layer in find_moe_layers(model):
        moments, tokens = by_hand(model, model_type, layer, batches)
        assert torch.equal(statistics.tokens[layer.name], tokens)
        assert tokens.sum() > 0
        collector = Collector(model, [layer])  # before they are stored in half precision
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        collector.close()
        for name, expected in moments.items():
            sums = collector._sums[layer.name][name] / tokens.clamp(min=1).view(-1, 1, 1)
            torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
            for expert in range(layer.num_experts):
                found = statistics.second_moment(layer.name, name, expert).double()
                torch.testing.assert_close(
                    found, expected[expert], rtol=1e-3, atol=1e-3 * float(expected[expert].max())
                )


@pytest.mark.parametrize("model_type", ["mixtral", "switch_transformers"])
def test_padding_does_not_count(model_type):
    model = build(model_type)
    batch = inputs(model)
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[1, 4:] = mask[2, 9:] = 0
    batch |= {"attention_mask": mask}
    statistics = collect_statistics(model, [batch])
    for layer in find_moe_layers(model):
        keep = None if "decoder" in layer.name else [mask]
        _, tokens = by_hand(model, model_type, layer, [batch], keep)
        assert torch.equal(statistics.tokens[layer.name], tokens)
    without = collect_statistics(model, [{**batch, "attention_mask": torch.ones_like(mask)}])
    first = next(iter(without.tokens))
    assert statistics.tokens[first].sum() < without.tokens[first].sum()


def test_an_expert_that_is_never_reached():
    model = build("mixtral")
    layer = find_moe_layers(model)[0]
    with torch.no_grad():
        model.model.layers[0].mlp.experts.register_forward_pre_hook(
            lambda module, args: (args[0], args[1].where(args[1] != 5, 4), args[2])
        )
    statistics = collect_statistics(model, [inputs(model, rows=30)])
    assert statistics.tokens[layer.name][5] == 0
    assert statistics.experts_without_tokens == 1
    assert "1 experts saw none" in statistics.described()
    assert not statistics.second_moment(layer.name, "down_proj", 5).any()
    assert statistics.fit_moment(layer.name, "down_proj", 5) is None


def test_modules_in_a_plain_list_weigh_1():
    model = PlainMoE()
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    statistics = collect_statistics(model, [x[:120], x[120:]])
    chosen = model.router(x).argmax(-1)
    assert torch.equal(statistics.tokens[""], chosen.bincount(minlength=4))
    for expert in range(4):
        mine = x[chosen == expert]
        hidden = torch.relu(model.experts[expert][0](mine)).detach()
        for name, rows in (("0", mine), ("2", hidden)):
            found = statistics.second_moment("", name, expert)
            torch.testing.assert_close(found, rows.T @ rows / len(rows), rtol=2e-3, atol=2e-3)


def test_what_no_hook_sees():
    model = build("mixtral")
    with pytest.raises(StatisticsError, match=r"layer 'model\.layers\.0\.mlp': no input of .* was seen"):
        collect_statistics(model, [])
    assert not any(module._forward_pre_hooks for module in model.modules())

    class Through(PlainMoE):
        """Reads the parameters of its experts itself."""

        def forward(self, x):
            return sum(F.linear(F.linear(x, e[0].weight, e[0].bias).relu(), e[2].weight) for e in self.experts)

    with pytest.raises(StatisticsError, match="called in a way that no hook sees"):
        collect_statistics(Through(), [torch.randn(5, 32)])


def test_experts_in_a_layout_that_cannot_be_seen():
    model = PlainMoE()
    for expert in model.experts:
        expert[0] = nn.Bilinear(32, 32, 64)
        expert[0].weight = nn.Parameter(torch.randn(64, 32))
    with pytest.raises(StatisticsError, match=r"the inputs of its experts .* cannot be seen: expected transformers'"):
        collect_statistics(model, [torch.randn(5, 32)])


def test_inputs_that_are_not_finite():
    model = build("mixtral")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("inf")
    with pytest.raises(StatisticsError, match="values that are not finite; has training diverged"):
        collect_statistics(model, [{"input_ids": torch.full((1, 5), 7)}])


def test_bytes_are_known_before(tmp_path):
    model = build("mixtral")
    layers = find_moe_layers(model)
    assert memory_bytes(layers) == 2 * 8 * 4 * (64 * 64 + 128 * 128)
    statistics = collect_statistics(model, [inputs(model)])
    statistics.save(tmp_path / "s.safetensors")
    size = (tmp_path / "s.safetensors").stat().st_size
    assert file_bytes(layers) < size < file_bytes(layers) + 4096
