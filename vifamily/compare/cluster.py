"""Cells on the workers of a Dask cluster: several machines, or several processes of this one."""

from __future__ import annotations

import importlib.util
import pickletools
import sys
from collections.abc import Callable, Iterator, Sequence
from pickle import PicklingError
from typing import Any

from joblib.parallel import get_active_backend

from vifamily.compare.cells import Cell
from vifamily.errors import ConfigError, MissingExtraError

__all__ = ["client_of", "run_on"]


def client_of(cluster: Any) -> tuple[Any, bool]:
    """Return the client to use, and whether it was made here and is to be closed after use.

    Args:
        cluster: A ``dask.distributed`` client or cluster, the address of a scheduler, or None: then the client of
            joblib's active backend where that is ``"dask"``, and otherwise None.

    Raises:
        MissingExtraError: If ``dask.distributed`` is not installed.
        ConfigError: If there is no cluster there.

    Example:
        >>> client_of(None)
        (None, False)
    """
    if cluster is None:
        backend, _ = get_active_backend()
        return (backend.client, False) if type(backend).__name__ == "DaskDistributedBackend" else (None, False)
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingExtraError(
            'cluster= needs dask.distributed, which is not installed. Run: pip install "vifamily[dask]"'
        ) from error
    if isinstance(cluster, Client):
        return cluster, False
    if not isinstance(cluster, str) and not hasattr(cluster, "scheduler_address"):
        raise ConfigError(
            "cluster must be a dask.distributed client, a cluster or a scheduler's address such as "
            f"'tcp://127.0.0.1:8786', got {type(cluster).__name__}."
        )
    try:
        # not the default of this process: the user's own dask code goes on as before
        return Client(cluster, set_as_default=False), True
    except (OSError, ValueError, TimeoutError) as error:
        raise ConfigError(
            f"there is no Dask scheduler at {cluster!r}: {error}. Start one with the commands dask scheduler and "
            "dask worker, or pass a dask.distributed.LocalCluster()."
        ) from error


def run_on(
    client: Any, batches: Sequence[Sequence[Cell]], run: Callable[..., Any], *arguments: Any, jobs: int | None
) -> Iterator[Any]:
    """Run batches of cells on the workers and give what each returns as soon as it is there.

    What a worker that is lost was running or held is run again elsewhere by the scheduler, up to its
    ``allowed-failures`` (3); a batch that is lost more often than that gives nothing.

    Args:
        client: A ``dask.distributed`` client.
        batches: The cells of each task.
        run: Called in a worker with the batch and the arguments.
        *arguments: Further arguments.
        jobs: Most tasks at once; None or -1 leaves it to the cluster.

    Raises:
        ConfigError: If an object cannot be sent to a worker, or a worker cannot load it.
        Exception: What ``run`` raised in a worker.
    """
    import cloudpickle  # type: ignore[import-untyped]
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    waiting = list(reversed(batches))
    running: set[Any] = set()
    done = as_completed(loop=client.loop)

    present: set[str] = set()

    def check(cells: Sequence[Cell]) -> None:
        try:
            named = _modules_named(cloudpickle.dumps((run, cells, arguments))) - present
        except (PicklingError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"an object of the comparison cannot be sent to another process ({' '.join(str(error).split())}). "
                "Leave cluster out and pass jobs=1 to run every cell in this process."
            ) from error
        lacking = sorted(set().union(*client.run(_lacking, sorted(named)).values())) if named else []
        if lacking:
            raise ConfigError(
                f"a worker cannot load what it would be sent: it has no module {', '.join(map(repr, lacking))}. "
                "Install the same packages there, and put modules of your own where it can import them."
            )
        present.update(named)

    def submit() -> None:
        cells = waiting.pop()
        check(cells)
        future = client.submit(run, cells, *arguments, pure=False)
        running.add(future)
        done.add(future)

    try:
        for _ in range(len(waiting) if jobs in (None, -1) else min(int(jobs or 1), len(waiting))):
            submit()
        for future in done:
            running.discard(future)
            error = future.exception() if future.status == "error" else None
            if error is None:
                yield future.result()
            elif not isinstance(error, KilledWorker):
                raise error
            if waiting:
                submit()
    finally:
        client.cancel(list(running))


def _modules_named(written: bytes) -> set[str]:
    """Modules that a serialised object may name: its texts that are modules here; the object is not read."""
    texts = {argument for _, argument, _ in pickletools.genops(written) if isinstance(argument, str)}
    return {text for text in texts if text in sys.modules and text != "__main__"}


def _lacking(names: Sequence[str]) -> list[str]:
    """Modules that a worker cannot find."""

    def there(name: str) -> bool:
        try:
            return name in sys.modules or importlib.util.find_spec(name) is not None
        except (ImportError, ValueError, AttributeError):
            return False

    return [name for name in names if not there(name)]
