"""Plans: what is resolved, chosen and refused before the first step."""

import dataclasses

import pytest
import torch

from vifamily import fit, registry
from vifamily.errors import ConfigError, DeviceError, IncompatibleError, ModelError, UnknownNameError
from vifamily.models import Density, LikelihoodModel
from vifamily.objectives import Elbo
from vifamily.plan import describe, plan
from vifamily.types import Capability

DOUBLE = torch.float64


def density(**options):
    return Density(lambda z: -0.5 * (z**2).sum(-1), dim=2, **options)


def likelihood():
    def log_likelihood(theta, y):
        return -0.5 * (y - theta["mu"].unsqueeze(-1)) ** 2

    data = torch.linspace(0, 1, 12, dtype=DOUBLE)
    return LikelihoodModel((0.0, 1.0), log_likelihood, data=data, parameters={"mu": "real"})


def counts():
    return Density(lambda theta: -theta["k"].double(), parameters={"k": "integer_interval(0, 3)"})


def test_names_are_resolved_and_nothing_is_fitted():
    made = plan("banana", "low_rank(rank=1)", "renyi(alpha=0.5)", draws=7)
    assert (made.problem.name, made.latent.dim, made.draws) == ("banana", 2, 7)
    assert registry.entry_name(made.entry) == "low_rank"
    assert made.objective.alpha == 0.5


def test_a_plan_reads_as_text():
    text = str(plan(likelihood(), "auto", "elbo", batch_size=4))
    assert "likelihood, 1 unconstrained coordinates, float64 on cpu" in text
    assert "family     full_rank" in text
    assert "objective  elbo(estimator=" in text
    assert "4 of 12 data" in text
    assert "note       family full_rank chosen" in text
    assert "all data" in str(plan(density()))


@pytest.mark.parametrize(
    ("spec", "text"),
    [("elbo", "elbo"), ("renyi(alpha=0.5)", "renyi"), ("renyi(alpha=2)", "renyi(alpha=2)"), ("iwae", "iwae")],
)
def test_what_differs_from_the_default_is_described(spec, text):
    assert describe(registry.build("objectives", spec)) == text


def test_described_entries_build_again():
    spec = "mixture(components=3, of=full_rank)"
    entry = registry.build("families", spec)
    assert registry.build("families", describe(entry)) == entry


@pytest.mark.parametrize(
    ("model", "family", "estimator"),
    [(density, "mean_field", "entropy"), (density, "flow", "reparameterised"), (counts, "categorical", "enumerated")],
)
def test_the_estimator_is_chosen_by_what_both_can_do(model, family, estimator):
    assert plan(model(), family, "elbo").estimator == estimator


def test_an_estimator_that_is_asked_for_is_taken():
    assert plan(density(), "mean_field", "elbo(estimator=entropy)").estimator == "entropy"


@pytest.mark.parametrize(("dim", "solver"), [(512, "lbfgs"), (1024, "adam")])
def test_a_family_that_needs_very_many_fixed_draws_takes_fresh_ones(dim, solver):
    chosen = plan(Density(lambda z: -0.5 * z.square().sum(-1), dim=dim), "hadamard_sqrt", "elbo")
    assert registry.entry_name(chosen.solver) == solver
    assert solver != "adam" or any("2050 fixed draws" in note for note in chosen.notes)


def test_discrete_latents_get_a_discrete_family():
    made = plan(counts())
    assert registry.entry_name(made.entry) == "categorical"
    assert any("categorical chosen" in note for note in made.notes)


def test_what_cannot_meet_is_refused_with_what_works():
    with pytest.raises(IncompatibleError) as caught:
        plan(density(), "implicit", "elbo")
    error = caught.value
    assert "family: log density" in error.missing
    assert {"mean_field", "full_rank", "flow"} <= set(error.works_with["families"])
    assert "implicit" not in error.works_with["families"]
    assert "elbo" not in error.works_with["objectives"]
    text = str(error)
    assert "the objective 'elbo' cannot run on the family 'implicit" in text
    assert "missing: family: log density" in text
    assert "families that work with this objective here: " in text
    assert "full_rank" in text


def test_every_alternative_that_is_named_does_work():
    with pytest.raises(IncompatibleError) as caught:
        plan(density(), "implicit", "elbo")
    for family in caught.value.works_with["families"]:
        assert plan(density(), family, "elbo").estimator


