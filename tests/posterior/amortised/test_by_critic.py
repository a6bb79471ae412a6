"""Games on simulated pairs: the value at known ratios, gradients, fits with a known answer, and what is refused."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError
from vifamily.models import Density, Simulator
from vifamily.objectives import RocArcCritic
from vifamily.objectives._joint_ratio import JointRatio
from vifamily.posterior.amortised import AmortisedPosterior
from vifamily.posterior.amortised._at_data import FamilyAtData
from vifamily.posterior.amortised._family import AmortisedFamily
from vifamily.posterior.amortised._fit import _Run, fit_amortised
from vifamily.posterior.amortised.encoders import as_encoder
from vifamily.rng import draw_noise, generator
from vifamily.testing import tolerances
from vifamily.types import Batch, LatentSpec, Loss

NOISE = 0.5
SD = (1 + NOISE**-2) ** -0.5
DOUBLE = torch.float64


def simulator(dtype: torch.dtype = torch.float32) -> Simulator:
    """A normal mean with a standard normal prior, seen once: its posterior is N(0.8 x, 0.2)."""
    prior = torch.distributions.Normal(torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype))

    def simulate(theta: Tensor, *, generator: torch.Generator) -> Tensor:
        return theta + NOISE * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)

    return Simulator(torch.distributions.Independent(prior, 1), simulate)


def pairs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = generator(seed, "pairs")
    z = torch.randn(count, 1, generator=source, dtype=DOUBLE)
    return z, z + NOISE * torch.randn(count, 1, generator=source, dtype=DOUBLE)


def networks(family: str = "mean_field") -> AmortisedFamily:
    """A family that begins at N(0, 1), whatever the data."""
    encoder = as_encoder("vector").build(
        (1,), generator=generator(0, "encoder"), dtype=DOUBLE, device=torch.device("cpu")
    )
    latent = LatentSpec(1, context_dim=1, dtype=DOUBLE)
    return AmortisedFamily(encoder, registry.build("families", family).build(latent, generator=generator(0, "f")))


def blank_critic(z: Tensor, x: Tensor) -> JointRatio:
    critic = JointRatio(nn.Identity(), z, x, [8], generator(0, "critic"))
    with torch.no_grad():
        critic.ratio.weights[-1].zero_()
        critic.ratio.shift.zero_()
        critic.ratio.scale.fill_(1.0)
    return critic


def joint_value(
    module: AmortisedFamily, critic: JointRatio, z: Tensor, x: Tensor, draws: int = 4, **options: Any
) -> Loss:
    objective = RocArcCritic(**options)
    family = FamilyAtData(module, x)
    noise = draw_noise(family.noise_spec, (len(x), draws), generator(1, "noise"), dtype=DOUBLE, device=x.device)
    return objective.joint_loss(family, noise, Batch((z, x), len(x)), critic)


def test_a_critic_that_cannot_tell_them_apart_has_the_value_zero() -> None:
    z, x = pairs(50)
    torch.testing.assert_close(joint_value(networks(), blank_critic(z, x), z, x).value, torch.zeros(50, dtype=DOUBLE))


def test_at_the_true_ratio_the_value_is_the_divergence_averaged_over_data() -> None:
    z, x = pairs(40_000)
    module = networks()
    with torch.no_grad():
        drawn = FamilyAtData(module, x[:2000])(torch.randn(2000, 50, 1, generator=generator(3, "d"), dtype=DOUBLE)).z
    mean, sd = float(drawn.mean()), float(drawn.std())
    assert abs(mean) < 0.02 and abs(sd - 1) < 0.02, "q must not depend on the data here"
    critic = blank_critic(z, x)
    with torch.no_grad():  # log N(z; 0.8 x, 0.2) - log N(z; 0, 1) in the coordinates (z, x)
        precision = SD**-2
        critic.ratio.quadratic.copy_(torch.tensor([[-0.5 * (precision - 1), 0.4 * precision], [0.4 * precision, 0]]))
        critic.ratio.quadratic[1, 1] = -0.5 * 0.64 * precision
        critic.ratio.biases[-1].fill_(-math.log(SD))
    found = joint_value(module, critic, z, x, draws=1).value

    def at(x: float) -> float:
        grid = np.linspace(-9, 9, 6001)
        p, q = stats.norm.pdf(grid, 0.8 * x, SD), stats.norm.pdf(grid)
        return float(integrate.trapezoid(np.hypot(p, q), grid)) - math.sqrt(2)

    nodes, weights = np.polynomial.hermite_e.hermegauss(31)
    values = np.array([at(n * math.sqrt(1 + NOISE**2)) for n in nodes])
    exact = float(weights @ values) / math.sqrt(2 * math.pi)
    error = float(found.std()) / len(found) ** 0.5
    assert exact > 0.1
    assert abs(float(found.mean()) - exact) < tolerances.STANDARD_ERRORS * error


@pytest.mark.parametrize("form", ["minimax", "non_saturating", "log_ratio"])
def test_gradients_are_those_of_differences(form: str) -> None:
    z, x = pairs(6)
    module = networks()
    critic = JointRatio(nn.Identity(), z, x, [8], generator(0, "critic"))
    with torch.no_grad():
        critic.ratio.quadratic.copy_(torch.tensor([[0.3, -0.2], [0.1, 0.4]]))

    def surrogate() -> Tensor:
        return joint_value(module, critic, z, x, family_loss=form).surrogate.sum()

    def value() -> float:
        return float(joint_value(module, critic, z, x, family_loss=form).value.sum())

    def descended() -> float:
        """What q descends on."""
        if form == "minimax":
            return value()
        family = FamilyAtData(module, x)
        noise = draw_noise(family.noise_spec, (len(x), 4), generator(1, "noise"), dtype=DOUBLE, device=x.device)
        g = critic(family(noise).z, critic.encode(x))
        gain = g if form == "log_ratio" else torch.sin(torch.atan(g.exp()))
        return -gain.detach().mean(-1).sum().item()

    for group, function in ((list(critic.parameters()), value), (list(module.parameters()), descended)):
        gradients = torch.autograd.grad(surrogate(), group, allow_unused=True)
        seen = 0.0
        for parameter, gradient in zip(group, gradients, strict=True):
            if gradient is None or not parameter.numel():
                continue
            flat, step = parameter.data.view(-1), 1e-6
            for i in range(min(3, flat.numel())):
                kept = float(flat[i])
                flat[i] = kept + step
                up = function()
                flat[i] = kept - step
                down = function()
                flat[i] = kept
                expected = (up - down) / (2 * step)
                seen = max(seen, abs(expected))
                assert float(gradient.reshape(-1)[i]) == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert seen > 1e-3


def fit(family: str, objective: str = "roc_arc_critic", model: Any = None, **given: Any) -> AmortisedPosterior:
    options = {"seed": 0, "steps": 500, "progress": False, **given}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = fit_amortised(model or simulator(), family, objective, **options)
    return posterior


AT = torch.tensor([[-1.0], [0.0], [0.5], [1.2]])


def test_a_family_that_contains_the_posterior_finds_it() -> None:
    posterior = fit("mean_field", encoder="vector", step_size=4e-3, batch_size=128)
    draws = posterior.draws(AT, 4000)
    assert float(((draws.mean(0) - 0.8 * AT) / SD).abs().max()) < 0.15
    assert float((draws.std(0) / SD).log().abs().max()) < 0.15
    assert posterior.record.stop_reason == "converged" and posterior.record.solver == "two_player"
    assert any(note.startswith("audit: ") for note in posterior.record.notes)
    assert posterior.record.restart_losses[0] < 0.02


def test_a_sampler_without_density_finds_it_too() -> None:
    posterior = fit("implicit(hidden=[16])", encoder="vector", step_size=2e-3, batch_size=128, steps=800)
    draws = posterior.draws(AT, 4000)
    assert float(((draws.mean(0) - 0.8 * AT) / SD).abs().max()) < 0.25
    assert float((draws.std(0) / SD).log().abs().max()) < 0.25


def test_a_family_that_does_not_contain_it_is_told_apart() -> None:
    """Independent coordinates for a posterior with correlation 0.9: means right, and the audit says it is not exact."""
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))

    def simulate(theta: Tensor, *, generator: torch.Generator) -> Tensor:
        return theta.sum(-1, keepdim=True) + 0.3 * torch.randn(len(theta), 1, generator=generator)

    posterior = fit("mean_field", model=Simulator(prior, simulate), encoder="vector", step_size=4e-3, batch_size=128)
    at = torch.tensor([[-1.0], [0.0], [1.0]])
    draws = posterior.draws(at, 4000)
    gain = 1 / (2 + 0.09)
    sd, conditional = (1 - gain) ** 0.5, (1 + 1 / 0.09) ** -0.5
    assert float((draws.mean(0) - gain * at).abs().max() / sd) < 0.3
    assert bool((draws.std(0) < sd).all()) and bool((draws.std(0) > 0.5 * conditional).all())
    assert posterior.record.restart_losses[0] > 0.03
    assert posterior.record.stop_reason == "max_steps"


def test_the_same_seed_gives_the_same_fit_and_files_hold_it(tmp_path: Path) -> None:
    one, two = (fit("implicit(hidden=[8])", "roc_arc_critic(simulations=400)", steps=20) for _ in range(2))
    torch.testing.assert_close(one.draws(AT, 5), two.draws(AT, 5), rtol=0, atol=0)
    other = fit("implicit(hidden=[8])", "roc_arc_critic(simulations=400)", steps=20, seed=1)
    assert not torch.equal(one.draws(AT, 5), other.draws(AT, 5))
    loaded = AmortisedPosterior.load(one.save(tmp_path / "posterior"), model=simulator())
    torch.testing.assert_close(loaded.draws(AT, 5), one.draws(AT, 5), rtol=0, atol=0)


def test_fresh_and_stored_simulations_and_restarts() -> None:
    stored = simulator().with_simulations(simulator().simulations(300, seed=4))
    posterior = fit("mean_field", model=stored, steps=15, restarts=2)
    assert len(posterior.record.restart_losses) == 2
    assert "270 simulations to learn from, 30 held out" in posterior.record.notes
    fresh = fit("mean_field", "roc_arc_critic(simulations=None)", steps=3, batch_size=32)
    assert "fresh simulations at every step" in fresh.record.notes


def test_simulations_that_are_not_finite_are_left_out() -> None:
    prior = torch.distributions.MultivariateNormal(torch.zeros(1), torch.eye(1))

    def simulate(theta: Tensor) -> Tensor:
        return torch.where(theta > 1, torch.nan, theta)

    posterior = fit("mean_field", "roc_arc_critic(simulations=400)", model=Simulator(prior, simulate), steps=5)
    assert posterior.record.non_finite > 20


def test_families_without_differentiable_draws_are_refused() -> None:
    on = Simulator({"on": torch.distributions.Bernoulli(torch.tensor(0.3))}, lambda theta: theta["on"].unsqueeze(-1))
    with pytest.raises(IncompatibleError, match="reparameterised"):
        vf.fit(on, "natural(kind=categorical)", "roc_arc_critic", progress=False)


def test_the_joint_estimator_needs_a_simulator() -> None:
    with pytest.raises(IncompatibleError, match="joint simulation"):
        vf.fit(Density(lambda z: -0.5 * (z**2).sum(-1), dim=1), "mean_field", "roc_arc_critic(estimator=joint)")
    with pytest.raises(IncompatibleError, match="reference draws"):
        vf.fit(simulator(), "mean_field", "roc_arc_critic(estimator=reference)")


@pytest.mark.parametrize("simulations", [3, 0, -5, 2.5, True])
def test_the_number_of_simulations_is_checked(simulations: object) -> None:
    with pytest.raises(ConfigError, match="simulations"):
        RocArcCritic(simulations=simulations)  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "length"), [(None, 4000), (50_000, 50_000), (7, 7)])
def test_the_schedule_is_as_long_as_was_asked_for(steps: int | None, length: int) -> None:
    run = _Run(simulator(), "mean_field", "roc_arc_critic", None, 0, None, None, None, steps, "auto", 1)
    assert run.steps == length
