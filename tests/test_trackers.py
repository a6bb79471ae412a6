"""Trackers: what reaches the file, what is refused, and that any object with the methods will do."""

import csv
import sys
import types

import pytest

from vifamily.errors import ConfigError, MissingExtraError
from vifamily.trackers import CsvTracker, TensorBoardTracker, Tracker, WandbTracker


def rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def log(tracker, steps, config=None):
    tracker.start(config or {})
    for step in steps:
        tracker.log(step, {"loss": step / 3, "step_size": 0.1})
    tracker.finish()


def test_csv_holds_every_number_exactly(tmp_path):
    path = tmp_path / "new" / "trace.csv"
    log(CsvTracker(path), range(1, 4))
    header, *body = rows(path)
    assert header == ["step", "loss", "step_size"]
    assert [(int(s), float(v), float(r)) for s, v, r in body] == [(s, s / 3, 0.1) for s in (1, 2, 3)]


def test_csv_logs_every_few_steps(tmp_path):
    log(CsvTracker(tmp_path / "a.csv", every=3), range(1, 11))
    assert [row[0] for row in rows(tmp_path / "a.csv")[1:]] == ["3", "6", "9"]


def test_csv_keeps_its_columns_when_the_numbers_change(tmp_path):
    tracker = CsvTracker(tmp_path / "a.csv")
    tracker.start({})
    tracker.log(1, {"loss": 1.0, "entropy": 2.0})
    tracker.log(2, {"loss": 3.0, "other": 4.0})
    tracker.finish()
    assert rows(tmp_path / "a.csv") == [["step", "loss", "entropy"], ["1", "1.0", "2.0"], ["2", "3.0", ""]]


def test_a_tracker_serves_a_second_fit(tmp_path):
    tracker = CsvTracker(tmp_path / "a.csv")
    log(tracker, range(1, 4))
    log(tracker, range(1, 3))
    assert [row[0] for row in rows(tmp_path / "a.csv")] == ["step", "1", "2"]


def test_a_resumed_fit_goes_on_in_its_file(tmp_path):
    path = tmp_path / "a.csv"
    log(CsvTracker(path), range(1, 8))
    # the checkpoint is behind the file, and the last row was cut short by the kill
    with path.open("a") as file:
        file.write("8,2.6")
    log(CsvTracker(path), range(6, 9), {"resumed_at": 5})
    assert [row[0] for row in rows(path)] == ["step", *map(str, range(1, 9))]
    assert all(float(row[1]) == int(row[0]) / 3 for row in rows(path)[1:])


def test_a_resumed_fit_makes_no_sense_of_a_foreign_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("name,value\n1,2\n")
    log(CsvTracker(path), [6], {"resumed_at": 5})
    assert [row[0] for row in rows(path)] == ["step", "6"]


def test_logging_before_the_start_and_finishing_twice_do_no_harm(tmp_path):
    tracker = CsvTracker(tmp_path / "a.csv")
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    tracker.finish()
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize("every", [0, -1, True, 1.5, "2", None])
def test_every_must_be_a_positive_integer(every, tmp_path):
    with pytest.raises(ConfigError, match="every must be a positive number of steps"):
        CsvTracker(tmp_path / "a.csv", every=every)


def test_an_unwritable_path_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.csv", tmp_path):
        with pytest.raises(ConfigError, match="the tracker cannot write .* Choose a writable path"):
            CsvTracker(path).start({})


def test_any_object_with_the_methods_is_a_tracker():
    class Mine:
        def start(self, config): ...
        def log(self, step, values): ...
        def finish(self): ...

    assert isinstance(Mine(), Tracker)
    assert isinstance(CsvTracker("unused.csv"), Tracker)
    assert not isinstance(object(), Tracker)


# --- optional services, stood in for ---


def test_without_tensorboard_the_package_to_install_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match="pip install tensorboard"):
        TensorBoardTracker(tmp_path)


def test_without_wandb_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="pip install wandb"):
        WandbTracker()


def test_tensorboard_receives_scalars(monkeypatch, tmp_path):
    seen = []

    class SummaryWriter:
        def __init__(self, folder):
            seen.append(("open", folder))

        def add_text(self, name, text):
            seen.append((name, text))

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def close(self):
            seen.append(("close",))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    tracker = TensorBoardTracker(tmp_path, every=2)
    assert isinstance(tracker, Tracker)
    tracker.start({"seed": 3})
    for step in (1, 2):
        tracker.log(step, {"loss": float(step)})
    tracker.finish()
    assert seen == [("open", str(tmp_path)), ("config", "seed: 3"), ("loss", 2.0, 2), ("close",)]


def test_wandb_receives_scalars(monkeypatch):
    seen = []

    class Run:
        def log(self, values, step):
            seen.append((values, step))

        def finish(self):
            seen.append("finish")

    def init(**options):
        seen.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    tracker = WandbTracker(every=2, project="mine")
    tracker.start({"seed": 3})
    for step in (1, 2, 3, 4):
        tracker.log(step, {"loss": float(step)})
    tracker.finish()
    assert seen == [{"config": {"seed": 3}, "project": "mine"}, ({"loss": 2.0}, 2), ({"loss": 4.0}, 4), "finish"]
