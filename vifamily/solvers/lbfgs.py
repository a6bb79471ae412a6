"""L-BFGS on fixed draws: a deterministic fit whose draws are multiplied until the answer no longer depends on them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from vifamily.errors import ConfigError, IncompatibleError
from vifamily.registry import register
from vifamily.solvers._base import Solver, Task
from vifamily.solvers._draw_sets import fewest_draws
from vifamily.solvers._lbfgs_run import LbfgsRun
from vifamily.types import Capability

__all__ = ["Lbfgs"]


@register("solvers", "lbfgs")
@dataclasses.dataclass(frozen=True)
class Lbfgs(Solver):
    r"""L-BFGS on fixed draws: no step size, no gradient noise, a few dozen evaluations.

    The expectation over the family's base noise is replaced by a mean over n fixed draws (the sample-average
    approximation),

    .. math:: \hat L_n(\lambda) = \frac1n \sum_{i=1}^n \ell(\lambda, e_i),

    a plain function that a quasi-Newton method minimises to the end (Giordano, Ingram and Broderick 2024; Burroni,
    Domke and Sheldon 2023). Its minimum differs from that of the expectation by a Monte-Carlo error that depends on n
    alone. That error is estimated at each minimum from three further sets of n draws: the minimum on another set lies
    about one quasi-Newton step away, :math:`-\hat H^{-1} \nabla \hat L_n'`, and the spread of the four is the error.
    The draws are multiplied by four (64, 256, 1024, ...), each time with fresh ones and from the last minimum, until
    the error of every posterior mean (in posterior sds) and log sd is below half of ``tolerance`` and the last
    multiplication moved none by more than twice ``tolerance``, which is what so many quantities may move by chance.
    The largest error is reported as ``record.mcse_iterates``.

    The draws are scrambled Sobol points with their mirror images, scaled to exact second moments, which makes
    Gaussian answers to Gaussian posteriors exact on any number of draws. For objectives that combine several draws
    (``iwae``, ``renyi``) they are independent, in groups of ``draws``. Restarts share their draws and are minimised
    side by side; those that start at the same Gaussian are one calculation, and once three in four are at their
    minimum, those that are still clearly worse on four sets of draws are left behind where they stand. One step of the
    fit is one evaluation of the loss and its gradient on all draws.

    What it refuses before the first step: families whose optimum on fixed draws is unbounded, or fits the draws rather
    than the posterior (flows, implicit families: they need fresh draws); gradient estimators that do not follow the
    value on fixed draws (``score``, ``stl``, ``dreg``; ``estimator="auto"`` takes another one); minibatches; local
    latents. A family with a full covariance has no bounded optimum on fewer draws than dimensions: the first number of
    draws (``draws`` of the fit, 64 by default, rounded up to a power of two) is then raised.

    Args:
        tolerance: Twice the largest Monte-Carlo error of a mean (in posterior sds) or log sd.
        most_draws: Most draws; at least two numbers of draws are always compared.

    Raises:
        ConfigError: If a number is not positive.

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("correlated_normal", family="full_rank", solver="lbfgs", seed=0)
        >>> posterior.record.stop_reason, posterior.record.steps < 60
        ('converged', True)
    """

    tolerance: float = 0.02
    most_draws: int = 65536

    fixed_draws: ClassVar[bool] = True
    default_draws: ClassVar[int | None] = 64

    def __post_init__(self) -> None:
        number = isinstance(self.tolerance, (int, float)) and not isinstance(self.tolerance, bool)
        if not (number and 0 < self.tolerance < math.inf):
            raise ConfigError(f"lbfgs(tolerance=...) must be a positive number, got {self.tolerance!r}.")
        if isinstance(self.most_draws, bool) or not isinstance(self.most_draws, int) or self.most_draws < 2:
            raise ConfigError(f"lbfgs(most_draws=...) must be an integer of at least 2, got {self.most_draws!r}.")

    def check(self, *, model: Any, family: Any, batch_size: int | None = None, objective: Any = None) -> None:
        """Refuse what has no bounded optimum on fixed draws (see :class:`~vifamily.solvers._base.Solver`)."""
        capabilities = frozenset(family.capabilities)
        name = getattr(family, "spec", None) or type(family).__name__
        if batch_size is not None:
            raise IncompatibleError(
                "the solver 'lbfgs' minimises one fixed function, and a minibatch changes it at every step: leave "
                "batch_size out, or use solver='adam'.",
                missing=("all data in one step",),
            )
        if Capability.LOCAL in frozenset(getattr(model, "capabilities", ())):
            raise IncompatibleError(
                "the solver 'lbfgs' does not take models with local latents: use solver='adam'.",
                missing=("a model without local latents",),
            )
        if not {Capability.REPARAMETERISED, Capability.ENUMERATED} & capabilities:
            raise IncompatibleError(
                f"the solver 'lbfgs' needs draws through which a gradient flows, and the family {name!r} has none: use "
                "solver='adam'.",
                missing=(str(Capability.REPARAMETERISED),),
            )
        if fewest_draws(family) is None:
            raise IncompatibleError(
                f"the solver 'lbfgs' needs a family with a bounded optimum on fixed draws, and the family {name!r} "
                "does not say from how many draws on it has one (flows and implicit families have it on none): use "
                "solver='adam', or a family such as mean_field, full_rank, low_rank or mixture.",
                missing=("a bounded optimum on fixed draws",),
                works_with={"families": ["mean_field", "full_rank", "low_rank", "mixture"]},
            )

    def start(self, task: Task) -> LbfgsRun:
        """Begin a run."""
        self.check(model=task.model, family=task.family)
        if task.objective_state is not None:
            raise IncompatibleError(
                "the solver 'lbfgs' minimises one fixed function, and this objective carries a state from step to "
                "step: use solver='adam'.",
                missing=("an objective without a state",),
            )
        return LbfgsRun(task, self.tolerance, self.most_draws)
