"""Files: round trip, replacement in one step, and everything hostile."""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from vifamily import checkpoint
from vifamily.errors import CheckpointError, ConfigError

ROOT = Path(__file__).resolve().parents[2]


def saved(folder, tensors=None, meta=None):
    return checkpoint.write(folder, {"a": torch.arange(3.0)} if tensors is None else tensors, meta or {"step": 1})


def edit(folder, change, *, rehash=None):
    """Change the JSON; with bytes, put them in place of the tensor file with a hash that fits."""
    path = folder / "checkpoint.json"
    header = json.loads(path.read_text())
    if rehash is not None:
        digest = hashlib.sha256(rehash).hexdigest()
        header |= {"sha256": digest, "tensors": f"checkpoint-{digest[:16]}.safetensors"}
        (folder / header["tensors"]).write_bytes(rehash)
    change(header)
    path.write_text(json.dumps(header))


def test_round_trip_of_every_kind(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "view": base.T,
        "shared": base[0],
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.zeros(0, 2),
        "flags": torch.tensor([True, False]),
        "whole": torch.tensor([1, -2]),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.tensor([math.nan, math.inf])),
    }
    meta = {"x": [1, 2.5, None, True, "text ∂"], "deep": {"a": {"b": (1, 2)}}, "bad": [math.nan, math.inf, -math.inf]}
    meta["numpy"] = np.float64(0.1)
    checkpoint.write(tmp_path, tensors, meta)
    found, plain = checkpoint.read(tmp_path)
    assert set(found) == set(tensors)
    for key, value in tensors.items():
        torch.testing.assert_close(found[key], value.detach(), rtol=0, atol=0, equal_nan=True)
    assert plain["x"] == [1, 2.5, None, True, "text ∂"]
    assert plain["deep"] == {"a": {"b": [1, 2]}}
    assert math.isnan(plain["bad"][0])
    assert plain["bad"][1:] == [math.inf, -math.inf]
    assert plain["numpy"] == 0.1


def test_replacing_leaves_two_files(tmp_path):
    for step in range(3):
        saved(tmp_path, {"a": torch.full((2,), float(step))}, {"step": step})
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]
    tensors, meta = checkpoint.read(tmp_path)
    assert meta["step"] == tensors["a"][0] == 2


def test_names_do_not_disturb_each_other(tmp_path):
    saved(tmp_path)
    checkpoint.write(tmp_path, {"b": torch.ones(1)}, {}, name="other")
    assert set(checkpoint.read(tmp_path)[0]) == {"a"}
    assert set(checkpoint.read(tmp_path, name="other")[0]) == {"b"}


def test_a_writer_that_fails_leaves_the_old_state(tmp_path, monkeypatch):
    saved(tmp_path)
    real = os.replace

    def fail(source, target):
        if str(target).endswith(".json"):
            raise OSError("no space left")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConfigError, match="no space left"):
        saved(tmp_path, {"a": torch.zeros(9)}, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.read(tmp_path)[1]["step"] == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_killed_writer_leaves_a_whole_state(tmp_path):
    code = """
        import sys, torch
        from vifamily import checkpoint
        step = 0
        while True:
            step += 1
            checkpoint.write(sys.argv[1], {"a": torch.full((20_000,), float(step))}, {"step": step})
            print(step, flush=True)
    """
    for delay in (0.0, 0.017):
        writer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
        )
        for _ in range(3):
            writer.stdout.readline()
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        tensors, meta = checkpoint.read(tmp_path)
        assert bool((tensors["a"] == meta["step"]).all())


def test_prepare_makes_the_folder(tmp_path):
    assert checkpoint.prepare(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "bad\0name"):
        with pytest.raises(ConfigError, match="cannot write"):
            checkpoint.prepare(folder)
        with pytest.raises(ConfigError, match="cannot write"):
            saved(folder)


@pytest.mark.parametrize("value", [object(), {1: 2}, torch.zeros(1), {"a": {2}}])
def test_meta_that_is_not_plain(tmp_path, value):
    with pytest.raises(ConfigError, match="meta.x"):
        saved(tmp_path, meta={"x": value})


@pytest.mark.parametrize("name", ["../up", "a/b", "", "a.b", "x" * 65])
def test_names_that_are_paths(tmp_path, name):
    with pytest.raises(ConfigError, match="letters, digits"):
        checkpoint.write(tmp_path, {}, {}, name=name)
    with pytest.raises(ConfigError, match="letters, digits"):
        checkpoint.read(tmp_path, name=name)


def test_nothing_there(tmp_path):
    assert checkpoint.read_if_any(tmp_path) is None
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.read(tmp_path / "nowhere")
    saved(tmp_path)
    assert checkpoint.read_if_any(tmp_path)[1] == {"step": 1}


# -- hostile files ---


def truncate_tensors(folder):
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])


def flip_a_bit(folder):
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def drop_tensors(folder):
    (file,) = folder.glob("*.safetensors")
    file.unlink()


def tensors_are_a_folder(folder):
    (file,) = folder.glob("*.safetensors")
    file.unlink()
    file.mkdir()


def json_is_a_folder(folder):
    (folder / "checkpoint.json").unlink()
    (folder / "checkpoint.json").mkdir()


