"""Draws folded into the datum axis: one call of the user's net for all draws."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vifamily.errors import ShapeError
from vifamily.weights._base import LayerWeights

__all__ = ["FoldedNet"]


class _Call:
    """What the layers need to know of the call that is running."""

    def __init__(self) -> None:
        self.num_draws = self.num_data = 0
        self.latents: dict[str, Tensor] = {}
        self.repeat = False


class _Folded(nn.Module):
    """Stands for a converted layer: unfolds its input, computes with its weights, folds back (draws outermost)."""

    weights: LayerWeights

    def __init__(self, name: str, weights: LayerWeights, call: _Call) -> None:
        super().__init__()
        self.name, self.call = name, call
        self.__dict__["weights"] = weights  # owned by the network, not by this stand-in

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``(rows, ...)`` to ``(rows, ...)``, with draws before data in the rows."""
        rows, call = x.shape[0], self.call
        z, draws = call.latents[self.name], call.num_draws
        if not call.repeat and rows == call.num_data:
            unfolded = x.unsqueeze(0)
        elif rows == draws * call.num_data or (call.repeat and z.dim() == 2 and rows % draws == 0):
            unfolded = x.reshape(draws, rows // draws, *x.shape[1:])
        else:
            raise ShapeError(f"layer {self.name!r} got {rows} rows for {draws} draws of {call.num_data} data.")
        out = self.weights.forward(unfolded, z)
        if not isinstance(out, Tensor):
            raise ShapeError(f"layer {self.name!r} gives no tensor but {type(out).__name__}.")
        return out.reshape(out.shape[0] * out.shape[1], *out.shape[2:])


class FoldedNet:
    """A net whose converted layers compute all draws in one call.

    Args:
        net: The net, left as it is; the copy shares its tensors.
        layers: Layer name to weights.
    """

    def __init__(self, net: nn.Module, layers: Mapping[str, LayerWeights]) -> None:
        self._call = _Call()
        memo: dict[int, Any] = {id(t): t for t in (*net.parameters(), *net.buffers())}
        memo |= {id(net.get_submodule(n)): _Folded(n, w, self._call) for n, w in layers.items()}
        self._net: nn.Module = copy.deepcopy(net, memo)
        inside = tuple(f"{n}." for n in layers if n)
        for name, module in net.named_modules():
            if name not in layers and not name.startswith(inside):
                # the dictionaries too, so that whoever exchanges tensors of the net (torch.func.functional_call under
                # restarts and compiled steps) exchanges them here
                twin = self._net.get_submodule(name)
                twin._parameters, twin._buffers = module._parameters, module._buffers
        self._names = tuple(layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Copy to None: the owner makes its own anew from its own layers."""
        return

    def __call__(self, x: Tensor, latents: Sequence[Tensor], *, repeat: bool) -> Tensor:
        """Compute ``(datum, ...)`` and ``(draw, [datum,] dim)`` per layer to ``(draw, datum, ...)``.

        Where ``repeat`` is false the input has no draw axis until the first converted layer gives it one.
        """
        call, draws, size = self._call, latents[0].shape[0], x.shape[0]
        call.num_draws, call.num_data, call.repeat = draws, size, repeat
        call.latents = dict(zip(self._names, latents, strict=True))
        try:
            given = x.unsqueeze(0).expand(draws, *x.shape).reshape(draws * size, *x.shape[1:]) if repeat else x
            out: Tensor = self._net(given)
        finally:
            call.latents = {}
        return out.reshape(draws, size, *out.shape[1:])
