"""Supports and layouts: Jacobians against automatic differentiation and integration, round trips, shapes, files."""

import json
import math

import numpy as np
import pyro.distributions.constraints as pyro_constraints
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from torch.distributions import Dirichlet, LKJCholesky, biject_to, constraints

from vifamily.errors import ConfigError, ShapeError, SupportError
from vifamily.rng import scoped
from vifamily.supports import Layout, Site, describe_support, support_from
from vifamily.types import Space

# name -> (shape, support, which constrained entries are free coordinates)
LOWER3 = [(i, j) for i in range(3) for j in range(i + 1)]
STRICT3 = [(i, j) for i in range(3) for j in range(i)]
CASES = {
    "real": ((), "real", None),
    "positive": ((2,), "positive", None),
    "unit_interval": ((), "unit_interval", None),
    "interval": ((2, 2), "interval(-1, 3)", None),
    "greater_than": ((), "greater_than(1.5)", None),
    "less_than": ((3,), "less_than(-2)", None),
    "simplex": ((4,), "simplex", [(0,), (1,), (2,)]),
    "ordered": ((3,), "ordered", None),
    "positive_ordered": ((3,), "positive_ordered", None),
    "corr_cholesky": ((3, 3), "corr_cholesky", STRICT3),
    "corr_matrix": ((3, 3), "corr_matrix", STRICT3),
    "lower_cholesky": ((3, 3), "lower_cholesky", LOWER3),
    "positive_definite": ((3, 3), "positive_definite", LOWER3),
    "tensor_bounds": ((2,), constraints.interval(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0])), None),
    "stack": ((2,), constraints.stack([constraints.real, constraints.positive], 0), None),
    "cat": ((3,), constraints.cat([constraints.real, constraints.unit_interval], 0, [1, 2]), None),
}
NAMES = sorted(CASES)


def layout_of(name: str) -> Layout:
    shape, support, _ = CASES[name]
    return Layout.of({"x": (shape, support)})


def points(layout: Layout, lead: tuple[int, ...], seed: int = 0, scale: float = 1.5) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*lead, layout.dim, generator=source, dtype=torch.float64)


def free_entries(name: str, value: torch.Tensor) -> torch.Tensor:
    free = CASES[name][2]
    return value.reshape(-1) if free is None else torch.stack([value[at] for at in free])


@pytest.mark.parametrize("name", NAMES)
def test_log_jacobian_is_that_of_automatic_differentiation(name):
    layout = layout_of(name)
    for z in points(layout, (5,)):
        jacobian = torch.autograd.functional.jacobian(lambda u: free_entries(name, layout.constrain(u)["x"]), z)
        _, log_jacobian = layout.constrain_with_jacobian(z)
        assert jacobian.shape == (layout.dim, layout.dim)
        torch.testing.assert_close(log_jacobian, torch.linalg.slogdet(jacobian)[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (1, 2, 3)])
