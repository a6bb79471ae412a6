"""Amortised fits: a conjugate posterior recovered, stored and fresh simulations, stopping, files, refusals."""

import math

import pytest
import torch

import vifamily as vf
from vifamily.errors import CheckpointError, ConfigError, DataError, IncompatibleError, NotAvailableError, ShapeError
from vifamily.posterior.amortised import AmortisedPosterior
from vifamily.rng import scoped

VARIANCE = 0.1


def gaussian_linear(dim=2, **options):
    """``theta ~ N(0, 0.1 I)``, ``x ~ N(theta, 0.1 I)``: the posterior is ``N(x / 2, 0.05 I)``."""
    prior = torch.distributions.MultivariateNormal(torch.zeros(dim), VARIANCE * torch.eye(dim))
    return vf.models.Simulator(prior, lambda t: t + math.sqrt(VARIANCE) * torch.randn_like(t), **options)


@pytest.fixture(scope="module")
def fitted():
    return vf.fit(gaussian_linear(), "full_rank", "inclusive_kl(simulations=6000)", encoder="vector", seed=0)


def test_the_conjugate_posterior_is_recovered(fitted):
    assert fitted.record.converged and fitted.record.non_finite == 0
    for x in torch.tensor([[0.3, -0.2], [-0.5, 0.4]]):
        draws = fitted(x).draws(20_000)
        sd = math.sqrt(VARIANCE / 2)
        assert float((draws.mean(0) - x / 2).abs().max()) < 0.1 * sd
        assert float((draws.T.cov() / sd**2 - torch.eye(2)).abs().max()) < 0.1


def test_the_held_out_loss_is_that_of_the_exact_posterior(fitted):
    entropy = 2 * 0.5 * math.log(2 * math.pi * math.e * VARIANCE / 2)
    # 600 held-out pairs: minus a log density of two normal coordinates has variance one
    assert abs(fitted.record.restart_losses[0] - entropy) < 5 / math.sqrt(600) + 0.02


def test_a_flow_recovers_it_too():
    posterior = vf.fit(
        gaussian_linear(), "flow(kind=maf, transforms=1, hidden=[16])", "inclusive_kl(simulations=3000)", seed=1
    )
    draws = posterior(torch.tensor([0.3, -0.2])).draws(5000)
    sd = math.sqrt(VARIANCE / 2)
    assert float((draws.mean(0) - torch.tensor([0.15, -0.1])).abs().max()) < 0.25 * sd
    assert float((draws.std(0) / sd - 1).abs().max()) < 0.2


def test_the_posterior_of_an_observation_is_an_ordinary_one(fitted, tmp_path):
    x = torch.tensor([0.3, -0.2])
    posterior = fitted(x)
    assert posterior.sample(10)["theta"].shape == (10, 2)
    assert len(posterior.summary(num_draws=200).to_dict()) > 0
    z = posterior.draws(7)
    torch.testing.assert_close(posterior.log_prob(z), fitted.log_prob(z.unsqueeze(1), x[None])[:, 0])
    assert torch.equal(posterior.draws(5, seed=3), fitted(x[None]).draws(5, seed=3))
    assert posterior.posterior_predictive(6)["x"].shape == (6, 2)
    assert posterior.to_arviz(num_draws=50).posterior["theta"].shape[-1] == 2
    posterior.save(tmp_path)
    again = vf.load(tmp_path, family=fitted(torch.zeros(2)).family)
    assert torch.equal(again.draws(9), posterior.draws(9))
    with pytest.raises(NotAvailableError):
        posterior.log_joint(z)


def test_many_observations_at_once(fitted):
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    draws = fitted.draws(x, 4000)
    assert draws.shape == (4000, 5, 2)
    assert float((draws.mean(0) - x / 2).abs().max()) < 0.1
    assert fitted.sample(x, 3)["theta"].shape == (3, 5, 2)
    with pytest.raises(ShapeError):
        fitted.draws(torch.zeros(2), 3)


