"""Densities: shapes, Jacobians, gradients, discrete and circular spaces, and every wrong return."""

import math

import pytest
import torch
from torch.distributions import Dirichlet, Gamma, LKJCholesky, Normal
from torch.fx.experimental.proxy_tensor import make_fx

from vifamily import registry
from vifamily.errors import ConfigError, DataError, DeviceError, ModelError, NotAvailableError, ShapeError, SupportError
from vifamily.models import Density
from vifamily.rng import generator as stream
from vifamily.rng import scoped
from vifamily.types import Capability, Space

DOUBLE = torch.float64
PARAMETERS = {
    "mu": "real",
    "tau": ((2,), "positive"),
    "p": ((3,), "simplex"),
    "factor": ((2, 2), "corr_cholesky"),
}


def number(value):
    return torch.tensor(value, dtype=DOUBLE)


# Made once and without validation, which reads values: tracing cannot.
GAMMA = Gamma(number(2.0), number(1.0), validate_args=False)
DIRICHLET = Dirichlet(number([1.0, 2.0, 3.0]), validate_args=False)
LKJ = LKJCholesky(2, number(2.0), validate_args=False)
NORMAL = Normal(number(0.0), number(2.0), validate_args=False)


def named_log_prob(theta):
    vectors = GAMMA.log_prob(theta["tau"]).sum(-1) + DIRICHLET.log_prob(theta["p"])
    return NORMAL.log_prob(theta["mu"]) + vectors + LKJ.log_prob(theta["factor"])


def points(dim, *lead, seed=0):
    return torch.randn(*lead, dim, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def standard(z):
    return -0.5 * (z**2).sum(-1)


def test_an_unconstrained_density_is_what_the_function_says():
    model = Density(standard, dim=3, name="standard")
    z = points(3, 5)
    assert torch.equal(model.log_joint(z), standard(z))
    assert model.layout.names == ("z",) and model.layout["z"].shape == (3,) and model.name == "standard"
    assert model.capabilities == {Capability.LOG_JOINT, Capability.SCORE, Capability.SECOND_ORDER}
    assert registry.entry_name(model) == "density"


@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (2, 3, 2)])
def test_any_leading_axes(lead):
    model = Density(named_log_prob, parameters=PARAMETERS)
    z = points(model.dim, *lead)
    out = model.log_joint(z)
    assert out.shape == lead
    flat = torch.stack([model.log_joint(one) for one in z.reshape(-1, model.dim)])
    torch.testing.assert_close(out.reshape(-1), flat, rtol=1e-12, atol=1e-12)


def test_the_log_jacobian_is_added():
    model = Density(named_log_prob, parameters=PARAMETERS)
    z = points(model.dim, 4)
    theta, log_jacobian = model.layout.constrain_with_jacobian(z)
    torch.testing.assert_close(model.log_joint(z), named_log_prob(theta) + log_jacobian, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.unconstrain(model.constrain(z)), z, rtol=1e-8, atol=1e-8)


def test_a_constrained_density_integrates_to_one_on_unconstrained_space():
    def log_prob(theta):
        return Gamma(number(2.0), number(1.5)).log_prob(theta["a"]) + Normal(0.0, 1.0).log_prob(theta["b"])

    model = Density(log_prob, parameters={"a": "positive", "b": "real"})
    grid = torch.linspace(-14, 8, 600, dtype=DOUBLE)
    total = model.log_joint(torch.cartesian_prod(grid, grid)).exp().sum() * (grid[1] - grid[0]) ** 2
    assert float(total) == pytest.approx(1.0, abs=1e-6)


def test_gradients_of_first_and_second_order():
    model = Density(named_log_prob, parameters=PARAMETERS)
    z = points(model.dim, 2).requires_grad_()
    with scoped(0):
        assert torch.autograd.gradcheck(model.log_joint, (z,), rtol=1e-6)
        assert torch.autograd.gradgradcheck(model.log_joint, (z,), rtol=1e-5)


def test_the_log_joint_can_be_traced():
    model = Density(named_log_prob, parameters=PARAMETERS)

    def gradient(z):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(model.log_joint(z).sum(), z)[0]

    traced = make_fx(gradient)(points(model.dim, 3))
    other = points(model.dim, 3, seed=4)
    torch.testing.assert_close(traced(other), gradient(other), rtol=1e-12, atol=1e-12)


def test_a_module_brings_point_parameters():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = torch.nn.Parameter(torch.zeros((), dtype=DOUBLE))

        def forward(self, z):
            return standard(z * self.log_scale.exp())

    model = Density(Scaled(), dim=2)
    assert Capability.POINT_PARAMETERS in model.capabilities and len(list(model.point_parameters())) == 1


# --- spaces ---


def test_integer_parameters_make_a_discrete_space():
    table = torch.arange(12.0, dtype=DOUBLE).reshape(3, 4)
    model = Density(
        lambda t: table[t["i"].long() - 1, t["j"].long()],
        parameters={"i": "integer_interval(1, 3)", "j": "integer_interval(0, 3)"},
    )
    assert model.space is Space.DISCRETE and model.num_categories == (3, 4)
    assert model.capabilities == {Capability.LOG_JOINT}
    z = torch.tensor([[0.0, 0.0], [2.0, 3.0]], dtype=DOUBLE)
    assert model.log_joint(z).tolist() == [0.0, 11.0]
    start = model.start(200, generator=stream(0, "start"))
    assert start.shape == (200, 2) and start.max(0).values.tolist() == [2.0, 3.0] and float(start.min()) == 0.0


def test_angles_start_on_the_circle():
    model = Density(lambda z: z.cos().sum(-1), dim=2, space="circle")
    start = model.start(50, generator=stream(0, "start"))
    assert model.space is Space.CIRCLE and float(start.abs().max()) <= math.pi


