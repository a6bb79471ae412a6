"""The stopping rule on chains whose law is known."""

import math

import numpy as np
import pytest
import torch

from vifamily.numerics.rhat import split_rhat
from vifamily.rng import generator
from vifamily.solvers._stopping import StageMonitor, StoppingRule, _worst_rhat

RULE = StoppingRule()


def feed(chain, rule=RULE, goal=None, first_step=0, *, native=False):
    """Give a chain ``(row, quantity)`` to a monitor as a run would; returns the verdict, the step and the monitor."""
    monitor = StageMonitor(rule, first_step, rule.mcse if goal is None else goal, native=native)
    for i, row in enumerate(chain):
        monitor.add(row)
        step = first_step + (i + 1) * rule.every
        if (step - first_step) % rule.check == 0:
            verdict = monitor.judge(step, torch.ones_like(row))
            if verdict is not None:
                return verdict, step, monitor
    return None, first_step + len(chain) * rule.every, monitor


def noise(rows, columns=3, *, seed, rho=0.0):
    """Autoregressive chains of unit variance."""
    source = generator(seed, "chain")
    shocks = torch.randn(rows, columns, generator=source, dtype=torch.float64)
    out = [shocks[0]]
    for shock in shocks[1:]:
        out.append(rho * out[-1] + math.sqrt(1 - rho**2) * shock)
    return torch.stack(out)


def test_nothing_is_said_before_there_is_enough_to_judge():
    verdict, _, monitor = feed(torch.zeros(RULE.window // RULE.every - 1, 2))
    assert verdict is None
    assert monitor.stationary_from is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_a_stationary_chain_ends_when_its_average_is_known(seed, rho):
    sd = 0.1
    verdict, step, monitor = feed(sd * noise(1000, seed=seed, rho=rho))
    assert verdict == "done"
    assert monitor.error < RULE.mcse
    assert monitor.rhat < RULE.rhat
    # the error of the mean of n correlated numbers is sd sqrt((1 + rho) / (1 - rho) / n)
    needed = (sd / RULE.mcse) ** 2 * (1 + rho) / (1 - rho) * RULE.every
    assert 0.3 * needed < step < 8 * max(needed, RULE.window)


@pytest.mark.parametrize("seed", range(3))
def test_a_drift_is_not_taken_for_stationarity(seed):
    rows = RULE.stage // RULE.every
    drift = torch.linspace(0, 30, rows, dtype=torch.float64).unsqueeze(-1)
    verdict, step, monitor = feed(drift + 0.1 * noise(rows, 1, seed=seed))
    assert (verdict, step) == ("slow", RULE.stage)
    assert monitor.stationary_from is None
    assert monitor.rhat > RULE.rhat


def test_one_drifting_quantity_among_still_ones_is_enough_to_go_on():
    chain = 0.01 * noise(400, 5, seed=1)
    chain[:, 3] += torch.linspace(0, 8, 400, dtype=torch.float64)
    assert feed(chain)[0] is None


def test_a_transient_is_left_out_of_the_window():
    decay = 5 * torch.exp(-torch.arange(1000, dtype=torch.float64) / 10).unsqueeze(-1)
    verdict, step, monitor = feed(decay + 0.05 * noise(1000, 1, seed=2))
    assert verdict == "done"
    kept = decay[monitor.stationary_from // RULE.every : step // RULE.every]
    assert float(kept.mean()) < 2 * RULE.mcse
    assert float(kept.mean()) < 0.1 * float(decay[: step // RULE.every].mean())


def test_quantities_that_have_stopped_moving_count_as_stationary():
    # R-hat of a vanishing drift is large whatever its size
    crawl = 1e-5 * torch.linspace(0, 1, 200, dtype=torch.float64).unsqueeze(-1)
    verdict, _, monitor = feed(crawl)
    assert verdict == "done"
    assert monitor.rhat == 1.0


def test_units_scale_what_is_watched():
    rows = 0.1 * noise(400, 1, seed=0)
    coarse, fine = StageMonitor(RULE, 0, RULE.mcse), StageMonitor(RULE, 0, RULE.mcse)
    for row in rows:
        coarse.add(row)
        fine.add(row)
    coarse.judge(2000, torch.full((1,), 10.0, dtype=torch.float64))
    fine.judge(2000, torch.full((1,), 0.1, dtype=torch.float64))
    assert fine.error == pytest.approx(100 * coarse.error, rel=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_what_is_judged_in_c_ends_where_it_would_in_python(seed):
    decay = 5 * torch.exp(-torch.arange(1000, dtype=torch.float64) / 10).unsqueeze(-1)
    chain = decay + 0.1 * noise(1000, 3, seed=seed, rho=0.8)
    (said, step, python), (also, there, native) = feed(chain), feed(chain, native=True)
    assert (said, step, python.stationary_from) == (also, there, native.stationary_from)
    assert native.error == pytest.approx(python.error, rel=1e-9)
    assert native.rhat == pytest.approx(python.rhat, rel=1e-9)


def test_a_later_stage_counts_from_its_own_start():
    verdict, step, monitor = feed(0.05 * noise(1000, seed=0), first_step=1700)
    early, early_step, first = feed(0.05 * noise(1000, seed=0))
    assert (verdict, step - 1700) == (early, early_step)
    assert monitor.stationary_from - 1700 == first.stationary_from


def test_r_hat_of_several_windows_is_that_of_each_alone():
    chain = torch.randn(401, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chain[:, 1] += torch.linspace(0, 4, 401)
    chain[:, 2] = 1e6 + 1e-3 * chain[:, 2]
    chain[:, 3] = 2.0
    chain[:100, 4] += 1e5
    chain[:, 5] *= 1e-6
    widths = [40, 111, 200, 380]
    got = _worst_rhat(chain[-380:, :].numpy(), widths, np.zeros(6))
    for width, value in zip(widths, got.tolist(), strict=True):
        assert value == pytest.approx(float(split_rhat(chain[-width:]).max()), rel=1e-6)
    moving = _worst_rhat(chain[-380:, 1:2].numpy(), widths, np.full(1, 10.0))
    assert moving.tolist() == [1.0] * 4
