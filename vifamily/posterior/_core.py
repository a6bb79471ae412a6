"""The core of a posterior: draws, densities, moments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vifamily.diagnostics.summary import Summary, summarise
from vifamily.errors import ConfigError, NotAvailableError
from vifamily.families._base import Family
from vifamily.models._base import Model
from vifamily.numerics.newton import value_and_gradient
from vifamily.posterior._linear_response import linear_response_covariance
from vifamily.posterior._record import FitRecord
from vifamily.rng import generator
from vifamily.supports import Layout
from vifamily.types import Capability

__all__ = ["PosteriorCore", "check_count"]

_CHUNK = 256
_MOVED, _MOST_MOVED = 500, 400
"""Draws that are moved to carry an error of the fit over to constrained parameters, and most coordinates of them."""
"""Draws given to the model at once, to bound the memory of likelihoods per datum."""


class PosteriorCore:
    """Draws, densities and moments of a fitted family; :class:`vifamily.posterior.Posterior` adds the rest.

    Args:
        model: The model, or None when it is not there.
        family: The fitted family.
        record: How the fit went.
        layout: Named parameters and their places in ``z``.
        problem: The named problem it came from, or None.
        restarts: The families of all restarts, when there were several.
        objective: The objective it was fitted with.
        config: The configuration of the fit, plain data.
    """

    def __init__(
        self,
        model: Model | None,
        family: Family,
        record: FitRecord,
        *,
        layout: Layout,
        problem: Any = None,
        restarts: Sequence[Family] = (),
        objective: Any = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.family, self.record, self.layout = model, family, record, layout
        self.problem, self.restarts, self.objective = problem, tuple(restarts), objective
        self.config: dict[str, Any] | None = None if config is None else dict(config)
        self.problem_name: str | None = getattr(problem, "name", None)
        self._no_model = "it was loaded without its model: pass it as load(path, model=...)"

    def __repr__(self) -> str:
        record = self.record
        return (
            f"Posterior({record.family}, {record.objective}, {record.stop_reason} after {record.steps} steps: "
            f"{self.layout!r})"
        )

    @property
    def dim(self) -> int:
        """Number of unconstrained coordinates."""
        return self.layout.dim

    @property
    def has_log_joint(self) -> bool:
        """Whether the model is there and gives a log joint of these parameters alone."""
        model = self.model
        return model is not None and Capability.LOG_JOINT in model.capabilities and model.local_layout is None

    # -- draws and densities -------------------------------------------------------------------------------------------
    def _generator(self, seed: int | None, *index: int) -> torch.Generator:
        return generator(self.record.seed if seed is None else seed, "posterior", *index)

    def draws(self, num_draws: int = 1000, *, seed: int | None = None) -> Tensor:
        """Draw on unconstrained space.

        Families whose draws carry weights (ensembles) are resampled by them.

        Args:
            num_draws: Number of draws, at least 1.
            seed: Seed of the draws; by default that of the fit.

        Returns:
            ``(num_draws, dim)``, equally weighted.

        Raises:
            ConfigError: If ``num_draws`` is not a positive integer.
        """
        check_count("num_draws", num_draws)
        return self.family.sample(num_draws, generator=self._generator(seed))

    def sample(self, num_draws: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """Draw named parameters in their supports.

        Args:
            num_draws: Number of draws, at least 1.
            seed: Seed of the draws; by default that of the fit.

        Returns:
            Name to ``(num_draws, *shape)``, in the dtype of the fit; integers for discrete parameters.

        Raises:
            ConfigError: If ``num_draws`` is not a positive integer.
        """
        return self.constrain(self.draws(num_draws, seed=seed))

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Map unconstrained points ``(..., dim)`` to named parameters ``(..., *shape)``; integers for discrete ones."""
        theta = self.layout.constrain(z)
        whole = {site.name for site in self.layout.sites if site.num_categories is not None}
        return {name: value.round().long() if name in whole else value for name, value in theta.items()}

    def columns(self, num_draws: int = 4000, *, seed: int | None = None) -> Tensor:
        """Draws as a table, ``(num_draws, column)``, one constrained number per column of ``layout.columns()``."""
        return self._flat(self.draws(num_draws, seed=seed))

    def _flat(self, z: Tensor) -> Tensor:
        return self.layout.flatten(self.layout.constrain(z))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of the family on unconstrained space, ``(..., dim) -> (...)``.

        Raises:
            NotAvailableError: If the family has no density.
        """
        return self.family.log_prob(z)

    def log_joint(self, z: Tensor) -> Tensor:
        """Log joint of the model on unconstrained space, Jacobian included, ``(..., dim) -> (...)``.

        Raises:
            NotAvailableError: If the model is not there.
        """
        return self.require_model("the log joint").log_joint(z)

    def require_model(self, what: str, *needs: Capability) -> Model:
        """Return the model, or say why something cannot be had.

        Args:
            what: What it is for, as the message says it.
            needs: Capabilities the model must have.

        Raises:
            NotAvailableError: If the model is not there or lacks a capability.
        """
        if self.model is None:
            raise NotAvailableError(f"{what} needs the model of this posterior, and {self._no_model}.")
        if Capability.LOG_JOINT in needs and self.model.local_layout is not None:
            raise NotAvailableError(
                f"{what} needs a log joint of the global parameters alone, and {type(self.model).__name__} has latents "
                "of each datum beside them."
            )
        lacking = [str(need) for need in needs if need not in self.model.capabilities]
        if lacking:
            raise NotAvailableError(
                f"{what} needs a model with {', '.join(lacking)}; {type(self.model).__name__} has none."
            )
        return self.model

    # -- summaries -----------------------------------------------------------------------------------------------------
    def mean(self, *, unconstrained: bool = False, num_draws: int = 4000, seed: int | None = None) -> Tensor:
        """Posterior mean.

        Args:
            unconstrained: Of ``z`` rather than of the constrained parameters.
            num_draws: Draws to take where there is no closed form.
            seed: Seed of the draws; by default that of the fit.

        Returns:
            ``(column,)`` in the order of ``layout.columns()``, or ``(dim,)``.
        """
        return self._moments(num_draws, seed, unconstrained=unconstrained)[0]

    def sd(self, *, unconstrained: bool = False, num_draws: int = 4000, seed: int | None = None) -> Tensor:
        """Posterior standard deviations; arguments and order as in :meth:`mean`."""
        return self._moments(num_draws, seed, unconstrained=unconstrained)[1].diagonal().clamp_min(0).sqrt()

    def covariance(
        self,
        *,
        unconstrained: bool = False,
        linear_response: bool = False,
        num_draws: int = 4000,
        seed: int | None = None,
    ) -> Tensor:
        """Posterior covariance, ``(column, column)``.

        Args:
            unconstrained: Of ``z`` rather than of the constrained parameters.
            linear_response: Whether to take the covariance from how the fitted means answer to a small push rather
                than from the family's spread: exact for a Gaussian posterior whatever the Gaussian family, so it gives
                a mean-field fit the correlations and marginal sds that it lacks. Needs a fit by ``elbo`` at its
                minimum and a twice differentiable model.
            num_draws: Draws to take where there is no closed form.
            seed: Seed of the draws; by default that of the fit.

        Raises:
            NotAvailableError: If linear responses are asked for and something they need is missing.
        """
        if not linear_response:
            return self._moments(num_draws, seed, unconstrained=unconstrained)[1]
        check_count("num_draws", num_draws)
        model = self.require_model("a linear-response covariance")
        return linear_response_covariance(
            model, self.family, self.objective, None if unconstrained else self._flat,
            num_draws=max(num_draws, 2), seed=self.record.seed if seed is None else seed,
        )  # fmt: skip

    @torch.no_grad()
    def _moments(self, num_draws: int, seed: int | None, *, unconstrained: bool) -> tuple[Tensor, Tensor]:
        real = all(site.plain["kind"] == "real" for site in self.layout.sites)
        if unconstrained or real:
            try:
                return self.family.moments()
            except NotAvailableError:
                pass
        z = self.draws(num_draws, seed=seed)
        x = self._unrolled(z if unconstrained else self._flat(z).to(z.dtype))
        centred = x - x.mean(0)
        return x.mean(0), centred.T @ centred / max(x.shape[0] - 1, 1)

    def summary(
        self,
        *,
        num_draws: int = 4000,
        seed: int | None = None,
        probabilities: Sequence[float] = (0.05, 0.5, 0.95),
    ) -> Summary:
        """Mean, standard deviation, quantiles and Monte-Carlo error of each parameter.

        Those of angles are taken within half a turn of their mean direction, so numbers may lie beyond a half turn.

        The Monte-Carlo error of a mean is that of the draws of this table and that of the fit together: a solver that
        minimises on fixed draws says for each coordinate how far the mean may have moved by their chance; of others the
        largest error of the averaged iterates counts for every mean.

        Args:
            num_draws: Number of draws.
            seed: Seed of the draws; by default that of the fit.
            probabilities: Probabilities of the quantiles.

        Returns:
            A table: prints, shows in a notebook, and gives ``.to_dict()``.
        """
        z = self.draws(num_draws, seed=seed)
        table = summarise(self._unrolled(self._flat(z)), self.layout.columns(), probabilities=probabilities)
        return dataclasses.replace(table, mcse=torch.hypot(table.mcse, self._fit_error(z[:_MOVED], table.sd)))

    def _unrolled(self, columns: Tensor) -> Tensor:
        """Angles turned to within half a turn of their mean direction, so that moments and quantiles see no cut."""
        places = self.layout.angles()
        if not places:
            return columns
        angle = columns[:, places]
        centre = torch.atan2(angle.sin().mean(0), angle.cos().mean(0))
        out = columns.clone()
        out[:, places] = centre + torch.remainder(angle - centre + math.pi, 2 * math.pi) - math.pi
        return out

    @torch.no_grad()
    def _fit_error(self, z: Tensor, sd: Tensor) -> Tensor:
        """Monte-Carlo error of the fit in the mean of each column."""
        errors = self.record.mean_errors
        if len(errors) != self.dim or self.dim > _MOST_MOVED:
            return (self.record.mcse_iterates or 0.0) * sd
        # each coordinate moved by its error moves the means of the columns that depend on it
        here, total = self._flat(z), torch.zeros_like(sd)
        for i, error in enumerate(errors):
            moved = z.clone()
            moved[:, i] += error
            total += (self._flat(moved) - here).mean(0).to(sd).square()
        return total.sqrt()

    # -- importance weights --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def weighted(
        self, num_draws: int = 4000, *, seed: int | None = None, restart: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws with both log densities, for importance weights.

        Args:
            num_draws: Number of draws.
            seed: Seed of the draws; by default that of the fit.
            restart: Draw from the family of this restart, with noise of its own, instead of the posterior's.

        Returns:
            ``z`` ``(num_draws, dim)``, ``log p(z, y)`` and ``log q(z)`` ``(num_draws,)``, float64 for the densities.

        Raises:
            NotAvailableError: If the family has no density or the model is not there.
        """
        self.require_model("an importance weight", Capability.LOG_JOINT)
        chosen = self.family if restart is None else self.restarts[restart]
        if Capability.LOG_Q not in chosen.capabilities:
            raise NotAvailableError(
                f"importance weights need a density, and the family {self.record.family} is a sampler only."
            )
        check_count("num_draws", num_draws)
        source = self._generator(seed) if restart is None else self._generator(seed, 4, restart)
        z = chosen.sample(num_draws, generator=source)
        return z, self.log_joint_in_chunks(z), chosen.log_prob(z).double()

    @torch.no_grad()
    def log_joint_in_chunks(self, z: Tensor) -> Tensor:
        """Log joint of many points without a gradient, ``(draw, dim) -> (draw,)``, float64."""
        model = self.require_model("the log joint", Capability.LOG_JOINT)
        return torch.cat([model.log_joint(part) for part in z.split(_CHUNK)]).double()

    @torch.no_grad()
    def log_likelihood_in_chunks(self, z: Tensor) -> Tensor:
        model = self.require_model("a likelihood per datum", Capability.PER_DATUM)
        return torch.cat([model.log_likelihood(part) for part in z.split(_CHUNK)]).double()

    def scores_in_chunks(self, z: Tensor) -> Tensor:
        """Gradient of the log joint at many points, ``(draw, dim)``, float64."""
        model = self.require_model("a score", Capability.LOG_JOINT, Capability.SCORE)
        return torch.cat([value_and_gradient(model.log_joint, part)[1] for part in z.split(_CHUNK)]).double()


def check_count(name: str, value: Any) -> None:
    """Raise ConfigError unless a count is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < math.inf:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
