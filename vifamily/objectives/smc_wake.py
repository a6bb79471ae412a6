"""SMC-wake: inclusive KL with particles that a tempered sequential Monte Carlo sampler takes to the posterior."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.numerics.smc import KERNELS, Particles, effective, tempered_smc
from vifamily.objectives._base import Estimator, Objective, ValueKind, log_ratio_parts, restart_shape
from vifamily.objectives._reference import check_number
from vifamily.registry import register
from vifamily.types import Batch, Capability, Draw, FamilyLike, Loss, ModelLike, Space

__all__ = ["SmcWake"]

_PRIOR_LADDER = 3
"""Power of the spacing of a fixed ladder from the prior, where the first data change most."""
_HEAD = 3
"""Numbers in front of the kept particles in a row of the state."""
_PRIOR = frozenset({Capability.PRIOR, Capability.PRIOR_DRAWS})


@register("objectives", "smc_wake")
@dataclasses.dataclass(frozen=True)
class SmcWake(Objective):
    r"""SMC-wake: inclusive KL whose draws of the posterior come from tempered sequential Monte Carlo.

    .. math:: -\nabla_\lambda \mathrm{KL}(p \,\|\, q) = \mathbb{E}_p \nabla_\lambda \log q(z)
              \approx \sum_{k=1}^K \bar w_k \nabla_\lambda \log q(z_k), \qquad
              \pi_\tau(z) \propto s(z)^{1 - \tau}\, p(x, z)^\tau .

    Minimises :math:`\mathrm{KL}(p \,\|\, q)`. At each step K particles are drawn from a law s, taken along the
    tempered laws :math:`\pi_\tau` from :math:`\tau = 0` to 1 (weighted, resampled systematically, and moved by
    ``moves`` Metropolis-Hastings steps at each temperature), and end with weights :math:`\bar w` for the posterior.
    The estimator says what s is. ``from_family`` starts at q as it stands: the ladder is short where q is near, and
    where the effective sample size is above ``ess`` at once it has one step. ``from_prior``
    starts at the prior, so what q has not found yet cannot mislead it, and its ladder is as long as the data demand.
    Each next temperature is the largest at which the weights keep a part ``ess`` of their effective sample size, or
    with ``stages`` the ladder is :math:`\tau_t = (t / T)^c`, c = 1 from the family and 3 from the prior.

    The value is the estimate :math:`\sum_k \bar w_k \log \{p(x, z_k) / q(z_k)\} - \log \hat Z` of the divergence with
    the sampler's estimate of the evidence; the terms are ``log_evidence``, ``ess``, ``stages`` and ``acceptance``.
    The randomness of a sampler is seeded by its rows of the noise. On amortised families of a simulator with a
    likelihood there is one sampler for each datum of a step.

    Samplers are dear and their particles stay good when q moves on: with ``refresh`` they run at every so many steps
    only, and with ``keep`` the particles of the last runs count together, each run with its part of the summed
    evidence estimates :math:`\hat Z_m`. These runs are the objective's state and go into checkpoints.

    **Bias.** Of order 1/K from the division by the sum of weights and from ladders and proposals that are learnt from
    the particles, with a factor that tempering and moves keep small where that of ``reweighted_wake`` grows
    exponentially in the divergence. On a ladder of ``stages`` and with many kept runs the first part is of order
    1/(K ``keep``).

    **Blind to.** Modes that no particle of the start comes near: moves are local, and tempering from q goes where q
    has mass.

    **Fails when.** Moves are refused (``acceptance`` near 0) or too few to forget where particles were resampled
    from; in many dimensions take more ``moves`` or ``kernel=mala``. One step costs ``1 + moves`` evaluations of the
    log joint at each temperature. Minibatches would temper another target and are refused.

    Source: D. McNamara, J. Loper and J. Regier, "Sequential Monte Carlo for inclusive KL minimization in amortized
    variational inference" (AISTATS 2024), with likelihoods to a power from the prior on; the path from q on is that of
    P. Del Moral, A. Doucet and A. Jasra, "Sequential Monte Carlo samplers" (JRSS B 2006).

    Args:
        ess: Part of the effective sample size that weights keep from one temperature to the next.
        stages: Number of temperatures of a fixed ladder, or None.
        moves: Metropolis-Hastings steps at each temperature, the last included.
        kernel: ``"pcn"``, a Gaussian autoregression about the mean of the particles; ``"random_walk"``; or
            ``"mala"``, Langevin proposals along the score. The last two take angles, too.
        refresh: Steps of the fit from one run of the sampler to the next.
        keep: Number of runs whose particles count.
        estimator: ``"auto"``, ``"from_family"`` or ``"from_prior"``.

    Raises:
        ConfigError: If a number is out of range or there is no such kernel.

    Example:
        >>> from vifamily import plan
        >>> plan("correlated_normal", "mean_field", "smc_wake").estimator
        'from_family'
    """

    ess: float = 0.5
    stages: int | None = None
    moves: int = 3
    kernel: str = "pcn"
    refresh: int = 1
    keep: int = 1
    estimator: str = "auto"

    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q, Capability.DRAWS})
    estimators: ClassVar[Mapping[str, Estimator]] = {
        # particles are resampled, so the draws that they begin as must count equally
        "from_family": Estimator(
            never_model=frozenset({Capability.LOCAL}),
            never_family=frozenset({Capability.WEIGHTED, Capability.LOG_Q_BOUND, Capability.ENUMERATED}),
            value_gradient=False,
        ),
        "from_prior": Estimator(
            model=_PRIOR,
            never_model=frozenset({Capability.LOCAL}),
            never_family=frozenset({Capability.LOG_Q_BOUND, Capability.ENUMERATED}),
            value_gradient=False,
        ),
    }
    spaces: ClassVar[frozenset[Space]] = frozenset({Space.REAL})
    value_kind: ClassVar[ValueKind] = "surrogate"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "no"
    inclusive: ClassVar[bool] = True
    state_by_row: ClassVar[bool] = True
    biased_at_posterior: ClassVar[bool] = True
    bias: ClassVar[str | None] = (
        "the normalised weights of {draws} particles are biased by O(1/draws), with a factor that tempering keeps small"
    )
    min_draws: ClassVar[int] = 8
    default_draws: ClassVar[int] = 64

    def __post_init__(self) -> None:
        check_number("ess", self.ess, 0, 1, "a part of the effective sample size, between 0 and 1")
        for name in ("stages", "moves", "refresh", "keep"):
            number, other = getattr(self, name), " or None" if name == "stages" else ""
            whole = isinstance(number, int) and not isinstance(number, bool) and number >= 1
            if not whole and not (other and number is None):
                raise ConfigError(f"smc_wake({name}=...) must be a positive integer{other}, got {number!r}.")
        if self.kernel not in KERNELS:
            raise ConfigError(f"smc_wake(kernel=...) must be one of {', '.join(KERNELS)}, got {self.kernel!r}.")
        super().__post_init__()
        needs = type(self).needs_model
        if self.kernel == "mala":
            needs |= {Capability.SCORE}
        if self.estimator == "from_prior":
            needs |= _PRIOR
        object.__setattr__(self, "needs_model", needs)
        if self.kernel != "pcn":
            # steps without a centre are as good on the circle; an autoregression would see its cut
            object.__setattr__(self, "spaces", frozenset({Space.REAL, Space.CIRCLE}))
        if self.refresh > 1 or self.keep > 1:
            # kept particles are of the model as it was
            object.__setattr__(self, "never_model", type(self).never_model | {Capability.POINT_PARAMETERS})

    def init_state(self, model: ModelLike, family: FamilyLike, *, generator: torch.Generator) -> Tensor:
        """Step 0 and no particles, ``([restart,] 3)``."""
        of: Any = getattr(family, "latent", model)
        dtype, device = getattr(of, "dtype", torch.float64), getattr(of, "device", "cpu")
        return torch.zeros(*restart_shape(family), _HEAD, dtype=dtype, device=device)

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Run a sampler for each restart where it is due, and evaluate q at what is kept (see :class:`Objective`)."""
        lead = noise.shape[: noise.dim() - len(family.noise_spec.shape) - 1]
        before = noise.new_zeros(*lead, _HEAD) if state is None else state
        due = before[..., 0] % self.refresh == 0
        kept = None if bool(due.all()) and self.keep == 1 else _Kept.read(before, noise.shape[len(lead)], self.keep)
        if kept is None or bool(due.any()):
            kept = _Kept.after(self._sampled(family, model, noise, batch), kept, due, self.keep)
        z, log_share, log_evidence = kept.together()
        log_p, _, _ = log_ratio_parts(model, Draw(z, None, log_share), batch)
        log_q = family.log_prob(z)
        share = log_share.exp()
        apart = torch.where(share > 0, share * (log_p - log_q).detach(), torch.zeros_like(share)).sum(-1)
        # log p is there for point-estimated parameters of the model; particles without mass have no part in either
        climbed = torch.where(share > 0, share * (log_q + log_p), torch.zeros_like(share))
        terms = {
            "log_evidence": log_evidence,
            "ess": effective(log_share) * kept.runs,
            "stages": kept.stages,
            "acceptance": kept.acceptance,
        }
        stored = kept.written(before[..., 0] + 1, all_of_it=self.keep > 1 or self.refresh > 1)
        return Loss(-climbed.sum(-1), apart - log_evidence, terms, stored)

    @torch.no_grad()
    def _sampled(self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None) -> Particles:
        rows = noise.flatten(noise.dim() - len(family.noise_spec.shape) - 1)
        sources = [_source(row) for row in rows.reshape(-1, rows.shape[-1])]
        prior = self.estimator == "from_prior"
        if prior:
            count = noise.shape[rows.dim() - 1]
            drawn = torch.stack([_prior_draws(model, count, source) for source in sources])
            z = drawn.reshape(*rows.shape[:-1], count, -1).to(noise)
        else:
            z = family(noise).z
        power = _PRIOR_LADDER if prior else 1
        return tempered_smc(
            z,
            model.log_prior if prior else family.log_prob,
            lambda z: model.log_joint(z, batch),
            sources,
            ladder=None if self.stages is None else [((t + 1) / self.stages) ** power for t in range(self.stages)],
            ess=self.ess,
            kernel=self.kernel,
            moves=self.moves,
        )


