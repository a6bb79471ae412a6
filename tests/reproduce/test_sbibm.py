"""The benchmark of simulation-based inference: its simulators, its reference posteriors, a short run."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vifamily.errors import ReferenceDataError
from vifamily.problems._sbibm_tasks import TASKS, observations
from vifamily.reproduce import Options, paper_named
from vifamily.reproduce import sbibm as module
from vifamily.rng import generator


def data_folder():
    where = os.environ.get("VIFAMILY_REFERENCE_DATA", str(Path(__file__).resolve().parents[3] / "shared"))
    folder = Path(where) / "sbibm"
    if not folder.is_dir():
        pytest.skip("needs the reference posteriors in ../shared/sbibm, or where VIFAMILY_REFERENCE_DATA points")
    return folder


@pytest.mark.parametrize(("name", "dim", "numbers"), [("two_moons", 2, 2), ("gaussian_linear", 10, 10),
                                                      ("gaussian_mixture", 2, 2), ("slcp", 5, 8)])  # fmt: skip
def test_simulators_have_the_sizes_of_the_benchmark(name, dim, numbers):
    pairs = TASKS[name].make().simulations(200, seed=0)
    assert pairs.theta.shape == (200, dim) and pairs.x.shape == (200, numbers) and pairs.non_finite == 0


def test_the_covariance_of_slcp(seed):
    simulator = TASKS["slcp"].make()
    theta = torch.tensor([[0.7, -2.9, -1.0, 1.5, 0.6]]).expand(20_000, -1)
    x = simulator.simulate({"theta": theta}, generator=generator(seed, "slcp")).double().reshape(-1, 2)
    first, second, rho = 1.0, 1.5**2, math.tanh(0.6)
    wanted = torch.tensor([[first**2, rho * first * second], [rho * first * second, second**2]]).double()
    centred = x - torch.tensor([0.7, -2.9])
    outer = centred[:, :, None] * centred[:, None, :]
    assert bool(((outer.mean(0) - wanted).abs() < 5 * outer.std(0) / math.sqrt(len(x)) + 1e-5).all())


def test_two_moons_puts_data_on_its_half_circle(seed):
    simulator = TASKS["two_moons"].make()
    theta = torch.tensor([[0.3, -0.5]]).expand(5000, -1)
    x = simulator.simulate({"theta": theta}, generator=generator(seed, "moons")).double()
    centre = torch.tensor([0.25 - abs(0.3 - 0.5) / math.sqrt(2), (-0.5 - 0.3) / math.sqrt(2)], dtype=torch.float64)
    radius = (x - centre).norm(dim=-1)
    assert bool((x[:, 0] >= centre[0] - 1e-6).all())
    assert abs(float(radius.mean()) - 0.1) < 5 * 0.01 / math.sqrt(5000) + 1e-6


def test_reference_posteriors_are_read():
    places = observations(data_folder(), "gaussian_linear")
    assert len(places) == 3
    for place in places:
        # the exact posterior is N(x / 2, 0.05 I), of which these are 2000 independent draws
        error = math.sqrt(0.05 / len(place.draws))
        assert float((place.draws.mean(0) - place.x / 2).abs().max()) < 5 * error


def test_without_data_nothing_is_tried(monkeypatch):
    monkeypatch.delenv("VIFAMILY_REFERENCE_DATA", raising=False)
    found = paper_named("sbibm").run(Options(say=lambda line: None))
    assert not found.failed and all(claim.holds is None for claim in found.claims)


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(ReferenceDataError, match="--data"):
        observations(tmp_path, "two_moons")
    with pytest.raises(ReferenceDataError, match="no folder"):
        paper_named("sbibm").run(Options(data=tmp_path / "none", say=lambda line: None))


def test_a_short_run(tmp_path, monkeypatch):
    # one coordinate, exact draws, so that seconds are enough
    x = np.array([0.3, -0.2], dtype=np.float32)
    source = generator(0, "exact")
    draws = (torch.as_tensor(x) / 2 + math.sqrt(0.05) * torch.randn(500, 2, generator=source)).numpy()
    np.savez(tmp_path / "gaussian_linear.npz", observations=np.array([1]), obs1_observation=x, obs1_samples=draws)
    import vifamily as vf

    prior = torch.distributions.MultivariateNormal(torch.zeros(2), 0.1 * torch.eye(2))
    simulator = vf.models.Simulator(prior, lambda t: t + math.sqrt(0.1) * torch.randn_like(t))
    task = module.TASKS["gaussian_linear"]
    monkeypatch.setitem(module.TASKS, "gaussian_linear", type(task)(lambda: simulator, task.published, task.bound))
    monkeypatch.setattr(module, "_FAMILY", "full_rank")
    rows = module.measure("gaussian_linear", 1000, tmp_path, 0, 500)
    claim = module._judged("gaussian_linear", 1000, rows)
    assert rows[0]["c2st"] < 0.62 and claim.holds is True
