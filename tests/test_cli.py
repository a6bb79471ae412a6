"""The command line: outputs, exit codes, clean errors, and the examples of its help."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vifamily import registry
from vifamily.cli import app

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--steps", "20"]


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


def example(text):
    """The example in a help text, as arguments."""
    found = re.search(r"Example:\s+(vifamily .*?)(?:\s+Exit codes|$)", " ".join(text.split()))
    assert found, text
    return shlex.split(found.group(1))[1:]


@pytest.mark.parametrize("command", ["list", "fit", "compare"])
def test_help_shows_an_example_that_runs(call, command):
    shown = call(command, "--help")
    assert shown.exit_code == 0
    arguments = example(shown.output)
    assert arguments[0] == command
    short = [] if command == "list" else SHORT
    if command == "compare":
        short = [*short, "--seeds", "1", "--jobs", "1"]
    done = call(*arguments, *short)
    assert done.exit_code == 0, done.output
    if command != "list":
        folder = Path(arguments[arguments.index("--out") + 1])
        assert (folder / "report.html").stat().st_size > 10_000


def test_help_of_the_whole(call):
    text = call("--help").output
    assert all(word in text for word in ("list", "fit", "compare", "benchmark"))
    assert example(text)[0] == "compare"


def test_list(call):
    text = call("list").output
    assert all(f"{kind}:" in text for kind in registry.kinds())
    assert re.search(r"^  elbo +\S", text, re.MULTILINE)
    one = call("list", "problems").output
    assert "banana" in one
    assert "objectives:" not in one


def test_list_as_json(call):
    content = json.loads(call("list", "families", "--json").output)
    assert set(content) == {"families"}
    assert set(content["families"]) == set(registry.names("families"))
    assert all(content["families"].values())


def test_list_the_matrix(call):
    done = call("list", "--matrix")
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in registry.names("families"))
    content = json.loads(call("list", "--matrix", "--json").output)
    assert {cell["family"] for cell in content["cells"]} == set(registry.names("families"))
    assert call("list", "families", "--matrix").exit_code == 2


def test_fit_shows_its_plan(call):
    only = call("fit", "banana", "--family", "mean_field", "--objective", "iwae", "--dry-run")
    assert only.exit_code == 0, only.output
    assert "uses       of the model" in only.output and "warning    " in only.output and "k-hat" not in only.output
    both = call("fit", "banana", "--family", "mean_field", "--plan", *SHORT)
    assert "uses       of the model" in both.output and "k-hat" in both.output


def test_fit_writes_everything(call, tmp_path):
    done = call("fit", "banana", "--family", "mean_field", "--out", "out", *SHORT)
    assert done.exit_code == 0, done.output
    assert "k-hat" in done.output
    assert "z[0]" in done.output
    names = {path.name for path in Path("out").iterdir()}
    assert names == {"summary.json", "draws.png", "trace.png", "report.html", "posterior"}
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert content["diagnosis"]["steps"] == 20
    from vifamily.posterior import Posterior

    assert Posterior.load(tmp_path / "out" / "posterior").record.steps == 20


def test_quiet_prints_nothing(call):
    done = call("fit", "banana", "--family", "mean_field", "--quiet", *SHORT)
    assert (done.exit_code, done.output) == (0, "")


def test_strict_fails_when_the_stopping_rule_was_not_met(call):
    arguments = ["banana", "--family", "mean_field", "--solver", "adam", "--quiet", *SHORT]
    assert call("fit", *arguments, "--strict").exit_code == 1


def test_compare_prints_json(call):
    done = call("compare", "banana", "--families", "mean_field", "--objectives", "elbo", "--seeds", 1, "--jobs", 1,
                "--json", "--quiet", *SHORT)  # fmt: skip
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert [cell["status"] for cell in content["cells"]] == ["ok"]
    assert {path.name for path in Path("results").iterdir()} >= {
        "results.json",
        "results.csv",
        "report.html",
        "draws.png",
    }


def test_compare_tells_what_was_not_possible_and_goes_on(call):
    done = call("compare", "banana", "--families", "mean_field,categorical", "--objectives", "elbo", "--seeds", 1,
                "--jobs", 1, *SHORT)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "not possible" in done.output
    content = json.loads(Path("results/results.json").read_text("utf-8"))
    assert [cell["status"] for cell in content["cells"]] == ["ok", "not possible"]


def test_compare_with_a_cell_that_fails_exits_with_1(call):
    # a low-rank family cannot have more columns than the problem has coordinates
    done = call("compare", "banana", "--families", "mean_field,low_rank(rank=50)", "--objectives", "elbo", "--seeds", 1,
                "--jobs", 1, *SHORT)  # fmt: skip
    assert done.exit_code == 1, done.output
    assert "failed: banana x low_rank(rank=50) x elbo, seed 0" in done.output
    assert Path("results/report.html").exists()


WRONG = {
    "problem": (["fit", "bananna"], "Did you mean 'banana'"),
    "family": (["fit", "banana", "--family", "mean_feild"], "Did you mean 'mean_field'"),
    "objective argument": (["fit", "banana", "--objective", "renyi(alpa=0.5)"], "Did you mean 'alpha'"),
    "code in a spec": (["fit", "banana", "--objective", "__import__('os').system('ls')"], "cannot read the spec"),
    "kind": (["list", "objetives"], "unknown kind"),
    "seed": (["fit", "banana", "--seed", "-1"], "seed must be"),
    "seeds": (["compare", "banana", "--seeds", "0"], "seeds must be"),
    "steps": (["compare", "banana", "--steps", "0"], "steps must be"),
    "draws": (["compare", "banana", "--draws", "-3"], "draws must be"),
    "time limit": (["compare", "banana", "--time-limit", "-3"], "time_limit must be"),
    "jobs": (["compare", "banana", "--jobs", "0"], "jobs must be"),
    "twice": (["compare", "banana", "banana"], "more than once"),
    "solver": (["compare", "banana", "--solver", "adamm"], "Did you mean 'adam'"),
    "impossible": (["fit", "banana", "--family", "categorical"], "categorical"),
    "option": (["fit", "banana", "--familly", "flow"], "No such option"),
    "no problem": (["fit"], "Missing argument"),
    "unwritable": (["compare", "banana", "--out", "file/results"], "cannot make the folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_command_is_one_line_and_2(call, name):
    Path("file").write_text("")
    arguments, words = WRONG[name]
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert "Traceback" not in done.output
    if name not in ("option", "no problem"):
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ")


def test_debug_shows_the_traceback(call):
    done = call("fit", "bananna", "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr


def test_interrupt_exits_with_130(call, monkeypatch):
    import importlib

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    # `vifamily.compare` as an attribute is the function; this is the module that the command imports from
    monkeypatch.setattr(importlib.import_module("vifamily.compare"), "compare", interrupted)
    done = call("compare", "banana")
    assert done.exit_code == 130
    assert "interrupted" in done.stderr


def test_module_is_the_command():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vifamily", "list", "solvers"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "adam" in done.stdout