def test_it_is_importance_weighed_where_there_is_a_likelihood():
    def log_likelihood(theta, x):
        return torch.distributions.Normal(theta, math.sqrt(VARIANCE)).log_prob(x).sum(-1)

    simulator = gaussian_linear(log_likelihood=log_likelihood)
    posterior = vf.fit(simulator, "full_rank", "inclusive_kl(simulations=3000)", encoder="vector", seed=0)
    here = posterior(torch.tensor([0.3, -0.2]))
    z, log_p, log_q = here.weighted(2000)
    # evidence N(x; 0, 0.2 I)
    exact = torch.distributions.Normal(0.0, math.sqrt(2 * VARIANCE)).log_prob(torch.tensor([0.3, -0.2])).sum()
    assert float((log_p - log_q).logsumexp(0) - math.log(2000)) == pytest.approx(float(exact), abs=0.05)
    assert here.diagnose().k_hat < 0.5


def test_fresh_simulations():
    posterior = vf.fit(
        gaussian_linear(), "mean_field", "inclusive_kl(simulations=None)", encoder="vector", steps=1500, batch_size=128,
        seed=0,
    )  # fmt: skip
    assert posterior.record.steps == 1500 and posterior.record.stop_reason == "max_steps"
    assert (
        float((posterior(torch.tensor([0.4, 0.0])).mean(num_draws=4000) - torch.tensor([0.2, 0.0])).abs().max()) < 0.05
    )


def test_the_same_seed_gives_the_same_fit():
    options = {"family": "mean_field", "objective": "inclusive_kl(simulations=500)", "steps": 40}
    simulator, x = gaussian_linear(), torch.zeros(2)
    one, two, other = (vf.fit(simulator, seed=s, **options)(x).draws(3, seed=0) for s in (4, 4, 5))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_restarts_callbacks_and_limits():
    seen = []
    posterior = vf.fit(
        gaussian_linear(), "mean_field", "inclusive_kl(simulations=500)", restarts=2, steps=60,
        callbacks=lambda report: seen.append(report.step) or report.step >= 30,
    )  # fmt: skip
    assert posterior.record.stop_reason == "callback" and seen[-1] >= 30
    posterior = vf.fit(gaussian_linear(), "mean_field", "inclusive_kl(simulations=500)", restarts=2, steps=30)
    assert len(posterior.record.restart_losses) == 2
    assert posterior.record.restart_losses[posterior.record.best_restart] == min(posterior.record.restart_losses)
    timed = vf.fit(gaussian_linear(), "mean_field", "inclusive_kl(simulations=500)", time_limit=1e-6)
    assert timed.record.stop_reason == "time_limit"


def test_it_goes_on_from_another(fitted):
    further = vf.fit(gaussian_linear(), "full_rank", "inclusive_kl(simulations=1000)", init=fitted, steps=25, seed=9)
    assert further.record.restart_losses[0] < fitted.record.restart_losses[0] + 0.3


def test_simulations_of_the_users_own_and_non_finite_ones():
    simulator = gaussian_linear()
    pairs = simulator.simulations(600, seed=1)
    x = pairs.x.clone()
    x[:50] = math.nan
    posterior = vf.fit(simulator.with_simulations(pairs.theta, x), "mean_field", "inclusive_kl", steps=30)
    assert posterior.record.non_finite == 50
    assert any("50 simulations were not finite" in note for note in posterior.record.notes)


def test_files(fitted, tmp_path):
    fitted.save(tmp_path)
    again = vf.load(tmp_path)
    assert isinstance(again, AmortisedPosterior) and again.record.steps == fitted.record.steps
    x = torch.tensor([0.1, 0.2])
    assert torch.equal(again(x).draws(10), fitted(x).draws(10))
    with pytest.raises(NotAvailableError, match="simulator"):
        again.sbc(20)
    with pytest.raises(NotAvailableError, match="amortised"):
        again(x).posterior_predictive(5)
    assert vf.load(tmp_path, model=gaussian_linear()).simulator is not None
    with pytest.raises(CheckpointError, match="parameters"):
        vf.load(tmp_path, model=gaussian_linear(3))


