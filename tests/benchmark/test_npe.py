"""Neural posterior estimation beside sbi: what needs no peer, with reference posteriors made here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Gamma, MultivariateNormal
from typer.testing import CliRunner

from vifamily.benchmark import Options, benchmark_named
from vifamily.benchmark._environments import LAYER_PEERS, NPE_PEERS, PEERS, interpreter
from vifamily.benchmark.npe import Measured, _Case, _rows, prior_values, read_measured
from vifamily.cli import app
from vifamily.errors import BenchmarkError, ConfigError, ReferenceDataError


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """The normal linear task's posterior at two observations, N(x / 2, 0.05 I), in the form of the files."""
    source = np.random.default_rng(0)
    held = {"observations": np.array([1, 2])}
    for number in (1, 2):
        x = 0.3 * source.standard_normal(10)
        held[f"obs{number}_observation"] = x
        held[f"obs{number}_samples"] = x / 2 + np.sqrt(0.05) * source.standard_normal((200, 10))
    np.savez(tmp_path / "gaussian_linear.npz", **held)
    return tmp_path


def test_from_the_command_line_without_peers(reference: Path) -> None:
    rows_file = reference / "rows.json"
    done = CliRunner().invoke(app, [
        "benchmark", "npe", "--data", str(reference), "--tasks", "gaussian_linear", "--simulations", "300", "--repeats",
        "1", "--peers", "sbi", "--peers-dir", str(reference), "--clock", "cpu", "--json", str(rows_file),
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    own, peer = json.loads(rows_file.read_text("utf-8"))
    assert (own["side"], own["task"], own["simulations"], own["draws"]) == ("vifamily", "gaussian_linear", 300, 200)
    assert own["reason"] is None
    assert own["ratio"] == 1.0
    assert own["cpu_seconds"]["median"] == own["seconds"]["median"] > 0
    assert 0.4 < own["c2st"]["median"] < 0.95
    assert len(own["c2st_each"]) == 2
    assert own["bound"] is None  # bounds are for ten thousand simulations
    assert (peer["side"], peer["ratio"]) == ("sbi", None)
    assert "not installed" in peer["reason"]


def test_what_cannot_be_understood(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = benchmark_named("npe").run
    for options, words in (
        (Options(data=reference, tasks=("three_moons",), peers=()), "no task 'three_moons'"),
        (Options(data=reference, peers=("pymc",)), "no peer 'pymc'"),
        (Options(data=reference, clock="sun"), "the clock is"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(options)
    monkeypatch.delenv("VIFAMILY_REFERENCE_DATA", raising=False)
    with pytest.raises(ReferenceDataError, match="--data"):
        run(Options(peers=()))


def answer(folder: Path, draws: np.ndarray, **change: object) -> None:
    content = {"training": [2.0, 1.0], "drawing": [0.1, 0.1], "epochs": 7, "setting": "s", "memory_mb": 1.0,
               "versions": {"sbi": "1"}} | change  # fmt: skip
    np.savez(folder / "answer.npz", draws=draws)
    (folder / "answer.json").write_text(json.dumps(content), "utf-8")


def test_an_answer_is_read(tmp_path: Path) -> None:
    answer(tmp_path, np.zeros((1, 5, 2)))
    found = read_measured(tmp_path, (1, 5, 2))
    assert (found.training, found.drawing, found.epochs, found.versions) == ((2.0, 1.0), (0.1, 0.1), 7, {"sbi": "1"})


@pytest.mark.parametrize(
    ("draws", "change", "words"),
    [
        (np.zeros((1, 4, 2)), {}, "draws must be finite float64"),
        (np.zeros((1, 5, 2), dtype=np.float32), {}, "draws must be finite float64"),
        (np.full((1, 5, 2), np.nan), {}, "draws must be finite float64"),
        (np.zeros((1, 5, 2)), {"training": [1.0]}, "two positive numbers"),
        (np.zeros((1, 5, 2)), {"drawing": [-1.0, 1.0]}, "two positive numbers"),
        (np.zeros((1, 5, 2)), {"epochs": "many"}, "lacks or garbles"),
        (np.zeros((1, 5, 2)), {"versions": None}, "lacks or garbles"),
    ],
)
def test_a_hostile_answer_is_refused(tmp_path: Path, draws: np.ndarray, change: dict, words: str) -> None:
    answer(tmp_path, draws, **change)
    with pytest.raises(BenchmarkError, match=words):
        read_measured(tmp_path, (1, 5, 2))


def test_rows_are_medians_with_ratios() -> None:
    def measured(seconds: float, *accuracies: float) -> Measured:
        return Measured(np.zeros((2, 3, 2)), (seconds, seconds / 2), (0.0, 0.0), 9, "s", 1.0, {}, accuracies)

    case = _Case("slcp", {"draws": 3}, {}, [], {
        "vifamily": [measured(2.0, 0.6, 0.8), measured(4.0, 0.7, 0.9), measured(3.0, 0.5, 0.7)],
        "sbi": [measured(9.0, 0.9, 0.9), measured(12.0, 0.9, 0.99), measured(6.0, 0.8, 0.9)],
        "sbi_maf": [measured(1.0, 0.9, 0.9), "it fell over"],
    })  # fmt: skip
    own, peer, broken = _rows(case, 10_000, clock=0)
    assert own["wall_seconds"] == {"median": 3.0, "least": 2.0, "largest": 4.0}
    assert own["cpu_seconds"]["median"] == 1.5
    assert own["c2st"]["median"] == pytest.approx(0.7)
    assert own["c2st_each"] == [0.6, 0.8]
    assert (own["bound"], own["within_bound"], peer["within_bound"]) == (0.88, True, False)
    assert (own["ratio"], peer["ratio"]) == (1.0, 3.0)
    assert (broken["reason"], broken["ratio"]) == ("it fell over", None)


def test_priors_as_plain_values() -> None:
    found = prior_values(MultivariateNormal(torch.zeros(2), 0.5 * torch.eye(2)))
    assert found == {"kind": "normal", "mean": [0.0, 0.0], "covariance": [[0.5, 0.0], [0.0, 0.5]]}
    with pytest.raises(ConfigError, match="not Gamma"):
        prior_values(Gamma(torch.ones(2), torch.ones(2)))


def test_peers_belong_to_one_benchmark() -> None:
    assert not set(NPE_PEERS) & {*PEERS, *LAYER_PEERS}
    with pytest.raises(ConfigError, match="no peer 'sbi'"):
        benchmark_named("solvers").run(Options(peers=("sbi",), problems=("logistic_60_3",), quick=True))


def test_a_build_for_one_kind_of_processor_counts(tmp_path: Path) -> None:
    home = tmp_path / "sbi"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").write_text("", "utf-8")
    site = home / "lib" / "python3.11" / "site-packages"
    for name in ("torch-2.13.0+cpu", "sbi-0.27.0"):
        (site / f"{name}.dist-info").mkdir(parents=True)
    assert interpreter("sbi", tmp_path) is not None
    (site / "torch-2.13.0+cpu.dist-info").rename(site / "torch-2.13.1+cpu.dist-info")
    assert interpreter("sbi", tmp_path) is None
