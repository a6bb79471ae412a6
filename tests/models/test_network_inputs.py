"""Networks and what users give them: inputs to predict at, loaders with a smaller last batch."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vifamily as vf
from vifamily import errors, registry, rng
from vifamily.testing._tools import seeded
from vifamily.types import LatentSpec

X = torch.randn(40, 3, generator=seeded(0))
Y = X[:, :1].sin()


def small(weights, data=(X, Y)):
    with rng.scoped(0):
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    return vf.models.Network(net, "gaussian", data, weights)


@pytest.mark.parametrize("weights", ["dense", "walsh_hadamard"])
@pytest.mark.parametrize(
    ("inputs", "error", "match"),
    [
        (torch.ones(5, 2), (errors.ShapeError, errors.ModelError), "inputs"),
        (torch.ones(3), errors.ShapeError, r"must be \(datum, 3\)"),
        (torch.ones(0, 3), errors.ShapeError, "at least one"),
        (torch.full((5, 3), float("nan")), errors.DataError, "NaN"),
        ("five", errors.DataError, "numbers"),
        (None, errors.DataError, "numbers"),
    ],
)
def test_inputs_that_cannot_be_predicted_at_are_refused(weights, inputs, error, match):
    with pytest.raises(error, match=match):
        model = small(weights)
        model.predict(torch.zeros(2, model.dim), inputs)


def test_inputs_may_be_lists_of_whole_numbers():
    model = small("dense")
    z = torch.zeros(2, model.dim)
    found = model.predict(z, [[1, 2, 3], [0, 0, 1]])
    assert found.draws.dtype == torch.float32
    torch.testing.assert_close(found.draws, model.predict(z, torch.tensor([[1.0, 2, 3], [0, 0, 1]])).draws)


def test_a_loader_whose_last_batch_is_smaller_is_fitted_with_noise_of_each_datum():
    loader = DataLoader(TensorDataset(X, Y), batch_size=16)  # 40 data: the last batch has 8
    posterior = vf.fit(
        small("walsh_hadamard", loader),
        "mean_field",
        "elbo(estimator=example)",
        steps=12,
        draws=1,
        seed=0,
        progress=False,
    )
    assert bool(posterior.draws(3).isfinite().all())


def test_a_smaller_batch_gives_the_bound_of_its_own_data():
    """With the noise of a batch of 16, one of 6 data is evaluated at 2 draws of 6 rows: the first 12."""
    model = small("walsh_hadamard")
    latent = LatentSpec(model.dim, dtype=torch.float32)
    family = registry.build("families", "mean_field").build(latent, generator=seeded(0))
    objective = registry.build("objectives", "elbo(estimator=example)").resolve(model, family)
    batch, noise = model.batch_at(torch.arange(6)), torch.randn(16, model.dim, generator=seeded(1))
    found, expected = (objective.loss(family, model, part, batch).value for part in (noise, noise[:12]))
    torch.testing.assert_close(found, expected)
    with pytest.raises(errors.ConfigError, match="6 at least, and got 5"):
        objective.loss(family, model, noise[:5], batch)


def test_a_network_that_cannot_be_used_is_refused():
    with rng.scoped(0), pytest.raises(errors.ConfigError, match="lazy"):
        vf.models.Network(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1)), "gaussian", (X, Y))
    for data in ((X.to_sparse(), Y), (X.to(torch.complex64), Y)):
        with pytest.raises(errors.DataError, match="dense tensor"):
            small("dense", data)


def test_a_latent_of_another_shape_is_refused():
    model = small("dense")
    for z in (torch.zeros(model.dim), torch.zeros(2, model.dim + 1)):
        with pytest.raises(errors.ShapeError, match="z must be"):
            model.weights(X, z)


def test_scores_of_targets_that_are_no_finite_numbers_are_refused():
    model = small("dense")
    prediction = model.predict(torch.zeros(2, model.dim), X)
    with pytest.raises(errors.DataError, match="NaN"):
        prediction.calibration(Y * float("nan"))
    with pytest.raises(errors.DataError, match="numbers"):
        prediction.log_score("many")
