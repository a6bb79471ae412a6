"""What a posterior says of its members: who explains which datum, and how well they predict together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vifamily.diagnostics.routing import MixtureScore, Responsibilities, mixture_log_score, responsibilities
from vifamily.errors import NotAvailableError
from vifamily.models._data import as_data
from vifamily.models._groups import Groups
from vifamily.posterior._core import PosteriorCore, check_count
from vifamily.rng import draw_noise
from vifamily.types import Batch, Capability

__all__ = ["RoutedPosterior"]


class RoutedPosterior(PosteriorCore):
    """Adds responsibilities and mixture scores to the core of a posterior."""

    @torch.no_grad()
    def members(self, num_draws: int = 1000, *, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Points of the posterior with their log weights, for whatever treats it as a finite mixture.

        Args:
            num_draws: Draws of a continuous family; an ensemble of points gives its members, whatever the number.
            seed: Seed of the draws; by default that of the fit.

        Returns:
            ``z`` ``(member, dim)`` and normalised log weights ``(member,)``.

        Raises:
            ConfigError: If ``num_draws`` is not a positive integer.
        """
        check_count("num_draws", num_draws)
        family = self.family
        noise = draw_noise(
            family.noise_spec,
            (num_draws,),
            self._generator(seed, 5),
            dtype=family.latent.dtype,
            device=family.latent.device,
        )
        draw = family(noise)
        return draw.z, draw.log_weight

    def responsibilities(
        self,
        data: Any = None,
        *,
        groups: Any = None,
        alpha: float | None = None,
        num_draws: int = 1000,
        seed: int | None = None,
    ) -> Responsibilities:
        """Say which member explains which datum, softly: weights in proportion to likelihoods to the power alpha.

        Args:
            data: Data in the model's form; None takes those of the fit.
            groups: Ids of the groups of given data, one per datum: responsibilities are then for groups. Data of the
                fit are grouped as they were in the objective.
            alpha: The power; None takes the objective's.
            num_draws: Draws that stand for a continuous family.
            seed: Seed of the draws; by default that of the fit.

        Returns:
            Responsibilities ``(member, unit)`` with usage, entropies, and a table.

        Raises:
            NotAvailableError: If the model gives no likelihood per datum, or the objective has no alpha of this kind
                and none is given.
        """
        self.require_model("responsibilities", Capability.PER_DATUM)
        order = getattr(self.objective, "predictive_order", None) if alpha is None else alpha
        if order is None:
            raise NotAvailableError(
                f"the objective {self.record.objective} routes no data to members, so there is no power to take "
                "likelihoods to: give alpha=, for example alpha=1."
            )
        z, log_weight = self.members(num_draws, seed=seed)
        likelihood, unit, names = self._unit_likelihood(z, data, groups)
        kind = "member" if Capability.FINITE in self.family.capabilities else "draw"
        return responsibilities(
            likelihood,
            log_weight,
            order,
            unit=unit,
            names=[f"{kind} {i}" for i in range(len(z))],
            unit_names=names,
        )

    def mixture_log_score(
        self, data: Any = None, *, groups: Any = None, num_draws: int = 4000, seed: int | None = None
    ) -> MixtureScore:
        """Score held-out data under the mixture of the members' likelihoods, and under members one by one.

        Args:
            data: Held-out data in the model's form; None takes those of the fit, which flatters.
            groups: Ids of the groups of given data, one per datum: a unit is then a group.
            num_draws: Draws that stand for a continuous family; the logarithm of their mean is biased low by about half
                the relative variance of the likelihood over their number.
            seed: Seed of the draws; by default that of the fit.

        Returns:
            Log scores per unit, higher being better; prints as a table.

        Raises:
            NotAvailableError: If the model gives no likelihood per datum.
        """
        self.require_model("a log score", Capability.PER_DATUM)
        z, log_weight = self.members(num_draws, seed=seed)
        likelihood, _, _ = self._unit_likelihood(z, data, groups)
        kind = "member" if Capability.FINITE in self.family.capabilities else "draw"
        return mixture_log_score(likelihood, log_weight, names=[f"{kind} {i}" for i in range(len(z))])

    @torch.no_grad()
    def _unit_likelihood(self, z: Tensor, data: Any, groups: Any) -> tuple[Tensor, str, list[str] | None]:
        """Log likelihood ``(member, unit)``, what a unit is, and names of the units."""
        model: Any = self.require_model("a likelihood per datum", Capability.PER_DATUM)
        if data is None:
            each = self.log_likelihood_in_chunks(z)
            if groups is None and getattr(self.objective, "unit", "datum") == "group":
                number, count = model.groups_of(None)
                return _summed(each, number, count), "group", [str(name) for name in model.group_names]
        else:
            checked, size = as_data(data, model.dtype, model.device)
            each = torch.cat([model.log_likelihood(part, Batch(checked, size)) for part in z.split(256)])
        if groups is None:
            return each, "datum", None
        found = Groups(groups, each.shape[1], each.device)
        return _summed(each, found.number, found.count), "group", [str(name) for name in found.names]


def _summed(each: Tensor, number: Tensor, count: int) -> Tensor:
    return each.new_zeros(each.shape[0], count).index_add(1, number, each)
