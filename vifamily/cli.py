"""The command line: ``vifamily list | fit | compare | reproduce | benchmark | llm``.

Exit codes: 0 when everything asked for was done; 1 when a fit or a cell failed (with ``--strict`` also when one ended
before its stopping rule was met); 2 when the command cannot be understood (unknown name, wrong option, an impossible
combination, a folder that cannot be written to); 130 when interrupted.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vifamily import registry
from vifamily.benchmark import names as benchmark_names
from vifamily.errors import ConfigError, IncompatibleError, SpecError, VifamilyError
from vifamily.llm.commands import llm_app

__all__ = ["app", "main"]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

_FIT_EXAMPLE = "vifamily fit eight_schools --family full_rank --objective elbo --out results/eight_schools"
_COMPARE_EXAMPLE = (
    "vifamily compare banana eight_schools --families mean_field,full_rank "
    '--objectives elbo,"renyi(alpha=0.5)" --seeds 2 --out results/two'
)
_LIST_EXAMPLE = "vifamily list objectives"

_BENCHMARK_EXAMPLE = "vifamily benchmark solvers --quick --peers none --json results/solvers.json"

_REPRODUCE_EXAMPLE = "vifamily reproduce operator-vi --quick --json results/operator-vi.json"

_CODES = "Exit codes: 0 done, 1 a fit or cell failed, 2 the command cannot be understood, 130 interrupted."

app = typer.Typer(
    name="vifamily",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Variational inference: fit a named problem, compare families and objectives, list what there is.",
    epilog=f"Example:  {_COMPARE_EXAMPLE}",
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 also when a fit did not meet its stopping rule.")]
Steps = Annotated[int | None, typer.Option(help="Most steps of a fit; by default the stopping rule decides.")]
TimeLimit = Annotated[float | None, typer.Option(help="Most seconds of a fit.")]
Draws = Annotated[int | None, typer.Option(help="Draws per step; by default the objective's own.")]
Solver = Annotated[str, typer.Option(help="The solver.")]


def _clean(command: Callable[..., int]) -> Callable[..., None]:
    """Turn the package's errors into one line and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        debug = bool(kwargs.get("debug"))
        try:
            code = command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted; what was finished is kept.", err=True)
            code = INTERRUPTED
        except BrokenPipeError:
            # the reader (head, less) has gone: nobody is left to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = OK
        except VifamilyError as error:
            if debug:
                traceback.print_exc()
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            code = USAGE if isinstance(error, (SpecError, ConfigError, IncompatibleError)) else FAILED
        if code != OK:
            raise typer.Exit(code)

    return run


def _console(*, quiet: bool) -> Console:
    width = None if sys.stdout.isatty() else 200
    return Console(quiet=quiet, width=width, highlight=False, soft_wrap=False)


def _progress(*, quiet: bool) -> Any:
    """A progress line on a terminal, a line per cell in a log."""
    if quiet:
        return False
    if sys.stderr.isatty():
        return True
    from vifamily.compare.reporting import sentence

    def report(outcome: Any, done: int, total: int) -> None:
        typer.echo(f"[{done}/{total}] {sentence(outcome)}", err=True)

    return report


