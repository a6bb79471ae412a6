"""The grid: order, failures, resuming, killed runs; with a stand-in for the fit."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vifamily.compare.cells import Cell, Outcome, load, plain, store
from vifamily.compare.grid import num_jobs, one_thread, run_grid
from vifamily.errors import ConfigError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Under its own name in sys.modules, so that functions of it can be sent to worker processes by value.
_spec = importlib.util.spec_from_file_location("vifamily_tests_fake", HERE / "fake.py")
fake = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = fake
_spec.loader.exec_module(fake)


@pytest.fixture(autouse=True)
def by_value():
    try:
        import cloudpickle
    except ModuleNotFoundError:  # joblib before 1.6 carries its own
        from joblib.externals import cloudpickle

    cloudpickle.register_pickle_by_value(fake)
    yield
    cloudpickle.unregister_pickle_by_value(fake)


def runner(tmp_path, **options):
    return fake.FakeRunner(str(tmp_path / "log"), **options)


def test_outcomes_come_in_order_and_failures_are_told(tmp_path):
    cells = fake.cells(["good", "raises", "impossible"], seeds=2)
    outcomes = run_grid(cells, runner(tmp_path), jobs=1)
    assert [o.place for o in outcomes] == [c.place for c in cells]
    assert [o.status for o in outcomes] == ["ok", "ok", "failed", "failed", "not possible", "not possible"]
    assert outcomes[2].reason == "RuntimeError: the family raised"
    assert outcomes[4].reason == "it needs a log density."


def test_parallel_gives_the_same(tmp_path):
    cells = fake.cells(["good", "raises", "impossible"], seeds=2)
    parallel = run_grid(cells, runner(tmp_path, sleep=0.2), jobs=2)
    alone = run_grid(cells, runner(tmp_path), jobs=1)
    drop = {"seconds"}
    for a, b in zip(parallel, alone, strict=True):
        left, right = a.to_dict(), b.to_dict()
        assert {k: v for k, v in left["values"].items() if k not in drop} == {
            k: v for k, v in right["values"].items() if k not in drop
        }
        assert (a.place, a.status, a.reason) == (b.place, b.status, b.reason)
        assert (a.draws is None) == (b.draws is None)
        assert a.draws is None or np.array_equal(a.draws, b.draws)
    workers = {line.split(",")[-1] for line in fake.lines(tmp_path / "log")[:6]}
    assert len(workers) == 2
    assert str(os.getpid()) not in workers


def test_worker_that_dies_costs_only_its_own_cell(tmp_path):
    cells = fake.cells(["good", "dies", "fine"], seeds=1)
    outcomes = run_grid(cells, runner(tmp_path), folder=tmp_path / "cells", jobs=2)
    assert [o.status for o in outcomes] == ["ok", "failed", "ok"]
    assert "worker process died" in outcomes[1].reason


def test_finished_cells_are_taken_from_disk_and_failed_ones_tried_again(tmp_path):
    cells = fake.cells(["good", "raises", "impossible"], seeds=1)
    first = run_grid(cells, runner(tmp_path), folder=tmp_path / "cells", jobs=1)
    again = run_grid(cells, runner(tmp_path), folder=tmp_path / "cells", jobs=1)
    assert [line.split(",")[1] for line in fake.lines(tmp_path / "log")] == ["good", "raises", "impossible", "raises"]
    assert [o.resumed for o in again] == [True, False, True]
    assert again[0].to_dict() == first[0].to_dict()
    assert np.array_equal(again[0].draws, first[0].draws)
    run_grid(cells, runner(tmp_path), folder=tmp_path / "cells", jobs=1, resume=False)
    assert len(fake.lines(tmp_path / "log")) == 7


CHANGES = {
    "steps": lambda c: Cell(c.problem, c.family, c.objective, c.seed, {"steps": 7}, "mark"),
    "fingerprint": lambda c: Cell(c.problem, c.family, c.objective, c.seed, {"steps": 5}, "other"),
    "not resumable": lambda c: Cell(c.problem, c.family, c.objective, c.seed, {"steps": 5}, "mark", resumable=False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_cell_is_computed_anew(tmp_path, name):
    cells = fake.cells(seeds=1, steps=5)
    run_grid(cells, runner(tmp_path), folder=tmp_path / "cells", jobs=1)
    run_grid([CHANGES[name](c) for c in cells], runner(tmp_path), folder=tmp_path / "cells", jobs=1)
    assert len(fake.lines(tmp_path / "log")) == 2
    assert len(list((tmp_path / "cells").glob("*.json"))) == 1


def test_changed_version_is_computed_anew(tmp_path):
    cells = fake.cells(seeds=1)
    for version in ("1", "1", "2"):
        run_grid(cells, runner(tmp_path), folder=tmp_path / "cells", jobs=1, versions={"vifamily": version})
    assert len(fake.lines(tmp_path / "log")) == 2


DAMAGE = {
    "truncated": lambda json_file, npz: json_file.write_text(json_file.read_text()[:40]),
    "not JSON": lambda json_file, npz: json_file.write_bytes(b"\x80\x04pickle"),
    "no draws": lambda json_file, npz: npz.unlink(),
    "truncated draws": lambda json_file, npz: npz.write_bytes(npz.read_bytes()[:60]),
    "draws that are a pickle": lambda json_file, npz: np.savez(npz, draws=np.array([object()], dtype=object)),
    "of another cell": lambda json_file, npz: json_file.write_text(json_file.read_text().replace('"good"', '"bad"')),
    "field missing": lambda json_file, npz: json_file.write_text(json_file.read_text().replace('"names"', '"nam"')),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_cell_is_computed_anew(tmp_path, name):
    cells = fake.cells(seeds=1)
    run_grid(cells, runner(tmp_path), folder=tmp_path / "cells", jobs=1)
    (json_file,), (npz,) = (tmp_path / "cells").glob("*.json"), (tmp_path / "cells").glob("*.npz")
    DAMAGE[name](json_file, npz)
    (outcome,) = run_grid(cells, runner(tmp_path), folder=tmp_path / "cells", jobs=1)
    assert not outcome.resumed
    assert outcome.status == "ok"
    assert len(fake.lines(tmp_path / "log")) == 2


SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
from pathlib import Path
import fake
from vifamily.compare.grid import run_grid
if __name__ == "__main__":
    run_grid(fake.cells(["good", "fine", "well"], seeds=3), fake.FakeRunner({log!r}, sleep=0.4),
             folder=Path({cells!r}), jobs={jobs})
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_run_goes_on_where_it_was(tmp_path, jobs):
    folder, log = tmp_path / "cells", tmp_path / "log"
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(root=str(ROOT), here=str(HERE), log=str(log), cells=str(folder), jobs=jobs))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=stderr)
    deadline = time.monotonic() + 90
    while len(list(folder.glob("*.json"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    time.sleep(1.0)  # workers of a killed parent may finish the cell they are at
    assert process.returncode == -signal.SIGKILL, (tmp_path / "stderr").read_text()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert 2 <= len(before) < 9
    outcomes = run_grid(
        fake.cells(["good", "fine", "well"], seeds=3), fake.FakeRunner(str(tmp_path / "second")), folder=folder, jobs=1
    )
    assert [o.status for o in outcomes] == ["ok"] * 9
    assert sum(o.resumed for o in outcomes) == len(before)
    assert len(fake.lines(tmp_path / "second")) == 9 - len(before)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert all(after[name] == stamp for name, stamp in before.items())
    assert not list(folder.glob("*.tmp")) or jobs == 2


def test_interrupt_keeps_what_is_finished(tmp_path):
    cells = fake.cells(["good", "interrupts", "fine"], seeds=1)
    with pytest.raises(KeyboardInterrupt):
        run_grid(cells, runner(tmp_path), folder=tmp_path / "cells", jobs=1)
    assert len(list((tmp_path / "cells").glob("*.json"))) == 1


def test_report_counts(tmp_path):
    seen = []
    run_grid(
        fake.cells(seeds=3), runner(tmp_path), jobs=1, report=lambda o, done, total: seen.append((o.seed, done, total))
    )
    assert seen == [(0, 1, 3), (1, 2, 3), (2, 3, 3)]


def test_threads_are_restored():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("jobs", [0, -2, 1.5, True, "2"])
def test_wrong_jobs(jobs):
    with pytest.raises(ConfigError, match="jobs must be"):
        num_jobs(jobs, 4)


def test_num_jobs_is_never_above_the_cells():
    assert num_jobs(8, 3) == 3
    assert num_jobs(None, 1) == 1
    assert num_jobs(-1, 0) == 1


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Choose another out="):
        run_grid(fake.cells(), runner(tmp_path), folder=tmp_path / "file" / "cells", jobs=1)


def test_object_that_cannot_be_sent(tmp_path):
    import threading

    cells = [Cell("p", "f", "o", seed, given={"problem": threading.Lock()}) for seed in range(2)]
    with pytest.raises(ConfigError, match="jobs=1"):
        run_grid(cells, runner(tmp_path), jobs=2)


def test_store_and_load_of_values_that_are_not_finite(tmp_path):
    cell = Cell("p", "f", "o", 0)
    outcome = Outcome.of(cell, values={"k_hat": float("inf"), "elbo": float("nan"), "steps": np.int64(3)})
    store(tmp_path, cell, outcome, "key")
    text = next(tmp_path.glob("*.json")).read_text()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    json.loads(text, parse_constant=refuse)
    assert load(tmp_path, cell, "key").values == {"k_hat": None, "elbo": None, "steps": 3}
    assert load(tmp_path, cell, "other key") is None


def test_names_of_files_differ_and_are_plain():
    names = {Cell("p", family, "renyi(alpha=0.5)", 0).name for family in ("a b", "a_b", "a/b", "../a", "\u00e9" * 300)}
    assert len(names) == 5
    assert all("/" not in name and len(name) < 140 and not name.startswith(".") for name in names)


def test_plain_keeps_bools_and_orders():
    assert plain({"a": True, "b": (1, 2.5), "c": np.array([1.0, np.nan])}) == {
        "a": True,
        "b": [1, 2.5],
        "c": [1.0, None],
    }
