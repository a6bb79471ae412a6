"""Explicit randomness: named streams split from one root seed.

A stream is addressed by a root seed, a name and integers (a restart, a block); its generator is seeded by a hash of
that address. Two streams never share a state, adding one does not disturb another, and resuming at step ``t`` needs
only ``t``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import operator
import random
import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.numerics.native import kernels
from vifamily.types import NoiseSpec

__all__ = ["NoiseStream", "check_seed", "draw_noise", "generator", "scoped", "scrambled_sobol", "split"]

BLOCK = 64
"""Steps of noise drawn at once; part of the stream's definition, so never a matter of how steps are grouped."""

_NUMBER = re.compile(r"(^|/)-?\d+(/|$)")

LARGEST_SOBOL = 1000
"""Noise of more numbers per draw is drawn independently: a Sobol sequence gains little there."""


def check_seed(seed: int) -> int:
    """Return a valid root seed.

    Raises:
        ConfigError: If the seed is not an integer in ``[0, 2**63)``.

    Example:
        >>> check_seed(3)
        3
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) < 2**63:
        raise ConfigError(f"seed must be an integer in [0, 2**63), got {seed!r}. Pass for example seed=0.")
    return int(seed)


def split(seed: int, name: str, *index: int) -> int:
    """Derive the seed of a named stream.

    Args:
        seed: Root seed.
        name: Name of the stream (``"noise"``, ``"start/prior"`` …).
        index: Further integers of the address (restart, block …).

    Returns:
        A seed in ``[0, 2**63)``, the head of a SHA-256 hash of the address.

    Raises:
        ConfigError: If the seed is not valid, or a part of the name is a number, which the index could be taken for.

    Example:
        >>> split(0, "noise", 1) == split(0, "noise", 1), split(0, "noise", 1) == split(0, "noise", 2)
        (True, False)
    """
    if _NUMBER.search(name):
        raise ConfigError(
            f"the name of a stream must have no part that is a number, got {name!r}: use the index for it."
        )
    address = "/".join([str(check_seed(seed)), name, *(str(operator.index(i)) for i in index)])
    return int.from_bytes(hashlib.sha256(address.encode()).digest()[:8], "big") >> 1


def _split_each(seed: int, name: str, index: int, last: range) -> list[int]:
    """``split(seed, name, index, k)`` for each ``k``; the head of the address is hashed once."""
    head = hashlib.sha256(f"{check_seed(seed)}/{name}/{index}/".encode())
    out = []
    for k in last:
        own = head.copy()
        own.update(str(k).encode())
        out.append(int.from_bytes(own.digest()[:8], "big") >> 1)
    return out


def generator(seed: int, name: str, *index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator for a named stream (see :func:`split`).

    Example:
        >>> import torch
        >>> a = torch.randn(2, generator=generator(0, "start"))
        >>> torch.equal(a, torch.randn(2, generator=generator(0, "start")))
        True
    """
    out = torch.Generator(device=device)
    out.manual_seed(split(seed, name, *index))
    return out


