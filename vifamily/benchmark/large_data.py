"""Logistic regression on up to tens of millions of rows: time, memory and error as the data grow.

The rows are made from a seed in chunks as they are read, in float32, and never held: an epoch is a pass of the
generator. Nothing but a batch and the fit is in memory, whatever the number of rows.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from vifamily.benchmark._report import Benchmark, Options, Report
from vifamily.errors import ConfigError
from vifamily.fit import fit
from vifamily.models import LikelihoodModel
from vifamily.rng import generator

__all__ = ["BENCHMARK", "LogisticRows", "logistic_model", "newton", "run"]

_PRIOR_SD = 2.0


class LogisticRows(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches of a logistic regression, made from a seed when they are read; each epoch gives the same ones.

    Args:
        rows: Rows of an epoch.
        dim: Coefficients, the first of a column of ones.
        seed: Seed of the coefficients and of every batch.
        batch_size: Rows of a batch; the last one may be smaller.

    Attributes:
        rows_read: Rows given out so far, over all epochs.

    Raises:
        ConfigError: If a number is not positive.

    Example:
        >>> x, y = next(iter(LogisticRows(10, 3, seed=0, batch_size=4)))
        >>> x.shape, x.dtype, y.shape
        (torch.Size([4, 3]), torch.float32, torch.Size([4]))
    """

    def __init__(self, rows: int, dim: int, *, seed: int = 0, batch_size: int = 2000) -> None:
        for name, value in (("rows", rows), ("dim", dim), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
        self.rows, self.dim, self.seed, self.batch_size = rows, dim, seed, batch_size
        self.rows_read = 0
        self.coefficients = torch.randn(dim, generator=generator(seed, "coefficients")) / math.sqrt(dim)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Return a batch: inputs ``(row, dim)`` and outcomes of 0 or 1 ``(row,)``."""
        size = min(self.batch_size, self.rows - number * self.batch_size)
        source = generator(self.seed, "rows", number)
        x = torch.randn(size, self.dim, generator=source)
        x[:, 0] = 1.0
        y = (torch.rand(size, generator=source) < torch.sigmoid(x @ self.coefficients)).float()
        return x, y

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch."""
        for number in range(math.ceil(self.rows / self.batch_size)):
            out = self.batch(number)
            self.rows_read += len(out[1])
            yield out


def _log_likelihood(z: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
    x, y = data
    return -torch.nn.functional.softplus((1 - 2 * y) * (z @ x.mT))


def logistic_model(source: LogisticRows) -> LikelihoodModel:
    """Return the regression on a stream of rows, coefficients normal with sd 2 a priori.

    Args:
        source: The rows.

    Returns:
        A model in float32 whose batches are those of the stream.

    Example:
        >>> logistic_model(LogisticRows(1000, 3, batch_size=100)).num_data
        1000
    """
    loader = DataLoader(source, batch_size=None)
    return LikelihoodModel(
        (0.0, _PRIOR_SD), _log_likelihood, data=loader, dim=source.dim, num_data=source.rows, dtype=torch.float32
    )


def newton(source: LogisticRows, *, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mode and covariance at the mode by Newton's method on all rows, one streaming pass per step, in float64.

    Args:
        source: The rows.
        tolerance: Largest last move, in posterior sds.

    Returns:
        Mode ``(dim,)`` and inverse negative Hessian ``(dim, dim)``. The posterior of many rows is this Gaussian up to
        terms of order ``1 / sqrt(rows)`` of an sd.

    Example:
        >>> mode, covariance = newton(LogisticRows(500, 2, batch_size=100))
        >>> mode.shape, bool((torch.linalg.eigvalsh(covariance) > 0).all())
        (torch.Size([2]), True)
    """
    mode = torch.zeros(source.dim, dtype=torch.float64)
    for _ in range(50):
        gradient = -mode / _PRIOR_SD**2
        precision = torch.eye(source.dim, dtype=torch.float64) / _PRIOR_SD**2
        for number in range(math.ceil(source.rows / source.batch_size)):
            x, y = (part.double() for part in source.batch(number))
            p = torch.sigmoid(x @ mode)
            gradient = gradient + x.T @ (y - p)
            precision = precision + (x.T * (p * (1 - p))) @ x
        covariance = torch.linalg.inv(precision)
        move = covariance @ gradient
        mode = mode + move
        if float((move / covariance.diagonal().sqrt()).abs().max()) < tolerance:
            break
    return mode, covariance


def run(
    rows: int | Sequence[int] = (10_000, 100_000, 1_000_000, 10_000_000),
    dim: int = 20,
    *,
    batch_size: int = 5000,
    family: str = "full_rank",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Fit the regression by natural gradients on streamed minibatches, at several numbers of rows.

    Args:
        rows: One or several numbers of rows; at least twice the batch size each.
        dim: Coefficients.
        batch_size: Rows of a step.
        family: ``"full_rank"`` or ``"mean_field"``.
        seed: Root seed of data and fit.

    Returns:
        One row for each: ``rows``, ``dim``, ``batch_size``, ``family``, ``steps``, ``stop_reason``, ``rows_read`` (all
        passes counted), ``seconds`` of the fit, ``seconds_newton`` of the reference, ``peak_memory_mb`` of the process
        so far (so run increasing sizes), ``largest_mean_error`` in posterior sds, and ``largest_log_sd_error``, both
        against Newton's method on the same rows, which for mean field is the wrong answer for the sds.

    Raises:
        ConfigError: If a number is not positive.

    Example:
        >>> [row] = run(4000, 2, batch_size=1000)
        >>> row["rows"], row["stop_reason"], row["largest_mean_error"] < 0.2
        (4000, 'converged', True)
    """
    return [
        _one(count, dim, batch_size=batch_size, family=family, seed=seed)
        for count in ([rows] if isinstance(rows, int) else rows)
    ]


def _one(rows: int, dim: int, *, batch_size: int, family: str, seed: int) -> dict[str, Any]:
    source = LogisticRows(rows, dim, seed=seed, batch_size=batch_size)
    began = time.perf_counter()
    posterior = fit(logistic_model(source), family, solver="natural_gradient", seed=seed, progress=False)
    seconds = time.perf_counter() - began
    memory = _peak_megabytes()
    began = time.perf_counter()
    mode, covariance = newton(source)
    mean, own = (part.double() for part in posterior.family.moments())
    sd = covariance.diagonal().sqrt()
    return {
        "rows": rows, "dim": dim, "batch_size": batch_size, "family": family,
        "steps": posterior.record.steps, "stop_reason": posterior.record.stop_reason,
        "rows_read": source.rows_read, "seconds": seconds, "seconds_newton": time.perf_counter() - began,
        "peak_memory_mb": memory,
        "largest_mean_error": float(((mean - mode) / sd).abs().max()),
        "largest_log_sd_error": float((own.diagonal().sqrt() / sd).log().abs().max()),
    }  # fmt: skip


def _peak_megabytes() -> float:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _run(options: Options) -> Report:
    """What ``vifamily benchmark large_data`` does."""
    sizes = (10_000, 20_000) if options.quick else (10_000, 100_000, 1_000_000, 10_000_000)
    rows = []
    for size in sizes:
        options.say(f"{size:,} rows")
        rows += [row for family in options.families or ("full_rank",) for row in run(size, family=family)]
    columns = {
        "rows": "rows", "family": "family", "steps": "steps", "rows read": "rows_read", "seconds": "seconds",
        "Newton / s": "seconds_newton", "peak memory / MB": "peak_memory_mb",
        "worst mean error / sds": "largest_mean_error", "worst log sd error": "largest_log_sd_error",
        "stop": "stop_reason",
    }  # fmt: skip
    return Report(rows, columns, failed=any(row["stop_reason"] != "converged" for row in rows))


BENCHMARK = Benchmark("Logistic regression on streamed rows, up to ten million: time, memory, error.", _run)
"""The benchmark ``large_data``."""
