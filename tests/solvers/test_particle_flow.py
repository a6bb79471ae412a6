"""The particle flow: where it stops, how it goes on, what it refuses."""

import json
import math

import pytest
import torch

import vifamily as vf
from vifamily.errors import ConfigError, ConvergenceWarning, NonFiniteLossError
from vifamily.models import Density
from vifamily.solvers import ParticleFlow
from vifamily.testing import targets


def normal_model(dim=2):
    return Density(lambda z: -0.5 * z.square().sum(-1), dim=dim)


def rest(method, seed, bandwidth=0.5):
    posterior = vf.fit(normal_model(1), "ensemble(size=5)", f"svgd(bandwidth={bandwidth})",
                       f"particle_flow(method={method}, tolerance=1e-5)", seed=seed, steps=2500)  # fmt: skip
    return posterior, posterior.family(torch.zeros(1, 0, dtype=torch.float64)).z[:, 0].sort().values


def test_both_methods_end_at_one_rest():
    """In one dimension the particles rest in one order: symmetric, and the same from every start."""
    _, points = rest("adam", 0)
    torch.testing.assert_close(points, -points.flip(0), rtol=0, atol=1e-3)
    for method, seed in (("adam", 7), ("adagrad", 0)):
        torch.testing.assert_close(rest(method, seed)[1], points, rtol=0, atol=1e-3)


def test_short_steps_do_not_pass_for_rest():
    """Where two particles hardly feel each other's place, Adagrad crawls, and must not be called converged."""
    posterior, points = rest("adagrad", 0, bandwidth=1.0)
    assert float(points[2]) < 1e-3 or not posterior.record.converged


def test_a_smaller_tolerance_leaves_less_to_go():
    left = []
    for tolerance in (0.05, 0.005, 0.0005):
        start = torch.full((3,), 2.0, dtype=torch.float64)
        solver = f"particle_flow(tolerance={tolerance})"
        posterior = vf.fit(normal_model(3), "ensemble(size=20)", "svgd", solver, seed=0, init=start)
        assert posterior.record.stop_reason == "converged"
        note = next(n for n in posterior.record.notes if "left to go" in n)
        left.append(float(note.split("about ")[1].split()[0]))
        assert left[-1] < tolerance
    assert left == sorted(left, reverse=True)


def test_weights_are_equal_whatever_the_family_held():
    posterior = vf.fit(normal_model(), "ensemble(size=6)", "svgd", seed=0)
    assert not posterior.family.logits.any()
    again = vf.fit(normal_model(), "ensemble(size=6)", "svgd", seed=0, init=posterior)
    assert again.record.steps <= posterior.record.steps


def test_restarts_side_by_side_equal_one_by_one():
    both = vf.fit(targets.two_normals().model, "ensemble(size=8)", "svgd", seed=0, restarts=3, steps=40)
    alone = vf.fit(targets.two_normals().model, "ensemble(size=8)", "svgd", seed=0, steps=40)
    torch.testing.assert_close(both.restarts[0].points, alone.family.points, rtol=1e-9, atol=1e-9)
    assert len(both.record.restart_losses) == 3 and min(both.record.restart_losses) > 0


@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("method", ["adam", "adagrad"])
def test_a_checkpoint_goes_on_bit_for_bit(tmp_path, batch, method):
    model = targets.linear_regression().model
    options = dict(family="ensemble(size=7)", objective="svgd(cycles=1, cycle_length=20)", batch_size=batch, seed=3,
                   solver=f"particle_flow(method={method})")  # fmt: skip
    whole = vf.fit(model, steps=120, **options)
    vf.fit(model, steps=67, checkpoint=tmp_path / "c", **options)
    resumed = vf.fit(model, steps=120, checkpoint=tmp_path / "c", **options)
    assert torch.equal(resumed.family.points, whole.family.points)
    assert resumed.record.trace["loss"].tolist() == whole.record.trace["loss"].tolist()


def test_steps_are_reported_one_by_one():
    seen = []

    def note(report):
        seen.append(report.step)

    vf.fit(normal_model(), "ensemble(size=4)", "svgd", seed=0, steps=3, callbacks=note)
    assert seen == [1, 2, 3]


def test_a_density_that_breaks_ends_at_the_last_finite_state():
    calls = [0]

    def log_prob(z):
        calls[0] += 1
        return -0.5 * z.square().sum(-1) * (math.nan if calls[0] > 40 else 1.0)

    with pytest.raises(NonFiniteLossError, match="log_joint is not finite") as caught:
        vf.fit(Density(log_prob, dim=2), "ensemble(size=5)", "svgd", "particle_flow(tolerance=1e-9)", seed=0,
               init=torch.zeros(2, dtype=torch.float64))  # fmt: skip
    assert caught.value.parameter == "points" and caught.value.step > 0


@pytest.mark.slow
def test_an_improper_posterior_is_not_called_converged():
    """A density that grows for ever drives its particles for ever."""
    model = Density(lambda z: z.sum(-1), dim=1)
    with pytest.warns(ConvergenceWarning):
        posterior = vf.fit(model, "ensemble(size=4)", "svgd(bandwidth=1.0)", seed=0, init=torch.zeros(1).double())
    assert not posterior.record.converged


def test_the_record_is_plain_data():
    posterior = vf.fit(normal_model(), "ensemble(size=6)", "svgd", seed=0)
    json.dumps(posterior.diagnose().to_dict(), allow_nan=False)
    assert any("bandwidth" in name for name in posterior.record.trace)
    assert posterior.diagnose().k_hat is None
    assert "does not see the relative weights" in posterior.diagnose().advice


@pytest.mark.parametrize("options", [{"step_size": 0}, {"tolerance": -1.0}, {"tolerance": None}, {"method": "sgd"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ConfigError):
        ParticleFlow(**options)
