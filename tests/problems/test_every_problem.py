"""What holds for every problem: shapes, derivatives, finite far away, and a reference that fits the log joint."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vifamily import registry
from vifamily.problems._base import NUM_DRAWS, Problem


def score(problem: Problem, z: Tensor) -> Tensor:
    z = z.detach().requires_grad_(True)
    (out,) = torch.autograd.grad(problem.model.log_joint(z).sum(), z)
    return out


def stein_errors(problem: Problem, z: Tensor) -> tuple[float, float]:
    """Largest standardised deviation of E[s] from 0 and of E[(z - m) s'] from -I."""
    s = score(problem, z)
    root = math.sqrt(len(z))
    first = s.mean(0) / s.std(0) * root
    products = (z - z.mean(0)).unsqueeze(-1) * s.unsqueeze(-2) + torch.eye(z.shape[-1], dtype=z.dtype)
    second = products.mean(0) / products.std(0) * root
    return float(first.abs().max()), float(second.abs().max())


def test_every_registered_problem_is_tested_here(problem_of: Any) -> None:
    from_here = {registry.parse(spec).name for spec in _specs()}
    own = {
        name
        for name in registry.names("problems")
        if registry.lookup("problems", name).__module__.startswith("vifamily.")
    }
    assert own == from_here


def _specs() -> list[str]:
    import ast
    from pathlib import Path

    tree = ast.parse((Path(__file__).parent / "conftest.py").read_text("utf-8"))
    lists = {
        n.targets[0].id: ast.literal_eval(n.value)
        for n in tree.body
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.List)
    }
    return lists["SHIPPED"] + lists["FROM_FOLDER"]


def test_has_description_names_and_draws(any_problem: Problem) -> None:
    reference = any_problem.reference
    assert reference is not None
    assert any_problem.description.endswith(".")
    assert reference.note
    if any_problem.quantities is None:
        assert tuple(any_problem.model.layout.columns()) == reference.names
    if any_problem.name not in ("german_credit_logistic", "brownian_unknown_scales"):
        assert reference.draws is not None
        assert reference.draws.shape == (NUM_DRAWS, len(reference.names))


def test_columns_invert(any_problem: Problem, unconstrained: Any) -> None:
    reference = any_problem.reference
    values = reference.mean[None] if reference.draws is None else reference.draws[:20]
    z = unconstrained(any_problem, values)
    again = any_problem.columns(any_problem.model.constrain(z))
    np.testing.assert_allclose(again.numpy(), values, rtol=1e-8, atol=1e-8)


def test_reference_draws_have_the_reference_moments(any_problem: Problem) -> None:
    reference = any_problem.reference
    if reference.draws is None:
        pytest.skip("the reference has moments only")
    centred = (reference.draws - reference.mean) / reference.sd
    standard_error = np.sqrt(
        1 / NUM_DRAWS + (0 if reference.mean_error is None else (reference.mean_error / reference.sd) ** 2)
    )
    # chains thinned to 2000 draws are not quite independent
    slack = 1.5 if reference.kind in ("nuts", "published") else 1.0
    assert np.all(np.abs(centred.mean(0)) < 5 * slack * standard_error)
    if (
        any_problem.name == "funnel"
    ):  # the sample variance of x has no useful standard error: its law has very heavy tails
        centred = centred[:, :1]
    squares = centred**2
    assert np.all(np.abs(squares.mean(0) - 1) < 5 * slack * squares.std(0) / math.sqrt(NUM_DRAWS))


def test_stein_identity_under_the_reference_draws(any_problem: Problem, unconstrained: Any) -> None:
    if any_problem.reference.draws is None:
        pytest.skip("the reference has moments only")
    first, second = stein_errors(any_problem, unconstrained(any_problem, any_problem.reference.draws))
    assert first < 5
    assert second < 5


@pytest.mark.parametrize("spec", ["eight_schools", "breast_cancer", "student_t_regression", "banana"])
def test_stein_identity_notices_a_wrong_reference(spec: str, problem_of: Any, unconstrained: Any) -> None:
    problem = problem_of(spec)
    z = unconstrained(problem, problem.reference.draws)
    shifted = z + 0.2 * z.std(0)
    widened = z.mean(0) + 1.2 * (z - z.mean(0))
    assert max(stein_errors(problem, shifted)) > 5
    assert max(stein_errors(problem, widened)) > 5


def test_gradient_against_finite_differences(any_problem: Problem, typical: Any, generator: torch.Generator) -> None:
    z = typical(any_problem, generator, 3)
    sd = typical(any_problem, generator, 200).std(0)
    direction = sd * torch.randn(z.shape, generator=generator, dtype=z.dtype)
    step = 1e-3
    values = {k: any_problem.model.log_joint(z + k * step * direction) for k in (-2, -1, 1, 2)}
    numeric = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)
    exact = (score(any_problem, z) * direction).sum(-1)
    scale = (score(any_problem, z) * direction).norm(dim=-1) + 1
    assert torch.all((numeric - exact).abs() < 1e-6 * scale)


def test_second_derivative_against_finite_differences(
    any_problem: Problem, typical: Any, generator: torch.Generator
) -> None:
    z = typical(any_problem, generator, 2)
    sd = typical(any_problem, generator, 200).std(0)
    direction = sd * torch.randn(z.shape, generator=generator, dtype=z.dtype)
    step = 1e-3
    slopes = {k: score(any_problem, z + k * step * direction) for k in (-2, -1, 1, 2)}
    numeric = (8 * (slopes[1] - slopes[-1]) - (slopes[2] - slopes[-2])) / (12 * step)
    z.requires_grad_(True)
    (first,) = torch.autograd.grad(any_problem.model.log_joint(z).sum(), z, create_graph=True)
    (exact,) = torch.autograd.grad((first * direction).sum(), z)
    assert torch.all(((numeric - exact) * sd).abs() < 2e-6 * ((exact * sd).norm(dim=-1, keepdim=True) + 1))


@pytest.mark.parametrize("spread", [1.0, 4.0, 10.0])
def test_finite_far_from_the_posterior(
    any_problem: Problem, typical: Any, generator: torch.Generator, spread: float
) -> None:
    z = typical(any_problem, generator, 200, spread=spread)
    assert any_problem.model.log_joint(z).isfinite().all()
    assert score(any_problem, z).isfinite().all()


def test_finite_at_raw_starting_points(any_problem: Problem, generator: torch.Generator) -> None:
    shape = (200, any_problem.model.dim)
    for z in (
        5 * torch.randn(shape, generator=generator, dtype=torch.float64),
        torch.zeros(1, shape[1], dtype=torch.float64),
    ):
        assert any_problem.model.log_joint(z).isfinite().all()
        assert score(any_problem, z).isfinite().all()


def test_axes_fold_and_draws_do_not_mix(any_problem: Problem, typical: Any, generator: torch.Generator) -> None:
    z = typical(any_problem, generator, 6)
    together = any_problem.model.log_joint(z)
    assert together.shape == (6,)
    assert together.dtype == torch.float64
    apart = torch.stack([any_problem.model.log_joint(one) for one in z])
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(
        any_problem.model.log_joint(z.reshape(2, 3, -1)), together.reshape(2, 3), rtol=1e-10, atol=1e-9
    )


def test_building_is_repeatable(any_problem: Problem) -> None:
    entry = registry.lookup("problems", any_problem.name)
    again, twice = entry().reference, entry().reference
    if again.draws is not None:
        assert np.array_equal(again.draws, twice.draws)
    assert np.array_equal(again.mean, twice.mean)
