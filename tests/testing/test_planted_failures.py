"""Wrong entries fail the kit, each with the contract that it breaks: the kit can tell right from wrong."""

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from vifamily import registry, testing
from vifamily.families import Family, FamilyEntry
from vifamily.families.mean_field import MeanField, MeanFieldFamily
from vifamily.models import Density, LikelihoodModel
from vifamily.objectives import (
    Elbo,
    Estimator,
    InclusiveKlDraws,
    Iwae,
    MarkovianScoreClimbing,
    Objective,
    Renyi,
    RenyiPredictive,
    ReweightedWake,
)
from vifamily.objectives._power import power_bound
from vifamily.solvers.adam import Adam
from vifamily.testing import ContractError
from vifamily.types import Capability, Draw, LatentSpec, Loss, NoiseSpec, Space


def broken(check, entry, contract, **options):
    """Require that a contract is named as broken, with what was got and what was expected."""
    with pytest.raises(ContractError) as caught:
        check(entry, **options)
    assert caught.value.contract == contract, str(caught.value)
    message = str(caught.value)
    assert "expected" in message and "got" in message and contract in message
    return caught.value


# --- objectives ---
def changed(base, change, **fields):
    """An objective whose loss is that of another, changed."""

    @dataclasses.dataclass(frozen=True)
    class Changed(base):
        """An objective with a planted failure."""

        def loss(self, family, model, noise, batch=None, state=None):
            return change(super().loss(family, model, noise, batch, state), family, model, noise, batch)

    for name, value in fields.items():
        setattr(Changed, name, value)
    return Changed


def test_a_wrong_sign_is_caught_by_the_gradient():
    wrong = changed(Elbo, lambda loss, *_: dataclasses.replace(loss, surrogate=-loss.surrogate))
    broken(testing.check_objective, wrong(), "gradient")


def test_a_wrong_sign_without_a_value_is_caught_by_the_descent():
    wrong = changed(Elbo, lambda loss, *_: dataclasses.replace(loss, surrogate=-loss.surrogate), value_kind="none")
    broken(testing.check_objective, wrong(), "conjugate")


def test_a_gradient_off_by_a_factor_is_caught():
    wrong = changed(Elbo, lambda loss, *_: dataclasses.replace(loss, surrogate=2 * loss.surrogate))
    broken(testing.check_objective, wrong(), "gradient")


@dataclasses.dataclass(frozen=True)
class InvertedDreg(Renyi):
    """Doubly reparameterised weights given to the draws in inverted order."""

    def loss(self, family, model, noise, batch=None, state=None):
        if self.estimator != "dreg":
            return super().loss(family, model, noise, batch, state)
        draw = family(noise)
        ratio = model.log_joint(draw.z, batch) - family.log_prob(draw.z, frozen=True)
        value = -power_bound(ratio, draw.log_weight, self.alpha)
        v = torch.softmax((1 - self.alpha) * ratio.detach(), -1)
        v = v.sort(-1).values.gather(-1, ratio.argsort(-1, descending=True).argsort(-1))
        return Loss(-((self.alpha * v + (1 - self.alpha) * v**2) * ratio).sum(-1), value.detach(), {})


@dataclasses.dataclass(frozen=True)
class SquaredDreg(Renyi):
    """The squared weights of alpha = 0 used at every alpha."""

    def loss(self, family, model, noise, batch=None, state=None):
        if self.estimator != "dreg":
            return super().loss(family, model, noise, batch, state)
        draw = family(noise)
        ratio = model.log_joint(draw.z, batch) - family.log_prob(draw.z, frozen=True)
        value = -power_bound(ratio, draw.log_weight, self.alpha)
        v = torch.softmax((1 - self.alpha) * ratio.detach(), -1)
        return Loss(-(v**2 * ratio).sum(-1), value.detach(), {})


@pytest.mark.parametrize("wrong", [InvertedDreg, SquaredDreg])
def test_wrong_weights_of_draws_are_caught(wrong):
    broken(testing.check_objective, wrong(), "gradient")


