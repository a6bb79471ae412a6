"""Every weight is a latent."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from vifamily.errors import ConfigError
from vifamily.registry import register
from vifamily.weights._base import LayerWeights
from vifamily.weights._entry import WeightsEntry

__all__ = ["NORMALISATIONS", "Dense", "DenseLayer"]

NORMALISATIONS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
"""Layers whose weight multiplies something already of unit size."""
_APART = 0.1
"""Starts are this share of their standard deviation apart: members that begin at one point stay together."""
_CONVOLUTIONS: dict[Any, Any] = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d}


class DenseLayer(LayerWeights):
    """A layer whose chosen parameters are the latent itself, one after the other.

    Args:
        module: The layer.
        name: Its full name.
        keys: Own names of the parameters that are latent; the others stay with the layer.
        spread: Start standard deviation relative to that of the prior of the weights.
        begin: Where a fit begins, ``"net"`` (the layer's own values) or ``"prior"`` (a draw of the prior).
    """

    example_noise = True
    module: Any
    prior_mean: Tensor
    prior_sd: Tensor
    start: Tensor
    start_sd: Tensor

    def __init__(
        self, module: nn.Module, name: str, keys: tuple[str, ...], *, spread: float = 0.1, begin: str = "net"
    ) -> None:
        super().__init__()
        self.module, self.keys, self.begin = module, keys, begin
        values = {key: module.get_parameter(key).detach() for key in keys}
        self.names = tuple(f"{name}.{key}" if name else key for key in keys)
        self.shapes = tuple(tuple(v.shape) for v in values.values())
        self.site_shapes = dict(zip(self.names, self.shapes, strict=True))
        self.dim = sum(v.numel() for v in values.values())
        prior = [_prior(module, key, value) for key, value in values.items()]
        self.register_buffer("prior_mean", torch.cat([torch.full_like(v, m).flatten() for v, m, _ in prior]))
        self.register_buffer("prior_sd", torch.cat([torch.full_like(v, s).flatten() for v, _, s in prior]))
        self.register_buffer("start", torch.cat([v.flatten() for v in values.values()]))
        scale = spread * min(s for _, _, s in prior)
        self.register_buffer("start_sd", torch.full_like(self.prior_sd, scale))

    def _own(self, z: Tensor) -> dict[str, Tensor]:
        parts = z.split([math.prod(shape) for shape in self.shapes], -1)
        rows = zip(self.keys, parts, self.shapes, strict=True)
        return {key: part.reshape(*z.shape[:-1], *shape) for key, part, shape in rows}

    def materialise(self, z: Tensor) -> dict[str, Tensor]:
        """Cut the latent into the parameters, ``(..., dim) -> full name -> (..., *shape)``."""
        return dict(zip(self.names, self._own(z).values(), strict=True))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Compute the output for every draw; see :meth:`LayerWeights.forward`."""
        own = self._own(z)
        if type(self.module) is nn.Linear:
            return self._linear(x, z, own)
        if type(self.module) in _CONVOLUTIONS and self.module.padding_mode == "zeros":
            return self._convolution(x, z, own)
        call = torch.vmap(
            lambda v, row: functional_call(self.module, v, (row,)), in_dims=(0, 0 if len(x) > 1 else None)
        )
        given = x if len(x) > 1 else x[0]
        if z.dim() == 2:
            out: Tensor = call(own, given)
            return out
        one = torch.vmap(lambda v, row: functional_call(self.module, v, (row.unsqueeze(0),)).squeeze(0))
        each: Tensor = torch.vmap(one)(own, x.expand(z.shape[0], *x.shape[1:]))
        return each

    def _weight(self, own: dict[str, Tensor], lead: torch.Size) -> Tensor:
        """The weight for every draw, whether latent or not."""
        if "weight" in own:
            return own["weight"]
        value: Tensor = self.module.weight
        return value.expand(*lead, *value.shape)

    def _bias(self, own: dict[str, Tensor], lead: torch.Size) -> Tensor | None:
        """The bias for every draw, or None where the layer has none."""
        if "bias" in own:
            return own["bias"]
        value: Tensor | None = self.module.bias
        return None if value is None else value.expand(*lead, *value.shape)

    def _linear(self, x: Tensor, z: Tensor, own: dict[str, Tensor]) -> Tensor:
        lead = z.shape[:-1]
        weight, bias = self._weight(own, lead), self._bias(own, lead)
        draws, out_features, in_features = z.shape[0], weight.shape[-2], weight.shape[-1]
        if z.dim() == 3:
            rows = x.reshape(x.shape[0], x.shape[1], -1, in_features)
            out = rows @ weight.transpose(-1, -2)
            out = out if bias is None else out + bias.unsqueeze(-2)
            return out.reshape(draws, x.shape[1], *x.shape[2:-1], out_features)
        if len(x) == 1:  # a shared input needs one product with the weights of all draws
            flat = functional.linear(x[0], weight.reshape(-1, in_features))
            out = flat.reshape(*x.shape[1:-1], draws, out_features).movedim(-2, 0)
            return out if bias is None else out + bias.reshape(draws, *(1,) * (x.dim() - 2), out_features)
        rows = x.reshape(draws, -1, in_features)
        turned = weight.transpose(-1, -2)
        out = rows @ turned if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, turned)
        return out.reshape(*x.shape[:-1], out_features)

    def _convolution(self, x: Tensor, z: Tensor, own: dict[str, Tensor]) -> Tensor:
        layer = self.module
        lead, convolve = z.shape[:-1], _CONVOLUTIONS[type(layer)]
        weight, bias = self._weight(own, lead), self._bias(own, lead)
        kernel = weight.flatten(0, len(lead))
        offset = None if bias is None else bias.flatten()
        options = (layer.stride, layer.padding, layer.dilation)
        data, channels = x.shape[1], layer.out_channels
        if z.dim() == 3:  # every draw and datum is a group of its own
            wide = x.expand(z.shape[0], *x.shape[1:]).flatten(0, 2).unsqueeze(0)
            out: Tensor = convolve(wide, kernel, offset, *options, lead.numel() * layer.groups)
            return out.reshape(*lead, channels, *out.shape[2:])
        if len(x) == 1 and layer.groups == 1:
            out = convolve(x[0], kernel, offset, *options)
        else:
            wide = x.expand(z.shape[0], *x.shape[1:]).transpose(0, 1).flatten(1, 2)
            out = convolve(wide, kernel, offset, *options, z.shape[0] * layer.groups)
        return out.reshape(data, z.shape[0], channels, *out.shape[2:]).transpose(0, 1)

    def prior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the prior, ``(dim,)`` each."""
        return self.prior_mean, self.prior_sd

    def initial(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Begin near the layer's own values, so that a trained net stays trained, or at a draw of the prior."""
        noise = torch.randn(self.dim, generator=generator, dtype=torch.float64).to(self.start)
        if self.begin == "prior":
            return self.prior_mean + self.prior_sd * noise, self.start_sd
        return self.start + _APART * self.start_sd * noise, self.start_sd