def json_with(text):
    return lambda folder: (folder / "checkpoint.json").write_bytes(text)


def changed(**values):
    return lambda folder: edit(folder, lambda header: header.update(values))


def without(key):
    return lambda folder: edit(folder, lambda header: header.pop(key))


def fake_tensors(payload):
    return lambda folder: edit(folder, lambda header: None, rehash=payload)


def escape(folder):
    """A valid tensor file outside the folder, with the right hash."""
    payload = safetensors.torch.save({"a": torch.zeros(1)})
    (folder.parent / "secret.safetensors").write_bytes(payload)
    edit(folder, lambda h: h.update(tensors="../secret.safetensors", sha256=hashlib.sha256(payload).hexdigest()))


LENGTH = (2**40).to_bytes(8, "little")
OVERLAP = json.dumps({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}}).encode()
HOSTILE = {
    "truncated tensors": (truncate_tensors, "truncated or changed"),
    "flipped bit": (flip_a_bit, "truncated or changed"),
    "missing tensors": (drop_tensors, "missing"),
    "tensors are a folder": (tensors_are_a_folder, "cannot read"),
    "JSON is a folder": (json_is_a_folder, "cannot read"),
    "wrong hash": (changed(sha256="0" * 64), "truncated or changed"),
    "hash of a wrong type": (changed(sha256=5), "'sha256' must be str"),
    "path traversal": (escape, "not a name of this format"),
    "absolute path": (changed(tensors="/etc/passwd"), "not a name of this format"),
    "name with a NUL": (changed(tensors="checkpoint-\0.safetensors"), "not a name of this format"),
    "name of a wrong type": (changed(tensors=["a"]), "'tensors' must be str"),
    "future schema": (changed(schema=2), "format version '2'"),
    "true as schema": (changed(schema=True), "format version"),
    "schema as text": (changed(schema="1"), "format version"),
    "no schema": (without("schema"), "format version"),
    "no meta": (without("meta"), "no 'meta' dictionary"),
    "meta is a list": (changed(meta=[1]), "no 'meta' dictionary"),
    "malformed number": (changed(meta={"x": {"non_finite": "__import__('os')"}}), "malformed number"),
    "empty JSON": (json_with(b""), "not valid JSON"),
    "half a JSON": (json_with(b'{"schema": 1, "tens'), "not valid JSON"),
    "not text": (json_with(b"\xff\xfe\x00\x80"), "not valid JSON"),
    "pickle": (json_with(b"\x80\x04\x95\x10."), "not valid JSON"),
    "a list": (json_with(b"[1, 2]"), "holds a list"),
    "NaN in the JSON": (json_with(b'{"schema": 1, "x": NaN}'), "holds NaN"),
    "deep nesting": (json_with(b"[" * 200_000 + b"]" * 200_000), "not valid JSON"),
    "tensors are noise": (fake_tensors(b"noise" * 10), "not a valid safetensors file"),
    "tensors are empty": (fake_tensors(b""), "not a valid safetensors file"),
    "tensors claim a huge header": (fake_tensors(LENGTH + b"{}"), "not a valid safetensors file"),
    "tensors claim a huge shape": (
        fake_tensors(len(OVERLAP).to_bytes(8, "little") + OVERLAP + b"\0\0\0\0"),
        "not a valid safetensors file",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(tmp_path, name):
    spoil, message = HOSTILE[name]
    folder = saved(tmp_path / "fit")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(folder)


@pytest.mark.parametrize("depth", [200, 330, 480, 700, 950])
def test_nesting_at_the_edge(tmp_path, depth):
    # deep enough for one of the two passes over the JSON, not for the other
    folder = saved(tmp_path)
    edit(folder, lambda header: header.update(meta={"x": "NEST"}))
    path = folder / "checkpoint.json"
    path.write_text(path.read_text().replace('"NEST"', "[" * depth + "]" * depth))
    try:
        checkpoint.read(folder)
    except CheckpointError as error:
        assert "valid" in str(error)


def test_a_huge_json_is_not_read(tmp_path, monkeypatch):
    saved(tmp_path, meta={"x": "y" * 500})
    monkeypatch.setattr("vifamily.checkpoint._files._LARGEST_JSON", 400)
    with pytest.raises(CheckpointError, match="larger than"):
        checkpoint.read(tmp_path)


def test_no_pickle_is_ever_loaded():
    for path in (ROOT / "vifamily").rglob("*.py"):
        text = path.read_text("utf-8")
        assert (
            re.search(r"(import|from) c?(loud)?pickle\b.*loads?\b|pickle\.loads?\(|^import pickle$", text, re.M) is None
        ), path
        assert "torch.load(" not in text, path
        assert "allow_pickle=True" not in text, path


def test_field_checks_types():
    data = {"i": 1, "f": 1.5, "b": True, "n": None}
    assert checkpoint.field(data, "i", float) == 1.0
    assert isinstance(checkpoint.field(data, "i", float), float)
    assert checkpoint.field(data, "n", int, optional=True) is None
    for key, kind in (("b", int), ("b", float), ("f", int), ("n", int), ("missing", str), ("i", str)):
        with pytest.raises(CheckpointError, match=key):
            checkpoint.field(data, key, kind)
    with pytest.raises(CheckpointError):
        checkpoint.field(["not a dictionary"], "i", int)
