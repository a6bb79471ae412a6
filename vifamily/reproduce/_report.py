"""What a reproduction is asked, and what it gives: claims beside measurements, and pictures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vifamily.errors import ConfigError
from vifamily.report import png, write_bytes, write_text
from vifamily.reproduce._parts import kept_rows

__all__ = ["Claim", "Options", "Paper", "Reproduction"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim of a paper beside what was measured.

    Attributes:
        claim: The claim, in one sentence.
        published: What the paper says: a number, words, or None where it gives no number.
        measured: What was measured: a number or words.
        error: Its standard error, or None where it is exact or words.
        holds: Whether the claim holds on what was measured; None where it could not be tried.
        reason: Why ``holds`` is what it is: the rule that was applied, or what was missing.

    Raises:
        ConfigError: If ``holds`` is None without a reason.
    """

    claim: str
    published: float | str | None
    measured: float | str | None
    error: float | None
    holds: bool | None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.holds is None and not self.reason:
            raise ConfigError(f"the claim {self.claim!r} was not tried: say why in reason=.")


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be asked of a reproduction.

    Attributes:
        quick: Fewer seeds and a smaller grid, for a first look; rules stay the same.
        seed: Root seed.
        data: Folder with the data sets of papers that need some; without it their claims are not tried.
        say: Called with a line on what is being done.
        peers_dir: Folder of the environments of libraries that are compared with; the user's cache by default. Where a
            library is not installed, its claim is not tried.
        install_peers: Whether to create missing environments.
        parts: Folder of finished parts, which a run that was cut off takes up; None keeps none.
    """

    quick: bool = False
    seed: int = 0
    data: Path | None = None
    say: Callable[[str], None] = print
    peers_dir: Path | None = None
    install_peers: bool = False
    parts: Path | None = None

    def rows(
        self, name: str, compute: Callable[[], Sequence[Mapping[str, Any]]], **settings: Any
    ) -> list[dict[str, Any]]:
        """Return the rows of a part, computed or as they were kept (see :func:`kept_rows`), and say which.

        Args:
            name: What the part is, in words.
            compute: Makes the rows.
            **settings: What they depend on besides the name; plain values.
        """
        fresh = []

        def made() -> Sequence[Mapping[str, Any]]:
            fresh.append(name)
            self.say(name)
            return compute()

        found = kept_rows(self.parts, name, settings, made)
        if not fresh:
            self.say(f"{name} (kept from before)")
        return found

    def row(self, name: str, compute: Callable[[], Mapping[str, Any]], **settings: Any) -> dict[str, Any]:
        """Return the only row of a part (see :meth:`rows`)."""
        return self.rows(name, lambda: [compute()], **settings)[0]


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """What a reproduction gives.

    Attributes:
        claims: The claims, in the order of the paper.
        figures: Pictures by name.
        tables: Further rows worth keeping, by name; plain values.
    """

    claims: Sequence[Claim]
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether a claim was tried and does not hold."""
        return any(claim.holds is False for claim in self.claims)

    def table(self) -> Table:
        """Return the claims as a table."""
        table = Table(show_edge=False)
        for head in ("claim", "published", "measured", "holds"):
            table.add_column(head, overflow="fold")
        for claim in self.claims:
            error = "" if claim.error is None else f" ± {claim.error:.2g}"
            holds = {True: "yes", False: "NO", None: "not tried"}[claim.holds]
            table.add_row(
                claim.claim,
                _cell(claim.published),
                _cell(claim.measured) + error,
                holds + (f": {claim.reason}" if claim.reason else ""),
            )
        return table

    def plain_rows(self) -> list[dict[str, Any]]:
        """Return the claims as plain values, ``{"claim", "published", "measured", "error", "holds", "reason"}``."""
        return [_plain(dataclasses.asdict(claim)) for claim in self.claims]

    def write_json(self, path: Path) -> Path:
        """Write the claims as a JSON list.

        Raises:
            ConfigError: If the file cannot be written.
        """
        return write_text(path, json.dumps(self.plain_rows(), indent=1, allow_nan=False) + "\n")

    def write(self, folder: Path) -> list[Path]:
        """Write ``claims.json``, ``tables.json`` and a PNG for each figure into a folder.

        Raises:
            ConfigError: If a file cannot be written.
        """
        written = [self.write_json(folder / "claims.json")]
        if self.tables:
            text = json.dumps({k: [_plain(row) for row in rows] for k, rows in self.tables.items()}, indent=1)
            written.append(write_text(folder / "tables.json", text + "\n"))
        written += [write_bytes(folder / f"{name}.png", png(figure)) for name, figure in self.figures.items()]
        return written


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper whose main findings are run again.

    Attributes:
        title: Its title.
        source: Where it was published.
        run: From options to claims and figures.
    """

    title: str
    source: str
    run: Callable[[Options], Reproduction]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Write numbers that JSON does not know as words."""
    return {k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
