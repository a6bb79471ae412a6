"""A model given by a prior and a simulator, without a likelihood."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor
from typing import Any, Self

import joblib
import torch
from torch import Tensor

from vifamily import rng
from vifamily.errors import ConfigError, DataError, ModelError, NotAvailableError, ShapeError
from vifamily.models._at_data import SimulatorAtData
from vifamily.models._base import Model, check_result
from vifamily.models._calls import call_seeded, check_callable, check_count, check_device, check_dtype
from vifamily.models._data import as_numbers
from vifamily.models._observed_simulator import ObservedSimulator
from vifamily.models._prior import Prior
from vifamily.models._simulations import SimulationFolder, Simulations
from vifamily.registry import register
from vifamily.supports import Site
from vifamily.types import Batch, Capability

__all__ = ["ObservedSimulator", "Simulations", "Simulator"]

_CHUNK, _CHUNK_SINGLE = 1000, 50
"""Simulations made in one call of a batched simulator, and in one task of one that takes a single parameter."""
_PROBE = 3
_ROUNDED = 1e-4
"""How far outside of its interval, relative to its size, a parameter may be by rounding."""
_EDGE = 17.0
"""The logit of one rounding of single precision."""


@register("models", "simulator")
class Simulator(Model):
    r"""A prior and a simulator: the joint :math:`p(\theta) p(x \mid \theta)` by its draws alone.

    The conventions are those of sbi: the prior is a torch distribution, or an object with ``sample(shape)`` and
    ``log_prob(theta)``; the simulator maps a batch of parameters ``(batch, dim)`` to a batch of data ``(batch,
    *shape)``, or one parameter ``(dim,)`` to one datum. Beyond them the prior may be a function of the number of draws,
    or a dictionary of independent priors by name: the simulator then gets a dictionary of tensors. Parameters are
    moved to unconstrained space by their supports, so that no posterior leaks out of its prior. Discrete ones, not
    mixed with continuous ones, are coded 0, 1, .... Angles, under von Mises priors or of the support ``circle``, are
    not cut anywhere: their families live on the circle, and draws lie in ``(-pi, pi]``.

    Prior and simulator draw from an explicit generator: it is passed to those that take ``generator=``, and others run
    under its seed, after which global random states are put back.

    Args:
        prior: The prior.
        simulate: The simulator.
        parameters: Name to support, or to ``(shape, support)``; see :func:`vifamily.supports.support_from`. None reads
            them off distributions and takes real numbers otherwise; a single prior is called ``theta``.
        log_likelihood: Where there is one: ``(theta, x) -> (draw,)`` for parameters of many draws and one observation.
            Posteriors can then be weighed and refined, and the bounds of variational inference are to be had.
        mean_statistics: For the Rao-Blackwellised ``inclusive_kl``, where known: ``(theta, x) -> (pair, statistic)``,
            the mean of the sufficient statistics given the data of each pair, or given the data and such parts of
            ``theta`` as it uses. Statistics are those of ``z`` in the order of the family: first and second moments
            for normal laws, cosines and sines for angles.
        batched: Whether the simulator takes batches; None tries.
        dtype: Floating dtype of parameters, data and networks.
        device: Where networks live; simulations are made on the CPU.
        name: A name for reports, and for the identity of stored simulations.

    Raises:
        ConfigError: If an argument cannot be used.
        SupportError: If the support of a prior has no map to unconstrained space, or angles are mixed with others.

    Example:
        >>> prior = torch.distributions.Uniform(torch.zeros(2), torch.ones(2))
        >>> simulator = Simulator(prior, lambda theta: theta + 0.1 * torch.randn_like(theta))
        >>> simulator.layout
        Layout(theta[2]: interval([0.0, 0.0], [1.0, 1.0]))
        >>> pairs = simulator.simulations(500, seed=0)
        >>> tuple(pairs.theta.shape), tuple(pairs.x.shape), pairs.non_finite
        ((500, 2), (500, 2), 0)
    """

    def __init__(
        self,
        prior: Any,
        simulate: Callable[..., Any],
        *,
        parameters: Mapping[str, Any] | None = None,
        log_likelihood: Callable[[Any, Tensor], Tensor] | None = None,
        mean_statistics: Callable[[Any, Tensor], Tensor] | None = None,
        batched: bool | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        name: str | None = None,
    ) -> None:
        check_callable(simulate, "simulate", "of parameters (batch, dim) that gives data (batch, ...)")
        if log_likelihood is not None:
            check_callable(log_likelihood, "log_likelihood", "of parameters and one observation")
        if mean_statistics is not None:
            check_callable(mean_statistics, "mean_statistics", "of parameters and data of the same pairs")
        found = Prior(prior, parameters)
        super().__init__(found.layout, dtype=check_dtype(dtype), device=check_device(device))
        self.num_categories = found.layout.num_categories
        self.space = found.space
        self.prior, self.function, self.log_likelihood_function = found, simulate, log_likelihood
        self.name, self._batched = name, batched
        self.stored: Simulations | None = None
        self.observations: Tensor | None = None
        capabilities = {Capability.SIMULATE, Capability.PRIOR_DRAWS}
        if found.has_log_prob:
            capabilities.add(Capability.PRIOR)
        self.mean_statistics_function = mean_statistics
        if mean_statistics is not None:
            capabilities.add(Capability.MEAN_STATISTICS)
        self.capabilities = frozenset(capabilities)

    # -- the prior -----------------------------------------------------------------------------------------------------
    def _log_joint(self, z: Tensor, batch: Batch | None) -> Tensor:
        raise NotAvailableError(
            "a simulator has a log joint only at an observation and with a likelihood: give it log_likelihood=, and "
            "use simulator.at(x)."
        )

    def _log_prior(self, z: Tensor) -> Tensor:
        if Capability.PRIOR not in self.capabilities:
            raise NotAvailableError("this simulator's prior has no log_prob: it is given by its draws alone.")
        theta, log_jacobian = self.layout.constrain_with_jacobian(z)
        return self.prior.log_prob(theta).to(z) + log_jacobian

    def sample_prior(self, num_draws: int, *, generator: torch.Generator) -> Tensor:
        """Draw from the prior on unconstrained space, ``(num_draws, dim)``."""
        check_count(num_draws, "num_draws")
        theta = self.layout.flatten(self.prior.draw(num_draws, generator=generator))
        return self.unconstrained(theta)

    def unconstrained(self, theta: Tensor) -> Tensor:
        """Map parameters side by side ``(pair, column)`` to unconstrained space ``(pair, dim)``."""
        # in double precision: the ends of an interval are otherwise reached
        z = self.layout.unconstrain(self.layout.unflatten(theta.double()))
        for site in self._intervals:
            # a draw rounded to an end of its interval stands for one within a rounding of it
            z[:, site.start : site.stop].clamp_(-_EDGE, _EDGE)
        bad = ~z.isfinite().all(-1) | self._outside(theta.double(), z)
        if bool(bad.any()):
            raise DataError(f"{int(bad.sum())} of {len(z)} parameters lie on the edge of or outside their support.")
        return z.to(self.device, self.dtype)

    @property
    def _intervals(self) -> list[Site]:
        """Parameters that lie between two bounds."""
        return [site for site in self.layout.sites if site.plain["kind"] == "interval"]

    def _outside(self, theta: Tensor, z: Tensor) -> Tensor:
        """Rows with a parameter outside its interval by more than rounding, ``(pair,)``."""
        given, back = self.layout.unflatten(theta), self.layout.constrain(z)
        bad = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        for site in self._intervals if len(z) else []:
            inside = back[site.name]
            size = inside.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            gap = (given[site.name].to(inside) - inside).abs().reshape(len(z), -1)
            bad |= ~(gap <= _ROUNDED * size).all(-1)
        return bad

    def mean_statistics(self, z: Tensor, x: Tensor) -> Tensor:
        """Mean sufficient statistics given data, ``(pair, dim), (pair, *shape) -> (pair, statistic)``.

        Raises:
            NotAvailableError: If none were given.
            ShapeError: If there is not one row for each pair.
        """
        if self.mean_statistics_function is None:
            raise NotAvailableError("mean statistics are not known: Simulator(..., mean_statistics=...).")
        theta = self.layout.constrain(z)
        out = self.mean_statistics_function(theta if self.prior.named else next(iter(theta.values())), x)
        check_result("mean_statistics", out, (len(z), None), z)
        return out

    # -- simulations ---------------------------------------------------------------------------------------------------
    def simulate(self, theta: Mapping[str, Tensor], *, generator: torch.Generator) -> Tensor:
        """Simulate data for parameters.

        Args:
            theta: Named parameters ``(batch, *shape)``.
            generator: Randomness.

        Returns:
            ``(batch, *shape)`` on the CPU, in the simulator's dtype; numbers may be non-finite.

        Raises:
            ModelError: If the simulator raises.
            ShapeError: If it does not give data of one shape for each parameter.
        """
        num = next(iter(theta.values())).shape[0]
        with torch.no_grad():
            if self.takes_batches:
                return self._call(theta, num, generator)
            rows = [self._call({n: v[i] for n, v in theta.items()}, None, generator) for i in range(num)]
        if len({row.shape for row in rows}) > 1:
            raise ShapeError("the simulator gives data of different shapes: pad them to one shape.")
        return torch.stack(rows)

    @property
    def takes_batches(self) -> bool:
        """Whether the simulator maps many parameters at once; tried once where it was not said."""
        if self._batched is None:
            theta = self.prior.draw(_PROBE, generator=rng.generator(0, "simulator probe"))
            try:
                with torch.no_grad():
                    self._call(theta, _PROBE, rng.generator(0, "simulator probe"))
                self._batched = True
            except (ModelError, ShapeError):
                self._batched = False
        return self._batched

    def _call(self, theta: Mapping[str, Tensor], num: int | None, generator: torch.Generator) -> Tensor:
        argument = dict(theta) if self.prior.named else next(iter(theta.values()))
        made = call_seeded("the simulator", self.function, argument, generator=generator)
        try:
            given = torch.as_tensor(made).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ShapeError(f"the simulator must give numbers in a tensor, got {type(made).__name__}.") from error
        if given.is_complex():
            raise ShapeError("the simulator gave complex numbers: give real and imaginary part side by side.")
        x = given.to("cpu", self.dtype)
        if num is not None and (x.dim() == 0 or x.shape[0] != num):
            raise ShapeError(
                f"the simulator gave data of shape {tuple(x.shape)} for {num} parameters: the first axis must be that "
                "of the parameters. One that takes a single parameter is declared by batched=False."
            )
        return x

    def simulations(
        self,
        num: int,
        *,
        seed: int = 0,
        workers: int = 1,
        folder: str | os.PathLike[str] | None = None,
    ) -> Simulations:
        """Draw from the prior and simulate, in chunks that are addressed by seed and number.

        Args:
            num: Number of simulations.
            seed: Root seed: the same simulations whatever the number of workers.
            workers: Processes, through joblib; -1 for one per core. Under ``joblib.parallel_config`` another backend
                (dask, ray) runs them on other machines.
            folder: Store them there, chunk by chunk. What the folder already holds is read and not made again, so that
                an interrupted run is resumed and a finished one extended; it then may hold more than ``num``, and all
                is returned.

        Returns:
            The pairs; those with non-finite numbers are counted and left out.

        Raises:
            ConfigError: If a number is out of range or the folder cannot be written.
            CheckpointError: If the folder holds simulations of another prior or seed.
            DataError: If no simulation is finite.
            ModelError: If prior or simulator raise.
        """
        check_count(num, "num")
        if isinstance(workers, bool) or not isinstance(workers, int) or workers == 0:
            raise ConfigError(f"workers must be a positive integer, or -1 for one per core, got {workers!r}.")
        chunk = _CHUNK if self.takes_batches else _CHUNK_SINGLE
        if folder is None:
            sizes = [min(chunk, num - start) for start in range(0, num, chunk)]
            return Simulations.join(self._made(list(enumerate(sizes)), seed, workers))
        store = SimulationFolder(folder, self._identity(seed))
        plan = store.plan(num, chunk)
        store.declare(plan)
        missing = [(i, size) for i, size in plan if not store.has(i)]
        # what is finished is stored before the next is begun, so that an error loses no more than one round
        step = 1 if workers == 1 else max(1, 4 * (workers if workers > 0 else os.cpu_count() or 1))
        for start in range(0, len(missing), step):
            some = missing[start : start + step]
            for (index, _), part in zip(some, self._made(some, seed, workers), strict=True):
                store.add(index, part)
        return Simulations.join([store.read(i) for i, _ in plan])

    def _identity(self, seed: int) -> dict[str, Any]:
        first = self.layout.flatten(self.prior.draw(2, generator=rng.generator(seed, "simulations identity")))
        return {"name": self.name, "seed": rng.check_seed(seed), "layout": self.layout.to_json(),
                "dtype": str(self.dtype), "prior": first.double().tolist()}  # fmt: skip

    def _made(self, plan: list[tuple[int, int]], seed: int, workers: int) -> list[Simulations]:
        if workers == 1 or len(plan) == 1:
            return [_chunk(self, seed, index, size) for index, size in plan]
        bare = copy.copy(self)
        bare.stored = None
        try:
            made: list[Simulations] = joblib.Parallel(n_jobs=workers)(
                joblib.delayed(_chunk)(bare, seed, index, size) for index, size in plan
            )
        except BrokenExecutor as error:
            raise ModelError(
                "a worker process ended while it simulated: it was killed, most often for want of memory, or the "
                "simulator ended its process. Try workers=1."
            ) from error
        return made

    def with_simulations(self, theta: Any, x: Any = None) -> Self:
        """Return this simulator with stored simulations, which fits then learn from.

        Args:
            theta: :class:`Simulations`; or parameters, ``(pair, dim)`` or named ``(pair, *shape)``, in their supports.
            x: The data that belong to them, ``(pair, *shape)``.

        Raises:
            ShapeError: If the numbers of rows differ, or the parameters are not those of the prior.
            DataError: If no pair is finite.
        """
        if isinstance(theta, Simulations):
            pairs = theta
        else:
            if x is None:
                raise ShapeError("give the data that belong to the parameters as well: with_simulations(theta, x).")
            columns = self.layout.flatten(theta) if isinstance(theta, Mapping) else as_numbers(theta, "parameters")
            pairs = Simulations.of(columns.to(self.dtype), as_numbers(x, "data").to(self.dtype))
        if not len(pairs) and not pairs.non_finite:
            raise DataError("there is not a single simulation.")
        if pairs.theta.shape[-1] != len(self.layout.columns()):
            raise ShapeError(
                f"the parameters must have {len(self.layout.columns())} columns, {', '.join(self.layout.columns())}, "
                f"got {pairs.theta.shape[-1]}."
            )
        other = copy.copy(self)
        other.stored = Simulations.join([pairs])
        return other

    def with_observations(self, x: Any) -> Self:
        """Return this simulator with observed data, over which objectives by the likelihood then average.

        Args:
            x: ``(datum, *shape)``.

        Raises:
            ShapeError: If there is no axis of data.
            DataError: If a number is not finite.
        """
        data = as_numbers(x, "observations").detach().to(self.device, self.dtype)
        if data.dim() == 0 or not len(data):
            raise ShapeError(f"observations must have a first axis of data, got the shape {tuple(data.shape)}.")
        if not bool(data.isfinite().all()):
            raise DataError("the observations have numbers that are not finite.")
        other = copy.copy(self)
        other.observations = data
        return other

    def moved(self, *, device: torch.device, dtype: torch.dtype) -> Self:
        """Return a copy whose networks live on another device, or whose numbers have another floating dtype."""
        other = copy.copy(self)
        other.device, other.dtype = device, check_dtype(dtype)
        return other

    def by_likelihood(self) -> Model:
        """This simulator as a model with a log joint at data, where it has a likelihood and the prior a density."""
        if self.log_likelihood_function is None or Capability.PRIOR not in self.capabilities:
            return self
        return SimulatorAtData(self)

    # -- at an observation ---------------------------------------------------------------------------------------------
    def at(self, x: Any) -> ObservedSimulator:
        """Return the model of one observation: prior, new data, and the log joint where there is a likelihood.

        Args:
            x: The observation, of the shape of one simulation.

        Raises:
            DataError: If it is not finite.
        """
        return ObservedSimulator(self, x)


def _chunk(simulator: Simulator, seed: int, index: int, size: int) -> Simulations:
    source = rng.generator(seed, "simulations", index)
    theta = simulator.prior.draw(size, generator=source)
    x = simulator.simulate(theta, generator=source)
    return Simulations.of(simulator.layout.flatten(theta).detach(), x)
