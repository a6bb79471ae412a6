"""Likelihoods of outputs of a network: what a datum is worth, what it looks like, and its moments.

Axes are ``(draw, datum, ...)``; data ``y`` are ``(datum, ...)``. Nothing broadcasts between the two: ``(datum,)``
against outputs ``(datum, 1)`` is refused.
"""

from __future__ import annotations

import abc
import copy
import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from scipy.special import stdtr
from torch import Tensor, nn
from torch.nn import functional

from vifamily.errors import ConfigError, DataError, NotAvailableError, ShapeError, SpecError, UnknownNameError
from vifamily.models._base import check_result
from vifamily.models._calls import check_callable
from vifamily.registry import parse

__all__ = ["CallableLikelihood", "Likelihood", "likelihood_of"]


class Likelihood(nn.Module, abc.ABC):
    """The law of a datum given the outputs of the network.

    Attributes:
        kind: ``"regression"`` (moments and intervals say how good a prediction is), ``"classification"``
            (probabilities), or ``"other"`` (only its log density is known).
        output_axes: Number of trailing axes of the outputs that a single number of ``y`` takes.
    """

    kind: Literal["regression", "classification", "other"] = "regression"
    output_axes: int = 0

    def event_shape(self, out: torch.Size) -> torch.Size:
        """Shape of one datum, given that of one output.

        Raises:
            ShapeError: If no datum can have such an output.
        """
        return out

    def check(self, y: Tensor, out: torch.Size) -> None:
        """Check data against the shape of one output.

        Raises:
            ShapeError: If the shapes do not fit without broadcasting.
            DataError: If values are impossible.
        """
        event = self.event_shape(out)
        if y.shape[1:] != event:
            raise ShapeError(
                f"the network gives {tuple(out)} for each input, for which the {self.name} likelihood needs y of shape "
                f"{('N', *event)}, got {('N', *y.shape[1:])}: give y that shape, or let the network give other outputs "
                "(nn.Flatten(0) after a last layer of one unit makes (N, 1) into (N,)).".replace("'N'", "N")
            )
        self.check_values(y)

    def check_values(self, y: Tensor) -> None:
        """Check that the law can give such data; real numbers by default."""

    def begin(self, y: Tensor, like: Tensor) -> None:
        """Set parameters of the law where a fit should begin, from some data."""

    @property
    def name(self) -> str:
        """Name in messages."""
        return type(self).__name__.lower().removesuffix("likelihood")

    @abc.abstractmethod
    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Log density of each datum, ``(draw, datum, ...), (datum, ...) -> (draw, datum)``."""

    @property
    def samples(self) -> bool:
        """Whether new data can be drawn."""
        return True

    def sample(self, outputs: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw one datum for each draw and input, ``(draw, datum, ...)``."""
        raise NotAvailableError(f"the {self.name} likelihood does not draw new data; one given by name does.")

    def mean(self, outputs: Tensor) -> Tensor:
        """Mean of a datum, ``(draw, datum, ...)``; probabilities for classes."""
        raise NotAvailableError(
            f"the {self.name} likelihood does not know the mean of a datum; one given by name does."
        )

    def variance(self, outputs: Tensor) -> Tensor:
        """Variance of a datum, ``(draw, datum, ...)``."""
        raise NotAvailableError(f"the {self.name} likelihood does not know the variance of a datum.")

    def cdf(self, outputs: Tensor, y: Tensor) -> Tensor | None:
        """Distribution function at ``y``, ``(draw, datum, ...)``; None where it is found from draws."""
        return None


def _per_datum(values: Tensor) -> Tensor:
    """Sum over all axes after draw and datum."""
    return values if values.dim() == 2 else values.flatten(2).sum(-1)


def _noise(outputs: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64, device=generator.device).to(outputs)


def _uniform(shape: torch.Size, generator: torch.Generator, like: Tensor) -> Tensor:
    unit = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return unit.clamp_min(torch.finfo(torch.float64).tiny).to(like.device)


class _Located(Likelihood):
    """A law around the output whose scale is known, or estimated as a point (one for each output of a vector)."""

    log_scale: Tensor | None

    def __init__(self, scale: float | None, label: str) -> None:
        super().__init__()
        if scale is not None and not (_is_number(scale) and 0 < scale < math.inf):
            raise ConfigError(f"{label} must be a positive number, or left out to be learned, got {scale!r}.")
        self._known = scale
        self.register_parameter("log_scale", None)

    def begin(self, y: Tensor, like: Tensor) -> None:
        """Begin a learned scale at the standard deviation of the data."""
        if self._known is not None:
            return
        values = y.to(like)
        axes = list(range(y.dim() - 1 if y.dim() == 2 else y.dim()))
        sd = values.std(axes, correction=0)
        sd = torch.where(torch.isfinite(sd) & (sd > 0), sd, torch.ones_like(sd))
        self.log_scale = nn.Parameter(sd.log())

    def scale(self, outputs: Tensor) -> Tensor:
        """Scale of the law, which broadcasts against the outputs."""
        if self.log_scale is None:
            return outputs.new_tensor(1.0 if self._known is None else self._known)
        return self.log_scale.exp()

    def mean(self, outputs: Tensor) -> Tensor:
        """The output itself."""
        return outputs


