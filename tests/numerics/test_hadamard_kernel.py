"""The compiled transform against that of torch, its derivatives, its vectorised and compiled forms."""

import sys
import types

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from vifamily.errors import ConfigError, NotAvailableError, ShapeError
from vifamily.numerics import hadamard_kernel
from vifamily.numerics.hadamard import hadamard as torch_hadamard
from vifamily.numerics.hadamard_kernel import compile_kernel, hadamard
from vifamily.numerics.native import _library
from vifamily.numerics.walsh_hadamard import walsh_product
from vifamily.rng import scoped


@pytest.fixture
def kernel() -> str:
    try:
        compile_kernel()
    except NotAvailableError as error:
        pytest.skip(str(error))
    return "compiled"


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("power", range(17))
@pytest.mark.parametrize("orthonormal", [True, False])
def test_it_is_the_transform_of_torch(kernel, power, orthonormal):
    x = normal(3, 2**power)
    wanted = torch_hadamard(x, orthonormal=orthonormal)
    found = hadamard(x, orthonormal=orthonormal, kernel=kernel)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-10)
    single = hadamard(x.float(), orthonormal=orthonormal, kernel=kernel)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), wanted, rtol=1e-4, atol=2e-6 * wanted.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.usefixtures("validation")
def test_derivatives(kernel):
    x = normal(2, 64).requires_grad_()
    with scoped(0):  # the checks draw directions
        assert gradcheck(lambda v: hadamard(v, kernel=kernel), (x,), check_forward_ad=True)
        y = normal(1, 16).requires_grad_()
        assert gradgradcheck(lambda v: hadamard(v, kernel=kernel).pow(3), (y,), check_fwd_over_rev=True)


def test_vmap(kernel):
    x = normal(32, 5, 3)
    found = torch.func.vmap(lambda v: hadamard(v, kernel=kernel), in_dims=1)(x.movedim(0, -1).movedim(0, 1))
    torch.testing.assert_close(found, torch_hadamard(x.movedim(0, -1)), rtol=0, atol=1e-10)


def test_many_gradients_at_once_and_a_tangent_of_one(kernel):
    x, many = normal(3, 16).requires_grad_(), normal(5, 3, 16)
    y = hadamard(x, kernel=kernel)
    (found,) = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(found, torch_hadamard(many), rtol=0, atol=1e-10)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(many[0], many[1])
        (gradient,) = torch.autograd.grad(y, x, dual)
        tangent = torch.autograd.forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(tangent, torch_hadamard(many[1]), rtol=0, atol=1e-10)


def test_a_tracer_sees_one_operation(kernel):
    from torch.fx.experimental.proxy_tensor import make_fx

    x = normal(2, 64)
    traced = make_fx(lambda v: hadamard(v, kernel=kernel))(x)
    torch.testing.assert_close(traced(2 * x), torch_hadamard(2 * x), rtol=0, atol=1e-10)
    nested = make_fx(torch.func.vmap(lambda v: hadamard(v, kernel=kernel)))(x)
    torch.testing.assert_close(nested(2 * x), torch_hadamard(2 * x), rtol=0, atol=1e-10)
    gradient = make_fx(torch.func.grad(lambda v: hadamard(v, kernel=kernel).pow(2).sum()))(x)
    torch.testing.assert_close(gradient(2 * x), 4 * x, rtol=0, atol=1e-10)


def test_a_tracer_that_does_not_ask_for_the_kernel_is_shown_products(kernel):
    from torch.fx.experimental.proxy_tensor import make_fx

    x = normal(2, 64)
    code = make_fx(lambda v: hadamard(v))(x).code
    assert "aten.mm" in code and "vifamily" not in code
    assert "vifamily.hadamard" in make_fx(lambda v: hadamard(v, kernel=kernel))(x).code


