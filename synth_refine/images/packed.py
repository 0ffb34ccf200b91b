"""Packed image sources of users: webdataset shards, Parquet files, Hugging Face datasets in; `Images` out."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synth_refine._io.check import InputError
from synth_refine._io.csv import check_unique
from synth_refine._io.untrusted import open_plain
from synth_refine.images.decode import SUFFIXES
from synth_refine.images.listing import Images, alike, named, numbers
from synth_refine.images.readers import HubRows, ParquetRows, TarMembers

LABELS = ("label", "labels", "fine_label")
PICTURES = ("image", "img")
MOST_EXTENDED_BYTES = 1 << 20  # of a tar header that carries names


def webdataset(shards: list[Path], classes: Sequence[str] | None, image: str = "", label: str = "") -> Images:
    """The samples of tar files, each an image with its label beside it.

    Raises:
        InputError: No tar file, cut off or damaged, or a sample without an image or a label of its own.
    """
    if image or label:
        raise InputError(f"image, label: expected no column, as {shards[0]} has none")
    ids, texts, places = [], [], []
    for shard in shards:
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        for name, offset, size in _members(shard):
            path = PurePosixPath(name)
            stem, _, ending = path.name.partition(".")
            key = str(path.with_name(stem)) if stem else path.name
            parts = samples.setdefault(key, {})
            if ending.lower() in parts:
                raise InputError(f"images: expected every sample once in {shard}, got {name!r} again")
            parts[ending.lower()] = (offset, size)
        for key, parts in samples.items():
            pictures = [ending for ending in parts if f".{ending.rpartition('.')[2]}" in SUFFIXES]
            if not pictures:
                continue
            plain = [ending for ending in pictures if "." not in ending] or pictures  # "mask.png" goes with "jpg"
            if len(plain) > 1:
                raise InputError(f"images: expected one image in the sample {key} of {shard}, got {', '.join(plain)}")
            places.append((shard, *parts[plain[0]]))
            ids.append(f"{shard.name}/{key}")
            texts.append(_sample_label(shard, key, parts))
    if not ids:
        raise InputError(f"images: expected images in {shards[0]}, got none")
    check_unique("images: sample", ids)
    labels, known = named(texts, classes, _place(shards), ids)
    return Images(ids, labels, known, TarMembers(places), "webdataset", alike(known))


class _Member(tarfile.TarInfo):
    """A header whose sizes are checked before anything is read or skipped by them."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        found = super().frombuf(buf, encoding, errors)
        extended = found.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if found.size < 0 or (extended and found.size > MOST_EXTENDED_BYTES):
            raise ValueError(f"a member of {found.size} bytes")
        if found.type == tarfile.GNUTYPE_SPARSE:
            raise ValueError("a sparse member")
        return found


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file in an uncompressed tar file."""
    try:
        with open_plain("images", shard) as file:
            end = os.fstat(file.fileno()).st_size if hasattr(file, "raw") else 0
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
                for member in archive:
                    if member.size < 0 or member.sparse is not None:  # as an extended header may say
                        raise ValueError("a sparse member" if member.size >= 0 else f"a member of {member.size} bytes")
                    if member.offset_data + member.size > end:
                        raise ValueError(f"truncated in {member.name[:80]!r}")
                    if member.isreg():
                        yield member.name, member.offset_data, member.size
                    archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                file.seek(archive.offset)
                rest = file.read(tarfile.BLOCKSIZE)
            if rest.strip(b"\0"):
                raise ValueError(f"damaged at byte {archive.offset}")
            if len(rest) < tarfile.BLOCKSIZE:
                raise ValueError("cut off: it has no end-of-archive marker")
    except InputError:
        raise
    except Exception as error:  # a damaged header can fail in any way
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"images: {shard} is no whole, uncompressed tar file: {why}") from error


def _sample_label(shard: Path, key: str, parts: Mapping[str, tuple[int, int]]) -> str:
    """The label of a webdataset sample, from its .cls or .label, or the entry `label` of its .json, or its .txt."""
    for ending in ("cls", "label", "json", "txt"):  # a text is a caption more often than a label
        if ending not in parts:
            continue
        offset, size = parts[ending]
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                text = file.read(min(size, MOST_EXTENDED_BYTES)).decode()
            if ending == "json":
                content = json.loads(text)
                if isinstance(content, dict) and "label" not in content:
                    raise ValueError(
                        f"expected the entry label, got {', '.join(content)[:80]}; put the class into {key}.cls"
                    )
                label = content["label"]
                if type(label) not in (int, str):
                    raise TypeError(f"expected a number or a name, got {json.dumps(label)[:40]}")
                text = str(label)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"images: {shard} has no label in {key}.{ending}: {repr(error)[:160]}") from error
        return text.strip()
    raise InputError(f"images: expected a label (.cls or .json) beside {key} in {shard}, got {', '.join(parts)}")


def parquet(files: list[Path], classes: Sequence[str] | None, image: str = "", label: str = "") -> Images:
    """The rows of Parquet files, with the class names that Hugging Face notes in them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'synth-refine[parquet]'") from error
    groups: list[tuple[Path, int, int]] = []
    cells: list[Any] = []
    ids: list[str] = []
    names, column = None, ""
    for path in files:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                present = file.schema_arrow.names
                features = _hub_features(file.schema_arrow.metadata)
                kinds = {name: kind.get("_type") for name, kind in features.items()}
                column = _column("image", present, image or column, PICTURES, path, _of_kind(kinds, "Image"))
                wanted = _column("label", present, label, LABELS, path, _of_kind(kinds, "ClassLabel"))
                own = _class_names(features.get(wanted, {}), path)
                names = names or own
                for old, new in zip_longest(names or (), own or names or ()):
                    if old != new:
                        raise InputError(f"images: expected the class {old!r} of {files[0]} in {path} too, got {new!r}")
                first = len(cells)
                cells += file.read(columns=[wanted]).column(0).to_pylist()
                rows = len(cells) - first
                ids += (
                    [str(one) for one in file.read(columns=["id"]).column(0).to_pylist()]
                    if "id" in present
                    else [f"{path.name}/{row}" for row in range(rows)]
                )
                for number in range(file.num_row_groups):
                    groups.append((path, number, first))
                    first += file.metadata.row_group(number).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(
                f"images: {path} cannot be read as Parquet: {' '.join(str(error).split())[:160]}"
            ) from error
    check_unique("images: id", ids)
    labels, known = _values(cells, names, classes, _place(files), ids)
    return Images(ids, labels, known, ParquetRows(groups, column), "parquet", alike(known))


