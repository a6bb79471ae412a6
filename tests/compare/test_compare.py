"""Whole comparisons with real, short fits."""

import json

import numpy as np
import pytest
import torch

from vifamily.compare import DEFAULTS, compare
from vifamily.compare.measure import as_problem, fingerprint, target_of
from vifamily.errors import ConfigError, UnknownNameError
from vifamily.models import Density
from vifamily.problems._base import Problem, Reference


def normal(z):
    return -0.5 * (z**2).sum(-1)


def short(*arguments, **options):
    return compare(*arguments, **{"seeds": 1, "steps": 30, "jobs": 1, "draws": 4, **options})


def test_every_figure_is_there_and_the_settings_are_shared():
    result = short("banana", "mean_field", "elbo, iwae")
    assert [cell.status for cell in result.cells] == ["ok", "ok"]
    for cell in result.cells:
        for name in (
            "mean_error",
            "mean_error_rms",
            "log_sd_ratio",
            "sliced_wasserstein",
            "mmd",
            "elbo",
            "k_hat",
            "seconds",
        ):
            assert np.isfinite(cell.values[name]), name
        assert cell.values["draws_per_step"] == 4
        assert cell.values["steps"] == 30
        assert cell.draws.shape == (500, 2)
        assert cell.errors.keys() == {"z[0]", "z[1]"}
        assert abs(cell.errors["z[1]"]) <= cell.values["mean_error"]
    assert result.config["draws"] == 4


def test_draws_per_step_are_the_same_for_all_objectives_by_default():
    from vifamily import registry

    expected = max(registry.build("objectives", name).default_draws for name in ("elbo", "iwae"))
    result = short("banana", "mean_field", ("elbo", "iwae"), steps=2, draws=None)
    assert {cell.values["draws_per_step"] for cell in result.cells} == {expected}


def test_same_cells_give_the_same_numbers_whatever_runs_beside_them():
    alone = short("banana", "mean_field", "elbo")
    among = short("banana", "full_rank, mean_field", "iwae, elbo")
    (other,) = [c for c in among.cells if (c.family, c.objective) == ("mean_field", "elbo")]
    assert np.array_equal(alone.cells[0].draws, other.draws)
    assert alone.cells[0].values["elbo"] == other.values["elbo"]


def test_moments_of_a_known_posterior():
    # the reference is a normal with mean 1 and sd 2 where the target is standard: errors are -1/2 and -log 2
    reference = Reference("analytic", ("z[0]", "z[1]"), np.ones(2), np.full(2, 2.0))
    problem = Problem("shifted", Density(normal, dim=2), reference, "A normal with the wrong reference.")
    (cell,) = short(problem, "full_rank", "elbo", steps=400, draws=16).cells
    assert cell.values["mean_error"] == pytest.approx(0.5, abs=0.06)
    assert cell.values["mean_error_rms"] == pytest.approx(0.5, abs=0.06)
    assert cell.values["log_sd_ratio"] == pytest.approx(-np.log(2), abs=0.1)
    assert "sliced_wasserstein" not in cell.values


def test_model_without_reference():
    result = short(Density(normal, dim=3, name="plain"), "mean_field", "elbo")
    (cell,) = result.cells
    assert cell.status == "ok"
    assert "mean_error" not in cell.values
    assert np.isfinite(cell.values["elbo"])
    assert result.figure() is not None
    assert "0.00" in str(result) or "-" in str(result)


def test_resumes_from_the_folder(tmp_path):
    first = short("banana", "mean_field, full_rank", "elbo", out=tmp_path)
    again = short("banana", "mean_field, full_rank", "elbo", out=tmp_path)
    assert [cell.resumed for cell in again.cells] == [True, True]
    assert again.to_dict()["cells"] == first.to_dict()["cells"]
    more = short("banana", "mean_field, full_rank", "elbo, iwae", out=tmp_path)
    assert [cell.resumed for cell in more.cells] == [True, False, True, False]
    changed = short("banana", "mean_field, full_rank", "elbo", out=tmp_path, steps=31)
    assert [cell.resumed for cell in changed.cells] == [False, False]
    assert len(json.loads((tmp_path / "results.json").read_text("utf-8"))["cells"]) == 2


def test_changed_problem_is_computed_anew(tmp_path):
    for scale, resumed in ((1.0, False), (1.0, True), (2.0, False)):
        model = Density(lambda z, scale=scale: normal(z / scale), dim=2, name="mine")
        (cell,) = short(model, "mean_field", "elbo", out=tmp_path).cells
        assert cell.resumed is resumed


