"""Small networks and tables that families are made of, initialised from an explicit generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, ShapeError

__all__ = ["SamplerNet", "Table", "check_number", "check_positive", "check_widths", "linear", "mlp", "normal"]


def normal(
    shape: Sequence[int], generator: torch.Generator, *, dtype: torch.dtype, device: torch.device, std: float = 1.0
) -> Tensor:
    """Draw a normal tensor from a generator, in float64 and then rounded, so that every precision starts alike."""
    out = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device=generator.device)
    return (std * out).to(device=device, dtype=dtype)


def linear(
    inputs: int,
    outputs: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype,
    device: torch.device,
    gain: float = 1.0,
    bias_std: float = 0.0,
) -> nn.Linear:
    """Return a linear layer with weights of standard deviation ``gain / sqrt(inputs)``."""
    # torch's own initialisation draws from the global stream, so it is skipped
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=dtype, device=device)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    with torch.no_grad():
        layer.weight.copy_(normal((outputs, inputs), generator, std=gain / math.sqrt(max(inputs, 1)), **options))
        layer.bias.copy_(normal((outputs,), generator, std=bias_std, **options))
    return layer


def mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype,
    device: torch.device,
    last_gain: float = 1.0,
) -> nn.Sequential:
    """Return a perceptron with SiLU activations (smooth, so that densities built on it are twice differentiable).

    Args:
        inputs: Number of inputs.
        hidden: Widths of the hidden layers; empty for a linear map.
        outputs: Number of outputs.
        generator: Randomness of the weights.
        dtype: Dtype of the weights.
        device: Device of the weights.
        last_gain: Standard deviation of the outputs at the start, roughly.
    """
    layers: list[nn.Module] = []
    width = inputs
    for size in hidden:
        layers += [
            linear(width, size, generator, dtype=dtype, device=device, gain=math.sqrt(2), bias_std=0.5),
            nn.SiLU(),
        ]
        width = size
    layers.append(linear(width, outputs, generator, dtype=dtype, device=device, gain=last_gain))
    return nn.Sequential(*layers)


class Table(nn.Module):
    """One row of free numbers per datum, looked up by position.

    Args:
        rows: Number of data.
        columns: Numbers per datum.
        dtype: Dtype of the numbers.
        device: Device of the numbers.
    """

    def __init__(self, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.rows = rows
        self.values = nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=device))

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows of some data, ``(datum,) -> (datum, columns)``.

        Raises:
            ShapeError: If the positions are not a vector of integers.
        """
        if index.dim() != 1 or index.is_floating_point():
            raise ShapeError(
                f"positions of data must be a vector of integers, got shape {tuple(index.shape)}, dtype {index.dtype}."
            )
        return self.values[index.to(self.values.device)]


def check_positive(name: str, value: object, *, least: int = 1) -> None:
    """Refuse a hyper-parameter that is not an integer of at least ``least``.

    Raises:
        ConfigError: Naming the argument and what was got.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")


def check_number(name: str, value: Any) -> None:
    """Refuse a hyper-parameter that is not a positive finite number.

    Raises:
        ConfigError: Naming the argument and what was got.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a positive number, got {value!r}.")


def check_widths(name: str, value: object) -> tuple[int, ...]:
    """Return hidden widths as a tuple.

    Raises:
        ConfigError: If they are not positive integers.
    """
    widths = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in widths):
        raise ConfigError(f"{name} must be a list of positive integers such as [64, 64], got {value!r}.")
    return widths


class SamplerNet(nn.Module):
    """A generator network ``loc + skip e + unit net(e, context)``: near a linear map of the noise when it starts.

    Args:
        noise_dim: Size of the noise ``e``.
        dim: Size of the output.
        hidden: Widths of the hidden layers.
        context_dim: Size of a context, 0 for none.
        generator: Randomness of the weights.
        dtype: Dtype of the weights.
        device: Device of the weights.
    """

    direction: Tensor
    unit: Tensor

    def __init__(
        self,
        noise_dim: int,
        dim: int,
        hidden: Sequence[int],
        context_dim: int,
        generator: torch.Generator,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.net = mlp(noise_dim + context_dim, hidden, dim, generator, dtype=dtype, device=device, last_gain=0.1)
        self.loc = nn.Parameter(torch.zeros(dim, **options))
        direction = torch.eye(dim, noise_dim, **options)
        if noise_dim < dim:
            # fewer inputs than outputs: rows of unit length, so that every output starts with unit variance
            direction = nn.functional.normalize(normal((dim, noise_dim), generator, dtype=dtype, device=device), dim=-1)
        self.register_buffer("direction", direction)
        self.register_buffer("unit", torch.ones(dim, **options))
        self.skip = nn.Parameter(direction.clone())

    def forward(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """Map noise ``(..., [datum,] noise_dim)`` to ``(..., [datum,] dim)``."""
        inputs = noise
        if context is not None:
            inputs = torch.cat([noise, context.expand(*noise.shape[:-1], context.shape[-1])], dim=-1)
        out: Tensor = self.loc + noise @ self.skip.mT + self.unit * self.net(inputs)
        return out

    @torch.no_grad()
    def start(self, mean: Tensor, scale: Tensor) -> None:
        """Set mean and covariance of the linear part; ``scale`` is ``(dim,)`` or a factor ``(dim, dim)``."""
        self.loc.copy_(mean)
        scale = scale.to(self.skip)
        self.skip.copy_(scale[:, None] * self.direction if scale.dim() == 1 else scale @ self.direction)
        self.unit.copy_(scale if scale.dim() == 1 else scale.square().sum(-1).sqrt())