def _hub_features(metadata: Mapping[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """What Hugging Face notes of the columns in its Parquet files."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {str(name): kind for name, kind in features.items() if isinstance(kind, dict)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _class_names(feature: Mapping[str, Any], place: object) -> list[str] | None:
    names = feature.get("names")
    if not isinstance(names, list) or not names:
        return None
    check_unique(f"images: classes in {place}", list(map(str, names)))
    return list(map(str, names))


def _of_kind(kinds: Mapping[str, Any], kind: str) -> list[str]:
    return [name for name, one in kinds.items() if one == kind]


def hub(source: Any, classes: Sequence[str] | None, image: str = "", label: str = "") -> Images:
    """The rows of a Hugging Face dataset, in memory or where it was saved to."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("Hugging Face datasets need datasets: pip install 'synth-refine[hub]'") from error
    place = source if isinstance(source, Path) else "the dataset"
    if isinstance(source, Path):
        try:
            source = datasets.load_from_disk(str(source))
        except Exception as error:
            raise InputError(f"images: {place} cannot be read as a dataset: {str(error)[:160]}") from error
    if isinstance(source, Mapping):
        raise InputError(f"images: expected one split, got {', '.join(source)} in {place}; name its folder or entry")
    if not isinstance(source, datasets.Dataset):
        raise InputError(f"images: expected a folder, a file or a datasets.Dataset, got {type(source).__name__}")
    source = source.with_format(None)  # a transform would give something else than rows
    kinds = {name: type(kind).__name__ for name, kind in source.features.items()}
    column = _column("image", source.column_names, image, PICTURES, place, _of_kind(kinds, "Image"))
    wanted = _column("label", source.column_names, label, LABELS, place, _of_kind(kinds, "ClassLabel"))
    names = getattr(source.features[wanted], "names", None)
    cells = list(source[wanted])
    if isinstance(source.features[column], datasets.Image):
        source = source.cast_column(column, datasets.Image(decode=False))
    ids = list(map(str, source["id"])) if "id" in source.column_names else list(map(str, range(len(source))))
    check_unique("images: id", ids)
    labels, known = _values(cells, names, classes, place, ids)
    return Images(ids, labels, known, HubRows(source, column), "huggingface", alike(known))


def _column(
    what: str, present: Sequence[str], wanted: str, usual: Sequence[str], place: object, typed: Iterable[str]
) -> str:
    """The column that was asked for, or the only one of a usual name or of the kind."""
    if wanted and wanted in present:
        return wanted
    found = list(dict.fromkeys([*(name for name in usual if name in present), *typed]))
    if wanted or not found:
        shown = ", ".join(present)
        raise InputError(f"{what}: expected the column {wanted or ' or '.join(usual)} in {place}, got {shown}")
    if len(found) > 1:
        raise InputError(
            f"{what}: expected one column of {what}s in {place}, got {', '.join(found)}; name one with --{what}"
        )
    return found[0]


def _values(
    cells: list[Any], names: Sequence[str] | None, classes: Sequence[str] | None, place: object, ids: Sequence[str]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels from cells of a table, which are numbers, with names or without, or names."""
    if not cells:
        raise InputError(f"images: expected at least one row in {place}, got none")
    if names is not None:
        for row, cell in enumerate(cells):
            if type(cell) is not int or not 0 <= cell < len(names):
                got = f"{str(cell)[:40]} for {ids[row]!r}"
                raise InputError(f"images: expected labels 0 to {len(names) - 1} in {place}, got {got}")
        texts = [names[cell] for cell in cells]
        known = tuple(classes) if classes is not None else tuple(names)
        return numbers(texts, known, place), known
    for row, cell in enumerate(cells):
        if type(cell) not in (int, str) or (isinstance(cell, int) and cell < -1):
            got = f"{str(cell)[:40]} for {ids[row]!r}"
            raise InputError(f"images: expected labels from 0 or names in {place}, got {got}")
    return named([str(cell) for cell in cells], classes, place, ids)


def _place(files: Sequence[Path]) -> Path:
    """What a message about all files names."""
    return files[0] if len(files) == 1 else files[0].parent
