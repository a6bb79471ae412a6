"""Local latents: one law per datum, by table or by encoder."""

import pytest
import torch
from torch import nn

from vifamily import registry
from vifamily.errors import ConfigError, DataError, IncompatibleError, ShapeError
from vifamily.families.local import LocalFamily
from vifamily.rng import draw_noise, scoped
from vifamily.types import Batch, Capability, LatentSpec


def built(dim=2, local="mean_field", local_dim=3, **options):
    generator = torch.Generator().manual_seed(0)
    shared = registry.build("families", "mean_field" if dim == 0 else "full_rank").build(
        LatentSpec(dim), generator=generator
    )
    return LocalFamily.from_entries(
        shared, registry.build("families", local), local_dim, generator=generator, **options
    )


def draws(family, num, batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    draw = family(draw_noise(family.noise_spec, (num,), generator))
    return family.draw_local(draw, draw_noise(family.local_noise_spec, (num, batch.size), generator), batch)


@pytest.mark.parametrize("local", ["mean_field", "full_rank(student_t=5)", "low_rank(rank=1)"])
def test_a_table_gives_each_datum_its_own_law(local):
    family = built(local=local, num_data=10)
    with torch.no_grad():
        family.per_datum.head.values.copy_(
            0.3
            * torch.randn(
                10, family.per_datum.num_values, generator=torch.Generator().manual_seed(3), dtype=torch.float64
            )
        )
    batch = Batch(None, 4, torch.tensor([7, 0, 3, 7]))
    draw = draws(family, 5, batch)
    assert draw.z.shape == (5, 2) and draw.log_q.shape == (5,)
    assert draw.local.shape == (5, 4, 3) and draw.local_log_q.shape == (5, 4)
    torch.testing.assert_close(family.local_log_prob(draw.local, batch), draw.local_log_q, rtol=1e-10, atol=1e-10)
    swapped = family.local_log_prob(draw.local, Batch(None, 4, torch.tensor([0, 7, 3, 7])))
    same = (swapped - draw.local_log_q).abs().amax(0) < 1e-12
    assert same.tolist() == [False, False, True, True]


def test_only_rows_of_the_batch_have_a_gradient():
    family = built(num_data=6)
    draw = draws(family, 3, Batch(None, 2, torch.tensor([1, 4])))
    (draw.local.square().sum() + draw.local_log_q.sum()).backward()
    touched = family.per_datum.head.values.grad.abs().sum(-1) > 0
    assert touched.tolist() == [False, True, False, False, True, False]


def test_an_encoder_gives_the_law_from_the_data():
    with scoped(0):
        encoder = nn.Linear(4, 2, dtype=torch.float64)
    family = built(encoder=encoder, context_dim=2)
    data = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draw = draws(family, 3, Batch(data, 5))
    assert draw.local.shape == (3, 5, 3)
    draw.local.sum().backward()
    assert encoder.weight.grad.abs().sum() > 0
    assert any(p is encoder.weight for p in family.parameters())


def test_a_table_finds_the_exact_posterior_of_conjugate_local_latents():
    # y_n ~ N(l_n, 1), l_n ~ N(0, 1): the posterior of l_n is N(y_n / 2, 1 / 2)
    y = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    family = built(dim=0, local_dim=1, num_data=3)
    optimiser = torch.optim.Adam(family.per_datum.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.99)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    for step in range(500):
        index = torch.randperm(3, generator=torch.Generator().manual_seed(step))[:2]
        batch = Batch(y[index], 2, index)
        draw = draws(family, 8, batch, seed=step)
        local = draw.local[..., 0]
        # the density at frozen parameters: the noise of the gradient vanishes at the exact posterior
        log_q = family.local_log_prob(draw.local, batch, frozen=True)
        loss = -(normal.log_prob(local) + normal.log_prob(batch.data - local) - log_q).mean(0).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    z = draws(family, 4000, Batch(y, 3, torch.arange(3))).local[..., 0].detach()
    assert (z.mean(0) - y / 2).abs().max().item() < 5 * 0.71 / 4000**0.5 + 0.02
    assert (z.std(0) - 0.5**0.5).abs().max().item() < 0.06


def test_as_a_family_it_is_the_global_one():
    family = built(num_data=4)
    noise = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    family.precondition(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert torch.equal(family(noise).z, family.shared(noise).z)
    assert torch.equal(family.entropy(), family.shared.entropy())
    assert torch.equal(family.log_prob(noise, frozen=True), family.shared.log_prob(noise))
    assert family.moments()[0].tolist() == [1.0, 2.0]
    assert {Capability.LOCAL, Capability.LOG_Q} <= family.capabilities


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="num_data"):
        built()
    with pytest.raises(ConfigError, match="context_dim"):
        built(encoder=nn.Identity())
    with pytest.raises(IncompatibleError, match="local latents need"):
        built(local="ensemble", num_data=3)
    with pytest.raises(IncompatibleError, match="unweighted"):
        built(local="mixture", num_data=3)
    with pytest.raises(ConfigError, match="Gaussian families"):
        built(local="flow", num_data=3)
    family = built(num_data=3)
    with pytest.raises(DataError, match="positions"):
        draws(family, 2, Batch(None, 2))
    draw = family(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ShapeError, match="local noise"):
        family.draw_local(draw, torch.zeros(2, 4, 3, dtype=torch.float64), Batch(None, 2, torch.tensor([0, 1])))
    with scoped(0):
        wrong = built(encoder=nn.Linear(4, 5, dtype=torch.float64), context_dim=2)
    with pytest.raises(ShapeError, match="encoder must return"):
        draws(wrong, 2, Batch(torch.zeros(3, 4, dtype=torch.float64), 3))
