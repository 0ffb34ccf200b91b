"""A table of the user and new cells of one column in, the same table out, in which every other byte is as it was."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from synth_refine._io.check import InputError

CELL = re.compile(r'("(?:[^"]|"")*"|[^,\r\n]*)(,|\r\n|\r|\n|\Z)')


def with_column(table: bytes, column: str, cells: Sequence[str]) -> bytes:
    """A .csv table with other cells in a column.

    A cell keeps its quotes where it had some it did not need, and else follows the column's name, so that the way back
    gives the same bytes.

    Args:
        table: The content of a file that `read_csv` reads.
        column: Name of the column.
        cells: The text of every row, (N,); where it is the old one, nothing changes.

    Raises:
        InputError: The table has another number of rows, or cannot be cut into cells.
    """
    start = "\ufeff" if table.startswith(b"\xef\xbb\xbf") else ""
    text = table.decode("utf-8-sig")
    rows: list[list[tuple[str, str]]] = [[]]  # of each cell: as it is written, and what ends it
    place = 0
    while place < len(text):
        match = CELL.match(text, place)
        assert match is not None  # an empty cell at the least
        rows[-1].append((match[1], match[2]))
        place = match.end()
        if match[2] != ",":
            rows.append([])
    rows.pop()
    plain = [[_text(raw) for raw, _ in row] for row in rows]
    if plain != [row or [""] for row in csv.reader(io.StringIO(text, newline=""), strict=True)]:
        raise InputError("table: expected cells that are quoted in the usual way")
    while len(plain) - 1 > len(cells) and not any(plain[-1]):  # blank lines at the end
        plain.pop()
    if column not in plain[0] or len(plain) - 1 != len(cells):
        raise InputError(f"table: expected the column {column} and {len(cells)} rows, got {len(plain) - 1}")
    number = plain[0].index(column)
    named = rows[0][number][0].startswith('"')
    for row, new in enumerate(cells, 1):
        raw, end = rows[row][number]
        old = plain[row][number]
        if new not in (old, old[1:] if old.startswith("'") else old):
            quoted = named if _must_quote(old) else raw.startswith('"')
            raw = '"' + new.replace('"', '""') + '"' if quoted or _must_quote(new) else new
            rows[row][number] = raw, end
    return (start + "".join(raw + end for row in rows for raw, end in row)).encode()


def _text(raw: str) -> str:
    return raw[1:-1].replace('""', '"') if raw.startswith('"') else raw


def _must_quote(text: str) -> bool:
    return any(mark in text for mark in ',"\r\n')
