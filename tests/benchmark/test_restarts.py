"""The cost of restarts, in its short mode."""

import pytest

from vifamily.benchmark import Options, benchmark_named


def test_quick():
    said = []
    report = benchmark_named("restarts").run(Options(quick=True, say=said.append))
    (row,) = report.rows
    assert len(said) == 1
    assert row["restarts"] == 4
    assert row["ratio"]["median"] == pytest.approx(row["many"]["median"] / row["one"]["median"])
    # both are converged fits of one problem, and the larger one holds the smaller one's start
    assert row["ended"] == "converged, converged"
    assert row["loss_many"]["median"] <= row["loss_one"]["median"] + 0.01
    assert not report.failed
    assert report.table().row_count == 1


def test_a_problem_that_is_not_there_is_a_remark():
    report = benchmark_named("restarts").run(Options(problems=("no_such_problem",), quick=True, say=lambda line: None))
    assert report.failed
    assert "no_such_problem" in report.rows[0]["reason"]
