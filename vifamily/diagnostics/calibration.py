"""Whether a way of fitting is calibrated: fits of data that the model itself made, from parameters that are known."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from vifamily.diagnostics._calibration_results import Calibration, Simulations, SymmetryCheck
from vifamily.errors import ConfigError, ConvergenceWarning, NotAvailableError, VifamilyError
from vifamily.interrupts import Interrupts
from vifamily.models import Model
from vifamily.rng import check_seed, generator, split
from vifamily.types import Capability

__all__ = ["Calibration", "SymmetryCheck", "sbc", "vsbc"]

FEWEST = 20
"""Simulations below which nothing could be told."""

Fit = Callable[..., Any]
Quantities = Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]]


def sbc(
    model: Model,
    fit: Fit,
    *,
    num_simulations: int = 100,
    num_draws: int = 999,
    quantities: Quantities | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Calibration:
    r"""Simulation-based calibration (Talts et al. 2018): is the truth ranked evenly among posterior draws?

    For each simulation :math:`\theta^* \sim p(\theta)` and :math:`y \sim p(y \mid \theta^*)`, the model with data y is
    fitted, and each parameter of :math:`\theta^*` is ranked among M draws of the posterior. Averaged over data from the
    model, exact posteriors give uniform ranks,

    .. math:: \#\{m : \theta_m < \theta^*\} \sim \mathrm{Uniform}\{0, \dots, M\}.

    Ranks that pile up at both ends mean posteriors that are too narrow, in the middle too wide, at one end off to the
    other. Uniformity is judged by the ECDF, in a simultaneous band (Säilynoja, Bürkner and Vehtari 2022), and by a
    chi-square test. Besides the parameters the log joint density is ranked, which sees posteriors that leave data out
    (Modrák et al. 2023): a fit that returned the prior would pass in every parameter.

    It speaks of the fit averaged over data that the model predicts, not of the fit of one data set at hand.

    Args:
        model: A model that can draw from its prior and its predictive and be given other data
            (:meth:`~vifamily.models.Model.with_observed`).
        fit: From a model and ``seed=`` to a posterior, such as ``functools.partial(vf.fit, family="full_rank",
            progress=False)``; anything whose result has ``draws(num_draws)`` on unconstrained space.
        num_simulations: Number of fits, 20 or more.
        num_draws: Draws M of each posterior; 999 makes a thousand ranks.
        quantities: Further quantities to rank, by name: functions of the named parameters ``(draw, *shape)`` that give
            ``(draw,)``, such as contrasts.
        seed: Root seed. Each simulation has seeds of its own, so that more of them leave the first as they are.
        progress: Whether to show a progress line; None shows it on a terminal only.

    Returns:
        Ranks and p-values; prints as a table, and ``plot()`` draws ECDFs in their band.

    Raises:
        NotAvailableError: If the model cannot simulate or be given other data, or no fit came to an end.
        ConfigError: If a number is out of range.

    Ctrl-C ends after the fit in progress, and what was finished is returned.

    Example:
        >>> from vifamily.testing.targets import linear_regression
        >>> class Exact:  # the posterior of this model in closed form, in place of a fit
        ...     def __init__(self, model, seed):
        ...         (x, y), self.seed = model.source.whole(), seed
        ...         mean, sd = model.gaussian_prior()
        ...         self.covariance = torch.linalg.inv(x.mT @ x / 0.64 + torch.diag(sd**-2))
        ...         self.mean = self.covariance @ (x.mT @ y / 0.64 + mean / sd**2)
        ...     def draws(self, n):
        ...         e = torch.randn(n, 2, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        ...         return self.mean + e @ torch.linalg.cholesky(self.covariance).mT
        >>> sbc(linear_regression().model, Exact, num_simulations=50, progress=False).calibrated()
        True
    """
    return Calibration.of(_simulate(model, fit, num_simulations, num_draws, quantities, seed, progress))


def vsbc(
    model: Model,
    fit: Fit,
    *,
    num_simulations: int = 100,
    num_draws: int = 999,
    quantities: Quantities | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> SymmetryCheck:
    r"""Calibration of the centre alone (VSBC, Yao, Vehtari, Simpson and Gelman 2018).

    Variational posteriors are often too narrow and yet useful for point estimates. With
    :math:`p_{ij} = \Pr_q(\theta_i < \theta_i^*)` in the fit of simulated data set j, the law of :math:`p_i` is
    symmetric about one half where the centre of q is unbiased for parameter i, however wide q is. Symmetry is tested by
    the Kolmogorov-Smirnov distance between :math:`p_i` and :math:`1 - p_i`. Dispersion is not seen: use :func:`sbc`.

    :meth:`Calibration.symmetry` gives the same from the fits of :func:`sbc`. The log joint is not among its quantities,
    for nothing makes its law symmetric.

    Args:
        model: As in :func:`sbc`.
        fit: As in :func:`sbc`.
        num_simulations: Number of fits, 20 or more.
        num_draws: Draws of each posterior.
        quantities: As in :func:`sbc`.
        seed: Root seed; that of :func:`sbc` gives the same data and fits.
        progress: Whether to show a progress line; None shows it on a terminal only.

    Returns:
        Probabilities and p-values; prints as a table, and ``plot()`` draws histograms.

    Raises:
        NotAvailableError: If the model cannot simulate or be given other data, or no fit came to an end.
        ConfigError: If a number is out of range.
    """
    return SymmetryCheck.of(_simulate(model, fit, num_simulations, num_draws, quantities, seed, progress))


def _simulate(
    model: Model, fit: Fit, num_simulations: int, num_draws: int, quantities: Quantities | None, seed: int,
    progress: bool | None,  # noqa: FBT001
) -> Simulations:  # fmt: skip
    for name, value, least in (("num_simulations", num_simulations, FEWEST), ("num_draws", num_draws, 9)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be an integer of {least} or more, got {value!r}.")
    if not callable(fit):
        raise ConfigError(f"fit must be a function of a model and seed=, got {type(fit).__name__}.")
    lacking = [c for c in (Capability.PRIOR_DRAWS, Capability.PREDICTIVE) if c not in model.capabilities]
    if lacking:
        raise NotAvailableError(
            f"calibration simulates data, and this model lacks {' and '.join(lacking)}: give it sample_prior= (or a "
            "prior (mean, sd)) and simulate=, or write it as a Pyro program."
        )
    run = _Run(model, fit, num_draws, dict(quantities or {}), check_seed(seed))
    console = Console(file=sys.stderr)
    shown = console.is_terminal if progress is None else progress
    columns = (TextColumn("[bold]calibration[/]"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("fits"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not shown) as line, Interrupts() as interrupts:
        task = line.add_task("calibration", total=num_simulations)
        for index in range(num_simulations):
            if not run.one(index) or interrupts.asked:
                run.interrupted = True
                break
            line.advance(task)
    return run.results(num_simulations)


class _Run:
    """The simulations so far."""

    def __init__(self, model: Model, fit: Fit, num_draws: int, quantities: Quantities, seed: int) -> None:
        self.model, self.fit, self.num_draws, self.quantities, self.seed = model, fit, num_draws, quantities, seed
        # ranked too, where it is there: the one quantity here that knows the data
        self.with_joint = {Capability.LOG_JOINT} <= model.capabilities and Capability.LOCAL not in model.capabilities
        self.below: list[Tensor] = []
        self.equal: list[Tensor] = []
        self.kept: list[int] = []
        self.failed: list[str] = []
        self.unconverged = 0
        self.interrupted = False

    def one(self, index: int) -> bool:
        """Simulate, fit and rank once; False where the fit was interrupted."""
        source = generator(self.seed, "calibration", index)
        with torch.no_grad():
            truth = self.model.sample_prior(1, generator=source)
            data = {name: value[0] for name, value in self.model.predictive(truth, generator=source).items()}
        at = self.model.with_observed(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
                posterior = self.fit(at, seed=split(self.seed, "calibration fit", index))
        except KeyboardInterrupt:
            return False
        except VifamilyError as error:
            self.failed.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            return True
        record = getattr(posterior, "record", None)
        if getattr(record, "stop_reason", None) == "interrupted":
            return False
        with torch.no_grad():
            values = self._values(at, torch.cat([truth, posterior.draws(self.num_draws).to(truth)]))
        if not bool(values.isfinite().all()):
            self.failed.append("draws or quantities that are not finite")
            return True
        self.unconverged += int(not getattr(record, "converged", True))
        self.below.append((values[1:] < values[0]).sum(0))
        self.equal.append((values[1:] == values[0]).sum(0))
        self.kept.append(index)
        return True

    def _values(self, at: Model, z: Tensor) -> Tensor:
        """Quantities at points, ``(draw, quantity)``."""
        theta = at.constrain(z)
        parts = [at.layout.flatten(theta).double()] if at.layout.columns() else []
        for name, function in self.quantities.items():
            value = torch.as_tensor(function(theta))
            if value.shape != z.shape[:1]:
                raise ConfigError(
                    f"the quantity {name!r} must give one number per draw, {tuple(z.shape[:1])}, got shape "
                    f"{tuple(value.shape)}."
                )
            parts.append(value.double()[:, None])
        if self.with_joint:
            parts.append(at.log_joint(z).double()[:, None])
        return torch.cat(parts, -1)

    def results(self, asked: int) -> Simulations:
        """Ranks of what was finished; ties are broken at random, by seed."""
        if not self.below:
            why = f" (the first: {self.failed[0]})" if self.failed else ""
            raise NotAvailableError(f"no fit of {asked} came to an end{why}: there is nothing to rank.")
        below, equal = torch.stack(self.below), torch.stack(self.equal)
        unit = torch.rand(equal.shape, generator=generator(self.seed, "calibration ties"), dtype=torch.float64)
        ranks = below + (unit * (equal + 1)).floor().long()
        names = (*self.model.layout.columns(), *self.quantities, *(["log joint"] if self.with_joint else []))
        return Simulations(
            names=names,
            ranks=ranks,
            probability=(below + 0.5 * equal) / self.num_draws,
            num_draws=self.num_draws,
            asked=asked,
            failures=tuple(self.failed),
            unconverged=self.unconverged,
            interrupted=self.interrupted,
            seed=self.seed,
            with_joint=self.with_joint,
        )
