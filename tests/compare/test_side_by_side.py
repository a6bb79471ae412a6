"""Cells that differ in their seed alone run as one program and give what each gives alone."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from vifamily.compare import compare
from vifamily.compare.grid import batches_of, run_grid
from vifamily.models import Density

_spec = importlib.util.spec_from_file_location("vifamily_tests_fake_together", Path(__file__).parent / "fake.py")
fake = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = fake
_spec.loader.exec_module(fake)


@dataclasses.dataclass(frozen=True)
class Together(fake.FakeRunner):
    """A stand-in whose shared part is logged, and fails where told to."""

    def together(self, cells):
        with open(self.log, "a") as file:
            file.write(f"together,{','.join(str(cell.seed) for cell in cells)}\n")
        if cells[0].family == "shared":
            raise RuntimeError("all of them")
        return [self] * len(cells)


def test_vectorised_seeds_give_the_serial_cells():
    # not Gaussian: at an exact start gradients are rounding errors, and Adam takes steps of full length along those
    model = Density(lambda z: -(0.5 * z**2 + 0.1 * z**4).sum(-1) + 0.3 * z[..., 0] * z[..., 1], dim=2)
    options = {"seeds": [3, 0, 5], "steps": 60, "jobs": 1, "draws": 4}
    axes = ([model, "banana"], "mean_field, full_rank", "elbo, iwae")
    together, alone = compare(*axes, **options), compare(*axes, **options, vectorise=False)
    assert [c.place for c in together.cells] == [c.place for c in alone.cells]
    for a, b in zip(together.cells, alone.cells, strict=True):
        assert (a.status, b.status) == ("ok", "ok")
        np.testing.assert_allclose(a.draws, b.draws, rtol=1e-8, atol=1e-8)
        for name in set(a.values) - {"seconds"}:
            left, right = a.values[name], b.values[name]
            assert left == (pytest.approx(right, rel=1e-6, abs=1e-8) if isinstance(right, float) else right), name
        assert any("side by side with 2 more seeds" in note for note in a.notes)
        assert not any("side by side" in note for note in b.notes)


def test_what_cannot_run_side_by_side_runs_one_by_one():
    for extra in ({"solver": "lbfgs"}, {"time_limit": 60.0}):
        result = compare("banana", "mean_field", seeds=2, steps=5, jobs=1, draws=4, **extra)
        assert [cell.status for cell in result.cells] == ["ok", "ok"]
        assert not any("side by side" in note for cell in result.cells for note in cell.notes)


def test_a_combination_that_cannot_be_says_so_in_each_cell():
    result = compare("banana", "mean_field", "elbo(estimator=enumerated)", seeds=2, steps=5, jobs=1, draws=4)
    assert [cell.status for cell in result.cells] == ["not possible"] * 2
    assert all("enumerated" in cell.reason or "missing" in cell.reason for cell in result.cells)


def test_shared_failure_leaves_each_cell_to_itself(tmp_path):
    cells = fake.cells(["shared", "good"], seeds=2)
    outcomes = run_grid(cells, Together(str(tmp_path / "log")), jobs=1, vectorise=True, folder=tmp_path / "cells")
    assert [o.status for o in outcomes] == ["ok"] * 4
    log = fake.lines(tmp_path / "log")
    assert [line for line in log if line.startswith("together")] == ["together,0,1", "together,0,1"]
    assert len(log) == 6
    assert len(list((tmp_path / "cells").glob("*.json"))) == 4


def test_finished_seeds_are_not_run_again(tmp_path):
    runner = Together(str(tmp_path / "log"))
    run_grid(fake.cells(seeds=1), runner, jobs=1, vectorise=True, folder=tmp_path / "cells")
    outcomes = run_grid(fake.cells(seeds=3), runner, jobs=1, vectorise=True, folder=tmp_path / "cells")
    assert [o.resumed for o in outcomes] == [True, False, False]
    assert [line for line in fake.lines(tmp_path / "log") if line.startswith("together")] == ["together,1,2"]


@pytest.mark.parametrize(("seeds", "workers"), [(1, 4), (5, 1), (5, 2), (5, 3), (5, 16)])
def test_batches_keep_every_cell_and_every_worker(seeds, workers):
    cells = fake.cells(["good", "fine"], seeds=seeds)
    batches = batches_of(cells, workers, vectorise=True)
    assert [cell for batch in batches for cell in batch] == cells
    assert all(len({cell.place[:3] for cell in batch}) == 1 for batch in batches)
    assert len(batches) >= min(workers, len(cells)) - 1
    assert [len(batch) for batch in batches_of(cells, workers, vectorise=False)] == [1] * len(cells)
