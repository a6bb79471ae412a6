"""What can meet what: every cell is planned, every plan fits or is refused for a capability that is really missing."""

import dataclasses
import json
import math
import warnings

import pytest
import torch

from vifamily import compatibility, fit, plan, registry
from vifamily.errors import ConfigError, IncompatibleError, UnknownNameError, VifamilyError
from vifamily.objectives import Objective
from vifamily.plan import KINDS, check_batches, default_capabilities, latent_of
from vifamily.types import Capability, Space

STEPS = 8
OBJECTIVES = tuple(compatibility(families=[], models=[]).objectives)
MODELS = {name: kind.make() for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def matrix():
    return compatibility()


def capabilities(cell):
    """What model and family of a cell can do, as they declare it."""
    model = MODELS[cell.model]
    family = registry.build("families", cell.family)
    if family.space is not model.space:
        return frozenset(model.capabilities), frozenset()
    built = family.build(latent_of(model), generator=torch.Generator())
    return frozenset(model.capabilities), frozenset(built.capabilities)


def false_reasons(cell):
    """Statements of a refusal that are not true of the model and the family, by what they declare."""
    model, family = MODELS[cell.model], registry.lookup("families", cell.family)
    of_model, of_family = capabilities(cell)
    if family.space is not model.space:
        return [] if cell.missing == (str(family.space),) or cell.missing == (str(model.space),) else [*cell.missing]
    sides = {"model": of_model, "family": of_family}
    wrong = []
    for said in cell.missing:
        side, _, what = said.partition(" (")[0].partition(": ")
        if side == "space":
            true = model.space not in registry.build("objectives", cell.objective).spaces
        elif what.startswith("no "):
            true = Capability(what.removeprefix("no ")) in sides[side]
        else:
            true = Capability(what) not in sides[side]
        wrong += [] if true else [said]
    return wrong


# --- every cell ---


def test_every_objective_meets_every_family_on_every_kind_of_model_in_one_cell(matrix):
    expected = {(o, f, m) for o in OBJECTIVES for f in registry.names("families") for m in KINDS}
    assert len(matrix.cells) == len(expected)
    assert {(c.objective, c.family, c.model) for c in matrix.cells} == expected


def test_every_registered_objective_has_a_row_or_needs_arguments():
    for name in set(registry.names("objectives")) - set(OBJECTIVES):
        with pytest.raises(VifamilyError):
            registry.build("objectives", name)


def test_every_refusal_names_what_is_really_missing(matrix):
    wrong = {
        (c.objective, c.family, c.model): found
        for c in matrix.cells
        if not c.works and (found := false_reasons(c) or ([] if c.missing else [c.reason]))
    }
    assert wrong == {}


def test_every_need_that_is_not_met_is_refused(matrix):
    for cell in matrix.cells:
        objective = registry.build("objectives", cell.objective)
        of_model, of_family = capabilities(cell)
        if objective.needs_model - of_model or objective.needs_family - of_family or objective.never_model & of_model:
            assert not cell.works, cell


def test_what_a_refusal_offers_instead_can_be_planned(matrix):
    seen = set()
    for cell in matrix.cells:
        if cell.works:
            continue
        with pytest.raises(VifamilyError) as caught:
            plan(MODELS[cell.model], cell.family, cell.objective)
        works = getattr(caught.value, "works_with", {})
        pairs = [(family, cell.objective) for family in works.get("families", [])]
        pairs += [(cell.family, objective) for objective in works.get("objectives", [])]
        for family, objective in pairs:
            if (cell.model, family, objective) not in seen:
                assert matrix.cell(objective, family, cell.model).works, (cell, family, objective)
            seen.add((cell.model, family, objective))
    assert seen


def test_every_objective_runs_somewhere(matrix):
    idle = [o for o in OBJECTIVES if not any(c.works for c in matrix.cells if c.objective == o)]
    assert idle == []


def test_every_family_has_an_objective_on_each_kind_of_its_space(matrix):
    for family in registry.names("families"):
        if not any(c.works for c in matrix.cells if c.family == family):
            can = default_capabilities(family, latent_of(MODELS["density"])) or frozenset()
            assert Capability.LOG_Q not in can, family  # only samplers may wait for an objective


# --- every plan ---


def size_of(cell):
    """Parameters of a cell's family."""
    built = registry.build("families", cell.family).build(latent_of(MODELS[cell.model]), generator=torch.Generator())
    return sum(p.numel() for p in built.parameters())


def plans_of(matrix, objective, *, families):
    """One working cell for each estimator and solver, with local latents and without; for each family too, or the
    smallest of them."""
    kept = {}
    for cell in sorted((c for c in matrix.cells if c.works and c.objective == objective), key=size_of):
        kind = (cell.estimator, cell.solver, cell.model == "local")
        kept.setdefault((*kind, cell.family) if families else kind, cell)
    return list(kept.values())


def check_fit(cell):
    """A few steps of what was planned: it runs, stays finite, and did what the plan said."""
    model, objective = MODELS[cell.model], cell.objective
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        posterior = fit(model, cell.family, objective, seed=0, steps=STEPS, compile=False, progress=False)
    if cell.model == "simulator":
        posterior = posterior(torch.zeros(2))
    record, z = posterior.record, posterior.draws(50)
    assert record.steps >= 1 and record.estimator == cell.estimator, cell
    assert z.shape == (50, model.dim) and bool(z.isfinite().all()), cell
    if registry.build("objectives", objective).value_kind != "none":
        assert all(map(math.isfinite, record.restart_losses)), cell
    if Capability.LOG_Q in posterior.family.capabilities and Capability.LOCAL not in model.capabilities:
        assert bool(posterior.log_prob(z).isfinite().all()), cell
    assert [f"warning: {w}" for w in cell.warnings] == [n for n in record.notes if n.startswith("warning: ")], cell


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_kind_of_plan_fits(matrix, objective):
    for cell in plans_of(matrix, objective, families=False):
        check_fit(cell)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_plan_fits(matrix, objective):
    for cell in plans_of(matrix, objective, families=True):
        check_fit(cell)


# --- refusals that must be there, whatever is registered ---

SMOOTH = {Capability.SCORE, Capability.SECOND_ORDER, Capability.REPARAMETERISED}


def test_integer_latents_refuse_whatever_needs_a_gradient_through_them(matrix):
    for cell in (c for c in matrix.cells if c.model == "discrete" and c.works):
        made = plan(MODELS["discrete"], cell.family, cell.objective)
        used = {*made.uses["model"], *made.uses["family"]}
        assert not used & {str(c) for c in SMOOTH}, cell


def test_minibatches_are_refused_where_they_would_change_the_answer():
    for name in OBJECTIVES:
        objective, model = registry.build("objectives", name), MODELS["likelihood"]
        if objective.subsampling in ("unbiased", "biased"):
            check_batches(objective, model, 5)
            continue
        with pytest.raises(IncompatibleError, match="not a sum over data") as caught:
            check_batches(objective, model, 5)
        assert caught.value.works_with["objectives"]
        assert all(
            registry.build("objectives", other).subsampling in ("unbiased", "biased")
            for other in caught.value.works_with["objectives"]
        )


def test_fewer_draws_than_an_objective_needs_are_refused(matrix):
    for row in matrix.needs:
        cell = next(c for c in matrix.cells if c.objective == row.objective and c.works)
        if row.min_draws > 1:
            with pytest.raises(ConfigError, match=f"at least {row.min_draws} draws per step, got draws=1"):
                plan(MODELS[cell.model], cell.family, row.objective, draws=1)


def test_a_family_without_density_meets_only_what_needs_none(matrix):
    for cell in matrix.cells:
        can = capabilities(cell)[1]
        if cell.works and Capability.LOG_Q not in can:
            assert str(Capability.LOG_Q) not in plan(MODELS[cell.model], cell.family, cell.objective).uses["family"]


def test_samples_are_matched_only_where_there_are_samples(matrix):
    for row in matrix.needs:
        if row.model.get(str(Capability.REFERENCE_DRAWS)) == "required":
            on = {c.model for c in matrix.cells if c.objective == row.objective and c.works}
            assert on <= {"reference"}, row.objective


@pytest.mark.parametrize("objective", ["batch_and_match", "gsm"])
def test_closed_form_updates_take_full_rank_families_only(matrix, objective):
    assert {c.family for c in matrix.cells if c.objective == objective and c.works} == {"full_rank"}
    assert "model: no local latents" in matrix.cell(objective, "full_rank", "local").missing


def test_weighted_draws_and_local_latents_are_refused(matrix):
    cell = matrix.cell("elbo", "mixture", "local")
    assert not cell.works and "draws that carry unequal weights" in cell.missing[0]


# --- the matrix itself ---


def test_an_entry_of_somebody_else_is_in_it_without_an_edit(monkeypatch):
    @registry.register("objectives", "half_elbo")
    @dataclasses.dataclass(frozen=True)
    class HalfElbo(Objective):
        """Half a bound."""

        def loss(self, family, model, noise, batch=None, state=None):
            raise NotImplementedError

    entries = registry._entries("objectives") | {"half_elbo": HalfElbo}
    everything = registry._entries
    monkeypatch.setattr(registry, "_entries", lambda kind: entries if kind == "objectives" else everything(kind))
    found = compatibility(families=["implicit"], models=["density"])
    assert "half_elbo" in found.objectives
    assert found.cell("half_elbo", "implicit", "density").works
    assert [row.implicit for row in found.needs if row.objective == "half_elbo"] == [True]


def test_ones_own_models_and_specs():
    found = compatibility(["elbo(estimator=stl)"], ["full_rank"], {"mine": MODELS["likelihood"], "named": "banana"})
    assert [c.estimator for c in found.cells] == ["stl", "stl"]
    assert found.overview_rows()[1] == ["elbo(estimator=stl)", "12"]


def test_needs_are_those_declared(matrix):
    for row in matrix.needs:
        objective = registry.build("objectives", row.objective)
        assert {c for c, mark in row.model.items() if mark == "required"} >= {str(c) for c in objective.needs_model}
        used = {c for e in objective.estimators.values() for c in e.family} | objective.needs_family
        assert set(row.family) == {str(c) for c in used}
    elbo = next(row for row in matrix.needs if row.objective == "elbo")
    assert (elbo.family["log density"], elbo.family["closed-form entropy"]) == ("required", "alternative")
    assert (elbo.discrete, elbo.implicit, elbo.minibatches) == (True, False, "unbiased")


def test_it_prints_every_row_and_goes_through_json(matrix):
    text = str(matrix)
    assert all(text.count(name) >= 3 for name in OBJECTIVES) and repr(matrix) == text
    back = json.loads(json.dumps(matrix.to_dict()))
    assert len(back["cells"]) == len(matrix.cells) and len(back["needs"]) == len(OBJECTIVES)
    assert all(text in str(matrix) for text in ("a model: log joint", "blind"))


def test_what_is_not_there_is_said(matrix):
    with pytest.raises(ConfigError, match="no cell"):
        matrix.cell("elbo", "mean_field", "nowhere")
    with pytest.raises(ConfigError, match="no kind of model 'densty'"):
        compatibility(models=["densty"])
    with pytest.raises(UnknownNameError, match="mean_field"):
        compatibility(families=["mean_feild"])
    with pytest.raises(UnknownNameError, match="elbo"):
        compatibility(["elbow"])


def test_spaces_of_the_kinds():
    assert MODELS["discrete"].space is Space.DISCRETE
    assert Capability.LOCAL in MODELS["local"].capabilities
    assert Capability.REFERENCE_DRAWS in MODELS["reference"].capabilities
