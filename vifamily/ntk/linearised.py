"""A network linearised in its parameters: what it would be if training were lazy."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from vifamily.ntk._network import outputs_of, pushed, trainable

__all__ = ["LinearisedNetwork"]


class LinearisedNetwork(nn.Module):
    r"""First-order expansion of a network in its parameters, trained like any module.

    .. math:: f_{\mathrm{lin}}(x; \phi) = f(x; \phi_0) + J(x; \phi_0) (\phi - \phi_0)

    Its parameters are the displacement ``phi - phi_0``, zero at first. Its tangent kernel is that of the network where
    it was linearised, and stays so: a loss that is convex in the output is convex in these parameters. One forward
    pass costs about two of the network; the Jacobian is never formed. The network is copied, not changed.

    Args:
        model: The network; takes ``(inputs, ...)`` and gives ``(inputs, outputs)``.

    Raises:
        ConfigError: If nothing is trainable, or a layer is random or mixes inputs (in training mode).

    Source: Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein and Pennington (2019), "Wide neural networks of any
    depth evolve as linear models under gradient descent".

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> x = torch.ones(3, 2)
        >>> torch.equal(LinearisedNetwork(net)(x), net(x))
        True
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        start = trainable(model)
        self.names = tuple(start)
        self.start = copy.deepcopy(model).requires_grad_(requires_grad=False)
        self.displacement = nn.ParameterList([nn.Parameter(value.new_zeros(value.shape)) for value in start.values()])

    def train(self, mode: bool = True) -> LinearisedNetwork:  # noqa: FBT001, FBT002 - torch's own signature
        """Set the mode of the wrapper; the network inside stays in the mode in which it was linearised."""
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(inputs, outputs)``."""
        held = dict(self.start.named_parameters())
        start: dict[str, Tensor] = {name: held[name] for name in self.names}
        tangent: dict[str, Tensor] = dict(zip(self.names, self.displacement, strict=True))
        value, change = pushed(lambda p: outputs_of(self.start, p, x), start, tangent)
        return value + change