class Gaussian(_Located):
    """``y ~ N(output, sd^2)``.

    Args:
        sd: Known standard deviation of the noise; None to learn it.
    """

    def __init__(self, sd: float | None = None) -> None:
        super().__init__(sd, "sd")

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Normal log density."""
        return _per_datum(_normal_log_prob(y.to(outputs), outputs, self.scale(outputs)))

    def sample(self, outputs: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw around the outputs."""
        return outputs + self.scale(outputs) * _noise(outputs, generator)

    def variance(self, outputs: Tensor) -> Tensor:
        """The same everywhere."""
        return self.scale(outputs).square().expand_as(outputs)

    def cdf(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Normal distribution function."""
        value: Tensor = torch.special.ndtr((y.to(outputs) - outputs) / self.scale(outputs))
        return value


class StudentT(_Located):
    """``y = output + scale * t``, with ``t`` of the Student law: outliers pull less.

    Args:
        df: Degrees of freedom.
        scale: Known scale; None to learn it.
    """

    def __init__(self, df: float = 4.0, scale: float | None = None) -> None:
        super().__init__(scale, "scale")
        if not (_is_number(df) and 0 < df < math.inf):
            raise ConfigError(f"df must be a positive number, got {df!r}.")
        self.df = float(df)

    @property
    def name(self) -> str:
        """Name in messages."""
        return "student_t"

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Log density of the Student law."""
        scale, df = self.scale(outputs), self.df
        constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
        square = ((y.to(outputs) - outputs) / scale).square()
        return _per_datum(constant - scale.log() - 0.5 * (df + 1) * torch.log1p(square / df))

    def sample(self, outputs: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw around the outputs, by the polar method of Bailey (1994)."""
        u, v = (_uniform(outputs.shape, generator, outputs) for _ in range(2))
        t = torch.cos(2 * math.pi * v) * (self.df * torch.expm1(-2 / self.df * u.log())).sqrt()
        return outputs + self.scale(outputs) * t.to(outputs)

    def variance(self, outputs: Tensor) -> Tensor:
        """Infinite for two degrees of freedom and fewer."""
        factor = self.df / (self.df - 2) if self.df > 2 else math.inf
        return (factor * self.scale(outputs).square()).expand_as(outputs)

    def cdf(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Distribution function of the Student law."""
        standard = ((y.to(outputs) - outputs) / self.scale(outputs)).detach()
        return torch.as_tensor(stdtr(self.df, standard.cpu().double().numpy())).to(outputs)


class Heteroscedastic(Likelihood):
    """``y ~ N(m, s^2)`` with outputs ``(m, r)``, ``s = softplus(r)``, on the last axis."""

    output_axes = 1

    def event_shape(self, out: torch.Size) -> torch.Size:
        """Two outputs for each number."""
        if not out or out[-1] != 2:
            raise ShapeError(
                "the heteroscedastic likelihood needs a network with two outputs, mean and spread, on the last axis; "
                f"got {tuple(out)} for each input."
            )
        return out[:-1]

    def _moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        return outputs[..., 0], functional.softplus(outputs[..., 1]) + 1e-6

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Normal log density."""
        return _per_datum(_normal_log_prob(y.to(outputs), *self._moments(outputs)))

    def sample(self, outputs: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw around the means."""
        mean, sd = self._moments(outputs)
        return mean + sd * _noise(mean, generator)

    def mean(self, outputs: Tensor) -> Tensor:
        """The first output."""
        return outputs[..., 0]

    def variance(self, outputs: Tensor) -> Tensor:
        """Square of the spread."""
        return self._moments(outputs)[1].square()

    def cdf(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Normal distribution function."""
        mean, sd = self._moments(outputs)
        value: Tensor = torch.special.ndtr((y.to(outputs) - mean) / sd)
        return value


class Categorical(Likelihood):
    """Classes with the outputs as log odds on the last axis; ``y`` are labels from 0."""

    kind = "classification"
    output_axes = 1

    def event_shape(self, out: torch.Size) -> torch.Size:
        """One label for the last axis."""
        if not out or out[-1] < 2:
            raise ShapeError(
                "the categorical likelihood needs a network with one output for each class on the last axis, two at "
                f"least; got {tuple(out)} for each input. Two classes by one output are the bernoulli likelihood."
            )
        self._num_classes = out[-1]
        return out[:-1]

    def check_values(self, y: Tensor) -> None:
        """Labels are integers in range."""
        if y.is_floating_point() or y.dtype == torch.bool:
            raise DataError(f"labels of the categorical likelihood must be integers, got {y.dtype}: use y.long().")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= self._num_classes:
            raise DataError(
                f"labels must be 0 to {self._num_classes - 1} for a network with {self._num_classes} outputs, got "
                f"{low} to {high}."
            )

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Log probability of the label."""
        index = y.long().expand(outputs.shape[:-1]).unsqueeze(-1)
        return _per_datum(outputs.log_softmax(-1).gather(-1, index).squeeze(-1))

    def sample(self, outputs: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw labels."""
        unit = _uniform(outputs.shape[:-1], generator, outputs).unsqueeze(-1)
        below = outputs.double().softmax(-1).cumsum(-1) < unit
        return below.sum(-1).clamp_max(outputs.shape[-1] - 1)

    def mean(self, outputs: Tensor) -> Tensor:
        """Probabilities of the classes, ``(draw, datum, ..., class)``."""
        return outputs.softmax(-1)


class Bernoulli(Likelihood):
    """Yes (1) or no (0), with the outputs as log odds."""

    kind = "classification"

    def check_values(self, y: Tensor) -> None:
        """Only 0 and 1."""
        if not bool(((y == 0) | (y == 1)).all()):
            raise DataError(f"data of the bernoulli likelihood must be 0 or 1, got {_first(y, (y != 0) & (y != 1))}.")

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Log probability."""
        return _per_datum(functional.logsigmoid(torch.where(y.bool(), outputs, -outputs)))

    def sample(self, outputs: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw 0 or 1."""
        return (_uniform(outputs.shape, generator, outputs) < outputs.sigmoid()).to(outputs)

    def mean(self, outputs: Tensor) -> Tensor:
        """Probability of 1."""
        return outputs.sigmoid()


class Poisson(Likelihood):
    """Counts, with the outputs as log rates."""

    def check_values(self, y: Tensor) -> None:
        """Whole numbers from 0."""
        bad = (y < 0) | (y != y.round()) if y.is_floating_point() else y < 0
        if y.dtype == torch.bool or bool(bad.any()):
            what = _first(y, bad) if y.dtype != torch.bool else "truth values"
            raise DataError(f"data of the poisson likelihood must be whole numbers from 0, got {what}.")

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Log probability."""
        count = y.to(outputs)
        return _per_datum(count * outputs - outputs.exp() - torch.lgamma(count + 1))

    def sample(self, outputs: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw counts."""
        return torch.poisson(outputs.exp().to(generator.device), generator=generator).to(outputs)

    def mean(self, outputs: Tensor) -> Tensor:
        """The rates."""
        return outputs.exp()

    def variance(self, outputs: Tensor) -> Tensor:
        """The rates."""
        return outputs.exp()


class CallableLikelihood(Likelihood):
    """A log density of the user's own.

    Args:
        function: ``function(outputs, y)`` gives ``(draw, datum)`` from ``(draw, datum, ...)`` and ``(datum, ...)``.
    """

    kind = "other"

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        check_callable(function, "likelihood", "likelihood(outputs, y), one number per draw and datum")
        self.function = function  # its parameters, where it is a module, are estimated as points

    def check(self, y: Tensor, out: torch.Size) -> None:
        """Accept whatever the function takes."""

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Evaluate the function, and check what it gives."""
        value: Tensor = self.function(outputs, y)
        check_result("the likelihood", value, tuple(outputs.shape[:2]), outputs)
        return value

    @property
    def samples(self) -> bool:
        """Only a log density is known."""
        return False


_NAMED: dict[str, type[Likelihood]] = {
    "gaussian": Gaussian,
    "heteroscedastic": Heteroscedastic,
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "student_t": StudentT,
}


def likelihood_of(given: Any) -> Likelihood:
    """Return the likelihood for a spec such as ``"gaussian(sd=0.1)"``, or for a function.

    Raises:
        UnknownNameError: If there is none of that name.
        SpecError: If it has no such argument.
        ConfigError: If an argument has an impossible value.
    """
    if isinstance(given, Likelihood):
        return copy.deepcopy(given)
    if not isinstance(given, str):
        return CallableLikelihood(given)
    spec = parse(given)
    if spec.name not in _NAMED:
        near = difflib.get_close_matches(spec.name, _NAMED, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownNameError(
            f"there is no likelihood {spec.name!r}.{hint} There are: {', '.join(_NAMED)}; or give a function "
            "likelihood(outputs, y)."
        )
    kind = _NAMED[spec.name]
    known = [p for p in inspect.signature(kind.__init__).parameters if p not in ("self", "args", "kwargs")]
    unknown = [key for key in spec.kwargs if key not in known]
    if unknown:
        raise SpecError(f"the likelihood {spec.name!r} takes {', '.join(known) or 'no arguments'}, got {unknown[0]!r}.")
    return kind(**spec.kwargs)


def _normal_log_prob(y: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    return -0.5 * ((y - mean) / sd).square() - sd.log() - 0.5 * math.log(2 * math.pi)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _first(y: Tensor, bad: Tensor) -> str:
    return f"{y[bad][0].item():g} at {bad.nonzero()[0].tolist()}"
