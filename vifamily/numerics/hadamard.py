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

_STEPS = (2**13, 2**21)
"""From so many numbers on the products take longer than the calls, and smaller factors pay; and from so many on fresh
memory for what is between the factors takes longer still, and fewer pay."""
_DENSE = (8, 6, 6)
"""Up to that power one product with the whole matrix is fastest; one entry for each amount of numbers."""
_LARGEST_PLANNED = 20
_HALVES = (torch.float16, torch.bfloat16)


def _signs(power: int) -> np.ndarray:
    """The matrix of size ``2^power``, entries one and minus one."""
    out = np.ones((1, 1))
    for _ in range(power):
        out = np.block([[out, out], [out, -out]])
    return out


def _tables(scale: Callable[[int, torch.dtype], float]) -> dict[torch.dtype, tuple[Tensor, ...]]:
    """The matrices of all powers, scaled, in every dtype."""
    signs = [torch.from_numpy(_signs(power)) for power in range(max(_DENSE) + 1)]
    kinds = (torch.float64, torch.float32, *_HALVES)
    return {kind: tuple((scale(p, kind) * matrix).to(kind) for p, matrix in enumerate(signs)) for kind in kinds}


# made on import, while no tracer is at work: a matrix made under one would belong to its graph
_SIGNS = _tables(lambda power, kind: 1.0)
# in half precision only powers of two are exact: what is left of the scale is applied to the result
_UNIT = _tables(lambda power, kind: 2.0 ** -(power // 2 if kind in _HALVES else power / 2))


def _amount(numbers: int) -> int:
    """Few numbers, many or very many: 0, 1 or 2."""
    return sum(numbers >= step for step in _STEPS)


def _factors(power: int, amount: int) -> tuple[int, ...]:
    """Powers of the Kronecker factors, outermost first, near equal: at most 64, and of many numbers one such."""
    if power <= _DENSE[amount]:
        return (power,)
    count = -(-(power - 1) // 5) if amount == 1 else -(-power // 6)
    least, more = divmod(power, count)
    return (least,) * (count - more) + (least + 1,) * more


def _plan(power: int, kind: torch.dtype, *, amount: int, orthonormal: bool) -> tuple[Tensor, ...]:
    """The matrices of the factors of a size, outermost first."""
    tables = _UNIT if orthonormal else _SIGNS
    factors = _factors(power, amount)
    if kind in tables:
        return tuple(tables[kind][factor] for factor in factors)
    return tuple(tables[torch.float64][factor].to(kind) for factor in factors)


# to be looked up: for a few short rows, finding the factors anew takes as long as the products
_PLANS = {
    (power, kind, amount, orthonormal): _plan(power, kind, amount=amount, orthonormal=orthonormal)
    for power in range(_LARGEST_PLANNED + 1)
    for kind in _SIGNS
    for amount in range(len(_DENSE))
    for orthonormal in (False, True)
}


def _matrices(x: Tensor, size: int, *, orthonormal: bool) -> tuple[Tensor, ...]:
    power, amount = size.bit_length() - 1, _amount(x.numel())
    found = _PLANS.get((power, x.dtype, amount, orthonormal))
    if found is None:
        found = _plan(power, x.dtype, amount=amount, orthonormal=orthonormal)
    return found if x.device.type == "cpu" else tuple(matrix.to(x.device) for matrix in found)


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
    matrices = _matrices(x, size, orthonormal=orthonormal)
    # the last factor acts along the last axis, each other one on an axis of its own with those that are done behind it
    if len(matrices) == 1:
        out = functional.linear(x, matrices[0])
    else:
        after = matrices[-1].shape[0]
        out = functional.linear(x.reshape(-1, after), matrices[-1])
        for matrix in matrices[-2::-1]:
            factor = matrix.shape[0]
            blocks = x.numel() // (factor * after)
            if blocks == 1:
                out = torch.mm(matrix, out.reshape(factor, after))
            else:
                out = torch.bmm(matrix.expand(blocks, factor, factor), out.reshape(blocks, factor, after))
            after *= factor
        out = out.reshape(x.shape)
    if x.dtype not in _HALVES or not orthonormal:
        return out
    odd = sum(matrix.shape[0].bit_length() % 2 == 0 for matrix in matrices)
    return out * 2.0 ** (-odd / 2) if odd else out


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
