"""One cycle of step sizes: its shape, its answer, the same numbers compiled or not, and states that can be taken up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vifamily as vf
from vifamily.errors import CheckpointError, ConfigError
from vifamily.grid_fit import fit_seeds
from vifamily.models import Density
from vifamily.solvers._one_cycle import one_cycle

CYCLE = "adam(schedule=one_cycle, step_size=0.1)"


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_the_cycle_rises_to_one_and_falls_to_zero(total: int) -> None:
    found = one_cycle(0, total + 1, total)
    top = max(1, int(0.3 * total))
    assert found[0] == 0.04
    assert found.max() == 1.0 and found[top] == 1.0
    assert found[-1] == pytest.approx(0.0 if total > 1 else 1.0)
    assert (np.diff(found[: top + 1]) > 0).all() and (np.diff(found[top:]) < 0).all()


def test_parts_of_the_cycle_are_the_whole() -> None:
    parts = [one_cycle(0, 7, 40), one_cycle(7, 13, 40), one_cycle(20, 20, 40)]
    np.testing.assert_array_equal(np.concatenate(parts), one_cycle(0, 40, 40))


def test_it_finds_the_mean_field_optimum_of_a_correlated_normal() -> None:
    mean, precision = torch.tensor([1.0, -2.0]).double(), torch.tensor([[2.0, -1.5], [-1.5, 3.0]]).double()
    model = Density(lambda z: -0.5 * (((z - mean) @ precision) * (z - mean)).sum(-1), dim=2)
    posterior = vf.fit(model, "mean_field", "elbo(estimator=reparameterised)", CYCLE, steps=3000, draws=8, seed=0,
                       init=torch.tensor([4.0, 4.0]).double(), progress=False)  # fmt: skip
    found, covariance = posterior.family.moments()
    best = precision.diagonal().rsqrt()
    assert float(((found - mean) / best).abs().max()) < 0.02
    assert float((covariance.diagonal().sqrt() / best).log().abs().max()) < 0.02
    assert posterior.record.stop_reason == "max_steps" and posterior.record.steps == 3000


@pytest.mark.parametrize("compiled", [False, True])
def test_the_record_has_the_step_sizes_of_the_cycle(compiled: bool) -> None:
    posterior = vf.fit("banana", "mean_field", "elbo", CYCLE, steps=250, seed=0, progress=False, compile=compiled)
    np.testing.assert_allclose(posterior.record.trace["step_size"], 0.1 * one_cycle(0, 250, 250), rtol=1e-12)
    assert ("steps compiled" in posterior.record.notes) is compiled


def test_compiled_steps_are_the_same() -> None:
    plain, compiled = (
        vf.fit("banana", "full_rank", "elbo", CYCLE, steps=400, seed=0, progress=False, compile=compile)
        for compile in (False, True)
    )
    np.testing.assert_allclose(plain.record.trace["loss"], compiled.record.trace["loss"], rtol=1e-6, atol=1e-6)
    for a, b in zip(plain.family.parameters(), compiled.family.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_last_iterate_is_the_answer() -> None:
    seen: list[torch.Tensor] = []
    posterior = vf.fit("banana", "mean_field", "elbo", CYCLE, steps=60, seed=0, progress=False,
                       callbacks=[lambda report: seen.append(torch.tensor(report.step_size))])  # fmt: skip
    assert float(seen[-1]) < 1e-3 < float(max(seen))
    again = vf.fit("banana", "mean_field", "elbo", CYCLE, steps=60, seed=0, progress=False)
    for a, b in zip(posterior.family.parameters(), again.family.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_fit_that_was_cut_off_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 120, "seed": 3, "progress": False, "compile": False}
    whole = vf.fit("banana", "mean_field", "elbo", CYCLE, **options)
    folder = tmp_path / "fit"
    vf.fit("banana", "mean_field", "elbo", CYCLE, checkpoint=folder, checkpoint_every=10,
           callbacks=[lambda report: report.step >= 50], **options)  # fmt: skip
    resumed = vf.fit("banana", "mean_field", "elbo", CYCLE, checkpoint=folder, **options)
    assert resumed.record.steps == 120
    np.testing.assert_array_equal(whole.record.trace["loss"], resumed.record.trace["loss"])
    for a, b in zip(whole.family.parameters(), resumed.family.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_cycle_of_another_length_is_not_taken_up(tmp_path: Path) -> None:
    folder = tmp_path / "fit"
    vf.fit("banana", "mean_field", "elbo", CYCLE, checkpoint=folder, checkpoint_every=10, steps=100, seed=0,
           progress=False, callbacks=[lambda report: report.step >= 50])  # fmt: skip
    with pytest.raises(CheckpointError, match="give steps=100"):
        vf.fit("banana", "mean_field", "elbo", CYCLE, checkpoint=folder, steps=200, seed=0, progress=False)


def test_the_number_of_steps_must_be_given() -> None:
    with pytest.raises(ConfigError, match="give steps="):
        vf.fit("banana", "mean_field", "elbo", CYCLE, progress=False)


def test_other_schedules_are_refused() -> None:
    with pytest.raises(ConfigError, match="'one_cycle', got 'linear'"):
        vf.solvers.Adam(schedule="linear")


def test_seeds_are_not_fitted_side_by_side() -> None:
    with pytest.raises(ConfigError, match="a schedule of step sizes"):
        fit_seeds("banana", "mean_field", "elbo", CYCLE, seeds=[0, 1], steps=20)
