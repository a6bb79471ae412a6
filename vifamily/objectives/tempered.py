"""Another objective on a tempered target."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import SpecError
from vifamily.objectives._tempering import Compound
from vifamily.registry import register
from vifamily.types import Batch, FamilyLike, Loss, ModelLike

__all__ = ["Tempered"]


@register("objectives", "tempered")
@dataclasses.dataclass(frozen=True)
class Tempered(Compound):
    r"""Another objective on the posterior at a temperature T, which is another target unless T is 1.

    .. math:: p_T(z) \propto p(x, z)^{1/T} \quad\text{(part="joint")}, \qquad
              p_T(z) \propto p(z)\, p(x \mid z)^{1/T} \quad\text{(part="likelihood")}.

    What is minimised, and with which estimator, is the business of the objective in ``of``, which sees the model with
    its log joint (or its log likelihood) divided by T. With ``of=elbo`` and ``part=likelihood`` the loss is 1/T times
    :math:`T\, \mathrm{KL}(q \| p(z)) - \mathbb{E}_q \log p(x \mid z)`: the beta-ELBO with weight beta = T on the
    divergence from the prior. T below 1 gives the "cold posteriors" of networks, T above 1 wider laws than the
    posterior.

    **Bias.** Unless T is 1 the answer is not the posterior, whatever the family: on a normal posterior with
    ``part=joint`` it is the one with T times the variance. The value is a bound on the log normaliser of the tempered
    law. The bias of the estimator is that of the objective in ``of``.

    **Blind to.** What the objective in ``of`` is blind to.

    **Fails when.** The tempered joint has no finite integral: a large T with ``part=joint`` and heavy tails. Also when
    its answer is read as a posterior; the diagnosis compares it with the posterior itself, and says so.

    Source: Higgins et al. (2017) for the beta-ELBO; Wenzel et al. (2020) for cold posteriors.

    Args:
        of: The objective: a spec string, or an objective.
        temperature: T, positive.
        part: ``"joint"`` or ``"likelihood"``.
        estimator: ``"auto"`` or the name of an estimator of the objective in ``of``.

    Raises:
        SpecError: If the temperature is not a positive number, or there is no such part or estimator.
        ConfigError: If ``of`` is not an objective.
        IncompatibleError: If ``of`` is driven by more than the descent of a loss.

    Example:
        >>> from vifamily import registry
        >>> registry.build("objectives", "tempered(of=renyi(alpha=0.5), temperature=2)").targets_posterior
        False
    """

    of: Any = "elbo"
    temperature: float = 1.0
    part: str = "joint"
    estimator: str = "auto"

    def __post_init__(self) -> None:
        number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        if not number or not 0 < self.temperature < math.inf:
            raise SpecError(f"temperature must be a positive number, got {self.temperature!r}.")
        super().__post_init__()
        if self.temperature != 1:
            object.__setattr__(self, "targets_posterior", False)

    @property
    def warmup_steps(self) -> int:
        """As of the objective it is made of."""
        return self.inner.warmup_steps

    @property
    def notes(self) -> tuple[str, ...]:
        """What the target is."""
        if self.temperature == 1:
            return super().notes
        return (
            *super().notes,
            f"the target is not the posterior: its {self.part} is at temperature {self.temperature:g}",
        )

    def init_state(self, model: ModelLike, family: FamilyLike, *, generator: torch.Generator) -> Any:
        """As of the objective it is made of."""
        return self.inner.init_state(model, family, generator=generator)

    def after_warmup(self, state: Any) -> Any:
        """As of the objective it is made of."""
        return self.inner.after_warmup(state)

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the loss on the tempered target (see :class:`Objective`)."""
        return self._tempered_loss(family, model, noise, batch, state, 1 / self.temperature)
