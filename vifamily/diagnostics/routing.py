"""Which member of a mixture explains which unit of data, and how well members and mixture predict."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vifamily.diagnostics._tables import render
from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.numerics.soft_routing import route

__all__ = ["MixtureScore", "Responsibilities", "mixture_log_score", "responsibilities"]

_DEAD = 0.1
_SHOWN = 16


def _entropy(p: Tensor, dim: int) -> Tensor:
    out: Tensor = torch.special.entr(p).sum(dim)
    return out


@dataclasses.dataclass(frozen=True)
class Responsibilities:
    """Soft routing of units to members.

    Attributes:
        weight: Responsibility of each member for each unit, ``(member, unit)``; sums to one over members.
        prior_weight: Weight of each member in the mixture, ``(member,)``.
        member_nll: Mean negative log likelihood of each member over all units, ``(member,)``.
        routed_nll: The same over the units that are routed to it, by their responsibilities, ``(member,)``.
        alpha: The power at which units are routed.
        unit: What a unit is, ``"datum"`` or ``"group"``.
        names: A name for each member.
        unit_names: A name for each unit.
    """

    weight: Tensor
    prior_weight: Tensor
    member_nll: Tensor
    routed_nll: Tensor
    alpha: float
    unit: str
    names: tuple[str, ...]
    unit_names: tuple[str, ...]

    @property
    def usage(self) -> Tensor:
        """Share of the units that each member explains, ``(member,)``."""
        return self.weight.mean(1)

    @property
    def dead(self) -> tuple[str, ...]:
        """Names of members whose usage is below a tenth of an equal share."""
        least = _DEAD / len(self.names)
        return tuple(name for name, used in zip(self.names, self.usage.tolist(), strict=True) if used < least)

    @property
    def entropy(self) -> Tensor:
        """Routing entropy of each unit in nats, ``(unit,)``: 0 where one member takes it, log M where all share."""
        return _entropy(self.weight, 0)

    @property
    def routing_entropy(self) -> float:
        """Mean routing entropy over units."""
        return float(self.entropy.mean())

    @property
    def effective_members(self) -> float:
        """Exponential of the entropy of the usage."""
        return math.exp(float(_entropy(self.usage, 0)))

    def route_information(self, labels: Sequence[Any] | Tensor | None = None) -> float:
        """Mutual information, in nats, of the member and the unit, or of the member and a label of the unit.

        It is soft, from responsibilities: the hard choice of the largest one reads chance into members that are all
        but equal. Near zero, members are interchangeable; with labels, up to the entropy of the labels. Large
        information does not mean that members are good: look at their scores beside it.

        Args:
            labels: One label per unit; None takes each unit for itself.

        Returns:
            Nats, from 0.

        Raises:
            ShapeError: If there is not one label per unit.
        """
        if labels is None:
            return max(float(_entropy(self.usage, 0)) - self.routing_entropy, 0.0)
        given = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        if len(given) != self.weight.shape[1]:
            raise ShapeError(f"labels must name each of the {self.weight.shape[1]} units, got {len(given)}.")
        inside = 0.0
        for label in dict.fromkeys(given):
            chosen = torch.tensor([item == label for item in given])
            inside += float(chosen.double().mean()) * float(_entropy(self.weight[:, chosen].mean(1), 0))
        return max(float(_entropy(self.usage, 0)) - inside, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "alpha": self.alpha,
            "unit": self.unit,
            "num_units": int(self.weight.shape[1]),
            "routing_entropy": self.routing_entropy,
            "route_information": self.route_information(),
            "effective_members": self.effective_members,
            "dead": list(self.dead),
            "members": [
                {"name": name, "weight": w, "usage": u, "nll": a, "routed_nll": r}
                for name, w, u, a, r in zip(
                    self.names,
                    self.prior_weight.tolist(),
                    self.usage.tolist(),
                    self.member_nll.tolist(),
                    self.routed_nll.tolist(),
                    strict=True,
                )
            ],
        }

    def __str__(self) -> str:
        """Return members by usage as a table."""
        plain = self.to_dict()
        order = sorted(plain["members"], key=lambda row: -row["usage"])
        rows = [
            (
                row["name"] + (" (dead)" if row["name"] in self.dead else ""),
                f"{row['weight']:.3f}",
                f"{row['usage']:.3f}",
                f"{row['nll']:.4g}",
                f"{row['routed_nll']:.4g}",
            )
            for row in order[:_SHOWN]
        ]
        left = len(order) - len(rows)
        note = (
            f"Routing entropy {self.routing_entropy:.3f} of at most {math.log(len(self.names)):.3f} nats; a unit tells "
            f"{self.route_information():.3f} nats of its member; {self.effective_members:.3g} members in use."
        )
        if left:
            note += f" {left} members of less usage are not shown."
        if self.dead:
            note += f" Dead (usage below {_DEAD / len(self.names):.3g}): {len(self.dead)}."
        title = f"responsibilities for {plain['num_units']} units ({self.unit}) at alpha {self.alpha:g}"
        return render(title, ("member", "weight", "usage", "nll, all units", "nll, routed"), rows, note)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw responsibilities of the members that are most used, with their usage.

        Args:
            path: Save the figure there too; the ending gives the format.

        Returns:
            A matplotlib figure.
        """
        from vifamily import plots  # matplotlib is slow to import and most sessions draw nothing

        order = torch.argsort(self.usage, descending=True)[:_SHOWN]
        figure = plots.responsibilities(
            self.weight[order].numpy(),
            [self.names[i] for i in order.tolist()],
            unit=self.unit,
            unit_names=self.unit_names or None,
        )
        if path is not None:
            figure.savefig(path)
        return figure


