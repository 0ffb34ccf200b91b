"""Arrays on disk in pieces: .npy and Parquet files in, aligned shards and chunks out.

Letters in shapes: N images, D features, C classes, n rows of a chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from synth_refine._io.check import InputError, check_array, check_labels
from synth_refine._io.order import natural_key
from synth_refine._io.untrusted import read_npy
from synth_refine.refine.result import REASONS, Action

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_ROWS = 1 << 18
"""Rows of a .npy file per shard: 134 MB of 256 float16 features, a few seconds of work."""

TOP = 5  # best classes that are reported per image


@dataclass(frozen=True)
class Piece:
    """Rows of one input file.

    Attributes:
        path: A .npy or Parquet file.
        start: Its first row.
        stop: The row behind its last one.
        values: Labels in place of a file, (n,).
    """

    path: str
    start: int
    stop: int
    values: NDArray[np.integer[Any]] | None = field(default=None, repr=False, compare=False)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """What one output file is made from; `first` is the number of its first row among all rows."""

    number: int
    first: int
    features: Piece
    given: Piece
    logits: Piece | None

    @property
    def name(self) -> str:
        """The output file."""
        return f"part-{self.number:06d}.parquet"


def read_given(shard: Shard, num_classes: int | None) -> NDArray[np.int64]:
    """The given labels of a shard, (n,)."""
    parts = list(read_chunks("given", shard.given, SHARD_ROWS))
    start, most = shard.given.start, 1 << 31 if num_classes is None else num_classes
    for part in parts:
        check_labels(f"given in {shard.given.path}", part, most, start)
        start += len(part)
    return np.concatenate(parts).astype(np.int64)


@dataclass(frozen=True)
class Scores:
    """What is decided about the images of a shard.

    Attributes:
        given: Given labels, (n,) int64.
        refined: Refined labels, (n,) int64.
        classes: The best classes from the best one down, (n, K) int32; -1 where the image cannot be scored.
        scores: Their scores, (n, K) float32; NaN where the image cannot be scored.
        margin: By how much the best class beats the second, (n,) float32.
        action: `Action` codes, (n,).
        reason: `Reason` codes, (n,).
    """

    given: NDArray[np.int64]
    refined: NDArray[np.int64]
    classes: NDArray[np.int32]
    scores: NDArray[np.float32]
    margin: NDArray[np.float32]
    action: NDArray[np.integer[Any]]
    reason: NDArray[np.integer[Any]]

    def counts(self) -> dict[str, int]:
        """What the manifest says of the shard."""
        return {
            "rows": len(self.given),
            "changed": int((self.given != self.refined).sum()),
            "abstained": int((self.action == Action.ABSTAIN).sum()),
            "unscored": int((self.classes[:, 0] < 0).sum()),
        }


def shards_sample(
    features: str | os.PathLike[str], given: str | os.PathLike[str] | NDArray[Any], rows: int
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Given labels, (n,), and features, (n, D), of at most so many images from shards all over the files."""
    shards = cut_shards(features, given, None, SHARD_ROWS // 64)
    shards = shards[:: -(-len(shards) // 100)]
    each = -(-rows // len(shards))
    parts = [next(read_chunks("features", shard.features, each, "D")) for shard in shards]
    labels = [read_given(shard, None)[: len(part)] for shard, part in zip(shards, parts, strict=True)]
    return np.concatenate(labels)[:rows], np.concatenate(parts)[:rows]


def shard_table(shard: Shard, scores: Scores) -> pa.Table:
    """What is written of a shard."""
    import pyarrow as pa

    def texts(codes: NDArray[np.integer[Any]], names: Sequence[str]) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(codes.astype(np.int8), list(names))

    width = scores.classes.shape[1]
    columns = {
        "row": np.arange(shard.first, shard.first + len(scores.given)),
        "given": scores.given.astype(np.int32),
        "refined": scores.refined.astype(np.int32),
        "action": texts(scores.action, [action.name.lower() for action in Action]),
        "reason": texts(scores.reason, REASONS),
        "margin": scores.margin,
        "confidence": np.ascontiguousarray(scores.scores[:, 0]),
        "classes": pa.FixedSizeListArray.from_arrays(scores.classes.reshape(-1), width),
        "scores": pa.FixedSizeListArray.from_arrays(scores.scores.reshape(-1), width),
    }
    return pa.table(columns)


def cut_shards(
    features: str | os.PathLike[str],
    given: str | os.PathLike[str] | NDArray[Any],
    logits: str | os.PathLike[str] | None,
    shard_rows: int,
) -> list[Shard]:
    """The inputs cut into shards whose rows belong together."""
    if shard_rows < 1:
        raise InputError(f"shard_rows: expected at least 1, got {shard_rows}")
    if find_spec("pyarrow") is None:
        raise InputError("out: Parquet needs pyarrow; install it with `pip install 'synth-refine[parquet]'`")
    parts = _pieces("features", features, shard_rows)
    layout = [piece.rows for piece in parts]
    first = np.cumsum([0, *layout])
    labels = _aligned("given", given, layout, shard_rows)
    outputs = None if logits is None else _aligned("logits", logits, layout, shard_rows)
    if not parts:
        raise InputError(f"features: expected at least one row, got none in {features}")
    return [
        Shard(number, int(first[number]), piece, labels[number], None if outputs is None else outputs[number])
        for number, piece in enumerate(parts)
    ]


def _pieces(name: str, source: str | os.PathLike[str], shard_rows: int) -> list[Piece]:
    """The files of an input, the .npy ones cut; files without rows are left out."""
    pieces = []
    for path in _files(name, source):
        rows = _rows(name, path)
        step = shard_rows if path.endswith(".npy") else max(rows, 1)
        pieces += [Piece(path, start, min(start + step, rows)) for start in range(0, rows, step)]
    return pieces


def _files(name: str, source: str | os.PathLike[str]) -> list[str]:
    path = Path(source)
    if not path.is_dir():
        return [str(path)]
    kinds = [sorted(path.glob(f"*{suffix}"), key=natural_key) for suffix in (".npy", ".parquet")]
    if all(kinds):
        found = " and ".join(files[0].name for files in kinds)
        raise InputError(f"{name}: expected .npy or .parquet files in the folder {path}, got both: {found}")
    if files := kinds[0] or kinds[1]:
        return [str(file) for file in files]
    raise InputError(f"{name}: expected .npy or .parquet files in the folder {path}, got none")


def _rows(name: str, path: str) -> int:
    if path.endswith(".parquet"):
        return int(_parquet(name, path).metadata.num_rows)
    kinds, shape = ("iu", ("N",)) if name == "given" else ("f", ("N", "D"))
    values = read_npy(name, path, kinds)
    check_array(name, values, shape)
    return len(values)


def _parquet(name: str, path: str) -> Any:
    """An open Parquet file that has the column `name`."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            f"{name}: Parquet needs pyarrow; install it with `pip install 'synth-refine[parquet]'`"
        ) from error
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{name}: {path} is no Parquet file that can be read: {str(error).splitlines()[0]}") from error
    if name not in file.schema_arrow.names:
        raise InputError(f"{name}: expected the column {name} in {path}, got {', '.join(file.schema_arrow.names)}")
    return file


def _aligned(
    name: str, source: str | os.PathLike[str] | NDArray[Any], layout: list[int], shard_rows: int
) -> list[Piece]:
    """The pieces of an input with the rows of the features: one array or .npy file for all, or a file for each."""
    ends = np.cumsum([0, *layout]).tolist()
    if isinstance(source, np.ndarray):
        check_array(name, source, (ends[-1],))
        return [Piece("memory", start, stop, source[start:stop]) for start, stop in pairwise(ends)]
    path = Path(source)
    if path.is_dir() or path.suffix == ".parquet":
        pieces = _pieces(name, source, shard_rows)
        if (found := [piece.rows for piece in pieces]) != layout:
            raise InputError(
                f"{name}: expected files with the rows of the features' {_shown(layout)}, got {_shown(found)} in {path}"
            )
        return pieces
    if (rows := _rows(name, str(path))) != ends[-1]:
        raise InputError(f"{name}: expected {ends[-1]} rows like the features, got {rows} in {path}")
    return [Piece(str(path), start, stop) for start, stop in pairwise(ends)]


def _shown(layout: list[int]) -> str:
    return f"[{', '.join(map(str, layout[:4]))}{', ...' if len(layout) > 4 else ''}]"


def read_chunks(name: str, piece: Piece, step: int, width: int | str | None = None) -> Iterator[NDArray[Any]]:
    """The rows of a piece, `step` at a time: (n, width), a letter for any, or (n,) without a width.

    Every chunk of a .npy file is a map of its own, so that the pages of the one before no longer count as resident.
    """
    shape: tuple[int | str, ...] = ("n",) if width is None else ("n", width)
    if piece.values is not None:
        yield from (piece.values[start : start + step] for start in range(0, len(piece.values), step))
        return
    if not piece.path.endswith(".parquet"):
        for start in range(piece.start, piece.stop, step):
            mapped = read_npy(name, piece.path, "iu" if width is None else "f")[start : min(start + step, piece.stop)]
            check_array(f"{name} in {piece.path}", mapped, shape)
            yield mapped
        return
    rest: NDArray[Any] | None = None
    for batch in _parquet(name, piece.path).iter_batches(batch_size=step, columns=[name]):
        column = batch.column(0)
        if column.null_count:
            raise InputError(f"{name}: expected a value in every row of {piece.path}, got {column.null_count} nulls")
        values = column.to_numpy(zero_copy_only=False) if width is None else _matrix(name, piece.path, column)
        check_array(f"{name} in {piece.path}", values, shape)
        rest = values if rest is None else np.concatenate([rest, values])
        while len(rest) >= step:  # batches end with row groups too, and features and logits may differ in these
            yield rest[:step]
            rest = rest[step:]
    if rest is not None and len(rest):
        yield rest


def _matrix(name: str, path: str, column: Any) -> NDArray[Any]:
    """A column of lists as (n, D)."""
    import pyarrow.compute as pc
    import pyarrow.types as pt

    kind = column.type
    if not (pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)):
        raise InputError(f"{name}: expected a list of numbers per row of {path}, got {kind}")
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    flat = column.flatten()
    if len(lengths) != 1 or flat.null_count or not pt.is_floating(kind.value_type):
        raise InputError(
            f"{name}: expected lists of one length without nulls in {path}, got {kind} of lengths {lengths[:5]}"
        )
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), lengths[0])


def input_digests(shards: list[Shard]) -> dict[str, str]:
    """What identifies the input files, by name, size and time of change, and how they are cut."""
    digests = {}
    for name in ("features", "given", "logits"):
        pieces = [getattr(shard, name) for shard in shards]
        files = {piece.path: os.stat(piece.path) for piece in pieces if piece is not None and piece.values is None}
        about: list[Any] = [(Path(path).name, stat.st_size, stat.st_mtime_ns) for path, stat in files.items()]
        about += [digest(piece.values.tobytes()) for piece in pieces if piece is not None and piece.values is not None]
        cuts = [None if piece is None else (piece.start, piece.stop) for piece in pieces]
        digests[name] = digest(json.dumps([about, cuts]).encode())
    return digests


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
