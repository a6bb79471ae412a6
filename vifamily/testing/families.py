"""The contracts of families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError, NotAvailableError
from vifamily.families._adapters import as_entry
from vifamily.families._stack import StackedFamily
from vifamily.rng import draw_noise
from vifamily.testing import tolerances
from vifamily.testing._family_tools import DRAWS, FamilyTools, refuses, works_or_refuses
from vifamily.testing._report import Broken, Contracts, NotApplicable, Report
from vifamily.testing._tools import agree, mean_is, seeded
from vifamily.types import Capability, Space

__all__ = ["check_family"]


def check_family(family: Any, *, skip: Mapping[str, str] | None = None) -> Report:
    """Hold a family to its contracts.

    The contracts: draws, densities and weights have the shapes and the dtype of the latent space; weights are
    normalised; the log density of draws is the density at their points, and that density integrates to one and
    describes the draws; freezing stops the gradient to the parameters alone; gradients agree with differences; a copy,
    a saved state and a stack of families give what the family gives; it starts where it is told to; what it declares
    works, and what it does not declare is refused.

    Args:
        family: An entry, its name or spec, or whatever else is accepted where a family is.
        skip: Contracts that do not apply, each with the reason that the report will show.

    Returns:
        What was checked and what was skipped.

    Raises:
        ContractError: Naming the family, the contract, what was expected and what was found.

    Example:
        >>> report = check_family("mean_field")
        >>> "integral" in report.passed
        True
    """
    entry = as_entry(family)
    name = family if isinstance(family, str) else registry.entry_name(entry)
    contracts = Contracts(f"the family {name!r}", "family", skip)
    check = _Checks(entry)
    for contract in (
        check.declarations,
        check.shapes,
        check.dtypes,
        check.determinism,
        check.capabilities,
        check.conditional,
        check.density_of_draws,
        check.integral,
        check.draws_follow_density,
        check.frozen,
        check.gradients,
        check.moments,
        check.start,
        check.state,
        check.stack,
    ):
        contracts.run(contract.__name__, contract)
    return contracts.report()


class _Checks(FamilyTools):
    # -- contracts -----------------------------------------------------------------------------------------------------
    def declarations(self) -> None:
        """An entry with a docstring, whose built families can do at least what it says."""
        if not (type(self.entry).__doc__ or "").strip():
            raise Broken(got="no docstring", expected="a docstring whose first sentence says what the family is")
        family = self.build()
        if family.log_q_is_bound != (Capability.LOG_Q_BOUND in family.capabilities):
            raise Broken(
                got=f"log_q_is_bound={family.log_q_is_bound}",
                expected=f"the capability {Capability.LOG_Q_BOUND!s} where, and only where, that is so",
            )
        lost = self.entry.capabilities - family.capabilities
        if lost:
            raise Broken(
                got=f"families without {', '.join(sorted(map(str, lost)))}",
                expected="what the entry declares before building",
            )

    def shapes(self) -> None:
        """One row per draw, normalised weights, one number per point, for several dimensions."""
        for dim in (1, 2, 5):
            changes: dict[str, Any] = {"dim": dim}
            if self.entry.space is Space.DISCRETE:
                changes["num_categories"] = (2, 3, 2, 2, 3)[:dim]
            try:
                family = self.build(**changes)
            except (ConfigError, IncompatibleError, ValueError) as error:
                if dim == self.latent().dim:
                    raise
                del error  # a hyper-parameter that does not fit this dimension (a rank above it) is refused, rightly
                continue
            draw = self.draw(family)
            num = draw.log_weight.shape[0]
            for what, got, wanted in (
                ("log_weight", tuple(draw.log_weight.shape), (num,)),
                ("z", tuple(draw.z.shape), (num, family.dim)),
                (
                    "log_q",
                    None if draw.log_q is None else tuple(draw.log_q.shape),
                    None if draw.log_q is None else (num,),
                ),
            ):
                if got != wanted:
                    raise Broken(got=f"{what} of shape {got}", expected=f"shape {wanted}")
            total = draw.log_weight.detach().logsumexp(-1)
            agree(total, torch.zeros_like(total), tolerances.EXACT, "weights that sum to one")
            if self.has(family, Capability.LOG_Q):
                points = draw.z.detach()[:2].expand(3, 2, family.dim)
                if tuple(family.log_prob(points).shape) != (3, 2):
                    raise Broken(got=f"log_prob of shape {tuple(family.log_prob(points).shape)}", expected="(3, 2)")

    def dtypes(self) -> None:
        """Parameters and draws have the dtype of the latent space."""
        if self.entry.given:
            raise NotApplicable("it is a module of the user's own")
        for dtype in (torch.float32, torch.float64):
            family = self.build(dtype=dtype)
            draw = self.draw(family)
            parts = {"z": draw.z, "log_weight": draw.log_weight, **dict(family.named_parameters())}
            if draw.log_q is not None:
                parts["log_q"] = draw.log_q
            for name, part in parts.items():
                if part.dtype != dtype:
                    raise Broken(got=f"{name} of {part.dtype}", expected=f"{dtype}, that of the latent space")

    def determinism(self) -> None:
        """Draws are a function of parameters and noise; building is one of the generator."""
        first, second = self.build(), self.build()
        if self.entry.given:
            second = first
        a, b, c = self.draw(first), self.draw(first), self.draw(second)
        if not torch.equal(a.z, b.z) or not torch.equal(a.z, c.z):
            raise Broken(got="different draws", expected="the same draws from the same noise and the same generator")
        one, two = (first.sample(7, generator=seeded(9)) for _ in range(2))
        if tuple(one.shape) != (7, first.dim) or not torch.equal(one, two):
            raise Broken(
                got=f"samples of shape {tuple(one.shape)}", expected=f"the same (7, {first.dim}) from one seed"
            )

    def capabilities(self) -> None:
        """Each declared capability works; each undeclared one is refused."""
        family = self.build()
        draw = self.draw(family)
        for capability, works in (
            (Capability.LOG_Q, lambda: family.log_prob(draw.z.detach())),
            (Capability.ENTROPY, family.entropy),
        ):
            works_or_refuses(family, capability, works)
        if self.has(family, Capability.GAUSSIAN):
            family.moments()
        if (draw.log_q is not None) != self.has(family, Capability.LOG_Q):
            got = "no log_q" if draw.log_q is None else "a log_q"
            raise Broken(got=f"draws with {got}", expected="a log density where, and only where, it is declared")
        if draw.z.requires_grad != self.has(family, Capability.REPARAMETERISED):
            raise Broken(
                got=f"draws {'with' if draw.z.requires_grad else 'without'} a gradient",
                expected="a path gradient where, and only where, reparameterised draws are declared",
            )
        equal = bool((draw.log_weight == draw.log_weight[0]).all())
        if not equal and not self.has(family, Capability.WEIGHTED):
            raise Broken(got="unequal weights", expected=f"equal weights, or the capability {Capability.WEIGHTED!s}")
        if self.has(family, Capability.ENUMERATED):
            other = self.draw(family, seed=4)
            if not torch.equal(draw.z, other.z) or not draw.log_weight.requires_grad:
                raise Broken(
                    got="draws that depend on noise or weights without gradient", expected="all states, weighted"
                )

    def conditional(self) -> None:
        """A conditional version gives one law per datum; where none is declared, a context is refused."""
        if self.entry.given:
            raise NotApplicable("it is a module of the user's own")
        declared = Capability.CONDITIONAL in self.entry.capabilities
        if not declared:
            try:
                self.entry.build(self.latent(context_dim=3), generator=seeded(0))
            except IncompatibleError:
                return
            raise Broken(got="no error", expected="IncompatibleError for a context, which it does not declare")
        family = self.build(context_dim=3)
        context = torch.randn(4, 3, generator=seeded(5), dtype=torch.float64)
        noise = draw_noise(family.noise_spec, (DRAWS, 4), seeded(6))
        draw = family(noise, context)
        num = draw.log_weight.shape[0]
        if tuple(draw.z.shape) != (num, 4, family.dim):
            wanted = f"(draw, datum, dim) = ({num}, 4, {family.dim})"
            raise Broken(got=f"draws of shape {tuple(draw.z.shape)}", expected=wanted)
        if draw.log_q is not None:
            agree(family.log_prob(draw.z, context), draw.log_q, tolerances.DENSITY_AT_DRAWS, "log_prob at the draws")
        alone = family(noise[:, 2:3], context[2:3])
        agree(alone.z[:, 0], draw.z[:, 2], tolerances.EXACT, "draws of a datum whatever the other data are")

    def density_of_draws(self) -> None:
        """The log density that draws carry is the density at their points."""
        family = self.build()
        self.need_density(family)
        if family.log_q_is_bound:
            raise NotApplicable("its draws carry a bound in place of the density, and it says so")
        draw = self.draw(family, 50)
        if draw.log_q is not None:
            agree(family.log_prob(draw.z), draw.log_q, tolerances.DENSITY_AT_DRAWS, "log_prob at the draws")

    def integral(self) -> None:
        """The density has total mass one."""
        if self.entry.space is Space.DISCRETE:
            family = self.build()
            axes = [torch.arange(n, dtype=torch.float64) for n in family.latent.num_categories or ()]
            points = torch.cartesian_prod(*axes).reshape(-1, family.dim)
            total = family.log_prob(points).logsumexp(0).exp()
            agree(total, torch.ones_like(total), tolerances.EXACT, "probabilities that sum to one")
            return
        if self.entry.space is not Space.REAL:
            raise NotApplicable(f"no rule for the {self.entry.space} space")
        for dim, num in ((1, 4001), (2, 201)):
            try:
                family = self.build(dim=dim)
            except (ConfigError, IncompatibleError, ValueError):
                continue
            self.need_density(family)
            t = torch.linspace(-6, 6, num, dtype=torch.float64)
            # z = sinh(t) reaches far into heavy tails
            points = torch.cartesian_prod(*[t.sinh()] * dim).reshape(-1, dim)
            weight = torch.cartesian_prod(*[t.cosh()] * dim).reshape(-1, dim).prod(-1)
            with torch.no_grad():
                total = (family.log_prob(points).exp() * weight).sum() * float(t[1] - t[0]) ** dim
            agree(
                total,
                torch.ones_like(total),
                tolerances.INTEGRAL,
                f"a total mass of one in {dim} dimensions",
                scale=1.0,
            )

    def draws_follow_density(self) -> None:
        """Weighted draws and samples have the expectations of the density, such as E[q0 / q] = 1."""
        family = self.build(by=0.05)
        rows = 4000
        with torch.no_grad():
            z = family.sample(rows, generator=seeded(7))
            draw = self.draw(family, rows, seed=8)
            weighted = draw.log_weight.exp()[:, None] * torch.cat([draw.z, draw.z.square()], -1)
            if draw.z.shape[0] % rows == 0:
                per_row = weighted.unflatten(0, (rows, -1)).sum(1) * rows
                direct = torch.cat([z, z.square()], -1)
                mean_is(per_row - direct, 0.0, "a mean difference between weighted draws and samples")
            else:
                mean_is(torch.cat([z, z.square()], -1), weighted.sum(0), "a mean over samples")
            if family.log_q_is_bound or not self.has(family, Capability.LOG_Q) or self.entry.space is not Space.REAL:
                return
            centre, spread = z.mean(0), 0.5 * z.std(0)
            log_p0 = torch.distributions.Normal(centre, spread).log_prob(z).sum(-1)
            mean_is((log_p0 - family.log_prob(z)).exp(), 1.0, "a mean importance ratio of a normal law")

    def frozen(self) -> None:
        """Freezing stops the gradient to the parameters, not to the points."""
        family = self.build()
        self.need_density(family)
        points = self.draw(family).z.detach()
        if family.log_q_is_bound:
            refuses(lambda: family.log_prob(points, frozen=True), "a frozen density that is not that of the draws")
            return
        if self.entry.space is Space.DISCRETE:
            if family.log_prob(points, frozen=True).requires_grad:
                raise Broken(got="a gradient to the parameters", expected="none when frozen")
            return
        free, held = points.clone().requires_grad_(), points.clone().requires_grad_()
        a, b = family.log_prob(free), family.log_prob(held, frozen=True)
        agree(b, a, tolerances.EXACT, "the same density when frozen")
        parts = torch.autograd.grad(b.sum(), [held, *family.parameters()], allow_unused=True)
        if any(g is not None and bool((g != 0).any()) for g in parts[1:]):
            raise Broken(got="a gradient to the parameters", expected="none when frozen")
        (wanted,) = torch.autograd.grad(a.sum(), [free])
        agree(parts[0], wanted, tolerances.EXACT, "the same gradient to the points when frozen")

    def gradients(self) -> None:
        """Gradients of draws, weights and densities agree with central differences along a direction."""
        family = self.build(by=0.1)
        parameters = [p for p in family.parameters() if p.requires_grad]
        if not parameters:
            raise NotApplicable("it has no parameters")
        points = self.draw(family).z.detach() + 0.1 * (self.entry.space is Space.REAL)
        generator = seeded(11)
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        length = sum(float(d.square().sum()) for d in directions) ** 0.5
        directions = [d * (3 / length) for d in directions]

        def value() -> Tensor:
            draw = self.draw(family)
            ramp = torch.linspace(-1, 1, draw.log_weight.numel(), dtype=draw.z.dtype)
            out = (ramp * draw.log_weight).sum()
            if self.has(family, Capability.REPARAMETERISED):
                out = out + (ramp[:, None] * torch.sin(draw.z)).sum()
            if draw.log_q is not None:
                out = out + (ramp * draw.log_q).sum() + (ramp * family.log_prob(points)).sum()
            if self.has(family, Capability.ENTROPY):
                out = out + family.entropy()
            return out

        grads = torch.autograd.grad(value(), parameters, allow_unused=True)
        slope = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True) if g is not None)
        # families that invert themselves numerically cannot be differenced to more digits than they invert
        exact = self.has(family, Capability.CHEAP_LOG_Q) or not self.has(family, Capability.LOG_Q)
        step, tolerance = (1e-5, tolerances.FINITE_DIFFERENCE) if exact else (1e-3, 2e-3)
        sides = []
        with torch.no_grad():
            for sign in (1, -2):
                for p, d in zip(parameters, directions, strict=True):
                    p.add_(sign * step * d)
                sides.append(float(value()))
        wanted = (sides[0] - sides[1]) / (2 * step)
        if not abs(slope - wanted) <= tolerance * (1 + abs(wanted)):
            raise Broken(
                got=f"a directional derivative of {slope:.10g}", expected=f"{wanted:.10g} by central differences"
            )

    def moments(self) -> None:
        """Closed-form mean, covariance and entropy are those of the draws."""
        family = self.build()
        with torch.no_grad():
            draw = self.draw(family, 4000, seed=12)
            if self.has(family, Capability.ENTROPY) and draw.log_q is not None:
                if self.has(family, Capability.ENUMERATED):
                    exact = -(draw.log_weight.exp() * draw.log_q).sum()
                    agree(family.entropy(), exact, tolerances.EXACT, "the entropy of the states")
                else:
                    mean_is(-draw.log_q, family.entropy(), "minus the mean log density of draws, the entropy")
            try:
                mean, covariance = family.moments()
            except NotAvailableError:
                if self.has(family, Capability.GAUSSIAN):
                    raise
                return
            for got, part, what in zip(
                family.marginals(), (mean, covariance.diagonal()), ("means", "variances"), strict=True
            ):
                agree(got, part, tolerances.EXACT, f"marginal {what} as in the moments")
            z = family.sample(4000, generator=seeded(13))
            mean_is(z, mean, "a mean of samples, the closed-form one")
            apart = z - mean
            mean_is(apart[:, :, None] * apart[:, None, :], covariance, "a covariance of samples, the closed-form one")

    def start(self) -> None:
        """Started at a mean and a scale, it is near that Gaussian."""
        if self.entry.space is not Space.REAL:
            raise NotApplicable("only families on the real space are started at moments")
        mean = torch.tensor([1.5, -0.5], dtype=torch.float64)
        factor = torch.tensor([[0.7, 0.0], [0.6, 1.1]], dtype=torch.float64)
        for scale in (torch.tensor([0.4, 2.0], dtype=torch.float64), factor):
            family = self.entry.build(self.latent(), generator=seeded(0))
            if family.dim != 2:
                raise NotApplicable("it covers another number of coordinates")
            try:
                family.start_at(mean, scale)
            except NotAvailableError:
                raise NotApplicable("it cannot be started at moments") from None
            sd = scale if scale.dim() == 1 else scale.square().sum(-1).sqrt()
            z = family.sample(4000, generator=seeded(14))
            off, ratio = ((z.mean(0) - mean) / sd).abs().max(), (z.std(0) / sd)
            # a finite ensemble has only a few members, and samplers start wide on purpose
            if not (float(off) < 1.0 and bool(((ratio > 0.4) & (ratio < 2.5)).all())):
                raise Broken(
                    got=f"a mean {float(off):.2g} sd off, sds {[round(r, 2) for r in ratio.tolist()]} times too large",
                    expected="about the mean and the standard deviations it was started at",
                )
            if self.has(family, Capability.GAUSSIAN):
                agree(family.moments()[0], mean, tolerances.EXACT, "exactly the mean it was started at")
                agree(family.moments()[1].diagonal(), sd.square(), tolerances.EXACT, "the variances it was started at")

    def state(self) -> None:
        """A copy, and a family that loaded its state, give the same draws."""
        family = self.build()
        other = family.copy() if self.entry.given else self.build(seed=50, mapped=False)
        other.load_state_dict(family.state_dict())
        draw = self.draw(family)
        for what, held in (("a copy", family.copy()), ("a family with its state loaded", other)):
            again = self.draw(held)
            agree(again.z, draw.z, tolerances.EXACT, f"the same draws from {what}")
            agree(again.log_weight, draw.log_weight, tolerances.EXACT, f"the same weights from {what}")
            if draw.log_q is not None and again.log_q is not None:
                agree(again.log_q, draw.log_q, tolerances.EXACT, f"the same densities from {what}")

    def stack(self) -> None:
        """Several families at once equal one after the other."""
        members = [self.build(seed=10 * r) for r in range(3)]
        if self.entry.given:
            members = [self.build() for _ in range(3)]
        stack = StackedFamily(members)
        noise = draw_noise(stack.noise_spec, (3, DRAWS), seeded(15))
        together = stack(noise)
        tolerance = tolerances.loop(torch.float64)
        for r, member in enumerate(members):
            alone = member(noise[r])
            agree(together.z[r], alone.z, tolerance, "the draws of one family alone")
            agree(together.log_weight[r], alone.log_weight, tolerance, "the weights of one family alone")
            if alone.log_q is not None and together.log_q is not None:
                agree(together.log_q[r], alone.log_q, tolerance, "the densities of one family alone")
        if self.has(members[0], Capability.LOG_Q):
            points = together.z.detach()
            both = stack.log_prob(points)
            for r, member in enumerate(members):
                agree(both[r], member.log_prob(points[r]), tolerance, "log_prob of one family alone")
        if self.has(members[0], Capability.ENTROPY):
            agree(stack.entropy(), torch.stack([m.entropy() for m in members]), tolerance, "the entropy of each family")
        again = StackedFamily(members).members()[1]
        agree(self.draw(again).z, self.draw(members[1]).z, tolerances.EXACT, "the draws of a family out of a stack")
