"""This package's neural posterior estimation on given simulations; run like the peers, in a process of its own."""

from __future__ import annotations

from ._common import Clock, Job

__all__ = ["main"]


def main(path: str) -> None:
    """Do a job: fit, then draw at every observation."""
    import torch

    from vifamily.fit import fit
    from vifamily.posterior import versions
    from vifamily.problems._sbibm_tasks import TASKS

    torch.set_num_threads(1)
    job = Job(path)
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()  # outside every clock
    simulator = TASKS[job["task"]].make()
    theta, data = (torch.from_numpy(job.data[key]) for key in ("theta", "x"))
    training, drawing = Clock(), Clock()
    training.go()
    posterior = fit(
        simulator.with_simulations(theta, data), job["family"], "inclusive_kl", seed=job["seed"], progress=False
    )
    training.stop()
    drawing.go()
    draws = [posterior(x).columns(job["draws"]) for x in torch.from_numpy(job.data["observations"])]  # type: ignore[operator]
    drawing.stop()
    record = posterior.record
    setting = f"{record.family}, {record.steps} steps of {record.draws_per_step}"
    job.write(
        {"draws": torch.stack(draws).double().numpy()}, training=[training.wall, training.cpu],
        drawing=[drawing.wall, drawing.cpu], epochs=len(record.trace["step"]), setting=setting,
        versions=dict(versions()),
    )  # fmt: skip
