"""Pathfinder: Gaussians along quasi-Newton paths, the best by ELBO, draws of all paths weighted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vifamily.errors import ConfigError, NonFiniteLossError
from vifamily.numerics.psis import FEWEST_DRAWS
from vifamily.registry import register
from vifamily.rng import generator, split
from vifamily.solvers._base import Run, Solver, StepReport, Task
from vifamily.solvers._gaussian_answer import fresh_losses, members_of, refuse, start_of, write_back, write_gaussian
from vifamily.solvers._paths import Answer, Dialogue, Found, NoGaussian, Request, evaluate, find
from vifamily.types import Capability

__all__ = ["Pathfinder"]

_SPARE_STARTS = 4
_NO_WEIGHT = -1e4
"""A log weight whose exponential is zero, and which is finite."""


@register("solvers", "pathfinder")
@dataclasses.dataclass(frozen=True)
class Pathfinder(Solver):
    r"""Pathfinder: Gaussians along quasi-Newton paths, chosen by ELBO, their draws importance-weighted.

    L-BFGS climbs the log joint from ``paths`` start points at once. At every point :math:`x` that it accepts, its
    inverse-Hessian estimate gives a Gaussian :math:`N(x + \Sigma \nabla \log p(x), \Sigma)`,

    .. math:: \Sigma = \mathrm{diag}(\alpha) + \beta \gamma \beta^\top,

    with a diagonal that is updated where the curvature is positive and a factor of rank :math:`2 J` from the last
    :math:`J` steps. Its ELBO is estimated on draws that are common to all, and each path keeps the Gaussian with the
    highest: near the mode where that has mass, before it where it has none (a funnel). Draws of all paths then get the
    weights :math:`p(z) / \tfrac1I \sum_i q_i(z)`, Pareto-smoothed. The mixture in the denominator (the balance
    heuristic of Veach and Guibas 1995, where the paper divides by each draw's own law) makes a mode count once,
    however many
    paths end in it. Walls, where the log joint is not finite, are backed away from. No objective is descended.

    What the posterior is, by family:

    * ``family="auto"`` with several paths, or ``ensemble(size=...)``: the weighted draws themselves, so that
      ``posterior.sample`` resamples them by importance; ``record.k_hat`` is their Pareto k-hat. With a size other
      than the number of draws, that many are resampled and weigh the same. The loss is minus the ELBO of the mixture.
    * Gaussian families: of the best path's Gaussian and the one with the moments of the weighted draws (where k-hat
      allows; several paths only), the one with the higher ELBO; a family that cannot hold it gets the nearer, in
      :math:`\mathrm{KL}(q \| N)`, of the best fit to its covariance and its conditional sds. With one path
      ``family="auto"`` is such a family. The loss is minus the ELBO of the result on fresh draws.

    One step is one batch of evaluations for all paths. The trace of losses is minus the log joint of the best path
    while they climb. The fit is ``"converged"`` when the best path reached its mode or its best Gaussian lies before
    its end; how good the answer is, k-hat says.

    Args:
        paths: Number of paths, each from its own start point: the first from where the fit starts (``init=``), the
            others from draws of the prior, or uniform on (-2, 2).
        history: Steps :math:`J` in each inverse-Hessian estimate.
        elbo_draws: Draws on which each Gaussian is judged, even.
        draws: Draws of all paths together that are weighted, 25 at least.

    Raises:
        ConfigError: If a number is not a positive integer, or too small.

    Source: Zhang, Carpenter, Gelman and Vehtari (2022), JMLR 23(306).

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("bimodal", solver="pathfinder(paths=8)", seed=0)
        >>> posterior.record.family, posterior.record.k_hat < 0.7
        ('ensemble(size=4000)', True)
    """

    paths: int = 4
    history: int = 6
    elbo_draws: int = 16
    draws: int = 4000

    own_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        least = {"paths": 1, "history": 1, "elbo_draws": 2, "draws": FEWEST_DRAWS}
        for name, fewest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < fewest:
                raise ConfigError(f"pathfinder({name}=...) must be an integer of at least {fewest}, got {value!r}.")
        if self.elbo_draws % 2:
            raise ConfigError(
                f"pathfinder(elbo_draws=...) must be even, as draws come with their mirror images, got "
                f"{self.elbo_draws}."
            )

    def default_family(self) -> str | None:
        """Several paths give weighted draws."""
        return f"ensemble(size={self.draws})" if self.paths > 1 else None

    def writes(self, family: Any) -> bool:
        """Points take the weighted draws as they are."""
        has = frozenset(family.capabilities)
        return Capability.FINITE in has and Capability.LOG_Q not in has

    def check(self, *, model: Any, family: Any, batch_size: int | None = None, objective: Any = None) -> None:
        """Refuse what no Gaussian and no set of points can answer (see :class:`~vifamily.solvers._base.Solver`)."""
        holds = frozenset({Capability.FINITE if self.writes(family) else Capability.GAUSSIAN})
        refuse("pathfinder", model, family, batch_size, objective, holds=holds)

    def start(self, task: Task) -> PathfinderRun:
        """Begin a run."""
        self.check(model=task.model, family=task.family)
        return PathfinderRun(task, self)


class PathfinderRun(Run):
    """One run of :class:`Pathfinder`; each step answers what the paths of all restarts ask next."""

    def __init__(self, task: Task, solver: Pathfinder) -> None:
        self.task, self.solver, self.step_count, self.finished = task, solver, 0, None
        self.points = solver.writes(task.family)
        self.notes: list[str] = []
        self.k_hat: float | None = None
        self._begin()

    def _begin(self) -> None:
        self.members = members_of(self.task)
        self.like = start_of(self.members[0])
        self.answers: list[list[Answer]] = [[] for _ in self.members]
        self.best = [math.inf] * len(self.members)
        self._losses: list[list[float]] = []
        self.found: list[Found | None] = [None] * len(self.members)
        self.dialogues = [self._dialogue(r) for r in range(len(self.members))]
        self.asked: list[Request | None] = [next(dialogue) for dialogue in self.dialogues]

    def _dialogue(self, restart: int) -> Dialogue:
        task, solver, index = self.task, self.solver, self.task.first_restart + restart
        own = start_of(self.members[restart]).unsqueeze(0)
        source = generator(task.seed, "pathfinder/starts", index)
        others = task.model.start(_SPARE_STARTS * solver.paths, generator=source).to(own)
        return find(
            torch.cat([own, others]).cpu().double(), solver.paths, history=solver.history,
            elbo_draws=solver.elbo_draws, draws=solver.draws if solver.paths > 1 or self.points else 0,
            seed=split(task.seed, "pathfinder", index), resolution=float(torch.finfo(own.dtype).eps),
        )  # fmt: skip

    def step(self) -> StepReport:
        """Evaluate once (see :class:`~vifamily.solvers._base.Run`).

        Raises:
            NonFiniteLossError: If the log joint is not finite at any start point, or at draws of every Gaussian.
        """
        if self.finished is None:
            asked = [r for r, request in enumerate(self.asked) if request is not None]
            phase = next(request.phase for request in self.asked if request is not None)
            for r in asked:
                request = self.asked[r]
                if request is not None:
                    density = self.task.model.log_joint
                    self._take(r, evaluate(density, request, self.like, getattr(self.task.model, "num_data", None)))
            self.step_count += 1
            if all(request is None for request in self.asked):
                self._finish()
                phase = "weighing draws"
            self._losses.append([v if math.isfinite(v) else self._highest() for v in self.best])
            return StepReport(self.step_count, tuple(self._losses[-1]), {}, 1.0, self.finished, phase)
        return StepReport(self.step_count, tuple(self._losses[-1]), {}, 1.0, self.finished, "")

    def _highest(self) -> float:
        finite = [v for v in self.best if math.isfinite(v)]
        return max(finite, default=math.inf)

    def _take(self, restart: int, answer: Answer) -> None:
        """Hand an answer to the paths of one restart."""
        request = self.asked[restart]
        if answer.gradient is not None:
            top = answer.value[torch.isfinite(answer.value)]
            self.best[restart] = min(self.best[restart], -float(top.max()) if len(top) else math.inf)
        try:
            self.asked[restart] = self.dialogues[restart].send(answer)
        except StopIteration as end:
            self.asked[restart], self.found[restart] = None, end.value
        except NoGaussian as error:
            # a generator that raised is over: the same state as before this step is made by answering again
            self.asked[restart] = request
            raise NonFiniteLossError(
                f"step {self.step_count}: {error}. Start inside the support with init=, declare supports that keep "
                "parameters where the density is defined, and look for a log joint that overflows.",
                step=self.step_count,
                term="log_joint",
            ) from error
        self.answers[restart].append(answer)

    # -- the answer ----------------------------------------------------------------------------------------------------
    def _finish(self) -> None:
        found = [f for f in self.found if f is not None]
        for member, one in zip(self.members, found, strict=True):
            if self.points:
                self._write_points(member, one)
            else:
                write_gaussian(member, one.mean, one.factor, one.conditional_sd)
        write_back(self.task, self.members)
        if self.points:
            self.best = [-float(f.log_ratio[torch.isfinite(f.log_ratio)].mean()) for f in found]
        else:
            self.best = fresh_losses(self.task)
        lowest = min(range(len(found)), key=lambda r: self.best[r] if math.isfinite(self.best[r]) else math.inf)
        best = found[lowest]
        self.finished = "converged" if best.whole[int(best.elbo.argmax())] else "max_steps"
        self._say(best)

    def _say(self, best: Found) -> None:
        bounds = ", ".join(f"{float(v):.2f}" for v in best.elbo)
        lost = f"; {best.lost} without a finite one" if best.lost else ""
        self.notes.append(f"ELBO of the paths' Gaussians: {bounds}{lost}")
        if best.weights is not None:
            weights = best.weights
            self.notes.append(
                f"Pareto k-hat {weights.k_hat:.2f} of {weights.num_draws} draws of all paths, effective number "
                f"{weights.ess:.0f}"
            )
        if self.points:
            self.k_hat = None if best.weights is None else best.weights.k_hat
        else:
            self.notes.append(f"the Gaussian is that of {best.choice}")
            if best.factor is None:
                self.notes.append("too many coordinates for a covariance: conditional sds only; an ensemble keeps more")

    @torch.no_grad()
    def _write_points(self, member: Any, found: Found) -> None:
        weights = found.weights
        log_weight = found.log_ratio if weights is None else weights.log_weight
        log_weight = log_weight.nan_to_num(-math.inf, -math.inf, -math.inf).log_softmax(-1)
        z = found.z
        if member.size != len(z):
            chosen = _systematic(log_weight.exp(), member.size, generator(self.task.seed, "pathfinder/resample"))
            z, log_weight = z[chosen], torch.full((member.size,), -math.log(member.size))
        member.points.copy_(member.to_standard(z.to(member.shift)))
        member.logits.copy_(log_weight.clamp_min(_NO_WEIGHT))

    def output(self) -> Mapping[str, Any]:
        """Say how it stands; the family is written when the last step is taken."""
        notes = tuple(self.notes)
        if self.finished is None:
            notes = (*notes, "the paths were left before a Gaussian was chosen: the family is as it was at the start")
        done = self.finished is not None
        return {
            "losses": list(self.best) if done else [math.inf] * len(self.members), "rhat": math.nan, "mcse": math.nan,
            "gradient_snr": None, "notes": notes, "k_hat": self.k_hat,
        }  # fmt: skip

    # -- writing down --------------------------------------------------------------------------------------------------
    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return every answer so far: the paths are a function of them (see :class:`~vifamily.solvers._base.Run`)."""
        out: dict[str, Tensor] = {}
        for r, answers in enumerate(self.answers):
            for i, answer in enumerate(answers):
                out[f"answer/{r}/{i}/value"] = answer.value
                if answer.gradient is not None:
                    out[f"answer/{r}/{i}/gradient"] = answer.gradient
        out["losses"] = self.losses
        return out, {"step": self.step_count, "answers": [len(a) for a in self.answers]}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up a written-down state by giving the same answers (see :class:`~vifamily.solvers._base.Run`)."""
        self._begin()
        for r, count in enumerate(values["answers"]):
            for i in range(count):
                name = f"answer/{r}/{i}"
                self._take(r, Answer(tensors[f"{name}/value"], tensors.get(f"{name}/gradient")))
        self.step_count = int(values["step"])
        if all(request is None for request in self.asked):
            self._finish()
        self._losses = tensors["losses"].tolist()

    @property
    def losses(self) -> Tensor:
        """Minus the log joint of the best path, and at the end minus the ELBO, ``(step, restart)``."""
        return torch.tensor(self._losses, dtype=torch.float64).reshape(len(self._losses), self.task.restarts)

    @property
    def step_sizes(self) -> Tensor:
        """One throughout: line searches of several paths have no common length, ``(step,)``."""
        return torch.ones(len(self._losses), dtype=torch.float64)


def _systematic(weight: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Positions chosen by weight, each as often as its expected number rounded down or up."""
    at = (torch.arange(count, dtype=torch.float64) + torch.rand((), generator=source, dtype=torch.float64)) / count
    # draws of the paths take turns: in that order a regular comb could meet those of one path alone
    order = torch.randperm(len(weight), generator=source)
    edges = weight.double()[order].cumsum(0)
    return order[torch.searchsorted(edges / edges[-1], at).clamp_max(len(weight) - 1)]
