"""Any named f-divergence between q and the posterior."""

from __future__ import annotations

import dataclasses
from typing import Any

from vifamily.errors import ConfigError, SpecError
from vifamily.numerics.f_generators import Generator, f_generator
from vifamily.objectives._csiszar import Csiszar
from vifamily.registry import register

__all__ = ["FDivergence"]


@register("objectives", "f_divergence")
@dataclasses.dataclass(frozen=True)
class FDivergence(Csiszar):
    r"""An f-divergence between the posterior p and q, by name.

    .. math:: D_f = \mathbb{E}_q\big[f(u)\big], \qquad u = \frac{p(z \mid x)}{q(z)},

    with f convex and ``f(1) = 0``. It is minimised over q. The names: ``kl_reverse``, ``kl_forward``, ``amari_alpha``
    (with ``alpha=``), ``jensen_shannon``, ``arithmetic_geometric``, ``total_variation``, ``pearson``, ``chi_square``,
    ``squared_hellinger``, ``triangular``, ``jeffreys``, ``t_power`` (with ``t=``), ``log1p_abs`` and ``modified_gan``;
    the dual ``u f(1/u)`` exchanges p and q, and the symmetrised divergence is the mean of both.

    Estimators: ``dreg`` differentiates along the path of the draws alone, with weights :math:`f''(u) u^2` on
    :math:`\nabla_z \log(p/q)` (for ``kl_reverse`` this is sticking the landing, and its noise vanishes when q reaches
    p for every f); functions with a kink (``total_variation``, ``log1p_abs``) do not have it. ``reparameterised``
    is the gradient of the value, ``score`` needs no path, ``enumerated`` sums over all states. All have the same
    mean, that of the gradient of the value's expectation.

    The posterior is known up to its normaliser only, and but for ``kl_reverse`` the ratio u needs it. By default
    :math:`w = p(x, z) / q` is divided by the running mean of all ratios so far (each step's mean is an unbiased
    estimate of the evidence, whatever q is; the running one is held fixed in the gradient and kept with a memory of
    0.95, and that of the step is reported as ``log_evidence``). ``normalise="self"`` takes ``u_k = K softmax(log w)_k``
    from the draws of the step alone, and differentiates the normaliser too; a number is taken as the log evidence;
    ``"none"`` takes the log joint to be normalised. The first step of a running mean and local latents are
    self-normalised, and so is an enumerated family, where that is exact. The model's own parameters stay as they are,
    since moving the target would bring it to q; ``kl_reverse``, minus the evidence lower bound, fits them.

    **Bias.** ``kl_reverse``, and every f with a log evidence that is right, is unbiased. With the running mean, the
    bias is that of the mean's own error. Self-normalised, what is minimised is the expectation of the K-draw estimate,
    which differs from the divergence of the name by O(1/K), and much for a q that is narrower than p: a Gaussian on the
    ``banana`` problem has the sds 1.23 and 0.93 under the squared Hellinger distance of 32 draws, 1.40 and 1.00 of 256,
    and 1.49 and 1.13 in the limit (the running mean gives 1.52 and 1.14 with 32). ``chi_square`` and ``pearson`` become
    the same estimate then. With ``"none"`` and an unnormalised joint it is another function of q altogether, whose
    gradient may be zero to rounding.

    **Blind to.** Modes in which q has no draws, as every expectation over q: a mass-covering f helps only where some
    draw hits the missed mass. The less :math:`f''(u) u^2` grows with u, the less it sees single large ratios:
    ``kl_reverse`` not at all, ``total_variation`` only whether u is above one.

    **Fails when.** The dimension is high: for f with :math:`f''(u) u^2` away from a constant a few draws carry all
    weight and the signal of the gradient falls exponentially (Geffner and Domke 2021); above some ten dimensions look
    at the term ``largest_weight``. ``pearson``, ``chi_square`` and ``t_power`` of large t have infinite variance unless
    q has heavier tails than p, and ``log1p_abs``, which looks at 1/u, unless it has lighter ones. ``total_variation``
    has almost no gradient where q and p hardly overlap. On fixed draws the value is least where q slips between the
    draws, so solvers that minimise it there are refused but for ``kl_reverse``.

    Source: Ali and Silvey (1966) and Csiszár (1967) for the divergences; Roeder et al. (2017) and Tucker et al. (2019)
    for the path gradient of ``kl_reverse`` and of importance weighting, here for every f, derived in
    ``docs/divergences.md``.

    Args:
        kind: The name of the divergence.
        alpha: The number of ``amari_alpha``.
        t: The number of ``t_power``.
        dual: Whether to take ``u f(1/u)``.
        symmetrised: Whether to take the mean of f and its dual.
        normalise: ``"auto"`` (``"none"`` for ``kl_reverse``, else ``"running"``), ``"self"``, ``"running"``,
            ``"none"``, or the log evidence.
        estimator: ``"auto"``, ``"enumerated"``, ``"dreg"``, ``"reparameterised"`` or ``"score"``.

    Raises:
        SpecError: If there is no such divergence, number, normalisation or estimator.

    Example:
        >>> from vifamily import registry
        >>> registry.build("objectives", "f_divergence(kind=amari_alpha, alpha=0.3, normalise=-12.5)").renyi_order
        0.7
    """

    kind: str = "squared_hellinger"
    alpha: float | None = None
    t: float | None = None
    dual: bool = False
    symmetrised: bool = False
    normalise: Any = "auto"
    estimator: str = "auto"

    def _generator(self) -> Generator:
        for name in ("dual", "symmetrised"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        try:
            out = f_generator(self.kind, alpha=self.alpha, t=self.t)
        except ConfigError as error:
            raise SpecError(f"f_divergence: {error}") from error
        out = out.dual() if self.dual else out
        return out.symmetrised() if self.symmetrised else out
