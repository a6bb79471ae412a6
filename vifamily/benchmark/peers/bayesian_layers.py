"""Layers with random weights of bayesian-torch, torchbnn and blitz, timed beside a linear layer in the same process.

A layer is timed forward and backward without its divergence, except that of blitz, which evaluates the densities of its
draw in the forward pass. A training step has everything: the divergence as the library gives it, and Adam.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._turns import turns

__all__ = ["main"]

_PRIOR_SD = 1.0


def _bayesian_torch(kind: str, fan_in: int, fan_out: int, *, bias: bool) -> Any:
    from bayesian_torch.layers.flipout_layers.linear_flipout import LinearFlipout
    from bayesian_torch.layers.variational_layers.linear_variational import LinearReparameterization

    made = LinearFlipout if kind == "flipout" else LinearReparameterization
    return made(fan_in, fan_out, bias=bias)


def _torchbnn(kind: str, fan_in: int, fan_out: int, *, bias: bool) -> Any:
    from torchbnn import BayesLinear

    return BayesLinear(0.0, _PRIOR_SD, fan_in, fan_out, bias=bias)


def _blitz(kind: str, fan_in: int, fan_out: int, *, bias: bool) -> Any:
    from blitz.modules import BayesianLinear

    return BayesianLinear(fan_in, fan_out, bias=bias)


_MAKE: dict[str, Callable[..., Any]] = {
    "bayesian_torch": _bayesian_torch,
    "bayesian_torch_flipout": _bayesian_torch,
    "torchbnn": _torchbnn,
    "blitz": _blitz,
}


def _made(side: str, fan_in: int, fan_out: int, *, bias: bool) -> Any:
    return _MAKE[side]("flipout" if side.endswith("flipout") else "reparameterised", fan_in, fan_out, bias=bias)


def _forward(side: str, layer: Any, x: Any) -> Any:
    """The outputs of a layer alone."""
    return layer(x, return_kl=False) if side.startswith("bayesian_torch") else layer(x)


def _layers(torch: Any, size: int, batch: int, names: list[str]) -> dict[str, Callable[[], object]]:
    x, gradient = torch.randn(batch, size, requires_grad=True), torch.randn(batch, size)

    def side(call: Callable[[Any], Any], parameters: list[Any]) -> Callable[[], object]:
        # blitz registers parameters of a bias that it does not use
        return lambda: torch.autograd.grad(call(x), (x, *parameters), gradient, allow_unused=True)

    linear = torch.nn.Linear(size, size, bias=False)
    sides = {"floor": side(linear, list(linear.parameters()))}
    for name in names:
        layer = _made(name, size, size, bias=False)
        sides[name] = side(functools.partial(_forward, name, layer), list(layer.parameters()))
    return sides


def _steps(torch: Any, sizes: list[int], batch: int, names: list[str]) -> dict[str, Callable[[], object]]:
    x, y = torch.randn(batch, sizes[0]), torch.randn(batch, sizes[-1])
    return {name: _step(torch, name, sizes, x, y) for name in ["floor", *names]}


def _step(torch: Any, name: str, sizes: list[int], x: Any, y: Any) -> Callable[[], object]:
    """A whole step: noise of one, so that minus the log likelihood is half the squared error."""
    pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
    if name == "floor":
        layers = [torch.nn.Linear(*pair) for pair in pairs]
    else:
        layers = [_made(name, *pair, bias=True) for pair in pairs]
    module = torch.nn.ModuleList(layers)
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-3)

    def divergence(parts: list[Any]) -> Any:
        if name == "torchbnn":
            from torchbnn import BKLLoss

            return BKLLoss(reduction="sum")(module)
        if name == "blitz":
            from blitz.losses import kl_divergence_from_nn

            return kl_divergence_from_nn(module)
        return sum(parts)

    def step() -> None:
        out, parts = x, []
        for i, layer in enumerate(layers):
            out = torch.relu(out) if i else out
            if name.startswith("bayesian_torch"):
                out, kl = layer(out)
                parts.append(kl)
            else:
                out = layer(out)
        loss = 0.5 * (out - y).square().sum()
        if name != "floor":
            loss = loss + divergence(parts).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def main(path: str) -> None:
    """Do a job of ``what``, ``cells``, ``names``, ``rounds`` and ``seconds``: seconds by name for each cell."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)  # this process is the peers' alone
    job: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
    rows = []
    for shape, batch in job["cells"]:
        sides = (_layers if job["what"] == "layers" else _steps)(torch, shape, batch, job["names"])
        rows.append(turns(sides, rounds=job["rounds"], seconds=job["seconds"]))
        print(shape, batch, file=sys.stderr)
    (Path(path).parent / "answer.json").write_text(json.dumps({"rows": rows}), "utf-8")
