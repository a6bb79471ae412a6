"""The contracts of objectives that are games of a family against a critic (see the objective ``operator``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vifamily.families import Family
from vifamily.models import Density
from vifamily.objectives import Objective
from vifamily.rng import NoiseStream, draw_noise
from vifamily.testing import targets, tolerances
from vifamily.testing._report import Broken, Contracts, NotApplicable
from vifamily.testing._settings import Setting, build_at, exact_family
from vifamily.testing._tools import agree, finite_difference, flat_gradient, grid_noise, mean_is, seeded
from vifamily.types import GameState

__all__ = ["check_game", "is_game"]

_CLOSE = 0.03
"""Largest relative error of a value at a critic that was trained for some hundred steps."""


def is_game(objective: Objective) -> bool:
    """Whether an objective is a game, by the solver that drives it."""
    return objective.own_solver == "two_player"


def check_game(contracts: Contracts, objective: Objective) -> None:
    """Run the contracts that take the place of those about descent.

    Args:
        contracts: Where to record them.
        objective: A game.
    """
    for contract in (_state, _players, _closeness, _no_gain, _best_critic, _envelope, _mode_weights):
        contracts.run(contract.__name__.removeprefix("_"), contract, objective)


def _setting(objective: Objective, target: targets.Target, spec: str) -> Setting:
    family = build_at(target, spec)
    lacking = objective.missing(
        frozenset(target.model.capabilities), frozenset(family.capabilities), target.model.space
    )
    if lacking:
        raise NotApplicable(f"it does not run on {spec!r} with this target: {'; '.join(lacking)}")
    return Setting(objective.resolve(target.model, family), target, family, None)


def _begin(s: Setting, family: Any) -> GameState:
    state = s.objective.init_state(s.target.model, family, generator=seeded(0))
    if not isinstance(state, GameState) or not isinstance(state.critic, nn.Module):
        raise Broken(got=f"an initial state of {type(state).__name__}", expected="a GameState with a critic")
    return state


def _noise(family: Any, draws: int, seed: int = 1) -> Tensor:
    return draw_noise(family.noise_spec, (draws,), seeded(seed))


def _state(objective: Objective) -> None:
    """An evaluation changes no critic, and hands on a state that says one evaluation more."""
    s = _setting(objective, targets.linear_regression(), "full_rank")
    state = _begin(s, s.family)
    before = {name: p.detach().clone() for name, p in state.critic.named_parameters()}
    loss = s.objective.loss(s.family, s.target.model, _noise(s.family, 8), None, state)
    for name, parameter in state.critic.named_parameters():
        agree(parameter, before[name], 0.0, f"the critic's parameter {name!r} as it was")
    if not isinstance(loss.state, GameState) or loss.state.step != state.step + 1:
        raise Broken(got=f"the state {loss.state!r:.80}", expected="the same critic, one evaluation later")


def _players(objective: Objective) -> None:
    """On the same noise the surrogate has the gradient of the value: for the critic, and for the family where said."""
    s = _setting(objective, targets.linear_regression(), "full_rank")
    state, noise, model = _begin(s, s.family), _noise(s.family, 8), s.target.model

    def value() -> Tensor:
        return s.objective.loss(s.family, model, noise, None, state).value

    for module, what in ((s.family, "the family"), (state.critic, "the critic")):
        got = flat_gradient(s.objective.loss(s.family, model, noise, None, state), module)
        wanted = finite_difference(value, module, step=1e-5, stacked=False)
        if module is state.critic or s.objective.value_gradient:
            agree(got, wanted, 10 * tolerances.FINITE_DIFFERENCE, f"the gradient of the value for {what}")
        if not bool((got != 0).any()):
            raise Broken(got=f"no gradient for {what}", expected="a gradient for both players at the start")


def _closeness(objective: Objective) -> None:
    """At q = p the operator's mean is zero, and the value of a game on draws is not positive, whatever the critic."""
    s = _setting(objective, targets.linear_regression(), "full_rank")
    family = exact_family(s)
    state, source = _begin(s, family), seeded(2)
    with torch.no_grad():
        # far from where it begins, for a critic may well begin near zero
        for parameter in state.critic.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=source, dtype=parameter.dtype))
    rows = []
    for k in range(50):
        loss = s.objective.loss(family, s.target.model, _noise(family, 400, seed=k), None, state)
        if not hasattr(s.objective, "rule"):
            rows.append(loss.value)
            continue
        if "operator" not in loss.terms:
            raise Broken(got=f"the terms {', '.join(loss.terms) or 'none'}", expected="a term 'operator', its mean")
        rows.append(loss.terms["operator"])
    if hasattr(s.objective, "rule"):
        mean_is(torch.stack(rows), 0.0, "a mean of the operator at q = p")
    elif float(torch.stack(rows).mean()) > tolerances.STANDARD_ERRORS * float(torch.stack(rows).std()) / 50**0.5:
        raise Broken(got=f"a value of {float(torch.stack(rows).mean()):.3g} at q = p", expected="none above zero")


