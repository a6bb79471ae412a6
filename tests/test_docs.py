"""The texts are true: links lead somewhere, examples run, commands exist, public names are documented."""

import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TOP_LEVEL = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
# generated pages are made from what other tests cover: the notebooks, for one, run in full elsewhere
GENERATED = {"_build", "api", "registry", "notebooks"}
PAGES = TOP_LEVEL + [p for p in sorted(DOCS.rglob("*.md")) if not GENERATED & set(p.relative_to(DOCS).parts)]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def blocks(path: Path, language: str) -> tuple[str, ...]:
    return tuple(code for lang, code in FENCE.findall(path.read_text("utf-8")) if lang == language)


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process and a folder of its own, with warnings as errors."""
    known = r"import warnings; warnings.filterwarnings('ignore', r'\s*ArviZ is undergoing', FutureWarning)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "", "OMP_NUM_THREADS": "1"}
    head = f"import warnings; warnings.simplefilter('error', UserWarning); {known}\n"
    return subprocess.run(
        [sys.executable, "-c", head + code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


# --- links and examples ---


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = [target for target, _ in LINK.findall(page.read_text("utf-8")) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{label(page)} links to {missing}"


WITH_PYTHON = [p for p in PAGES if blocks(p, "python") and p.name != "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=label)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    done = run_python("\n".join(blocks(page, "python")), tmp_path)
    assert done.returncode == 0, f"{label(page)}:\n{done.stderr[-3000:]}"


def test_readme_example_is_short() -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


COMMANDS = sorted({(p, line) for p in PAGES for b in blocks(p, "sh") for line in b.splitlines() if line.strip()})


def test_commands_exist() -> None:
    from typer.main import get_command

    cli = importlib.import_module("vifamily.cli")
    application = get_command(cli.app)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page, line in COMMANDS:
        words = line.split("#")[0].split()
        if words[0] == "vifamily":
            assert words[1] in application.commands, f"{label(page)}: no command {line!r}"
            options = {o for p in application.commands[words[1]].params for o in p.opts}
            unknown = [w for w in words if w.startswith("--") and w not in options]
            assert not unknown, f"{label(page)}: {line!r} has no option {unknown}"
        elif words[0] == "make":
            assert words[1] in targets, f"{label(page)}: no target {line!r}"
        else:
            assert words[0] == ".ci/run", f"{label(page)}: unknown command {line!r}"


def test_listing_commands_run() -> None:
    listings = sorted({line for _, line in COMMANDS if line.startswith("vifamily list")})
    assert len(listings) >= 3
    for line in listings:
        done = CliRunner().invoke(importlib.import_module("vifamily.cli").app, line.split()[1:])
        assert done.exit_code == 0 and ("banana" if "problems" in line else "elbo") in done.output, line


# --- the worked example ---


def test_worked_objective_recovers_a_conjugate_posterior(tmp_path: Path) -> None:
    (source,) = blocks(ROOT / "CONTRIBUTING.md", "python")
    (tmp_path / "log_variance.py").write_text(source, "utf-8")
    use = """
import doctest, sys
sys.path.insert(0, ".")
import torch
import log_variance
import vifamily as vf

assert doctest.testmod(log_variance).failed == 0
sd = torch.tensor([0.5, 2.0], dtype=torch.float64)
wide = lambda n, generator: 3 * torch.randn(n, 2, generator=generator, dtype=torch.float64)  # a start that is off
model = vf.models.Density(lambda z: -0.5 * ((z - 1.0) / sd).square().sum(-1), dim=2, sample_prior=wide)
posterior = vf.fit(model, family="mean_field", objective=log_variance.LogVariance(), seed=0, init="prior")
draws = posterior.draws(20000)
error = (draws.mean(0) - 1.0).abs() / sd
ratio = draws.std(0) / sd
assert error.max() < 0.05 and (ratio - 1).abs().max() < 0.05, (error, ratio)
"""
    done = run_python(use, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_worked_objective_passes_the_contracts(tmp_path: Path) -> None:
    testing = importlib.import_module("vifamily.testing")
    (source,) = blocks(ROOT / "CONTRIBUTING.md", "python")
    (tmp_path / "log_variance.py").write_text(source, "utf-8")
    check = getattr(testing, "check_objective", None)
    assert check is not None, "vifamily.testing offers check_objective, which CONTRIBUTING.md relies on"
    use = """
