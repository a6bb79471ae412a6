"""Random Fourier features: a Gaussian process with a squared exponential kernel as a network of one hidden layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, ShapeError

__all__ = ["RandomFourierFeatures", "random_feature_network"]


class RandomFourierFeatures(nn.Module):
    r"""Sines and cosines of random projections.

    .. math:: \Phi(x) = \sigma\, [\cos \Omega x, \sin \Omega x], \qquad
              \tfrac1N\, \mathbb{E}\, \Phi(x)^\top \Phi(x') = \sigma^2 \exp(-\tfrac12 \|(x - x') / \ell\|^2)

    for frequencies ``Omega_ij ~ N(0, 1 / l_j^2)``. They are the weight of a linear layer without bias, ``frequencies``,
    scaled so that ``N(0, 2 / fan-in)`` on it is that law: the prior of the weights entries ``"dense"`` and
    ``"walsh_hadamard"``, whose rows are the features of Fastfood. Kept out of the latent, the frequencies stay a draw.

    Args:
        in_features: Number of inputs.
        features: Number of frequencies, ``N``.
        lengthscale: ``l``, for all inputs or one for each.
        amplitude: ``sigma``.
        generator: Randomness of the frequencies at the start.
        dtype: Floating dtype; None for torch's default.

    Raises:
        ConfigError: If a size is not a positive integer, or a length scale or the amplitude is not positive.

    Source: Rahimi and Recht (2007), "Random features for large-scale kernel machines"; Le, Sarlos and Smola (2013),
    "Fastfood"; Cutajar, Bonilla, Michiardi and Filippone (2017), "Random feature expansions for deep Gaussian
    processes", section 3.

    Example:
        >>> features = RandomFourierFeatures(3, 64, generator=torch.Generator().manual_seed(0))
        >>> phi = features(torch.zeros(5, 3))
        >>> phi.shape, (phi.square().sum(-1) / 64).tolist()
        (torch.Size([5, 128]), [1.0, 1.0, 1.0, 1.0, 1.0])
    """

    scale: Tensor

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        lengthscale: float | Sequence[float] = 1.0,
        amplitude: float = 1.0,
        generator: torch.Generator,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(in_features=in_features, features=features)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        lengths = torch.as_tensor(lengthscale, dtype=torch.float64)
        if lengths.shape not in ((), (in_features,)):
            raise ConfigError(
                f"lengthscale must be one number or {in_features}, one for each input, got {tuple(lengths.shape)}."
            )
        if not bool(((lengths > 0) & lengths.isfinite()).all()):
            raise ConfigError(f"lengthscale must be positive, got {lengthscale!r}.")
        if not 0 < amplitude < math.inf:
            raise ConfigError(f"amplitude must be positive, got {amplitude!r}.")
        self.amplitude = float(amplitude)
        # what makes a weight of variance 2 / fan-in a frequency
        half = math.sqrt(in_features / 2)
        self.register_buffer("scale", (half / lengths).expand(in_features).to(dtype).clone())
        self.frequencies = _linear(in_features, features, generator=generator, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features, ``(..., in_features) -> (..., 2 features)``.

        Raises:
            ShapeError: If the last axis has another length.
        """
        if x.dim() == 0 or x.shape[-1] != len(self.scale):
            raise ShapeError(f"inputs must have {len(self.scale)} numbers along the last axis, got {tuple(x.shape)}.")
        phase = self.frequencies(x * self.scale)
        return self.amplitude * torch.cat([torch.cos(phase), torch.sin(phase)], dim=-1)


def random_feature_network(
    in_features: int,
    out_features: int,
    *,
    features: int = 128,
    lengthscale: float | Sequence[float] = 1.0,
    amplitude: float = 1.0,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    r"""Make a network that is nearly a Gaussian process with a squared exponential kernel.

    .. math:: f(x) = \beta^\top \Phi(x), \qquad \beta_k \sim \mathrm{N}(0, 1 / N)

    Given frequencies from their prior, ``f`` has covariance ``sigma^2 exp(-|(x - x') / l|^2 / 2)`` in the mean over
    them. The variance of ``beta`` is the prior of the weights entry ``"dense"`` for a layer of ``2 N`` inputs. In
    Walsh-Hadamard weights entries of ``beta`` are not independent; ``include="*frequencies*"`` leaves it a point.

    Args:
        in_features: Number of inputs.
        out_features: Number of functions; they share the frequencies.
        features: Number of frequencies, ``N``.
        lengthscale: ``l``, for all inputs or one for each.
        amplitude: ``sigma``.
        generator: Randomness of the weights at the start.
        dtype: Floating dtype; None for torch's default.

    Returns:
        The features, module ``"0"``, and a linear layer without bias, ``"1"``.

    Raises:
        ConfigError: As :class:`RandomFourierFeatures`.

    Example:
        >>> net = random_feature_network(2, 1, features=16, generator=torch.Generator().manual_seed(0))
        >>> [name for name, _ in net.named_parameters()], net(torch.zeros(5, 2)).shape
        (['0.frequencies.weight', '1.weight'], torch.Size([5, 1]))
    """
    _check(out_features=out_features)
    first = RandomFourierFeatures(
        in_features, features, lengthscale=lengthscale, amplitude=amplitude, generator=generator, dtype=dtype
    )
    return nn.Sequential(first, _linear(2 * features, out_features, generator=generator, dtype=first.scale.dtype))


def _linear(wide: int, out: int, *, generator: torch.Generator, dtype: torch.dtype) -> nn.Linear:
    """A linear layer without bias; its weights have variance ``2 / fan-in``, and are not of torch's global stream."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, wide, out, bias=False, dtype=dtype)
    draw = torch.randn(out, wide, generator=generator, dtype=torch.float64, device=generator.device)
    with torch.no_grad():
        layer.weight.copy_(math.sqrt(2 / wide) * draw)
    return layer


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name} must be a positive integer, got {size!r}.")
