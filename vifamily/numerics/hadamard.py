"""The fast Walsh-Hadamard transform, and the algebra of vectors indexed by bits that goes with it.

``H`` is the Walsh-Hadamard matrix in natural (Sylvester) order, ``H_ij = (-1)^popcount(i & j)``, of size ``D = 2^p``;
divided by ``sqrt(D)`` it is orthogonal and its own inverse. It is a Kronecker product of smaller ones, so that the
transform of a row is a few small matrix products: that is all it is here, which is why it has every derivative, runs
under ``vmap`` and on any device, and compiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vifamily.errors import ShapeError

__all__ = ["dyadic_convolution", "hadamard", "next_power_of_two", "split_powers_of_two"]

_DENSE = 7
"""Up to size ``2^7`` one product with the whole matrix is fastest, but for the largest in many rows."""
_MANY_ROWS = 64
"""From so many rows on it costs more to multiply by 128 than to make two products of its factors."""
_LARGEST_FACTOR = 5
"""Above that, factors of at most ``2^5``: their products take longer in larger ones, and in more calls otherwise."""
_HALVES = (torch.float16, torch.bfloat16)


def _signs(power: int) -> np.ndarray:
    """The matrix of size ``2^power``, entries one and minus one."""
    out = np.ones((1, 1))
    for _ in range(power):
        out = np.block([[out, out], [out, -out]])
    return out


def _tables(scale: Callable[[int, torch.dtype], float]) -> dict[torch.dtype, tuple[Tensor, ...]]:
    """The matrices of all powers, scaled, in every dtype."""
    signs = [torch.from_numpy(_signs(power)) for power in range(_DENSE + 1)]
    kinds = (torch.float64, torch.float32, *_HALVES)
    return {kind: tuple((scale(p, kind) * matrix).to(kind) for p, matrix in enumerate(signs)) for kind in kinds}


# made on import, while no tracer is at work: a matrix made under one would belong to its graph
_SIGNS = _tables(lambda power, kind: 1.0)
# in half precision only powers of two are exact: what is left of the scale is applied to the result
_UNIT = _tables(lambda power, kind: 2.0 ** -(power // 2 if kind in _HALVES else power / 2))


def _factors(power: int, rows: int) -> tuple[int, ...]:
    """Powers of the Kronecker factors, outermost first, as equal as they can be."""
    if power < _DENSE or (power == _DENSE and rows < _MANY_ROWS):
        return (power,)
    count = -(-power // _LARGEST_FACTOR)
    least, more = divmod(power, count)
    return (least,) * (count - more) + (least + 1,) * more


def hadamard(x: Tensor, *, orthonormal: bool = True) -> Tensor:
    r"""Walsh-Hadamard transform along the last axis.

    .. math:: y = \bar H x, \qquad \bar H_{ij} = D^{-1/2} (-1)^{|i \wedge j|},

    with ``|i and j|`` the number of bits that the indices share. It is a few matrix products whose work grows
    little faster than ``D``, is linear, differentiable any number of times in both modes, batched over leading axes and
    over ``torch.vmap``, and compiles as one graph. Orthonormal, it is its own inverse.

    Args:
        x: ``(..., D)``, ``D`` a power of two; any floating dtype and device. Products of half-precision numbers are
            summed as the device's matrix products sum them.
        orthonormal: Whether to divide by ``sqrt(D)``.

    Returns:
        ``(..., D)`` in the dtype of ``x``.

    Raises:
        ShapeError: If the last axis is not a power of two, or there is none.

    Example:
        >>> hadamard(torch.tensor([1.0, 0.0, -1.0, 2.0]), orthonormal=False)
        tensor([ 2., -2.,  0.,  4.])
    """
    size = x.shape[-1] if x.dim() else 0
    if size < 1 or size & (size - 1):
        raise ShapeError(
            f"a Walsh-Hadamard transform needs a power of two along the last axis, got shape {tuple(x.shape)}: pad it "
            f"with zeros to {next_power_of_two(max(size, 1))}, or cut it into blocks of powers of two."
        )
    power = size.bit_length() - 1
    factors = _factors(power, x.numel() // size)
    tables = _UNIT if orthonormal else _SIGNS
    matrices = tables.get(x.dtype) or tuple(matrix.to(x.dtype) for matrix in tables[torch.float64])
    # the last factor acts along the last axis, each other one on an axis of its own with those that are done behind it
    last, after = factors[-1], 2 ** factors[-1]
    rows = x if len(factors) == 1 else x.reshape(-1, after)
    out = functional.linear(rows, matrices[last].to(x.device))
    for factor in reversed(factors[:-1]):
        out = out.reshape(-1, 2**factor, after)
        out = torch.bmm(matrices[factor].to(x.device).expand(out.shape[0], -1, -1), out)
        after *= 2**factor
    out = out.reshape(x.shape)
    odd = sum(factor % 2 for factor in factors) if x.dtype in _HALVES else 0
    return out * 2.0 ** (-odd / 2) if orthonormal and odd else out


def dyadic_convolution(a: Tensor, b: Tensor) -> Tensor:
    r"""Convolution over indices that add bit by bit.

    .. math:: c_k = \sum_i a_i b_{i \oplus k},

    with the exclusive or of indices. Transforms turn it into a product of coordinates, so it costs three of them.

    Args:
        a: ``(..., D)``, ``D`` a power of two.
        b: ``(..., D)``; leading axes broadcast.

    Returns:
        ``(..., D)``.

    Raises:
        ShapeError: If the last axes differ or are no power of two.

    Example:
        >>> dyadic_convolution(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])).round().tolist()
        [13.0, 11.0]
    """
    if a.dim() == 0 or b.dim() == 0 or a.shape[-1] != b.shape[-1]:
        raise ShapeError(
            f"a dyadic convolution needs two vectors of one length, got shapes {tuple(a.shape)} and {tuple(b.shape)}."
        )
    return hadamard(hadamard(a) * hadamard(b)) * math.sqrt(a.shape[-1])


def next_power_of_two(size: int) -> int:
    """Return the least power of two that is not below ``size``.

    Example:
        >>> [next_power_of_two(n) for n in (1, 2, 3, 9)]
        [1, 2, 4, 16]
    """
    return 1 << (size - 1).bit_length()


def split_powers_of_two(size: int, largest: int | None = None) -> tuple[int, ...]:
    """Write a length as a sum of powers of two, the largest first.

    Args:
        size: What is to be cut, at least 1.
        largest: Largest piece, a power of two, or None for no bound.

    Returns:
        The pieces; without a bound, the binary expansion of ``size``.

    Example:
        >>> split_powers_of_two(25), split_powers_of_two(25, 8)
        ((16, 8, 1), (8, 8, 8, 1))
    """
    pieces = []
    while size:
        piece = 1 << (size.bit_length() - 1)
        piece = piece if largest is None else min(piece, largest)
        pieces.append(piece)
        size -= piece
    return tuple(pieces)