def _prior(module: nn.Module, key: str, value: Tensor) -> tuple[Tensor, float, float]:
    if isinstance(module, NORMALISATIONS):
        return value, (1.0 if key == "weight" else 0.0), 1.0
    if value.dim() < 2 or isinstance(module, nn.Embedding):
        return value, 0.0, 1.0
    return value, 0.0, math.sqrt(2 / math.prod(value.shape[1:]))


@register("weights", "dense")
@dataclasses.dataclass(frozen=True)
class Dense(WeightsEntry):
    r"""Every chosen parameter is a latent, with an independent normal prior.

    .. math:: w \sim \mathrm{N}(0, 2 / \text{fan-in}), \qquad b \sim \mathrm{N}(0, 1)

    Outputs of a layer then keep their size through ReLU networks of any width. Scales of normalisation layers have
    prior mean 1, rows of embeddings standard deviation 1. A fit begins with a tenth of the smallest prior standard
    deviation of the layer, around the layer's own values or around a draw of the prior (each member of an ensemble has
    its own).

    Args:
        include: Patterns on parameter or layer names, separated by commas.
        exclude: Patterns of what stays as it is.
        begin: Where a fit begins: ``"net"``, near the values that the network has, or ``"prior"``.

    Raises:
        ConfigError: If begin is neither.

    Source: He, Zhang, Ren and Sun (2015), "Delving deep into rectifiers", equation 10, as the prior.

    Example:
        >>> import torch
        >>> made = Dense(exclude="bias").build(torch.nn.Linear(3, 2), generator=torch.Generator())
        >>> made.dim, made.report.point, made(torch.zeros(5, 3), torch.zeros(4, 6)).shape
        (6, 2, torch.Size([4, 5, 2]))
    """

    begin: str = "net"

    def __post_init__(self) -> None:
        """Check the patterns and the start."""
        super().__post_init__()
        if self.begin not in ("net", "prior"):
            raise ConfigError(f"begin must be 'net' or 'prior', got {self.begin!r}.")

    def layer(self, module: nn.Module, name: str, *, generator: torch.Generator) -> LayerWeights | str:
        """Make the weights of a layer: all its chosen parameters that are not frozen."""
        keys = [k for k, p in module.named_parameters(recurse=False) if p.requires_grad and self.picks(name, k)]
        if not keys:
            return "its parameters do not require gradients"
        return DenseLayer(module, name, tuple(keys), begin=self.begin)
