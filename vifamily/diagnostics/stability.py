r"""When an ensemble under the alpha-Rényi loss stays together and when it becomes specialists.

For members at one point the loss :math:`-\frac1\alpha \log \mathrm{E}_Q\, p(y \mid \theta)^\alpha`, averaged over
units, changes under a small spread with covariance :math:`\Sigma` by
:math:`\frac12 \mathrm{tr}[(V - \alpha J) \Sigma]`, with V the mean negative Hessian of the units' log likelihoods and
J the mean outer product of their scores. Spread pays as soon as :math:`V - \alpha J` has a negative eigenvalue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from vifamily.diagnostics._stability_model import ModelUnits
from vifamily.diagnostics._stability_report import Spread, Stability
from vifamily.diagnostics._stability_routes import Critical, Dense, Free, Gram, Route
from vifamily.diagnostics._stability_units import Curvature, GaussNewton, Labelled, Units, as_functions, fisher_rows
from vifamily.errors import ConfigError, ShapeError
from vifamily.numerics.soft_routing import power_value

__all__ = ["Labelled", "Spread", "Stability", "stability", "unit_stability"]

_DENSE, _MOST_ROWS = 1000, 4000
_DAMPING = 1e-3
_SWEEP = (1e-4, 1e-3, 1e-2, 1e-1)
_DRIFT, _MILD = 0.1, 1e-2
Functions = Callable[[], Tensor] | Sequence[Callable[[], Tensor]]
RouteName = Literal["auto", "dense", "matrix_free", "gram"]


def unit_stability(
    log_likelihood: Functions,
    parameters: Tensor | Sequence[Tensor],
    alpha: float | None = None,
    *,
    units: Tensor | Sequence[int] | None = None,
    curvature: Literal["hessian", "fisher", "gauss_newton"] = "hessian",
    labelled: Sequence[Labelled] = (),
    outputs: Functions | None = None,
    log_likelihood_of: Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]] | None = None,
    route: RouteName = "auto",
    damping: float | None = None,
    sweep: Sequence[float] = _SWEEP,
    prior_precision: Tensor | float = 0.0,
    search: bool = True,
    tolerance: float = 1e-8,
    max_steps: int = 300,
    seed: int = 0,
    labels: Sequence[str] = (),
) -> Stability:
    r"""Analyse the stability of an ensemble collapsed at the current values of any torch parameters.

    Needs gradients of single units' log likelihoods and products with the curvature, nothing else, so that adapters of
    a large network can be asked. Each function gives the log likelihoods of a part of the data (a part whose graph fits
    in memory) and is called again for every product with a Hessian or Gauss-Newton matrix. The parameters are moved to
    search for the best pair of members, and put back exactly.

    Args:
        log_likelihood: A function without arguments, to ``(datum,)``, or several, one for each part of the data.
        parameters: The parameters of one member; leaves that require a gradient.
        alpha: An alpha to judge; None asks for the critical one alone.
        units: The unit of each datum over all parts, ``(datum,)`` integers from 0 without gaps: log likelihoods of data
            of a unit are summed. None: each datum is a unit. It must be the unit that is routed in training.
        curvature: ``"hessian"``, exact, but possibly indefinite away from a minimum; ``"fisher"``, with ``labelled``;
            ``"gauss_newton"``, with ``outputs`` and ``log_likelihood_of``. The latter two are never negative.
        labelled: Log likelihoods with labels of the model in place of the observed ones.
        outputs: As ``log_likelihood``, to outputs ``(datum, output)``.
        log_likelihood_of: From outputs to log likelihoods ``(datum,)``, one for each part.
        route: ``"dense"`` forms the matrices, ``"gram"`` the inner products of rows (fewer units than parameters, a
            curvature with a factor, something on the diagonal), ``"matrix_free"`` neither. ``"auto"`` is dense up to
            1,000 parameters, then Gram where there is a factor of up to 4,000 rows together with the scores.
        damping: Added to the diagonal of V, relative to the mean of that diagonal (estimated where there are only
            products). None adds nothing on the dense route unless V is singular, and 0.001 otherwise.
        sweep: Relative dampings at which the critical alpha is computed too.
        prior_precision: :math:`\lambda/\sigma_0^2`, added to the diagonal of V: the part of the divergence to a normal
            prior that members at points keep. A number, or ``(dim,)``.
        search: Whether to search for the best pair of members at ``alpha``, some 60 evaluations.
        tolerance: Relative residual of eigenvalues on the matrix-free route, as far as the parameters' dtype allows.
        max_steps: Steps of Lanczos' method at most; each keeps a vector. Linear solves take up to ten times as many.
        seed: Seed of its starting vectors.
        labels: A name for each coordinate, for the table.

    Returns:
        The critical alpha, its direction, and what is predicted at ``alpha``.

    Raises:
        ConfigError: If a value is out of range, or a curvature lacks what it is computed from.
        NotAvailableError: If the route or curvature cannot be had, or the log likelihood has no gradient.
        ShapeError: If a result has the wrong shape.

    Example:
        >>> y = torch.tensor([-2.0, 0.0, 2.0, 4.0], dtype=torch.float64)  # variance 5 about the mean, model sd 1
        >>> theta = torch.ones(1, dtype=torch.float64, requires_grad=True)
        >>> round(unit_stability(lambda: -0.5 * (y - theta) ** 2, theta).alpha_star, 10)
        0.2
    """
    held = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    functions = as_functions(log_likelihood, "log_likelihood")
    group = _checked_units(units)
    _check_numbers(alpha, damping, sweep)
    data = Units(functions, held, group)
    scores = data.scores()
    if not bool(scores.isfinite().all()):
        raise ConfigError("the score of a unit is not finite at this point.")
    if curvature == "hessian":
        bend = Curvature(curvature, data.hessian_product, dtype=held[0].dtype)
    elif curvature == "fisher":
        rows = fisher_rows(labelled, held, group)

        def trace() -> float:
            return float(rows.square().sum()) / len(scores)

        bend = Curvature(curvature, lambda v: rows.T @ (rows @ v) / len(scores), lambda: rows, trace)
    elif curvature == "gauss_newton":
        split = _split(outputs, log_likelihood_of, len(functions))
        bend = Curvature(curvature, lambda v: split.product(data, v), lambda: split.rows(data), None, held[0].dtype)
    else:
        raise ConfigError(f"curvature must be 'hessian', 'fisher' or 'gauss_newton', got {curvature!r}.")
    analysis = _Analysis(
        _make_route(route, scores, bend, seed, tolerance, max_steps),
        prior_precision.to(scores) if isinstance(prior_precision, Tensor) else float(prior_precision),
    )
    return analysis.report(data, bend, alpha, damping, sweep, labels, search=search)


def stability(
    model: Any,
    z: Tensor,
    alpha: float | None = None,
    *,
    units: Tensor | Sequence[int] | Literal["datum", "group"] = "datum",
    curvature: Literal["hessian", "fisher", "gauss_newton"] = "hessian",
    label_values: Sequence[float] | None = None,
    num_label_draws: int = 32,
    generator: torch.Generator | None = None,
    outputs: Callable[[Any, Any], Tensor] | None = None,
    log_likelihood_of: Callable[[Tensor, Any], Tensor] | None = None,
    batch: Any = None,
    prior_precision: Tensor | float | Literal["model"] = 0.0,
    **options: Any,
) -> Stability:
    r"""Analyse the stability of an ensemble collapsed at one point of a model.

    With V the mean negative Hessian of the units' log likelihoods at the point and J the mean outer product of their
    scores, members there stay together under the alpha-Rényi loss while :math:`V - \alpha J` is positive definite, and
    move apart along its negative directions above

    .. math:: \alpha^* = 1 / \lambda_{\max}(V^{-1} J).

    The point should be where members would collapse to: the maximum of the likelihood, or of the posterior with
    ``prior_precision="model"``. Away from it J holds systematic error too, and alpha* is that of the transient.

    Args:
        model: A model with a log likelihood per datum.
        z: The point, ``(dim,)``, unconstrained.
        alpha: An alpha to judge; None asks for the critical one alone.
        units: What is routed in training: each datum, or each ``"group"`` of the model's (``groups=``); or the unit of
            each datum, as in :func:`unit_stability`.
        curvature: ``"hessian"``, ``"fisher"`` (labels of the model), or ``"gauss_newton"``.
        label_values: For the Fisher matrix: all values that a label can take (``[0, 1]``), which makes it exact.
        num_label_draws: Labels drawn for each datum where ``label_values`` is None, by the model's ``simulate``; fewer
            than 16 are too noisy for an eigenvalue.
        generator: Randomness of those labels.
        outputs: For Gauss-Newton: ``(theta, data) -> (draw, datum, output)``, with ``theta`` as in the model's own log
            likelihood.
        log_likelihood_of: For Gauss-Newton: ``(outputs, data) -> (datum,)`` from outputs ``(datum, output)``.
        batch: Data to use, a :class:`~vifamily.types.Batch` (held-out data, say); None takes the model's own.
        prior_precision: As in :func:`unit_stability`; ``"model"`` takes that of the model's own normal prior over the
            number of units, which is what the loss with divergence weight 1/n sees.
        options: ``route``, ``damping``, ``sweep``, ``search``, ``tolerance``, ``max_steps`` and ``seed`` of
            :func:`unit_stability`.

    Returns:
        The critical alpha, its direction, and what is predicted at ``alpha``.

    Raises:
        ConfigError: If a value is out of range, or a curvature lacks what it is computed from.
        NotAvailableError: If the model has no log likelihood per datum, or cannot be asked for labels.
        ShapeError: If the point or a result has the wrong shape.

    Example:
        >>> import vifamily as vf
        >>> y = torch.tensor([-2.0, 0.0, 2.0, 4.0], dtype=torch.float64)
        >>> def log_likelihood(theta, y):
        ...     return -0.5 * (y - theta["mu"].unsqueeze(-1)) ** 2
        >>> model = vf.models.LikelihoodModel((0.0, 10.0), log_likelihood, data=y, parameters={"mu": "real"})
        >>> found = stability(model, torch.ones(1, dtype=torch.float64), alpha=0.5)
        >>> round(found.alpha_star, 10), found.stable, found.smallest
        (0.2, False, -1.5)
    """
    view = ModelUnits(model, z, batch)
    group = view.units(units) if isinstance(units, str) else _checked_units(units)
    given: dict[str, Any] = dict(options)
    if curvature == "fisher":
        given["labelled"] = (
            view.drawn(num_label_draws, generator) if label_values is None else view.enumerated(label_values)
        )
    elif curvature == "gauss_newton":
        if outputs is None or log_likelihood_of is None:
            raise ConfigError("curvature='gauss_newton' needs outputs= and log_likelihood_of=.")
        given["outputs"], given["log_likelihood_of"] = view.split(outputs, log_likelihood_of)
    if isinstance(prior_precision, str):
        if prior_precision != "model":
            raise ConfigError(f"prior_precision must be a number, a tensor or 'model', got {prior_precision!r}.")
        prior_precision = view.prior_precision(None if group is None else int(group.max()) + 1)
    return unit_stability(
        view.log_likelihood,
        view.point,
        alpha,
        units=group,
        curvature=curvature,
        prior_precision=prior_precision,
        labels=view.labels,
        **given,
    )


class _Analysis:
    """A route with what goes onto the diagonal of V.

    Args:
        route: V and J.
        prior: Precision of the prior.
    """

    def __init__(self, route: Route, prior: Tensor | float) -> None:
        self.route, self.prior = route, prior
        scale = route.mean_diagonal()
        # a V that curves downwards on average has no scale of its own
        self.scale = scale if scale > 0 else float(route.scores.square().mean())

    def added(self, damping: float) -> Tensor | float:
        return self.prior + damping * self.scale

    def report(
        self, data: Units, bend: Curvature, alpha: float | None, damping: float | None, sweep: Sequence[float],
        labels: Sequence[str], *, search: bool,
    ) -> Stability:  # fmt: skip
        """Put everything together."""
        if damping is None:
            no_prior = not isinstance(self.prior, Tensor) and self.prior == 0
            damping = _DAMPING if no_prior and self.route.singular() else 0.0
        found = self.route.critical(self.added(damping))
        swept = tuple((float(d), self.route.critical(self.added(d)).alpha_star) for d in sweep)
        pull = self.route.scores @ found.direction
        square = float(pull.square().mean())
        drift = float(pull.mean()) ** 2 / square if square > 0 else 0.0
        smallest = None if alpha is None else self.route.smallest(alpha, self.added(damping))
        spread = None if alpha is None else self._spread(data, found, alpha, damping, search=search)
        return Stability(
            alpha_star=found.alpha_star,
            direction=found.direction,
            pull=pull,
            curvature_along=found.curvature,
            curvature=bend.name,
            route=self.route.name,
            num_units=self.route.num_units,
            damping=damping,
            sweep=swept,
            alpha=alpha,
            smallest=None if smallest is None else smallest.value,
            smallest_direction=None if smallest is None else smallest.vector,
            spread=spread,
            drift=drift,
            residual=found.residual,
            labels=tuple(labels),
            notes=_notes(found, swept, drift, spread),
        )

    def _spread(self, data: Units, found: Critical, alpha: float, damping: float, *, search: bool) -> Spread:
        left = 1 - alpha / found.alpha_star if found.alpha_star > 0 else -1.0
        stable = left > 0 and found.curvature > 0
        covariance = self.route.covariance(alpha, self.added(damping)) if stable else None
        if covariance is not None:
            covariance = covariance / self.route.num_units
        laplace = (self.route.num_units * found.curvature) ** -0.5 if found.curvature > 0 else math.inf
        inflation = left**-0.5 if stable else math.inf
        separation, gain = _best_pair(data, found, alpha, self.prior) if search else (math.nan, math.nan)
        return Spread(alpha, laplace * inflation, inflation, covariance, separation, gain)


def _best_pair(data: Units, found: Critical, alpha: float, prior: Tensor | float) -> tuple[float, float]:
    """Half the distance and the gain per unit of the best two equal members on the line, prior included."""
    together = float(data.values().mean())
    unit = abs(found.curvature) ** -0.5 if found.curvature else 1.0

    def gain(log_distance: float) -> float:
        step = unit * math.exp(log_distance) * found.direction
        one, other = data.values(step), data.values(-step)
        pair = power_value(torch.stack([one, other]), one.new_zeros(2), alpha)
        value = -float(pair.mean()) - 0.5 * float((prior * step.square()).sum())
        return value - together if math.isfinite(value) else -math.inf

    grid = np.linspace(math.log(1e-2), math.log(30.0), 25)
    gains = [gain(float(g)) for g in grid]
    best = int(np.argmax(gains))
    if not gains[best] > 1e-12 * abs(together):
        return 0.0, 0.0
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    refined = optimize.minimize_scalar(
        lambda g: -gain(float(g)), bounds=(low, high), method="bounded", options={"xatol": 1e-6}
    )
    return unit * math.exp(float(refined.x)), -float(refined.fun)


def _notes(
    found: Critical, sweep: tuple[tuple[float, float], ...], drift: float, spread: Spread | None
) -> tuple[str, ...]:
    out = []
    if found.alpha_star == 0:
        out.append(
            "V is not positive definite: at this point even one member alone is not at a minimum. Go on to the "
            "minimum, or use curvature='fisher'."
        )
    if drift > _DRIFT:
        out.append(
            f"{100 * drift:.0f} % of the squared scores along the direction is their mean: the point is not a "
            "minimum, and members that move apart here may come together again later."
        )
    finite = [a for d, a in sweep if d <= _MILD and math.isfinite(a) and a > 0]
    if finite and max(finite) > 2 * min(finite):
        out.append("The critical alpha depends on the damping: read it as an order of magnitude.")
    if found.residual > 1e-3:
        out.append("The eigenvalue has not converged: raise max_steps.")
    if spread is not None and spread.gain > 0 and spread.alpha < found.alpha_star:
        out.append(
            "The point is stable, yet a pair far apart does better: from a spread start the members may stay spread."
        )
    return tuple(out)


def _make_route(name: str, scores: Tensor, bend: Curvature, seed: int, tolerance: float, max_steps: int) -> Route:
    if name == "auto":
        few = len(scores) <= _MOST_ROWS and scores.shape[1] > len(scores)
        name = (
            "dense"
            if scores.shape[1] <= _DENSE
            else "gram"
            if bend.name == "fisher" and bend.factor is not None and few and len(bend.factor()) <= _MOST_ROWS
            else "matrix_free"
        )
    if name == "dense":
        return Dense(scores, bend)
    if name == "gram":
        return Gram(scores, bend)
    if name == "matrix_free":
        return Free(scores, bend, torch.Generator().manual_seed(seed), tolerance, max_steps)
    raise ConfigError(f"route must be 'auto', 'dense', 'matrix_free' or 'gram', got {name!r}.")


def _checked_units(units: Tensor | Sequence[int] | None) -> Tensor | None:
    if units is None:
        return None
    index = torch.as_tensor(units)
    if index.dim() != 1 or index.is_floating_point() or not len(index):
        raise ShapeError(f"units must be integers (datum,), got {index.dtype} of shape {tuple(index.shape)}.")
    if not torch.equal(index.unique(), torch.arange(int(index.max()) + 1, device=index.device)):
        raise ConfigError("units must be numbered from 0 without gaps: torch.unique(ids, return_inverse=True)[1].")
    return index


def _check_numbers(alpha: float | None, damping: float | None, sweep: Sequence[float]) -> None:
    for name, value in (("alpha", alpha), ("damping", damping), *(("sweep", d) for d in sweep)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name} must be a finite number, zero or above, got {value!r}.")


def _split(outputs: Functions | None, of: Any, count: int) -> GaussNewton:
    if outputs is None or of is None:
        raise ConfigError("curvature='gauss_newton' needs outputs= and log_likelihood_of=.")
    first = as_functions(outputs, "outputs")
    second = tuple(of) if isinstance(of, Sequence) else (of,)
    if len(first) != count or len(second) != count:
        raise ConfigError(f"outputs and log_likelihood_of must come in {count} parts, like log_likelihood.")
    return GaussNewton(first, second)
