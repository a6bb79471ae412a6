r"""How unsure an ensemble is, and how much of that is disagreement of its members.

Members m with weights :math:`\pi_m` predict :math:`\bar p = \sum_m \pi_m p_m`. The entropy of that splits in two,

.. math:: \underbrace{H[\bar p]}_{\text{total}} = \underbrace{\sum_m \pi_m H[p_m]}_{\text{aleatoric}}
          + \underbrace{\sum_m \pi_m \mathrm{KL}(p_m \,\|\, \bar p)}_{\text{epistemic}},

where the last part is the mutual information of the member and the answer, between 0 and the entropy of the weights.
All are in nats. Under misspecification members go on disagreeing however much data there is: epistemic means here what
members disagree on, not what is missing for lack of data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from vifamily.errors import ConfigError, DataError, ShapeError

__all__ = [
    "Behaviour",
    "SequenceInformation",
    "Uncertainty",
    "answer_clusters",
    "behaviour",
    "posterior_log_weight",
    "sequence_information",
    "split_uncertainty",
    "split_uncertainty_along",
]

_SUM = 1e-3
"""How far probabilities may sum from one: what float32 leaves over a large vocabulary."""


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """Uncertainty of predictions in nats, split; see the module.

    Attributes:
        total: Entropy of the mixture, ``(...)``.
        aleatoric: Mean entropy of the members, ``(...)``.
        epistemic: Total less aleatoric, ``(...)``; what members disagree on.
        vote_entropy: Entropy of the members' likeliest answers, ``(...)``.
        bound: Largest epistemic part that the weights allow, their entropy, ``(...)`` or a scalar.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    vote_entropy: Tensor
    bound: Tensor

    @property
    def normalised(self) -> Tensor:
        """Epistemic part as a share of its bound, from 0 to 1; 0 where one member has all the weight."""
        return torch.where(self.bound > 0, self.epistemic / self.bound.clamp_min(1e-300), torch.zeros_like(self.total))


def split_uncertainty(log_prob: Tensor, log_weight: Tensor | None = None) -> Uncertainty:
    """Split the uncertainty of predictions over classes or tokens.

    Args:
        log_prob: Log probabilities under each member, ``(member, ..., class)``; minus infinity is allowed.
        log_weight: Log weights of the members, ``(member,)``; normalised here. None takes them alike.

    Returns:
        The parts, in float64.

    Raises:
        ShapeError: If shapes disagree.
        DataError: If probabilities do not sum to one, or are NaN.

    Example:
        >>> agree = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
        >>> disagree = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
        >>> [round(float(split_uncertainty(p).epistemic), 3) for p in (agree, disagree)]
        [0.0, 0.693]
    """
    if log_prob.dim() < 2 or not log_prob.numel():
        raise ShapeError(f"log_prob must have shape (member, ..., class), got {tuple(log_prob.shape)}.")
    p = _probabilities(log_prob)
    weight = _log_weight(log_weight, p.shape[0]).exp()
    return _split(p, weight.reshape(-1, *(1,) * (p.dim() - 2)))


