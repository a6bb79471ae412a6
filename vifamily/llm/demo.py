"""The demonstration: a base from scratch, members that specialise, and pictures of who answers what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from vifamily.llm import specialists as lab
from vifamily.llm.saving import save_members
from vifamily.llm.specialists import Settings, Specialisation
from vifamily.llm.tiny import save_base
from vifamily.plots import _style as style
from vifamily.plots import responsibilities as responsibility_map
from vifamily.report import png, write_bytes, write_text

__all__ = ["run", "table", "uncertainty_figure"]


def run(
    folder: Path, *, quick: bool = False, seed: int = 0, say: Callable[[str], None] = print
) -> tuple[list[Specialisation], list[Path]]:
    """Train an ensemble at alpha 0.8 and one at alpha 0 on the same contradictory answers, and compare them.

    Args:
        folder: Where the base, the ensemble, two pictures and the figures go.
        quick: Far too few steps to specialise, to see that everything runs.
        seed: Root seed.
        say: Called with a line on what is being done.

    Returns:
        What was measured of both, and the files.
    """
    length = 2 if quick else 6
    say("a base from scratch: copy, reverse and increment of six symbols ...")
    base = lab.symbol_base(steps=40 if quick else 600, length=length, seed=seed, say=say)
    size = (24, 8) if quick else (2000, 500)
    corpus, held = lab.conflict(*size, length=length, seed=seed), lab.conflict(40, 40, length=length, seed=seed + 1)
    say("a new task, answered by copying in half of the records and by reversing in the rest ...")
    found, model = [], None
    for alpha in (0.0, 0.8):
        steps = 4 if quick else 500
        settings = Settings(alpha, steps=steps, ramp=steps * 2 // 5 if alpha else 0, seed=seed)
        say(f"four members at alpha {alpha:g}, {steps} steps ...")
        model = lab.train(base, corpus, settings)
        found.append(lab.measure(model, base, held, alpha))
    written = [save_base(folder / "base", base.model, base.tokenizer)]
    if model is not None:
        model.config._name_or_path = str((folder / "base").resolve())
        save_members(model, folder / "ensemble", training={"objective": "sft", "renyi_alpha": 0.8, "unit": "sequence"})
        base.tokenizer.save_pretrained(folder / "ensemble")
        written.append(folder / "ensemble")
    title = "who explains which contradictory answer, alpha 0.8"
    routing = responsibility_map(found[-1].routing.weight.numpy(), unit="answer", title=title)
    written += [
        write_bytes(folder / "routing.png", png(routing)),
        write_bytes(folder / "uncertainty.png", png(uncertainty_figure(found))),
        write_text(folder / "figures.json", json.dumps([s.plain() for s in found], indent=1) + "\n"),
    ]
    return found, written


def table(found: list[Specialisation]) -> Table:
    """Return what was measured as a table."""
    out = Table(show_edge=False)
    for head in (
        "alpha",
        "mixture",
        "member",
        "route information",
        "first token, conflicting",
        "clean",
        "exact copy, reverse",
    ):
        out.add_column(head)
    for s in found:
        exact = "  ".join(f"{a:.2f}, {b:.2f}" for a, b in s.exact)
        out.add_row(
            f"{s.alpha:g}", f"{s.mixture_nll:.3f}", f"{s.member_nll:.2f}", f"{s.route_information:.3f}",
            f"{s.conflicting_information:.3f}", f"{s.clean_information:.4f}", exact,
        )  # fmt: skip
    return out


def uncertainty_figure(found: list[Specialisation]) -> Figure:
    """Information of the member and the first token on conflicting and on clean prompts, by alpha."""
    figure = style.new_figure(5.2, 3.2)
    axes = figure.subplots()
    style.dress(axes, grid=True)
    for offset, name, colour, label in (
        (-0.18, "conflicting_information", style.POSTERIOR, "conflicting prompts"),
        (0.18, "clean_information", style.REFERENCE, "clean prompts"),
    ):
        heights = [getattr(s, name) for s in found]
        bars = axes.bar([i + offset for i in range(len(found))], heights, width=0.34, color=colour, label=label)
        axes.bar_label(bars, fmt="%.3f", fontsize=style.TICK_SIZE, color=style.INK)
    axes.set_xticks(range(len(found)), [f"alpha {s.alpha:g}" for s in found])
    axes.set_ylabel("epistemic uncertainty, nats", fontsize=style.LABEL_SIZE, color=style.INK)
    axes.margins(y=0.2)
    axes.legend(fontsize=style.TICK_SIZE, frameon=False, loc="upper left")
    return figure