@app.command("list", epilog=f"Example:  {_LIST_EXAMPLE}")
@_clean
def list_command(
    kind: Annotated[
        str | None, typer.Argument(help="One of objectives, families, models, weights, solvers, problems.")
    ] = None,
    *,
    matrix: Annotated[bool, typer.Option("--matrix", help="Print what can meet what instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> int:
    """List what is registered, with a sentence on each; or every objective with every family, planned."""
    if matrix:
        if kind is not None:
            raise ConfigError(f"--matrix shows objectives with families: leave {kind!r} out.")
        return _print_matrix(as_json=as_json)
    kinds = registry.kinds() if kind is None else (kind,)
    found = {each: {name: registry.describe(each, name) for name in registry.names(each)} for each in kinds}
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return OK
    for each, entries in found.items():
        typer.echo(f"{each}:")
        width = max((len(name) for name in entries), default=0)
        for name, text in entries.items():
            typer.echo(f"  {name.ljust(width)}  {text}")
        if not entries:
            typer.echo("  none")
    return OK


def _print_matrix(*, as_json: bool) -> int:
    from vifamily.plan import compatibility

    found = compatibility()
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
    else:
        _console(quiet=False).print(found)
    return OK


@app.command("fit", epilog=f"Example:  {_FIT_EXAMPLE}  {_CODES}")
@_clean
def fit_command(
    problem: Annotated[str, typer.Argument(help='A problem, such as banana or "funnel(dim=5)".')],
    *,
    family: Annotated[str, typer.Option(help='The family, such as full_rank or "low_rank(rank=2)".')] = "auto",
    objective: Annotated[str, typer.Option(help='The objective, such as elbo or "renyi(alpha=0.5)".')] = "elbo",
    solver: Solver = "auto",
    seed: Annotated[int, typer.Option(help="Root seed.")] = 0,
    steps: Steps = None,
    restarts: Annotated[int, typer.Option(help="Fits from different starting points; the best one is kept.")] = 1,
    draws: Draws = None,
    time_limit: TimeLimit = None,
    show_plan: Annotated[bool, typer.Option("--plan", help="Print the plan before the fit.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and fit nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the posterior, the figures and the report.")] = None,
    strict: Strict = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Fit a named problem; print its summary and diagnosis."""
    from vifamily.compare.measure import as_problem
    from vifamily.compare.single import save_fit
    from vifamily.fit import fit
    from vifamily.plan import plan

    built = as_problem(problem)
    if dry_run or (show_plan and not quiet):
        typer.echo(str(plan(built, family, objective, solver, draws=draws)))
        if dry_run:
            return OK
    posterior = fit(
        built,
        family,
        objective,
        solver,
        seed=seed,
        steps=steps,
        restarts=restarts,
        draws=draws,
        time_limit=time_limit,
        progress=False if quiet else None,
    )
    diagnosis = posterior.diagnose()
    console = _console(quiet=quiet)
    console.print(posterior.summary())
    console.print(diagnosis)
    if out is not None:
        for path in save_fit(posterior, built, out, title=f"{problem}, {family}, {objective}").values():
            console.print(f"wrote {path}", markup=False)
    if posterior.record.stop_reason == "interrupted":
        return INTERRUPTED
    failed = posterior.record.stop_reason == "non_finite" or (strict and not posterior.record.converged)
    return FAILED if failed else OK


@app.command("compare", epilog=f"Example:  {_COMPARE_EXAMPLE}  {_CODES}")
@_clean
def compare_command(
    problems: Annotated[list[str] | None, typer.Argument(help="Problems; a default choice when none is named.")] = None,
    *,
    families: Annotated[str | None, typer.Option(help="Families, separated by commas.")] = None,
    objectives: Annotated[str | None, typer.Option(help='Objectives, such as elbo,iwae,"renyi(alpha=0.5)".')] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; 3 by default.")] = None,
    solver: Solver = "adam",
    steps: Steps = None,
    time_limit: TimeLimit = None,
    draws: Annotated[int | None, typer.Option(help="Draws per step, the same for every objective.")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Against reference draws: arc_length, c2st (slow), both or none; arc_length.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Fits at once; one per core by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results; a killed run goes on from there.")] = Path("results"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute every cell anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of the table.")] = False,
    strict: Strict = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Fit problems with every family and objective on the same noise and budget; write table, figures and report.

    With nothing named, a small default is run: three problems, cut off at 1000 steps, in about a minute on two cores.
    """
    from vifamily.compare import DEFAULTS, compare

    bare = not (problems or families or objectives)
    if seeds is None:
        seeds = DEFAULTS["seeds"] if bare else 3
    if steps is None and time_limit is None and bare:
        steps = DEFAULTS["steps"]
    result = compare(
        problems or DEFAULTS["problems"],
        families or DEFAULTS["families"],
        objectives or DEFAULTS["objectives"],
        seeds=seeds,
        out=out,
        jobs=jobs,
        steps=steps,
        time_limit=time_limit,
        draws=draws,
        solver=solver,
        metrics=DEFAULTS["metrics"] if metrics is None else metrics,
        progress=_progress(quiet=quiet),
        resume=not fresh,
    )
    if as_json:
        typer.echo(result.to_json(), nl=False)
    else:
        console = _console(quiet=quiet)
        console.print(result)
        console.print(f"report: {out / 'report.html'}", markup=False)
    for cell in result.failed:
        typer.echo(
            f"failed: {cell.problem} x {cell.family} x {cell.objective}, seed {cell.seed}: {cell.reason}", err=True
        )
    unsettled = strict and not all(cell.values.get("converged") for cell in result.fitted)
    return FAILED if result.failed or not result.fitted or unsettled else OK


def _words(text: str | None) -> tuple[str, ...] | None:
    """Split a list at commas outside parentheses; ``none`` is the empty one."""
    from vifamily.compare import split_specs

    if text is None:
        return None
    return () if text.strip() == "none" else tuple(str(word) for word in split_specs(text))


@app.command("reproduce", epilog=f"Example:  {_REPRODUCE_EXAMPLE}  {_CODES}")
@_clean
def reproduce_command(
    name: Annotated[str, typer.Argument(help="The paper, such as operator-vi, or all.")],
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer seeds and smaller grids, for a first look.")] = False,
    seed: Annotated[int, typer.Option(help="Root seed.")] = 0,
    data: Annotated[Path | None, typer.Option(help="Folder with the data sets of papers that need some.")] = None,
    peers_dir: Annotated[Path | None, typer.Option(help="Folder of the peers' environments.")] = None,
    install_peers: Annotated[bool, typer.Option("--install-peers", help="Create missing environments.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the claims.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for claims, tables, figures and finished parts, which are taken up.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute every part anew.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Run a paper's main findings again: each claim, what was published, what is measured, and whether it holds."""
    from vifamily.report import write_text
    from vifamily.reproduce import Options, names, paper_named

    def say(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    if data is not None and not data.is_dir():
        raise ConfigError(f"--data must be a folder, and there is none at {data}.")
    chosen = names() if name == "all" else (name,)
    papers = {each: paper_named(each) for each in chosen}
    console = _console(quiet=quiet)
    failed, rows = False, []
    for each, paper in papers.items():
        console.print(f"{paper.title} ({paper.source})", markup=False)
        folder = None if out is None else out / each if name == "all" else out
        parts = None if folder is None else folder / "parts"
        if fresh and parts is not None:
            shutil.rmtree(parts, ignore_errors=True)
        found = paper.run(Options(quick, seed, data, say, peers_dir, install_peers, parts))
        console.print(found.table())
        failed = failed or found.failed
        rows += found.plain_rows()
        if folder is not None:
            for path in found.write(folder):
                console.print(f"wrote {path}", markup=False)
    if json_file is not None:
        text = json.dumps(rows, indent=1, allow_nan=False) + "\n"
        console.print(f"wrote {write_text(json_file, text)}", markup=False)
    return FAILED if failed else OK


@app.command("benchmark", epilog=f"Example:  {_BENCHMARK_EXAMPLE}  {_CODES}")
@_clean
def benchmark_command(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(benchmark_names())}.")],
    *,
    problems: Annotated[str | None, typer.Option(help="Problems of the suite, separated by commas.")] = None,
    families: Annotated[str | None, typer.Option(help="mean_field, full_rank or both.")] = None,
    solvers: Annotated[str | None, typer.Option(help="Solvers of this package, separated by commas.")] = None,
    peers: Annotated[
        str | None, typer.Option(help="Of numpyro,blackjax,pathfinder,pymc,pyro; sbi,sbi_maf; or none.")
    ] = None,
    peers_dir: Annotated[Path | None, typer.Option(help="Folder of the peers' environments.")] = None,
    install_peers: Annotated[bool, typer.Option("--install-peers", help="Create missing environments.")] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds over all sides; 3 by default.")] = None,
    budget: Annotated[float | None, typer.Option(min=0.01, help="Most seconds of steps of a run, by --clock.")] = None,
    clock: Annotated[str, typer.Option(help="wall, or cpu on a busy machine.")] = "wall",
    quick: Annotated[bool, typer.Option("--quick", help="Two problems, one round, what is installed.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder with reference posteriors, for npe.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of npe, separated by commas.")] = None,
    simulations: Annotated[int | None, typer.Option(min=20, help="Simulations of npe; 10,000 by default.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the rows.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the picture, PNG.")] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Measure this package, beside its peers where they are installed; one row for each side."""
    from vifamily.benchmark import Options, benchmark_named
    from vifamily.report import png, write_bytes

    def say(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    options = Options(
        _words(problems), _words(families), _words(solvers), _words(peers), peers_dir, install_peers, repeats, budget,
        clock, quick, say, data, _words(tasks), simulations,
    )  # fmt: skip
    report = benchmark_named(name).run(options)
    console = _console(quiet=quiet)
    console.print(report.table())
    if json_file is not None:
        console.print(f"wrote {report.write_json(json_file)}", markup=False)
    if plot is not None and report.figure is not None:
        console.print(f"wrote {write_bytes(plot, png(report.figure))}", markup=False)
    return FAILED if report.failed else OK


app.add_typer(llm_app(_clean), name="llm")


def main() -> None:
    """Run the command line."""
    app()
