"""The solver of games: resumed bit for bit, stopped where it must, honest about what the critic could not see."""

import math

import pytest
import torch

import vifamily as vf
from vifamily.errors import ConfigError, NonFiniteLossError
from vifamily.models import Density
from vifamily.reproduce._operator_vi_mixture import distance_to_mixture
from vifamily.reproduce._operator_vi_programs import SwitchProgram

DOUBLE = torch.float64
FEW = "two_player(audit=5)"


def bits(posterior):
    return torch.cat([v.reshape(-1) for v in posterior.family.state_dict().values()])


CASES = {
    "plain": {},
    "inner steps": {"solver": "two_player(audit=5, inner=3)"},
    "probes": {"objective": "operator(trace=hutchinson)"},
    "squared": {"objective": "operator(distance=square)"},
    "sampler": {"family": "implicit(hidden=[4])"},
    "two restarts": {"restarts": 2},
    "past a stage": {"steps": 230, "draws": 4},
}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_goes_on_bit_for_bit(name, tmp_path):
    options = {"family": "full_rank", "objective": "operator", "solver": FEW, "draws": 6, "seed": 2, **CASES[name]}
    steps = options.pop("steps", 24)
    vf.fit("banana", **options, steps=steps // 2, checkpoint=tmp_path / "kept")
    resumed = vf.fit("banana", **options, steps=steps, checkpoint=tmp_path / "kept")
    whole = vf.fit("banana", **options, steps=steps)
    assert torch.equal(bits(resumed), bits(whole))
    assert (resumed.record.trace["loss"] == whole.record.trace["loss"]).all()
    assert resumed.record.notes[-1] == whole.record.notes[-1]


def test_the_critic_ascends_and_the_family_descends():
    """With the family all but held, the value rises to the Fisher divergence; then it falls."""
    model = Density(lambda z: -0.5 * (z - 1.0).square().sum(-1), dim=1)
    start = torch.tensor([0.0], dtype=DOUBLE)
    held = vf.fit(
        model, "mean_field", "operator", "two_player(step_size=1e-9, audit=300)", init=start, steps=300, seed=0
    )
    # scores differ by one everywhere: the divergence is one, and the value is a half at tau = 0.5
    assert held.record.restart_losses[0] == pytest.approx(0.5, abs=0.05)
    free = vf.fit(model, "mean_field", "operator", init=start, seed=0)
    assert free.record.stop_reason == "converged"
    assert abs(free.record.restart_losses[0]) < 0.03
    assert float(free.mean()[0]) == pytest.approx(1.0, abs=0.05)


def test_a_critic_that_lags_behind_is_found_out_before_the_fit_ends():
    """Two players that all but stand still look as if they had settled."""
    model = Density(lambda z: -0.5 * (z - 1.0).square().sum(-1), dim=1)
    solver = "two_player(step_size=1e-9, critic_step_size=1e-7, audit=100)"
    posterior = vf.fit(model, "mean_field", "operator", solver, init=torch.zeros(1, dtype=DOUBLE), steps=700, seed=0)
    assert posterior.record.stop_reason == "max_steps"
    assert any("lagged behind" in note for note in posterior.record.notes)


def test_a_gaussian_on_a_mixture_ends_at_the_minimum_of_the_fisher_divergence():
    """By quadrature: mean 3.04 and sd 0.98, where reverse KL has 2.98 and 1.02."""
    posterior = vf.fit("bimodal", "full_rank", "operator", init=torch.tensor([2.0], dtype=DOUBLE), seed=0)
    mean, covariance = posterior.family.moments()
    assert posterior.record.stop_reason == "converged"
    assert float(mean) == pytest.approx(3.04, abs=0.1)
    assert math.sqrt(float(covariance)) == pytest.approx(0.98, abs=0.1)


def test_minibatches_are_played_on():
    options = {"family": "mean_field", "objective": "operator", "solver": FEW, "seed": 0, "steps": 4}
    batch, whole = vf.fit("breast_cancer", **options, batch_size=100), vf.fit("breast_cancer", **options)
    assert not torch.equal(bits(batch), bits(whole))


def test_a_family_that_cannot_match_is_told():
    """Mean field on a strongly correlated law: settled, and the scores still differ."""
    posterior = vf.fit("correlated_normal", "mean_field", "operator", seed=0, steps=300)
    assert any("does not match the target" in note for note in posterior.record.notes)
    assert posterior.record.restart_losses[0] > 0.2


def test_a_loss_that_is_not_finite_stops_it_with_the_last_state():
    def wall(z):
        return torch.where(z[:, 0] > 2.5, torch.nan, -0.5 * z.square().sum(-1))

    with pytest.raises(NonFiniteLossError, match="operator is not finite") as caught:
        vf.fit(Density(wall, dim=1), "full_rank", "operator", FEW, init=torch.full((1,), 1.9, dtype=DOUBLE), seed=0)
    assert caught.value.step == caught.value.posterior.record.steps
    assert all(bool(torch.isfinite(part).all()) for part in caught.value.posterior.family.moments())


BAD = {"step_size": 0.0, "critic_step_size": -1.0, "inner": 0, "audit": 1.5, "tolerance": "small", "mcse": math.inf}


@pytest.mark.parametrize("name", BAD)
def test_bad_numbers_are_refused(name):
    with pytest.raises(ConfigError, match=name):
        vf.solvers.TwoPlayer(**{name: BAD[name]})


def test_the_models_own_parameters_stay():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.log_sd = torch.nn.Parameter(torch.zeros((), dtype=DOUBLE))

        def forward(self, z):
            return -0.5 * (z * (-self.log_sd).exp()).square().sum(-1) - self.log_sd

    net = Scaled()
    fitted = vf.fit(Density(net, dim=1), "full_rank", "operator", FEW, steps=5, seed=0)
    assert float(net.log_sd.detach()) == 0.0
    assert any("stay as they are" in note for note in fitted.record.notes)


# --- the program of the paper ---


def test_the_program_finds_both_modes_from_a_wide_start():
    posterior = vf.fit("bimodal", SwitchProgram(seed=0), "operator", seed=0)
    assert distance_to_mixture(posterior.draws(20_000)[:, 0], 0.5) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_the_program_finds_both_modes_from_ten_seeds(seed):
    posterior = vf.fit("bimodal", SwitchProgram(seed=seed), "operator", seed=seed)
    assert distance_to_mixture(posterior.draws(20_000)[:, 0], 0.5) <= 0.2


def test_the_program_is_blind_to_the_weights_of_modes():
    """On weights of 0.2 and 0.8 it stays at a half and a half, and the audit sees next to nothing wrong."""
    posterior = vf.fit("bimodal(weight=0.2)", SwitchProgram(seed=1), "operator", seed=1)
    z = posterior.draws(20_000)[:, 0]
    assert float((z > 0).double().mean()) == pytest.approx(0.5, abs=0.02)
    assert distance_to_mixture(z, 0.2) > 1.5
    # 0.3 to 0.7 on both sides: sizes are right, weights are not
    assert float(z[z > 0].mean()) == pytest.approx(3.0, abs=0.3)
    assert float(z[z < 0].mean()) == pytest.approx(-3.0, abs=0.3)
    assert not any("does not match the target" in note for note in posterior.record.notes)
