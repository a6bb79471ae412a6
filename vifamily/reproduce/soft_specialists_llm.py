"""Soft specialists on language models: contradictory answers and preferences, on a base trained from scratch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from vifamily.llm import specialists as lab
from vifamily.llm.specialists import Base, PairFigures, Settings, Specialisation
from vifamily.plots import _style as style
from vifamily.plots import responsibilities as responsibility_map
from vifamily.reproduce._report import Claim, Options, Paper, Reproduction
from vifamily.reproduce._soft_specialists_baselines import (
    INDEPENDENT,
    SOFT,
    Baseline,
    baseline_claims,
    baselines,
    compare,
)

__all__ = ["PAPER", "run"]

_HIGH = 0.8
_SHARED, _APART = 0.1, 0.5
"""Route information below which members share all answers, and above which they share them out."""
_RAMPED = 0.3
"""From here on alpha rises from 0.01 over 200 steps: at once it also shares out clean answers that all could keep."""
_PAIRS = ((1, 0.8), (2, 0.4), (2, 0.8), (8, 0.05), (8, 0.8))
_QUICK_PAIRS = ((1, 0.8), (8, 0.05), (8, 0.8))


def run(options: Options) -> Reproduction:
    """Run the small experiments on language models.

    The published figures are those of an earlier measurement on a model of this size, not of the paper's own runs on
    models of billions of parameters.
    """
    alphas = (0.0, 0.03, 0.05, _HIGH) if options.quick else (0.0, 0.01, 0.03, 0.05, 0.1, 0.3, _HIGH)
    seeds = 1 if options.quick else 3
    base = lab.symbol_base(seed=options.seed, say=options.say)
    corpus, held = lab.conflict(seed=options.seed), lab.conflict(200, 100, seed=options.seed + 1)
    found: list[tuple[int, Specialisation]] = []
    compared: list[Baseline] = []
    for seed in range(seeds):
        for alpha in alphas:
            settings = Settings(alpha, ramp=200 if alpha >= _RAMPED else 0, seed=options.seed + seed)
            model = lab.train(base, corpus, settings)
            measured = lab.measure(model, base, held, alpha)
            if not seed and alpha in (0.0, _HIGH):
                compared.append(compare(SOFT if alpha else INDEPENDENT, model, base, held))
            options.say(f"answers, alpha {alpha:g}, seed {seed}: {_line(measured)}")
            found.append((seed, measured))
    options.say("baselines ...")
    compared = [*baselines(base, corpus, held, Settings(_HIGH, seed=options.seed), options.say), *compared]
    options.say("the critical alpha at one member ...")
    predicted = lab.critical_alpha(base, corpus, Settings(0.0, seed=options.seed))
    pairs = [_preferences(base, size, alpha, options) for size, alpha in (_QUICK_PAIRS if options.quick else _PAIRS)]
    shown = max((s for _, s in found if s.alpha == _HIGH), key=lambda s: -s.mixture_nll)
    return Reproduction(
        [*_answer_claims(found), _threshold_claim(found, predicted), *_pair_claims(pairs), *baseline_claims(compared)],
        figures={
            "transition": _transition(found, predicted.alpha_star),
            "routing": responsibility_map(shown.routing.weight.numpy(), unit="answer", title="alpha 0.8"),
        },
        tables={
            "answers": [{"seed": seed, **s.plain()} for seed, s in found],
            "preferences": [p.plain() for p in pairs],
            "baselines": [b.plain() for b in compared],
            "damping": [{"damping": d, "alpha_star": a} for d, a in predicted.sweep],
        },
    )


def _line(s: Specialisation) -> str:
    return f"mixture {s.mixture_nll:.3f}, member {s.member_nll:.2f}, route information {s.route_information:.3f}"


def _preferences(base: Base, size: int, alpha: float, options: Options) -> PairFigures:
    groups = 1024 // size
    settings = Settings(
        alpha, rank=4, steps=250, learning_rate=2e-3, unit="group", batch_size=max(1, 32 // size), seed=options.seed
    )
    model = lab.train(base, lab.preferences(groups, size, seed=options.seed), settings)
    held = lab.preferences(max(16, 128 // size), size, seed=options.seed + 1)
    found = lab.measure_pairs(model, base, held, settings)
    options.say(
        f"preferences, {size} a group, alpha {alpha:g}: route information {found.route_information:.3f}, "
        f"{found.mixture_nll:.3f} nats a pair, accuracy {found.accuracy:.2f}"
    )
    return found


# --- claims ---


def _answer_claims(found: Sequence[tuple[int, Specialisation]]) -> list[Claim]:
    high = [s for _, s in found if s.alpha == _HIGH]
    low = [s for _, s in found if s.alpha <= 0.03]
    gap = max(s.mixture_nll - s.ideal for s in high)
    torn, clean = min(s.conflicting_information for s in high), max(s.clean_information for s in high)
    route = max(s.route_information for s in low)
    return [
        Claim(
            "At alpha 0.8 the mixture's loss on contradictory answers is within 0.1 nats of its ideal for the split",
            "0.702 against 0.693", f"{max(s.mixture_nll for s in high):.3f} against {high[0].ideal:.3f}", None,
            gap < 0.1, f"largest gap over seeds {gap:.3f}",
        ),
        Claim(
            "There members disagree on the first token of conflicting prompts (more than 0.4 nats of information)",
            0.632, torn, None, torn > 0.4, "smallest over seeds",
        ),
        Claim(
            "and agree on that of clean prompts (less than 0.01 nats)", 0.0032, clean, None, clean < 0.01,
            "largest over seeds; alpha rises to 0.8 over 200 steps, and without that clean answers are shared out too",
        ),
        Claim(
            "At alpha up to 0.03 members share all answers", "0.011 of 1", route, None, route < _SHARED,
            f"largest route information below {_SHARED}",
        ),
    ]  # fmt: skip


def transition(found: Sequence[tuple[int, Specialisation]]) -> float | None:
    """Where members start to share answers out: between the last alpha with little and the first with much.

    None where these are further apart than a factor of two, or out of order.
    """
    means: dict[float, list[float]] = {}
    for _, s in found:
        means.setdefault(s.alpha, []).append(s.route_information)
    mean = {alpha: sum(values) / len(values) for alpha, values in sorted(means.items())}
    below = [alpha for alpha, value in mean.items() if value < _SHARED and alpha > 0]
    above = [alpha for alpha, value in mean.items() if value > _APART]
    if not below or not above or not max(below) < min(above) <= 2 * max(below):
        return None
    return math.sqrt(max(below) * min(above))


def _threshold_claim(found: Sequence[tuple[int, Specialisation]], predicted: Any) -> Claim:
    measured, star = transition(found), float(predicted.alpha_star)
    words = f"sweep over dampings: {', '.join(f'{d:g}: {a:.3g}' for d, a in predicted.sweep)}"
    claim = "The transition lies within a factor of two of the critical alpha predicted at one member, damping 0.001"
    if measured is None:
        return Claim(claim, "between 0.03 and 0.05 against 0.035", None, None, None, "the grid does not place it")
    holds = 0.5 <= measured / star <= 2.0
    return Claim(claim, "between 0.03 and 0.05 against 0.035", f"{measured:.3g} against {star:.3g}", None, holds, words)


def _pair_claims(pairs: Sequence[PairFigures]) -> list[Claim]:
    claims = []
    for p in pairs:
        above = p.size > 1 and p.alpha > 1 / p.size
        holds = p.route_information > 0.9 if above else p.route_information < _SHARED
        claims.append(
            Claim(
                f"Contradictory preferences in groups of {p.size} at alpha {p.alpha:g}: members "
                + ("share the groups out" if above else "do not specialise"),
                f"critical alpha {1 / p.size:.3g}",
                p.route_information,
                None,
                holds,
                f"{p.mixture_nll:.3f} nats a pair" + (f", ideal {math.log(2) / p.size:.3f}" if above else ""),
            )  # fmt: skip
        )
    last = pairs[-1]
    claims.append(
        Claim(
            f"Two populations of annotators are told apart: held-out accuracy with groups of {last.size} above 0.95",
            1.0,
            last.accuracy,
            None,
            last.accuracy > 0.95,
            "members weighted by the other pairs of the group",
        )  # fmt: skip
    )
    return claims


# --- picture ---


def _transition(found: Sequence[tuple[int, Specialisation]], star: float) -> Figure:
    figure = style.new_figure(7.2, 4.0)
    left, right = figure.subplots(1, 2)
    shown = [(max(s.alpha, 0.005), s) for _, s in found]  # zero has no place on a logarithmic axis
    for axes, series in (
        (left, (("mixture_nll", style.POSTERIOR, "mixture"), ("member_nll", style.REFERENCE, "member"))),
        (right, (("route_information", style.POSTERIOR, "route information"),
                 ("conflicting_information", style.ACCENT, "first token, conflicting"),
                 ("clean_information", style.REFERENCE, "first token, clean"))),
    ):  # fmt: skip
        style.dress(axes, grid=True)
        for name, colour, label in series:
            axes.plot(*zip(*[(a, getattr(s, name)) for a, s in shown], strict=True), "o", color=colour, markersize=4,
                      label=label)  # fmt: skip
        axes.axvline(star, color=style.GREY, linestyle=":", linewidth=1.2, label="predicted critical alpha")
        axes.set_xscale("log")
        axes.set_xlabel("alpha (0 at the left edge)", fontsize=style.LABEL_SIZE, color=style.INK)
        # above the panel: points may lie anywhere inside
        handles = axes.get_legend_handles_labels()[0]
        style.legend(axes, handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
    left.set_yscale("log")
    left.set_ylabel("nats per conflicting answer", fontsize=style.LABEL_SIZE, color=style.INK)
    right.set_ylabel("information", fontsize=style.LABEL_SIZE, color=style.INK)
    return figure


PAPER = Paper(
    title="Soft Specialists on language models: contradictory answers and preferences, on a small base from scratch",
    source="arXiv 2605.27747; figures of the miniature experiments are our own",
    run=run,
)
