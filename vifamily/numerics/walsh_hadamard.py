r"""Matrices ``W = diag(a) H diag(g) H diag(b)`` with a Walsh-Hadamard ``H``: products, entries, moments, divergences.

``H`` is orthonormal, of size ``P = 2^p``. ``H diag(g) H`` depends on its indices only through their exclusive or,

.. math:: W_{ij} = a_i b_j \gamma_{i \oplus j}, \qquad \gamma = P^{-1/2} H g,

from which everything here follows. For normal ``g`` the matrix is normal on a subspace of ``P`` dimensions out of
``P^2``. All functions take blocks along leading axes. Source: Rossi, Marmin and Filippone (2020), "Walsh-Hadamard
variational inference for Bayesian deep learning"; Le, Sarlos and Smola (2013), "Fastfood", for the product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import ShapeError
from vifamily.numerics.hadamard import dyadic_convolution
from vifamily.numerics.hadamard_kernel import hadamard

__all__ = [
    "isotropic_cross_entropy",
    "isotropic_log_prior",
    "isotropic_spectrum",
    "normal_kl",
    "walsh_covariance",
    "walsh_matrix",
    "walsh_output_covariance",
    "walsh_output_moments",
    "walsh_product",
]


def _exclusive_or(size: int, device: torch.device) -> Tensor:
    """Table of ``i xor j``, ``(P, P)``."""
    index = torch.arange(size, device=device)
    return index.unsqueeze(-1) ^ index


class _XorGather(torch.autograd.Function):
    """``gamma[i xor j]``. Its derivative is a gather too; autograd would take a scatter, which is many times slower."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gamma: Tensor) -> Tensor:
        return gamma[..., _exclusive_or(gamma.shape[-1], gamma.device)]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing has to be kept."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        index = _exclusive_or(grad.shape[-1], grad.device)
        return grad.gather(-1, index.expand(grad.shape)).sum(-2)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent[..., _exclusive_or(tangent.shape[-1], tangent.device)]


