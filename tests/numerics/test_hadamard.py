"""The transform against the matrix, its derivatives, its vectorised forms, and the algebra of bits."""

import math

import pytest
import torch
from scipy.linalg import hadamard as matrix_of

from vifamily.errors import ShapeError
from vifamily.numerics.hadamard import dyadic_convolution, hadamard, next_power_of_two, split_powers_of_two
from vifamily.rng import scoped

SIZES = [1, 2, 4, 8, 64, 128, 256, 1024, 4096, 8192]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("orthonormal", [True, False])
def test_it_is_the_product_with_the_matrix(size, orthonormal):
    x = normal(3, size)
    matrix = torch.from_numpy(matrix_of(size)).double()
    wanted = x @ matrix / (math.sqrt(size) if orthonormal else 1)
    torch.testing.assert_close(hadamard(x, orthonormal=orthonormal), wanted, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("size", [2, 32, 512, 2048, 16384])
def test_it_is_its_own_inverse_and_keeps_lengths(size):
    x = normal(2, size)
    y = hadamard(x)
    torch.testing.assert_close(hadamard(y), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(16,), (0, 16), (0, 1024), (2, 3, 5, 256), (40, 256), (1, 1, 8192)])
def test_leading_axes_are_kept(shape):
    x = normal(*shape)
    y = hadamard(x)
    assert y.shape == x.shape
    flat = x.reshape(-1, shape[-1])
    if flat.shape[0]:
        rows = torch.stack([hadamard(row) for row in flat])
        torch.testing.assert_close(y.reshape(flat.shape), rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_many_rows_give_what_one_row_gives(dtype):
    x = normal(100, 128).to(dtype)
    one_by_one = torch.stack([hadamard(row) for row in x])
    slack = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(hadamard(x), one_by_one, rtol=slack, atol=4 * slack)


def test_strides_do_not_matter():
    x = normal(256, 6).T
    torch.testing.assert_close(hadamard(x), hadamard(x.contiguous()), rtol=0, atol=1e-13)


# largest error of one entry, in units of the entries' size
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 2e-6), (torch.bfloat16, 0.05), (torch.float16, 0.006)])
@pytest.mark.parametrize("size", [64, 128, 512, 1024, 16384])
def test_every_precision(dtype, slack, size):
    x = normal(4, size).to(dtype)
    y = hadamard(x)
    assert y.dtype == dtype
    wanted = hadamard(x.double())
    assert float((y.double() - wanted).abs().max()) < slack
    # no systematic error of the scale, which rounding the factor 2^-1/2 in the matrix would bring
    ratio = float((y.double() * wanted).sum() / wanted.square().sum())
    assert abs(ratio - 1) < 0.1 * slack


# torch's own forward-mode rules are scripted, which it deprecates itself
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("size", [8, 256])
def test_derivatives_of_both_orders_and_modes(size):
    x = normal(2, size).requires_grad_()
    with scoped(0):  # the checks draw directions
        assert torch.autograd.gradcheck(hadamard, x, check_forward_ad=True, fast_mode=size > 64)
        assert torch.autograd.gradgradcheck(lambda t: hadamard(t * t), x, fast_mode=size > 64)
    value, derivative = torch.func.jvp(hadamard, (x.detach(),), (normal(2, size, seed=1),))
    torch.testing.assert_close(derivative, hadamard(normal(2, size, seed=1)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(value, hadamard(x.detach()), rtol=1e-12, atol=1e-12)


def test_vmap_is_the_batched_form():
    x = normal(5, 3, 512)
    torch.testing.assert_close(torch.vmap(hadamard)(x), hadamard(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.vmap(hadamard, in_dims=1)(x), hadamard(x.movedim(1, 0)), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("validation")
@pytest.mark.parametrize("size", [64, 1024])
def test_it_compiles_as_one_graph(size):
    compiled = torch.compile(lambda t: hadamard(t).square().sum(), fullgraph=True, backend="aot_eager")
    x = normal(3, size).requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(gradient, 2 * x.detach(), rtol=1e-10, atol=1e-10)


def test_tracing_leaves_nothing_behind():
    from torch.fx.experimental.proxy_tensor import make_fx

    x = normal(2, 256)
    traced = make_fx(lambda t: hadamard(t))(x)
    torch.testing.assert_close(traced(x), hadamard(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hadamard(x), torch.from_numpy(matrix_of(256) / 16.0 @ x.numpy().T).T)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 12), (4, 0)])
def test_other_lengths_are_refused(shape):
    with pytest.raises(ShapeError, match="power of two"):
        hadamard(torch.zeros(shape))


def test_the_convolution_is_the_sum_over_exclusive_or():
    a, b = normal(16), normal(3, 16, seed=1)
    wanted = torch.stack([sum(a[i] * b[:, i ^ k] for i in range(16)) for k in range(16)], dim=-1)
    torch.testing.assert_close(dyadic_convolution(a, b), wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(ShapeError, match="one length"):
        dyadic_convolution(a, normal(8))


def test_a_diagonal_between_two_transforms_depends_on_the_exclusive_or_of_indices():
    g = normal(8)
    product = hadamard(hadamard(torch.eye(8, dtype=torch.float64)) * g)
    gamma = hadamard(g) / math.sqrt(8)
    wanted = torch.tensor([[gamma[i ^ j] for j in range(8)] for i in range(8)])
    torch.testing.assert_close(product, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100, 1541])
def test_lengths_are_cut_into_powers_of_two(size):
    assert next_power_of_two(size) >= size > next_power_of_two(size) // 2
    for largest in (None, 4):
        pieces = split_powers_of_two(size, largest)
        assert sum(pieces) == size and list(pieces) == sorted(pieces, reverse=True)
        assert all(p & (p - 1) == 0 and (largest is None or p <= largest) for p in pieces)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_gpu_gives_the_same(dtype):
    x = normal(3, 1024).to(dtype)
    slack = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    assert float((hadamard(x.cuda()).cpu().double() - hadamard(x.double())).abs().max()) < slack
