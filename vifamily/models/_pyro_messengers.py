"""Running a Pyro program: what is put in at each site, what is recorded, and the globals put back afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from vifamily import rng
from vifamily.errors import IncompatibleError
from vifamily.models._pyro import (
    Delta,
    EnumMessenger,
    Messenger,
    Subsample,
    Unit,
    config_enumerate,
    poutine,
    pyro,
    scale_and_mask,
)

__all__ = ["Collector", "PointParameters", "Record", "foreign", "is_factor", "run_program"]


@contextlib.contextmanager
def foreign(dtype: torch.dtype, source: torch.Generator | int | None = None) -> Iterator[None]:
    """Run Pyro code: constants in the model's dtype, no validation, seeded where it draws; everything is put back.

    Args:
        dtype: What a number written in the program becomes.
        source: Generator or seed for code that draws at random; None where nothing is drawn.
    """
    torch_validates = torch.distributions.Distribution._validate_args
    dtype_before = torch.get_default_dtype()
    seeded = contextlib.nullcontext() if source is None else rng.scoped(source)
    try:
        with seeded, pyro.validation_enabled(is_validate=False):
            torch.set_default_dtype(dtype)
            yield
    finally:
        torch.set_default_dtype(dtype_before)
        # Pyro puts back its own flag, which need not be torch's
        torch.distributions.Distribution.set_default_validate_args(torch_validates)


class PointParameters(nn.Module):
    """The ``pyro.param`` sites of a program as parameters of a module; Pyro's own store is never touched."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ParameterList()
        self._known: dict[str, tuple[nn.Parameter, Any]] = {}

    def __call__(self, msg: Any) -> Tensor:
        """Return the value for a message of ``pyro.param``, made on first sight from its initial value."""
        name = msg["name"]
        if name not in self._known:
            self._known[name] = self._made(name, msg)
        parameter, support = self._known[name]
        if support is constraints.real:
            return parameter
        value: Tensor = biject_to(support)(parameter)
        return value

    def _made(self, name: str, msg: Any) -> tuple[nn.Parameter, Any]:
        if len(msg["args"]) < 2:
            raise IncompatibleError(f"the parameter {name!r} has no initial value in pyro.param: give it one.")
        initial = msg["args"][1]
        support = msg["kwargs"].get("constraint", constraints.real)
        if isinstance(initial, nn.Parameter) and support is constraints.real:
            return initial, support  # a module's own: it stays where it is, and is trained there
        start = initial() if callable(initial) and not isinstance(initial, Tensor) else initial
        start = torch.as_tensor(start).detach().to(torch.get_default_dtype())
        parameter = nn.Parameter(biject_to(support).inv(start).clone())
        self.values.append(parameter)
        return parameter, support


@dataclasses.dataclass
class Record:
    """A sample site as it was met in a run.

    Attributes:
        name: Its name.
        fn: Its distribution, expanded to its plates.
        value: Its value.
        observed: Whether the value was given by the program.
        frames: The plates around it.
        message: Pyro's message, whose ``infer`` the enumeration fills after the fact.
        log_prob: Log density, scaled and masked as the program says, or None where only values were wanted.
    """

    name: str
    fn: Any
    value: Any
    observed: bool
    frames: tuple[Any, ...]
    message: Any
    log_prob: Tensor | None


class Collector(Messenger):  # type: ignore[misc]
    """Puts values in at latent sites, an index in at the data plate, and records every site.

    Args:
        values: Values of latent sites, aligned with the program's plates.
        parameters: Values of ``pyro.param`` sites.
        plate: Name of the plate that takes the index.
        index: Positions in that plate, or None to leave it as the program has it.
        densities: Whether log densities are wanted.
        release: Whether observed sites are drawn anew.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        parameters: PointParameters,
        *,
        plate: str | None = None,
        index: Tensor | None = None,
        densities: bool = True,
        release: bool = False,
    ) -> None:
        super().__init__()
        self.values, self.parameters, self.plate, self.index = values, parameters, plate, index
        self.densities, self.release = densities, release
        self.records: list[Record] = []
        self.plates: dict[str, tuple[int, int, bool]] = {}  # name -> (size, size of the subsample, index given by hand)

    def _pyro_param(self, msg: Any) -> None:
        msg["value"], msg["done"] = self.parameters(msg), True

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, Subsample):
            by_hand = msg["value"] is not None
            taken = len(msg["value"]) if by_hand else min(fn.subsample_size or fn.size, fn.size)
            self.plates[name] = (int(fn.size), int(taken), by_hand)
            if name == self.plate and self.index is not None:
                msg["value"], msg["done"] = self.index, True
        elif not msg["is_observed"]:
            if name in self.values:
                msg["value"], msg["done"] = self.values[name], True
        elif self.release and not is_factor(msg):
            msg["is_observed"], msg["value"] = False, None

    def _pyro_post_sample(self, msg: Any) -> None:
        fn, value = msg["fn"], msg["value"]
        if isinstance(fn, Subsample) or msg["infer"].get("_deterministic"):
            return
        if isinstance(value, Tensor) and value.is_floating_point() and not msg["is_observed"]:
            # a prior made outside the program, in another dtype, must not decide the dtype of its draws
            value = msg["value"] = value.to(torch.get_default_dtype())
        log_prob = None
        if self.densities:
            log_prob = scale_and_mask(fn.log_prob(value, *msg["args"], **msg["kwargs"]), msg["scale"], msg["mask"])
        record = Record(msg["name"], fn, value, msg["is_observed"], msg["cond_indep_stack"], msg, log_prob)
        self.records.append(record)


class _Enumerate(EnumMessenger):  # type: ignore[misc]
    """Pyro's enumeration, made to work under ``vmap``, where a tensor's ``data`` may not be read."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor):
            msg["value"] = types.SimpleNamespace(data=value, dim=value.dim)  # all that is asked of it is its shape
        try:
            super()._pyro_post_sample(msg)
        finally:
            msg["value"] = value


def is_factor(msg: Any) -> bool:
    """Return whether a site only adds a number to the log density (``pyro.factor``, ``pyro.deterministic``)."""
    fn = msg["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, (Unit, Delta)) or bool(msg["infer"].get("_deterministic"))


def run_program(
    program: Callable[..., Any],
    collector: Collector,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    enumerate_from: int | None = None,
    draws: tuple[int, int] | None = None,
) -> list[Record]:
    """Run a program under a collector.

    Args:
        program: The program.
        collector: What is put in and recorded.
        args: Positional arguments of the program.
        kwargs: Keyword arguments of the program.
        enumerate_from: First tensor axis free for enumerating discrete latents, or None not to.
        draws: Size and axis of an outermost plate of draws, for sampling.

    Returns:
        The sites, in order.
    """
    called = program if enumerate_from is None else config_enumerate(program)
    outer = contextlib.nullcontext() if draws is None else pyro.plate("_draws", draws[0], dim=draws[1])
    inner = contextlib.nullcontext() if enumerate_from is None else _Enumerate(first_available_dim=enumerate_from)
    with poutine.block(), collector, outer, inner:
        called(*args, **kwargs)
    collector.plates.pop("_draws", None)
    return collector.records
