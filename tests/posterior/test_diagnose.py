"""The diagnosis of posteriors with known faults."""

import json
import math

import pytest
import torch

from vifamily import registry
from vifamily.errors import ConfigError
from vifamily.models.density import Density
from vifamily.objectives.elbo import Elbo
from vifamily.posterior import Posterior
from vifamily.types import LatentSpec


def normal_target(dim=2, log_z=0.0):
    return Density(lambda z: log_z - 0.5 * (z**2).sum(-1) - dim / 2 * math.log(2 * math.pi), dim=dim)


def test_a_perfect_fit(exact):
    found = exact.diagnose()
    assert found.k_hat == 0.0
    assert found.elbo.value == pytest.approx(0, abs=1e-10)
    assert found.log_evidence.value == pytest.approx(0, abs=1e-10)
    assert found.importance_ess == pytest.approx(4000)
    assert found.loss.value == pytest.approx(exact.record.trace["loss"][-1])
    assert "Nothing here speaks against" in found.advice
    json.dumps(found.to_dict(), allow_nan=False)
    assert "k-hat" in str(found)


def test_elbo_and_k_hat_of_a_narrow_family(family, record):
    model = normal_target(2, log_z=3.0)
    posterior = Posterior(model, family("mean_field", [0.0, 0.0], [0.5, 0.5]), record(), layout=model.layout)
    found = posterior.diagnose(num_draws=20_000)
    exact = 3.0 - 2 * (-math.log(0.5) + 0.5 * 0.25 - 0.5)
    assert abs(found.elbo.value - exact) < 5 * found.elbo.error
    assert found.k_hat == pytest.approx(0.75, abs=0.3)
    assert abs(found.log_evidence.value - 3) < 0.5


def test_a_mean_field_that_misses_correlation_is_told_of_full_rank(family, record):
    precision = torch.linalg.inv(torch.tensor([[1.0, 0.98], [0.98, 1.0]], dtype=torch.float64))
    model = Density(lambda z: -0.5 * torch.einsum("di,ij,dj->d", z, precision, z), dim=2)
    sd = float(1 / precision[0, 0]) ** 0.5
    posterior = Posterior(model, family("mean_field", [0.0, 0.0], [sd, sd]), record(), layout=model.layout)
    found = posterior.diagnose()
    assert found.k_hat > 0.7
    assert "full_rank" in found.advice


def test_draws_that_break_the_log_joint(family, record):
    model = Density(lambda z: torch.where(z[:, 0] > 1, torch.nan, -0.5 * (z**2).sum(-1)), dim=1)
    found = Posterior(model, family("mean_field", [0.0], [1.0]), record(), layout=model.layout).diagnose()
    assert abs(found.non_finite_draws / 4000 - 0.1587) < 5 * math.sqrt(0.1335 / 4000)
    assert found.elbo is None
    assert "NaN or infinite" in found.advice


def test_draws_outside_the_support(family, record):
    model = Density(lambda z: torch.where(z[:, 0] < 0, -math.inf, -z[:, 0]), dim=1)
    found = Posterior(model, family("mean_field", [1.0], [0.5]), record(), layout=model.layout).diagnose()
    assert found.zero_draws > 0
    assert found.elbo.value == -math.inf
    assert "supports" in found.advice
    assert found.to_dict()["elbo"]["value"] == "-inf"


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_an_implicit_family_is_tested_by_its_score(shift, record, named):
    latent = LatentSpec(2)
    family = registry.build("families", "implicit").build(latent, generator=torch.Generator().manual_seed(0))
    z = family.sample(20_000, generator=torch.Generator().manual_seed(1))
    mean, factor = z.mean(0), torch.linalg.cholesky(z.T.cov())

    def log_prob(x):  # the moments of the sampler's own draws, moved
        return -0.5 * torch.linalg.solve_triangular(factor, (x - mean - shift * z.std(0)).T, upper=False).square().sum(
            0
        )

    model = Density(log_prob, dim=2)
    found = Posterior(model, family, record(family="implicit"), layout=model.layout).diagnose()
    assert found.k_hat is None
    assert "implicit family (no density)" in found.k_hat_note
    assert "unavailable: implicit family (no density)" in " ".join(str(found).split())
    if shift:
        assert found.stein.p_value < 0.01
        assert "Stein" in found.advice


def test_a_finite_ensemble_has_no_density(record):
    model = normal_target()
    family = registry.build("families", "ensemble(size=4)").build(LatentSpec(2), generator=torch.Generator())
    with torch.no_grad():
        family.logits.copy_(torch.tensor([3.0, 0, 0, 0]))
    posterior = Posterior(model, family, record(family="ensemble(size=4)"), layout=model.layout)
    assert "finite ensemble" in posterior.diagnose().k_hat_note
    assert posterior.diagnose().stein is None
    # draws follow the members' weights
    heavy = family(torch.zeros(1, *family.noise_spec.shape, dtype=torch.float64)).z[0]
    share = float((posterior.draws(4000) == heavy).all(-1).double().mean())
    exact = math.exp(3) / (math.exp(3) + 3)
    assert abs(share - exact) < 5 * math.sqrt(exact * (1 - exact) / 4000)


def test_restarts_that_agree_and_not(family, record):
    model = normal_target()
    same = [family("mean_field", [0.0, 0.0], [1.0, 1.0]) for _ in range(3)]
    posterior = Posterior(model, same[0], record(num_restarts=3), layout=model.layout, restarts=same)
    assert posterior.diagnose().restart_rhat < 1.02
    other = [*same, family("mean_field", [0.0, 3.0], [1.0, 1.0])]
    posterior = Posterior(model, same[0], record(num_restarts=4), layout=model.layout, restarts=other)
    found = posterior.diagnose()
    assert found.restart_rhat > 1.05
    assert found.restart_worst == "z[1]"
    assert "disagree" in found.advice


def test_a_blind_objective_is_named(exact):
    class Blind(Elbo):
        blind_to_mode_weights = True

    posterior = Posterior(exact.model, exact.family, exact.record, layout=exact.layout, objective=Blind())
    assert "does not see the relative weights" in posterior.diagnose().advice


def test_fewest_draws(exact):
    assert exact.diagnose(num_draws=25).k_hat_threshold == pytest.approx(1 - 1 / math.log10(25))
    for number in (24, 0, True, 30.0):
        with pytest.raises(ConfigError, match="num_draws"):
            exact.diagnose(num_draws=number)
