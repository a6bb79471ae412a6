"""Alpha from step to step: fixed, by a ramp, or moved so that routing keeps a wanted entropy."""

from __future__ import annotations

import math

from vifamily.errors import CheckpointError, ConfigError
from vifamily.llm.options import EnsembleOptions

__all__ = ["AlphaControl"]

_SHARE = 0.2
"""Share of the newest step in the averages: what one batch says of the entropy is noisy."""
_RISE, _FALL = 0.02, 0.1
"""Most that log alpha rises and falls in a step: members that begin to part do so faster than entropy is seen to."""
_LEAST = 1e-6
_START = 0.01


class AlphaControl:
    r"""The alpha of each step.

    With a wanted entropy :math:`h \ln K`, log alpha is moved by :math:`\Delta_t` after step t,

    .. math:: e_t = \rho\, (\bar H_t - h \ln K) + (1 - \rho)\, \big(e_{t-1} - \tfrac12 (\bar S_{t-1} + \bar S_t)\,
              \Delta_{t-1}\big), \qquad \Delta_t = \mathrm{clip}\Big(\frac{e_t}{\tilde S_t},\, -0.1,\, r\Big),
              \qquad S = -\frac{\partial H}{\partial \ln \alpha} = \mathrm{Cov}_w(\alpha a, \ln w) \ge 0

    with the entropy H of a unit's responsibilities and its slope S, averaged over the step's units (the bar) and the
    latter over steps too (the tilde), :math:`\rho = 0.2`. For members that stay as they are H falls in alpha, and e is
    what entropy at the present alpha has too much: an average over steps, each taken along to the next alpha by the
    slope. Alpha goes by Newton's step to where it is nil. A rise is limited to :math:`r = 0.1`, as a fall is, so that
    noise moves alpha up as far as down; where nothing is routed yet (e above half of :math:`(1 - h) \ln K`) to 0.02.
    Where the slope vanishes its limits are what is taken. Alpha stays between 1e-6 and ``renyi_alpha``; e is taken
    along by the move that was made, so what the bounds cut off is not summed up: there is no wind-up.

    Inside the limits e is nil after each move, so :math:`\Delta_t = \rho (\bar H_t - h \ln K) / \tilde S_t`. Then
    the entropy differs from the wanted one by :math:`\epsilon_{t+1} = (1 - \rho) \epsilon_t + v - \rho\, \nu_t`, with
    a drift v per step from members that move and batch noise :math:`\nu`: :math:`v / \rho = 5 v` in the mean, and
    :math:`\sqrt{\rho / (2 - \rho)}`, a third, of the noise's standard deviation.

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
        self._half = (math.log(num_members) - self._target) / 2
        start = options.renyi_alpha_start
        self._value = max(_LEAST, min(options.renyi_alpha, _START if start is None else start))
        self._error: float | None = None  # e; None before the first step
        self._slope = self._last = self._move = 0.0  # averaged, that of the last step, and what it moved log alpha by

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
        error = entropy - self._target
        if self._error is None:
            self._error, self._slope = error, slope
        else:
            # the move by the mean of the slopes at both ends: right to its third power
            carried = self._error - 0.5 * (self._last + slope) * self._move
            self._error = carried + _SHARE * (error - carried)
            self._slope += _SHARE * (slope - self._slope)
        self._last = slope
        value = max(_LEAST, min(self._options.renyi_alpha, self._value * math.exp(self._wish())))
        # what the bounds have left of it
        self._move, self._value = math.log(value / self._value), value

    def _wish(self) -> float:
        """How far log alpha is to go, within its limits."""
        error = self._error or 0.0
        if not 10 * self._slope > abs(error):  # the quotient says no more than its sign
            return _RISE if error > 0 else -_FALL if error < 0 else 0.0
        # a second average, of drift, would leave no error where members move steadily; they do not, and it ran on
        return max(-_FALL, min(_FALL if error < self._half else _RISE, error / self._slope))

    def plain(self) -> list[float] | None:
        """Return what a checkpoint has to hold: alpha, and the averages once there are some."""
        if not self._held:
            return None
        averages = [] if self._error is None else [self._error, self._slope, self._last, self._move]
        return [self._value, *averages]

    def restore(self, value: list[float] | float | None) -> None:
        """Go on from what a checkpoint holds; a number is alpha alone, of a version that averaged nothing.

        Raises:
            CheckpointError: If it was written by a run whose alpha was not held, and this one's is.
            ValueError: If it is of another form.
        """
        if self._held and value is None:
            raise CheckpointError("the checkpoint is of a run whose alpha was not held: leave routing_entropy= out.")
        if not self._held or value is None:
            return
        found = [float(v) for v in (value if isinstance(value, list) else [value])]
        if len(found) not in (1, 5):
            raise ValueError(f"{len(found)} numbers for alpha")
        self._value, self._error = found[0], None
        if len(found) == 5:
            self._error, self._slope, self._last, self._move = found[1:]
