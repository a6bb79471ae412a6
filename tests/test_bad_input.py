"""Bad input: each is refused by the right class, with a message that says what was wrong and what to do."""

import math
import os
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import vifamily as vf
from vifamily import checkpoint, errors, registry
from vifamily.models import Density, LikelihoodModel, PyroModel
from vifamily.trackers import CsvTracker
from vifamily.types import Capability, Draw, NoiseSpec

DOUBLE = torch.float64
Y = torch.linspace(-1.0, 2.0, 10, dtype=DOUBLE)
X = torch.stack([torch.ones(10), torch.linspace(-1, 1, 10)], -1).double()


def normal(z):
    return -0.5 * (z**2).sum(-1)


def density(**options):
    return Density(normal, dim=2, **options)


def named(parameters, log_prob=lambda theta: next(iter(theta.values())).flatten(1).sum(-1)):
    return Density(log_prob, parameters=parameters)


def log_likelihood(theta, y):
    return -0.5 * (y - theta["mu"].unsqueeze(-1)) ** 2


def likelihood(data=Y, function=log_likelihood, prior=(0.0, 1.0), **options):
    options.setdefault("parameters", {"mu": "real"})
    return LikelihoodModel(prior, function, data=data, **options)


def counts():
    return Density(lambda theta: -theta["k"].double(), parameters={"k": "integer_interval(0, 3)"})


def fit(model=None, family="mean_field", *args, **options):
    options.setdefault("steps", 3)
    return vf.fit(density() if model is None else model, family, *args, **options)


def returning(value):
    """A density whose function returns something else than one number per draw."""
    return Density(lambda z: value(z), dim=2)


def with_value(data, position, value):
    out = data.clone()
    out.view(-1)[position] = value
    return out


class Unsized(IterableDataset):
    def __iter__(self):
        return iter([torch.zeros(2)])


class Empty(Dataset):
    def __len__(self):
        return 0

    def __getitem__(self, i):
        raise IndexError


def fails(*args):
    raise ZeroDivisionError("a bug of the user's")


def program():
    return pyro.sample("mu", dist.Normal(0.0, 1.0))


DATA = {
    "nan": (
        lambda: likelihood(with_value(Y, 3, math.nan)),
        errors.DataError,
        "hold 1 NaN or infinite value(s), the first at [3]",
    ),
    "inf": (lambda: likelihood(with_value(Y, 0, math.inf)), errors.DataError, "hold 1 NaN or infinite value(s)"),
    "nan in one of two": (
        lambda: likelihood((X, with_value(Y, 2, math.nan)), lambda t, d: log_likelihood(t, d[1])),
        errors.DataError,
        "the data number 1 hold 1 NaN",
    ),
    "nan in a named part": (
        lambda: likelihood({"x": X, "y": with_value(Y, 2, math.nan)}, lambda t, d: log_likelihood(t, d["y"])),
        errors.DataError,
        "the data 'y' hold 1 NaN",
    ),
    "nan in an array": (lambda: likelihood(np.array([1.0, np.nan])), errors.DataError, "NaN or infinite"),
    "empty tensor": (lambda: likelihood(Y[:0]), errors.DataError, "the datum axis has length 0"),
    "empty tuple": (lambda: likelihood(()), errors.DataError, "data are empty"),
    "empty dataset": (lambda: likelihood(Empty()), errors.DataError, "the dataset is empty"),
    "empty batch": (
        lambda: likelihood(DataLoader([(torch.zeros(2),)], batch_size=2, drop_last=True)),
        errors.DataError,
        "no batch",
    ),
    "one number": (lambda: likelihood(torch.tensor(1.0, dtype=DOUBLE)), errors.ShapeError, "must have a datum axis"),
    "lengths disagree": (
        lambda: likelihood((X, Y[:-1]), lambda t, d: log_likelihood(t, d[1])),
        errors.DataError,
        "must agree in length, got number 0: 10, number 1: 9",
    ),
    "text": (lambda: likelihood("data.csv"), errors.DataError, "must be a tensor or a numeric array, got str"),
    "list of texts": (
        lambda: likelihood(np.array(["a", "b"])),
        errors.DataError,
        "must be a tensor or a numeric array",
    ),
    "no data": (lambda: likelihood(None), errors.DataError, "got NoneType"),
    "single precision data": (
        lambda: likelihood(Y.float()),
        errors.DeviceError,
        "are torch.float32 but the model computes in torch.float64",
    ),
    "data elsewhere": (lambda: likelihood(Y.to("meta")), errors.DeviceError, "live on meta, the model on cpu"),
    "num_data that is wrong": (
        lambda: likelihood(num_data=11),
        errors.DataError,
        "num_data=11 was given, but the data hold 10",
    ),
    "num_data negative": (
        lambda: likelihood(num_data=-1),
        errors.ConfigError,
        "num_data must be a positive integer, got -1",
    ),
    "stream without num_data": (lambda: likelihood(DataLoader(Unsized())), errors.DataError, "num_data="),
    "dataset without length": (lambda: likelihood(Unsized()), errors.DataError, "without len()"),
}