def _trained(s: Setting, family: Family, steps: int = 400) -> GameState:
    """Ascend on the critic alone, on fresh draws at each step: on fixed ones it would learn the draws."""
    state = _begin(s, family)
    parameters = [p for p in state.critic.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=0.02, foreach=False, maximize=True)
    stream = NoiseStream(7, family.noise_spec, draws=256, balanced=s.objective.linear_in_draws)
    family = family.copy().requires_grad_(requires_grad=False)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.02 * 0.03 ** (step / steps)
        loss = s.objective.loss(family, s.target.model, stream.at(step), None, state)
        found = torch.autograd.grad(loss.surrogate.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        optimiser.step()
        state = loss.state
    return state


def _wide(s: Setting) -> Family:
    """The exact posterior as coordinates, and a Gaussian that is off and wider in them."""
    mean, covariance = s.target.moments()
    family = s.family.copy()
    family.precondition(mean, torch.linalg.cholesky(covariance))
    family.start_at(torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor([1.3, 1.2], dtype=torch.float64))
    return family


def _no_gain(objective: Objective) -> None:
    """At q = p a critic that was trained has gained nothing on fresh draws; elsewhere it has."""
    s = _setting(objective, targets.linear_regression(), "full_rank")
    away = _wide(s)
    exact = away.copy()
    exact.start_at(torch.zeros(2).double(), torch.ones(2).double())
    gains = {}
    for family in (away, exact):
        state = _trained(s, family, 200)
        with torch.no_grad():
            rows = torch.stack([
                s.objective.loss(family, s.target.model, _noise(family, 1000, seed=k), None, state).value
                for k in range(20)
            ])  # fmt: skip
        mean, error = float(rows.mean()), float(rows.std()) / len(rows) ** 0.5
        gains[family is exact] = mean
        # a critic learns reference draws by heart, which no fresh draws of q take off: a little is gained from them
        learnt = "reference" in s.objective.estimators
        least = 0.1 * gains[False] if family is exact and learnt else 0.0
        gained = mean > least + tolerances.STANDARD_ERRORS * error
        if gained is (family is exact):
            where = "at q = p" if family is exact else "elsewhere"
            raise Broken(
                got=f"a value of {mean:.3g} (standard error {error:.2g}) {where} on fresh draws",
                expected="a trained critic to gain something away from p only",
            )


def _fisher(s: Setting, family: Family, noise: Tensor) -> Tensor:
    """Fisher divergence in the family's standardised coordinates, differentiable."""
    z = family(noise).z
    (of_p,) = torch.autograd.grad(s.target.model.log_joint(z).sum(), z, create_graph=True)
    (of_q,) = torch.autograd.grad(family.log_prob(z).sum(), z, create_graph=True)
    out: Tensor = ((of_p - of_q) @ family.scale).square().sum(-1).mean()
    return out


def _penalty(objective: Objective) -> float:
    tau = getattr(objective, "tau", None)
    if tau is None or getattr(objective, "form", "penalised") != "penalised":
        raise NotApplicable("it has no penalty on the size of the critic, so the best critic has no finite value")
    return float(tau)


def _best_critic(objective: Objective) -> None:
    """Against a Gaussian its value at the best critic is the Fisher divergence over four times the penalty."""
    tau = _penalty(objective)
    s = _setting(objective, targets.linear_regression(), "full_rank")
    family = _wide(s)
    noise = grid_noise(family.noise_spec, 60)
    loss = s.objective.loss(family, s.target.model, noise, None, _trained(s, family))
    agree(4 * tau * loss.value, _fisher(s, family, noise), _CLOSE, "the Fisher divergence at the best critic")


def _envelope(objective: Objective) -> None:
    """At the best critic the family's gradient is that of the Fisher divergence: the penalty's part included."""
    tau = _penalty(objective)
    s = _setting(objective, targets.linear_regression(), "full_rank")
    family = _wide(s)
    noise = grid_noise(family.noise_spec, 60)
    loss = s.objective.loss(family, s.target.model, noise, None, _trained(s, family))
    got = 4 * tau * flat_gradient(loss, family)
    parts = torch.autograd.grad(_fisher(s, family, noise), [p for p in family.parameters() if p.requires_grad])
    wanted = torch.cat([part.reshape(-1) for part in parts])
    agree(got, wanted, 2 * _CLOSE, "the gradient of the Fisher divergence at the best critic", scale=wanted.abs().max())


def _mode_weights(objective: Objective) -> None:
    """What it declares about modes is so: other weights of far modes leave its value at one of them unchanged."""

    def mixture(weight: float) -> targets.Target:
        logs = torch.tensor([weight, 1 - weight], dtype=torch.float64).log()
        model = Density(
            lambda z: torch.stack([logs[i] - 0.5 * (z[:, 0] - c) ** 2 for i, c in enumerate((-12.0, 12.0))]).logsumexp(
                0
            ),
            dim=1,
        )
        return targets.Target(model, 0.0)

    one, other = (_setting(objective, mixture(w), "mean_field") for w in (0.5, 0.9))
    one.family.start_at(torch.full((1,), 11.5).double(), torch.ones(1).double())
    state, noise = _begin(one, one.family), _noise(one.family, 16)
    values = [s.objective.loss(one.family, s.target.model, noise, None, state).value for s in (one, other)]
    same = bool((values[0] - values[1]).abs() < 1e-8)
    if same is not bool(objective.blind_to_mode_weights):
        raise Broken(
            got="the same value" if same else "another value",
            expected=f"what blind_to_mode_weights={objective.blind_to_mode_weights} says, at other mode weights",
        )
