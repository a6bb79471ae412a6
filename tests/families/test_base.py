"""What holds for every family: densities, gradients, copies, stacking, and refusals."""

import copy
import math

import pytest
import torch
from torch.func import functional_call, stack_module_state

from vifamily import registry
from vifamily.errors import IncompatibleError, NotAvailableError, ShapeError
from vifamily.families import Family
from vifamily.rng import draw_noise
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec, Space

GAUSSIAN = ["mean_field", "full_rank", "low_rank(rank=1)"]
STUDENT = ["mean_field(student_t=4)", "full_rank(student_t=5)", "low_rank(rank=2, student_t=7)"]
MIXTURES = ["mixture(components=3)", "mixture(components=2, of=full_rank(student_t=5))"]
FLOWS = ["flow(hidden=[8], transforms=2)", "flow(kind=maf, hidden=[8])", "flow(kind=nice, hidden=[8])"]
DENSITIES = [
    *GAUSSIAN,
    *STUDENT,
    *MIXTURES,
    *FLOWS,
    "flow(kind=bpf, hidden=[8], transforms=1)",
    "ensemble(size=3, jitter=0.5)",
]
CONDITIONAL = [*GAUSSIAN, STUDENT[1], *MIXTURES, *FLOWS, "mean_field(hidden=[8])", "implicit(hidden=[8])"]
REAL = [*DENSITIES, "ensemble(size=3)", "implicit(hidden=[8])", "semi_implicit(hidden=[8], mixing_draws=4)"]


def moved(spec, dim=2, *, context_dim=None, seed=0, by=0.25, scale="full"):
    """A family away from where it starts, with a full affine map."""
    generator = torch.Generator().manual_seed(seed)
    entry = registry.build("families", spec)
    family = entry.build(LatentSpec(dim, context_dim=context_dim), generator=generator)
    with torch.no_grad():
        for p in family.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    if scale == "full":
        factor = torch.tril(0.4 * torch.randn(dim, dim, generator=generator, dtype=torch.float64), -1)
        factor = factor + torch.diag(torch.linspace(0.6, 1.5, dim, dtype=torch.float64))
        family.precondition(torch.linspace(-0.5, 0.4, dim, dtype=torch.float64), factor)
    return family


def noise_of(family, num_draws, *, data=None, seed=1):
    leading = (num_draws,) if data is None else (num_draws, data)
    return draw_noise(family.noise_spec, leading, torch.Generator().manual_seed(seed))


def close_enough(family):
    """Flows invert themselves; the Bernstein flow by bisection to 1e-6 per coordinate."""
    name = type(family).__name__
    return 1e-5 if name == "FlowFamily" and not family.vectorised else 1e-6 if name == "FlowFamily" else 1e-10


@pytest.mark.parametrize("spec", DENSITIES)
def test_density_integrates_to_one_in_one_dimension(spec):
    if "rank=2" in spec:
        spec = spec.replace("rank=2", "rank=1")
    family = moved(spec, 1)
    # z = sinh(t) reaches far into heavy tails with a plain rule
    t = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    density = family.log_prob(t.sinh()[:, None]).exp() * t.cosh()
    assert torch.trapezoid(density.detach(), t).item() == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize("spec", DENSITIES)
def test_density_integrates_to_one_in_two_dimensions(spec):
    family = moved(spec, 2)
    num = 101 if "bpf" in spec else 301
    t = torch.linspace(-6, 6, num, dtype=torch.float64)
    points = torch.cartesian_prod(t.sinh(), t.sinh())
    with torch.no_grad():
        density = family.log_prob(points).exp().reshape(num, num) * t.cosh() * t.cosh()[:, None]
    total = torch.trapezoid(torch.trapezoid(density, t), t).item()
    assert total == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("context_dim", [None, 3])
@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("spec", DENSITIES)
def test_density_of_draws_is_the_density_at_their_points(spec, dim, context_dim):
    if dim == 1 and "rank=2" in spec:
        pytest.skip("rank above dimension")
    if context_dim and Capability.CONDITIONAL not in registry.build("families", spec).capabilities:
        pytest.skip("no conditional version")
    family = moved(spec, dim, context_dim=context_dim)
    context = (
        None
        if context_dim is None
        else torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    )
    draw = family(noise_of(family, 6, data=None if context is None else 4), context)
    assert (draw.log_q - family.log_prob(draw.z, context)).abs().max().item() < close_enough(family)