MODELS = {
    "(N, 1) against (N,)": (
        lambda: likelihood((X, Y.unsqueeze(-1)), lambda t, d: -((d[1] - t["mu"].unsqueeze(-1)) ** 2)),
        errors.ModelError,
        "(N,) against (N, 1) is a usual cause",
    ),
    "(N, 1) that broadcasts": (
        lambda: likelihood(Y.unsqueeze(-1), lambda t, y: -((y - t["mu"]) ** 2)),
        errors.ShapeError,
        "(N,) against (N, 1), is the usual cause",
    ),
    "likelihood summed over data": (
        lambda: likelihood(function=lambda t, y: log_likelihood(t, y).sum(-1)),
        errors.ShapeError,
        "log_likelihood must return shape",
    ),
    "likelihood summed over draws": (
        lambda: likelihood(function=lambda t, y: log_likelihood(t, y).sum(0)),
        errors.ShapeError,
        "one number per draw and datum",
    ),
    "prior without draws": (
        lambda: likelihood(prior=lambda t: t["mu"].sum()),
        errors.ShapeError,
        "log_prior must return shape",
    ),
    "prior per coordinate": (
        lambda: likelihood(
            prior=lambda z: -(z**2), dim=2, parameters=None, function=lambda z, y: -((y - z[:, :1]) ** 2)
        ),
        errors.ShapeError,
        "A missing sum over the last axis",
    ),
    "prior sd of zero": (
        lambda: likelihood(prior=(0.0, 0.0)),
        errors.ConfigError,
        "positive finite standard deviations",
    ),
    "prior sd is nan": (lambda: likelihood(prior=(0.0, math.nan)), errors.ConfigError, "finite"),
    "prior of another length": (lambda: likelihood(prior=(torch.zeros(3), 1.0)), errors.ConfigError, "shape (1,)"),
    "normal prior of a positive parameter": (
        lambda: likelihood(parameters={"mu": "positive"}),
        errors.ConfigError,
        "supports are all real",
    ),
    "no prior": (lambda: likelihood(prior=None), errors.ConfigError, "log_prior must be"),
    "likelihood not callable": (
        lambda: likelihood(function=3),
        errors.ConfigError,
        "log_likelihood must be a function",
    ),
    "likelihood that raises": (
        lambda: likelihood(function=fails),
        errors.ModelError,
        "ZeroDivisionError: a bug of the user's",
    ),
    "local without its density": (lambda: likelihood(local={"a": "real"}), errors.ConfigError, "both local="),
    "no size": (lambda: Density(normal), errors.ConfigError, "give one of dim="),
    "size and names": (
        lambda: Density(normal, dim=2, parameters={"a": "real"}),
        errors.ConfigError,
        "give one of dim=",
    ),
    "size zero": (lambda: Density(normal, dim=0), errors.ConfigError, "dim must be a positive integer, got 0"),
    "size negative": (lambda: Density(normal, dim=-3), errors.ConfigError, "dim must be a positive integer, got -3"),
    "size true": (lambda: Density(normal, dim=True), errors.ConfigError, "dim must be a positive integer, got True"),
    "size fractional": (lambda: Density(normal, dim=2.0), errors.ConfigError, "dim must be a positive integer"),
    "no parameters": (lambda: named({}), errors.ConfigError, "at least one name"),
    "unknown support": (lambda: named({"a": "positve"}), errors.SupportError, "positve"),
    "support that runs code": (
        lambda: named({"a": "interval(0, __import__('os').getcwd())"}),
        errors.SupportError,
        "interval",
    ),
    "interval upside down": (lambda: named({"a": "interval(2, 1)"}), errors.SupportError, "2"),
    "simplex of one": (lambda: named({"a": ((1,), "simplex")}), errors.ShapeError, "simplex"),
    "shape negative": (lambda: named({"a": ((-2,), "real")}), errors.ShapeError, "positive integers"),
    "mixed discrete": (
        lambda: named({"a": "real", "k": "integer_interval(0, 2)"}),
        errors.SupportError,
        "cannot be mixed",
    ),
    "density not callable": (lambda: Density("normal", dim=2), errors.ConfigError, "log_prob must be a function"),
    "integer dtype": (lambda: density(dtype=torch.int64), errors.ConfigError, "floating torch dtype"),
    "unknown device": (lambda: density(device="gpu0"), errors.ConfigError, "must name a torch device"),
    "unknown space": (lambda: density(space="sphere"), errors.ConfigError, "unknown space 'sphere'"),
    "pyro program not callable": (lambda: PyroModel(3), errors.ConfigError, "fn must be a function"),
    "pyro program that raises": (lambda: PyroModel(fails), errors.ModelError, "a bug of the user's"),
    "pyro without latents": (lambda: PyroModel(lambda: None), errors.VifamilyError, "latent"),
    "pyro data nan": (
        lambda: PyroModel(lambda y: pyro.sample("y", dist.Normal(program(), 1.0), obs=y), torch.tensor(math.nan)),
        errors.DataError,
        "NaN|not finite",
    ),
}

