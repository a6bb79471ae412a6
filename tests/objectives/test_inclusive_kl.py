"""The variants of inclusive_kl on exponential families: natural gradients, mean statistics in place of draws."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import registry, testing
from vifamily.errors import ConfigError, IncompatibleError, NotAvailableError, ShapeError
from vifamily.numerics.exponential_families import DiagonalGaussian, FullGaussian, VonMises
from vifamily.objectives.inclusive_kl import InclusiveKl
from vifamily.posterior.amortised import AmortisedFamily, Vector, fit_amortised
from vifamily.types import Batch, LatentSpec, Space

COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
POSTERIOR = torch.linalg.inv(torch.linalg.inv(COVARIANCE) + 4 * torch.eye(2, dtype=torch.float64))
GAIN = 4 * POSTERIOR


def full_statistics(theta, x):
    """First and second moments of the posterior of ``theta ~ N(0, C)``, ``x ~ N(theta, I / 4)``."""
    mean = x @ GAIN.T.to(x)
    second = POSTERIOR.to(x) + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    return torch.cat([mean, second.flatten(-2)], dim=-1)


def simulator(**options):
    prior = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), COVARIANCE)
    return vf.models.Simulator(prior, lambda t: t + 0.5 * torch.randn_like(t), dtype=torch.float64, **options)


def amortised(spec="natural(kind=full)", space=Space.REAL, dim=2):
    source = torch.Generator().manual_seed(3)
    encoder = Vector().build((2,), generator=source, dtype=torch.float64, device=torch.device("cpu"))
    family = registry.build("families", spec).build(LatentSpec(dim, space, context_dim=2), generator=source)
    if space is Space.REAL:
        family.precondition(torch.tensor([0.3, -0.1]), torch.tensor([0.9, 1.4]))
    return AmortisedFamily(encoder, family)


def pairs(number=64, **options):
    model = simulator(**options)
    made = model.simulations(number, seed=2)
    return model, Batch((model.unconstrained(made.theta), made.x), number)


def slope(loss, module):
    parameters = list(module.parameters())
    found = torch.autograd.grad(loss.surrogate, parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten()
                      for g, p in zip(found, parameters, strict=True)])  # fmt: skip


@pytest.mark.parametrize("spec", ["natural", "natural(kind=full)", "natural(kind=full, link=identity)"])
def test_the_value_is_that_of_the_plain_loss(spec):
    module, (model, batch) = amortised(spec), pairs()
    plain = InclusiveKl().loss(module, model, torch.zeros(0), batch)
    natural = InclusiveKl(natural_gradient=True).loss(module, model, torch.zeros(0), batch)
    torch.testing.assert_close(natural.value, plain.value, rtol=1e-12, atol=1e-12)


def test_mean_statistics_give_the_mean_of_the_plain_loss_without_its_noise():
    module, (model, batch) = amortised(), pairs(4000, mean_statistics=full_statistics)
    noise = torch.zeros(0)
    smooth = InclusiveKl(rao_blackwell=True).loss(module, model, noise, batch)
    x = batch.data[1]
    # the plain loss over many draws of the exact posterior at the same data
    factor, source = torch.linalg.cholesky(POSTERIOR), torch.Generator().manual_seed(0)
    values, slopes = [], []
    for _ in range(40):
        z = x @ GAIN.T + torch.randn(len(x), 2, generator=source, dtype=torch.float64) @ factor.T
        loss = InclusiveKl().loss(module, model, noise, Batch((z, x), len(x)))
        values.append(loss.value)
        slopes.append(slope(loss, module))
    values, slopes = torch.stack(values), torch.stack(slopes)
    assert abs(float(values.mean() - smooth.value)) < 5 * float(values.std()) / math.sqrt(40)
    error = slopes.std(0) / math.sqrt(40)
    assert bool(((slopes.mean(0) - slope(smooth, module)).abs() < 5 * error + 1e-12).all())


def test_at_the_exact_posterior_every_batch_has_no_gradient():
    module = amortised()
    inner = module.family
    inner.precondition(torch.zeros(2), torch.ones(2))
    head = inner.head[-1]
    with torch.no_grad():
        inner.start_at(torch.zeros(2), torch.linalg.cholesky(POSTERIOR))
        lower = torch.linalg.cholesky(torch.linalg.inv(POSTERIOR))
        head.weight.zero_()
        head.bias.zero_()
        head.weight[:2] = lower.T @ GAIN
    model, batch = pairs(5, mean_statistics=full_statistics)
    smooth = InclusiveKl(rao_blackwell=True).loss(module, model, torch.zeros(0), batch)
    assert float(slope(smooth, module).abs().max()) < 1e-12
    noisy = InclusiveKl().loss(module, model, torch.zeros(0), batch)
    assert float(slope(noisy, module).abs().max()) > 1e-2


@pytest.mark.parametrize("law", [DiagonalGaussian(2), FullGaussian(2), FullGaussian(2, "identity"), VonMises(2)])
def test_the_information_of_the_raw_numbers_is_that_of_scores(law):
    source = torch.Generator().manual_seed(5)
    raw = torch.randn(law.num_outputs, generator=source, dtype=torch.float64) + (
        1.5 if getattr(law, "link", "") == "identity" else 0.0
    )
    eta = law.natural(raw).expand(40_000, -1)
    theta = law.sample(eta, generator=source)
    score = torch.func.vmap(torch.func.grad(lambda r, t: law.log_prob(t, law.natural(r))), (None, 0))(raw, theta)
    products = score.unsqueeze(-1) * score.unsqueeze(-2)
    error = products.std(0) / math.sqrt(len(theta))
    assert bool(((products.mean(0) - law.output_fisher(raw)).abs() < 5 * error + 1e-9).all())


@pytest.mark.parametrize("law", [DiagonalGaussian(2), FullGaussian(2)])
def test_statistics_in_other_units(law):
    theta = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift, scale = torch.tensor([0.4, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    moved = law.standardised_mean(law.statistics(theta).mean(0), shift, scale)
    torch.testing.assert_close(moved, law.statistics((theta - shift) / scale).mean(0), rtol=1e-12, atol=1e-12)


def test_natural_steps_match_moments_at_the_rate_of_newton():
    law = FullGaussian(2)
    target = law.mean(law.natural(torch.tensor([0.7, -0.4, 1.1, 0.2, 0.5], dtype=torch.float64)))
    raw, gaps = torch.tensor([0.3, 0.0, 0.8, 0.5, 0.2], dtype=torch.float64), []
    for _ in range(8):
        gaps.append(float((law.mean(law.natural(raw)) - target).abs().max()))
        raw = raw - law.output_natural_gradient(raw, target)
    assert gaps[-1] < 1e-9 and gaps[-2] < 1e-2 * gaps[-3]


def test_a_narrow_law_far_from_the_truth_is_no_plateau():
    """From kappa = 30 pointing the wrong way the plain slope hardly turns the mean; the natural one does."""
    law = VonMises()
    eta = torch.tensor([-30.0, 1.0], dtype=torch.float64)
    target = law.mean(torch.tensor([2.0, 0.0], dtype=torch.float64))
    plain = law.mean(eta) - target
    natural = law.output_natural_gradient(eta, target, 1e-3)
    assert float(plain.norm()) < 2
    assert float(natural.norm()) > 100 * float(plain.norm())


def test_fits_by_the_variants_end_at_the_posterior():
    x = torch.tensor([0.8, -0.4])
    model = simulator(mean_statistics=full_statistics).moved(device=torch.device("cpu"), dtype=torch.float32)
    for options in ("natural_gradient=True", "rao_blackwell=True", "natural_gradient=True, rao_blackwell=True"):
        posterior = fit_amortised(model, "natural(kind=full)", f"inclusive_kl(simulations=1500, {options})",
                                  encoder="vector", steps=400, step_size=0.03, seed=0)  # fmt: skip
        draws = posterior(x).draws(20_000)
        close = 0.04 if "rao" in options else 0.12
        assert float((draws.mean(0) - x @ GAIN.T.float()).abs().max()) < close
        assert float((draws.T.cov() / POSTERIOR - 1).abs().max()) < 2 * close, options


def test_an_angle_with_mean_statistics():
    # a flat prior and a von Mises datum: the posterior is von Mises about the datum
    kappa = 4.0
    law = VonMises()

    def simulate(theta, generator):
        noise = law.sample(torch.tensor([kappa, 0.0]).expand(len(theta), -1), generator=generator)
        angle = theta + noise
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    assert law.statistics(torch.zeros(1, 1)).tolist() == [[1.0, 0.0]]
    module = amortised("natural(kind=von_mises)", Space.CIRCLE, 1)
    theta = torch.rand(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 6
    x = simulate(theta, torch.Generator().manual_seed(1))
    head = module.family.head[-1]
    with torch.no_grad():
        module.family.output.zero_()
        head.bias.zero_()
        head.weight.copy_(kappa * torch.eye(2))
    ratio = float(law.mean(torch.tensor([kappa, 0.0], dtype=torch.float64))[0])
    model = vf.models.Simulator(lambda n: torch.zeros(n, 1), simulate, dtype=torch.float64,
                                mean_statistics=lambda theta, x: ratio * x)  # fmt: skip
    loss = InclusiveKl(rao_blackwell=True).loss(module, model, torch.zeros(0), Batch((theta, x), 200))
    assert float(slope(loss, module).abs().max()) < 1e-10


def test_contracts_hold_with_the_variants_that_need_no_more():
    assert "parts" in testing.check_objective(InclusiveKl(patience=3)).passed


def test_refusals():
    for options in ({"damping": -1.0}, {"natural_gradient": 1}, {"rao_blackwell": "yes"}):
        with pytest.raises(ConfigError):
            InclusiveKl(**options)
    with pytest.raises(IncompatibleError, match="natural parameters"):
        vf.fit(simulator(), "full_rank", "inclusive_kl(natural_gradient=True)", steps=2)
    with pytest.raises(IncompatibleError, match="mean_statistics="):
        vf.fit(simulator(), "natural", "inclusive_kl(rao_blackwell=True)", steps=2)
    with pytest.raises(NotAvailableError, match="mean_statistics="):
        simulator().mean_statistics(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ShapeError):
        model = simulator(mean_statistics=lambda theta, x: torch.zeros(3, dtype=torch.float64))
        model.mean_statistics(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2))
