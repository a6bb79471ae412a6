"""The judge against exact bounds, and the time to a target on curves that are not monotone."""

import math

import numpy as np
import pytest
import torch

from vifamily.benchmark._judge import Judge, density_offset, first_time, quasi_normal
from vifamily.errors import BenchmarkError
from vifamily.models import Density
from vifamily.problems import Problem, Reference

MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0, 0.0], [0.7, 0.5, 0.0], [-0.2, 0.1, 2.0]], dtype=torch.float64)
LOG_EVIDENCE = -4.25


def gaussian() -> Problem:
    law = torch.distributions.MultivariateNormal(MEAN, scale_tril=FACTOR)
    model = Density(lambda z: law.log_prob(z) + LOG_EVIDENCE, dim=3)
    sd = (FACTOR @ FACTOR.T).diagonal().sqrt().numpy()
    reference = Reference("analytic", ("z[0]", "z[1]", "z[2]"), MEAN.numpy(), sd, None, LOG_EVIDENCE)
    return Problem("gaussian", model, reference, "A normal law.")


def kl(mean: torch.Tensor, factor: torch.Tensor) -> float:
    q = torch.distributions.MultivariateNormal(mean, scale_tril=factor)
    p = torch.distributions.MultivariateNormal(MEAN, scale_tril=FACTOR)
    return float(torch.distributions.kl_divergence(q, p))


def test_bound_of_the_posterior_itself_is_the_evidence() -> None:
    judge = Judge(gaussian())
    assert judge.elbo(MEAN.numpy(), FACTOR.numpy()) == pytest.approx(LOG_EVIDENCE, abs=1e-4)


@pytest.mark.parametrize("full", [True, False])
def test_gap_is_the_divergence(full: bool) -> None:
    judge = Judge(gaussian())
    mean, sd = MEAN + 0.3, torch.tensor([0.4, 0.6, 1.5], dtype=torch.float64)
    factor = 1.2 * FACTOR if full else torch.diag(sd)
    scale = factor.numpy() if full else sd.numpy()
    # the standard error of the bound on as many independent draws; Sobol points do better
    noise = torch.randn(4096, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error = float(judge.model.log_joint(mean + noise @ factor.T).std()) / math.sqrt(4096)
    assert judge.elbo(mean.numpy(), scale) == pytest.approx(LOG_EVIDENCE - kl(mean, factor), abs=error)


def test_a_factor_need_not_be_triangular() -> None:
    judge = Judge(gaussian())
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    assert judge.elbo(MEAN.numpy(), (FACTOR @ rotation).numpy()) == pytest.approx(LOG_EVIDENCE, abs=0.01)


def test_far_points_are_valued_on_few_draws() -> None:
    judge = Judge(gaussian())
    far = (MEAN + 50).numpy()
    assert judge.elbo(far, FACTOR.numpy(), near=LOG_EVIDENCE) < LOG_EVIDENCE - 100


def test_bound_that_is_not_finite_is_the_worst() -> None:
    problem = Problem("wall", Density(lambda z: z.sum(-1) * math.inf, dim=3), None, "Infinite.")
    assert Judge(problem).elbo(MEAN.numpy(), FACTOR.numpy()) == -math.inf


def test_moments_of_a_shifted_gaussian() -> None:
    judge = Judge(gaussian())
    sd = (FACTOR @ FACTOR.T).diagonal().sqrt()
    found = judge.moments((MEAN + 0.5 * sd).numpy(), (2 * FACTOR).numpy(), count=4096)
    assert found.mean == pytest.approx(0.5, abs=1e-6)
    assert found.log_sd == pytest.approx(math.log(2), abs=0.01)


def test_draws_are_balanced_in_every_even_part() -> None:
    draws = quasi_normal(4, 64, 3)
    assert draws.shape == (64, 4)
    assert float(draws[:10].mean(0).abs().max()) < 1e-12


TIMES = [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([9.0, 3.0, 0.5, 0.05, 0.01], 3),
        ([9.0, 0.05, 3.0, 0.05, 0.01], 3),  # left again
        ([0.0, 0.0, 0.0, 0.0, 0.0], 0),
        ([-1.0, 0.2, 0.1, 0.1, 0.1], 2),
        ([0.0, 0.0, 0.0, 0.0, 0.2], None),  # not within at the end
        ([0.0, math.nan, 0.0, 0.0, 0.0], 2),
        ([0.0, 0.0, 0.0, 0.0, math.nan], None),
        ([0.0, math.inf, 0.0, 0.0, 0.0], 2),
    ],
)
def test_first_time(gaps: list[float], expected: int | None) -> None:
    assert first_time(TIMES, gaps, 0.1) == expected


def test_first_time_of_nothing_and_of_unequal_lengths() -> None:
    assert first_time([], [], 0.1) is None
    with pytest.raises(BenchmarkError, match="as many times as gaps"):
        first_time(TIMES, [0.0], 0.1)


def test_offset_ignores_a_constant_and_nothing_else() -> None:
    ours = np.array([-10.0, -12.0, -30.0])
    assert density_offset(ours, ours + 7.5) < 1e-15
    assert density_offset(ours, ours * 1.001) > 1e-5
    assert density_offset(ours, np.array([1.0, 2.0])) == math.inf
    assert density_offset(ours, np.array([1.0, math.nan, 2.0])) == math.inf
