"""Losses of amortised fits whose objective evaluates the likelihood: one number for each datum, averaged over data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vifamily.errors import IncompatibleError
from vifamily.models import Simulator, SimulatorAtData
from vifamily.objectives import Objective, weighted_sum
from vifamily.posterior.amortised._at_data import FamilyAtData
from vifamily.posterior.amortised._family import AmortisedFamily
from vifamily.posterior.amortised._training import Pairs
from vifamily.registry import entry_name
from vifamily.rng import draw_noise, generator
from vifamily.types import Batch, Capability

__all__ = ["ByLikelihood", "draws_per_datum", "refuse_without_likelihood"]

_POINTS = 4096
"""Points at which the likelihood is evaluated in one part of a pass over the held-out data."""
_FEW_DRAWS = 2
_PAIRS = 256
"""Simulated pairs of a step at least, for objectives that learn from these beside their data."""
_CRITERION_DRAWS, _MOST_TIMES = 256, 32


def refuse_without_likelihood(simulator: Simulator, objective: Objective) -> None:
    """Refuse an objective that needs the log joint where the simulator does not give one.

    Raises:
        IncompatibleError: Saying what to give.
    """
    lacking = []
    if simulator.log_likelihood_function is None:
        lacking.append("the log likelihood: Simulator(prior, simulate, log_likelihood=lambda theta, x: ...)")
    if Capability.PRIOR not in simulator.capabilities:
        lacking.append("the density of the prior: a prior with log_prob")
    if lacking:
        raise IncompatibleError(
            f"the objective {entry_name(objective)!r} evaluates the log joint, and this simulator lacks "
            f"{'; and '.join(lacking)}. By simulations alone there is objective='inclusive_kl'.",
            missing=(f"model: {Capability.LOG_JOINT}",),
        )


def draws_per_datum(objective: Objective, asked: int | None) -> int:
    """Draws of q at each datum of a step: few where the loss is a mean over them, since a step has many data."""
    if asked is not None:
        return asked
    few = objective.linear_in_draws or getattr(objective, "estimator", None) == "score"
    return max(objective.min_draws, _FEW_DRAWS) if few else objective.default_draws


class ByLikelihood:
    """An objective with a log joint, as the loss of an amortised fit.

    Args:
        objective: The objective.
        simulator: A simulator with a likelihood.
        module: The networks.
        data: The data to learn from, ``(datum, *shape)``.
        simulated: Simulated pairs, for objectives that learn from these as well.
        draws: Draws at each datum in a step.
        seed: Root seed of the noise.

    Raises:
        IncompatibleError: If the objective cannot be evaluated at many data.
    """

    def __init__(
        self, objective: Objective, simulator: Simulator, module: AmortisedFamily, data: Tensor, simulated: Pairs,
        *, draws: int, seed: int,
    ) -> None:  # fmt: skip
        self.simulator, self.draws, self.seed = simulator, draws, seed
        self.model = SimulatorAtData(simulator)
        self.noise, self.order = generator(seed, "noise"), generator(seed, "pairs")
        self.simulated = simulated if Capability.SIMULATE in objective.needs_model else None
        with torch.no_grad():
            probe = FamilyAtData(module, data[:2])
        self.objective: Objective = objective.resolve(self.model, probe)
        self.state = self._first_state(module, data)

    def _first_state(self, module: AmortisedFamily, data: Tensor) -> Tensor | None:
        """What the objective carries from step to step, one row for each datum; None where it carries nothing."""
        source = generator(self.seed, "state")
        parts, size = [], max(1, _POINTS // self.draws)
        for x in data.split(size):
            with torch.no_grad():
                family = FamilyAtData(module, x)
            found = self.objective.init_state(self.model.given(x), family, generator=source)
            if found is None:
                return None
            # points of Markov chains and their like are what can be kept for each datum
            rows = isinstance(found, Tensor) and found.shape[:1] == (len(x),) and found.dtype == x.dtype
            if not (rows and self.objective.state_by_row) or self.objective.warmup_steps:
                raise IncompatibleError(
                    f"the objective {entry_name(self.objective)!r} carries a state from step to step that is not one "
                    "of each datum, so it cannot be averaged over data: fit one observation, vf.fit(simulator.at(x), "
                    "...).",
                    missing=("objective: a state for each datum",),
                )
            parts.append(found)
        return torch.cat(parts)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """The mean over a batch, whose data are numbers of rows ``(datum, 1)`` and data, with the estimator's gradient.

        The number is that of the reported value, not of the surrogate.
        """
        rows, x = batch.data
        family = FamilyAtData(module, x)  # type: ignore[arg-type]
        model = self.model.given(x)
        noise = draw_noise(family.noise_spec, (len(x), self.draws), self.noise, dtype=x.dtype, device=x.device)
        state = None if self.state is None else self.state[rows[:, 0]]
        out = self.objective.loss(family, model, noise, self._pairs(len(x)), state)
        if self.state is not None:
            wider = out.state.shape[1] - self.state.shape[1]
            if wider:
                self.state = torch.cat([self.state, out.state.new_zeros(len(self.state), wider)], 1)
            self.state[rows[:, 0]] = out.state
        surrogate = out.surrogate.mean()
        return out.value.mean() + (surrogate - surrogate.detach())

    def _pairs(self, count: int) -> Batch | None:
        """Some of the simulated pairs, for an objective that asks for them."""
        if self.simulated is None:
            return None
        size = max(count, min(_PAIRS, len(self.simulated)))
        some = torch.randint(len(self.simulated), (size,), generator=self.order).to(self.simulated.z.device)
        return Batch((self.simulated.z[some], self.simulated.x[some]), size)

    @torch.no_grad()
    def pointwise(self, module: nn.Module, pairs: Pairs) -> Tensor:
        """The criterion at each held-out datum, on the same noise every time.

        For lower bounds on the log evidence it is their value. Other objectives have no number that a narrow or a
        displaced q could not fake: minus the log density at simulated pairs where there are some, the loss of inclusive
        ones; else minus the evidence lower bound, which is least where q is the posterior.
        """
        bound = self.objective.value_kind == "lower_bound" and not self.objective.inclusive
        if not bound and pairs.z.dtype.is_floating_point:
            parts = zip(pairs.z.split(_POINTS), pairs.x.split(_POINTS), strict=True)
            return torch.cat([-module.log_prob(z, x) for z, x in parts])  # type: ignore[operator]
        draws = self.draws if bound else max(self.draws, _CRITERION_DRAWS)
        # few data are judged by more noise
        times = max(1, min(_MOST_TIMES, _POINTS // (draws * len(pairs.x))))
        source, out = generator(self.seed, "held out"), []
        for x in pairs.x.split(max(1, _POINTS // draws)):
            family, model = FamilyAtData(module, x), self.model.given(x)  # type: ignore[arg-type]
            values = [self._judged(family, model, source, draws, bound=bound) for _ in range(times)]
            out.append(torch.stack(values).mean(0))
        return torch.cat(out)

    def _judged(
        self, family: FamilyAtData, model: SimulatorAtData, source: torch.Generator, draws: int, *, bound: bool
    ) -> Tensor:
        latent = family.latent
        noise = draw_noise(family.noise_spec, (family.size, draws), source, dtype=latent.dtype, device=latent.device)
        if bound:
            return self.objective.loss(family, model, noise, None, None).value
        drawn = family(noise)
        ratio = model.log_joint(drawn.z) - family.log_prob(drawn.z)
        return -weighted_sum(drawn.log_weight.expand_as(ratio), ratio)
