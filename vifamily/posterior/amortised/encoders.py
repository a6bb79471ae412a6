"""Encoders: from data to the context of a conditional family, with standardisation built in."""

from __future__ import annotations

import abc
import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vifamily import registry
from vifamily.errors import ConfigError, ShapeError
from vifamily.families._nets import check_positive, check_widths, mlp, normal
from vifamily.rng import scoped

__all__ = ["Encoder", "EncoderEntry", "Image", "Module", "Series", "Set", "Vector", "as_encoder", "encoder_spec"]

_LARGEST_SCALE = 1e-6
"""Spread, relative to the size of the numbers, below which a number counts as constant."""


class Encoder(nn.Module):
    """A standardiser and a network: data ``(datum, *shape)`` to a context ``(datum, context_dim)``.

    The standardiser subtracts the mean of the simulations and divides by their standard deviation; both are buffers,
    so that they are saved with the network. Numbers that do not vary become zero.

    Args:
        shape: Shape of one datum.
        net: From standardised data to the context.
        axes: Axes of a datum that share one mean and scale (the items of a set, the times of a series).
        dtype: Dtype of the data.
        device: Device of the network.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        net: nn.Module,
        *,
        axes: Sequence[int] = (),
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.shape, self.net, self.axes = tuple(shape), net, tuple(axes)
        size = [1 if i in self.axes else n for i, n in enumerate(self.shape)]
        self.register_buffer("shift", torch.zeros(size, dtype=dtype, device=device))
        self.register_buffer("scale", torch.ones(size, dtype=dtype, device=device))

    @torch.no_grad()
    def fit_scale(self, x: Tensor) -> None:
        """Take mean and standard deviation from simulated data ``(datum, *shape)``."""
        over = (0, *(i + 1 for i in self.axes))
        values = x.double()
        mean = values.mean(over, keepdim=True)
        sd = (values - mean).square().mean(over, keepdim=True).sqrt()
        constant = sd <= _LARGEST_SCALE * mean.abs()
        inverse = torch.where(constant | (sd == 0), torch.zeros_like(sd), 1 / sd.clamp_min(1e-300))
        self.shift.copy_(mean[0])
        self.scale.copy_(inverse[0])

    def forward(self, x: Tensor) -> Tensor:
        """Encode.

        Raises:
            ShapeError: If the data are not of the shape that the encoder was built for, or the network does not give
                one vector per datum.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ShapeError(f"the encoder takes data of shape (datum, {self.shape}), got {tuple(x.shape)}.")
        out: Tensor = self.net((x - self.shift) * self.scale)
        if out.dim() != 2 or out.shape[0] != x.shape[0]:
            raise ShapeError(f"an encoder must give (datum, context) numbers, got {tuple(out.shape)}.")
        return out