@pytest.mark.parametrize("spec", DENSITIES)
def test_expectations_under_draws_match_quadrature(spec):
    # the draws follow the stated density: E |z| in one dimension both ways, within five standard errors
    spec = spec.replace("rank=2", "rank=1")
    family = moved(spec, 1)
    t = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    with torch.no_grad():
        density = family.log_prob(t.sinh()[:, None]).exp() * t.cosh()
        exact = torch.trapezoid(density * t.sinh().abs(), t).item()
        z = family.sample(20_000, generator=torch.Generator().manual_seed(3))[:, 0].abs()
        draw = family(noise_of(family, 20_000, seed=4))
        per_row = (draw.log_weight.exp() * draw.z[:, 0].abs()).reshape(20_000, -1).sum(-1) * 20_000
    for values in (z, per_row):
        assert abs(values.mean().item() - exact) < 5 * values.std().item() / math.sqrt(20_000)


@pytest.mark.parametrize("spec", [*GAUSSIAN, *STUDENT])
def test_closed_entropy_is_minus_the_mean_log_density(spec):
    family = moved(spec, 3)
    with torch.no_grad():
        log_q = family(noise_of(family, 40_000)).log_q
    error = log_q.std().item() / math.sqrt(40_000)
    assert abs(family.entropy().item() + log_q.mean().item()) < 5 * error


@pytest.mark.parametrize("spec", [s.replace("rank=2", "rank=1") for s in (*GAUSSIAN, *STUDENT)])
def test_closed_entropy_matches_quadrature(spec):
    family = moved(spec, 1)
    t = torch.linspace(-14, 14, 40_001, dtype=torch.float64)
    with torch.no_grad():
        log_q = family.log_prob(t.sinh()[:, None])
        entropy = -torch.trapezoid(log_q.exp() * log_q * t.cosh(), t).item()
    assert family.entropy().item() == pytest.approx(entropy, abs=1e-7)


