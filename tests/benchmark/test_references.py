"""Nearness to the best of a family, on a problem whose reference draws and best errors are made here."""

from typing import Any

import numpy as np
import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.benchmark import Options, benchmark_named, references
from vifamily.problems._base import Problem, Reference
from vifamily.problems._targets import BEST_OF_FAMILY, Errors


def quiet(line: str) -> None:
    """Say nothing."""


@pytest.fixture
def normal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A normal law with mean 1 and sd 2, which both families hold, under the name of a problem of the table."""
    law = torch.distributions.Normal(torch.tensor(1.0, dtype=torch.float64), 2.0)
    model = vf.models.Density(lambda x: law.log_prob(x).sum(-1), dim=1)
    reference = Reference("analytic", (model.layout.columns()[0],), np.array([1.0]), np.array([2.0]))
    problem = Problem("garch11", model, reference, "A normal law.")
    build = registry.build
    monkeypatch.setattr(registry, "build", lambda kind, spec: problem if kind == "problems" else build(kind, spec))
    monkeypatch.setitem(BEST_OF_FAMILY["mean_field"], "garch11", Errors(0.0, 0.0))
    return problem


def run(**options: Any) -> Any:
    return benchmark_named("references").run(Options(quick=True, families=("mean_field",), say=quiet, **options))


@pytest.mark.usefixtures("normal")
def test_an_exact_fit_reaches_the_best() -> None:
    report = run(repeats=2)
    (row,) = report.rows
    # two normal moments from DRAWS draws: five standard errors are 0.016 and 0.011
    assert row["gap"]["largest"] < 0.016
    assert row["stop_reason"] == "converged"
    assert row["reached"]
    assert not report.failed


@pytest.mark.usefixtures("normal")
def test_a_gap_in_either_direction_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    # errors smaller than those of the best of the family are no better: the fit then found something else
    monkeypatch.setitem(BEST_OF_FAMILY["mean_field"], "garch11", Errors(0.0, references.ALLOWED + 0.05))
    report = run()
    assert not report.rows[0]["reached"]
    assert report.failed


def test_a_problem_without_figures_is_a_remark() -> None:
    report = run(problems=("banana",))
    assert report.failed
    assert "no figure for 'banana'" in report.rows[0]["reason"]
