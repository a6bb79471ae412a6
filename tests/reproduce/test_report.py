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
