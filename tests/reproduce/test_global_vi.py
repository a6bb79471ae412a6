"""The reproduction of globally convergent variational inference: known values, and short runs of each part."""

import math

import numpy as np
import pytest
import torch
from scipy.special import i0

from vifamily.numerics.exponential_families import VonMises
from vifamily.reproduce import Options, paper_named
from vifamily.reproduce import _global_vi_clusters as labels
from vifamily.reproduce import _global_vi_rotation as rotation
from vifamily.reproduce import _global_vi_sinusoid as sinusoid
from vifamily.reproduce import _global_vi_toy as toy
from vifamily.reproduce.global_vi import _interval
from vifamily.rng import generator

DOUBLE = torch.float64


def test_the_paper_is_found():
    assert "Globally Convergent" in paper_named("global-vi").title


def test_figures_of_the_toy_are_those_known():
    assert pytest.approx(4.57508, abs=1e-5) == toy.BEST_LENGTH
    exact, best = toy.least_losses()
    assert (exact, best) == (pytest.approx(0.72579, abs=1e-5), pytest.approx(0.72768, abs=1e-5))
    # late in the flow the gap closes at rate A'(kappa) / 8 = 0.003538
    late = toy.BEST_LENGTH - toy.infinite_width(torch.tensor([2000.0, 2500.0], dtype=DOUBLE))
    assert float((late[0] / late[1]).log() / 500) == pytest.approx(0.003538, rel=2e-3)


def test_a_short_sweep_of_the_toy():
    swept, _, held = toy.sweep([32, 256], [0], time=60.0)
    assert held
    assert all(swept.slopes[name] < -0.5 for name in ("drift of the kernel", "network from linearised"))
    assert "network from infinite width" not in toy.sweep([8, 16], [0], time=5.0, readout="normal")[0].values


def test_divergences_on_the_grid_are_those_of_von_mises_laws(seed):
    law = VonMises()
    first, second = torch.randn(2, 5, 2, generator=generator(seed, "eta"), dtype=DOUBLE) * 3
    posterior = rotation._Posterior(torch.zeros(5, rotation.SENSORS, dtype=DOUBLE), 360)
    posterior.log_joint = posterior.log_q(first)

    def known(p, q):
        return ((p - q) * law.mean(p)).sum(-1) - law.log_partition(p) + law.log_partition(q)

    torch.testing.assert_close(posterior.forward_kl(second), known(first, second), rtol=0, atol=1e-10)
    torch.testing.assert_close(posterior.reverse_kl(second), known(second, first), rtol=0, atol=1e-10)
    torch.testing.assert_close(posterior.mean, law.mean(first), rtol=0, atol=1e-10)


def test_posteriors_of_the_pattern_find_the_angle(seed):
    theta, x = rotation._simulate(200, generator(seed, "x"))
    mean = rotation._Posterior(x, 360).mean
    off = torch.atan2(mean[:, 1], mean[:, 0]) - theta
    assert float((torch.atan2(off.sin(), off.cos()).abs() > math.radians(30)).double().mean()) < 0.06


def test_newton_steps_end_where_moments_match(seed):
    _, x = rotation._simulate(4, generator(seed, "x"))
    posterior = rotation._Posterior(x, 120)
    value, slope = rotation._newton(posterior.forward_kl, torch.full((1, 4, 2), 0.1, dtype=DOUBLE))
    matched = VonMises().from_mean(posterior.mean)
    torch.testing.assert_close(value[0], posterior.forward_kl(matched), rtol=0, atol=1e-9)
    assert float(slope.max()) < 1e-6


def test_one_observation_at_a_time_has_one_inclusive_optimum_and_several_exclusive_ones(seed):
    rows = rotation.pointwise(observations=5, steps=150, seed=seed)
    for row in rows:
        if row["divergence"] == "inclusive" and row["length"] <= 5:
            assert row["spread"] < 1e-6 and row["several"] == 0
        if row["divergence"] == "exclusive":
            assert row["gradient"] < 1e-4
    assert any(row["several"] >= 4 for row in rows)