EVALUATIONS = {
    "scalar": (
        lambda: fit(returning(lambda z: normal(z).sum())),
        errors.ShapeError,
        "the log joint must return shape (1,)",
    ),
    "one per coordinate": (
        lambda: fit(returning(lambda z: -(z**2))),
        errors.ShapeError,
        "A missing sum over the last axis",
    ),
    "column": (lambda: fit(returning(lambda z: normal(z).unsqueeze(-1))), errors.ShapeError, "but gave (1, 1)"),
    "a number": (
        lambda: fit(returning(lambda z: 3.0)),
        errors.ShapeError,
        "must return a tensor, one number per draw, got float",
    ),
    "an array": (lambda: fit(returning(lambda z: normal(z).detach().numpy())), errors.ShapeError, "got ndarray"),
    "nothing": (lambda: fit(returning(lambda z: None)), errors.ShapeError, "got NoneType"),
    "single precision": (
        lambda: fit(returning(lambda z: normal(z.float()))),
        errors.DeviceError,
        "must be torch.float64 on cpu",
    ),
    "another device": (
        lambda: fit(returning(lambda z: normal(z).to("meta"))),
        errors.DeviceError,
        "but is torch.float64 on meta",
    ),
    "nan": (
        lambda: fit(returning(lambda z: normal(z) * math.nan)),
        errors.NonFiniteLossError,
        "step 0: log_joint is not finite",
    ),
    "infinite": (
        lambda: fit(returning(lambda z: normal(z) + math.inf)),
        errors.NonFiniteLossError,
        "step 0: log_joint is not finite",
    ),
    "no gradient": (lambda: fit(returning(lambda z: normal(z.detach()))), errors.ModelError, "gradient"),
    "no gradient from the prior": (
        lambda: fit(
            Density(lambda z: normal(z.detach()), dim=2, sample_prior=lambda n, generator: torch.zeros(n, 2)),
            init="prior",
        ),
        errors.ModelError,
        "gives no gradient",
    ),
    "raises": (lambda: fit(Density(fails, dim=2)), errors.ModelError, "ZeroDivisionError: a bug of the user's"),
    "unknown key": (lambda: fit(named({"a": "real"}, lambda t: t["b"])), errors.ModelError, "KeyError: 'b'"),
    "points of another size": (
        lambda: density().log_joint(torch.zeros(4, 3, dtype=DOUBLE)),
        errors.ShapeError,
        "(..., 2), got (4, 3)",
    ),
}


