"""The reproduction of Walsh-Hadamard variational inference: its pieces, on small made-up data."""

from __future__ import annotations

import numpy as np
import pytest

from vifamily.reproduce import Options, paper_named
from vifamily.reproduce import whvi as paper
from vifamily.reproduce._network_baselines import Budget
from vifamily.reproduce._whvi_algebra import algebra, noise, parameters
from vifamily.reproduce._whvi_fits import classified, collapsed, regression_row, toy_bands

QUICK = Options(quick=True, say=lambda line: None)
SMALL = Budget(steps=300, hidden=(32,), draws=32)

pytestmark = [
    pytest.mark.filterwarnings("ignore::vifamily.errors.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::vifamily.errors.VifamilyWarning"),
]


@pytest.fixture
def folder(tmp_path):
    source = np.random.default_rng(0)
    x = source.normal(size=(240, 2))
    y = 10 + 5 * x[:, 0] - 3 * x[:, 1] + 0.5 * source.normal(size=240)
    np.savez(tmp_path / "plane.npz", X=x, y=y, test_index=np.arange(40)[None])
    np.savez(tmp_path / "yacht.npz", X=x, y=y, test_index=np.arange(40)[None])
    return tmp_path


def test_the_paper_is_found():
    assert "Walsh-Hadamard" in paper_named("whvi").title


def test_what_is_exact_holds():
    assert [claim.holds for claim in algebra(QUICK)] == [True, True]
    assert noise(QUICK).holds
    # 1-128-128-1: latents with two numbers each (16 + 128 + 16 and biases), diagonals as points, one noise apart
    assert parameters().measured == 2 * (160 + 257) + 2 * 160


@pytest.mark.parametrize("method", ["Walsh-Hadamard", "mean field", "one network"])
def test_a_fit_of_a_plane_is_in_the_units_of_the_data(folder, method):
    row = regression_row(folder, "plane", 0, method, SMALL)
    # the noise alone has 0.5 and 0.73; the targets' own sd is near 6
    assert row["rmse"] < 2.5 and row["mnll"] < 2.6
    assert row["parameters"] > 0 and row["data"] == "plane"


def test_a_start_near_zero_stays_at_the_mean(folder):
    found = collapsed(folder, "plane", Budget(steps=120, hidden=(32,), draws=16))
    assert found["rmse"] > 0.8 * found["constant"]


def test_digits_are_told_apart():
    row = classified("convolutional", "Walsh-Hadamard", Budget(steps=400, draws=16), 0)
    assert row["error"] < 0.5 and 0 <= row["ece"] < 1 and row["nll"] < np.log(10)


def test_bands_are_those_of_the_data():
    found = toy_bands(Budget(steps=200, hidden=(32,), draws=64), 0)
    assert found["mean"].shape == found["total"].shape == (301,)
    assert bool((found["total"] > found["epistemic"]).all())


def test_claims_of_a_table(folder):
    row = {"splits": 5, "parameters": 10, "rmse_error": 0.1, "mnll_error": 0.1}
    of = {m: row | {"method": m, "rmse": 0.7, "mnll": 1.9} for m in paper.METHODS}
    of[paper.WHVI] = row | {"method": paper.WHVI, "rmse": 0.6, "mnll": 1.7}
    assert [claim.holds for claim in paper._claims_of("yacht", of, quick=False)] == [True, True, None]
    of[paper.WHVI]["rmse"] = 0.71
    assert [claim.holds for claim in paper._claims_of("yacht", of, quick=False)] == [False, False, None]
    assert [claim.holds for claim in paper._claims_of("yacht", of, quick=True)] == [None, None, None]


def test_without_data_nothing_is_judged():
    claims, tables, figures = paper._regression(QUICK, SMALL)
    assert not tables and not figures and {claim.holds for claim in claims} == {None}
    assert "--data" in claims[0].reason
