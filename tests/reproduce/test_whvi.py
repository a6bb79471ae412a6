"""The reproduction of Walsh-Hadamard variational inference: its pieces, on small made-up data."""

from __future__ import annotations

import numpy as np
import pytest

from vifamily.reproduce import Options, paper_named
from vifamily.reproduce import whvi as paper

QUICK = Options(quick=True, say=lambda line: None)


def _made_up() -> dict[str, np.ndarray]:
    source = np.random.default_rng(0)
    x = source.normal(size=(120, 2))
    return {"X": x, "y": 10 + 5 * x[:, 0] - 3 * x[:, 1], "test_index": np.arange(20)[None]}


def test_the_paper_is_found() -> None:
    assert "Walsh-Hadamard" in paper_named("whvi").title


def test_what_is_exact_holds() -> None:
    assert [claim.holds for claim in paper.algebra(QUICK)] == [True, True]
    assert paper.noise(QUICK).holds
    # 1-128-128-1: latents with two numbers each (16 + 128 + 16 and biases), diagonals as points, one noise apart
    assert paper.parameters().measured == 2 * (160 + 257) + 2 * 160


@pytest.mark.filterwarnings("ignore::vifamily.errors.ConvergenceWarning")
def test_a_fit_of_a_plane_is_in_the_units_of_the_data() -> None:
    found = paper.regression(_made_up(), 0, 300)
    assert found["spread"] == pytest.approx(float(_made_up()["y"][:20].std()))
    assert found["rmse"] < 0.5 * found["spread"]
    # a normal law of that error has about this score
    assert found["mnll"] < np.log(found["spread"]) + 1.42


@pytest.mark.filterwarnings("ignore::vifamily.errors.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore::vifamily.errors.VifamilyWarning")
def test_a_start_near_zero_stays_at_the_mean() -> None:
    found = paper.regression(_made_up(), 0, 120, collapsed=True)
    assert found["rmse"] > 0.8 * found["spread"]


def test_without_data_nothing_is_judged(tmp_path) -> None:
    claims, rows = paper._regressions(Options(quick=True, data=tmp_path, say=lambda line: None))
    assert not rows and [claim.holds for claim in claims] == [None]
    assert "no file" in claims[0].reason
