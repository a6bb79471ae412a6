"""Calibration checks of an amortised posterior under the names and with the results that users of sbi know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.stats import kstest
from torch import Tensor

from vifamily.diagnostics import c2st, misspecification_mmd, tarp
from vifamily.errors import ConfigError, ShapeError
from vifamily.models._calls import check_count
from vifamily.models._data import as_numbers
from vifamily.posterior.amortised._posterior import AmortisedPosterior
from vifamily.rng import generator

__all__ = ["calc_misspecification_mmd", "check_sbc", "check_tarp", "run_sbc", "run_tarp"]

ReduceFunction = Callable[[Tensor, Tensor], Tensor]
"""From parameters side by side ``(draw, column)`` and one datum to a number for each, ``(draw,)``."""


def run_sbc(
    thetas: Any,
    xs: Any,
    posterior: AmortisedPosterior,
    num_posterior_samples: int = 1000,
    reduce_fns: str | ReduceFunction | Sequence[ReduceFunction] = "marginals",
    *,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""Ranks of simulated parameters among draws of their posteriors, and one draw for each.

    For pairs :math:`(\theta_i, x_i)` of the simulator the rank of :math:`f(\theta_i, x_i)` among
    :math:`f(\theta_{im}, x_i)`, :math:`\theta_{im} \sim q(\cdot \mid x_i)`, is uniform where q is the posterior.
    ``posterior.sbc()`` simulates and judges in one call.

    Args:
        thetas: Parameters side by side, ``(simulation, column)``.
        xs: Their data, ``(simulation, *shape)``.
        posterior: The amortised posterior.
        num_posterior_samples: Draws for each.
        reduce_fns: ``"marginals"``: each column; ``"log_prob"``: the density of q, whose ranks are the expected
            coverage of highest-density regions; or functions of parameters ``(draw, column)`` and one datum.
        seed: Root seed of the draws.

    Returns:
        Ranks from 0 to ``num_posterior_samples``, ``(simulation, quantity)``, and draws of the data-averaged posterior,
        ``(simulation, column)``.

    Raises:
        ShapeError: If shapes disagree.
        DataError: If a number is missing or not finite.
        ConfigError: If ``reduce_fns`` is something else, or ``num_posterior_samples`` is not positive.

    Source: Talts et al. (2018), "Validating Bayesian inference algorithms with simulation-based calibration".

    Example:
        >>> import vifamily as vf
        >>> prior = torch.distributions.Normal(torch.zeros(1), 1.0)
        >>> simulator = vf.models.Simulator(prior, lambda theta: theta + torch.randn_like(theta))
        >>> posterior = vf.fit(simulator, "full_rank", "inclusive_kl(simulations=500)", seed=0, steps=100)
        >>> pairs = simulator.simulations(50, seed=1)
        >>> ranks, averaged = run_sbc(pairs.theta, pairs.x, posterior, 100)
        >>> ranks.shape, averaged.shape
        (torch.Size([50, 1]), torch.Size([50, 1]))
    """
    truth, at, data, z = _drawn(thetas, xs, posterior, num_posterior_samples, seed)
    draws = posterior.layout.flatten(posterior.layout.constrain(z))
    if isinstance(reduce_fns, str) and reduce_fns == "marginals":
        ranks = (draws < truth).sum(0)
    elif isinstance(reduce_fns, str) and reduce_fns == "log_prob":
        ranks = (_density(posterior, z, data) < _density(posterior, at.unsqueeze(0), data)).sum(0).unsqueeze(-1)
    else:
        functions = [reduce_fns] if callable(reduce_fns) else reduce_fns
        if isinstance(functions, str) or not all(callable(f) for f in functions):
            raise ConfigError(f"reduce_fns is 'marginals', 'log_prob' or functions, got {reduce_fns!r}.")
        rows = [
            torch.stack([(f(draws[:, i], data[i]) < f(truth[i : i + 1], data[i])).sum() for f in functions])
            for i in range(len(truth))
        ]
        ranks = torch.stack(rows)
    return ranks, draws[0]


