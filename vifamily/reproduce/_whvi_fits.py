"""Networks with Walsh-Hadamard weights and what stands beside them, on regression sets, digits and a toy curve."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from vifamily import rng
from vifamily.errors import VifamilyWarning
from vifamily.fit import fit
from vifamily.models import Network
from vifamily.reproduce import _network_baselines as baselines
from vifamily.reproduce._uci import Split, split_of
from vifamily.types import Capability

__all__ = [
    "BESIDE",
    "SEVERAL",
    "WHVI",
    "classified",
    "collapsed",
    "dense_net",
    "digits_settings_of",
    "regression_row",
    "settings_of",
    "toy_bands",
]

WHVI = "Walsh-Hadamard"
SEVERAL = "Walsh-Hadamard, three members"
"""Fits from starts of their own, each with its own diagonals and noise, weighted alike; twice the steps each."""
_MEMBERS = 3
_LONGER = 2
_WIDE = 10.0
"""Prior scale of one classifying network: under the default, made for random weights, its mode fits too little."""
_ONE_CYCLE = "adam(schedule=one_cycle, step_size=0.04, model_step_size=1)"
BESIDE = {
    "mean field": baselines.mean_field_network,
    "one network": baselines.single_network,
    "five networks": baselines.deep_ensemble,
    "dropout": baselines.dropout_network,
    "SWAG": baselines.swag,
}
"""The other methods of the table, by name."""


def dense_net(sizes: list[int], activation: type[nn.Module], seed: int) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    with rng.scoped(seed):
        for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            layers += [activation()] if i else []
            layers.append(nn.Linear(fan_in, fan_out))
    return nn.Sequential(*layers)


def settings_of(method: str) -> dict[str, Any]:
    """What the row of a method depends on besides the budget, for its kept parts."""
    if method == SEVERAL:
        return {"members": _MEMBERS, "longer": _LONGER, "solver": _ONE_CYCLE}
    return {"step_size": baselines.SWAG_STEP_SIZE} if method == "SWAG" else {}


def digits_settings_of(method: str) -> dict[str, Any]:
    """The same for the rows of the digits."""
    return {"prior_scale": _WIDE} if method == "one network" else {}


def _fitted(model: Network, budget: baselines.Budget, seed: int, *, solver: str = "adam", **options: Any) -> Tensor:
    """Fit a network in mean field with noise per example; return posterior draws."""
    posterior = fit(
        model, "mean_field", "elbo(estimator=example)", solver, batch_size=budget.batch, steps=budget.steps, draws=1,
        seed=seed, progress=False, **options,
    )  # fmt: skip
    draws: Tensor = posterior.draws(budget.draws)
    return draws


def regression_row(folder: Path, name: str, split: int, method: str, budget: baselines.Budget) -> dict[str, Any]:
    """One method on one split: error and minus the mean log density in the unit of the targets, size and time."""
    data = split_of(folder, name, split)
    start = time.perf_counter()
    if method == WHVI:
        found = _walsh_hadamard(data, budget, split)
    elif method == SEVERAL:
        found = _several(data, budget, split)
    else:
        found = BESIDE[method](data.x, data.y, data.x_test, budget, split)
    row = {"data": name, "split": split, "method": method, "parameters": found.parameters}
    return row | baselines.score(found, data.y_test, data.scale) | {"seconds": time.perf_counter() - start}


def _walsh_hadamard(data: Split, budget: baselines.Budget, seed: int, *, solver: str = "adam") -> baselines.Predicted:
    net = dense_net([data.x.shape[1], *budget.hidden, 1], nn.ReLU, seed)
    model = Network(net, "gaussian", (data.x, data.y[:, None]), "walsh_hadamard", seed=seed)
    return _whvi_prediction(model, _fitted(model, budget, seed, solver=solver), data.x_test)


def _several(data: Split, budget: baselines.Budget, split: int) -> baselines.Predicted:
    """The mixture, in equal parts, of posteriors that were fitted apart: each has its own diagonals and noise."""
    longer = dataclasses.replace(budget, steps=_LONGER * budget.steps)
    members = [_walsh_hadamard(data, longer, split + 1000 * k, solver=_ONE_CYCLE) for k in range(_MEMBERS)]
    return baselines.Predicted(
        torch.cat([member.mean for member in members]),
        torch.cat([member.sd for member in members]),
        sum(member.parameters for member in members),
    )


def _whvi_prediction(model: Network, draws: Tensor, x: Tensor) -> baselines.Predicted:
    prediction = model.predict(draws, x)
    mean = prediction.draws.squeeze(-1)
    # of a Gaussian likelihood with one noise for all data, the aleatoric part is its variance
    sd = prediction.aleatoric.sqrt().reshape(-1)[0].expand(len(mean))
    points = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return baselines.Predicted(mean, sd, 2 * model.dim + points)


def collapsed(folder: Path, name: str, budget: baselines.Budget) -> dict[str, float]:
    """The start with diagonals of 0.01 and a mean of zero, which ends at a constant; on the first split."""
    data = split_of(folder, name, 0)
    net = dense_net([data.x.shape[1], *budget.hidden, 1], nn.ReLU, 0)
    model = Network(net, "gaussian", (data.x, data.y[:, None]), "walsh_hadamard", seed=0)
    with torch.no_grad():
        for layer_name, parameter in model.named_parameters():
            if layer_name.endswith((".left", ".right")):
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=rng.generator(0, layer_name)))
    with warnings.catch_warnings():  # that this start goes nowhere is what is shown
        warnings.simplefilter("ignore", VifamilyWarning)
        draws = _fitted(model, budget, 0, init=torch.zeros(model.dim))
    found = _whvi_prediction(model, draws, data.x_test)
    constant = float((data.y_test - data.y.mean()).square().mean().sqrt()) * data.scale
    return baselines.score(found, data.y_test, data.scale) | {"constant": constant}


# -- digits ------------------------------------------------------------------------------------------------------------
def _digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    images, labels = torch.from_numpy(x[order] / 16.0).float(), torch.from_numpy(y[order]).long()
    cut = int(0.8 * len(y))
    return images[:cut], labels[:cut], images[cut:], labels[cut:]


def _convolutional(seed: int) -> nn.Sequential:
    with rng.scoped(seed):
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip


def classified(kind: str, method: str, budget: baselines.Budget, seed: int) -> dict[str, Any]:
    """One method on the 8x8 digits, four fifths for training: error rate, mean negative log score, ECE, size.

    Args:
        kind: ``"dense"`` (64-128-128-10) or ``"convolutional"``.
        method: ``"Walsh-Hadamard"``, ``"mean field"`` (both fitted here alike) or ``"one network"``, the mode under a
            prior that is wide enough for nearly maximum likelihood.
        budget: Steps and batch.
        seed: Root seed, of the split too.
    """
    x, y, x_test, y_test = _digits(seed)
    net = dense_net([64, 128, 128, 10], nn.ReLU, seed) if kind == "dense" else _convolutional(seed)
    start = time.perf_counter()
    if method == "one network":
        model = Network(net, "categorical", (x, y), "dense", prior_scale=_WIDE, seed=seed)
        options: dict[str, Any] = {"family": "ensemble(size=1)", "objective": "renyi_predictive(alpha=1)"}
    else:
        entry = "walsh_hadamard" if method == WHVI else "dense"
        model = Network(net, "categorical", (x, y), entry, seed=seed)
        each = method == WHVI and Capability.CHEAP_EXAMPLE_NOISE in model.capabilities  # convolutions share theirs
        noise = "example" if each else "reparameterised"
        options = {"family": "mean_field", "objective": f"elbo(estimator={noise})", "draws": 1}
    posterior = fit(model, batch_size=budget.batch, steps=budget.steps, solver="adam", seed=seed, progress=False,
                    **options)  # fmt: skip
    draws = 1 if method == "one network" else budget.draws
    found = model.predict(posterior.draws(draws), x_test).calibration(y_test)
    points = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = (1 if method == "one network" else 2) * model.dim + points
    return {
        "net": kind, "method": method, "seed": seed, "error": found["error_rate"], "nll": -found["log_score"],
        "ece": found["ece"], "parameters": size, "seconds": time.perf_counter() - start,
    }  # fmt: skip


# -- a curve -----------------------------------------------------------------------------------------------------------
class _Cosine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cos()


def toy_bands(budget: baselines.Budget, seed: int) -> dict[str, Tensor]:
    """A curve seen in two stretches, with noise of variance exp(-3): posterior mean and both parts of the spread.

    The layers are random features: cosines with phases drawn at random, as points of the model.

    Returns:
        ``x``, ``y`` (data), ``grid``, ``mean``, ``epistemic`` and ``total`` (standard deviations on the grid).
    """
    source = rng.generator(seed, "toy")
    half = torch.rand(64, generator=source)
    x = torch.cat([half[:32] * 0.8 - 1.0, half[32:] * 0.8 + 0.2])[:, None]
    y = torch.sin(4 * x) + 0.5 * x + math.exp(-1.5) * torch.randn(x.shape, generator=source)
    net = dense_net([1, *budget.hidden, 1], _Cosine, seed)
    with torch.no_grad():
        for layer in list(net)[:-1:2]:  # with phases of zero every draw of the weights has the same slope at zero
            if isinstance(layer, nn.Linear):
                layer.bias.copy_(2 * math.pi * torch.rand(layer.bias.shape, generator=source))
    # diagonals that are points would take up the spread of the prior: here they are latent
    model = Network(net, f"gaussian(sd={math.exp(-1.5)})", (x, y), "walsh_hadamard(scales=latent)", seed=seed)
    draws = _fitted(model, budget, seed)
    grid = torch.linspace(-3, 3, 301)[:, None]
    found = model.predict(draws, grid)
    return {
        "x": x[:, 0], "y": y[:, 0], "grid": grid[:, 0], "mean": found.mean[:, 0],
        "epistemic": found.epistemic.sqrt()[:, 0], "total": found.sd[:, 0],
    }  # fmt: skip
