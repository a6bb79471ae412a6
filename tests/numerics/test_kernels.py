"""Kernels: derivatives against automatic differentiation, Stein's identity, bandwidths."""

import math

import pytest
import torch

from vifamily.diagnostics import two_sample
from vifamily.errors import ConfigError, DataError, ModelError, ShapeError
from vifamily.numerics import kernels
from vifamily.numerics.kernels import (
    Imq,
    Linear,
    Rbf,
    Sum,
    median_bandwidth,
    median_distance,
    named_kernel,
    square_distances,
    stein_direction,
    stein_kernel,
)
from vifamily.numerics.scores import score

KINDS = {
    "rbf": Rbf(),
    "imq": Imq(),
    "imq(2, -0.25)": Imq(2.0, -0.25),
    "linear": Linear(),
    "linear(3)": Linear(3.0),
    "sum": Sum((Rbf(), Imq(), Linear()), weights=(0.5, 2.0, 0.1), factors=(1.0, 2.0, 0.5)),
    "multiscale": named_kernel("multiscale"),
}


def points(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", KINDS)
def test_derivatives_equal_automatic_ones(name):
    kernel, x, y, width = KINDS[name], points(4, 3), points(5, 3, seed=1), 1.3

    def one(a, b):
        return kernel(a[None], b[None], width)[0, 0]

    gradient, trace = kernel.gradient(x, y, width), kernel.cross_trace(x, y, width)
    for i in range(4):
        for j in range(5):
            torch.testing.assert_close(gradient[i, j], torch.func.grad(one, 0)(x[i], y[j]), rtol=1e-10, atol=1e-12)
            mixed = torch.func.jacrev(torch.func.grad(one, 0), 1)(x[i], y[j])
            torch.testing.assert_close(trace[i, j], mixed.trace(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_kernels_and_stein_kernels_are_positive(name):
    x, s = points(30, 2), points(30, 2, seed=1)
    for matrix in (KINDS[name](x, x, 0.8), stein_kernel(KINDS[name], x, s, bandwidth=0.8)):
        torch.testing.assert_close(matrix, matrix.mT, rtol=1e-10, atol=1e-10)
        values = torch.linalg.eigvalsh(matrix)
        assert values[0] > -1e-10 * values[-1]


@pytest.mark.parametrize("name", KINDS)
def test_stein_identity_by_quadrature(name):
    """The mean of the Stein kernel over the law itself is zero at every point."""
    grid = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    log_p = torch.logsumexp(torch.stack([-0.5 * (grid + 1) ** 2, -0.8 * (grid - 2) ** 2]), 0)
    inner = grid.clone().requires_grad_()
    log = torch.logsumexp(torch.stack([-0.5 * (inner + 1) ** 2, -0.8 * (inner - 2) ** 2]), 0)
    s = torch.autograd.grad(log.sum(), inner)[0]
    weight = torch.softmax(log_p, 0)
    y, s_y = points(3, 1), points(3, 1, seed=1)
    mean = weight @ stein_kernel(KINDS[name], grid[:, None], s[:, None], y, s_y)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_leading_axes_and_their_bandwidths(name):
    x, s, width = points(3, 6, 2), points(3, 6, 2, seed=1), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    together = stein_kernel(KINDS[name], x, s, bandwidth=width)
    for r in range(3):
        alone = stein_kernel(KINDS[name], x[r], s[r], bandwidth=float(width[r]))
        torch.testing.assert_close(together[r], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_direction_is_the_sum_of_pull_and_push(name):
    x, s, at = points(5, 2), points(5, 2, seed=1), points(4, 2, seed=2)
    kernel = KINDS[name]
    got = stein_direction(kernel.parts(x, at), x, s, at, attraction=0.7)
    value, gradient = kernel(x, at), kernel.gradient(x, at)
    wanted = (0.7 * value.unsqueeze(-1) * s.unsqueeze(1) + gradient).mean(0)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_stein_kernel_far_from_the_origin_keeps_its_digits():
    x, s = points(6, 2), points(6, 2, seed=1)
    near, far = stein_kernel(Imq(), x, s), stein_kernel(Imq(), x + 1e6, s)
    torch.testing.assert_close(far, near, rtol=1e-7, atol=1e-7)


def test_distances_by_products_equal_those_by_differences(monkeypatch):
    x, y = 100 + points(7, 3), 100 + points(5, 3, seed=1)
    wanted = square_distances(x, y)
    monkeypatch.setattr(kernels, "_LARGEST_DIFFERENCE", 0)
    torch.testing.assert_close(square_distances(x, y), wanted, rtol=1e-10, atol=1e-10)
    assert square_distances(x, x).diagonal().abs().max() < 1e-12


def test_median_distance_takes_weights_as_such():
    x = points(9, 2)
    whole = median_distance(x, torch.full((9,), -math.log(9), dtype=torch.float64))
    torch.testing.assert_close(whole, median_distance(x))
    torch.testing.assert_close(whole, torch.nn.functional.pdist(x).quantile(0.5))
    halves = torch.cat([torch.full((9,), -math.log(9)), torch.full((1,), -math.log(18))]).double()
    halves[0] = -math.log(18)
    torch.testing.assert_close(median_distance(torch.cat([x, x[:1]]), halves), whole)
    stack = torch.stack([x, 3 * x])
    torch.testing.assert_close(median_distance(stack), torch.stack([whole, 3 * whole]))


@pytest.mark.parametrize("x", [torch.zeros(4, 2), torch.zeros(1, 2), torch.full((3, 1), math.nan)], ids=str)
def test_median_distance_of_nothing_is_one(x):
    assert float(median_distance(x.double())) == 1.0


def test_no_gradient_passes_through_the_median():
    assert not median_distance(points(4, 2).requires_grad_()).requires_grad


def test_median_bandwidth_is_where_it_was():
    assert two_sample.median_bandwidth is median_bandwidth
    with pytest.raises(ShapeError, match="columns"):
        median_bandwidth(torch.zeros(3, 1), torch.zeros(3, 2))
    with pytest.raises(DataError, match="NaN"):
        median_bandwidth(torch.zeros(3, 1), torch.full((3, 1), math.nan))


@pytest.mark.parametrize(
    "wrong",
    [lambda: Imq(power=0.5), lambda: Imq(offset=0.0), lambda: Linear(0.0), lambda: Sum(()),
     lambda: Sum((Rbf(),), (-1.0,)), lambda: Sum((Rbf(),), factors=(1.0, 2.0)), lambda: named_kernel("gauss"),
     lambda: named_kernel(3)],
)  # fmt: skip
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()


# --- scores ---


def test_scores_carry_gradients_of_points_and_parameters():
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    z = points(3, 2).requires_grad_()
    s = score(lambda at: -0.5 * (scale * at.square()).sum(-1), z)
    torch.testing.assert_close(s, -scale * z)
    got = torch.autograd.grad(s.sum(), [z, scale])
    torch.testing.assert_close(got[0], torch.full_like(z, -2.0))
    torch.testing.assert_close(got[1], -z.sum())


def test_scores_without_gradients_are_plain():
    z = points(3, 2).requires_grad_()
    with torch.no_grad():
        s = score(lambda at: -0.5 * at.square().sum(-1), z)
    assert not s.requires_grad
    torch.testing.assert_close(s, -z.detach())


@pytest.mark.parametrize("follow", [True, False])
def test_a_hidden_gradient_is_refused(follow):
    z = points(3, 2).requires_grad_(follow)
    with pytest.raises(ModelError, match="no gradient"):
        score(lambda at: at.detach().sum(-1), z)
