"""What an amortised fit returns: a posterior for every observation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vifamily import checkpoint
from vifamily.diagnostics import Calibration, Coverage, NullTest, expected_coverage, local_c2st, sbc, tarp
from vifamily.errors import CheckpointError, ConfigError, DataError, NotAvailableError, ShapeError
from vifamily.models import ObservedSimulator, Simulator
from vifamily.models._data import as_numbers
from vifamily.posterior import FitRecord, Posterior
from vifamily.posterior.amortised._family import AmortisedFamily
from vifamily.posterior.amortised._refine import Refined, refine
from vifamily.posterior.amortised.encoders import Encoder, as_encoder
from vifamily.rng import draw_noise, generator, split
from vifamily.supports import Layout
from vifamily.types import Capability

__all__ = ["AmortisedPosterior"]

_NAME = "amortised"
_NO_MODEL = "it comes from an amortised posterior that was loaded without its simulator: load(path, model=simulator)"


class AmortisedPosterior:
    """A conditional family fitted to a simulator: call it with an observation.

    Args:
        simulator: The simulator, or None when it is not there.
        family: Encoder and conditional family.
        record: How the fit went.
        layout: Named parameters and their places in ``z``.
        encoder_spec: The spec of the encoder, or None for a module of the user's own.
        config: The configuration of the fit, plain data.
    """

    def __init__(
        self,
        simulator: Simulator | None,
        family: AmortisedFamily,
        record: FitRecord,
        *,
        layout: Layout,
        encoder_spec: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.simulator, self.family, self.record, self.layout = simulator, family, record, layout
        self.encoder_spec = encoder_spec
        self.config: dict[str, Any] | None = None if config is None else dict(config)

    def __repr__(self) -> str:
        record = self.record
        return (
            f"AmortisedPosterior({record.family}, {record.objective}, {record.stop_reason} after {record.steps} steps: "
            f"{self.layout!r} given x{list(self.family.encoder.shape)})"
        )

    def __call__(self, x: Any) -> Posterior:
        """Return the posterior of one observation: draws, density, summary, diagnosis, files.

        Args:
            x: The observation, of the shape of one simulation.

        Raises:
            ShapeError: If the shape is another.
            DataError: If it is not finite.
        """
        observed = as_numbers(x, "an observation")
        model = None if self.simulator is None else ObservedSimulator(self.simulator, observed)
        if model is not None and tuple(model.x.shape) == (1, *self.family.encoder.shape):
            model = ObservedSimulator(model.simulator, model.x[0])
        out = Posterior(
            model, self.family.at(observed), self.record, layout=self.layout, config=self.config,
        )  # fmt: skip
        if model is None:
            out._no_model = _NO_MODEL
        return out

    def refine(
        self, x: Any, num_draws: int = 1000, *, pool: int | None = None, defensive: float = 0.05, tune: bool = True,
        steps: int = 500, seed: int | None = None,
    ) -> Refined:  # fmt: skip
        """Correct the posterior of one observation by the likelihood.

        Points of the posterior, and a few of the prior, are weighed by ``p(theta) p(x | theta)`` over the density of
        the mixture that they came from; draws are chosen by the smoothed weights. Where k-hat says that the weights
        cannot be trusted, a copy of the networks first takes steps of ``reweighted_wake`` at this observation alone.

        Args:
            x: The observation.
            num_draws: Draws to choose, with replacement.
            pool: Points to weigh; by default four times as many, 4,000 at least.
            defensive: Share of them that comes from the prior, so that what the posterior left out is seen.
            tune: Whether to fit on at the observation where the weights cannot be trusted.
            steps: Most steps of that fit.
            seed: Root seed; by default that of the fit.

        Returns:
            Draws, weights, k-hat and the log evidence.

        Raises:
            NotAvailableError: If the simulator, its likelihood or the density of its prior is not there, or no point
                has any weight.
            ConfigError: If a number is out of range.

        Warns:
            VifamilyWarning: If k-hat is above its threshold in the end.
        """
        return refine(self, x, num_draws, pool=pool, defensive=defensive, tune=tune, steps=steps, seed=seed)

    # -- many observations at once -------------------------------------------------------------------------------------
    def _data(self, x: Any) -> Tensor:
        like, shape = self.family.encoder.shift, self.family.encoder.shape
        data = as_numbers(x, "observations").to(like)
        if data.dim() != len(shape) + 1 or tuple(data.shape[1:]) != shape:
            wanted = ", ".join(["datum", *map(str, shape)])
            raise ShapeError(f"observations must have shape ({wanted}), got {tuple(data.shape)}.")
        if not bool(data.isfinite().all()):
            bad = int((~data.reshape(len(data), -1).isfinite().all(-1)).sum())
            raise DataError(f"{bad} of {len(data)} observations have numbers that are not finite: leave them out.")
        return data

    @torch.no_grad()
    def draws(self, x: Any, num_draws: int = 1000, *, seed: int | None = None) -> Tensor:
        """Draw on unconstrained space at many observations.

        Args:
            x: ``(datum, *shape)``.
            num_draws: Draws for each.
            seed: Seed of the draws; by default that of the fit.

        Returns:
            ``(num_draws, datum, dim)``.

        Raises:
            ShapeError: If the shape of the observations is another.
            DataError: If one is not finite.
            ConfigError: If ``num_draws`` is not a positive integer.
        """
        if isinstance(num_draws, bool) or not isinstance(num_draws, int) or num_draws < 1:
            raise ConfigError(f"num_draws must be a positive integer, got {num_draws!r}.")
        source = generator(self.record.seed if seed is None else seed, "posterior")
        data, latent = self._data(x), self.family.latent
        if Capability.WEIGHTED in self.family.capabilities:
            context = self.family.encoder(data)
            return self.family.family.sample(num_draws, generator=source, context=context)
        parts = []
        # the memory of a pass is that of all draws at some observations
        for part in data.split(max(1, 100_000 // num_draws)):
            noise = draw_noise(self.family.noise_spec, (num_draws, len(part)), source, dtype=latent.dtype,
                               device=latent.device)  # fmt: skip
            parts.append(self.family(noise, part).z)
        return torch.cat(parts, dim=1)

    def sample(self, x: Any, num_draws: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """Draw named parameters in their supports at many observations, ``(num_draws, datum, *shape)`` each."""
        return self.layout.constrain(self.draws(x, num_draws, seed=seed))

    @torch.no_grad()
    def log_prob(self, z: Tensor, x: Any) -> Tensor:
        """Log density at points ``(..., datum, dim)`` of unconstrained space given data ``(datum, *shape)``.

        Raises:
            ShapeError: If points or data have another shape.
            DataError: If data are not finite.
        """
        data, points = self._data(x), as_numbers(z, "points").to(self.family.encoder.shift)
        if points.dim() < 2 or points.shape[-1] != self.family.dim or points.shape[-2] not in (1, len(data)):
            raise ShapeError(
                f"points must have shape (..., {len(data)}, {self.family.dim}), one for each of the data, got "
                f"{tuple(points.shape)}."
            )
        return self.family.log_prob(points, data)

    # -- calibration ---------------------------------------------------------------------------------------------------
    def sbc(self, num_simulations: int = 200, *, num_draws: int = 999, seed: int = 0, **options: Any) -> Calibration:
        """Simulation-based calibration: see :func:`vifamily.diagnostics.sbc`. Nothing is fitted anew.

        Args:
            num_simulations: Number of simulated observations.
            num_draws: Draws of each posterior.
            seed: Root seed of the simulations.
            **options: ``quantities``, ``progress``.

        Raises:
            NotAvailableError: If the simulator is not there.
        """
        simulator = self._require_simulator()
        first = simulator.simulations(1, seed=seed).x[0]

        def conditioned(model: Any, seed: int) -> Any:
            return _Seeded(self(model.x), seed)

        return sbc(simulator.at(first), conditioned, num_simulations=num_simulations, num_draws=num_draws,
                   seed=seed, **options)  # fmt: skip

    def coverage(self, num_simulations: int = 500, *, num_draws: int = 199, seed: int = 0) -> Coverage:
        """Coverage of highest-density regions: see :func:`vifamily.diagnostics.expected_coverage`.

        Args:
            num_simulations: Number of simulated observations.
            num_draws: Draws of each posterior.
            seed: Root seed of the simulations and draws.

        Raises:
            NotAvailableError: If the simulator is not there, or the family has no density.
        """
        z, x = self._simulated(num_simulations, seed)
        draws = self.draws(x, num_draws, seed=seed)
        return expected_coverage(self.log_prob(z, x), self.log_prob(draws, x).T, seed=seed)

    def tarp(self, num_simulations: int = 500, *, num_draws: int = 199, seed: int = 0) -> Coverage:
        """Coverage of balls about random points, from draws alone: see :func:`vifamily.diagnostics.tarp`.

        Args:
            num_simulations: Number of simulated observations.
            num_draws: Draws of each posterior.
            seed: Root seed of the simulations, draws and points.

        Raises:
            NotAvailableError: If the simulator is not there.
        """
        z, x = self._simulated(num_simulations, seed)
        draws = self.draws(x, num_draws, seed=seed).transpose(0, 1)
        return tarp(self._columns(z), self._columns(draws), generator=generator(seed, "tarp"))

    def local_c2st(
        self, x: Any, num_simulations: int = 1000, *, num_draws: int = 500, seed: int = 0, **options: Any
    ) -> NullTest:
        """Whether the posterior is right at one observation: see :func:`vifamily.diagnostics.local_c2st`.

        Args:
            x: The observation.
            num_simulations: Number of simulations that the classifier learns from.
            num_draws: Draws at the observation.
            seed: Root seed.
            **options: ``num_null``, ``classifier``.

        Raises:
            NotAvailableError: If the simulator is not there.
        """
        z, data = self._simulated(num_simulations, seed)
        observed = self.family.one(as_numbers(x, "an observation"))
        one, here = self.draws(data, 1, seed=seed)[0], self.draws(observed, num_draws, seed=seed)[:, 0]
        return local_c2st(
            self._columns(z), data.reshape(len(data), -1), self._columns(one), observed=observed.flatten(),
            observed_draws=self._columns(here), seed=seed, **options,
        )  # fmt: skip

    def _require_simulator(self) -> Simulator:
        if self.simulator is None:
            raise NotAvailableError(f"calibration needs the simulator, and {_NO_MODEL}.")
        return self.simulator

    def _simulated(self, num: int, seed: int) -> tuple[Tensor, Tensor]:
        simulator = self._require_simulator()
        made = simulator.simulations(num, seed=split(seed, "calibration"))
        return simulator.unconstrained(made.theta), made.x

    def _columns(self, z: Tensor) -> Tensor:
        """Parameters side by side; of angles their points on the plane, between which distances have no cut."""
        columns = self.layout.flatten(self.layout.constrain(z))
        if self.layout.angles():
            return torch.cat([columns.cos(), columns.sin()], -1)
        return columns

    # -- files ---------------------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save to a folder: tensors as safetensors, everything else as JSON; the simulator is not saved.

        Raises:
            ConfigError: If it cannot be written.
        """
        record, trace = self.record.to_plain()
        tensors: dict[str, Tensor] = {f"trace/{key}": value for key, value in trace.items()}
        tensors.update({f"family/{key}": value for key, value in self.family.family.state_dict().items()})
        tensors.update({f"encoder/{key}": value for key, value in self.family.encoder.state_dict().items()})
        meta = {
            "kind": "amortised posterior",
            "family": checkpoint.describe_family(self.family.family),
            "encoder": self.encoder_spec,
            "shape": list(self.family.encoder.shape),
            "layout": self.layout.to_json(),
            "config": self.config,
            "record": record,
        }
        return checkpoint.write(path, tensors, meta, name=_NAME)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: Simulator | None = None,
        encoder: Any = None,
        device: torch.device | str | None = None,
    ) -> AmortisedPosterior:
        """Load what :meth:`save` wrote. Nothing in the files is executed.

        Args:
            path: The folder.
            model: The simulator, for whatever needs it: calibration, prediction, importance weights.
            encoder: The encoder, where it was a module of the user's own: one of the same architecture.
            device: Where the networks go; by default the saved device, or the CPU where that is not there.

        Raises:
            CheckpointError: If a file is missing, damaged, or does not fit.
        """
        tensors, meta = checkpoint.read(path, name=_NAME)
        field = checkpoint.field
        if meta.get("kind") != "amortised posterior":
            raise CheckpointError(f"{Path(path)} holds no amortised posterior.")
        record = FitRecord.from_plain(field(meta, "record", dict), _under(tensors, "trace/"))
        layout = Layout.from_json(field(meta, "layout", dict))
        if model is not None and model.layout != layout:
            raise CheckpointError(f"the given simulator has the parameters {model.layout!r}, the saved one {layout!r}.")
        family = checkpoint.rebuild_family(field(meta, "family", dict), _under(tensors, "family/"), device=device)
        spec, shape = field(meta, "encoder", str, optional=True), field(meta, "shape", list)
        if spec is None and encoder is None:
            raise CheckpointError(
                "the saved encoder was a module of your own: give one like it, load(path, encoder=...)."
            )
        built = as_encoder(spec if encoder is None else encoder).build(
            [int(n) for n in shape], generator=generator(0, "load"), dtype=family.latent.dtype,
            device=family.latent.device,
        )  # fmt: skip
        _restore(built, _under(tensors, "encoder/"))
        module = AmortisedFamily(built, family)
        module.requires_grad_(requires_grad=False)
        return cls(model, module, record, layout=layout, encoder_spec=spec,
                   config=field(meta, "config", dict, optional=True))  # fmt: skip


@dataclasses.dataclass
class _Seeded:
    """A posterior whose draws have a seed of their own."""

    posterior: Posterior
    seed: int

    @property
    def record(self) -> FitRecord:
        return self.posterior.record

    def draws(self, num_draws: int) -> Tensor:
        return self.posterior.draws(num_draws, seed=self.seed)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _restore(encoder: Encoder, state: Mapping[str, Tensor]) -> None:
    current = encoder.state_dict()
    if set(current) != set(state) or any(
        current[key].shape != state[key].shape or current[key].dtype != state[key].dtype for key in current
    ):
        raise CheckpointError("the saved encoder does not fit the one that was built: give encoder= as it was.")
    if any(not bool(value.isfinite().all()) for value in state.values() if value.is_floating_point()):
        raise CheckpointError("the saved encoder holds NaN or infinite values.")
    encoder.load_state_dict(dict(state))
