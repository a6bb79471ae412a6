"""The frame agrees with itself: ranges, pins, Makefile and entry point."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if line and not line.startswith("#")
)


def requirements() -> list[Requirement]:
    lines = PROJECT["dependencies"] + [
        line for extra, group in PROJECT["optional-dependencies"].items() if extra != "all" for line in group
    ]
    return [Requirement(line) for line in lines]


def test_every_requirement_is_pinned_within_its_range() -> None:
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    for requirement in requirements():
        if requirement.name == PROJECT["name"]:
            continue  # an extra that brings another of its own
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no pin in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} does not allow the pin {version}"


def test_pins_have_no_local_tag() -> None:
    assert not [name for name, version in PINS.items() if "+" in version]


def test_makefile_installs_the_pinned_torch_first() -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    assert re.findall(r"torch==([\d.]+)", text) == [PINS["torch"]]
    assert text.index("torch==") < text.index("--editable .")


def test_all_is_every_other_extra() -> None:
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    assert Requirement(everything).extras == set(extras) - {"all"}
