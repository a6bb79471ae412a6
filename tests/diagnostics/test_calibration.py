"""Calibration: exact posteriors pass, narrow ones fail in their ranks and pass in their centres, shifted ones fail."""

import functools
import json
import signal
import types
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from vifamily import fit
from vifamily.diagnostics import Calibration, sbc, vsbc
from vifamily.errors import ConfigError, ConvergenceWarning, NonFiniteLossError, NotAvailableError
from vifamily.models import Density, LikelihoodModel, PyroModel

DOUBLE = torch.float64
NOISE = 0.8
X = torch.stack([torch.ones(12, dtype=DOUBLE), torch.linspace(0.4, 1.6, 12, dtype=DOUBLE)], 1)


def simulate(z, generator):
    mean = z @ X.mT
    return mean + NOISE * torch.randn(mean.shape, generator=generator, dtype=DOUBLE)


# intercept and slope far from the centre of the inputs: strongly correlated a posteriori
MODEL = LikelihoodModel(
    (torch.tensor([0.5, -0.25], dtype=DOUBLE), torch.tensor([1.5, 2.0], dtype=DOUBLE)),
    lambda z, data: -0.5 * ((data[1] - z @ data[0].mT) / NOISE) ** 2,
    data=(X, torch.zeros(12, dtype=DOUBLE)), dim=2, simulate=simulate,
)  # fmt: skip


def moments(model):
    """Posterior of the conjugate regression."""
    x, y = model.source.whole()
    mean, sd = model.gaussian_prior()
    covariance = torch.linalg.inv(x.mT @ x / NOISE**2 + torch.diag(sd**-2))
    return covariance @ (x.mT @ y / NOISE**2 + mean / sd**2), covariance


class Answer:
    """A Gaussian in place of a fit."""

    def __init__(self, mean, factor, seed, converged=True):
        self.mean, self.factor, self.seed = mean, factor, seed
        self.record = types.SimpleNamespace(stop_reason="converged", converged=converged)

    def draws(self, num_draws):
        noise = torch.randn(num_draws, len(self.mean), generator=torch.Generator().manual_seed(self.seed), dtype=DOUBLE)
        return self.mean + noise @ self.factor.mT


def exact(model, seed):
    mean, covariance = moments(model)
    return Answer(mean, torch.linalg.cholesky(covariance), seed)


def conditional(model, seed):
    """What mean field comes to: the right mean, and the conditional standard deviation of each coordinate."""
    mean, covariance = moments(model)
    return Answer(mean, torch.diag(torch.linalg.inv(covariance).diagonal() ** -0.5), seed)


def wide(model, seed):
    mean, covariance = moments(model)
    return Answer(mean, 2 * torch.linalg.cholesky(covariance), seed)


def shifted(model, seed):
    mean, covariance = moments(model)
    return Answer(mean - 0.6 * covariance.diagonal().sqrt(), torch.linalg.cholesky(covariance), seed)


def the_prior(model, seed):
    mean, sd = model.gaussian_prior()
    return Answer(mean, torch.diag(sd), seed)


@functools.cache
def calibration(way):
    return sbc(MODEL, way, num_simulations=200, progress=False, seed=1)


# --- what is found ---


def test_exact_posteriors_pass():
    found = calibration(exact)
    assert found.names == ("z[0]", "z[1]", "log joint")
    assert found.calibrated() and found.symmetry().unbiased()
    assert min(found.chi_square) > 0.001
    assert set(found.reading) == {"no such pattern"}
    assert "Nothing here speaks against calibration" in str(found)


def test_narrow_posteriors_fail_in_their_ranks_and_pass_in_their_centres():
    found = calibration(conditional)
    assert not found.calibrated()
    assert max(found.ecdf[:2]) < 0.01 and found.reading[:2] == ("too narrow", "too narrow")
    assert found.symmetry().unbiased()
    assert "Not calibrated" in str(found) and "is not seen here" in found.symmetry().note()


def test_wide_posteriors_fail_in_their_ranks_and_pass_in_their_centres():
    found = calibration(wide)
    assert max(found.ecdf[:2]) < 0.001 and found.reading[:2] == ("too wide", "too wide")
    assert found.symmetry().unbiased()


def test_shifted_posteriors_fail_in_both():
    found = calibration(shifted)
    assert max(found.ecdf[:2]) < 0.001 and found.reading[:2] == ("too low", "too low")
    centres = found.symmetry()
    assert not centres.unbiased() and max(centres.p_values) < 0.001
    assert [row[-1] for row in centres.rows()] == ["too low", "too low"]


def test_a_fit_that_returns_the_prior_is_found_by_the_log_joint_alone():
    found = calibration(the_prior)
    assert min(found.ecdf[:2]) > 0.01
    assert found.ecdf[2] < 0.001 and not found.calibrated()


def test_fits_of_full_rank_pass():
    found = sbc(MODEL, functools.partial(fit, family="full_rank", progress=False), num_simulations=40, progress=False)
    assert found.calibrated() and found.symmetry().unbiased()
    assert len(found.ranks) == 40 and found.simulations.remarks() == []


def test_a_contrast_sees_what_its_parts_do_not():
    # independent coordinates with the marginal standard deviations: right one by one, wrong in their sum
    def marginal(model, seed):
        mean, covariance = moments(model)
        return Answer(mean, torch.diag(covariance.diagonal().sqrt()), seed)

    total = {"total": lambda theta: theta["z"].sum(-1)}
    found = sbc(MODEL, marginal, num_simulations=200, quantities=total, progress=False)
    assert found.names == ("z[0]", "z[1]", "total", "log joint")
    assert min(found.ecdf[:2]) > 0.01 and found.ecdf[2] < 0.001
    assert found.reading[2] == "too wide"


