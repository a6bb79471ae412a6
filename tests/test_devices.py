"""What runs on the CPU runs on another device unchanged.

The tests with the fixture ``device`` run on ``cuda`` where there is one. Those on the meta device find, on any machine,
a tensor that was made on the CPU while the model lives elsewhere: mixing the two is an error there as on ``cuda``.
"""

import pytest
import torch
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vifamily import registry
from vifamily.families._stack import StackedFamily
from vifamily.fit import fit
from vifamily.grid_fit import fit_seeds
from vifamily.models import Density, LikelihoodModel, PyroModel
from vifamily.posterior import Posterior
from vifamily.solvers._watch import units, watched
from vifamily.start import _curvature_scale
from vifamily.supports import Layout
from vifamily.types import Capability, Draw, LatentSpec, Space

DOUBLE = torch.float64


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device there is."""
    return torch.device(request.param)


def normal(z):
    return -0.5 * (z - 1.0).square().sum(-1)


def likelihood(device="cpu"):
    def log_likelihood(theta, y):
        return -0.5 * (y - theta["mu"].unsqueeze(-1)) ** 2

    data = torch.linspace(-1, 3, 12, dtype=DOUBLE)
    return LikelihoodModel((0.0, 1.0), log_likelihood, data=data.to(device), parameters={"mu": "real"}, device=device)


# --- on every device there is ---


def check_posterior(posterior, device, tmp_path):
    """Everything of a posterior works where it lives, and it comes back from disk."""
    assert {p.device.type for p in posterior.family.parameters()} == {device.type}
    draws = posterior.draws(50)
    assert draws.device.type == device.type
    assert bool(torch.isfinite(draws).all())
    if Capability.LOG_Q in posterior.family.capabilities:
        assert posterior.log_prob(draws).shape == (50,)
    assert posterior.diagnose().advice
    assert str(posterior.summary())
    posterior.save(tmp_path / "saved")
    again = Posterior.load(tmp_path / "saved", model=posterior.model)
    torch.testing.assert_close(again.draws(10).cpu(), posterior.draws(10).cpu())


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
@pytest.mark.parametrize(
    ("family", "objective"), [("mean_field", "elbo"), ("full_rank", "iwae"), ("low_rank(rank=1)", "renyi(alpha=0.5)")]
)
def test_fit(device, solver, family, objective, tmp_path):
    model = Density(normal, dim=3, device=device)
    check_posterior(fit(model, family, objective, solver, steps=20), device, tmp_path)


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"restarts": 2}])
def test_likelihood_model(device, options, tmp_path):
    check_posterior(fit(likelihood(device), "mean_field", solver="adam", steps=20, **options), device, tmp_path)


def test_pyro_model(device, tmp_path):
    import pyro
    import pyro.distributions as dist

    def program(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=DOUBLE, device=y.device), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    model = PyroModel(program, torch.linspace(-1, 3, 12, dtype=DOUBLE, device=device))
    check_posterior(fit(model, "mean_field", steps=20), device, tmp_path)


def test_moved_by_an_argument_of_fit(device):
    posterior = fit(likelihood(), "mean_field", steps=5, device=device)
    assert posterior.draws(3).device.type == device.type
    # the problems hold CPU tensors of their own; their answers are converted
    assert fit("eight_schools", "mean_field", steps=5, device=device).draws(3).device.type == device.type


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_resume(device, solver, tmp_path):
    model = Density(normal, dim=3, device=device)
    options = {"family": "mean_field", "solver": solver, "draws": 8}
    whole = fit(model, steps=24, **options)
    fit(model, steps=11, checkpoint=tmp_path / "c", **options)
    resumed = fit(model, steps=24, checkpoint=tmp_path / "c", **options)
    assert resumed.record.steps == whole.record.steps
    torch.testing.assert_close(resumed.draws(10), whole.draws(10))


def test_seeds_side_by_side(device):
    model = Density(normal, dim=3, device=device)
    for seed, posterior in enumerate(fit_seeds(model, "full_rank", seeds=(0, 1), steps=12)):
        torch.testing.assert_close(
            posterior.draws(10), fit(model, "full_rank", solver="adam", seed=seed, steps=12).draws(10)
        )


# --- on the meta device: no tensor is made in the wrong place ---

META = torch.device("meta")
# those that take points of another device on cuda as well: copies, and indices that stay on the CPU
MIXING = ("aten::copy_", "aten::_to_copy", "aten::index.", "aten::index_put", "aten::_index_put_impl_", "aten::to.")


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of the CPU and of another device; torch itself checks few of them on meta."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function.name()) + "."
        if not name.startswith(MIXING):
            # a number as a tensor mixes with anything
            found = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()}
            if len(found) > 1:
                raise RuntimeError(f"{name} mixes tensors on {' and '.join(sorted(found))}")
        return function(*args, **kwargs)


@pytest.fixture
def one_device():
    with OneDevice():
        yield


DIM = 3


class MetaModel:
    """A log joint on the meta device, in the parts that objectives ask for."""

    capabilities = frozenset({Capability.LOG_JOINT, Capability.SCORE, Capability.PRIOR, Capability.PER_DATUM})
    num_data, space = 4, Space.REAL

    def log_prior(self, z):
        return -0.5 * z.square().sum(-1)

    def log_likelihood(self, z, batch=None):
        return -0.5 * (z[..., :1] - torch.zeros(4, dtype=z.dtype, device=z.device)) ** 2

    def log_joint(self, z, batch=None):
        return self.log_prior(z) + self.log_likelihood(z).sum(-1)

    def scale(self, batch):
        return 1.0


def on_meta(name):
    """A family with its tensors on the meta device, or a skip where it is for another space."""
    try:
        entry = registry.build("families", name)
    except ValueError:
        pytest.skip(f"{name} needs arguments")
    if entry.space is not Space.REAL:
        pytest.skip(f"{name} is for {entry.space}")
    return entry.build(LatentSpec(DIM, device=META), generator=torch.Generator())


FAMILIES = [*registry.names("families"), "full_rank(df=5)", "flow(kind=nsf)"]


def noise_of(family, *leading):
    return torch.empty(*leading, *family.noise_spec.shape, dtype=DOUBLE, device=META)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", FAMILIES)
def test_family_makes_no_tensor_elsewhere(name):
    family = on_meta(name)
    assert {t.device for t in (*family.parameters(), *family.buffers())} == {META}
    draw = family(noise_of(family, 5))
    assert isinstance(draw, Draw)
    assert {t.device for t in (draw.z, draw.log_weight, draw.log_q) if t is not None} == {META}


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("objective", registry.names("objectives"))
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_makes_no_tensor_elsewhere(name, objective):
    family, model = on_meta(name), MetaModel()
    try:
        loss = registry.build("objectives", objective)
    except ValueError:
        pytest.skip(f"{objective} needs arguments")
    if loss.missing(model.capabilities, frozenset(family.capabilities)):
        pytest.skip(f"{objective} cannot run on {name}")
    if loss.init_state(model, family, generator=torch.Generator()) is not None:
        pytest.skip(f"{objective} carries a state")
    for estimator in loss.estimators or (None,):
        if estimator is not None:
            chosen = registry.build("objectives", f"{objective}(estimator={estimator})")
            if chosen.missing(model.capabilities, frozenset(family.capabilities)):
                continue
            loss = chosen
        out = loss.resolve(model, family).loss(family, model, noise_of(family, 6))
        assert out.value.device == META
        if loss.own_solver is not None:
            continue  # its steps are formulas, and its loss is only reported
        parameters = [p for p in family.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(out.surrogate.sum(), parameters, allow_unused=True)
        assert {g.device for g in gradients if g is not None} == {META}


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", ["mean_field", "full_rank", "low_rank"])
def test_stack_and_watch_make_no_tensor_elsewhere(name):
    stack = StackedFamily([on_meta(name) for _ in range(2)])
    row = watched(stack, noise_of(stack, 2, 8), torch.empty(2, 4, device=META))
    assert row.device == units(stack, row).device == META


SUPPORTS = {
    "real": ((), "real"),
    "circle": ((2,), "circle"),
    "positive": ((2,), "positive"),
    "interval": ((2, 2), "interval(-1, 3)"),
    "bounds": ((2,), constraints.interval(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0]))),
    "simplex": ((4,), "simplex"),
    "ordered": ((3,), "positive_ordered"),
    "correlation": ((3, 3), "corr_cholesky"),
    "correlation matrix": ((3, 3), "corr_matrix"),
    "factor": ((3, 3), "lower_cholesky"),
    "covariance": ((3, 3), "positive_definite"),
    "stack": ((2,), constraints.stack([constraints.real, constraints.positive], 0)),
    "cat": ((3,), constraints.cat([constraints.real, constraints.unit_interval], 0, [1, 2])),
}


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", SUPPORTS)
def test_support_makes_no_tensor_elsewhere(name):
    layout = Layout.of({"x": SUPPORTS[name]})
    theta, log_jacobian = layout.constrain_with_jacobian(torch.empty(4, layout.dim, dtype=DOUBLE, device=META))
    assert theta["x"].device == log_jacobian.device == META


@pytest.mark.usefixtures("one_device")
def test_scale_at_a_given_start_makes_no_tensor_elsewhere():
    class Model(MetaModel):
        dim = DIM

    assert _curvature_scale(Model(), torch.empty(DIM, dtype=DOUBLE, device=META)).device == META


PLANTED = {
    "sum": lambda a, b: a + b,
    "matrix product": lambda a, b: a @ b,
    "einsum": lambda a, b: torch.einsum("ij,jk->ik", a, b),
    "solve": lambda a, b: torch.linalg.solve_triangular(a, b, upper=False),
    "gather": lambda a, b: a.gather(0, b.long()),
    "mapped": lambda a, b: torch.vmap(lambda row: row @ b)(a),
}


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", PLANTED)
def test_a_tensor_made_elsewhere_is_found(name):
    """What the tests above rely on."""
    with pytest.raises(RuntimeError, match="device|mixes"):
        PLANTED[name](torch.empty(3, 3, device=META), torch.ones(3, 3))
