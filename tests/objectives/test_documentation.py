"""Every objective says on its page what it is, its bias, what it is blind to, and when it fails."""

import doctest
import inspect
import re

import pytest

from vifamily import registry
from vifamily.types import Capability

NAMES = registry.names("objectives")
MARKERS = ("**Bias.**", "**Blind to.**", "**Fails when.**")


def page_of(name):
    entry = registry.lookup("objectives", name)
    return inspect.cleandoc(entry.__dict__.get("__doc__") or "")


def paragraph(page, marker):
    """The words of the paragraph that begins with a marker, or None."""
    found = [p for p in re.split(r"\n\s*\n", page) if p.strip().startswith(marker)]
    return " ".join(found[0].replace(marker, "").split()) if len(found) == 1 else None


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_says_what_it_is_and_when_not_to_trust_it(name):
    page = page_of(name)
    said = {marker: paragraph(page, marker) for marker in MARKERS}
    lacking = [marker for marker, words in said.items() if words is None or len(words.split()) < 3]
    assert lacking == [], f"the page of {name!r} needs one paragraph that begins with each of {lacking}"
    sources = re.findall(r"^Source: (.*?)(?:\n\s*\n|\Z)", page, re.MULTILINE | re.DOTALL)
    assert sources, f"the page of {name!r} has no line 'Source: paper, equation'"
    dated = re.search(r"\b(1[89]|20)\d\d\b|derived here", " ".join(sources))
    assert dated, f"{name!r}: the source has no year: {sources}"
    assert ".. math::" in page, f"{name!r} shows no formula"
    assert len(page.split("\n\n")[0]) < 300, f"{name!r}: the first paragraph is the summary of every list"


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_has_an_example(name):
    # that it runs is seen by those who run the examples of all docstrings
    assert doctest.DocTestParser().get_examples(page_of(name)), f"{name!r} has no example"


@pytest.mark.parametrize("name", NAMES)
def test_the_page_agrees_with_what_is_declared(name):
    entry = registry.lookup("objectives", name)
    blind = paragraph(page_of(name), "**Blind to.**") or ""
    if entry.blind_to_mode_weights:
        assert "weights" in blind and "modes" in blind, (
            f"{name!r} declares blindness to mode weights, its page does not"
        )
    if Capability.SECOND_ORDER in entry.needs_model:
        assert re.search(r"second|twice|curvature|ReLU|piecewise", page_of(name)), name


def test_a_page_without_its_paragraphs_is_found():
    page = "What it is.\n\n**Bias.** None at all here.\n\n**Blind to.** x"
    assert paragraph(page, "**Bias.**") == "None at all here."
    assert paragraph(page, "**Fails when.**") is None
    assert len(paragraph(page, "**Blind to.**").split()) < 3
