"""The sampler without density."""

import pytest
import torch

from vifamily.errors import ConfigError
from vifamily.families.implicit import Implicit
from vifamily.types import LatentSpec


def test_it_starts_wide():
    family = Implicit().build(LatentSpec(3), generator=torch.Generator().manual_seed(0))
    z = family.sample(4000, generator=torch.Generator().manual_seed(1))
    assert (z.std(0) > 1.3).all() and (z.std(0) < 1.8).all()
    assert z.mean(0).abs().max() < 0.3


@pytest.mark.parametrize("noise_dim", [1, 2, 5])
def test_every_coordinate_starts_with_the_same_spread_whatever_the_noise(noise_dim):
    family = Implicit(noise_dim=noise_dim).build(LatentSpec(3), generator=torch.Generator().manual_seed(0))
    z = family.sample(4000, generator=torch.Generator().manual_seed(1))
    assert (z.std(0) > 1.3).all() and (z.std(0) < 1.8).all()


def test_it_learns_a_shape_that_is_not_gaussian():
    # matching draws of a ring by energy distance, which needs no density
    family = Implicit(hidden=[32, 32], noise_dim=2).build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(family.parameters(), 2e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.995)
    for step in range(600):
        generator = torch.Generator().manual_seed(step)
        angle = 6.283185307 * torch.rand(64, 1, dtype=torch.float64, generator=generator)
        ring = 2 * torch.cat([angle.cos(), angle.sin()], -1)
        z = family(torch.randn(64, 2, dtype=torch.float64, generator=generator)).z
        loss = 2 * torch.cdist(z, ring).mean() - torch.cdist(z, z).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    radius = family.sample(2000, generator=torch.Generator().manual_seed(1)).norm(dim=-1)
    assert radius.mean().item() == pytest.approx(2, abs=0.3)
    # a Gaussian of that radius has 1.05
    assert radius.std().item() < 0.5


@pytest.mark.parametrize(
    ("options", "what"), [({"hidden": [0]}, "hidden"), ({"noise_dim": 0}, "noise_dim"), ({"spread": 0}, "spread")]
)
def test_bad_options_are_refused(options, what):
    with pytest.raises(ConfigError, match=what):
        Implicit(**options)
