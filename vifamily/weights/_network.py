"""A network as a function of its input and a flat latent."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vifamily.errors import ConfigError, ShapeError, VifamilyError
from vifamily.supports import Layout
from vifamily.weights._base import LayerWeights, check_positive
from vifamily.weights._fold import FoldedNet
from vifamily.weights._report import ConversionReport, ConvertedLayer
from vifamily.weights._routes import (
    REFUSALS,
    Route,
    evaluated,
    loop_over_draws,
    out_of_memory,
    over_draws,
    raised_on,
    settled_route,
)

if TYPE_CHECKING:
    from vifamily.weights._entry import WeightsEntry

__all__ = ["NetworkWeights"]


class NetworkWeights(nn.Module):
    """A network as a function of its input and a flat latent.

    The given net is copied. It is evaluated in eval mode, whatever :meth:`train` says: dropout is off and batch
    normalisation uses its running statistics, since batch statistics would mix draws.

    Args:
        net: Any module that maps ``(datum, ...)`` to ``(datum, ...)``.
        entry: Which layers are converted, and how.
        generator: Randomness of starting values.
        rest: What becomes of parameters that are not converted: ``"point"`` (estimated as points) or ``"frozen"``.
        prior_scale: Multiplies the prior standard deviation of every layer.
        chunk_draws: Draws at a time, to bound memory; None for all at once.

    Attributes:
        layout: The latent's sites: one per parameter, or one per layer where a layer's latent is not its parameters.
        dim: Number of latent coordinates.
        report: What was converted and what was not.
        route: How draws are evaluated: ``"fold"``, ``"repeat"``, ``"vmap"`` or ``"loop"``; None until the first
            call, which finds out (see :meth:`settle`).
        declined: Routes that were tried and left, with the reasons.

    Raises:
        ConfigError: If no layer is converted, or an argument has an impossible value.
    """

    scales: Tensor

    def __init__(
        self,
        net: nn.Module,
        entry: WeightsEntry,
        *,
        generator: torch.Generator,
        rest: str = "point",
        prior_scale: float = 1.0,
        chunk_draws: int | None = None,
    ) -> None:
        super().__init__()
        _check(net, rest, prior_scale, chunk_draws)
        self.rest, self.chunk_draws = rest, chunk_draws
        self.route: Route | None = None
        self.declined: dict[str, str] = {}
        self._fold_cache: FoldedNet | None = None
        self.net = evaluated(copy.deepcopy(net))
        own = sum(p.numel() for p in self.net.parameters())
        modules = {n: m for n, m in self.net.named_modules() if any(True for _ in m.parameters(recurse=False))}
        layers, rows = _made_layers(self.net, modules, entry, generator)
        self.layers = nn.ModuleList(layers.values())
        self.layer_names = tuple(layers)
        self._convert(layers, modules)
        like = next(iter(net.parameters()))
        # fixed in a fit, but saved with it: a prior that was fitted belongs to the posterior
        self.scales = nn.Parameter(torch.full((len(layers),), float(prior_scale)).to(like), requires_grad=False)
        sites: dict[str, Any] = {}
        for name, layer in layers.items():
            shapes: Mapping[str, tuple[int, ...]] = getattr(layer, "site_shapes", {}) or {name or "net": (layer.dim,)}
            sites |= {site: (shape, "real") for site, shape in shapes.items()}
        self.layout, self.dim = Layout.of(sites), sum(layer.dim for layer in layers.values())
        point = sum(p.numel() for p in self.parameters() if p.requires_grad)
        self.report = ConversionReport(tuple(rows), own, self.dim, point)

    def _convert(self, layers: Mapping[str, LayerWeights], modules: Mapping[str, nn.Module]) -> None:
        """Turn what the latent makes into buffers of the copied net, and share what stays with the layers' weights."""
        made = {name for layer in layers.values() for name in layer.names}
        for name, module in modules.items():
            for key, value in list(module.named_parameters(recurse=False)):
                full = f"{name}.{key}" if name else key
                if full in made or self.rest == "frozen" or not value.requires_grad:
                    del module._parameters[key]
                    module.register_buffer(key, value.detach().clone(), persistent=full not in made)
        for name, layer in layers.items():
            if isinstance(getattr(layer, "module", None), nn.Module):
                # the net's own, one set of points for both; under one name only: whoever exchanges parameters by names
                # (torch.func.functional_call) would exchange and put back those of a module with two of them twice
                del layer.module
                layer.__dict__["module"] = self.net.get_submodule(name)

    def train(self, mode: bool = True) -> NetworkWeights:  # noqa: FBT001, FBT002 - torch's own signature
        """Set the mode of this module; the network inside stays in eval mode."""
        super().train(mode)
        evaluated(self.net)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002 - torch's own signature
        self._fold_cache = None  # buffers of the folded net are replaced, not changed
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    # -- evaluation ----------------------------------------------------------------------------------------------------
    @property
    def example_noise(self) -> bool:
        """Whether each datum can have a latent of its own in every layer."""
        folded = self.route in ("fold", "repeat")
        return folded and all(layer.example_noise for layer in self._layers())

    @property
    def cheap_example_noise(self) -> bool:
        """Whether latents of each datum's own cost about as much as one for all."""
        return self.example_noise and all(layer.cheap_example_noise for layer in self._layers())

    def _layers(self) -> list[LayerWeights]:
        return [layer for layer in self.layers if isinstance(layer, LayerWeights)]

    def slices(self, z: Tensor) -> list[Tensor]:
        """Part of the latent that each layer takes, ``(..., dim) -> [(..., layer dim)]``."""
        return list(z.split([layer.dim for layer in self._layers()], -1))

    def materialise(self, z: Tensor) -> dict[str, Tensor]:
        """Write out every converted parameter, ``(..., dim) -> full name -> (..., *shape)``."""
        out: dict[str, Tensor] = {}
        for layer, part in zip(self._layers(), self.slices(z), strict=True):
            out |= layer.materialise(part)
        return out

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Compute the network's outputs for every draw.

        Args:
            x: Inputs, ``(datum, ...)``.
            z: ``(draw, dim)``, or ``(draw, datum, dim)`` where each datum has a latent of its own.

        Returns:
            ``(draw, datum, *out)``.

        Raises:
            ShapeError: If ``z`` has another shape.
            ModelError: At the first call, if the network cannot be evaluated on these inputs (see :meth:`settle`).
        """
        if z.dim() not in (2, 3) or z.shape[-1] != self.dim:
            raise ShapeError(f"z must be (draw, {self.dim}) or (draw, datum, {self.dim}), got {tuple(z.shape)}.")
        route = self.route or self.settle(x)
        size = self.chunk_draws or max(z.shape[0], 1)
        parts = [self.evaluate(route, x, part) for part in z.split(size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def checked(self, x: Tensor, z: Tensor) -> Tensor:
        """Compute as :meth:`forward` does, at inputs that are new: what the network raises on them is said in words.

        Raises:
            ModelError: If the network raises.
            ShapeError: If a layer does not take the inputs, or ``z`` has another shape.
        """
        try:
            out: Tensor = self(x, z)
        except VifamilyError:
            raise
        except REFUSALS as error:
            if out_of_memory(error):
                raise
            raise raised_on(x, error) from error
        return out

    def evaluate(self, route: Route, x: Tensor, z: Tensor) -> Tensor:
        """Compute as :meth:`forward` does, by one of the routes."""
        if route in ("fold", "repeat"):
            if self._fold_cache is None:
                self._fold_cache = FoldedNet(self.net, dict(zip(self.layer_names, self._layers(), strict=True)))
            return self._fold_cache(x, self.slices(z), repeat=route == "repeat")
        if z.dim() == 3:
            per_datum = [self.evaluate(route, x[i : i + 1], z[:, i]) for i in range(x.shape[0])]
            return torch.cat(per_datum, 1)
        evaluate = over_draws if route == "vmap" else loop_over_draws
        return evaluate(self.net, x, self.materialise(z))

    def settle(self, x: Tensor, *, generator: torch.Generator | None = None) -> Route:
        """Find out on a few inputs how draws can be evaluated, by comparison with a loop over draws.

        Draws are folded into the datum axis (``"fold"``; with the input repeated first, ``"repeat"``) where that gives
        what a loop gives; where a net mixes rows or reads its parameters from outside their layer it does not, and
        the whole net is vectorised (``"vmap"``) or, where that raises, looped over (``"loop"``). The first call of
        :meth:`forward` does this by itself.

        Args:
            x: Inputs, ``(datum, ...)``; a few of them are used.
            generator: Randomness of the draws that are compared; a fixed one by default.

        Returns:
            The route, also kept as ``route``.

        Raises:
            ModelError: If the network raises, gives no finite output, no tensor with the datum axis first, or another
                output each time.
        """
        self.route, self.declined = settled_route(self, x, generator)
        return self.route

    # -- prior ---------------------------------------------------------------------------------------------------------
    @property
    def gaussian_prior(self) -> bool:
        """Whether the prior of every layer is independent normal."""
        return not any(map(_own_prior, self._layers()))

    def prior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the prior, ``(dim,)`` each."""
        pairs = [layer.prior() for layer in self._layers()]
        sds = [sd * scale for (_, sd), scale in zip(pairs, self.scales, strict=True)]
        return torch.cat([mean for mean, _ in pairs]), torch.cat(sds)

    def log_prior(self, z: Tensor) -> Tensor:
        """Log prior density, ``(..., dim) -> (...)``."""
        total = z.new_zeros(z.shape[:-1])
        for layer, part, scale in zip(self._layers(), self.slices(z), self.scales, strict=True):
            total = total + layer.log_prior(part, scale)
        return total

    def cross_entropy(self, mean: Tensor, variance: Tensor, *, independent: bool = False) -> Tensor | None:
        """``E_q[-log p(z)]`` of a normal law with these moments, in closed form.

        Args:
            mean: ``(..., dim)``.
            variance: Marginal variances, ``(..., dim)``.
            independent: Whether the coordinates of the law are independent, which some priors need.

        Returns:
            ``(...)``, or None where the moments are not enough.
        """
        total = mean.new_zeros(mean.shape[:-1])
        moments = zip(self._layers(), self.slices(mean), self.slices(variance), self.scales, strict=True)
        for layer, centre, spread, scale in moments:
            part = layer.cross_entropy(centre, spread, independent=independent, scale=scale)
            if part is None:
                return None
            total = total + part
        return total

    def fit_prior(self, mean: Tensor, variance: Tensor) -> dict[str, float]:
        r"""Set each layer's prior scale to the maximiser of the bound at given posterior moments (empirical Bayes).

        .. math:: \lambda^2 = \operatorname{mean}_k\, [v_k + (m_k - m^0_k)^2] / s_k^2

        for independent normal priors; for others the quadratic form of their precision takes the place of the sum.

        Args:
            mean: Posterior means, ``(dim,)``; or draws, ``(draw, dim)``, with variances of zero.
            variance: Posterior variances, of the same shape; of independent coordinates where the prior's are not.

        Returns:
            Layer name to its new scale.
        """
        moments = zip(self._layers(), self.slices(mean), self.slices(variance), strict=True)
        with torch.no_grad():
            found = [layer.best_scale(centre, spread).mean().sqrt() for layer, centre, spread in moments]
            self.scales.copy_(torch.stack(found))
        return {name or "net": float(scale) for name, scale in zip(self.layer_names, self.scales, strict=True)}

    def check_start(self, mean: Tensor, sd: Tensor) -> None:
        """Warn where a fit that begins at these moments, ``(dim,)`` each, is known to get nowhere."""
        for layer, centre, spread in zip(self._layers(), self.slices(mean), self.slices(sd), strict=True):
            layer.check_start(centre, spread)

    def initial(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation from which a fit should begin, ``(dim,)`` each."""
        pairs = [layer.initial(generator) for layer in self._layers()]
        return torch.cat([mean for mean, _ in pairs]), torch.cat([sd for _, sd in pairs])


def _made_layers(
    net: nn.Module, modules: Mapping[str, nn.Module], entry: WeightsEntry, generator: torch.Generator
) -> tuple[dict[str, LayerWeights], list[ConvertedLayer]]:
    """Ask the entry for the weights of every layer."""
    layers: dict[str, LayerWeights] = {}
    rows: list[ConvertedLayer] = []
    tied = _tied(modules)
    for name, module in modules.items():
        count = sum(p.numel() for p in module.parameters(recurse=False))
        reason = entry.skips(net, name, module)
        if reason is None and any(id(p) in tied for p in module.parameters(recurse=False)):
            reason = "shares a parameter with another layer"
        made = reason if reason is not None else entry.layer(copy.deepcopy(module), name, generator=generator)
        skipped = made if isinstance(made, str) else ""
        dim = 0 if isinstance(made, str) else made.dim
        rows.append(ConvertedLayer(name or "(net)", type(module).__name__, count, dim, skipped))
        if not isinstance(made, str):
            layers[name] = made
    if not layers:
        raise ConfigError(
            "no layer of the network was converted: "
            + ("; ".join(f"{row.name}: {row.skipped}" for row in rows) or "it has no parameters")
            + ". Choose other weights=, include= or exclude=."
        )
    return layers, rows


def _own_prior(layer: nn.Module) -> bool:
    return isinstance(layer, LayerWeights) and type(layer).log_prior is not LayerWeights.log_prior


def _tied(modules: Mapping[str, nn.Module]) -> set[int]:
    seen = [id(p) for module in modules.values() for p in module.parameters(recurse=False)]
    return {i for i in seen if seen.count(i) > 1}


def _check(net: Any, rest: str, prior_scale: float, chunk_draws: int | None) -> None:
    if not isinstance(net, nn.Module):
        raise ConfigError(f"net must be a torch.nn.Module, got {type(net).__name__}.")
    if any(is_lazy(p) for p in net.parameters()):
        raise ConfigError(
            "net has lazy layers, which do not know their sizes yet: evaluate it once on some inputs first."
        )
    kinds = {p.dtype for p in net.parameters() if p.is_floating_point()}
    if len(kinds) != 1:
        found = ", ".join(sorted(map(str, kinds))) or "no parameters"
        raise ConfigError(f"net must have parameters of one floating dtype, got {found}: use net.to(dtype).")
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ConfigError(
                f"the layer {name!r} normalises by the statistics of its batch even in eval mode, which mixes data: "
                "give it running statistics (track_running_stats=True) or use LayerNorm or GroupNorm."
            )
    if rest not in ("point", "frozen"):
        raise ConfigError(f"rest must be 'point' or 'frozen', got {rest!r}.")
    check_positive("prior_scale", prior_scale)
    if chunk_draws is not None and (
        isinstance(chunk_draws, bool) or not isinstance(chunk_draws, int) or chunk_draws < 1
    ):
        raise ConfigError(f"chunk_draws must be a positive integer or None, got {chunk_draws!r}.")