def _source(row: Tensor) -> torch.Generator:
    """A generator seeded by the bits of the noise of one sampler, ``(number,)``."""
    digest = hashlib.sha256(row.detach().cpu().contiguous().numpy().tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _prior_draws(model: Any, count: int, source: torch.Generator) -> Tensor:
    draws: Tensor = model.sample_prior(count, generator=source)
    return draws


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    """The last runs of samplers, the newest first, of every restart.

    Attributes:
        z: ``(*lead, run, particle, dim)``.
        log_weight: Normalised within each run, ``(*lead, run, particle)``.
        log_evidence: ``(*lead, run)``; minus infinity where there was no such run yet.
        stages: Of the newest, ``(*lead)``.
        acceptance: Of the newest, ``(*lead)``.
    """

    z: Tensor
    log_weight: Tensor
    log_evidence: Tensor
    stages: Tensor
    acceptance: Tensor

    @staticmethod
    def read(state: Tensor, count: int, keep: int) -> _Kept | None:
        """Read what :meth:`written` wrote; None where nothing was kept yet."""
        if state.shape[-1] == _HEAD:
            return None
        head, rest = state[..., :_HEAD], state[..., _HEAD:]
        log_evidence, rest = rest[..., :keep], rest[..., keep:]
        if not rest.shape[-1] or rest.shape[-1] % (keep * count):
            raise ConfigError(
                f"smc_wake keeps particles from step to step and was called with {count} draws after another number: "
                "use as many draws in each step."
            )
        table = rest.unflatten(-1, (keep, count, -1))
        # rows that were not visited yet have their place and nothing in it
        begun = head[..., :1] > 0
        empty = torch.full_like(log_evidence, -torch.inf)
        return _Kept(table[..., 1:], table[..., 0], torch.where(begun, log_evidence, empty), head[..., 1], head[..., 2])

    @staticmethod
    def after(new: Particles, old: _Kept | None, due: Tensor, keep: int) -> _Kept:
        """Put new runs in front where they are due."""
        run = (new.z.unsqueeze(-3), new.log_weight.unsqueeze(-2), new.log_evidence.unsqueeze(-1))
        if old is None:
            lead, size = new.log_evidence.shape, (1,) * new.log_evidence.dim()
            none = torch.full((*lead, keep - 1), -torch.inf, dtype=run[2].dtype, device=run[2].device)
            z, log_weight = run[0].repeat(*size, keep, 1, 1), run[1].repeat(*size, keep, 1)
            return _Kept(z, log_weight, torch.cat([run[2], none], -1), new.stages, new.acceptance)

        def shifted(one: Tensor, others: Tensor, axis: int) -> Tensor:
            moved = torch.cat([one, others.narrow(axis, 0, keep - 1)], axis)
            return torch.where(due[(..., *[None] * (-axis))], moved, others)

        return _Kept(
            shifted(run[0], old.z, -3),
            shifted(run[1], old.log_weight, -2),
            shifted(run[2], old.log_evidence, -1),
            torch.where(due, new.stages, old.stages),
            torch.where(due, new.acceptance, old.acceptance),
        )

    @property
    def runs(self) -> Tensor:
        """Places for runs over those that are taken: turns a part of all particles into one of those that count."""
        places = self.log_evidence.shape[-1]
        return places / (self.log_evidence > -torch.inf).sum(-1).clamp_min(1)

    def together(self) -> tuple[Tensor, Tensor, Tensor]:
        """All particles ``(*lead, run * particle, dim)``, their log weights, and the log of the mean evidence."""
        log_share = torch.log_softmax(self.log_evidence, -1).unsqueeze(-1) + self.log_weight
        number = (self.log_evidence > -torch.inf).sum(-1).clamp_min(1)
        evidence = torch.logsumexp(self.log_evidence, -1) - number.log()
        return self.z.flatten(-3, -2), log_share.flatten(-2), evidence

    def written(self, step: Tensor, *, all_of_it: bool) -> Tensor:
        """One row of numbers for each restart: step, stages, acceptance, and where asked for the runs."""
        head = torch.stack([step, self.stages, self.acceptance], -1)
        if not all_of_it:
            return head.detach()
        table = torch.cat([self.log_weight.unsqueeze(-1), self.z], -1)
        return torch.cat([head, self.log_evidence, table.flatten(-3)], -1).detach()
