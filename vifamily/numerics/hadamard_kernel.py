"""The Walsh-Hadamard transform by a compiled kernel, on request; pure torch wherever there is none.

On a processor the kernel is C, compiled on the first request and kept in the cache of compiled libraries. On a CUDA
device it is that of ``fast_hadamard_transform`` where it is installed. Nothing here is needed: the transform of
`vifamily.numerics.hadamard` does the same everywhere.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from vifamily.errors import ConfigError, NotAvailableError
from vifamily.numerics.hadamard import hadamard as torch_hadamard
from vifamily.numerics.native import _library
from vifamily.numerics.native._hadamard import SMALLEST, hadamard_source

__all__ = ["KERNELS", "compile_kernel", "hadamard"]

KERNELS = ("auto", "torch", "compiled")
"""What may be asked for."""

_LOADED: dict[torch.dtype, Any] = {}
"""Functions of the compiled library by dtype, once it is loaded."""
_DAO_INSTALLED = importlib.util.find_spec("fast_hadamard_transform") is not None
_DAO_LARGEST = 2**15


def compile_kernel() -> bool:
    """Compile the processor's kernel, or take it from the cache; from then on ``kernel="auto"`` uses it.

    Returns:
        Whether it was loaded by this call, and not before.

    Raises:
        NotAvailableError: If it cannot be compiled here.
    """
    if _LOADED:
        return False
    try:
        library = _library.load(hadamard_source())
    except _library.NoCompilerError as error:
        raise NotAvailableError(
            f"the kernel of the Walsh-Hadamard transform cannot be compiled: {error}; use kernel='torch', which needs "
            "no compiler."
        ) from error
    for dtype, function in ((torch.float32, library.hadamard_float), (torch.float64, library.hadamard_double)):
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_double]
        function.restype = None
        _LOADED[dtype] = function
    return True


def _on_processor(x: Tensor, scale: float) -> Tensor:
    """Transform the last axis with the compiled library; no derivatives."""
    if not _LOADED:
        compile_kernel()
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    _LOADED[x.dtype](x.data_ptr(), out.data_ptr(), x.numel() // size, size.bit_length() - 1, scale)
    return out


def _on_dao(x: Tensor, scale: float) -> Tensor:
    """Transform the last axis with the CUDA kernel of ``fast_hadamard_transform``; no derivatives."""
    out: Tensor = importlib.import_module("fast_hadamard_transform").hadamard_transform(x.contiguous(), scale)
    return out


_WAYS = {"processor": _on_processor, "dao": _on_dao}


# torch has no public name for these questions; where it has dropped them, the slower way serves everything
_nested = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_observed = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def _lowest(x: Tensor, scale: float, way: str) -> Tensor:
    """The transform of a tensor below all derivatives; with its name where a tracer watches, or there is no memory."""
    if not _observed():
        try:
            x.data_ptr()
        except RuntimeError:  # many gradients at once, `is_grads_batched`, come as a tensor without memory of its own
            pass
        else:
            return _WAYS[way](x, scale)
    named: Tensor = _operation(x, scale, way)
    return named


class _Linear(torch.autograd.Function):
    """The transform and its derivatives: it is linear and symmetric, so each of them is the transform again."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _apply(grads[0], ctx.scale, ctx.way), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _apply(tangents[0], ctx.scale, ctx.way)


class _Plain(_Linear):
    """Without what `torch.func` asks for, which takes longer than the transform of a small batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, way: str) -> Tensor:
        ctx.scale, ctx.way = scale, way
        return _lowest(x, scale, way)


class _Nested(_Linear):
    """Under the transforms of `torch.func`."""

    @staticmethod
    def forward(x: Tensor, scale: float, way: str) -> Tensor:
        return _lowest(x, scale, way)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, str], output: Tensor) -> None:
        ctx.scale, ctx.way = inputs[1:]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, scale: float, way: str) -> tuple[Tensor, int]:
        return _apply(x.movedim(in_dims[0] or 0, 0), scale, way), 0


def _apply(x: Tensor, scale: float, way: str) -> Tensor:
    """The transform with its derivatives, by the least work between Python and the kernel that the occasion allows."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, Parameter):
        named: Tensor = _operation(x, scale, way)
        return named
    function = _Nested if _nested() else _Plain
    out: Tensor = function.apply(x, scale, way)  # type: ignore[no-untyped-call]
    return out


