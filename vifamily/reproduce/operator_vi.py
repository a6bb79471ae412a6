"""Operator variational inference (Ranganath, Altosaar, Tran and Blei 2016), its findings run again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vifamily import registry
from vifamily.fit import fit
from vifamily.models import Density
from vifamily.reproduce._operator_vi_digits import METHODS, completion
from vifamily.reproduce._operator_vi_mixture import FITS, Fitted, mixture_figure, mixture_fit
from vifamily.reproduce._report import Claim, Options, Paper, Reproduction
from vifamily.rng import draw_noise, generator
from vifamily.types import LatentSpec, NoiseSpec

__all__ = ["PAPER"]

_WITHIN = {"mean field, KL": 0.3, "mean field, Langevin-Stein": 0.3, "program, Langevin-Stein": 0.6}
"""Nats below the exact score that still count as reached."""


def run(options: Options) -> Reproduction:
    """Run the paper's findings again.

    Args:
        options: ``quick`` takes one seed of each fit, twenty images and fewer steps.
    """
    claims = [*_closeness(options), *_subsampling(options)]
    mixture, figure, rows = _mixture(options)
    claims += mixture
    claims += _implicit(options)
    claims += _discrete()
    images, table = _images(options)
    claims += images
    return Reproduction(claims, {"mixture": figure}, {"mixture": rows, "completion": table})


# -- operators ---------------------------------------------------------------------------------------------------------
def _closeness(options: Options) -> list[Claim]:
    """Means of the operators under the target itself, over eight test functions each."""
    options.say("means of the operators under the target")
    worst = 0.0
    model = registry.build("problems", "bimodal").model
    source = generator(options.seed, "closeness")
    each = torch.randint(2, (200_000,), generator=source).double()
    z = (6 * each - 3 + torch.randn(each.shape, generator=source, dtype=torch.float64)).unsqueeze(-1)
    for k in range(8):
        objective = registry.build("objectives", "operator")
        family = registry.build("families", "full_rank").build(LatentSpec(1), generator=source)
        state = objective.init_state(model, family, generator=generator(options.seed, "critic", k))
        values = _operator_values(objective, model, z, state)
        worst = max(worst, abs(float(values.mean())) / (float(values.std()) / math.sqrt(len(values))))
    logs = torch.tensor([0.4, -0.3, 1.1, 0.0], dtype=torch.float64)
    p = logs.softmax(0)
    f = torch.cat([torch.zeros(1, dtype=torch.float64), torch.randn(3, generator=source, dtype=torch.float64)])
    fp = torch.cat([f * p, torch.zeros(1, dtype=torch.float64)])
    total = float((p * (fp[1:] - fp[:-1]) / p).sum())
    return [
        Claim(
            "The Langevin-Stein operator has mean zero under the posterior, whatever the test function", "0",
            worst, None, worst < 5, "largest of eight means in standard errors, below five",
        ),
        Claim(
            "So has the discrete operator, on finite states with f(0) = 0", "0", total, None, abs(total) < 1e-12,
            "an exact sum over four states",
        ),
    ]  # fmt: skip


def _operator_values(objective: Any, model: Any, z: Tensor, state: Any) -> Tensor:
    from vifamily.types import Draw

    draw = Draw(z, None, z.new_zeros(len(z)))
    values: Tensor = objective.rule.values(draw, model, None, state.critic, None)[0].detach()
    return values


def _subsampling(options: Options) -> list[Claim]:
    """Losses of the minibatches of an epoch against that of all data, at one critic and on the same noise."""
    options.say("minibatches")
    model = registry.build("problems", "diabetes").model
    objective = registry.build("objectives", "operator")
    family = registry.build("families", "mean_field").build(LatentSpec(model.dim), generator=generator(0, "family"))
    state = objective.init_state(model, family, generator=generator(0, "critic"))
    noise = draw_noise(NoiseSpec((model.dim,)), (64,), generator(options.seed, "noise"))
    size = 34  # thirteen batches of the 442 data
    batches = model.batches(size, seed=0)
    parts = [objective.loss(family, model, noise, batches.at(i), state).value for i in range(model.num_data // size)]
    whole = float(objective.loss(family, model, noise, None, state).value)
    off = abs(float(torch.stack(parts).mean()) - whole) / (1 + abs(whole))
    return [
        Claim(
            "Langevin-Stein admits data subsampling: it is linear in log p", "unbiased", off, None, off < 1e-9,
            f"relative difference of the mean over the {len(parts)} batches of an epoch from all data, below 1e-9",
        )
    ]  # fmt: skip


# -- the mixture -------------------------------------------------------------------------------------------------------
def _mixture(options: Options) -> tuple[list[Claim], Any, list[dict[str, Any]]]:
    seeds = range(options.seed, options.seed + (1 if options.quick else 5))
    found: dict[str, list[Fitted]] = {}
    for name in FITS:
        options.say(f"mixture: {name}")
        found[name] = [mixture_fit(name, seed) for seed in seeds]
    options.say("mixture: unequal weights")
    blind = [mixture_fit("program, Langevin-Stein", seed, 0.2) for seed in seeds]
    program, squared = found["program, Langevin-Stein"], found["program, squared form"]
    kl, stein = found["Gaussian, KL"], found["Gaussian, Langevin-Stein"]
    worst = max(one.distance for one in program)
    moments = {name: _moments(found[name]) for name in ("Gaussian, KL", "Gaussian, Langevin-Stein")}
    near = all(abs(abs(float(o.z.mean())) - 3.04) < 0.1 and abs(float(o.z.std()) - 0.98) < 0.1 for o in stein)
    one_mode = min(min(o.upper, 1 - o.upper) for o in kl + stein)
    claims = [
        Claim(
            "A Gaussian fits one mode, by KL and by Langevin-Stein", "figure only",
            "; ".join(f"{name}: {text}" for name, text in moments.items()), None, one_mode < 0.02 and near,
            "less than 2 % of mass beyond zero; Langevin-Stein within 0.1 of (3.04, 0.98), by quadrature",
        ),
        Claim(
            "A variational program with the Langevin-Stein objective captures both modes", "figure only",
            f"Wasserstein-1 {np.mean([o.distance for o in program]):.3f}, worst of {len(program)} seeds {worst:.3f}",
            None, worst <= 0.2, "worst at most 0.2, from a wide start with the penalised form",
        ),
        Claim(
            "The squared form, as published, with steps of 1:10 and weights of norm two", "figure only",
            f"Wasserstein-1 {', '.join(f'{o.distance:.2f}' for o in squared)} after at most "
            f"{max(o.record.steps for o in squared)} steps",
            None, None, "the paper gives neither steps nor iterations of this run: reported, not judged",
        ),
        Claim(
            "Beyond the paper: on modes of unequal weights the program stays at a half and a half", None,
            f"target 0.2 and 0.8: mass above zero {np.mean([o.upper for o in blind]):.3f}, Wasserstein-1 "
            f"{np.mean([o.distance for o in blind]):.2f}",
            None, None, "measured, and no claim of the paper: its program comes right because its switch has the "
            "weights of the target; scores cannot tell them",
        ),
    ]  # fmt: skip
    shown = [found[n][0] for n in ("Gaussian, KL", "Gaussian, Langevin-Stein", "program, Langevin-Stein")]
    rows = [
        {"fit": one.name, "seed": one.record.seed, "distance": one.distance, "above_zero": one.upper,
         "steps": one.record.steps, "stop": one.record.stop_reason, "weight": w}
        for group, w in [*((g, 0.5) for g in found.values()), (blind, 0.2)] for one in group
    ]  # fmt: skip
    return claims, mixture_figure(shown, blind[0], 0.2), rows


def _moments(found: list[Fitted]) -> str:
    mean, sd = (np.mean([float(getattr(one.z, what)()) for one in found]) for what in ("mean", "std"))
    return f"mean {mean:.2f}, sd {sd:.2f}"


# -- families without density, discrete latents ------------------------------------------------------------------------
def _implicit(options: Options) -> list[Claim]:
    options.say("a sampler without density on a banana")
    problem = registry.build("problems", "banana")
    posterior = fit(problem, "implicit(hidden=[32, 32])", "operator", seed=options.seed, progress=False,
                    steps=2000 if options.quick else 4000)  # fmt: skip
    z = posterior.draws(20_000)
    reference = torch.as_tensor(np.asarray(problem.reference.mean)), torch.as_tensor(np.asarray(problem.reference.sd))
    off = float(((z.mean(0) - reference[0]) / reference[1]).abs().max())
    spread = float((z.std(0) / reference[1]).log().abs().max())
    return [
        Claim(
            "Families need no tractable density: a sampler network is fitted with scores alone", "possible",
            f"banana: means within {off:.2f} sd, log sds within {spread:.2f}", None, off < 0.3 and spread < 0.4,
            "means within 0.3 posterior sds, log sds within 0.4",
        )
    ]  # fmt: skip


def _discrete() -> list[Claim]:
    logs = torch.tensor([0.5, -1.0, 0.8, 0.2, -0.6], dtype=torch.float64)
    model = Density(lambda theta: logs[theta["k"].long()], parameters={"k": ((), "integer_interval(0, 4)")})
    posterior = fit(model, "categorical", "discrete_stein", seed=0, progress=False)
    family: Any = posterior.family
    off = float((family.log_probabilities().exp()[0] - logs.softmax(0)).abs().max())
    return [
        Claim(
            "The discrete operator fits discrete latents", "stated", off, None, off < 1e-3,
            "largest error of five probabilities, below 0.001",
        )
    ]  # fmt: skip


# -- images ------------------------------------------------------------------------------------------------------------
def _images(options: Options) -> tuple[list[Claim], list[dict[str, Any]]]:
    seeds = range(options.seed, options.seed + (1 if options.quick else 3))
    images, steps = (20, 500) if options.quick else (100, 800)
    rows = []
    for seed in seeds:
        options.say(f"image completion, seed {seed}")
        rows += completion(seed, images=images, steps=steps)
    table = [_mean_row(rows, name) for name in ("prior", "exact", *METHODS)]
    score = {row["method"]: row for row in table}
    published = {"mean field, KL": "-59.3", "mean field, Langevin-Stein": "-75.3", "program, Langevin-Stein": "-58.9"}
    claims = [
        Claim(
            f"Completion of hidden pixels, {name} (published: MNIST, 784 pixels, ten latents)",
            published[name],
            f"{score[name]['score']:.3f} (exact {score['exact']['score']:.3f}, prior {score['prior']['score']:.3f})",
            score[name]["error"],
            all(r["below_exact"] <= _WITHIN[name] for r in rows if r["method"] == name)
            and score[name]["score"] > score["prior"]["score"] + 1,
            f"8x8 digits, log p(hidden | seen) per image: each of {len(seeds)} seeds at most {_WITHIN[name]} "
            "below the exact score, and above the prior by 1; the published number is of another data set",
        )
        for name in METHODS
    ]
    gap = score["mean field, Langevin-Stein"]["score"] - score["mean field, KL"]["score"]
    claims.append(
        Claim(
            "Mean field by Langevin-Stein completes far worse than by KL, and the program mends it", "16.0 nats worse",
            f"{gap:+.3f} nats", None, None,
            "data, metric and optimisation of the published number are not here or not given in full; where the critic "
            "follows, the best of mean field is next to the exact score by both, with nothing for a program to mend",
        )
    )  # fmt: skip
    return claims, [*table, *rows]


def _mean_row(rows: list[dict[str, Any]], method: str) -> dict[str, Any]:
    mine = [row for row in rows if row["method"] == method]
    out = {key: float(np.mean([row[key] for row in mine])) for key in ("score", "error", "below_exact", "sd")}
    return {"method": method, "seed": "all", **out}


PAPER = Paper("Operator Variational Inference", "Ranganath, Altosaar, Tran and Blei, NIPS 2016, arXiv 1610.09033", run)
