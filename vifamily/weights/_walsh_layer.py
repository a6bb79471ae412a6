"""One layer with Walsh-Hadamard weights."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional

from vifamily.errors import ShapeError, VifamilyWarning
from vifamily.numerics.hadamard import hadamard
from vifamily.numerics.walsh_hadamard import (
    isotropic_cross_entropy,
    isotropic_log_prior,
    isotropic_spectrum,
    walsh_matrix,
    walsh_product,
)
from vifamily.weights._base import LayerWeights
from vifamily.weights._walsh_blocks import Blocks

__all__ = ["IsotropicWalshLayer", "WalshLayer"]

_START_SD = 0.1
"""Standard deviation at the start, relative to the mean's usual size."""
_SMALLEST = 1e-2
"""Below this share of the usual spread of weights a layer puts out nearly nothing, and a fit stays there."""


def _signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return (2 * torch.randint(0, 2, shape, generator=generator) - 1).to(like)


class WalshLayer(LayerWeights):
    r"""A linear layer or convolution whose weight is ``W0 + diag(a) H diag(g) H diag(b)`` by blocks.

    The latent holds ``g``, ``(T, P)``, after it ``a`` and ``b`` of the same shape where they are latent, and last the
    bias where that is. The prior of ``g`` is ``N(0, scale^2)``, those of ``a`` and ``b`` are ``N(0, 1)`` and
    ``N(0, P sd^2)`` with ``sd`` the usual spread of the weights. A bias that is a point stays with the module.

    Args:
        module: ``nn.Linear`` or ``nn.Conv2d``.
        name: Its full name.
        blocks: Layout of the blocks.
        scale: Prior standard deviation of a weight relative to ``sqrt(gain / fan-in)`` at the start.
        gain: 2 before a rectifier, 1 otherwise.
        residual: Whether to add to the module's own weight, which stays fixed.
        latent_scales: Whether ``a`` and ``b`` belong to the latent; otherwise they are the parameters ``left`` and
            ``right``.
        latent_bias: Whether the bias belongs to the latent.
        generator: Randomness of the signs of ``a`` and ``b`` where they are parameters.
    """

    module: nn.Linear | nn.Conv2d
    base: Tensor | None

    def __init__(
        self,
        module: nn.Linear | nn.Conv2d,
        name: str,
        blocks: Blocks,
        *,
        scale: float,
        gain: float,
        residual: bool,
        latent_scales: bool = False,
        latent_bias: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        prefix = f"{name}." if name else ""
        self.module, self.blocks, self.scale, self.residual = module, blocks, scale, residual
        self.latent_bias = latent_bias and module.bias is not None
        self.latent_scales = latent_scales
        self.names = (f"{prefix}weight", *((f"{prefix}bias",) if self.latent_bias else ()))
        self.cores = blocks.numbers
        self.structured = self.cores * (3 if latent_scales else 1)
        self.dim = self.structured + (blocks.shape[0] if self.latent_bias else 0)
        self.example_noise, self.cheap_example_noise = True, isinstance(module, nn.Linear)
        weight = module.weight.detach()
        self.weight_sd = math.sqrt(gain / blocks.fan_in)
        if residual and bool(weight.any()):
            self.weight_sd = float(weight.square().mean().sqrt())
        self.register_buffer("base", weight.clone() if residual else None)
        bias = module.bias.detach().clone() if module.bias is not None else None
        self.register_buffer("start_bias", bias if residual else None if bias is None else torch.zeros_like(bias))
        if not latent_scales:
            shape = (blocks.count, blocks.size)
            self.left = nn.Parameter(_signs(shape, generator, weight))
            self.right = nn.Parameter(_signs(shape, generator, weight) * self.right_sd)

    @property
    def right_sd(self) -> float:
        """Size of the entries of ``b`` at which weights have their usual spread, with those of ``a`` at one."""
        return self.weight_sd * math.sqrt(self.blocks.size)

    def _diagonals(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``a``, ``g`` and ``b``, ``(..., T, P)`` each; what is no latent has no leading axes."""
        parts = z[..., : self.structured].reshape(*z.shape[:-1], -1, self.blocks.count, self.blocks.size)
        if self.latent_scales:
            core, left, right = parts.unbind(-3)
            return left, core, right
        return self.left, parts.squeeze(-3), self.right

    def _bias(self, z: Tensor) -> Tensor | None:
        if self.latent_bias:
            return z[..., self.structured :]
        return None if self.module.bias is None else self.module.bias.expand(*z.shape[:-1], -1)

    def _weight(self, z: Tensor) -> Tensor:
        weight = self.blocks.assemble(walsh_matrix(*self._diagonals(z)))
        return weight if self.base is None else weight + self.base

    def materialise(self, z: Tensor) -> dict[str, Tensor]:
        """Write the weight (and a latent bias) out, ``(..., dim) -> full name -> (..., *shape)``."""
        values = [self._weight(z), *([z[..., self.structured :]] if self.latent_bias else [])]
        return dict(zip(self.names, values, strict=True))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Compute the output for every draw; see :meth:`LayerWeights.forward`."""
        if isinstance(self.module, nn.Conv2d):
            return self._convolution(self.module, x, z)
        bias = self._bias(z)
        middle = (1,) * (x.dim() - z.dim())
        if self.blocks.kind == "stack":
            out = self._product(x, z)
            if self.base is not None:
                out = out + functional.linear(x, self.base)
        else:
            weight = self._weight(z)
            rows = x.reshape(*x.shape[: z.dim() - 1], -1, x.shape[-1])
            out = rows @ weight.mT
            lead = torch.broadcast_shapes(x.shape[: z.dim() - 1], z.shape[:-1])
            out = out.reshape(*lead, *x.shape[z.dim() - 1 : -1], -1)
        return out if bias is None else out + bias.reshape(*z.shape[:-1], *middle, -1)

    def _product(self, x: Tensor, z: Tensor) -> Tensor:
        """``W x`` by transforms; the inner one is shared by draws that share their input."""
        if x.shape[-1] != self.blocks.fan_in:  # padding would hide it
            raise ShapeError(f"a linear layer of {self.blocks.fan_in} inputs got {x.shape[-1]} on the last axis.")
        middle = (1,) * (x.dim() - z.dim())
        left, core, right = (
            t if t.dim() == 2 else t.reshape(*t.shape[:-2], *middle, *t.shape[-2:]) for t in self._diagonals(z)
        )
        padded = functional.pad(x, (0, self.blocks.size - x.shape[-1])).unsqueeze(-2)
        return walsh_product(padded, left, core, right).flatten(-2)[..., : self.blocks.shape[0]]

    def _convolution(self, layer: nn.Conv2d, x: Tensor, z: Tensor) -> Tensor:
        """Every draw (and datum, where latents are theirs) is a group of channels of one convolution.

        Stacked blocks with a latent of each datum's own are products with the patches of its image instead: kernels
        would have to be written out for each datum.
        """
        each = z.dim() == 3
        if each and self.blocks.kind == "stack" and layer.groups == 1:
            return self._patches(layer, x, z)
        lead = z.shape[:-1]
        kernel, bias = self._weight(z).flatten(0, len(lead)), self._bias(z)
        offset = None if bias is None else bias.flatten()
        data = x.shape[1]
        if len(x) == 1 and layer.groups == 1 and not each:
            wide, groups = x[0], 1
        else:
            full = x.expand(z.shape[0], *x.shape[1:])
            wide = full.flatten(0, 2).unsqueeze(0) if each else full.transpose(0, 1).flatten(1, 2)
            groups = lead.numel() * layer.groups
        out = functional.conv2d(wide, kernel, offset, layer.stride, layer.padding, layer.dilation, groups)
        if each:
            return out.reshape(*lead, layer.out_channels, *out.shape[2:])
        return out.reshape(data, z.shape[0], layer.out_channels, *out.shape[2:]).transpose(0, 1)

    def _patches(self, layer: nn.Conv2d, x: Tensor, z: Tensor) -> Tensor:
        """The same without kernels: each image's own weights times its patches, all positions alike."""
        full = x.expand(z.shape[0], *x.shape[1:]).flatten(0, 1)
        # what torch pads for padding="same" is not the same on both sides where a kernel is even
        padded = functional.pad(full, layer._reversed_padding_repeated_twice)
        sizes = [
            (n - step * (k - 1) - 1) // stride + 1
            for n, k, stride, step in zip(
                padded.shape[-2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
            )
        ]
        rows = functional.unfold(padded, layer.kernel_size, layer.dilation, stride=layer.stride)
        patches = rows.mT.unflatten(0, z.shape[:2])  # (draw, datum, position, in * taps)
        out = self._product(patches, z)
        if self.base is not None:
            out = out + functional.linear(patches, self.base.flatten(1))
        bias = self._bias(z)
        out = out if bias is None else out + bias.unsqueeze(-2)
        return out.mT.reshape(*out.shape[:2], -1, *sizes)

    def prior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the prior, ``(dim,)`` each; a latent bias has unit variance."""
        like = self.module.weight
        sd = torch.ones(self.dim, dtype=like.dtype, device=like.device)
        sd[: self.cores] = self.scale
        if self.latent_scales:
            sd[2 * self.cores : self.structured] = self.right_sd
        return torch.zeros_like(sd), sd

    def initial(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Begin at a draw ``g ~ N(0, 1)``, at ``g = 0`` on top of a trained weight; standard deviation a tenth.

        Latent ``a`` and ``b`` begin at random signs times their usual size.

        Warns:
            VifamilyWarning: If the diagonals are so small that the layer would put out nearly nothing.
        """
        mean = torch.zeros_like(self.prior()[0])
        sd = torch.full_like(mean, _START_SD)
        if not self.residual:
            draw = torch.randn(self.cores, generator=generator, dtype=torch.float64)
            mean[: self.cores] = draw.to(mean)
        if self.latent_scales:
            mean[self.cores : self.structured] = _signs((2 * self.cores,), generator, mean)
            for moment in (mean, sd):
                moment[2 * self.cores : self.structured] *= self.right_sd
        self.check_start(mean, sd)
        if self.latent_bias and isinstance(self.start_bias, Tensor):
            mean[self.structured :] = self.start_bias
        return mean, sd

    def check_start(self, mean: Tensor, sd: Tensor) -> None:
        """Warn where the layer would put out nearly nothing; see :meth:`LayerWeights.check_start`."""
        if self.residual or self.latent_scales:
            return
        left, core, right = (t.detach() for t in self._diagonals(mean))
        spread = self._diagonals(sd.detach())[1].square().mean(-1, keepdim=True) / self.blocks.size
        size = walsh_matrix(left, core, right).square()
        size = size + (left.square() * spread).unsqueeze(-1) * right.square().unsqueeze(-2)
        share = float(self.blocks.assemble(size).mean().sqrt()) / self.weight_sd
        if share < _SMALLEST:
            warnings.warn(
                f"the weights of {self.names[0]!r} start at {share:.1e} of their usual spread: the layer puts out "
                "nearly nothing, its gradients vanish, and a fit tends to stay at the mean prediction. Let the "
                "diagonals left and right start at their own values (1 and sqrt(P gain / fan-in), with random signs), "
                "and the latent too (init='auto').",
                VifamilyWarning,
                stacklevel=2,
            )


class IsotropicWalshLayer(WalshLayer):
    r"""The same with an isotropic normal prior on the block ``W``, restricted to what ``g`` can make.

    ``g ~ N(0, tau^2 (A'A)^{-1})``, ``tau = scale sqrt(P) sd``, with ``sd`` the usual spread of the weights: at the
    starting diagonals this is ``N(0, scale^2)`` on ``g``. It depends on the diagonals, whose scale it fixes.
    """

    @property
    def _tau(self) -> float:
        return self.scale * self.right_sd

    def log_prior(self, z: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """Log prior density, ``(..., dim) -> (...)``; ``scale`` multiplies ``tau`` and other standard deviations."""
        left, core, right = self._diagonals(z)
        blocks = isotropic_log_prior(core, left, right, self._tau * scale).sum(-1)
        return blocks - self._rest_entropy(z.square(), scale)

    def cross_entropy(
        self, mean: Tensor, variance: Tensor, *, independent: bool = False, scale: Tensor | float = 1.0
    ) -> Tensor | None:
        """Cross entropy with the prior; None unless ``independent``, since its precision is not diagonal.

        It is None too where ``a`` and ``b`` are latent, which the precision depends on.

        Args:
            mean: ``(..., dim)``.
            variance: ``(..., dim)``.
            independent: Whether the coordinates of the law are independent, as in mean field: then it is exact.
            scale: Multiplies ``tau`` and the other standard deviations.
        """
        if not independent or self.latent_scales:
            return None
        left, core, right = self._diagonals(mean)
        spread = self._diagonals(variance)[1]
        blocks = isotropic_cross_entropy(core, left, right, self._tau * scale, variance=spread)
        return blocks.sum(-1) + self._rest_entropy(mean.square() + variance, scale)

    def best_scale(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Square of the scale that makes the cross entropy least; see :meth:`LayerWeights.best_scale`."""
        left, core, right = self._diagonals(mean)
        spectrum = isotropic_spectrum(left, right)
        trace = self._diagonals(variance)[1].sum(-1) * spectrum.mean(-1)
        blocks = (trace + (hadamard(core).square() * spectrum).sum(-1)).sum(-1) / self._tau**2
        rest = (mean.square() + variance)[..., self.cores :] / self.prior()[1][self.cores :].square()
        return (blocks + rest.sum(-1)) / self.dim

    def _rest_entropy(self, square: Tensor, scale: Tensor | float) -> Tensor:
        """Cross entropy of what comes after ``g`` in the latent, from its second moments."""
        sd = self.prior()[1][self.cores :] * scale
        return 0.5 * (square[..., self.cores :] / sd.square() + torch.log(2 * math.pi * sd.square())).sum(-1)
