"""What the tests of problems share: problems by name, and their reference draws on unconstrained space."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vifamily import registry
from vifamily.errors import ReferenceDataError
from vifamily.problems._base import Problem

SHIPPED = [
    "banana",
    "bimodal",
    "breast_cancer",
    "correlated_normal",
    "diabetes",
    "diabetes(noise=unknown)",
    "eight_schools",
    "eight_schools(parameterisation=centered)",
    "four_modes",
    "funnel",
    "poisson_glm",
    "ring",
    "student_t_regression",
]
FROM_FOLDER = [
    "ark",
    "brownian_unknown_scales",
    "garch11",
    "german_credit_logistic",
    "gp_pois_regr",
    "kidscore_momhsiq",
    "lotka_volterra",
    "low_dim_gauss_mix",
    "posteriordb_eight_schools",
    "posteriordb_eight_schools(parameterisation=centered)",
    "sblrc_blr",
]

_built: dict[str, Problem] = {}


def build(spec: str) -> Problem:
    """Build a problem once, or skip where its data are not there."""
    if spec not in _built:
        try:
            _built[spec] = registry.build("problems", spec)
        except ReferenceDataError as error:
            if registry.parse(spec).name in {registry.parse(s).name for s in SHIPPED}:
                raise
            pytest.skip(str(error))
    return _built[spec]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, specs in {
        "any_problem": SHIPPED + FROM_FOLDER,
        "shipped_problem": SHIPPED,
        "folder_problem": FROM_FOLDER,
    }.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, specs, ids=specs, indirect=True)


@pytest.fixture
def any_problem(request: pytest.FixtureRequest) -> Problem:
    return build(request.param)


@pytest.fixture
def shipped_problem(request: pytest.FixtureRequest) -> Problem:
    return build(request.param)


@pytest.fixture
def folder_problem(request: pytest.FixtureRequest) -> Problem:
    return build(request.param)


@pytest.fixture
def problem_of() -> Iterator[Callable[[str], Problem]]:
    yield build


def _by_site(problem: Problem, columns: Tensor) -> dict[str, Tensor]:
    out, start = {}, 0
    for site in problem.model.layout.sites:
        size = int(np.prod(site.shape, dtype=int))
        out[site.name] = columns[..., start : start + size].reshape((*columns.shape[:-1], *site.shape))
        start += size
    return out


def to_z(problem: Problem, values: np.ndarray) -> Tensor:
    """Reference columns to unconstrained space; written apart from the problems' own maps, which it inverts."""
    columns = torch.from_numpy(np.asarray(values, dtype=np.float64))
    names = {site.name for site in problem.model.layout.sites}
    if "eta" in names:
        mu, tau = columns[..., -2], columns[..., -1]
        theta = {"eta": (columns[..., :-2] - mu[..., None]) / tau[..., None], "mu": mu, "tau": tau}
    elif "fraction" in names:
        mu, alpha0, alpha1, beta1 = columns.unbind(-1)
        theta = {"mu": mu, "alpha0": alpha0, "alpha1": alpha1, "fraction": beta1 / (1 - alpha1)}
    elif {"rho", "z"} <= names:
        rho, alpha, f = columns[..., 0], columns[..., 1], columns[..., 2:]
        x = torch.linspace(-10, 10, 11, dtype=torch.float64)
        kernel = (-((x[:, None] - x) ** 2) / (2 * rho[..., None, None] ** 2)).exp() * alpha[..., None, None] ** 2
        factor = torch.linalg.cholesky(kernel + 1e-10 * torch.eye(11, dtype=torch.float64))
        z = torch.linalg.solve_triangular(factor, f.unsqueeze(-1), upper=False).squeeze(-1)
        theta = {"rho": rho, "alpha": alpha, "z": z}
    else:
        theta = _by_site(problem, columns)
    return problem.model.unconstrain(theta)


def typical_z(problem: Problem, generator: torch.Generator, number: int, *, spread: float = 1.0) -> Tensor:
    """Points of unconstrained space around the posterior, `spread` standard deviations wide."""
    reference = problem.reference
    assert reference is not None
    if reference.draws is not None:
        draws = to_z(problem, reference.draws)
        centre, sd = draws.mean(0), draws.std(0)
    else:
        centre = to_z(problem, reference.mean)
        # the delta rule on the log scale, where the parameter is positive
        positive = [name.endswith("_scale") for name in reference.names]
        sd = torch.from_numpy(np.where(positive, reference.sd / np.where(positive, reference.mean, 1.0), reference.sd))
    return centre + spread * sd * torch.randn(number, len(sd), generator=generator, dtype=torch.float64)


@pytest.fixture
def unconstrained() -> Callable[..., Tensor]:
    return to_z


@pytest.fixture
def typical() -> Callable[..., Any]:
    return typical_z
