"""A guide written by hand for a Pyro model, as a family."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import transform_to

from vifamily.errors import ConfigError, IncompatibleError, ShapeError
from vifamily.families._base import Family, FamilyEntry, uniform_log_weight
from vifamily.families._foreign import load
from vifamily.rng import scoped
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec

__all__ = ["GuideFamily", "PyroGuide", "arguments_of", "private_store"]

_CAPABILITIES = frozenset({Capability.DRAWS, Capability.REPARAMETERISED, Capability.LOG_Q})


@contextlib.contextmanager
def private_store(*, keep: bool) -> Iterator[Any]:
    """Run Pyro under a parameter store of its own, then put the user's back untouched.

    Args:
        keep: Whether the private store starts with what the user's holds.
    """
    store = load("pyro").get_param_store()
    before = store.get_state()
    with store.scope() as inner:
        store.clear()
        if keep:
            store.set_state({"params": dict(before["params"]), "constraints": dict(before["constraints"])})
        yield inner and store


def arguments_of(model: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a Pyro model's program, which its guide takes too."""
    program = getattr(model, "program", model)
    return tuple(program.args), dict(program.kwargs)


class _Reference:
    """Holds what must be shared, not copied, when a family is copied (a model with its data, a function)."""

    def __init__(self, **content: Any) -> None:
        self.__dict__.update(content)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        return self


@dataclasses.dataclass(frozen=True)
class PyroGuide(FamilyEntry):
    """A guide written by hand, with continuous latents, for a Pyro model.

    Its ``pyro.param`` statements become parameters of the family, starting from the user's parameter store where it
    holds them; a ``PyroModule`` is copied with its own parameters. The store itself is never changed. Each draw is one
    run of the guide, so a step costs as many runs as draws. Noise enters as a seed: two uniform numbers per draw seed
    torch for that run, so draws are a function of (parameters, noise), reparameterised, but not a smooth function of
    the noise.

    Args:
        guide: The guide, a function or a ``PyroModule``, with the arguments of the model.
        model: The Pyro model, for its arguments and the order of its sites.
    """

    guide: Any = dataclasses.field(repr=False)
    model: Any = dataclasses.field(repr=False)
    capabilities = _CAPABILITIES
    given = True

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> GuideFamily:
        """Run the guide once to find its sites and parameters, and build the family.

        Raises:
            ConfigError: If the guide's sites are not those of the model, or it has auxiliary ones.
            ShapeError: If a site has another shape than in the model.
            IncompatibleError: If a site is discrete or has no reparameterised draws.
        """
        self.check_space(latent)
        return GuideFamily(latent, self.guide, self.model, generator)


class GuideFamily(Family):
    """The module of :class:`PyroGuide`.

    Args:
        latent: What is covered.
        guide: The guide.
        model: The Pyro model.
        generator: Randomness of the first run.
    """

    capabilities = _CAPABILITIES
    vectorised = False

    def __init__(self, latent: LatentSpec, guide: Any, model: Any, generator: torch.Generator) -> None:
        super().__init__(latent)
        self.noise_spec = NoiseSpec((2,), "uniform")
        module = copy.deepcopy(guide) if isinstance(guide, nn.Module) else None
        self.guide = None if module is None else module
        self._fixed = _Reference(
            layout=model.layout, function=guide if module is None else None, arguments=arguments_of(model)
        )
        self.free = nn.ParameterList()
        self._names: list[str] = []
        self._constraints = _Reference(of={})
        with private_store(keep=module is None) as store, scoped(generator):
            trace = self._trace(self._callable())
            found = {} if module is not None else dict(store.named_parameters())
            for name, value in found.items():
                self._names.append(name)
                self._constraints.of[name] = store._constraints[name]
                self.free.append(nn.Parameter(value.detach().clone().to(dtype=latent.dtype, device=latent.device)))
        if module is not None:
            self.to(dtype=latent.dtype, device=latent.device)
        self._check(trace)

    def _callable(self) -> Any:
        return self._fixed.function if self.guide is None else self.guide

    def _trace(self, guide: Any) -> Any:
        args, kwargs = self._fixed.arguments
        trace = load("pyro").poutine.trace(guide).get_trace(*args, **kwargs)
        trace.compute_log_prob()
        return trace

    def _check(self, trace: Any) -> None:
        layout, latents = self._fixed.layout, _latents(trace)
        if set(latents) != set(layout.names):
            raise ConfigError(
                f"the guide samples the sites {sorted(latents)}, but the model's latents are {sorted(layout.names)}. "
                "Sample each latent of the model once, and nothing else."
            )
        for name, node in latents.items():
            if not node["fn"].has_rsample or node["fn"].support.is_discrete:
                raise IncompatibleError(
                    f"the guide's site {name!r} has no reparameterised draws ({type(node['fn']).__name__}).",
                    missing=(str(Capability.REPARAMETERISED),),
                )
            if tuple(node["value"].shape) != layout[name].shape:
                raise ShapeError(
                    f"the guide's site {name!r} has shape {tuple(node['value'].shape)}, "
                    f"but {layout[name].shape} in the model."
                )

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Supply this family's parameters to the guide, under a private store."""
        messenger = load("pyro.poutine.messenger").Messenger
        values = {
            name: transform_to(self._constraints.of[name])(value)
            for name, value in zip(self._names, self.free, strict=True)
        }

        class Supply(messenger):  # type: ignore[misc, valid-type]
            def _pyro_param(self, message: Any) -> None:
                if message["name"] in values:
                    message["value"], message["done"] = values[message["name"]], True

        with private_store(keep=False), Supply():
            yield

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Run the guide once per row of noise, seeded by it."""
        self.check_context(context)
        layout, draws, densities = self._fixed.layout, [], []
        with self._running():
            for row in noise.detach().tolist():
                high, low = (int(min(max(part, 0.0), 1.0) * (2**31 - 1)) for part in row)
                with scoped((high << 31) | low):
                    trace = self._trace(self._callable())
                latents = _latents(trace)
                draws.append(layout.unconstrain({k: node["value"].to(self.shift) for k, node in latents.items()}))
                densities.append(sum(node["log_prob_sum"] for node in latents.values()))
        z = torch.stack(draws)
        log_q = torch.stack(densities).to(z) + layout.constrain_with_jacobian(z)[1]
        return Draw(z, log_q, uniform_log_weight(log_q, noise.shape[0]))

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Run the guide once per point, held at it."""
        layout, poutine = self._fixed.layout, load("pyro").poutine
        flat = u.reshape(-1, self.dim)
        theta, log_jacobian = layout.constrain_with_jacobian(flat)
        densities = []
        with self._running(), scoped(0):
            for i in range(flat.shape[0]):
                held = {name: value[i] for name, value in theta.items()}
                trace = self._trace(poutine.condition(self._callable(), data=held))
                densities.append(sum(trace.nodes[name]["log_prob_sum"] for name in layout.names))
        out: Tensor = torch.stack(densities).to(u) + log_jacobian
        return out.reshape(u.shape[:-1])


def _latents(trace: Any) -> dict[str, Any]:
    """Sample sites of a trace, those of subsampling left out."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and type(node["fn"]).__name__ != "_Subsample"
    }
