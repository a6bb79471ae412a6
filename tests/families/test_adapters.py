"""Objects of other libraries and of the user's own, where a family is expected."""

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from vifamily.errors import ConfigError, IncompatibleError, ShapeError, UnknownNameError
from vifamily.families._adapters import as_entry
from vifamily.families._foreign import keep_validation
from vifamily.families.full_rank import FullRank
from vifamily.families.low_rank import LowRank
from vifamily.models.pyro_model import PyroModel
from vifamily.rng import draw_noise, generator, scoped
from vifamily.supports import Layout
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec

with keep_validation():
    import zuko


def build(obj, dim=3, model=None, dtype=torch.float64):
    return as_entry(obj, model).build(LatentSpec(dim, dtype=dtype), generator=generator(0, "family"))


def noise_of(family, num, seed=1):
    return draw_noise(family.noise_spec, (num,), torch.Generator().manual_seed(seed))


# --- names, entries, families ---


def test_names_entries_and_classes_become_entries():
    assert as_entry("low_rank(rank=3)") == LowRank(rank=3)
    assert as_entry(FullRank()) == FullRank()
    assert as_entry(FullRank) == FullRank()
    with pytest.raises(UnknownNameError, match="Did you mean 'full_rank'"):
        as_entry("full_rnak")


def test_a_built_family_is_copied():
    family = build("full_rank")
    family.start_at(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3))
    entry = as_entry(family)
    assert entry.given and entry.capabilities == family.capabilities
    twin = build(family)
    with torch.no_grad():
        family.loc.zero_()
    assert twin.loc.tolist() == [1, 2, 3]
    with pytest.raises(ShapeError, match="covers 3"):
        build(family, 5)


# --- modules ---


class Shifted(nn.Module):
    noise_spec = NoiseSpec((2,))
    capabilities = frozenset({Capability.DRAWS, Capability.REPARAMETERISED, Capability.LOG_Q})

    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.tensor([1.0, -1.0]))

    def forward(self, noise):
        z = noise + self.at
        return Draw(z, self.log_prob(z), torch.zeros(len(noise), dtype=z.dtype).log_softmax(0))

    def log_prob(self, z):
        return torch.distributions.Normal(self.at, 1.0).log_prob(z).sum(-1)


def test_a_module_with_the_methods_is_a_family():
    family = build(Shifted(), 2)
    family.precondition(torch.tensor([0.0, 5.0]), torch.tensor([2.0, 3.0]))
    draw = family(noise_of(family, 4))
    assert (draw.log_q - family.log_prob(draw.z)).abs().max().item() < 1e-12
    frozen = family.log_prob(draw.z.detach(), frozen=True)
    assert not frozen.requires_grad
    assert family.module.at.dtype == torch.float64


@pytest.mark.parametrize("missing", ["noise_spec", "capabilities", "forward", "log_prob"])
def test_what_a_module_lacks_is_named(missing):
    body = {k: v for k, v in vars(Shifted).items() if k != missing and not k.startswith("__")}
    with pytest.raises(ConfigError, match=f"lacks {missing}"):
        as_entry(type("Broken", (nn.Module,), body)())


def test_a_module_that_returns_the_wrong_thing_is_told_so():
    class Wrong(Shifted):
        def forward(self, noise):
            return noise

    class Flat(Shifted):
        def forward(self, noise):
            return Draw(noise, noise, torch.zeros(len(noise), dtype=noise.dtype).log_softmax(0))

    with pytest.raises(ShapeError, match="must return a Draw"):
        build(Wrong(), 2)(torch.zeros(3, 2, dtype=torch.float64))
    with pytest.raises(ShapeError, match="log_q of shape"):
        build(Flat(), 2)(torch.zeros(3, 2, dtype=torch.float64))
    with pytest.raises(ShapeError, match="z of shape"):
        build(Shifted(), 5)(torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("obj", [3, None, [1, 2], object()])
def test_anything_else_is_refused(obj):
    with pytest.raises(ConfigError, match="cannot use a"):
        as_entry(obj)


# --- zuko ---


@pytest.mark.parametrize("kind", ["NSF", "MAF", "NICE"])
def test_a_zuko_flow_keeps_its_density(kind):
    with scoped(3):
        flow = getattr(zuko.flows, kind)(3, hidden_features=[8])
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.3 * torch.randn_like(p))
    family = build(flow)
    draw = family(noise_of(family, 5))
    assert (draw.log_q - family.log_prob(draw.z)).abs().max().item() < 1e-6
    with torch.no_grad(), keep_validation():
        torch.distributions.Distribution.set_default_validate_args(False)
        expected = flow.double()().log_prob(draw.z)
    torch.testing.assert_close(family.log_prob(draw.z).detach(), expected, rtol=1e-10, atol=1e-10)
    base = family.flow.transform(None)(draw.z)
    torch.testing.assert_close(base, noise_of(family, 5), rtol=1e-7, atol=1e-7)
    draw.log_q.sum().backward()
    assert all(p.grad is None for p in flow.parameters())


