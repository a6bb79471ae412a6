"""Where a fit begins: at approximations, the prior, a given point, or another posterior."""

import numpy as np
import pytest
import torch

from vifamily import registry
from vifamily.errors import ConfigError, NotAvailableError, ShapeError, SupportError
from vifamily.families._adapters import as_entry
from vifamily.fit import fit
from vifamily.models import Density, LikelihoodModel
from vifamily.plan import describe
from vifamily.rng import generator
from vifamily.start import initialise
from vifamily.types import LatentSpec

DOUBLE = torch.float64
COVARIANCE = torch.tensor([[4.0, 1.5], [1.5, 1.0]], dtype=DOUBLE)
PRECISION = torch.linalg.inv(COVARIANCE)
MEAN = torch.tensor([3.0, -2.0], dtype=DOUBLE)


def log_prob(z):
    return -0.5 * (((z - MEAN) @ PRECISION) * (z - MEAN)).sum(-1)


def gaussian(**options):
    return Density(log_prob, dim=2, **options)


def begun(model, family="full_rank", init="auto", *, seed=0, restart=0, minibatches=False):
    entry = as_entry(family)
    latent = LatentSpec(model.dim, model.space, model.num_categories)
    built = entry.build(latent, generator=generator(seed, "family", restart))
    built.spec = describe(entry)
    how = initialise(built, entry, model, init, seed=seed, restart=restart, minibatches=minibatches)
    return built, how


def moments(family):
    mean, covariance = family.moments()
    return mean.detach(), covariance.detach()


@pytest.mark.parametrize("init", ["auto", "laplace"])
def test_a_gaussian_is_found_before_the_first_step(init):
    family, how = begun(gaussian(), init=init)
    mean, covariance = moments(family)
    assert how.startswith("at a Gaussian approximation")
    assert torch.allclose(mean, MEAN, atol=1e-4)
    assert torch.allclose(covariance, COVARIANCE, atol=1e-4)


def test_mean_field_starts_with_conditional_sds():
    _, covariance = moments(begun(gaussian(), "mean_field", "laplace")[0])
    assert torch.allclose(covariance, torch.diag(1 / PRECISION.diagonal()), atol=1e-4)


def test_the_laplace_approximation_is_refused_where_there_is_none():
    slope = Density(lambda z: z.sum(-1), dim=2)
    with pytest.raises(NotAvailableError, match="does not exist here.*Use init='auto'"):
        begun(slope, init="laplace")


def test_a_density_without_any_finite_approximation_starts_at_a_point():
    family, how = begun(Density(lambda z: z.sum(-1) * torch.nan, dim=2))
    assert "no Gaussian approximation was finite" in how
    assert bool(torch.isfinite(moments(family)[0]).all())


def test_the_prior_gives_centre_and_spread():
    def sample_prior(n, generator):
        unit = torch.randn(n, 2, generator=generator, dtype=DOUBLE)
        return torch.tensor([10.0, -7.0]) + torch.tensor([3.0, 0.5]) * unit

    family, how = begun(gaussian(sample_prior=sample_prior), init="prior")
    mean, covariance = moments(family)
    assert how == "at the prior"
    assert torch.allclose(mean, torch.tensor([10.0, -7.0], dtype=DOUBLE), atol=0.6)
    assert torch.allclose(covariance.diagonal().sqrt(), torch.tensor([3.0, 0.5], dtype=DOUBLE), rtol=0.2)
    assert covariance[0, 1] == 0


def test_a_prior_that_cannot_be_drawn_from_is_said():
    with pytest.raises(NotAvailableError, match="cannot draw from its prior"):
        begun(gaussian(), init="prior")


POINT = torch.tensor([1.0, 2.0], dtype=DOUBLE)


@pytest.mark.parametrize(
    "init", [POINT, POINT.float(), POINT.numpy(), np.array([1, 2])], ids=["tensor", "single", "array", "int"]
)
def test_a_given_point_is_the_centre(init):
    family, how = begun(gaussian(), init=init)
    mean, covariance = moments(family)
    assert how == "at the given point"
    assert torch.equal(mean, POINT)
    assert torch.allclose(covariance, torch.diag(1 / PRECISION.diagonal()), rtol=1e-4)