# --- how it runs ---


def test_seeds_and_more_simulations():
    first = sbc(MODEL, exact, num_simulations=20, progress=False, seed=5)
    more = sbc(MODEL, exact, num_simulations=30, progress=False, seed=5)
    assert torch.equal(first.ranks, more.ranks[:20])
    assert not torch.equal(first.ranks, sbc(MODEL, exact, num_simulations=20, progress=False, seed=6).ranks)
    centres = vsbc(MODEL, exact, num_simulations=20, progress=False, seed=5)
    assert torch.equal(centres.probability, first.symmetry().probability)
    assert centres.names == ("z[0]", "z[1]")


def test_the_model_keeps_its_own_data():
    before = MODEL.observed()["y"].clone()
    seen = []

    def watch(model, seed):
        seen.append(model.observed()["y"])
        return exact(model, seed)

    sbc(MODEL, watch, num_simulations=20, progress=False)
    assert torch.equal(MODEL.observed()["y"], before)
    assert len({float(y.sum()) for y in seen}) == 20


def test_ties_are_broken_evenly():
    constant = {"one": lambda theta: torch.ones(len(theta["z"]))}
    found = sbc(MODEL, exact, num_simulations=200, num_draws=99, quantities=constant, progress=False)
    assert found.ecdf[2] > 0.01 and len(found.ranks[:, 2].unique()) > 50  # every draw ties with the truth
    assert set(found.simulations.probability[:, 2].tolist()) == {0.5}


def test_failures_and_unconverged_fits_are_counted():
    def sometimes(model, seed):
        answer = exact(model, seed)
        if seed % 3 == 0:
            raise NonFiniteLossError("the loss is nan", step=1, term="log_joint")
        warnings.warn("not done", ConvergenceWarning, stacklevel=1)
        answer.record.converged = seed % 3 == 1
        return answer

    found = sbc(MODEL, sometimes, num_simulations=30, progress=False)
    size, lost = len(found.ranks), len(found.simulations.failures)
    assert size + lost == 30 and 0 < lost < 30 and 0 < found.simulations.unconverged < size
    assert f"{lost} fits failed" in found.note() and "NonFiniteLossError: the loss is nan" in found.note()

    def never(model, seed):
        raise NonFiniteLossError("the loss is nan", step=1, term="log_joint")

    with pytest.raises(NotAvailableError, match="no fit of 20 came to an end .*the loss is nan"):
        sbc(MODEL, never, num_simulations=20, progress=False)


def test_an_interrupt_keeps_what_was_finished():
    count = [0]

    def interrupted(model, seed):
        count[0] += 1
        if count[0] == 23:
            signal.raise_signal(signal.SIGINT)
        return exact(model, seed)

    found = sbc(MODEL, interrupted, num_simulations=60, progress=False)
    assert len(found.ranks) == 23 and found.simulations.interrupted
    assert "Interrupted after 23 of 60 fits" in found.note()


def test_a_fit_that_was_cut_short_does_not_count():
    count = [0]

    def cut(model, seed):
        count[0] += 1
        answer = exact(model, seed)
        if count[0] == 21:
            answer.record.stop_reason = "interrupted"
        return answer

    assert len(sbc(MODEL, cut, num_simulations=40, progress=False).ranks) == 20


def test_results_go_through_json_and_pictures(tmp_path):
    found = calibration(conditional)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["calibrated"] is False and len(plain["ranks"]) == 200
    assert json.loads(json.dumps(found.symmetry().to_dict()))["unbiased"] is True
    found.plot(path=tmp_path / "ecdf.png", title="mean field")
    found.symmetry().plot(path=tmp_path / "symmetry.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("ecdf.png", "symmetry.png"))
    assert repr(found) == str(found) and isinstance(found, Calibration)


def test_what_cannot_be_calibrated_is_said():
    with pytest.raises(NotAvailableError, match="draws from the prior and draws from the predictive"):
        sbc(Density(lambda z: -z.square().sum(-1), dim=1), exact, progress=False)
    with pytest.raises(ConfigError, match="num_simulations must be an integer of 20 or more, got 5"):
        sbc(MODEL, exact, num_simulations=5)
    with pytest.raises(ConfigError, match="num_draws"):
        vsbc(MODEL, exact, num_draws=3)
    with pytest.raises(ConfigError, match="fit must be a function"):
        sbc(MODEL, "mean_field")
    with pytest.raises(ConfigError, match="'bad' must give one number per draw"):
        sbc(MODEL, exact, quantities={"bad": lambda theta: theta["z"]}, progress=False)


def test_a_pyro_program_is_calibrated_too():
    def program(x, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)) as i:
            pyro.sample("y", dist.Normal(slope[..., None] * x[i] if slope.dim() else slope * x[i], 1.0), obs=y[i])

    x = torch.linspace(-1, 1, 5, dtype=DOUBLE)
    model = PyroModel(program, x, torch.zeros(5, dtype=DOUBLE) + 0.1)

    def closed(at, seed):
        y = at.observed()["y"]
        precision = 1 + x.square().sum()
        return Answer((x @ y / precision)[None], (precision**-0.5).reshape(1, 1), seed)

    found = sbc(model, closed, num_simulations=60, progress=False)
    assert found.names == ("slope", "log joint") and found.calibrated()