def test_files_of_an_encoder_of_the_users_own(tmp_path):
    with scoped(0):
        net, same = torch.nn.Linear(2, 4), torch.nn.Linear(2, 4)
    posterior = vf.fit(gaussian_linear(), "mean_field", "inclusive_kl(simulations=500)", encoder=net, steps=20)
    posterior.save(tmp_path)
    with pytest.raises(CheckpointError, match="encoder"):
        vf.load(tmp_path)
    again = vf.load(tmp_path, encoder=same)
    assert torch.equal(again(torch.zeros(2)).draws(5), posterior(torch.zeros(2)).draws(5))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"objective": "iwae"}, IncompatibleError, "inclusive_kl"),
        ({"family": "ensemble"}, IncompatibleError, "full_rank"),
        ({"solver": "lbfgs"}, ConfigError, "adam"),
        ({"draws": 4}, ConfigError, "batch_size"),
        ({"init": "laplace"}, ConfigError, "init"),
        ({"compile": True}, ConfigError, "compile"),
        ({"encoder": "vecotr"}, ConfigError, "vector"),
        ({"encoder": 3}, ConfigError, "module"),
        ({"objective": "inclusive_kl(holdout=1.5)"}, ConfigError, "holdout"),
    ],
)
def test_what_cannot_be_is_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        vf.fit(gaussian_linear(), **{"family": "mean_field", "objective": "inclusive_kl(simulations=100)", **arguments})


def test_the_plan_is_shown(capsys):
    vf.fit(gaussian_linear(), objective="inclusive_kl(simulations=100)", steps=2, show_plan=True)
    shown = capsys.readouterr().out
    assert "simulator" in shown and "flow(direction=density)" in shown and "joint simulation" in shown


def test_parameters_stay_in_their_supports():
    prior = {"rate": torch.distributions.Gamma(2.0, 2.0), "share": torch.distributions.Uniform(0.0, 1.0)}
    simulator = vf.models.Simulator(
        prior, lambda t: torch.poisson(20 * (t["rate"] * t["share"])[:, None].expand(-1, 4))
    )
    posterior = vf.fit(simulator, "full_rank", "inclusive_kl(simulations=800)", steps=60)
    theta = posterior(torch.tensor([3.0, 5.0, 4.0, 4.0])).sample(500)
    assert bool((theta["rate"] > 0).all()) and bool(((theta["share"] > 0) & (theta["share"] < 1)).all())


def test_a_posterior_that_ends_at_a_bound_keeps_its_sharp_end():
    """``theta ~ U(0, 1)``, ``x ~ N(theta, 0.1)``: the posterior is the normal law cut to the unit interval."""
    prior = torch.distributions.Uniform(torch.zeros(1), torch.ones(1))
    simulator = vf.models.Simulator(prior, lambda t: t + 0.1 * torch.randn_like(t))
    posterior = vf.fit(simulator, "flow(transforms=1, hidden=[32])", "inclusive_kl(simulations=10000)", seed=2)
    assert "standardise=regression" in posterior.record.family
    grid = torch.linspace(0.0005, 0.9995, 1000)
    z = torch.logit(grid)
    for x in (0.02, 0.5, 0.97):
        law = torch.distributions.Normal(x, 0.1)
        exact = law.log_prob(grid).exp() / (law.cdf(torch.tensor(1.0)) - law.cdf(torch.tensor(0.0)))
        found = (posterior(torch.tensor([x])).log_prob(z[:, None]) - (grid * (1 - grid)).log()).exp()
        # total variation: the density does not fall to zero at the bound, where it is nearly largest for the first x
        assert float((found - exact).abs().mean()) / 2 < 0.06


@pytest.mark.parametrize("family", ["flow(transforms=1, hidden=[8])", "full_rank"])
def test_one_number_of_one_parameter(family):
    """A prior over one number and data of one number, without axes of their own."""
    simulator = vf.models.Simulator(torch.distributions.Uniform(0.0, 1.0), lambda t: t + 0.1 * torch.randn_like(t))
    posterior = vf.fit(simulator, family, "inclusive_kl(simulations=300)", steps=40, seed=0)
    for x in (0.5, torch.tensor(0.5), torch.tensor([0.5])):
        assert posterior(x).draws(3).shape == (3, 1)
    assert posterior.draws(torch.zeros(4), 5).shape == (5, 4, 1)


