"""Walsh-Hadamard variational inference (Rossi, Marmin and Filippone 2020), its findings run again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vifamily.errors import ReferenceDataError
from vifamily.fit import fit
from vifamily.models import Network
from vifamily.numerics.walsh_hadamard import walsh_covariance, walsh_matrix, walsh_product
from vifamily.problems._folder import reference_root
from vifamily.reproduce._report import Claim, Options, Paper, Reproduction
from vifamily.rng import generator, scoped
from vifamily.weights import convert

__all__ = ["PAPER"]

_PUBLISHED = {"yacht": (0.69, 1.80), "energy": (0.58, 2.00), "concrete": (4.70, 3.17)}
"""Root mean squared error and mean negative log likelihood over eight splits."""
_WIDTH = 128
_DRAWS = 64
_NOT_HERE = "needs training runs of days on images"


def run(options: Options) -> Reproduction:
    """Run the paper's findings again.

    Args:
        options: ``quick`` takes one data set, one split and fewer steps. ``data`` is the folder with the npz files;
            None looks in ``uci`` where ``VIFAMILY_REFERENCE_DATA`` points, or beside the checkout.
    """
    claims = [*algebra(options), noise(options), parameters()]
    regressions, rows = _regressions(options)
    claims += regressions
    claims.append(
        Claim(
            "Convolutional networks with few parameters keep up on CIFAR10", "figure only", None, None, None, _NOT_HERE
        )
    )
    return Reproduction(claims, tables={"regression": rows})


# -- algebra -----------------------------------------------------------------------------------------------------------
def algebra(options: Options) -> list[Claim]:
    """Product against matrix, and the rank of the covariance of the weights."""
    options.say("products and covariances")
    source = generator(options.seed, "whvi/algebra")
    a, g, b, x = torch.randn(4, 512, generator=source, dtype=torch.float64).unbind()
    wanted = walsh_matrix(a, g, b) @ x
    off = float((walsh_product(x, a, g, b) - wanted).abs().max() / wanted.abs().max())
    covariance = walsh_covariance(a[:8], g[:8].exp(), b[:8]).reshape(64, 64)
    rank = int(torch.linalg.matrix_rank(covariance, hermitian=True))
    return [
        Claim(
            "Products with the weights take O(D log D) and no matrix", "stated", off, None, off < 1e-12,
            "largest relative difference from the product with the matrix at D = 512, below 1e-12",
        ),
        Claim(
            "D random numbers make D^2 dependent weights", "stated", f"rank {rank} of 64 at D = 8", None, rank == 8,
            "rank of the covariance of the weights equal to D",
        ),
    ]  # fmt: skip


def noise(options: Options) -> Claim:
    """Variance of the gradient with a draw for each datum, beside one draw for all."""
    options.say("noise for each datum")
    source = generator(options.seed, "whvi/noise")
    with scoped(source):
        layer = convert(nn.Linear(_WIDTH, _WIDTH, bias=False).double(), "walsh_hadamard", seed=options.seed)
    x, y = torch.randn(2, 64, _WIDTH, generator=source, dtype=torch.float64).unbind()
    layer.settle(x)
    mean = layer.initial(source)[0].requires_grad_()
    count = 100 if options.quick else 400
    spread = {}
    for each in (False, True):
        shape = (1, 64, layer.dim) if each else (1, layer.dim)
        found = []
        for _ in range(count):
            z = mean + 0.1 * torch.randn(shape, generator=source, dtype=torch.float64)
            found.append(torch.autograd.grad((torch.relu(layer(x, z)) - y).square().mean(), mean)[0])
        spread[each] = float(torch.stack(found).var(0).mean())
    ratio = spread[False] / spread[True]
    return Claim(
        "Local reparameterisation lowers the variance of gradients", "stated", f"{ratio:.1f} times lower", None,
        ratio > 4,
        "one layer of 128, 64 data, a draw for each; more than four times. One draw for all is sampling of weights",
    )  # fmt: skip


def parameters() -> Claim:
    """Parameters of a network with two hidden layers."""
    report = convert(_net(1), "walsh_hadamard(bias=gaussian)").report
    numbers = 2 * report.latent + report.point
    dense = 2 * report.parameters
    return Claim(
        "A network 1-128-128-1 takes few parameters", "1541", numbers, None, numbers < dense / 10,
        f"less than a tenth of the {dense} of mean field; the paper's thin layers are laid out otherwise",
    )  # fmt: skip


# -- regression --------------------------------------------------------------------------------------------------------
def _regressions(options: Options) -> tuple[list[Claim], list[dict[str, Any]]]:
    names = ("yacht",) if options.quick else tuple(_PUBLISHED)
    splits, steps = ((0,), 400) if options.quick else ((0, 1), 6000)
    try:
        data = {name: _read(options.data, name) for name in names}
    except ReferenceDataError as error:
        what = "Errors and log likelihoods on UCI regressions"
        return [Claim(what, "table", None, None, None, f"no data: {error}")], []
    rows = []
    for name in names:
        for split in splits:
            options.say(f"{name}, split {split}")
            rows.append({"data": name, "split": split, "start": "usual"} | regression(data[name], split, steps))
    options.say("from a start near zero")
    near: dict[str, Any] = {"data": names[0], "split": 0, "start": "near zero"} | regression(
        data[names[0]], 0, steps, collapsed=True
    )
    claims = [_compared(name, [row for row in rows if row["data"] == name], options) for name in names]
    failed = near["rmse"] > 0.9 * near["spread"]
    claims.append(
        Claim(
            "Beyond the paper: from diagonals of a hundredth and means of zero the fit stays at the mean prediction",
            None,
            f"{names[0]}: RMSE {near['rmse']:.2f}, targets' sd {near['spread']:.2f}", None, failed,
            "RMSE above nine tenths of the standard deviation of the targets",
        )
    )  # fmt: skip
    return claims, [*rows, near]


def _compared(name: str, rows: list[dict[str, Any]], options: Options) -> Claim:
    rmse, score = (np.array([row[key] for row in rows]) for key in ("rmse", "mnll"))
    published = _PUBLISHED[name]
    error = float(rmse.std(ddof=1) / math.sqrt(len(rmse))) if len(rmse) > 1 else None
    holds = None if options.quick else bool(rmse.mean() <= published[0] and score.mean() <= published[1])
    reason = "both means at most the published ones" if holds is not None else "too few steps to judge"
    text = f"{rmse.mean():.3g}, {score.mean():.3g}" + ("" if error is None else f" (RMSE ± {error:.2g})")
    return Claim(
        f"{name}: RMSE and mean negative log likelihood", f"{published[0]}, {published[1]} (8 splits)",
        f"{text}, {len(rows)} splits", None, holds, reason,
    )  # fmt: skip


def _read(folder: Path | None, name: str) -> dict[str, Any]:
    path = (reference_root() / "uci" if folder is None else folder) / f"{name}.npz"
    if not path.is_file():
        raise ReferenceDataError(f"there is no file {path}.")
    with np.load(path) as found:
        return {key: found[key] for key in ("X", "y", "test_index")}


def _net(inputs: int) -> nn.Sequential:
    """Two hidden layers of rectifiers, as in the paper."""
    with scoped(generator(0, "whvi/net")):  # replaced by the weights of the fit, all but their shapes
        return nn.Sequential(
            nn.Linear(inputs, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 1)
        )  # fmt: skip


def regression(data: dict[str, Any], split: int, steps: int, *, collapsed: bool = False) -> dict[str, float]:
    """Fit one split; errors are in the units of the data.

    Args:
        data: ``X``, ``y`` and ``test_index``.
        split: Number of the split.
        steps: Steps of Adam.
        collapsed: Whether to begin with diagonals of a hundredth and means of zero.

    Returns:
        ``rmse``, ``mnll`` and ``spread``, the standard deviation of the test targets.
    """
    test = np.zeros(len(data["y"]), dtype=bool)
    test[data["test_index"][split]] = True
    x, y = (torch.as_tensor(np.asarray(data[key], dtype=np.float64).reshape(len(test), -1)) for key in ("X", "y"))
    inside, outside = torch.from_numpy(~test), torch.from_numpy(test)
    centre, unit = y[inside].mean(), y[inside].std()
    scaled, targets = _standard(x, inside).float(), ((y - centre) / unit).float()
    model = Network(
        _net(x.shape[1]), "gaussian", data=(scaled[inside], targets[inside]), weights="walsh_hadamard", seed=split
    )
    init: Any = "auto"
    if collapsed:
        init = torch.zeros(model.dim)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if key.endswith((".left", ".right")):
                    value.copy_(0.01 * value.sign())
    posterior: Any = fit(
        model, "mean_field", "elbo", "adam", seed=split, steps=steps, batch_size=64, progress=False, init=init
    )
    prediction = posterior.model.predict(posterior.draws(_DRAWS), scaled[outside])
    score = prediction.log_score(targets[outside]).mean() - unit.log()
    error = (prediction.mean - targets[outside]).double() * unit
    return {
        "rmse": float(error.square().mean().sqrt()),
        "mnll": -float(score),
        "spread": float(y[outside].std(correction=0)),
    }


def _standard(x: Tensor, inside: Tensor) -> Tensor:
    sd = x[inside].std(0)
    return (x - x[inside].mean(0)) / torch.where(sd > 0, sd, torch.ones_like(sd))


PAPER = Paper(
    title="Walsh-Hadamard Variational Inference for Bayesian Deep Learning (Rossi, Marmin and Filippone 2020)",
    source="arXiv 1905.11248",
    run=run,
)
