r"""Laplace's approximation after training: a Gaussian over the numbers of one trained adapter, its draws as members.

The precision is the diagonal of the Fisher matrix of the data at the adapter plus that of the prior,

.. math:: h_j = \sum_i \mathbb{E}_{y \sim p(\cdot \mid x_i)} \big[ (\partial_j \log p(y \mid x_i))^2 \big], \qquad
          q(\theta) = \mathrm{N}\big(\hat\theta, \operatorname{diag}(h + \lambda)^{-1}\big),

with labels drawn from the adapter's own predictions of each token (of each preference) given what was observed before
it: the generalised Gauss-Newton matrix in expectation. The prior precision :math:`\lambda` of all first and of all
second matrices is where the evidence is largest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vifamily.errors import ConfigError, DataError
from vifamily.llm._answers import positive
from vifamily.llm._decode import log_prob_at
from vifamily.llm._stacked import StackedCausalLM, completion_rows
from vifamily.llm.adapter_files import put, swapped
from vifamily.llm.rows import PairRow, Row, collate_pairs, collate_sft

__all__ = ["AdapterLaplace", "adapter_laplace", "evidence_precision"]


@dataclasses.dataclass(frozen=True)
class AdapterLaplace:
    """A Gaussian over the numbers of one adapter.

    Attributes:
        mean: Two matrices of each layer, ``name -> ((r, in), (out, r))``.
        fisher: Diagonal of the Fisher matrix, of the same shapes.
        prior_precision: Of first and of second matrices.
        effective: Numbers that the data have determined, of each of the two: the sum of ``h / (h + lambda)``.
    """

    mean: dict[str, tuple[Tensor, Tensor]]
    fisher: dict[str, tuple[Tensor, Tensor]]
    prior_precision: tuple[float, float]
    effective: tuple[float, float]

    def __str__(self) -> str:
        """Say how much is known."""
        count = [sum(pair[i].numel() for pair in self.mean.values()) for i in (0, 1)]
        return "; ".join(
            f"{name}: prior precision {p:.4g}, {e:.1f} of {n} numbers determined"
            for name, p, e, n in zip(("lora_A", "lora_B"), self.prior_precision, self.effective, count, strict=True)
        )

    def draw_members(self, model: StackedCausalLM, num_members: int, *, generator: torch.Generator) -> None:
        """Make draws the members of an ensemble, in the place of those that it has, with equal weights.

        Args:
            model: The ensemble over the same base; changed in place.
            num_members: Number of draws.
            generator: Source of the draws.
        """
        pairs = {}
        for name, means in self.mean.items():
            drawn = []
            for mean, fisher, prior in zip(means, self.fisher[name], self.prior_precision, strict=True):
                noise = torch.randn(
                    (positive("num_members", num_members), *mean.shape), generator=generator, dtype=torch.float64
                )
                drawn.append(mean + noise.to(mean.device) / (fisher + prior).sqrt())
            pairs[name] = (drawn[0], drawn[1])
        put(model, pairs)
        model.family = "laplace"  # type: ignore[assignment]


def adapter_laplace(
    model: StackedCausalLM,
    rows: Sequence[Row] | Sequence[PairRow],
    *,
    generator: torch.Generator,
    member: int = 0,
    beta: float = 0.1,
    num_label_draws: int = 1,
    prior_precision: float | None = None,
) -> AdapterLaplace:
    """Fit the Gaussian at one trained member.

    Args:
        model: The ensemble, such as one of a single member.
        rows: The rows that it was trained on: the Fisher matrix is summed over them.
        generator: Source of the labels.
        member: The member that is looked at.
        beta: For preferences, as in training.
        num_label_draws: Labels drawn for each row; of preferences the matrix is exact without.
        prior_precision: Of all numbers; None takes what the evidence is largest at, for each of the two matrices.

    Returns:
        The Gaussian.

    Raises:
        ConfigError: If a number is out of range.
        DataError: If there are no rows.

    Example:
        >>> found = adapter_laplace(model, prepare_sft(records, tokenizer), generator=source)  # doctest: +SKIP
        >>> found.draw_members(model, 8, generator=source)  # doctest: +SKIP
        >>> Ensemble(model, tokenizer).first_token(prompts).epistemic  # doctest: +SKIP
    """
    some: list[Any] = list(rows)
    if not some:
        raise DataError("there are no rows: give those that the adapter was trained on.")
    if isinstance(member, bool) or not isinstance(member, int) or not 0 <= member < model.num_members:
        raise ConfigError(f"member must be from 0 to {model.num_members - 1}, got {member!r}.")
    if prior_precision is not None and not prior_precision > 0:
        raise ConfigError(f"prior_precision must be positive, got {prior_precision!r}.")
    draws = positive("num_label_draws", num_label_draws)
    own = {
        name: (layer.lora_A.detach()[member : member + 1].clone(), layer.lora_B.detach()[member : member + 1].clone())
        for name, layer in model.lora_adapters()
    }
    with swapped(model, own, trained=True) as parameters:
        total = [torch.zeros(p.shape[1:], dtype=torch.float64, device=p.device) for p in parameters]
        for row in some:
            if isinstance(row, PairRow):
                slope, chance = _pair_slope(model, row, parameters, beta)
                _add(total, slope, chance * (1 - chance) * beta**2)
            else:
                for _ in range(draws):
                    _add(total, _answer_slope(model, row, parameters, generator), 1.0 / draws)
    mean = {name: (a[0].double(), b[0].double()) for name, (a, b) in own.items()}
    fisher = {name: (total[2 * i], total[2 * i + 1]) for i, name in enumerate(own)}
    precision, effective = [], []
    for which in (0, 1):
        h, theta = (torch.cat([pair[which].flatten() for pair in part.values()]) for part in (fisher, mean))
        found = evidence_precision(h, theta) if prior_precision is None else float(prior_precision)
        precision.append(found)
        effective.append(float((h / (h + found)).sum()))
    return AdapterLaplace(mean, fisher, (precision[0], precision[1]), (effective[0], effective[1]))


def evidence_precision(fisher: Tensor, mean: Tensor, *, steps: int = 200) -> float:
    r"""Prior precision where the evidence of a diagonal Laplace approximation is largest, by MacKay's fixed point.

    .. math:: \lambda \leftarrow \frac{\sum_j h_j / (h_j + \lambda)}{\sum_j \hat\theta_j^2}

    whose fixed points are where the derivative of
    :math:`\tfrac12 \sum_j [\log \lambda - \log(h_j + \lambda) - \lambda \hat\theta_j^2]` is zero.

    Args:
        fisher: h.
        mean: The estimate.
        steps: Most steps.

    Returns:
        The precision, between 1e-8 and 1e8.

    Example:
        >>> h, mean = torch.tensor([4.0, 4.0]), torch.tensor([1.0, 1.0])
        >>> round(evidence_precision(h, mean), 6)  # the root of x**2 + 4 x - 4
        0.828427
    """
    h, square = fisher.double().flatten(), float(mean.double().square().sum())
    precision = 1.0
    for _ in range(steps):
        before = precision
        precision = min(1e8, max(1e-8, float((h / (h + precision)).sum()) / max(square, 1e-300)))
        if math.isclose(before, precision, rel_tol=1e-12):
            break
    return precision


def _add(total: list[Tensor], slope: Sequence[Tensor], factor: float) -> None:
    for t, s in zip(total, slope, strict=True):
        t.add_(s[0].double().square(), alpha=factor)


def _answer_slope(model: StackedCausalLM, row: Row, parameters: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Slope of the log likelihood of tokens that the member draws, each given what was observed before it."""
    batch = {name: value.to(model.device) for name, value in collate_sft([row], 0).items()}
    log_prob = log_prob_at(model, batch, (0, 1))[0]
    label = torch.multinomial(log_prob.detach().exp().to(generator.device), 1, generator=generator).to(log_prob.device)
    out: tuple[Tensor, ...] = torch.autograd.grad(log_prob.gather(-1, label).sum(), parameters)
    return out


def _pair_slope(model: StackedCausalLM, row: PairRow, parameters: Any, beta: float) -> tuple[tuple[Tensor, ...], float]:
    """Slope of the margin, and the probability of the preference; the Fisher matrix is their product."""
    batch = {name: value.to(model.device) for name, value in collate_pairs([row], 0).items()}
    value = model(**batch, members=(0, 1))[0]
    answer = completion_rows(batch["completion_mask"])
    margin = torch.where(answer == 0, value, -value).sum()
    with torch.no_grad():
        reference = model(**batch, adapters=False)[0]
        gain = margin - torch.where(answer == 0, reference, -reference).sum()
    return torch.autograd.grad(margin, parameters), float(logsigmoid(beta * gain).exp())