def split_uncertainty_along(log_prob: Tensor, answer: Tensor, log_weight: Tensor | None = None) -> Uncertainty:
    r"""Split the uncertainty of each token of an answer, given the tokens before it.

    Members are weighted by how well they have said the answer so far,
    :math:`v_m \propto \pi_m\, p_m(y_{<t} \mid x)`: that is the mixture of whole answers. Averaging next tokens with
    weights that stay is another distribution, whose answers may change member half way. Averaged over answers of the
    mixture, the epistemic parts of all tokens sum to the mutual information of the member and the answer.

    Args:
        log_prob: Log probabilities of the next token under each member, ``(member, ..., token, vocabulary)``.
        answer: The tokens themselves, integers ``(..., token)``.
        log_weight: Log weights of the members before the first token, ``(member,)``.

    Returns:
        The parts for each token, ``(..., token)``.

    Raises:
        ShapeError: If shapes disagree.
        DataError: If probabilities do not sum to one or are NaN, a token is outside the vocabulary, or no member could
            have said the answer.

    Example:
        >>> p = torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.1, 0.9], [0.1, 0.9]]]).log()
        >>> [round(e, 3) for e in split_uncertainty_along(p, torch.tensor([0, 0])).epistemic.tolist()]
        [0.368, 0.146]
    """
    if log_prob.dim() < 3 or log_prob.shape[1:-1] != answer.shape or not log_prob.numel():
        raise ShapeError(
            "log_prob must have shape (member, ..., token, vocabulary) and answer (..., token), got "
            f"{tuple(log_prob.shape)} and {tuple(answer.shape)}."
        )
    if answer.dtype.is_floating_point or int(answer.min()) < 0 or int(answer.max()) >= log_prob.shape[-1]:
        raise DataError(f"answer must hold tokens from 0 to {log_prob.shape[-1] - 1}, as integers.")
    p = _probabilities(log_prob)
    index = answer.detach().cpu().expand(p.shape[0], *answer.shape).unsqueeze(-1)
    said = p.gather(-1, index).squeeze(-1).log()  # (member, ..., token)
    before = torch.cat([torch.zeros_like(said[..., :1]), said[..., :-1]], -1).cumsum(-1)
    prior = _log_weight(log_weight, p.shape[0]).reshape(-1, *(1,) * (before.dim() - 1))
    posterior = (prior + before).softmax(0)
    if bool(posterior.isnan().any()):
        raise DataError("no member could have said the answer: a token has probability zero under all of them.")
    return _split(p, posterior)


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """How often members show a behaviour (a refusal, a yes, a preference), by prompt.

    Attributes:
        probability: Of the mixture, ``(...)``.
        variance: Across members, ``(...)``; from 0 to 0.25.
        vote_entropy: Entropy of whether a member is more likely than not to show it, ``(...)``, in nats.
    """

    probability: Tensor
    variance: Tensor
    vote_entropy: Tensor


def behaviour(probability: Tensor, log_weight: Tensor | None = None) -> Behaviour:
    r"""Mean and spread over members of the probability of a behaviour, :math:`\sum_m \pi_m (p_m - \bar p)^2`.

    Args:
        probability: Under each member, from 0 to 1, ``(member, ...)``; what a member did once is 0 or 1.
        log_weight: Log weights of the members, ``(member,)``.

    Returns:
        By prompt; average them over prompts for one figure.

    Raises:
        ShapeError: If shapes disagree.
        DataError: If a value is no probability.

    Example:
        >>> found = behaviour(torch.tensor([[1.0, 0.5], [0.0, 0.5]]))
        >>> found.probability.tolist(), found.variance.tolist()
        ([0.5, 0.5], [0.25, 0.0])
    """
    if probability.dim() < 1 or not probability.numel():
        raise ShapeError(f"probability must have shape (member, ...), got {tuple(probability.shape)}.")
    p = probability.detach().cpu().double()
    if bool(p.isnan().any()) or float(p.min()) < 0 or float(p.max()) > 1:
        raise DataError(f"probabilities must lie in [0, 1], got {float(p.min()):g} to {float(p.max()):g}.")
    weight = _log_weight(log_weight, p.shape[0]).exp().reshape(-1, *(1,) * (p.dim() - 1))
    mean = (weight * p).sum(0)
    votes = (weight * (p > 0.5)).sum(0).clamp(0, 1)
    return Behaviour(mean, (weight * (p - mean).square()).sum(0), _entropy(torch.stack([votes, 1 - votes], -1)))


@dataclasses.dataclass(frozen=True)
class SequenceInformation:
    """Mutual information of the member and a whole answer, by Monte Carlo.

    Attributes:
        value: Nats, ``(...)``; from 0.
        error: Its standard error, ``(...)``; NaN with one answer of a member.
        bound: Largest value that the weights allow.
    """

    value: Tensor
    error: Tensor
    bound: float


