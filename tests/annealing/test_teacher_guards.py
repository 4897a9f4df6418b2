"""A teacher where a run is not the plain one: buffers, leftovers of an interrupted run, full disks, other losses."""

import pytest
import torch

from moe_precision.annealing.teacher import Teacher, saved_tensors
from tests.annealing.test_annealing import IDS
from tests.annealing.test_teacher import on_grid

BATCH = {"input_ids": IDS[:3], "labels": IDS[:3]}


def teacher_of(model, hooks, other, share=1.0):
    return Teacher(model, saved_tensors(other), share, hooks)


def test_a_teacher_routes_by_its_own_biases_which_are_buffers():
    model, hooks, other = on_grid("deepseek_v3")
    biases = {name: one for name, one in other.named_buffers() if name.endswith("e_score_correction_bias")}
    for one in biases.values():
        one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(2)))
    before = {name: one.clone() for name, one in saved_tensors(model).items()}
    assert biases
    assert biases.keys() <= before.keys()
    teacher = teacher_of(model, hooks, other)
    with torch.no_grad(), teacher.in_charge():
        assert torch.equal(model(**BATCH).logits, other(**BATCH).logits)
    assert all(torch.equal(before[name], one) for name, one in saved_tensors(model).items())
