"""The solver of closed-form updates: exact on Gaussians, low rank, resumed, stopped, refused."""

import math

import pytest
import torch

import vifamily as vf
from vifamily.errors import ConfigError, IncompatibleError, NonFiniteLossError
from vifamily.models import Density
from vifamily.objectives import BatchAndMatch, Gsm
from vifamily.solvers.closed_form import moved

DOUBLE = torch.float64


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def badly_scaled(dim):
    root = random(dim, 2 * dim, seed=0)
    precision = root @ root.T / dim
    units = torch.logspace(-3, 3, dim, dtype=DOUBLE)
    precision = precision / units / units[:, None]
    mean = units * random(dim, seed=1)
    return Density(lambda z: -0.5 * (((z - mean) @ precision) * (z - mean)).sum(-1), dim=dim), mean, precision


def errors(posterior, mean, precision):
    covariance = torch.linalg.inv(precision)
    sd = covariance.diagonal().sqrt()
    found, own = posterior.family.moments()
    return float(((found - mean) / sd).abs().max()), float(((own - covariance) / sd / sd[:, None]).abs().max())


@pytest.mark.parametrize("objective", ["batch_and_match", "gsm"])
@pytest.mark.parametrize("draws", [3, 64])
def test_a_gaussian_in_any_units_is_found_also_from_few_draws(objective, draws):
    model, mean, precision = badly_scaled(12)
    start = 0.5 * mean
    fitted = vf.fit(model, "full_rank", objective, solver="auto", draws=draws, init=start, seed=0)
    assert fitted.record.stop_reason == "converged"
    off, spread = errors(fitted, mean, precision)
    # what is left of the start shrinks by a factor at each step of gsm, and more slowly than in batch_and_match
    assert max(off, spread) < (1e-4 if objective == "gsm" else 1e-6)
    assert fitted.record.restart_losses[0] < 1e-8


@pytest.mark.parametrize("objective", [BatchAndMatch(), Gsm()])
def test_the_factor_moves_as_the_covariance_does_with_and_without_a_basis(objective):
    factor = torch.linalg.cholesky(torch.eye(10, dtype=DOUBLE) + 0.3)
    for draws in (2, 30):
        _, basis, inner = objective.move(random(draws, 10, seed=1), random(draws, 10, seed=2), 0.5)
        assert (basis is None) is (draws == 30)
        new, covariance = moved(factor, factor @ factor.T, basis, inner)
        whole = inner if basis is None else torch.eye(10) + basis @ (inner - torch.eye(inner.shape[-1])) @ basis.T
        assert torch.allclose(covariance, factor @ whole @ factor.T, atol=1e-8)
        assert torch.allclose(new @ new.T, covariance, atol=1e-8)


def test_restarts_side_by_side_equal_single_ones_and_agree():
    together = vf.fit("banana", "full_rank", "batch_and_match", solver="auto", restarts=3, steps=25, seed=0)
    alone = vf.fit("banana", "full_rank", "batch_and_match", solver="auto", steps=25, seed=0)
    first = together.restarts[0].moments()
    for a, b in zip(first, alone.family.moments(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    options = {"family": "full_rank", "objective": "batch_and_match", "solver": "auto", "seed": 0, "draws": 8}
    vf.fit("eight_schools", **options, steps=70, checkpoint=tmp_path / "kept")
    resumed = vf.fit("eight_schools", **options, steps=170, checkpoint=tmp_path / "kept")
    whole = vf.fit("eight_schools", **options, steps=170)
    assert torch.equal(resumed.draws(5), whole.draws(5))
    assert (resumed.record.trace["loss"] == whole.record.trace["loss"]).all()


def test_a_score_that_is_not_finite_stops_it_with_the_last_state():
    def wall(z):
        return torch.where(z[:, 0] > 2.5, torch.nan, -0.5 * z.square().sum(-1))

    with pytest.raises(NonFiniteLossError, match="log_joint is not finite") as caught:
        vf.fit(Density(wall, dim=1), "full_rank", "gsm", solver="auto", init=torch.full((1,), 2.0), seed=0)
    assert all(bool(torch.isfinite(part).all()) for part in caught.value.posterior.family.moments())


def test_what_it_cannot_drive_is_refused():
    with pytest.raises(IncompatibleError, match="steps are formulas"):
        vf.plan("banana", "full_rank", "elbo", "closed_form")
    for bad in (0.0, -1.0, math.inf, "1"):
        with pytest.raises(ConfigError, match="positive number"):
            vf.solvers.ClosedFormUpdates(step=bad)


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.log_sd = torch.nn.Parameter(torch.zeros((), dtype=DOUBLE))

    def forward(self, z):
        return -0.5 * (z * (-self.log_sd).exp()).square().sum(-1) - self.log_sd


def test_the_models_own_parameters_stay():
    net = Scaled()
    fitted = vf.fit(Density(net, dim=1), "full_rank", "batch_and_match", solver="auto", seed=0)
    assert float(net.log_sd.detach()) == 0.0
    assert any("stay as they are" in note for note in fitted.record.notes)
