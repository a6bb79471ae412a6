"""Several families of one kind, evaluated as one along a leading restart axis."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, NotAvailableError
from vifamily.families._base import Family
from vifamily.types import Capability, Draw, NoiseSpec

__all__ = ["StackedFamily"]


class _Call(nn.Module):
    """Makes any method callable through ``functional_call``; hides nothing and holds nothing but the family."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def forward(self, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "draw":
            draw = self.family(*arguments)
            return draw.z, torch.zeros(()) if draw.log_q is None else draw.log_q, draw.log_weight
        return getattr(self.family, method)(*arguments, **options)


class StackedFamily(nn.Module):
    """R families of one entry with parameters stacked along a leading axis; ``vmap`` runs over parameters only.

    Calls take and give a leading restart axis: noise ``(restart, draw, ...)``, draws ``(restart, draw, dim)``,
    ``log_prob`` of ``(restart, ..., dim)``. User code never sees it: models fold it into the draw axis.

    Args:
        members: Families built by one entry for one latent space.

    Raises:
        ConfigError: If there are none.
    """

    def __init__(self, members: Sequence[Family]) -> None:
        super().__init__()
        if not members:
            raise ConfigError("a stack of families needs at least one member.")
        _same_scale_shape(members)
        self.latent, self.spec = members[0].latent, members[0].spec
        self.vectorised = all(m.vectorised for m in members)
        self.size = len(members)
        self._names = [n for n, _ in members[0].named_parameters()]
        self._buffer_names = [n for n, _ in members[0].named_buffers()]
        for i, name in enumerate(self._names):
            stacked = torch.stack([dict(m.named_parameters())[name].detach() for m in members])
            self.register_parameter(f"p{i}", nn.Parameter(stacked))
        for i, name in enumerate(self._buffer_names):
            self.register_buffer(f"b{i}", torch.stack([dict(m.named_buffers())[name] for m in members]))
        # kept out of the module tree: its own parameters are only a template
        self._template = [_Call(copy.deepcopy(members[0]))]
        self._members = [copy.deepcopy(m) for m in members]

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What each member can do."""
        return self._members[0].capabilities

    @property
    def restart_shape(self) -> tuple[int, ...]:
        """The leading axis of noise, draws and losses; what carries a state gives it one row per restart."""
        return (self.size,)

    @property
    def noise_spec(self) -> NoiseSpec:
        """Base noise of one draw of one member."""
        return self._members[0].noise_spec

    def __getattr__(self, name: str) -> Any:
        # the affine maps of the members, with a leading restart axis
        if name in ("shift", "scale") and name in self.__dict__.get("_buffer_names", ()):
            return super().__getattr__(f"b{self._buffer_names.index(name)}")
        return super().__getattr__(name)

    def fewest_fixed_draws(self) -> int | None:
        """What each member says."""
        return self._members[0].fewest_fixed_draws()

    def inverse_curvatures(self) -> list[dict[str, float | Tensor] | None]:
        """What each member says, with the names that the parameters have in the stack."""
        place = {name: f"p{i}" for i, name in enumerate(self._names)}
        said = [member.inverse_curvature() for member in self._members]
        return [None if one is None else {place[name]: value for name, value in one.items()} for one in said]

    def _state(self) -> dict[str, Tensor]:
        state = {"family." + n: getattr(self, f"p{i}") for i, n in enumerate(self._names)}
        state.update({"family." + n: getattr(self, f"b{i}") for i, n in enumerate(self._buffer_names)})
        return state

    def _each(self, method: str, *arguments: Tensor, **options: Any) -> Any:
        template = self._template[0]

        def one(state: dict[str, Tensor], *arguments: Tensor) -> Any:
            return torch.func.functional_call(template, state, (method, *arguments), options)

        state = self._state()
        if self.vectorised:
            return torch.vmap(one, in_dims=(0,) * (1 + len(arguments)))(state, *arguments)
        parts = [one({k: v[r] for k, v in state.items()}, *(a[r] for a in arguments)) for r in range(self.size)]
        if isinstance(parts[0], tuple):
            return tuple(torch.stack(column) for column in zip(*parts, strict=True))
        return torch.stack(parts)

    def forward(self, noise: Tensor, context: Tensor | None = None) -> Draw:
        """Map noise ``(restart, draw, ...)`` to draws ``(restart, draw, dim)``."""
        if context is not None:
            raise NotAvailableError("restarts of conditional families run one after the other, not stacked.")
        z, log_q, log_weight = self._each("draw", noise)
        return Draw(z, log_q if Capability.LOG_Q in self.capabilities else None, log_weight)

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, frozen: bool = False) -> Tensor:
        """Log density, ``(restart, ..., dim) -> (restart, ...)``."""
        out: Tensor = self._each("log_prob", z, frozen=frozen)
        return out

    def entropy(self, context: Tensor | None = None) -> Tensor:
        """Closed-form entropies, ``(restart,)``."""
        out: Tensor = self._each("entropy")
        return out

    def moments(self) -> tuple[Tensor, Tensor]:
        """Closed-form means ``(restart, dim)`` and covariances ``(restart, dim, dim)``."""
        mean, covariance = self._each("moments")
        return mean, covariance

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Closed-form means and variances of each coordinate, ``(restart, dim)``."""
        mean, variance = self._each("marginals")
        return mean, variance

    def subset(self, rows: Sequence[int]) -> Family | StackedFamily:
        """Some of the members as a stack of their own, or the one member alone; copies."""
        members = self.members()
        return members[rows[0]] if len(rows) == 1 else StackedFamily([members[row] for row in rows])

    def standard_moments(self) -> tuple[Tensor, Tensor]:
        """Closed-form means and covariances in standardised coordinates, with a leading restart axis."""
        mean, covariance = self._each("standard_moments")
        return mean, covariance

    def particles(self) -> Tensor:
        """Members' particles in standardised coordinates, ``(restart, size, dim)``."""
        return torch.stack([member.particles() for member in self.members()])  # type: ignore[operator]

    @torch.no_grad()
    def set_particles(self, points: Tensor) -> None:
        """Put each member's particles at standardised coordinates, ``(restart, size, dim)``."""
        for r, member in enumerate(self.members()):
            member.set_particles(points[r])  # type: ignore[operator]
            self._take(r, member)

    def to_standard(self, z: Tensor) -> Tensor:
        """Map ``z`` ``(restart, ..., dim)`` to standardised coordinates."""
        out: Tensor = self._each("to_standard", z)
        return out

    def coordinate_scale(self) -> Tensor:
        """Size of a standardised unit in each coordinate, ``(restart, dim)``."""
        out: Tensor = self._each("coordinate_scale")
        return out

    def to_latent(self, u: Tensor) -> Tensor:
        """Map standardised coordinates ``(restart, ..., dim)`` to ``z``."""
        out: Tensor = self._each("to_latent", u)
        return out

    @torch.no_grad()
    def start_at(self, mean: Tensor, scale: Tensor) -> None:
        """Set each member to a Gaussian in standardised coordinates, ``(restart, dim)`` and ``(restart, ...)``."""
        for r, member in enumerate(self.members()):
            member.start_at(mean[r], scale[r])
            self._take(r, member)

    def _take(self, row: int, member: Family) -> None:
        """Copy a family's parameters into its row."""
        for i, name in enumerate(self._names):
            getattr(self, f"p{i}")[row] = member.get_parameter(name)

    @torch.no_grad()
    def adopt(self, row: int, member: Family) -> None:
        """Make one member a copy of a family, its affine map as well: parameters mean nothing without the map."""
        for i, name in enumerate(self._buffer_names):
            value = member.get_buffer(name)
            getattr(self, f"b{i}")[row] = value
            self._members[row].get_buffer(name).copy_(value)
        self._take(row, member)

    @torch.no_grad()
    def members(self) -> list[Family]:
        """Return the families one by one, as copies."""
        out = []
        for r, member in enumerate(self._members):
            one = copy.deepcopy(member)
            for i, name in enumerate(self._names):
                one.get_parameter(name).copy_(getattr(self, f"p{i}")[r])
            out.append(one)
        return out


def _same_scale_shape(members: Sequence[Family]) -> None:
    """Write per-coordinate maps as matrices when another member has a full one, so that all stack."""
    if len({m.scale.dim() for m in members}) > 1:
        for m in members:
            if m.scale.dim() == 1:
                m.scale = torch.diag(m.scale)
