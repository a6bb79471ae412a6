"""A model given by its log density alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vifamily import rng
from vifamily.errors import ConfigError, SupportError, VifamilyError
from vifamily.models._base import Model, check_result
from vifamily.models._calls import check_callable, check_count, check_device, check_dtype, prior_draws
from vifamily.registry import register
from vifamily.supports import Layout
from vifamily.types import Batch, Capability, Space

__all__ = ["Density"]

_SMOOTH = frozenset({Capability.SCORE, Capability.SECOND_ORDER})


def layout_of(dim: Any, parameters: Any) -> Layout:
    """Build the layout of a model that takes either a size or named parameters.

    Raises:
        ConfigError: Unless exactly one is given, and well.
    """
    if (dim is None) == (parameters is None):
        raise ConfigError(
            "give one of dim= (log density on unconstrained space) and parameters= (names with supports)."
        )
    if parameters is not None:
        if not isinstance(parameters, Mapping) or not parameters:
            raise ConfigError("parameters must map at least one name to a support, as in {'tau': 'positive'}.")
        return Layout.of(parameters)
    return Layout.of({"z": ((check_count(dim, "dim"),), "real")})


@register("models", "density")
class Density(Model):
    r"""A log density, known up to a constant, as a model.

    With ``dim=`` the function takes points ``(draw, dim)`` of unconstrained space, whose one parameter is ``z``. With
    ``parameters=`` it takes a dict of constrained parameters ``(draw, *shape)``, and the model adds the log Jacobian of
    the map :math:`\theta(z)` to unconstrained space:

    .. math:: \log p(z) = \log p(\theta(z)) + \log |\det \partial\theta / \partial z|.

    Args:
        log_prob: The natural logarithm of the density, one number per draw: ``(draw, dim) -> (draw,)`` or
            ``dict -> (draw,)``. It must be differentiable by torch. A module's parameters become point-estimated ones.
        dim: Number of unconstrained coordinates.
        parameters: Name to support, or to ``(shape, support)``; see :func:`vifamily.supports.support_from`. Where every
            support is ``integer_interval`` the space is discrete: ``z`` counts categories from zero (as floats), and
            there is no score.
        num_data: Size of the data behind the density, for reports; no minibatches come of it.
        dtype: Floating dtype of points and log density.
        device: Where they live.
        sample_prior: Draws from the prior: ``sample_prior(num_draws, generator)`` gives points ``(num_draws, dim)`` or
            a dict of constrained parameters. Used for starting points and prior predictive checks.
        space: The space of ``z`` with ``dim=``: ``"real"`` or ``"circle"`` (angles in radians).
        name: A name for reports.

    Raises:
        ConfigError: If an argument cannot be used.
        SupportError: If a support is unknown, or discrete and continuous ones are mixed.

    Example:
        >>> import torch
        >>> model = Density(lambda theta: -theta["tau"], parameters={"tau": "positive"})  # tau is exponential
        >>> model.log_joint(torch.zeros(3, 1, dtype=torch.float64))  # at tau = 1, where the log Jacobian is 0
        tensor([-1., -1., -1.], dtype=torch.float64)
    """

    def __init__(
        self,
        log_prob: Callable[[Any], Tensor],
        *,
        dim: int | None = None,
        parameters: Mapping[str, Any] | None = None,
        num_data: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        sample_prior: Callable[..., Any] | None = None,
        space: Space | str = Space.REAL,
        name: str | None = None,
    ) -> None:
        check_callable(log_prob, "log_prob", "of the points, one number per draw")
        layout = layout_of(dim, parameters)
        if num_data is not None:
            check_count(num_data, "num_data")
        super().__init__(layout, num_data=num_data, dtype=check_dtype(dtype), device=check_device(device))
        self.function, self.name = log_prob, name
        self._computes_in: tuple[torch.device, torch.dtype] | None = None
        self._named = parameters is not None
        self.num_categories = layout.num_categories
        asked = _checked_space(space, named=self._named)
        self.space = layout.space if self._named else asked
        capabilities = {Capability.LOG_JOINT} | (set() if self.space is Space.DISCRETE else _SMOOTH)
        if sample_prior is not None:
            check_callable(sample_prior, "sample_prior", "sample_prior(num_draws, generator)")
            capabilities.add(Capability.PRIOR_DRAWS)
        if any(True for _ in self.parameters()):
            capabilities.add(Capability.POINT_PARAMETERS)
        self._sample_prior = sample_prior
        self.capabilities = frozenset(capabilities)

    def moved(self, *, device: torch.device, dtype: torch.dtype) -> Model:
        """Return a copy whose points and log density have another device or floating dtype.

        A function that holds tensors of its own may not follow; it is then evaluated where it was, and its points and
        results are converted.
        """
        other = super().moved(device=device, dtype=dtype)
        try:
            with torch.no_grad(), rng.scoped(0):
                other.log_joint(torch.zeros(2, self.dim, dtype=dtype, device=device))
        except VifamilyError:
            other = super().moved(device=self.device, dtype=self.dtype)
            other.device, other.dtype = device, dtype
            other._computes_in = (self.device, self.dtype)  # type: ignore[assignment]
        return other

    def _log_joint(self, z: Tensor, batch: Batch | None) -> Tensor:
        if self._computes_in is not None:
            return self._evaluate(z.to(*self._computes_in)).to(z)
        return self._evaluate(z)

    def _evaluate(self, z: Tensor) -> Tensor:
        if not self._named:
            return self.function(z)
        theta, log_jacobian = self.layout.constrain_with_jacobian(z)
        out = self.function(theta)
        check_result("log_prob", out, (z.shape[0],), z)  # before the sum below, which would broadcast a scalar
        return out + log_jacobian

    def sample_prior(self, num_draws: int, *, generator: torch.Generator) -> Tensor:
        """Draw from the prior on unconstrained space, ``(num_draws, dim)``."""
        if self._sample_prior is None:
            return super().sample_prior(num_draws, generator=generator)
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return prior_draws(self.layout, self._sample_prior, num_draws, generator, like)

    def start(self, num_draws: int, *, generator: torch.Generator) -> Tensor:
        """Return starting points ``(num_draws, dim)``: of the prior, or uniform over categories, angles or (-2, 2)."""
        if self._sample_prior is not None or self.space is Space.REAL:
            return super().start(num_draws, generator=generator)
        unit = torch.rand(num_draws, self.dim, generator=generator, dtype=torch.float64)
        if self.num_categories is None:
            return (2 * torch.pi * (unit - 0.5)).to(self.device, self.dtype)
        return (unit * torch.tensor(self.num_categories)).floor().to(self.device, self.dtype)


def _checked_space(space: Space | str, *, named: bool) -> Space:
    try:
        chosen = Space(space)
    except ValueError:
        raise ConfigError(f"unknown space {space!r}: choose 'real' or 'circle'.") from None
    if chosen is Space.REAL or (chosen is Space.CIRCLE and not named):
        return chosen
    raise SupportError(
        f"the space {chosen.value!r} cannot be set here: name the parameters with their supports "
        "(circle, simplex, integer_interval …) in parameters= instead."
    )