def test_an_estimator_that_cannot_run_is_refused_by_what_it_lacks():
    with pytest.raises(IncompatibleError) as caught:
        plan(density(), "flow", "elbo(estimator=entropy)")
    assert caught.value.missing == ("family: closed-form entropy",)


def test_a_family_of_another_space_is_refused():
    with pytest.raises(IncompatibleError, match="lives on the real space, but the model's latents are discrete"):
        plan(counts(), "mean_field")
    with pytest.raises(IncompatibleError, match="lives on the discrete space, but the model's latents are real"):
        plan(density(), "categorical")


@pytest.mark.parametrize("objective", ["iwae", "renyi(alpha=0.5)"])
def test_an_objective_that_is_no_sum_over_data_refuses_minibatches(objective):
    with pytest.raises(IncompatibleError, match="is not a sum over data") as caught:
        plan(likelihood(), "mean_field", objective, batch_size=4)
    assert caught.value.missing == ("objective: unbiased minibatches",)
    assert plan(likelihood(), "mean_field", objective).batch_size is None


def test_minibatches_of_what_has_none_are_refused():
    with pytest.raises(IncompatibleError, match="states num_data") as caught:
        plan(density(num_data=12), "mean_field", batch_size=4)
    assert caught.value.missing == (str(Capability.SUBSAMPLE),)


def test_draws_fall_back_to_the_objectives_default():
    assert plan(density(), objective="elbo", solver="adam").draws == registry.build("objectives", "elbo").default_draws
    assert plan(density(), objective="iwae").draws == registry.build("objectives", "iwae").default_draws


@pytest.mark.parametrize("objective", ["iwae", "renyi(alpha=0.5)", "elbo(estimator=score)"])
def test_too_few_draws_are_refused(objective):
    with pytest.raises(ConfigError, match="needs at least 2 draws per step, got draws=1"):
        plan(density(), "mean_field", objective, draws=1)


@pytest.mark.parametrize(
    ("options", "wrong", "near"),
    [
        ({"model": "bananna"}, "bananna", "banana"),
        ({"family": "meanfield"}, "meanfield", "mean_field"),
        ({"objective": "elbow"}, "elbow", "elbo"),
        ({"solver": "adamm"}, "adamm", "adam"),
    ],
)
def test_an_unknown_name_of_any_kind_gets_the_nearest(options, wrong, near):
    with pytest.raises(UnknownNameError, match=f"no entry named '{wrong}'.*Did you mean '{near}'"):
        plan(**{"model": density(), **options})


@pytest.mark.parametrize("thing", [lambda z: z, 3, None, torch.zeros(2), torch.nn.Linear(2, 1)])
def test_what_is_no_model_is_told_how_to_become_one(thing):
    with pytest.raises(ModelError, match=r"Density\(log_prob, dim=\.\.\.\), a Pyro program as vf\.models\.PyroModel"):
        plan(thing)


def test_the_meta_device_holds_no_numbers():
    with pytest.raises(DeviceError, match="meta device, which holds no numbers"):
        plan(density(), device="meta")
    with pytest.raises(DeviceError, match="meta device"):
        plan(density(device="meta"))