def test_round_trip_and_shapes_with_any_leading_axes(name, lead):
    layout = layout_of(name)
    z = points(layout, lead)
    theta, log_jacobian = layout.constrain_with_jacobian(z)
    assert theta["x"].shape == (*lead, *CASES[name][0])
    assert log_jacobian.shape == lead
    layout.check(theta)
    torch.testing.assert_close(layout.unconstrain(theta), z, rtol=1e-7, atol=1e-7)
    flat = layout.flatten(theta)
    assert flat.shape == (*lead, len(layout.columns()))
    torch.testing.assert_close(flat, theta["x"].reshape(*lead, -1), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_gives_what_leading_axes_give(name):
    layout = layout_of(name)
    z = points(layout, (3, 2))
    theta, log_jacobian = layout.constrain_with_jacobian(z)
    mapped, mapped_jacobian = torch.vmap(layout.constrain_with_jacobian)(z)
    torch.testing.assert_close(mapped["x"], theta["x"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mapped_jacobian, log_jacobian, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_first_and_second_order(name):
    layout = layout_of(name)
    z = points(layout, (1,), seed=3, scale=0.7).requires_grad_()

    def scalar(u):
        theta, log_jacobian = layout.constrain_with_jacobian(u)
        return log_jacobian.sum() + theta["x"].sin().sum()

    with scoped(0):  # the checks draw their directions from torch's own stream
        assert torch.autograd.gradcheck(scalar, (z,))
        assert torch.autograd.gradgradcheck(scalar, (z,))


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name):
    layout = layout_of(name)
    again = Layout.from_json(json.loads(json.dumps(layout.to_json(), allow_nan=False)))
    assert again == layout
    z = points(layout, (2,))
    torch.testing.assert_close(again.constrain(z)["x"], layout.constrain(z)["x"], rtol=0, atol=0)


def integral(layout: Layout, log_density) -> float:
    if layout.dim == 1:

        def on_line(u: float) -> float:
            theta, log_jacobian = layout.constrain_with_jacobian(torch.tensor([u], dtype=torch.float64))
            return float((log_density(theta["x"]) + log_jacobian).exp())

        return quad(on_line, -30, 30, limit=200)[0]
    grid = torch.linspace(-25, 12, 1500, dtype=torch.float64)
    z = torch.cartesian_prod(*[grid] * layout.dim)
    theta, log_jacobian = layout.constrain_with_jacobian(z)
    return float((log_density(theta["x"]) + log_jacobian).exp().sum() * (grid[1] - grid[0]) ** layout.dim)


@pytest.mark.parametrize(
    ("support", "density"),
    [
        ("positive", torch.distributions.Gamma(torch.tensor(2.0).double(), torch.tensor(1.3).double())),
        ("unit_interval", torch.distributions.Beta(torch.tensor(2.0).double(), torch.tensor(0.7).double())),
        ("interval(-1, 2)", torch.distributions.Uniform(-1.0, 2.0)),
        ("greater_than(1)", torch.distributions.Pareto(torch.tensor(1.0).double(), torch.tensor(3.0).double())),
    ],
)
def test_a_density_of_a_number_integrates_to_one(support, density):
    assert integral(Layout.of({"x": support}), density.log_prob) == pytest.approx(1.0, abs=1e-6)


def test_a_density_below_a_bound_integrates_to_one():
    layout = Layout.of({"x": "less_than(3)"})
    assert integral(layout, lambda x: x - 3.0) == pytest.approx(1.0, abs=1e-7)


def test_a_density_on_the_simplex_integrates_to_one():
    density = Dirichlet(torch.tensor([2.0, 3.0, 1.5], dtype=torch.float64))
    assert integral(Layout.of({"x": ((3,), "simplex")}), density.log_prob) == pytest.approx(1.0, abs=1e-3)


def test_a_density_of_ordered_pairs_integrates_to_one():
    def order_statistics(x):  # of two standard normals: twice their density
        return math.log(2) + torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)

    assert integral(Layout.of({"x": ((2,), "ordered")}), order_statistics) == pytest.approx(1.0, abs=1e-5)


def test_a_density_of_correlation_factors_integrates_to_one():
    density = LKJCholesky(2, torch.tensor(1.7, dtype=torch.float64))
    assert integral(Layout.of({"x": ((2, 2), "corr_cholesky")}), density.log_prob) == pytest.approx(1.0, abs=1e-6)


def test_a_three_by_three_correlation_factor_integrates_to_one():
    density = LKJCholesky(3, torch.tensor(2.0, dtype=torch.float64))
    layout = Layout.of({"x": ((3, 3), "corr_cholesky")})
    grid = torch.linspace(-6, 6, 81, dtype=torch.float64)
    z = torch.cartesian_prod(grid, grid, grid)
    theta, log_jacobian = layout.constrain_with_jacobian(z)
    total = (density.log_prob(theta["x"]) + log_jacobian).exp().sum() * (grid[1] - grid[0]) ** 3
    assert float(total) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", ["positive", "unit_interval", "interval", "simplex", "corr_cholesky"])
def test_the_maps_are_those_of_torch(name):
    shape, support, _ = CASES[name]
    layout, reference = layout_of(name), biject_to(support_from(support))
    z = points(layout, (3,))
    x = z.reshape(3, *layout["x"].unconstrained_shape)
    theta, log_jacobian = layout.constrain_with_jacobian(z)
    torch.testing.assert_close(theta["x"], reference(x), rtol=1e-9, atol=1e-9)
    expected = reference.log_abs_det_jacobian(x, reference(x)).reshape(3, -1).sum(-1)
    torch.testing.assert_close(log_jacobian, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["ordered_vector", "positive_ordered_vector"])
def test_the_maps_are_those_of_pyro(name):
    support = getattr(pyro_constraints, name)
    layout, reference = Layout.of({"x": ((3,), support)}), biject_to(support)
    z = points(layout, (4,))
    torch.testing.assert_close(layout.constrain(z)["x"], reference(z), rtol=1e-10, atol=1e-10)


def test_correlations_far_out_stay_finite_with_their_gradient():
    layout = Layout.of({"x": ((3, 3), "corr_cholesky")})
    z = torch.tensor([200.0, -300.0, 50.0], dtype=torch.float64, requires_grad=True)
    theta, log_jacobian = layout.constrain_with_jacobian(z)
    (gradient,) = torch.autograd.grad(log_jacobian + theta["x"].sum(), z)
    assert bool(torch.isfinite(gradient).all()) and bool(torch.isfinite(log_jacobian))


# --- discrete ---


def test_an_integer_interval_counts_its_categories_and_shifts():
    layout = Layout.of({"k": ((2,), "integer_interval(1, 3)"), "b": constraints.boolean})
    assert layout.num_categories == (3, 3, 2)
    theta = layout.constrain(torch.tensor([0.0, 2.0, 1.0]))
    assert theta["k"].tolist() == [1.0, 3.0] and theta["b"].item() == 1.0
    assert layout.constrain_with_jacobian(torch.zeros(4, 3))[1].tolist() == [0.0] * 4


def test_discrete_and_continuous_do_not_mix():
    with pytest.raises(SupportError, match="cannot be mixed"):
        _ = Layout.of({"k": "integer_interval(0, 3)", "x": "real"}).num_categories
    assert Layout.of({"x": "real"}).num_categories is None


# --- angles ---


def test_angles_are_turned_into_the_circle_and_lose_nothing():
    layout = Layout.of({"phi": ((2,), "circle"), "psi": "circle"})
    assert layout.space is Space.CIRCLE and layout.angles() == [0, 1, 2] and layout.dim == 3
    z = torch.tensor([[0.5, 4.0, -math.pi], [math.pi, -3.5, 100.0]], dtype=torch.float64)
    theta, log_jacobian = layout.constrain_with_jacobian(z)
    flat = layout.flatten(theta)
    assert bool(((flat > -math.pi) & (flat <= math.pi)).all())
    for part in (torch.cos, torch.sin):
        torch.testing.assert_close(part(flat), part(z))
    assert log_jacobian.tolist() == [0.0, 0.0]
    # within the circle nothing is touched, and the way back is the same map
    assert flat[0, 0] == 0.5 and flat[1, 0] == math.pi
    assert torch.equal(layout.unconstrain(theta), flat)
    torch.testing.assert_close(layout.unconstrain(layout.unflatten(z)), flat)
    layout.check({"phi": torch.tensor([7.0, -20.0]), "psi": torch.tensor(0.0)})
    with pytest.raises(SupportError, match="not finite"):
        layout.check({"phi": torch.tensor([math.inf, 0.0]), "psi": torch.tensor(0.0)})
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert describe_support(support_from("circle")) == "circle"


def test_an_angle_has_a_slope_of_one_beyond_the_cut_too():
    z = torch.tensor([[4.0], [-9.0], [1.0]], dtype=torch.float64, requires_grad=True)
    Layout.of({"phi": "circle"}).constrain(z)["phi"].sum().backward()
    assert z.grad.flatten().tolist() == [1.0, 1.0, 1.0]


def test_the_space_of_a_layout():
    assert Layout.of({"x": "positive"}).space is Space.REAL
    assert Layout.of({"k": "integer_interval(0, 3)"}).space is Space.DISCRETE
    assert Layout.of({}).space is Space.REAL
    with pytest.raises(SupportError, match="angles: phi"):
        _ = Layout.of({"phi": "circle", "x": "real"}).space


# --- properties ---

elementary = st.sampled_from(
    ["real", "positive", "unit_interval", "interval(-2, 5)", "greater_than(-1)", "less_than(4)"]
)
vector = st.sampled_from(["simplex", "ordered", "positive_ordered"])
matrix = st.sampled_from(["corr_cholesky", "lower_cholesky", "positive_definite", "corr_matrix"])
parameter = st.one_of(
    st.tuples(st.lists(st.integers(1, 3), max_size=2).map(tuple), elementary),
    st.tuples(st.tuples(st.integers(1, 3), st.integers(2, 4)), vector),
    st.tuples(st.integers(2, 3).map(lambda n: (n, n)), matrix),
)


@given(st.dictionaries(st.text("abcxyz_.", min_size=1, max_size=5), parameter, min_size=1, max_size=4), st.data())
def test_any_layout_round_trips(parameters, data):
    layout = Layout.of(parameters)
    lead = tuple(data.draw(st.lists(st.integers(1, 3), max_size=3)))
    seed = data.draw(st.integers(0, 2**31))
    z = points(layout, lead, seed, scale=0.8)
    theta, log_jacobian = layout.constrain_with_jacobian(z)
    assert log_jacobian.shape == lead and bool(torch.isfinite(log_jacobian).all())
    torch.testing.assert_close(layout.unconstrain(theta), z, rtol=1e-5, atol=1e-5)
    assert len(layout.columns()) == layout.flatten(theta).shape[-1] == len(set(layout.columns()))
    assert layout.unconstrained_columns() == list(dict.fromkeys(layout.unconstrained_columns()))
    assert len(layout.unconstrained_columns()) == layout.dim
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_an_interval_reads_back_as_it_is_written(lower, width):
    support = support_from(f"interval({lower!r}, {lower + width!r})")
    again = support_from(describe_support(support))
    assert (again.lower_bound, again.upper_bound) == (support.lower_bound, support.upper_bound)


# --- names ---


def test_columns_count_from_zero():
    layout = Layout.of({"mu": "real", "theta": ((2,), "positive"), "Sigma": ((2, 2), "positive_definite")})
    assert layout.columns() == [
        "mu", "theta[0]", "theta[1]", "Sigma[0,0]", "Sigma[0,1]", "Sigma[1,0]", "Sigma[1,1]",
    ]  # fmt: skip
    assert layout.dim == 6 and layout["Sigma"].start == 3 and layout["Sigma"].stop == 6
    assert layout.unconstrained_columns()[-1] == "Sigma[2]"


def test_coordinates_between_two_bounds_are_told_from_others():
    parts = constraints.cat([constraints.interval(0.0, 1.0), constraints.positive], -1, [2, 1])
    pair = constraints.stack([constraints.real, constraints.unit_interval], 0)
    layout = Layout.of({
        "rate": "interval(0, 2)", "mu": "real", "scale": "positive", "mixed": ((3,), parts), "pair": ((2, 2), pair),
        "share": ((3,), "simplex"),
    })  # fmt: skip
    expected = [True, False, False, True, True, False, False, False, True, True, False, False]
    assert layout.bounded().tolist() == expected
    assert Layout([]).bounded().tolist() == []


def test_numbers_and_arrays_can_be_unconstrained():
    layout = Layout.of({"a": "positive", "b": ((2,), "real")})
    z = layout.unconstrain({"a": torch.tensor(1.0), "b": torch.as_tensor(np.array([2.0, 3.0], dtype=np.float32))})
    assert z.tolist() == [0.0, 2.0, 3.0]


def test_float32_stays_float32():
    layout = Layout.of({n: CASES[n][:2] for n in NAMES})
    theta, log_jacobian = layout.constrain_with_jacobian(torch.zeros(2, layout.dim, dtype=torch.float32))
    assert {v.dtype for v in theta.values()} == {torch.float32} and log_jacobian.dtype == torch.float32


def test_a_layout_may_hold_nothing():
    layout = Layout.of({})
    assert layout.dim == 0 and layout.columns() == [] and layout.constrain(torch.zeros(3, 0)) == {}
    assert layout.constrain_with_jacobian(torch.zeros(3, 0))[1].tolist() == [0.0] * 3


# --- refusals ---


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("positve", "unknown support 'positve'"),
        ("interval", "unknown support"),
        ("interval(1)", "takes 2 number"),
        ("interval(2, 1)", "below its upper bound"),
        ("interval(a, b)", "must be given numbers"),
        ("interval(0, inf)", "must be finite"),
        ("greater_than(nan)", "must be finite"),
        ("integer_interval(0, 1.5)", "two integers"),
        ("__import__('os')", "unknown support"),
        (3, "must be a torch constraint"),
        (constraints.one_hot, "has no map to unconstrained space"),
        (constraints.nonnegative_integer, "has no map to unconstrained space"),
        (pyro_constraints.sphere, "has no map to unconstrained space"),
        (constraints.dependent, "has no map to unconstrained space"),
        (constraints.stack([constraints.simplex, constraints.real], -1), "supports of single numbers"),
    ],
)
def test_supports_that_cannot_be_used_are_refused(spec, words):
    with pytest.raises(SupportError, match=words.replace("(", r"\(")):
        support_from(spec)


