"""Data sets are read whole and in order, and what cannot be read says why."""

import json
import sys
from pathlib import Path

import pytest

from vifamily.errors import DataError, MissingExtraError
from vifamily.llm import read_records
from vifamily.llm._extra import require

RECORDS = [{"prompt": "a é", "completion": "b"}, {"prompt": "c", "completion": "d"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "lines.json", "rows.parquet"])
def test_files_give_their_records(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(RECORDS), path)
    elif name == "rows.json":
        path.write_text(json.dumps(RECORDS), "utf-8")
    else:
        path.write_text("\n".join(json.dumps(record) for record in RECORDS) + "\n\n", "utf-8")
    assert read_records(path) == RECORDS
    assert read_records(str(path)) == RECORDS


def test_records_are_copied() -> None:
    read = read_records(iter(RECORDS))
    read[0]["prompt"] = "changed"
    assert RECORDS[0]["prompt"] == "a é"


BAD_FILES = {
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n\n", "holds no records"),
    "none.json": (b"[]", "holds no records"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2"),
    "half.json": (b'[{"text": "a"}', "line 1"),
    "list.jsonl": (b"[1, 2]\n", "line 1 .* must be an object .* got list"),
    "number.json": (b"3", "must hold a list of objects, got int"),
    "latin.jsonl": ('{"text": "é"}'.encode("latin-1"), "not text in UTF-8"),
    "deep.jsonl": (b"[" * 100_000, "line 1 .* nested too deeply"),
    "deep.json": (b"[" * 100_000, "nested too deeply"),
    "rows.csv": (b"a,b\n1,2\n", "must end in one of"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_say_why(tmp_path: Path, name: str) -> None:
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_records(tmp_path / name)


def test_broken_parquet_says_so(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_records(tmp_path / "rows.parquet")


def test_what_is_no_data_set_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read_records(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_records(tmp_path)
    with pytest.raises(DataError, match="holds no records"):
        read_records([])
    with pytest.raises(DataError, match="one mapping with the keys train, test"):
        read_records({"train": [], "test": []})
    with pytest.raises(DataError, match="record 1 must be a dictionary"):
        read_records([{"text": "a"}, "b"])  # type: ignore[list-item]


def test_missing_package_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "rows.parquet").write_bytes(b"x")
    with pytest.raises(
        MissingExtraError, match="needs pyarrow, which is not installed. Run: pip install .vifamily.llm"
    ):
        read_records(tmp_path / "rows.parquet")
    with pytest.raises(MissingExtraError, match="'owner/name', which is no file here .* .vifamily.llm"):
        read_records("owner/name")
    with pytest.raises(MissingExtraError, match=r"pip install \"vifamily\[llm\]\""):
        require("transformers", "this")


def test_package_that_breaks_is_told_from_one_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "needs_another.py").write_text("import package_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingExtraError, match="installed but cannot be imported: operator torchvision::nms"):
        require("broken_package", "this")
    with pytest.raises(MissingExtraError, match="installed but cannot be imported: No module named 'package_that"):
        require("needs_another", "this")


@pytest.mark.parametrize("name", ["deep.jsonl", "deep.json"])
def test_text_that_is_nested_too_deeply_is_refused(name, tmp_path):
    path = tmp_path / name
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"nested too deeply|not JSON"):
        read_records(path)
