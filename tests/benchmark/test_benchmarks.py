"""The named benchmarks from the command line, with no peer."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vifamily.benchmark import benchmark_named, names
from vifamily.benchmark._report import median_and_range
from vifamily.cli import app
from vifamily.errors import UnknownNameError


def call(*arguments: str):
    return CliRunner().invoke(app, ["benchmark", *arguments])


def test_names() -> None:
    assert {"solvers", "scaling"} <= set(names())
    for name in names():
        assert benchmark_named(name).summary.endswith(".")
    with pytest.raises(UnknownNameError, match="no benchmark 'speed'"):
        benchmark_named("speed")


def test_solvers_quick_without_peers(tmp_path: Path) -> None:
    rows_file, picture = tmp_path / "rows.json", tmp_path / "gap.png"
    done = call("solvers", "--quick", "--problems", "logistic_60_3", "--peers", "none", "--solvers", "lbfgs",
                "--budget", "5", "--json", str(rows_file), "--plot", str(picture))  # fmt: skip
    assert done.exit_code == 0, done.output
    (row,) = json.loads(rows_file.read_text("utf-8"))
    assert (row["side"], row["problem"], row["family"]) == ("vifamily lbfgs", "logistic_60_3", "mean_field")
    assert row["reason"] is None
    assert row["ratio"] == 1.0
    assert row["stop_reason"] == "converged"
    assert row["cold"]["median"] > 0
    assert row["evaluations"]["median"] > 0
    assert abs(row["final_gap"]["median"]) < 0.05
    assert picture.read_bytes()[1:4] == b"PNG"


def test_a_peer_that_is_missing_is_said_to_be(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.json"
    done = call("solvers", "--quick", "--problems", "logistic_60_3", "--peers", "pymc", "--peers-dir", str(tmp_path),
                "--solvers", "lbfgs", "--json", str(rows_file))  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = json.loads(rows_file.read_text("utf-8"))
    assert [row["side"] for row in rows] == ["vifamily lbfgs", "pymc"]
    assert "not installed" in rows[1]["reason"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("speed",),
        ("solvers", "--problems", "nothing"),
        ("solvers", "--families", "flow"),
        ("solvers", "--peers", "stan"),
        ("solvers", "--clock", "sun"),
    ],
)
def test_what_cannot_be_understood_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert call(*arguments).exit_code == 2


def test_a_repeat_that_missed_leaves_no_median() -> None:
    assert median_and_range([1.0, None, 3.0]) == {"median": None, "least": 1.0, "largest": None}
    assert median_and_range([4.0, 1.0, 3.0, 2.0])["median"] == 2.5