class NoLogQ(nn.Module):
    noise_spec = NoiseSpec((2,))
    capabilities = frozenset({Capability.DRAWS, Capability.REPARAMETERISED, Capability.LOG_Q})

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2, dtype=DOUBLE))

    def forward(self, noise):
        z = self.loc + noise
        return Draw(z, None, z.new_full((len(z),), -math.log(len(z))))


class WrongDraws(NoLogQ):
    capabilities = frozenset({Capability.DRAWS, Capability.REPARAMETERISED, Capability.LOG_Q})

    def forward(self, noise):
        return self.loc + noise

    def log_prob(self, z):
        return normal(z)


CHOICES = {
    "function as a model": (lambda: fit(normal), errors.ModelError, "a model is needed, got function"),
    "pyro program as a model": (lambda: fit(program), errors.ModelError, "PyroModel(program, ...)"),
    "tensor as a model": (lambda: fit(torch.zeros(2)), errors.ModelError, "got Tensor"),
    "unknown problem": (lambda: fit("bananna"), errors.UnknownNameError, "Did you mean 'banana'"),
    "unknown family": (lambda: fit(family="fullrank"), errors.UnknownNameError, "Did you mean 'full_rank'"),
    "unknown objective": (lambda: fit(objective="elbow"), errors.UnknownNameError, "Did you mean 'elbo'"),
    "unknown solver": (lambda: fit(solver="adm"), errors.UnknownNameError, "Did you mean 'adam'"),
    "unknown estimator": (
        lambda: fit(objective="elbo(estimator=stick)"),
        errors.SpecError,
        "has no estimator 'stick'; it has: auto",
    ),
    "unknown init": (lambda: fit(init="lapalce"), errors.ConfigError, "init must be 'auto'"),
    "unknown kind": (lambda: registry.names("losses"), errors.UnknownNameError, "unknown kind 'losses'"),
    "unknown flow": (lambda: fit(family="flow(kind=nfs)"), errors.ConfigError, "nfs"),
    "wrong argument": (lambda: fit(family="low_rank(ranks=1)"), errors.SpecError, "Did you mean 'rank'"),
    "positional argument": (lambda: fit(family="low_rank(1)"), errors.SpecError, "given by name"),
    "spec that runs code": (
        lambda: fit(objective="elbo(estimator=__import__('os').system('x'))"),
        errors.SpecError,
        "cannot read the spec",
    ),
    "spec that computes": (lambda: fit(objective="renyi(alpha=2 ** 9 ** 9)"), errors.SpecError, "is not a plain value"),
    "spec that is code": (lambda: fit(family="().__class__.__mro__"), errors.SpecError, "cannot read the spec"),
    "huge spec": (lambda: fit(family="mean_field(" + "a" * 5000), errors.SpecError, "characters long"),
    "deep spec": (lambda: fit(family="a(b=" * 200), errors.SpecError, "cannot read the spec"),
    "alpha is text": (lambda: fit(objective="renyi(alpha=half)"), errors.SpecError, "alpha must be a real number"),
    "alpha is nan": (lambda: fit(objective="renyi(alpha=nan)"), errors.SpecError, "alpha must be a real number"),
    "rank above dimension": (
        lambda: fit(family="low_rank(rank=5)"),
        errors.ConfigError,
        "rank=5 exceeds the 2 latent coordinates",
    ),
    "rank zero": (lambda: fit(family="low_rank(rank=0)"), errors.ConfigError, "rank"),
    "no components": (lambda: fit(family="mixture(components=0)"), errors.ConfigError, "components"),
    "ensemble negative": (lambda: fit(family="ensemble(size=-2)"), errors.ConfigError, "size"),
    "degrees of freedom zero": (lambda: fit(family="mean_field(student_t=0)"), errors.ConfigError, "student_t"),
    "mixture of what is no family": (lambda: fit(family="mixture(of=elbo)"), errors.VifamilyError, "elbo"),
    "number as a family": (lambda: fit(family=3), errors.ConfigError, "cannot use a int as a family"),
    "layer as a family": (lambda: fit(family=nn.Tanh()), errors.ConfigError, "it lacks noise_spec, capabilities"),
    "family without its density": (lambda: fit(family=NoLogQ()), errors.ConfigError, "it lacks log_prob"),
    "family that returns no draw": (
        lambda: fit(family=WrongDraws()),
        errors.ShapeError,
        "must return a Draw, got Tensor",
    ),
    "guide without its program": (
        lambda: fit(family=lambda: None),
        errors.ConfigError,
        "needs the Pyro model it was written for",
    ),
    "family of another space": (lambda: fit(counts()), errors.IncompatibleError, "the model's latents are discrete"),
    "discrete family on real latents": (
        lambda: fit(family="categorical"),
        errors.IncompatibleError,
        "the model's latents are real",
    ),
    "objective as a number": (lambda: fit(objective=3), errors.ConfigError, "an objective is a name such as 'elbo'"),
    "objective that is a class": (
        lambda: fit(objective=type(registry.build("objectives", "elbo"))),
        errors.ConfigError,
        "an objective is a name",
    ),
    "solver as a number": (lambda: fit(solver=0.01), errors.ConfigError, "a solver is a name such as 'adam'"),
    "step size negative": (
        lambda: fit(solver="adam(step_size=-1)"),
        errors.ConfigError,
        "must be a positive number, got -1",
    ),
    "sampler with the elbo": (lambda: fit(family="implicit"), errors.IncompatibleError, "missing: family: log density"),
    "entropy that is not closed": (
        lambda: fit(family="flow", objective="elbo(estimator=entropy)"),
        errors.IncompatibleError,
        "family: closed-form entropy",
    ),
    "prior kl of an unknown prior": (
        lambda: fit(objective="elbo(estimator=analytic_kl)"),
        errors.IncompatibleError,
        "Gaussian prior",
    ),
    "encoder without local latents": (
        lambda: fit(encoder=nn.Tanh()),
        errors.ConfigError,
        "for models with local latents",
    ),
    "encoder by name without a simulator": (
        lambda: fit(encoder="vector"),
        errors.ConfigError,
        "is for simulators",
    ),
    "local family without local latents": (
        lambda: fit(local_family="mean_field"),
        errors.ConfigError,
        "for models with local latents",
    ),
    "iwae in minibatches": (
        lambda: fit(likelihood(), objective="iwae", batch_size=4),
        errors.IncompatibleError,
        "is not a sum over data",
    ),
    "renyi in minibatches": (
        lambda: fit(likelihood(), objective="renyi(alpha=0.5)", batch_size=4),
        errors.IncompatibleError,
        "is not a sum over data",
    ),
    "minibatches of a density": (
        lambda: fit(density(num_data=5), batch_size=2),
        errors.IncompatibleError,
        "states num_data",
    ),
    "batch larger than the data": (
        lambda: fit(likelihood(), batch_size=11),
        errors.ConfigError,
        "batch_size=11 is larger than the data set of 10",
    ),
    "one draw for iwae": (
        lambda: fit(objective="iwae", draws=1),
        errors.ConfigError,
        "needs at least 2 draws per step, got draws=1",
    ),
    "one draw for scores": (
        lambda: fit(objective="elbo(estimator=score)", draws=1),
        errors.ConfigError,
        "needs at least 2 draws",
    ),
    "laplace without a mode": (
        lambda: fit(Density(lambda z: z.sum(-1), dim=2), init="laplace"),
        errors.NotAvailableError,
        "Use init='auto'",
    ),
    "prior without draws": (lambda: fit(init="prior"), errors.NotAvailableError, "cannot draw from its prior"),
    "init of another shape": (
        lambda: fit(init=torch.zeros(3)),
        errors.ShapeError,
        "2 unconstrained numbers in all; got the shape (3,)",
    ),
    "init of rank two": (lambda: fit(init=torch.zeros(1, 2)), errors.ShapeError, "got the shape (1, 2)"),
    "init outside the support": (
        lambda: fit(named({"tau": "positive"}), init={"tau": -1.0}),
        errors.SupportError,
        "outside its support",
    ),
    "init of an unknown name": (lambda: fit(named({"tau": "positive"}), init={"tua": 1.0}), errors.ConfigError, "tua"),
    "init is nan": (
        lambda: fit(init=torch.full((2,), math.nan)),
        errors.ConfigError,
        "not finite at the given init point",
    ),
    "init is a number": (lambda: fit(init=0.0), errors.ConfigError, "init must be"),
    "init of another dimension": (
        lambda: fit(init=vf.fit(Density(normal, dim=3), "mean_field", steps=2)),
        errors.ShapeError,
        "a posterior over 3 coordinates, the model has 2",
    ),
    "callbacks as text": (lambda: fit(callbacks="print"), errors.ConfigError, "callbacks must be functions"),
    "callbacks as numbers": (lambda: fit(callbacks=[3]), errors.ConfigError, "callbacks must be functions"),
    "tracker as text": (
        lambda: fit(tracker="a.csv"),
        errors.ConfigError,
        "a tracker is an object with start, log and finish",
    ),
    "tracker class": (lambda: fit(tracker=CsvTracker), errors.ConfigError, "got the class CsvTracker"),
    "meta device": (lambda: fit(device="meta"), errors.DeviceError, "holds no numbers"),
    "no such device": (lambda: fit(device="cuda:77"), errors.DeviceError, "cannot be used here"),
    "device as a number": (lambda: fit(device=2.5), errors.DeviceError, "cannot be used here"),
    "integer precision": (lambda: fit(dtype=torch.int32), errors.ConfigError, "dtype must be a floating torch dtype"),
    "dtype as text": (lambda: fit(dtype="float32"), errors.ConfigError, "dtype must be a floating torch dtype"),
    "compare of an unknown problem": (
        lambda: vf.compare(["bananna"]),
        errors.UnknownNameError,
        "Did you mean 'banana'",
    ),
}

