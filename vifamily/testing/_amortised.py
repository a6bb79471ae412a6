"""The contracts of objectives over a simulator's joint, on a linear Gaussian simulator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import VifamilyError
from vifamily.models import Simulator
from vifamily.objectives import Objective
from vifamily.posterior.amortised import AmortisedFamily, Vector
from vifamily.registry import build
from vifamily.testing import tolerances
from vifamily.testing._report import Broken, Contracts, NotApplicable
from vifamily.testing._tools import agree, mean_is, seeded
from vifamily.types import Batch, LatentSpec, Loss

__all__ = ["check_amortised"]

_PRIOR_SCALE = ((1.0, 0.0), (0.8, 0.6))
_NOISE = (0.5, 1.0)
_PAIRS = 20_000


def check_amortised(contracts: Contracts, objective: Objective) -> None:
    """Run the contracts."""
    check = _Checks(objective)
    for contract in (
        check.no_density_needed,
        check.loss_shape,
        check.determinism,
        check.needs_pairs,
        check.parts,
        check.order,
        check.gradient,
        check.nonzero_gradient,
        check.zero_at_posterior,
        check.value_at_posterior,
        check.conjugate,
        check.misspecified,
        check.extreme_data,
    ):
        contracts.run(contract.__name__, contract)


class _Checks:
    """A Gaussian prior with correlation, data with independent noise: the posterior is linear in the data."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        factor = torch.tensor(_PRIOR_SCALE, dtype=torch.float64)
        self.prior_covariance = factor @ factor.mT
        noise = torch.tensor(_NOISE, dtype=torch.float64)
        precision = torch.linalg.inv(self.prior_covariance) + torch.diag(noise**-2)
        self.covariance = torch.linalg.inv(precision)
        self.gain = self.covariance * noise**-2

        def sample_prior(num: int, generator: torch.Generator) -> Tensor:
            return torch.randn(num, 2, generator=generator, dtype=torch.float64) @ factor.mT

        def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
            return theta + noise * torch.randn(theta.shape, generator=generator, dtype=torch.float64)

        self.simulator = Simulator(sample_prior, simulate, batched=True, dtype=torch.float64)

    # -- pieces --------------------------------------------------------------------------------------------------------
    def pairs(self, num: int, seed: int = 0) -> Batch:
        made = self.simulator.simulations(num, seed=seed)
        return Batch((self.simulator.unconstrained(made.theta), made.x), num)

    def family(self, spec: str = "full_rank", seed: int = 0) -> AmortisedFamily:
        options = {"dtype": torch.float64, "device": torch.device("cpu")}
        encoder = Vector().build((2,), generator=seeded(seed), **options)  # type: ignore[arg-type]
        built = build("families", spec).build(LatentSpec(2, context_dim=2), generator=seeded(seed))
        return AmortisedFamily(encoder, built)

    def exact(self) -> AmortisedFamily:
        """The family at the exact posterior of every observation."""
        out = self.family()
        inner: Any = out.family
        head = inner.head[-1]
        with torch.no_grad():
            inner.start_at(torch.zeros(2), torch.linalg.cholesky(self.covariance))
            head.weight.zero_()
            head.bias.zero_()
            head.weight[:2] = self.gain
        return out

    def loss(self, family: AmortisedFamily, batch: Batch | None) -> Loss:
        return self.objective.loss(family, self.simulator, torch.zeros(0), batch, None)

    def _gradient(self, family: AmortisedFamily, batch: Batch) -> Tensor:
        parameters = list(family.parameters())
        family.zero_grad()
        found = torch.autograd.grad(self.loss(family, batch).surrogate, parameters, allow_unused=True)
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for g, p in zip(found, parameters, strict=True)
            ]
        )

    # -- contracts -----------------------------------------------------------------------------------------------------
    def no_density_needed(self) -> None:
        """A prior without density and a simulator without likelihood are enough."""
        if not bool(self.loss(self.family(), self.pairs(8)).value.isfinite()):
            raise Broken(got="a loss that is not finite", expected="a finite loss")

    def loss_shape(self) -> None:
        """One finite number, nothing attached to what is reported."""
        for spec in ("full_rank", "mean_field", "flow(kind=maf, transforms=1, hidden=[8], direction=density)"):
            loss = self.loss(self.family(spec), self.pairs(8))
            if loss.surrogate.shape != () or loss.value.shape != () or loss.value.requires_grad:
                raise Broken(got=f"a value of shape {tuple(loss.value.shape)}", expected="one detached number")

    def determinism(self) -> None:
        """A function of its arguments."""
        family, batch = self.family(), self.pairs(16)
        if not torch.equal(self.loss(family, batch).value, self.loss(family, batch).value):
            raise Broken(got="two results on the same pairs", expected="the same bits from the same pairs")

    def needs_pairs(self) -> None:
        """Without pairs it says what is missing."""
        try:
            self.loss(self.family(), None)
        except VifamilyError:
            return
        raise Broken(got="no error without a batch", expected="an error that says what is missing")

    def parts(self) -> None:
        """The halves of a batch average to the whole: a minibatch is unbiased."""
        family, batch = self.exact(), self.pairs(64)
        z, x = batch.data
        halves = [self.loss(family, Batch((z[part], x[part]), 32)).value for part in (slice(32), slice(32, 64))]
        agree(torch.stack(halves).mean(), self.loss(family, batch).value, tolerances.EXACT, "the mean of the halves")

    def order(self) -> None:
        """The order of the pairs does not matter, but who belongs to whom does."""
        family, batch = self.exact(), self.pairs(64)
        z, x = batch.data
        whole = self.loss(family, batch).value
        agree(self.loss(family, Batch((z.flip(0), x.flip(0)), 64)).value, whole, tolerances.EXACT, "the same loss")
        if float(self.loss(family, Batch((z.flip(0), x), 64)).value) <= float(whole):
            raise Broken(got="a lower loss for pairs that do not belong together", expected="a higher one")

    def gradient(self) -> None:
        """The surrogate's gradient is that of the value."""
        family, batch = self.exact(), self.pairs(32)
        got = self._gradient(family, batch)
        wanted, step = [], 1e-5
        with torch.no_grad():
            for parameter in family.parameters():
                flat = parameter.view(-1)
                for i in range(flat.numel()):
                    own = float(flat[i])
                    flat[i] = own + step
                    above = self.loss(family, batch).value
                    flat[i] = own - step
                    wanted.append((above - self.loss(family, batch).value) / (2 * step))
                    flat[i] = own
        agree(got, torch.stack(wanted), tolerances.FINITE_DIFFERENCE, "differences of the value")

    def nonzero_gradient(self) -> None:
        """At the start there is a direction to go."""
        if not float(self._gradient(self.family(), self.pairs(256)).abs().max()) > 1e-3:
            raise Broken(got="no gradient at the start", expected="one that is not zero")

    def zero_at_posterior(self) -> None:
        """At the exact posterior of every observation the mean gradient vanishes."""
        self._targets()
        family = self.exact()
        rows = torch.stack([self._gradient(family, self.pairs(50, seed=s)) for s in range(200)])
        mean_is(rows, 0.0, "a mean gradient at the exact posterior")

    def value_at_posterior(self) -> None:
        """There the value is the mean entropy of the posteriors."""
        self._targets()
        entropy = 0.5 * float(torch.logdet(2 * math.pi * math.e * self.covariance))
        family = self.exact()
        rows = torch.stack([self.loss(family, self.pairs(50, seed=s)).value for s in range(200)])
        mean_is(rows, entropy, "the entropy of the posterior")

    def _fitted(self, spec: str) -> AmortisedFamily:
        family, batch = self.family(spec), self.pairs(_PAIRS, seed=9)
        optimiser = torch.optim.LBFGS(family.parameters(), lr=1.0, max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            value = self.loss(family, batch).surrogate
            value.backward()
            return value

        optimiser.step(closure)
        return family

    def _draws(self, family: AmortisedFamily, x: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(40_000, *family.noise_spec.shape, generator=seeded(5), dtype=torch.float64)
        z = family.at(x)(torch.cat([noise, -noise])).z.detach()
        return z.mean(0), z.T.cov()

    def conjugate(self) -> None:
        """A fit ends at the exact posterior of observations that it has not seen."""
        self._targets()
        family, sd = self._fitted("full_rank"), self.covariance.diagonal().sqrt()
        for x in torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=torch.float64):
            mean, covariance = self._draws(family, x)
            agree(mean / sd, self.gain @ x / sd, 2.5 * tolerances.MOMENTS, "the mean of the posterior, in its sd")
            scale = sd[:, None] * sd
            agree(covariance / scale, self.covariance / scale, 2.5 * tolerances.MOMENTS, "its covariance")

    def misspecified(self) -> None:
        """A family of independent coordinates ends at the means and the marginal variances (inclusive divergences)."""
        self._targets()
        family, variance = self._fitted("mean_field"), self.covariance.diagonal()
        x = torch.tensor([1.0, -1.0], dtype=torch.float64)
        mean, covariance = self._draws(family, x)
        agree(mean / variance.sqrt(), self.gain @ x / variance.sqrt(), 2.5 * tolerances.MOMENTS, "the posterior mean")
        agree(covariance.diagonal() / variance, torch.ones(2), 2.5 * tolerances.MOMENTS, "marginal variances")

    def extreme_data(self) -> None:
        """Data far from the simulations give a finite loss and gradient."""
        z = torch.tensor([[300.0, -300.0], [0.0, 0.0]], dtype=torch.float64)
        batch = Batch((z, 10 * z), 2)
        if not bool(self._gradient(self.family(), batch).isfinite().all()):
            raise Broken(got="a gradient that is not finite", expected="finite numbers")

    def _targets(self) -> None:
        if not self.objective.targets_posterior or not self.objective.inclusive:
            raise NotApplicable("it is declared to stand for another divergence or law")