@dataclasses.dataclass(frozen=True)
class TailAdaptive(Objective):
    """Weights by rank of the density ratio (Wang, Liu and Liu 2018): the largest ratio gets the largest weight."""

    inverted: bool = False
    estimator: str = "auto"

    # draws that carry weights of their own would have them ignored
    estimators: ClassVar = {"ranked": Estimator(never_family=frozenset({Capability.WEIGHTED, Capability.LOG_Q_BOUND}))}
    needs_model: ClassVar = frozenset({Capability.LOG_JOINT, Capability.SCORE})
    needs_family: ClassVar = frozenset({Capability.REPARAMETERISED, Capability.LOG_Q})
    value_kind: ClassVar = "none"
    min_draws: ClassVar[int] = 2

    @property
    def renyi_order(self):
        return (-1.0, 1.0)

    def loss(self, family, model, noise, batch=None, state=None):
        draw = family(noise)
        ratio = model.log_joint(draw.z, batch) - family.log_prob(draw.z, frozen=True)
        # one over the fraction of draws whose ratio is at least as large
        rank = ratio.detach().argsort(-1, descending=not self.inverted).argsort(-1) + 1
        weight = (1 / rank) / (1 / rank).sum(-1, keepdim=True)
        return Loss(-(weight * ratio).sum(-1), -ratio.mean(-1).detach(), {})


TAIL_SKIP = {"zero_at_posterior": "ranks of equal ratios are rounding", "constant_invariance": "likewise"}


def test_tail_adaptive_ranks_pass_and_inverted_ones_are_caught():
    right = testing.check_objective(TailAdaptive(), skip=TAIL_SKIP)
    assert "misspecified" in right.passed
    # inverted, draws far from the target count most: q ends narrower than the conditional law
    broken(testing.check_objective, TailAdaptive(inverted=True), "misspecified", skip=TAIL_SKIP)


def test_a_doubled_divergence_is_caught():
    @dataclasses.dataclass(frozen=True)
    class Doubled(Elbo):
        """The KL to the prior counted twice."""

        def loss(self, family, model, noise, batch=None, state=None):
            loss = super().loss(family, model, noise, batch, state)
            if self.estimator != "analytic_kl":
                return loss
            draw = family(noise)
            likelihood = model.log_likelihood(draw.z, batch).sum(-1).mean(-1) * model.scale(batch)
            value = 2 * (loss.surrogate + likelihood) - likelihood
            return dataclasses.replace(loss, surrogate=value, value=value.detach())

    broken(testing.check_objective, Doubled(), "zero_at_posterior")


def test_a_forgotten_minibatch_scale_is_caught():
    @dataclasses.dataclass(frozen=True)
    class Unscaled(Objective):
        """An ELBO that sums the batch's likelihood as it is."""

        needs_model: ClassVar = frozenset(
            {Capability.LOG_JOINT, Capability.PRIOR, Capability.PER_DATUM, Capability.SCORE}
        )
        needs_family: ClassVar = frozenset({Capability.REPARAMETERISED, Capability.LOG_Q})
        value_kind: ClassVar = "lower_bound"
        subsampling: ClassVar = "unbiased"

        def loss(self, family, model, noise, batch=None, state=None):
            draw = family(noise)
            log_p = model.log_prior(draw.z) + model.log_likelihood(draw.z, batch).sum(-1)
            value = -(draw.log_weight.exp() * (log_p - draw.log_q)).sum(-1)
            return Loss(value, value.detach(), {})

    broken(testing.check_objective, Unscaled(), "minibatches")


def test_a_bound_over_all_data_that_claims_unbiased_minibatches_is_caught():
    broken(testing.check_objective, changed(Iwae, lambda loss, *_: loss, subsampling="unbiased")(), "minibatches")


def test_ignored_weights_of_draws_are_caught():
    def equal_weights(loss, family, model, noise, batch):
        draw = family(noise)
        if draw.log_q is None or draw.z.shape[-1] == 0:
            return loss
        value = -(model.log_joint(draw.z, batch) - draw.log_q).mean(-1)
        return Loss(value, value.detach(), {})

    wrong = changed(Elbo, equal_weights)
    broken(testing.check_objective, wrong("reparameterised"), "draw_weights")


