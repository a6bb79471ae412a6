"""Save and load: what comes back, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from vifamily import checkpoint, registry
from vifamily.errors import CheckpointError, ConfigError, NotAvailableError
from vifamily.models.density import Density
from vifamily.posterior import FitRecord, Posterior, load


def same(a, b):
    assert torch.equal(a.draws(20), b.draws(20))
    assert torch.equal(a.log_prob(a.draws(20)), b.log_prob(b.draws(20)))
    plain_a, trace_a = a.record.to_plain()
    plain_b, trace_b = b.record.to_plain()
    assert json.dumps(plain_a) == json.dumps(plain_b)
    assert list(trace_a) == list(trace_b) or set(trace_a) == set(trace_b)
    assert all(torch.equal(trace_a[key], trace_b[key]) for key in trace_a)
    assert a.layout == b.layout


def test_round_trip_with_the_model(exact, named, tmp_path):
    assert exact.save(tmp_path / "fit") == tmp_path / "fit"
    again = load(tmp_path / "fit", model=named)
    same(exact, again)
    assert again.diagnose().to_dict() == exact.diagnose().to_dict()
    assert not any(p.requires_grad for p in again.family.parameters())
    again.save(tmp_path / "again")
    same(again, load(tmp_path / "again"))


def test_without_the_model(exact, tmp_path):
    exact.save(tmp_path)
    again = load(tmp_path)
    same(exact, again)
    assert again.summary().to_dict() == exact.summary().to_dict()
    with pytest.raises(NotAvailableError, match="model="):
        again.log_joint(again.draws(2))


def test_a_named_problem_comes_back_by_name(family, record, tmp_path):
    problem = registry.build("problems", "banana")
    dim = problem.model.dim
    posterior = Posterior(
        problem.model, family("full_rank", [0.0] * dim, [1.0] * dim), record(family="full_rank"),
        layout=problem.model.layout, problem=problem, config={"problem": "banana"},
    )  # fmt: skip
    posterior.save(tmp_path)
    again = load(tmp_path)
    assert again.problem.name == "banana"
    assert again.config == {"problem": "banana"}
    assert again.diagnose().to_dict() == posterior.diagnose().to_dict()


def test_restarts_and_their_mixture(two_modes, tmp_path):
    two_modes.save(tmp_path / "fit")
    again = load(tmp_path / "fit", model=two_modes.model)
    assert len(again.restarts) == 2
    assert again.diagnose().to_dict() == two_modes.diagnose().to_dict()
    stacked = again.stack()
    stacked.save(tmp_path / "stacked")
    back = load(tmp_path / "stacked", model=two_modes.model)
    same(stacked, back)
    assert torch.equal(back.family.mixture_weights, stacked.family.mixture_weights)


def test_affine_maps_of_both_shapes(named, family, record, tmp_path):
    for matrix in (False, True):
        fitted = family("full_rank", [0.0] * 4, [1.0] * 4)
        scale = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
        fitted.precondition(scale, torch.diag(scale) + torch.ones(4, 4).tril(-1) if matrix else scale)
        posterior = Posterior(named, fitted, record(), layout=named.layout)
        posterior.save(tmp_path)
        same(posterior, load(tmp_path))


def test_draws_are_the_same_bits_whatever_the_memory_layout(family, record, generator, tmp_path):
    fitted = family("full_rank", [0.0] * 31, [1.0] * 31)
    factor = torch.randn(31, 31, generator=generator, dtype=torch.float64).tril(-1) + 5 * torch.eye(
        31, dtype=torch.float64
    )
    fitted.precondition(torch.zeros(31), factor.T.contiguous().T)
    model = Density(lambda z: -0.5 * (z**2).sum(-1), dim=31)
    posterior = Posterior(model, fitted, record(), layout=model.layout)
    posterior.save(tmp_path)
    assert torch.equal(posterior.draws(4000), load(tmp_path, model=model).draws(4000))


def test_non_finite_figures_survive(exact, tmp_path):
    record = FitRecord(**{
        **{f: getattr(exact.record, f) for f in exact.record.__dataclass_fields__},
        "restart_losses": (math.inf, 1.0),
        "gradient_snr": None,
        "trace": {"step": np.array([1.0, 2.0]), "loss": np.array([math.nan, 1.0])},
    })  # fmt: skip
    Posterior(None, exact.family, record, layout=exact.layout).save(tmp_path)
    again = load(tmp_path).record
    assert again.restart_losses == (math.inf, 1.0)
    assert again.gradient_snr is None
    np.testing.assert_array_equal(again.trace["loss"], record.trace["loss"])


def test_a_family_of_the_users_own(exact, named, family, tmp_path):
    exact.family.spec = None
    exact.save(tmp_path)
    with pytest.raises(CheckpointError, match="family="):
        load(tmp_path)
    other = family("full_rank", [9.0] * 4, [9.0] * 4)
    for given in (other, registry.build("families", "full_rank"), "full_rank"):
        same(exact, load(tmp_path, family=given))
    assert float(other.moments()[0][0]) == 9  # what was given is left as it was
    with pytest.raises(CheckpointError, match="does not fit"):
        load(tmp_path, family="mean_field")
    with pytest.raises(ConfigError, match="family="):
        load(tmp_path, family=3)


class WithScale(Density):
    """A model with a point parameter."""

    def __init__(self, value):
        super().__init__(lambda z: -0.5 * (z**2).sum(-1), dim=2)
        self.noise = nn.Parameter(torch.tensor(value, dtype=torch.float64))


def test_point_parameters_of_the_model(family, record, tmp_path):
    model = WithScale(1.5)
    Posterior(model, family("mean_field", [0.0, 0.0], [1.0, 1.0]), record(), layout=model.layout).save(tmp_path)
    fresh = WithScale(0.0)
    assert load(tmp_path, model=fresh).model is fresh
    assert fresh.noise.item() == 1.5
    with pytest.raises(CheckpointError, match="point parameters"):
        load(tmp_path, model=Density(lambda z: -0.5 * (z**2).sum(-1), dim=2))


def test_another_model_is_refused(exact, tmp_path):
    exact.save(tmp_path)
    with pytest.raises(CheckpointError, match="the given model has the parameters"):
        load(tmp_path, model=Density(lambda z: -0.5 * (z**2).sum(-1), dim=4))


def test_an_unwritable_place(exact, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        exact.save(tmp_path / "file")


def test_missing_and_other_folders(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(tmp_path / "nowhere")
    checkpoint.write(tmp_path, {}, {"kind": "fit"}, name="posterior")
    with pytest.raises(CheckpointError, match="not a posterior"):
        load(tmp_path)


def meta(*path, value):
    def change(data, tensors):
        for key in path[:-1]:
            data = data[key]
        if value is None:
            data.pop(path[-1])
        else:
            data[path[-1]] = value

    return change


def tensors(**values):
    return lambda data, held: held.update({key.replace("__", "/"): value for key, value in values.items()})


D, REAL = torch.float64, {"kind": "real"}
HOSTILE = {
    "no record": meta("record", value=None),
    "record is a list": meta("record", value=[1]),
    "steps as text": meta("record", "steps", value="many"),
    "converged as a number": meta("record", "converged", value=1),
    "losses as text": meta("record", "restart_losses", value=["a"]),
    "losses as one number": meta("record", "restart_losses", value=1.0),
    "notes of numbers": meta("record", "notes", value=[1]),
    "versions of numbers": meta("record", "versions", value={"torch": 2}),
    "seconds missing": meta("record", "seconds", value=None),
    "no layout": meta("layout", value=None),
    "layout of another form": meta("layout", value={"sites": 5}),
    "layout with code": meta("layout", value={"sites": [{"name": "a", "shape": [], "support": "__import__('os')"}]}),
    "layout of another size": meta("layout", "sites", value=[{"name": "a", "shape": [2], "support": REAL}]),
    "layout with a huge shape": meta("layout", "sites", value=[{"name": "a", "shape": [10**12], "support": REAL}]),
    "layout with a negative shape": meta("layout", "sites", value=[{"name": "a", "shape": [-4], "support": REAL}]),
    "no family": meta("family", value=None),
    "family is text": meta("family", value="full_rank"),
    "restarts are text": meta("restarts", value="two"),
    "a restart is text": meta("restarts", value=["full_rank"]),
    "a restart without tensors": lambda data, held: data.update(restarts=[data["family"]]),
    "an unknown problem": meta("problem", value="no_such_problem"),
    "a problem with code": meta("problem", value="__import__('os').system('true')"),
    "problem of another kind": meta("problem", value=3),
    "another problem": meta("problem", value="banana"),
    "config is a list": meta("config", value=[1]),
    "ragged trace": tensors(trace__loss=torch.zeros(9, dtype=D)),
    "trace of rank two": tensors(trace__loss=torch.zeros(5, 1, dtype=D)),
    "trace of integers": tensors(trace__loss=torch.zeros(5, dtype=torch.int64)),
    "NaN in the family": tensors(family__loc=torch.full((4,), math.nan, dtype=D)),
    "wrong shape in the family": tensors(family__loc=torch.zeros(3, dtype=D)),
    "wrong dtype in the family": tensors(family__loc=torch.zeros(4)),
    "unknown tensor in the family": tensors(family__extra=torch.zeros(4)),
    "missing tensor in the family": lambda data, held: held.pop("family/loc"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_content(exact, tmp_path, name):
    exact.save(tmp_path)
    held, data = checkpoint.read(tmp_path, name="posterior")
    HOSTILE[name](data, held)
    checkpoint.write(tmp_path, held, data, name="posterior")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 1000


def test_untouched_content_loads(exact, tmp_path):
    # the hostile cases fail for what they change, not for how they are written
    exact.save(tmp_path)
    held, data = checkpoint.read(tmp_path, name="posterior")
    checkpoint.write(tmp_path, held, data, name="posterior")
    same(exact, load(tmp_path))
