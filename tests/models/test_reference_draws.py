"""Reference draws of a model: checked, mapped, carried along, and never written into a posterior."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, DataError, NotAvailableError, ShapeError, SupportError
from vifamily.models import Density, LikelihoodModel, PyroModel
from vifamily.plan import resolve_model
from vifamily.types import Capability

DOUBLE = torch.float64


def density(**options):
    return Density(lambda z: -0.5 * (z**2).sum(-1), dim=2, **options)


def named():
    return Density(lambda t: -t["tau"] - t["mu"].square().sum(-1), parameters={"tau": "positive", "mu": ((2,), "real")})


def test_points_are_kept_in_the_models_dtype():
    points = np.arange(6, dtype=np.float32).reshape(3, 2)
    for given in (points, torch.from_numpy(points), points.tolist(), points.astype(int)):
        draws = density().with_reference_draws(given).reference_draws
        assert draws.dtype == DOUBLE and torch.equal(draws, torch.arange(6, dtype=DOUBLE).reshape(3, 2))
    assert density(dtype=torch.float32).with_reference_draws(points).reference_draws.dtype == torch.float32


def test_named_draws_are_mapped_to_unconstrained_space():
    theta = {"mu": torch.ones(4, 2, dtype=DOUBLE), "tau": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=DOUBLE)}
    model = named().with_reference_draws(theta)
    back = model.constrain(model.reference_draws)
    assert all(torch.allclose(back[name], theta[name]) for name in theta)


def test_the_model_itself_is_unchanged_and_its_parameters_are_shared():
    model = density()
    model.offset = torch.nn.Parameter(torch.zeros(2, dtype=DOUBLE))
    copy = model.with_reference_draws(torch.zeros(2, 2))
    assert Capability.REFERENCE_DRAWS in copy.capabilities and Capability.REFERENCE_DRAWS not in model.capabilities
    assert copy.offset is model.offset and dict(model.named_buffers()) == {}
    with pytest.raises(NotAvailableError, match="with_reference_draws"):
        _ = model.reference_draws
    assert Capability.REFERENCE_DRAWS not in copy.without_reference_draws().capabilities
    assert copy.reference_draws.shape == (2, 2), "taking them off a copy leaves them on the original"


def test_given_draws_are_copied():
    mine = torch.zeros(3, 2, dtype=DOUBLE)
    model = density().with_reference_draws(mine)
    mine += 1
    assert not bool(model.reference_draws.any())


BAD = {
    "one draw": (torch.zeros(1, 2), ShapeError, "at least two"),
    "columns": (torch.zeros(5, 3), ShapeError, r"\(draw, 2\)"),
    "rank": (torch.zeros(5), ShapeError, r"\(5,\)"),
    "nan": (torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [0.0, 0.0]]), DataError, "1 of 3 .* row 1"),
    "complex": (torch.zeros(5, 2, dtype=torch.complex128), DataError, "real numbers"),
    "text": (["a", "b"], DataError, "numeric"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_draws_is_refused(case):
    draws, error, text = BAD[case]
    with pytest.raises(error, match=text):
        density().with_reference_draws(draws)


def test_named_draws_outside_their_support_or_of_other_names_are_refused():
    fine = {"tau": torch.ones(3), "mu": torch.zeros(3, 2)}
    with pytest.raises(SupportError, match="tau"):
        named().with_reference_draws({**fine, "tau": -torch.ones(3)})
    with pytest.raises(ConfigError, match="missing: mu"):
        named().with_reference_draws({"tau": torch.ones(3)})
    with pytest.raises(ShapeError, match="leading axes"):
        named().with_reference_draws({**fine, "tau": torch.ones(4)})


def test_categories_are_checked():
    model = Density(lambda t: -t["k"].double(), parameters={"k": "integer_interval(0, 2)"})
    assert model.with_reference_draws({"k": torch.tensor([0, 2, 1])}).reference_draws.tolist() == [[0], [2], [1]]
    for wrong in ([[0.0], [3.0]], [[0.5], [1.0]]):
        with pytest.raises(SupportError, match="categories"):
            model.with_reference_draws(wrong)


def test_draws_move_with_the_model():
    model = density().with_reference_draws(torch.ones(3, 2))
    moved, _ = resolve_model(model, dtype=torch.float32)
    assert moved.reference_draws.dtype == torch.float32 and model.reference_draws.dtype == DOUBLE


def test_draws_of_all_latents_do_not_follow_into_the_form_with_local_latents():
    def program(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)) as i:
            code = pyro.sample("code", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(code, 1.0), obs=y[i])

    model = PyroModel(program, torch.zeros(6))
    with_draws = model.with_reference_draws(torch.zeros(4, model.dim))
    assert Capability.REFERENCE_DRAWS in with_draws.for_batches(None).capabilities
    assert Capability.REFERENCE_DRAWS not in with_draws.for_batches(2).capabilities


def test_a_model_of_local_latents_alone_has_none():
    model = LikelihoodModel(
        None,
        data=torch.zeros(3, dtype=DOUBLE),
        local={"code": ((), "real")},
        log_local=lambda t, c, y: -(c["code"] ** 2),
    )
    with pytest.raises(ShapeError, match="without global parameters"):
        model.with_reference_draws(torch.zeros(3, 0))


# --- named problems ---


def test_a_problem_brings_its_draws_where_they_are_the_parameters():
    found, problem = resolve_model("poisson_glm")
    columns = found.layout.flatten(found.constrain(found.reference_draws))
    assert torch.allclose(columns, torch.as_tensor(problem.reference.draws), rtol=1e-6)
    assert Capability.REFERENCE_DRAWS not in problem.model.capabilities


def test_a_problem_whose_draws_are_of_other_quantities_brings_none():
    with pytest.raises(vf.errors.IncompatibleError, match="reference draws"):
        vf.plan("eight_schools", "full_rank", "inclusive_kl_draws")


def test_own_draws_are_not_replaced_by_those_of_a_problem():
    problem = registry.build("problems", "correlated_normal")
    own = problem.model.with_reference_draws(torch.zeros(7, 2))
    mine = type(problem)("mine", own, problem.reference, "with draws of its own")
    assert len(resolve_model(mine)[0].reference_draws) == 7


def test_a_saved_posterior_does_not_hold_the_draws(tmp_path):
    posterior = vf.fit("correlated_normal", "mean_field", "inclusive_kl_draws", seed=0)
    posterior.save(tmp_path / "posterior")
    sizes = [f.stat().st_size for f in (tmp_path / "posterior").rglob("*") if f.is_file()]
    assert sum(sizes) < 2000 * 2 * 8
    loaded = vf.load(tmp_path / "posterior")
    assert torch.equal(loaded.draws(20), posterior.draws(20))
    assert str(loaded.summary()) == str(posterior.summary())


def test_columns_are_put_back_in_shape():
    layout = named().layout
    theta = {"tau": torch.arange(5.0), "mu": torch.arange(10.0).reshape(5, 2)}
    back = layout.unflatten(layout.flatten(theta))
    assert all(torch.equal(back[name], theta[name]) for name in theta)
    with pytest.raises(ShapeError, match=r"\.\.\., 3"):
        layout.unflatten(torch.zeros(5, 2))
