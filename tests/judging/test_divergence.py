"""KL to the float model by independent formulas, agreement by counting, and experts by what the routers say."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe_precision import allocate, quantize_model
from moe_precision.judging.choices import Place, containers, places_of, unchanged
from moe_precision.judging.divergence import Divergence, divergence, measure, token_divergence
from moe_precision.judging.evaluation import document_losses
from moe_precision.judging.judge import Judge
from moe_precision.judging.reference import Reference
from tests.support.models import build

FLOATS = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1], [0.2, 0.2, 0.6]])
OTHERS = torch.tensor([[0.25, 0.5, 0.25], [0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])


def ids(rows, length, seed):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def causal_batches():
    """Two batches, of two rows and one; the last three labels of the second row are padding."""
    first, second = ids(2, 9, 1), ids(1, 9, 2)
    labels = first.clone()
    labels[1, 6:] = -100
    return [{"input_ids": first, "labels": labels}, {"input_ids": second, "labels": second}]


def quantized(model, bits=2):
    return quantize_model(copy.deepcopy(model), allocate(model, method="uniform", average_bits=bits, group_size=32))


def test_by_hand():
    kl, agrees = token_divergence(FLOATS.log(), OTHERS.log())
    by_hand = [
        0.5 * math.log(2) + 0.25 * math.log(0.5),
        0.0,
        0.4 * math.log(2) + 0.6 * math.log(0.75),
    ]
    assert kl.dtype == torch.float64
    assert kl.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert agrees.tolist() == [False, True, True]
    with pytest.raises(ValueError, match=r"predicts \(3, 3\).*the other model \(3, 2\): give a model of the same"):
        token_divergence(FLOATS.log(), OTHERS.log()[:, :2])


def test_tokens_in_several_chunks(monkeypatch):
    whole = token_divergence(FLOATS.log(), OTHERS.log())
    monkeypatch.setattr("moe_precision.judging.divergence._CHUNK", 4)  # one token of three logits
    for one, other in zip(token_divergence(FLOATS.log(), OTHERS.log()), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_the_summary_by_hand():
    kl = torch.arange(1001, dtype=torch.float64)
    found = Divergence.of(kl, kl < 800, torch.tensor([True, True, False, True]), every=2)
    assert (found.kl, found.kl_99, found.kl_999) == (500, 990, 999)
    assert found.top1 == pytest.approx(800 / 1001)
    assert (found.same_experts, found.tokens, found.every) == (0.75, 1001, 2)
    other = Divergence(100, 10, 1, 0.0, 0.25, 1001, 2)
    mean = Divergence.mean_of([found, other])
    assert (mean.kl, mean.kl_99, mean.kl_999, mean.same_experts, mean.every) == (300, 500, 500, 0.5, 2)
    assert Divergence.mean_of([found, Divergence.of(kl, kl < 1, None)]).same_experts is None


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_a_model_does_not_diverge_from_itself(family):
    model = build(family)
    batches = [{"input_ids": ids(2, 7, 1), "labels": ids(2, 5, 2)}]
    batches = batches if model.config.is_encoder_decoder else causal_batches()
    found = divergence(model, copy.deepcopy(model), batches)
    assert (found.kl, found.kl_99, found.kl_999, found.top1, found.same_experts) == (0, 0, 0, 1, 1)
    assert found.tokens == (10 if model.config.is_encoder_decoder else 8 + 5 + 8)


def expected(model, other, batches):
    """KL of every target token by PyTorch's own loss, and how often the most likely token is the same."""
    kls, agree = [], []
    for batch in batches:
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                p, q = (one(**batch).logits[batch["labels"] != -100] for one in (model, other))
            else:
                kept = batch["labels"][:, 1:] != -100
                p, q = (one(input_ids=batch["input_ids"]).logits[:, :-1][kept] for one in (model, other))
        logs = [F.log_softmax(one.double(), dim=-1) for one in (q, p)]
        kls.append(F.kl_div(*logs, reduction="none", log_target=True).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
    return torch.cat(kls), torch.cat(agree).double().mean().item()


@pytest.mark.slow
def test_a_quantized_causal_model_by_an_independent_formula():
    model = build("mixtral", initializer_range=0.2)
    other, batches = quantized(model), causal_batches()
    kl, top1 = expected(model, other, batches)
    found = measure(model, other, batches)
    assert found.divergence.tokens == len(kl) == 8 + 5 + 8  # padding is left out
    assert found.divergence.kl == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found.divergence.kl_99 == pytest.approx(np.quantile(kl.numpy(), 0.99), rel=1e-3)
    assert found.divergence.kl_999 == pytest.approx(np.quantile(kl.numpy(), 0.999), rel=1e-3)
    assert found.divergence.top1 == pytest.approx(top1)
    assert 0 < found.divergence.kl < found.divergence.kl_99
    for losses, one in ((found.float_losses, model), (found.losses, other)):
        again, targets, documents = document_losses(one, batches)
        assert losses.equal(again)
        assert found.targets.equal(targets)
        assert found.documents.equal(documents)


@pytest.mark.slow
def test_a_quantized_encoder_decoder_model_by_an_independent_formula():
    model = build("switch_transformers", expert_capacity=64)
    labels = ids(2, 5, 2)
    labels[0, 3:] = -100
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    batches = [{"input_ids": ids(2, 7, 1), "attention_mask": mask, "labels": labels}]
    other = quantized(model, 1)
    kl, top1 = expected(model, other, batches)
    found = divergence(model, other, batches)
    assert found.tokens == len(kl) == 3 + 5
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found.top1 == pytest.approx(top1)


def chosen_by_routers(model, ids, experts):
    """The experts of the first router rows' largest logits, layer by layer, ``(layers, tokens)`` of frozen sets."""
    seen, handles = [], []
    for layer in model.model.layers:

        def keep(module, args, output):
            logits = next(one for one in (output if isinstance(output, tuple) else (output,)) if one.shape[-1] == 8)
            seen.append([frozenset(row) for row in logits.topk(experts).indices.tolist()])

        handles.append(layer.mlp.gate.register_forward_hook(keep))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.slow
def test_the_same_experts_are_those_that_the_routers_choose():
    model = build("mixtral", initializer_range=0.2)
    other, batches = quantized(model), causal_batches()
    same = total = 0
    for batch in batches:
        one, two = (chosen_by_routers(m, batch["input_ids"], 2) for m in (model, other))
        follows = F.pad(batch["labels"][:, 1:] != -100, (0, 1)).flatten().tolist()
        for token in (i for i, counts in enumerate(follows) if counts):
            same += all(a[token] == b[token] for a, b in zip(one, two, strict=True))
            total += 1
    found = divergence(model, other, batches)
    assert 0 < same < total
    assert found.same_experts == pytest.approx(same / total)


@pytest.mark.slow
def test_tokens_of_an_encoder_count_for_themselves():
    model = build("switch_transformers", expert_capacity=64)
    other = copy.deepcopy(model)
    router = next(module for name, module in other.decoder.named_modules() if name.endswith("router.classifier"))
    with torch.no_grad():
        router.weight.copy_(router.weight.roll(1, dims=0))  # every token of the decoder goes to the next expert
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    batch = {"input_ids": ids(2, 7, 1), "attention_mask": mask, "labels": ids(2, 5, 2)}
    assert divergence(model, other, [batch]).same_experts == pytest.approx(12 / (12 + 10))
    assert {place.path.split(".")[0]: place.encoder for place in places_of(model)} == {
        "encoder": True,
        "decoder": False,
    }


def test_experts_that_cannot_be_seen():
    place, seen = Place("a", 4, False), torch.tensor([[0, 1]], dtype=torch.int16)
    assert unchanged([place], {"a": seen}, {}) is None
    assert unchanged([place], {"a": seen}, {"a": seen[:, :1]}) is None
    assert unchanged([], {}, {}) is None
    assert unchanged([place], {"a": seen}, {"a": seen.clone()}).tolist() == [True]
    dense = torch.nn.Linear(3, 3)
    assert places_of(dense) == []
    assert containers(dense, [place]) == {}
    model = build("mixtral")
    places = places_of(model)
    model.model.layers[0].mlp.experts = torch.nn.Identity()
    model.model.layers[1].mlp = torch.nn.Identity()
    assert [one.path for one in containers(model, places)] == ["model.layers.0.mlp.experts"]


def test_no_hook_is_left_and_no_target_is_an_error(mixtral):
    batches = causal_batches()
    divergence(mixtral, copy.deepcopy(mixtral), batches)
    assert not any(module._forward_pre_hooks for module in mixtral.modules())
    empty = {"input_ids": batches[0]["input_ids"], "labels": torch.full((2, 9), -100)}
    for given in ([], [empty]):
        with pytest.raises(ValueError, match="no target tokens"):
            divergence(mixtral, mixtral, given)
    assert divergence(mixtral, mixtral, [empty, *batches]).tokens == 21


@pytest.mark.slow
def test_what_is_kept_gives_what_two_models_side_by_side_give():
    model = build("mixtral", initializer_range=0.2)
    other, batches = quantized(model), causal_batches()
    found = Reference(model, batches).measure(other)
    beside = measure(model, other, batches)
    assert found.divergence == beside.divergence
    assert found.float_losses.equal(beside.float_losses)


@pytest.mark.slow
def test_beyond_the_bound_every_third_token_is_kept():
    model = build("mixtral", initializer_range=0.2)
    other, batches = quantized(model), causal_batches()
    kl, _ = expected(model, other, batches)
    reference = Reference(model, batches, kept_bytes=7 * 128 * 4)  # seven of the 21 tokens
    found = reference.measure(other)
    assert reference.every == found.divergence.every == 3
    assert found.divergence.tokens == 7
    assert found.divergence.kl == pytest.approx(kl[::3].mean().item(), rel=1e-3)
    assert sum(seen.log_probs.untyped_storage().nbytes() for seen in reference._seen) == 7 * 128 * 4
    assert len(found.losses) == 21  # losses are of all tokens
    judge = Judge(model, batches, torch.ones(128), kept_bytes=100)
    assert judge.measure()[1].tokens == 1
