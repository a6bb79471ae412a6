"""Ways to evaluate a network for many draws, and how the fastest that is right is found."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vifamily import rng
from vifamily.errors import ModelError, ShapeError

if TYPE_CHECKING:
    from vifamily.weights._network import NetworkWeights

__all__ = [
    "REFUSALS",
    "Route",
    "evaluated",
    "loop_over_draws",
    "out_of_memory",
    "over_draws",
    "raised_on",
    "settled_route",
]

Route = Literal["fold", "repeat", "vmap", "loop"]

_ROWS, _DRAWS = 5, 2
"""Rows and draws of the comparison: with one row, broadcasting hides wrong axes."""
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
"""What user code raises where axes are not those that it expects."""


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is short, which says nothing about the network."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def raised_on(x: Tensor, error: Exception) -> ModelError:
    """What to say where the network raised an error on inputs."""
    return ModelError(
        f"the network raised on inputs of shape {tuple(x.shape)}, {x.dtype}: {type(error).__name__}: {error}"
    )


def evaluated(net: nn.Module) -> nn.Module:
    """Set eval mode, but for torch's fused forms of attention, which have no derivative."""
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            module.training = True  # its parts, dropout among them, keep eval mode
    return net


def over_draws(net: nn.Module, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Vectorise the whole net over draws, ``(datum, ...) -> (draw, datum, ...)``."""
    out: Tensor = torch.vmap(lambda values: functional_call(net, values, (x,)))(dict(parameters))
    return out


def loop_over_draws(net: nn.Module, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Call the net once for every draw."""
    count = len(next(iter(parameters.values())))
    return torch.stack([functional_call(net, {k: v[s] for k, v in parameters.items()}, (x,)) for s in range(count)])


def settled_route(
    weights: NetworkWeights, x: Tensor, generator: torch.Generator | None
) -> tuple[Route, dict[str, str]]:
    """Return the first route that agrees with a loop over draws, and why the others were left."""
    source = rng.generator(0, "settle") if generator is None else generator
    mean, sd = weights.initial(source)
    noise = torch.randn(_DRAWS, weights.dim, generator=source, dtype=torch.float64)
    z = mean + (sd + 0.1) * noise.to(mean)
    rows = _probe(x, source)
    declined: dict[str, str] = {}
    routes: tuple[Route, ...] = ("fold", "repeat", "vmap")
    # user code that draws at random knows no generator
    with torch.no_grad(), rng.scoped(source), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = _expected(weights, rows, z)
        tolerance = 1e3 * torch.finfo(expected.dtype).eps * float(1 + expected.abs().max())
        for route in routes:
            try:
                out = _with_gradient(weights, route, rows, z)
            except REFUSALS as error:
                if out_of_memory(error):
                    raise
                declined[route] = f"{type(error).__name__}: {error}"
                continue
            if out.shape == expected.shape and bool((out - expected).abs().max() <= tolerance):
                return route, declined
            declined[route] = "gives other outputs than one draw at a time"
    return "loop", declined


def _with_gradient(weights: NetworkWeights, route: Route, x: Tensor, z: Tensor) -> Tensor:
    """Outputs by a route whose derivative exists too, where the network has one."""
    with torch.enable_grad():
        at = z.clone().requires_grad_()
        out = weights.evaluate(route, x, at)
        if out.requires_grad:
            torch.autograd.grad(out.sum(), [at], allow_unused=True)
    return out.detach()


def _expected(weights: NetworkWeights, x: Tensor, z: Tensor) -> Tensor:
    """Outputs by the loop, checked."""
    parameters = weights.materialise(z)
    try:
        out, again = (loop_over_draws(weights.net, x, parameters) for _ in range(2))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise raised_on(x, error) from error
    if not out.is_floating_point() or out.dim() < 2 or out.shape[1] != x.shape[0]:
        raise ShapeError(
            f"the network must map (datum, ...) to real numbers (datum, ...), but gave {tuple(out.shape[1:])}, "
            f"{out.dtype}, for inputs of shape {tuple(x.shape)}."
        )
    if not bool(torch.isfinite(out).all()):
        raise ModelError(
            f"the network gives NaN or infinite outputs for {x.shape[0]} inputs and weights drawn at the start: look "
            "for inputs that are not standardised, and for logarithms, roots or divisions in the network."
        )
    if not torch.equal(out, again):
        raise ModelError(
            "the network gives other outputs each time for the same input and weights, in eval mode: take out what "
            "draws at random in its forward pass."
        )
    return out


def _probe(x: Tensor, source: torch.Generator) -> Tensor:
    """A few rows of the input; where there are fewer, made up to the number by shuffled values of those."""
    rows = x[:_ROWS]
    if rows.shape[0] >= _ROWS - 1:
        return rows
    if rows.shape[0] == 0:
        raise ShapeError(f"the network needs at least one input, got shape {tuple(x.shape)}.")
    extra = []
    for k in range(_ROWS - rows.shape[0]):
        row = rows[k % rows.shape[0]]
        order = torch.randperm(row.numel(), generator=source, device=source.device).to(row.device)
        mixed = row.flatten()[order].reshape(row.shape)
        scale = 1 + 0.1 * (k + 1)
        extra.append(mixed * scale if mixed.is_floating_point() else mixed)
    return torch.cat([rows, torch.stack(extra)])
