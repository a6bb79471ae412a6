"""Families rebuilt from plain data and a state."""

import copy
import math

import pytest
import torch

from vifamily import checkpoint, registry
from vifamily.diagnostics.stacking import RestartMixture
from vifamily.errors import CheckpointError
from vifamily.types import LatentSpec

SPECS = ["mean_field", "full_rank", "low_rank(rank=2)", "mean_field(student_t=5)"]


def make(spec, dim=4, dtype=torch.float64):
    family = registry.build("families", spec).build(LatentSpec(dim, dtype=dtype), generator=torch.Generator())
    family.spec = spec
    family.start_at(torch.arange(float(dim)).to(dtype), torch.full((dim,), 2.0, dtype=dtype))
    return family


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("matrix", [False, True])
def test_round_trip(spec, matrix, generator):
    family = make(spec)
    scale = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    family.precondition(torch.ones(4), torch.diag(scale) + torch.ones(4, 4).tril(-1) if matrix else scale)
    again = checkpoint.rebuild_family(checkpoint.describe_family(family), family.state_dict())
    z = family.sample(5, generator=generator)
    assert torch.equal(family.log_prob(z), again.log_prob(z))
    assert again.latent == family.latent


def test_single_precision_is_kept():
    family = make("full_rank", dtype=torch.float32)
    again = checkpoint.rebuild_family(checkpoint.describe_family(family), family.state_dict())
    assert again.latent.dtype == again.shift.dtype == torch.float32


def test_mixture_of_restarts(generator):
    mixture = RestartMixture([make("mean_field"), make("mean_field")], torch.tensor([0.2, 0.8]))
    again = checkpoint.rebuild_family(checkpoint.describe_family(mixture), mixture.state_dict())
    z = mixture.sample(5, generator=generator)
    assert torch.equal(mixture.log_prob(z), again.log_prob(z))


def test_a_family_of_the_users_own_must_be_given():
    family = make("mean_field")
    family.spec = None
    with pytest.raises(CheckpointError, match="load.path, family="):
        checkpoint.rebuild_family(checkpoint.describe_family(family), family.state_dict())


def latent(**changes):
    return lambda data, state: data["latent"].update(changes)


def tensor(name, value):
    return lambda data, state: state.update({name: value})


D = torch.float64
HOSTILE = {
    "unknown kind": (lambda d, s: d.update(kind="evil"), "unknown kind"),
    "no kind": (lambda d, s: d.pop("kind"), "'kind' must be str"),
    "unknown name": (lambda d, s: d.update(spec="no_such_family"), "cannot be rebuilt"),
    "code as spec": (lambda d, s: d.update(spec="__import__('os').system('true')"), "cannot be rebuilt"),
    "wrong arguments": (lambda d, s: d.update(spec="mean_field(rank=3)"), "cannot be rebuilt"),
    "spec of a wrong type": (lambda d, s: d.update(spec=3), "'spec' must be str"),
    "no latent": (lambda d, s: d.pop("latent"), "'latent' must be dict"),
    "negative dim": (latent(dim=-1), "not a possible one"),
    "huge dim": (latent(dim=10**9), "do not hold"),
    "dim as text": (latent(dim="4"), "'dim' must be int"),
    "another dim": (latent(dim=3), "affine map"),
    "unknown space": (latent(space="moon"), "not a possible one"),
    "another space": (latent(space="discrete", num_categories=[2, 2, 2, 2]), "cannot be rebuilt"),
    "categories that do not fit": (latent(space="discrete", num_categories=[2]), "categories"),
    "categories of a wrong type": (latent(num_categories=["a"]), "list of integers"),
    "unknown dtype": (latent(dtype="float64; rm"), "not a possible one"),
    "an integer dtype": (latent(dtype="int64"), "not a possible one"),
    "another dtype": (latent(dtype="float32"), "needs torch.float32"),
    "missing tensor": (lambda d, s: s.pop("loc"), "missing loc"),
    "missing shift": (lambda d, s: s.pop("shift"), "missing shift"),
    "unknown tensor": (tensor("extra", torch.zeros(1)), "unknown extra"),
    "wrong shape": (tensor("loc", torch.zeros(5, dtype=D)), "shape"),
    "wrong dtype": (tensor("loc", torch.zeros(4)), "torch.float32"),
    "NaN": (tensor("loc", torch.full((4,), math.nan, dtype=D)), "NaN or infinite"),
    "infinite scale": (tensor("scale", torch.full((4,), math.inf, dtype=D)), "NaN or infinite"),
    "zero scale": (tensor("scale", torch.zeros(4, dtype=D)), "zero scale"),
    "scale of rank three": (tensor("scale", torch.ones(4, 4, 4, dtype=D)), "affine map"),
    "many unknown": (lambda d, s: s.update({f"x{i}": torch.zeros(1) for i in range(9)}), "and 5 more"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_state(name):
    spoil, message = HOSTILE[name]
    family = make("mean_field")
    data, state = copy.deepcopy(checkpoint.describe_family(family)), dict(family.state_dict())
    spoil(data, state)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.rebuild_family(data, state)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "restart_mixture", "components": []}, "no components"),
        ({"kind": "restart_mixture"}, "'components' must be list"),
        ({"kind": "restart_mixture", "components": [{"kind": "restart_mixture", "components": []}]}, "unknown kind"),
        ({"kind": "restart_mixture", "components": ["text"]}, "'kind' must be str"),
    ],
)
def test_hostile_mixture(data, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.rebuild_family(data, {"shift": torch.zeros(4)})


def test_a_device_that_is_not_here_becomes_the_cpu():
    family = make("mean_field")
    data = checkpoint.describe_family(family)
    data["latent"]["device"] = "cuda:7" if not torch.cuda.is_available() else "nonsense"
    assert checkpoint.rebuild_family(data, family.state_dict()).shift.device.type == "cpu"
