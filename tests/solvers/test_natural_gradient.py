"""Natural gradients: exact on Gaussians in one step, unbiased on minibatches, at the optimum of the ELBO elsewhere."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError
from vifamily.models import Density, LikelihoodModel
from vifamily.objectives import Elbo
from vifamily.rng import NoiseStream, draw_noise
from vifamily.solvers import NaturalGradient, Task
from vifamily.solvers.natural_gradient import derivatives, positive
from vifamily.testing import targets
from vifamily.types import LatentSpec

DOUBLE = torch.float64


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def logistic(rows=40, dim=3):
    x = random(rows, dim, seed=1)
    y = (random(rows, seed=2) < x @ torch.tensor([1.0, -1.0, 0.5], dtype=DOUBLE)).double()

    def log_likelihood(z, data):
        inputs, outcomes = data
        return -torch.nn.functional.softplus((1 - 2 * outcomes) * (z @ inputs.mT))

    return LikelihoodModel((0.0, 2.0), log_likelihood, data=(x, y), dim=dim)


def begun(model, solver, *, batch_size=None, family="full_rank", draws=4, seed=0, noise=None):
    built = registry.build("families", family).build(LatentSpec(model.dim), generator=torch.Generator().manual_seed(0))
    built.start_at(0.3 * random(model.dim, seed=3), 0.7 * torch.ones(model.dim, dtype=DOUBLE))
    stream = NoiseStream(seed, built.noise_spec, draws=draws)
    fixed = draw_noise(built.noise_spec, (16,), torch.Generator().manual_seed(1))
    batches = model.batches(batch_size, seed=seed)
    at = stream.at if noise is None else lambda step: noise
    return solver.start(
        Task(Elbo("entropy").loss, model, built, at, batches.at, fixed, 1, 0.05, None, objective=Elbo())
    )


def moments(posterior):
    return tuple(part.detach() for part in posterior.family.moments())


@pytest.mark.parametrize("draws", [1, 4])
def test_one_whole_step_on_a_gaussian_is_exact(draws):
    target = targets.linear_regression()
    run = begun(target.model, NaturalGradient(step=1.0), draws=draws)
    run.task.family.start_at(target.mean + 0.8, torch.ones(2, dtype=DOUBLE))
    run = NaturalGradient(step=1.0).start(run.task)
    run.step()
    run.output()
    mean, covariance = (part.detach() for part in run.task.family.moments())
    assert torch.allclose(mean, target.mean, atol=1e-8)
    assert torch.allclose(covariance, target.covariance, atol=1e-8)


def test_one_whole_step_on_minibatches_of_a_gaussian_is_exact_with_an_anchor():
    target = targets.linear_regression()
    run = begun(target.model, NaturalGradient(step=1.0), batch_size=3)
    run.step()
    run.output()
    mean, covariance = (part.detach() for part in run.task.family.moments())
    assert torch.allclose(mean, target.mean, atol=1e-8)
    assert torch.allclose(covariance, target.covariance, atol=1e-8)


def test_hessians_are_exact():
    model, points = logistic(), random(1, 4, 3, seed=5)
    for rows in (1, 2_000_000):  # the second evaluates a few points at a time
        value, gradient, hessian = derivatives(model.log_joint, points, rows)
        for i in range(4):
            at = points[0, i]
            single = lambda z: model.log_joint(z[None])[0]  # noqa: E731
            assert float(value[0, i]) == pytest.approx(float(single(at)))
            assert torch.allclose(gradient[0, i], torch.autograd.functional.jacobian(single, at), atol=1e-12)
            assert torch.allclose(hessian[0, i], torch.autograd.functional.hessian(single, at), atol=1e-12)


def test_a_log_density_without_curvature_has_zero_hessians():
    _, gradient, hessian = derivatives(lambda z: 2 * z.sum(-1), random(1, 2, 3, seed=0))
    assert bool((gradient == 2).all()) and bool((hessian == 0).all())


@pytest.mark.parametrize("anchor", [False, True])
def test_over_an_epoch_the_natural_gradient_is_that_of_all_data(anchor):
    model, noise = logistic(), random(4, 3, seed=9)
    parts = begun(model, NaturalGradient(anchor=anchor), batch_size=8, noise=noise)
    whole = begun(model, NaturalGradient(), noise=noise)
    if anchor:
        parts._set_anchor()
        parts.mean, parts.matrix = parts.mean + 0.2, 1.3 * parts.matrix
        parts.renew()
        whole.mean, whole.matrix, whole.factor = parts.mean, parts.matrix, parts.factor
    found = [parts.natural_gradient(step) for step in range(5)]
    for column, wanted in zip(zip(*found, strict=True), whole.natural_gradient(0), strict=True):
        assert torch.allclose(torch.stack(column).mean(0), wanted, atol=1e-10)


def test_the_anchor_takes_most_of_the_noise_of_minibatches_away():
    model, noise = logistic(400), random(4, 3, seed=9)
    spread = []
    for anchor in (False, True):
        run = begun(model, NaturalGradient(anchor=anchor), batch_size=20, noise=noise)
        # near the posterior, as a start is
        run.mean, run.matrix = torch.tensor([[1.0, -1.0, 0.5]], dtype=DOUBLE), 60 * torch.eye(3, dtype=DOUBLE)[None]
        run.renew()
        if anchor:
            run._set_anchor()
        slopes = torch.stack([run.natural_gradient(step)[1] for step in range(20)])
        spread.append(float(slopes.std(0).max()))
    assert spread[1] < 0.2 * spread[0]


def test_without_second_derivatives_the_estimate_is_unbiased():
    """Stein's identity against exact Hessians, within five standard errors."""
    model = Density(lambda z: -torch.cosh(z).sum(-1), dim=2)
    exact = begun(model, NaturalGradient(), draws=4000)
    _, _, wanted = exact.natural_gradient(0)
    stein = begun(model, NaturalGradient(), draws=20)
    stein.exact = False
    found = torch.stack([stein.natural_gradient(step)[2] for step in range(64 * 8)])
    # the noise of a block of 64 steps is one stream: blocks are what is independent
    blocks = found.reshape(8, 64, 1, 2, 2).mean(1)
    error = (blocks.var(0) / 8).sqrt()
    assert bool(((blocks.mean(0) - wanted).abs() <= 5 * error + 2e-2).all())


