"""Arc lengths of pairs whose optimal ROC curves are known: convergence, coverage, and the level and power of tests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import integrate, stats

from vifamily.numerics.arctangent_ratio import RIGHT_ANGLE, SHORTEST
from vifamily.numerics.kernel_angle import kernel_angle
from vifamily.numerics.kernels import median_bandwidth, square_distances
from vifamily.roc import ArcLengthRatio, arc_length, arc_length_from_angles, arc_length_test

__all__ = [
    "PAIRS",
    "SHIFTED",
    "convergence",
    "coverage",
    "efficiency",
    "efficiency_outside",
    "errors_of_table",
    "level",
    "outside_pairs",
    "power",
]

Array = NDArray[np.float64]
_NORMAL = stats.norm()
PAIRS: Mapping[str, tuple[Any, Any, float, float]] = {
    "N(0.25, 1), N(0, 1)": (stats.norm(0.25), _NORMAL, 1.424977, 0.570158),
    "N(0.5, 1), N(0, 1)": (stats.norm(0.5), _NORMAL, 1.454447, 0.638163),
    "N(1, 1), N(0, 1)": (stats.norm(1), _NORMAL, 1.546469, 0.760250),
    "N(1.5, 1), N(0, 1)": (stats.norm(1.5), _NORMAL, 1.652002, 0.855578),
    "N(2, 1), N(0, 1)": (stats.norm(2), _NORMAL, 1.749823, 0.921350),
    "N(3, 1), N(0, 1)": (stats.norm(3), _NORMAL, 1.891545, 0.983053),
    "N(4, 1), N(0, 1)": (stats.norm(4), _NORMAL, 1.962522, 0.997661),
    "N(0, 2), N(0, 1)": (stats.norm(0, 2), _NORMAL, 1.516167, 0.704833),
    "N(0, 3), N(0, 1)": (stats.norm(0, 3), _NORMAL, 1.607320, 0.795167),
    "N(1, 2), N(0, 1)": (stats.norm(1, 2), _NORMAL, 1.551719, 0.744084),
    "N(1, 0.5), N(0, 1)": (stats.norm(1, 0.5), _NORMAL, 1.646311, 0.831161),
    "N(2, 1.5), N(0, 1)": (stats.norm(2, 1.5), _NORMAL, 1.678423, 0.866559),
    "Cauchy(1), Cauchy(0)": (stats.cauchy(1), stats.cauchy(), 1.486230, 0.685600),
    "Cauchy(2), Cauchy(0)": (stats.cauchy(2), stats.cauchy(), 1.604263, 0.806436),
    "t3 + 1, t3": (stats.t(3, 1), stats.t(3), 1.512266, 0.717197),
    "t2, N(0, 1)": (stats.t(2), _NORMAL, 1.451521, 0.584986),
    "Cauchy, N(0, 1)": (stats.cauchy(), _NORMAL, 1.494297, 0.647408),
    "Laplace, N(0, 1)": (stats.laplace(), _NORMAL, 1.438165, 0.581378),
    "Exp(1/2), Exp(1)": (stats.expon(scale=2), stats.expon(), 1.478942857545, 2 / 3),
}
"""Positives, negatives, arc length and maximal AUC, by quadrature."""

SHIFTED = {0.0: SHORTEST, 0.25: 1.424977, 1.0: 1.546469, 2.0: 1.749823, 3.0: 1.891545}
"""Arc lengths of two normals a shift apart."""


def drawn(name: str, size: int, seed: int) -> tuple[Array, Array]:
    """Samples of a pair, ``(size, 1)`` each."""
    rng = np.random.default_rng(seed)
    positive, negative = (law.rvs(size=(size, 1), random_state=rng) for law in PAIRS[name][:2])
    return positive, negative


def errors_of_table(size: int, seed: int) -> list[dict[str, Any]]:
    """The estimate of every pair beside its value."""
    rows = []
    for name, (_, _, length, area) in PAIRS.items():
        found = arc_length(*drawn(name, size, seed), interval="wald", seed=seed)
        rows.append({
            "pair": name, "size": size, "length": length, "estimate": found.value, "error": found.standard_error,
            "off": (found.value - length) / found.standard_error, "auc": area, "auc_estimate": found.auc,
        })  # fmt: skip
    return rows


# -- beside the true ratio ---------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Outside:
    """A pair that no setting was chosen by.

    Attributes:
        draw: From a generator and a size to positives and negatives, ``(size, feature)``.
        log_ratio: log p / q of points.
        length: Arc length.
    """

    draw: Callable[[np.random.Generator, int], tuple[Array, Array]]
    log_ratio: Callable[[Array], Array]
    length: float


def _on_line(positive: Any, negative: Any) -> Outside:
    """A pair in one dimension; the length by quadrature over levels of both laws."""

    def at(level: float) -> float:
        # the mean over negatives and that over positives of sqrt(p^2 + q^2) / (p + q) sum to the length
        total = 0.0
        for law in (positive, negative):
            x = law.ppf(level)
            p, q = positive.pdf(x), negative.pdf(x)
            total += math.hypot(p, q) / float(p + q)
        return total

    length = integrate.quad(at, 0, 1, limit=400, epsabs=1e-9)[0]
    return Outside(
        lambda rng, n: (positive.rvs((n, 1), random_state=rng), negative.rvs((n, 1), random_state=rng)),
        lambda x: positive.logpdf(x[:, 0]) - negative.logpdf(x[:, 0]),
        length,
    )


def _scaled_normals(dim: int, scale: float, length: float) -> Outside:
    return Outside(
        lambda rng, n: (scale * rng.normal(size=(n, dim)), rng.normal(size=(n, dim))),
        lambda x: 0.5 * (1 - 1 / scale**2) * (x**2).sum(1) - dim * math.log(scale),
        length,
    )


def _moved_normals(dim: int) -> Outside:
    def draw(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        a, b = rng.normal(size=(n, dim)), rng.normal(size=(n, dim))
        a[:, 0] += 1
        return a, b

    return Outside(draw, lambda x: x[:, 0] - 0.5, SHIFTED[1.0])


def outside_pairs() -> dict[str, Outside]:
    """Pairs beyond the table: heavier tails, bounded and skewed laws, and several dimensions."""
    return {
        "Cauchy of scale 3, Cauchy": _on_line(stats.cauchy(scale=3), stats.cauchy()),
        "t1.5 + 3, t1.5": _on_line(stats.t(1.5, 3), stats.t(1.5)),
        "Gamma(3), Exp(1)": _on_line(stats.gamma(3), stats.expon()),
        "Beta(2, 5), uniform": _on_line(stats.beta(2, 5), stats.uniform()),
        "log-normals, shift 1": _on_line(stats.lognorm(1, scale=math.e), stats.lognorm(1)),
        "N(1, 1), two dimensions": _moved_normals(2),
        "scale 1.5, two dimensions": _scaled_normals(2, 1.5, 1.497840),
        "N(1, 1), five dimensions": _moved_normals(5),
        "scale 1.5, five dimensions": _scaled_normals(5, 1.5, 1.595039),
    }


def _beside(off: list[tuple[float, float]]) -> dict[str, float]:
    both = np.array(off)
    mine, oracle = np.sqrt(np.mean(both**2, axis=0)).tolist()
    bias = float((both[:, 0] - both[:, 1]).mean())
    return {"repeats": len(off), "rmse": mine, "oracle": oracle, "ratio": mine / oracle, "bias": bias}


def efficiency(size: int, repeats: int, seed: int) -> list[dict[str, Any]]:
    """Root mean squared errors of the estimate and of the means at the true ratio, on the same draws.

    The bias is the mean difference of the two, of which the second has none.
    """
    rows = []
    for name, (positive, negative, length, _) in PAIRS.items():
        off = []
        for k in range(repeats):
            a, b = drawn(name, size, seed + k)
            u = (np.arctan2(positive.pdf(x[:, 0]), negative.pdf(x[:, 0])) for x in (a, b))
            truth = arc_length_from_angles(*u).value
            off.append((arc_length(a, b, seed=seed + k).value - length, truth - length))
        rows.append({"pair": name, "size": size, **_beside(off)})
    return rows


def efficiency_outside(size: int, repeats: int, seed: int) -> list[dict[str, Any]]:
    """The same on pairs beyond the table."""
    rows = []
    for name, pair in outside_pairs().items():
        off = []
        for k in range(repeats):
            a, b = pair.draw(np.random.default_rng(seed + k), size)
            truth = arc_length_from_angles(*(np.arctan(np.exp(np.minimum(pair.log_ratio(x), 700))) for x in (a, b)))
            off.append((arc_length(a, b, seed=seed + k).value - pair.length, truth.value - pair.length))
        rows.append({"pair": name, "size": size, **_beside(off)})
    return rows


def _shifted(dim: int, size: int, seed: int, shift: float = 1.0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(size, dim)), rng.normal(size=(size, dim))
    a[:, 0] += shift
    return a, b


def convergence(dim: int, sizes: tuple[int, ...], repeats: int, seed: int) -> list[dict[str, Any]]:
    """Errors of the angle in the mean square, and of the length, for two normals a unit apart."""
    rows = []
    for size in sizes:
        angle, length = [], []
        for k in range(repeats):
            a, b = _shifted(dim, size, seed + k)
            # more centres with more points, so that the kernel's reach grows
            centers = int(min(400, max(100, 4 * math.sqrt(size))))
            fitted = kernel_angle(a, b, np.random.default_rng(k), num_centers=centers)
            off = [
                np.clip(fitted(x), 0, RIGHT_ANGLE) - np.arctan(np.exp(x[:, 0] - 0.5))
                for x in _shifted(dim, 20_000, 10_000 + k)
            ]
            # the norm of L2(sqrt(p^2 + q^2)) by the even mixture of fresh points, within a factor of sqrt(2)
            angle.append(math.sqrt(np.mean([np.mean(o**2) for o in off])))
            ratio = ArcLengthRatio(num_centers=centers)
            length.append(arc_length(a, b, ratio=ratio, interval="wald", seed=k).value - SHIFTED[1.0])
        rmse = float(np.sqrt(np.mean(np.square(length))))
        rows.append({
            "dim": dim, "size": size, "angle": float(np.mean(angle)), "length": rmse,
            "angle_error": float(np.std(angle) / math.sqrt(repeats)),
        })  # fmt: skip
    return rows


def coverage(shift: float, size: int, repeats: int, seed: int) -> dict[str, Any]:
    """How often intervals and bounds of two normals a shift apart hold: the default interval, and that of Wald."""
    length, area = SHIFTED[shift], float(stats.norm.cdf(shift / math.sqrt(2)))
    held = []
    for k in range(repeats):
        found = arc_length(*_shifted(1, size, seed + k, shift), seed=k)
        width = float(stats.norm.ppf(0.975)) * found.standard_error
        wald = np.clip((found.value - width, found.value + width), SHORTEST, 2.0)
        held.append((
            *(low <= length + 1e-12 and length - 1e-12 <= high for low, high in (found.interval, wald)),
            found.lower_bound <= length + 1e-12, found.auc_lower_bound <= area + 1e-12,
        ))  # fmt: skip
    two, plain, one, auc = np.mean(held, axis=0)
    return {
        "shift": shift, "size": size, "repeats": repeats, "interval": float(two), "wald": float(plain),
        "lower_bound": float(one), "auc_lower_bound": float(auc),
    }  # fmt: skip


def level(size: int, repeats: int, seed: int, permutations: int = 19) -> dict[str, Any]:
    """How often the permutation test rejects at 5 % where both samples are normal."""
    rejected = [
        arc_length_test(*_shifted(1, size, seed + k, 0.0), num_permutations=permutations, seed=k).p_value <= 0.05
        for k in range(repeats)
    ]
    return {"size": size, "repeats": repeats, "permutations": permutations, "level": float(np.mean(rejected))}


# -- tests -------------------------------------------------------------------------------------------------------------
def _mmd_p_value(a: Array, b: Array, permutations: int, seed: int) -> float:
    """Permutation p-value of the maximum mean discrepancy with the median heuristic, on all points."""
    both = torch.from_numpy(np.concatenate([a, b]))
    width = median_bandwidth(torch.from_numpy(a), torch.from_numpy(b))
    gram = torch.exp(-square_distances(both, both) / (2 * width**2)).numpy()
    rng, first = np.random.default_rng(seed), np.repeat([1 / len(a), -1 / len(b)], [len(a), len(b)])
    signs = np.stack([first, *(first[rng.permutation(len(first))] for _ in range(permutations))])
    values = ((signs @ gram) * signs).sum(1)
    return float((1 + (values[1:] >= values[0] - 1e-12).sum()) / (1 + permutations))


ALTERNATIVES: Mapping[str, Callable[[int], tuple[Array, Array]]] = {
    "equal, two dimensions, 100 points": lambda seed: _shifted(2, 100, seed, 0.0),
    "shift 0.3, two dimensions, 200 points": lambda seed: _shifted(2, 200, seed, 0.3),
    "scale 1.3, two dimensions, 200 points": lambda seed: _scaled(2, 200, seed, 1.3),
    "shift 0.3, ten dimensions, 400 points": lambda seed: _shifted(10, 400, seed, 0.3),
    "scale 1.2, five dimensions, 400 points": lambda seed: _scaled(5, 400, seed, 1.2),
}


def _scaled(dim: int, size: int, seed: int, scale: float) -> tuple[Array, Array]:
    a, b = _shifted(dim, size, seed, 0.0)
    return scale * a, b


def power(name: str, repeats: int, seed: int, permutations: int = 99) -> dict[str, Any]:
    """Shares of rejections at 5 % of four tests on the same samples; the first three hold half of the points out."""
    rejected = []
    for k in range(repeats):
        a, b = ALTERNATIVES[name](seed + k)
        p_values = [
            arc_length_test(a, b, statistic=s, num_permutations=permutations, seed=k).p_value
            for s in ("arc_length", "auc", "accuracy")
        ]
        rejected.append([p <= 0.05 for p in (*p_values, _mmd_p_value(a, b, permutations, k))])
    shares = np.mean(rejected, axis=0)
    return {
        "setting": name,
        "repeats": repeats,
        **dict(zip(("arc_length", "auc", "accuracy", "mmd"), shares.tolist(), strict=True)),
    }
