"""Supports of named parameters, and the map between them and unconstrained space.

Supports are torch's own constraints; each parameter is moved to unconstrained space by torch's bijection for its
constraint (exponential, sigmoid, stick-breaking …), with the few that torch lacks from
:mod:`vifamily.numerics.bijections`. A :class:`Layout` holds the parameters of a model and their places in one vector.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from vifamily.errors import ConfigError, ShapeError, SupportError, VifamilyError
from vifamily.numerics.constraint_kinds import (
    MATRICES,
    constraint_of,
    describe_support,
    event_dim_of,
    is_fixed,
    is_interval,
    make_bijection,
    plain_of,
    support_from,
)
from vifamily.types import Space

__all__ = ["Layout", "Site", "describe_support", "support_from"]


@dataclasses.dataclass(frozen=True)
class Site:
    """One named parameter.

    Attributes:
        name: Its name.
        shape: Its constrained shape, ``()`` for a number.
        support: Its support.
        start: Where its unconstrained coordinates start in ``z``.
    """

    name: str
    shape: tuple[int, ...]
    support: Constraint
    start: int = 0

    def __post_init__(self) -> None:
        """Check the shape against the support."""
        plain: dict[str, Any] = self.plain
        shape: tuple[Any, ...] = self.shape
        name: Any = self.name
        if not isinstance(name, str) or not name:
            raise ConfigError(f"a parameter's name must be a non-empty string, got {name!r}.")
        if any(not isinstance(n, int) or n < 1 for n in shape):
            raise ShapeError(f"the shape of parameter {self.name!r} must hold positive integers, got {shape}.")
        kind, need = plain["kind"], event_dim_of(plain)
        if len(shape) < need or (kind == "simplex" and shape[-1] < 2) or (kind in MATRICES and shape[-1] != shape[-2]):
            wanted = "(..., n, n)" if need == 2 else "(..., n)" + (" with n of 2 or more" if kind == "simplex" else "")
            raise ShapeError(
                f"parameter {self.name!r} with support {kind} needs a shape {wanted}, got {shape}. "
                "Give it as (shape, support)."
            )
        if kind.startswith("corr_") and shape[-1] < 2:
            raise ShapeError(
                f"parameter {self.name!r} with support {kind} needs a matrix of at least 2 by 2, got {shape}."
            )
        if kind in ("stack", "cat"):
            self._check_parts(plain)
        for key in ("lower_bound", "upper_bound"):
            bound = torch.as_tensor(plain.get(key, 0.0))
            try:
                fits = torch.broadcast_shapes(bound.shape, shape) == torch.Size(shape)
            except RuntimeError:
                fits = False
            if not fits:
                raise ShapeError(
                    f"the {key.replace('_', ' ')} of parameter {self.name!r} has shape {tuple(bound.shape)}, "
                    f"which does not fit {shape}."
                )

    def _check_parts(self, plain: Mapping[str, Any]) -> None:
        length = len(plain["of"]) if plain["kind"] == "stack" else sum(plain["lengths"])
        if not -len(self.shape) <= plain["dim"] < 0 or self.shape[plain["dim"]] != length:
            raise ShapeError(
                f"parameter {self.name!r} has shape {self.shape}, but its support {plain['kind']} covers {length} "
                f"along axis {plain['dim']}."
            )

    @functools.cached_property
    def plain(self) -> dict[str, Any]:
        """The support as plain data."""
        plain = plain_of(self.support)
        if plain.get("dim", -1) >= 0:
            plain["dim"] -= len(self.shape)  # counted from the end, so that leading axes do not move it
        return plain

    @functools.cached_property
    def unconstrained_shape(self) -> tuple[int, ...]:
        """Shape of the unconstrained coordinates."""
        kind = self.plain["kind"]
        if kind in MATRICES or kind == "simplex":
            return tuple(self._transform.inverse_shape(self.shape))
        return self.shape

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates."""
        return math.prod(self.unconstrained_shape)

    @property
    def stop(self) -> int:
        """Where its unconstrained coordinates end in ``z``."""
        return self.start + self.size

    @property
    def num_categories(self) -> int | None:
        """Number of values of a discrete parameter, None for a continuous one."""
        if self.plain["kind"] != "integer_interval":
            return None
        return int(self.plain["upper_bound"] - self.plain["lower_bound"]) + 1

    @functools.cached_property
    def _transform(self) -> Transform:
        return make_bijection(self.plain, self.shape, torch.float64, torch.device("cpu"))

    @functools.cached_property
    def _moved(self) -> dict[tuple[torch.dtype, torch.device], Transform]:
        return {}

    @functools.cached_property
    def _fixed(self) -> bool:
        return is_fixed(self.plain)

    @functools.cached_property
    def _is_real(self) -> bool:
        return bool(self.plain["kind"] == "real")

    def bijection(self, like: Tensor) -> Transform:
        """Return the transform from unconstrained space, for tensors like the given one."""
        if self._fixed:
            return self._transform
        key = (like.dtype, like.device)
        if key not in self._moved:
            self._moved[key] = make_bijection(self.plain, self.shape, *key)
        return self._moved[key]

    def take(self, z: Tensor) -> Tensor:
        """Return its coordinates, ``(..., dim) -> (..., *unconstrained_shape)``."""
        shape = self.unconstrained_shape
        if not shape:
            return z[..., self.start]
        part = z[..., self.start : self.stop]
        return part if len(shape) == 1 else part.reshape(*z.shape[:-1], *shape)

    def to_json(self) -> dict[str, Any]:
        """Return the site as plain data."""
        return {"name": self.name, "shape": list(self.shape), "support": self.plain}


