"""Log densities of the suite, up to a constant, in the operations of whichever library runs them.

Each takes one point ``(dim,)``, in the same coordinates as the package's own problem of that name, log Jacobian
included. ``ops`` is a namespace with numpy's names and a few more (see :func:`numpy_ops`).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["DENSITIES", "density", "jax_ops", "numpy_ops", "pytensor_ops"]

Data = Mapping[str, Any]


def numpy_ops() -> Any:
    """Return numpy with the operations that it lacks."""
    ops = types.SimpleNamespace(**{
        name: getattr(np, name)
        for name in ("exp", "log", "log1p", "sqrt", "sum", "logaddexp", "concatenate", "stack", "eye", "maximum")
    })  # fmt: skip
    ops.softplus = lambda x: np.logaddexp(0.0, x)
    ops.cholesky = np.linalg.cholesky
    ops.iterate = _python_loop
    return ops


def jax_ops() -> Any:
    """Return the operations of JAX."""
    import jax
    import jax.numpy as jnp

    ops = types.SimpleNamespace(**{
        name: getattr(jnp, name)
        for name in ("exp", "log", "log1p", "sqrt", "sum", "logaddexp", "concatenate", "stack", "eye", "maximum")
    })  # fmt: skip
    ops.softplus, ops.cholesky = jax.nn.softplus, jnp.linalg.cholesky

    def iterate(step: Callable[[Any], Any], x: Any, times: int) -> Any:
        def body(state: Any, _: Any) -> tuple[Any, Any]:
            new = step(state)
            return new, new

        return jax.lax.scan(body, x, None, length=times)[1]

    ops.iterate = iterate
    return ops


def pytensor_ops() -> Any:
    """Return the operations of PyTensor; it has no ``iterate``, for its scan takes minutes to build."""
    import pytensor.tensor as pt

    names = ("exp", "log", "log1p", "sqrt", "sum", "logaddexp", "concatenate", "stack", "eye", "maximum", "softplus")
    ops = types.SimpleNamespace(**{name: getattr(pt, name) for name in names})
    ops.cholesky = pt.linalg.cholesky
    return ops


def _python_loop(step: Callable[[Any], Any], x: Any, times: int) -> Any:
    out = []
    for _ in range(times):
        x = step(x)
        out.append(x)
    return np.stack(out)


def _normal(ops: Any, x: Any, mean: Any, sd: Any) -> Any:
    return -0.5 * ((x - mean) / sd) ** 2 - ops.log(sd)


def logistic(ops: Any, data: Data) -> Callable[[Any], Any]:
    """Logistic regression, standard normal prior; the labels are folded into the features."""
    signed = (2 * data["y"] - 1)[:, None] * data["X"]
    return lambda z: -0.5 * ops.sum(z * z) - ops.sum(ops.softplus(-(signed @ z)))


def _half_cauchy_log(ops: Any, log_x: Any, scale: float) -> Any:
    """Half-Cauchy law of ``exp(log_x)``, with the Jacobian of the exponential."""
    return log_x - ops.softplus(2 * (log_x - np.log(scale)))


def eight_schools(ops: Any, data: Data, *, centred: bool) -> Callable[[Any], Any]:
    """Eight schools: effects (or their standardised versions), mean, log spread."""
    y, sigma = data["y"], data["sigma"]
    size = len(y)

    def log_density(z: Any) -> Any:
        effect, mu, log_tau = z[:size], z[size], z[size + 1]
        tau = ops.exp(log_tau)
        top = -0.5 * (mu / 5.0) ** 2 + _half_cauchy_log(ops, log_tau, 5.0)
        if centred:
            prior, schools = ops.sum(-0.5 * ((effect - mu) / tau) ** 2 - log_tau), effect
        else:
            prior, schools = -0.5 * ops.sum(effect**2), mu + tau * effect
        return top + prior - 0.5 * ops.sum(((y - schools) / sigma) ** 2)

    return log_density


def _linear(ops: Any, features: Any, response: Any, beta: Any, log_sigma: Any) -> Any:
    residual = (response - features @ beta) / ops.exp(log_sigma)
    return -0.5 * ops.sum(residual * residual) - len(response) * log_sigma


def kidscore(ops: Any, data: Data) -> Callable[[Any], Any]:
    """Unscaled linear regression, flat coefficients, half-Cauchy noise."""
    x, y = data["X"], data["y"]
    return lambda z: _linear(ops, x, y, z[:3], z[3]) + _half_cauchy_log(ops, z[3], 2.5)


def blr(ops: Any, data: Data) -> Callable[[Any], Any]:
    """Linear regression, normal coefficients, half-normal noise."""
    x, y = data["X"], data["y"]
    dim = x.shape[1]

    def log_density(z: Any) -> Any:
        prior = -0.5 * ops.sum((z[:dim] / 10) ** 2) - 0.5 * (ops.exp(z[dim]) / 10) ** 2 + z[dim]
        return prior + _linear(ops, x, y, z[:dim], z[dim])

    return log_density


def ark(ops: Any, data: Data) -> Callable[[Any], Any]:
    """Autoregression of order five; the first column of the features is one."""
    x, y = data["X"], data["y"]

    def log_density(z: Any) -> Any:
        return -0.5 * ops.sum((z[:6] / 10) ** 2) + _half_cauchy_log(ops, z[6], 2.5) + _linear(ops, x, y, z[:6], z[6])

    return log_density


def gauss_mix(ops: Any, data: Data) -> Callable[[Any], Any]:
    """Two-part mixture with ordered means."""
    y = data["y"]

    def log_density(z: Any) -> Any:
        low, high = z[0], z[0] + ops.exp(z[1])
        log_weight, log_rest = -ops.softplus(-z[4]), -ops.softplus(z[4])
        sd = (ops.exp(z[2]), ops.exp(z[3]))
        prior = -0.125 * (low**2 + high**2 + sd[0] ** 2 + sd[1] ** 2) + 5 * (log_weight + log_rest)
        parts = ops.logaddexp(log_weight + _normal(ops, y, low, sd[0]), log_rest + _normal(ops, y, high, sd[1]))
        return prior + z[1] + z[2] + z[3] + ops.sum(parts)

    return log_density


def gp_poisson(ops: Any, data: Data) -> Callable[[Any], Any]:
    """Latent Gaussian process under Poisson counts."""
    x, counts = data["x"], data["k"]
    half_squares, size = 0.5 * (x[:, None] - x) ** 2, len(x)

    def log_density(z: Any) -> Any:
        rho, alpha = ops.exp(z[0]), ops.exp(z[1])
        jitter = ops.maximum(1e-10 / alpha**2, 1e-13)
        f = alpha * (ops.cholesky(ops.exp(-half_squares / rho**2) + jitter * ops.eye(size)) @ z[2:])
        prior = 25 * z[0] - 4 * rho - 0.125 * alpha**2 + z[1] - 0.5 * ops.sum(z[2:] ** 2)
        return prior + ops.sum(counts * f - ops.exp(f))

    return log_density


def brownian(ops: Any, data: Data) -> Callable[[Any], Any]:
    """Brownian path with unknown scales and a gap."""
    seen = np.nonzero(~np.isnan(data["observed"]))[0]
    values, size = data["observed"][seen], len(data["observed"])

    def log_density(z: Any) -> Any:
        path = z[2:]
        steps = ops.sum((path[1:] - path[:-1]) ** 2) + path[0] ** 2
        noise = ops.sum((values - path[seen]) ** 2)
        prior = -0.125 * (z[0] ** 2 + z[1] ** 2)
        innovation = -0.5 * steps * ops.exp(-2 * z[0]) - size * z[0]
        return prior + innovation - 0.5 * noise * ops.exp(-2 * z[1]) - len(seen) * z[1]

    return log_density


def garch(ops: Any, data: Data) -> Callable[[Any], Any]:
    """GARCH(1, 1), the recursion solved by doubling."""
    y, first = data["y"], float(data["sigma1"]) ** 2

    def log_density(z: Any) -> Any:
        alpha0 = ops.exp(z[1])
        log_alpha1, log_rest = -ops.softplus(-z[2]), -ops.softplus(z[2])
        log_fraction, log_unused = -ops.softplus(-z[3]), -ops.softplus(z[3])
        residual = y - z[0]
        drive = alpha0 + ops.exp(log_alpha1) * residual[:-1] ** 2
        h = ops.concatenate([first + 0 * drive[:1], drive])
        power, step = ops.exp(log_rest + log_fraction), 1
        while step < len(y):
            h = ops.concatenate([h[:step], h[step:] + power * h[:-step]])
            power, step = power**2, 2 * step
        jacobian = z[1] + log_alpha1 + log_rest + log_fraction + log_unused
        return log_rest + jacobian - 0.5 * ops.sum(residual**2 / h + ops.log(h))

    return log_density


def lotka_volterra(ops: Any, data: Data) -> Callable[[Any], Any]:
    """Predator and prey by Runge and Kutta on log populations, ten steps a year."""
    log_y = np.log(np.concatenate([data["y_init"][None], data["y"]]))
    years, step = len(data["y"]), 0.1
    centre, spread = np.array([1.0, 0.05, 1.0, 0.05]), np.array([0.5, 0.05, 0.5, 0.05])

    def log_density(z: Any) -> Any:
        theta, log_sigma = ops.exp(z[:4]), z[6:8]
        drift = ops.stack([theta[0], -theta[2]])

        def bounded(x: Any) -> Any:
            return ops.exp(-ops.softplus(40.0 - x) + 40.0)

        def slope(x: Any) -> Any:
            e = bounded(x)
            return drift + ops.stack([-e[1], e[0]])

        def year(x: Any) -> Any:
            k1 = slope(x)
            k2 = slope(x + 0.5 * step * k1)
            k3 = slope(x + 0.5 * step * k2)
            k4 = slope(x + step * k3)
            return x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

        shift = ops.stack([z[3], z[1]])
        path = ops.iterate(year, z[4:6] + shift, 10 * years)[9::10] - shift
        both = ops.concatenate([z[4:6][None], path])
        prior = ops.sum(-0.5 * ((theta - centre) / spread) ** 2) + ops.sum(z[:4])
        prior = prior - 0.5 * ops.sum((log_sigma + 1) ** 2) - 0.5 * ops.sum((z[4:6] - np.log(10.0)) ** 2)
        residual = (log_y - both) / ops.exp(log_sigma)
        return prior - 0.5 * ops.sum(residual**2) - (years + 1) * ops.sum(log_sigma)

    return log_density


DENSITIES: dict[str, Callable[[Any, Data], Callable[[Any], Any]]] = {
    "logistic": logistic,
    "eight_schools_noncentred": lambda ops, data: eight_schools(ops, data, centred=False),
    "eight_schools_centred": lambda ops, data: eight_schools(ops, data, centred=True),
    "kidscore": kidscore,
    "blr": blr,
    "ark": ark,
    "gauss_mix": gauss_mix,
    "gp_poisson": gp_poisson,
    "brownian": brownian,
    "garch": garch,
    "lotka_volterra": lotka_volterra,
}
"""Densities by name."""


def density(name: str, ops: Any, data: Data) -> Callable[[Any], Any]:
    """Return a log density ``(dim,) -> ()``.

    Raises:
        LookupError: If it cannot be written in these operations.
    """
    if name == "lotka_volterra" and not hasattr(ops, "iterate"):
        raise LookupError("not written for this peer")
    return DENSITIES[name](ops, data)