import sys
sys.path.insert(0, ".")
import log_variance
from vifamily.testing import check_objective

check_objective(log_variance.LogVariance())
"""
    done = run_python(use, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


# --- what is said of the project ---


def test_change_log_has_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert importlib.import_module("vifamily").__version__ == version


def test_design_page_has_the_floors_that_are_tested() -> None:
    source = (ROOT / "tests" / "test_layers.py").read_text("utf-8")
    scope: dict[str, object] = {}
    exec(re.search(r"^FLOORS = \(.*?^\)", source, re.MULTILINE | re.DOTALL).group(), scope)  # our own file
    rows = re.findall(r"^\| (\d) \| ((?:`\w+` ?)+)\|", (DOCS / "design.md").read_text("utf-8"), re.MULTILINE)
    assert {int(n): tuple(re.findall(r"\w+", units)) for n, units in rows} == dict(enumerate(scope["FLOORS"]))


def test_entry_point_groups_are_those_of_the_registry() -> None:
    registry = importlib.import_module("vifamily.registry")
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8") + (ROOT / "pyproject.toml").read_text("utf-8")
    for kind in registry.kinds():
        assert text.count(f"vifamily.{kind}") >= 2


def entries() -> list[tuple[str, str]]:
    registry = importlib.import_module("vifamily.registry")
    return [(kind, name) for kind in registry.kinds() for name in registry.names(kind)]


def test_every_entry_is_documented() -> None:
    registry = importlib.import_module("vifamily.registry")
    bare = [f"{k}: {n}" for k, n in entries() if len(registry.describe(k, n)) < 20]
    assert not bare, bare


@pytest.mark.parametrize("kind", ["objectives", "families"])
def test_page_names_every_entry(kind: str) -> None:
    text = (DOCS / f"{kind}.md").read_text("utf-8")
    own = [n for k, n in entries() if k == kind]
    assert [n for n in own if f"`{n}" not in text] == []


def test_models_page_names_every_support() -> None:
    kinds = importlib.import_module("vifamily.numerics.constraint_kinds")
    text = (DOCS / "models.md").read_text("utf-8")
    assert [name for name in {**kinds._NAMED, **kinds._BOUNDED} if f"`{name}" not in text] == []


def test_estimators_are_those_of_the_page() -> None:
    vf = importlib.import_module("vifamily")
    counts = vf.models.Density(lambda t: -t["k"].double(), parameters={"k": "integer_interval(0, 3)"})
    page = (DOCS / "objectives.md").read_text("utf-8").split('What `"auto"` takes')[1]
    rows = re.findall(r"^\| `([^`]+)` \| `(\w+)` \| `(\w+)` \|$", page, re.MULTILINE)
    assert len(rows) >= 10
    for family, *stated in rows:
        model = counts if family.startswith("categorical") else "banana"
        chosen = [vf.plan(model, family, objective, "adam").estimator for objective in ("elbo", "iwae", "renyi")]
        assert [chosen[0], chosen[1], chosen[2]] == [stated[0], stated[1], stated[1]], family


def test_page_on_fits_has_the_rule_and_every_reason_to_stop() -> None:
    text = (DOCS / "fitting.md").read_text("utf-8")
    rule = importlib.import_module("vifamily.solvers._stopping").StoppingRule()
    for words in (
        f"Every {rule.every} steps",
        f"Every {rule.check} steps, from {rule.window} on",
        f"is below {rule.rhat}",
        f"{rule.rough} at first, {rule.mcse} once",
        f"is below {rule.tolerance} posterior sds",
        f"limit of {rule.stage:,} steps",
        f"or {importlib.import_module('vifamily.fit')._MOST_STEPS:,} |",
    ):
        assert words in text, words
    assert rule.stages == 10 and "after ten step sizes" in text and rule.shrink == 0.5 and "half the step size" in text
    record = importlib.import_module("vifamily.posterior").FitRecord
    stated = re.search(r"stop_reason: (.*?)\n +converged:", inspect.getdoc(record), re.DOTALL).group(1)
    reasons = re.findall(r'"(\w+)"', stated)
    assert len(reasons) >= 8
    assert [reason for reason in reasons if f"`{reason}`" not in text] == []


def test_diagnosis_page_has_every_line() -> None:
    diagnostics = importlib.import_module("vifamily.diagnostics")
    text = (DOCS / "diagnosis.md").read_text("utf-8")
    shown = diagnostics.Diagnosis("converged", True, 10, 1.0, importance_ess=5.0, notes=("a note",))
    assert [name for name, _ in shown.rows() if f"\n| {name} |" not in text] == []


def test_compare_page_has_every_column_and_the_default() -> None:
    compare = importlib.import_module("vifamily.compare")
    text = (DOCS / "compare.md").read_text("utf-8")
    assert [m.head for m in compare.MEASURES if m.head not in text] == []
    words = f"with {compare.DEFAULTS['seeds']} seed, cut off at {compare.DEFAULTS['steps']} steps"
    assert words in text


def test_exit_codes_are_those_of_the_page() -> None:
    cli = importlib.import_module("vifamily.cli")
    codes = re.findall(r"^\| (\d+) \|", (DOCS / "command_line.md").read_text("utf-8"), re.MULTILINE)
    assert [int(c) for c in codes] == [cli.OK, cli.FAILED, cli.USAGE, cli.INTERRUPTED]


def test_readme_counts_the_problems() -> None:
    registry = importlib.import_module("vifamily.registry")
    own = [n for n in registry.names("problems") if registry.lookup("problems", n).__module__.startswith("vifamily.")]
    assert f"| problems | {len(own)} " in (ROOT / "README.md").read_text("utf-8")


def generated_pages() -> ModuleType:
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        return importlib.import_module("generated_pages")
    finally:
        sys.path.remove(str(DOCS / "_ext"))


def test_the_page_of_an_objective_shows_what_it_declares() -> None:
    pages, registry = generated_pages(), importlib.import_module("vifamily.registry")
    for name in registry.names("objectives"):
        entry = registry.lookup("objectives", name)
        shown = dict(pages.facts(entry))
        assert ("does not see them" in shown["Weights of separate modes"]) is entry.blind_to_mode_weights
        assert shown["Solver"].startswith(entry.own_solver or "any")
        assert shown["The model's own parameters"].startswith("stay" if entry.freezes_model else "are fitted")
    assert dict(pages.facts(registry.lookup("objectives", "renyi")))["Rényi order at its defaults"] == "0.5"


def test_the_page_of_the_matrix_has_every_own_entry(tmp_path: Path) -> None:
    pages, registry = generated_pages(), importlib.import_module("vifamily.registry")
    pages.write_matrix(tmp_path / "matrix.rst")
    text = (tmp_path / "matrix.rst").read_text("utf-8")
    for kind in ("objectives", "families"):
        for name in pages.own_entries(registry, kind):
            assert name in text, name
    assert "Integer latents" in text and "●" in text


def test_every_public_name_is_documented() -> None:
    pages = generated_pages()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        modules = list(pages.public_modules())
    bare = []
    for module in modules:
        if not inspect.getdoc(module):
            bare.append(module.__name__)
        for name in pages.public_names(module):
            thing = getattr(module, name)
            if (
                pages.home_of(module, name) == module.__name__
                and pages.is_documented(thing)
                and not inspect.getdoc(thing)
            ):
                bare.append(f"{module.__name__}.{name}")
    assert not bare, bare