class Layout:
    """Named parameters, their supports, and their places in one unconstrained vector ``z``.

    Args:
        sites: The parameters, in order; their places are assigned here. There may be none (a model whose latents are
            all local has no global ones).

    Raises:
        ConfigError: If two share a name.

    Example:
        >>> layout = Layout.of({"mu": "real", "tau": ((2,), "positive")})
        >>> layout.dim, layout.columns()
        (3, ['mu', 'tau[0]', 'tau[1]'])
        >>> theta, log_jacobian = layout.constrain_with_jacobian(torch.tensor([[1.0, 0.0, 2.0]]))
        >>> theta["mu"].shape, theta["tau"].shape, log_jacobian
        (torch.Size([1]), torch.Size([1, 2]), tensor([2.]))
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        placed, start = [], 0
        for site in sites:
            placed.append(dataclasses.replace(site, start=start))
            start = placed[-1].stop
        self.sites: tuple[Site, ...] = tuple(placed)
        self.dim = start
        self.names = tuple(site.name for site in self.sites)
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"parameters must have different names, got {', '.join(self.names)}.")

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Layout:
        """Build a layout from ``name -> support`` or ``name -> (shape, support)``.

        Raises:
            SupportError: If a support is unknown.
            ShapeError: If a shape is not one of positive integers, or does not suit its support.
        """
        sites = []
        for name, value in parameters.items():
            shape, support = value if isinstance(value, (tuple, list)) and len(value) == 2 else ((), value)
            shape = (shape,) if isinstance(shape, int) else shape
            if isinstance(support, (tuple, list)) or not isinstance(shape, (tuple, list)):
                raise SupportError(
                    f"parameter {name!r} must be given as a support or as (shape, support), got {value!r}."
                )
            sites.append(Site(name, tuple(shape), support_from(support)))
        return cls(sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise ConfigError(f"no parameter is called {name!r}; there are {', '.join(self.names)}.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.names, self.dim))

    def __repr__(self) -> str:
        shapes = [str(list(s.shape)) if s.shape else "" for s in self.sites]
        parts = [f"{s.name}{n}: {describe_support(s.support)}" for s, n in zip(self.sites, shapes, strict=True)]
        return f"Layout({', '.join(parts)})"

    # -- maps ----------------------------------------------------------------------------------------------------------
    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Map ``(..., dim)`` to named parameters ``(..., *shape)``."""
        self._check_z(z)
        return {s.name: s.take(z) if s._is_real else s.bijection(z)(s.take(z)) for s in self.sites}

    def constrain_with_jacobian(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Map ``(..., dim)`` to named parameters, with ``log |d theta / d z|`` summed over parameters, ``(...)``."""
        self._check_z(z)
        theta: dict[str, Tensor] = {}
        total: Tensor | None = None
        for site in self.sites:
            x = site.take(z)
            if site._is_real:
                theta[site.name] = x
                continue
            transform = site.bijection(z)
            y = transform(x)
            theta[site.name] = y
            part = transform.log_abs_det_jacobian(x, y)
            extra = part.dim() - (z.dim() - 1)
            if extra:
                part = part.sum(tuple(range(-extra, 0)))
            total = part if total is None else total + part
        return theta, z.new_zeros(z.shape[:-1]) if total is None else total

    def unconstrain(self, theta: Mapping[str, Any]) -> Tensor:
        """Map named parameters ``(..., *shape)`` to ``(..., dim)``.

        Raises:
            ConfigError: If names are missing or unknown.
            ShapeError: If a shape is wrong, or leading axes disagree.
        """
        values, lead = self._values(theta)
        parts = [s.bijection(v).inv(v).reshape(*lead, s.size) for s, v in zip(self.sites, values, strict=True)]
        return torch.cat(parts, -1) if parts else torch.zeros(0)

    def flatten(self, theta: Mapping[str, Any]) -> Tensor:
        """Put named parameters ``(..., *shape)`` side by side, ``(..., len(columns()))``."""
        values, lead = self._values(theta)
        parts = [v.reshape(*lead, math.prod(s.shape)) for s, v in zip(self.sites, values, strict=True)]
        return torch.cat(parts, -1) if parts else torch.zeros(0)

    def unflatten(self, columns: Tensor) -> dict[str, Tensor]:
        """Take apart what :meth:`flatten` put side by side, ``(..., len(columns()))``.

        Raises:
            ShapeError: If the number of columns is another.
        """
        sizes = [math.prod(site.shape) for site in self.sites]
        if columns.shape[-1:] != (sum(sizes),):
            raise ShapeError(f"the columns must have shape (..., {sum(sizes)}), got {tuple(columns.shape)}.")
        parts = columns.split(sizes, -1)
        return {s.name: p.reshape(*columns.shape[:-1], *s.shape) for s, p in zip(self.sites, parts, strict=True)}

    def check(self, theta: Mapping[str, Any]) -> None:
        """Check values against their supports.

        Raises:
            SupportError: If a value is not finite or lies outside its support.
            ShapeError: If a shape is wrong.
            ConfigError: If names are missing or unknown.
        """
        values, _ = self._values(theta)
        for site, value in zip(self.sites, values, strict=True):
            if not bool(torch.isfinite(value).all()):
                raise SupportError(f"parameter {site.name!r} has values that are not finite.")
            support = constraint_of(site.plain)
            if not bool(support.check(value).all()):
                raise SupportError(f"parameter {site.name!r} lies outside its support {describe_support(support)}.")

    # -- names ---------------------------------------------------------------------------------------------------------
    def columns(self) -> list[str]:
        """Return the names of the constrained numbers, counted from zero: ``mu``, ``theta[0]``, ``Sigma[0,1]``."""
        out = []
        for site in self.sites:
            if not site.shape:
                out.append(site.name)
                continue
            positions = itertools.product(*(range(n) for n in site.shape))
            out += [f"{site.name}[{','.join(map(str, p))}]" for p in positions]
        return out

    def unconstrained_columns(self) -> list[str]:
        """Return the names of the unconstrained coordinates, in the same form."""
        plain = [Site(s.name, s.unconstrained_shape, constraints.real) for s in self.sites if s.size]
        return Layout(plain).columns() if plain else []

    def bounded(self) -> Tensor:
        """Return which coordinates of ``z`` are logits of a number between two bounds, ``(dim,)``.

        Example:
            >>> Layout.of({"rate": "interval(0, 2)", "mu": ((2,), "real")}).bounded()
            tensor([ True, False, False])
        """
        parts = [is_interval(s.plain, s.unconstrained_shape).reshape(-1) for s in self.sites if s.size]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)

    @property
    def num_categories(self) -> tuple[int, ...] | None:
        """Number of values of each coordinate when every parameter is discrete; None when every one is continuous.

        Raises:
            SupportError: If there are both.
        """
        counts = [site.num_categories for site in self.sites]
        if all(count is None for count in counts):
            return None
        if any(count is None for count in counts):
            mixed = [s.name for s in self.sites if s.num_categories is not None]
            raise SupportError(
                "discrete and continuous parameters cannot be mixed in one layout; "
                f"discrete: {', '.join(mixed)}. Sum them out in the log joint."
            )
        return tuple(c for s, c in zip(self.sites, counts, strict=True) for _ in range(s.size) if c is not None)

    @property
    def space(self) -> Space:
        """The space that ``z`` lives on: angles alone on the circle, categories on the discrete space, others real.

        Raises:
            SupportError: If there are both of angles and others, or of discrete and continuous parameters.
        """
        if self.num_categories:
            return Space.DISCRETE
        angles = [site.name for site in self.sites if site.plain["kind"] == "circle"]
        if not angles:
            return Space.REAL
        if len(angles) < len(self.sites):
            raise SupportError(
                "angles and other parameters cannot be mixed in one layout, since no family covers both; angles: "
                f"{', '.join(angles)}. Give these the support interval(-3.1416, 3.1416), which is cut at its ends."
            )
        return Space.CIRCLE

    def angles(self) -> list[int]:
        """Places of the angles among :meth:`columns`."""
        kinds = [(site.plain["kind"], math.prod(site.shape)) for site in self.sites]
        each = [kind for kind, number in kinds for _ in range(number)]
        return [i for i, kind in enumerate(each) if kind == "circle"]

    # -- files ---------------------------------------------------------------------------------------------------------
    def to_json(self) -> dict[str, Any]:
        """Return the layout as plain data."""
        return {"sites": [site.to_json() for site in self.sites]}

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """Build a layout from :meth:`to_json`'s data; nothing in it is evaluated.

        Raises:
            SupportError: If the data are not those of a layout.
        """
        try:
            sites = [
                Site(str(d["name"]), tuple(int(n) for n in d["shape"]), constraint_of(d["support"]))
                for d in data["sites"]
            ]
            return cls(sites)
        except VifamilyError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise SupportError(
                f"these data do not describe a layout of parameters: {type(error).__name__}: {error}."
            ) from error

    # -- checks --------------------------------------------------------------------------------------------------------
    def _check_z(self, z: Tensor) -> None:
        if z.shape[-1:] != (self.dim,):
            raise ShapeError(f"points must have shape (..., {self.dim}), got {tuple(z.shape)}.")

    def _values(self, theta: Mapping[str, Any]) -> tuple[list[Tensor], tuple[int, ...]]:
        missing = [n for n in self.names if n not in theta]
        unknown = [n for n in theta if n not in self.names]
        if missing or unknown:
            said = [
                f"{what}: {', '.join(map(str, w))}" for what, w in (("missing", missing), ("unknown", unknown)) if w
            ]
            raise ConfigError(f"parameters must be exactly {', '.join(self.names)}; {'; '.join(said)}.")
        values = [torch.as_tensor(theta[n]) for n in self.names]
        leads = []
        for site, value in zip(self.sites, values, strict=True):
            rank = len(site.shape)
            if tuple(value.shape[value.dim() - rank :]) != site.shape or value.dim() < rank:
                raise ShapeError(
                    f"parameter {site.name!r} must have shape {('...', *site.shape)}, got {tuple(value.shape)}."
                )
            leads.append(tuple(value.shape[: value.dim() - rank]))
        if len(set(leads)) > 1:
            given = ", ".join(f"{n}: {lead}" for n, lead in zip(self.names, leads, strict=True))
            raise ShapeError(f"leading axes of the parameters must agree, got {given}.")
        return values, leads[0] if leads else ()