def test_layers_use_the_kernel_once_it_is_there(kernel):
    x, left, core, right = normal(3, 64), normal(64), normal(64), normal(64)
    found = walsh_product(x, left, core, right)
    wanted = left * torch_hadamard(core * torch_hadamard(right * x))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_a_parameter_and_a_subclass(kernel):
    class Own(torch.Tensor):
        pass

    x = normal(2, 64)
    for form in (torch.nn.Parameter(x.clone()), x.clone().as_subclass(Own)):
        found = hadamard(form, kernel=kernel)
        torch.testing.assert_close(found.detach().as_subclass(torch.Tensor), torch_hadamard(x), rtol=0, atol=1e-10)


def test_where_torch_does_not_say_what_is_active(kernel, monkeypatch):
    monkeypatch.setattr(hadamard_kernel, "_nested", lambda: True)
    x = normal(2, 64).requires_grad_()
    (gradient,) = torch.autograd.grad(hadamard(x, kernel=kernel).square().sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach(), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("validation")
def test_compiled_graph(kernel):
    def loss(v):
        return (hadamard(v * 2, kernel="compiled") ** 3).sum()

    x = normal(3, 32)
    found = torch.func.grad(loss)(x)
    y = x.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(y).backward()
    torch.testing.assert_close(y.grad, found, rtol=1e-12, atol=1e-10)


@pytest.mark.usefixtures("validation")
@pytest.mark.parametrize("loaded", [True, False])
def test_compiled_graph_of_a_layer(kernel, monkeypatch, loaded):
    if not loaded:
        monkeypatch.setattr(hadamard_kernel, "_LOADED", {})
    x, left, core, right = normal(3, 32), normal(32), normal(32), normal(32)
    found = torch.compile(walsh_product, fullgraph=True, backend="aot_eager")(x, left, core, right)
    torch.testing.assert_close(found, walsh_product(x, left, core, right), rtol=1e-12, atol=1e-10)


def test_layouts(kernel):
    x = normal(64, 4, 6)
    y = x.movedim(0, -1)
    assert not y.is_contiguous()
    torch.testing.assert_close(hadamard(y, kernel=kernel), torch_hadamard(y), rtol=0, atol=1e-10)
    assert hadamard(x.new_empty(0, 64), kernel=kernel).shape == (0, 64)
    assert hadamard(y[0, 0], kernel=kernel).shape == (64,)


def test_half_precision_is_left_to_torch(kernel):
    x = normal(3, 256, dtype=torch.bfloat16)
    assert torch.equal(hadamard(x, kernel=kernel), torch_hadamard(x))


def test_errors(monkeypatch):
    with pytest.raises(ConfigError, match="got 'fast'"):
        hadamard(normal(2, 16), kernel="fast")
    with pytest.raises(ShapeError, match="power of two"):
        hadamard(normal(2, 12), kernel="compiled")
    monkeypatch.setattr(hadamard_kernel, "_LOADED", {})

    def none(source):
        raise _library.NoCompilerError("no C compiler was found")

    monkeypatch.setattr(_library, "load", none)
    with pytest.raises(NotAvailableError, match="no C compiler"):
        hadamard(normal(2, 16), kernel="compiled")
    # by default nothing is compiled
    torch.testing.assert_close(hadamard(normal(2, 16)), torch_hadamard(normal(2, 16)))


def test_the_installed_cuda_kernel_is_chosen_and_called(monkeypatch):
    fake = types.ModuleType("fast_hadamard_transform")
    fake.hadamard_transform = lambda x, scale: torch_hadamard(x, orthonormal=False) * scale  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", fake)
    monkeypatch.setattr(hadamard_kernel, "_DAO_INSTALLED", True)
    assert hadamard_kernel._way("cuda", torch.float32, 256, "auto") == "dao"
    assert hadamard_kernel._way("cuda", torch.float64, 256, "auto") is None
    assert hadamard_kernel._way("cuda", torch.float32, 256, "torch") is None
    x = normal(2, 64).requires_grad_()
    with scoped(0):
        assert gradcheck(lambda v: hadamard_kernel._apply(v, 0.125, "dao"), (x,))


@pytest.mark.gpu
def test_on_a_cuda_device():
    x = normal(3, 256, dtype=torch.float32).cuda()
    torch.testing.assert_close(hadamard(x).cpu(), torch_hadamard(x.cpu()), rtol=1e-4, atol=1e-4)