CASES = {
    f"{kind}: {name}": case
    for kind, cases in {"data": DATA, "model": MODELS, "evaluation": EVALUATIONS, "choice": CHOICES}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_a_clear_message(name):
    call, error, phrase = CASES[name]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert any(part in message for part in phrase.split("|")), message
    assert len(message) < 1500, "said to a person, not dumped"
    assert isinstance(caught.value, errors.VifamilyError)


@pytest.mark.parametrize("value", [0, -1, True, False, 2.0, "3", math.nan, None], ids=repr)
@pytest.mark.parametrize("argument", ["steps", "restarts", "draws", "batch_size", "checkpoint_every"])
def test_every_count_must_be_a_positive_integer(argument, value):
    if value is None and argument not in ("restarts", "checkpoint_every"):
        return  # the default
    with pytest.raises(
        errors.ConfigError, match=rf"{argument} must be a positive integer, got {re.escape(repr(value))}"
    ):
        vf.fit(likelihood(), "mean_field", **{"steps": 3, argument: value})


@pytest.mark.parametrize("value", [-1, 2**63, True, 1.5, "0", None], ids=repr)
def test_a_seed_must_be_one(value):
    with pytest.raises(errors.ConfigError, match=r"seed must be an integer in \[0, 2\*\*63\)"):
        fit(seed=value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, True, "10"], ids=repr)