def test_starts_without_a_prior_are_uniform_around_zero():
    start = Density(standard, dim=2).start(100, generator=stream(0, "start"))
    assert start.shape == (100, 2) and 1.5 < float(start.abs().max()) <= 2


# --- the prior ---


def test_prior_draws_from_a_generator_or_from_global_randomness():
    def from_generator(num, generator):
        return {"tau": torch.rand(num, generator=generator, dtype=DOUBLE) + 0.1}

    def from_globals(num):
        return {"tau": torch.rand(num, dtype=DOUBLE) + 0.1}

    for function in (from_generator, from_globals):
        model = Density(lambda t: -t["tau"], parameters={"tau": "positive"}, sample_prior=function)
        assert Capability.PRIOR_DRAWS in model.capabilities
        z = model.sample_prior(7, generator=stream(0, "prior"))
        assert z.shape == (7, 1) and torch.equal(z, model.start(7, generator=stream(0, "prior")))
        assert float(model.constrain(z)["tau"].min()) > 0.1


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda n, generator: torch.zeros(n, 2), ShapeError, "must return"),
        (lambda n, generator: [0.0] * n, ShapeError, "named parameters or a tensor"),
        (lambda n, generator: {"tau": -torch.ones(n)}, SupportError, "outside its support"),
        (lambda n, generator: {"sigma": torch.ones(n)}, ConfigError, "unknown: sigma"),
        (lambda n, generator: torch.full((n, 1), math.nan), DataError, "not finite"),
        (lambda n, generator: 1 / 0, ModelError, "ZeroDivisionError"),
    ],
)
def test_prior_draws_are_checked(function, error, words):
    model = Density(lambda t: -t["tau"], parameters={"tau": "positive"}, sample_prior=function)
    with pytest.raises(error, match=words):
        model.sample_prior(3, generator=stream(0, "prior"))


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ConfigError, "one of dim="),
        ({"dim": 2, "parameters": {"x": "real"}}, ConfigError, "one of dim="),
        ({"dim": 0}, ConfigError, "dim must be a positive integer"),
        ({"dim": -3}, ConfigError, "dim must be a positive integer"),
        ({"dim": 2.0}, ConfigError, "dim must be a positive integer"),
        ({"dim": True}, ConfigError, "dim must be a positive integer"),
        ({"parameters": {}}, ConfigError, "at least one name"),
        ({"parameters": ["x"]}, ConfigError, "at least one name"),
        ({"parameters": {"x": "positve"}}, SupportError, "unknown support"),
        ({"parameters": {"x": "simplex"}}, ShapeError, "needs a shape"),
        ({"parameters": {"x": "real", "k": "integer_interval(0, 2)"}}, SupportError, "cannot be mixed"),
        ({"dim": 2, "num_data": 0}, ConfigError, "num_data must be a positive"),
        ({"dim": 2, "dtype": torch.int32}, ConfigError, "floating torch dtype"),
        ({"dim": 2, "dtype": "float64"}, ConfigError, "floating torch dtype"),
        ({"dim": 2, "device": "moon"}, ConfigError, "must name a torch device"),
        ({"dim": 2, "space": "torus"}, ConfigError, "unknown space"),
        ({"dim": 2, "space": "simplex"}, SupportError, "cannot be set here"),
        ({"dim": 2, "sample_prior": 3}, ConfigError, "sample_prior must be a function"),
    ],
)
def test_arguments_are_checked(options, error, words):
    with pytest.raises(error, match=words):
        Density(standard, **options)


def test_the_log_density_must_be_a_function():
    with pytest.raises(ConfigError, match="log_prob must be a function"):
        Density(torch.zeros(3), dim=3)


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda z: -0.5 * z**2, ShapeError, r"shape \(4,\), one number per draw, but gave \(4, 3\)"),
        (lambda z: standard(z).unsqueeze(-1), ShapeError, r"gave \(4, 1\)"),
        (lambda z: standard(z).unsqueeze(-1) + standard(z), ShapeError, r"gave \(4, 4\)"),
        (lambda z: standard(z).sum(), ShapeError, r"gave \(\)"),
        (lambda z: 1.0, ShapeError, "must return a tensor"),
        (lambda z: None, ShapeError, "must return a tensor"),
        (lambda z: standard(z).float(), DeviceError, "must be torch.float64"),
        (lambda z: standard(z).long(), DeviceError, "must be torch.float64"),
        (lambda z: standard(z).to("meta"), DeviceError, "is torch.float64 on meta"),
        (lambda z: z @ torch.zeros(7, dtype=DOUBLE), ModelError, "the model raised while computing the log joint"),
    ],
)
def test_what_the_function_returns_is_checked(function, error, words):
    with pytest.raises(error, match=words) as caught:
        Density(function, dim=3).log_joint(points(3, 4))
    if error is ModelError:
        assert caught.value.__cause__ is not None


def test_a_scalar_from_a_named_density_does_not_broadcast():
    model = Density(lambda t: -t["tau"].sum(), parameters={"tau": "positive"})
    with pytest.raises(ShapeError, match="log_prob must return shape"):
        model.log_joint(points(1, 4))


def test_points_are_checked():
    model = Density(standard, dim=3)
    with pytest.raises(ShapeError, match="points of shape"):
        model.log_joint(points(2, 4))
    for call in (model.log_prior, model.log_likelihood):
        with pytest.raises(NotAvailableError):
            call(points(3, 2))
    with pytest.raises(NotAvailableError, match="cannot draw from its prior"):
        model.sample_prior(2, generator=stream(0, "prior"))
    with pytest.raises(NotAvailableError, match="minibatches need a model in likelihood form"):
        model.batches(2, seed=0)
    assert model.batches(None, seed=0).at(3) is None
