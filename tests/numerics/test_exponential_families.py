"""Exponential families: densities, gradients of log partitions, matching of moments, draws, declared convexity."""

import math

import pytest
import torch
from scipy import special

from vifamily.errors import ConfigError
from vifamily.numerics.exponential_families import (
    Categorical,
    DiagonalGaussian,
    FixedScaleGaussian,
    FullGaussian,
    VonMises,
    bessel_ratio,
)
from vifamily.rng import generator

LAWS = [
    VonMises(),
    VonMises(2),
    FixedScaleGaussian(2, sd=0.7),
    DiagonalGaussian(2),
    DiagonalGaussian(2, link="identity"),
    FullGaussian(1),
    FullGaussian(3),
    FullGaussian(3, link="identity"),
    Categorical(2, num_categories=2),
    Categorical(2, num_categories=4),
]


def outputs(law, count=6, seed=0):
    raw = torch.randn(count, law.num_outputs, generator=generator(seed, "outputs"), dtype=torch.float64)
    if getattr(law, "link", "") == "identity":  # inside the domain
        start = law.dim
        raw[:, start : start + law.dim] = raw[:, start : start + law.dim].exp()
    return raw


def points(law, count=6, seed=1):
    return law.sample(law.natural(outputs(law, count, seed)), generator=generator(seed, "points"))


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_the_mean_is_the_gradient_of_the_log_partition(law):
    eta = law.natural(outputs(law)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(law.log_partition(eta).sum(), eta)
    torch.testing.assert_close(law.mean(eta), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_moments_match_and_the_loss_is_least_there(law):
    eta = law.natural(outputs(law))
    mean = law.mean(eta)
    back = law.from_mean(mean)
    torch.testing.assert_close(law.mean(back), mean, rtol=1e-9, atol=1e-9)
    other = law.natural(outputs(law) + 0.05)
    assert bool((law.loss(other, mean) > law.loss(back, mean)).all())


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_the_density_is_that_of_torch(law):
    raw, theta = outputs(law), points(law)
    got = law.log_prob(theta, law.natural(raw))
    d = torch.distributions
    if isinstance(law, VonMises):
        pairs = raw.unflatten(-1, (law.dim, 2))
        wanted = d.VonMises(torch.atan2(pairs[..., 1], pairs[..., 0]), pairs.norm(dim=-1)).log_prob(theta).sum(-1)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # torch approximates the Bessel function
        return
    if isinstance(law, FixedScaleGaussian):
        wanted = d.Normal(raw, law.sd).log_prob(theta).sum(-1)
    elif isinstance(law, DiagonalGaussian):
        first, second = raw.split(law.dim, -1)
        precision = torch.nn.functional.softplus(second) if law.link == "softplus" else second
        wanted = d.Normal(first / precision, precision**-0.5).log_prob(theta).sum(-1)
    elif isinstance(law, FullGaussian):
        b, lower = law.factor(raw)
        matrix = lower @ lower.mT
        mean = torch.linalg.solve(lower.mT, b.unsqueeze(-1)).squeeze(-1)
        wanted = d.MultivariateNormal(mean, precision_matrix=matrix).log_prob(theta)
    else:
        logits = torch.nn.functional.pad(raw.unflatten(-1, (law.dim, -1)), (1, 0))
        wanted = d.Categorical(logits=logits).log_prob(theta).sum(-1)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_draws_have_the_mean_statistics(law, seed):
    eta = law.natural(outputs(law, 1)).expand(20_000, -1)
    drawn = law.statistics(law.sample(eta, generator=generator(seed, "draws")))
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert bool(((drawn.mean(0) - law.mean(eta[0])).abs() < 5 * error + 1e-12).all())


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_convexity_in_the_raw_numbers_is_as_declared(law):
    # the least eigenvalue of the Hessian of minus the log density in the raw numbers, over many points
    raw = outputs(law, 200, seed=4)
    theta = 3 * points(law, 200, seed=5) if law.space == "real" else points(law, 200, seed=5)
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(lambda o, t: -law.log_prob(t, law.natural(o)))))(
        raw, theta
    )
    least = torch.linalg.eigvalsh(hessian).min()
    assert (least > -1e-9) == law.convex_in_output


