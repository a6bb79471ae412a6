"""Optimisers that scale each parameter: their kernel with scales held fixed, and which kernel predicts training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, NotAvailableError, ShapeError
from vifamily.ntk._loss import OutputLoss
from vifamily.ntk._network import trainable
from vifamily.ntk._tables import Printed
from vifamily.ntk.flow import predicted_flow, scaled_gap

__all__ = ["KernelComparison", "adam_scales", "compare_kernels"]

_CLOSE = 0.05


def adam_scales(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    r"""Factors by which Adam multiplies each parameter's gradient now, with the second moments held fixed.

    .. math:: D^{-1} = \frac{1}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    ``jacobian_gram(model, x, scales=adam_scales(model, optimiser))`` is the kernel :math:`J D^{-1} J^\top`, under which
    outputs move while the second moments stay as they are and time counts steps times their size. That is an
    approximation: moments go on moving, and Adam's momentum delays each gradient by about ``1 / (1 - beta_1)`` steps.

    Args:
        model: The network.
        optimiser: Its ``torch.optim.Adam``, ``AdamW`` or another that keeps ``exp_avg_sq``, after a step or more.

    Returns:
        Name of each trainable parameter to factors of its shape.

    Raises:
        ConfigError: If a parameter is not the optimiser's, or parameters have different step sizes.
        NotAvailableError: If the optimiser has no second moments, or not yet.

    Source: Kingma and Ba (2015), "Adam"; the kernel is that of preconditioned gradient flow.

    Example:
        >>> net = nn.Linear(2, 1, dtype=torch.float64)
        >>> adam = torch.optim.Adam(net.parameters(), eps=0.0)
        >>> net(torch.tensor([[2.0, 4.0]], dtype=torch.float64)).sum().backward()
        >>> adam.step()
        >>> adam_scales(net, adam)["weight"]  # one over the gradient
        tensor([[0.5000, 0.2500]], dtype=torch.float64)
    """
    if len({float(group["lr"]) for group in optimiser.param_groups}) > 1:
        raise ConfigError("parameters have step sizes of their own, so that there is no common time: give them one.")
    groups = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    names, out = trainable(model), {}
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        group, state = groups.get(id(parameter)), optimiser.state.get(parameter, {})
        if group is None:
            raise ConfigError(f"the optimiser does not train the parameter {name!r}: give the one that does.")
        second = state.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
        if second is None:
            raise NotAvailableError(
                f"{type(optimiser).__name__} has no second moments of {name!r}: it needs an optimiser like Adam, after "
                "its first step."
            )
        corrected = second / (1 - group["betas"][1] ** float(state["step"]))
        out[name] = 1 / (corrected.sqrt() + group["eps"])
    return out


@dataclasses.dataclass(frozen=True, repr=False)
class KernelComparison(Printed):
    """How well each of several kernels predicts a path of outputs.

    Attributes:
        gaps: Largest distance of the path from each kernel's prediction, over the way that the path makes, by name.
        best: The name of the nearest.
        notes: A sentence on what that means.
    """

    gaps: Mapping[str, float]
    best: str
    notes: tuple[str, ...]

    heading = "Which kernel predicts training"

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table, name and figure."""
        return [(name, f"{gap:.4g} of the way") for name, gap in self.gaps.items()]


def compare_kernels(
    kernels: Mapping[str, Tensor], loss: OutputLoss, outputs: Tensor, times: Tensor
) -> KernelComparison:
    r"""Hold a realised path of outputs against the flows that several kernels predict.

    Args:
        kernels: Name to Gram matrix ``(N q, N q)`` at the start, such as the plain one and that under Adam.
        loss: From outputs ``(N, q)`` to the loss of each input ``(N,)``.
        outputs: The path, ``(T, N, q)``, from the start.
        times: Its times ``(T,)``, from zero: steps times their size.

    Raises:
        ConfigError: If there is no kernel, or times do not ascend from zero.
        ShapeError: If shapes do not fit.
        DataError: If the loss is not finite on the way.
        NotAvailableError: If the path does not move, or a flow cannot be followed.

    Example:
        >>> y = torch.ones(1, 1, dtype=torch.float64)
        >>> times = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        >>> path = (1 - (-2 * times).exp()).reshape(3, 1, 1)
        >>> kernels = {"plain": torch.eye(1).double(), "twice": 2 * torch.eye(1).double()}
        >>> compare_kernels(kernels, lambda f: 0.5 * (f - y).square().sum(1), path, times).best
        'twice'
    """
    if not kernels:
        raise ConfigError("give one kernel or more by name.")
    if outputs.ndim != 3 or times.shape != outputs.shape[:1] or len(times) < 2:
        raise ShapeError(
            "the path must have shape (times, inputs, outputs) with two times or more and as many times, got "
            f"{tuple(outputs.shape)} and {tuple(times.shape)}."
        )
    if float(times[0]) != 0:
        raise ConfigError(f"the path must start at time zero, got {float(times[0]):g}.")
    if not float((outputs[-1] - outputs[0]).norm()) > 0:
        raise NotAvailableError("the path ends where it starts: there is nothing to predict.")
    gaps = {}
    for name, kernel in kernels.items():
        predicted = predicted_flow(kernel, loss, outputs[0], times).outputs
        gaps[name] = float(scaled_gap(predicted, outputs).max())
    best = min(gaps, key=lambda name: gaps[name] if math.isfinite(gaps[name]) else math.inf)
    said = f"The nearest is the kernel {best!r}: its flow stays within {gaps[best]:.2g} of the way of the outputs"
    note = f"{said}." if gaps[best] <= _CLOSE else f"{said}, which is no prediction: none of these kernels is at work."
    return KernelComparison(gaps, best, (note,))
