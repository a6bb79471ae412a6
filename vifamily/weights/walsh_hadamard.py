"""Weights made of Walsh-Hadamard transforms and diagonals."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from vifamily.errors import ConfigError
from vifamily.registry import register
from vifamily.weights._base import LayerWeights, check_positive
from vifamily.weights._entry import WeightsEntry
from vifamily.weights._walsh_blocks import Blocks
from vifamily.weights._walsh_layer import IsotropicWalshLayer, WalshLayer

__all__ = ["WalshHadamard"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "prior": ("latent", "isotropic"),
    "scales": ("point", "latent"),
    "layout": ("auto", "stack", "taps", "reshape"),
    "residual": (False, True),
    "bias": ("point", "gaussian"),
    "gain": ("relu", "linear"),
}


@register("weights", "walsh_hadamard")
@dataclasses.dataclass(frozen=True)
class WalshHadamard(WeightsEntry):
    r"""Linear layers and convolutions whose weights are products of diagonals and Walsh-Hadamard transforms.

    .. math:: W = A H \operatorname{diag}(g) H B, \qquad g \sim \mathrm{N}(0, \lambda^2 I)

    by square blocks of side ``P``, a power of two, with padding and surplus rows dropped. ``g`` is the latent, ``P``
    numbers for ``P^2`` weights; the diagonals ``A`` and ``B`` are points. A linear layer computes ``W x`` without
    ``W``, by two transforms in ``O(P log P)``, and does so at the same price with a latent for each datum.

    The weights are normal on a subspace of ``P`` dimensions: given a row of a block, the others are determined.
    With the prior on ``g``, the diagonals can take up any scale that the prior asks for, so the divergence does not
    see the size of ``W``; ``prior="isotropic"`` puts ``N(0, tau^2 I)`` on the entries of ``W``, restricted to
    those that ``g`` can make, and does see it.

    Args:
        include: Patterns on parameter or layer names, separated by commas.
        exclude: Patterns of what stays as it is.
        prior: ``"latent"``, independent normal on ``g``, or ``"isotropic"``, on ``W`` (closed form in mean field).
        scale: Prior standard deviation, relative to that of weights which keep the size of outputs.
        scales: ``"point"``, or ``"latent"``: the diagonals belong to the latent too, with normal priors. ``W`` is then
            no longer normal.
        layout: ``"stack"`` (rows of blocks as wide as the input), ``"taps"`` (a block for each tap of a convolution),
            ``"reshape"`` (one block, read row by row), or ``"auto"``: what needs fewest numbers, reshaped only where
            a layer is so thin that this needs at most a quarter.
        residual: Whether ``W`` is added to the weight that the layer has, which stays fixed. A fit then begins at
            ``g = 0``.
        bias: ``"point"``, or ``"gaussian"``: latent, with a standard normal prior.
        gain: ``"relu"`` where outputs meet a rectifier, ``"linear"``: variance of the weights times fan-in, 2 or 1.

    Raises:
        ConfigError: If an argument has none of these values or scale is not positive.

    Source: Rossi, Marmin and Filippone (2020), "Walsh-Hadamard variational inference for Bayesian deep learning",
    section 3.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 1))
        >>> made = WalshHadamard().build(net, generator=torch.Generator())
        >>> made.dim, made.report.parameters, made(torch.zeros(5, 128), torch.zeros(4, made.dim)).shape
        (144, 16641, torch.Size([4, 5, 1]))
    """

    prior: str = "latent"
    scale: float = 1.0
    scales: str = "point"
    layout: str = "auto"
    residual: bool = False
    bias: str = "point"
    gain: str = "relu"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for key, allowed in _CHOICES.items():
            if (got := getattr(self, key)) not in allowed:
                raise ConfigError(f"{key} must be one of {', '.join(map(repr, allowed))}, got {got!r}.")
        check_positive("scale", self.scale)

    def layer(self, module: nn.Module, name: str, *, generator: torch.Generator) -> LayerWeights | str:
        """Make the weights of a linear layer or a convolution over two dimensions."""
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or type(module) not in (nn.Linear, nn.Conv2d):
            return "neither a linear layer nor a convolution over two dimensions"
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            return f"a convolution that pads with other than zeros ({module.padding_mode})"
        if not self.picks(name, "weight"):
            return "its weight is not chosen"
        if not (module.weight.requires_grad or self.residual):
            return "its weight does not require gradients"
        kind = IsotropicWalshLayer if self.prior == "isotropic" else WalshLayer
        free = module.bias is not None and module.bias.requires_grad and self.picks(name, "bias")
        return kind(
            module,
            name,
            Blocks.choose(tuple(module.weight.shape), self.layout),
            scale=float(self.scale),
            gain=2.0 if self.gain == "relu" else 1.0,
            residual=self.residual,
            latent_scales=self.scales == "latent",
            latent_bias=self.bias == "gaussian" and free,
            generator=generator,
        )