def test_a_time_limit_must_be_seconds(value):
    with pytest.raises(errors.ConfigError, match="time_limit must be a positive number of seconds"):
        fit(time_limit=value)


def test_an_unknown_argument_of_fit_is_pythons_own_error():
    with pytest.raises(TypeError, match="learning_rate"):
        vf.fit(density(), learning_rate=0.1)


def test_a_model_that_raises_keeps_its_cause():
    with pytest.raises(errors.ModelError) as caught:
        fit(Density(fails, dim=2))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_refusal_lists_what_works_instead():
    with pytest.raises(errors.IncompatibleError) as caught:
        fit(family="implicit")
    assert {"mean_field", "full_rank"} <= set(caught.value.works_with["families"])
    for family in caught.value.works_with["families"]:
        assert family in str(caught.value)


def test_nothing_is_drawn_or_evaluated_before_arguments_are_checked():
    calls = []

    def counted(z):
        calls.append(1)
        return normal(z)

    for options in (
        {"seed": -1},
        {"steps": 0},
        {"callbacks": 3},
        {"draws": 0},
        {"objective": "elbow"},
        {"device": "x"},
    ):
        with pytest.raises(errors.VifamilyError):
            vf.fit(Density(counted, dim=2), "mean_field", **options)
    assert calls == []


