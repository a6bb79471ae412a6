"""One self-contained HTML page from plain values: text, tables and figures.

The page asks nothing of the network and opens from a file. Styles and pictures are inside; a few lines of script let a
reader sort a table, and without script the page is complete.
"""

from __future__ import annotations

import base64
import dataclasses
import html as escaping
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vifamily.errors import ConfigError, ShapeError

__all__ = ["Cell", "Picture", "Table", "Text", "html", "png", "write", "write_bytes", "write_text"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: What is shown.
        value: The number that sorting goes by; text is sorted as text where it is None.
        tone: ``""``, ``"good"``, ``"bad"`` or ``"quiet"``; colour is never the only sign, so say it in ``text`` too.
    """

    text: str
    value: float | None = None
    tone: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: Heads.
        rows: Cells of each row; plain strings are cells without a number.
        caption: What the table shows.
        notes: What each head means, in the same order; empty where that is clear.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure with its description.

    Attributes:
        figure: A matplotlib figure, or the bytes of a PNG file.
        alt: What the picture shows, for readers who cannot see it.
        caption: Written under it.
    """

    figure: Figure | bytes
    alt: str
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph, or a heading with an optional paragraph.

    Attributes:
        body: The paragraph; blank lines separate paragraphs.
        heading: A heading over it.
        fixed: Keep line breaks and use a fixed-width font (commands, printed tables).
    """

    body: str = ""
    heading: str = ""
    fixed: bool = False


_STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:#222;font:16px/1.5 system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:88rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .25rem}
h2{font-size:1.2rem;margin:2.2rem 0 .5rem}
p{max-width:46rem;margin:.5rem 0}
.subtitle{color:#595959;margin-bottom:1.5rem}
.scroll{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:#595959;padding:.3rem 0;caption-side:top}
th,td{padding:.35rem .6rem;text-align:left;white-space:nowrap;border-bottom:1px solid #e4e4e4;vertical-align:top}
td.wide{white-space:normal;min-width:16rem}
th{border-bottom:2px solid #b8b8b8;vertical-align:bottom;white-space:normal}
th button{all:unset;cursor:pointer;font-weight:600}
th button:focus-visible{outline:2px solid #0072b2;outline-offset:2px}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
tbody tr:hover{background:#f5f8fb}
td.number{text-align:right}
.good{color:#00694d}.bad{color:#b02a0c}.quiet{color:#6b6b6b}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;font-size:.9rem;max-width:60rem}
dt{font-weight:600}dd{margin:0;color:#444}
figure{margin:1rem 0}
img{max-width:100%;height:auto;border:1px solid #ececec}
figcaption{color:#595959;font-size:.9rem;max-width:46rem}
pre{background:#f6f6f6;padding:.75rem 1rem;overflow-x:auto;font-size:.85rem;line-height:1.4}
footer{margin-top:3rem;color:#6b6b6b;font-size:.85rem}
@media print{th button{cursor:auto}main{max-width:none}}
"""

# Sorting only; numbers by data-value, missing ones last in both directions.
_SCRIPT = """
document.querySelectorAll("table").forEach(function(table){
  table.querySelectorAll("thead th").forEach(function(head,column){
    head.querySelector("button").addEventListener("click",function(){
      var down=head.getAttribute("aria-sort")==="ascending",sign=down?-1:1;
      table.querySelectorAll("thead th").forEach(function(h){h.setAttribute("aria-sort","none")});
      head.setAttribute("aria-sort",down?"descending":"ascending");
      var body=table.tBodies[0],rows=Array.from(body.rows);
      function key(row){
        var cell=row.cells[column],v=cell.getAttribute("data-value");
        return v===null?cell.textContent:(v===""?null:Number(v))}
      rows.sort(function(a,b){var x=key(a),y=key(b);
        if(x===null||y===null)return (x===null)-(y===null);
        return sign*(typeof x==="number"&&typeof y==="number"?x-y:String(x).localeCompare(String(y)))});
      rows.forEach(function(row){body.appendChild(row)});
    });
  });
});
"""


def _escape(text: object) -> str:
    return escaping.escape(str(text), quote=True)


def png(figure: Figure, *, dpi: int = 150) -> bytes:
    """Return a figure as the bytes of a PNG file; equal figures give equal bytes, for no date or version is in it.

    Example:
        >>> from matplotlib.figure import Figure
        >>> png(Figure(figsize=(1, 1)))[1:4]
        b'PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _text(block: Text) -> str:
    heading = f"<h2>{_escape(block.heading)}</h2>" if block.heading else ""
    if block.fixed:
        return f"{heading}<pre>{_escape(block.body)}</pre>"
    return heading + "".join(f"<p>{_escape(part.strip())}</p>" for part in block.body.split("\n\n") if part.strip())


def _picture(block: Picture) -> str:
    if not block.alt.strip():
        raise ConfigError("a picture needs alt=: a sentence that says what it shows.")
    data = block.figure if isinstance(block.figure, bytes) else png(block.figure)
    caption = f"<figcaption>{_escape(block.caption)}</figcaption>" if block.caption else ""
    code = base64.b64encode(data).decode("ascii")
    return f'<figure><img alt="{_escape(block.alt)}" src="data:image/png;base64,{code}">{caption}</figure>'


def _cell(cell: Cell | str, *, numeric: bool) -> str:
    one = cell if isinstance(cell, Cell) else Cell(cell)
    classes = [one.tone] if one.tone else []
    if numeric:
        classes.append("number")
    elif len(one.text) > 48:
        classes.append("wide")
    value = "" if one.value is None or one.value != one.value else repr(float(one.value))
    data = f' data-value="{value}"' if numeric else ""
    label = f' class="{_escape(" ".join(classes))}"' if classes else ""
    return f"<td{label}{data}>{_escape(one.text)}</td>"


def _table(block: Table) -> str:
    width = len(block.columns)
    if any(len(row) != width for row in block.rows):
        raise ShapeError(f"every row of a table needs {width} cells, one per column ({', '.join(block.columns)}).")
    if block.notes and len(block.notes) != width:
        raise ShapeError(f"notes must hold one string per column: {width} columns, {len(block.notes)} notes.")
    numeric = [any(isinstance(row[i], Cell) and row[i].value is not None for row in block.rows) for i in range(width)]  # type: ignore[union-attr]
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{_escape(name)}</button></th>'
        for name in block.columns
    )
    body = "".join(
        "<tr>" + "".join(_cell(cell, numeric=flag) for cell, flag in zip(row, numeric, strict=True)) + "</tr>\n"
        for row in block.rows
    )
    caption = f"<caption>{_escape(block.caption)}</caption>" if block.caption else ""
    pairs = [(name, note) for name, note in zip(block.columns, block.notes, strict=False) if note]
    notes = "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(note)}</dd>" for name, note in pairs)
    label = _escape(block.caption or "table")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>" + (f"<dl>{notes}</dl>" if notes else "")
    )


def html(title: str, *blocks: Text | Table | Picture, subtitle: str = "", footer: str = "") -> str:
    """Return one self-contained page.

    Every string is escaped; figures become PNG pictures inside the page.

    Args:
        title: Title of the page and its first heading.
        *blocks: What follows, in order.
        subtitle: A line under the title.
        footer: A line at the end.

    Returns:
        The page as text; write it with :func:`write`.

    Raises:
        ShapeError: If a table's rows do not match its columns.
        ConfigError: If a picture has no description.

    Example:
        >>> page = html("A <comparison>", Table(["family", "error"], [["mean_field", Cell("0.20", 0.2)]]))
        >>> "A &lt;comparison&gt;" in page, "http" in page
        (True, False)
    """
    parts = []
    for block in blocks:
        if isinstance(block, Text):
            parts.append(_text(block))
        elif isinstance(block, Table):
            parts.append(_table(block))
        else:
            parts.append(_picture(block))
    under = f'<p class="subtitle">{_escape(subtitle)}</p>' if subtitle else ""
    end = f"<footer>{_escape(footer)}</footer>" if footer else ""
    script = f"<script>{_SCRIPT}</script>" if any(isinstance(block, Table) for block in blocks) else ""
    # an empty inline icon keeps browsers from asking for a favicon beside the file
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{_escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n'
        f"<body><main><h1>{_escape(title)}</h1>{under}\n" + "\n".join(parts) + f"\n{end}</main>{script}</body></html>\n"
    )


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file so that a reader sees the old one or the new one, never half of it.

    Args:
        path: Where to write; missing folders are made.
        text: What to write, as UTF-8.

    Returns:
        The path.

    Raises:
        ConfigError: If the folder cannot be written to.
    """
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a binary file the way :func:`write_text` writes text."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}. "
            "Choose a folder that exists or can be made, and is writable."
        ) from error
    return path


def write(
    path: str | os.PathLike[str], title: str, *blocks: Text | Table | Picture, subtitle: str = "", footer: str = ""
) -> Path:
    """Write one self-contained page (see :func:`html`).

    Returns:
        The path.

    Raises:
        ConfigError: If the folder cannot be written to.
    """
    return write_text(path, html(title, *blocks, subtitle=subtitle, footer=footer))
