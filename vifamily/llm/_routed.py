"""From log probabilities of tokens to the routed loss of their units, and what is logged of it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.numerics.soft_routing import power_value, route

__all__ = ["Tally", "pair_loss", "pair_margin", "supervised_loss"]


@dataclasses.dataclass
class Tally:
    """Sums over units, for the log.

    Attributes:
        items: What the loss is averaged over: tokens, or pairs.
        units: Number of units.
        usage: Sum of responsibilities, ``(member,)``.
        sums: Other sums, by the name they are logged under; over ``items``, or over units where the name starts with
            ``routing/``.
        slope: Sum over units of the derivative of the entropy of responsibilities in log alpha, with its sign turned.
    """

    items: float = 0.0
    units: float = 0.0
    usage: Tensor | None = None
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    slope: float = 0.0

    def add(self, other: Tally) -> None:
        """Add the sums of another tally."""
        self.items += other.items
        self.units += other.units
        self.slope += other.slope
        if other.usage is not None:
            self.usage = other.usage if self.usage is None else self.usage + other.usage
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Means by name, with the share of each member."""
        if not self.units or self.usage is None:
            return {}
        out = {
            name: value / (self.units if name.startswith("routing/") else self.items)
            for name, value in self.sums.items()
        }
        usage = (self.usage / self.units).tolist()
        out["routing/effective_members"] = 1.0 / max(sum(u * u for u in usage), 1e-12)
        return out | {f"routing/usage_{k}": u for k, u in enumerate(usage)}


def supervised_loss(
    log_prob: Tensor, row: Tensor, group: Tensor, unit: str, alpha: float, log_weight: Tensor
) -> tuple[Tensor, Tally]:
    r"""Sum over units of the routed negative log likelihood, with one member that of the tokens.

    Args:
        log_prob: ``(member, token)``.
        row: Row of each token, ``(token,)``.
        group: Group of each row, ``(row,)`` integers from 0.
        unit: What is routed.
        alpha: The power.
        log_weight: ``(member,)``.

    Returns:
        The sum, and what is logged.
    """
    times = torch.ones((), dtype=log_prob.dtype, device=log_prob.device)
    if unit == "token":
        a = log_prob
    else:
        index = group[row] if unit == "group" else row
        count = int(group.max()) + 1 if unit == "group" else len(group)
        a = _summed(log_prob, index, count)
        if unit == "normalised":
            # alpha works on the mean over tokens; the value is counted as often as there are tokens
            times = _summed(torch.ones_like(log_prob[:1]), index, count).squeeze(0)
            a = a / times
    return _total(a, times, alpha, log_weight, items=float(log_prob.shape[1]))


def pair_margin(row_log_prob: Tensor, reference: Tensor) -> Tensor:
    """Margin of each pair over that of the reference: chosen rows stand before rejected ones.

    Args:
        row_log_prob: ``(member, 2 * pair)``.
        reference: ``(2 * pair,)``.

    Returns:
        ``(member, pair)``.
    """
    chosen, rejected = (row_log_prob - reference).chunk(2, -1)
    return chosen - rejected


def pair_loss(
    log_prob: Tensor,
    row: Tensor,
    group: Tensor,
    reference: Tensor,
    unit: str,
    alpha: float,
    log_weight: Tensor,
    beta: float,
) -> tuple[Tensor, Tally]:
    r"""Sum over units of the routed DPO loss, with one member that of the pairs.

    A member's likelihood of a preference is :math:`\sigma(\beta \Delta)`, with the margin over the reference.

    Args:
        log_prob: ``(member, token)`` of chosen rows, then of rejected ones.
        row: Row of each token.
        group: Group of each pair, ``(pair,)`` integers from 0.
        reference: Log probability of each row under the reference, ``(2 * pair,)``.
        unit: ``"sequence"`` routes pairs, ``"group"`` groups of them.
        alpha: The power.
        log_weight: ``(member,)``.
        beta: Inverse temperature.

    Returns:
        The sum, and what is logged.

    Raises:
        ConfigError: If the unit is one that preferences do not have.
    """
    if unit not in ("sequence", "group"):
        raise ConfigError(f"preferences are routed by 'sequence' (a pair) or 'group', got unit={unit!r}.")
    pairs = len(group)
    margin = pair_margin(_summed(log_prob, row, 2 * pairs), reference.to(log_prob.dtype))
    a = torch.nn.functional.logsigmoid(beta * margin)
    units = _summed(a, group, int(group.max()) + 1) if unit == "group" else a
    total, tally = _total(units, torch.ones((), dtype=a.dtype, device=a.device), alpha, log_weight, items=float(pairs))
    with torch.no_grad():
        weight = log_weight.softmax(-1).to(a).unsqueeze(-1)
        tally.sums["rewards/margins"] = float((weight * beta * margin).sum())
        # a pair is decided by the mixture's probability, each member's by its own margin
        tally.sums["rewards/accuracies"] = float(((weight * a.exp()).sum(0) > 0.5).sum())
        tally.sums["rewards/member_accuracies"] = float((weight * (margin > 0)).sum())
    return total, tally


def _summed(value: Tensor, index: Tensor, count: int) -> Tensor:
    return value.new_zeros(len(value), count).index_add(1, index, value)


def _total(a: Tensor, times: Tensor, alpha: float, log_weight: Tensor, *, items: float) -> tuple[Tensor, Tally]:
    log_weight = log_weight.to(a)
    routed = route(a, log_weight, alpha)
    total: Tensor = (times * routed.value).sum()
    with torch.no_grad():
        share = routed.responsibility
        weight = log_weight.softmax(-1).unsqueeze(-1)
        sums = {
            "routed_fit": float((times * routed.fit).sum()),
            "routing_cost": float((times * routed.cost).sum()),
            "mixture_nll": float(power_value(a * times, log_weight, 1.0).sum()),
            "member_nll": -float((weight * a * times).sum()),
            "routing/entropy": float(torch.special.entr(share).sum()),
        }
        usage = share.sum(-1).double().cpu()
        slope = float(_entropy_slope(a, share, alpha).sum())
    return total, Tally(items, float(a.shape[1]), usage, sums, slope)


def _entropy_slope(a: Tensor, share: Tensor, alpha: float) -> Tensor:
    r"""How fast the entropy of responsibilities falls in log alpha :math:`\mathrm{Cov}_w(\alpha a, \ln w)`, by unit."""
    # centred on the best, so that a covariance is not what is left of two large numbers
    power = torch.where(share > 0, alpha * (a - a.amax(0)), torch.zeros_like(a))
    surprise = torch.special.entr(share)
    out: Tensor = (share * power).sum(0) * surprise.sum(0) - (power * surprise).sum(0)
    return out
