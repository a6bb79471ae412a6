"""Simulators: priors and simulators of every form, seeds, stored simulations, non-finite ones, observations."""

import math
import os

import pytest
import safetensors.torch
import torch
from torch.distributions import Independent, Normal

from vifamily import testing
from vifamily.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NotAvailableError,
    ShapeError,
    SupportError,
)
from vifamily.models import Simulations, Simulator
from vifamily.rng import generator
from vifamily.types import Capability

PRIOR = torch.distributions.Uniform(torch.zeros(2), torch.ones(2))
NORMAL = torch.distributions.Normal(torch.zeros(2), torch.ones(2))


def noisy(theta):
    return theta + 0.1 * torch.randn_like(theta)


def one_by_one(theta):
    assert theta.dim() == 1
    return [float(theta.sum()), 1.0, 2.0]


class Custom:
    """A prior of the user's own, in sbi's form."""

    def sample(self, shape):
        return torch.rand(*shape, 3) + 1

    def log_prob(self, theta):
        return torch.zeros(theta.shape[:-1])


def sampler(num_draws):
    return torch.randn(num_draws, 2)


# --- priors ---


@pytest.mark.parametrize(
    ("prior", "dim", "density"),
    [
        (NORMAL, 2, True),
        (torch.distributions.Independent(torch.distributions.Uniform(torch.zeros(3), torch.ones(3)), 1), 3, True),
        (torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)), 2, True),
        (torch.distributions.Dirichlet(torch.ones(3)), 2, True),
        (Custom(), 3, True),
        (sampler, 2, False),
    ],
    ids=lambda v: type(v).__name__,
)
def test_priors_of_every_form(prior, dim, density):
    simulator = Simulator(prior, noisy)
    z = simulator.sample_prior(5, generator=generator(0, "prior"))
    assert z.shape == (5, dim) and z.dtype == torch.float32
    assert (Capability.PRIOR in simulator.capabilities) == density
    if density:
        assert bool(simulator.log_prior(z).isfinite().all())
    else:
        with pytest.raises(NotAvailableError, match="draws alone"):
            simulator.log_prior(z)


def test_the_density_of_the_prior_has_its_jacobian():
    prior = torch.distributions.Uniform(-torch.ones(2), 3 * torch.ones(2))
    simulator = Simulator(prior, noisy, dtype=torch.float64)
    z = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    grid = torch.stack([z, torch.zeros_like(z)], -1)
    # along a line through the origin: the marginal of one logistic coordinate times the other's density at zero
    total = torch.trapezoid(simulator.log_prior(grid).exp(), z)
    assert float(total) == pytest.approx(0.25, abs=1e-4)


def test_named_priors_reach_the_simulator_by_name():
    prior = {"mu": torch.distributions.Normal(0.0, 1.0), "tau": torch.distributions.HalfNormal(torch.ones(2))}
    simulator = Simulator(prior, lambda theta: theta["mu"][:, None] + theta["tau"])
    pairs = simulator.simulations(10)
    assert simulator.layout.columns() == ["mu", "tau[0]", "tau[1]"] and pairs.x.shape == (10, 2)
    torch.testing.assert_close(pairs.x, pairs.theta[:, :1] + pairs.theta[:, 1:])


def test_one_sampler_of_several_named_parameters():
    simulator = Simulator(
        lambda n: {"a": torch.rand(n), "b": torch.randn(n, 2)}, lambda theta: theta["b"],
        parameters={"a": "unit_interval", "b": ((2,), "real")},
    )  # fmt: skip
    assert simulator.simulations(7).theta.shape == (7, 3)


def test_draws_on_the_edge_of_an_interval_stay_within_reach():
    simulator = Simulator(torch.distributions.Uniform(torch.zeros(1), torch.ones(1)), noisy)
    z = simulator.unconstrained(torch.tensor([[0.0], [0.5], [1.0]]))
    assert float(z.abs().max()) <= 17


# --- simulators ---


def test_single_parameter_simulators_are_found_out():
    simulator = Simulator(NORMAL, one_by_one)
    pairs = simulator.simulations(120, seed=3)
    assert not simulator.takes_batches and pairs.x.shape == (120, 3)
    torch.testing.assert_close(pairs.x[:, 0], pairs.theta.sum(-1))


def test_data_of_any_shape():
    simulator = Simulator(NORMAL, lambda theta: theta[:, :, None, None].expand(-1, 2, 4, 3))
    assert simulator.simulations(6).x.shape == (6, 2, 4, 3)