@pytest.mark.parametrize(
    "spec", [s for s in REAL if "semi" not in s and Capability.LOG_Q in registry.build("families", s).capabilities]
)
def test_frozen_density_has_the_gradient_of_the_points_alone(spec):
    family = moved(spec)
    points = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    free, frozen = points.clone().requires_grad_(), points.clone().requires_grad_()
    a, b = family.log_prob(free), family.log_prob(frozen, frozen=True)
    assert torch.equal(a, b)
    grads = torch.autograd.grad(b.sum(), [frozen, *family.parameters()], allow_unused=True)
    assert all(g is None or not g.any() for g in grads[1:])
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(torch.autograd.grad(a.sum(), free)[0], grads[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", REAL)
def test_gradients_match_finite_differences(spec):
    family = moved(spec)
    noise = noise_of(family, 3)

    def value():
        draw = family(noise)
        out = (draw.log_weight.exp() * (draw.z.sin().sum(-1) + (0 if draw.log_q is None else draw.log_q))).sum()
        if Capability.LOG_Q in family.capabilities and "bpf" not in spec:  # which is inverted by bisection
            out = out + family.log_prob(torch.tensor([[0.3, -0.7]], dtype=torch.float64)).sum()
        return out

    parameters = list(family.parameters())
    grads = torch.autograd.grad(value(), parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(9)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True) if g is not None).item()
    step, ends = 1e-5, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(sign * step * d)
            ends.append(value().item())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("spec", REAL)
def test_every_parameter_has_a_gradient_where_it_starts(spec):
    family = registry.build("families", spec).build(LatentSpec(3), generator=torch.Generator().manual_seed(0))
    draw = family(noise_of(family, 6))
    target = -(draw.z - 0.3).square() @ torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    loss = (draw.log_weight.exp() * (target - (0 if draw.log_q is None else draw.log_q))).sum()
    for (name, p), g in zip(
        family.named_parameters(), torch.autograd.grad(loss, list(family.parameters())), strict=True
    ):
        assert p.numel() == 0 or g.abs().max() > 1e-8, name


class Everything(torch.nn.Module):
    """Draws and densities in one call, for functional_call."""

    def __init__(self, family):
        super().__init__()
        self.family = family

    def forward(self, noise):
        draw = self.family(noise)
        out = [draw.z, draw.log_weight]
        if draw.log_q is not None:
            out.append(draw.log_q)
            if not self.family.log_q_is_bound:
                out.append(self.family.log_prob(draw.z, frozen=True))
        return tuple(out)


@pytest.mark.parametrize("spec", [s for s in REAL if "bpf" not in s])
def test_stacked_parameters_under_vmap_equal_a_loop(spec):
    members = [Everything(moved(spec, 3, seed=r)) for r in range(3)]
    assert members[0].family.vectorised
    parameters, buffers = stack_module_state(members)
    noise = torch.stack([noise_of(m.family, 4, seed=10 + r) for r, m in enumerate(members)])
    template = copy.deepcopy(members[0])
    together = torch.vmap(lambda p, b, n: functional_call(template, (p, b), (n,)))(parameters, buffers, noise)
    for r, member in enumerate(members):
        for a, b in zip(together, member(noise[r]), strict=True):
            torch.testing.assert_close(a[r], b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", CONDITIONAL)
def test_conditional_draws_have_a_datum_axis_and_depend_on_the_context(spec):
    family = moved(spec, 2, context_dim=3)
    context = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    noise = noise_of(family, 4, data=5)
    draw = family(noise, context)
    rows = draw.log_weight.shape[0]
    assert draw.z.shape == (rows, 5, 2)
    # weights may depend on the context: then each datum has its own, which sum to one
    assert float(draw.log_weight.detach().logsumexp(0).abs().max()) < 1e-12
    if Capability.LOG_Q in family.capabilities:
        assert draw.log_q.shape == (rows, 5)
    other = family(noise, context + torch.eye(5, 3, dtype=torch.float64))
    changed = (draw.z != other.z).any(-1).any(0)
    assert changed.tolist() == [True, True, True, False, False]
    assert family.sample(7, generator=torch.Generator().manual_seed(0), context=context).shape == (7, 5, 2)
    if Capability.ENTROPY in family.capabilities:
        assert family.entropy(context).shape == (5,)
    with pytest.raises(ShapeError, match="context"):
        family(noise_of(family, 4))


@pytest.mark.parametrize("spec", DENSITIES)
def test_preconditioning_changes_coordinates_and_keeps_densities_right(spec):
    plain = moved(spec, scale=None)
    mapped = plain.copy()
    shift, factor = (
        torch.tensor([1.0, -2.0], dtype=torch.float64),
        torch.tensor([[2.0, 0.0], [-0.7, 0.3]], dtype=torch.float64),
    )
    mapped.precondition(shift, factor)
    noise = noise_of(plain, 5)
    a, b = plain(noise), mapped(noise)
    torch.testing.assert_close(b.z, shift + a.z @ factor.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b.log_q, a.log_q - math.log(0.6), rtol=1e-12, atol=1e-12)
    assert (mapped.log_prob(b.z) - b.log_q).abs().max().item() < close_enough(plain)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("spec", REAL)
def test_start_at_lands_on_the_moments(spec, full):
    entry = registry.build("families", spec)
    family = entry.build(LatentSpec(3), generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    factor = torch.tensor([[0.5, 0, 0], [0.3, 2.0, 0], [-0.4, 0.1, 1.0]], dtype=torch.float64)
    scale = factor if full else torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    covariance = factor @ factor.T if full else torch.diag(scale**2)
    family.start_at(mean, scale)
    z = family.sample(60_000, generator=torch.Generator().manual_seed(1))
    spread = covariance.diagonal().sqrt()
    if spec.startswith("ensemble"):  # the members are three draws: only that they sit where draws would
        apart = (family.points - mean) / spread
        assert 0.1 < apart.square().mean().item() < 4
        return
    widened = 1.5 if spec.startswith("implicit") else 1.0
    assert ((z.mean(0) - mean) / spread).abs().max().item() < 0.25
    assert (z.std(0) / spread / widened - 1).abs().max().item() < 0.1
    if full and spec.startswith(("full_rank", "flow", "low_rank(rank=1)")):
        correlation = covariance / spread / spread[:, None]
        assert (torch.corrcoef(z.T) - correlation).abs().max().item() < (0.25 if "low" in spec else 0.06)


@pytest.mark.parametrize("spec", REAL)
def test_copies_and_saved_states_reproduce_draws(spec):
    family = moved(spec)
    noise = noise_of(family, 4)
    expected = family(noise).z
    twin = family.copy()
    fresh = registry.build("families", spec).build(LatentSpec(2), generator=torch.Generator().manual_seed(99))
    fresh.load_state_dict(family.state_dict())
    with torch.no_grad():
        for p in family.parameters():
            p.add_(1.0)
    assert torch.equal(twin(noise).z, expected)
    assert torch.equal(fresh(noise).z, expected)


@pytest.mark.parametrize("spec", REAL)
def test_initial_parameters_come_from_the_generator_alone(spec):
    entry = registry.build("families", spec)
    a, b, c = (entry.build(LatentSpec(3), generator=torch.Generator().manual_seed(s)) for s in (4, 4, 5))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    if not spec.startswith(("mean_field", "full_rank")):
        assert any(not torch.equal(x, y) for x, y in zip(a.state_dict().values(), c.state_dict().values(), strict=True))


@pytest.mark.parametrize("spec", REAL)
def test_what_an_entry_declares_its_module_can_do(spec):
    entry = registry.build("families", spec)
    family = entry.build(LatentSpec(3), generator=torch.Generator().manual_seed(0))
    assert entry.capabilities - {Capability.CONDITIONAL} <= family.capabilities | entry.capabilities
    assert family.capabilities <= entry.capabilities
    draw = family(noise_of(family, 4))
    assert (draw.log_q is not None) == (Capability.LOG_Q in family.capabilities)
    assert draw.z.requires_grad == (Capability.REPARAMETERISED in family.capabilities)
    uniform = bool((draw.log_weight == draw.log_weight[0]).all())
    assert uniform or Capability.WEIGHTED in family.capabilities
    assert draw.log_weight.logsumexp(0).item() == pytest.approx(0, abs=1e-12)
    if Capability.ENTROPY in family.capabilities:
        assert family.entropy().shape == ()
    else:
        with pytest.raises(NotAvailableError, match="entropy"):
            family.entropy()
    if Capability.LOG_Q not in family.capabilities:
        with pytest.raises(NotAvailableError, match="density"):
            family.log_prob(torch.zeros(1, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", REAL)
def test_everything_has_the_dtype_that_was_asked_for(spec, dtype):
    family = registry.build("families", spec).build(
        LatentSpec(2, dtype=dtype), generator=torch.Generator().manual_seed(0)
    )
    assert {p.dtype for p in family.parameters()} == {dtype}
    draw = family(noise_of(family, 3).to(dtype))
    assert draw.z.dtype == draw.log_weight.dtype == dtype
    assert draw.log_q is None or draw.log_q.dtype == dtype


@pytest.mark.parametrize("spec", [*GAUSSIAN, "implicit"])
def test_wrong_shapes_are_refused(spec):
    family = registry.build("families", spec).build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
    size = family.noise_spec.shape[0]
    for shape in [(4, size + 1), (size,), (4, 3, size)]:
        with pytest.raises(ShapeError, match="noise of shape"):
            family(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ShapeError, match="points of shape"):
        family.log_prob(torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises((IncompatibleError, ShapeError), match="context|noise"):
        family(torch.zeros(4, 2, size, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", registry.names("families"))
def test_the_wrong_space_is_refused(name):
    entry = registry.lookup("families", name)()
    wrong = Space.REAL if entry.space is Space.DISCRETE else Space.DISCRETE
    with pytest.raises(IncompatibleError, match="space"):
        entry.build(LatentSpec(2, space=wrong, num_categories=(2, 2)), generator=torch.Generator())


@pytest.mark.parametrize("spec", ["ensemble", "semi_implicit"])
def test_a_context_is_refused_by_families_without_conditional_version(spec):
    with pytest.raises(IncompatibleError, match="conditional"):
        registry.build("families", spec).build(LatentSpec(2, context_dim=3), generator=torch.Generator())


def test_families_of_no_coordinates_have_density_one():
    family = registry.build("families", "mean_field").build(LatentSpec(0), generator=torch.Generator())
    draw = family(torch.zeros(3, 0, dtype=torch.float64))
    assert draw.z.shape == (3, 0)
    assert draw.log_q.tolist() == [0, 0, 0]


def test_a_family_may_define_forward_and_log_prob_alone():
    class Uniform(Family):
        noise_spec = NoiseSpec((1,), "uniform")

        def transform(self, noise, context):
            return Draw(
                noise, torch.zeros(noise.shape[0], dtype=noise.dtype), torch.zeros(noise.shape[0]).log_softmax(0)
            )

    family = Uniform(LatentSpec(1))
    family.precondition(torch.tensor([1.0]), torch.tensor([4.0]))
    assert family(torch.full((2, 1), 0.5, dtype=torch.float64)).log_q.tolist() == pytest.approx([-math.log(4)] * 2)