def test_a_simulator_without_noise_does_not_start_at_a_point():
    simulator = vf.models.Simulator(torch.distributions.Uniform(torch.zeros(2), torch.ones(2)), lambda t: 2 * t)
    posterior = vf.fit(simulator, "flow(transforms=1, hidden=[8])", "inclusive_kl(simulations=300)", steps=40, seed=0)
    # the density of the parameters has no bound here; the width of the start is a thousandth of the prior's
    assert posterior.record.restart_losses[0] < 0
    assert (
        float((posterior(torch.tensor([1.0, 0.4])).sample(200)["theta"] - torch.tensor([0.5, 0.2])).abs().max()) < 0.05
    )


@pytest.mark.parametrize("x", ["abc", [[1.0], [2.0, 3.0]], None, torch.zeros(2, dtype=torch.complex64)])
def test_observations_that_are_no_numbers_are_refused(fitted, x):
    with pytest.raises(DataError, match="must be"):
        fitted(x)
    with pytest.raises(DataError, match="must be"):
        gaussian_linear().with_observations(x)


@pytest.mark.parametrize("encoder", [None, "vector"])
def test_data_of_one_number_without_an_axis_are_those_with_one(encoder):
    prior = torch.distributions.Normal(torch.zeros(1), 1.0)
    plain = vf.models.Simulator(prior, lambda theta: theta[:, 0] + torch.randn(len(theta)))
    beside = vf.models.Simulator(prior, lambda theta: theta + torch.randn(len(theta)).unsqueeze(-1))
    one, other = (
        vf.fit(simulator, "natural", "inclusive_kl(simulations=500)", encoder=encoder, steps=60, seed=0)
        for simulator in (plain, beside)
    )
    x = torch.linspace(-2, 2, 5)
    assert torch.equal(one.draws(x, 20), other.draws(x.unsqueeze(-1), 20))
    assert torch.equal(one(x[0]).draws(20), other(x[:1]).draws(20))
    assert one.local_c2st(x[0], 60, num_draws=30, num_null=3).p_value > 0


def test_many_observations_are_checked_as_one_is():
    simulator = vf.models.Simulator(
        torch.distributions.Normal(torch.zeros(2), 1.0), lambda theta: theta + torch.randn_like(theta)
    )
    found = vf.fit(simulator, "natural", "inclusive_kl(simulations=100)", steps=3, seed=0)
    gone = torch.tensor([[math.nan, 0.0], [0.0, 0.0]])
    for call in (found.draws, found.sample, lambda x: found.log_prob(torch.zeros(2, 2), x)):
        with pytest.raises(DataError, match="1 of 2 observations"):
            call(gone)
    for value in ("text", None):
        with pytest.raises(DataError, match="numbers in a tensor"):
            found(value)
    with pytest.raises(ShapeError, match="one for each of the data"):
        found.log_prob(torch.zeros(7, 2), torch.zeros(2, 2))
    with pytest.raises(ShapeError, match="shape of one simulation"):
        found.local_c2st(torch.zeros(3), 100)


@pytest.mark.parametrize("batch_size", [0, -1, True, 2.5])
def test_sizes_of_batches_are_checked(batch_size):
    simulator = vf.models.Simulator(torch.distributions.Normal(torch.zeros(2), 1.0), lambda theta: theta)
    with pytest.raises(ConfigError, match="batch_size"):
        vf.fit(simulator, "natural", "inclusive_kl(simulations=100)", batch_size=batch_size, steps=3)


def test_data_without_numbers_are_refused():
    simulator = vf.models.Simulator(
        torch.distributions.Normal(torch.zeros(2), 1.0), lambda theta: torch.zeros(len(theta), 0)
    )
    with pytest.raises(ShapeError, match="holds no numbers"):
        vf.fit(simulator, "natural", "inclusive_kl(simulations=100)", steps=3)


def test_going_on_keeps_the_family(fitted):
    with pytest.raises(ConfigError, match="init is a full_rank .* asked for is mean_field"):
        vf.fit(gaussian_linear(), "mean_field", "inclusive_kl(simulations=100)", init=fitted, steps=3)
