"""Conversion of a network by the name of an entry."""

from __future__ import annotations

import dataclasses

from torch import nn

from vifamily import registry, rng
from vifamily.errors import ConfigError
from vifamily.weights._entry import NetworkWeights, WeightsEntry

__all__ = ["convert"]


def convert(
    module: nn.Module,
    weights: str | WeightsEntry = "dense",
    *,
    include: str | None = None,
    exclude: str | None = None,
    rest: str = "point",
    prior_scale: float = 1.0,
    seed: int = 0,
) -> NetworkWeights:
    """Make a network whose weights come from a latent; the given module is left as it is.

    Args:
        module: Any module that maps ``(datum, ...)`` to ``(datum, ...)``.
        weights: An entry or its spec, ``"lora(rank=4)"``.
        include: Patterns on parameter or layer names, in place of the entry's.
        exclude: Patterns of what stays as it is, in place of the entry's.
        rest: What becomes of other parameters: ``"point"`` or ``"frozen"``.
        prior_scale: Multiplies the prior standard deviations.
        seed: Seed of starting values.

    Returns:
        The converted network; its ``report`` prints as a table.

    Raises:
        ConfigError: If nothing is converted, or an argument has an impossible value.

    Example:
        >>> from torch import nn
        >>> print(convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), exclude="0.*").report)
        layer  kind    parameters  latent
        0      Linear          16       0  not chosen by include= and exclude=
        2      Linear           5       5
        all                    21       5  16 point parameters
        Evaluated in eval mode: dropout off, statistics fixed.
    """
    entry = registry.build("weights", weights) if isinstance(weights, str) else weights
    if not isinstance(entry, WeightsEntry):
        raise ConfigError(f"weights must be the name of an entry or an entry, got {type(entry).__name__}.")
    changes = {k: v for k, v in {"include": include, "exclude": exclude}.items() if v is not None}
    entry = dataclasses.replace(entry, **changes)
    made = entry.build(module, generator=rng.generator(seed, "weights"), rest=rest, prior_scale=prior_scale)
    return made