def test_an_undeclared_need_is_caught():
    wrong = changed(Elbo, lambda loss, family, *_: dataclasses.replace(loss, terms={"h": family.entropy().detach()}))
    error = broken(testing.check_objective, wrong(), "declared_needs")
    assert "closed-form entropy" in str(error)


def test_a_need_that_is_not_checked_is_caught():
    @dataclasses.dataclass(frozen=True)
    class Lenient(Elbo):
        """Says that everything fits."""

        def missing(self, model, family, space=None):
            return ()

    broken(testing.check_objective, Lenient(), "refusals")


def test_a_value_that_is_not_per_restart_is_caught():
    wrong = changed(Elbo, lambda loss, *_: dataclasses.replace(loss, value=loss.value.sum()))
    broken(testing.check_objective, wrong(), "loss_shape")


def test_an_attached_value_is_caught():
    wrong = changed(Elbo, lambda loss, *_: dataclasses.replace(loss, value=loss.value + 0 * loss.surrogate))
    broken(testing.check_objective, wrong(), "loss_shape")


def test_restarts_that_see_one_another_are_caught():
    def mixed(loss, *_):
        return (
            loss
            if loss.surrogate.dim() == 0
            else dataclasses.replace(loss, surrogate=loss.surrogate + loss.surrogate.sum())
        )

    broken(testing.check_objective, changed(Elbo, mixed)(), "restarts")


def test_randomness_of_its_own_is_caught():
    def noisy(loss, *_):
        return dataclasses.replace(loss, surrogate=loss.surrogate * (1 + 0.1 * torch.rand(())))

    broken(testing.check_objective, changed(Elbo, noisy)(), "declared_needs")


def test_dependence_on_the_log_evidence_is_caught():
    def raw(loss, *_):
        return dataclasses.replace(loss, surrogate=loss.surrogate**2, value=loss.value**2)

    broken(testing.check_objective, changed(Elbo, raw)(), "constant_invariance", skip={"gradient": "stl"})


def test_overflow_is_caught():
    def exponential(loss, *_):
        value = (0.2 * loss.surrogate).exp()
        return dataclasses.replace(loss, surrogate=value, value=value.detach())

    skip = {"constant_invariance": "it is no bound", "gradient": "of stl", "minibatches": "not a sum"}
    wrong = changed(Elbo, exponential, value_kind="surrogate")
    error = broken(testing.check_objective, wrong(), "extreme_weights", skip=skip)
    assert "1e4" in str(error)


def test_a_vanishing_gradient_is_caught():
    wrong = changed(Elbo, lambda loss, *_: dataclasses.replace(loss, surrogate=0 * loss.surrogate), value_kind="none")
    broken(testing.check_objective, wrong(), "nonzero_gradient")


def test_a_wrong_order_is_caught():
    @dataclasses.dataclass(frozen=True)
    class Claims(Elbo):
        """Reverse KL that claims to be of order one half."""

        @property
        def renyi_order(self):
            return 0.5

    error = broken(testing.check_objective, Claims(), "misspecified")
    assert "0.6602" in str(error) and "0.43" in str(error)


def test_a_reverse_divergence_that_claims_to_be_the_inclusive_one_is_caught():
    wrong = changed(Elbo, lambda loss, *_: loss, inclusive=True)
    broken(testing.check_objective, wrong(), "misspecified")


@dataclasses.dataclass(frozen=True)
class ShiftedDraws(InclusiveKlDraws):
    """Maximum likelihood on reference draws, shifted: its gradient does not vanish at the posterior."""

    biased_at_posterior: ClassVar[bool] = True
    spaces: ClassVar = frozenset({Space.REAL})

    def loss(self, family, model, noise, batch=None, state=None):
        draws = model.reference_draws
        shifted = SimpleNamespace(reference_draws=draws + 0.5 * draws.std(0), capabilities=model.capabilities)
        return super().loss(family, shifted, noise, batch, state)


