"""The grid on a Dask cluster of separate processes of this machine."""

import builtins
import importlib.util
import os
import shutil
import sys
import threading
import warnings
from pathlib import Path

import joblib
import numpy as np
import pytest

from vifamily.compare import compare
from vifamily.compare.cells import Cell
from vifamily.compare.cluster import client_of
from vifamily.compare.grid import run_grid
from vifamily.errors import ConfigError, MissingExtraError

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("vifamily_tests_fake_cluster", HERE / "fake.py")
fake = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = fake
_spec.loader.exec_module(fake)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Two workers of one thread each, each a process of its own that is started again when it dies."""
    distributed = pytest.importorskip("distributed", reason="needs the extra 'dask'")
    dask = pytest.importorskip("dask")
    # a task may lose one worker, not three, so that the one that kills them all is found sooner
    with warnings.catch_warnings(), dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        warnings.simplefilter("ignore")  # about sockets and ports of other clusters
        cluster = distributed.LocalCluster(
            processes=True, n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None,
            silence_logs=50, memory_limit=0,
        )  # fmt: skip
        client = distributed.Client(cluster, set_as_default=False)
    # a module of the user's own, brought to the workers in Dask's way; later workers get it too
    sent = shutil.copy(Path(__file__).parent / "fake.py", tmp_path_factory.mktemp("sent") / f"{fake.__name__}.py")
    client.upload_file(str(sent))
    yield client
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client.close()
        cluster.close()


def equal(a, b):
    drop = {"seconds"}
    left, right = a.to_dict(), b.to_dict()
    assert (a.place, a.status, a.reason) == (b.place, b.status, b.reason)
    assert {k: v for k, v in left["values"].items() if k not in drop} == {
        k: v for k, v in right["values"].items() if k not in drop
    }
    assert (a.draws is None) == (b.draws is None)
    assert a.draws is None or np.array_equal(a.draws, b.draws)


def test_the_same_cells_as_in_this_process(client, tmp_path):
    cells = fake.cells(["good", "raises", "impossible"], seeds=2)
    runner = fake.FakeRunner(str(tmp_path / "log"), sleep=0.05)
    far = run_grid(cells, runner, client=client, folder=tmp_path / "cells")
    near = run_grid(cells, fake.FakeRunner(str(tmp_path / "here")), jobs=1)
    for a, b in zip(far, near, strict=True):
        equal(a, b)
    assert str(os.getpid()) not in {line.split(",")[-1] for line in fake.lines(tmp_path / "log")}
    # what is finished is kept here, and not run again
    again = run_grid(cells, runner, client=client, folder=tmp_path / "cells")
    assert [o.resumed for o in again] == [True, True, False, False, True, True]


def test_a_lost_workers_cells_run_again_and_nothing_computed_is_lost(client, tmp_path):
    cells = fake.cells(["good", "dies once", "fine"], seeds=2)
    seen = []
    outcomes = run_grid(
        cells, fake.FakeRunner(str(tmp_path / "log"), sleep=0.05), client=client, folder=tmp_path / "cells",
        report=lambda outcome, done, total: seen.append(outcome.place),
    )  # fmt: skip
    assert (tmp_path / "log.died").exists()
    assert [o.status for o in outcomes] == ["ok"] * 6
    for a, b in zip(outcomes, run_grid(cells, fake.FakeRunner(str(tmp_path / "log")), jobs=1), strict=True):
        equal(a, b)
    assert sorted(seen) == sorted(cell.place for cell in cells)
    assert len(list((tmp_path / "cells").glob("*.json"))) == 6


@pytest.mark.slow  # four workers are started anew
def test_a_cell_that_kills_every_worker_costs_only_itself(client, tmp_path):
    cells = fake.cells(["good", "dies"], seeds=1)
    outcomes = run_grid(cells, fake.FakeRunner(str(tmp_path / "log")), client=client, folder=tmp_path / "cells")
    assert [o.status for o in outcomes] == ["ok", "failed"]
    assert "worker process died" in outcomes[1].reason


def test_fits_on_the_cluster_are_the_fits_of_this_process(client, tmp_path):
    options = {"seeds": 2, "steps": 20, "draws": 4}
    axes = ("banana", "mean_field, full_rank", "elbo")
    far = compare(*axes, **options, cluster=client, out=tmp_path)
    near = compare(*axes, **options, jobs=1)
    for a, b in zip(far.cells, near.cells, strict=True):
        assert a.status == "ok"
        np.testing.assert_allclose(a.draws, b.draws, rtol=1e-8, atol=1e-8)
        assert a.values["elbo"] == pytest.approx(b.values["elbo"], rel=1e-8)
    assert len(list((tmp_path / "cells").glob("*.json"))) == 4


def test_joblibs_dask_backend_is_taken(client, tmp_path):
    runner = fake.FakeRunner(str(tmp_path / "log"))
    assert client_of(None) == (None, False)
    with joblib.parallel_config(backend="dask", client=client):
        found, ours = client_of(None)
        assert (found is client, ours) == (True, False)
        assert [o.status for o in run_grid(fake.cells(seeds=2), runner, client=found)] == ["ok", "ok"]


def test_an_address_gives_a_client_of_its_own(client):
    found, ours = client_of(client.scheduler.address)
    try:
        assert ours
        assert len(found.ncores()) == 2
    finally:
        found.close()


def test_jobs_limits_what_runs_at_once(client, tmp_path):
    runner = fake.FakeRunner(str(tmp_path / "log"))
    outcomes = run_grid(fake.cells(seeds=3), runner, client=client, jobs=1)
    assert [o.status for o in outcomes] == ["ok"] * 3
    with pytest.raises(ConfigError, match="jobs must be"):
        run_grid(fake.cells(seeds=3), runner, client=client, jobs=0)


def test_object_that_cannot_be_sent(client, tmp_path):
    cells = [Cell("p", "f", "o", seed, given={"problem": threading.Lock()}) for seed in range(2)]
    with pytest.raises(ConfigError, match="jobs=1"):
        run_grid(cells, fake.FakeRunner(str(tmp_path / "log")), client=client)


def test_what_a_worker_cannot_load_is_told(client, tmp_path):
    spec = importlib.util.spec_from_file_location("only_in_this_process", HERE / "fake.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        with pytest.raises(ConfigError, match="cannot load what it would be sent.*only_in_this_process"):
            run_grid(fake.cells(seeds=1), module.FakeRunner(str(tmp_path / "log")), client=client)
    finally:
        del sys.modules[spec.name]


def test_wrong_cluster():
    pytest.importorskip("distributed", reason="needs the extra 'dask'")
    with pytest.raises(ConfigError, match="cluster must be"):
        compare("banana", "mean_field", seeds=1, steps=2, cluster=7)


def test_missing_extra_names_the_command(monkeypatch):
    plain = builtins.__import__

    def without(name, *arguments, **options):
        if name.partition(".")[0] == "distributed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return plain(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r'pip install "vifamily\[dask\]"'):
        client_of("tcp://127.0.0.1:8786")
