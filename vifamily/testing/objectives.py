"""The contracts of objectives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from vifamily import registry
from vifamily.errors import IncompatibleError
from vifamily.families._local_view import LocalView, joint_noise_spec
from vifamily.families._stack import StackedFamily
from vifamily.objectives import Objective
from vifamily.rng import draw_noise
from vifamily.testing import targets, tolerances
from vifamily.testing._amortised import check_amortised
from vifamily.testing._closed_form import check_closed_form
from vifamily.testing._games import check_game, is_game
from vifamily.testing._narrow import NarrowFamily, NarrowModel, QuadratureFamily, SplitFamily
from vifamily.testing._particles import check_particles
from vifamily.testing._predictive import check_predictive
from vifamily.testing._report import Broken, Contracts, NotApplicable, Report
from vifamily.testing._settings import Setting, build_at, exact_family, local_family, moved, unbiased
from vifamily.testing._states import check_states, on_states
from vifamily.testing._tools import (
    agree,
    descend,
    finite_difference,
    flat_gradient,
    grid_noise,
    mean_is,
    normal_quadrature,
    replicate,
    seeded,
)
from vifamily.types import Batch, Capability, Loss, Space

__all__ = ["check_objective"]

_VANISHING = frozenset({"stl", "dreg"})
"""Estimators whose gradient is zero at q = p, draw by draw."""
_PAIRED = frozenset({"pairs"})
"""Estimators that take means over pairs of independent draws."""
_BOUNDS = ("lower_bound", "upper_bound")
_COPIES = 2000


def check_objective(objective: Objective | str, *, skip: Mapping[str, str] | None = None) -> Report:
    """Hold an objective to its contracts, on targets with known answers.

    The contracts: its class says what it is; a missing need is refused; it runs on nothing but what it declares to
    need; its loss is finite, of one number per restart, and a function of its arguments alone; several restarts at once
    equal one after the other; gradients of each estimator agree with differences of the value (exactly on the same
    noise, or in the mean within five standard errors); they vanish at the exact posterior and not elsewhere; a descent
    ends at the exact posterior of a conjugate model, and on a target that mean field does not contain at the closed
    form for its ``renyi_order``, on data more spread out than the model says at that for its ``predictive_order``;
    weights of draws are used as such; a constant added to the log joint changes no gradient; minibatches are unbiased
    where it says so; extreme weights stay finite.

    An objective over a simulator's joint (see :class:`vifamily.objectives.InclusiveKl`) is held to these, on a linear
    Gaussian simulator: a finite function of its arguments, of one number; its gradient agrees with differences of the
    value; parts of a batch average to the whole; its gradient vanishes in the mean at the exact conditional law and
    not elsewhere; its value there is the mean entropy of the posteriors; a fit ends at the exact posteriors of data it
    has not seen, and in a family of independent coordinates at their means and marginal variances.

    An objective with closed-form steps (see :class:`vifamily.objectives.ClosedForm`) is held, in place of what is said
    about gradients, to these: a Gaussian posterior is a fixed point on every batch and the end of its steps from
    elsewhere; covariances stay positive definite; steps do not depend on units; several at once equal one after the
    other; small batches give in a basis what the dense formula gives; its blindness to mode weights is as declared.

    An objective that moves particles (see :class:`vifamily.objectives.Svgd`) is held to these: draws of the posterior
    drive no point anywhere in the mean; moved by it, the KL divergence falls at the rate of its discrepancy, by finite
    differences; order and rotations do not matter; without scores particles part; one alone follows its score; on a
    conjugate model they surround the mean; minibatches leave the direction unbiased where it says so; annealing ends.

    Args:
        objective: An objective, or its name or spec.
        skip: Contracts that do not apply, each with the reason that the report will show.

    Returns:
        What was checked and what was skipped.

    Raises:
        ContractError: Naming the objective, the contract, what was expected and what was found.

    Example:
        >>> report = check_objective("elbo(estimator=stl)")
        >>> "misspecified" in report.passed
        True
    """
    built = registry.build("objectives", objective) if isinstance(objective, (str, registry.Spec)) else objective
    name = objective if isinstance(objective, str) else registry.entry_name(built)
    contracts = Contracts(f"the objective {name!r}", "objective", skip)
    contracts.run("declarations", _declarations, built)
    contracts.run("refusals", _refusals, built)
    check = _Checks(built)
    if Capability.SIMULATE in built.needs_model:
        # it is evaluated on simulated pairs, and its families take data for a context
        check_amortised(contracts, built)
        return contracts.report()
    if hasattr(built, "move"):
        # nothing of it is differentiated: its steps are held to contracts of their own
        for contract in (check.declared_needs, check.loss_shape, check.determinism, check.restarts,
                         check.value_at_posterior):  # fmt: skip
            contracts.run(contract.__name__, contract)
        check_closed_form(contracts, built)
        return contracts.report()
    if hasattr(built, "flow"):
        # what drives the particles is not the gradient of its value
        for contract in (check.declared_needs, check.loss_shape, check.determinism, check.restarts):
            contracts.run(contract.__name__, contract)
        check_particles(contracts, built)
        return contracts.report()
    if is_game(built):
        # its value at one critic has no optimum to descend to: what the best critic makes of it is held to its own
        for contract in (check.declared_needs, check.loss_shape, check.determinism, check.restarts, check.draw_weights,
                         check.constant_invariance, check.nonzero_gradient, check.minibatches,
                         check.extreme_weights):  # fmt: skip
            contracts.run(contract.__name__, contract)
        check_game(contracts, built)
        return contracts.report()
    for contract in (
        check.declared_needs,
        check.loss_shape,
        check.determinism,
        check.restarts,
        check.gradient,
        check.draw_weights,
        check.constant_invariance,
        check.zero_at_posterior,
        check.value_at_posterior,
        check.nonzero_gradient,
        check.conjugate,
        check.misspecified,
        check.minibatches,
        check.extreme_weights,
    ):
        contracts.run(contract.__name__, contract)
    if on_states(built):
        check_states(contracts, built)
    contracts.run("predictive", check_predictive, built)
    return contracts.report()


def _declarations(objective: Objective) -> None:
    if not isinstance(objective, Objective) or not dataclasses.is_dataclass(objective):
        raise Broken(got=type(objective).__name__, expected="a frozen dataclass that derives from Objective")
    if objective.value_kind not in (*_BOUNDS, "divergence", "surrogate", "none"):
        raise Broken(got=f"value_kind={objective.value_kind!r}", expected="one of the kinds of value that exist")
    if objective.subsampling not in ("unbiased", "biased", "per_datum", "no"):
        raise Broken(got=f"subsampling={objective.subsampling!r}", expected="unbiased, biased, per_datum or no")
    if not 1 <= objective.min_draws <= objective.default_draws:
        raise Broken(
            got=f"min_draws={objective.min_draws}, default_draws={objective.default_draws}",
            expected="1 <= min_draws <= default_draws",
        )
    if not (type(objective).__doc__ or "").strip():
        raise Broken(got="no docstring", expected="a docstring whose first sentence says what is computed")
    if objective.estimators and not hasattr(objective, "estimator"):
        raise Broken(
            got="estimators without a field 'estimator'", expected="a field 'estimator' that names one or is 'auto'"
        )


def _refusals(objective: Objective) -> None:
    """Each declared need, when missing, is named before the first step."""
    everything = frozenset(Capability) - _vetoes(objective)
    space = sorted(objective.spaces)[0]
    for side, needs in (("model", objective.needs_model), ("family", objective.needs_family)):
        for capability in needs:
            lacking = everything - {capability}
            model: Any = SimpleNamespace(capabilities=lacking if side == "model" else everything, space=space)
            family: Any = SimpleNamespace(capabilities=lacking if side == "family" else everything)
            try:
                objective.resolve(model, family)
            except IncompatibleError as error:
                if str(capability) not in " ".join(error.missing):
                    raise Broken(got=f"missing={error.missing}", expected=f"the error to name {capability!s}") from None
            else:
                raise Broken(got="no error", expected=f"IncompatibleError for a {side} without {capability!s}")


def _vetoes(objective: Objective) -> frozenset[Capability]:
    out = objective.never_model
    for estimator in objective.estimators.values():
        out |= estimator.never_model | estimator.never_family
    return out - objective.needs_model - objective.needs_family


class _Checks:
    """The contracts that evaluate the loss."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.draws = max(objective.min_draws, 4)

    # -- where it can run ----------------------------------------------------------------------------------------------
    def setting(self, target: targets.Target, spec: str, estimator: str | None = None) -> Setting | None:
        """Meet a target and a family, or return None when they lack what is needed."""
        objective: Any = self.objective
        if estimator is not None:
            objective = dataclasses.replace(objective, estimator=estimator)
        family = build_at(target, spec)
        of_model, of_family = frozenset(target.model.capabilities), frozenset(family.capabilities)
        if objective.missing(of_model, of_family, target.model.space):
            return None
        resolved = objective.resolve(target.model, family)
        return Setting(resolved, target, family, getattr(resolved, "estimator", None))

    def settings(self, specs: tuple[str, ...] = ("full_rank", "mixture(components=2)")) -> list[Setting]:
        """Every estimator on every family of the kit that it allows."""
        if Capability.PARTICLES in self.objective.needs_family:
            specs = ("ensemble(size=5)",)
        asked = getattr(self.objective, "estimator", None)
        names = (
            [None] if not self.objective.estimators else [*self.objective.estimators] if asked == "auto" else [asked]
        )
        places = [(targets.linear_regression(), spec) for spec in specs]
        places += [(targets.discrete(), spec) for spec in ("categorical", "categorical(max_states=0)")]
        found = [self.setting(target, spec, name) for name in names for target, spec in places]
        usable = [s for s in found if s is not None]
        if not usable:
            raise NotApplicable("no target and family of the kit offer what it needs")
        return usable

    def on(self, target: targets.Target, spec: str) -> Setting:
        """Meet a target and a family, or skip."""
        found = self.setting(target, spec)
        if found is None:
            raise NotApplicable(f"it does not run on {spec!r} with this target")
        return found

    def _at_posterior(self) -> None:
        """Skip what is said about the exact posterior where the objective aims at another law."""
        if not self.objective.targets_posterior:
            raise NotApplicable("it is declared not to be least at the posterior (targets_posterior)")

    # -- contracts -----------------------------------------------------------------------------------------------------
    def declared_needs(self) -> None:
        """It runs where only what it declares to need is there."""
        for s in self.settings():
            chosen = s.objective.estimators.get(s.estimator or "")
            of_model = s.objective.needs_model | (chosen.model if chosen else frozenset())
            of_family = s.objective.needs_family | (chosen.family if chosen else frozenset()) | {Capability.DRAWS}
            # a family may say more about its draws than is needed, but the weights belong to the draws
            of_family |= s.family.capabilities & {Capability.WEIGHTED, Capability.ENUMERATED}
            loss = s.loss(NarrowFamily(s.family, of_family), s.noise(self.draws), NarrowModel(s.target.model, of_model))
            if not bool(torch.isfinite(loss.value).all()):
                raise Broken(got=f"a loss of {loss.value.tolist()}", expected="a finite loss")

    def loss_shape(self) -> None:
        """One finite number per restart, nothing attached to what is reported."""
        for s in self.settings():
            for family, copies in ((s.family, None), (replicate(s.family, 3), 3)):
                loss = s.loss(family, s.noise(self.draws, copies=copies))
                shape = () if copies is None else (copies,)
                for what, part in (("surrogate", loss.surrogate), ("value", loss.value), *loss.terms.items()):
                    if tuple(part.shape) != shape:
                        raise Broken(got=f"{what} of shape {tuple(part.shape)}", expected=f"shape {shape}")
                    if not bool(torch.isfinite(part).all()):
                        raise Broken(got=f"{what} = {part.tolist()}", expected="finite numbers")
                    if what != "surrogate" and part.requires_grad:
                        raise Broken(got=f"{what} with a gradient", expected="value and terms detached")

    def determinism(self) -> None:
        """The loss is a function of its arguments: the same noise gives the same number and gradient."""
        for s in self.settings():
            noise = s.noise(self.draws)
            first, second = s.loss(s.family, noise), s.loss(s.family, noise)
            same = torch.equal(first.value, second.value)
            if same and first.surrogate.requires_grad:
                same = torch.equal(flat_gradient(first, s.family), flat_gradient(second, s.family))
            if not same:
                raise Broken(got="two results on the same noise", expected="the same bits from the same noise")

    def restarts(self) -> None:
        """Several restarts at once equal one after the other, in value, terms and gradient."""
        for s in self.settings():
            members = [moved(s.family, 0.2 * r, seed=r) for r in range(3)]
            stack = StackedFamily(members)
            noise, state = s.noise(self.draws, copies=3), s.state(stack)
            together = s.loss(stack, noise, state=state)
            gradient = flat_gradient(together, stack, 3) if together.surrogate.requires_grad else None
            for r, member in enumerate(members):
                own_state = state[r] if isinstance(state, torch.Tensor) else None
                alone = s.loss(member, noise[r], state=own_state)
                agree(together.value[r], alone.value, tolerances.LOOP[torch.float64], "the loss of one restart alone")
                if gradient is not None:
                    own = flat_gradient(alone, member)
                    agree(gradient[r], own, tolerances.LOOP[torch.float64], "its gradient alone")
                for name, term in alone.terms.items():
                    agree(together.terms[name][r], term, tolerances.LOOP[torch.float64], f"its term {name!r} alone")

    def gradient(self) -> None:
        """The surrogate's gradient is that of the value: exactly, or in the mean."""
        kind = self.objective.value_kind
        found = self.settings()
        if kind == "surrogate":
            # such a value need not be what the surrogate differentiates; where it is said to be, it is held to it
            found = [s for s in found if getattr(s.objective.estimators.get(s.estimator or "", s.objective),
                                                 "value_gradient", False)]  # fmt: skip
        sure = self.objective.value_gradient and not self.objective.estimators
        if not found or (kind == "none" and not sure):
            raise NotApplicable(f"its value is declared {kind!r}: not what the surrogate differentiates")
        for s in found:
            if Capability.REPARAMETERISED not in s.family.capabilities and s.estimator != "enumerated":
                continue  # the value on given noise is no smooth function of the parameters
            chosen = s.objective.estimators.get(s.estimator or "")
            if chosen is not None and not chosen.unbiased:
                self._vanishing_bias(s)
                continue
            pathwise = bool(getattr(chosen or s.objective, "value_gradient", False))
            copies = 2 if pathwise else _COPIES
            stack = replicate(s.family, copies)
            noise = s.noise(self.draws, copies=copies, seed=2)
            got = flat_gradient(s.loss(stack, noise), stack, copies)
            wanted = finite_difference(lambda s=s, f=stack, n=noise: s.loss(f, n).value, stack, step=1e-4, stacked=True)
            if pathwise:
                agree(
                    got, wanted, tolerances.FINITE_DIFFERENCE, f"the gradient of the value (estimator {s.estimator!r})"
                )
            else:
                what = f"a mean difference between the gradient of the estimator {s.estimator!r} and that of the value"
                mean_is(got - wanted, 0.0, what, slack=tolerances.FINITE_DIFFERENCE)

    def _vanishing_bias(self, s: Setting) -> None:
        """With many draws the mean gradient is that of the value, to two in a hundred."""
        stack, draws = replicate(s.family, _COPIES // 10), 500
        noise = s.noise(draws, copies=_COPIES // 10, seed=2)
        got = flat_gradient(s.loss(stack, noise), stack, _COPIES // 10)
        wanted = finite_difference(lambda: s.loss(stack, noise).value, stack, step=1e-4, stacked=True)
        slack = 0.02 * float(wanted.mean(0).abs().max())
        what = f"a mean difference, with {draws} draws, between the gradient of {s.estimator!r} and that of the value"
        mean_is(got - wanted, 0.0, what, slack=slack)

    def draw_weights(self) -> None:
        """Weights of draws are used as such: one draw written as two halves changes nothing."""
        if getattr(self.objective, "reads_states_in_order", False):
            raise NotApplicable("its draws are all states, in their order, and not exchangeable")
        found = [s for s in self.settings() if Capability.WEIGHTED in s.family.capabilities]
        if not found:
            raise NotApplicable("it does not run on families whose draws carry weights")
        for s in found:
            noise = s.noise(self.draws)
            whole, halves = s.loss(s.family, noise), s.loss(SplitFamily(s.family), noise)
            what = f"when a draw is written as two of half its weight (estimator {s.estimator!r})"
            agree(halves.value, whole.value, tolerances.EXACT, f"the same loss {what}")
            agree(
                flat_gradient(halves, s.family),
                flat_gradient(whole, s.family),
                tolerances.EXACT,
                f"the same gradient {what}",
            )

    def constant_invariance(self) -> None:
        """The log evidence is unknown: a constant added to the log joint changes no gradient."""
        if not self.objective.invariant_to_constants:
            raise NotApplicable("it declares that it takes the log joint to be normalised, or the evidence to be known")
        for s in self.settings(("full_rank",)):
            if s.estimator == "analytic_kl":
                continue
            inner = s.target.model
            # what needs the likelihood apart meets the constant in the prior
            apart = {Capability.PER_DATUM, Capability.PRIOR} - s.objective.needs_model
            narrow = NarrowModel(inner, frozenset(inner.capabilities) - apart, 37.5)
            noise = s.noise(self.draws)
            plain = flat_gradient(s.loss(s.family, noise), s.family)
            shifted = flat_gradient(s.loss(s.family, noise, narrow), s.family)
            agree(
                shifted,
                plain,
                1e-9,
                f"the same gradient after adding 37.5 to the log joint (estimator {s.estimator!r})",
            )

    def zero_at_posterior(self) -> None:
        """At q = p the mean gradient is zero, and for sticking the landing and its kin every gradient."""
        self._at_posterior()
        found = [s for s in self.settings(("full_rank",)) if s.target.covariance is not None]
        if not found:
            raise NotApplicable("it does not run on the conjugate target")
        for s in found:
            if s.objective.biased_at_posterior:
                self._shrinking(s)
                continue
            stack = replicate(exact_family(s), _COPIES)
            gradient = flat_gradient(s.loss(stack, s.noise(self.draws, copies=_COPIES, seed=3)), stack, _COPIES)
            if s.estimator in _VANISHING:
                agree(
                    gradient,
                    torch.zeros_like(gradient),
                    tolerances.EXACT,
                    f"no gradient noise at q = p (estimator {s.estimator!r})",
                )
            mean_is(gradient, 0.0, f"a mean gradient at q = p (estimator {s.estimator!r})")

    def _shrinking(self, s: Setting) -> None:
        """With four times the draws the mean gradient at q = p is at most half as large, or within its error."""
        sizes, copies = [], 200
        for draws in (self.draws, 4 * self.draws):
            stack = replicate(exact_family(s), copies)
            gradient = flat_gradient(s.loss(stack, s.noise(draws, copies=copies, seed=3)), stack, copies)
            error = float(gradient.var(0).sum().div(copies).sqrt())
            sizes.append((float(gradient.mean(0).norm()), error))
        (few, _), (many, error) = sizes
        if many > 0.5 * few + tolerances.STANDARD_ERRORS * error:
            raise Broken(
                got=f"a mean gradient at q = p of size {many:.3g} with four times the draws, {few:.3g} before",
                expected="a bias that shrinks as draws are added",
            )

    def value_at_posterior(self) -> None:
        """At q = p lower bounds are minus the log evidence, upper ones the log evidence, divergences zero."""
        kind = self.objective.value_kind
        if kind not in (*_BOUNDS, "divergence"):
            raise NotApplicable(f"its value is declared {kind!r}")
        self._at_posterior()
        if kind == "divergence" and not self.objective.invariant_to_constants:
            raise NotApplicable("its value is a divergence only where the evidence is the one that it was told")
        found = [s for s in self.settings(("full_rank",)) if s.target.covariance is not None]
        if not found:
            raise NotApplicable("it does not run on the conjugate target")
        for s in found:
            stack = replicate(exact_family(s), _COPIES)
            value = s.loss(stack, s.noise(self.draws, copies=_COPIES, seed=3)).value
            evidence = s.target.log_evidence
            expected = {"divergence": 0.0, "lower_bound": -evidence, "upper_bound": evidence}[kind]
            mean_is(value, expected, f"a mean value at q = p (estimator {s.estimator!r})")

    def nonzero_gradient(self) -> None:
        """Away from the optimum, as families are built, every parameter has a gradient."""
        target, used = targets.linear_regression(), []
        for name in registry.names("families"):
            try:
                s = self.setting(target, name)
            except Exception:  # noqa: S112 - a family that needs arguments, or that its own checks will find
                continue
            if s is None:
                continue
            used.append(name)
            family = registry.build("families", name).build(s.family.latent, generator=seeded(0))
            loss = s.loss(family, s.noise(max(self.draws, s.objective.default_draws)))
            named = [(n, p) for n, p in family.named_parameters() if p.requires_grad]
            parts = torch.autograd.grad(loss.surrogate.sum(), [p for _, p in named], allow_unused=True)
            dead = [n for (n, _), g in zip(named, parts, strict=True) if g is None or not bool((g != 0).any())]
            if dead:
                raise Broken(
                    got=f"no gradient for {', '.join(dead)} of {name!r}",
                    expected="a gradient for every parameter at the defaults",
                )
        if not used:
            raise NotApplicable("no registered family offers what it needs on a continuous target")

    def conjugate(self) -> None:
        """A descent on fixed noise ends at the exact posterior of a conjugate model."""
        self._at_posterior()
        s = self.on(targets.linear_regression(), "full_rank")
        if s.objective.renyi_order == 0 and s.estimator not in _VANISHING:
            raise NotApplicable(
                "of order 0, its value is flat with many draws, and on fixed ones it follows their errors"
            )
        family = exact_family(s)
        exact_mean, exact_covariance = s.target.moments()
        exact_sd = exact_covariance.diagonal().sqrt()
        # wider than the posterior, but not by so much that divergences of large order are infinite
        family.start_at(exact_mean + 0.3 * exact_sd, 1.25 * torch.linalg.cholesky(exact_covariance))
        seen: Any = family
        objective, nodes = s.objective.on_quadrature(), grid_noise(family.noise_spec, 12)
        # the points of a grid are not independent, and a mean over pairs of them is off by one over their number
        fresh = s.estimator in _PAIRED and objective == s.objective
        if fresh:
            nodes = grid_noise(family.noise_spec, 20)
        if objective != s.objective:  # its value is not a mean over draws, and needs the rule's weights
            nodes, weights = normal_quadrature(2)
            seen = QuadratureFamily(family, weights)
        descend(objective, seen, s.target.model, nodes, steps=200, rate=0.05, fresh=fresh)
        mean, covariance = (part.detach() for part in family.moments())
        off = ((mean - exact_mean) / exact_sd).abs().max()
        spread = (covariance.diagonal().sqrt().log() - exact_sd.log()).abs().max()
        if not (off < tolerances.MOMENTS and spread < tolerances.MOMENTS):
            raise Broken(
                got=f"a mean {float(off):.2g} sd off and a log sd {float(spread):.2g} off",
                expected=f"the exact posterior to {tolerances.MOMENTS:g}",
            )

    def misspecified(self) -> None:
        """Mean field on a correlated normal law lands where the closed form for its order says."""
        self._at_posterior()
        order = 0.0 if self.objective.inclusive else self.objective.renyi_order
        if order is None:
            raise NotApplicable("it states no renyi_order, so there is no closed form to compare with")
        low, high = order if isinstance(order, tuple) else (order, order)
        # of the divergences whose limit is of order 0 only KL(p || q) has an optimum of its own
        if low == high and not (0 < low <= 1 or self.objective.inclusive):
            raise NotApplicable(f"the kit's grid of draws is good for orders in (0, 1], and this is of order {low:g}")
        rho = 0.9
        s = self.on(targets.correlated_normal(rho), "mean_field")
        family = s.family.copy()
        # importance weights reach further out than draws do
        per_axis = 100 if self.objective.inclusive else 40
        descend(s.objective, family, s.target.model, grid_noise(family.noise_spec, per_axis), steps=250)
        mean, covariance = (part.detach() for part in family.moments())
        sd = covariance.diagonal().sqrt()
        wide, narrow = targets.mean_field_sd(low, rho), targets.mean_field_sd(high, rho)
        slack = math.exp(tolerances.MOMENTS)
        inside = (sd > narrow / slack) & (sd < wide * slack) & (mean.abs() < tolerances.MOMENTS * narrow)
        if not bool(inside.all()):
            wanted = f"{narrow:.4f}" if low == high else f"between {narrow:.4f} and {wide:.4f}"
            raise Broken(
                got=f"sds {[round(x, 4) for x in sd.tolist()]}, means {[round(x, 4) for x in mean.tolist()]}",
                expected=f"sds {wanted} and means 0 (mean field on a normal law of correlation {rho})",
            )

    def minibatches(self) -> None:
        """Over the batches of an epoch the mean loss and gradient are those of all data, on the same noise."""
        kind = self.objective.subsampling
        if kind == "no" or kind == "biased":
            raise NotApplicable(f"minibatches are declared {kind!r}")
        if kind == "per_datum":
            self._per_datum()
            return
        found = [s for s in self.settings(("full_rank",)) if Capability.SUBSAMPLE in s.target.model.capabilities]
        if not found:
            raise NotApplicable("it does not run on a target with minibatches")
        for s in found:
            model, noise = s.target.model, s.noise(self.draws)
            source = model.batches(4, seed=0)
            parts = [s.loss(s.family, noise, batch=source.at(i)) for i in range((model.num_data or 0) // 4)]
            whole = s.loss(s.family, noise)
            unbiased(parts, whole, s.family)

    def _per_datum(self) -> None:
        target = targets.local_normal()
        family = local_family(target.model)
        objective = self.objective
        if objective.missing(frozenset(target.model.capabilities), frozenset(family.capabilities), Space.REAL):
            raise NotApplicable("it does not run on a target with local latents")
        resolved, model, size = objective.resolve(target.model, family), target.model, target.model.num_data or 0
        noise = draw_noise(joint_noise_spec(family, size), (self.draws,), seeded(4))
        columns = noise.reshape(self.draws, size, -1)

        def loss(batch: Batch) -> Loss:
            own = columns[:, batch.index].reshape(self.draws, -1)
            return resolved.loss(LocalView(family, batch), model, own, batch, None)

        source = model.batches(2, seed=0)
        batches = [source.at(i) for i in range(size // 2)]
        whole = model.batches(size, seed=0).at(0)
        unbiased([loss(b) for b in batches if b is not None], loss(whole), family)  # type: ignore[arg-type]

    def extreme_weights(self) -> None:
        """Log ratios of plus and minus 1e4 give finite losses and gradients."""
        found = [s for n in (self.objective.estimators or [None]) if (s := self._extreme(n)) is not None]
        if not found:
            raise NotApplicable("it does not run on mean field with a log density")
        for s in found:
            loss = s.loss(s.family, s.noise(16))
            gradient = flat_gradient(loss, s.family)
            if not (bool(torch.isfinite(loss.value).all()) and bool(torch.isfinite(gradient).all())):
                raise Broken(
                    got=f"value {loss.value.tolist()}, gradient {gradient.tolist()} (estimator {s.estimator!r})",
                    expected="finite numbers at log ratios of 1e4",
                )

    def _extreme(self, estimator: str | None) -> Setting | None:
        asked = getattr(self.objective, "estimator", None)
        if asked not in (None, "auto") and estimator != asked:
            return None
        return self.setting(targets.extreme(), "mean_field", estimator)