def test_a_bias_that_more_draws_do_not_shrink_is_caught():
    broken(testing.check_objective, ShiftedDraws(), "zero_at_posterior")


@dataclasses.dataclass(frozen=True)
class Stuck(MarkovianScoreClimbing):
    """A chain that never moves."""

    def loss(self, family, model, noise, batch=None, state=None):
        return dataclasses.replace(super().loss(family, model, noise, batch, state), state=state)


def test_a_chain_that_does_not_move_is_caught():
    # with few draws per step the first draw would be averaged in for good
    broken(testing.check_objective, Stuck(average=False), "conjugate")


def test_undeclared_reference_draws_are_caught():
    wrong = changed(Elbo, lambda loss, family, model, *_: (model.reference_draws, loss)[1])
    broken(testing.check_objective, wrong(), "declared_needs")


def test_weights_of_draws_that_are_not_normalised_are_caught():
    class Unnormalised(ReweightedWake):
        """The sum of ratios left in."""

        def loss(self, family, model, noise, batch=None, state=None):
            loss = super().loss(family, model, noise, batch, state)
            draw = family(noise)
            ratio = (model.log_joint(draw.z) - family.log_prob(draw.z)).detach()
            return dataclasses.replace(
                loss, surrogate=loss.surrogate * (ratio + draw.log_weight.detach()).logsumexp(-1).exp()
            )

    broken(testing.check_objective, Unnormalised(), "constant_invariance")


def test_a_wrong_predictive_order_is_caught():
    @dataclasses.dataclass(frozen=True)
    class Mistaken(RenyiPredictive):
        """One that takes another power than it says."""

        @property
        def predictive_order(self):
            return 1.1 * self.alpha

    broken(testing.check_objective, Mistaken(), "predictive")


def test_a_surrogate_that_claims_the_gradient_of_its_value_is_held_to_it():
    wrong = changed(RenyiPredictive, lambda loss, *_: dataclasses.replace(loss, surrogate=2 * loss.surrogate))
    broken(testing.check_objective, wrong(), "gradient")


def test_dependence_on_the_scale_of_the_prior_is_caught():
    # what needs the likelihood apart meets the constant in the prior
    def change(loss, family, model, noise, batch):
        scaled = loss.surrogate * (1 + 1e-3 * model.log_prior(family(noise).z)[..., 0].detach())
        return dataclasses.replace(loss, surrogate=scaled)

    broken(testing.check_objective, changed(RenyiPredictive, change, value_kind="none")(), "constant_invariance")


def test_a_contract_that_does_not_exist_cannot_be_skipped():
    with pytest.raises(ContractError, match="no contract of this name"):
        testing.check_family("mean_field", skip={"no_such": "because"})


# --- families ---
def family_entry(module, **declared):
    """An entry for a family module, with the capabilities of mean field."""

    @dataclasses.dataclass(frozen=True)
    class Entry(FamilyEntry):
        """A family with a planted failure."""

        capabilities = declared.get("capabilities", MeanField().capabilities - {Capability.CONDITIONAL})
        space = declared.get("space", MeanField().space)

        def build(self, latent, *, generator):
            self.check_space(latent)
            return module(latent)

    return Entry()


def planted(**methods):
    """Mean field with some methods replaced."""
    from vifamily.families._elliptical import Radial

    class Planted(MeanFieldFamily):
        def __init__(self, latent: LatentSpec) -> None:
            super().__init__(latent, Radial(None))
            self.capabilities = self.capabilities - {Capability.CONDITIONAL} | methods.get("more", frozenset())

    for name, method in methods.items():
        if name != "more":
            setattr(Planted, name, method)
    return family_entry(Planted)


BASE = MeanFieldFamily
COUNTER = itertools.count()


def replaced(draw, **parts):
    return dataclasses.replace(draw, **{name: change(getattr(draw, name)) for name, change in parts.items()})


def test_an_unbroken_family_of_this_form_passes():
    assert len(testing.check_family(planted()).passed) == 15