def check_sbc(
    ranks: Tensor, prior_samples: Any, dap_samples: Any, num_posterior_samples: int, *, seed: int = 0
) -> dict[str, Tensor]:
    """Judge what :func:`run_sbc` returns.

    Args:
        ranks: ``(simulation, quantity)``.
        prior_samples: The parameters of the simulations, ``(simulation, column)``.
        dap_samples: Draws of the data-averaged posterior, ``(simulation, column)``.
        num_posterior_samples: Draws that the ranks are among.
        seed: Root seed of uniform ranks and of the classifiers.

    Returns:
        ``ks_pvals``: p-values of a Kolmogorov-Smirnov test of uniform ranks, ``(quantity,)``; ``c2st_ranks``: accuracy
        of a classifier between ranks and uniform ones, ``(quantity,)``; ``c2st_dap``: the same between the columns of
        both samples, ``(column,)``. Half is best of the last two.

    Raises:
        ShapeError: If shapes disagree.
    """
    prior, averaged = as_numbers(prior_samples, "prior samples"), as_numbers(dap_samples, "averaged samples")
    if ranks.dim() != 2 or prior.shape != averaged.shape or len(prior) != len(ranks):
        raise ShapeError(
            "ranks (simulation, quantity) and both samples (simulation, column) belong together, got "
            f"{tuple(ranks.shape)}, {tuple(prior.shape)} and {tuple(averaged.shape)}."
        )
    # ranks are whole numbers; their places between are filled, so that no classifier sees the steps
    unit = torch.rand(ranks.shape, generator=generator(seed, "sbc ties"), dtype=torch.float64)
    places = (ranks.double() + unit) / (num_posterior_samples + 1)
    even = torch.rand(ranks.shape, generator=generator(seed, "sbc even"), dtype=torch.float64)
    pairs = zip(places.T, even.T, strict=True)
    columns = zip(prior.T, averaged.T, strict=True)
    return {
        "ks_pvals": torch.tensor([float(kstest(column.numpy(), "uniform").pvalue) for column in places.T]),
        "c2st_ranks": torch.tensor([c2st(a[:, None], b[:, None], seed=seed).value for a, b in pairs]),
        "c2st_dap": torch.tensor([c2st(a[:, None], b[:, None], seed=seed).value for a, b in columns]),
    }