def test_zuko_objects_that_are_no_flow_are_refused():
    with scoped(0):
        circular, conditional = zuko.flows.NCSF(2), zuko.flows.MAF(2)
    with pytest.raises(ConfigError, match="normal base"):
        as_entry(circular)
    with pytest.raises(ShapeError, match="2 features"):
        build(conditional, 3)


# --- Pyro ---

DATA = torch.tensor([1.0, 2.0, 4.0])


def program(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu + weight.sum(), tau), obs=y)


# another order than the program's, so that coordinates must be moved
MODEL = SimpleNamespace(
    layout=Layout.of({"weight": ((2,), "real"), "mu": "real", "tau": "positive"}),
    program=SimpleNamespace(args=(DATA,), kwargs={}),
)


@pytest.fixture(autouse=True)
def clean_store():
    store = pyro.get_param_store()
    store.clear()
    with scoped(5):
        yield
    store.clear()


def trained(guide):
    """Run a guide once, and move its parameters."""
    guide(DATA)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return guide


@pytest.mark.parametrize(
    "kind", ["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal"]
)
def test_automatic_guides_become_the_family_they_describe(kind):
    guide = trained(getattr(autoguide, kind)(program))
    family = build(guide, 4, MODEL)
    z = family.sample(3, generator=torch.Generator().manual_seed(0))
    theta = MODEL.layout.constrain(z)
    for i in range(3):
        held = {k: v[i].float() for k, v in theta.items()}
        if kind == "AutoNormal":
            held_free = {
                f"{k}_unconstrained": MODEL.layout[k].bijection(v[i]).inv(v[i]).float() for k, v in theta.items()
            }
            trace = pyro.poutine.trace(pyro.poutine.condition(guide, data=held_free)).get_trace(DATA)
            trace.compute_log_prob()
            expected = sum(trace.nodes[k]["log_prob_sum"] for k in held_free)
        else:
            # the guide's own order: mu, tau, weight
            latent = torch.cat([held["mu"].reshape(1), held["tau"].log().reshape(1), held["weight"]])
            expected = guide.get_posterior().log_prob(latent)
        assert family.log_prob(z[i]).item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


def test_an_automatic_guide_that_never_ran_is_set_up_without_touching_the_store():
    family = build(autoguide.AutoDiagonalNormal(program, init_scale=0.5), 4, MODEL)
    assert family.log_scale.exp().tolist() == pytest.approx([0.5] * 4, rel=1e-5)
    assert len(pyro.get_param_store()) == 0


def test_a_point_guide_becomes_an_ensemble_of_one():
    guide = trained(autoguide.AutoDelta(program))
    family = build(guide, 4, MODEL)
    theta = MODEL.layout.constrain(family.points)
    for name, value in guide.median(DATA).items():
        torch.testing.assert_close(theta[name][0].float(), value, rtol=1e-5, atol=1e-5)


def test_automatic_guides_without_counterpart_are_refused():
    with pytest.raises(ConfigError, match="AutoIAFNormal has no counterpart.*AutoNormal"):
        as_entry(autoguide.AutoIAFNormal(program), MODEL)


def test_guides_of_another_model_are_refused():
    def other():
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    model = SimpleNamespace(layout=MODEL.layout, args=(), kwargs={})
    with pytest.raises(ConfigError, match="covers the sites"):
        build(autoguide.AutoDiagonalNormal(other), 4, model)
    with pytest.raises(ConfigError, match="samples the sites"):
        build(other, 4, model)


def by_hand(y):
    at = pyro.param("at", torch.tensor([0.5, -0.5]))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
    weight = pyro.sample("weight", dist.Normal(at, scale).to_event(1))
    mu = pyro.sample("mu", dist.Normal(weight.sum(), scale))  # depends on the draw before
    pyro.sample("tau", dist.LogNormal(0.3 * mu, 0.4))


def by_hand_log_q(z, at, scale):
    """The density of `by_hand` on unconstrained space, written out."""
    normal = torch.distributions.Normal
    out = normal(at, scale).log_prob(z[:, :2]).sum(-1)
    out = out + normal(z[:, :2].sum(-1), scale).log_prob(z[:, 2])
    return out + normal(0.3 * z[:, 2], 0.4).log_prob(z[:, 3])