@pytest.mark.parametrize(
    ("simulate", "error", "text"),
    [
        (lambda theta: 1 / 0, ModelError, "division by zero"),
        (lambda theta: "text", ShapeError, "numbers in a tensor"),
        (lambda theta: theta[:1], ShapeError, "first axis"),
    ],
)
def test_simulators_that_cannot_be_used(simulate, error, text):
    with pytest.raises(error, match=text):
        Simulator(NORMAL, simulate, batched=True).simulations(5)


def test_seeds_are_all_that_counts():
    simulator, before = Simulator(NORMAL, noisy), torch.get_rng_state()
    one, two, other = (simulator.simulations(2500, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.x, two.x) and not torch.equal(one.x, other.x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(simulator.simulations(1000, seed=1).x, one.x[:1000])


@pytest.mark.slow
def test_workers_do_not_change_the_numbers():
    simulator = Simulator(NORMAL, noisy)
    assert torch.equal(simulator.simulations(2500, workers=2).x, simulator.simulations(2500).x)


def test_non_finite_simulations_are_counted_and_left_out():
    def sometimes(theta):
        return torch.where(theta[:, :1] > 1, torch.nan, theta)

    pairs = Simulator(NORMAL, sometimes).simulations(1000)
    assert len(pairs) + pairs.non_finite == 1000 and pairs.non_finite > 100
    assert bool((pairs.theta[:, 0] <= 1).all())
    with pytest.raises(DataError, match="all 50"):
        Simulator(NORMAL, lambda theta: theta * math.nan).simulations(50)


# --- files ---


def test_stored_simulations_are_resumed_and_extended(tmp_path):
    calls = []

    def counted(theta):
        calls.append(len(theta))
        return theta

    simulator = Simulator(NORMAL, counted, batched=True)
    first = simulator.simulations(1500, seed=5, folder=tmp_path)
    assert torch.equal(first.x, simulator.simulations(1500, seed=5).x)
    calls.clear()
    again = simulator.simulations(1500, seed=5, folder=tmp_path)
    assert torch.equal(first.x, again.x) and calls == []
    longer = simulator.simulations(2600, seed=5, folder=tmp_path)
    assert torch.equal(longer.x[:1500], first.x) and len(longer) == 2600 and sum(calls) == 1100
    # a run that was killed leaves whole chunks: what is missing is made again, the same
    (tmp_path / "chunk-000001.safetensors").unlink()
    assert torch.equal(simulator.simulations(2600, seed=5, folder=tmp_path).x, longer.x)


def test_folders_of_other_simulations_are_refused(tmp_path):
    simulator = Simulator(NORMAL, noisy)
    simulator.simulations(20, seed=5, folder=tmp_path)
    with pytest.raises(CheckpointError, match="seed"):
        simulator.simulations(20, seed=6, folder=tmp_path)
    with pytest.raises(CheckpointError, match="prior"):
        Simulator(torch.distributions.Normal(torch.ones(2), torch.ones(2)), noisy).simulations(
            20, seed=5, folder=tmp_path
        )
    (tmp_path / "chunk-000000.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="damaged"):
        simulator.simulations(20, seed=5, folder=tmp_path)
    (tmp_path / "simulations.json").write_text("[]")
    with pytest.raises(CheckpointError, match="index"):
        simulator.simulations(20, seed=5, folder=tmp_path)


def test_simulations_of_the_users_own():
    simulator = Simulator(NORMAL, noisy).with_simulations(torch.zeros(4, 2), torch.ones(4, 3))
    assert simulator.stored is not None and len(simulator.stored) == 4
    with pytest.raises(ShapeError, match="rows"):
        simulator.with_simulations(torch.zeros(4, 2), torch.ones(3, 3))
    with pytest.raises(ShapeError, match="columns"):
        simulator.with_simulations(torch.zeros(4, 3), torch.ones(4, 3))
    assert len(Simulations.of(torch.zeros(2, 1), torch.tensor([1.0, math.inf]))) == 1


# --- at an observation ---


def test_an_observation_with_a_likelihood_is_an_ordinary_model():
    def log_likelihood(theta, x):
        return torch.distributions.Normal(theta, 0.1).log_prob(x).sum(-1)

    simulator = Simulator(NORMAL, noisy, log_likelihood=log_likelihood, dtype=torch.float64)
    report = testing.check_model(simulator.at(torch.tensor([0.3, -0.2])))
    assert {"capabilities", "score", "prior_draws", "round_trip"} <= set(report.passed)


def test_an_observation_without_a_likelihood_has_no_log_joint():
    model = Simulator(NORMAL, noisy).at(torch.zeros(2))
    assert Capability.LOG_JOINT not in model.capabilities and Capability.PREDICTIVE in model.capabilities
    with pytest.raises(NotAvailableError, match="likelihood"):
        model.log_joint(torch.zeros(1, 2))
    with pytest.raises(NotAvailableError, match="simulator.at"):
        Simulator(NORMAL, noisy).log_joint(torch.zeros(1, 2))
    other = model.with_observed({"x": torch.ones(2)})
    assert torch.equal(other.observed()["x"], torch.ones(2))
    with pytest.raises(DataError, match="finite"):
        Simulator(NORMAL, noisy).at(torch.tensor([math.nan, 0.0]))


@pytest.mark.parametrize("options", [{"num": 0}, {"num": 10, "workers": 0}])
def test_numbers_are_checked(options):
    with pytest.raises(ConfigError):
        Simulator(NORMAL, noisy).simulations(**options)


def test_priors_that_cannot_be_used():
    with pytest.raises(ConfigError, match="prior"):
        Simulator(3.0, noisy)
    mixed = {"a": torch.distributions.Bernoulli(torch.tensor(0.5)), "b": torch.distributions.Normal(0.0, 1.0)}
    with pytest.raises(SupportError, match="mixed"):
        Simulator(mixed, noisy)
    with pytest.raises(ConfigError, match="simulate"):
        Simulator(NORMAL, None)


def test_what_is_finished_is_stored_before_the_simulator_fails(tmp_path):
    calls = {"count": 0}

    def failing(theta):
        calls["count"] += 1
        if calls["count"] == 3:
            raise RuntimeError("out of luck")
        return noisy(theta)

    simulator = Simulator(PRIOR, failing, batched=True)
    with pytest.raises(ModelError, match="out of luck"):
        simulator.simulations(4000, seed=1, folder=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    again = simulator.simulations(4000, seed=1, folder=tmp_path)
    assert torch.equal(again.x, Simulator(PRIOR, noisy, batched=True).simulations(4000, seed=1).x)
    assert calls["count"] == 5  # the two that were there were not made again


@pytest.mark.parametrize(
    "tensors",
    [
        {"theta": torch.zeros(10, 2), "x": torch.zeros(10, 2)},
        {"theta": torch.zeros(1000, 2), "x": torch.full((1000, 2), math.nan)},
        {"theta": torch.zeros(1000, 2).double(), "x": torch.zeros(1000, 2)},
    ],
)
def test_chunks_that_are_not_what_the_index_says_are_refused(tmp_path, tensors):
    simulator = Simulator(PRIOR, noisy)
    simulator.simulations(2000, folder=tmp_path)
    safetensors.torch.save_file(tensors, tmp_path / "chunk-000001.safetensors")
    with pytest.raises(CheckpointError, match="delete it"):
        simulator.simulations(2000, folder=tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": 1, "identity": null, "sizes": []}'])
def test_indices_that_are_damaged_are_refused(tmp_path, text):
    (tmp_path / "simulations.json").write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        Simulator(PRIOR, noisy).simulations(100, folder=tmp_path)


@pytest.mark.slow
def test_a_worker_that_dies_is_told_in_words():
    simulator = Simulator(PRIOR, lambda theta: os._exit(3), batched=True)
    with pytest.raises(ModelError, match="worker process ended"):
        simulator.simulations(3000, workers=2)


def test_given_simulations_are_checked():
    simulator = Simulator(PRIOR, noisy)
    with pytest.raises(ShapeError, match="the data that belong"):
        simulator.with_simulations(torch.zeros(5, 2))
    with pytest.raises(DataError, match="not a single"):
        simulator.with_simulations(torch.zeros(0, 2), torch.zeros(0, 2))
    with pytest.raises(DataError, match="numbers in a tensor"):
        simulator.with_observations(None)
    with pytest.raises(DataError, match="3 of 5 parameters lie"):
        simulator.unconstrained(torch.tensor([[5.0, 0.5], [0.5, 0.5], [0.5, -7.0], [0.2, 0.9], [2.0, 2.0]]))


def test_complex_data_are_refused_and_mixtures_have_the_support_of_their_components():
    with pytest.raises(ShapeError, match="complex"):
        Simulator(PRIOR, lambda theta: torch.complex(theta, theta)).simulations(10)
    parts = Independent(Normal(torch.zeros(3, 2), 1.0), 1)
    mixed = Simulator(
        torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(3)), parts), noisy
    )
    assert mixed.dim == 2
    assert mixed.simulations(10).x.shape == (10, 2)
