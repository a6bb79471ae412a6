"""Fixed draws of base noise, and a loss that is evaluated on all of them a part at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vifamily.rng import LARGEST_SOBOL, draw_noise, split
from vifamily.types import Draw, Loss, NoiseSpec

__all__ = ["FixedLoss", "Grouped", "balanced_draws", "independent_draws", "part_size", "stream"]

_LARGEST_PART = 4_000_000
_PART_OF_UNKNOWN = 1024
_LARGEST_HELD = 2**24
"""Bytes that an evaluation may hold for its gradient where the size of a model's data is not known."""
_FEW = 8


def balanced_draws(spec: NoiseSpec, count: int, seed: int) -> Tensor:
    """Scrambled Sobol points with their mirror images, the second moments of normal ones made exact.

    With mean zero and unit covariance, exactly, the optimum of a Gaussian family on a Gaussian target is the exact
    one on any number of draws; on other targets what is left of the Monte-Carlo error is of third order and higher.

    Args:
        spec: Base noise of one draw.
        count: Number of draws, even.
        seed: Seed of the scrambling.

    Returns:
        ``(count, *spec.shape)``, float64: the points, then their mirror images.

    Example:
        >>> from vifamily.types import NoiseSpec
        >>> draws = balanced_draws(NoiseSpec((3,)), 64, 0)
        >>> bool((draws.mean(0).abs() < 1e-12).all()), bool((draws.mT.cov(correction=0).diagonal() - 1 < 1e-12).all())
        (True, True)
    """
    size, half = math.prod(spec.shape), count // 2
    if size == 0:
        return torch.zeros(count, *spec.shape, dtype=torch.float64)
    if size > LARGEST_SOBOL:
        source = torch.Generator()
        source.manual_seed(seed)
        points = draw_noise(NoiseSpec((size,), spec.law), (half,), source)
    else:
        engine = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed)
        uniform = engine.draw(half, dtype=torch.float64).clamp(2.0**-31, 1 - 2.0**-31)
        points = torch.special.ndtri(uniform) if spec.law == "normal" else uniform
    if spec.law != "normal":
        return torch.cat([points, 1 - points]).reshape(count, *spec.shape)
    points = _unit_covariance(points)
    return torch.cat([points, -points]).reshape(count, *spec.shape)


def _unit_covariance(points: Tensor) -> Tensor:
    """Map points of mean zero so that their second moments are one, all of them where they are enough for it."""
    half, size = points.shape
    scaled = points / points.square().mean(0).sqrt()
    if half < 2 * size:
        return scaled
    # the symmetric root moves the points least
    values, vectors = torch.linalg.eigh(scaled.mT @ scaled / half)
    root: Tensor = (vectors * values.rsqrt()) @ vectors.mT
    return scaled @ root


