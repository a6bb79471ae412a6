"""References checked by a second route: quadrature, closed forms of scipy, importance sampling, chain diagnostics."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats as st
import torch
from torch import Tensor

from vifamily import registry
from vifamily.errors import ConfigError, ReferenceDataError
from vifamily.problems._base import Problem, Reference
from vifamily.problems._references import read_stored, stored_reference
from vifamily.problems._references.make import NAMES, main


def plane(problem: Problem, half_width: float, number: int) -> tuple[Tensor, Tensor]:
    """Points of a square grid and the log of joint times cell: the trapezoid rule, exact to many digits here."""
    axes = [torch.linspace(-half_width, half_width, number, dtype=torch.float64)] * problem.model.dim
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, problem.model.dim)
    return points, problem.model.log_joint(points) + problem.model.dim * math.log(2 * half_width / (number - 1))


@pytest.mark.parametrize(
    ("spec", "half_width", "number"),
    [
        ("banana", 60.0, 1601),
        ("bimodal", 15.0, 801),
        ("bimodal(weight=0.2, separation=2.0)", 15.0, 801),
        ("correlated_normal", 10.0, 801),
        ("correlated_normal(correlation=-0.7, mean=0.5)", 10.0, 801),
        ("four_modes", 9.0, 801),
        ("ring", 4.0, 1201),
        ("ring(radius=1.0, width=0.5)", 7.0, 1201),
    ],
)
def test_moments_and_evidence_by_quadrature(spec: str, half_width: float, number: int) -> None:
    problem = registry.build("problems", spec)
    points, log_mass = plane(problem, half_width, number)
    log_evidence = torch.logsumexp(log_mass, 0)
    weight = (log_mass - log_evidence).exp()
    mean = weight @ points
    sd = (weight @ (points - mean).square()).sqrt()
    # a ring narrower than its radius still puts a little mass on the kink at the origin, where the rule is of second
    # order
    tolerance = 1e-4 if spec.startswith("ring(") else 1e-7
    assert float(log_evidence) == pytest.approx(problem.reference.log_evidence, abs=tolerance)
    np.testing.assert_allclose(mean, problem.reference.mean, atol=tolerance)
    np.testing.assert_allclose(sd, problem.reference.sd, atol=tolerance)


def test_funnel_integrates_by_conditioning() -> None:
    problem = registry.build("problems", "funnel(dim=2, scale=1.0)")
    v = torch.linspace(-9, 9, 361, dtype=torch.float64)
    unit = torch.linspace(-9, 9, 361, dtype=torch.float64)
    x = unit * (0.5 * v).exp()[:, None]  # a grid that narrows with the funnel
    z = torch.stack([v[:, None].expand_as(x), x], dim=-1)
    mass = (problem.model.log_joint(z) + (0.5 * v)[:, None]).exp() * 0.05**2
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-9)
    assert float((mass * x**2).sum()) == pytest.approx(problem.reference.sd[1] ** 2, abs=1e-6)


def test_eight_schools_by_two_dimensional_quadrature(problem_of: Any) -> None:
    problem = problem_of("eight_schools")
    y, sigma = np.array([28, 8, -3, 7, -1, 1, 18, 12.0]), np.array([15, 10, 16, 11, 9, 11, 10, 18.0])
    mu, log_tau = np.linspace(-45, 55, 401)[:, None], np.linspace(-25, 11, 1801)[None, :]
    tau = np.exp(log_tau)
    log_mass = st.norm.logpdf(mu, 0, 5) + st.halfcauchy.logpdf(tau, scale=5) + log_tau
    for effect, error in zip(y, sigma, strict=True):
        log_mass = log_mass + st.norm.logpdf(effect, mu, np.sqrt(error**2 + tau**2))
    cell = (mu[1, 0] - mu[0, 0]) * (log_tau[0, 1] - log_tau[0, 0])
    mass = np.exp(log_mass) * cell
    total = mass.sum()
    reference = problem.reference
    assert math.log(total) == pytest.approx(reference.log_evidence, abs=1e-8)
    weight = mass / total
    tau_mean, mu_mean = (weight * tau).sum(), (weight * mu).sum()
    assert reference.mean[9] == pytest.approx(tau_mean, rel=1e-7)
    assert reference.sd[9] == pytest.approx(math.sqrt((weight * (tau - tau_mean) ** 2).sum()), rel=1e-6)
    assert reference.mean[8] == pytest.approx(mu_mean, rel=1e-7)
    assert reference.sd[8] == pytest.approx(math.sqrt((weight * (mu - mu_mean) ** 2).sum()), rel=1e-7)
    for school in range(8):
        share = tau**2 / (tau**2 + sigma[school] ** 2)
        centre = mu + share * (y[school] - mu)
        mean = (weight * centre).sum()
        variance = (weight * ((centre - mean) ** 2 + sigma[school] ** 2 * share)).sum()
        assert reference.mean[school] == pytest.approx(mean, rel=1e-7)
        assert reference.sd[school] == pytest.approx(math.sqrt(variance), rel=1e-7)


def test_eight_schools_agrees_with_the_published_draws(problem_of: Any) -> None:
    published, own = problem_of("posteriordb_eight_schools").reference, problem_of("eight_schools").reference
    assert published.names == own.names
    assert np.all(np.abs(published.mean - own.mean) < 5 * published.mean_error)
    np.testing.assert_allclose(published.sd, own.sd, rtol=0.05)


def test_both_parameterisations_share_the_reference(problem_of: Any) -> None:
    one, other = problem_of("eight_schools"), problem_of("eight_schools(parameterisation=centered)")
    np.testing.assert_array_equal(one.reference.draws, other.reference.draws)


def test_diabetes_evidence_is_the_one_of_the_marginal_law(problem_of: Any) -> None:
    from vifamily.problems import diabetes

    problem = problem_of("diabetes")
    x, y = (part.numpy() for part in problem.model.source.whole())
    covariance = diabetes.KNOWN_SIGMA**2 * np.eye(len(y)) + x @ x.T
    known = st.multivariate_normal.logpdf(y, np.zeros(len(y)), covariance)
    assert problem.reference.log_evidence == pytest.approx(known, abs=1e-8)
    shape, rate = diabetes.PRIOR_SHAPE, diabetes.PRIOR_RATE
    unknown = st.multivariate_t.logpdf(y, np.zeros(len(y)), rate / shape * (np.eye(len(y)) + x @ x.T), df=2 * shape)
    assert problem_of("diabetes(noise=unknown)").reference.log_evidence == pytest.approx(unknown, abs=1e-8)


@pytest.mark.parametrize("spec", ["diabetes", "diabetes(noise=unknown)"])
def test_diabetes_posterior_density_is_joint_over_evidence(spec: str, problem_of: Any) -> None:
    # Bayes' rule at the mean of the weights: the closed-form posterior must integrate what the log joint says.
    problem = problem_of(spec)
    reference = problem.reference
    draws = torch.from_numpy(reference.draws)
    weights = draws[:, :11]
    if spec == "diabetes":
        z = draws
        posterior = st.multivariate_normal.logpdf(weights, reference.mean, _normal_covariance(problem))
    else:
        from scipy.special import gammaln

        sigma = draws[:, 11:]
        z = torch.cat([weights, sigma.log()], dim=-1)
        x, y = (part.numpy() for part in problem.model.source.whole())
        precision = np.eye(11) + x.T @ x
        mean = np.linalg.solve(precision, x.T @ y)
        shape, rate = 2 + len(y) / 2, 1 + 0.5 * (y @ y - mean @ precision @ mean)
        scaled = (weights.numpy() - mean) / sigma.numpy()
        normal = st.multivariate_normal.logpdf(scaled, np.zeros(11), np.linalg.inv(precision)) - 11 * np.log(
            sigma[:, 0].numpy()
        )
        log_sigma = np.log(sigma[:, 0].numpy())
        gamma = (
            shape * math.log(rate)
            - gammaln(shape)
            - 2 * shape * log_sigma
            - rate * np.exp(-2 * log_sigma)
            + math.log(2)
        )
        posterior = normal + gamma
    joint = problem.model.log_joint(z).numpy()
    np.testing.assert_allclose(joint - posterior, reference.log_evidence, atol=1e-7)


def _normal_covariance(problem: Problem) -> np.ndarray:
    x = problem.model.source.whole()[0].numpy()
    return np.linalg.inv(np.eye(11) + x.T @ x / 0.49)


def laplace_importance(
    problem: Problem, generator: torch.Generator, number: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Means, standard errors and effective sample size of importance sampling from Student's t at the mode."""
    z = torch.from_numpy(problem.reference.mean).clone().unsqueeze(0).requires_grad_(True)
    for _ in range(30):
        (g,) = torch.autograd.grad(problem.model.log_joint(z).sum(), z)
        h = torch.autograd.functional.hessian(lambda p: problem.model.log_joint(p.unsqueeze(0))[0], z[0].detach())
        z = (z.detach() - torch.linalg.solve(h, g[0])).requires_grad_(True)
    factor = torch.linalg.cholesky(torch.linalg.inv(-h))
    df, dim = 30.0, z.shape[1]
    normal = torch.randn(number, dim, generator=generator, dtype=torch.float64)
    chi = torch.from_numpy(st.chi2.ppf(torch.rand(number, generator=generator, dtype=torch.float64).numpy(), df))
    unit = normal * (df / chi).sqrt().unsqueeze(-1)
    points = z.detach() + unit @ factor.T
    log_q = -0.5 * (df + dim) * torch.log1p(unit.square().sum(-1) / df)
    log_w = problem.model.log_joint(points) - log_q
    weight = torch.softmax(log_w, 0)
    mean = weight @ points
    error = (weight.square() @ (points - mean).square()).sqrt()
    return mean.numpy(), error.numpy(), float(1 / weight.square().sum())


