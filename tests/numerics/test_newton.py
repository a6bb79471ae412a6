"""Modes by Newton's method: exact in one step on quadratics, in any units, and honest where there is no mode."""

import pytest
import torch

from vifamily.errors import ModelError
from vifamily.numerics.newton import is_numerical, newton_modes, tolerant, value_and_gradient

DOUBLE = torch.float64
SCALES = torch.tensor([1e-4, 1.0, 1e4], dtype=DOUBLE)
CORRELATION = torch.tensor([[1.0, 0.9, 0.2], [0.9, 1.0, -0.1], [0.2, -0.1, 1.0]], dtype=DOUBLE)
PRECISION = torch.linalg.inv(SCALES[:, None] * CORRELATION * SCALES)
MEAN = torch.tensor([2e-3, -5.0, 4e3], dtype=DOUBLE)


def gaussian(z):
    return -0.5 * (((z - MEAN) @ PRECISION) * (z - MEAN)).sum(-1)


def test_a_badly_scaled_gaussian_from_several_starts():
    starts = torch.tensor([[0.0, 0.0, 0.0], [5.0, -3.0, 2.0]], dtype=DOUBLE)
    modes = newton_modes(gaussian, starts)
    assert modes.found.all()
    assert float(((modes.point - MEAN) / SCALES).abs().max()) < 1e-5
    covariance = modes.factor @ modes.factor.mT / (SCALES[:, None] * SCALES)
    assert torch.allclose(covariance, CORRELATION.expand_as(covariance), atol=1e-6)


def test_few_evaluations_are_made():
    calls = []
    newton_modes(lambda z: calls.append(len(z)) or gaussian(z), torch.zeros(1, 3, dtype=DOUBLE))
    assert len(calls) <= 12


def test_each_start_finds_a_mode_of_its_own():
    def two(z):
        return torch.logaddexp(-8 * (z[:, 0] - 2) ** 2, -8 * (z[:, 0] + 2) ** 2)

    modes = newton_modes(two, torch.tensor([[-1.7], [1.6]], dtype=DOUBLE))
    assert torch.allclose(modes.point[:, 0], torch.tensor([-2.0, 2.0], dtype=DOUBLE), atol=1e-5)
    assert torch.allclose(modes.factor[:, 0, 0], torch.full((2,), 0.25, dtype=DOUBLE), rtol=1e-5)


def test_a_saddle_is_left():
    # stationary at the origin, with modes at x = -1 and 1
    modes = newton_modes(lambda z: -((z[:, 0] ** 2 - 1) ** 2) - z[:, 1] ** 2, torch.full((1, 2), 1e-3, dtype=DOUBLE))
    assert bool(modes.found)
    assert abs(float(modes.point[0, 0])) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "log_density",
    [lambda z: z.sum(-1), lambda z: (z**2).sum(-1), lambda z: z.sum(-1) * torch.nan],
    ids=["slope", "bowl", "nan"],
)
def test_where_there_is_no_mode_none_is_found(log_density):
    modes = newton_modes(log_density, torch.ones(2, 2, dtype=DOUBLE))
    assert not modes.found.any()


def test_a_density_without_gradient_is_said():
    with pytest.raises(ModelError, match="no gradient"):
        value_and_gradient(lambda z: z.detach().sum(-1), torch.zeros(1, 2))


def test_points_at_which_a_model_fails_are_nan_and_the_others_are_not():
    def fails(z):
        if bool((z[:, 0] > 1).any()):
            raise torch.linalg.LinAlgError("not positive definite")
        return -z.square().sum(-1)

    z = torch.tensor([[0.0], [2.0], [0.5], [0.25], [3.0]], dtype=DOUBLE)
    found = tolerant(fails)(z)
    assert found.isnan().tolist() == [False, True, False, False, True]
    assert torch.equal(found[[0, 2, 3]], -z[[0, 2, 3], 0].square())


def test_other_failures_are_not_hidden():
    def broken(z):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        tolerant(broken)(torch.zeros(2, 1))
    assert not is_numerical(TypeError())
    wrapped = ModelError("the model raised")
    wrapped.__cause__ = ValueError("Expected parameter scale to satisfy the constraint GreaterThan(lower_bound=0.0)")
    assert is_numerical(wrapped)
    assert not is_numerical(ValueError("a file is missing"))
