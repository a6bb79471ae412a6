"""Metrics against reference draws in a comparison: arc length and C2ST, in every table and file."""

import csv
import io
import json
import math

import numpy as np
import pytest

from vifamily.compare import compare
from vifamily.compare.metrics import METRICS, metric_names, metric_values, shown_measures
from vifamily.errors import ConfigError
from vifamily.models import Density
from vifamily.problems._base import Problem, Reference


def normal(z):
    return -0.5 * (z**2).sum(-1)


def shifted(seed, size=1500):
    """A standard normal whose reference draws are one to the right of it: L = 1.546469, best accuracy Phi(1/2)."""
    draws = np.random.default_rng(seed).normal(1.0, 1.0, (size, 1))
    reference = Reference("analytic", ("z[0]",), np.ones(1), np.ones(1), draws)
    return Problem("shifted", Density(normal, dim=1), reference, "A normal beside its neighbour.")


def short(problem, **options):
    return compare(problem, "full_rank", "elbo", **{"seeds": 1, "steps": 300, "jobs": 1, "draws": 16, **options})


def test_known_values_in_cells_tables_and_files(seed):
    result = short(shifted(seed), metrics="c2st, arc_length")
    (cell,) = result.cells
    # the fit itself is a little off its normal: a slope of 0.19 in the shift times a few hundredths
    assert abs(cell.values["arc_length"] - 1.546469) < 5 * cell.values["arc_length_error"] + 0.01
    assert abs(cell.values["c2st"] - 0.691462) < 5 * cell.values["c2st_error"] + 0.01
    assert result.config["metrics"] == ["arc_length", "c2st"]
    (row,) = result.rows()
    assert row["arc_length"] == cell.values["arc_length"]
    assert {"arc length", "C2ST"} <= {str(column.header).replace("\n", " ") for column in result.table().columns}
    (line,) = csv.DictReader(io.StringIO(result.to_csv()))
    assert float(line["arc_length"]) == cell.values["arc_length"]
    assert float(line["c2st_error"]) == cell.values["c2st_error"]
    content = json.loads(result.to_json())
    assert {"arc_length", "c2st"} <= content["measures"].keys()
    page = result.html()
    assert "arc length" in page
    assert "C2ST" in page
    assert f"{cell.values['arc_length']:.3f}" in page


def test_the_arc_length_is_there_by_default_and_c2st_is_not(seed):
    result = short(shifted(seed), steps=2)
    (cell,) = result.cells
    assert 1.0 < cell.values["arc_length"] <= 2.0
    assert "c2st" not in cell.values
    assert "C2ST" not in str(result)
    assert "c2st" not in result.to_dict()["measures"]
    assert "c2st" not in result.to_csv()


def test_none_of_them(seed):
    result = short(shifted(seed), steps=2, metrics=None)
    assert "arc_length" not in result.cells[0].values
    assert "arc" not in str(result)
    assert "sliced_wasserstein" in result.cells[0].values


def test_other_metrics_are_another_configuration(tmp_path, seed):
    problem = shifted(seed, 50)
    resumed = [
        short(problem, steps=2, out=tmp_path, metrics=metrics).cells[0].resumed
        for metrics in ("none", "arc_length", "arc_length")
    ]
    assert resumed == [False, False, True]


@pytest.mark.parametrize("metrics", ["accuracy", ["arc_length", "mmd"], 3])
def test_unknown_metrics_are_refused_before_anything_is_fitted(metrics):
    with pytest.raises(ConfigError, match="arc_length, c2st"):
        compare("banana", "mean_field", "elbo", metrics=metrics)


def test_names():
    assert metric_names(["c2st"]) == ("c2st",)
    assert metric_names("arc_length,c2st") == tuple(METRICS)
    assert metric_names("") == metric_names(()) == ()


def test_few_draws_give_none_and_unequal_numbers_are_fine(seed):
    rng = np.random.default_rng(seed)
    values, remarks = metric_values(tuple(METRICS), rng.normal(size=(4, 1)), rng.normal(size=(100, 1)), 0)
    assert values == dict.fromkeys(("arc_length", "arc_length_error", "c2st", "c2st_error"))
    assert not remarks
    values, _ = metric_values(tuple(METRICS), rng.normal(9.0, 1.0, (90, 1)), rng.normal(size=(40, 1)), 0)
    assert values["arc_length"] > 1.9
    assert values["c2st"] == 1.0


def test_a_metric_that_cannot_be_computed_leaves_the_fit_as_it_is(monkeypatch, seed):
    def refuse(*_):
        raise ValueError("too\nlarge for float32")

    monkeypatch.setitem(METRICS, "arc_length", refuse)
    (cell,) = short(shifted(seed, 50), steps=2).cells
    assert (cell.status, cell.values["arc_length"]) == ("ok", None)
    assert "arc_length could not be computed: too large for float32" in cell.notes


def test_draws_that_are_far_out_are_measured(seed):
    rng = np.random.default_rng(seed)
    values, remarks = metric_values(
        ("arc_length",), 1e150 * rng.standard_cauchy((200, 2)), rng.normal(size=(200, 2)), 0
    )
    assert not remarks
    assert math.isfinite(values["arc_length"])


def test_optional_measures_are_shown_where_a_row_has_them():
    assert "c2st" not in {m.name for m in shown_measures([{"c2st": None}])}
    assert "c2st" in {m.name for m in shown_measures([{"c2st": None}, {"c2st": 0.6}])}
