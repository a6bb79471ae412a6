"""Parameters as one matrix: views, order, and restarts as rows."""

import pytest
import torch
from torch import nn

from vifamily.solvers._flat import FlatParameters


def parameters(*shapes):
    count = iter(range(1000))
    return [nn.Parameter(torch.tensor([float(next(count)) for _ in range(int(torch.Size(s).numel()))]).reshape(s))
            for s in shapes]  # fmt: skip


@pytest.mark.parametrize(
    ("restarts", "shapes"),
    [(1, [(2,), (), (2, 3)]), (3, [(3, 2), (3,), (3, 2, 2)]), (1, [(0,), (1, 1)]), (2, [(2, 1)])],
)
def test_parameters_become_views_and_keep_their_values(restarts, shapes):
    held = parameters(*shapes)
    before = [p.detach().clone() for p in held]
    flat = FlatParameters(held, restarts)
    for parameter, value, shape in zip(held, before, shapes, strict=True):
        assert parameter.shape == torch.Size(shape)
        assert torch.equal(parameter, value)
    flat.value.add_(100.0)
    for parameter, value in zip(held, before, strict=True):
        assert torch.equal(parameter, value + 100)
    flat.set(torch.zeros_like(flat.value))
    assert all(not bool(p.any()) for p in held)


def test_rows_are_restarts():
    matrix, vector = parameters((2, 2), (2,))
    flat = FlatParameters([matrix, vector], 2)
    assert torch.equal(flat.value, torch.tensor([[0.0, 1.0, 4.0], [2.0, 3.0, 5.0]]))


def test_gradients_are_laid_out_like_the_parameters_and_missing_ones_are_zero():
    matrix, vector = parameters((2, 2), (2,))
    flat = FlatParameters([matrix, vector], 2)
    out = flat.gather([matrix.detach() * 2, None])
    assert torch.equal(out, torch.tensor([[0.0, 2.0, 0.0], [4.0, 6.0, 0.0]]))
    single = FlatParameters(parameters((2,)), 1)
    assert torch.equal(single.gather([torch.tensor([5.0, 6.0])]), torch.tensor([[5.0, 6.0]]))


def test_frozen_parameters_are_left_out():
    free, frozen = parameters((2,), (3,))
    frozen.requires_grad_(False)
    flat = FlatParameters([free, frozen], 1)
    assert flat.value.shape == (1, 2)
    assert FlatParameters([frozen], 2).value.shape == (2, 0)


def test_a_column_names_its_parameter():
    flat = FlatParameters(parameters((2,), (3,)), 1)
    assert [flat.name_of(c, ["loc", "scale"]) for c in range(6)] == ["loc", "loc", "scale", "scale", "scale", "unknown"]


def test_gradients_reach_the_parameters_through_the_views():
    (vector,) = parameters((3,))
    flat = FlatParameters([vector], 1)
    (gradient,) = torch.autograd.grad((vector**2).sum(), [vector])
    assert torch.equal(flat.gather([gradient]), 2 * flat.value)
