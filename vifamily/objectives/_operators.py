"""Operators of operator variational inference: what they compute at a draw, and what they need for it.

An operator turns a test function f into ``(O f)(z)``, a number at each draw of q, whose expectation under q is zero for
all f when q is the posterior (closeness), and which needs the target up to a constant only (tractability).
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor

from vifamily.errors import ModelError, NotAvailableError
from vifamily.objectives._base import Caps, log_ratio_parts
from vifamily.types import Batch, Capability, Draw, ModelLike

__all__ = ["OPERATORS", "KullbackLeibler", "LangevinStein", "OperatorRule", "scores"]


def scores(model: ModelLike, z: Tensor, batch: Batch | None) -> Tensor:
    """Gradient of the log joint at points ``(..., dim)``, itself differentiable where the points carry a gradient.

    Raises:
        ModelError: If the log joint does not depend on its points as far as torch can tell.
    """
    wanted = torch.is_grad_enabled() and z.requires_grad
    with torch.enable_grad():
        at = z if z.requires_grad else z.detach().requires_grad_()
        value = model.log_joint(at, batch)
        if not value.requires_grad:
            raise ModelError("the log joint gives no gradient with respect to its points: compute it with torch.")
        (out,) = torch.autograd.grad(value.sum(), at, create_graph=wanted)
    # where the density is zero or undefined its gradient may still be a number, zero most often, and would pass
    return out + (0.0 * value.detach()).unsqueeze(-1)


class OperatorRule(abc.ABC):
    """An operator ``O^{p,q}``: its needs as flags, and its values at draws."""

    name: ClassVar[str]
    has_test_function: ClassVar[bool] = True
    """Whether it acts on a test function; otherwise there is no second player."""
    needs_log_q: ClassVar[bool] = False
    """Whether it evaluates the density of q."""
    linear_in_log_p: ClassVar[bool] = True
    """Whether it is linear in ``log p``, so that minibatches leave it unbiased."""
    blind_to_mode_weights: ClassVar[bool] = False
    """Whether it sees the target through its score alone."""
    needs_model: ClassVar[Caps] = frozenset({Capability.LOG_JOINT})
    needs_family: ClassVar[Caps] = frozenset()

    @abc.abstractmethod
    def values(
        self, draw: Draw, model: ModelLike, batch: Batch | None, critic: Any, probes: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluate the operator at draws.

        Args:
            draw: Draws of the family.
            model: The model.
            batch: The data to use, or None for all.
            critic: The test function with its divergence (see :class:`~vifamily.objectives._critics.Critic`), or None.
            probes: Directions for an estimate of the divergence, or None for the exact one.

        Returns:
            ``(O f)(z)`` and ``|f(z)|^2``, each ``([restart,] draw)``; the second None without a test function.
        """


class LangevinStein(OperatorRule):
    r"""``s_p(z)^T f(z) + div f(z)`` with the score :math:`s_p = \nabla \log p`; needs no density of q."""

    name = "langevin_stein"
    blind_to_mode_weights = True
    needs_model = frozenset({Capability.LOG_JOINT, Capability.SCORE, Capability.SECOND_ORDER})
    needs_family = frozenset({Capability.REPARAMETERISED})

    def values(
        self, draw: Draw, model: ModelLike, batch: Batch | None, critic: Any, probes: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluate it in the critic's standardised coordinates (see :class:`OperatorRule`)."""
        field, divergence = critic(draw.z, probes)
        score = critic.standard_score(scores(model, draw.z, batch))
        return (score * field).sum(-1) + divergence, field.square().sum(-1)


class KullbackLeibler(OperatorRule):
    """``log q(z) - log p(x, z)``: no test function, and a non-negative expectation up to the log evidence."""

    name = "kl"
    has_test_function = False
    needs_log_q = True
    needs_model = frozenset({Capability.LOG_JOINT, Capability.SCORE})
    needs_family = frozenset({Capability.REPARAMETERISED, Capability.LOG_Q})

    def values(
        self, draw: Draw, model: ModelLike, batch: Batch | None, critic: Any, probes: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluate it (see :class:`OperatorRule`)."""
        log_p, local_log_q, _ = log_ratio_parts(model, draw, batch)
        if draw.log_q is None:
            raise NotAvailableError("the operator 'kl' needs the log density of the draws, and the family gave none.")
        return (draw.log_q if local_log_q is None else draw.log_q + local_log_q) - log_p, None


OPERATORS: dict[str, type[OperatorRule]] = {rule.name: rule for rule in (LangevinStein, KullbackLeibler)}
