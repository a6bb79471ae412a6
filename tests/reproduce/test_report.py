"""The frame of reproductions: claims, tables, files, and the command."""

import io
import json

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

from vifamily import reproduce
from vifamily.cli import app
from vifamily.errors import ConfigError, UnknownNameError
from vifamily.reproduce import Claim, Options, Paper, Reproduction
from vifamily.reproduce._parts import digest


def claims(*holds):
    return [Claim(f"claim {i}", 1.0, 1.5, 0.1, h, "no machine" if h is None else "") for i, h in enumerate(holds)]


def test_only_a_claim_that_does_not_hold_fails():
    assert not Reproduction(claims(True, None)).failed
    assert Reproduction(claims(True, None, False)).failed


def test_a_claim_that_was_not_tried_needs_a_reason():
    with pytest.raises(ConfigError, match="say why"):
        Claim("x", None, None, None, None)


def test_files_hold_the_claims_the_tables_and_the_pictures(tmp_path):
    found = Reproduction(
        [*claims(True), Claim("wide", None, float("inf"), None, True)],
        {"one": Figure(figsize=(1, 1))},
        {"rows": [{"a": 1.0}]},
    )
    written = found.write(tmp_path / "new")
    assert [path.name for path in written] == ["claims.json", "tables.json", "one.png"]
    rows = json.loads((tmp_path / "new" / "claims.json").read_text())
    assert rows[0] == {
        "claim": "claim 0", "published": 1.0, "measured": 1.5, "error": 0.1, "holds": True, "reason": ""
    }  # fmt: skip
    assert rows[1]["measured"] == "inf"


def test_the_table_says_what_was_not_tried():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(Reproduction(claims(False, None)).table())
    text = console.export_text()
    assert "NO" in text and "not tried: no machine" in text and "1.5 ± 0.1" in text


def test_an_unknown_paper_is_named():
    with pytest.raises(UnknownNameError, match="choose among"):
        reproduce.paper_named("nothing")


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (None, 0), (False, 1)])
def test_the_command_exits_by_what_holds(holds, code, monkeypatch, tmp_path):
    paper = Paper("A title", "somewhere", lambda options: Reproduction(claims(holds)))
    monkeypatch.setattr(reproduce, "names", lambda: ("one", "two"))
    monkeypatch.setattr(reproduce, "paper_named", lambda name: paper)
    result = CliRunner().invoke(app, ["reproduce", "all", "--json", str(tmp_path / "x.json"), "--out", str(tmp_path)])
    assert result.exit_code == code
    assert len(json.loads((tmp_path / "x.json").read_text())) == 2
    assert (tmp_path / "two" / "claims.json").exists()


@pytest.mark.parametrize("name", reproduce.names())
def test_every_paper_says_what_it_is(name):
    paper = reproduce.paper_named(name)
    assert paper.title and paper.source and callable(paper.run)
    assert Options().quick is False


def test_the_command_hands_on_the_folder_of_data(monkeypatch, tmp_path):
    seen = []

    def run(options):
        seen.append(options.data)
        return Reproduction(claims(True))

    monkeypatch.setattr(reproduce, "paper_named", lambda name: Paper("A title", "somewhere", run))
    assert CliRunner().invoke(app, ["reproduce", "x", "--data", str(tmp_path), "-q"]).exit_code == 0
    assert seen == [tmp_path]
    refused = CliRunner().invoke(app, ["reproduce", "x", "--data", str(tmp_path / "nothing")])
    assert refused.exit_code == 2 and "must be a folder" in refused.output


def part(counted, name="a part", value=1.0, **settings):
    def compute():
        counted.append(name)
        return [{"name": name, "value": value, "pair": (1, 2)}]

    return {"name": name, "compute": compute, **settings}


def test_finished_parts_are_taken_up(tmp_path):
    said, counted = [], []
    options = Options(say=said.append, parts=tmp_path / "parts")
    first = options.rows(**part(counted, value=float("inf"), seed=1))
    again = options.rows(**part(counted, value=2.0, seed=1))
    assert again == first == [{"name": "a part", "value": float("inf"), "pair": [1, 2]}]
    assert counted == ["a part"] and said == ["a part", "a part (kept from before)"]


@pytest.mark.parametrize(("name", "seed"), [("another", 1), ("a part", 2)])
def test_a_part_of_other_settings_is_computed(name, seed, tmp_path):
    counted = []
    options = Options(say=lambda line: None, parts=tmp_path)
    options.rows(**part(counted, seed=1))
    assert options.rows(**part(counted, name, 3.0, seed=seed))[0]["value"] == 3.0
    assert options.rows(**part(counted, seed=1))[0]["value"] == 1.0
    assert len(counted) == 2


@pytest.mark.parametrize("content", ["", "{", '{"key": 3}', '{"rows": []}', "[]", '"text"'])
def test_a_damaged_part_is_computed_anew(content, tmp_path):
    counted = []
    options = Options(say=lambda line: None, parts=tmp_path)
    options.rows(**part(counted))
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    assert options.rows(**part(counted, value=5.0))[0]["value"] == 5.0
    assert options.rows(**part(counted, value=6.0))[0]["value"] == 5.0


def test_versions_are_part_of_what_a_part_depends_on(tmp_path, monkeypatch):
    counted = []
    options = Options(say=lambda line: None, parts=tmp_path)
    options.rows(**part(counted))
    monkeypatch.setattr("vifamily.reproduce._parts.versions", lambda: {"torch": "0"})
    options.rows(**part(counted))
    assert len(counted) == 2


def test_a_part_that_fails_leaves_those_before_it(tmp_path):
    counted = []
    options = Options(say=lambda line: None, parts=tmp_path)
    options.rows(**part(counted))
    with pytest.raises(ZeroDivisionError):
        options.row("broken", lambda: {"value": 1 / 0})
    assert options.row("broken", lambda: {"value": 4}) == {"value": 4}
    assert len(list(tmp_path.iterdir())) == 2


def test_the_command_keeps_parts_in_its_folder_and_computes_them_anew_when_asked(monkeypatch, tmp_path):
    counted = []

    def run(options):
        options.rows(**part(counted))
        return Reproduction(claims(True))

    paper = Paper("A title", "somewhere", run)
    monkeypatch.setattr(reproduce, "paper_named", lambda name: paper)
    monkeypatch.setattr(reproduce, "names", lambda: ("x",))
    call = ["reproduce", "x", "--out", str(tmp_path)]
    for more in ([], [], ["--fresh"]):
        assert CliRunner().invoke(app, [*call, *more]).exit_code == 0
    assert len(counted) == 2


def test_a_digest_is_that_of_the_contents(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("a")
    before = digest([one, other])
    assert digest([other, one]) == before
    other.write_text("b")
    assert digest([one, other]) != before
