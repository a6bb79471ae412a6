"""Averages over seeds, labels, and the files of a comparison; from outcomes made by hand."""

import csv
import io
import json
import math

import numpy as np
import pytest

from vifamily import report
from vifamily.compare.cells import Outcome
from vifamily.compare.labels import items, split_specs
from vifamily.compare.measure import Target
from vifamily.compare.pictures import shown_columns
from vifamily.compare.result import Comparison
from vifamily.compare.tables import figure_text, mean_and_error, summarise
from vifamily.errors import ConfigError, SpecError, UnknownNameError

EVIL = "<b>&[red]"


def outcome(family, seed, error, *, status="ok", reason=None, k=0.4):
    values = {"mean_error": error, "k_hat": k, "k_hat_threshold": 0.7, "elbo": -2.0 + 0.1 * seed, "steps": 100 + seed}
    values |= {"stop_reason": "converged" if seed else "max_steps", "seconds": 0.5, "mmd": None}
    draws = np.random.default_rng(seed).normal(size=(60, 3)) if status == "ok" else None
    return Outcome(
        EVIL, family, "elbo", seed, status, reason, values if status == "ok" else {}, {"a": 0.1, "b": -0.9, "c": 0.3},
        ("a", "b", "c"), draws, {"step": [0.0, 1.0], "loss": [2.0, 1.0], "loss_error": [0.1, 0.1]},
    )  # fmt: skip


def comparison():
    cells = (
        outcome("mean_field", 0, 0.2),
        outcome("mean_field", 1, 0.4, k=1.0),
        outcome("flow", 0, 0.1),
        outcome("flow", 1, math.nan, status="failed", reason=EVIL),
        outcome("implicit", 0, 0, status="not possible", reason="needs a density"),
        outcome("implicit", 1, 0, status="not possible", reason="needs a density"),
    )
    names = ("a", "b", "c")
    target = Target(EVIL, "A description " + EVIL, names, "nuts", np.random.default_rng(0).normal(size=(80, 3)), -1.5)
    config = {
        "problems": [EVIL],
        "families": ["mean_field", "flow", "implicit"],
        "objectives": ["elbo"],
        "seeds": [0, 1],
    }
    return Comparison(cells, config, {EVIL: target})


def test_rows_are_means_with_errors_across_seeds():
    first, second, third = comparison().rows()
    assert first["mean_error"] == pytest.approx(0.3)
    assert first["mean_error_error"] == pytest.approx(0.1)  # sd sqrt(0.02), over sqrt(2)
    assert first["elbo"] == pytest.approx(-1.95)
    assert first["mmd"] is None
    assert first["stop_reason"] == "max_steps 1, converged 1"
    assert (second["status"], second["fitted"], second["seeds"], second["reason"]) == ("partly failed", 1, 2, EVIL)
    assert second["mean_error_error"] is None
    assert (third["status"], third["mean_error"]) == ("not possible", None)


def test_mean_and_error():
    assert mean_and_error([]) == (None, None)
    assert mean_and_error([2.0]) == (2.0, None)
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))


TEXTS = {
    (0.2, 0.0, 2): "0.20 ± 0.00",
    (1234567.0, None, 2): "1.23e+06",
    (-30.123, 1.4, 1): "-30.1 ± 1.4",
    (1e9, 1e3, 0): "1e+09 ± 1000",
    (None, None, 3): "-",
}


@pytest.mark.parametrize("numbers", TEXTS)
def test_figure_text(numbers):
    assert figure_text(*numbers) == TEXTS[numbers]


def test_narrow_terminals_get_the_table_without_errors():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=140)
    console.print(comparison())
    assert "±" not in console.file.getvalue()
    assert "±" in str(comparison())


def test_table_text_marks_bad_k_hat_and_gives_reasons():
    text = str(comparison())
    assert "0.70 ± 0.30" in text  # k-hat 0.4 and 1.0: not above 0.7 on average
    assert "not possible: needs a density" in text
    assert "1 of 2 failed" in text
    assert EVIL in text
    over = Comparison((outcome("mean_field", 0, 0.2, k=0.9),), {})
    assert "0.90 !" in str(over)


def test_json_is_strict_and_complete(tmp_path):
    text = comparison().to_json(tmp_path / "results.json")

    def refuse(word):
        raise AssertionError(word)

    content = json.loads(text, parse_constant=refuse)
    assert content == json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert len(content["cells"]) == 6
    assert len(content["summary"]) == 3
    assert content["cells"][0]["values"]["mean_error"] == 0.2
    assert content["problems"][EVIL]["reference"] == "nuts"
    assert "mean_error" in content["measures"]