def sequence_information(
    log_likelihood: Tensor, drawn_by: Tensor, log_weight: Tensor | None = None
) -> SequenceInformation:
    r"""Mutual information of the member and an answer, from answers that members gave.

    .. math:: I = \sum_m \pi_m \mathbb{E}_{y \sim p_m} \log \frac{p_m(y)}{\bar p(y)}
              = \sum_m \pi_m \mathbb{E}_{y \sim p_m} \mathrm{KL}(w(y) \,\|\, \pi), \qquad
              w_k(y) \propto \pi_k\, p_k(y).

    The second form is averaged: it sums over the member that could have spoken instead of taking the one that did, so
    it is never negative and varies less.

    Args:
        log_likelihood: Of each answer as a whole under each member, ``(member, ..., answer)``.
        drawn_by: Which member gave each answer, ``(answer,)``; every member of positive weight must have given one.
        log_weight: Log weights of the members, ``(member,)``.

    Returns:
        The estimate with its error.

    Raises:
        ShapeError: If shapes disagree.
        DataError: If a log likelihood is NaN, an answer is impossible under all members, or a member gave no answer.

    Example:
        >>> ll = torch.tensor([[0.0, -50.0], [-50.0, 0.0]])  # each member gives an answer that the other never does
        >>> round(float(sequence_information(ll, torch.tensor([0, 1])).value), 4)
        0.6931
    """
    if log_likelihood.dim() < 2 or drawn_by.shape != log_likelihood.shape[-1:] or not log_likelihood.numel():
        raise ShapeError(
            "log_likelihood must have shape (member, ..., answer) and drawn_by (answer,), got "
            f"{tuple(log_likelihood.shape)} and {tuple(drawn_by.shape)}."
        )
    ll = log_likelihood.detach().cpu().double()
    log_prior = _log_weight(log_weight, ll.shape[0])
    weight, who = log_prior.exp(), drawn_by.detach().cpu().long()
    posterior = (log_prior.reshape(-1, *(1,) * (ll.dim() - 1)) + ll).log_softmax(0)
    if bool(posterior.isnan().any()):
        raise DataError("a log likelihood is NaN, or an answer has probability zero under every member.")
    prior = log_prior.reshape(-1, *(1,) * (ll.dim() - 1))
    terms = torch.where(posterior > -math.inf, posterior.exp() * (posterior - prior), torch.zeros_like(ll))
    each = terms.sum(0)  # (..., answer)
    value, variance = torch.zeros_like(each[..., 0]), torch.zeros_like(each[..., 0])
    for member in torch.nonzero(weight > 0).flatten().tolist():
        own = each[..., who == member]
        count = own.shape[-1]
        if not count:
            raise DataError(f"member {member} has weight {float(weight[member]):.3g} and gave no answer: draw some.")
        value = value + weight[member] * own.mean(-1)
        spread = own.var(-1) if count > 1 else torch.full_like(value, math.nan)
        variance = variance + weight[member].square() * spread / count
    return SequenceInformation(value, variance.sqrt(), float(_entropy(weight)))


def answer_clusters(
    clusters: Sequence[Hashable], drawn_by: Sequence[int] | Tensor, log_weight: Tensor | None = None
) -> Uncertainty:
    """Split the uncertainty over what answers mean, where their likelihoods cannot be compared.

    Args:
        clusters: What each answer means, such as its normalised text or the number of its cluster.
        drawn_by: Which member gave each answer.
        log_weight: Log weights of the members, ``(member,)``; None takes those that gave answers alike.

    Returns:
        The parts, from shares of clusters among each member's answers. With few answers shares are rough: entropies of
        members come out too small and the epistemic part too large.

    Raises:
        ShapeError: If there is not one member to an answer.
        DataError: If a member of positive weight gave no answer.

    Example:
        >>> float(answer_clusters(["yes", "yes", "no", "no"], [0, 0, 1, 1]).aleatoric)
        0.0
    """
    who = torch.as_tensor(drawn_by).long()
    if who.dim() != 1 or len(who) != len(clusters) or not len(who):
        raise ShapeError(f"there must be one member to each answer, got {len(clusters)} answers and {who.numel()}.")
    if int(who.min()) < 0:
        raise DataError("members are numbered from 0.")
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    size = int(who.max()) + 1 if log_weight is None else len(log_weight)
    if int(who.max()) >= size:
        raise ShapeError(f"an answer is of member {int(who.max())}, and there are weights for {size}.")
    count = torch.zeros(size, len(number), dtype=torch.float64)
    count.index_put_((who, torch.tensor([number[c] for c in clusters])), torch.ones(len(who)).double(), accumulate=True)
    silent = count.sum(1) == 0
    log_prior = _log_weight((~silent).double().log() if log_weight is None else log_weight, size)
    if bool((silent & (log_prior > -math.inf)).any()):
        raise DataError(f"member {int(torch.nonzero(silent)[0])} has weight and gave no answer: draw some.")
    heard = ~silent
    return split_uncertainty((count[heard] / count[heard].sum(1, keepdim=True)).log(), log_prior[heard])


