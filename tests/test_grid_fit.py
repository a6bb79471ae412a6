"""Fits of several seeds side by side are the fits of the seeds: same draws, same steps, same ends."""

import functools
import math

import pytest
import torch

from vifamily.errors import ConfigError, ConvergenceWarning, NonFiniteLossError
from vifamily.fit import fit as fit_with
from vifamily.grid_fit import SeedGrid, fit_seeds, why_one_by_one
from vifamily.models import Density, LikelihoodModel
from vifamily.plan import plan as plan_with

DOUBLE = torch.float64
fit = functools.partial(fit_with, solver="adam")
plan = functools.partial(plan_with, solver="adam")
FAMILIES = ("mean_field", "full_rank", "low_rank(rank=1)", "mixture(components=2)")


def normal(z):
    return -0.5 * (z / torch.tensor([1.0, 3.0], dtype=z.dtype)).square().sum(-1) + 0.3 * torch.sin(z[..., 0])


def same(together, alone):
    """Whether two posteriors agree: their parameters to rounding, all else exactly."""
    left, right = together.record, alone.record
    assert (left.seed, left.steps, left.stop_reason, left.best_restart) == (
        right.seed, right.steps, right.stop_reason, right.best_restart,
    )  # fmt: skip
    for (name, a), (_, b) in zip(together.family.state_dict().items(), alone.family.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(
        torch.as_tensor(left.trace["loss"]), torch.as_tensor(right.trace["loss"]), rtol=1e-8, atol=1e-8
    )
    assert left.restart_losses == pytest.approx(right.restart_losses, rel=1e-8, nan_ok=True)
    for name in ("mcse_iterates", "rhat_iterates", "gradient_snr"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None and b is None) or a == pytest.approx(b, rel=1e-6), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_are_those_of_each_seed(family):
    model = Density(normal, dim=2)
    for seed, posterior in zip((4, 0, 9), fit_seeds(model, family, seeds=(4, 0, 9), steps=23, draws=3), strict=True):
        same(posterior, fit(model, family, seed=seed, steps=23, draws=3))


@pytest.mark.parametrize("objective", ["elbo(estimator=score)", "elbo(estimator=entropy)", "iwae", "renyi(alpha=0.5)"])
def test_objectives(objective):
    model = Density(normal, dim=2)
    for seed, posterior in enumerate(fit_seeds(model, "mean_field", objective, seeds=(0, 1), steps=15)):
        same(posterior, fit(model, "mean_field", objective, seed=seed, steps=15))


def test_each_ends_at_its_own_time_as_it_would_alone():
    seeds = (0, 2, 3)
    posteriors = fit_seeds("eight_schools", "mean_field", seeds=seeds)
    assert len({p.record.steps for p in posteriors}) == 3
    for seed, posterior in zip(seeds, posteriors, strict=True):
        same(posterior, fit("eight_schools", "mean_field", seed=seed))
        assert posterior.record.converged


def test_the_step_limit_ends_all_in_the_middle_of_a_stage():
    with_limit = fit_seeds("banana", "full_rank", seeds=(0, 1), steps=333)
    for seed, posterior in enumerate(with_limit):
        same(posterior, fit("banana", "full_rank", seed=seed, steps=333))
        assert posterior.record.stop_reason == "max_steps"


def test_one_seed_is_a_fit():
    same(fit_seeds("banana", "mean_field", seeds=[6], steps=10)[0], fit("banana", "mean_field", seed=6, steps=10))


def walled(z):
    """Not a number where the first coordinate is large."""
    return torch.where(z[..., 0] > 3.0, torch.nan, -0.5 * z.square().sum(-1))


def test_a_row_that_is_not_finite_leaves_the_others_as_they_are():
    model, seeds, options = Density(walled, dim=2), range(6), {"steps": 120, "draws": 4}
    grid = SeedGrid(plan(model, "mean_field", draws=4), seeds, steps=120)
    grid.advance()
    failed = []
    for i, seed in enumerate(seeds):
        try:
            alone = fit(model, "mean_field", seed=seed, **options)
        except NonFiniteLossError as error:
            failed.append(seed)
            with pytest.raises(NonFiniteLossError) as caught:
                grid.finish(i)
            assert (caught.value.step, caught.value.term) == (error.step, error.term)
            same(caught.value.posterior, error.posterior)
        else:
            same(grid.finish(i), alone)
    assert 0 < len(failed) < len(seeds)


def test_the_warning_of_an_unfinished_fit(monkeypatch):
    monkeypatch.setattr("vifamily.grid_fit._MOST_STEPS", 12)
    grid = SeedGrid(plan("banana", "mean_field"), [0, 1])
    grid.advance()
    with pytest.warns(ConvergenceWarning, match="after 12 steps"):
        grid.finish(1)


def test_time_is_shared():
    grid = SeedGrid(plan("banana", "mean_field"), range(3), steps=40)
    before = sum(grid.seconds)
    grid.advance()
    posteriors = [grid.finish(i) for i in range(3)]
    assert sum(grid.seconds) > before > 0
    assert all(p.record.seconds >= s for p, s in zip(posteriors, grid.seconds, strict=True))
    assert any("side by side with 2 more seeds" in note for note in posteriors[0].record.notes)


def conjugate(**options):
    def log_likelihood(theta, y):
        return -0.5 * (y - theta["mu"].unsqueeze(-1)) ** 2

    data = torch.linspace(-1, 3, 12, dtype=DOUBLE)
    return LikelihoodModel((0.0, 1.0), log_likelihood, data=data, parameters={"mu": "real"}, **options)


def test_the_answer_is_right():
    exact_sd = 13**-0.5
    for posterior in fit_seeds(conjugate(), "mean_field", seeds=range(3)):
        mean, covariance = posterior.family.moments()
        assert float(covariance.squeeze().sqrt()) == pytest.approx(exact_sd, rel=0.02)
        assert float(mean) == pytest.approx(12 * exact_sd**2, abs=0.02 * exact_sd)


REASONS = {
    "solver": (lambda: plan("banana", "mean_field", solver="lbfgs"), "not adam"),
    "minibatches": (lambda: plan(conjugate(), "mean_field", batch_size=4), "minibatches"),
    "family": (lambda: plan("banana", "flow(kind=bpf)"), "cannot be vectorised"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_run_side_by_side_says_why(name):
    make, expected = REASONS[name]
    planned = make()
    assert expected in why_one_by_one(planned)
    with pytest.raises(ConfigError, match="Call fit for each seed"):
        SeedGrid(planned, [0, 1])


def test_no_seed():
    with pytest.raises(ConfigError, match="at least one seed"):
        fit_seeds("banana", "mean_field", seeds=[])
    assert math.isfinite(fit_seeds("banana", "mean_field", seeds=[1], steps=1)[0].record.seconds)
