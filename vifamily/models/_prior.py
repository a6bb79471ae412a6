"""Priors as people of simulation-based inference give them: torch distributions, objects, samplers, by name or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, VonMises

from vifamily.errors import ConfigError, DataError, ModelError, ShapeError, SupportError
from vifamily.models._calls import call_seeded
from vifamily.supports import Layout
from vifamily.types import Space

__all__ = ["Prior"]

_NAME = "theta"
_ROUNDING = 1e-5


class Prior:
    """A prior with named parameters: their supports, draws and, where there is one, the log density.

    Args:
        given: A distribution, an object with ``sample(shape)`` (and ``log_prob``), a sampler ``(num_draws) -> draws``,
            or a dictionary of independent ones by name.
        parameters: Name to support, or to ``(shape, support)``; None reads them off distributions.
    """

    def __init__(self, given: Any, parameters: Mapping[str, Any] | None = None) -> None:
        self.named = isinstance(given, Mapping) or parameters is not None
        self.parts: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {_NAME: given}
        if not self.parts or not all(isinstance(name, str) for name in self.parts):
            raise ConfigError("a dictionary of priors maps names to at least one prior.")
        for name, part in self.parts.items():
            if not callable(getattr(part, "sample", part)):
                raise ConfigError(
                    f"the prior of {name!r} must be a torch distribution, an object with sample(shape), or a function "
                    f"of the number of draws, got {type(part).__name__}."
                )
        # one sampler may draw several named parameters at once
        self.joint = isinstance(given, Mapping) is False and parameters is not None
        self.layout = Layout.of(parameters if parameters is not None else self._read_off())
        self.space = self.layout.space
        self.has_log_prob = all(callable(getattr(part, "log_prob", None)) for part in self.parts.values())

    def _read_off(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, part in self.parts.items():
            drawn = self._draw(name, part, 2, torch.Generator().manual_seed(0))
            if isinstance(drawn, Mapping):
                raise ConfigError("a prior that draws named parameters needs their supports: parameters={name: ...}.")
            shape = tuple(drawn.shape[1:])
            support: Any = "real"
            if _is_von_mises(part):
                support = "circle"  # torch calls it real
            elif isinstance(part, Distribution) or hasattr(part, "support"):
                support = part.support
            if isinstance(part, MixtureSameFamily):
                support = part.component_distribution.support  # all components have it
            if support is None:
                support = "real"
            out[name] = (shape, support)
        return out

    def _draw(self, name: str, part: Any, num_draws: int, generator: torch.Generator) -> Any:
        sample = getattr(part, "sample", None)
        ask: Callable[..., Any] = part if sample is None else sample
        argument = num_draws if sample is None else torch.Size([num_draws])
        with torch.no_grad():
            drawn = call_seeded(f"the prior of {name!r}", ask, argument, generator=generator)
        if isinstance(drawn, Mapping):
            return {key: torch.as_tensor(value) for key, value in drawn.items()}
        try:
            out = torch.as_tensor(drawn)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ShapeError(f"the prior of {name!r} gave a {type(drawn).__name__} in place of a tensor.") from error
        if out.dim() == 0 or out.shape[0] != num_draws:
            raise ShapeError(
                f"the prior of {name!r} must give {num_draws} draws along its first axis, got {tuple(out.shape)}."
            )
        return out

    def draw(self, num_draws: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw named parameters ``(num_draws, *shape)`` in their supports.

        Raises:
            DataError: If a draw is not finite.
            ShapeError: If a shape is not as declared.
        """
        out: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            drawn = self._draw(name, part, num_draws, generator)
            out.update(drawn if isinstance(drawn, Mapping) else {name: drawn})
        if self.joint and set(out) == {_NAME} != set(self.layout.names):
            out = self.layout.unflatten(out[_NAME].reshape(num_draws, -1))
        for site in self.layout.sites:
            if site.name not in out or tuple(out[site.name].shape[1:]) != site.shape:
                got = tuple(out[site.name].shape) if site.name in out else "nothing"
                raise ShapeError(f"the prior must draw {site.name!r} of shape {(num_draws, *site.shape)}, got {got}.")
            if not bool(out[site.name].isfinite().all()):
                raise DataError(f"the prior drew values of {site.name!r} that are not finite.")
        return {name: out[name] for name in self.layout.names}

    def log_prob(self, theta: Mapping[str, Tensor]) -> Tensor:
        """Log density of named parameters ``(draw, *shape)`` in their own units, ``(draw,)``.

        Raises:
            ModelError: If user code raises.
            ShapeError: If it does not give one number per draw.
        """
        total: Tensor | None = None
        for name, part in self.parts.items():
            value = theta[name] if name in theta else self.layout.flatten(theta)
            if self.space is Space.CIRCLE:
                value = _turned(value, part)
            try:
                each = torch.as_tensor(part.log_prob(value))
            except (ValueError, RuntimeError, TypeError) as error:
                raise ModelError(f"the log density of the prior of {name!r} raised: {error}") from error
            if each.dim() == 0 or each.shape[0] != value.shape[0]:
                raise ShapeError(f"log_prob of the prior of {name!r} must give one number per draw, got {each.shape}.")
            each = each.flatten(1).sum(-1) if each.dim() > 1 else each
            total = each if total is None else total + each
        if total is None:
            raise SupportError("there are no parameters.")
        return total


def _is_von_mises(part: Any) -> bool:
    base = part.base_dist if isinstance(part, Independent) else part
    return isinstance(base, VonMises)


def _turned(angle: Tensor, part: Any) -> Tensor:
    """Angles turned to where a prior on an interval has its mass; others have a density of any turn."""
    support = getattr(part, "support", None)
    support = getattr(support, "base_constraint", support)
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if low is None or high is None:
        return angle
    least, most = torch.as_tensor(low).to(angle), torch.as_tensor(high).to(angle)
    moved: Tensor = least + torch.remainder(angle - least, 2 * math.pi)
    # a turn that rounding took past the end
    return torch.where((moved > most) & (moved - most < _ROUNDING), most, moved)