def test_the_expectation_over_minibatches_at_random_is_unbiased():
    """Epochs of many shuffles: the mean over batches within five standard errors of all data, draws included."""
    model = logistic()
    whole = begun(model, NaturalGradient(), draws=2000).natural_gradient(0)
    run = begun(model, NaturalGradient(anchor=False), batch_size=4, draws=4)
    found = [run.natural_gradient(step) for step in range(640)]
    for column, wanted in zip(zip(*found, strict=True), whole, strict=True):
        blocks = torch.stack(column).reshape(10, 64, *wanted.shape).mean(1)
        error = (blocks.var(0) / 10).sqrt()
        assert bool(((blocks.mean(0) - wanted).abs() <= 5 * error + 1e-2).all())


@pytest.mark.parametrize("family", ["full_rank", "mean_field"])
@pytest.mark.parametrize("batch_size", [None, 100])
def test_it_ends_at_the_optimum_of_the_family(family, batch_size):
    model = logistic(400)
    wanted = vf.fit(model, family, solver="lbfgs", seed=0)
    found = vf.fit(model, family, solver="natural_gradient", batch_size=batch_size, seed=0)
    assert found.record.stop_reason == "converged"
    (mean, covariance), (other, other_covariance) = moments(found), moments(wanted)
    sd, other_sd = covariance.diagonal().sqrt(), other_covariance.diagonal().sqrt()
    assert float(((mean - other) / other_sd).abs().max()) < 0.06
    assert float((sd / other_sd).log().abs().max()) < 0.06