def responsibilities(
    log_likelihood: Tensor,
    log_weight: Tensor,
    alpha: float,
    *,
    unit: str = "datum",
    names: Sequence[str] | None = None,
    unit_names: Sequence[str] | None = None,
) -> Responsibilities:
    r"""Route units to members: :math:`w_{mu} \propto \pi_m\, p(y_u \mid \theta_m)^\alpha`.

    Args:
        log_likelihood: ``(member, unit)``.
        log_weight: Log weights of the members, ``(member,)``.
        alpha: The power, finite from 0.
        unit: What a unit is, for the table.
        names: Names of the members; by default numbered from 0.
        unit_names: Names of the units.

    Returns:
        The responsibilities with usage, entropies and information; prints as a table.

    Raises:
        ShapeError: If shapes or names disagree.
        ConfigError: If alpha is not a finite number from 0.
        DataError: If a log likelihood is NaN.

    Example:
        >>> ll = torch.tensor([[0.0, -9.0, -9.0], [-9.0, 0.0, 0.0]])
        >>> found = responsibilities(ll, torch.zeros(2), 1.0)
        >>> [round(u, 2) for u in found.usage.tolist()], round(found.route_information(), 2)
        ([0.33, 0.67], 0.64)
    """
    a, log_prior = _checked(log_likelihood, log_weight)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
        raise ConfigError(f"alpha must be a finite number from 0, got {alpha!r}.")
    weight = route(a, log_prior, float(alpha)).responsibility
    nll = -a
    # a member with no responsibility for a unit says nothing about it, even where that is infinite
    part = torch.where(weight > 0, weight * nll, torch.zeros_like(nll)).sum(1)
    return Responsibilities(
        weight,
        log_prior.exp(),
        nll.mean(1),
        part / weight.sum(1),
        float(alpha),
        unit,
        _named(names, a.shape[0], "member"),
        _named(unit_names, a.shape[1], unit),
    )