# A compiled graph, a tracer or a counter of operations cannot look into a C function: for them it is one operation with
# a name. Without any the functions above do the same with less work between Python and the kernel.
@torch.library.custom_op("vifamily::hadamard", mutates_args=())
def _operation(x: Tensor, scale: float, way: str) -> Tensor:
    return _WAYS[way](x, scale)


@_operation.register_fake
def _(x: Tensor, scale: float, way: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_operation.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, scale: float, way: str) -> tuple[Tensor, int]:
    return _operation(x.movedim(in_dims[0] or 0, 0), scale, way), 0


def _keep(ctx: Any, inputs: tuple[Tensor, float, str], output: Tensor) -> None:
    ctx.scale, ctx.way = inputs[1:]


def _again(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _operation(grad, ctx.scale, ctx.way), None, None


_operation.register_autograd(_again, setup_context=_keep)


def _way(device: str, dtype: torch.dtype, size: int, kernel: str) -> str | None:
    """Which kernel serves; None for torch.

    Raises:
        NotAvailableError: If one was asked for and there is none for the device.
    """
    if kernel == "torch" or size < SMALLEST or size & (size - 1):
        return None
    if device == "cpu":
        handled = dtype in (torch.float32, torch.float64)
        return "processor" if handled and (kernel == "compiled" or _LOADED) else None
    if device == "cuda":
        if dtype != torch.float64 and size <= _DAO_LARGEST and _DAO_INSTALLED:
            return "dao"
        if kernel == "auto" or dtype != torch.float32:
            return None
        raise NotAvailableError(
            f"no kernel of the Walsh-Hadamard transform serves size {size} on this CUDA device: install "
            "fast_hadamard_transform, or use kernel='torch'."
        )
    return None


def hadamard(x: Tensor, *, orthonormal: bool = True, kernel: str = "auto") -> Tensor:
    r"""Walsh-Hadamard transform along the last axis, by a compiled kernel where one is asked for.

    .. math:: y = \bar H x, \qquad \bar H_{ij} = D^{-1/2} (-1)^{|i \wedge j|}.

    On a processor the kernel is C for float32 and float64, one row at a time on the calling thread. Half precision,
    sizes below 16 and devices without a kernel are left to torch. Derivatives of any order, forward and reverse,
    ``torch.vmap`` and, in reverse mode, ``torch.compile`` all hold.

    Args:
        x: ``(..., D)``, ``D`` a power of two.
        orthonormal: Whether to divide by ``sqrt(D)``.
        kernel: ``"torch"`` for the transform of `vifamily.numerics.hadamard`; ``"compiled"`` for a kernel, which is
            compiled on its first use; ``"auto"`` for a kernel where `compile_kernel` was called or, on a CUDA device,
            ``fast_hadamard_transform`` is installed, and torch otherwise and where a tracer watches.

    Returns:
        ``(..., D)`` in the dtype of ``x``.

    Raises:
        ConfigError: If the kernel is none of the three.
        NotAvailableError: If a kernel was asked for and cannot be had here.
        ShapeError: If the last axis is not a power of two, or there is none.

    Source: Fino and Algazi (1976), "Unified matrix treatment of the fast Walsh-Hadamard transform".

    Example:
        >>> hadamard(torch.tensor([1.0, 0.0, -1.0, 2.0]), orthonormal=False, kernel="torch")
        tensor([ 2., -2.,  0.,  4.])
    """
    if kernel not in KERNELS:
        raise ConfigError(f"kernel is one of {', '.join(KERNELS)}, got {kernel!r}.")
    size = x.shape[-1] if x.dim() else 0
    # a tracer that is not asked for the kernel is shown products, which it can take apart
    traced = kernel == "auto" and not torch.compiler.is_compiling() and _observed()
    way = None if traced else _way(x.device.type, x.dtype, size, kernel)
    if way is None:
        return torch_hadamard(x, orthonormal=orthonormal)
    scale = float(size) ** -0.5 if orthonormal else 1.0
    return _apply(x, scale, way)