def test_problem_that_cannot_be_built_fails_alone(monkeypatch):
    from vifamily import registry
    from vifamily.errors import ReferenceDataError

    real = registry.build

    def build(kind, spec):
        if str(spec) == "funnel":
            raise ReferenceDataError("the data are not here.")
        return real(kind, spec)

    monkeypatch.setattr(registry, "build", build)
    result = short("funnel, banana", "mean_field", "elbo")
    assert [(cell.status, cell.reason) for cell in result.cells] == [("failed", "the data are not here."), ("ok", None)]
    assert len(result.failed) == 1


def test_model_that_raises_fails_alone(tmp_path):
    def broken(z):
        raise RuntimeError("no luck")

    result = short([Density(broken, dim=2, name="broken"), "banana"], "mean_field", "elbo", out=tmp_path)
    assert [cell.status for cell in result.cells] == ["failed", "ok"]
    assert "no luck" in result.cells[0].reason
    assert (tmp_path / "report.html").exists()


def test_globals_stay_as_they_were():
    threads, state, dtype = torch.get_num_threads(), torch.get_rng_state(), torch.get_default_dtype()
    short("banana", "flow(transforms=1, hidden=[8])", "elbo", steps=5)
    assert torch.get_num_threads() == threads
    assert bool((torch.get_rng_state() == state).all())
    assert torch.get_default_dtype() == dtype


def test_runs_in_worker_processes():
    here = short("banana", "mean_field", "elbo", seeds=[3, 5])
    there = short("banana", "mean_field", "elbo", seeds=[3, 5], jobs=2)
    assert [cell.seed for cell in there.cells] == [3, 5]
    for a, b in zip(here.cells, there.cells, strict=True):
        assert np.allclose(a.draws, b.draws, rtol=1e-10, atol=1e-10)


def test_object_that_cannot_be_sent_is_told():
    import threading

    lock = threading.Lock()
    model = Density(lambda z: normal(z) + 0 * float(lock.locked()), dim=2, name="locked")
    with pytest.raises(ConfigError, match="jobs=1"):
        short(model, "mean_field", "elbo", seeds=2, jobs=2)


def test_two_dimensional_targets_have_their_density():
    target = target_of("banana", as_problem("banana"))
    points = np.array([[0.0, 0.0], [1.0, 2.0]])
    model = as_problem("banana").model
    assert np.allclose(target.log_density(points), model.log_joint(torch.as_tensor(points)).detach().numpy())
    assert target_of("eight_schools", as_problem("eight_schools")).log_density is None


def test_fingerprint_depends_on_the_reference_and_the_density():
    marks = {
        fingerprint(as_problem(name)) for name in ("banana", "banana(curvature=0.3)", "funnel", "correlated_normal")
    }
    assert len(marks) == 4
    assert fingerprint(as_problem("banana")) in marks


def test_progress_is_reported():
    seen = []
    short("banana", "mean_field", "elbo", seeds=2, progress=lambda outcome, done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_defaults_are_known():
    from vifamily.compare.labels import items

    for kind in ("problems", "families", "objectives"):
        assert items(kind, DEFAULTS[kind])


WRONG = {
    "seeds": ({"seeds": 0}, ConfigError, "seeds must be at least 1"),
    "no seeds": ({"seeds": []}, ConfigError, "at least one"),
    "seeds twice": ({"seeds": [1, 1]}, ConfigError, "distinct"),
    "seeds as text": ({"seeds": "3"}, ConfigError, "number of seeds"),
    "negative seed": ({"seeds": [-1]}, ConfigError, "seed must be"),
    "steps": ({"steps": 0}, ConfigError, "steps must be"),
    "steps that are not whole": ({"steps": 1.5}, ConfigError, "steps must be"),
    "draws": ({"draws": 0}, ConfigError, "draws must be"),
    "time limit": ({"time_limit": 0}, ConfigError, "time_limit must be"),
    "solver": ({"solver": "adamm"}, UnknownNameError, "Did you mean 'adam'"),
    "jobs": ({"jobs": 0}, ConfigError, "jobs must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    options, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        short("banana", "mean_field", "elbo", **options)


def test_wrong_kind_of_problem():
    with pytest.raises(ConfigError, match=r"vf\.models\.Density"):
        short([normal], "mean_field", "elbo")