def test_a_guide_written_by_hand_has_its_density():
    family = build(by_hand, 4, MODEL)
    at, scale = torch.tensor([0.5, -0.5], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float32).double()
    draw = family(noise_of(family, 5))
    torch.testing.assert_close(draw.log_q, by_hand_log_q(draw.z, at, scale), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(family.log_prob(draw.z), draw.log_q, rtol=1e-6, atol=1e-6)
    grid = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert family.log_prob(grid).shape == (2, 3)


def test_draws_of_a_guide_are_a_function_of_noise_and_parameters():
    family = build(by_hand, 4, MODEL)
    noise = noise_of(family, 4)
    before = torch.get_rng_state()
    a, b = family(noise), family(noise)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.z, b.z)
    assert len(a.z.detach().unique(dim=0)) == 4
    # reparameterised: moving `at` moves the draws of `weight` alike
    (gradient,) = torch.autograd.grad(a.z[:, :2].sum(), family.free[0])
    assert gradient.tolist() == [4, 4]
    frozen = family.log_prob(a.z.detach(), frozen=True)
    assert not frozen.requires_grad
    twin = family.copy()
    assert torch.equal(twin(noise).z, a.z)


def test_gradients_of_a_guide_match_finite_differences():
    family = build(by_hand, 4, MODEL)
    noise = noise_of(family, 3)

    def value():
        draw = family(noise)
        return draw.log_q.sum() + draw.z.sin().sum()

    gradient = torch.autograd.grad(value(), family.free[1])[0].item()
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            family.free[1].add_(sign * 1e-5)
            ends.append(value().item())
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(gradient, rel=1e-6)


def test_the_parameter_store_is_read_and_never_changed():
    pyro.param("at", torch.tensor([9.0, 9.0]))
    pyro.param("another", torch.tensor(1.0))
    family = build(by_hand, 4, MODEL)
    assert family.free[0].tolist() == [9, 9]
    family(noise_of(family, 2))
    store = pyro.get_param_store()
    assert set(store.keys()) == {"at", "another"}
    assert store["at"].tolist() == [9, 9]


class ModuleGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.tensor([0.5, -0.5]))
        self.scale = PyroParam(torch.tensor(0.7), constraints.positive)

    def forward(self, y):
        weight = pyro.sample("weight", dist.Normal(self.at, self.scale).to_event(1))
        mu = pyro.sample("mu", dist.Normal(weight.sum(), self.scale))
        pyro.sample("tau", dist.LogNormal(0.3 * mu, 0.4))


def test_a_pyro_module_is_a_guide_with_its_own_parameters():
    guide = ModuleGuide()
    family = build(guide, 4, MODEL)
    assert guide.at.dtype == torch.float32  # the guide itself is left as it is
    by_function = build(by_hand, 4, MODEL)
    noise = noise_of(family, 4)
    draw, other = family(noise), by_function(noise)
    torch.testing.assert_close(draw.z, other.z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(draw.log_q, other.log_q, rtol=1e-6, atol=1e-6)
    assert len(pyro.get_param_store()) == 0
    grads = torch.autograd.grad(draw.z.sum() + draw.log_q.sum(), list(family.parameters()))
    assert all(g.abs().sum() > 0 for g in grads)
    frozen = family.log_prob(draw.z.detach(), frozen=True)
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, draw.log_q.detach(), rtol=1e-6, atol=1e-6)


def test_guides_that_cannot_be_reparameterised_are_refused():
    def discrete(y):
        pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("mu", dist.Poisson(3.0))
        pyro.sample("tau", dist.LogNormal(0.0, 1.0))

    def wide(y):
        pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("tau", dist.LogNormal(0.0, 1.0))

    with pytest.raises(IncompatibleError, match="'mu'.*Poisson"):
        build(discrete, 4, MODEL)
    with pytest.raises(ShapeError, match=r"'weight' has shape \(3,\)"):
        build(wide, 4, MODEL)


def test_a_guide_without_its_model_is_refused():
    with pytest.raises(ConfigError, match="'by_hand' needs the Pyro model"):
        as_entry(by_hand)
    with pytest.raises(ConfigError, match="needs the Pyro model"):
        as_entry(autoguide.AutoNormal(program), SimpleNamespace(layout=MODEL.layout))


@pytest.mark.parametrize("guide", [by_hand, autoguide.AutoMultivariateNormal(program)], ids=["by hand", "automatic"])
def test_guides_meet_a_pyro_model(guide):
    model = PyroModel(program, DATA)
    family = build(guide, model.dim, model)
    draw = family(noise_of(family, 4))
    bound = (model.log_joint(draw.z) - draw.log_q).mean()
    gradients = torch.autograd.grad(bound, list(family.parameters()))
    assert torch.isfinite(bound) and all(torch.isfinite(g).all() for g in gradients)
    assert (draw.log_q - family.log_prob(draw.z)).abs().max().item() < 1e-6
