"""The reader of a folder of problems: what it finds, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vifamily import registry
from vifamily.errors import ReferenceDataError
from vifamily.problems._folder import ENVIRONMENT, find_folder, read_folder, reference_root
from vifamily.problems._targets import BEST_OF_FAMILY, PEERS, best_of_family


def good_reference() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(50, 2))
    return {"names": np.array(["mu", "theta[1]"]), "mean": draws.mean(0), "sd": draws.std(0), "draws": draws}


def write(folder: Path, *, data: Any = None, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps({"N": 2, "y": [1, 2.5]} if data is None else data))
    np.savez(folder / "reference.npz", **{k: v for k, v in (good_reference() | changed).items() if v is not None})
    return folder


def test_reads_data_and_reference(tmp_path: Path) -> None:
    data, reference = read_folder(write(tmp_path / "collection" / "name"))
    assert data["N"] == 2
    np.testing.assert_array_equal(data["y"], [1.0, 2.5])
    assert reference.kind == "published"
    assert reference.names == ("mu", "theta[0]")  # counted from 0 here
    assert reference.draws.shape == (50, 2)
    assert "collection/name" in reference.note


def test_reads_arrays_and_moments_alone(tmp_path: Path) -> None:
    write(tmp_path, draws=None)
    (tmp_path / "data.json").unlink()
    np.savez(tmp_path / "data.npz", observed=np.array([1.0, np.nan]))
    data, reference = read_folder(tmp_path)
    assert np.isnan(data["observed"][1])
    assert reference.draws is None


def test_environment_variable_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    write(tmp_path / "posteriordb" / "one")
    assert find_folder("posteriordb", "one") == tmp_path / "posteriordb" / "one"
    with pytest.raises(ReferenceDataError, match=ENVIRONMENT):
        find_folder("posteriordb", "two")
    with pytest.raises(ReferenceDataError, match="not here"):
        registry.build("problems", "garch11")


def test_without_the_variable_it_looks_beside_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert reference_root() == Path(__file__).resolve().parents[3] / "shared"


def truncated(folder: Path) -> None:
    content = (folder / "reference.npz").read_bytes()
    (folder / "reference.npz").write_bytes(content[: len(content) // 2])


def pickled(folder: Path) -> None:
    np.savez(folder / "reference.npz", **(good_reference() | {"mean": np.array([{"a": 1}, None], dtype=object)}))


BROKEN = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), "no folder"),
    "no data": (lambda f: (f / "data.json").unlink(), "neither data.json nor data.npz"),
    "data are not JSON": (lambda f: (f / "data.json").write_text("{'N': 2"), "cannot read"),
    "data are a list": (lambda f: (f / "data.json").write_text("[1]"), "must hold a mapping"),
    "text in data": (lambda f: (f / "data.json").write_text('{"y": ["a"]}'), "list of numbers"),
    "ragged data": (lambda f: (f / "data.json").write_text('{"y": [[1, 2], [3]]}'), "differ in length"),
    "empty data": (lambda f: (f / "data.json").write_text('{"y": []}'), "list of numbers"),
    "no reference": (lambda f: (f / "reference.npz").unlink(), "cannot read"),
    "truncated reference": (truncated, "cannot read"),
    "pickle": (pickled, "cannot read"),
    "empty file": (lambda f: (f / "reference.npz").write_bytes(b""), "cannot read"),
    "no mean": (lambda f: write(f, mean=None), "lacks mean"),
    "numbers as names": (lambda f: write(f, names=np.arange(2)), "names must be a list of strings"),
    "text as sd": (lambda f: write(f, sd=np.array(["a", "b"])), "sd must be numbers"),
    "nan in draws": (lambda f: write(f, draws=np.full((5, 2), np.nan)), "draws must be finite"),
    "swapped columns": (lambda f: write(f, mean=np.array([3.0, 0.0])), "draws and mean disagree for 'mu'"),
    "too many names": (lambda f: write(f, names=np.array(["a", "b", "c"])), "mean must be 3 finite numbers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(case: str, tmp_path: Path) -> None:
    spoil, message = BROKEN[case]
    spoil(write(tmp_path / "x"))
    with pytest.raises(ReferenceDataError, match=message):
        read_folder(tmp_path / "x")


def test_targets_name_problems_that_exist() -> None:
    for family in ("mean_field", "full_rank"):
        assert len(BEST_OF_FAMILY[family]) == 11
        assert BEST_OF_FAMILY[family].keys() == PEERS[family].keys()
        for spec in BEST_OF_FAMILY[family]:
            assert registry.parse(spec).name in registry.names("problems")
    assert best_of_family("gp_pois_regr", "mean_field").log_sd == 3.29
    with pytest.raises(ReferenceDataError, match="no figure for 'banana'"):
        best_of_family("banana", "full_rank")
