"""Run every notebook from top to bottom and fail on the first error.

``VIFAMILY_SHORT=1`` asks the notebooks for their short mode: the same cells with fewer steps and seeds. Nothing is
written back, so that a check never changes a notebook.

    VIFAMILY_SHORT=1 python tests/run_notebooks.py [notebook ...]
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
SECONDS_PER_CELL = 300


def run(path: Path) -> str | None:
    """Run one notebook in its own folder; return what went wrong, or None."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS_PER_CELL, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return str(error)
    return None


def main(arguments: list[str]) -> int:
    """Run the named notebooks, or all of them; return the number that failed."""
    paths = [Path(argument) for argument in arguments] or sorted(FOLDER.glob("*.ipynb"))
    if not paths:
        print(f"error: no notebook in {FOLDER}", file=sys.stderr)
        return 1
    failed = 0
    for path in paths:
        start = time.perf_counter()
        problem = run(path)
        print(f"{path.name}: {'failed' if problem else 'ran'} in {time.perf_counter() - start:.1f} s", flush=True)
        if problem:
            print(problem, file=sys.stderr)
            failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
