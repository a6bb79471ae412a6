"""The HTML page: escaped, self-contained, accessible, and read by a real browser where one is installed."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from vifamily import plots, report
from vifamily.errors import ConfigError, ShapeError

EVIL = '<script>document.title="broken"</script>&"\''
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def page():
    draws = np.random.default_rng(0).normal(size=(200, 2))
    return report.html(
        "Comparison " + EVIL,
        report.Text("Two paragraphs.\n\nHere.", heading=EVIL),
        report.Table(
            ["family", "error"],
            [
                ["b" + EVIL, report.Cell("0.2", 0.2, "bad")],
                ["a", report.Cell("0.1", 0.1)],
                ["c", report.Cell("none", None)],
            ],
            caption="errors",
            notes=["", "in posterior sd"],
        ),
        report.Picture(plots.pairs(draws), alt="pairs " + EVIL, caption="Pairs."),
        report.Text("vifamily compare\n  --seeds 3", fixed=True),
        subtitle="sub",
        footer="end",
    )


class Reader(HTMLParser):
    VOID = {"meta", "link", "img", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def test_page_is_well_formed_and_escaped():
    text = page()
    reader = read(text)
    assert EVIL not in text
    assert reader.tags.count("script") == 1  # ours alone
    assert reader.tags.count("table") == 1
    assert "<pre>vifamily compare\n  --seeds 3</pre>" in text


def test_page_asks_nothing_of_the_network():
    for _, attributes in read(page()).attributes:
        for key in ("src", "href"):
            if key in attributes:
                assert attributes[key].startswith("data:")
    assert not re.search(r"https?:|@import|url\(", page())


def test_page_is_accessible():
    reader = read(page())
    assert ("html", {"lang": "en"}) in reader.attributes
    assert all(a.get("alt") for tag, a in reader.attributes if tag == "img")
    assert all(a.get("scope") == "col" for tag, a in reader.attributes if tag == "th")


def test_numbers_sort_by_value_and_missing_ones_are_empty():
    values = [a["data-value"] for tag, a in read(page()).attributes if tag == "td" and "data-value" in a]
    assert values == ["0.2", "0.1", ""]


def test_page_without_tables_has_no_script():
    assert "<script" not in report.html("t", report.Text("x"))


def test_picture_needs_a_description():
    with pytest.raises(ConfigError, match="alt="):
        report.html("t", report.Picture(b"", alt=" "))


@pytest.mark.parametrize("table", [report.Table(["a", "b"], [["x"]]), report.Table(["a", "b"], [], notes=["one"])])
def test_ragged_table_is_refused(table):
    with pytest.raises(ShapeError, match="one"):
        report.html("t", table)


def test_png_is_reproducible():
    def figure():
        out = Figure(figsize=(2, 2))
        out.subplots().plot([0, 1])
        return out

    assert report.png(figure()) == report.png(figure())


def test_write_is_atomic_and_makes_folders(tmp_path):
    path = report.write(tmp_path / "a" / "b.html", "first")
    report.write(path, "second")
    assert "second" in path.read_text("utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["b.html"]


def test_unwritable_folder_gives_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot write"):
        report.write(tmp_path / "file" / "b.html", "t")


def in_browser(path, folder, *extra):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome is installed")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}",
        *extra,
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_page_loads_in_a_browser_and_sorts(tmp_path):
    # The click is added here, after the page's own script: the printed document shows whether sorting works.
    click = (
        '<script>document.querySelectorAll("th button")[1].click();'
        'document.title="imgs:"+[...document.images].map(i=>i.naturalWidth>0)</script>'
    )
    path = report.write_text(tmp_path / "page.html", page().replace("</body>", click + "</body>"))
    seen = in_browser(path, tmp_path / "profile", "--virtual-time-budget=2000", "--dump-dom")
    assert "<title>imgs:true</title>" in seen
    body = seen.split("<tbody>")[1].split("</tbody>")[0]
    assert re.findall(r'data-value="([^"]*)"', body) == ["0.1", "0.2", ""]
    assert 'aria-sort="ascending"' in seen