@pytest.mark.parametrize(
    ("contract", "entry"),
    [
        ("shapes", planted(transform=lambda s, n, c: replaced(BASE.transform(s, n, c), log_weight=lambda w: w + 0.1))),
        ("shapes", planted(transform=lambda s, n, c: replaced(BASE.transform(s, n, c), log_q=lambda q: q[:, None]))),
        (
            "density_of_draws",
            planted(transform=lambda s, n, c: replaced(BASE.transform(s, n, c), log_q=lambda q: q + 0.01)),
        ),
        ("density_of_draws", planted(log_density=lambda s, u, c: BASE.log_density(s, u, c) + s.log_scale.sum())),
        ("density_of_draws", planted(transform=lambda s, n, c: replaced(BASE.transform(s, n, c), z=lambda z: 1.1 * z))),
        ("frozen", planted(log_prob=lambda s, z, context=None, *, frozen=False: Family.log_prob(s, z, context))),
        ("capabilities", planted(entropy=lambda s, context=None: torch.tensor(math.nan))),
        ("capabilities", planted(transform=lambda s, n, c: replaced(BASE.transform(s, n, c), log_q=lambda q: None))),
        ("capabilities", planted(transform=lambda s, n, c: replaced(BASE.transform(s, n, c), z=torch.Tensor.detach))),
        ("moments", planted(standard_entropy=lambda s, c: BASE.standard_entropy(s, c) + 0.5)),
        ("moments", planted(standard_moments=lambda s: (s.loc, torch.diag(s.log_scale.exp())))),
        ("start", planted(start_at=lambda s, mean, scale: None)),
        ("shapes", planted(transform=lambda s, n, c: BASE.transform(s, n + torch.rand_like(n), c))),
        ("determinism", planted(transform=lambda s, n, c: BASE.transform(s, n + next(COUNTER), c))),
    ],
)
def test_wrong_families_are_caught(contract, entry):
    broken(testing.check_family, entry, contract)


def test_a_density_that_agrees_with_itself_but_is_not_one_is_caught():
    def transform(self, noise, context):
        return replaced(BASE.transform(self, noise, context), log_q=lambda q: q + 0.3)

    def log_density(self, u, context):
        return BASE.log_density(self, u, context) + 0.3

    broken(testing.check_family, planted(transform=transform, log_density=log_density), "integral")


def test_draws_of_another_law_than_the_density_are_caught():
    def transform(self, noise, context):
        u = self.loc + 1.3 * self.log_scale.exp() * noise
        return Draw(u, self.log_density(u, None), torch.full_like(u[:, 0], -math.log(u.shape[0])))

    broken(testing.check_family, planted(transform=transform), "draws_follow_density")


def test_a_gradient_cut_off_is_caught():
    def transform(self, noise, context):
        draw = BASE.transform(self, noise, context)
        return dataclasses.replace(draw, z=self.loc + (draw.z - self.loc).detach())

    broken(testing.check_family, planted(transform=transform), "gradients")


def test_undeclared_unequal_weights_are_caught():
    def transform(self, noise, context):
        draw = BASE.transform(self, noise, context)
        return dataclasses.replace(draw, log_weight=noise[:, 0].log_softmax(0))

    broken(testing.check_family, planted(transform=transform), "capabilities")


def test_state_outside_the_state_dict_is_caught():
    class Forgetful(MeanFieldFamily):
        def __init__(self, latent: LatentSpec, offset: float) -> None:
            from vifamily.families._elliptical import Radial

            super().__init__(latent, Radial(None))
            self.capabilities = self.capabilities - {Capability.CONDITIONAL}
            self.offset = offset

        def values(self, context):
            loc, log_scale = super().values(context)
            return [loc + self.offset, log_scale]

    @dataclasses.dataclass(frozen=True)
    class Entry(FamilyEntry):
        """Draws an offset on building that no saved state holds."""

        capabilities = MeanField().capabilities - {Capability.CONDITIONAL}

        def build(self, latent, *, generator):
            self.check_space(latent)
            return Forgetful(latent, float(torch.randn((), generator=generator)))

    broken(testing.check_family, Entry(), "state", skip={"start": "offset by what was drawn"})


