"""Tables for terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text


def summary_table(rows: Sequence[Mapping[str, object]], title: str | None = None) -> Table:
    """Table for the end of a run: one column per key, in order of first appearance; floats to four digits."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title, title_justify="left")
    for name in columns:
        numeric = all(isinstance(row[name], int | float) for row in rows if name in row)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        cells = [row.get(name, "") for name in columns]
        table.add_row(*(Text(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in cells))
    return table
