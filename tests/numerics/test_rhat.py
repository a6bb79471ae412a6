"""R-hat against arviz and against chains whose answer is known."""

import arviz
import numpy as np
import pytest
import torch

from vifamily.errors import ShapeError
from vifamily.numerics.rhat import rhat, split_chains, split_rhat


def test_agrees_with_arviz(generator):
    chains = torch.randn(4, 251, 2, generator=generator, dtype=torch.float64).cumsum(1)
    ours = rhat(chains)
    theirs = [float(arviz.rhat(chains[..., q].numpy(), method="identity")) for q in range(2)]
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-10)
    split = [float(arviz.rhat(chains[0, 1:, q].numpy().reshape(2, 125), method="identity")) for q in range(2)]
    np.testing.assert_allclose(split_rhat(chains[0]).numpy(), split, rtol=1e-10)


def test_formula_on_two_chains_by_hand():
    chains = torch.tensor([[[0.0], [2.0]], [[4.0], [6.0]]], dtype=torch.float64)
    # within: 2; variance of the means 1 and 5: 8; so sqrt((2 / 2 + 8) / 2)
    assert float(rhat(chains)) == pytest.approx(4.5**0.5, rel=1e-12)


def test_odd_length_drops_the_first_time():
    assert split_chains(torch.arange(5.0).reshape(1, 5, 1)).squeeze(-1).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_constants_and_non_finite_values():
    level = torch.full((100, 1), 0.1, dtype=torch.float64)
    step = torch.cat([level[:50], level[:50] + 1])
    broken = level.clone()
    broken[3] = torch.nan
    out = split_rhat(torch.cat([level, step, broken], dim=1))
    assert float(out[0]) == 1.0
    assert float(out[1]) == torch.inf
    assert bool(out[2].isnan())


def test_one_dimension_gives_a_scalar(generator):
    x = torch.randn(64, generator=generator, dtype=torch.float64)
    assert split_rhat(x).shape == ()
    assert float(split_rhat(x)) == float(split_rhat(x[:, None])[0])


@pytest.mark.parametrize("shape", [(3, 2), (3,), (), (2, 3, 4)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ShapeError, match="four times"):
        split_rhat(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 10, 2), (2, 1, 2), (2, 10)])
def test_bad_chains_are_refused(shape):
    with pytest.raises(ShapeError, match="two chains"):
        rhat(torch.zeros(shape))