def walsh_product(x: Tensor, left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """Product ``W x = a * H(g * H(b * x))`` without the matrix: two transforms, ``O(P log P)``.

    Args:
        x: ``(..., P)``.
        left: Diagonal ``a``, ``(..., P)``.
        core: Diagonal ``g``, ``(..., P)``.
        right: Diagonal ``b``, ``(..., P)``; all leading axes broadcast.

    Returns:
        ``(..., P)``. The first transform is made at the shape of ``x`` and ``b`` alone, so draws of ``g`` share it.

    Raises:
        ShapeError: If the last axis is not a power of two.

    Example:
        >>> one = torch.ones(4)
        >>> walsh_product(torch.arange(4.0), one, one, one).tolist()  # H is its own inverse
        [0.0, 1.0, 2.0, 3.0]
    """
    return left * hadamard(core * hadamard(right * x))


def walsh_matrix(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """Entries ``W_ij = a_i b_j gamma_(i xor j)``: one transform of length ``P`` and a gather.

    Args:
        left: Diagonal ``a``, ``(..., P)``.
        core: Diagonal ``g``, ``(..., P)``.
        right: Diagonal ``b``, ``(..., P)``; leading axes broadcast.

    Returns:
        ``(..., P, P)``.

    Raises:
        ShapeError: If the last axis is not a power of two.

    Example:
        >>> walsh_matrix(torch.ones(2), torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])).round().tolist()
        [[2.0, 2.0], [1.0, 4.0]]
    """
    gamma = hadamard(core) / math.sqrt(core.shape[-1])
    entries: Tensor = _XorGather.apply(gamma)  # type: ignore[no-untyped-call]
    return left.unsqueeze(-1) * entries * right.unsqueeze(-2)


def walsh_output_moments(
    x: Tensor, left: Tensor, mean: Tensor, variance: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variances of ``W x`` for independent normal ``g``.

    With ``v = H(b * x)``: ``E h = a * H(mean * v)`` and ``Var h_i = a_i^2 sum_k variance_k v_k^2 / P``.

    Args:
        x: ``(..., P)``.
        left: Diagonal ``a``, ``(..., P)``.
        mean: Mean of ``g``, ``(..., P)``.
        variance: Variances of ``g``, ``(..., P)``.
        right: Diagonal ``b``, ``(..., P)``.

    Returns:
        Mean and variance, ``(..., P)`` each.

    Example:
        >>> one = torch.ones(2)
        >>> moments = walsh_output_moments(torch.tensor([1.0, 0.0]), one, 0 * one, 4 * one, one)
        >>> [t.round(decimals=3).tolist() for t in moments]
        [[0.0, 0.0], [2.0, 2.0]]
    """
    v = hadamard(right * x)
    spread = (variance * v.square()).mean(-1, keepdim=True)
    return left * hadamard(mean * v), left.square() * spread


def walsh_output_covariance(x: Tensor, left: Tensor, variance: Tensor, right: Tensor) -> Tensor:
    """Covariance ``A H diag(variance * v^2) H A`` of ``W x``, with ``v = H(b * x)`` and ``A = diag(a)``.

    Args:
        x: ``(..., P)``.
        left: Diagonal ``a``, ``(..., P)``.
        variance: Variances of ``g``, ``(..., P)``.
        right: Diagonal ``b``, ``(..., P)``.

    Returns:
        ``(..., P, P)``.
    """
    return walsh_matrix(left, variance * hadamard(right * x).square(), left)


def walsh_covariance(left: Tensor, variance: Tensor, right: Tensor) -> Tensor:
    r"""Covariances of the entries of ``W`` for independent normal ``g``.

    .. math:: \operatorname{Cov}(W_{ij}, W_{kl}) = a_i b_j a_k b_l\, \eta_{i \oplus j \oplus k \oplus l},
        \qquad \eta = P^{-3/2} H \sigma^2.

    Args:
        left: Diagonal ``a``, ``(P,)``.
        variance: Variances of ``g``, ``(P,)``.
        right: Diagonal ``b``, ``(P,)``.

    Returns:
        ``(P, P, P, P)``, indexed ``i, j, k, l``: for small blocks.
    """
    size = variance.shape[-1]
    eta = hadamard(variance) / (size * math.sqrt(size))
    index = _exclusive_or(size, variance.device)
    scale = left.unsqueeze(-1) * right
    return scale[:, :, None, None] * scale * eta[index[:, :, None, None] ^ index]


def normal_kl(
    mean: Tensor,
    prior_variance: float,
    *,
    variance: Tensor | None = None,
    factor: Tensor | None = None,
    scale_tril: Tensor | None = None,
) -> Tensor:
    r"""Divergence ``KL(N(mean, C) || N(0, lambda I))``.

    .. math:: \tfrac12 \bigl[(\operatorname{tr} C + \|m\|^2) / \lambda - P + P \ln\lambda - \ln\det C\bigr]

    ``C`` is ``diag(variance)``, ``diag(variance) + V V'`` with ``V = factor``, or ``L L'`` with ``L = scale_tril``.

    Args:
        mean: ``(..., P)``.
        prior_variance: ``lambda``.
        variance: ``(..., P)``.
        factor: ``(..., P, rank)``, together with ``variance``.
        scale_tril: Lower triangular, positive diagonal, ``(..., P, P)``, instead of ``variance``.

    Returns:
        ``(...)``.

    Raises:
        ShapeError: If not exactly one of ``variance`` and ``scale_tril`` is given, or ``factor`` without ``variance``.

    Example:
        >>> normal_kl(torch.zeros(2), 1.0, variance=torch.ones(2)).item()
        0.0
    """
    if (variance is None) == (scale_tril is None) or (factor is not None and variance is None):
        raise ShapeError(
            "a normal law is given by its variances, by variances and a factor, or by a triangular factor alone: got "
            f"variance={variance is not None}, factor={factor is not None}, scale_tril={scale_tril is not None}."
        )
    if scale_tril is not None:
        trace = scale_tril.square().sum((-2, -1))
        log_det = 2 * scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    elif variance is not None:
        trace, log_det = variance.sum(-1), variance.log().sum(-1)
        if factor is not None:
            inner = factor.mT @ (factor / variance.unsqueeze(-1))
            inner = inner + torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
            trace = trace + factor.square().sum((-2, -1))
            log_det = log_det + torch.linalg.slogdet(inner).logabsdet
    size = mean.shape[-1]
    quadratic = (trace + mean.square().sum(-1)) / prior_variance
    return 0.5 * (quadratic - size + size * math.log(prior_variance) - log_det)


def isotropic_spectrum(left: Tensor, right: Tensor) -> Tensor:
    r"""Eigenvalues of ``A'A`` where ``vec W = A g``, in the basis ``H``.

    .. math:: \kappa_c / P, \qquad \kappa_c = \sum_i a_i^2 b_{i \oplus c}^2, \quad
        A'A = H \operatorname{diag}(\kappa / P) H.

    Args:
        left: Diagonal ``a``, ``(..., P)``.
        right: Diagonal ``b``, ``(..., P)``.

    Returns:
        ``(..., P)``; the diagonal of ``A'A`` is constant, the mean of these.

    Example:
        >>> isotropic_spectrum(torch.ones(2), torch.tensor([1.0, 2.0])).round(decimals=3).tolist()
        [2.5, 2.5]
    """
    spectrum = dyadic_convolution(left.square(), right.square()) / left.shape[-1]
    # a sum of squares: what rounding leaves below the smallest term that it can hold is no information
    return spectrum.clamp_min(torch.finfo(spectrum.dtype).tiny)


def isotropic_log_prior(core: Tensor, left: Tensor, right: Tensor, prior_sd: float | Tensor) -> Tensor:
    r"""Log density of ``g`` under an isotropic normal law on ``W``, restricted to the matrices that ``g`` can make.

    .. math:: g \sim N(0, \tau^2 (A'A)^{-1}), \qquad \|W\|_F^2 = \sum_c (H g)_c^2 \kappa_c / P.

    It depends on ``a``, ``b`` and ``g`` through ``W`` alone (up to the volume): a scale cannot be moved from one to the
    other to escape it. Cost: four transforms.

    Args:
        core: ``g``, ``(..., P)``.
        left: Diagonal ``a``, ``(..., P)``.
        right: Diagonal ``b``, ``(..., P)``.
        prior_sd: ``tau``.

    Returns:
        ``(...)``.
    """
    spectrum = isotropic_spectrum(left, right)
    squared = hadamard(core).square() * spectrum / prior_sd**2
    log_scale = torch.log(2 * math.pi * prior_sd**2 / spectrum)
    return -0.5 * (squared + log_scale).sum(-1)


def isotropic_cross_entropy(
    mean: Tensor,
    left: Tensor,
    right: Tensor,
    prior_sd: float | Tensor,
    *,
    variance: Tensor | None = None,
    covariance: Tensor | None = None,
) -> Tensor:
    """Cross entropy ``E_q[-log p(g)]`` of a normal law with :func:`isotropic_log_prior`, in closed form.

    Args:
        mean: ``(..., P)``.
        left: Diagonal ``a``, ``(..., P)``.
        right: Diagonal ``b``, ``(..., P)``.
        prior_sd: ``tau``.
        variance: ``(..., P)``, of independent coordinates. The diagonal of ``A'A`` is constant, so their sum is enough.
        covariance: ``(..., P, P)`` instead, where coordinates depend on each other: ``A'A`` is not diagonal.

    Returns:
        ``(...)``.

    Raises:
        ShapeError: If not exactly one of ``variance`` and ``covariance`` is given.
    """
    if (variance is None) == (covariance is None):
        raise ShapeError("a cross entropy needs either the variances of independent coordinates or a covariance.")
    spectrum = isotropic_spectrum(left, right)
    if covariance is not None:
        turned = hadamard(hadamard(covariance).mT).diagonal(dim1=-2, dim2=-1)
        trace = (turned * spectrum).sum(-1)
    elif variance is not None:
        trace = variance.sum(-1) * spectrum.mean(-1)
    return 0.5 * trace / prior_sd**2 - isotropic_log_prior(mean, left, right, prior_sd)
