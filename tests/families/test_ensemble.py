"""Finite ensembles."""

import pytest
import torch

from vifamily.errors import ConfigError, NotAvailableError
from vifamily.families.ensemble import Ensemble
from vifamily.types import Capability, LatentSpec


def built(dim=2, **options):
    return Ensemble(**options).build(LatentSpec(dim), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [1, 7])
def test_points_are_the_draws_whatever_the_noise(rows):
    family = built(size=5)
    assert family.noise_spec.shape == (0,)
    draw = family(torch.zeros(rows, 0, dtype=torch.float64))
    assert torch.equal(draw.z, family.points)
    assert draw.log_q is None
    torch.testing.assert_close(draw.log_weight, family.logits.log_softmax(0))


def test_points_have_no_density_and_say_so():
    family = built(size=5)
    assert Capability.FINITE in family.capabilities
    assert Capability.LOG_Q not in family.capabilities
    with pytest.raises(NotAvailableError, match="no density"):
        family.log_prob(torch.zeros(1, 2, dtype=torch.float64))


def test_jitter_makes_a_mixture_of_gaussians():
    family = built(size=3, jitter=0.2)
    with torch.no_grad():
        family.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
        family.log_jitter.copy_(torch.tensor([0.1, 0.5, 0.3]).log())
    z = torch.tensor([[0.2, -0.3]], dtype=torch.float64)
    parts = torch.distributions.Normal(family.points, family.log_jitter.exp()[:, None]).log_prob(z).sum(-1)
    expected = torch.logsumexp(parts + family.logits.log_softmax(0), 0)
    assert family.log_prob(z).item() == pytest.approx(expected.item(), abs=1e-12)
    draw = family(torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert draw.z.shape == (12, 2)


def test_moments_are_those_of_the_weighted_points():
    family = built(size=3)
    with torch.no_grad():
        family.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
    mean, covariance = family.moments()
    z = family.sample(40_000, generator=torch.Generator().manual_seed(2))
    assert ((z.mean(0) - mean).abs() < 5 * z.std(0) / 200).all()
    assert (torch.cov(z.T) - covariance).abs().max().item() < 0.05


def test_members_start_as_draws_of_the_gaussian():
    family = built(size=4000)
    factor = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    family.start_at(torch.tensor([3.0, 4.0]), factor)
    assert (family.points.mean(0) - torch.tensor([3.0, 4.0])).abs().max().item() < 0.2
    assert (torch.cov(family.points.detach().T) - factor @ factor.T).abs().max().item() < 0.5


@pytest.mark.parametrize(
    ("options", "what"), [({"size": 0}, "size"), ({"jitter": 0.0}, "jitter"), ({"jitter": -1}, "jitter")]
)
def test_bad_options_are_refused(options, what):
    with pytest.raises(ConfigError, match=what):
        Ensemble(**options)