def test_a_point_that_tracks_gradients_is_no_part_of_the_fit():
    point = POINT.clone().requires_grad_(True)
    family, _ = begun(gaussian(), init=point)
    assert not family.shift.requires_grad


def named():
    def log_density(theta):
        return -theta["tau"] - 0.5 * theta["mu"].square().sum(-1)

    return Density(log_density, parameters={"tau": "positive", "mu": ((2,), "real")})


def test_named_values_are_constrained_ones():
    model = named()
    family, _ = begun(model, init={"tau": 2.0, "mu": [0.5, -1.0]})
    theta = model.constrain(moments(family)[0])
    assert float(theta["tau"]) == pytest.approx(2.0)
    assert theta["mu"].tolist() == pytest.approx([0.5, -1.0])


@pytest.mark.parametrize(
    ("init", "error", "phrase"),
    [
        ({"tau": -1.0, "mu": [0.0, 0.0]}, SupportError, "'tau' lies outside its support"),
        ({"tau": float("nan"), "mu": [0.0, 0.0]}, SupportError, "'tau' has values that are not finite"),
        ({"tau": 1.0}, ConfigError, "mu"),
        ({"tau": 1.0, "mu": [0.0, 0.0], "nu": 1.0}, ConfigError, "nu"),
        ({"tau": 1.0, "mu": [0.0, 0.0, 0.0]}, ShapeError, "mu"),
        ({"tau": 1.0, "mu": "high"}, ConfigError, "init cannot be read as numbers"),
        ({"tau": [1.0, 2.0], "mu": [[0.0, 0.0], [0.0, 0.0]]}, ShapeError, "one draw"),
        (torch.zeros(2), ShapeError, "3 unconstrained numbers in all; got the shape (2,)"),
        (torch.zeros(1, 3), ShapeError, "got the shape (1, 3)"),
        (torch.full((3,), torch.nan), ConfigError, "not finite at the given init point"),
        (np.array(["a", "b", "c"]), ConfigError, "init cannot be read as numbers"),
        ("lapalce", ConfigError, "init must be 'auto', 'laplace', 'pathfinder', 'prior'"),
        (3, ConfigError, "init must be"),
        (None, ConfigError, "init must be"),
        ([0.0, 0.0, 0.0], ConfigError, "init must be"),
    ],
)
def test_a_start_that_cannot_be_used_is_said(init, error, phrase):
    with pytest.raises(error) as caught:
        begun(named(), init=init)
    assert phrase in str(caught.value)


def test_restarts_start_at_places_of_their_own():
    def sample_prior(n, generator):
        return 5 * torch.randn(n, 1, generator=generator, dtype=DOUBLE)

    def many_modes(z):
        return (3 * torch.cos(z)).sum(-1) - 0.005 * (z**2).sum(-1)

    model = Density(many_modes, dim=1, sample_prior=sample_prior)
    places = {round(float(moments(begun(model, restart=r)[0])[0]), 1) for r in range(8)}
    assert len(places) >= 2
    again = {round(float(moments(begun(model, restart=r)[0])[0]), 1) for r in range(8)}
    assert places == again


# --- from another posterior ---


def test_the_same_family_goes_on_with_every_number():
    first = fit(gaussian(), "mixture(components=2)", seed=0, steps=30)
    family, how = begun(gaussian(), "mixture(components=2)", first)
    assert how == "at the given posterior"
    ours, theirs = family.state_dict(), first.family.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    z = first.draws(20)
    assert torch.equal(family.log_prob(z), first.family.log_prob(z))


@pytest.mark.parametrize("family", ["low_rank(rank=1)", "mean_field", "flow"])
def test_another_family_takes_over_the_moments(family):
    first = fit(gaussian(), "full_rank", seed=0, steps=30)
    built, how = begun(gaussian(), family, first)
    assert how == "at the moments of the given posterior"
    # 2,000 draws
    assert torch.allclose(built.shift, MEAN, atol=5 * 2 / 2000**0.5)
    scale = built.scale
    covariance = torch.diag(scale**2) if scale.dim() == 1 else scale @ scale.T
    expected = torch.diag(COVARIANCE.diagonal()) if scale.dim() == 1 else COVARIANCE
    assert scale.dim() == (2 if family == "flow" else 1)
    assert torch.allclose(covariance, expected, rtol=0.2, atol=0.2)


