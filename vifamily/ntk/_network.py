"""A module as a function of its parameters, and what is refused of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from vifamily.errors import ConfigError, DeviceError, ShapeError

__all__ = ["check_inputs", "outputs_of", "pushed", "trainable"]

_RANDOM_OR_COUPLED = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that the kernel differentiates by: those that require a gradient, each tied one once.

    Raises:
        ConfigError: If there are none, or a layer is random or mixes the inputs of a batch.
    """
    for name, module in model.named_modules():
        if module.training and isinstance(module, _RANDOM_OR_COUPLED):
            raise ConfigError(
                "the tangent kernel needs a network that is a fixed function of one input, got "
                f"{type(module).__name__} {name!r} in training mode. Call model.eval() first."
            )
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ConfigError("the network has no parameter that requires a gradient, so its tangent kernel is zero.")
    return found


def check_inputs(parameters: dict[str, Tensor], *inputs: Tensor) -> None:
    """Refuse inputs without a batch axis, empty ones and those of another dtype or device.

    Raises:
        ShapeError: If there is no input, or no axis of inputs.
        DeviceError: If the device or the floating dtype is not that of the parameters.
    """
    first = next(iter(parameters.values()))
    for x in inputs:
        if x.ndim < 1 or x.shape[0] == 0:
            raise ShapeError(f"inputs need shape (inputs, ...) with at least one input, got {tuple(x.shape)}.")
        if x.device != first.device or (x.is_floating_point() and x.dtype != first.dtype):
            raise DeviceError(
                f"inputs are {x.dtype} on {x.device} and the parameters {first.dtype} on {first.device}: "
                "convert one of them, best both to float64."
            )


def outputs_of(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """Outputs ``(inputs, output)``; a network with one output may leave that axis out.

    Raises:
        ShapeError: If the output has another shape.
    """
    out = functional_call(model, parameters, (x,))
    if not isinstance(out, torch.Tensor) or out.ndim not in (1, 2) or out.shape[0] != x.shape[0]:
        got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ShapeError(
            f"the network must give (inputs, outputs) or (inputs,) for {x.shape[0]} inputs, got {got}. Flatten it."
        )
    return out.reshape(x.shape[0], -1)


def pushed(
    function: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor], tangent: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Value of a function of the parameters, and its derivative along a tangent, by forward differentiation."""
    with warnings.catch_warnings():
        # the first use of forward derivatives makes torch load code of its own that it has deprecated
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        value, change = jvp(function, (parameters,), (tangent,))[:2]
    return value, change