def run_tarp(
    thetas: Any,
    xs: Any,
    posterior: AmortisedPosterior,
    references: Any = None,
    num_posterior_samples: int = 1000,
    num_bins: int = 30,
    *,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Expected coverage of balls about random points (:func:`~vifamily.diagnostics.tarp`) as a curve.

    Args:
        thetas: Parameters side by side, ``(simulation, column)``.
        xs: Their data, ``(simulation, *shape)``.
        posterior: The amortised posterior.
        references: Points ``(simulation, column)``, of angles the cosines and then the sines; None takes random ones.
        num_posterior_samples: Draws for each.
        num_bins: Intervals of credibility.
        seed: Root seed.

    Returns:
        Coverage and credibility, ``(num_bins + 1,)`` each; equal where q is the posterior.

    Raises:
        ShapeError: If shapes disagree or there are fewer than 20 simulations or 9 draws.
        ConfigError: If ``num_bins`` is no positive integer.
    """
    check_count(num_bins, "num_bins")
    _, at, _, z = _drawn(thetas, xs, posterior, num_posterior_samples, seed)
    draws = posterior._columns(z).transpose(0, 1)
    found = tarp(posterior._columns(at), draws, generator=generator(seed, "tarp"), references=references)
    credibility = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    return found.coverage(credibility), credibility


def check_tarp(ecp: Tensor, alpha: Tensor) -> tuple[float, float]:
    """Judge what :func:`run_tarp` returns.

    Args:
        ecp: Coverage, ``(point,)``.
        alpha: Credibility, ``(point,)``.

    Returns:
        Sum of coverage less credibility over the upper half (zero is best, above: too wide, below: too narrow), and the
        p-value of a two-sample Kolmogorov-Smirnov test between the values of both curves. The latter takes the points
        of a curve for a sample, as sbi does; ``posterior.tarp().p_value`` is that of the ranks.

    Raises:
        ShapeError: If the shapes differ.

    Example:
        >>> line = torch.linspace(0, 1, 5)
        >>> check_tarp(line, line)
        (0.0, 1.0)
    """
    if ecp.shape != alpha.shape or ecp.dim() != 1:
        raise ShapeError(f"both curves have the shape (point,), got {tuple(ecp.shape)} and {tuple(alpha.shape)}.")
    middle = len(alpha) // 2
    return float((ecp - alpha)[middle:].sum()), float(kstest(ecp.numpy(), alpha.numpy()).pvalue)


def calc_misspecification_mmd(
    posterior: AmortisedPosterior,
    x_obs: Any,
    x: Any,
    mode: str = "x_space",
    n_shuffle: int = 1000,
    max_samples: int = 1000,
    *,
    seed: int = 0,
) -> tuple[float, tuple[Tensor, float]]:
    """Whether observed data look like simulated ones (:func:`~vifamily.diagnostics.misspecification_mmd`).

    Args:
        posterior: The amortised posterior.
        x_obs: Observed data ``(datum, *shape)``, or one datum ``shape``.
        x: Simulated data, ``(simulation, *shape)``.
        mode: ``"x_space"`` compares the data, ``"embedding"`` what the encoder makes of them.
        n_shuffle: Number of null values.
        max_samples: Simulated data that are used, at most.
        seed: Root seed.

    Returns:
        The p-value, and null values ``(n_shuffle,)`` with the statistic.

    Raises:
        ConfigError: If ``mode`` is another, or a number is not positive.
        ShapeError: If shapes disagree.
    """
    if mode not in ("x_space", "embedding"):
        raise ConfigError(f"mode is 'x_space' or 'embedding', got {mode!r}.")
    shape = posterior.family.encoder.shape
    seen = as_numbers(x_obs, "observed data")
    data = posterior._data(seen.unsqueeze(0) if tuple(seen.shape) == shape else seen)
    made = posterior._data(x)[:max_samples]
    if mode == "embedding":
        with torch.no_grad():
            data, made = posterior.family.encode(data), posterior.family.encode(made)
    found = misspecification_mmd(
        data.reshape(len(data), -1),
        made.reshape(len(made), -1),
        generator=generator(seed, "misspecification"),
        num_null=n_shuffle,
    )
    return found.p_value, (found.null, found.statistic)


def _drawn(
    thetas: Any, xs: Any, posterior: AmortisedPosterior, num: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parameters, also on unconstrained space, and data, checked, and draws at the data ``(draw, simulation, dim)``."""
    data = posterior._data(xs)
    truth = as_numbers(thetas, "parameters").to(data)
    wanted = (len(data), len(posterior.layout.columns()))
    if tuple(truth.shape) != wanted:
        raise ShapeError(
            f"parameters must have shape {wanted}, a row for each datum with the columns "
            f"{', '.join(posterior.layout.columns())}, got {tuple(truth.shape)}."
        )
    at = posterior.layout.unconstrain(posterior.layout.unflatten(truth)).to(data)
    return truth, at, data, posterior.draws(data, num, seed=seed)


def _density(posterior: AmortisedPosterior, z: Tensor, data: Tensor) -> Tensor:
    """Log density of the parameters themselves, ``(draw, simulation)``."""
    parts = [posterior.log_prob(part, data) for part in z.split(max(1, 100_000 // len(data)))]
    return torch.cat(parts) - posterior.layout.constrain_with_jacobian(z)[1]