@pytest.mark.parametrize("device", ["cpuu", 3.5, "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_said(device):
    with pytest.raises(DeviceError, match="cannot be used here.*device='cpu'"):
        plan(density(), device=device)


@pytest.mark.parametrize("dtype", [torch.int64, "float32", torch.bool, 32])
def test_a_dtype_must_be_floating(dtype):
    with pytest.raises(ConfigError, match="dtype must be a floating torch dtype"):
        plan(density(), dtype=dtype)


def test_the_dtype_asked_for_reaches_the_latents():
    made = plan(density(), dtype=torch.float32)
    assert made.latent.dtype == made.model.dtype == torch.float32


# --- what is used, and what to beware of ---


def declares(**declared):
    """An objective that declares something else than the one it is made of."""
    return dataclasses.dataclass(frozen=True)(type("Declares", (Elbo,), declared))()


def warned(objective, family="mean_field", model=None, **options):
    return plan(density() if model is None else model, family, objective, "adam", **options).warnings


def wide(dim):
    return Density(lambda z: -0.5 * (z**2).sum(-1), dim=dim)


def test_a_plan_says_what_it_uses():
    made = plan(density(), "full_rank", "elbo(estimator=entropy)")
    assert made.uses["family"] == ("closed-form entropy", "log density", "reparameterised draws")
    assert made.uses["model"] == ("differentiable log joint", "log joint")
    assert "of the family: closed-form entropy, log density" in str(made)


def test_the_bound_itself_has_no_warnings():
    for family in ("mean_field", "full_rank", "flow"):
        assert warned("elbo", family) == ()
    assert warned("elbo", model=wide(100)) == ()
    assert warned("renyi(alpha=1)", model=wide(100)) == ()


def test_blindness_is_said_and_more_so_of_families_that_hold_several_modes():
    made = plan(density(), "full_rank", "gsm")
    assert [w for w in made.warnings if w.startswith("blind to the weights of separate modes")]
    assert "\nwarning    blind to" in str(made)
    (one,) = [w for w in warned(declares(blind_to_mode_weights=True)) if "blind" in w]
    (many,) = [w for w in warned(declares(blind_to_mode_weights=True), "mixture") if "blind" in w]
    assert "of this family's parts" in many and "of this family's parts" not in one


@pytest.mark.parametrize(("dim", "said"), [(20, False), (21, True)])
def test_ratios_in_many_dimensions(dim, said):
    for objective in ("renyi(alpha=0.5)", "iwae", "renyi(alpha=2)"):
        assert any(f"density ratios in {dim} dimensions" in w for w in warned(objective, model=wide(dim))) is said


def test_bias_in_the_number_of_draws():
    assert any("O(1/draws)" in w and "over 7 draws" in w for w in warned("renyi(alpha=0.5)", draws=7))
    assert any("7 draws" in w for w in warned("iwae", draws=7))
    assert warned(declares(bias="off by a third at {draws} draws"), draws=6) == ("off by a third at 6 draws",)
    assert warned(declares(bias="", renyi_order=0.5)) == ()
    assert any("O(1/draws)" in w for w in warned(declares(biased_at_posterior=True)))
    assert any("normalised" in w for w in warned(declares(invariant_to_constants=False)))
    assert any("certifies nothing" in w for w in warned("renyi(alpha=-1)"))


def test_bias_on_minibatches_is_said_only_with_minibatches():
    biased = declares(subsampling="biased")
    assert any("biased on minibatches" in w for w in warned(biased, model=likelihood(), batch_size=4))
    assert warned(biased, model=likelihood()) == ()


def test_a_density_at_given_points_that_costs_an_inversion():
    (said,) = warned("elbo(estimator=stl)", "flow")
    assert "cheap log density at given points" in said
    assert warned("elbo(estimator=stl)", "flow(passes=2)") == ()


def test_second_derivatives_and_values_that_say_nothing():
    twice = declares(needs_model=Elbo.needs_model | {Capability.SECOND_ORDER})
    assert any("ReLU" in w for w in warned(twice))
    assert any("no value that orders answers" in w for w in warned(declares(value_kind="none")))


def test_matches_of_scores_do_not_weigh_by_ratios():
    scores = declares(blind_to_mode_weights=True, renyi_order=None)
    assert declares(renyi_order=None).weighs_by_ratio
    assert not scores.weighs_by_ratio
    assert not any("ratios" in w for w in plan(density(), "full_rank", "batch_and_match").warnings)


def test_planning_changes_nothing_and_repeats():
    model = likelihood()
    before = torch.get_rng_state()
    first, second = (str(plan(model, "flow", "iwae", batch_size=None)) for _ in range(2))
    assert first == second and torch.equal(before, torch.get_rng_state())


def test_warnings_reach_record_and_diagnosis():
    posterior = fit(density(), "full_rank", "gsm", seed=0)
    (said,) = [note for note in posterior.record.notes if note.startswith("warning: blind")]
    assert said in posterior.diagnose().notes
    assert "warning: blind" in str(posterior.diagnose())


def test_a_plan_is_shown_before_a_fit_on_request(capsys):
    fit(density(), "mean_field", seed=0, steps=3, progress=False)
    assert capsys.readouterr().out == ""
    fit(density(), "mean_field", seed=0, steps=3, progress=False, show_plan=True)
    assert capsys.readouterr().out == str(plan(density(), "mean_field")) + "\n"


def test_a_family_of_another_space_is_refused_with_what_lives_there():
    with pytest.raises(IncompatibleError) as caught:
        plan(counts(), "mean_field", "elbo")
    assert caught.value.works_with["families"] == ["categorical"]
    assert "families on the discrete space: categorical" in str(caught.value)
    with pytest.raises(IncompatibleError) as caught:
        plan(density(), "categorical", "gsm")
    assert caught.value.works_with["families"] == ["full_rank"]
