"""Alpha from step to step: fixed, by a ramp, or moved so that routing keeps a wanted entropy."""

from __future__ import annotations

import math

from vifamily.errors import CheckpointError, ConfigError
from vifamily.llm.options import EnsembleOptions

__all__ = ["AlphaControl"]

_GAIN = 0.5
"""Share of a Newton step that is taken: what a batch says of the entropy is noisy."""
_RISE, _FALL = 0.02, 0.1
"""Most that log alpha rises and falls in a step: members that begin to part do so faster than entropy is seen to."""
_LEAST = 1e-6
_START = 0.01


class AlphaControl:
    r"""The alpha of each step.

    With a wanted entropy :math:`h \ln K`, log alpha is moved after each step by

    .. math:: \mathrm{clip}\Big(\gamma\, \frac{\bar H - h \ln K}{\bar S},\, -0.1,\, 0.02\Big), \qquad
              S = -\frac{\partial H}{\partial \ln \alpha} = \mathrm{Cov}_w(\alpha a, \ln w) \ge 0

    with the entropy H of a unit's responsibilities and its slope S, averaged over the step's units. For members that
    stay as they are H falls in alpha, so this is a damped Newton step towards the one alpha with that entropy; where
    nothing is routed yet, or everything is, S vanishes and the limits are what is taken. Alpha stays between 1e-6 and
    ``renyi_alpha``; nothing is summed up beside alpha itself, so there is no wind-up at the bounds.

    Args:
        options: The ensemble's options.
        num_members: K.

    Raises:
        ConfigError: If an entropy is asked for of one member.

    Example:
        >>> control = AlphaControl(EnsembleOptions(routing_entropy=0.5, renyi_alpha_start=0.1), 2)
        >>> control.after_step(entropy=0.6, slope=0.05)  # more shared than wanted: alpha rises
        >>> round(control.at(1), 4)
        0.102
    """

    def __init__(self, options: EnsembleOptions, num_members: int) -> None:
        self._options, self._held = options, options.routing_entropy is not None
        if self._held and num_members < 2:
            raise ConfigError("routing_entropy= needs at least two members: one member has nothing to route.")
        self._target = (options.routing_entropy or 0.0) * math.log(num_members)
        start = options.renyi_alpha_start
        self._value = max(_LEAST, min(options.renyi_alpha, _START if start is None else start))

    @property
    def held(self) -> bool:
        """Whether alpha is moved to hold an entropy."""
        return self._held

    def at(self, step: int) -> float:
        """Return alpha after some optimiser steps; of a held one, that of now."""
        return self._value if self._held else self._options.alpha_at(step)

    def after_step(self, entropy: float, slope: float) -> None:
        """Move a held alpha, after a step with this mean entropy and this mean slope."""
        if not self._held:
            return
        wanted = _GAIN * (entropy - self._target)
        # where the slope vanishes the quotient says no more than its sign
        move = wanted / slope if 10 * slope > abs(wanted) else math.copysign(1.0, wanted)
        move = max(-_FALL, min(_RISE, move))
        self._value = max(_LEAST, min(self._options.renyi_alpha, self._value * math.exp(move)))

    def plain(self) -> float | None:
        """Return what a checkpoint has to hold."""
        return self._value if self._held else None

    def restore(self, value: float | None) -> None:
        """Go on from what a checkpoint holds.

        Raises:
            CheckpointError: If it was written by a run whose alpha was not held, and this one's is.
        """
        if self._held and value is None:
            raise CheckpointError("the checkpoint is of a run whose alpha was not held: leave routing_entropy= out.")
        if self._held and value is not None:
            self._value = float(value)