def posterior_log_weight(
    log_likelihood: Tensor, log_weight: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    r"""Weights of members given a context: :math:`v_m \propto \pi_m\, p_m(\text{context})^{1 / \tau}`.

    Args:
        log_likelihood: Of a prompt or of examples under each member, ``(member,)`` or ``(member, ..., example)``;
            examples are summed.
        log_weight: Log weights before, ``(member,)``.
        temperature: A number :math:`\tau` above 1 lets the context say less, as for long texts whose likelihoods differ
            by more than they should; infinity keeps the weights as they were.

    Returns:
        Log weights, ``(member, ...)``, in float64.

    Raises:
        ShapeError: If shapes disagree.
        DataError: If a log likelihood is NaN, or the context is impossible under every member.
        ConfigError: If the temperature is not positive.

    Example:
        >>> posterior_log_weight(torch.tensor([[-1.0, -1.0], [-2.0, -4.0]])).exp().round(decimals=3).tolist()
        [0.982, 0.018]
    """
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not temperature > 0:
        raise ConfigError(f"temperature must be positive, got {temperature!r}.")
    if not log_likelihood.dim() or not log_likelihood.shape[0]:
        raise ShapeError("log_likelihood must have shape (member,) or (member, ..., example), got a single number.")
    ll = log_likelihood.detach().cpu().double()
    summed = ll if ll.dim() == 1 else ll.sum(-1)
    prior = _log_weight(log_weight, len(summed)).reshape(-1, *(1,) * (summed.dim() - 1))
    scaled = torch.zeros_like(summed) if math.isinf(temperature) else summed / temperature
    out = (prior + scaled).log_softmax(0)
    if bool(out.isnan().any()):
        raise DataError("a log likelihood is NaN, or the context has probability zero under every member.")
    return out


# --- parts ---


def _entropy(p: Tensor) -> Tensor:
    out: Tensor = torch.special.entr(p).sum(-1)
    return out


def _probabilities(log_prob: Tensor) -> Tensor:
    p = log_prob.detach().cpu().double().exp()
    total = p.sum(-1)
    if bool(total.isnan().any()):
        raise DataError("a log probability is NaN: look at the data, or at what the model does with them.")
    if float((total - 1).abs().max()) > _SUM:
        raise DataError(
            f"probabilities must sum to one over the last axis, got sums of {float(total.min()):.4g} to "
            f"{float(total.max()):.4g}. Pass log_prob.log_softmax(-1) to take them as a choice among these classes."
        )
    return p / total.unsqueeze(-1)


def _log_weight(log_weight: Tensor | None, members: int) -> Tensor:
    if log_weight is None:
        return torch.full((members,), -math.log(members), dtype=torch.float64)
    if log_weight.shape != (members,):
        raise ShapeError(f"log_weight must have shape ({members},), one to a member, got {tuple(log_weight.shape)}.")
    out = log_weight.detach().cpu().double().log_softmax(0)
    if bool(out.isnan().any()):
        raise DataError("log weights must be finite, or minus infinity for some of the members, and not NaN.")
    return out


def _split(p: Tensor, weight: Tensor) -> Uncertainty:
    """Split for probabilities ``(member, ..., class)`` and weights that broadcast to ``(member, ...)``."""
    mean = (weight.unsqueeze(-1) * p).sum(0)
    total = _entropy(mean)
    aleatoric = (weight * _entropy(p)).sum(0)
    # members that agree differ by rounding alone, which may fall below zero
    epistemic = (total - aleatoric).clamp_min(0)
    votes = torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).double()
    bound = _entropy(weight.movedim(0, -1))
    return Uncertainty(total, aleatoric, epistemic, _entropy((weight.unsqueeze(-1) * votes).sum(0)), bound)
