"""The reproduction of the arc length of the optimal ROC curve: its pieces, short."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from vifamily.reproduce import _roc_arc_length_curves as curves
from vifamily.reproduce import _roc_arc_length_imbalance as tasks
from vifamily.reproduce import paper_named
from vifamily.reproduce.roc_arc_length import _as_good, _consistent, _gap, _imbalance_figure, _rate_figure


def test_the_paper_is_found():
    assert "Arc Length of the Optimal ROC" in paper_named("roc-arc-length").title


def test_losses_of_pairs_by_hand(generator):
    a, b = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (5, 4))
    ones = torch.ones(5, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    gap = [float(x - y) for x in a for y in b]
    logistic = np.mean([math.log1p(math.exp(-d)) for d in gap])
    hinge = np.mean([max(1 - d, 0) ** 2 for d in gap])
    assert float(tasks.pairwise_logistic(a, b, *ones)) == pytest.approx(logistic, abs=1e-12)
    assert float(tasks.pairwise_hinge(a, b, *ones)) == pytest.approx(hinge, abs=1e-12)
    # the inner maximum over alpha >= 0 of 2 alpha (1 + m' - m) - alpha^2, by a grid
    alpha = np.linspace(0, 10, 100_001)
    inner = (2 * alpha * (1 + float(b.mean() - a.mean())) - alpha**2).max()
    variances = float(a.var(correction=0) + b.var(correction=0))
    assert float(tasks.auc_margin(a, b, *ones)) == pytest.approx(variances + inner, abs=1e-6)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_positives_are_as_rare_as_asked(name, seed):
    split = tasks.TASKS[name](0.05, seed)
    assert len(split.pos) / (len(split.pos) + len(split.neg)) == pytest.approx(0.05, abs=0.005)
    both = {row.tobytes() for row in split.pos} & {row.tobytes() for row in split.test_pos}
    assert not both


def test_every_method_is_judged_and_the_picture_is_drawn(seed):
    rows = []
    for k in range(2):
        found = tasks.method_aucs(tasks.TASKS["breast cancer"](0.1, seed + k), seed + k, max_iter=20)
        assert tuple(found) == tasks.METHODS
        assert min(found.values()) > 0.7
        rows += [
            {"task": task, "fraction": f, "seed": k, "method": m, "auc": found[m]}
            for task in tasks.TASKS for f in (0.01, 0.05, 0.1) for m in tasks.METHODS
        ]  # fmt: skip
    gap, error = _gap(rows, "two steps, tanh", "arc length alone")
    assert abs(gap) < 0.3
    assert error >= 0
    assert len(_imbalance_figure(rows).axes) == 3


def test_convergence_and_its_picture(seed):
    rows = [row for dim in (1, 2, 5) for row in curves.convergence(dim, (50, 400), 2, seed)]
    assert rows[1]["angle"] < rows[0]["angle"]
    assert len(_rate_figure(rows).axes) == 2


def test_estimates_coverage_and_power_short(seed):
    rows = curves.errors_of_table(300, seed)
    assert len(rows) == len(curves.PAIRS)
    assert max(abs(row["off"]) for row in rows) < 5
    held = curves.coverage(2.0, 60, 20, seed)
    assert min(held["lower_bound"], held["interval"], held["auc_lower_bound"]) > 0.7
    assert curves.level(30, 40, seed)["level"] < 0.05 + 5 * math.sqrt(0.05 * 0.95 / 40)
    shares = curves.power("scale 1.3, two dimensions, 200 points", 4, seed, permutations=19)
    assert shares["arc_length"] >= 0.5


def test_pairs_beyond_the_table(seed):
    pairs = curves.outside_pairs()
    # a shift by one of the logarithm; and a parabola's length by hand for the quadrature
    assert pairs["log-normals, shift 1"].length == pytest.approx(1.546469, abs=1e-6)
    assert curves._on_line(stats.expon(scale=2), stats.expon()).length == pytest.approx(1.478942857545, abs=1e-7)
    for name, pair in pairs.items():
        a, b = pair.draw(np.random.default_rng(seed), 20_000)
        u, v = (np.arctan(np.exp(np.minimum(pair.log_ratio(x), 700))) for x in (a, b))
        error = math.sqrt((np.sin(u).var() + np.cos(v).var()) / 20_000)
        assert abs(np.sin(u).mean() + np.cos(v).mean() - pair.length) < 5 * error, name


def test_claims_are_judged_by_binomial_intervals():
    assert [_consistent(x, 1000, 0.95) for x in (0.92, 0.933, 0.967, 0.98)] == [False, True, True, False]
    rows = [{"pair": "a", "repeats": 9, "ratio": 1.1}, {"pair": "b", "repeats": 9, "ratio": 1.3}]
    assert _as_good("two pairs", rows, judged=True).holds is False
    assert _as_good("one pair", rows[:1], judged=True).holds is True
    assert _as_good("two pairs", rows, judged=False).holds is None
