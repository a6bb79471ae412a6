"""Flows: those of zuko, and the planar one."""

import subprocess
import sys

import pytest
import torch

from vifamily.errors import ConfigError
from vifamily.families.flow import Flow
from vifamily.families.full_rank import FullRank
from vifamily.types import Capability, LatentSpec

KINDS = ["nsf", "maf", "nice", "realnvp", "bpf", "planar"]


def built(dim=3, **options):
    return Flow(**options).build(LatentSpec(dim), generator=torch.Generator().manual_seed(0))


def normal(num, dim=3, seed=1):
    return torch.randn(num, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_near_the_identity(kind, dim):
    family = built(dim, kind=kind)
    noise = normal(200, dim)
    draw = family(noise)
    assert (draw.z - noise).abs().max().item() < 0.1
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)
    assert (draw.log_q - standard).abs().max().item() < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_log_density_of_draws_uses_the_jacobian_of_the_map(kind):
    family = built(2, kind=kind)
    with torch.no_grad():
        for p in family.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(2)))
    e = normal(1, 2)
    jacobian = torch.autograd.functional.jacobian(lambda x: family(x[None]).z[0], e[0])
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(e).sum()
    expected = standard - jacobian.det().abs().log()
    assert family(e).log_q.item() == pytest.approx(expected.item(), abs=1e-8)


def test_the_triangular_map_makes_it_contain_every_gaussian():
    family = built(2)
    factor = torch.tensor([[0.1, 0.0], [5.0, 30.0]], dtype=torch.float64)
    family.start_at(torch.tensor([100.0, -3.0]), factor)
    z = family.sample(20_000, generator=torch.Generator().manual_seed(0))
    assert torch.corrcoef(z.T)[0, 1].item() == pytest.approx(5 / (25 + 900) ** 0.5, abs=0.04)
    assert (z.std(0) / torch.tensor([0.1, (25 + 900) ** 0.5]) - 1).abs().max().item() < 0.03


@pytest.mark.parametrize("kind", ["nsf", "maf"])
def test_it_learns_a_banana_by_minimising_the_elbo(kind):
    def log_p(z):
        base = torch.distributions.Normal(0.0, 1.0)
        return base.log_prob(z[:, 0]) + base.log_prob((z[:, 1] - 1.5 * z[:, 0] ** 2) / 0.5) - torch.tensor(0.5).log()

    def divergence(family):
        optimiser = torch.optim.Adam(family.parameters(), 2e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.99)
        for step in range(400):
            draw = family(normal(32, 2, seed=step))
            loss = (draw.log_q - log_p(draw.z)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            draw = family(normal(4000, 2, seed=10_000))
            return (draw.log_q - log_p(draw.z)).mean().item()

    gaussian = FullRank().build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
    assert divergence(built(2, kind=kind, hidden=[16, 16], transforms=2)) < divergence(gaussian) / 3


def test_inverting_is_cheap_only_where_that_is_said():
    assert Capability.CHEAP_LOG_Q in Flow(kind="nice").capabilities
    assert Capability.CHEAP_LOG_Q in Flow(kind="nsf", passes=2).capabilities
    assert Capability.CHEAP_LOG_Q not in Flow(kind="nsf").capabilities


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"kind": "glow"}, "unknown kind 'glow'.*nsf"),
        ({"activation": "gelu"}, "activation"),
        ({"affine": "none"}, "affine"),
        ({"transforms": 0}, "transforms"),
        ({"hidden": [0]}, "hidden"),
        ({"bins": 1}, "bins"),
        ({"kind": "nice", "passes": 2}, "passes"),
        ({"kind": "planar", "passes": 2}, "passes"),
    ],
)
def test_bad_options_are_refused(options, what):
    with pytest.raises(ConfigError, match=what):
        Flow(**options)


def test_a_wide_flow_has_a_diagonal_map():
    family = built(300, kind="maf", transforms=1, hidden=[4])
    assert not family.full
    assert family(normal(2, 300)).z.shape == (2, 300)


PROGRAM = """
import torch
from torch.distributions import Distribution
{before}
found = (Distribution._validate_args, Distribution.__dict__["arg_constraints"])
from vifamily.families.flow import Flow
from vifamily.types import LatentSpec
family = Flow().build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
family.log_prob(family(torch.zeros(3, 2, dtype=torch.float64)).z)
assert (Distribution._validate_args, Distribution.__dict__["arg_constraints"]) == found
print(Distribution._validate_args)
"""


@pytest.mark.parametrize(("before", "state"), [("", "True"), ("import zuko", "False")])
def test_validation_of_torch_stays_as_found(before, state):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [state]


@pytest.mark.parametrize("context_dim", [None, 3])
def test_density_of_a_spline_flow_is_that_of_the_layers(context_dim):
    source = torch.Generator().manual_seed(0)
    latent = LatentSpec(4, context_dim=context_dim)
    family = Flow(transforms=2, hidden=[16], direction="density").build(latent, generator=source)
    assert family.spline_first
    with torch.no_grad():
        for p in family.layers.parameters():
            p.mul_(1.7)  # away from the identity
    context = None if context_dim is None else torch.randn(5, context_dim, generator=source, dtype=torch.float64)
    z = 2 * torch.randn(6, 5, 4, generator=source, dtype=torch.float64)
    found = family.log_prob(z, context)
    family.spline_first = False
    assert (found - family.log_prob(z, context)).abs().max() < 1e-10


@pytest.mark.parametrize("options", [{"kind": "maf", "direction": "density"}, {"kind": "nsf"}])
def test_other_flows_keep_their_own_pass(options):
    assert not built(**options).spline_first


@pytest.mark.parametrize("dim", [1, 2])
def test_splines_given_points_have_the_density_of_their_layers(dim):
    """One coordinate has networks of the context alone."""
    entry = Flow(direction="density", hidden=(16,), affine="diagonal")
    family = entry.build(LatentSpec(dim, context_dim=3), generator=torch.Generator().manual_seed(0))
    z, context = normal(50, dim), normal(50, 3, seed=2)
    base, log_jacobian = family.layers(context).call_and_ladj(z)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(base).sum(-1) + log_jacobian
    torch.testing.assert_close(family.log_prob(z, context), expected, rtol=1e-8, atol=1e-8)
