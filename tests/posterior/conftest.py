"""Posteriors built by hand: a known target, a family at a known place."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from vifamily import registry
from vifamily.models.density import Density
from vifamily.models.likelihood import LikelihoodModel
from vifamily.posterior import FitRecord, Posterior
from vifamily.types import LatentSpec


def make_record(**changes: Any) -> FitRecord:
    step = np.arange(10, 60, 10)
    values: dict[str, Any] = {
        "objective": "elbo", "estimator": "reparameterised", "family": "mean_field", "solver": "adam", "seed": 3,
        "steps": 60, "stop_reason": "converged", "converged": True, "seconds": 0.25, "draws_per_step": 8,
        "trace": {"step": step, "loss": 5 - step / 20, "loss_error": step * 0 + 0.1, "step_size": step * 0 + 0.01,
                  "term:log_joint": -step / 10},
        "restart_losses": (2.5,), "gradient_snr": 0.3, "rhat_iterates": 1.01, "mcse_iterates": 0.02,
        "notes": ("started at the prior",), "versions": {"torch": "2"},
    }  # fmt: skip
    return FitRecord(**{**values, **changes})


def make_family(spec: str, mean: list[float], sd: Any, **latent: Any) -> Any:
    family = registry.build("families", spec).build(LatentSpec(len(mean), **latent), generator=torch.Generator())
    family.spec = spec
    like = family.shift
    family.start_at(torch.tensor(mean, dtype=torch.float64).to(like), torch.tensor(sd, dtype=torch.float64).to(like))
    return family.requires_grad_(False)


@pytest.fixture
def record() -> Callable[..., FitRecord]:
    return make_record


@pytest.fixture
def family() -> Callable[..., Any]:
    return make_family


@pytest.fixture
def named() -> Density:
    """mu ~ N(1, 2^2), tau ~ LogNormal(0.5, 0.3^2), v ~ N(0, I_2): on unconstrained space normal with known moments."""

    def normal(mean, sd):
        return torch.distributions.Normal(*torch.tensor([mean, sd], dtype=torch.float64))

    def log_prob(theta):
        log_tau = theta["tau"].log()
        return (
            normal(1.0, 2.0).log_prob(theta["mu"])
            + normal(0.5, 0.3).log_prob(log_tau) - log_tau
            + normal(0.0, 1.0).log_prob(theta["v"]).sum(-1)
        )  # fmt: skip

    return Density(log_prob, parameters={"mu": "real", "tau": "positive", "v": ((2,), "real")})


@pytest.fixture
def exact(named: Density) -> Posterior:
    """The family is the posterior."""
    return Posterior(
        named,
        make_family("full_rank", [1.0, 0.5, 0.0, 0.0], [2.0, 0.3, 1.0, 1.0]),
        make_record(family="full_rank"),
        layout=named.layout,
    )


def conjugate(num_data: int = 20) -> LikelihoodModel:
    """y_i ~ N(mu, 1), mu ~ N(0, 2^2)."""
    y = 0.7 + torch.randn(num_data, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return LikelihoodModel(
        lambda theta: torch.distributions.Normal(0.0, 2.0).log_prob(theta["mu"]),
        lambda theta, data: torch.distributions.Normal(theta["mu"].unsqueeze(-1), 1.0).log_prob(data["y"]),
        data={"y": y},
        parameters={"mu": "real"},
        sample_prior=lambda num_draws, generator: {
            "mu": 2 * torch.randn(num_draws, generator=generator, dtype=torch.float64)
        },
        simulate=lambda theta, generator: {
            "y": theta["mu"].unsqueeze(-1)
            + torch.randn(theta["mu"].shape[0], num_data, generator=generator, dtype=torch.float64)
        },
    )


@pytest.fixture
def regression() -> Posterior:
    """The conjugate normal mean, its family at the exact posterior."""
    model = conjugate()
    y = model.observed()["y"]
    precision = len(y) + 0.25
    family = make_family("mean_field", [float(y.sum()) / precision], [precision**-0.5])
    return Posterior(model, family, make_record(), layout=model.layout)


@pytest.fixture
def two_modes() -> Posterior:
    """0.3 N(-10, 1) + 0.7 N(10, 2^2), one restart in each mode."""

    def log_prob(z):
        a = torch.distributions.Normal(-10.0, 1.0).log_prob(z[:, 0])
        b = torch.distributions.Normal(10.0, 2.0).log_prob(z[:, 0])
        weights = torch.tensor([0.3, 0.7], dtype=z.dtype).log()
        return torch.logsumexp(torch.stack([a, b], -1) + weights, -1)

    model = Density(log_prob, dim=1)
    restarts = (make_family("mean_field", [-10.0], [1.0]), make_family("mean_field", [10.0], [2.0]))
    record = make_record(num_restarts=2, restart_losses=(1.2, 0.36), best_restart=1)
    return Posterior(model, restarts[1], record, layout=model.layout, restarts=restarts)