class EncoderEntry(abc.ABC):
    """Hyper-parameters of an encoder; builds it once the shape of the data is known."""

    def __post_init__(self) -> None:
        """Check the widths that the entry has."""
        for name in ("hidden", "channels"):
            if hasattr(self, name):
                object.__setattr__(self, name, check_widths(name, getattr(self, name)))
        if hasattr(self, "outputs"):
            check_positive("outputs", self.outputs)

    @abc.abstractmethod
    def build(
        self, shape: Sequence[int], *, generator: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Encoder:
        """Build the encoder for data of a shape.

        Raises:
            ShapeError: If it does not take data of this shape.
        """


@dataclasses.dataclass(frozen=True)
class Vector(EncoderEntry):
    """For a vector of numbers or summaries: standardised, flattened, through a perceptron if ``hidden`` is given.

    Args:
        hidden: Widths of the hidden layers; empty to pass the standardised numbers on.
        outputs: Size of the context where there are hidden layers.

    Example:
        >>> encoder = Vector().build((3,), generator=torch.Generator(), dtype=torch.float32, device=torch.device("cpu"))
        >>> encoder.fit_scale(torch.tensor([[0.0, 5.0, 1.0], [2.0, 5.0, 3.0]]))
        >>> encoder(torch.tensor([[2.0, 5.0, 1.0]])).tolist()
        [[1.0, 0.0, -1.0]]
    """

    hidden: Sequence[int] = ()
    outputs: int = 32

    def build(
        self, shape: Sequence[int], *, generator: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Encoder:
        """Build the encoder."""
        _check_not_empty(shape)
        net: nn.Module = _Flat()
        if self.hidden:
            inner = mlp(math.prod(shape), self.hidden, self.outputs, generator, dtype=dtype, device=device)
            net = nn.Sequential(_Flat(), inner)
        return Encoder(shape, net, dtype=dtype, device=device)


class _Flat(nn.Module):
    """One vector for each datum; a datum that is a single number becomes a vector of one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-1).flatten(1)


class _Pool(nn.Module):
    """A network on each item, their mean, and a network on the mean."""

    def __init__(self, each: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.each, self.after = each, after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.each(x).mean(-2))
        return out


@dataclasses.dataclass(frozen=True)
class Set(EncoderEntry):
    """For exchangeable items ``(item, number)``: a network on each item, their mean, a network on the mean.

    The encoding does not depend on the order of the items (Zaheer et al., "Deep sets", NeurIPS 2017). All items share
    one standardiser.

    Args:
        hidden: Widths of the hidden layers of both networks.
        outputs: Size of the context.
    """

    hidden: Sequence[int] = (64,)
    outputs: int = 32

    def build(
        self, shape: Sequence[int], *, generator: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Encoder:
        """Build the encoder."""
        _check_rank(self, shape, (2,), "(item, number)")
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        width = self.hidden[-1]
        each = mlp(shape[1], self.hidden, width, generator, **options)
        after = mlp(width, self.hidden, self.outputs, generator, **options)
        return Encoder(shape, _Pool(each, after), axes=(0,), **options)


@dataclasses.dataclass(frozen=True)
class Series(EncoderEntry):
    """For a time series ``(time, number)`` or ``(time,)``: convolutions that halve the length, then a perceptron.

    All times share one standardiser.

    Args:
        channels: Channels of the convolutions, of width 5 and stride 2.
        outputs: Size of the context.
    """

    channels: Sequence[int] = (16, 32)
    outputs: int = 32

    def build(
        self, shape: Sequence[int], *, generator: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Encoder:
        """Build the encoder."""
        _check_rank(self, shape, (1, 2), "(time, number) or (time,)")
        return _convolutional(self, shape, nn.Conv1d, 5, last=True, generator=generator, dtype=dtype, device=device)


@dataclasses.dataclass(frozen=True)
class Image(EncoderEntry):
    """For images ``(channel, height, width)`` or ``(height, width)``: convolutions that halve the sides, a perceptron.

    All pixels of a channel share one standardiser.

    Args:
        channels: Channels of the convolutions, of width 3 and stride 2.
        outputs: Size of the context.
    """

    channels: Sequence[int] = (8, 16, 32)
    outputs: int = 32

    def build(
        self, shape: Sequence[int], *, generator: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Encoder:
        """Build the encoder."""
        _check_rank(self, shape, (2, 3), "(channel, height, width) or (height, width)")
        return _convolutional(self, shape, nn.Conv2d, 3, last=False, generator=generator, dtype=dtype, device=device)


class _ChannelsFirst(nn.Module):
    """Puts the channels before the sides: those of the last axis, or one that is not there."""

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1) if self.plain else x.movedim(-1, 1)


def _convolutional(
    entry: Series | Image, shape: Sequence[int], kind: Any, width: int, *, last: bool, generator: torch.Generator,
    **options: Any,
) -> Encoder:  # fmt: skip
    """Convolutions that halve the sides, then a perceptron; the sides share one standardiser.

    Args:
        entry: Channels and outputs.
        shape: Sides, with or without an axis of channels.
        kind: ``nn.Conv1d`` or ``nn.Conv2d``.
        width: Width of the convolutions.
        last: Whether the axis of channels, where there is one, is the last rather than the first.
        generator: Randomness of the weights.
        **options: dtype and device.
    """
    spatial = 1 if kind is nn.Conv1d else 2
    plain = len(shape) == spatial
    start = 0 if plain or last else 1
    axes = tuple(range(start, start + spatial))
    sides = [shape[axis] for axis in axes]
    numbers = math.prod(shape) // math.prod(sides)
    layers: list[nn.Module] = [_ChannelsFirst(plain=plain)] if plain or last else []
    for channels in entry.channels:
        layers += [_convolution(kind, numbers, channels, width, generator, **options), nn.SiLU()]
        numbers, sides = channels, [-(-side // 2) for side in sides]
    layers += [nn.Flatten(), mlp(numbers * math.prod(sides), (64,), entry.outputs, generator, **options)]
    return Encoder(shape, nn.Sequential(*layers), axes=axes, **options)


def _convolution(
    kind: Any, inputs: int, outputs: int, width: int, generator: torch.Generator, **options: Any
) -> nn.Module:
    layer: nn.Module = nn.utils.skip_init(kind, inputs, outputs, width, stride=2, padding=width // 2, **options)
    weight: Any = layer.weight
    with torch.no_grad():
        std = math.sqrt(2 / math.prod(weight.shape[1:]))
        weight.copy_(normal(weight.shape, generator, std=std, **options))
        layer.bias.zero_()  # type: ignore[operator]
    return layer


@dataclasses.dataclass(frozen=True)
class Module(EncoderEntry):
    """A module of the user's own, behind a standardiser; what is built is a copy.

    Args:
        module: From standardised data ``(datum, *shape)`` to ``(datum, context)``.
    """

    module: nn.Module = dataclasses.field(repr=False)

    def build(
        self, shape: Sequence[int], *, generator: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Encoder:
        """Build the encoder around a copy of the module."""
        with scoped(generator):
            own = copy.deepcopy(self.module).to(dtype=dtype, device=device)
        return Encoder(shape, own, dtype=dtype, device=device)


def _check_not_empty(shape: Sequence[int]) -> None:
    if 0 in shape:
        raise ShapeError(
            f"a datum of shape {tuple(shape)} holds no numbers: the simulator gives nothing to learn from."
        )


def _check_rank(entry: EncoderEntry, shape: Sequence[int], ranks: tuple[int, ...], wanted: str) -> None:
    _check_not_empty(shape)
    if len(shape) not in ranks:
        raise ShapeError(f"the encoder {type(entry).__name__} takes data of shape {wanted}, got {tuple(shape)}.")


_KINDS: dict[str, type[EncoderEntry]] = {"vector": Vector, "set": Set, "series": Series, "image": Image}


def as_encoder(given: Any) -> EncoderEntry:
    """Turn a name or spec, an entry or a module into an entry; None is a vector.

    Raises:
        ConfigError: If it is none of these.
        SpecError: If a spec cannot be parsed.

    Example:
        >>> as_encoder("vector(hidden=[64, 64])")
        Vector(hidden=(64, 64), outputs=32)
    """
    if given is None:
        return Vector()
    if isinstance(given, EncoderEntry):
        return given
    if isinstance(given, nn.Module):
        return Module(given)
    if isinstance(given, str):
        spec = registry.parse(given)
        kind = _KINDS.get(spec.name)
        fields = {f.name for f in dataclasses.fields(kind)} if kind is not None else set()  # type: ignore[arg-type]
        if kind is None or set(spec.kwargs) - fields:
            known = "; ".join(f"{n}({', '.join(f.name for f in dataclasses.fields(k))})" for n, k in _KINDS.items())  # type: ignore[arg-type]
            raise ConfigError(f"cannot build the encoder {given!r}: there are {known}.")
        return kind(**spec.kwargs)
    raise ConfigError(
        f"encoder must be a torch module, or one of {', '.join(_KINDS)}, such as 'set(outputs=16)'; got "
        f"{type(given).__name__}."
    )


def encoder_spec(entry: EncoderEntry) -> str | None:
    """The spec of an entry, or None for a module of the user's own."""
    name = next((name for name, kind in _KINDS.items() if type(entry) is kind), None)
    if name is None:
        return None
    fields = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}  # type: ignore[arg-type]
    return str(registry.Spec(name, {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}))