@pytest.mark.parametrize("spec", ["poisson_glm", "breast_cancer", "german_credit_logistic"])
def test_means_by_importance_sampling(spec: str, problem_of: Any, generator: torch.Generator) -> None:
    problem = problem_of(spec)
    mean, error, effective = laplace_importance(problem, generator, 20_000)
    assert effective > 1000
    reference = problem.reference
    assert np.all(np.abs(mean - reference.mean) < 5 * np.hypot(error, reference.mean_error))


def test_brownian_moments_by_quadrature(problem_of: Any) -> None:
    problem = problem_of("brownian_unknown_scales")
    from vifamily.problems._folder import find_folder, read_folder

    observed = read_folder(find_folder("inference_gym", "brownian_unknown_scales"))[0]["observed"]
    seen = ~np.isnan(observed)
    walk = np.minimum.outer(np.arange(1, 31), np.arange(1, 31)).astype(float)
    # The prior is wide, so one of the scales may be tiny as long as the other explains the data: the grid must reach
    # far down.
    grid = np.linspace(-16, 1, 137)
    total, first, second = 0.0, np.zeros(32), np.zeros(32)
    for a in grid:
        s, r = np.exp(a), np.exp(grid)
        prior = s**2 * walk
        data = prior[np.ix_(seen, seen)] + r[:, None, None] ** 2 * np.eye(seen.sum())
        gain = np.linalg.solve(data, np.broadcast_to(prior[seen], (len(r), 20, 30)))
        mean = observed[seen] @ gain
        variance = np.diag(prior) - np.einsum("gij,ij->gj", gain, prior[seen])
        misfit = (
            np.linalg.solve(data, np.broadcast_to(observed[seen][:, None], (len(r), 20, 1)))[..., 0] @ observed[seen]
        )
        weight = np.exp(-0.5 * (misfit + np.linalg.slogdet(data)[1]) - 0.5 * (a**2 + grid**2) / 4 - 40)
        values = np.column_stack([np.full(len(r), s), r, mean])
        total += weight.sum()
        first += weight @ values
        second += weight @ (values**2 + np.column_stack([np.zeros((len(r), 2)), variance]))
    first, second = first / total, second / total
    np.testing.assert_allclose(first, problem.reference.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.sqrt(second - first**2), problem.reference.sd, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_stored_chains_converged(name: str) -> None:
    stored = read_stored(name)
    assert stored["rhat"].max() < 1.01
    assert min(stored["ess_bulk"].min(), stored["ess_tail"].min()) > 1000
    assert int(stored["divergences"]) <= 0.001 * int(stored["num_draws"])
    assert stored["draws"].dtype == np.float32
    assert stored["command"].item().startswith(f"python -m vifamily.problems._references.make {name} ")


@pytest.mark.slow
def test_a_short_chain_finds_the_stored_moments(tmp_path: Any) -> None:
    code = main(
        ["poisson_glm", "--chains", "2", "--draws", "100", "--warmup", "100", "--seed", "3", "--folder", str(tmp_path)]
    )
    assert code in (0, 1)  # so short a run may miss the bound on R-hat
    with np.load(tmp_path / "poisson_glm.npz", allow_pickle=False) as made:
        stored = read_stored("poisson_glm")
        assert np.all(np.abs(made["mean"] - stored["mean"]) < 5 * np.hypot(made["mcse_mean"], stored["mcse_mean"]))


def test_missing_or_damaged_store_says_how_to_make_it_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.resources

    with pytest.raises(ReferenceDataError, match=r"_references.make nothing"):
        stored_reference("nothing")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    np.savez(tmp_path / "partial.npz", names=np.array(["a"]))
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(ReferenceDataError, match="missing or damaged"):
        stored_reference("broken")
    with pytest.raises(ReferenceDataError, match="lacks draws"):
        stored_reference("partial")


BAD_REFERENCES = {
    "kind": ({"kind": "guess"}, "one of analytic"),
    "no columns": ({"names": ()}, "at least one column"),
    "twice one name": ({"names": ("a", "a")}, "distinct names"),
    "short mean": ({"mean": np.zeros(1)}, "mean must be 2 finite numbers"),
    "nan mean": ({"mean": np.array([0.0, np.nan])}, "mean must be 2 finite numbers"),
    "zero sd": ({"sd": np.array([1.0, 0.0])}, "must be positive"),
    "flat draws": ({"draws": np.zeros(4)}, r"of shape \(draw, 2\)"),
    "infinite draws": ({"draws": np.array([[0.0, np.inf]])}, "must be finite"),
}


@pytest.mark.parametrize("name", BAD_REFERENCES)
def test_bad_references_are_refused(name: str) -> None:
    changed, message = BAD_REFERENCES[name]
    good = {"kind": "analytic", "names": ("a", "b"), "mean": np.zeros(2), "sd": np.ones(2), "draws": None}
    with pytest.raises(ReferenceDataError, match=message):
        Reference(**(good | changed))


def test_columns_by_name() -> None:
    reference = Reference("analytic", ("a", "b"), np.zeros(2), np.ones(2))
    assert reference.column("b") == 1
    with pytest.raises(ReferenceDataError, match="no column 'c'; it has a, b"):
        reference.column("c")


BAD_ARGUMENTS = {
    "correlated_normal(dim=0)": "dim must be at least 1",
    "correlated_normal(dim=3, correlation=-0.6)": "strictly between -0.5 and 1",
    "correlated_normal(correlation=1.0)": "strictly between -1 and 1",
    "banana(width=0.0)": "width must be positive",
    "funnel(dim=1)": "dim must be at least 2",
    "funnel(scale=-1.0)": "scale must be positive",
    "ring(radius=-1.0)": "radius must not be negative",
    "ring(width=nan)": "width must be positive",
    "bimodal(weight=1.0)": "strictly between 0 and 1",
    "four_modes(sd=0.0)": "sd must be positive",
    "eight_schools(parameterisation=central)": "'noncentered' or 'centered', got 'central'",
    "diabetes(noise=none)": "'known' or 'unknown', got 'none'",
}


@pytest.mark.parametrize("spec", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=BAD_ARGUMENTS[spec]):
        registry.build("problems", spec)