def draw_noise(
    spec: NoiseSpec,
    shape: tuple[int, ...],
    source: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw base noise of a family.

    Args:
        spec: What the family declares.
        shape: Leading shape, usually ``(draws,)``.
        source: The generator; noise is drawn on its device and moved.
        dtype: Floating dtype of the noise.
        device: Device of the result.

    Returns:
        Noise of shape ``(*shape, *spec.shape)``.
    """
    full = (*shape, *spec.shape)
    # always drawn in float64: the same seed then gives the same noise, rounded, in every precision
    maker = torch.randn if spec.law == "normal" else torch.rand
    return maker(full, generator=source, dtype=torch.float64, device=source.device).to(device=device, dtype=dtype)


class NoiseStream:
    """Noise of every step of a fit, addressed by step.

    Noise is made in blocks of :data:`BLOCK` steps, each block from its own generator, so the noise of step ``t``
    depends on the seed, the restart and ``t`` alone: not on where a fit was resumed, nor on how many steps run in
    one compiled call, nor on how many restarts run beside it.

    Args:
        seed: Root seed.
        spec: Noise of one draw.
        draws: Draws per step.
        restarts: Number of restarts run at once; 1 gives no restart axis.
        first_restart: Index of the first of them.
        batch_shape: Shape between the draw axis and the noise event, ``(datum,)`` for conditional families.
        dtype: Floating dtype.
        device: Device of the noise.
        name: Name of the stream.
        balanced: Make each block of steps a scrambled Sobol sequence (Owen 1995; Buchholz, Wenzel and Mandt 2018)
            rather than independent draws. Every draw keeps its law, so whatever is linear in the draws stays
            unbiased, and averages over draws and over steps are far less noisy. Not for objectives that combine
            draws non-linearly.
        native: Make balanced noise in C where that can be compiled: the same numbers, sooner.

    Example:
        >>> from vifamily.types import NoiseSpec
        >>> stream = NoiseStream(0, NoiseSpec((2,)), draws=3)
        >>> stream.at(5).shape, bool((stream.at(5) == stream.at(5)).all())
        (torch.Size([3, 2]), True)
    """

    def __init__(
        self,
        seed: int,
        spec: NoiseSpec,
        *,
        draws: int,
        restarts: int = 1,
        first_restart: int = 0,
        batch_shape: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        name: str = "noise",
        balanced: bool = False,
        native: bool = False,
    ) -> None:
        self.native = native
        self.balanced = balanced and 0 < math.prod((*batch_shape, *spec.shape)) <= LARGEST_SOBOL
        self.seed, self.spec, self.draws, self.restarts = check_seed(seed), spec, draws, restarts
        self.first_restart, self.batch_shape = first_restart, batch_shape
        self.dtype, self.device, self.name = dtype, device, name
        self._block = -1
        self._noise: Tensor | None = None
        self._ahead: Tensor | None = None
        self._ahead_from, self._ahead_to = 0, 0

    def block(self, number: int) -> Tensor:
        """Return the noise of steps ``BLOCK * number`` onwards, ``(BLOCK, [restart,] draw, ...)``."""
        return self._blocks(number, 1)

    def _blocks(self, first: int, count: int) -> Tensor:
        """Noise of several blocks, ``(count * BLOCK, [restart,] draw, ...)``."""
        rows = []
        for r in range(self.restarts):
            rows.append(
                self._made(_split_each(self.seed, self.name, self.first_restart + r, range(first, first + count)))
            )
        return rows[0] if self.restarts == 1 else torch.stack(rows, dim=1)

    def _made(self, seeds: list[int]) -> Tensor:
        event = (*self.batch_shape, *self.spec.shape)
        if not self.balanced:
            parts = []
            for seed in seeds:
                source = torch.Generator()
                source.manual_seed(seed)
                leading = (BLOCK, self.draws, *self.batch_shape)
                parts.append(draw_noise(self.spec, leading, source, dtype=self.dtype, device=self.device))
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        # 2^-30 is the resolution of the points: half a cell keeps the normal quantile finite
        points = native_sobol if self.native else scrambled_sobol
        uniform = points(seeds, math.prod(event), BLOCK * self.draws).clamp_(2.0**-31, 1 - 2.0**-31)
        noise = torch.special.ndtri(uniform) if self.spec.law == "normal" else uniform
        return noise.reshape(-1, self.draws, *event).to(device=self.device, dtype=self.dtype)

    def at(self, step: int) -> Tensor:
        """Return the noise of one step, ``([restart,] draw, *batch_shape, *spec.shape)``."""
        number, offset = divmod(step, BLOCK)
        if number != self._block or self._noise is None:
            self._block, self._noise = number, self.block(number)
        return self._noise[offset]

    def span(self, first: int, count: int) -> Tensor:
        """Return the noise of some steps, ``(count, [restart,] draw, ...)``: the same as :meth:`at` gives one by one.

        Args:
            first: First step.
            count: Number of steps.
        """
        low, high = first // BLOCK, -(-(first + count) // BLOCK)
        if self._ahead is None or low < self._ahead_from or high > self._ahead_to:
            size = BLOCK * self.draws * self.restarts * max(1, math.prod((*self.batch_shape, *self.spec.shape)))
            # some further blocks at once, as far as they are small: most of the cost is that of the calls
            high = max(high, low + min(16, max(1, 1_000_000 // size)))
            self._ahead, self._ahead_from, self._ahead_to = self._blocks(low, high - low), low, high
        start = first - BLOCK * self._ahead_from
        return self._ahead[start : start + count]


@functools.lru_cache(maxsize=16)
def _directions(size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Leading bits of the direction numbers, ``(size, bit, direction)``, and powers of two, ``(30,)``."""
    state = torch.quasirandom.SobolEngine(size).sobolstate[:, :bits]
    shifts = torch.arange(29, 29 - bits, -1)
    powers = 2.0 ** torch.arange(29, -1, -1, dtype=torch.float64)
    return ((state.unsqueeze(1) >> shifts.reshape(-1, 1)) & 1).to(torch.float64), powers


def scrambled_sobol(seeds: Sequence[int], size: int, count: int) -> Tensor:
    """Scrambled Sobol sequences, one for each seed: the numbers of ``torch.quasirandom.SobolEngine``, sooner.

    The engine scrambles all thirty direction numbers of each coordinate bit by bit; of the first ``2^m`` points only
    ``m`` of them matter, and these have their leading ``m`` bits alone. So the product of the random lower
    triangular matrix with the directions, modulo two, is a small matrix product for all coordinates and seeds at once.
    The points follow in Gray-code order by reflection (Antonov and Saleev 1979).

    Args:
        seeds: Seeds of the scramblings.
        size: Coordinates.
        count: Points of each sequence.

    Returns:
        ``(len(seeds) * count, size)`` in float64, on the unit interval.

    Example:
        >>> engine = torch.quasirandom.SobolEngine(3, scramble=True, seed=5)
        >>> bool((scrambled_sobol([5], 3, 8) == engine.draw(8, dtype=torch.float64)).all())
        True
    """
    bits = max(1, (count - 1).bit_length())
    directions, powers = _directions(size, bits)
    shifts, triangles = [], []
    for seed in seeds:
        source = torch.Generator()
        source.manual_seed(seed)
        shifts.append(torch.randint(2, (size, 30), generator=source))
        triangles.append(torch.randint(2, (size, 30, 30), generator=source)[:, :, :bits].to(torch.float64))
    lower = torch.ones(30, bits, dtype=torch.float64).tril_(-1)
    matrix = torch.stack(triangles) * lower + torch.eye(30, bits, dtype=torch.float64)
    product = torch.matmul(matrix, directions)  # (seed, size, 30, direction)
    odd = product.sub_(product.mul(0.5).floor_().mul_(2))
    scrambled = (powers @ odd).to(torch.int64).movedim(-1, 0)
    points = torch.empty(2**bits, len(seeds), size, dtype=torch.int64)
    points[0] = (torch.stack(shifts).to(torch.float64) @ powers.flip(0)).to(torch.int64)
    for k in range(bits):
        points[2**k : 2 ** (k + 1)] = points[: 2**k].flip(0) ^ scrambled[k]
    out = points[:count].to(torch.float64) * 2.0**-30
    # the engine takes its first point in single precision
    out[0] = out[0].to(torch.float32).to(torch.float64)
    return out.transpose(0, 1).reshape(-1, size)


def native_sobol(seeds: Sequence[int], size: int, count: int) -> Tensor:
    """The numbers of :func:`scrambled_sobol`, made in C where that can be compiled."""
    found = kernels()
    if found is None:
        return scrambled_sobol(seeds, size, count)
    return found.sobol(seeds, _direction_numbers(size, max(1, (count - 1).bit_length())), count)


@functools.lru_cache(maxsize=16)
def _direction_numbers(size: int, bits: int) -> Tensor:
    return torch.quasirandom.SobolEngine(size).sobolstate[:, :bits].contiguous()


@contextlib.contextmanager
def scoped(source: torch.Generator | int) -> Iterator[None]:
    """Run foreign code that takes no generator under a seed, then restore every global stream.

    Seeds torch (CPU, and CUDA where it is in use), numpy and Python's ``random`` from the source, and restores all
    of them afterwards. A generator is advanced by one number, so consecutive scopes differ. The one place where
    global random state is touched.

    Args:
        source: A generator, or a seed.

    Example:
        >>> import torch
        >>> before = torch.get_rng_state()
        >>> with scoped(7):
        ...     a = torch.randn(2)
        >>> bool((torch.get_rng_state() == before).all())
        True
    """
    if isinstance(source, torch.Generator):
        seed = int(torch.randint(2**62, (), generator=source, device=source.device).item())
    else:
        seed = check_seed(source)
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=cuda):
        # torch.manual_seed would leave a call for every accelerator that is not in use, with a stack trace each time
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
