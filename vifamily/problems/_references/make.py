"""Make the stored references again: ``python -m vifamily.problems._references.make breast_cancer``.

Runs Pyro's NUTS on the unconstrained log joint in float64, several chains one after the other from points spread around
the mode, and stores moments, thinned draws, R-hat and effective sample sizes. Takes minutes per problem; nothing else
in the package runs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import arviz
import numpy as np
import torch
from torch import Tensor

from vifamily.models import Model
from vifamily.problems._base import NUM_DRAWS
from vifamily.rng import generator, scoped, split

__all__ = ["NAMES", "Chains", "main", "run_chains"]

NAMES = ("breast_cancer", "poisson_glm", "student_t_regression")


@dataclasses.dataclass(frozen=True)
class Chains:
    """Markov chains on unconstrained space.

    Attributes:
        z: Draws ``(chain, draw, dim)``.
        divergences: Number of divergent transitions after warm-up.
    """

    z: Tensor
    divergences: int


def _mode(model: Model, start: Tensor) -> Tensor:
    z = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([z], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = -model.log_joint(z).sum()
        loss.backward()
        return loss

    solver.step(closure)
    return z.detach()


def run_chains(model: Model, *, seed: int, num_chains: int, num_draws: int, warmup: int) -> Chains:
    """Run NUTS with a dense mass matrix.

    Args:
        model: The model; its log joint is the target.
        seed: Root seed.
        num_chains: Chains, run one after the other.
        num_draws: Draws kept per chain.
        warmup: Steps of adaptation per chain.

    Returns:
        The chains.
    """
    from pyro.infer.mcmc import MCMC, NUTS

    mode = _mode(model, torch.zeros(1, model.dim, dtype=torch.float64))[0]
    chains, divergences = [], 0
    for chain in range(num_chains):
        source = generator(seed, "nuts/start", chain)
        start = mode + 0.5 * torch.randn(model.dim, generator=source, dtype=torch.float64)
        kernel = NUTS(
            potential_fn=lambda values: -model.log_joint(values["z"].unsqueeze(0))[0],
            full_mass=True,
            target_accept_prob=0.9,
            max_tree_depth=9,
        )
        with scoped(split(seed, "nuts/run", chain)):
            run = MCMC(
                kernel,
                num_samples=num_draws,
                warmup_steps=warmup,
                initial_params={"z": start},
                num_chains=1,
                disable_progbar=True,
            )
            run.run()
        chains.append(run.get_samples()["z"])
        divergences += sum(len(d) for d in run.diagnostics()["divergences"].values())
        print(f"  chain {chain + 1} of {num_chains} done", flush=True)
    return Chains(torch.stack(chains), divergences)


def _store(name: str, model: Model, chains: Chains, folder: Path, command: str) -> dict[str, np.ndarray]:
    num_chains, num_draws, dim = chains.z.shape
    theta = model.layout.flatten(model.constrain(chains.z.reshape(-1, dim)))
    columns = theta.reshape(num_chains, num_draws, -1).numpy()
    data = arviz.convert_to_dataset({"x": columns})
    flat = columns.reshape(-1, columns.shape[-1])
    keep = np.linspace(0, len(flat) - 1, NUM_DRAWS).round().astype(int)
    arrays = {
        "names": np.array(model.layout.columns()),
        "draws": flat[keep].astype(np.float32),
        "mean": flat.mean(0),
        "sd": flat.std(0, ddof=1),
        "mcse_mean": arviz.mcse(data, method="mean")["x"].to_numpy(),
        "rhat": arviz.rhat(data)["x"].to_numpy(),
        "ess_bulk": arviz.ess(data, method="bulk")["x"].to_numpy(),
        "ess_tail": arviz.ess(data, method="tail")["x"].to_numpy(),
        "num_chains": np.array(num_chains),
        "num_draws": np.array(num_chains * num_draws),
        "divergences": np.array(chains.divergences),
        "command": np.array(command),
    }
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    return arrays


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the references named on the command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m vifamily.problems._references.make",
        description="Make stored references again by long NUTS runs.",
    )
    parser.add_argument("name", choices=NAMES, help="problem whose reference to make")
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--draws", type=int, default=2500, help="draws kept per chain")
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where to write the file")
    given = parser.parse_args(arguments)
    command = (
        f"python -m vifamily.problems._references.make {given.name} --chains {given.chains} --draws {given.draws} "
        f"--warmup {given.warmup} --seed {given.seed}"
    )
    began = time.perf_counter()
    model = importlib.import_module(f"vifamily.problems.{given.name}").make_model()
    chains = run_chains(model, seed=given.seed, num_chains=given.chains, num_draws=given.draws, warmup=given.warmup)
    stored = _store(given.name, model, chains, given.folder, command)
    least = min(stored["ess_bulk"].min(), stored["ess_tail"].min())
    print(
        f"{given.name}: R-hat at most {stored['rhat'].max():.4f}, effective sample size at least {least:.0f}, "
        f"{chains.divergences} divergences, {time.perf_counter() - began:.0f} s"
    )
    return 0 if stored["rhat"].max() < 1.01 else 1


if __name__ == "__main__":
    sys.exit(main())
