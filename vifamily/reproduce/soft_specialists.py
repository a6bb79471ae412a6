"""Soft specialists: when ensembles under the alpha-Rényi loss divide the data among themselves."""

from __future__ import annotations

import dataclasses

from vifamily.reproduce._report import Claim, Options, Paper, Reproduction
from vifamily.reproduce._soft_specialists_behaviour import behaviour_claims, gaussian_spread, hysteresis, transient
from vifamily.reproduce._soft_specialists_figures import (
    hysteresis_figure,
    responsibility_figure,
    spread_figure,
    transient_figure,
)  # fmt: skip
from vifamily.reproduce._soft_specialists_thresholds import sides_of_the_threshold, threshold_claims

__all__ = ["PAPER", "run"]

_LANGUAGE = "needs language models of one to eight billion parameters, which are not shipped"
_NOT_HERE = (
    ("Fine-tuning eight adapters on MMLU: clear specialists at alpha 0.8, gains on questions the base model got wrong "
     "(paper)", "alpha 0.8 against 0"),
    ("Preference tuning on OR-Bench, hard split: variance of members' refusals rises for Phi-3 (paper)",
     "0.054 to 0.118"),
)  # fmt: skip


def run(options: Options) -> Reproduction:
    """Run the toy experiments again.

    What the paper claims and what was derived for this package from its criterion stand side by side, and each claim
    says which it is.
    """
    options.say("both sides of the threshold ...")
    sides = sides_of_the_threshold(options)
    claims = threshold_claims(options, sides)
    options.say("limits, routing, outliers, transients ...")
    path = transient(options)
    options.say("hysteresis ...")
    branches = hysteresis(options)
    claims += [*behaviour_claims(options, branches, path), gaussian_spread(options)]
    claims += [Claim(claim, published, None, None, None, _LANGUAGE) for claim, published in _NOT_HERE]
    options.say("figures ...")
    spread, rows = spread_figure(options)
    return Reproduction(
        claims,
        figures={
            "spread": spread,
            "responsibilities": responsibility_figure(options),
            "hysteresis": hysteresis_figure(branches),
            "transient": transient_figure(path),
        },
        tables={
            "sides": [dataclasses.asdict(side) | {"as_predicted": side.as_predicted} for side in sides],
            "spread": rows,
            "hysteresis": [dataclasses.asdict(branch) for branch in branches],
        },
    )


PAPER = Paper(
    title="Soft Specialists: alpha-Rényi ensembles of low-rank adapters (Cordero-Encinar, Tyukin and Duncan 2026)",
    source="arXiv 2605.27747",
    run=run,
)
