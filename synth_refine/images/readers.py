"""Where the bytes of images lie: files, tar members, Parquet rows, Hugging Face rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from synth_refine._io.check import InputError
from synth_refine._io.untrusted import open_plain

MOST_BYTES = 1 << 28  # of an image file


class Reader(Protocol):
    """The bytes of a row; it can be sent to another process."""

    def __call__(self, row: int) -> bytes:
        """The image file of a row; raises InputError where it cannot be read."""


@dataclass(frozen=True)
class Files:
    """Reads rows from files."""

    paths: list[Path]

    def __call__(self, row: int) -> bytes:
        """The bytes of a row's file."""
        return _bytes(self.paths[row])


@dataclass(frozen=True)
class TarMembers:
    """Reads rows from uncompressed tar files by offset; nothing is unpacked, and no name in them is used as a path."""

    places: list[tuple[Path, int, int]]

    def __call__(self, row: int) -> bytes:
        """The bytes of a row's member."""
        path, offset, size = self.places[row]
        data = _bytes(path, offset, size)
        if len(data) != size:
            raise InputError(f"image: {path} was cut off: expected {size} bytes from byte {offset} on, got {len(data)}")
        return data


class ParquetRows:
    """Reads rows from Parquet files, a row group at a time."""

    def __init__(self, groups: list[tuple[Path, int, int]], column: str) -> None:
        """Groups are (file, number of the group in it, first row of all)."""
        self.groups, self.column = groups, column
        self.starts = [start for _, _, start in groups]
        self.held: tuple[int, Any] = (-1, None)  # number of a group, and its cells or why they cannot be read

    def __call__(self, row: int) -> bytes:
        """The bytes of a row's cell."""
        import pyarrow.parquet

        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        path, group, start = self.groups[number]
        if self.held[0] != number:
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    self.held = (number, file.read_row_group(group, columns=[self.column]).column(0))
            except (pyarrow.ArrowException, OSError) as error:
                why = " ".join(str(error).split())[:160]
                self.held = (number, f"image: row group {group} of {path} cannot be read, {why}")
        if isinstance(self.held[1], str):
            raise InputError(self.held[1])
        return _cell_bytes(self.held[1][row - start].as_py(), row)


@dataclass(frozen=True)
class HubRows:
    """Reads rows from a Hugging Face dataset whose image column is not decoded, or from a list of such rows."""

    dataset: Any
    column: str

    def __call__(self, row: int) -> bytes:
        """The bytes of a row's cell, or of the file that it names."""
        try:
            cell = self.dataset[row][self.column]
        except Exception as error:  # a damaged Arrow file can fail in many ways
            why = " ".join(repr(error).split())[:160]
            raise InputError(f"image: row {row} of the dataset cannot be read, {why}") from error
        return _cell_bytes(cell, row)


def _bytes(path: str | os.PathLike[str], offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a file, or `size` of them from `offset` on."""
    with open_plain("image", path) as file:
        try:
            if size is None:
                size = file.seek(0, os.SEEK_END) - offset
            if size > MOST_BYTES:
                raise InputError(f"image: expected at most {MOST_BYTES} bytes, got {size}: {path}")
            file.seek(offset)
            return file.read(size)
        except OSError as error:
            raise InputError(f"image: cannot be read, {error.strerror or error}: {path}") from error


@dataclass(frozen=True)
class From:
    """Reads rows that are counted from another one than the first."""

    read: Reader
    first: int

    def __call__(self, row: int) -> bytes:
        """The bytes of a row."""
        return self.read(self.first + row)


def part_of(read: Reader, rows: range) -> Reader:
    """A reader of these rows, counted from 0; readers of `open_images` do not carry along where all the others are."""
    if isinstance(read, Files):
        return Files(read.paths[rows.start : rows.stop])
    if isinstance(read, TarMembers):
        return TarMembers(read.places[rows.start : rows.stop])
    if isinstance(read, ParquetRows):  # without the row group that it holds
        first = int(np.searchsorted(read.starts, rows.start, side="right")) - 1
        groups = [group for group in read.groups[first:] if group[2] < rows.stop]
        return ParquetRows([(path, group, start - rows.start) for path, group, start in groups], read.column)
    if isinstance(read, HubRows):
        part = read.dataset.select_columns(read.column).select(rows)
        # Of a dataset on disk its place travels; one in memory would travel whole, though most of it is not selected.
        return HubRows(part if part.cache_files else part.to_list(), read.column)
    return From(read, rows.start)  # a user's own


def _cell_bytes(cell: object, row: int) -> bytes:
    """Image bytes from a cell: bytes, or a record of bytes and path as Hugging Face stores them."""
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
        if data is None and path:
            return _bytes(path)
        cell = data
    if not isinstance(cell, bytes):
        raise InputError(f"image: expected bytes in row {row}, got {type(cell).__name__}")
    return cell
