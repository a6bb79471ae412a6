"""Likelihoods of outputs: densities against torch's, draws against moments, data that are refused."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal, Poisson, StudentT
from torch.nn import functional

from vifamily import errors, rng
from vifamily.models._likelihoods import likelihood_of
from vifamily.testing._tools import seeded

DOUBLE = torch.float64
OUT = torch.randn(3, 5, 2, generator=seeded(0), dtype=DOUBLE)
REAL = torch.randn(5, 2, generator=seeded(1), dtype=DOUBLE)
BITS = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1]])
COUNTS = torch.tensor([[0, 3], [1, 1], [7, 0], [2, 2], [0, 1]])
LABELS = torch.tensor([0, 1, 1, 0, 1])

LAWS = {
    "gaussian(sd=0.3)": (REAL, lambda f: Normal(f, 0.3), 1),
    "student_t(df=3, scale=0.5)": (REAL, lambda f: StudentT(3.0, f, 0.5), 1),
    "bernoulli": (BITS, lambda f: Bernoulli(logits=f), 1),
    "poisson": (COUNTS, lambda f: Poisson(f.exp()), 1),
    "heteroscedastic": (REAL[:, 0], lambda f: Normal(f[..., 0], functional.softplus(f[..., 1]) + 1e-6), 0),
    "categorical": (LABELS, lambda f: Categorical(logits=f), 0),
}


@pytest.mark.parametrize("spec", LAWS)
def test_density_is_that_of_the_law(spec):
    y, law, axes = LAWS[spec]
    expected = law(OUT).log_prob(y.to(DOUBLE))
    expected = expected.sum(-1) if axes else expected
    torch.testing.assert_close(likelihood_of(spec).log_prob(OUT, y), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", ["gaussian(sd=0.3)", "student_t(df=9, scale=0.5)", "heteroscedastic", "poisson"])
def test_draws_have_the_moments(spec, seed):
    law, count = likelihood_of(spec), 20_000
    outputs = OUT[:1].expand(count, -1, -1)
    drawn = law.sample(outputs, generator=rng.generator(seed, spec.split("(")[0]))
    mean, variance = law.mean(outputs)[0], law.variance(outputs)[0]
    centred = drawn - mean
    assert bool((centred.mean(0).abs() < 5 * centred.std(0) / math.sqrt(count)).all())
    square = centred.square()
    assert bool(((square.mean(0) - variance).abs() < 5 * square.std(0) / math.sqrt(count)).all())


@pytest.mark.parametrize("spec", ["bernoulli", "categorical"])
def test_draws_have_the_probabilities(spec, seed):
    law, count = likelihood_of(spec), 20_000
    outputs = OUT[:1].expand(count, -1, -1)
    drawn = law.sample(outputs, generator=rng.generator(seed, spec))
    p = law.mean(outputs)[0]
    found = drawn.mean(0) if spec == "bernoulli" else functional.one_hot(drawn, 2).double().mean(0)
    assert bool(((found - p).abs() < 5 * (p * (1 - p) / count).sqrt()).all())
    assert likelihood_of(spec).log_prob(outputs[:1], drawn[0]).isfinite().all()


@pytest.mark.parametrize("spec", ["gaussian(sd=0.3)", "student_t(df=3, scale=0.5)", "heteroscedastic"])
def test_distribution_function_has_the_density_as_slope(spec):
    law, y = likelihood_of(spec), LAWS[spec][0][:, :1] if spec != "heteroscedastic" else REAL[:, 0]
    outputs = OUT[..., :1] if spec != "heteroscedastic" else OUT
    h = 1e-5
    slope = (law.cdf(outputs, y + h) - law.cdf(outputs, y - h)) / (2 * h)
    density = law.log_prob(outputs, y).exp()
    torch.testing.assert_close(slope.reshape(3, 5), density, rtol=1e-6, atol=1e-8)


def test_learned_scale_has_one_number_for_each_output():
    law = likelihood_of("gaussian")
    y = REAL * torch.tensor([1.0, 100.0], dtype=DOUBLE)
    law.begin(y, OUT)
    torch.testing.assert_close(law.scale(OUT).detach(), y.std(0, correction=0))
    assert [p.shape for p in law.parameters()] == [(2,)]
    flat = likelihood_of("student_t")
    flat.begin(torch.ones(4, dtype=DOUBLE), OUT)  # data that do not vary
    assert float(flat.scale(OUT).detach()) == 1.0


def test_variance_of_heavy_tails_is_infinite():
    law = likelihood_of("student_t(df=2, scale=1.0)")
    assert bool(torch.isinf(law.variance(OUT)).all())


def test_no_axis_broadcasts():
    law = likelihood_of("gaussian(sd=1.0)")
    for y, out in (
        (torch.zeros(4), (1,)),
        (torch.zeros(4, 1), ()),
        (torch.zeros(4, 2), (1,)),
        (torch.zeros(4, 1), (2,)),
    ):
        with pytest.raises(errors.ShapeError, match="needs y of shape"):
            law.check(y, torch.Size(out))
    law.check(torch.zeros(4, 2), torch.Size((2,)))


@pytest.mark.parametrize(
    ("spec", "y", "out", "kind", "match"),
    [
        ("categorical", torch.tensor([0, 3]), (3,), errors.DataError, "0 to 2"),
        ("categorical", torch.tensor([-1, 2]), (3,), errors.DataError, "-1 to 2"),
        ("categorical", torch.tensor([0.0, 1.0]), (3,), errors.DataError, "integers"),
        ("categorical", torch.tensor([0, 1]), (1,), errors.ShapeError, "bernoulli"),
        ("categorical", torch.tensor([[0], [1]]), (3,), errors.ShapeError, r"\(N,\)"),
        ("bernoulli", torch.tensor([0.0, 0.5]), (), errors.DataError, "0.5"),
        ("poisson", torch.tensor([1, -2]), (), errors.DataError, "-2"),
        ("poisson", torch.tensor([1.0, 0.5]), (), errors.DataError, "0.5"),
        ("poisson", torch.tensor([True, False]), (), errors.DataError, "truth"),
        ("heteroscedastic", torch.zeros(3), (1,), errors.ShapeError, "two outputs"),
    ],
)
def test_impossible_data_are_refused(spec, y, out, kind, match):
    with pytest.raises(kind, match=match):
        likelihood_of(spec).check(y, torch.Size(out))


@pytest.mark.parametrize(
    ("given", "kind", "match"),
    [
        ("gausian", errors.UnknownNameError, "gaussian"),
        ("gaussian(scale=1)", errors.SpecError, "sd"),
        ("poisson(rate=1)", errors.SpecError, "no arguments"),
        ("gaussian(sd=-1)", errors.ConfigError, "sd"),
        ("student_t(df=0)", errors.ConfigError, "df"),
        (3, errors.ConfigError, "likelihood"),
    ],
)
def test_names_and_arguments_are_checked(given, kind, match):
    with pytest.raises(kind, match=match):
        likelihood_of(given)


def test_a_function_is_checked_and_has_no_moments():
    law = likelihood_of(lambda outputs, y: outputs[..., 0] - y)
    y = torch.zeros(5, dtype=DOUBLE)
    torch.testing.assert_close(law.log_prob(OUT, y), OUT[..., 0])
    with pytest.raises(errors.ShapeError):
        likelihood_of(lambda outputs, y: outputs).log_prob(OUT, y)
    assert not law.samples
    for method in (law.mean, law.variance, lambda f: law.sample(f, generator=seeded(0))):
        with pytest.raises(errors.NotAvailableError):
            method(OUT)
