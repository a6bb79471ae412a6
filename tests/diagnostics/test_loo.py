"""Leave-one-out against the exact answer of a conjugate normal mean."""

import math

import pytest
import torch
from torch.distributions import Normal

from vifamily.diagnostics.loo import loo
from vifamily.errors import DataError, ShapeError

SIGMA, TAU = 1.0, 2.0  # y_i ~ N(mu, SIGMA^2), mu ~ N(0, TAU^2)


def posterior_of(y):
    precision = len(y) / SIGMA**2 + 1 / TAU**2
    return float(y.sum()) / SIGMA**2 / precision, precision**-0.5


def exact(y):
    out = []
    for i in range(len(y)):
        mean, sd = posterior_of(torch.cat([y[:i], y[i + 1 :]]))
        out.append(Normal(mean, (sd**2 + SIGMA**2) ** 0.5).log_prob(y[i]))
    return torch.stack(out)


@pytest.fixture
def y(generator):
    return 0.7 + SIGMA * torch.randn(25, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("off", "wide"), [(0.0, 1.0), (0.3, 1.3), (-0.5, 1.1)])
def test_exact_answer_from_right_and_wrong_approximations(y, off, wide, generator):
    mean, sd = posterior_of(y)
    q = Normal(torch.tensor(mean + off * sd, dtype=torch.float64), torch.tensor(wide * sd, dtype=torch.float64))
    mu = q.mean + q.stddev * torch.randn(40_000, generator=generator, dtype=torch.float64)
    density = Normal(mu[:, None], SIGMA).log_prob(y)
    ratio = density.sum(1) + Normal(0.0, TAU).log_prob(mu) - q.log_prob(mu)
    found = loo(density, ratio)
    assert found.num_unreliable == 0
    # weights are bounded by a power of the draws: the error of a mean of 40,000 is far below this
    torch.testing.assert_close(found.pointwise, exact(y), atol=0.01, rtol=0)
    assert found.elpd == pytest.approx(float(exact(y).sum()), abs=0.02)
    assert found.elpd_error == pytest.approx(math.sqrt(25) * float(exact(y).std()), rel=0.02)
    # exact p_loo from the exact predictive densities
    full = Normal(mean, (sd**2 + SIGMA**2) ** 0.5).log_prob(y)
    assert found.p_loo == pytest.approx(float(full.sum() - exact(y).sum()), abs=0.02)


def test_without_the_correction_a_shifted_approximation_is_wrong(y, generator):
    # the test above can fail: leaving out the ratios gives another answer
    mean, sd = posterior_of(y)
    mu = mean + 2.5 * sd + sd * torch.randn(20_000, generator=generator, dtype=torch.float64)
    found = loo(Normal(mu[:, None], SIGMA).log_prob(y), torch.zeros(20_000))
    assert abs(found.elpd - float(exact(y).sum())) > 0.5


def test_an_outlier_is_flagged(y, generator):
    y = torch.cat([y, torch.tensor([40.0], dtype=torch.float64)])
    mean, sd = posterior_of(y)
    mu = mean + sd * torch.randn(2000, generator=generator, dtype=torch.float64)
    found = loo(Normal(mu[:, None], SIGMA).log_prob(y), torch.zeros(2000))
    assert int(found.k_hat.argmax()) == 25
    assert found.num_unreliable >= 1
    assert "cannot be trusted" in str(found)
    assert found.to_dict()["num_data"] == 26


def test_a_draw_without_density_adds_nothing(y, generator):
    mean, sd = posterior_of(y)
    mu = mean + sd * torch.randn(5000, generator=generator, dtype=torch.float64)
    density = Normal(mu[:, None], SIGMA).log_prob(y)
    ratio = torch.zeros(5000, dtype=torch.float64)
    broken = torch.cat([density, torch.full((1, 25), -math.inf, dtype=torch.float64)])
    found = loo(broken, torch.cat([ratio, torch.tensor([-math.inf], dtype=torch.float64)]))
    torch.testing.assert_close(found.pointwise, loo(density, ratio).pointwise, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("density", "ratio"), [((30,), (30,)), ((30, 0), (30,)), ((30, 2), (29,)), ((24, 2), (24,)), ((30, 2), (30, 1))]
)
def test_bad_shapes(density, ratio):
    with pytest.raises(ShapeError, match="leave-one-out"):
        loo(torch.zeros(density), torch.zeros(ratio))


def test_bad_values():
    density = torch.zeros(30, 2)
    density[3, 1] = math.nan
    with pytest.raises(DataError, match="NaN"):
        loo(density, torch.zeros(30))