@dataclasses.dataclass(frozen=True)
class MixtureScore:
    """Log scores per unit of held-out data: of the mixture, and of its members one by one. Higher is better.

    Attributes:
        mixture: Log density of each unit under the mixture of the members' likelihoods, ``(unit,)``; always at power
            one, whatever alpha trained.
        member: Mean over members of the log density of each unit, ``(unit,)``: the score of a member drawn by weight.
        best_member: Mean score of the best single member.
        best_name: Its name.
    """

    mixture: Tensor
    member: Tensor
    best_member: float
    best_name: str

    @property
    def mixture_mean(self) -> float:
        """Mean mixture log score per unit."""
        return float(self.mixture.mean())

    @property
    def member_mean(self) -> float:
        """Mean member log score per unit; never above the mixture's."""
        return float(self.member.mean())

    @property
    def diversity(self) -> float:
        """How much the mixture gains over a member, in nats per unit, from 0."""
        return self.mixture_mean - self.member_mean

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "mixture": self.mixture_mean,
            "mixture_error": _error(self.mixture),
            "member": self.member_mean,
            "member_error": _error(self.member),
            "best_member": self.best_member,
            "best_name": self.best_name,
            "diversity": self.diversity,
            "num_units": int(self.mixture.shape[0]),
        }

    def __str__(self) -> str:
        """Return the scores as a table."""
        rows = [
            ("mixture", f"{self.mixture_mean:.4f} ± {_error(self.mixture):.4f}"),
            ("member, mean", f"{self.member_mean:.4f} ± {_error(self.member):.4f}"),
            (f"best: {self.best_name}", f"{self.best_member:.4f}"),
            ("gain of the mixture", f"{self.diversity:.4f}"),
        ]
        return render(f"log score per unit, {self.mixture.shape[0]} units", ("of", "nats"), rows)


def mixture_log_score(
    log_likelihood: Tensor, log_weight: Tensor, *, names: Sequence[str] | None = None
) -> MixtureScore:
    r"""Score a mixture and its members: :math:`\log \sum_m \pi_m p(y_u \mid \theta_m)` and :math:`\sum_m \pi_m \log p`.

    Losses at different alpha are not comparable; these are.

    Args:
        log_likelihood: Of held-out units, ``(member, unit)``.
        log_weight: Log weights of the members, ``(member,)``.
        names: Names of the members.

    Returns:
        The scores; prints as a table.

    Raises:
        ShapeError: If shapes or names disagree.
        DataError: If a log likelihood is NaN.

    Example:
        >>> ll = torch.tensor([[0.0, -9.0], [-9.0, 0.0]])
        >>> score = mixture_log_score(ll, torch.zeros(2))
        >>> round(score.mixture_mean, 3), score.member_mean
        (-0.693, -4.5)
    """
    a, log_prior = _checked(log_likelihood, log_weight)
    named = _named(names, a.shape[0], "member")
    each = a.mean(1)
    best = int(each.argmax())
    member = torch.where(log_prior.exp()[:, None] > 0, log_prior.exp()[:, None] * a, torch.zeros_like(a)).sum(0)
    return MixtureScore(torch.logsumexp(log_prior[:, None] + a, 0), member, float(each[best]), named[best])


def _checked(log_likelihood: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    if log_likelihood.dim() != 2 or not log_likelihood.numel() or log_weight.shape != log_likelihood.shape[:1]:
        raise ShapeError(
            "log likelihoods must be (member, unit) with one log weight per member, got the shapes "
            f"{tuple(log_likelihood.shape)} and {tuple(log_weight.shape)}."
        )
    if bool(log_likelihood.isnan().any()):
        raise DataError("a log likelihood is NaN: look at the data, or at what the model does with them.")
    return log_likelihood.detach().cpu().double(), log_weight.detach().cpu().double().log_softmax(0)


def _named(names: Sequence[str] | None, count: int, what: str) -> tuple[str, ...]:
    if names is None:
        return tuple(f"{what} {i}" for i in range(count))
    if len(names) != count:
        raise ShapeError(f"there are {count} names to give, one per {what}; got {len(names)}.")
    return tuple(str(name) for name in names)


def _error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