# --- files ---


@pytest.fixture
def blocked(tmp_path):
    """A path below a plain file, which nobody can write, not even root."""
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file" / "folder"


def test_an_unwritable_checkpoint_folder_is_refused_before_any_work(blocked):
    calls = []

    def counted(z):
        calls.append(1)
        return normal(z)

    with pytest.raises(errors.ConfigError, match="cannot write to the folder .*choose another one"):
        fit(Density(counted, dim=2), checkpoint=blocked)
    with pytest.raises(errors.ConfigError, match="cannot write to the folder"):
        fit(Density(counted, dim=2), checkpoint=blocked.parent)
    assert calls == []
    assert blocked.parent.read_text() == "mine"


def test_an_unwritable_place_for_a_posterior_loses_nothing(blocked, tmp_path):
    posterior = fit()
    with pytest.raises(errors.ConfigError, match="cannot write to the folder"):
        posterior.save(blocked)
    posterior.save(tmp_path / "elsewhere")
    assert torch.equal(vf.load(tmp_path / "elsewhere").draws(5, seed=1), posterior.draws(5, seed=1))


def test_an_unwritable_tracker_file_is_refused_before_the_first_step(blocked):
    steps = []
    with pytest.raises(errors.ConfigError, match="the tracker cannot write"):
        fit(tracker=CsvTracker(blocked / "a.csv"), callbacks=steps.append)
    assert steps == []


def test_an_unwritable_output_folder_of_compare_is_refused(blocked):
    with pytest.raises(errors.ConfigError, match="cannot write|writable"):
        vf.compare(["banana"], families=["mean_field"], objectives=["elbo"], seeds=1, out=blocked)


def truncate(folder):
    (file,) = folder.glob("*.safetensors")
    os.truncate(file, 20)


def flip(folder):
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


def garble(folder):
    (file,) = folder.glob("*.json")
    file.write_bytes(file.read_bytes()[:-30])


def pickled(folder):
    (file,) = folder.glob("*.json")
    file.write_bytes(b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94")


def future(folder):
    (file,) = folder.glob("*.json")
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 99'))


def elsewhere(folder):
    (file,) = folder.glob("*.json")
    file.write_text(re.sub(r'"tensors": "[^"]*"', '"tensors": "../../etc/passwd"', file.read_text()))


def missing(folder):
    (file,) = folder.glob("*.safetensors")
    file.unlink()


DAMAGES = {
    truncate: "truncated or changed",
    flip: "truncated or changed",
    garble: "is not valid JSON",
    pickled: "is not valid JSON",
    future: "has format version '99'",
    elsewhere: "not a name of this format",
    missing: "is missing: copy the whole folder",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_file_is_refused_and_left_as_it_is(damage, tmp_path):
    fit(checkpoint=tmp_path / "fit").save(tmp_path / "posterior")
    for folder, use in ((tmp_path / "fit", lambda f: fit(checkpoint=f, steps=9)), (tmp_path / "posterior", vf.load)):
        damage(folder)
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        with pytest.raises(errors.CheckpointError, match=DAMAGES[damage]):
            use(folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_files_of_other_kinds_are_refused(tmp_path):
    checkpoint.write(tmp_path / "foreign", {"a": torch.zeros(2)}, {"kind": "thermometer"})
    with pytest.raises(errors.CheckpointError, match="belongs to another fit"):
        fit(checkpoint=tmp_path / "foreign")
    with pytest.raises(errors.CheckpointError, match="there is no checkpoint at"):
        vf.load(tmp_path / "nothing")
    with pytest.raises(errors.CheckpointError):
        vf.load(tmp_path / "foreign")


def test_the_checkpoint_of_another_fit_is_refused_and_kept(tmp_path):
    first = fit(checkpoint=tmp_path, seed=1)
    with pytest.raises(errors.CheckpointError, match="seed: 1 there, 2 here"):
        fit(checkpoint=tmp_path, seed=2)
    again = fit(checkpoint=tmp_path, seed=1)
    assert torch.equal(first.draws(3), again.draws(3))
