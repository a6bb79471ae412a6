"""Several families at once are what each is alone: draws, densities, gradients, parameters."""

import pytest
import torch

from vifamily import registry
from vifamily.errors import ConfigError, NotAvailableError
from vifamily.families._stack import StackedFamily
from vifamily.rng import draw_noise
from vifamily.types import Capability, LatentSpec, Space

REAL = [
    "mean_field",
    "full_rank(student_t=5)",
    "low_rank(rank=1)",
    "mixture(components=3)",
    "flow(hidden=[8], transforms=2)",
    "flow(kind=maf, hidden=[8])",
    "flow(kind=nice, hidden=[8])",
    "flow(kind=bpf, hidden=[8], transforms=1)",
    "ensemble(size=3)",
    "ensemble(size=3, jitter=0.5)",
    "implicit(hidden=[8])",
    "semi_implicit(hidden=[8], mixing_draws=4)",
]
DISCRETE = ["categorical", "categorical(max_states=0)"]


def members(spec, dtype=torch.float64, scales=("diagonal", "diagonal", "diagonal")):
    space = Space.DISCRETE if spec in DISCRETE else Space.REAL
    categories = (2, 3) if space is Space.DISCRETE else None
    out = []
    for r, scale in enumerate(scales):
        generator = torch.Generator().manual_seed(r)
        latent = LatentSpec(2, space=space, num_categories=categories, dtype=dtype)
        family = registry.build("families", spec).build(latent, generator=generator)
        with torch.no_grad():
            for p in family.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
        if space is Space.REAL:
            diagonal = torch.tensor([0.7, 1.5], dtype=torch.float64) + 0.1 * r
            full = torch.diag(diagonal) + torch.tensor([[0.0, 0.0], [0.4, 0.0]], dtype=torch.float64)
            shift = torch.tensor([0.1 * r, -0.3], dtype=torch.float64)
            family.precondition(shift, diagonal if scale == "diagonal" else full)
        out.append(family)
    return out


def noise_for(stack, dtype=torch.float64, rows=5):
    source = torch.Generator().manual_seed(99)
    return draw_noise(stack.noise_spec, (stack.size, rows), source, dtype=dtype)


def scalar(draw):
    """A number that depends on all of a draw, with weights that differ along every axis."""
    ramp = torch.linspace(-1, 1, draw.log_weight.shape[-1], dtype=draw.z.dtype)
    out = (ramp.unsqueeze(-1) * torch.sin(draw.z)).sum((-1, -2)) + (ramp * draw.log_weight).sum(-1)
    return out if draw.log_q is None else out + (ramp * draw.log_q).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spec", [*REAL, *DISCRETE])
def test_draws_and_gradients_are_those_of_each_member(spec, dtype):
    families = members(spec, dtype)
    stack = StackedFamily(families)
    noise = noise_for(stack, dtype)
    together = scalar(stack(noise))
    parameters = list(stack.parameters())
    gradients = torch.autograd.grad(together.sum(), parameters, allow_unused=True)
    # single precision: a few units in the last place of numbers of this size, more where a flow inverts itself
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4 if "flow" in spec else 2e-5
    for r, family in enumerate(families):
        alone = scalar(family(noise[r]))
        assert alone.dtype == dtype
        assert torch.allclose(together[r], alone, rtol=tolerance, atol=tolerance)
        own = torch.autograd.grad(alone, list(family.parameters()), allow_unused=True)
        for stacked, single in zip(gradients, own, strict=True):
            if single is None:
                assert stacked is None or not stacked[r].any()
            else:
                assert torch.allclose(stacked[r], single, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "spec", [s for s in (*REAL, *DISCRETE) if s not in ("ensemble(size=3)", "implicit(hidden=[8])")]
)
def test_densities_at_points_are_those_of_each_member(spec):
    families = members(spec)
    stack = StackedFamily(families)
    points = stack(noise_for(stack)).z.detach()
    together = stack.log_prob(points)
    for r, family in enumerate(families):
        assert torch.allclose(together[r], family.log_prob(points[r]), rtol=1e-10, atol=1e-10)
    if "semi" not in spec:
        held = points.requires_grad_()
        frozen = stack.log_prob(held, frozen=True)
        assert torch.allclose(frozen, together, rtol=1e-10, atol=1e-10)
        gradients = (
            torch.autograd.grad(frozen.sum(), [held, *stack.parameters()], allow_unused=True)
            if frozen.requires_grad
            else []
        )
        assert all(g is None or not g.any() for g in gradients[1:])


@pytest.mark.parametrize("spec", ["mean_field", "full_rank(student_t=5)", "low_rank(rank=1)", "categorical"])
def test_closed_forms_are_those_of_each_member(spec):
    families = members(spec)
    stack = StackedFamily(families)
    assert torch.allclose(stack.entropy(), torch.stack([f.entropy() for f in families]), rtol=1e-10)
    if spec != "categorical":
        for stacked, single in zip(stack.moments(), zip(*(f.moments() for f in families), strict=True), strict=True):
            assert torch.allclose(stacked, torch.stack(single), rtol=1e-10, atol=1e-12)


def test_members_with_maps_of_both_kinds_stack():
    families = members("full_rank", scales=("diagonal", "full", "diagonal"))
    draws = [
        f(noise)
        for f, noise in zip(
            families, torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), strict=True
        )
    ]
    stack = StackedFamily(families)
    noise = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = stack(noise)
    for r, draw in enumerate(draws):
        assert torch.allclose(together.z[r], draw.z, rtol=1e-12) and torch.allclose(
            together.log_q[r], draw.log_q, rtol=1e-12
        )
    for r, member in enumerate(stack.members()):
        assert torch.allclose(member(noise[r]).z, draws[r].z, rtol=1e-12)


@pytest.mark.parametrize(
    "spec", ["mean_field", "mixture(components=3)", "flow(kind=bpf, hidden=[8], transforms=1)", "categorical"]
)
def test_members_carry_what_was_learned(spec):
    families = members(spec)
    stack = StackedFamily(families)
    with torch.no_grad():
        for p in stack.parameters():
            p.add_(torch.arange(3, dtype=p.dtype).reshape(-1, *[1] * (p.dim() - 1)))
    noise = noise_for(stack)
    together = stack(noise)
    for r, member in enumerate(stack.members()):
        assert type(member) is type(families[r])
        assert torch.allclose(member(noise[r]).log_weight, together.log_weight[r], rtol=1e-10, atol=1e-12)
        assert torch.allclose(member(noise[r]).z, together.z[r], rtol=1e-10, atol=1e-10)
    # the families that were stacked are as they were
    assert torch.equal(next(families[2].parameters()), next(members(spec)[2].parameters()))


def test_a_stack_says_what_its_members_can_do():
    stack = StackedFamily(members("implicit(hidden=[8])"))
    assert stack.capabilities == members("implicit(hidden=[8])")[0].capabilities
    assert stack(noise_for(stack)).log_q is None
    with pytest.raises(NotAvailableError):
        stack.log_prob(torch.zeros(3, 1, 2, dtype=torch.float64))
    with pytest.raises(NotAvailableError, match="stacked"):
        stack(noise_for(stack), torch.zeros(3, 2, dtype=torch.float64))
    assert Capability.LOG_Q in StackedFamily(members("mean_field")).capabilities


def test_an_empty_stack_is_refused():
    with pytest.raises(ConfigError, match="at least one"):
        StackedFamily([])
