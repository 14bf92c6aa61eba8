"""Rows of data files, and errors that name file, row and field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

Row = dict[str, Any]
Record = TypeVar("Record")
_SHOWN = 10


class DataError(ValueError):
    """A data file that cannot be used; the message lists the malformed rows."""


class FieldError(ValueError):
    """What is wrong with one field of one row."""


def read_records(path: Path, parse: Callable[[Row], tuple[str, Record]]) -> list[Record]:
    """Every row of a .parquet or .jsonl file, parsed.

    Args:
        path: the file. Rows are counted from 1; blank lines of JSONL count but hold nothing.
        parse: turns a row into (id, record); raises FieldError for a malformed one.

    Raises:
        DataError: listing the first malformed rows by place and field, ids given twice, or that there are no rows.
        FileNotFoundError: there is no such file.
    """
    records: list[Record] = []
    places: dict[str, str] = {}
    problems: list[str] = []
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    rows = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}.get(path.suffix)
    if rows is None:
        raise DataError(f"{path}: unknown kind of data file {path.suffix!r}; give .parquet or .jsonl")
    for place, row in rows(path):
        try:
            if isinstance(row, FieldError):
                raise row
            name, record = parse(row)
            if name in places:
                raise FieldError(f"id {name!r} was already given in {places[name]}; keep one row of each")
        except FieldError as error:
            problems.append(f"{place}: {error}")
            continue
        places[name] = place
        records.append(record)
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        lines = "\n".join(f"  - {problem}" for problem in [*problems[:_SHOWN], *more])
        raise DataError(f"{path}: {len(problems)} malformed row(s)\n{lines}")
    if not records:
        raise DataError(f"{path} has no rows")
    return records


def text_field(row: Mapping[str, Any], name: str, owner: str = "") -> str:
    """A text that is not blank.

    Raises:
        FieldError: naming the field, with `owner` in front where it is nested.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise FieldError(f"{owner}{name} {_found(row, name)}, should be a text that is not blank")
    return value


def name_field(row: Mapping[str, Any], name: str, owner: str = "") -> str:
    """As `text_field`; an integer stands for its digits."""
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_field(row, name, owner)


def section_field(row: Mapping[str, Any], name: str) -> Row:
    """A nested record; raises FieldError naming the field."""
    value = row.get(name)
    if not isinstance(value, dict):
        raise FieldError(f"{name} {_found(row, name)}, should be a record")
    return value


def _found(row: Mapping[str, Any], name: str) -> str:
    return f"is {row[name]!r:.60}" if name in row else "is missing"


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row | FieldError]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_each_key_once)
            except FieldError as error:
                yield f"line {number}", error
                continue
            except ValueError as error:
                yield f"line {number}", FieldError(f"not JSON ({error})")
                continue
            yield f"line {number}", row if isinstance(row, dict) else FieldError("should be a JSON object")


def _each_key_once(pairs: list[tuple[str, Any]]) -> Row:
    """Of a key that is given twice, JSON readers keep the last one without a word."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in row if names.count(name) > 1)
        raise FieldError(f"key {twice!r} is given twice; keep one")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row | FieldError]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
            for number, row in enumerate(rows, start=1):
                yield f"row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error})") from error
