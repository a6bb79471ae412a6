"""The arctangent likelihood ratio, against quadrature, closed forms and finite differences."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from vifamily.errors import DataError, ShapeError
from vifamily.numerics.arctangent_ratio import (
    auc_range,
    extended_cosine,
    extended_sine,
    largest_variance,
    logit_terms,
    population_curve,
    sine_bound,
)

NORMAL = stats.norm()
# positives, negatives, arc length, maximal AUC
PAIRS = {
    "shift 0.25": (stats.norm(0.25), NORMAL, 1.424977, 0.570158),
    "shift 0.5": (stats.norm(0.5), NORMAL, 1.454447, 0.638163),
    "shift 1": (stats.norm(1), NORMAL, 1.546469, 0.760250),
    "shift 1.5": (stats.norm(1.5), NORMAL, 1.652002, 0.855578),
    "shift 2": (stats.norm(2), NORMAL, 1.749823, 0.921350),
    "shift 3": (stats.norm(3), NORMAL, 1.891545, 0.983053),
    "shift 4": (stats.norm(4), NORMAL, 1.962522, 0.997661),
    "scale 2": (stats.norm(0, 2), NORMAL, 1.516167, 0.704833),
    "scale 3": (stats.norm(0, 3), NORMAL, 1.607320, 0.795167),
    "N(1, 2)": (stats.norm(1, 2), NORMAL, 1.551719, 0.744084),
    "N(1, 0.5)": (stats.norm(1, 0.5), NORMAL, 1.646311, 0.831161),
    "N(2, 1.5)": (stats.norm(2, 1.5), NORMAL, 1.678423, 0.866559),
    "Cauchy shift 1": (stats.cauchy(1), stats.cauchy(), 1.486230, 0.685600),
    "Cauchy shift 2": (stats.cauchy(2), stats.cauchy(), 1.604263, 0.806436),
    "t3 shift 1": (stats.t(3, 1), stats.t(3), 1.512266, 0.717197),
    "t2 and normal": (stats.t(2), NORMAL, 1.451521, 0.584986),
    "Cauchy and normal": (stats.cauchy(), NORMAL, 1.494297, 0.647408),
    "Laplace and normal": (stats.laplace(), NORMAL, 1.438165, 0.581378),
    "exponential rates": (stats.expon(scale=2), stats.expon(), 1.478942857545, 2 / 3),
}


@pytest.mark.parametrize("name", PAIRS)
def test_population_values_of_the_table(name):
    positive, negative, length, area = PAIRS[name]
    # edges even in the tangent, so that heavy tails get cells too
    edges = np.concatenate([[-np.inf], 2 * np.tan(np.linspace(-1.5707, 1.5707, 40_001)), [np.inf]])
    found = population_curve(np.diff(positive.cdf(edges)), np.diff(negative.cdf(edges)))
    assert found == pytest.approx((length, area), abs=2e-6)


def test_closed_forms():
    assert population_curve([0.5, 0.5], [0.5, 0.5]) == pytest.approx((math.sqrt(2), 0.5), abs=1e-12)
    assert population_curve([1, 0], [0, 1]) == pytest.approx((2.0, 1.0), abs=1e-12)
    a, b = 0.8, 0.3
    assert population_curve([a, 1 - a], [b, 1 - b]) == pytest.approx(
        (math.hypot(a, b) + math.hypot(1 - a, 1 - b), 0.5 + (a - b) / 2), abs=1e-12
    )


def test_gap_identity_and_the_maximum_at_the_arctangent(generator):
    p, q = (torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    best = torch.atan2(p, q)
    u = torch.rand(50, generator=generator, dtype=torch.float64) * math.pi / 2
    value = (p * extended_sine(u) + q * extended_cosine(u)).sum()
    length, _ = population_curve(p.numpy(), q.numpy())
    assert float(length - value) == pytest.approx(float((torch.hypot(p, q) * (1 - (u - best).cos())).sum()), abs=1e-12)
    assert float((p * extended_sine(best) + q * extended_cosine(best)).sum()) == pytest.approx(length, abs=1e-12)


@pytest.mark.parametrize("function", [extended_sine, extended_cosine])
def test_extension_is_concave_and_its_gradient_is_right(function):
    u = torch.linspace(-2, 4, 601, dtype=torch.float64)
    assert (function(u).diff().diff() < 1e-12).all()
    inner = torch.tensor([-1.0, -0.1, 0.4, 1.2, 1.7, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, inner)


def test_extension_joins_with_equal_slopes():
    ends = torch.tensor([0.0, math.pi / 2], dtype=torch.float64, requires_grad=True)
    (sine,) = torch.autograd.grad(extended_sine(ends).sum(), ends)
    (cosine,) = torch.autograd.grad(extended_cosine(ends).sum(), ends)
    assert sine.tolist() == pytest.approx([1.0, 0.0], abs=1e-12)
    assert cosine.tolist() == pytest.approx([0.0, -1.0], abs=1e-12)


def test_logit_terms_are_those_of_the_arctangent_and_stay_finite():
    g = torch.linspace(-5, 5, 21, dtype=torch.float64)
    sine, cosine = logit_terms(g)
    assert torch.allclose(sine, g.exp().atan().sin(), atol=1e-12)
    assert torch.allclose(cosine, g.exp().atan().cos(), atol=1e-12)
    far = torch.tensor([-5000.0, 5000.0], requires_grad=True)
    (slope,) = torch.autograd.grad(sum(t.sum() for t in logit_terms(far)), far)
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize(("shift", "bound"), [(0.5, 0.553577), (1, 0.659331), (2, 0.842535), (3, 0.939889)])
def test_sine_bound_at_the_arctangent(shift, bound):
    # quantiles at midpoints: means over them are quadrature
    at = NORMAL.ppf((np.arange(200_000) + 0.5) / 200_000)
    u_pos, u_neg = (torch.from_numpy(np.arctan(np.exp(shift * x - shift**2 / 2))) for x in (at + shift, at))
    assert float(sine_bound(u_pos, u_neg)) == pytest.approx(bound, abs=2e-6)
    assert bound < NORMAL.cdf(shift / math.sqrt(2))


@pytest.mark.parametrize(
    ("length", "ends"),
    [
        (1.454447030, (0.563493, 0.639487)),
        (1.546469337, (0.679135, 0.760314)),
        (1.749822958, (0.854044, 0.927088)),
        (1.891544675, (0.942474, 0.986297)),
        (math.sqrt(2), (0.5, 0.5)),
        (2.0, (1.0, 1.0)),
    ],
)
def test_range_of_areas(length, ends):
    assert auc_range(length) == pytest.approx(ends, abs=1.5e-6)


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="0 negatives"):
        sine_bound(torch.ones(3), torch.ones(0))
    with pytest.raises(ShapeError, match="one length"):
        population_curve([1.0], [0.5, 0.5])
    with pytest.raises(DataError, match="normalise"):
        population_curve([0.5, 0.1], [0.5, 0.5])
    for length in (1.2, 2.5, math.nan):
        with pytest.raises(DataError, match="between"):
            auc_range(length)


def test_no_pair_has_a_larger_variance(seed):
    rng = np.random.default_rng(seed)
    p, q = (rng.dirichlet(np.full(6, 0.4), 20_000) for _ in range(2))
    rho = np.hypot(p, q)
    sine, cosine = p / rho, q / rho
    variance = (p * sine**2).sum(1) - (p * sine).sum(1) ** 2 + (q * cosine**2).sum(1) - (q * cosine).sum(1) ** 2
    largest = np.array([largest_variance(x) for x in rho.sum(1)])
    assert (variance <= largest + 1e-12).all()
    # two points with p and q exchanged attain it
    p, q = np.array([0.8, 0.2]), np.array([0.2, 0.8])
    rho = np.hypot(p, q)
    both = 2 * ((p * (p / rho) ** 2).sum() - (p * p / rho).sum() ** 2)
    assert both == pytest.approx(largest_variance(float(rho.sum())), abs=1e-12)
