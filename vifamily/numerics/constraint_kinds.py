"""Supports as plain data: torch's constraints by name, what is saved of them, and the bijection of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import AffineTransform, CatTransform, StackTransform, Transform

from vifamily.errors import SupportError
from vifamily.numerics import bijections as own

__all__ = ["describe_support", "make_bijection", "support_from"]

_BOUNDED = {
    "greater_than": (constraints.greater_than, ("lower_bound",)),
    "less_than": (constraints.less_than, ("upper_bound",)),
    "interval": (constraints.interval, ("lower_bound", "upper_bound")),
    "integer_interval": (constraints.integer_interval, ("lower_bound", "upper_bound")),
}
_NAMED: dict[str, Constraint] = {
    "real": constraints.real,
    "circle": own.CircleConstraint(),
    "positive": constraints.positive,
    "unit_interval": constraints.unit_interval,
    "simplex": constraints.simplex,
    "ordered": own.OrderedConstraint(),
    "positive_ordered": own.PositiveOrderedConstraint(),
    "corr_cholesky": constraints.corr_cholesky,
    "corr_matrix": own.CorrMatrixConstraint(),
    "lower_cholesky": constraints.lower_cholesky,
    "positive_definite": constraints.positive_definite,
}
# Constraint classes by name, so that Pyro's are understood without importing Pyro.
_BY_CLASS = {
    "_Real": "real",
    "CircleConstraint": "circle",
    "_GreaterThan": "greater_than",
    "_GreaterThanEq": "greater_than",
    "_LessThan": "less_than",
    "_Interval": "interval",
    "_HalfOpenInterval": "interval",
    "_IntegerInterval": "integer_interval",
    "_Simplex": "simplex",
    "_OrderedVector": "ordered",
    "OrderedConstraint": "ordered",
    "_PositiveOrderedVector": "positive_ordered",
    "PositiveOrderedConstraint": "positive_ordered",
    "_CorrCholesky": "corr_cholesky",
    "_CorrMatrix": "corr_matrix",
    "CorrMatrixConstraint": "corr_matrix",
    "_LowerCholesky": "lower_cholesky",
    "_SoftplusLowerCholesky": "lower_cholesky",
    "_PositiveDefinite": "positive_definite",
    "_PositiveSemidefinite": "positive_definite",
    "_SoftplusPositive": "positive",
}
MATRICES: dict[str, type[own.LowerCholesky] | type[own.CorrCholesky]] = {
    "lower_cholesky": own.LowerCholesky,
    "positive_definite": own.PositiveDefinite,
    "corr_cholesky": own.CorrCholesky,
    "corr_matrix": own.CorrMatrix,
}
_EVENT_DIM = {"simplex": 1, "ordered": 1, "positive_ordered": 1} | dict.fromkeys(MATRICES, 2)
_CALL = re.compile(r"^\s*([a-z_]+)\s*(?:\((.*)\))?\s*$")
_KNOWN = ", ".join([*_NAMED, "greater_than(a)", "less_than(b)", "interval(a, b)", "integer_interval(a, b)"])


def support_from(spec: Constraint | str) -> Constraint:
    """Return a support as a torch constraint.

    Args:
        spec: A constraint of torch (or Pyro), or its name: ``"real"``, ``"positive"``, ``"unit_interval"``,
            ``"interval(0, 2)"``, ``"greater_than(1)"``, ``"less_than(0)"``, ``"circle"`` (angles in radians),
            ``"simplex"``, ``"ordered"``, ``"positive_ordered"``, ``"corr_cholesky"``, ``"corr_matrix"``,
            ``"lower_cholesky"``, ``"positive_definite"``, ``"integer_interval(0, 3)"``. Names are parsed, never
            evaluated.

    Returns:
        The constraint. Closed ends are read as open, wrappers that only declare event dimensions are dropped.

    Raises:
        SupportError: If the support is unknown, empty, or has no map to unconstrained space.

    Example:
        >>> support_from("interval(0, 2)")
        Interval(lower_bound=0.0, upper_bound=2.0)
    """
    if isinstance(spec, str):
        return constraint_of(_parse(spec))
    if not isinstance(spec, Constraint):
        raise SupportError(
            f"a support must be a torch constraint or the name of one, got {type(spec).__name__}. "
            f"Known names: {_KNOWN}."
        )
    return constraint_of(plain_of(spec))


def describe_support(support: Constraint) -> str:
    """Return a support as text, the form :func:`support_from` reads where it has one.

    Example:
        >>> describe_support(constraints.greater_than(1.0))
        'greater_than(1.0)'
    """
    plain = plain_of(support)
    if "of" in plain:
        return f"{plain['kind']}({', '.join(describe_support(constraint_of(p)) for p in plain['of'])})"
    bounds = [plain[key] for key in ("lower_bound", "upper_bound") if key in plain]
    return f"{plain['kind']}({', '.join(map(str, bounds))})" if bounds else str(plain["kind"])


def _parse(text: str) -> dict[str, Any]:
    found = _CALL.match(text)
    name = found.group(1) if found else text
    written = found.group(2) if found else None
    if name in _NAMED and written is None:
        return plain_of(_NAMED[name])
    if name not in _BOUNDED or written is None:
        raise SupportError(f"unknown support {text!r}. Known names: {_KNOWN}.")
    keys = _BOUNDED[name][1]
    try:
        values = [float(part) for part in written.split(",")]
    except ValueError:
        example = f"{name}({', '.join('0123'[: len(keys)])})"
        raise SupportError(f"the support {text!r} must be given numbers, as in {example}.") from None
    if len(values) != len(keys):
        raise SupportError(f"the support {name!r} takes {len(keys)} number(s), got {len(values)} in {text!r}.")
    return {"kind": name, **dict(zip(keys, values, strict=True))}


def plain_of(support: Constraint) -> dict[str, Any]:
    """Return plain data for a constraint: what is saved, and what every other function here reads."""
    name = type(support).__name__
    if isinstance(support, constraints.independent):
        return plain_of(support.base_constraint)
    if isinstance(support, (constraints.stack, constraints.cat)):
        parts = {"dim": int(support.dim), "of": [plain_of(part) for part in support.cseq]}
        if isinstance(support, constraints.stack):
            return {"kind": "stack", **parts}
        return {"kind": "cat", **parts, "lengths": [int(n) for n in support.lengths]}
    if name == "_Boolean":
        return {"kind": "integer_interval", "lower_bound": 0, "upper_bound": 1}
    kind = _BY_CLASS.get(name)
    if kind is None:
        raise SupportError(
            f"the support {support} has no map to unconstrained space. Known supports: {_KNOWN}. "
            "Integrate discrete parameters out, or use integer_interval."
        )
    if kind not in _BOUNDED:
        return {"kind": kind}
    plain = {"kind": kind} | {key: _bound(getattr(support, key)) for key in _BOUNDED[kind][1]}
    return {"kind": "positive"} if plain == {"kind": "greater_than", "lower_bound": 0.0} else plain


def _bound(value: Any) -> Any:
    return value.detach().cpu().tolist() if isinstance(value, Tensor) else float(value)


def constraint_of(plain: Mapping[str, Any]) -> Constraint:
    """Return the constraint that plain data describe."""
    kind = plain.get("kind")
    if kind in _NAMED:
        return _NAMED[kind]
    if kind in ("stack", "cat"):
        parts = [constraint_of(part) for part in plain["of"]]
        if any(event_dim_of(part) for part in plain["of"]):
            raise SupportError(
                f"a support of kind {kind} takes supports of single numbers, got {[str(p) for p in parts]}."
            )
        if kind == "stack":
            return constraints.stack(parts, plain["dim"])
        return constraints.cat(parts, plain["dim"], plain["lengths"])
    if kind not in _BOUNDED:
        raise SupportError(f"unknown support {plain!r}. Known names: {_KNOWN}.")
    maker, keys = _BOUNDED[kind]
    bounds = [
        torch.tensor(plain[k], dtype=torch.float64) if isinstance(plain[k], list) else float(plain[k]) for k in keys
    ]
    tensors = [torch.as_tensor(b, dtype=torch.float64) for b in bounds]
    given = ", ".join(str(plain[k]) for k in keys)
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise SupportError(f"the bounds of {kind} must be finite, got {given}.")
    if len(tensors) == 2 and not bool((tensors[0] < tensors[1]).all()):
        raise SupportError(f"the lower bound of {kind} must be below its upper bound, got {given}.")
    if kind == "integer_interval":
        if not all(bool((t == t.round()).all()) and t.dim() == 0 for t in tensors):
            raise SupportError(f"the bounds of integer_interval must be two integers, got {given}.")
        bounds = [int(b) for b in bounds]
    made: Constraint = maker(*bounds)
    return made


def event_dim_of(plain: Mapping[str, Any]) -> int:
    """Return how many trailing axes one value of the support takes."""
    return _EVENT_DIM.get(plain["kind"], 0)


def make_bijection(
    plain: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Transform:
    """Return the transform from unconstrained space; bounds that are tensors are moved to where the parameters live."""
    kind = plain["kind"]
    if kind in MATRICES:
        return MATRICES[kind](shape[-1])
    if kind == "circle":
        return own.Angle()
    if kind == "ordered":
        return own.Ordered()
    if kind == "positive_ordered":
        return own.PositiveOrdered()
    if kind == "integer_interval":
        return AffineTransform(plain["lower_bound"], 1)
    if kind in ("stack", "cat"):
        parts = [make_bijection(part, (), dtype, device) for part in plain["of"]]
        if kind == "stack":
            return StackTransform(parts, plain["dim"])
        return CatTransform(parts, plain["dim"], plain["lengths"])
    support = constraint_of(plain)
    for key in ("lower_bound", "upper_bound"):
        if isinstance(getattr(support, key, None), Tensor):
            setattr(support, key, getattr(support, key).to(device=device, dtype=dtype))
    made: Transform = biject_to(support)
    return made


def is_interval(plain: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
    """Return which numbers lie between two bounds, and so have logits for unconstrained coordinates.

    Args:
        plain: The support.
        shape: Shape of the unconstrained coordinates.

    Returns:
        Booleans of that shape.
    """
    if plain["kind"] not in ("stack", "cat"):
        return torch.full(shape, plain["kind"] == "interval")
    parts = [plain_part["kind"] == "interval" for plain_part in plain["of"]]
    lengths = plain.get("lengths", [1] * len(parts))
    along = torch.tensor(parts).repeat_interleave(torch.tensor(lengths))
    axis = plain["dim"] % len(shape)
    return along.reshape([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


def is_fixed(plain: Mapping[str, Any]) -> bool:
    """Return whether no bound is a tensor, so that one transform serves every dtype and device."""
    own_bounds = (plain.get("lower_bound"), plain.get("upper_bound"))
    return not any(isinstance(b, list) for b in own_bounds) and all(map(is_fixed, plain.get("of", ())))
