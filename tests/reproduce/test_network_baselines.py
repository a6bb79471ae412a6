"""The methods that posteriors over weights are put beside: the score, the training of members, and data sets."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from vifamily.errors import DataError
from vifamily.reproduce import _network_baselines as baselines
from vifamily.reproduce import _uci as uci
from vifamily.rng import generator

SMALL = baselines.Budget(steps=600, batch=32, peak=1e-2, hidden=(16,), draws=8)


def test_the_score_is_that_of_a_mixture_in_the_unit_of_the_targets(seed):
    g = generator(seed, "score")
    found = baselines.Predicted(torch.randn(5, 7, generator=g), torch.rand(5, generator=g) + 0.1, 1)
    y, scale = torch.randn(7, generator=g), 3.0
    mixture = MixtureSameFamily(
        Categorical(torch.ones(7, 5)), Normal(found.mean.T * scale, (found.sd * scale).expand(7, 5))
    )
    got = baselines.score(found, y, scale)
    assert got["mnll"] == pytest.approx(-float(mixture.log_prob(y * scale).mean()), rel=1e-5)
    assert got["rmse"] == pytest.approx(3 * float((found.mean.mean(0) - y).square().mean().sqrt()), rel=1e-6)


def test_members_side_by_side_are_members_alone(seed):
    nets = baselines._Members(3, (8, 5), 2, generator(seed, "nets"))
    x = torch.randn(2, 6, 3, generator=generator(seed, "x"))
    for k in range(2):
        h = x[k]
        for layer, (w, b) in enumerate(zip(nets.weights, nets.biases, strict=True)):
            h = torch.nn.functional.linear(h, w[k], b[k, 0])
            h = h.relu() if layer < 2 else h
        torch.testing.assert_close(nets(x)[k], h.squeeze(-1))


def test_the_prior_is_that_of_the_package(seed):
    nets = baselines._Members(3, (8,), 1, generator(seed, "nets"))
    wanted = sum(Normal(0.0, math.sqrt(2 / w.shape[-1])).log_prob(w).sum() for w in nets.weights)
    wanted = wanted + sum(Normal(0.0, 1.0).log_prob(b).sum() for b in nets.biases)
    with torch.no_grad():
        for w in nets.weights:
            w.mul_(2)
    moved = sum(Normal(0.0, math.sqrt(2 / w.shape[-1])).log_prob(w).sum() for w in nets.weights)
    moved = moved + sum(Normal(0.0, 1.0).log_prob(b).sum() for b in nets.biases)
    now = float(nets.log_prior().detach())
    with torch.no_grad():
        for w in nets.weights:
            w.div_(2)
    assert now - float(nets.log_prior().detach()) == pytest.approx(float((moved - wanted).detach()), rel=1e-4)


@pytest.mark.parametrize(
    "method",
    [baselines.single_network, baselines.deep_ensemble, baselines.dropout_network, baselines.swag],
    ids=lambda method: method.__name__,
)
def test_each_method_learns_a_line_and_its_noise(seed, method):
    g = generator(seed, "line")
    x = torch.randn(400, 2, generator=g)
    y = x @ torch.tensor([0.8, -0.5]) + 0.3 * torch.randn(400, generator=g)
    found = method(x[:300], y[:300], x[300:], SMALL, seed)
    got = baselines.score(found, y[300:], 1.0)
    # the true line has 0.3 and log(0.3) + 1.42 = 0.215, give or take the 100 test rows
    assert got["rmse"] < 0.4 and got["mnll"] < 0.6
    assert 0.2 < float(found.sd.mean()) < 0.4 and found.mean.shape[1] == 100


def test_a_split_is_scaled_by_its_training_rows(tmp_path, seed):
    source = np.random.default_rng(seed)
    x, y = 5 + 3 * source.standard_normal((40, 2)), 100 + 7 * source.standard_normal(40)
    np.savez(tmp_path / "made.npz", X=x, y=y, test_index=np.array([[0, 1, 2, 3], [4, 5, 6, 7]]))
    split = uci.split_of(tmp_path, "made", 1)
    assert uci.num_splits(tmp_path, "made") == 2
    assert split.x.shape == (36, 2) and split.x_test.shape == (4, 2)
    torch.testing.assert_close(split.x.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    assert split.scale == pytest.approx(float(np.delete(y, [4, 5, 6, 7]).std()))
    back = split.y_test.double().numpy() * split.scale + np.delete(y, [4, 5, 6, 7]).mean()
    np.testing.assert_allclose(back, y[4:8], rtol=1e-5)


def test_files_that_are_not_what_they_should_be(tmp_path):
    with pytest.raises(DataError, match="there is no"):
        uci.split_of(tmp_path, "nothing", 0)
    np.savez(tmp_path / "short.npz", X=np.zeros((3, 2)))
    with pytest.raises(DataError, match="lacks"):
        uci.split_of(tmp_path, "short", 0)
    np.savez(tmp_path / "bad.npz", X=np.full((3, 2), np.nan), y=np.zeros(3), test_index=np.zeros((1, 1), dtype=int))
    with pytest.raises(DataError, match="finite"):
        uci.split_of(tmp_path, "bad", 0)
    np.savez(tmp_path / "good.npz", X=np.ones((3, 2)), y=np.zeros(3), test_index=np.zeros((1, 1), dtype=int))
    with pytest.raises(DataError, match="splits 0 to 0"):
        uci.split_of(tmp_path, "good", 3)
