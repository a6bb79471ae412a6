"""vifamily: variational inference where any objective meets any family meets any model.

>>> import vifamily as vf
>>> posterior = vf.fit("correlated_normal", family="full_rank", objective="elbo", seed=0)
>>> posterior.sample(1000)["z"].shape
torch.Size([1000, 2])
"""

from vifamily import errors, families, models, objectives, registry, rng, solvers, supports, trackers, types
from vifamily.compare import choose_alpha, compare
from vifamily.fit import fit
from vifamily.plan import compatibility, plan
from vifamily.posterior import Posterior, amortised
from vifamily.posterior.amortised import AmortisedPosterior, load

__version__ = "0.1.0"

__all__ = [
    "AmortisedPosterior",
    "Posterior",
    "__version__",
    "amortised",
    "choose_alpha",
    "compare",
    "compatibility",
    "errors",
    "families",
    "fit",
    "load",
    "models",
    "objectives",
    "plan",
    "registry",
    "rng",
    "solvers",
    "supports",
    "trackers",
    "types",
]
