"""The last layer alone is Bayesian."""

from __future__ import annotations

import dataclasses

from torch import nn

from vifamily.registry import register
from vifamily.weights._entry import own_parameters
from vifamily.weights.dense import NORMALISATIONS, Dense

__all__ = ["LastLayer"]


@register("weights", "last_layer")
@dataclasses.dataclass(frozen=True)
class LastLayer(Dense):
    r"""The weights of the last layer with parameters are latent; all before it is a feature map.

    .. math:: f(x) = W \phi(x) + b, \qquad W, b \text{ latent}

    The last layer is the last by registration in the module that ``include`` and ``exclude`` choose, normalisation
    layers left aside. Prior and start are those of ``dense``.

    Args:
        include: Patterns on parameter or layer names, separated by commas.
        exclude: Patterns of what stays as it is.
        begin: Where a fit begins: ``"net"``, near the values that the network has, or ``"prior"``.

    Source: Snoek et al. (2015), "Scalable Bayesian optimization using deep neural networks", section 3.1.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> LastLayer().build(net, generator=torch.Generator()).report.converted
        {'2': 5}
    """

    def skips(self, net: nn.Module, name: str, module: nn.Module) -> str | None:
        """Skip all but the last layer."""
        # latent layers lose their parameters only once all have been asked
        chosen = [
            n
            for n, m in net.named_modules()
            if own_parameters(m)
            and not isinstance(m, NORMALISATIONS)
            and super(LastLayer, self).skips(net, n, m) is None
        ]
        if chosen and name == chosen[-1]:
            return None
        return super().skips(net, name, module) or "not the last layer"
