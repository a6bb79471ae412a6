"""Parameters whose names match a pattern are Bayesian."""

from __future__ import annotations

import dataclasses

from torch import nn

from vifamily.registry import register
from vifamily.weights._entry import check_patterns, own_parameters
from vifamily.weights.dense import Dense

__all__ = ["Subset"]


@register("weights", "subset")
@dataclasses.dataclass(frozen=True)
class Subset(Dense):
    """Parameters whose full names match a pattern are latent.

    Prior and start are those of ``dense``. The scale and shift of batch normalisation are taken where a pattern other
    than ``"*"`` chooses them.

    Args:
        include: Patterns on parameter or layer names, separated by commas.
        exclude: Patterns of what stays as it is.
        begin: Where a fit begins: ``"net"``, near the values that the network has, or ``"prior"``.
        pattern: Further pattern that a name must match, ``"encoder.*"``.

    Source: Daxberger et al. (2021), "Bayesian deep learning via subnetwork inference".

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> Subset(pattern="*.bias").build(net, generator=torch.Generator()).layout.names
        ('0.bias', '2.bias')
    """

    pattern: str = "*"

    def __post_init__(self) -> None:
        """Check the patterns and the start."""
        super().__post_init__()
        check_patterns("pattern", self.pattern)

    def picks(self, layer: str, parameter: str = "") -> bool:
        """Whether both patterns choose a parameter."""
        return super().picks(layer, parameter) and Dense(include=self.pattern).picks(layer, parameter)

    def named_on_purpose(self, name: str, module: nn.Module) -> bool:
        """Whether a pattern names the layer, rather than everything; batch normalisation needs it."""
        named = {"*"} != {self.include, self.pattern}
        return named and any(self.picks(name, key) for key in own_parameters(module))