def test_mean_field_on_a_correlated_normal_has_the_conditional_sds():
    target = targets.correlated_normal(0.9)
    found = vf.fit(
        target.model, "mean_field", solver="natural_gradient", init=torch.tensor([2.0, -1.0]).double(), seed=0
    )
    mean, covariance = moments(found)
    assert torch.allclose(covariance.diagonal().sqrt(), torch.full((2,), math.sqrt(0.19), dtype=DOUBLE), rtol=1e-3)
    assert float(mean.abs().max()) < 0.01


def test_the_means_of_mean_field_are_those_of_reverse_kl_where_the_curvature_varies():
    """Steps must not depend on the draws of their own slope: this posterior shows it in its means."""
    wanted = vf.fit("eight_schools", "mean_field", solver="lbfgs", seed=0)
    found = vf.fit("eight_schools", "mean_field", solver="natural_gradient(step=0.1)", steps=1500, seed=0)
    (mean, covariance), (other, other_covariance) = moments(found), moments(wanted)
    sd, other_sd = covariance.diagonal().sqrt(), other_covariance.diagonal().sqrt()
    assert float(((mean - other) / other_sd).abs().max()) < 0.09
    assert float((sd / other_sd).log().abs().max()) < 0.09


def test_precisions_stay_positive_where_the_curvature_is_negative():
    assert bool((positive(torch.linspace(-1e6, 3, 1001, dtype=DOUBLE)) >= 0.25).all())
    step = 1e-6
    slope = (positive(torch.tensor(-0.5 + step, dtype=DOUBLE)) - positive(torch.tensor(-0.5 - step, dtype=DOUBLE))) / (
        2 * step
    )
    assert float(slope) == pytest.approx(1.0, abs=1e-4)
    # between two modes the log density is convex
    found = vf.fit(
        targets.two_normals().model,
        "full_rank",
        solver="natural_gradient(step=0.05)",
        init=torch.zeros(1).double(),
        steps=1000,
        seed=0,
    )
    assert float(moments(found)[1]) == pytest.approx(2.74**2, rel=0.06) or float(moments(found)[1]) == pytest.approx(
        1.02**2, rel=0.06
    )


def test_restarts_side_by_side_equal_single_ones():
    together = vf.fit("banana", "full_rank", solver="natural_gradient", restarts=2, steps=15, seed=0)
    alone = vf.fit("banana", "full_rank", solver="natural_gradient", steps=15, seed=0)
    for a, b in zip(together.restarts[0].moments(), alone.family.moments(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_a_checkpoint_of_a_minibatch_fit_goes_on_bit_for_bit(tmp_path):
    options = {"family": "full_rank", "solver": "natural_gradient", "batch_size": 10, "seed": 0}
    vf.fit(logistic(), **options, steps=45, checkpoint=tmp_path / "kept")
    resumed = vf.fit(logistic(), **options, steps=90, checkpoint=tmp_path / "kept")
    whole = vf.fit(logistic(), **options, steps=90)
    assert torch.equal(resumed.draws(5), whole.draws(5))


def test_what_it_cannot_do_is_refused():
    with pytest.raises(IncompatibleError, match="any variances"):
        vf.plan("eight_schools", "low_rank", solver="natural_gradient")
    with pytest.raises(IncompatibleError, match="not of 'renyi'"):
        vf.plan("banana", "full_rank", "renyi(alpha=0.5)", "natural_gradient")
    with pytest.raises(IncompatibleError, match="local latents"):
        vf.fit(targets.local_normal().model, "mean_field", solver="natural_gradient")
    for bad in ({"step": 2.0}, {"step": 0.0}, {"mcse": -1.0}, {"anchor": 1}):
        with pytest.raises(ConfigError, match="natural_gradient"):
            NaturalGradient(**bad)
