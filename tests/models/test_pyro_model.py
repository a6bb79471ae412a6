"""Pyro models: terms, minibatches, local latents, draws, point parameters, gradients, refusals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch.fx.experimental.proxy_tensor import make_fx

from vifamily import registry
from vifamily.errors import (
    ConfigError,
    DataError,
    DeviceError,
    IncompatibleError,
    ModelError,
    NotAvailableError,
    ShapeError,
    SupportError,
)
from vifamily.models import PyroModel
from vifamily.rng import generator as stream
from vifamily.rng import scoped
from vifamily.types import Batch, Capability

DOUBLE = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


X, Y = normal(12, 2), normal(12, seed=1)


def regression(x, y, size=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(x), subsample_size=size) as i:
        mean = (w * x[i]).sum(-1) if w.dim() == 1 else (w @ x[i].T).squeeze(-2)
        pyro.sample("y", dist.Normal(mean, sigma), obs=None if y is None else y[i])


def with_local(y, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.Exponential(1.0))
    with pyro.plate("data", len(y), subsample_size=size) as i:
        a = pyro.sample("a", dist.Normal(mu, tau))
        b = pyro.sample("b", dist.Gamma(torch.full((2,), 2.0), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(a + b.sum(-1), 1.0), obs=y[i])


def mixture(y):
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2)))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("data", len(y)) as i:
        k = pyro.sample("k", dist.Categorical(weight))
        pyro.sample("y", dist.Normal(loc[k] if loc.dim() == 1 else loc[..., k], 0.5), obs=y[i])


def points(model, num=4, seed=5):
    return 0.7 * normal(num, model.dim, seed=seed)


# --- terms ---


@pytest.mark.parametrize(("program", "args"), [(regression, (X, Y)), (mixture, (Y,)), (regression, (X, Y, 5))])
def test_prior_and_likelihood_add_up(program, args):
    model = PyroModel(program, *args)
    z = points(model)
    likelihood = model.log_likelihood(z)
    assert likelihood.shape == (4, 12) and model.num_data == 12
    torch.testing.assert_close(model.log_prior(z) + likelihood.sum(-1), model.log_joint(z), rtol=1e-10, atol=1e-10)


def test_the_likelihood_per_datum_is_that_of_each_datum():
    model = PyroModel(regression, X, Y)
    z = points(model)
    theta = model.constrain(z)
    expected = torch.distributions.Normal(theta["w"] @ X.T, theta["sigma"].unsqueeze(-1)).log_prob(Y)
    torch.testing.assert_close(model.log_likelihood(z), expected, rtol=1e-12, atol=1e-12)
    mixed = PyroModel(mixture, Y)
    theta = mixed.constrain(z := points(mixed))
    parts = torch.distributions.Normal(theta["loc"].unsqueeze(-2), 0.5).log_prob(Y.unsqueeze(-1))
    expected = (parts + theta["weight"].log().unsqueeze(-2)).logsumexp(-1)
    torch.testing.assert_close(mixed.log_likelihood(z), expected, rtol=1e-10, atol=1e-10)


# --- minibatches ---


@pytest.mark.parametrize(
    ("program", "args", "size"),
    [
        (regression, (X, Y), 4),
        (regression, (X, Y, 3), 3),
        (mixture, (Y,), 4),
        (with_local, (Y,), 4),
        (with_local, (Y, 3), 3),
    ],
)
def test_the_batches_of_an_epoch_average_to_the_whole(program, args, size):
    model = PyroModel(program, *args)
    assert Capability.SUBSAMPLE in model.capabilities
    z = points(model)
    source = model.batches(size, seed=0)
    epoch = [source.at(step) for step in range(12 // size)]
    assert sorted(int(i) for batch in epoch for i in batch.index) == list(range(12))
    assert model.scale(epoch[0]) == 12 / size
    average = torch.stack([model.log_joint(z, batch) for batch in epoch]).mean(0)
    torch.testing.assert_close(average, model.log_joint(z), rtol=1e-10, atol=1e-10)


def test_a_program_that_subsamples_gives_the_same_whole():
    z = points(PyroModel(regression, X, Y))
    for size in (5, 6, 11):  # the last piece overlaps the one before
        torch.testing.assert_close(
            PyroModel(regression, X, Y, size).log_joint(z),
            PyroModel(regression, X, Y).log_joint(z),
            rtol=1e-10,
            atol=1e-10,
        )


def test_a_batch_holds_the_observed_rows():
    model = PyroModel(regression, X, Y)
    batch = model.batches(5, seed=3).at(1)
    assert batch.size == 5
    torch.testing.assert_close(batch.data["y"], Y[batch.index], rtol=0, atol=0)
    torch.testing.assert_close(
        model.log_likelihood(points(model), batch), model.log_likelihood(points(model))[:, batch.index]
    )


def test_a_plate_that_is_not_read_by_index_gives_no_minibatches():
    def program(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    model = PyroModel(program, Y)
    assert Capability.SUBSAMPLE not in model.capabilities and Capability.PER_DATUM in model.capabilities
    assert any("no minibatches" in note for note in model.notes)
    with pytest.raises(NotAvailableError, match="gives no minibatches"):
        model.batches(3, seed=0)


def test_batch_sizes_are_checked():
    with pytest.raises(ConfigError, match="must not exceed"):
        PyroModel(regression, X, Y).batches(13, seed=0)
    with pytest.raises(ConfigError, match="positive integer"):
        PyroModel(regression, X, Y).batches(-1, seed=0)
    with pytest.raises(ConfigError, match="3 data at a time"):
        PyroModel(regression, X, Y, 3).batches(4, seed=0)
    model = PyroModel(regression, X, Y)
    with pytest.raises(NotAvailableError, match="must carry its index"):
        model.log_joint(points(model), Batch({"y": Y[:3]}, 3))


# --- local latents ---


@pytest.mark.parametrize("args", [(Y,), (Y, 3)])
def test_local_latents_apart_give_the_same_log_joint(args):
    whole = PyroModel(with_local, *args)
    model = whole.for_batches(3)
    assert Capability.LOCAL in model.capabilities and Capability.PER_DATUM not in model.capabilities
    assert model.layout.names == ("mu", "tau") and model.local_layout.names == ("a", "b") and model.local_dim == 3
    assert whole.layout.names == ("mu", "tau", "a", "b") and whole.for_batches(None) is whole
    z = points(whole)
    theta = whole.constrain(z)
    local = model.local_layout.unconstrain({"a": theta["a"], "b": theta["b"]})  # (draw, datum, local_dim)
    source = model.batches(3, seed=0)
    total = model.log_prior(z[:, :2])
    for step in range(4):
        batch = source.at(step)
        part = model.log_local(z[:, :2], local[:, batch.index], batch)
        assert part.shape == (4, 3)
        total = total + part.sum(-1)
    torch.testing.assert_close(total, whole.log_joint(z), rtol=1e-10, atol=1e-10)
    with pytest.raises(NotAvailableError, match="log_local"):
        model.log_joint(z[:, :2])


def test_a_program_whose_latents_are_all_local():
    def program(y):
        with pyro.plate("data", len(y)) as i:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(a, 1.0), obs=y[i])

    model = PyroModel(program, Y).for_batches(4)
    assert model.dim == 0 and model.local_dim == 1
    z, batch = torch.zeros(2, 0, dtype=DOUBLE), model.batches(4, seed=0).at(0)
    local = normal(2, 4, 1)
    expected = -0.5 * (local[..., 0] ** 2 + (Y[batch.index] - local[..., 0]) ** 2) - math.log(2 * math.pi)
    torch.testing.assert_close(model.log_local(z, local, batch), expected, rtol=1e-12, atol=1e-12)
    assert model.log_prior(z).tolist() == [0.0, 0.0]


# --- draws ---


@pytest.mark.parametrize(("program", "args"), [(with_local, (Y,)), (with_local, (Y, 5)), (regression, (X, Y))])
def test_prior_draws_have_the_moments_of_the_prior(program, args, seed):
    model = PyroModel(program, *args)
    num = 2000 if model.program.mode == "batched" else 400
    z = model.sample_prior(num, generator=stream(seed, "prior"))
    assert z.shape == (num, model.dim) and z.dtype == DOUBLE
    assert torch.equal(z, model.sample_prior(num, generator=stream(seed, "prior")))
    theta = model.constrain(z)
    first = theta["mu"] if "mu" in theta else theta["w"][:, 0]
    assert abs(float(first.mean())) < 5 / math.sqrt(num)
    assert abs(float(first.var()) - 1) < 5 * math.sqrt(2 / num)
    if "b" in theta:  # Gamma(2, 1) in every place of every datum
        assert theta["b"].shape == (num, 12, 2)
        assert float((theta["b"].mean(0) - 2).abs().max()) < 5 * math.sqrt(2 / num)


@pytest.mark.parametrize(
    ("program", "args"), [(with_local, (Y,)), (regression, (X, Y)), (regression, (X, Y, 5)), (mixture, (Y,))]
)
def test_predictive_draws_have_the_shape_of_the_data(program, args):
    model = PyroModel(program, *args)
    drawn = model.predictive(points(model, 6), generator=stream(0, "predictive"))
    assert drawn["y"].shape == (6, 12)
    torch.testing.assert_close(model.observed()["y"], Y, rtol=0, atol=0)
    assert float(drawn["y"].std(0).min()) > 0  # each draw has its own noise
    assert not torch.equal(drawn["y"][0], drawn["y"][1])


def test_predictive_draws_follow_the_posterior_draw():
    model = PyroModel(regression, X, Y)
    z = model.unconstrain(
        {"w": torch.tensor([[5.0, -3.0]] * 800, dtype=DOUBLE), "sigma": torch.full((800,), 0.5, dtype=DOUBLE)}
    )
    drawn = model.predictive(z, generator=stream(0, "predictive"))["y"]
    error = drawn.mean(0) - X @ torch.tensor([5.0, -3.0], dtype=DOUBLE)
    assert float(error.abs().max()) < 5 * 0.5 / math.sqrt(800)


def test_predictive_at_new_inputs():
    model = PyroModel(regression, X, Y)
    drawn = model.predictive(points(model), generator=stream(0, "p"), x=normal(3, 2, seed=9).float(), y=None)
    assert drawn["y"].shape == (4, 3)
    with pytest.raises(ConfigError, match="no argument called other"):
        model.predictive(points(model), generator=stream(0, "p"), other=1)
    with pytest.raises(ShapeError, match="points must have shape"):
        model.predictive(points(model)[0], generator=stream(0, "p"))


# --- gradients ---


@pytest.mark.parametrize(
    ("program", "args"), [(with_local, (Y[:3],)), (mixture, (Y[:3],)), (regression, (X[:3], Y[:3]))]
)
def test_gradients_of_first_and_second_order(program, args):
    model = PyroModel(program, *args)
    z = points(model, 2).requires_grad_()
    with scoped(0):
        assert torch.autograd.gradcheck(model.log_joint, (z,), rtol=1e-6, atol=1e-6)
        assert torch.autograd.gradgradcheck(model.log_joint, (z,), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("args", [(X, Y)])
def test_the_log_joint_can_be_traced(args):
    model = PyroModel(regression, *args)

    def gradient(z):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(model.log_joint(z).sum(), z)[0]

    z, other = points(model), points(model, seed=8)
    traced = make_fx(gradient)(z)
    torch.testing.assert_close(traced(other), gradient(other), rtol=1e-12, atol=1e-12)


# --- what Pyro offers beside ---


def test_parameters_of_pyro_are_point_parameters_and_its_store_is_untouched():
    def program(y):
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    before = dict(pyro.get_param_store().items())
    model = PyroModel(program, Y)
    assert Capability.POINT_PARAMETERS in model.capabilities
    (parameter,) = model.parameters()
    z = points(model)
    model.log_joint(z).sum().backward()
    assert parameter.item() == pytest.approx(math.log(2.0)) and abs(parameter.grad.item()) > 0
    assert dict(pyro.get_param_store().items()) == before


def test_a_pyro_module_with_a_prior_on_its_weights():
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](2, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

        def forward(self, x, y):
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with scoped(0):
        net = Net().double()
    model = PyroModel(net, X, Y)
    assert model.layout.columns() == ["linear.weight[0,0]", "linear.weight[0,1]"]
    z = points(model)
    mean = (z @ X.T) + net.linear.bias
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    expected = expected + torch.distributions.Normal(mean, 1.0).log_prob(Y).sum(-1)
    torch.testing.assert_close(model.log_joint(z), expected, rtol=1e-10, atol=1e-10)
    assert [p.shape for p in model.parameters()] == [torch.Size([1])]


def test_names_and_shapes_are_kept():
    model = PyroModel(with_local, Y)
    assert {s.name: s.shape for s in model.layout} == {"mu": (), "tau": (), "a": (12,), "b": (12, 2)}
    assert registry.entry_name(model) == "pyro"


def test_data_in_single_precision_are_converted_and_told():
    model = PyroModel(regression, X.float(), Y.float())
    assert any("converted from torch.float32" in note for note in model.notes)
    single = PyroModel(regression, X.float(), Y.float(), dtype=torch.float32)
    assert single.log_joint(points(model).float()).dtype == torch.float32 and not any(
        "converted" in n for n in single.notes
    )


@pytest.mark.parametrize(("program", "args"), [(regression, (X, Y)), (mixture, (Y,)), (with_local, (Y, 4))])
def test_a_model_moves_to_another_precision(program, args):
    model = PyroModel(program, *args)
    moved = model.moved(device=torch.device("cpu"), dtype=torch.float32)
    z = points(model)
    out = moved.log_joint(z.float())
    assert out.dtype == torch.float32 and model.log_joint(z).dtype == DOUBLE
    torch.testing.assert_close(out.double(), model.log_joint(z), rtol=1e-4, atol=1e-4)
    assert moved.sample_prior(3, generator=stream(0, "p")).dtype == torch.float32
    assert moved.observed()["y"].dtype == torch.float32


def test_validation_is_left_as_it_was():
    flag = torch.distributions.Distribution._validate_args
    try:
        for value in (False, True):
            torch.distributions.Distribution.set_default_validate_args(value)
            model = PyroModel(regression, X, Y)
            model.log_joint(points(model))
            assert torch.distributions.Distribution._validate_args is value
    finally:
        torch.distributions.Distribution.set_default_validate_args(flag)


def test_a_missing_value_behind_a_mask_is_not_read():
    y = Y[:3].clone()
    y[1] = 1e6

    def program(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    z = torch.zeros(1, 1, dtype=DOUBLE)
    assert float(PyroModel(program, y).log_joint(z)) > -100


def test_a_program_that_draws_by_itself_leaves_the_random_state():
    def program(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        torch.randn(3)
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    model = PyroModel(program, torch.tensor(1.0))
    before = torch.get_rng_state()
    model.log_joint(points(model))
    assert torch.equal(before, torch.get_rng_state())


# --- refusals ---


def poisson_latent():
    k = pyro.sample("k", dist.Poisson(3.0))
    pyro.sample("x", dist.Normal(k, 1.0))


def moving_support():
    x = pyro.sample("x", dist.Uniform(1.0, 2.0))
    pyro.sample("y", dist.Uniform(0.0, x))


def changing_sites():
    if float(pyro.sample("x", dist.Normal(0.0, 1.0))) > 0:
        pyro.sample("y", dist.Normal(0.0, 1.0))
    pyro.sample(f"z{int(torch.randint(10**6, ()))}", dist.Normal(0.0, 1.0))


def nothing_latent():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def on_a_sphere():
    pyro.sample("x", dist.ProjectedNormal(torch.ones(3)))


def only_discrete():
    pyro.sample("k", dist.Bernoulli(0.5))


def discrete_batch_without_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.3 * torch.ones(3)))
    pyro.sample("y", dist.Normal(mu + k, 1.0), obs=y)


def two_subsampled_plates(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("a", 6, subsample_size=2, dim=-1) as i, pyro.plate("b", 2, subsample_size=1, dim=-2) as j:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y.reshape(2, 6)[j][:, i])


def looped_subsample(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", 12, subsample_size=3):
        pyro.sample(f"y_{i}", dist.Normal(mu, 1.0), obs=y[i])


def index_by_hand(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 12, subsample=torch.arange(3)) as i:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])


def index_ignored(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 12, subsample_size=3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[:3])


def positive_data(y):
    rate = pyro.sample("rate", dist.Exponential(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Exponential(rate), obs=y)


def raises(y):
    pyro.sample("x", dist.Normal(0.0, 1.0))
    raise KeyError("nothing here")


@pytest.mark.parametrize(
    ("program", "args", "error", "words"),
    [
        (poisson_latent, (), IncompatibleError, "'k' ~ Poisson has no finite support"),
        (moving_support, (), SupportError, "'y' depends on other latents"),
        (changing_sites, (), IncompatibleError, "sites change from run to run"),
        (nothing_latent, (), IncompatibleError, "no continuous latent"),
        (only_discrete, (), IncompatibleError, "no continuous latent"),
        (on_a_sphere, (), SupportError, "'x'.*no map"),
        (discrete_batch_without_plate, (Y[:3],), IncompatibleError, "outside plates"),
        (two_subsampled_plates, (Y,), IncompatibleError, "only one plate may be subsampled"),
        (looped_subsample, (Y,), IncompatibleError, "change from run to run"),
        (index_by_hand, (Y,), IncompatibleError, "by hand"),
        (index_ignored, (Y,), IncompatibleError, "does not read its data at the positions"),
        (raises, (Y,), ModelError, "KeyError"),
        (positive_data, (torch.tensor([1.0, math.nan]),), DataError, "'y' holds NaN"),
        (positive_data, (torch.tensor([1.0, math.inf]),), DataError, "'y' holds NaN or infinite"),
        (positive_data, (torch.tensor([1.0, -1.0]),), DataError, "outside the support"),
        (regression, (X * math.nan, Y), DataError, "log joint is NaN"),
        (regression, (X, Y[:5]), ModelError, "raised"),
        (regression, (X, Y.to("meta")), DeviceError, "lives on meta"),
        (3, (), ConfigError, "must be a function"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(program, args, error, words):
    with pytest.raises(error, match=words) as caught:
        PyroModel(program, *args)
    if error is ModelError:
        assert caught.value.__cause__ is not None


def test_options_are_checked():
    with pytest.raises(ConfigError, match="not a plate of the program"):
        PyroModel(regression, X, Y, data_plate="rows")
    with pytest.raises(ConfigError, match="floating torch dtype"):
        PyroModel(regression, X, Y, dtype=torch.int64)
    with pytest.raises(ConfigError, match="must name a torch device"):
        PyroModel(regression, X, Y, device="moon")


def test_two_plates_around_the_data_need_a_name():
    def program(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3, dim=-2) as i, pyro.plate("columns", 4, dim=-1):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])

    unnamed = PyroModel(program, Y.reshape(3, 4))
    assert unnamed.num_data is None and Capability.PER_DATUM not in unnamed.capabilities
    with pytest.raises(NotAvailableError, match="no likelihood per datum"):
        unnamed.log_likelihood(points(unnamed))
    named = PyroModel(program, Y.reshape(3, 4), data_plate="rows")
    assert named.log_likelihood(points(named)).shape == (4, 3)
    torch.testing.assert_close(named.log_joint(points(named)), unnamed.log_joint(points(named)))
    assert named.batches(2, seed=0).at(0).data["y"].shape == (2, 4)


def test_a_discrete_latent_above_the_data_cannot_be_summed_out_of_a_batch():
    def program(y, size=None):
        s = pyro.sample("s", dist.Bernoulli(0.3))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=size) as i:
            pyro.sample("y", dist.Normal(mu + s, 1.0), obs=y[i])

    model = PyroModel(program, Y)
    assert not {Capability.SUBSAMPLE, Capability.PER_DATUM, Capability.PRIOR} & model.capabilities
    with pytest.raises(IncompatibleError, match="outside the subsampled plate"):
        PyroModel(program, Y, 3)


# --- other data ---


def test_other_observed_data_make_another_program():
    model = PyroModel(regression, X, Y)
    other, fresh = model.with_observed({"y": Y + 1}), PyroModel(regression, X, Y + 1)
    z = normal(5, 3)
    assert torch.equal(other.log_joint(z), fresh.log_joint(z))
    assert torch.equal(model.observed()["y"], Y) and other.capabilities == model.capabilities
    keyword = PyroModel(regression, X, y=Y).with_observed({"y": Y + 1})
    assert torch.equal(keyword.log_joint(z), fresh.log_joint(z))


def test_data_that_are_no_argument_cannot_be_replaced():
    def closed():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(Y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)

    with pytest.raises(NotAvailableError, match="data of 'y' are no argument of the program"):
        PyroModel(closed).with_observed({"y": Y + 1})
    with pytest.raises(NotAvailableError, match="are 2 arguments"):
        PyroModel(lambda a, y: regression(X, y), Y, Y).with_observed({"y": Y + 1})
