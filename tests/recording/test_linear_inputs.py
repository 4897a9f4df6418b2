"""Second moments of the inputs of linear layers outside of experts: recorded, kept in the file, and rounded under."""

import copy
from dataclasses import replace

import pytest
import torch

from moe_precision import allocate, find_moe_layers, load_model, quantize_checkpoint, quantize_model
from moe_precision.quantize.replace import non_expert_linears
from moe_precision.recording.collecting import bytes_of, collect_statistics, passes
from moe_precision.recording.linear_inputs import LinearInputs
from moe_precision.recording.statistics import ExpertStatistics, StatisticsError, file_bytes
from tests.support.models import build, logits

QUERY, OUT = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def model():
    return build("mixtral")


@pytest.fixture(scope="module")
def batches():
    """Two batches of 3 rows of 40 tokens, whose first row ends in 15 of padding."""
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[0, 25:] = 0
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 128, (3, 40), generator=generator), "attention_mask": mask} for _ in (0, 1)]


@pytest.fixture(scope="module")
def statistics(model, batches):
    return collect_statistics(model, batches, linears=non_expert_linears(model, find_moe_layers(model)))


def inputs_of(model, name, batches) -> torch.Tensor:
    """What a module is given for the tokens that are no padding, ``(tokens, in)``."""
    rows = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: rows.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat([x[batch["attention_mask"] == 1] for x, batch in zip(rows, batches, strict=True)])


def test_sums_over_tokens_without_padding(model, batches, statistics):
    layers = len(model.model.layers)
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(layers) for p in "qkvo"]
    assert list(statistics.linears.tokens) == names
    for name in (QUERY, OUT):
        x = inputs_of(model, name, batches)
        assert statistics.linears.tokens[name] == len(x) == 2 * (120 - 15)
        torch.testing.assert_close(statistics.linears.diagonals[name], x.square().mean(0))
        share = 0.3 * x.shape[1] / (len(x) + 0.3 * x.shape[1])  # the rule of experts
        moment = x.T @ x / len(x)
        expected = (1 - share) * moment + share * moment.diagonal().mean() * torch.eye(x.shape[1])
        torch.testing.assert_close(statistics.linears.fit_moment(name), expected, rtol=1e-3, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not collect_statistics(model, batches).linears.tokens  # unless they are asked for


def test_within_a_bound_on_memory(model, batches, statistics):
    layers = find_moe_layers(model)
    widths = {name: len(diagonal) for name, diagonal in statistics.linears.diagonals.items()}
    bound = bytes_of(passes(layers[:1], 1.0)[0]) / 2**30
    groups = passes(layers, bound, widths)
    assert len(groups) > 2
    assert [name for group in groups for name in group.linears] == list(widths)
    again = collect_statistics(model, batches, memory_gib=bound, linears=list(widths))
    for name in widths:
        assert torch.equal(again.linears.diagonals[name], statistics.linears.diagonals[name])
    assert again.linears.tokens == statistics.linears.tokens


def test_the_file(model, statistics, tmp_path):
    path = tmp_path / "x.statistics.safetensors"
    statistics.save(path)
    widths = [len(diagonal) for diagonal in statistics.linears.diagonals.values()]
    header = int.from_bytes(path.read_bytes()[:8], "little")
    experts = sum(8 * (len(tokens) + len(tokens) / 2) for tokens in statistics.tokens.values())  # and router norms
    assert path.stat().st_size == 8 + header + file_bytes(find_moe_layers(model), widths) + experts
    found = ExpertStatistics.load(path)
    assert found.linears.tokens == statistics.linears.tokens
    assert torch.equal(found.linears.fit_moment(QUERY), statistics.linears.fit_moment(QUERY))
    assert found.described().endswith(f"; inputs of {len(widths)} other linear layers")
    body = {
        name.removeprefix("model."): replace(shape, router=shape.router.removeprefix("model."))
        for name, shape in statistics.layers.items()
    }
    body = {name: replace(shape, experts=shape.experts.removeprefix("model.")) for name, shape in body.items()}
    assert found.for_layers(body).linears.tokens.keys() == {
        name.removeprefix("model.") for name in found.linears.tokens
    }


def test_bad_values_are_named(statistics, tmp_path):
    changed = copy.deepcopy(statistics)
    changed.linears.diagonals[OUT][3] = torch.nan
    changed.save(tmp_path / "x")
    with pytest.raises(StatisticsError, match=rf"linear layer '{OUT}': holds values that are not finite"):
        ExpertStatistics.load(tmp_path / "x")
    changed.linears.diagonals[OUT] = torch.ones(3)
    changed.save(tmp_path / "x")
    with pytest.raises(StatisticsError, match=rf"linear layer '{OUT}': diagonal and correlations have shapes \(3,\)"):
        ExpertStatistics.load(tmp_path / "x")


def test_only_linear_layers(model, batches):
    with pytest.raises(
        StatisticsError, match=r"'model\.norm' is a MixtralRMSNorm in MixtralForCausalLM, expected an nn.L"
    ):
        collect_statistics(model, batches, linears=["model.norm"])
    with pytest.raises(StatisticsError, match="'nowhere' is not there in MixtralForCausalLM"):
        collect_statistics(model, batches, linears=["nowhere"])


@pytest.mark.slow
def test_rounding_under_them(model, batches, statistics, tmp_path, monkeypatch):
    """The squared error of a layer's output falls, and a checkpoint gets the same codes, whatever was there before."""
    plan = allocate(model, method="uniform", bits=(16,), average_bits=16, group_size=32)
    without = replace(statistics, linears=LinearInputs())
    packed = {
        name: quantize_model(copy.deepcopy(model), plan, non_expert_bits=4, statistics=known)
        for name, known in (("with", statistics), ("without", without))
    }
    for name in (QUERY, OUT):
        x, exact = inputs_of(model, name, batches), model.get_submodule(name)
        errors = {key: (one.get_submodule(name)(x) - exact(x)).square().mean() for key, one in packed.items()}
        assert errors["with"] < 0.8 * errors["without"]
    model.save_pretrained(tmp_path / "float")
    statistics.save(tmp_path / "x.statistics.safetensors")
    how = {"plan": plan, "out": tmp_path / "q", "non_expert_bits": 4}
    monkeypatch.setattr("shutil.copy2", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # packed files of other statistics are not taken
        quantize_checkpoint(tmp_path / "float", statistics=without, **how)
    monkeypatch.undo()
    quantize_checkpoint(tmp_path / "float", statistics=tmp_path / "x.statistics.safetensors", **how)
    assert torch.equal(logits(load_model(tmp_path / "q")), logits(packed["with"]))
