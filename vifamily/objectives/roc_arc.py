"""The length of the optimal ROC curve between the posterior and q."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vifamily.numerics.f_generators import Generator, arc_length
from vifamily.objectives._csiszar import Csiszar
from vifamily.registry import register

__all__ = ["RocArc"]


@register("objectives", "roc_arc")
@dataclasses.dataclass(frozen=True)
class RocArc(Csiszar):
    r"""The length of the optimal ROC curve that tells the posterior p from q, less the length of the diagonal.

    .. math:: L(p, q) - \sqrt2 = \int \sqrt{p^2 + q^2} - \sqrt2
              = \mathbb{E}_q\big[\sqrt{1 + u^2}\big] - \sqrt2, \qquad u = \frac{p(z \mid x)}{q(z)}.

    It lies between 0 (q = p) and :math:`2 - \sqrt2 = 0.586` (q and p apart), is symmetric in p and q, and is minimised
    over q. That the length is an f-divergence, with :math:`\arctan u` its natural unknown, is the source's; the
    function used here, :math:`f(u) = \sqrt{1 + u^2} - (1 + u) / \sqrt2` (the same divergence, without cancellation
    near u = 1), the gradients and the treatment of unnormalised targets are derived for this package.

    With :math:`\theta = \arctan u` the score-function gradient has the weights :math:`\cos\theta` and the path gradient
    (``dreg``) :math:`\sin^2\theta \cos\theta \le 0.385` on :math:`\nabla_z \log(p/q)`: no ratio, however large, carries
    more than that. ``reparameterised`` and ``enumerated`` are as in ``f_divergence``. The optimum moves with the
    normaliser of p, so the ratio is divided by the running mean of all ratios so far (each step's mean is an unbiased
    estimate of the evidence, whatever q is; the running one is held fixed in the gradient and kept with a memory of
    0.95, and that of the step is reported as ``log_evidence``). The first step, which has no past, and local latents
    are self-normalised.

    **Bias.** None for a normalised p. With the running mean, that of the mean's own error, which falls as q approaches
    p; with ``normalise="self"`` O(1/K).

    **Blind to.** Modes in which q has no draws. Between separate modes that it does see, it covers the mass as the
    forward Kullback-Leibler divergence does, without its stretch in the tails.

    **Fails when.** q starts far from p: the weights vanish for u near 0 as well as for large u, so almost nothing
    pulls; begin from a fit by ``elbo``. In high dimension nearly all ratios are such.

    Source: Liu (2022), "Estimating the arc length of the optimal ROC curve and lower bounding the maximal AUC", for the
    length as an f-divergence; also Bantis, Tsimikas, Chambers, Capello, Hanash and Feng (2021). As an objective:
    derived, see ``docs/divergences.md``.

    Args:
        normalise: ``"running"``, ``"self"``, ``"none"``, or the log evidence.
        estimator: ``"auto"``, ``"enumerated"``, ``"dreg"``, ``"reparameterised"`` or ``"score"``.

    Raises:
        SpecError: If there is no such normalisation or estimator.

    Example:
        >>> from vifamily import registry
        >>> registry.build("objectives", "roc_arc").value_kind
        'divergence'
    """

    normalise: Any = "running"
    estimator: str = "auto"

    def _generator(self) -> Generator:
        return arc_length()

    def _value_terms(self, value: Tensor) -> Mapping[str, Tensor]:
        """The length itself, 1.414 to 2."""
        return {"arc_length": value + math.sqrt(2.0)}
