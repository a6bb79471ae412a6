"""What several contracts need: many copies of one family, noise on a grid, descent, comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.families import Family
from vifamily.families._stack import StackedFamily
from vifamily.rng import draw_noise
from vifamily.testing import tolerances
from vifamily.testing._report import Broken, NotApplicable
from vifamily.types import Loss, NoiseSpec

__all__ = [
    "agree",
    "descend",
    "finite_difference",
    "flat_gradient",
    "grid_noise",
    "mean_is",
    "normal_quadrature",
    "replicate",
    "seeded",
]


def seeded(seed: int) -> torch.Generator:
    """Return a generator with a seed."""
    return torch.Generator().manual_seed(seed)


def replicate(family: Family, copies: int) -> StackedFamily:
    """Stack copies of one family, so that one backward pass gives the gradient of every replicate."""
    stack = StackedFamily([family])
    for name, parameter in list(stack.named_parameters(recurse=False)):
        repeated = parameter.detach().expand(copies, *parameter.shape[1:]).clone()
        setattr(stack, name, nn.Parameter(repeated))
    for name, buffer in list(stack.named_buffers(recurse=False)):
        setattr(stack, name, buffer.expand(copies, *buffer.shape[1:]).clone())
    stack.size = copies
    return stack


def grid_noise(spec: NoiseSpec, per_axis: int) -> Tensor:
    """Equal-weight noise on a grid: mid-points of equal probability, scaled to unit variance for normal noise."""
    size = math.prod(spec.shape)
    if size > 2:
        raise NotApplicable(f"its family needs {size} numbers of noise per draw, too many for a grid")
    if size == 0:
        return torch.zeros(2, *spec.shape, dtype=torch.float64)
    axis = (torch.arange(per_axis, dtype=torch.float64) + 0.5) / per_axis
    if spec.law == "normal":
        axis = torch.special.ndtri(axis)
        axis = axis / axis.square().mean().sqrt()
    points = torch.cartesian_prod(*[axis] * size).reshape(-1, *spec.shape)
    return points


def normal_quadrature(size: int, *, spacing: float = 0.6, radius: float = 4.3) -> tuple[Tensor, Tensor]:
    """Nodes ``(node, size)`` and log weights of the trapezoidal rule under the standard normal law.

    Exact to many digits for smooth functions: the rule's error falls as ``exp(-2 pi^2 / spacing^2)``.
    """
    steps = math.ceil(radius / spacing)
    axis = spacing * torch.arange(-steps, steps + 1, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * size).reshape(-1, size)
    square = points.square().sum(-1)
    points, square = points[square <= radius**2], square[square <= radius**2]
    return points, torch.log_softmax(-0.5 * square, 0)


def flat_gradient(loss: Loss, family: nn.Module, copies: int | None = None) -> Tensor:
    """Gradient of the surrogate with respect to all parameters of a family, ``([copies,] size)``."""
    parameters = [p for p in family.parameters() if p.requires_grad]
    if not loss.surrogate.requires_grad:
        raise Broken(
            got="a surrogate without a gradient", expected="a surrogate that depends on the family's parameters"
        )
    parts = torch.autograd.grad(loss.surrogate.sum(), parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)]
    leading = (-1,) if copies is None else (copies, -1)
    return torch.cat([g.reshape(leading) for g in filled], dim=-1)


def finite_difference(value: Any, family: nn.Module, *, step: float, stacked: bool) -> Tensor:
    """Central differences of ``value()`` in every parameter of a family, ``([copies,] size)``."""
    columns = []
    with torch.no_grad():
        for entry in _entries(family, stacked=stacked):
            kept = entry.clone()
            sides = []
            for sign in (1, -1):
                entry.copy_(kept + sign * step)
                sides.append(value().detach().clone())
            entry.copy_(kept)
            columns.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(columns, dim=-1)


def _entries(family: nn.Module, *, stacked: bool) -> Iterator[Tensor]:
    """Views on the single numbers of the parameters, one per copy in a stack."""
    for parameter in family.parameters():
        if parameter.requires_grad:
            flat = parameter.data.view(parameter.shape[0], -1) if stacked else parameter.data.view(-1)
            for i in range(flat.shape[-1]):
                yield flat[:, i] if stacked else flat[i]


def mean_is(samples: Tensor, expected: Tensor | float, what: str, *, slack: float = 1e-9) -> None:
    """Require that the mean over the first axis is as expected, within five standard errors.

    ``slack`` absorbs rounding where samples hardly vary.
    """
    samples = samples.detach()
    mean, error = samples.mean(0), samples.std(0) / math.sqrt(samples.shape[0])
    apart = (mean - expected).abs()
    allowed = tolerances.STANDARD_ERRORS * error + slack
    if not bool((apart <= allowed).all()):
        worst = int((apart / allowed).nan_to_num(math.inf).flatten().argmax())
        wanted = torch.as_tensor(expected, dtype=mean.dtype).expand_as(mean).flatten()[worst]
        raise Broken(
            got=f"{float(mean.flatten()[worst]):.6g} (standard error {float(error.flatten()[worst]):.2g})",
            expected=f"{what} of {float(wanted):.6g} within five standard errors",
        )


def agree(a: Tensor, b: Tensor, tolerance: float, what: str, *, scale: Tensor | float | None = None) -> None:
    """Require that two results agree relative to the larger of their sizes and one (or a given scale)."""
    if a.shape != b.shape:
        raise Broken(got=f"shape {tuple(a.shape)}", expected=f"{what} of shape {tuple(b.shape)}")
    if not a.numel():
        return
    a, b = a.detach(), b.detach()
    unit = torch.as_tensor(1.0 + b.abs().max() if scale is None else scale)
    difference = float(((a - b).abs() / unit).max())
    if not difference <= tolerance:
        raise Broken(got=f"a relative difference of {difference:.2g}", expected=f"{what}, to {tolerance:g}")


def descend(
    objective: Any,
    family: Family,
    model: Any,
    noise: Tensor,
    *,
    steps: int = 400,
    rate: float = 0.1,
    fresh: bool = False,
) -> None:
    """Minimise a loss on fixed noise by Adam with decaying steps.

    With ``fresh``, as many independent draws are made anew at each step, and the second half of the steps is averaged.
    It is so too where the objective's state is a Markov chain, which does not move as it should on the same noise.
    """
    parameters = [p for p in family.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=rate, foreach=False)
    state = objective.after_warmup(objective.init_state(model, family, generator=seeded(0)))
    fresh, source = fresh or (isinstance(state, Tensor) and state.is_floating_point()), seeded(7)
    total = [torch.zeros_like(p) for p in parameters]
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * 0.01 ** (step / steps)
        if fresh:
            noise = draw_noise(family.noise_spec, noise.shape[:1], source, dtype=noise.dtype)
        loss: Loss = objective.loss(family, model, noise, None, state)
        state = loss.state
        gradients = torch.autograd.grad(loss.surrogate.sum(), parameters, allow_unused=True)
        if not bool(torch.isfinite(loss.value).all()):
            raise Broken(got=f"a loss of {loss.value.tolist()} at step {step} of a descent", expected="finite losses")
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        if fresh and step >= steps // 2:
            for kept, parameter in zip(total, parameters, strict=True):
                kept += parameter.detach() / (steps - steps // 2)
    if fresh:
        with torch.no_grad():
            for kept, parameter in zip(total, parameters, strict=True):
                parameter.copy_(kept)