def test_an_entry_that_promises_more_than_it_builds_is_caught():
    class Sampler(Family):
        noise_spec = NoiseSpec((2,))
        capabilities = frozenset({Capability.DRAWS, Capability.REPARAMETERISED})

        def __init__(self, latent):
            super().__init__(latent)
            self.noise_spec = NoiseSpec((latent.dim,))
            self.loc = torch.nn.Parameter(torch.zeros(latent.dim, dtype=latent.dtype))

        def transform(self, noise, context):
            u = self.loc + noise
            return Draw(u, None, torch.full_like(u[:, 0], -math.log(u.shape[0])))

    broken(testing.check_family, family_entry(Sampler), "declarations")
    fair = family_entry(Sampler, capabilities=Sampler.capabilities)
    assert "gradients" in testing.check_family(fair).passed


# --- models ---
Y = torch.tensor([0.3, -0.2, 1.0, 0.4], dtype=torch.float64)


def test_draws_that_see_one_another_are_caught():
    def log_prob(z):
        return -0.5 * (z - z.mean(0)).square().sum(-1)

    broken(testing.check_model, Density(log_prob, dim=2), "draws_apart")


def test_a_score_cut_off_is_caught():
    broken(testing.check_model, Density(lambda z: -0.5 * (z * z.detach()).sum(-1), dim=2), "score")


def test_a_wrong_minibatch_scale_in_a_model_is_caught():
    class Unscaled(LikelihoodModel):
        def scale(self, batch):
            return 1.0

    model = Unscaled((0.0, 1.0), lambda z, y: -0.5 * (y - z) ** 2, data=Y, dim=1)
    broken(testing.check_model, model, "minibatches")


def test_a_prior_that_is_not_part_of_the_joint_is_caught():
    class Apart(LikelihoodModel):
        def _log_prior(self, z):
            return super()._log_prior(z) + 0.1

    model = Apart((0.0, 1.0), lambda z, y: -0.5 * (y - z) ** 2, data=Y, dim=1)
    broken(testing.check_model, model, "parts")


def test_an_undeclared_capability_of_a_model_is_caught():
    model = LikelihoodModel((0.0, 1.0), lambda z, y: -0.5 * (y - z) ** 2, data=Y, dim=1)
    model.capabilities = model.capabilities - {Capability.PRIOR}
    broken(testing.check_model, model, "capabilities")


def test_prior_draws_that_ignore_the_generator_are_caught():
    model = LikelihoodModel((0.0, 1.0), lambda z, y: -0.5 * (y - z) ** 2, data=Y, dim=1)
    counter = iter(range(1000))
    model.sample_prior = lambda n, *, generator: torch.full((n, 1), float(next(counter)), dtype=torch.float64)
    broken(testing.check_model, model, "prior_draws")


# --- solvers ---
def solver_with(**methods):
    base = registry.build("solvers", "adam")

    class Wrong(Adam):
        def start(self, task):
            run = base.start(task)
            for name, method in methods.items():
                setattr(run, name, method(run))
            return run

    return Wrong()


SLOW = {"converges": "slow", "restarts": "slow"}


def test_a_solver_that_forgets_its_state_is_caught():
    def forgetful(run):
        kept = run.tensors

        def tensors():
            held, values = kept()
            return {n: torch.zeros_like(t) if n.startswith("optimiser") else t for n, t in held.items()}, values

        return tensors

    broken(testing.check_solver, solver_with(tensors=forgetful), "resumes", skip=SLOW)


def test_a_solver_that_goes_on_after_a_loss_of_nan_is_caught():
    broken(testing.check_solver, solver_with(_check_finite=lambda run: lambda *_: None), "non_finite", skip=SLOW)


def test_a_solver_that_does_not_move_is_caught():
    def still(run):
        held, step = [g.value.clone() for g in run.groups], run.step

        def stay():
            report = step()
            for group, value in zip(run.groups, held, strict=True):
                group.set(value)
            return report

        return stay

    broken(testing.check_solver, solver_with(step=still), "converges")
