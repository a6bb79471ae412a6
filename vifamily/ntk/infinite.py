"""Tangent kernels of infinitely wide ReLU networks, in closed form, and the finite network they are the limit of."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, DeviceError, ShapeError

__all__ = ["TwoLayerReLU", "circle_spectrum", "relu_kernel"]

Readout = Literal["zero", "normal"]


class TwoLayerReLU(nn.Module):
    r"""Two-layer ReLU network in the tangent-kernel parametrisation, without biases.

    .. math:: f_i(x) = p^{-1/2} \sum_{j \le p} a_{ij} \max(0, w_j \cdot x), \qquad w_j \sim N(0, I)

    With ``readout="zero"`` the output weights ``a`` start at zero, and the kernel at the start is that of a random
    feature model times the identity; with ``"normal"`` they are standard normal.

    Args:
        inputs: Coordinates of an input.
        width: Hidden units ``p``.
        outputs: Outputs.
        generator: Source of the weights.
        readout: How the output weights start.
        dtype: Floating dtype.

    Raises:
        ConfigError: If a size is no positive integer or `readout` is unknown.

    Source: McNamara, Loper and Regier (2024), "Globally convergent variational inference".

    Example:
        >>> net = TwoLayerReLU(2, 16, 1, generator=torch.Generator())
        >>> net(torch.ones(3, 2, dtype=torch.float64)).shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        outputs: int,
        *,
        generator: torch.Generator,
        readout: Readout = "zero",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        for name, size in (("inputs", inputs), ("width", width), ("outputs", outputs)):
            _check_size(name, size, 1)
        _check_readout(readout)
        # without their own start, which would draw from torch's global generator
        self.hidden = nn.utils.skip_init(nn.Linear, inputs, width, bias=False, dtype=dtype)
        self.readout = nn.utils.skip_init(nn.Linear, width, outputs, bias=False, dtype=dtype)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.randn(width, inputs, generator=generator, dtype=torch.float64))
            self.readout.weight.zero_()
            if readout == "normal":
                self.readout.weight.copy_(torch.randn(outputs, width, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(inputs, outputs)``."""
        out: Tensor = self.readout(torch.relu(self.hidden(x))) / math.sqrt(self.hidden.out_features)
        return out


def relu_kernel(
    x: Tensor, other: Tensor | None = None, *, hidden_layers: int = 1, readout: Readout = "zero", gain: float = 1.0
) -> Tensor:
    r"""Tangent kernel of an infinitely wide ReLU network without biases; times the identity over outputs.

    The angle ``u`` between two inputs goes through each layer, and norms are multiplied by ``gain / 2``:

    .. math:: \Sigma_{l+1} = g \tfrac{\|x\|_l\|x'\|_l}{2\pi}(\sin u_l + (\pi - u_l)\cos u_l), \quad
              \dot\Sigma_{l+1} = g \tfrac{\pi - u_l}{2\pi}, \quad
              \Theta_{l+1} = \Sigma_{l+1} + \dot\Sigma_{l+1} \Theta_l, \quad \Theta_0 = \Sigma_0 = x \cdot x'

    With ``readout="normal"`` the kernel is the last ``Theta``; with ``"zero"`` (output weights start at zero)
    only these have a gradient at the start, and it is the last ``Sigma``. It is homogeneous of degree one in each
    input, so **collinear inputs make its Gram matrix singular**; with one hidden layer, on a circle, it is zero on odd
    harmonics from three on.

    Args:
        x: Inputs ``(N, coordinates)``.
        other: Inputs of the columns ``(M, coordinates)``; by default `x`.
        hidden_layers: Hidden layers, one or more.
        readout: How output weights start.
        gain: Variance ``g`` of the weights after the first layer times their number of inputs; 2 keeps norms (He).

    Returns:
        ``(N, M)``. Time and memory of order ``N M (coordinates + layers)`` and ``N M``.

    Raises:
        ConfigError: If `hidden_layers`, `readout` or `gain` is out of range.
        ShapeError: If inputs are not matrices with the same number of columns.
        DeviceError: If the two sets differ in device or dtype.

    Source: Cho and Saul (2009), "Kernel methods for deep learning"; Jacot, Gabriel and Hongler (2018).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
        >>> relu_kernel(x).abs().round(decimals=6)  # half the squared norm; opposite inputs share no active unit
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    other = x if other is None else other
    _check_size("hidden_layers", hidden_layers, 1)
    _check_readout(readout)
    if not gain > 0 or not math.isfinite(gain):
        raise ConfigError(f"gain must be positive and finite, got {gain!r}. Use 1, or 2 to keep norms.")
    if x.ndim != 2 or other.ndim != 2 or x.shape[1] != other.shape[1]:
        raise ShapeError(
            f"inputs must be (inputs, coordinates) with equal coordinates, got {tuple(x.shape)} and "
            f"{tuple(other.shape)}."
        )
    if x.dtype != other.dtype or x.device != other.device:
        raise DeviceError(f"inputs are {x.dtype} on {x.device} and {other.dtype} on {other.device}: convert one.")
    norms = x.norm(dim=1).unsqueeze(1) * other.norm(dim=1)
    angle = _angles(x, other)
    tangent = covariance = norms * torch.cos(angle)
    for layer in range(hidden_layers):
        if layer > 0:
            angle = _next_angle(angle)
        covariance = gain * norms / (2 * math.pi) * _arc(angle)
        tangent = covariance + gain * (math.pi - angle) / (2 * math.pi) * tangent
        norms = norms * gain / 2
    kernel: Tensor = tangent if readout == "normal" else covariance
    return kernel


def circle_spectrum(harmonics: int, *, readout: Readout = "zero", dtype: torch.dtype = torch.float64) -> Tensor:
    r"""Eigenvalues of the two-layer ReLU kernel for inputs uniform on the unit circle, by harmonic.

    .. math:: \lambda_0 = \tfrac{2}{\pi^2}, \quad \lambda_1 = \tfrac18, \quad
              \lambda_k = \tfrac{2}{\pi^2 (k^2-1)^2} \text{ for even } k, \quad \lambda_k = 0 \text{ for odd } k \ge 3

    for ``readout="zero"``. With ``"normal"``, ``(h_{k-1} + h_{k+1}) / 2`` is added, where ``h_0 = 1/4``,
    ``h_k = 1 / (pi k)^2`` for odd and zero for other even ``k``. Each counts once for ``k = 0`` and twice after. **The
    kernel is not strictly positive definite**: gradient flow of an infinitely wide network never
    moves odd harmonics from three on.

    Args:
        harmonics: How many, from ``k = 0``.
        readout: How output weights start.
        dtype: Floating dtype.

    Returns:
        ``(harmonics,)``.

    Raises:
        ConfigError: If `harmonics` is no positive integer or `readout` is unknown.

    Source: Fourier coefficients of the arc-cosine kernels of Cho and Saul (2009).

    Example:
        >>> circle_spectrum(4)
        tensor([0.2026, 0.1250, 0.0225, 0.0000], dtype=torch.float64)
    """
    _check_size("harmonics", harmonics, 1)
    _check_readout(readout)

    def step(k: int) -> float:
        return 0.25 if k == 0 else 1 / (math.pi * k) ** 2 if k % 2 else 0.0

    def value(k: int) -> float:
        features = 1 / 8 if k == 1 else 0.0 if k % 2 else 2 / (math.pi * (k * k - 1)) ** 2
        return features + (0.5 * (step(abs(k - 1)) + step(k + 1)) if readout == "normal" else 0.0)

    return torch.tensor([value(k) for k in range(harmonics)], dtype=dtype)


def _arc(angle: Tensor) -> Tensor:
    return torch.sin(angle) + (math.pi - angle) * torch.cos(angle)


def _angles(x: Tensor, other: Tensor) -> Tensor:
    """Angles between the rows; from chords, since the arc-cosine of a rounded cosine is off by 1e-8 near zero."""
    a, b = (v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny) for v in (x, other))
    exact = "donot_use_mm_for_euclid_dist"
    return 2 * torch.atan2(torch.cdist(a, b, compute_mode=exact), torch.cdist(a, -b, compute_mode=exact))


def _next_angle(angle: Tensor) -> Tensor:
    """Angle after a ReLU layer, through one minus its cosine, which keeps small angles accurate."""
    deficit = 2 * torch.sin(angle / 2).square() - (torch.sin(angle) - angle * torch.cos(angle)) / math.pi
    return 2 * torch.asin((deficit.clamp(0.0, 2.0) / 2).sqrt())


def _check_size(name: str, size: int, least: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {size!r}.")


def _check_readout(readout: str) -> None:
    if readout not in ("zero", "normal"):
        raise ConfigError(f"readout must be 'zero' or 'normal', got {readout!r}.")
