"""The reproduction of Walsh-Hadamard variational inference: its pieces, on small made-up data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vifamily.reproduce import Options, paper_named
from vifamily.reproduce import _network_baselines as baselines
from vifamily.reproduce import _whvi_fits as fits
from vifamily.reproduce import whvi as paper
from vifamily.reproduce._network_baselines import Budget
from vifamily.reproduce._uci import split_of
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
    assert all(claim.holds for claim in noise(QUICK))
    # 1-128-128-1: latents with two numbers each (16 + 128 + 16 and biases), diagonals as points, one noise apart
    assert parameters().measured == 2 * (160 + 257) + 2 * 160


@pytest.mark.parametrize("method", ["Walsh-Hadamard", "mean field", "one network"])
def test_a_fit_of_a_plane_is_in_the_units_of_the_data(folder, method):
    row = regression_row(folder, "plane", 0, method, SMALL)
    # the noise alone has 0.5 and 0.73; the targets' own sd is near 6
    assert row["rmse"] < 2.5 and row["mnll"] < 2.6
    assert row["parameters"] > 0 and row["data"] == "plane"


def test_three_members_are_the_mixture_of_fits_made_apart(folder, monkeypatch):
    monkeypatch.setattr(fits, "_LONGER", 1)
    data = split_of(folder, "plane", 0)
    found = fits._several(data, SMALL, 0)
    apart = [fits._walsh_hadamard(data, SMALL, 1000 * k, solver=fits._ONE_CYCLE) for k in range(3)]
    assert found.mean.shape == (3 * SMALL.draws, 40) and found.sd.shape == (3 * SMALL.draws,)
    torch.testing.assert_close(found.mean, torch.cat([member.mean for member in apart]), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sd, torch.cat([member.sd for member in apart]), rtol=0, atol=1e-6)
    assert found.parameters == 3 * apart[0].parameters
    # starts, draws and noise of their own
    assert not torch.allclose(apart[0].mean, apart[1].mean, rtol=0, atol=1e-3)
    row = regression_row(folder, "plane", 0, fits.SEVERAL, SMALL)
    assert row["rmse"] < 2.5 and row["mnll"] < 2.6 and row["parameters"] == found.parameters
    # the density of a mixture is at least the geometric mean of its parts' (Jensen)
    score = [baselines.score(p, data.y_test, data.scale) for p in (found, *apart)]
    assert score[0]["mnll"] <= sum(s["mnll"] for s in score[1:]) / 3 + 1e-6


def test_kept_parts_of_other_methods_do_not_depend_on_the_members(folder, monkeypatch):
    seen = {}
    row = {"rmse": 1.0, "mnll": 1.0, "seconds": 0.0, "parameters": 1}

    def kept(self, name, compute, **settings):
        seen[name] = settings
        method = name.split(", ", 2)[2] if "split" in name else "collapse"
        return row | {"data": "yacht", "split": 0, "method": method}

    monkeypatch.setattr(Options, "row", kept)
    monkeypatch.setattr(paper, "collapsed", lambda *_: {"rmse": 1.0, "constant": 1.0})
    paper._regression(Options(data=folder, quick=True, say=lambda line: None), SMALL)
    assert set(seen["yacht, split 0, Walsh-Hadamard"]) == {"budget", "data"}
    assert seen[f"yacht, split 0, {fits.SEVERAL}"]["members"] == 3


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
    of[paper.SEVERAL] = of[paper.WHVI] | {"method": paper.SEVERAL}
    assert [claim.holds for claim in paper._claims_of("yacht", of, quick=False)] == [True, True, True, None]
    of[paper.WHVI]["rmse"] = 0.71
    assert [claim.holds for claim in paper._claims_of("yacht", of, quick=False)] == [False, True, False, None]
    of[paper.SEVERAL]["mnll"] = 1.81
    assert [claim.holds for claim in paper._claims_of("yacht", of, quick=False)] == [False, False, False, None]
    assert [claim.holds for claim in paper._claims_of("yacht", of, quick=True)] == [None, None, None, None]


def test_without_data_nothing_is_judged():
    claims, tables, figures = paper._regression(QUICK, SMALL)
    assert not tables and not figures and {claim.holds for claim in claims} == {None}
    assert "--data" in claims[0].reason
