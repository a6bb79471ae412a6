"""The posterior: what can be asked of a fitted family."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vifamily.diagnostics import (
    Diagnosis,
    Estimate,
    Loo,
    PredictiveCheck,
    Psis,
    RestartMixture,
    Stability,
    fisher_gap,
    importance_mixture_weights,
    loo,
    predictive_check,
    psis,
    stability,
    stacking_weights,
)
from vifamily.diagnostics.inference_data import to_inference_data
from vifamily.errors import ConfigError, NotAvailableError, VifamilyWarning
from vifamily.families._base import Family, FamilyEntry
from vifamily.models._base import Model
from vifamily.numerics.newton import value_and_gradient
from vifamily.posterior._core import check_count
from vifamily.posterior._diagnose import diagnose
from vifamily.posterior._draw_plots import draw_plot
from vifamily.posterior._locals import sample_local
from vifamily.posterior._routing import RoutedPosterior
from vifamily.posterior._saving import load_parts, save_posterior
from vifamily.types import Capability

__all__ = ["Posterior", "load"]


class Posterior(RoutedPosterior):
    """A fitted family over the parameters of a model.

    Draws without a ``seed`` come from the stream ``"posterior"`` of the fit's own seed: asked twice, they are the same.

    Args:
        model: The model, or None when it is not there (loaded without it): what needs a log joint then says so.
        family: The fitted family.
        record: How the fit went.
        layout: Named parameters and their places in ``z``.
        problem: The named problem it came from, or None.
        restarts: The families of all restarts, when there were several.
        objective: The objective it was fitted with.
        config: The configuration of the fit, plain data.

    Example:
        >>> from vifamily.families.mean_field import MeanField
        >>> from vifamily.models.density import Density
        >>> from vifamily.posterior import FitRecord
        >>> from vifamily.types import LatentSpec
        >>> model = Density(lambda z: -0.5 * (z**2).sum(-1), dim=2)
        >>> family = MeanField().build(LatentSpec(2), generator=torch.Generator())
        >>> record = FitRecord("elbo", None, "mean_field", "adam", 0, 100, "converged", True, 0.1, 8)
        >>> posterior = Posterior(model, family, record, layout=model.layout)
        >>> posterior.sample(10)["z"].shape, posterior.diagnose().k_hat  # the family is the posterior: equal weights
        (torch.Size([10, 2]), 0.0)
    """

    def diagnose(self, *, num_draws: int = 4000, seed: int | None = None) -> Diagnosis:
        """Say how the fit went and how far the posterior can be trusted.

        Args:
            num_draws: Draws for k-hat, the ELBO and restart agreement; at least 25.
            seed: Seed of the draws; by default that of the fit.

        Returns:
            The figures and one sentence of advice; prints as a table, ``.to_dict()`` gives plain data.

        Raises:
            ConfigError: If there are fewer than 25 draws.
        """
        return diagnose(self, num_draws, seed)

    # -- importance weights --------------------------------------------------------------------------------------------
    def importance_weights(self, num_draws: int = 4000, *, seed: int | None = None) -> tuple[Tensor, Psis]:
        """Draws with their Pareto-smoothed importance weights, ``z`` and :class:`~vifamily.diagnostics.Psis`."""
        z, log_p, log_q = self.weighted(num_draws, seed=seed)
        return z, psis(log_p - log_q)

    def importance_resample(
        self, num_draws: int = 1000, *, pool: int | None = None, seed: int | None = None
    ) -> dict[str, Tensor]:
        """Draw from the posterior corrected by smoothed importance weights.

        Args:
            num_draws: Number of draws, with replacement.
            pool: Draws of the family to choose from; by default four times as many, 4,000 at least.
            seed: Seed of the draws; by default that of the fit.

        Returns:
            Name to ``(num_draws, *shape)``.

        Raises:
            NotAvailableError: If the family has no density, the model is not there, or no draw has weight.

        Warns:
            VifamilyWarning: If k-hat is above its threshold, so that the correction itself cannot be trusted.
        """
        check_count("num_draws", num_draws)
        z, weights = self.importance_weights(max(4 * num_draws, 4000) if pool is None else pool, seed=seed)
        if not bool(weights.log_weight.isfinite().any()):
            raise NotAvailableError("every draw has weight zero under the model: there is nothing to resample.")
        if not weights.reliable:
            warnings.warn(
                f"k-hat {weights.k_hat:.2f} is above {weights.threshold:.2f}: a few draws carry most of the weight, so "
                "the resampled posterior is no better founded than the fit. Use a richer family.",
                VifamilyWarning,
                stacklevel=2,
            )
        chosen = torch.multinomial(
            weights.log_weight.exp(), num_draws, replacement=True, generator=self._generator(seed, 1)
        )
        return self.constrain(z[chosen.to(z.device)])

    def stack(
        self,
        *,
        method: Literal["importance", "predictive"] = "importance",
        num_draws: int = 2000,
        seed: int | None = None,
    ) -> Posterior:
        """Combine the restarts into one mixture.

        ``"importance"`` weighs restarts so that the mixture is nearest to the posterior in inclusive divergence, by
        multiple-importance weights on draws of all restarts: restarts in separate modes get the masses of the modes.
        ``"predictive"`` weighs them for the best leave-one-out log score (stacking, Yao et al. 2022): better
        predictions where the model is wrong, but not the masses of modes; needs a likelihood per datum.

        Args:
            method: How to weigh.
            num_draws: Draws per restart.
            seed: Seed of the draws; by default that of the fit.

        Returns:
            A posterior whose family is the mixture; its record's notes give the weights.

        Raises:
            NotAvailableError: If there was one restart, a family has no density, or the model lacks what is needed.
            ConfigError: If the method is unknown.
        """
        if len(self.restarts) < 2:
            raise NotAvailableError("stacking combines restarts, and this fit had one: fit with restarts=4.")
        if method not in ("importance", "predictive"):
            raise ConfigError(f"method must be 'importance' or 'predictive', got {method!r}.")
        self.require_model("stacking", *([Capability.PER_DATUM] if method == "predictive" else []))
        parts = [self.weighted(num_draws, seed=seed, restart=r) for r in range(len(self.restarts))]
        if method == "importance":
            with torch.no_grad():
                z = torch.cat([part[0] for part in parts])
                every = torch.stack([family.log_prob(z).double() for family in self.restarts], -1)
            weights = importance_mixture_weights(torch.cat([part[1] for part in parts]), every)
        else:
            scores = [loo(self.log_likelihood_in_chunks(z), log_p - log_q).pointwise for z, log_p, log_q in parts]
            weights = stacking_weights(torch.stack(scores, -1))
        note = f"restarts stacked by {method} weights " + ", ".join(f"{w:.3f}" for w in weights.tolist())
        record = dataclasses.replace(self.record, notes=(*self.record.notes, note))
        out = Posterior(
            self.model,
            RestartMixture(self.restarts, weights),
            record,
            layout=self.layout,
            problem=self.problem,
            restarts=self.restarts,
            objective=self.objective,
            config=self.config,
        )
        out.problem_name = self.problem_name
        return out

    # -- predictions and checks ----------------------------------------------------------------------------------------
    def predict(self, x: Any, *, num_draws: int = 1000, seed: int | None = None, **options: Any) -> Any:
        """Predict at new inputs, where the model has inputs: what its ``predict(z, x, **options)`` gives.

        Args:
            x: New inputs, as the model takes them.
            num_draws: Number of posterior draws ``z`` ``(num_draws, dim)`` handed to the model.
            seed: Seed of the draws; by default that of the fit.
            options: Passed on.

        Raises:
            NotAvailableError: If the model does not predict.
        """
        model = self.require_model("a prediction")
        predict = getattr(model, "predict", None)
        if predict is None:
            raise NotAvailableError(
                f"the model {type(model).__name__} has no inputs to predict at; posterior_predictive() draws new data."
            )
        return predict(self.draws(num_draws, seed=seed), x, **options)

    def sample_local(
        self, num_draws: int = 1000, *, index: Sequence[int] | Tensor | None = None, seed: int | None = None
    ) -> dict[str, Tensor]:
        """Draw the latents of single data, each draw together with the global ones it goes with.

        Args:
            num_draws: Number of draws.
            index: Positions of the data; None means all.
            seed: Root seed; None takes the fit's.

        Returns:
            Global parameters as in :meth:`sample`, and local ones as ``(num_draws, datum, *shape)``.

        Raises:
            NotAvailableError: If the posterior has no local latents.
            ConfigError: If a position is out of range.
        """
        check_count("num_draws", num_draws)
        model = self.require_model("local latents", Capability.LOCAL)
        with torch.no_grad():
            return sample_local(self.family, model, num_draws, index, self._generator(seed, 4))

    def prior_predictive(self, num_draws: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """Draw data from the prior predictive, name to ``(num_draws, ...)``.

        Raises:
            NotAvailableError: If the model cannot draw from its prior or its predictive.
        """
        check_count("num_draws", num_draws)
        model = self.require_model("the prior predictive", Capability.PRIOR_DRAWS, Capability.PREDICTIVE)
        source = self._generator(seed, 2)
        with torch.no_grad():
            return model.predictive(model.sample_prior(num_draws, generator=source), generator=source)

    def posterior_predictive(self, num_draws: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """Draw replicated data, one data set per posterior draw, name to ``(num_draws, ...)``.

        Raises:
            NotAvailableError: If the model cannot draw from its predictive.
        """
        model = self.require_model("the posterior predictive", Capability.PREDICTIVE)
        with torch.no_grad():
            return model.predictive(self.draws(num_draws, seed=seed), generator=self._generator(seed, 3))

    def check(
        self,
        statistic: Callable[[Mapping[str, Tensor]], Tensor],
        *,
        prior: bool = False,
        num_draws: int = 1000,
        seed: int | None = None,
    ) -> PredictiveCheck:
        """Compare a statistic of the observed data with that of replicated data.

        Args:
            statistic: From a data set (name to tensor) to a number, for example ``lambda data: data["y"].max()``.
            prior: Replicate from the prior instead of the posterior.
            num_draws: Number of replicated data sets.
            seed: Seed of the draws; by default that of the fit.

        Returns:
            The statistics and the upper tail probability.

        Raises:
            NotAvailableError: If the model cannot draw new data or does not name its observed data.
        """
        replicate = self.prior_predictive if prior else self.posterior_predictive
        observed = self.require_model("a predictive check", Capability.PREDICTIVE).observed()
        return predictive_check(
            statistic, replicate(num_draws, seed=seed), observed, kind="prior" if prior else "posterior"
        )

    def loo(self, *, num_draws: int = 4000, seed: int | None = None) -> Loo:
        """Leave-one-out cross-validation by importance sampling, corrected for the approximation.

        Args:
            num_draws: Number of draws.
            seed: Seed of the draws; by default that of the fit.

        Returns:
            The expected log predictive density, its error, and a k-hat per datum.

        Raises:
            NotAvailableError: If the family has no density or the model no likelihood per datum.
        """
        self.require_model("leave-one-out", Capability.PER_DATUM)
        z, log_p, log_q = self.weighted(num_draws, seed=seed)
        return loo(self.log_likelihood_in_chunks(z), log_p - log_q)

    def fisher_gap(self, *, num_draws: int = 1000, weight: str = "covariance", seed: int | None = None) -> Estimate:
        """Mean squared difference of the scores of model and family: see :func:`vifamily.diagnostics.fisher_gap`.

        Args:
            num_draws: Number of draws.
            weight: ``"covariance"`` (in units of the draws' own covariance) or ``"identity"``.
            seed: Seed of the draws; by default that of the fit.

        Returns:
            The gap with its standard error.

        Raises:
            NotAvailableError: If the family has no density, or the model no score.
        """
        lacking = Capability.LOG_Q not in self.family.capabilities
        if lacking or Capability.LOG_Q_BOUND in self.family.capabilities:
            raise NotAvailableError(
                f"a Fisher gap needs the score of the family, and {self.record.family} has no density: "
                "posterior.diagnose() runs a kernel Stein test instead."
            )
        z = self.draws(num_draws, seed=seed)
        of_family = torch.cat([value_and_gradient(self.family.log_prob, part)[1] for part in z.split(256)])
        return fisher_gap(z, self.scores_in_chunks(z), of_family, weight=weight)

    def stability(self, alpha: float | None = None, *, point: Tensor | None = None, **options: Any) -> Stability:
        """Ask whether an ensemble at one point would move apart under the alpha-Rényi loss, and in which direction.

        Args:
            alpha: An alpha to judge; None asks for the critical one alone.
            point: Where, ``(dim,)`` on unconstrained space; by default the posterior mean.
            options: As in :func:`vifamily.diagnostics.stability`.

        Raises:
            NotAvailableError: If the model has no likelihood per datum.
        """
        model = self.require_model("stability", Capability.PER_DATUM)
        return stability(model, self.mean(unconstrained=True) if point is None else point, alpha, **options)

    # -- other tools ---------------------------------------------------------------------------------------------------
    def to_arviz(self, *, num_draws: int = 1000, seed: int | None = None) -> Any:
        """Return draws as ArviZ's ``InferenceData``.

        Groups: ``posterior``; ``sample_stats`` with ``log_p``, ``log_q`` and the smoothed ``log_weight`` of each draw,
        where there are densities; ``log_likelihood``, ``posterior_predictive`` and ``observed_data``, where the model
        gives them; ``fit_trace``, the loss over the fit.

        Args:
            num_draws: Number of draws.
            seed: Seed of the draws; by default that of the fit.

        Raises:
            ConfigError: If ``num_draws`` is not a positive integer.
        """
        z = self.draws(num_draws, seed=seed)
        has = frozenset() if self.model is None else frozenset(self.model.capabilities)
        stats: dict[str, Tensor] = {}
        if self.has_log_joint:
            stats["log_p"] = self.log_joint_in_chunks(z)
        if Capability.LOG_Q in self.family.capabilities:
            with torch.no_grad():
                stats["log_q"] = self.log_prob(z).double()
        if len(stats) == 2 and num_draws >= 25:
            stats["log_weight"] = psis(stats["log_p"] - stats["log_q"]).log_weight
        record, _ = self.record.to_plain()
        predictive = Capability.PREDICTIVE in has
        return to_inference_data(
            self.constrain(z),
            sample_stats=stats,
            log_likelihood={"y": self.log_likelihood_in_chunks(z)} if Capability.PER_DATUM in has else None,
            posterior_predictive=self.posterior_predictive(num_draws, seed=seed) if predictive else None,
            observed_data=self._observed() if predictive else None,
            trace=self.record.trace,
            attributes={"inference_library": "vifamily", **{k: v for k, v in record.items() if v is not None}},
        )

    def _observed(self) -> dict[str, Tensor] | None:
        try:
            return None if self.model is None else self.model.observed()
        except NotAvailableError:
            return None

    def plot(
        self,
        kind: Literal["pairs", "marginals", "contour", "trace", "khat"] = "pairs",
        *,
        reference: Any = None,
        num_draws: int = 2000,
        seed: int | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """Draw a picture.

        Args:
            kind: ``"pairs"``, ``"marginals"``, ``"contour"`` (two unconstrained coordinates), ``"trace"`` of the loss,
                or ``"khat"``.
            reference: Reference draws ``(draw, column)`` or a reference with ``draws``; by default that of the named
                problem, where there is one.
            num_draws: Draws shown.
            seed: Seed of the draws; by default that of the fit.
            path: Save the figure there too; the ending gives the format.

        Returns:
            A matplotlib figure.

        Raises:
            ConfigError: If the kind is unknown.
            NotAvailableError: If the posterior lacks what the kind shows.
        """
        return draw_plot(self, kind, reference=reference, num_draws=num_draws, seed=seed, path=path)

    # -- files ---------------------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save to a folder: tensors as safetensors, everything else as JSON (see :func:`load`).

        The model is not saved, only the name of its problem and its point parameters.

        Args:
            path: The folder, created if need be.

        Returns:
            The folder.

        Raises:
            ConfigError: If it cannot be written.
        """
        return save_posterior(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: Model | None = None,
        family: Family | FamilyEntry | str | None = None,
        device: torch.device | str | None = None,
    ) -> Posterior:
        """Load what :meth:`save` wrote; see :func:`load`."""
        parts = load_parts(path, model=model, family=family, device=device)
        name, why = parts.pop("problem_name"), parts.pop("no_model")
        out = cls(**parts)
        out.problem_name = name
        if why is not None:
            out._no_model = why
        for part in (out.family, *out.restarts):
            part.requires_grad_(requires_grad=False)
        return out


def load(
    path: str | os.PathLike[str],
    *,
    model: Model | None = None,
    family: Family | FamilyEntry | str | None = None,
    device: torch.device | str | None = None,
) -> Posterior:
    """Load a saved posterior. Nothing in the files is executed.

    Args:
        path: The folder that :meth:`Posterior.save` wrote.
        model: The model. A named problem is built again by its name; other models must be given for whatever needs
            a log joint, and their point parameters are set to the saved ones. Without it draws, density and summary
            work.
        family: The family, its entry or a spec, for families that are not registered.
        device: Where the family goes; by default the saved device, or the CPU where that is not there.

    Returns:
        The posterior; on the same machine its draws are those of the saved one.

    Raises:
        CheckpointError: If a file is missing, truncated, changed, of another version, or does not fit the model or
            family.

    Example:
        >>> load("nowhere")
        Traceback (most recent call last):
        vifamily.errors.CheckpointError: there is no checkpoint at nowhere/posterior.json: give the folder that was
        saved to.
    """
    return Posterior.load(path, model=model, family=family, device=device)