def independent_draws(spec: NoiseSpec, count: int, seed: int) -> Tensor:
    """Independent draws, then their mirror images, for losses that combine neighbouring draws non-linearly.

    Only the second moments over all of them are made exact, which ties the draws of one group together by a part in
    their number.

    Args:
        spec: Base noise of one draw.
        count: Number of draws, even.
        seed: Seed.

    Returns:
        ``(count, *spec.shape)``, float64.
    """
    source = torch.Generator()
    source.manual_seed(seed)
    points = draw_noise(spec, (count // 2,), source)
    if spec.law != "normal":
        return torch.cat([points, 1 - points])
    if points.numel():
        points = _unit_covariance(points.flatten(1)).reshape(points.shape)
    return torch.cat([points, -points])


def part_size(count: int, rows: int, num_data: int | None, held: int | None = None) -> int:
    """Draws to evaluate at once, a power-of-two part of ``count``, so that memory does not grow with their number.

    Args:
        count: Number of draws.
        rows: Number of restarts.
        num_data: Size of the data, where the model says.
        held: Bytes held for the gradient by each draw of each restart, where that was measured; counts only where
            the size of the data is not known, and never makes parts smaller.
    """
    most = _PART_OF_UNKNOWN if num_data is None else max(1, _LARGEST_PART // max(1, num_data))
    if num_data is None and held:
        # small parts of a cheap density cost calls, not arithmetic
        most = max(most, _LARGEST_HELD // held)
    size = count
    while size * rows > most and size % 2 == 0 and size > 2:
        size //= 2
    return size


class Grouped:
    """A family that gives its draws in groups, ``([restart,] group, draw, dim)``, and is otherwise the family itself.

    One evaluation then gives one value per group, with the draws of that group alone.

    Args:
        family: A family, or several stacked.
        size: Rows of noise in a group.
    """

    def __init__(self, family: Any, size: int) -> None:
        self.family, self.size = family, size

    def __getattr__(self, name: str) -> Any:
        """Everything but the draws is that of the family."""
        return getattr(self.family, name)

    def __call__(self, noise: Tensor, context: Tensor | None = None) -> Draw:
        """Map noise ``([restart,] group * size, ...)`` to grouped draws with weights that sum to one in each group."""
        draw = self.family(noise, context)
        groups = noise.shape[noise.dim() - len(self.family.noise_spec.shape) - 1] // self.size
        weight = draw.log_weight.unflatten(-1, (groups, -1))
        return Draw(
            draw.z.unflatten(-2, (groups, -1)),
            None if draw.log_q is None else draw.log_q.unflatten(-1, (groups, -1)),
            weight - weight.logsumexp(-1, keepdim=True),
        )


class FixedLoss:
    """A loss as a function of the parameters alone, a mean over parts of a fixed set of draws.

    Args:
        loss: Noise to loss, at the parameters as they stand.
        parameters: What is differentiated.
        rows: Number of restarts.
    """

    def __init__(self, loss: Callable[[Tensor], Loss], parameters: Sequence[nn.Parameter], rows: int) -> None:
        self.loss, self.parameters, self.rows = loss, list(parameters), rows
        self.parts: list[Tensor] = []

    def fix(self, draws: Sequence[Tensor], part: int, options: dict[str, Any]) -> None:
        """Set the draws.

        Args:
            draws: ``(draw, ...)`` for each restart.
            part: Number of draws in each evaluation; divides their number.
            options: Dtype and device of the noise.
        """
        all_draws = draws[0] if self.rows == 1 else torch.stack(list(draws))
        axis = 0 if self.rows == 1 else 1
        self.parts = [p.contiguous() for p in all_draws.to(**options).split(part, dim=axis)]

    def __call__(self) -> tuple[np.ndarray, list[Tensor | None], dict[str, float]]:
        """Value per restart, gradients of the sum over restarts, and the parts of the value."""
        value = np.zeros(self.rows)
        gradients: list[Tensor | None] = [None] * len(self.parameters)
        terms: dict[str, float] = {}
        share = 1 / len(self.parts)
        for noise in self.parts:
            with torch.enable_grad():
                loss = self.loss(noise)
                # one value per restart, or one per restart and group
                surrogate = loss.surrogate.reshape(self.rows, -1).mean(1).sum()
                found = torch.autograd.grad(surrogate, self.parameters, allow_unused=True)
            value += share * self._mean(loss)
            for i, gradient in enumerate(found):
                if gradient is not None:
                    held = gradients[i]
                    gradients[i] = share * gradient if held is None else held + share * gradient
            for name, term in loss.terms.items():
                terms[name] = terms.get(name, 0.0) + share * float(term.double().mean())
        return value, gradients, terms

    def held_by_a_draw(self, draws: Tensor, unit: int, options: dict[str, Any]) -> int | None:
        """Bytes that a draw of a restart adds to what an evaluation holds for its gradient.

        It is the difference of two small evaluations, so that data of a model, held once, do not count.

        Args:
            draws: ``(draw, ...)``, at least twice ``max(8, unit)`` of them.
            unit: Draws that belong together.
            options: Dtype and device of the noise.

        Returns:
            The bytes, or None where they cannot be counted.
        """
        few = unit * math.ceil(_FEW / unit)
        if len(draws) < 2 * few:
            return None
        seen = []
        for size in (few, 2 * few):
            noise = draws[:size].to(**options)
            total = [0]

            def note(tensor: Tensor, total: list[int] = total) -> Tensor:
                total[0] += tensor.numel() * tensor.element_size()
                return tensor

            try:
                with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    self.loss(noise if self.rows == 1 else noise.expand(self.rows, *noise.shape))
            except (RuntimeError, ValueError):
                # transforms that take no hooks, or a loss that is not defined here: the parts stay small
                return None
            seen.append(total[0])
        return max(1, (seen[1] - seen[0]) // (few * self.rows))

    def _mean(self, loss: Loss) -> np.ndarray:
        out: np.ndarray = loss.value.detach().double().reshape(self.rows, -1).mean(1).cpu().numpy()
        return out

    @torch.no_grad()
    def values(self) -> np.ndarray:
        """Value per restart on each part, ``(part, restart)``, without gradients."""
        return np.stack([self._mean(self.loss(noise)) for noise in self.parts])


def stream(seed: int, level: int, restart: int, check: int = 0) -> int:
    """Seed of one set of draws of one level and restart; all are independent."""
    return split(seed, "fixed draws", level, restart, check)