def test_csv_has_one_line_per_cell():
    lines = list(csv.DictReader(io.StringIO(comparison().to_csv())))
    assert len(lines) == 6
    assert lines[0]["problem"] == EVIL
    assert float(lines[1]["mean_error"]) == 0.4
    assert lines[0]["mmd"] == ""
    assert lines[3]["reason"] == EVIL
    assert lines[3]["mean_error"] == ""


def test_files_are_written_and_the_page_is_escaped(tmp_path):
    files = comparison().save(tmp_path / "new")
    assert set(files) == {"results.json", "results.csv", "table.txt", "draws.png", "report.html"}
    page = files["report.html"].read_text("utf-8")
    assert EVIL not in page
    assert page.count("<table>") == 3
    assert page.count("data:image/png") == 1
    assert "needs a density" in page


def test_page_without_any_fit():
    failed = Comparison((outcome("f", 0, 0, status="failed", reason="why"),), {"seeds": [0]})
    assert failed.figure() is None
    assert "0 of 1 cells were fitted, 1 failed" in failed.html()


def test_pictures_show_the_quantities_that_are_furthest_off():
    result = comparison()
    assert shown_columns(result.targets[EVIL], result.fitted) == [1, 2]


def test_trace_of_a_cell():
    assert comparison().trace(EVIL, "flow", "elbo").axes[0].get_xlabel() == "step"
    with pytest.raises(KeyError, match="no fitted cell"):
        comparison().trace(EVIL, "implicit", "elbo")


def test_page_of_a_comparison_loads_in_a_browser(tmp_path):
    import shutil
    import subprocess

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome is installed")
    page = comparison().html()
    script = (
        '<script>document.title=[document.querySelectorAll("tbody tr").length,'
        "document.images[0].naturalWidth>500]</script>"
    )
    path = report.write_text(tmp_path / "report.html", page.replace("</body>", script + "</body>"))
    profile = tmp_path / "profile"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "<title>7,true</title>" in done.stdout  # three methods, one problem, three cells without result


SPLITS = {
    "elbo,iwae": ["elbo", "iwae"],
    "elbo,iwae,renyi(alpha=0.5)": ["elbo", "iwae", "renyi(alpha=0.5)"],
    'a(x=[1, 2], y={"p,q": (1, 2)}) , b': ['a(x=[1, 2], y={"p,q": (1, 2)})', "b"],
    "a('x)',b),c": ["a('x)',b)", "c"],
    " , ,a,": ["a"],
    "": [],
}


@pytest.mark.parametrize("text", SPLITS)
def test_split_specs(text):
    assert split_specs(text) == SPLITS[text]


def test_labels_are_specs():
    labels = [item.label for item in items("objectives", ["elbo, renyi( alpha = 0.5 )", "iwae"])]
    assert labels == ["elbo", "renyi(alpha=0.5)", "iwae"]


def test_label_of_an_entry_is_its_spec():
    from vifamily.objectives import Renyi

    (item,) = items("objectives", Renyi(alpha=0.25))
    assert item.label == "renyi(alpha=0.25)"
    assert item.resumable
    assert item.given is None


def test_label_of_an_object_without_spec():
    class Mine:
        name = "mine"

    (item,) = items("families", [Mine()])
    assert (item.label, item.resumable) == ("mine", False)
    assert item.given is not None


@pytest.mark.parametrize(
    ("kind", "values", "error", "words"),
    [
        ("families", [], ConfigError, "at least one"),
        ("families", "mean_field,mean_field", ConfigError, "more than once"),
        ("families", "mean_feild", UnknownNameError, "Did you mean 'mean_field'"),
        ("objectives", "renyi(alpa=1)", SpecError, "Did you mean 'alpha'"),
        ("objectives", "elbo, __import__('os')", SpecError, "by name"),
        ("problems", "bananna", UnknownNameError, "Did you mean 'banana'"),
    ],
)
def test_wrong_items(kind, values, error, words):
    with pytest.raises(error, match=words):
        items(kind, values)


def test_summarise_keeps_the_order():
    rows = summarise(comparison().cells)
    assert [row["family"] for row in rows] == ["mean_field", "flow", "implicit"]