def test_the_fisher_information_is_the_covariance_of_the_statistics(seed):
    law = DiagonalGaussian(1)
    eta = law.natural(torch.tensor([[0.3, 1.0]], dtype=torch.float64))
    drawn = law.statistics(law.sample(eta.expand(100_000, -1), generator=generator(seed, "draws")))
    outer = (drawn - drawn.mean(0)).unsqueeze(-1) * (drawn - drawn.mean(0)).unsqueeze(-2)
    gap = outer.mean(0) - law.fisher(eta)[0]
    assert bool((gap.abs() < 5 * outer.std(0) / math.sqrt(100_000)).all())


def test_a_natural_gradient_step_of_a_fixed_scale_gaussian_is_exact():
    law = FixedScaleGaussian(2, sd=0.5)
    eta, mean = torch.randn(4, 2, generator=generator(0, "eta"), dtype=torch.float64), torch.ones(4, 2).double()
    torch.testing.assert_close(eta - law.natural_gradient(eta, mean), law.from_mean(mean), rtol=1e-10, atol=1e-10)


def test_von_mises_at_the_extremes():
    law = VonMises()
    for kappa in (0.0, 1e-9, 1e-3, 1.0, 50.0, 1e5):
        eta = torch.tensor([[kappa, 0.0]], dtype=torch.float64)
        assert bool(law.log_partition(eta).isfinite().all()) and bool(law.mean(eta).isfinite().all())
        drawn = law.sample(eta.expand(50, -1), generator=generator(0, "extreme"))
        assert bool(drawn.isfinite().all())
        torch.testing.assert_close(
            law.from_mean(law.mean(eta)), eta, rtol=1e-5, atol=1e-9, msg=lambda text, k=kappa: f"at kappa {k}: {text}"
        )
    torch.testing.assert_close(bessel_ratio(torch.tensor(1.0).double()), torch.tensor(0.4463899658965345).double())


def test_outside_the_domain_the_log_partition_is_infinite():
    assert float(DiagonalGaussian(1).log_partition(torch.tensor([1.0, 0.5]))) == math.inf
    assert float(FullGaussian(1).log_partition(torch.tensor([1.0, 0.5]))) == math.inf


@pytest.mark.parametrize(
    "make", [lambda: VonMises(0), lambda: DiagonalGaussian(1, link="exp"), lambda: Categorical(1, 1)]
)
def test_options_are_checked(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize("length", [0.0, 1e-9, 1e-2, 0.0316, 0.0317, 1.0])
def test_a_law_of_angles_is_smooth_where_its_natural_parameters_vanish(length):
    law = VonMises(2)
    eta = length * torch.tensor([0.6, 0.8, -1.0, 0.0], dtype=torch.float64)
    wanted = sum(math.log(2 * math.pi * special.i0(length)) for _ in range(2))
    assert float(law.log_partition(eta)) == pytest.approx(wanted, abs=1e-14)
    gradient = torch.func.grad(law.log_partition)(eta)
    torch.testing.assert_close(gradient, law.mean(eta), atol=1e-13, rtol=1e-12)
    ratio = 0.5 if length == 0 else special.i1(length) / special.i0(length) / length
    torch.testing.assert_close(gradient, ratio * eta, atol=1e-13, rtol=1e-12)
    hessian = torch.func.jacrev(torch.func.jacrev(law.log_partition))(eta)
    torch.testing.assert_close(hessian, law.fisher(eta), atol=1e-12, rtol=1e-10)
    if length == 0:
        torch.testing.assert_close(hessian, 0.5 * torch.eye(4, dtype=torch.float64))


def test_coordinates_of_unequal_numbers_of_categories():
    law = Categorical(3, (2, 4, 3))
    assert law.num_outputs == 6
    eta = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (2, 4, 3)))
    probability = law.log_prob(states, eta).exp()
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(probability @ law.statistics(states), law.mean(eta), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.func.grad(law.log_partition)(eta), law.mean(eta), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(law.from_mean(law.mean(eta)), eta, rtol=1e-10, atol=1e-10)
    deviation = law.statistics(states) - law.mean(eta)
    covariance = deviation.T @ (probability.unsqueeze(-1) * deviation)
    torch.testing.assert_close(law.output_fisher(eta), covariance, rtol=1e-10, atol=1e-12)
    assert float(law.log_prob(torch.tensor([0.0, 1.5, 0.0], dtype=torch.float64), eta)) == -math.inf
    assert float(law.log_prob(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64), eta)) == -math.inf
    with pytest.raises(ConfigError):
        Categorical(2, (2, 3, 4))
