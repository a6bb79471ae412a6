"""The evidence lower bound, with every standard gradient estimator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from vifamily.errors import ConfigError, NotAvailableError
from vifamily.objectives._base import Estimator, Objective, ValueKind, log_ratio_parts, weighted_sum
from vifamily.registry import register
from vifamily.types import Batch, Capability, Draw, FamilyLike, Loss, ModelLike

__all__ = ["Elbo"]

_PATH = frozenset({Capability.REPARAMETERISED})
_DENSITY = frozenset({Capability.LOG_Q})


@register("objectives", "elbo")
@dataclasses.dataclass(frozen=True)
class Elbo(Objective):
    r"""Evidence lower bound: minimises ``KL(q || p)``.

    .. math:: \mathcal{L}(q) = \mathbb{E}_q[\log p(x, z) - \log q(z)]
              = \log p(x) - \mathrm{KL}(q \,\|\, p(\cdot \mid x)), \qquad \text{loss} = -\mathcal{L}.

    Every estimator is unbiased for the gradient, also on minibatches. They differ in variance and in what they need:

    - ``enumerated``: all states of a finite family, weighted; no noise at all.
    - ``example``: the KL to a normal prior in closed form, the likelihood with a draw of its own for every datum (the
      local reparameterisation of Kingma, Salimans and Welling 2015): the noise of a minibatch averages out over its
      data. For models that take noise per example; each step uses ``draws`` times the batch size rows of noise, and
      ``"auto"`` takes it only where that is cheap.
    - ``stl``: sticking the landing (Roeder et al. 2017); the density's parameters are held fixed, so the gradient
      noise vanishes when q reaches p.
    - ``entropy``: the entropy in closed form; less noise far from the optimum, does not vanish there.
    - ``analytic_kl``: the KL to a Gaussian prior in closed form, the likelihood by Monte Carlo.
    - ``reparameterised``: plain path gradient of the bound (Kingma and Welling 2014).
    - ``score``: score function with leave-one-out baseline (Ranganath et al. 2014; Kool et al. 2019), for families
      or models without path gradients; needs two draws.

    **Bias.** None: value and gradient are unbiased for every number of draws, on minibatches too. With
    ``semi_implicit`` families, whose density of draws is a bound, the value is a bound of the bound.

    **Blind to.** Modes that q does not visit: they carry no term. Where q covers several modes their weights are seen.

    **Fails when.** The family does not contain the posterior: spread is then too small (mean field on a correlated
    normal lands on the conditional, not the marginal, standard deviation), and q may sit on one of several modes. The
    noise of the ``score`` estimator grows with the number of coordinates.

    Source: Blei, Kucukelbir and McAuliffe 2017, section 2.2; estimators as named above.

    Args:
        estimator: ``"auto"`` (the first of the above that fits) or a name.

    Example:
        >>> import torch
        >>> from vifamily import registry
        >>> registry.build("objectives", "elbo(estimator=stl)")
        Elbo(estimator='stl')
    """

    estimator: str = "auto"

    needs_model: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_JOINT})
    needs_family: ClassVar[frozenset[Capability]] = _DENSITY
    value_kind: ClassVar[ValueKind] = "lower_bound"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "unbiased"
    estimators: ClassVar[Mapping[str, Estimator]] = {
        "enumerated": Estimator(family=frozenset({Capability.ENUMERATED})),
        "example": Estimator(
            model=frozenset({Capability.SCORE, Capability.GAUSSIAN_PRIOR, Capability.EXAMPLE_NOISE}),
            family=_PATH | {Capability.GAUSSIAN, Capability.ENTROPY},
            never_family=frozenset({Capability.WEIGHTED}),
            unless_asked=frozenset({Capability.CHEAP_EXAMPLE_NOISE}),
            value_gradient=False,
        ),
        "stl": Estimator(
            model=frozenset({Capability.SCORE}),
            family=_PATH,
            never_model=frozenset({Capability.LOCAL}),
            never_family=frozenset({Capability.LOG_Q_BOUND}),
            unless_asked=frozenset({Capability.CHEAP_LOG_Q}),
            value_gradient=False,
        ),
        "entropy": Estimator(
            model=frozenset({Capability.SCORE}),
            family=_PATH | {Capability.ENTROPY},
            never_model=frozenset({Capability.LOCAL}),
        ),
        "analytic_kl": Estimator(
            model=frozenset({Capability.SCORE, Capability.PER_DATUM, Capability.GAUSSIAN_PRIOR}),
            family=_PATH | {Capability.GAUSSIAN, Capability.ENTROPY},
            never_model=frozenset({Capability.LOCAL}),
        ),
        "reparameterised": Estimator(model=frozenset({Capability.SCORE}), family=_PATH),
        "score": Estimator(
            family=frozenset({Capability.DRAWS}),
            never_family=frozenset({Capability.WEIGHTED, Capability.LOG_Q_BOUND}),
            never_model=frozenset({Capability.LOCAL}),
            value_gradient=False,
        ),
    }

    @property
    def linear_in_draws(self) -> bool:
        """The bound is a mean over draws; a leave-one-out baseline is not, and draws per datum must be independent."""
        return self.estimator not in ("score", "example")

    @property
    def noise_per_datum(self) -> bool:
        """Whether every datum has a draw of its own."""
        return self.estimator == "example"

    @property
    def renyi_order(self) -> float:
        """Reverse KL is the Rényi divergence of order 1."""
        return 1.0

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate minus the bound (see :class:`Objective`)."""
        draw = family(noise)
        if self.estimator == "example":
            return self._example(family, model, draw, batch)
        if self.estimator == "analytic_kl":
            each = model.log_likelihood(draw.z, batch).sum(-1)
            return self._closed_kl(family, model, weighted_sum(draw.log_weight, each), batch)
        if self.estimator == "score":
            return self._score(family, model, draw, batch)
        log_p, local_log_q, terms = log_ratio_parts(model, draw, batch)
        if self.estimator == "entropy":
            entropy = family.entropy()
            bound = weighted_sum(draw.log_weight, log_p) + entropy
            return _loss(-bound, terms, draw, {"entropy": -entropy})
        log_q = family.log_prob(draw.z, frozen=True) if self.estimator == "stl" else draw.log_q
        if log_q is None:
            raise NotAvailableError("the ELBO needs the log density of the draws, and the family gave none.")
        total_q = log_q if local_log_q is None else log_q + local_log_q
        return _loss(
            -weighted_sum(draw.log_weight, log_p - total_q),
            terms,
            draw,
            {"log_q": weighted_sum(draw.log_weight, total_q)},
        )

    def _score(self, family: FamilyLike, model: ModelLike, draw: Draw, batch: Batch | None) -> Loss:
        num_draws = draw.z.shape[-2]
        if num_draws < 2:
            raise ConfigError("the score-function ELBO takes its baseline from the other draws: use at least draws=2.")
        z = draw.z.detach()
        log_p, _, terms = log_ratio_parts(model, Draw(z, None, draw.log_weight), batch)
        log_q = family.log_prob(z)
        ratio = (log_p - log_q).detach()
        baseline = (ratio.sum(-1, keepdim=True) - ratio) / (num_draws - 1)
        # the log joint itself is kept in the surrogate for the sake of point-estimated model parameters; through z
        # it carries no gradient
        surrogate = -((ratio - baseline) * log_q + log_p).mean(-1)
        out = _loss(-ratio.mean(-1), terms, draw, {"log_q": log_q.mean(-1)})
        return dataclasses.replace(out, surrogate=surrogate)

    def _example(self, family: FamilyLike, model: ModelLike, draw: Draw, batch: Batch | None) -> Loss:
        size = batch.size if batch is not None else model.num_data
        rows = draw.z.shape[-2]
        if not size or rows < size:
            raise ConfigError(
                f"noise per example needs a row of noise for every datum, {size} at least, and got {rows}."
            )
        # the last batch of a DataLoader may be smaller than those that the noise was counted for
        z = draw.z.narrow(-2, 0, rows - rows % size)
        each = model.log_likelihood_each(z.unflatten(-2, (-1, size)), batch)
        return self._closed_kl(family, model, each.sum(-1).mean(-1), batch)

    def _closed_kl(self, family: FamilyLike, model: ModelLike, log_likelihood: Tensor, batch: Batch | None) -> Loss:
        likelihood = model.scale(batch) * log_likelihood
        kl = model.kl_to_prior(family)
        value = kl - likelihood
        return Loss(value, value.detach(), {"kl_to_prior": kl.detach(), "log_likelihood": -likelihood.detach()})


def _loss(value: Tensor, parts: Mapping[str, Tensor], draw: Draw, more: Mapping[str, Tensor]) -> Loss:
    """Pack minus a bound; terms carry the sign with which they enter the loss."""
    terms = {name: -weighted_sum(draw.log_weight, part).detach() for name, part in parts.items()}
    terms.update({name: part.detach() for name, part in more.items()})
    return Loss(value, value.detach(), terms)
