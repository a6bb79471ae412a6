"""What can be asked of the training of an ensemble, beside what transformers asks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from vifamily.errors import ConfigError
from vifamily.objectives import RenyiPredictive

__all__ = ["EnsembleOptions", "ROUTES", "UNITS"]

UNITS = ("token", "sequence", "normalised", "group")
ROUTES = ("auto", "stacked", "two_pass", "ranks")


@dataclasses.dataclass(frozen=True)
class EnsembleOptions:
    r"""Settings of an ensemble's objective and of how it is evaluated.

    Args:
        renyi_alpha: Power of the routed likelihood. Near 0 every member must explain everything, at 1 the loss is the
            log score of the mixture. It is not LoRA's ``lora_alpha``.
        renyi_alpha_start: Value at the first step of a ramp to ``renyi_alpha``; with ``renyi_alpha_warmup_steps``.
        renyi_alpha_warmup_steps: Steps of that ramp, by equal factors (from 0 by equal steps).
        routing_entropy: Mean entropy of responsibilities to hold, as a share of ln(num_members), between 0 and 1. Alpha
            is then moved after each step instead of by a ramp, from ``renyi_alpha_start`` (0.01 if that is None) and
            never above ``renyi_alpha``: a number that means the same for long and short answers. An ensemble whose
            members have split the data evenly in two keeps at least the entropy of each half.
        unit: What is routed to members as one. ``"sequence"``: an answer, or a preference. ``"token"``: each token.
            ``"normalised"``: an answer by its mean log likelihood per token, so that long answers are not routed harder
            than short ones; thresholds in alpha move up by its length. ``"group"``: all that shares the value of
            ``group_column``, such as an annotator.
        group_column: The column that groups rows; needed by ``unit="group"``. A batch is then of groups.
        beta: DPO's inverse temperature.
        reference_adapter: For preferences, folder of a PEFT adapter that is the reference policy; None takes the base
            without adapters, or the columns ``ref_chosen_logps`` and ``ref_rejected_logps`` where all records have
            them.
        learn_weights: Whether the members' weights in the mixture are learned too, by steps of expectation
            maximisation: they follow the mean responsibilities.
        weight_rate: Share of the new responsibilities in such a step.
        reseed_below: Put a member beside the one that explains most when its mean responsibility stays below this share
            of an equal one, such as 0.1, for ``reseed_patience`` steps. None leaves it dead.
        reseed_patience: That number of steps.
        reseed_noise: Size of the noise that tells the two apart, relative to the matrices.
        prior_weight: Weight of the normal prior on adapters, per item that the loss averages over.
        prior_sd: Its standard deviation.
        route: ``"stacked"``, all members of a micro-batch at once; ``"two_pass"``, one member at a time, exact too, for
            a forward pass more; ``"ranks"``, members shared out over processes, each of which sees the rows of all;
            ``"auto"`` is stacked unless a group is larger than a micro-batch.
        micro_batch_rows: Rows of a micro-batch that is evaluated under all members at once; by default the batch over
            the number of members, so that memory does not grow with them.
        max_length: Most tokens of a row; longer ones are counted and dealt with by ``overlong``.
        overlong: ``"drop"``, ``"error"`` or ``"trim_prompt"``.
        completion_only_loss: Whether answers alone are scored.

    Raises:
        ConfigError: If a value is out of range, or a group column is missing.

    Example:
        >>> EnsembleOptions(renyi_alpha=0.8, renyi_alpha_start=0.01, renyi_alpha_warmup_steps=100).alpha_at(100)
        0.8
    """

    renyi_alpha: float = 0.8
    renyi_alpha_start: float | None = None
    renyi_alpha_warmup_steps: int = 0
    routing_entropy: float | None = None
    unit: str = "sequence"
    group_column: str | None = None
    beta: float = 0.1
    reference_adapter: str | None = None
    learn_weights: bool = False
    weight_rate: float = 0.05
    reseed_below: float | None = None
    reseed_patience: int = 50
    reseed_noise: float = 0.1
    prior_weight: float = 0.0
    prior_sd: float = 1.0
    route: str = "auto"
    micro_batch_rows: int | None = None
    max_length: int | None = 1024
    overlong: str = "drop"
    completion_only_loss: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        self._objective()
        if self.unit not in UNITS:
            raise ConfigError(f"unit must be one of {', '.join(UNITS)}, got {self.unit!r}.")
        if self.route not in ROUTES:
            raise ConfigError(f"route must be one of {', '.join(ROUTES)}, got {self.route!r}.")
        if (self.unit == "group") != (self.group_column is not None):
            raise ConfigError(
                f"unit='group' and group_column= go together, got unit={self.unit!r}, "
                f"group_column={self.group_column!r}."
            )
        for name, low, high in (
            ("beta", 0.0, math.inf),
            ("prior_sd", 0.0, math.inf),
            ("prior_weight", -1e-300, math.inf),
            ("weight_rate", 0.0, 1.0 + 1e-12),
            ("reseed_noise", 0.0, math.inf),
            ("reseed_below", 0.0, 1.0),
            ("routing_entropy", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if value is None and name in ("reseed_below", "routing_entropy"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
                raise ConfigError(f"{name} must be a number in its range, got {value!r}.")
        for name in ("micro_batch_rows", "reseed_patience"):
            count = getattr(self, name)
            if count is None and name == "micro_batch_rows":
                continue
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ConfigError(f"{name} must be an integer from 1, got {count!r}.")

    def _objective(self) -> RenyiPredictive:
        if self.routing_entropy is not None:
            if self.renyi_alpha_warmup_steps:
                raise ConfigError(
                    "routing_entropy= moves alpha itself: leave renyi_alpha_warmup_steps out (got "
                    f"{self.renyi_alpha_warmup_steps})."
                )
            for name, value in (("renyi_alpha", self.renyi_alpha), ("renyi_alpha_start", self.renyi_alpha_start)):
                if value is not None and not value > 0:
                    raise ConfigError(f"{name} must be positive where routing_entropy= moves alpha, got {value!r}.")
            return RenyiPredictive(alpha=self.renyi_alpha)
        return RenyiPredictive(
            alpha=self.renyi_alpha, start=self.renyi_alpha_start, warmup=self.renyi_alpha_warmup_steps
        )

    def alpha_at(self, step: int) -> float:
        """Return alpha after some optimiser steps; its largest value where an entropy is held."""
        return self._objective().alpha_at(step)

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return dataclasses.asdict(self)
