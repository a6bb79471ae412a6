"""A likelihood at many observations: the same numbers whichever way it is called, and none where it cannot be."""

import math

import pytest
import torch
from torch.distributions import Gamma, Normal

import vifamily as vf
from vifamily.errors import ModelError, NotAvailableError, ShapeError
from vifamily.models import SimulatorAtData

NORMAL = Normal(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))


def simulator(log_likelihood, prior=NORMAL):
    return vf.models.Simulator(prior, lambda t: t + torch.randn_like(t), log_likelihood=log_likelihood,
                               dtype=torch.float64)  # fmt: skip


def rowwise(theta, x):
    return -0.5 * (theta - x).square().sum(-1)


def by_component(theta, x):
    """``x[0]`` is the first number of one observation, but the first row of many."""
    return -0.5 * (theta[:, 0] - x[0]).square() - 0.5 * (theta[:, 1] - x[1]).square()


def summing(theta, x):
    """The sum over ``x`` runs over everything, so that rows that belong together would give wrong numbers."""
    return theta.sum(-1) * x.sum()


def branching(theta, x):
    """Python branches on numbers cannot be mapped over."""
    return rowwise(theta, x) if float(x[0]) > 0 else by_component(theta, x)


@pytest.mark.parametrize(
    ("function", "way"), [(rowwise, "paired"), (by_component, "vmap"), (summing, "vmap"), (branching, "each")]
)
def test_each_way_gives_the_joint_of_each_observation(function, way):
    source = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, generator=source, dtype=torch.float64)
    z = torch.randn(5, 7, 2, generator=source, dtype=torch.float64)
    model = SimulatorAtData(simulator(function)).given(x)
    found = model.log_joint(z)
    exact = torch.stack([model.simulator.at(x[i]).log_joint(z[i]) for i in range(5)])
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    assert model.way == way


def test_a_positive_parameter_keeps_its_jacobian():
    prior = Gamma(torch.tensor([2.0], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64))
    model = SimulatorAtData(simulator(lambda theta, x: Normal(theta, 1.0).log_prob(x).sum(-1), prior))
    x = torch.tensor([[0.3], [1.0]], dtype=torch.float64)
    z = torch.tensor([[[-0.4]], [[0.7]]], dtype=torch.float64)
    found = model.given(x).log_joint(z).flatten()
    theta = torch.nn.functional.softplus(z.flatten())
    logs = z.flatten() if not torch.allclose(model.layout.constrain(z)["theta"].flatten(), theta) else None
    theta = theta if logs is None else z.flatten().exp()
    jacobian = torch.nn.functional.logsigmoid(z.flatten()) if logs is None else logs
    density = Gamma(2.0, 3.0).log_prob(theta) + Normal(theta, 1.0).log_prob(x.flatten()) + jacobian
    torch.testing.assert_close(found, density, rtol=1e-6, atol=1e-6)


def test_points_must_belong_to_the_observations():
    model = SimulatorAtData(simulator(rowwise))
    with pytest.raises(NotAvailableError, match="no observations"):
        model.log_joint(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ShapeError):
        model.given(torch.zeros(3, 2, dtype=torch.float64)).log_joint(torch.zeros(4, 2, dtype=torch.float64))


def test_without_a_likelihood_or_with_a_broken_one():
    with pytest.raises(NotAvailableError, match="likelihood"):
        SimulatorAtData(simulator(None))

    def broken(theta, x):
        raise ValueError("a mistake")

    model = SimulatorAtData(simulator(broken)).given(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ModelError, match="a mistake"):
        model.log_joint(torch.zeros(2, 3, 2, dtype=torch.float64))


def test_where_no_number_is_finite_yet_nothing_is_decided():
    def far(theta, x):
        return torch.where(theta.sum(-1) > 0, rowwise(theta, x), torch.full_like(theta[:, 0], -math.inf))

    x = torch.zeros(2, 2, dtype=torch.float64)
    model = SimulatorAtData(simulator(far)).given(x)
    assert not bool(model.log_joint(-torch.ones(2, 3, 2, dtype=torch.float64)).isfinite().any()) and model.way is None
    model.log_joint(torch.ones(2, 3, 2, dtype=torch.float64))
    assert model.way == "paired"