@pytest.mark.parametrize(
    ("parameters", "error", "words"),
    [
        ({"": "real"}, ConfigError, "non-empty string"),
        ({"x": "simplex"}, ShapeError, "needs a shape"),
        ({"x": ((1,), "simplex")}, ShapeError, "2 or more"),
        ({"x": ((2, 3), "corr_cholesky")}, ShapeError, "needs a shape"),
        ({"x": ((1, 1), "corr_cholesky")}, ShapeError, "at least 2 by 2"),
        ({"x": ((-1,), "real")}, ShapeError, "positive integers"),
        ({"x": ((1.5,), "real")}, ShapeError, "positive integers"),
        ({"x": ("real", (2,))}, SupportError, "as a support or as"),
        ({"x": ((3,), CASES["stack"][1])}, ShapeError, "covers 2"),
        ({"x": ((3,), CASES["tensor_bounds"][1])}, ShapeError, "does not fit"),
    ],
)
def test_layouts_that_cannot_be_are_refused(parameters, error, words):
    with pytest.raises(error, match=words):
        Layout.of(parameters)


def test_names_must_differ():
    with pytest.raises(ConfigError, match="different names"):
        Layout([Site("x", (), constraints.real), Site("x", (), constraints.real)])


def test_values_are_checked():
    layout = Layout.of({"x": ((2,), "positive"), "y": "real"})
    good = {"x": torch.ones(2), "y": torch.tensor(0.0)}
    layout.check(good)
    for bad, error, words in [
        ({"x": torch.ones(2)}, ConfigError, "missing: y"),
        ({**good, "w": torch.ones(1)}, ConfigError, "unknown: w"),
        ({**good, "x": torch.ones(3)}, ShapeError, "must have shape"),
        ({**good, "x": torch.ones(4, 2)}, ShapeError, "leading axes"),
        ({**good, "x": torch.tensor([1.0, -1.0])}, SupportError, "outside its support positive"),
        ({**good, "y": torch.tensor(math.nan)}, SupportError, "not finite"),
    ]:
        with pytest.raises(error, match=words):
            layout.check(bad)
    with pytest.raises(ShapeError, match="points must have shape"):
        layout.constrain(torch.zeros(2))
    with pytest.raises(ConfigError, match="no parameter is called"):
        layout["w"]


@pytest.mark.parametrize(
    "data",
    [
        None, [], {"sites": 3}, {"sites": [{"name": "x"}]}, {"sites": [{"name": "x", "shape": [], "support": "real"}]},
        {"sites": [{"name": "x", "shape": [], "support": {"kind": "nothing"}}]},
        {"sites": [{"name": "x", "shape": ["a"], "support": {"kind": "real"}}]},
        {"sites": [{"name": "x", "shape": [], "support": {"kind": "interval", "lower_bound": 1}}]},
        {"sites": [{"name": "x", "shape": [], "support": {"kind": "stack", "of": 3, "dim": -1}}]},
    ],
)  # fmt: skip
def test_damaged_files_are_refused(data):
    with pytest.raises((SupportError, ConfigError)):
        Layout.from_json(data)
