"""Operator variational inference: a family against a test function that is learned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, NotAvailableError
from vifamily.objectives._base import Caps, Objective, ValueKind, weighted_sum
from vifamily.objectives._critics import Critic, Perceptron
from vifamily.objectives._operators import OPERATORS, LangevinStein, OperatorRule
from vifamily.registry import register
from vifamily.rng import generator
from vifamily.types import Batch, Capability, FamilyLike, GameState, Loss, ModelLike, Space

__all__ = ["Operator"]

_DISTANCES = ("auto", "penalised", "square", "identity")
_TRACES = ("auto", "exact", "hutchinson")


@register("objectives", "operator")
@dataclasses.dataclass(frozen=True)
class Operator(Objective):
    r"""Operator variational inference: a family descends, and a test function ascends, on one expectation.

    An operator :math:`O^{p,q}`, a class of test functions F and a distance t make an objective,

    .. math:: \mathcal{L}(q) = \sup_{f \in F} t\bigl(\mathbb{E}_q[(O^{p,q} f)(z)]\bigr).

    - ``langevin_stein``: :math:`(O f)(z) = \nabla \log p(z)^T f(z) + \nabla \cdot f(z)`. It needs no density of q, so
      that q may be any differentiable sampler. f is a network (the critic), and the fit is a game, driven by the solver
      ``two_player``.
    - ``kl``: :math:`\log q(z) - \log p(x, z)`, without a test function: the loss of ``elbo``.

    The distance is ``penalised`` by default,

    .. math:: V(q, f) = \mathbb{E}_q[(O f)(z)] - \tau \, \mathbb{E}_q |f(z)|^2, \qquad
              f^* = \frac{\nabla \log p - \nabla \log q}{2 \tau}, \qquad
              4 \tau \sup_f V = \mathbb{E}_q |\nabla \log p - \nabla \log q|^2,

    so that it minimises the Fisher divergence without the score of q. The penalty is differentiated with respect to q
    too: without that, q moves by the gradient of something else. ``square`` is the published distance
    :math:`t(a) = a^2`, as the product of two means over independent halves of the draws, which makes its gradients
    unbiased; f is then bounded by ``max_norm`` only. Both gradients are those of reparameterised draws. Everything is
    computed in the family's standardised coordinates, so that nothing depends on the units of the latents: the
    divergence is weighted by the square of their scale.

    **Bias.** At a fixed f value and gradient of the penalised form are unbiased, also on minibatches: the operator is
    linear in :math:`\log p`. Its value is a lower bound on the divergence, and that of the draws on which the critic
    was trained is not to be taken for it: the solver reports the divergence on fresh draws with a critic trained on.
    The squared form refuses minibatches, which would need two independent ones.

    **Blind to.** The weights of separate modes: the score is the same for all of them where q has its mass. A family
    that can represent any weights gets them from its start, not from the data.

    **Fails when.** q starts where the score says nothing: a narrow q at a stationary point of p stays there, so start
    samplers wide; the critic is too small for :math:`\nabla \log p - \nabla \log q`, and q settles where the critic
    sees no difference; the family moves faster than the critic follows. Bounded latents are safe, since the package
    maps them to unconstrained space. ReLU networks inside p have no second derivatives to descend on. The squared form
    stalls wherever its expectation passes zero, far from the optimum too.

    Source: Ranganath, Altosaar, Tran and Blei (2016), arXiv 1610.09033, equations 3 to 8; the penalised form after
    Grathwohl et al. (2020), with the gradient of the penalty, which their setting does not have.

    Args:
        operator: ``"langevin_stein"``, ``"kl"``, or an object of a class of one's own that derives from
            ``OperatorRule``.
        distance: ``"penalised"`` or ``"square"`` with a test function, ``"identity"`` without; ``"auto"`` takes the
            first that fits.
        penalty: tau of the penalised form; None takes 0.5.
        hidden: Widths of the critic's hidden layers; None takes two of four times the dimension, between 32 and 256.
        critic: A function from the number of coordinates to a module that maps points ``(draw, dim)`` to a field of
            that shape, draw by draw, in place of the network; None for the network.
        max_norm: Largest norm of each unit's incoming weights; None bounds the squared form by 2, and nothing else.
        trace: ``"exact"`` divergence, ``"hutchinson"`` (an estimate with random signs), or ``"auto"``: exact where it
            is cheap, which with up to two hidden layers it always is, and otherwise up to ten coordinates.
        probes: Directions of the estimate.

    Raises:
        ConfigError: If an option is not one of these, or two do not go together.

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("correlated_normal", "full_rank", "operator", steps=100, seed=0)
        >>> posterior.record.solver
        'two_player'
    """

    operator: Any = "langevin_stein"
    distance: str = "auto"
    penalty: float | None = None
    hidden: Sequence[int] | None = None
    critic: Callable[[int], nn.Module] | None = None
    max_norm: float | None = None
    trace: str = "auto"
    probes: int = 1

    # what holds for the default; an instance has what its operator and distance make of it
    needs_model: ClassVar[Caps] = LangevinStein.needs_model
    needs_family: ClassVar[Caps] = LangevinStein.needs_family | {Capability.DRAWS}
    spaces: ClassVar[frozenset[Space]] = frozenset({Space.REAL})
    value_kind: ClassVar[ValueKind] = "surrogate"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "unbiased"
    value_gradient: ClassVar[bool] = True
    blind_to_mode_weights: ClassVar[bool] = True
    freezes_model: ClassVar[bool] = True
    own_solver: ClassVar[str | None] = "two_player"
    default_draws: ClassVar[int] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = self._checked_rule()
        self._check_numbers()
        distance = self._checked_distance(rule)
        square, game = distance == "square", rule.has_test_function
        for name, value in {
            "rule": rule,
            "form": distance,
            "needs_model": rule.needs_model,
            "needs_family": rule.needs_family | {Capability.DRAWS},
            "value_kind": "surrogate" if game else "lower_bound",
            "subsampling": "unbiased" if rule.linear_in_log_p and not square else "no",
            "blind_to_mode_weights": rule.blind_to_mode_weights,
            "freezes_model": rule.blind_to_mode_weights,
            "own_solver": "two_player" if game else None,
            "min_draws": 2 if square else 1,
            "default_draws": 128 if game else 16,
        }.items():
            object.__setattr__(self, name, value)

    def _checked_rule(self) -> OperatorRule:
        if isinstance(self.operator, OperatorRule):
            return self.operator
        if not isinstance(self.operator, str) or self.operator not in OPERATORS:
            raise ConfigError(f"operator must be one of {', '.join(OPERATORS)}, or an operator, got {self.operator!r}.")
        return OPERATORS[self.operator]()

    def _check_numbers(self) -> None:
        for name, least in (("penalty", 0.0), ("max_norm", 0.0)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and least < value < math.inf):
                raise ConfigError(f"operator({name}=...) must be a positive number, got {value!r}.")
        if isinstance(self.probes, bool) or not isinstance(self.probes, int) or self.probes < 1:
            raise ConfigError(f"operator(probes=...) must be a positive integer, got {self.probes!r}.")
        if self.trace not in _TRACES:
            raise ConfigError(f"trace must be one of {', '.join(_TRACES)}, got {self.trace!r}.")
        if self.hidden is not None:
            widths = tuple(self.hidden) if isinstance(self.hidden, (list, tuple)) else (self.hidden,)
            if any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in widths):
                raise ConfigError(f"hidden must be a list of positive integers such as [32, 32], got {self.hidden!r}.")
            object.__setattr__(self, "hidden", widths)
        if self.critic is not None and (not callable(self.critic) or isinstance(self.critic, nn.Module)):
            raise ConfigError(
                "critic must be a function from the number of coordinates to a module, so that each restart has its "
                f"own; got {type(self.critic).__name__}."
            )
        if self.critic is not None and (self.hidden is not None or self.max_norm is not None):
            raise ConfigError("hidden and max_norm describe the package's critic: leave them out beside critic=.")

    def _checked_distance(self, rule: OperatorRule) -> str:
        if self.distance not in _DISTANCES:
            raise ConfigError(f"distance must be one of {', '.join(_DISTANCES)}, got {self.distance!r}.")
        fitting = ("penalised", "square") if rule.has_test_function else ("identity",)
        if self.distance not in ("auto", *fitting):
            raise ConfigError(
                f"the operator {rule.name!r} goes with distance={' or '.join(map(repr, fitting))}, "
                f"got {self.distance!r}."
            )
        chosen = fitting[0] if self.distance == "auto" else self.distance
        if self.penalty is not None and chosen != "penalised":
            raise ConfigError(f"penalty belongs to distance='penalised', and this is {chosen!r}: leave it out.")
        return chosen

    rule: ClassVar[OperatorRule]
    form: ClassVar[str]

    @property
    def tau(self) -> float:
        """Weight of the penalty."""
        return 0.5 if self.penalty is None else self.penalty

    @property
    def linear_in_draws(self) -> bool:
        """Whether the value is a mean over draws: not the product of two."""
        return self.form != "square"

    @property
    def renyi_order(self) -> float | None:
        """Reverse KL is of order 1; the Fisher divergence is of no order."""
        return None if self.rule.has_test_function else 1.0

    def missing(self, model: Caps, family: Caps, space: Space = Space.REAL) -> tuple[str, ...]:
        """Return what a pair lacks (see :class:`Objective`)."""
        out = list(super().missing(model, family, space))
        if self.rule.has_test_function and Capability.LOCAL in model:
            out.append(f"model: no {Capability.LOCAL}")
        if self.form == "square" and Capability.WEIGHTED in family:
            out.append(f"family: no {Capability.WEIGHTED}")
        return tuple(out)

    def init_state(self, model: Any, family: Any, *, generator: torch.Generator) -> GameState | None:
        """Build the critic, one for each restart; all begin alike."""
        if not self.rule.has_test_function:
            return None
        shift, scale, full = _affine_map(model, family)
        dim = int(model.dim)

        def make(size: int) -> nn.Module:
            if self.critic is not None:
                return self.critic(size)
            width = min(256, max(32, 4 * size))
            bound = 2.0 if self.form == "square" and self.max_norm is None else self.max_norm
            return Perceptron(size, self.hidden or (width, width), generator, dtype=shift.dtype, device=shift.device,
                              max_norm=bound)  # fmt: skip

        seed = int(torch.randint(2**62, (), generator=generator))
        return GameState(Critic(make, dim, shift, scale, full=full), seed)

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the value of the game at the critic in ``state`` (see :class:`Objective`).

        The family descends on the surrogate, the critic ascends on it.

        Raises:
            NotAvailableError: If there is a second player and ``state`` is not what :meth:`init_state` returns.
        """
        draw = family(noise)
        if not self.rule.has_test_function:
            value = weighted_sum(draw.log_weight, self.rule.values(draw, model, batch, None, None)[0])
            return Loss(value, value.detach())
        if not isinstance(state, GameState):
            raise NotAvailableError("this objective is a game: give the state that init_state returns, with a critic.")
        probes = self._probes(draw.z, state)
        each, size = self.rule.values(draw, model, batch, state.critic, probes)
        following = dataclasses.replace(state, step=state.step + 1)
        if self.form == "square":
            first, second = (half.mean(-1) for half in each.tensor_split(2, dim=-1))
            value = first * second
            return Loss(value, value.detach(), {"operator": (0.5 * (first + second)).detach()}, following)
        if size is None:
            raise NotAvailableError("the penalised distance needs the size of the test function from the operator.")
        mean = weighted_sum(draw.log_weight, each)
        penalty = -self.tau * weighted_sum(draw.log_weight, size)
        value = mean + penalty
        return Loss(value, value.detach(), {"operator": mean.detach(), "penalty": penalty.detach()}, following)

    def _probes(self, z: Tensor, state: GameState) -> Tensor | None:
        """Random signs for the trace, addressed by the state: the loss has no randomness of its own."""
        critic: Any = state.critic
        if self.trace == "exact" or (self.trace == "auto" and critic.exact_trace_is_cheap()):
            return None
        source = generator(state.seed, "probes", state.step)
        # one set for all restarts, as if each ran alone
        bits = torch.randint(2, (z.shape[-2], self.probes, z.shape[-1]), generator=source)
        return (2 * bits - 1).to(z)


def _affine_map(model: Any, family: Any) -> tuple[Tensor, Tensor, bool]:
    """Shift and scale of a family or a stack, and whether the scale is a matrix; the identity where it has none."""
    shift, scale = getattr(family, "shift", None), getattr(family, "scale", None)
    if not isinstance(shift, Tensor) or not isinstance(scale, Tensor):
        zeros = torch.zeros(int(model.dim), dtype=model.dtype, device=getattr(model, "device", None))
        return zeros, torch.ones_like(zeros), False
    return shift, scale, scale.dim() > shift.dim()
