"""Read and write the CSV tables of this package, safe for spreadsheets."""

from __future__ import annotations

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from synth_refine._io.check import InputError
from synth_refine._io.untrusted import open_plain, what_is

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet runs a cell that begins with one of these."""


def check_unique(name: str, ids: Sequence[str]) -> None:
    """Refuse ids of which one occurs twice."""
    if len(set(ids)) != len(ids):
        [(first, count)] = Counter(ids).most_common(1)
        raise InputError(f"{name}: expected every id once, got {first!r} {count} times")


def read_csv(name: str, path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Read a .csv file into one list of cells per column, in the order of its rows.

    UTF-8 with or without a byte-order mark, with either line ending. A last line without a line ending is refused,
    because a truncated file looks like that. An apostrophe that `csv_bytes` put before a formula is taken off.

    Raises:
        InputError: The file is something else (the message says what), not UTF-8, truncated, or not a table.
    """
    with open_plain(name, path) as file:
        data = file.read()
    if kind := what_is(data[:512]):
        raise InputError(f"{name}: expected a .csv file, but {path} is {kind}")
    if b"\0" in data:
        raise InputError(f"{name}: expected a .csv file, but {path} holds zero bytes")
    if not data.endswith((b"\n", b"\r")):
        raise InputError(f"{name}: {path} is truncated: its last line has no line ending (add one if it is complete)")
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{name}: {path} is no UTF-8 table: {error}") from error
    header, *rows = rows
    while rows and is_blank(rows[-1]):  # at the end
        rows.pop()
    if len(header) == 1 and (sign := next((one for one in ";\t|" if one in header[0]), None)):
        raise InputError(f"{name}: expected commas between the cells of {path}, got {sign!r}; save it with commas")
    if len(set(header)) != len(header):
        raise InputError(f"{name}: expected every column once in {path}, got {', '.join(header)}")
    for number, row in enumerate(rows, 2):
        if is_blank(row):
            raise InputError(f"{name}: row {number} of {path} is blank; delete it")
        if len(row) != len(header):
            raise InputError(f"{name}: expected {len(header)} cells in row {number} of {path}, got {len(row)}")
    return {column: [_unescape(row[place]) for row in rows] for place, column in enumerate(header)}


def is_blank(row: Sequence[str]) -> bool:
    """Whether a row of a table is an empty line, or cells without content as spreadsheets leave them."""
    return not any(row) and len(row) != 1


def csv_bytes(columns: Mapping[str, Iterable[object]], *, guarded: bool = True) -> bytes:
    """Columns of equal length as a .csv file that a spreadsheet runs nothing of; `read_csv` reads it back.

    A text that begins with = + - @ (or with a tab, a carriage return or an apostrophe) gets an apostrophe before it,
    unless the file is not `guarded`, and NaN is an empty cell.

    Raises:
        InputError: A text that UTF-8 cannot write.
    """
    text = io.StringIO(newline="")
    # Every text is quoted: before Python 3.13 a lone carriage return would otherwise stand bare and split the row.
    table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    table.writerow(columns)
    table.writerows([_cell(cell, guarded) for cell in row] for row in zip(*columns.values(), strict=True))
    try:
        return text.getvalue().encode()
    except UnicodeEncodeError as error:
        shown = error.object[error.start]
        raise InputError(f"ids: expected text that UTF-8 can write, got the character {shown!r}") from error


def _cell(value: object, guarded: bool) -> object:
    if isinstance(value, str):
        return f"'{value}" if guarded and value.startswith((*FORMULA, "'")) else value
    return "" if isinstance(value, float) and math.isnan(value) else value


def _unescape(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith((*FORMULA, "'")) else cell
