"""Advice: one sentence, by rules, in order."""

import dataclasses
import json
import math

import pytest

from vifamily.diagnostics.bounds import Estimate
from vifamily.diagnostics.diagnosis import Diagnosis, Subject, advise
from vifamily.diagnostics.stein import SteinTest

GOOD = Diagnosis(
    "converged", True, 800, 1.5, loss=Estimate(3.0, 0.01), elbo=Estimate(-3.0, 0.01), log_evidence=Estimate(-2.9, 0.01),
    k_hat=0.2, k_hat_error=0.05, importance_ess=3500.0, num_draws=4000, gradient_snr=0.4, rhat_iterates=1.01,
    mcse_iterates=0.02, num_restarts=4, restart_rhat=1.002, restart_worst="mu", restart_losses=(3.0, 3.0, 3.0, 3.1),
)  # fmt: skip
SUBJECT = Subject("mean_field", "elbo", 10)

CASES = {
    "broken": ({"stop_reason": "non_finite", "converged": False}, {}, "last finite state"),
    "NaN draws": ({"non_finite_draws": 3}, {}, "3 of 4000 draws"),
    "zero density": ({"zero_draws": 7}, {}, "density is zero"),
    "steps": ({"stop_reason": "max_steps", "converged": False}, {}, "used up its 800 steps"),
    "interrupted": ({"stop_reason": "interrupted", "converged": False}, {}, "interrupted at step 800"),
    "time": ({"stop_reason": "time_limit", "converged": False}, {}, "ran out of its time"),
    "callback": ({"stop_reason": "callback", "converged": False}, {}, "ended (callback)"),
    "restarts": ({"restart_rhat": 1.4}, {}, "4 restarts disagree (R-hat 1.40 for mu)"),
    "mean field": ({"k_hat": 0.9}, {}, "try full_rank"),
    "mean field, large": ({"k_hat": 0.9}, {"dim": 5000}, "try low_rank"),
    "full rank": ({"k_hat": 0.9}, {"family": "full_rank"}, "try flow"),
    "flow": ({"k_hat": math.inf}, {"family": "flow"}, "larger flow"),
    "user's": ({"k_hat": 0.9}, {"family": "mine"}, "richer family"),
    "few draws": ({"k_hat": 0.6, "k_hat_threshold": 0.5, "num_draws": 100}, {}, "repeat with diagnose("),
    "noise of iterates": ({"mcse_iterates": 0.4}, {}, "Monte-Carlo error of 0.40"),
    "moving": ({"rhat_iterates": 1.3}, {}, "still moving"),
    "ELBO error": ({"elbo": Estimate(-3.0, 2.0)}, {}, "±2 nats"),
    "blind": ({}, {"blind_to_mode_weights": True, "objective": "operator"}, "operator does not see"),
    "implicit": ({"k_hat": None, "k_hat_note": "implicit family (no density)"}, {}, "k-hat is unavailable (implicit"),
    "implicit, rejected": ({"k_hat": None, "stein": SteinTest(1.0, 0.002)}, {}, "Stein test finds"),
    "one restart": ({"restart_rhat": None, "num_restarts": 1}, {}, "restarts=4 would look"),
    "good": ({}, {}, "Nothing here speaks against"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_rule(name):
    figures, subject, expected = CASES[name]
    sentence = advise(dataclasses.replace(GOOD, **figures), dataclasses.replace(SUBJECT, **subject))
    assert expected in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_the_first_problem_is_named():
    bad = dataclasses.replace(GOOD, stop_reason="max_steps", converged=False, restart_rhat=2.0, k_hat=2.0)
    assert "steps" in advise(bad, SUBJECT)
    assert "disagree" in advise(dataclasses.replace(bad, converged=True, stop_reason="converged"), SUBJECT)


def test_closed_form_fits_count_as_finished():
    assert "Nothing here" in advise(dataclasses.replace(GOOD, stop_reason="closed_form"), SUBJECT)


def test_prints_as_a_table():
    text = str(dataclasses.replace(GOOD, advice="All is well.", notes=("started at [the prior]",)))
    for part in ("0.20 ± 0.05, at most its threshold 0.70", "-3 ± 0.01", "1.002 (mu)", "All is well.", "[the prior]"):
        assert part in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 110


def test_plain_data_survives_json():
    plain = dataclasses.replace(GOOD, k_hat=math.inf, elbo=Estimate(-math.inf, math.nan)).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["k_hat"] == "inf"
    assert GOOD.reliable is True
    assert dataclasses.replace(GOOD, k_hat=None).reliable is None
