"""The factorised family."""

import math

import pytest
import scipy.stats
import torch

from vifamily import registry
from vifamily.errors import ConfigError
from vifamily.families.mean_field import MeanField
from vifamily.types import Capability, LatentSpec


def built(**options):
    return MeanField(**options).build(LatentSpec(2), generator=torch.Generator().manual_seed(0))


def test_density_is_a_product_of_normals():
    family = built()
    family.start_at(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]))
    z = torch.tensor([[0.3, 1.0]], dtype=torch.float64)
    expected = scipy.stats.norm.logpdf([0.3, 1.0], [1.0, -2.0], [0.5, 3.0]).sum()
    assert family.log_prob(z).item() == pytest.approx(expected, abs=1e-12)


def test_student_density_is_a_product_of_independent_t_laws():
    family = built(student_t=5)
    with torch.no_grad():
        family.loc.copy_(torch.tensor([1.0, -2.0]))
        family.log_scale.copy_(torch.tensor([0.5, 3.0]).log())
    z = torch.tensor([[9.3, 1.0]], dtype=torch.float64)
    expected = scipy.stats.t.logpdf([9.3, 1.0], 5, [1.0, -2.0], [0.5, 3.0]).sum()
    assert family.log_prob(z).item() == pytest.approx(expected, abs=1e-6)
    draws = family(torch.randn(40_000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).z
    size = (draws.detach() - family.loc.detach()).abs().log()
    # independent radii: the sizes of two coordinates do not go together, as those of a shared radius would
    assert abs(torch.corrcoef(size.T)[0, 1].item()) < 5 / math.sqrt(40_000)


def test_student_start_matches_the_standard_deviation_not_the_scale():
    family = built(student_t=4)
    family.start_at(torch.zeros(2), torch.tensor([2.0, 3.0]))
    assert family.moments()[1].diagonal().tolist() == pytest.approx([4.0, 9.0])
    assert Capability.GAUSSIAN not in family.capabilities
    assert Capability.GAUSSIAN not in MeanField(student_t=4).capabilities
    assert Capability.GAUSSIAN in MeanField().capabilities


@pytest.mark.parametrize("df", [2, 0, -1, 2.5, True, "five"])
def test_degrees_of_freedom_without_variance_are_refused(df):
    with pytest.raises(ConfigError, match="degrees of freedom"):
        MeanField(student_t=df)


def test_hidden_widths_are_checked():
    with pytest.raises(ConfigError, match="hidden"):
        MeanField(hidden=[8, 0])


def test_conditional_entropy_and_location_follow_the_context():
    family = MeanField(hidden=[16]).build(LatentSpec(2, context_dim=1), generator=torch.Generator().manual_seed(0))
    x = torch.linspace(-1, 1, 21, dtype=torch.float64)[:, None]
    goal = torch.cat([x.sin(), x**2], -1)
    # two points integrate the quadratic exactly, so the loss has no noise
    noise = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None, None].expand(2, 21, 2)
    optimiser = torch.optim.LBFGS(family.parameters(), max_iter=80, line_search_fn="strong_wolfe")

    def closure():
        draw = family(noise, x)
        loss = (50 * (draw.z - goal).square().sum(-1) + draw.log_q).mean()
        optimiser.zero_grad()
        loss.backward()
        return loss

    optimiser.step(closure)
    mean = family(torch.zeros(1, 21, 2, dtype=torch.float64), x).z[0]
    assert (mean - goal).abs().max().item() < 0.1
    # 50 s^2 - log s is least at s = 0.1
    best = 2 * (math.log(0.1) + 0.5 * (1 + math.log(2 * math.pi)))
    assert (family.entropy(x) - best).abs().max().item() < 0.1


def test_spec_strings_reach_the_options():
    assert registry.build("families", "mean_field(student_t=7, hidden=[4])") == MeanField(student_t=7, hidden=(4,))
