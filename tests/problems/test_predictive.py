"""Draws from priors and predictives of the problems that offer them."""

from typing import Any

import numpy as np
import pytest
import scipy.stats as st
import torch

from vifamily.problems._base import Problem
from vifamily.types import Capability

NUM_DRAWS = 4000


def test_predictive_has_the_shape_of_the_data(any_problem: Problem, typical: Any, generator: torch.Generator) -> None:
    if Capability.PREDICTIVE not in any_problem.model.capabilities:
        pytest.skip("the problem offers no predictive draws")
    z = typical(any_problem, generator, 7)
    drawn = any_problem.model.predictive(z, generator=generator)
    observed = any_problem.model.observed()
    for name, value in drawn.items():
        assert value.shape == (7, *observed[name].shape)
        assert value.isfinite().all()


# Mean and standard deviation of one new datum, written again.
MEANS_AND_SDS = {
    "diabetes": lambda t, x: (x @ t["beta"][0], 0.7),
    "diabetes(noise=unknown)": lambda t, x: (x @ t["beta"][0], t["sigma"][0]),
    "breast_cancer": lambda t, x: (p := torch.sigmoid(x @ t["w"][0]), (p * (1 - p)).sqrt()),
    "poisson_glm": lambda t, x: (rate := (x @ t["beta"][0]).exp(), rate.sqrt()),
    "student_t_regression": lambda t, x: (
        x @ t["beta"][0] + 17,
        t["sigma"][0] * (t["nu"][0] / (t["nu"][0] - 2)).sqrt(),
    ),
}


@pytest.mark.parametrize("spec", MEANS_AND_SDS)
def test_predictive_moments(spec: str, problem_of: Any, unconstrained: Any, generator: torch.Generator) -> None:
    problem = problem_of(spec)
    z = unconstrained(problem, problem.reference.mean[None]).expand(NUM_DRAWS, -1)
    drawn = problem.model.predictive(z, generator=generator)["y"]
    mean, sd = MEANS_AND_SDS[spec](problem.model.constrain(z[:1]), problem.model.source.whole()[0])
    # the average over the data is one number per draw, so one standard error
    centred = (drawn - mean).mean(-1)
    assert abs(float(centred.mean())) < 5 * float(centred.std()) / NUM_DRAWS**0.5
    squares = ((drawn - mean) ** 2 - torch.as_tensor(sd) ** 2).mean(-1)
    assert abs(float(squares.mean())) < 5 * float(squares.std()) / NUM_DRAWS**0.5


@pytest.mark.parametrize("spec", ["eight_schools", "eight_schools(parameterisation=centered)"])
def test_prior_and_predictive_of_eight_schools(spec: str, problem_of: Any, generator: torch.Generator) -> None:
    problem = problem_of(spec)
    z = problem.model.sample_prior(NUM_DRAWS, generator=generator)
    theta = problem.columns(problem.model.constrain(z)).numpy()
    mu, tau = theta[:, 8], theta[:, 9]
    standard = (theta[:, :8] - mu[:, None]) / tau[:, None]
    for values, law in ((mu, st.norm(0, 5)), (tau, st.halfcauchy(scale=5)), (standard.ravel(), st.norm(0, 1))):
        # a Kolmogorov-Smirnov distance this large has a probability below one in a million
        assert st.kstest(values, law.cdf).statistic < 2.7 / np.sqrt(len(values))
    drawn = problem.model.predictive(z, generator=generator)["y"].numpy()
    noise = (drawn - theta[:, :8]) / np.array([15, 10, 16, 11, 9, 11, 10, 18.0])
    assert st.kstest(noise.ravel(), st.norm.cdf).statistic < 2.7 / np.sqrt(noise.size)
