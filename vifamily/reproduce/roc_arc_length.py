"""The arc length of the optimal ROC curve (Liu 2022), its findings run again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from vifamily.plots._style import ACCENT, GREY, INK, LABEL_SIZE, POSTERIOR, REFERENCE, dress, new_figure
from vifamily.reproduce._report import Claim, Options, Paper, Reproduction
from vifamily.reproduce._roc_arc_length_curves import (
    ALTERNATIVES,
    PAIRS,
    convergence,
    coverage,
    efficiency,
    efficiency_outside,
    errors_of_table,
    level,
    power,
)
from vifamily.reproduce._roc_arc_length_imbalance import METHODS, TASKS, method_aucs
from vifamily.reproduce._roc_arc_length_libauc import LIBAUC, libauc_rows

__all__ = ["PAPER"]

_OF_PAIRS = ("pairwise logistic", "pairwise squared hinge", "AUC margin")
_FRACTIONS = (0.01, 0.05, 0.1)
Rows = list[dict[str, Any]]


def run(options: Options) -> Reproduction:
    """Run the paper's findings again.

    Args:
        options: ``quick`` takes fewer repetitions, smaller samples and three seeds of the imbalanced tasks.
    """
    claims, tables = _lengths(options)
    rates, rows = _rates(options)
    claims += rates
    inference, more = _inference(options)
    claims += inference
    imbalance, aucs = _imbalance(options)
    claims += imbalance
    figures = {"convergence": _rate_figure(rows), "imbalance": _imbalance_figure(aucs)}
    return Reproduction(claims, figures, {**tables, "convergence": rows, **more, "imbalance": aucs})


# -- the length --------------------------------------------------------------------------------------------------------
def _lengths(options: Options) -> tuple[list[Claim], dict[str, Rows]]:
    size = 2000 if options.quick else 10_000
    table = options.rows(
        f"{len(PAIRS)} pairs at {size} points of each class",
        functools.partial(errors_of_table, size, options.seed), seed=options.seed,
    )  # fmt: skip
    worst = max(table, key=lambda row: abs(row["off"]))
    rows: Rows = []
    full = not options.quick
    for n, repeats in [(1000, 4)] if options.quick else [(1000, 60), (10_000, 30)]:
        rows += options.rows(
            f"estimate beside the true ratio at {n} points, {repeats} repetitions",
            functools.partial(efficiency, n, repeats, options.seed), seed=options.seed,
        )  # fmt: skip
    repeats = 4 if options.quick else 30
    beyond = options.rows(
        f"estimate beside the true ratio on pairs beyond the table, {repeats} repetitions",
        functools.partial(efficiency_outside, 1000, repeats, options.seed), seed=options.seed,
    )  # fmt: skip
    claims = [
        Claim(
            "The arc length is an f-divergence, the largest value of a variational objective", "stated",
            f"{len(PAIRS)} pairs: at most {abs(worst['off']):.1f} standard errors from quadrature ({worst['pair']})",
            None, abs(worst["off"]) < 5, f"{size} points of each class; every estimate within five standard errors",
        ),
        *(
            _as_good(f"{len(PAIRS)} pairs at {n} points", [row for row in rows if row["size"] == n], judged=full)
            for n in dict.fromkeys(row["size"] for row in rows)
        ),
        _as_good(f"{len(beyond)} further pairs at 1000 points, in up to five dimensions", beyond, judged=False),
    ]  # fmt: skip
    return claims, {"lengths": table, "efficiency": rows, "efficiency_outside": beyond}


def _as_good(what: str, rows: Rows, *, judged: bool) -> Claim:
    """How the root mean squared error compares with that at the true ratio."""
    ratios = [row["ratio"] for row in rows]
    most = rows[int(np.argmax(ratios))]
    within = sum(ratio <= 1.25 for ratio in ratios)
    return Claim(
        f"Beyond the paper: the cross-fitted length is as good as if the ratio were known; {what}", None,
        f"root mean squared error over that at the true ratio: median {np.median(ratios):.2f}, "
        f"largest {max(ratios):.2f} ({most['pair']})",
        None, within == len(rows) if judged else None,
        f"{rows[0]['repeats']} repetitions on the same draws; {within} of {len(rows)} at most 1.25"
        + ("" if judged else "; reported, not judged"),
    )  # fmt: skip


def _rates(options: Options) -> tuple[list[Claim], Rows]:
    sizes, repeats = ((100, 316, 1000), 5) if options.quick else ((100, 316, 1000, 3162, 10_000), 10)
    rows, claims = [], []
    for dim in (1, 2, 5):
        mine = options.rows(
            f"convergence in {dim} dimensions",
            functools.partial(convergence, dim, sizes, repeats, options.seed),
            sizes=sizes, repeats=repeats, seed=options.seed,
        )  # fmt: skip
        rows += mine
        logs = np.log([row["size"] for row in mine])
        slope = {key: float(np.polyfit(logs, np.log([row[key] for row in mine]), 1)[0]) for key in ("angle", "length")}
        # the least-squares slope is linear in the logarithms, whose errors are relative ones
        weight = (logs - logs.mean()) / ((logs - logs.mean()) ** 2).sum()
        error = float(np.sqrt(((weight * [row["angle_error"] / row["angle"] for row in mine]) ** 2).sum()))
        claims.append(Claim(
            f"The arctangent ratio converges as n to the -beta/4, beta at most 1; two normals in {dim} dimensions",
            "-0.25 at beta = 1", slope["angle"], error, slope["angle"] < -0.25 + 3 * error if dim == 1 else None,
            f"slope of log error on log n, {sizes[0]} to {sizes[-1]} points; length: {slope['length']:.2f}"
            + ("" if dim == 1 else "; beta is not known here: reported, not judged"),
        ))  # fmt: skip
    return claims, rows


# -- intervals and tests -----------------------------------------------------------------------------------------------
def _binomial(share: float, repeats: int, nominal: float) -> bool:
    """Whether a share is at least the lower end of the 99 % binomial interval about its nominal level."""
    return bool(round(share * repeats) >= stats.binom.ppf(0.005, repeats, nominal))


def _consistent(share: float, repeats: int, nominal: float) -> bool:
    """Whether a share is within the two-sided 99 % binomial interval of its nominal level."""
    low, high = stats.binom.ppf([0.005, 0.995], repeats, nominal)
    return bool(low <= round(share * repeats) <= high)


def _inference(options: Options) -> tuple[list[Claim], dict[str, Rows]]:
    repeats = 50 if options.quick else 1000
    rows = []
    for shift in (0.0, 0.25, 1.0, 2.0, 3.0):
        rows.append(options.row(
            f"coverage at a shift of {shift:g}, {repeats} repetitions",
            functools.partial(coverage, shift, 200, repeats, options.seed), seed=options.seed,
        ))  # fmt: skip
    equal = options.row(
        f"level of the test at equality, {repeats} repetitions",
        functools.partial(level, 50, repeats, options.seed), seed=options.seed,
    )  # fmt: skip
    apart, near = ([row for row in rows if (row["shift"] >= 1) == far] for far in (True, False))
    each = 20 if options.quick else 200
    tested = [
        options.row(f"tests: {name}", functools.partial(power, name, each, options.seed), each=each, seed=options.seed)
        for name in ALTERNATIVES
    ]
    shares = "; ".join(
        f"{row['setting']}: {row['arc_length']:.2f}, {row['auc']:.2f}, {row['accuracy']:.2f}, {row['mmd']:.2f}"
        for row in tested
    )
    claims = [
        Claim(
            "Beyond the paper: 95 % intervals of separated pairs", None,
            ", ".join(f"shift {row['shift']:g}: {row['interval']:.3f}" for row in apart), None,
            all(_consistent(row["interval"], row["repeats"], 0.95) for row in apart),
            f"200 points of each class, {repeats} repetitions; consistent with 95 % by a 99 % binomial interval. "
            "Wald's: " + ", ".join(f"{row['wald']:.3f}" for row in apart),
        ),
        Claim(
            "Beyond the paper: one-sided 95 % bounds of the length, everywhere", None,
            ", ".join(f"shift {row['shift']:g}: {row['lower_bound']:.3f}" for row in rows), None,
            all(_binomial(row["lower_bound"], row["repeats"], 0.95) for row in rows), "the same runs and rule",
        ),
        Claim(
            "Beyond the paper: one-sided 95 % bounds of the maximal AUC, everywhere", None,
            ", ".join(f"shift {row['shift']:g}: {row['auc_lower_bound']:.3f}" for row in rows), None,
            all(_binomial(row["auc_lower_bound"], row["repeats"], 0.95) for row in rows), "the same runs and rule",
        ),
        Claim(
            "Beyond the paper: 95 % intervals at and near equality", None,
            ", ".join(f"shift {row['shift']:g}: {row['interval']:.3f}" for row in near), None,
            all(_binomial(row["interval"], row["repeats"], 0.95) for row in near),
            "not below 95 % by the same rule. Wald's: " + ", ".join(f"{row['wald']:.3f}" for row in near),
        ),
        Claim(
            "Beyond the paper: the permutation test keeps its level of 5 %", None, equal["level"],
            math.sqrt(0.05 * 0.95 / repeats), _consistent(equal["level"], repeats, 0.05),
            f"two equal normals, {equal['size']} points of each, {equal['permutations']} permutations, {repeats} "
            "repetitions; consistent with 5 % by a 99 % binomial interval",
        ),
        Claim(
            "Beyond the paper: power beside other tests (arc length, AUC, accuracy, MMD)", None, shares, None, None,
            "level 5 %; the first three fit on half of the points, MMD uses all of them: reported, not judged",
        ),
    ]  # fmt: skip
    return claims, {"coverage": rows, "level": [equal], "tests": tested}


# -- imbalanced classes ------------------------------------------------------------------------------------------------
def _imbalance(options: Options) -> tuple[list[Claim], Rows]:
    seeds = range(options.seed, options.seed + (3 if options.quick else 10))
    steps = 300 if options.quick else 2000
    rows: Rows = []
    for task, make in TASKS.items():
        for fraction in _FRACTIONS:
            for seed in seeds:
                found = options.row(
                    f"{task} with {fraction:.0%} of positives, seed {seed}",
                    functools.partial(_aucs, make, fraction, seed, steps), steps=steps,
                )  # fmt: skip
                rows += [
                    {"task": task, "fraction": fraction, "seed": seed, "method": m, "auc": found[m]} for m in METHODS
                ]
    mean = {m: float(np.mean([row["auc"] for row in rows if row["method"] == m])) for m in METHODS}
    best = max(_OF_PAIRS, key=mean.__getitem__)
    by_pair, by_pair_error = _gap(rows, "two steps, tanh", best)
    gain, gain_error = _gap(rows, "two steps, tanh", "arc length alone")
    entropy, entropy_error = _gap(rows, "two steps, tanh", "cross-entropy")
    setting = f"{len(TASKS)} tasks, positives at 1, 5 and 10 %, {len(seeds)} paired seeds"
    claims = [
        Claim(
            "Beyond the paper: the second step ranks no worse than the first alone", None, gain, gain_error,
            gain > -2 * gain_error,
            f"difference of mean AUC, {setting}; not below zero by two standard errors; the tanh form, derived here",
        ),
        Claim(
            "Two steps reach a good AUC on imbalanced classes", "CIFAR-10; its tasks and numbers are not given here",
            f"mean AUC {mean['two steps, tanh']:.4f}; cross-entropy {mean['cross-entropy']:.4f}, a difference of "
            f"{entropy:+.4f} ± {entropy_error:.4f}; {best} {mean[best]:.4f}, a difference of {by_pair:+.4f} ± "
            f"{by_pair_error:.4f}",
            None, entropy > -2 * entropy_error,
            f"{setting}; not below cross-entropy by two standard errors. Against the best loss of pairs: "
            + _verdict(by_pair, by_pair_error),
        ),
    ]  # fmt: skip
    theirs, missing = libauc_rows(_FRACTIONS, seeds, options, max_iter=steps)
    return [*claims, _beside_libauc(rows + theirs, setting, missing)], rows + theirs


def _aucs(make: Callable[..., Any], fraction: float, seed: int, steps: int) -> dict[str, float]:
    return method_aucs(make(fraction, seed), seed, max_iter=steps)


def _beside_libauc(rows: Rows, setting: str, missing: str) -> Claim:
    """LibAUC beside the methods of this package; said, not judged."""
    what = "Beside LibAUC 2.0.1: its AUC-margin loss with its optimiser PESG"
    if missing:
        return Claim(what, None, None, None, None, f"{missing}; the AUC-margin loss is among the losses of pairs above")
    parts = [f"mean AUC {np.mean([row['auc'] for row in rows if row['method'] == LIBAUC]):.4f}"]
    for method in ("AUC margin", "two steps, tanh"):
        gap, error = _gap(rows, method, LIBAUC)
        parts.append(f"{method} minus that: {gap:+.4f} ± {error:.4f}")
    return Claim(
        what, None, "; ".join(parts), None, None,
        f"{setting}; the same splits, network, start and number of steps, its own step sizes: reported, not judged",
    )  # fmt: skip


def _gap(rows: Rows, one: str, other: str) -> tuple[float, float]:
    """Mean paired difference of AUC and its standard error, with tasks and fractions as strata of paired seeds."""
    strata: dict[tuple[str, float], dict[tuple[int, str], float]] = {}
    for row in rows:
        strata.setdefault((row["task"], row["fraction"]), {})[row["seed"], row["method"]] = row["auc"]
    off = [[v - auc[seed, other] for (seed, method), v in auc.items() if method == one] for auc in strata.values()]
    variance = sum(float(np.var(each, ddof=1)) / len(each) for each in off) / len(off) ** 2
    return float(np.mean([np.mean(each) for each in off])), math.sqrt(variance)


def _verdict(gap: float, error: float) -> str:
    if abs(gap) <= 2 * error:
        return "level with it"
    return "better than it" if gap > 0 else "worse than it"


# -- pictures ----------------------------------------------------------------------------------------------------------
def _rate_figure(rows: Sequence[dict[str, Any]]) -> Any:
    figure = new_figure(8.6, 3.8)
    for axes, key, label, slope in zip(
        figure.subplots(1, 2), ("angle", "length"), ("error of the angle", "error of the arc length"), (-0.25, -0.5),
        strict=True,
    ):  # fmt: skip
        for dim, colour in ((1, POSTERIOR), (2, ACCENT), (5, REFERENCE)):
            mine = [row for row in rows if row["dim"] == dim]
            n = np.array([row["size"] for row in mine], dtype=float)
            unit = "dimension" if dim == 1 else "dimensions"
            axes.loglog(n, [row[key] for row in mine], color=colour, marker="o", markersize=4, label=f"{dim} {unit}")
        start = max(row[key] for row in rows if row["size"] == n[0])
        axes.loglog(n, 1.1 * start * (n / n[0]) ** slope, color=GREY, linestyle=(0, (4, 3)), label=f"slope {slope:g}")
        axes.set_xlabel("points of each class", fontsize=LABEL_SIZE, color=INK)
        axes.set_ylabel(label, fontsize=LABEL_SIZE, color=INK)
        axes.legend(frameon=False, fontsize=LABEL_SIZE, labelcolor=INK, loc="lower left")
        dress(axes)
    return figure


def _imbalance_figure(rows: Sequence[dict[str, Any]]) -> Any:
    figure = new_figure(9.6, 3.8)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axes, task in zip(figure.subplots(1, len(TASKS), sharey=False), TASKS, strict=True):
        for k, fraction in enumerate(_FRACTIONS):
            at = [
                np.array([r["auc"] for r in rows if (r["task"], r["fraction"], r["method"]) == (task, fraction, m)])
                for m in methods
            ]
            where = np.arange(len(methods)) + 0.2 * (k - 1)
            spread = [a.std(ddof=1) / math.sqrt(len(a)) for a in at]
            colour, label = (POSTERIOR, ACCENT, REFERENCE)[k], f"{fraction:.0%} positives"
            axes.errorbar([a.mean() for a in at], where, xerr=spread, fmt="o", markersize=4, color=colour, label=label)
        axes.set_yticks(range(len(methods)), methods if task == next(iter(TASKS)) else [""] * len(methods))
        axes.set_xlabel(f"AUC, {task}", fontsize=LABEL_SIZE, color=INK)
        axes.invert_yaxis()
        ticks = axes.get_yticks()
        dress(axes)
        axes.set_yticks(ticks, methods if task == next(iter(TASKS)) else [""] * len(methods))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=LABEL_SIZE)
    return figure


PAPER = Paper(
    "Estimating the Arc Length of the Optimal ROC Curve and Lower Bounding the Maximal AUC",
    "Liu, NeurIPS 2022, arXiv 2110.09651",
    run,
)
