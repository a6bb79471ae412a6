"""Normalizing flows, run in the direction in which a draw and its density come from one pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError
from vifamily.families._base import Family, FamilyEntry, uniform_log_weight
from vifamily.families._foreign import load
from vifamily.families._nets import check_positive, check_widths
from vifamily.families._planar import Planar
from vifamily.families._regression import RegressionFrame
from vifamily.families._spline_pass import is_spline_stack, spline_pass
from vifamily.families.full_rank import strict_lower, whiten
from vifamily.registry import register
from vifamily.rng import scoped
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec

__all__ = ["Flow", "FlowFamily"]

_CAPABILITIES = frozenset({Capability.DRAWS, Capability.REPARAMETERISED, Capability.LOG_Q, Capability.CONDITIONAL})
_KINDS = ("nsf", "maf", "nice", "realnvp", "bpf", "planar")
_COUPLING = ("nice", "realnvp")
_ACTIVATIONS = {"silu": nn.SiLU, "tanh": nn.Tanh, "elu": nn.ELU, "relu": nn.ReLU}
_START = 1e-2
_LEAST_SPREAD = 0.1
"""Least standard deviation of residuals at the start, in units in which they have about one."""
_LARGEST_FULL = 256


@register("families", "flow")
@dataclasses.dataclass(frozen=True)
class Flow(FamilyEntry):
    """A normalizing flow ``z = loc + L f(e)``, ``e`` standard normal, ``f`` mostly zuko's and ``L`` lower triangular.

    ``log q(z) = log N(e) - log |det df/de| - log |det L|``. The triangular map makes the family contain every Gaussian;
    ``f`` starts near the identity. The autoregressive direction is that of the inverse autoregressive flow (Kingma et
    al., NeurIPS 2016): a draw and its density take one pass through the networks, while the density at other points
    inverts ``f``, which takes as many passes as ``passes`` says.

    Kinds: ``nsf`` neural spline flow (Durkan et al., NeurIPS 2019), ``maf`` affine autoregressive (Papamakarios et al.,
    NeurIPS 2017), ``nice`` and ``realnvp`` affine coupling (Dinh et al., ICLR 2017), ``bpf`` Bernstein polynomials
    (Sick et al., ICPR 2020; inverted by bisection to about 1e-6), ``planar`` bends along one direction each (Rezende
    and Mohamed, ICML 2015): few parameters and no networks, for many coordinates; takes no context, inverted by
    bisection.

    Args:
        kind: One of the kinds above.
        transforms: Number of layers.
        hidden: Widths of the networks of each layer.
        passes: For autoregressive kinds, passes that an inversion takes: None for fully autoregressive (one pass per
            coordinate), 2 for a coupling.
        bins: Bins of a spline, or degree of a polynomial.
        activation: ``silu``, ``tanh``, ``elu`` (smooth) or ``relu``.
        affine: ``full`` for a triangular ``L``, ``diagonal``, or ``auto``: full up to 256 coordinates.
        direction: What takes one pass: ``draws``, as above, or ``density``, where the layers map points to the base
            (the masked autoregressive flow) and a draw inverts them. ``auto`` takes density where the objective
            evaluates given points only, as amortised inference does.
        standardise: What the flow models given a context: ``regression`` the residuals of a linear regression on the
            context, with sharp ends at the bounds of a bounded parameter, ``marginal`` the coordinates themselves.
            ``auto`` is regression in amortised inference, where there are pairs to regress on, and marginal elsewhere.

    Raises:
        ConfigError: If an option is unknown or not a positive integer.

    Example:
        >>> import torch
        >>> from vifamily.types import LatentSpec
        >>> family = Flow(kind="maf", transforms=1).build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
        >>> draw = family(torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
        >>> bool((draw.log_q - family.log_prob(draw.z)).abs().max() < 1e-8)
        True
    """

    kind: str = "nsf"
    transforms: int = 3
    hidden: Sequence[int] = (64, 64)
    passes: int | None = None
    bins: int = 8
    activation: str = "silu"
    affine: str = "auto"
    direction: str = "auto"
    standardise: str = "auto"
    capabilities = _CAPABILITIES

    def __post_init__(self) -> None:
        """Check the options."""
        for name, value, known in (
            ("kind", self.kind, _KINDS),
            ("activation", self.activation, tuple(_ACTIVATIONS)),
            ("affine", self.affine, ("auto", "full", "diagonal")),
            ("direction", self.direction, ("auto", "draws", "density")),
            ("standardise", self.standardise, ("auto", "regression", "marginal")),
        ):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r} of a flow: choose one of {', '.join(known)}.")
        check_positive("transforms", self.transforms)
        check_positive("bins", self.bins, least=2)
        object.__setattr__(self, "hidden", check_widths("hidden", self.hidden))
        if self.passes is not None:
            check_positive("passes", self.passes, least=2)
            if self.kind in _COUPLING:
                raise ConfigError(f"the coupling flow {self.kind!r} has no passes= to choose: leave it out.")
            if self.kind == "planar":
                raise ConfigError("a planar flow has no passes= to choose: leave it out.")
        if self.cheap:
            object.__setattr__(self, "capabilities", _CAPABILITIES | {Capability.CHEAP_LOG_Q})
        if self.kind == "planar":
            object.__setattr__(self, "capabilities", _CAPABILITIES - {Capability.CONDITIONAL})

    @property
    def cheap(self) -> bool:
        """Whether an inversion costs about as much as a draw."""
        forward = self.direction == "density"
        return forward or self.kind in _COUPLING or (self.passes == 2 and self.kind != "bpf")

    def for_given_points(self) -> Flow:
        """Return this flow with its density in one pass, unless a direction was asked for."""
        return dataclasses.replace(self, direction="density") if self.direction == "auto" else self

    def for_pairs(self) -> Flow:
        """Return this flow on residuals of a regression on the context, unless something else was asked for."""
        return dataclasses.replace(self, standardise="regression") if self.standardise == "auto" else self

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> FlowFamily:
        """Build the flow near the standard normal law."""
        self.check_space(latent)
        return FlowFamily(latent, self, self._make(latent, generator))

    def _make(self, latent: LatentSpec, generator: torch.Generator) -> nn.Module:
        if self.kind == "planar":
            return Planar(
                latent.dim,
                self.transforms,
                generator=generator,
                dtype=latent.dtype,
                device=latent.device,
                start=_START,
            )
        flows = load("zuko.flows")
        make = {"nsf": flows.NSF, "maf": flows.MAF, "nice": flows.NICE, "realnvp": flows.RealNVP, "bpf": flows.BPF}
        options: dict[str, Any] = {"hidden_features": list(self.hidden), "activation": _ACTIVATIONS[self.activation]}
        if latent.dim == 1 and latent.context_dim is None:
            options = {}  # one coordinate without context has no network: its spline or scale is a free parameter
        if self.kind not in _COUPLING and latent.dim > 1:
            options["passes"] = self.passes
        options.update({"nsf": {"bins": self.bins}, "bpf": {"degree": self.bins}}.get(self.kind, {}))
        # zuko draws its weights from the global stream
        with scoped(generator):
            flow = make[self.kind](latent.dim, context=latent.context_dim or 0, transforms=self.transforms, **options)
        transform: nn.Module = flow.transform.to(dtype=latent.dtype, device=latent.device)
        _near_identity(transform)
        _constant_masks(transform)
        return transform


def _near_identity(transform: nn.Module) -> None:
    """Scale down what parametrises each layer; all kinds are the identity where it is zero."""
    with torch.no_grad():
        for layer in transform.modules():
            module: Any = layer
            if hasattr(module, "hyper"):
                last = [part for part in module.hyper if hasattr(part, "weight")][-1]
                last.weight.mul_(_START)
                last.bias.mul_(_START)
            elif hasattr(module, "phi"):
                for phi in module.phi:
                    phi.mul_(_START)


def _constant_masks(transform: nn.Module) -> None:
    """Keep coupling masks out of the buffers: zuko reads positions from them, which vmap over buffers forbids."""
    for module in transform.modules():
        mask = module._buffers.get("mask")
        if mask is not None and hasattr(module, "hyper"):
            del module._buffers["mask"]
            object.__setattr__(module, "mask", mask)


class FlowFamily(Family):
    """The module of :class:`Flow`: ``layers`` from zuko, ``loc``, ``log_diagonal`` ``(dim,)`` and ``lower``.

    Args:
        latent: What is covered.
        entry: Hyper-parameters.
        layers: zuko's lazy transform.
    """

    # networks overshoot at the step size that suits locations and scales
    step_size = 0.005
    position: Tensor

    def __init__(self, latent: LatentSpec, entry: Flow, layers: nn.Module) -> None:
        super().__init__(latent)
        dim = latent.dim
        options: dict[str, Any] = {"dtype": latent.dtype, "device": latent.device}
        self.layers = layers
        by_regression = entry.standardise == "regression" and latent.context_dim is not None
        self.frame = RegressionFrame(latent) if by_regression else None
        if by_regression:
            self.pairs_step_size = 0.01
        self.density_first = entry.direction == "density"
        self.spline_first = self.density_first and is_spline_stack(layers)
        self.full = entry.affine == "full" or (entry.affine == "auto" and dim <= _LARGEST_FULL)
        self.capabilities = entry.capabilities
        # zuko inverts Bernstein polynomials by calls of autograd that vmap does not allow
        self.vectorised = entry.kind != "bpf"
        self.noise_spec = NoiseSpec((dim,))
        self.loc = nn.Parameter(torch.zeros(dim, **options))
        self.log_diagonal = nn.Parameter(torch.zeros(dim, **options))
        size = dim * (dim - 1) // 2 if self.full else 0
        if size:
            self.lower = nn.Parameter(torch.zeros(size, **options))
            rows, columns = torch.tril_indices(dim, dim, -1)
            position = torch.full((dim, dim), size, dtype=torch.long)
            position[rows, columns] = torch.arange(size)
            self.register_buffer("position", position.to(latent.device), persistent=False)
        else:
            self.full = False

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise to draws and their log density in one pass."""
        self.check_context(context)
        # zuko writes into a new tensor of the kind of its input: a buffer added makes it carry the axis of vmap
        base = noise + torch.zeros_like(self.shift)
        if self.density_first:
            layers = self.layers(context)
            v = layers.inv(base)
            log_jacobian = -layers.call_and_ladj(v)[1]
        else:
            v, log_jacobian = self.layers(context).call_and_ladj(base)
        log_q = _standard_normal(noise) - log_jacobian - self.log_diagonal.sum(-1)
        scaled = v + v @ strict_lower(self.lower, self.position).mT if self.full else v
        u = self.loc + self.log_diagonal.exp() * scaled
        if self.frame is not None and context is not None:
            u, inverse = self.frame.inverse(u, context)
            log_q = log_q + inverse
        return Draw(u, log_q, uniform_log_weight(log_q, noise.shape[0]))

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log density in standardised coordinates, by inverting the flow where draws come first."""
        self.check_context(context)
        moved = torch.zeros_like(u[..., 0])
        if self.frame is not None and context is not None:
            u, moved = self.frame(u, context)
        v = (u - self.loc) * (-self.log_diagonal).exp()
        if self.full:
            v = whiten(strict_lower(self.lower, self.position), v)
        if self.spline_first:
            base, inverse = spline_pass(self.layers, v, context)
            log_jacobian = -inverse
        elif self.density_first:
            base, inverse = self.layers(context).call_and_ladj(v)
            log_jacobian = -inverse
        else:
            layers = self.layers(context)
            base = layers.inv(v)
            _, log_jacobian = layers.call_and_ladj(base)
        out: Tensor = _standard_normal(base) - log_jacobian - self.log_diagonal.sum(-1) + moved
        return out

    @torch.no_grad()
    def start_from(self, z: Tensor, context: Tensor, bounded: Tensor) -> bool:
        """Set the regression, and the affine map to the moments of what it leaves; False where there is none.

        Args:
            z: Points, ``(pair, dim)``.
            context: Their contexts, ``(pair, context_dim)``.
            bounded: Which coordinates are logits of a number between two bounds, ``(dim,)``.
        """
        if self.frame is None:
            return False
        self.frame.fit(z, context, bounded)
        v = self.frame(z, context)[0].double()
        # residuals that vanish in the pairs at hand need not vanish elsewhere
        covariance = torch.cov(v.T).reshape(self.dim, self.dim) + _LEAST_SPREAD**2 * torch.eye(self.dim).to(v)
        self.start_at(v.mean(0), torch.linalg.cholesky(covariance))
        return True

    @torch.no_grad()
    def start_at(self, mean: Tensor, scale: Tensor) -> None:
        """Set the affine map; the flow before it stays as it is, near the identity when it was just built."""
        mean, scale = mean.to(self.shift), scale.to(self.shift)
        diagonal = scale if scale.dim() == 1 else scale.diagonal()
        if scale.dim() == 2 and not self.full:
            diagonal = scale.square().sum(-1).sqrt()
        self.loc.copy_(mean)
        self.log_diagonal.copy_(diagonal.abs().log())
        if self.full:
            self.lower.zero_()
            if scale.dim() == 2:
                rows, columns = torch.tril_indices(self.dim, self.dim, -1)
                self.lower.copy_((scale * diagonal.sign() / diagonal.abs()[:, None])[rows, columns])


def _standard_normal(e: Tensor) -> Tensor:
    return -0.5 * e.square().sum(-1) - 0.5 * e.shape[-1] * math.log(2 * math.pi)
