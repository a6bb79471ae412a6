"""Tables as text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["rich_table", "render"]


def rich_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> Table:
    """Return a table; the first column is left-aligned, columns of figures right-aligned."""
    table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 or len(header) == 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def render(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], note: str = "", *, width: int = 110
) -> str:
    """Return the same table as plain text, without colours, whatever the terminal."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(rich_table(title, header, rows))
    if note:
        console.print(note, markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