def test_going_on_leaves_the_first_posterior_as_it_was():
    first = fit(gaussian(), "mean_field", seed=0, steps=30)
    before = {k: v.clone() for k, v in first.family.state_dict().items()}
    second = fit(gaussian(), "mean_field", seed=1, steps=30, init=first)
    assert all(torch.equal(before[k], v) for k, v in first.family.state_dict().items())
    assert any("at the given posterior" in note for note in second.record.notes)


def test_a_posterior_of_another_size_is_refused():
    other = fit(Density(lambda z: -(z**2).sum(-1), dim=3), "mean_field", seed=0, steps=5)
    with pytest.raises(ShapeError, match="a posterior over 3 coordinates, the model has 2"):
        begun(gaussian(), init=other)


# --- what is not started ---


def test_a_given_family_is_used_as_it_stands():
    mine = registry.build("families", "mean_field").build(LatentSpec(2), generator=generator(0, "mine"))
    mine.start_at(torch.tensor([7.0, 8.0], dtype=DOUBLE), torch.tensor([0.1, 0.2], dtype=DOUBLE))
    family, how = begun(gaussian(), mine)
    assert how == "from the given family as it stands"
    mean, covariance = moments(family)
    assert torch.allclose(mean, torch.tensor([7.0, 8.0], dtype=DOUBLE))
    assert torch.allclose(covariance.diagonal().sqrt(), torch.tensor([0.1, 0.2], dtype=DOUBLE))


def test_discrete_latents_have_nowhere_to_start():
    def log_density(theta):
        return -theta["k"].double()

    model = Density(log_density, parameters={"k": "integer_interval(0, 3)"})
    assert begun(model, "categorical")[1] == "uniform"
    with pytest.raises(ConfigError, match="init must be"):
        begun(model, "categorical", "lapalce")


def test_many_data_in_minibatches_are_not_read_whole_to_start():
    calls = []

    def log_likelihood(theta, y):
        calls.append(y.shape[0])
        return -0.5 * (y - theta["mu"].unsqueeze(-1)) ** 2

    data = torch.randn(200_001, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    model = LikelihoodModel((0.0, 1.0), log_likelihood, data=data, parameters={"mu": "real"})
    calls.clear()
    family, how = begun(model, "mean_field", minibatches=True)
    assert "on 10000 of 200001 data" in how
    assert max(calls) == 10_000
    # the spread is that of all data, the mean is as good as 10,000 of them make it
    mean, covariance = moments(family)
    assert float(covariance[0, 0]) == pytest.approx(1 / 200_002, rel=1e-3)
    assert abs(float(mean[0])) < 5 / 100


class BeginsItself(Density):
    """A density that says where a fit should begin: at a draw of its own, one hundredth wide."""

    def __init__(self):
        super().__init__(log_prob, dim=2)

    def initial_gaussian(self, *, generator):
        return torch.randn(2, generator=generator, dtype=DOUBLE), torch.full((2,), 0.01, dtype=DOUBLE)


def test_a_model_may_say_where_a_fit_begins():
    family, how = begun(BeginsItself(), "mean_field")
    mean, covariance = moments(family)
    assert how == "where the model begins"
    assert torch.equal(mean, BeginsItself().initial_gaussian(generator=generator(0, "start", 0))[0])
    assert covariance.diagonal().sqrt().tolist() == pytest.approx([0.01, 0.01])
    other, _ = begun(BeginsItself(), "mean_field", restart=1)
    assert not torch.equal(moments(other)[0], mean)
    # what is asked for goes before
    assert begun(BeginsItself(), init="laplace")[1].startswith("at a Gaussian approximation")


def test_members_of_an_ensemble_each_have_a_start_of_their_own():
    family, _ = begun(BeginsItself(), "ensemble(size=3)")
    points = family.to_latent(family.particles())
    wanted = [BeginsItself().initial_gaussian(generator=generator(0, "start/member", 0, k))[0] for k in range(3)]
    assert torch.allclose(points, torch.stack(wanted))
    posterior = fit(BeginsItself(), "full_rank", seed=0, restarts=2)
    assert posterior.record.converged
    assert torch.allclose(moments(posterior.family)[0], MEAN, atol=1e-2)
