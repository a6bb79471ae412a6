"""Each log joint against scipy: densities written again, the Jacobian by differentiating the map itself."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.stats as st
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_linnerud

from vifamily.problems._base import Problem

Values = dict[str, np.ndarray]


def log_jacobian(problem: Problem, z: torch.Tensor) -> float:
    """Log determinant of d theta / d z, column by column, from autograd of `constrain`."""

    def columns(point: torch.Tensor) -> torch.Tensor:
        return problem.model.layout.flatten(problem.model.constrain(point.unsqueeze(0)))[0]

    return float(torch.linalg.slogdet(torch.autograd.functional.jacobian(columns, z))[1])


def scaled(features: np.ndarray) -> np.ndarray:
    return np.hstack([(features - features.mean(0)) / features.std(0), np.ones((len(features), 1))])


def folder_data(name: str, collection: str = "posteriordb") -> dict[str, Any]:
    import json

    from vifamily.problems._folder import find_folder

    path = find_folder(collection, name)
    return (
        json.loads((path / "data.json").read_text())
        if (path / "data.json").exists()
        else dict(np.load(path / "data.npz"))
    )


def eight_schools(t: Values, y: Any, sigma: Any) -> float:
    theta = t["theta"] if "theta" in t else t["mu"] + t["tau"] * t["eta"]
    prior = st.halfcauchy.logpdf(t["tau"], scale=5) + st.norm.logpdf(t["mu"], 0, 5)
    effects = st.norm.logpdf(t["theta"], t["mu"], t["tau"]).sum() if "theta" in t else st.norm.logpdf(t["eta"]).sum()
    return prior + effects + st.norm.logpdf(y, theta, sigma).sum()


def own_eight_schools(t: Values) -> float:
    return eight_schools(t, [28, 8, -3, 7, -1, 1, 18, 12], [15, 10, 16, 11, 9, 11, 10, 18])


def database_eight_schools(t: Values) -> float:
    data = folder_data("eight_schools")
    return eight_schools(t, data["y"], data["sigma"])


def logistic(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    probability = 1 / (1 + np.exp(-x @ w))
    return st.norm.logpdf(w).sum() + st.bernoulli.logpmf(y, probability).sum()


def breast_cancer(t: Values) -> float:
    table = load_breast_cancer()
    return logistic(t["w"], scaled(table.data), table.target)


def german_credit(t: Values) -> float:
    data = folder_data("german_credit_logistic", "inference_gym")
    return logistic(t["w"], data["X"], data["y"])


def diabetes_rows() -> tuple[np.ndarray, np.ndarray]:
    table = load_diabetes()
    return scaled(table.data), (table.target - table.target.mean()) / table.target.std()


def diabetes_known(t: Values) -> float:
    x, y = diabetes_rows()
    return st.norm.logpdf(t["beta"]).sum() + st.norm.logpdf(y, x @ t["beta"], 0.7).sum()


def diabetes_unknown(t: Values) -> float:
    x, y = diabetes_rows()
    sigma = t["sigma"]
    prior = st.invgamma.logpdf(sigma**2, 2, scale=1) + np.log(2 * sigma) + st.norm.logpdf(t["beta"], 0, sigma).sum()
    return prior + st.norm.logpdf(y, x @ t["beta"], sigma).sum()


def student_t(t: Values) -> float:
    from vifamily.problems import student_t_regression as own

    x = scaled(np.array([own.AIR_FLOW, own.WATER_TEMPERATURE, own.ACID_CONCENTRATION], dtype=float).T)
    prior = (
        st.norm.logpdf(t["beta"], 0, 10).sum()
        + st.halfnorm.logpdf(t["sigma"], scale=5)
        + st.gamma.logpdf(t["nu"], 2, scale=10)
    )
    return prior + st.t.logpdf(own.STACK_LOSS, t["nu"], x @ t["beta"] + 17, t["sigma"]).sum()


def poisson(t: Values) -> float:
    table = load_linnerud()
    x = scaled(table.target)
    return st.norm.logpdf(t["beta"], 0, 2).sum() + st.poisson.logpmf(table.data[:, 0], np.exp(x @ t["beta"])).sum()


def ring(t: Values) -> float:
    return -((np.hypot(*t["z"]) - 2) ** 2) / (2 * 0.2**2)


def mixture(means: list[list[float]], sd: float) -> Callable[[Values], float]:
    return lambda t: np.log(np.mean([np.exp(st.norm.logpdf(t["z"], m, sd).sum()) for m in means]))


def funnel(t: Values) -> float:
    return st.norm.logpdf(t["v"], 0, 3) + st.norm.logpdf(t["x"], 0, np.exp(t["v"] / 2)).sum()


def banana(t: Values) -> float:
    first, second = t["z"]
    return st.norm.logpdf(first, 0, 2) + st.norm.logpdf(second, 0.25 * (first**2 - 4), 1)


def kidscore(t: Values) -> float:
    data = folder_data("kidscore_momhsiq")
    mean = t["beta"][0] + t["beta"][1] * np.array(data["mom_hs"]) + t["beta"][2] * np.array(data["mom_iq"])
    return st.halfcauchy.logpdf(t["sigma"], scale=2.5) + st.norm.logpdf(data["kid_score"], mean, t["sigma"]).sum()


def sblrc(t: Values) -> float:
    data = folder_data("sblrc_blr")
    prior = st.norm.logpdf(t["beta"], 0, 10).sum() + st.halfnorm.logpdf(t["sigma"], scale=10)
    return prior + st.norm.logpdf(data["y"], np.array(data["X"]) @ t["beta"], t["sigma"]).sum()


def ark(t: Values) -> float:
    y = folder_data("arK")["y"]
    out = (
        st.norm.logpdf(t["alpha"], 0, 10)
        + st.norm.logpdf(t["beta"], 0, 10).sum()
        + st.halfcauchy.logpdf(t["sigma"], scale=2.5)
    )
    for now in range(5, len(y)):
        out += st.norm.logpdf(y[now], t["alpha"] + sum(t["beta"][k] * y[now - 1 - k] for k in range(5)), t["sigma"])
    return out


def garch(t: Values) -> float:
    data = folder_data("garch11")
    y, variance, out = data["y"], data["sigma1"] ** 2, math.log(1 - t["alpha1"])
    beta1 = (1 - t["alpha1"]) * t["fraction"]
    for now, value in enumerate(y):
        if now:
            variance = t["alpha0"] + t["alpha1"] * (y[now - 1] - t["mu"]) ** 2 + beta1 * variance
        out += st.norm.logpdf(value, t["mu"], math.sqrt(variance))
    return out


def gauss_mix(t: Values) -> float:
    y = np.array(folder_data("low_dim_gauss_mix")["y"])
    prior = st.norm.logpdf(t["mu"], 0, 2).sum() + st.halfnorm.logpdf(t["sigma"], scale=2).sum()
    # the log density of Beta(5, 5) without its constant
    prior += st.beta.logpdf(t["theta"], 5, 5) - st.beta.logpdf(0.5, 5, 5) + 8 * math.log(0.5)
    parts = [st.norm.pdf(y, t["mu"][k], t["sigma"][k]) for k in range(2)]
    return prior + np.log(t["theta"] * parts[0] + (1 - t["theta"]) * parts[1]).sum()


def gaussian_process(t: Values) -> float:
    data = folder_data("gp_pois_regr")
    x = np.array(data["x"], dtype=float)
    kernel = t["alpha"] ** 2 * np.exp(-((x[:, None] - x) ** 2) / (2 * t["rho"] ** 2)) + 1e-10 * np.eye(11)
    f = np.linalg.cholesky(kernel) @ t["z"]
    prior = (
        st.gamma.logpdf(t["rho"], 25, scale=1 / 4)
        + st.halfnorm.logpdf(t["alpha"], scale=2)
        + st.norm.logpdf(t["z"]).sum()
    )
    return prior + st.poisson.logpmf(data["k"], np.exp(f)).sum()


def lotka_volterra(t: Values) -> float:
    data = folder_data("lotka_volterra")
    a, b, c, d = t["theta"]
    path = scipy.integrate.solve_ivp(
        lambda _, s: [(a - b * s[1]) * s[0], (-c + d * s[0]) * s[1]],
        (0, 20),
        t["z_init"],
        t_eval=data["ts"],
        rtol=1e-10,
        atol=1e-10,
    ).y.T
    out = sum(st.norm.logpdf(t["theta"][k], [1, 0.05, 1, 0.05][k], [0.5, 0.05, 0.5, 0.05][k]) for k in range(4))
    out += (
        st.lognorm.logpdf(t["sigma"], 1, scale=math.exp(-1)).sum() + st.lognorm.logpdf(t["z_init"], 1, scale=10).sum()
    )
    for k in range(2):
        out += st.lognorm.logpdf(data["y_init"][k], t["sigma"][k], scale=t["z_init"][k])
        out += st.lognorm.logpdf(np.array(data["y"])[:, k], t["sigma"][k], scale=path[:, k]).sum()
    return out


def brownian(t: Values) -> float:
    observed = folder_data("brownian_unknown_scales", "inference_gym")["observed"]
    innovation, noise, path = t["innovation_noise_scale"], t["observation_noise_scale"], t["locs"]
    out = st.lognorm.logpdf([innovation, noise], 2).sum()
    for now in range(30):
        out += st.norm.logpdf(path[now], path[now - 1] if now else 0, innovation)
        if not np.isnan(observed[now]):
            out += st.norm.logpdf(observed[now], path[now], noise)
    return out


# name: (log joint of constrained parameters, relative tolerance); the differential equation is solved by another rule
CASES: dict[str, tuple[Callable[[Values], float], float]] = {
    "ark": (ark, 1e-10),
    "banana": (banana, 1e-10),
    "bimodal": (mixture([[-3], [3]], 1.0), 1e-10),
    "breast_cancer": (breast_cancer, 1e-10),
    "brownian_unknown_scales": (brownian, 1e-10),
    "correlated_normal": (lambda t: st.multivariate_normal.logpdf(t["z"], [1, 1], [[1, 0.9], [0.9, 1]]), 1e-10),
    "diabetes": (diabetes_known, 1e-10),
    "diabetes(noise=unknown)": (diabetes_unknown, 1e-10),
    "eight_schools": (own_eight_schools, 1e-10),
    "eight_schools(parameterisation=centered)": (own_eight_schools, 1e-10),
    "four_modes": (mixture([[-3, -3], [-3, 3], [3, -3], [3, 3]], 0.7), 1e-10),
    "funnel": (funnel, 1e-10),
    "garch11": (garch, 1e-10),
    "german_credit_logistic": (german_credit, 1e-10),
    "gp_pois_regr": (gaussian_process, 1e-7),
    "kidscore_momhsiq": (kidscore, 1e-10),
    "lotka_volterra": (lotka_volterra, 2e-4),
    "low_dim_gauss_mix": (gauss_mix, 1e-10),
    "poisson_glm": (poisson, 1e-10),
    "posteriordb_eight_schools": (database_eight_schools, 1e-10),
    "posteriordb_eight_schools(parameterisation=centered)": (database_eight_schools, 1e-10),
    "ring": (ring, 1e-10),
    "sblrc_blr": (sblrc, 1e-10),
    "student_t_regression": (student_t, 1e-10),
}


def test_every_problem_has_a_case() -> None:
    from vifamily import registry

    own = {
        name
        for name in registry.names("problems")
        if registry.lookup("problems", name).__module__.startswith("vifamily.")
    }
    assert {registry.parse(spec).name for spec in CASES} == own


@pytest.mark.parametrize("spec", CASES)
def test_log_joint_is_the_one_of_scipy(spec: str, problem_of: Any, typical: Any, generator: torch.Generator) -> None:
    problem = problem_of(spec)
    expected, tolerance = CASES[spec]
    z = typical(problem, generator, 3, spread=0.7)
    for point, got in zip(z, problem.model.log_joint(z), strict=True):
        theta = {name: value[0].numpy() for name, value in problem.model.constrain(point.unsqueeze(0)).items()}
        want = float(expected(theta)) + log_jacobian(problem, point)
        assert float(got) == pytest.approx(want, rel=tolerance, abs=tolerance)


def test_yearly_populations_agree_with_an_adaptive_solver(problem_of: Any, unconstrained: Any) -> None:
    problem = problem_of("lotka_volterra")
    from vifamily.problems.lotka_volterra import log_populations

    draws = problem.reference.draws[::400]
    path = log_populations(torch.from_numpy(draws[:, :4]), torch.from_numpy(draws[:, 4:6]), 20).exp().numpy()
    for row, got in zip(draws, path, strict=True):
        a, b, c, d = row[:4]
        want = scipy.integrate.solve_ivp(
            lambda _, s, a=a, b=b, c=c, d=d: [(a - b * s[1]) * s[0], (-c + d * s[0]) * s[1]],
            (0, 20),
            row[4:6],
            t_eval=np.arange(1, 21),
            rtol=1e-10,
            atol=1e-10,
        ).y.T
        # a hundredth of the noise, which is about 0.25 on the log scale
        np.testing.assert_allclose(got, want, rtol=2.5e-3)


def test_minibatch_log_joint_is_unbiased(problem_of: Any, typical: Any, generator: torch.Generator) -> None:
    problem = problem_of("breast_cancer")
    z = typical(problem, generator, 4)
    source = problem.model.batches(1, seed=0)
    # one epoch of batches of one: their mean is the log joint exactly
    mean = torch.stack([problem.model.log_joint(z, source.at(step)) for step in range(569)]).mean(0)
    torch.testing.assert_close(mean, problem.model.log_joint(z), rtol=1e-10, atol=1e-9)