def test_a_short_run_from_twelve_starts(seed):
    found = {
        name: rotation.amortised(name, length=5.0, width=32, steps=300, seed=seed)
        for name in ("inclusive", "exclusive")
    }
    assert found["inclusive"].wrong.shape == (rotation.DIRECTIONS,)
    assert 5 * float(found["inclusive"].forward_kl.max()) < float(found["exclusive"].forward_kl.min())


def test_the_joint_density_of_clusters_is_that_of_its_parts(seed):
    source = generator(seed, "clusters")
    theta, x = labels._simulate(3, source)
    normal = torch.distributions.Normal
    known = normal(0.0, 100.0).log_prob(theta[:, 0])
    known = known + normal(theta[:, :1] + labels._OFFSETS, 0.5).log_prob(theta[:, 1:]).sum(1)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3, 1, 5, dtype=DOUBLE)), normal(theta[:, None, 1:], 0.1)
    )
    known = known + mixture.log_prob(x).sum(1)
    off = labels._log_joint(theta.unsqueeze(0), x)[0] - known
    torch.testing.assert_close(off, off[:1].expand(3), rtol=0, atol=1e-8)  # equal up to one constant


def test_quantiles_are_of_the_sorted_points():
    x = torch.arange(100, dtype=DOUBLE).flip(0).unsqueeze(0)
    assert labels._features(x)[0, :2].tolist() == [0.01, 0.03]  # floors of 1.25 and 3.75, over a hundred


def test_a_short_run_of_label_switching(seed):
    seeds = [seed, seed + 1]
    inclusive = labels.clusters("inclusive", seeds, steps=400, width=32)
    assert inclusive.ordered.shape == (2,) and bool(inclusive.shift.isfinite().all())
    bound = labels.clusters("elbo", seeds, steps=100, width=32)
    assert float(bound.distance.min()) > float(inclusive.distance.min())


def test_the_weighted_bound_is_the_tighter(seed):
    source = [generator(seed, "noise") for _ in range(2)]
    theta, x = labels._simulate(6, generator(seed, "clusters"))
    plain, weighted = (labels._bound(name, theta, x, 10, g) for name, g in zip(("elbo", "iwae"), source, strict=True))
    assert bool((weighted <= plain).all())  # of the same draws, by Jensen's inequality


def test_the_exact_posterior_of_the_sinusoid():
    x = torch.tensor([0.0, 1.0, -1.5])
    grid, log_density = sinusoid.exact_log_density(x)
    torch.testing.assert_close(log_density.exp().mean(0) * 2 * np.pi, torch.ones(3, dtype=torch.float64))
    # the normaliser at x = 0 is exp(-1/4) I_0(1/4) times the length, from sin(2z)^2 = (1 - cos 4z) / 2
    at_zero = -0.5 * np.sin(2 * grid[0].item()) ** 2 - np.log(2 * np.pi * np.exp(-0.25) * i0(0.25))
    assert log_density[0, 0].item() == pytest.approx(at_zero, abs=1e-9)
    # the same at z and at a half turn from it, and largest where sin(2z) is nearest to x
    torch.testing.assert_close(log_density[:200], log_density[200:])
    assert grid[log_density[:200, 1].argmax()].item() == pytest.approx(np.pi / 4, abs=0.01)


def test_splines_get_near_the_posterior_of_the_sinusoid():
    found = sinusoid.ends(sinusoid.FAMILIES["B-splines"], [0, 1], steps=400)
    # 0.21 nats are those of the prior in place of the posterior
    assert float(found.divergence.max()) < 0.02 and found.steps.tolist() == [400, 400]
    assert found.spread == float((found.divergence[0] - found.divergence[1]).abs())


def test_the_interval_of_a_proportion():
    assert _interval(20, 20) == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    assert _interval(0, 20) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    low, high = _interval(5, 20)
    assert np.allclose([low, high], [0.0866, 0.4910], atol=1e-4)  # Clopper and Pearson's


@pytest.mark.slow
def test_every_claim_holds_in_a_quick_run():
    found = paper_named("global-vi").run(Options(quick=True, say=lambda _: None))
    assert not found.failed, str(found.plain_rows())
    assert len(found.figures) == 4
