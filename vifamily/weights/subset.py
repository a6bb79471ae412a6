"""Parameters whose names match a pattern are Bayesian."""

from __future__ import annotations

import dataclasses

from torch import nn

from vifamily.registry import register
from vifamily.weights.dense import Dense

__all__ = ["Subset"]


@register("weights", "subset")
@dataclasses.dataclass(frozen=True)
class Subset(Dense):
    """Parameters whose full names match a pattern are latent, also those of batch normalisation.

    Prior and start are those of ``dense``.

    Args:
        include: Patterns on parameter or layer names, separated by commas.
        exclude: Patterns of what stays as it is.
        pattern: Further pattern that a name must match, ``"encoder.*"``.

    Source: Daxberger et al. (2021), "Bayesian deep learning via subnetwork inference".

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> Subset(pattern="*.bias").build(net, generator=torch.Generator()).layout.names
        ('0.bias', '2.bias')
    """

    pattern: str = "*"

    def picks(self, layer: str, parameter: str = "") -> bool:
        """Whether both patterns choose a parameter."""
        return super().picks(layer, parameter) and Dense(include=self.pattern).picks(layer, parameter)

    def skips(self, net: nn.Module, name: str, module: nn.Module) -> str | None:
        """Skip what no pattern chooses; who names batch normalisation gets it."""
        if self.pattern == "*" or any(self.picks(name, k) for k, _ in module.named_parameters(recurse=False)):
            return super().skips(net, name, module) if self.pattern == "*" else None
        return "not chosen by include=, exclude= and pattern="
