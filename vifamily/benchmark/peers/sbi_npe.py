"""sbi's NPE with its defaults, on given simulations; runs in an environment that has sbi."""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

from ._common import Clock, Job

__all__ = ["main"]

_ESTIMATORS = {"sbi": "nsf", "sbi_maf": "maf"}
"""The neural spline flow of the published tables, and the estimator that NPE takes by itself."""


def _prior(given: dict[str, Any]) -> Any:
    import torch
    from torch import distributions

    if given["kind"] == "box":
        low, high = (torch.tensor(given[key]) for key in ("low", "high"))
        return distributions.Independent(distributions.Uniform(low, high), 1)
    return distributions.MultivariateNormal(torch.tensor(given["mean"]), torch.tensor(given["covariance"]))


def main(path: str) -> None:
    """Do a job: train, then draw at every observation."""
    import torch
    from sbi.inference import NPE

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    job = Job(path)
    torch.manual_seed(job["seed"])  # this process is the peer's alone
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()  # outside every clock
    theta, data = (torch.from_numpy(job.data[key]) for key in ("theta", "x"))
    prior, estimator = _prior(job["prior"]), _ESTIMATORS[job["method"]]
    training, drawing = Clock(), Clock()
    training.go()
    inference = NPE(prior=prior, density_estimator=estimator, show_progress_bars=False)
    inference.append_simulations(theta, data)
    inference.train()
    posterior = inference.build_posterior()
    training.stop()
    drawing.go()
    draws = [
        posterior.sample((job["draws"],), x=x, show_progress_bars=False)
        for x in torch.from_numpy(job.data["observations"])
    ]
    drawing.stop()
    job.write(
        {"draws": torch.stack(draws).double().numpy()}, training=[training.wall, training.cpu],
        drawing=[drawing.wall, drawing.cpu], epochs=int(inference.summary["epochs_trained"][-1]),
        setting=f"NPE, {estimator}, defaults", versions={p: importlib.metadata.version(p) for p in ("torch", "sbi")},
    )  # fmt: skip
