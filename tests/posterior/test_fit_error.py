"""The error of a reported mean: what refits with other draws spread by, in each parameter's own units."""

import pytest
import torch

import vifamily as vf


def skewed(theta):
    # two parameters in different units, neither Gaussian on the unconstrained scale
    return 3 * theta["rate"].log() - theta["rate"] - theta["shift"].div(100).exp() + 2 * theta["shift"] / 100


def fitted(seed):
    model = vf.models.Density(skewed, parameters={"rate": "positive", "shift": "real"})
    return vf.fit(model, "mean_field", solver="lbfgs(tolerance=0.2, most_draws=128)", seed=seed, draws=16, steps=500)


def test_errors_are_those_of_refits():
    fits = [fitted(seed) for seed in range(24)]
    spread = torch.stack([fit.mean(unconstrained=True) for fit in fits]).std(0)
    stated = torch.tensor([fit.record.mean_errors for fit in fits]).square().mean(0).sqrt()
    # an sd from 24 fits has a relative error of 0.15, that of three checks each is averaged over as many fits
    # one quasi-Newton step stands for a refit, so the order of magnitude is what is promised
    assert bool(((stated / spread > 0.4) & (stated / spread < 3)).all())


def test_the_table_has_the_error_of_the_fit_and_of_its_draws():
    fit = fitted(0)
    names, error = fit.layout.columns(), torch.tensor(fit.record.mean_errors)
    table = fit.summary(num_draws=4000)
    plain = table.sd / 4000**0.5
    extra = (table.mcse.square() - plain.square()).sqrt()
    assert names == ["rate", "shift"] or tuple(names) == ("rate", "shift")
    assert float(extra[1]) == pytest.approx(float(error[1]), rel=1e-6)
    # d rate = rate d log rate
    assert float(extra[0]) == pytest.approx(float(error[0] * table.mean[0]), rel=0.05)


def test_errors_are_saved(tmp_path):
    fit = fitted(0)
    fit.save(tmp_path / "p")
    loaded = vf.load(tmp_path / "p", model=fit.model)
    assert loaded.record.mean_errors == fit.record.mean_errors
    assert torch.equal(loaded.summary().mcse, fit.summary().mcse)
