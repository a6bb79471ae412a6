"""The contracts of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vifamily import registry
from vifamily.errors import NotAvailableError
from vifamily.models import Model
from vifamily.testing import tolerances
from vifamily.testing._report import Broken, Contracts, NotApplicable, Report
from vifamily.testing._tools import agree, seeded
from vifamily.types import Batch, Capability, Space

__all__ = ["check_model"]

_POINTS = 5


def check_model(model: Any, *, skip: Mapping[str, str] | None = None) -> Report:
    """Hold a model to its contracts.

    The contracts: one number per draw, whatever the leading axes and whatever the other draws are; the log joint is the
    log prior plus the scaled sum of the log likelihood; its gradient agrees with differences; over the batches of an
    epoch the mean log joint is that of all data; batches are addressed by step; parameters survive the way to
    unconstrained space and back; draws from the prior have finite density and follow the generator; a Gaussian prior is
    what it says; what it declares works, and what it does not declare is refused.

    Args:
        model: A model, or the name of a problem, or a problem.
        skip: Contracts that do not apply, each with the reason that the report will show.

    Returns:
        What was checked and what was skipped.

    Raises:
        ContractError: Naming the model, the contract, what was expected and what was found.

    Example:
        >>> from vifamily.testing import targets
        >>> report = check_model(targets.linear_regression().model)
        >>> "minibatches" in report.passed
        True
    """
    problem = registry.build("problems", model) if isinstance(model, (str, registry.Spec)) else model
    found = problem if isinstance(problem, Model) else problem.model
    name = model if isinstance(model, str) else getattr(found, "name", None) or registry.entry_name(found)
    contracts = Contracts(f"the model {name!r}", "model", skip)
    check = _Checks(found)
    for contract in (
        check.capabilities,
        check.shapes,
        check.draws_apart,
        check.parts,
        check.score,
        check.minibatches,
        check.batches_by_step,
        check.round_trip,
        check.prior_draws,
        check.gaussian_prior,
    ):
        contracts.run(contract.__name__, contract)
    return contracts.report()


class _Checks:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.z = model.start(_POINTS, generator=seeded(0))

    def has(self, capability: Capability) -> bool:
        return capability in self.model.capabilities

    def batch(self, size: int | None = None) -> Batch:
        found = self.model.batches(self.model.num_data if size is None else size, seed=0).at(0)
        if found is None:
            raise Broken(got="no batch", expected="a batch of the size that was asked for")
        return found

    def joint(self, z: Tensor) -> Tensor:
        """The log joint, with local latents at zero where they are apart."""
        if not self.has(Capability.LOCAL):
            return self.model.log_joint(z)
        batch = self.batch()
        local = z.new_zeros(*z.shape[:-1], batch.size, self.model.local_dim)
        return self.model.log_prior(z) + self.model.log_local(z, local, batch).sum(-1)

    # -- contracts -----------------------------------------------------------------------------------------------------
    def capabilities(self) -> None:
        """Each declared capability works; each undeclared one is refused."""
        model, z = self.model, self.z
        if tuple(z.shape) != (_POINTS, model.dim) or z.dtype != model.dtype:
            wanted = f"({_POINTS}, {model.dim}), {model.dtype}"
            raise Broken(got=f"starting points of shape {tuple(z.shape)}, {z.dtype}", expected=wanted)
        if not bool(torch.isfinite(self.joint(z)).all()):
            raise Broken(got=f"log joint {self.joint(z).tolist()} at starting points", expected="finite numbers")
        for capability, call in (
            (Capability.PRIOR, lambda: model.log_prior(z)),
            (Capability.PER_DATUM, lambda: model.log_likelihood(z)),
            (Capability.PRIOR_DRAWS, lambda: model.sample_prior(2, generator=seeded(1))),
            (Capability.PREDICTIVE, lambda: model.predictive(z, generator=seeded(1))),
            (Capability.GAUSSIAN_PRIOR, lambda: _gaussian_prior(model)),
        ):
            if self.has(capability):
                call()
                continue
            try:
                call()
            except NotAvailableError:
                continue
            raise Broken(got=f"{capability!s} without declaring it", expected="NotAvailableError")
        if self.has(Capability.SCORE) and model.space is Space.DISCRETE:
            raise Broken(got="a score on a discrete space", expected="none")

    def shapes(self) -> None:
        """Any leading axes give as many numbers."""
        z = torch.stack([self.z, self.z.flip(0)])
        out = self.joint(z)
        if tuple(out.shape) != (2, _POINTS):
            raise Broken(got=f"a log joint of shape {tuple(out.shape)}", expected=f"(2, {_POINTS})")
        agree(out[0], self.joint(self.z), tolerances.EXACT, "the same numbers whatever the leading axes")
        if self.has(Capability.PER_DATUM):
            rows = self.model.log_likelihood(z)
            wanted = (2, _POINTS, self.model.num_data)
            if tuple(rows.shape) != wanted:
                raise Broken(got=f"a log likelihood of shape {tuple(rows.shape)}", expected=f"{wanted}")

    def draws_apart(self) -> None:
        """The number of one draw does not depend on the other draws."""
        together = self.joint(self.z)
        alone = torch.cat([self.joint(self.z[i : i + 1]) for i in range(_POINTS)])
        agree(alone, together, 1e-9, "the same log joint for a draw alone")

    def parts(self) -> None:
        """Prior plus likelihood is the joint."""
        if not (self.has(Capability.PRIOR) and self.has(Capability.PER_DATUM)):
            raise NotApplicable("it does not give prior and likelihood apart")
        total = self.model.log_prior(self.z) + self.model.log_likelihood(self.z).sum(-1)
        agree(total, self.model.log_joint(self.z), tolerances.EXACT, "log prior plus the sum of the log likelihood")

    def score(self) -> None:
        """The gradient agrees with central differences."""
        if not self.has(Capability.SCORE) or self.model.dim == 0:
            raise NotApplicable("it declares no score" if self.model.dim else "every latent is local")
        z = self.z[:2].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.joint(z).sum(), [z])
        direction = torch.randn(z.shape, generator=seeded(2), dtype=z.dtype) / z.shape[-1] ** 0.5
        slope = (gradient * direction).sum(-1)
        # two step sizes, extrapolated: badly scaled posteriors have large third derivatives
        with torch.no_grad():
            rough, fine = (
                (self.joint(z + h * direction) - self.joint(z - h * direction)) / (2 * h) for h in (2e-4, 1e-4)
            )
        scale = 1 + slope.abs().max() + 1e-4 * self.joint(z).detach().abs().max()
        found, tolerance = (4 * fine - rough) / 3, 10 * tolerances.FINITE_DIFFERENCE
        agree(found, slope, tolerance, "differences of the log joint along a direction", scale=scale)

    def minibatches(self) -> None:
        """Over the batches of an epoch, the mean log joint is that of all data."""
        num = self.model.num_data
        if not self.has(Capability.SUBSAMPLE) or num is None or num < 2:
            raise NotApplicable("it gives no minibatches")
        size = next(s for s in range(min(max(num // 2, 1), 64), 0, -1) if num % s == 0)
        if num // size > 200:
            raise NotApplicable(f"its {num} data do not divide into a few batches of equal size")
        model = self.model.for_batches(size)
        if Capability.LOCAL in model.capabilities or model.dim != self.model.dim:
            raise NotApplicable("with minibatches its local latents are drawn apart")
        source = model.batches(size, seed=0)
        if source.dropped_per_epoch:
            raise Broken(
                got=f"{source.dropped_per_epoch} data dropped", expected="none: the batch size divides the data"
            )
        parts = torch.stack([model.log_joint(self.z, source.at(i)) for i in range(num // size)])
        agree(parts.mean(0), self.model.log_joint(self.z), 1e-9, "the log joint of all data as the mean over batches")

    def batches_by_step(self) -> None:
        """The batch of a step depends on the seed and the step, not on what was asked before."""
        num = self.model.num_data
        if not self.has(Capability.SUBSAMPLE) or num is None or num < 2:
            raise NotApplicable("it gives no minibatches")
        size = max(1, num // 2)
        forward, backward = self.model.batches(size, seed=3), self.model.batches(size, seed=3)
        ahead = [forward.at(i) for i in range(4)]
        for i in (3, 1, 2, 0):
            again = backward.at(i)
            a, b = getattr(ahead[i], "index", None), getattr(again, "index", None)
            if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b)):
                raise Broken(got=f"another batch at step {i}", expected="the same batch whatever was asked before")

    def round_trip(self) -> None:
        """Parameters survive the way to unconstrained space and back."""
        if self.model.dim == 0:
            raise NotApplicable("every latent is local")
        theta = self.model.constrain(self.z)
        self.model.layout.check(theta)
        agree(self.model.unconstrain(theta), self.z, 1e-8, "the same point after constraining and unconstraining")
        flat = self.model.layout.flatten(theta)
        if tuple(flat.shape) != (_POINTS, len(self.model.layout.columns())):
            raise Broken(got=f"flattened parameters of shape {tuple(flat.shape)}", expected="one column per name")

    def prior_draws(self) -> None:
        """Draws from the prior follow the generator and have finite density."""
        if not self.has(Capability.PRIOR_DRAWS):
            raise NotApplicable("it does not draw from its prior")
        one, two = (self.model.sample_prior(4, generator=seeded(4)) for _ in range(2))
        if tuple(one.shape) != (4, self.model.dim) or not torch.equal(one, two):
            wanted = f"the same (4, {self.model.dim}) from one seed"
            raise Broken(got=f"draws of shape {tuple(one.shape)}", expected=wanted)
        if self.has(Capability.PRIOR) and not bool(torch.isfinite(self.model.log_prior(one)).all()):
            raise Broken(got="prior draws of density zero", expected="finite log prior at draws from the prior")

    def gaussian_prior(self) -> None:
        """A prior that is declared Gaussian is that Gaussian."""
        if not self.has(Capability.GAUSSIAN_PRIOR):
            raise NotApplicable("it declares no Gaussian prior")
        mean, sd = _gaussian_prior(self.model)
        wanted = torch.distributions.Normal(mean, sd).log_prob(self.z).sum(-1)
        agree(self.model.log_prior(self.z), wanted, tolerances.EXACT, "the log density of the Gaussian prior")


def _gaussian_prior(model: Any) -> tuple[Tensor, Tensor]:
    if not hasattr(model, "gaussian_prior"):
        raise NotAvailableError("no Gaussian prior")
    out: tuple[Tensor, Tensor] = model.gaussian_prior()
    return out
