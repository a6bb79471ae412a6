"""Where the numbers of a fit go: a protocol of three methods, a CSV file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from vifamily.errors import ConfigError, MissingExtraError

__all__ = ["CsvTracker", "TensorBoardTracker", "Tracker", "WandbTracker"]


@runtime_checkable
class Tracker(Protocol):
    """Receives the numbers of a fit. Any object with these methods will do."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Receive the configuration of the fit, once, before the first step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the numbers of one step."""

    def finish(self) -> None:
        """Close; called however the fit ends."""


class CsvTracker:
    """Writes one row per logged step to a CSV file.

    A fit that goes on from a checkpoint goes on in its file: rows up to the step where it resumes are kept.

    Args:
        path: File to write; an existing one is overwritten by a new fit.
        every: Log every this many steps.

    Raises:
        ConfigError: If the file cannot be written or ``every`` is not a positive integer.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "trace.csv"
        >>> tracker = CsvTracker(path)
        >>> tracker.start({"seed": 0}); tracker.log(1, {"loss": 2.0}); tracker.finish()
        >>> path.read_text().split()
        ['step,loss', '1,2.0']
    """

    def __init__(self, path: str | Path, *, every: int = 1) -> None:
        self.path, self.every = Path(path), _checked_every(every)
        self._file: TextIO | None = None
        self._columns: list[str] = []

    def start(self, config: Mapping[str, Any]) -> None:
        """Open the file; ``config["resumed_at"]`` is the step that a resumed fit goes on from."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = self._rows_up_to(int(config.get("resumed_at") or 0))
            self._file = self.path.open("w", newline="")
            csv.writer(self._file).writerows(kept)
        except OSError as error:
            raise ConfigError(
                f"the tracker cannot write {self.path}: {error.strerror}. Choose a writable path."
            ) from error
        self._columns = kept[0][1:] if kept else []

    def _rows_up_to(self, step: int) -> list[list[str]]:
        if step < 1 or not self.path.exists():
            return []
        with self.path.open(newline="", errors="replace") as file:
            rows = list(csv.reader(file))
        if not rows or rows[0][:1] != ["step"]:
            return []
        # the last row of a killed process may be cut short
        whole = [row for row in rows[1:] if len(row) == len(rows[0]) and row[0].isdigit()]
        return [rows[0], *(row for row in whole if int(row[0]) <= step)]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row; the columns are those of the first row."""
        if self._file is None or step % self.every:
            return
        writer = csv.writer(self._file)
        if not self._columns:
            self._columns = list(values)
            writer.writerow(["step", *self._columns])
        writer.writerow([step, *(values.get(c, "") for c in self._columns)])

    def finish(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _checked_every(every: int) -> int:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ConfigError(f"every must be a positive number of steps, got {every!r}.")
    return every


class TensorBoardTracker:
    """Writes scalars for TensorBoard.

    Args:
        folder: Log folder.
        every: Log every this many steps.

    Raises:
        MissingExtraError: If the ``tensorboard`` package is not installed.
    """

    def __init__(self, folder: str | Path, *, every: int = 10) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("TensorBoard is not installed: pip install tensorboard.") from error
        self.every = _checked_every(every)
        self._writer = SummaryWriter(str(folder))

    def start(self, config: Mapping[str, Any]) -> None:
        """Write the configuration as text."""
        self._writer.add_text("config", "\n".join(f"{k}: {v}" for k, v in config.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        if step % self.every == 0:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbTracker:
    """Sends scalars to Weights & Biases; the only tracker that may use the network, and only when made by the user.

    Args:
        every: Log every this many steps.
        options: Passed to ``wandb.init``.

    Raises:
        MissingExtraError: If the ``wandb`` package is not installed.
    """

    def __init__(self, *, every: int = 10, **options: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("Weights & Biases is not installed: pip install wandb.") from error
        self.every, self._options, self._wandb = _checked_every(every), options, wandb
        self._run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Open the run."""
        self._run = self._wandb.init(config=dict(config), **self._options)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send scalars."""
        if step % self.every == 0:
            self._run.log(dict(values), step=step)

    def finish(self) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish()
