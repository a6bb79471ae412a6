"""Files of a single fit: the posterior, figures, one report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from vifamily import plots, report
from vifamily.compare.cells import plain
from vifamily.compare.measure import NUM_DRAWS, target_of
from vifamily.posterior import Posterior
from vifamily.problems._base import Problem

__all__ = ["save_fit"]


def _draws_figure(posterior: Posterior, problem: Problem, title: str) -> Figure:
    target = target_of(problem.name, problem)
    z = posterior.draws(NUM_DRAWS)
    with torch.no_grad():
        theta = problem.model.constrain(z)
        columns = problem.columns(theta) if target.names else problem.model.layout.flatten(theta)
    draws = np.asarray(columns.cpu(), dtype=np.float64)
    names = target.names or tuple(problem.model.layout.columns())
    if target.log_density is not None:
        return plots.contour(target.log_density, draws, names=names, reference=target.draws, title=title)
    draw = plots.pairs if draws.shape[1] <= 8 else plots.marginals
    return draw(draws, names, reference=target.draws, title=title)


def _trace_figure(posterior: Posterior, problem: Problem) -> Figure | None:
    trace = posterior.record.trace
    if "loss" not in trace or not np.isfinite(np.asarray(trace["loss"])).any():
        return None
    evidence = None if problem.reference is None else problem.reference.log_evidence
    return plots.loss_trace(
        trace["step"],
        trace["loss"],
        trace.get("loss_error"),
        step_size=trace.get("step_size"),
        level=None if evidence is None else -evidence,
    )


def save_fit(posterior: Posterior, problem: Problem, out: str | os.PathLike[str], *, title: str) -> dict[str, Path]:
    """Write the posterior, its figures, its numbers and a report into a folder.

    Args:
        posterior: What ``fit`` returned.
        problem: What was fitted.
        out: The folder; made where it is missing.
        title: Title of figures and report.

    Returns:
        Path of each file by name.

    Raises:
        ConfigError: If the folder cannot be written to.
    """
    folder = Path(out)
    diagnosis = posterior.diagnose()
    content: dict[str, Any] = {
        "title": title,
        "summary": posterior.summary().to_dict(),
        "diagnosis": diagnosis.to_dict(),
    }
    text = json.dumps(plain(content), allow_nan=False, indent=1, ensure_ascii=False) + "\n"
    files = {"summary.json": report.write_text(folder / "summary.json", text)}
    figures = {"draws": _draws_figure(posterior, problem, title), "trace": _trace_figure(posterior, problem)}
    pictures: list[report.Text | report.Picture | report.Table] = []
    alts = {
        "draws": "Posterior draws, with the reference where there is one.",
        "trace": "The loss against the step, with its error and the cuts of the step size.",
    }
    for name, figure in figures.items():
        if figure is not None:
            data = report.png(figure)
            files[f"{name}.png"] = report.write_bytes(folder / f"{name}.png", data)
            pictures.append(report.Picture(data, alt=alts[name]))
    posterior.save(folder / "posterior")
    files["posterior"] = folder / "posterior"
    rows = [[name, value] for name, value in diagnosis.rows()]
    files["report.html"] = report.write(
        folder / "report.html",
        title,
        report.Text(problem.description),
        report.Table(["figure", "value"], rows, caption="Diagnosis"),
        report.Text(str(posterior.summary()), heading="Summary", fixed=True),
        *pictures,
    )
    return files
