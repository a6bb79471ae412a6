"""Likelihood models: data of every form, minibatches, local latents, predictive draws, and every bad input."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from vifamily import registry
from vifamily.errors import ConfigError, DataError, DeviceError, ModelError, NotAvailableError, ShapeError
from vifamily.models import LikelihoodModel
from vifamily.rng import generator as stream
from vifamily.rng import scoped
from vifamily.types import Capability

DOUBLE = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


X, Y = normal(12, 2), normal(12, seed=1)
PARAMETERS = {"w": ((2,), "real"), "sigma": "positive"}


def log_prior(theta):
    return Normal(0.0, 1.0).log_prob(theta["w"]).sum(-1) - theta["sigma"]


def log_likelihood(theta, batch):
    x, y = batch if isinstance(batch, tuple) else (batch["x"], batch["y"])
    return Normal(theta["w"] @ x.T, theta["sigma"].unsqueeze(-1)).log_prob(y)


def model_of(data, **options):
    return LikelihoodModel(log_prior, log_likelihood, data=data, parameters=PARAMETERS, **options)


class Items(Dataset):
    def __init__(self, length=12):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return X[i], Y[i]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


WHOLE = {
    "tuple": lambda: (X, Y),
    "list": lambda: [X, Y],
    "mapping": lambda: {"x": X, "y": Y},
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "tensor dataset": lambda: TensorDataset(X, Y),
    "dataset": Items,
    "loader": lambda: DataLoader(Items(), batch_size=4, shuffle=False),
    "stream": lambda: DataLoader(Stream(), batch_size=5),
}


@pytest.mark.parametrize("form", WHOLE)
def test_every_form_of_data_gives_the_same_log_joint(form):
    model = model_of(WHOLE[form](), num_data=12 if form == "stream" else None)
    z = normal(4, 3, seed=2)
    theta, log_jacobian = model.layout.constrain_with_jacobian(z)
    expected = log_prior(theta) + log_jacobian + log_likelihood(theta, (X, Y)).sum(-1)
    assert model.num_data == 12
    torch.testing.assert_close(model.log_joint(z), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.log_prior(z) + model.log_likelihood(z).sum(-1), expected, rtol=1e-10, atol=1e-10)
    assert model.log_likelihood(z.reshape(2, 2, 3)).shape == (2, 2, 12)


@pytest.mark.parametrize("form", ["tuple", "mapping", "tensor dataset", "dataset"])
def test_the_batches_of_an_epoch_average_to_the_whole(form):
    model = model_of(WHOLE[form]())
    z = normal(4, 3, seed=2)
    source = model.batches(3, seed=7)
    joint = torch.stack([model.log_joint(z, source.at(step)) for step in range(4)])
    torch.testing.assert_close(joint.mean(0), model.log_joint(z), rtol=1e-10, atol=1e-10)
    again = model.batches(3, seed=7)
    for step in (9, 2, 5):
        assert torch.equal(again.at(step).index, source.at(step).index)
    seen = torch.cat([source.at(step).index for step in range(4, 8)])
    assert sorted(seen.tolist()) == list(range(12))


def test_rows_left_over_are_counted():
    assert model_of((X, Y)).batches(5, seed=0).dropped_per_epoch == 2


@pytest.mark.parametrize("form", ["shuffled", "own generator", "stream"])
def test_a_loader_gives_the_same_batch_at_the_same_step(form):
    loader = {
        "shuffled": lambda: DataLoader(Items(), batch_size=5, shuffle=True),
        "own generator": lambda: DataLoader(Items(), batch_size=5, shuffle=True, generator=torch.Generator()),
        "stream": lambda: DataLoader(Stream(), batch_size=5),
    }[form]()
    model = model_of(loader, num_data=12)
    source = model.batches(None, seed=3)
    batches = [source.at(step) for step in range(7)]
    assert [b.size for b in batches] == [5, 5, 2, 5, 5, 2, 5]
    fresh = model.batches(5, seed=3)
    for step in (6, 6, 1, 4, 3):
        assert torch.equal(fresh.at(step).data[1], batches[step].data[1])
    for epoch in (0, 1):
        seen = torch.cat([b.data[1] for b in batches[3 * epoch : 3 * epoch + 3]])
        assert torch.equal(seen.sort().values, Y.sort().values)
    if form != "stream":
        assert not torch.equal(batches[0].data[1], batches[3].data[1])
    z = normal(2, 3)
    expected = model.log_prior(z) + 12 / 5 * model.log_likelihood(z, batches[0]).sum(-1)
    torch.testing.assert_close(model.log_joint(z, batches[0]), expected, rtol=1e-12, atol=1e-12)


def test_items_that_draw_at_random_leave_the_random_state():
    class Noisy(Items):
        def __getitem__(self, i):
            return X[i] + 0 * torch.randn(2), Y[i]

    before = torch.get_rng_state()
    model_of(Noisy()).batches(4, seed=0).at(1)
    model_of(DataLoader(Noisy(), batch_size=4, shuffle=True)).batches(4, seed=0).at(1)
    assert torch.equal(before, torch.get_rng_state())


def test_gradients_of_first_and_second_order():
    model = model_of((X[:3], Y[:3]))
    z = normal(2, 3).requires_grad_()
    with scoped(0):
        assert torch.autograd.gradcheck(model.log_joint, (z,), rtol=1e-6)
        assert torch.autograd.gradgradcheck(model.log_joint, (z,), rtol=1e-5)


# --- the prior as a pair, and z itself ---


def test_a_normal_prior_as_a_pair():
    model = LikelihoodModel(
        (torch.tensor([1.0, 2.0], dtype=DOUBLE), 3.0), lambda z, y: -0.5 * (y - z[:, :1]) ** 2, data=Y, dim=2
    )
    assert {Capability.GAUSSIAN_PRIOR, Capability.PRIOR_DRAWS} <= model.capabilities
    mean, sd = model.gaussian_prior()
    assert mean.tolist() == [1.0, 2.0] and sd.tolist() == [3.0, 3.0]
    z = normal(4, 2)
    torch.testing.assert_close(model.log_prior(z), Normal(mean, sd).log_prob(z).sum(-1), rtol=1e-12, atol=1e-12)
    drawn = model.sample_prior(4000, generator=stream(0, "prior"))
    assert float((drawn.mean(0) - mean).abs().max()) < 5 * 3 / math.sqrt(4000)


@pytest.mark.parametrize(
    ("pair", "parameters", "words"),
    [
        ((0.0, -1.0), {"w": "real"}, "positive finite standard deviations"),
        ((math.nan, 1.0), {"w": "real"}, "finite means"),
        ((torch.zeros(3), 1.0), {"w": ((2,), "real")}, r"tensors of shape \(2,\)"),
        ((0.0, 1.0), {"w": "positive"}, "supports are all real"),
    ],
)
def test_a_normal_prior_is_checked(pair, parameters, words):
    with pytest.raises(ConfigError, match=words):
        LikelihoodModel(pair, lambda t, y: -0.5 * (y - t["w"].unsqueeze(-1)) ** 2, data=Y, parameters=parameters)


# --- local latents ---


def test_local_latents():
    def log_local(theta, local, y):
        assert local["a"].shape[1:] == (y.shape[0],) and local["b"].shape[1:] == (y.shape[0], 2)
        prior = Normal(theta["mu"].unsqueeze(-1), 1.0).log_prob(local["a"]) - local["b"].sum(-1)
        return prior + Normal(local["a"], 1.0).log_prob(y)

    model = LikelihoodModel(
        (0.0, 1.0), data=Y, parameters={"mu": "real"}, local={"a": "real", "b": ((2,), "positive")}, log_local=log_local
    )
    assert Capability.LOCAL in model.capabilities and Capability.PER_DATUM not in model.capabilities
    assert model.local_dim == 3
    batch = model.batches(4, seed=0).at(0)
    z, local = normal(5, 1), normal(5, 4, 3, seed=1)
    named, log_jacobian = model.local_layout.constrain_with_jacobian(local)
    expected = log_local(model.constrain(z), named, Y[batch.index]) + log_jacobian
    torch.testing.assert_close(model.log_local(z, local, batch), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_jacobian, local[..., 1:].sum(-1), rtol=1e-12, atol=1e-12)
    both = model.log_local(z.expand(2, 5, 1), local.expand(2, 5, 4, 3), batch)
    torch.testing.assert_close(both, expected.expand(2, 5, 4), rtol=1e-12, atol=1e-12)
    for call in (model.log_joint, model.log_likelihood):
        with pytest.raises(NotAvailableError, match="local latents"):
            call(z)


def test_only_local_latents():
    def log_local(theta, local, y):
        return Normal(0.0, 1.0).log_prob(local["a"]) + Normal(local["a"], 1.0).log_prob(y)

    model = LikelihoodModel(None, data=Y, local={"a": "real"}, log_local=log_local)
    assert model.dim == 0 and model.log_prior(torch.zeros(3, 0, dtype=DOUBLE)).tolist() == [0.0] * 3
    batch = model.batches(4, seed=0).at(0)
    assert model.log_local(torch.zeros(3, 0, dtype=DOUBLE), normal(3, 4, 1), batch).shape == (3, 4)


# --- predictive ---


def test_predictive_draws():
    def simulate(theta, generator):
        noise = torch.randn(len(theta["w"]), 12, generator=generator, dtype=DOUBLE)
        return theta["w"] @ X.T + theta["sigma"].unsqueeze(-1) * noise

    model = model_of((X, Y), simulate=simulate)
    assert Capability.PREDICTIVE in model.capabilities
    drawn = model.predictive(normal(5, 3), generator=stream(0, "p"))
    assert drawn["y"].shape == (5, 12) and torch.equal(model.observed()["y"], Y)
    assert set(model_of({"x": X, "y": Y}).observed()) == {"x", "y"}
    with pytest.raises(NotAvailableError, match="cannot draw new data"):
        model_of((X, Y)).predictive(normal(5, 3), generator=stream(0, "p"))
    with pytest.raises(ShapeError, match="5 draws along its first axis"):
        model_of((X, Y), simulate=lambda theta: Y).predictive(normal(5, 3), generator=stream(0, "p"))
    with pytest.raises(ModelError, match="simulate raised"):
        model_of((X, Y), simulate=lambda theta: 1 / 0).predictive(normal(5, 3), generator=stream(0, "p"))


# --- bad data ---


def spoilt(value):
    out = Y.clone()
    out[3] = value
    return out


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ((X, spoilt(math.nan)), DataError, r"number 1 hold 1 NaN or infinite value\(s\), the first at \[3\]"),
        ((X, spoilt(math.inf)), DataError, "NaN or infinite"),
        ({"x": X, "y": spoilt(-math.inf)}, DataError, "'y' hold 1 NaN or infinite"),
        ((X, spoilt(math.nan).numpy()), DataError, "NaN or infinite"),
        ((X[:0], Y[:0]), DataError, "datum axis has length 0"),
        ((), DataError, "data are empty"),
        ({}, DataError, "data are empty"),
        ((X, Y[:5]), DataError, "agree in length, got number 0: 12, number 1: 5"),
        ((X, torch.tensor(1.0, dtype=DOUBLE)), ShapeError, "must have a datum axis"),
        ((X, Y.float()), DeviceError, "are torch.float32 but the model computes in torch.float64"),
        ((X.float(), Y), DeviceError, "pass dtype=torch.float32"),
        ((X, Y.to("meta")), DeviceError, "live on meta"),
        ((X, None), DataError, "got NoneType"),
        ((X, ["a"] * 12), DataError, "got list"),
        ((X, np.array(["a"] * 12)), DataError, "numeric array"),
        (Items(0), DataError, "dataset is empty"),
        (DataLoader(Items(0), batch_size=2), DataError, "dataset is empty"),
        (DataLoader(Stream(), batch_size=2), DataError, r"has no len\(\): give the size"),
        (Stream(), DataError, "give a DataLoader"),
        (DataLoader(TensorDataset(X, spoilt(math.nan)), batch_size=4), DataError, "NaN or infinite"),
        (DataLoader(Items(3), batch_size=4, drop_last=True), DataError, "gave no batch"),
    ],
)  # fmt: skip
def test_bad_data_are_refused(data, error, words):
    with pytest.raises(error, match=words):
        model_of(data)


def test_nan_in_a_stream_is_found_when_it_arrives():
    class Spoilt(Items):
        def __getitem__(self, i):
            return X[i], Y[i] * (math.nan if i == 10 else 1.0)

    model = model_of(DataLoader(Spoilt(), batch_size=4))
    source = model.batches(4, seed=0)
    source.at(1)
    with pytest.raises(DataError, match="NaN or infinite"):
        source.at(2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_data": 11}, DataError, "num_data=11 was given, but the data hold 12"),
        ({"num_data": 0}, ConfigError, "num_data must be a positive"),
        ({"num_data": -5}, ConfigError, "num_data must be a positive"),
        ({"parameters": None}, ConfigError, "one of dim="),
        ({"dim": 3}, ConfigError, "one of dim="),
        ({"dtype": torch.float32}, DeviceError, "computes in torch.float32"),
        ({"local": {"a": "real"}}, ConfigError, "both local="),
        ({"sample_prior": 3}, ConfigError, "sample_prior must be a function"),
        ({"simulate": 3}, ConfigError, "simulate must be a function"),
        ({"log_likelihood": None}, ConfigError, "log_likelihood must be a function"),
        ({"log_prior": None}, ConfigError, "log_prior must be a function"),
        ({"log_prior": 3}, ConfigError, "log_prior must be a function"),
    ],
)
def test_arguments_are_checked(options, error, words):
    given = {"log_prior": log_prior, "log_likelihood": log_likelihood, "data": (X, Y), "parameters": PARAMETERS}
    given |= options
    with pytest.raises(error, match=words):
        LikelihoodModel(given.pop("log_prior"), given.pop("log_likelihood"), **given)


@pytest.mark.parametrize(
    ("prior", "likelihood", "error", "words"),
    [
        (lambda t: log_prior(t).sum(), log_likelihood, ShapeError, "log_prior must return shape"),
        (lambda t: t["w"], log_likelihood, ShapeError, "log_prior must return shape"),
        (lambda t: 0.0, log_likelihood, ShapeError, "must return a tensor"),
        (log_prior, lambda t, b: log_likelihood(t, b).sum(-1), ShapeError, "one number per draw and datum"),
        (log_prior, lambda t, b: log_likelihood(t, b).T, ShapeError, "log_likelihood must return shape"),
        # (N,) against (N, 1): predictions (draw, N) meet data (N, 1)
        (log_prior, lambda t, b: -((t["w"] @ b[0].T - b[1].unsqueeze(-1)) ** 2), ModelError, "must match the size"),
        (log_prior, lambda t, b: -((t["w"][:, 0] - b[1].unsqueeze(-1)) ** 2), ShapeError, "log_likelihood must return"),
        (log_prior, lambda t, b: log_likelihood(t, b).float(), DeviceError, "must be torch.float64"),
        (log_prior, lambda t, b: t["nothing"], ModelError, "KeyError"),
        (lambda t: t["nothing"], log_likelihood, ModelError, "KeyError"),
    ],
)
def test_wrong_functions_are_found_at_construction(prior, likelihood, error, words):
    with pytest.raises(error, match=words) as caught:
        LikelihoodModel(prior, likelihood, data=(X, Y), parameters=PARAMETERS)
    if error is ModelError:
        assert caught.value.__cause__ is not None


def test_batch_sizes_are_checked():
    model = model_of((X, Y))
    for size, words in [
        (13, "must not exceed"),
        (0, "positive integer"),
        (-2, "positive integer"),
        (2.5, "positive integer"),
    ]:
        with pytest.raises(ConfigError, match=words):
            model.batches(size, seed=0)
    with pytest.raises(ConfigError, match="seed must be"):
        model.batches(3, seed=-1)
    with pytest.raises(ConfigError, match="DataLoader makes batches of 4"):
        model_of(DataLoader(Items(), batch_size=4)).batches(3, seed=0)
    assert registry.entry_name(model) == "likelihood"


# --- other data ---


def test_other_observed_data_make_another_model():
    model = model_of((X, Y))
    other = model.with_observed({"y": Y + 1})
    fresh = model_of((X, Y + 1))
    z = normal(5, 3)
    assert torch.equal(other.log_joint(z), fresh.log_joint(z)) and not torch.equal(
        other.log_joint(z), model.log_joint(z)
    )
    assert torch.equal(model.observed()["y"], Y) and torch.equal(other.observed()["y"], Y + 1)
    assert other.capabilities == model.capabilities and other.num_data == model.num_data
    named = LikelihoodModel((0.0, 1.0), lambda z, d: -((d["b"] - z[:, :1]) ** 2) * d["a"], dim=1,
                            data={"a": Y.abs(), "b": Y})  # fmt: skip
    moved = named.with_observed({"b": Y * 2}).observed()
    assert torch.equal(moved["a"], Y.abs()) and torch.equal(moved["b"], Y * 2)


def test_other_observed_data_are_checked():
    model = model_of((X, Y))
    with pytest.raises(ShapeError, match=r"shape of the old, \(12,\), got \(11,\)"):
        model.with_observed({"y": Y[1:]})
    with pytest.raises(ConfigError, match="observes y; there is no 'z' to replace"):
        model.with_observed({"z": Y})
    with pytest.raises(DataError, match="NaN"):
        model.with_observed({"y": Y * torch.nan})
