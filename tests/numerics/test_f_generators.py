"""The convex functions of f-divergences: formulas, derivatives, duals, extremes, and divergences by quadrature."""

import math

import pytest
import torch

from vifamily.errors import ConfigError
from vifamily.numerics.f_generators import KINDS, arc_length, f_generator

U = torch.tensor([0.01, 0.3, 0.7, 0.999, 1.4, 2.5, 30.0], dtype=torch.float64)
# written as in the papers, straight from u
FORMULAS = {
    "kl_reverse": lambda u: -u.log(),
    "kl_forward": lambda u: u * u.log(),
    "amari_alpha(0.3)": lambda u: (u**0.3 - 1 - 0.3 * (u - 1)) / (0.3 * -0.7),
    "amari_alpha(-1.5)": lambda u: (u**-1.5 - 1 + 1.5 * (u - 1)) / (1.5 * 2.5),
    "jensen_shannon": lambda u: u * u.log() - (1 + u) * ((1 + u) / 2).log(),
    "arithmetic_geometric": lambda u: (1 + u) * ((1 + u) / (2 * u.sqrt())).log(),
    "total_variation": lambda u: 0.5 * (u - 1).abs(),
    "pearson": lambda u: (u - 1) ** 2,
    "chi_square": lambda u: u**2 - 1,
    "squared_hellinger": lambda u: (u.sqrt() - 1) ** 2,
    "triangular": lambda u: (u - 1) ** 2 / (1 + u),
    "jeffreys": lambda u: 0.5 * (u - 1) * u.log(),
    "t_power(0.4)": lambda u: -(u**0.4 - 1 - 0.4 * (u - 1)),
    "t_power(2.5)": lambda u: u**2.5 - 1 - 2.5 * (u - 1),
    "log1p_abs": lambda u: torch.maximum(u, 1 / u) - 1,
    "modified_gan": lambda u: (1 + u).log() - u.log() - math.log(2),
    "arc_length": lambda u: (1 + u**2).sqrt() - (1 + u) / math.sqrt(2),
}


def build(name):
    if name == "arc_length":
        return arc_length()
    kind, _, number = name.rstrip(")").partition("(")
    option = {"amari_alpha": "alpha", "t_power": "t"}.get(kind)
    return f_generator(kind, **({option: float(number)} if option else {}))


def variants(name):
    """Generator and formula of a name, of its dual and of its symmetrised form."""
    f, g = FORMULAS[name], build(name)
    yield g, f
    yield g.dual(), lambda u: u * f(1 / u)
    yield g.symmetrised(), lambda u: 0.5 * (f(u) + u * f(1 / u))


def test_every_kind_has_a_formula():
    assert {name.partition("(")[0] for name in FORMULAS} == {*KINDS, "arc_length"} and len(KINDS) == 14


@pytest.mark.parametrize("name", FORMULAS)
def test_functions_are_the_formulas_and_their_derivatives(name):
    for generator, formula in variants(name):
        u = U.clone().requires_grad_()
        value = formula(u)
        (first,) = torch.autograd.grad(value.sum(), [u], create_graph=True)
        second = torch.autograd.grad(first.sum(), [u])[0] if first.requires_grad else torch.zeros_like(u)
        at = U.log()
        assert torch.allclose(generator.value(at), value, rtol=1e-11, atol=1e-13)
        assert torch.allclose(generator.slope(at), first * u, rtol=1e-10, atol=1e-12)
        assert torch.allclose(generator.intercept(at), value - first * u, rtol=1e-10, atol=1e-12)
        if generator.smooth:
            assert torch.allclose(generator.curvature(at), second * u**2, rtol=1e-9, atol=1e-12)
        assert float(generator.value(torch.zeros(1, dtype=torch.float64))) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_ratios_are_finite_and_of_the_right_sign(name, dtype):
    at = torch.tensor([-1e4, -300.0, -1.0, 0.0, 1.0, 300.0, 1e4], dtype=dtype)
    g = build(name)
    for generator in (g, g.dual(), g.symmetrised()):
        functions = [generator.value, generator.slope, generator.intercept]
        for function in functions + ([generator.curvature] if generator.smooth else []):
            assert torch.isfinite(function(at)).all()
        if generator.smooth:
            assert (generator.curvature(at) >= 0).all()
        # convex: the slope in u does not fall
        steepness = generator.slope(at[1:-1]) * torch.exp(-at[1:-1]) if dtype == torch.float64 else at[1:-1]
        assert (steepness[1:] >= steepness[:-1] - 1e-12).all()


def test_a_kink_has_no_curvature():
    for kind in ("total_variation", "log1p_abs"):
        assert not f_generator(kind).smooth and not f_generator(kind).symmetrised().smooth
        with pytest.raises(ConfigError, match="kink"):
            f_generator(kind).curvature(U)


def test_limits_and_coincidences_of_kinds():
    log_u = U.log()
    for alpha, kind in ((0.0, "kl_reverse"), (1.0, "kl_forward")):
        found, limit = f_generator("amari_alpha", alpha=alpha), f_generator(kind)
        assert torch.equal(found.value(log_u), limit.value(log_u))
        near = f_generator("amari_alpha", alpha=alpha + 1e-5)
        assert torch.allclose(near.curvature(log_u), limit.curvature(log_u), rtol=1e-4)
    pairs = [("kl_forward", "kl_reverse"), ("jensen_shannon", "jensen_shannon"), ("triangular", "triangular"),
             ("arithmetic_geometric", "arithmetic_geometric"), ("squared_hellinger", "squared_hellinger")]  # fmt: skip
    for kind, dual in pairs:
        turned, other = f_generator(kind).dual().value(log_u), f_generator(dual).value(log_u)
        assert torch.allclose(turned, other, rtol=1e-12, atol=1e-14)
    assert f_generator("kl_reverse").shift_only and f_generator("kl_forward").dual().shift_only
    assert not any(build(name).shift_only for name in FORMULAS if name != "kl_reverse")
    jeffreys = f_generator("kl_forward").symmetrised()
    assert torch.allclose(jeffreys.value(log_u), f_generator("jeffreys").value(log_u), rtol=1e-12, atol=1e-14)
    assert arc_length().dual().value(log_u) == pytest.approx(arc_length().value(log_u), rel=1e-12)


BAD = [
    ({"kind": "hellinger"}, "there are"),
    ({"kind": "amari_alpha"}, "real number alpha"),
    ({"kind": "t_power", "t": math.nan}, "real number t"),
    ({"kind": "t_power", "t": 1}, "zero for every pair"),
    ({"kind": "pearson", "alpha": 0.5}, "belongs to amari_alpha"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        f_generator(**options)
