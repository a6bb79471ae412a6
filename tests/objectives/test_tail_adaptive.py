"""Tail-adaptive weights: the rule and its inversion, ties, limits, and where mean field lands."""

import dataclasses
import math

import pytest
import torch

from vifamily import testing
from vifamily.errors import ConfigError, IncompatibleError, SpecError
from vifamily.objectives import Elbo, TailAdaptive
from vifamily.objectives.tail_adaptive import tail_weights
from vifamily.testing import ContractError, targets
from vifamily.testing._tools import flat_gradient
from vifamily.types import Loss

RATIOS = torch.tensor([3.0, 1.0, 2.0, 0.5], dtype=torch.float64)


def test_the_largest_ratio_gets_the_largest_weight():
    assert torch.allclose(tail_weights(RATIOS, -1.0), torch.tensor([0.48, 0.16, 0.24, 0.12], dtype=torch.float64))


def test_weights_by_the_definition():
    at = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at[0, 1] = at[0, 4]  # a tie
    for beta in (-0.5, -1.0, -2.0):
        share = torch.tensor([[(row >= x).double().mean() for x in row] for row in at], dtype=torch.float64)
        wanted = share**beta / (share**beta).sum(-1, keepdim=True)
        assert torch.allclose(tail_weights(at, beta), wanted, atol=1e-14)
    assert torch.allclose(tail_weights(torch.zeros(5), -1.0), torch.full((5,), 0.2))


def test_without_weights_it_is_sticking_the_landing(tools):
    target = targets.linear_regression()
    family = tools.gaussian([0.2, -0.3], [0.5, 0.7])
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = (o.loss(family, target.model, noise) for o in (TailAdaptive(0.0), Elbo("stl")))
    assert torch.allclose(flat_gradient(ours, family), flat_gradient(theirs, family), atol=1e-12)


def fitted_sd(objective, draws, tools, steps=800):
    """Mean-field sd on a normal law of correlation 0.9, with fresh draws at every step."""
    model, source = targets.correlated_normal(0.9).model, torch.Generator().manual_seed(1)
    family = tools.gaussian([0.1, -0.1], [0.6, 0.6])
    optimiser = torch.optim.Adam(family.parameters(), lr=0.03)
    total = torch.zeros(2, dtype=torch.float64)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.03 * 0.1 ** (step / steps)
        optimiser.zero_grad()
        noise = torch.randn(draws, 2, generator=source, dtype=torch.float64)
        objective.loss(family, model, noise).surrogate.backward()
        optimiser.step()
        if step >= steps // 2:
            total += family.moments()[1].detach().diagonal().sqrt()
    return (total / (steps - steps // 2)).tolist()


@pytest.mark.parametrize(("beta", "draws"), [(-1.0, 32), (-1.0, 128), (-0.5, 32)])
def test_mean_field_lands_strictly_between_conditional_and_marginal(beta, draws, tools):
    conditional, marginal = targets.mean_field_sd(1, 0.9), targets.mean_field_sd(0, 0.9)
    for sd in fitted_sd(TailAdaptive(beta), draws, tools):
        assert conditional * 1.1 < sd < marginal * 0.95


@dataclasses.dataclass(frozen=True)
class Inverted(TailAdaptive):
    """The ranks upside down, as they have been shipped."""

    def loss(self, family, model, noise, batch=None, state=None):
        draw = family(noise)
        ratio = model.log_joint(draw.z, batch) - family.log_prob(draw.z, frozen=True)
        weight = tail_weights(-ratio.detach(), float(self.beta))
        return Loss(-(weight * ratio).sum(-1), -ratio.detach().mean(-1), {})


def test_inverted_ranks_are_caught():
    weights = tail_weights(-RATIOS, -1.0)
    assert torch.allclose(weights, torch.tensor([0.12, 0.24, 0.16, 0.48], dtype=torch.float64))
    with pytest.raises(ContractError) as caught:
        testing.check_objective(Inverted())
    assert caught.value.contract == "misspecified"


def test_only_ranks_enter(tools):
    # any increasing map of the ratios leaves the weights as they are
    assert torch.equal(tail_weights(RATIOS, -1.0), tail_weights(RATIOS.exp() + 1e4, -1.0))


def test_what_it_cannot_do_is_refused(tools):
    for beta in (0.5, math.nan, True, "tail"):
        with pytest.raises(SpecError, match="beta must be"):
            TailAdaptive(beta)
    with pytest.raises(ConfigError, match="draws=2"):
        TailAdaptive().loss(
            tools.gaussian(0.0, 1.0), targets.two_normals().model, torch.zeros(1, 1, dtype=torch.float64)
        )
    from vifamily import registry
    from vifamily.types import LatentSpec

    mixture = registry.build("families", "mixture").build(LatentSpec(1), generator=torch.Generator().manual_seed(0))
    with pytest.raises(IncompatibleError, match="unequal weights"):
        TailAdaptive().resolve(targets.two_normals().model, mixture)
