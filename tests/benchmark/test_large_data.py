"""Streams of rows: made from a seed, counted as they are read, fitted at a cost per step that does not grow."""

import pytest
import torch

import vifamily as vf
from vifamily.benchmark import large_data
from vifamily.errors import ConfigError


def test_every_epoch_gives_the_same_rows_in_batches():
    source = large_data.LogisticRows(25, 3, seed=1, batch_size=10)
    first, second = list(source), list(source)
    assert [len(y) for _, y in first] == [10, 10, 5]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert source.rows_read == 50
    other = large_data.LogisticRows(25, 3, seed=2, batch_size=10)
    assert not torch.equal(next(iter(other))[0], first[0][0])


@pytest.mark.parametrize("bad", [{"rows": 0}, {"rows": 5, "dim": 0}, {"rows": 5, "batch_size": 2.5}])
def test_numbers_are_checked(bad):
    with pytest.raises(ConfigError, match="positive integer"):
        large_data.LogisticRows(bad.pop("rows"), bad.pop("dim", 2), **bad)


def test_newton_finds_the_mode_of_all_rows():
    source = large_data.LogisticRows(2000, 3, batch_size=300)
    mode, covariance = large_data.newton(source)
    x, y = (torch.cat(column).double() for column in zip(*source, strict=True))
    at = mode.clone().requires_grad_()
    log_joint = -torch.nn.functional.softplus((1 - 2 * y) * (x @ at)).sum() - 0.5 * (at / 2.0).square().sum()
    (gradient,) = torch.autograd.grad(log_joint, at)
    assert float((covariance @ gradient / covariance.diagonal().sqrt()).abs().max()) < 1e-6


def rows_of_steps(rows, steps, solver):
    source = large_data.LogisticRows(rows, 2, batch_size=50)
    vf.fit(large_data.logistic_model(source), "full_rank", solver=solver, steps=steps, seed=0, init=torch.zeros(2))
    return source.rows_read


@pytest.mark.parametrize("solver", ["adam", "natural_gradient(anchor=false)"])
def test_the_rows_that_a_step_reads_do_not_grow_with_the_data(solver):
    """Counted, not timed: five further steps read five batches, of twenty thousand rows and of 250,000."""
    per_step = [rows_of_steps(n, 15, solver) - rows_of_steps(n, 10, solver) for n in (20_000, 250_000)]
    assert per_step == [250, 250]


def test_with_an_anchor_the_data_are_passed_over_once():
    twice = [rows_of_steps(20_000, steps, "natural_gradient") for steps in (10, 15)]
    assert twice[1] - twice[0] == 250
    bare = rows_of_steps(20_000, 10, "natural_gradient(anchor=false)")
    assert 20_000 <= twice[0] - bare <= 20_000 + 100


def test_the_start_reads_some_ten_thousand_rows_of_a_million():
    source = large_data.LogisticRows(1_000_000, 2, batch_size=1000)
    model = large_data.logistic_model(source)
    before = source.rows_read
    fitted = vf.fit(model, "full_rank", solver="natural_gradient(anchor=false)", steps=1, seed=0)
    assert any("on 10000 of 1000000 data" in note for note in fitted.record.notes)
    assert source.rows_read - before < 20_000


def test_a_small_run_ends_at_the_answer_of_newtons_method():
    [row] = large_data.run(20_000, 4, batch_size=2000)
    assert row["stop_reason"] == "converged"
    # mode and mean differ by a term of the order of one over the root of the rows
    assert row["largest_mean_error"] < 0.1 and row["largest_log_sd_error"] < 0.05
    assert row["peak_memory_mb"] > 0 and row["rows"] == 20_000
