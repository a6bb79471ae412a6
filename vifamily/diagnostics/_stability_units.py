"""Scores and curvature of the log likelihoods of units, from functions of any torch parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vifamily.errors import ConfigError, NotAvailableError, ShapeError

__all__ = ["Curvature", "GaussNewton", "Labelled", "Units", "as_functions", "fisher_rows"]

Function = Callable[[], Tensor]


def as_functions(functions: Function | Sequence[Function], what: str) -> tuple[Function, ...]:
    """Return one or several functions as a tuple.

    Raises:
        ConfigError: If something is not callable.
    """
    out = tuple(functions) if isinstance(functions, Sequence) else (functions,)
    if not out or not all(callable(f) for f in out):
        raise ConfigError(f"{what} must be a function without arguments, or several, got {functions!r}.")
    return out


def _flat(parts: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, parameters, strict=True)]
    return torch.cat([g.reshape(-1) for g in filled])


class Units:
    """Log likelihoods as functions of parameters, put together from parts and summed within groups.

    Args:
        functions: Each gives log likelihoods ``(datum,)`` of a part of the data at the parameters as they are.
        parameters: The parameters, leaves that require a gradient.
        group: Unit of each datum over all parts, integers from 0, or None where each datum is a unit.

    Raises:
        ConfigError: If a parameter cannot be differentiated, or there are none.
    """

    def __init__(self, functions: Sequence[Function], parameters: Sequence[Tensor], group: Tensor | None) -> None:
        self.functions, self.parameters, self.group = tuple(functions), list(parameters), group
        if not self.parameters or not all(p.requires_grad for p in self.parameters):
            raise ConfigError("stability needs at least one parameter, and each must require a gradient.")
        self.dim = sum(p.numel() for p in self.parameters)
        self._num_units: int | None = None if group is None else int(group.max()) + 1

    # -- values --------------------------------------------------------------------------------------------------------
    def _evaluate(self, function: Function) -> Tensor:
        out = function()
        if not isinstance(out, Tensor) or out.dim() != 1:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ShapeError(f"a log likelihood must be one number per datum, (datum,), got {got}.")
        if not out.requires_grad:
            raise NotAvailableError("the log likelihood does not depend on the parameters as far as torch can tell.")
        return out

    def _grouped(self, rows: Tensor) -> Tensor:
        if self.group is None:
            return rows
        if self.group.shape != rows.shape[:1]:
            raise ShapeError(f"units= must name the unit of each of {len(rows)} data, got {tuple(self.group.shape)}.")
        out = rows.new_zeros(self.num_units, *rows.shape[1:])
        return out.index_add_(0, self.group.to(rows.device), rows)

    @property
    def num_units(self) -> int:
        """Number of units, known once values or scores were asked for."""
        if self._num_units is None:
            self._num_units = len(self.values())
        return self._num_units

    def values(self, shift: Tensor | None = None) -> Tensor:
        """Log likelihood of each unit, ``(unit,)``, at the parameters or away from them by ``shift`` ``(dim,)``."""
        if shift is not None:
            self._move(shift)
        try:
            with torch.no_grad():
                out = torch.cat([f().detach().double() for f in self.functions])
        finally:
            if shift is not None:
                self._restore()
        return self._grouped(out)

    def _move(self, shift: Tensor) -> None:
        self._kept = [p.detach().clone() for p in self.parameters]
        at = 0
        with torch.no_grad():
            for p in self.parameters:
                p.add_(shift[at : at + p.numel()].to(p).reshape(p.shape))
                at += p.numel()

    def _restore(self) -> None:
        with torch.no_grad():
            for p, kept in zip(self.parameters, self._kept, strict=True):
                p.copy_(kept)

    # -- derivatives ---------------------------------------------------------------------------------------------------
    def scores(self, functions: Sequence[Function] | None = None) -> Tensor:
        """Gradient of each unit's log likelihood, ``(unit, dim)`` in float64."""
        rows = self._grouped(torch.cat([self._rows(f) for f in (functions or self.functions)]))
        self._num_units = len(rows)
        return rows

    def _rows(self, function: Function) -> Tensor:
        with torch.enable_grad():
            value = self._evaluate(function)
            if len(value) <= self.dim:
                return torch.stack([self._gradient(v) for v in value.unbind()]).double()
            # fewer parameters than data: the transposed Jacobian is linear in a vector that stands for the data
            stand_in = torch.zeros_like(value, requires_grad=True)
            total = self._gradient(value, stand_in, create_graph=True)
            columns = [
                torch.autograd.grad(part, stand_in, retain_graph=True)[0]
                if part.requires_grad
                else torch.zeros_like(value)
                for part in total.unbind()
            ]
            return torch.stack(columns, -1).double()

    def _gradient(self, value: Tensor, outputs: Tensor | None = None, *, create_graph: bool = False) -> Tensor:
        parts = torch.autograd.grad(
            value, self.parameters, outputs, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return _flat(parts, self.parameters)

    def hessian_product(self, vector: Tensor) -> Tensor:
        """Mean over units of the negative Hessian, times a vector ``(dim,)``."""
        out = torch.zeros_like(vector)
        for function in self.functions:
            with torch.enable_grad():
                slope = self._gradient(self._evaluate(function).sum(), create_graph=True)
                if slope.requires_grad:
                    out = out - self._gradient(slope @ vector.to(slope)).detach().double()
        return out / self.num_units


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """A likelihood split into a network's outputs and their log likelihood.

    Attributes:
        outputs: Functions that give outputs ``(datum, output)`` for the same parts of the data as the log likelihoods.
        log_likelihoods: For each part, from outputs to log likelihoods ``(datum,)``; each may depend on its own
            datum's outputs alone, and must be concave in them.
    """

    outputs: tuple[Function, ...]
    log_likelihoods: tuple[Callable[[Tensor], Tensor], ...]

    def product(self, units: Units, vector: Tensor) -> Tensor:
        """Mean over units of ``D^T H D``, times a vector, with D the Jacobian of outputs, H minus their Hessian."""
        out = torch.zeros_like(vector)
        for function, log_likelihood in zip(self.outputs, self.log_likelihoods, strict=True):
            with torch.enable_grad():
                output = self._checked(function())
                stand_in = torch.zeros_like(output, requires_grad=True)
                pulled = units._gradient(output, stand_in, create_graph=True)
                pushed = torch.autograd.grad(pulled @ vector.to(pulled), stand_in, retain_graph=True)[0].detach()
                point = output.detach().requires_grad_()
                slope = torch.autograd.grad(log_likelihood(point).sum(), point, create_graph=True)[0]
                if slope.requires_grad:
                    curved = torch.autograd.grad((slope * pushed).sum(), point)[0]
                    out = out - units._gradient(output, curved).detach().double()
        return out / units.num_units

    def rows(self, units: Units) -> Tensor:
        """A factor F, ``(row, dim)``, with the curvature ``F^T F / num_units``; one row per datum and output."""
        found = []
        for function, log_likelihood in zip(self.outputs, self.log_likelihoods, strict=True):
            with torch.enable_grad():
                output = self._checked(function())
                point = output.detach().requires_grad_()
                slope = torch.autograd.grad(log_likelihood(point).sum(), point, create_graph=True)[0]
                columns = [
                    torch.autograd.grad(slope[:, k].sum(), point, retain_graph=True)[0]
                    if slope.requires_grad
                    else torch.zeros_like(point)
                    for k in range(output.shape[1])
                ]
                minus = -torch.stack(columns, -1).detach().double()
                values, vectors = torch.linalg.eigh(0.5 * (minus + minus.mT))
                if bool((values < -1e-9 * values.abs().max()).any()):
                    raise NotAvailableError(
                        "the log likelihood is not concave in the outputs, so Gauss-Newton has no factor: use "
                        "curvature='fisher'."
                    )
                weight = (values.clamp(min=0).sqrt().unsqueeze(-2) * vectors).to(output)  # (datum, output, row)
                mixed = torch.einsum("nkr,nk->nr", weight, output).reshape(-1)
                found.append(Units([functools.partial(torch.clone, mixed)], units.parameters, None).scores())
        return torch.cat(found)

    @staticmethod
    def _checked(output: Tensor) -> Tensor:
        if output.dim() != 2:
            raise ShapeError(f"outputs must have shape (datum, output), got {tuple(output.shape)}.")
        return output


@dataclasses.dataclass(frozen=True)
class Curvature:
    """V, the curvature of the mean loss of a unit, as products and maybe as a factor.

    Attributes:
        name: ``"hessian"``, ``"fisher"`` or ``"gauss_newton"``.
        product: ``v -> V v``.
        factor: Makes F, ``(row, dim)``, with ``V = F^T F / num_units``, or None where there is none.
        trace: Gives the trace of V, or None where it would have to be estimated.
        dtype: Floating dtype in which products are computed.
    """

    name: str
    product: Callable[[Tensor], Tensor]
    factor: Callable[[], Tensor] | None = None
    trace: Callable[[], float] | None = None
    dtype: torch.dtype = torch.float64


@dataclasses.dataclass(frozen=True)
class Labelled:
    """The log likelihood with labels of the model in place of the observed ones.

    Attributes:
        log_likelihood: A function without arguments, to ``(datum,)``, or one for each part of the data.
        probability: Probability under the model of each datum's label, ``(datum,)``, where all values of a label are
            gone through; None where the labels are drawn from the model.
    """

    log_likelihood: Function | Sequence[Function]
    probability: Tensor | None = None


def fisher_rows(labelled: Sequence[Labelled], parameters: Sequence[Tensor], group: Tensor | None) -> Tensor:
    """A factor F, ``(row, dim)``, with the Fisher matrix of a unit ``F^T F / num_units``.

    Drawn labels give one row for each unit and draw. Labels that are gone through give one for each datum and value:
    the data of a unit are then taken as independent given the parameters, so that their Fisher matrices add.

    Raises:
        ConfigError: If there are none, drawn and enumerated ones are mixed, or probabilities do not sum to one.
    """
    if not labelled:
        raise ConfigError("curvature='fisher' needs labels of the model: labelled= with draws, or with all values.")
    known = [item.probability for item in labelled if item.probability is not None]
    if known and len(known) != len(labelled):
        raise ConfigError("labels must be either all drawn (probability=None) or all gone through.")
    if known and bool(((torch.stack(known).double().sum(0) - 1).abs() > 1e-4).any()):
        raise ConfigError("probabilities of labels must sum to one for each datum: give every value a label can take.")
    out = []
    for item in labelled:
        functions = as_functions(item.log_likelihood, "log_likelihood")
        rows = Units(functions, parameters, group if item.probability is None else None).scores()
        weight = len(labelled) ** -0.5 if item.probability is None else item.probability.double().sqrt()[:, None]
        out.append(rows * weight)
    return torch.cat(out)
