"""How the weights of a layer are cut into square blocks whose sides are powers of two."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from vifamily.numerics.hadamard import next_power_of_two

__all__ = ["Blocks"]


_WRITTEN = 16
"""Most numbers of a block that is written out, relative to those of the diagonals it would replace."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Square blocks that make a weight tensor.

    Args:
        shape: Shape of the weight, ``(out, in, *kernel)``.
        kind: ``"stack"``: rows of blocks as wide as the padded input, all kernel taps together. ``"taps"``: a block for
            each kernel tap. ``"reshape"``: one block, read row by row.
    """

    shape: tuple[int, ...]
    kind: str

    @property
    def fan_in(self) -> int:
        """Number of weights of one output."""
        return math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        """Side of a block, ``P``."""
        if self.kind == "reshape":
            return next_power_of_two(math.isqrt(math.prod(self.shape) - 1) + 1)
        return next_power_of_two(max(self.shape[:2]) if self.kind == "taps" else self.fan_in)

    @property
    def count(self) -> int:
        """Number of blocks, ``T``."""
        if self.kind == "reshape":
            return 1
        return math.prod(self.shape[2:]) if self.kind == "taps" else -(-self.shape[0] // self.size)

    @property
    def numbers(self) -> int:
        """Length of each diagonal over all blocks, ``T P``."""
        return self.size * self.count

    def assemble(self, blocks: Tensor) -> Tensor:
        """Put blocks together, ``(..., T, P, P) -> (..., *shape)``; what does not fit in the weight is dropped."""
        lead, size = blocks.shape[:-3], self.size
        if self.kind == "reshape":
            return blocks.reshape(*lead, -1)[..., : math.prod(self.shape)].reshape(*lead, *self.shape)
        if self.kind == "taps":
            taps = blocks[..., : self.shape[0], : self.shape[1]].movedim(-3, -1)
            return taps.reshape(*lead, *self.shape)
        rows = blocks.reshape(*lead, self.count * size, size)[..., : self.shape[0], : self.fan_in]
        return rows.reshape(*lead, *self.shape)

    @classmethod
    def choose(cls, shape: tuple[int, ...], layout: str) -> Blocks:
        """Take a layout by name.

        ``"auto"`` stacks, or for a convolution takes the layout with the shorter diagonals of ``"stack"`` and
        ``"taps"``; a layer so thin that one reshaped block needs at most a quarter of that is reshaped, unless the
        block, which must be written out, is large beside the diagonals: with a draw for each datum that would cost
        far more than the product.

        Example:
            >>> [Blocks.choose(s, "auto").kind for s in ((128, 128), (1, 128), (128, 1), (64, 64, 3, 3), (1024, 64))]
            ['stack', 'reshape', 'reshape', 'taps', 'stack']
        """
        if layout != "auto":
            return cls(shape, "stack" if layout == "taps" and len(shape) == 2 else layout)
        best = cls(shape, "stack")
        if len(shape) > 2:
            best = min(cls(shape, "taps"), best, key=lambda b: b.numbers)
        thin = cls(shape, "reshape")
        return thin if 4 * thin.numbers <= best.numbers and thin.size**2 <= _WRITTEN * best.numbers else best
