"""The last layer alone is Bayesian."""

from __future__ import annotations

import dataclasses

from torch import nn

from vifamily.registry import register
from vifamily.weights.dense import Dense

__all__ = ["LastLayer"]


@register("weights", "last_layer")
@dataclasses.dataclass(frozen=True)
class LastLayer(Dense):
    r"""The weights of the last layer with parameters are latent; all before it is a feature map.

    .. math:: f(x) = W \phi(x) + b, \qquad W, b \text{ latent}

    The last layer is the last by registration in the module. Prior and start are those of ``dense``.

    Args:
        include: Patterns on parameter or layer names, separated by commas.
        exclude: Patterns of what stays as it is.

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
        own = [n for n, m in net.named_modules() if any(True for _ in m.parameters(recurse=False))]
        return super().skips(net, name, module) if name == own[-1] else "not the last layer"
