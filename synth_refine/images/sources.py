"""Image sources of users: a folder, a csv, webdataset shards, Parquet, Hugging Face in; ids, labels, readers out."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synth_refine._io.check import InputError, check_folder_name
from synth_refine._io.csv import check_unique, read_csv
from synth_refine._io.untrusted import open_plain, read_yaml
from synth_refine.images.decode import SUFFIXES, decode
from synth_refine.images.readers import Files, HubRows, ParquetRows, Reader, TarMembers

MOST_CLASSES = 100_000  # a larger number in a column of labels is no class

CIFAKE_NAME = re.compile(r"\d+(?: \((\d+)\))?")
"""CIFAKE numbers its classes in the file names: "1000.jpg" is of the first class, "1000 (2).jpg" of the second."""


@dataclass(frozen=True)
class Images:
    """Labelled images somewhere on disk.

    Attributes:
        ids: One per image, unique; the path relative to the source, where there is one.
        labels: The class of each, (N,) int64 in [0, C).
        classes: Names of the classes, C.
        read: Gives the bytes of a row.
        kind: folder, csv, huggingface, webdataset, parquet or cifake.
    """

    ids: list[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    read: Reader = field(repr=False)
    kind: str

    def __post_init__(self) -> None:
        """Refuse ids that no result could be written with."""
        for one in self.ids:
            try:
                one.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"images: expected names in UTF-8, got {os.fsencode(one)!r}; rename it") from error

    def image(self, row: int) -> Image.Image:
        """The decoded image of a row.

        Raises:
            InputError: It cannot be read or decoded.
        """
        return decode(self.read(row))


def open_images(source: Any, classes: Sequence[str] | None = None, *, image: str = "", label: str = "") -> Images:
    """Find the images and labels of a source; no image is decoded yet.

    Args:
        source: A folder with one folder of images per class, named as in `SUFFIXES`; a .csv file with the columns
            `path` (or `id`) and `label`, paths relative to its folder; a folder that a Hugging Face dataset was saved
            to, or the dataset; a webdataset shard (.tar), or a folder of them, or a pattern such as "shards/*.tar"; the
            same for .parquet files; or a folder of CIFAKE's (FAKE or REAL).
        classes: Names of all classes, in the order of their numbers; by default those that occur, sorted.
        image: Column of the images in a dataset or Parquet file; by default `image` or `img`.
        label: Column of the labels; by default `label`, `labels` or `fine_label`.

    Raises:
        InputError: No such source, no images in it, an unknown class, an id twice, or a name that is not UTF-8.
    """
    if not isinstance(source, str | os.PathLike):
        return _hub(source, classes, image, label)
    place = Path(source)
    if "://" in str(source) or str(source).startswith("pipe:"):
        raise InputError(f"images: expected local files, got {source}; fetch them first")
    if any(sign in place.name for sign in "*?[") and not place.exists():
        shards = sorted(place.parent.glob(place.name))
        if shards and all(path.suffix == ".tar" for path in shards):
            return _webdataset(shards, classes)
        if shards and all(path.suffix == ".parquet" for path in shards):
            return _parquet(shards, classes, image, label)
        raise InputError(f"images: expected .tar or .parquet files that match {source}, got {len(shards)} files")
    if place.suffix == ".csv":
        return _table(place, classes)
    if place.suffix == ".tar":
        return _webdataset([place], classes)
    if place.suffix == ".parquet":
        return _parquet([place], classes, image, label)
    if not place.is_dir():
        found = "another file" if place.exists() else "nothing"
        raise InputError(f"images: expected a folder, .csv, .tar or .parquet, got {found}: {place}")
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        return _hub(place, classes, image, label)
    inside = sorted(path for path in place.iterdir() if not path.name.startswith("."))
    if shards := [path for path in inside if path.suffix == ".tar"]:
        return _webdataset(shards, classes)
    if shards := [path for path in inside if path.suffix == ".parquet"]:
        return _parquet(shards, classes, image, label)
    return _folder(place, inside, classes)


def _folder(place: Path, inside: list[Path], classes: Sequence[str] | None) -> Images:
    loose = [path for path in inside if path.suffix.lower() in SUFFIXES and path.is_file()]
    if loose:
        return _cifake(place, loose, classes)
    folders = [path for path in inside if path.is_dir()]
    cifake = [path.name for path in folders] in (["FAKE"], ["FAKE", "REAL"]) and "FAKE" not in (classes or ())
    if cifake and any(folders[0].glob("* (*)*")):  # its numbered copies; else these are two classes of somebody's own
        return _folder(folders[0], sorted(folders[0].iterdir()), classes)
    ids, names = [], []

    def fail(error: OSError) -> None:  # os.walk would pass over a folder that cannot be read
        raise InputError(f"images: cannot be read, {error.strerror or error}: {error.filename}") from error

    for folder in folders:
        for root, below, files in os.walk(folder, onerror=fail):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(files):
                if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                    ids.append(Path(root, name).relative_to(place).as_posix())
                    names.append(folder.name)
    if not ids:
        raise InputError(f"images: expected a folder of images per class in {place}, got no image")
    known = tuple(classes) if classes is not None else tuple(sorted(set(names)))
    order = sorted(range(len(ids)), key=ids.__getitem__)
    ids, names = [ids[row] for row in order], [names[row] for row in order]
    return Images(ids, _numbers(names, known, place), known, Files([place / one for one in ids]), "folder")


def _cifake(place: Path, files: list[Path], classes: Sequence[str] | None) -> Images:
    """A flat folder whose file names hold the class, as CIFAKE's do."""
    matches = [CIFAKE_NAME.fullmatch(path.stem) for path in files]
    if place.name not in ("FAKE", "REAL") or not all(matches):
        raise InputError(f"images: expected one folder per class in {place}, got the image {files[0].name} beside them")
    labels = np.array([int((match and match[1]) or 1) - 1 for match in matches], dtype=np.int64)
    known = tuple(classes) if classes is not None else tuple(map(str, range(int(labels.max()) + 1)))
    if labels.max() >= len(known) or labels.min() < 0:
        row = int(((labels >= len(known)) | (labels < 0)).argmax())
        raise InputError(f"images: expected {len(known)} classes in {place}, got {files[row].name}")
    return Images([path.name for path in files], labels, known, Files(files), "cifake")


def _table(place: Path, classes: Sequence[str] | None) -> Images:
    rows = read_csv("images", place)
    column = "path" if "path" in rows else "id"
    if column not in rows or "label" not in rows:
        raise InputError(f"images: expected the columns path and label in {place}, got {', '.join(rows)}")
    ids = rows[column]
    check_unique(f"images: {column} in {place}", ids)
    if not ids:
        raise InputError(f"images: expected at least one row in {place}, got none")
    labels, known = _named(rows["label"], classes, place)
    return Images(ids, labels, known, Files([place.parent / one for one in ids]), "csv")


def _webdataset(shards: list[Path], classes: Sequence[str] | None) -> Images:
    ids, texts, places = [], [], []
    for shard in shards:
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with open_plain("images", shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.isreg():
                        path = PurePosixPath(member.name)
                        stem, _, ending = path.name.partition(".")
                        key = str(path.with_name(stem)) if stem else path.name
                        parts = samples.setdefault(key, {})
                        if ending.lower() in parts:
                            raise InputError(
                                f"images: expected every sample once in {shard}, got {member.name!r} again"
                            )
                        parts[ending.lower()] = (member.offset_data, member.size)
                size = os.fstat(file.fileno()).st_size
        except tarfile.TarError as error:
            raise InputError(f"images: {shard} is no uncompressed tar file: {error}") from error
        for key, parts in samples.items():
            pictures = [ending for ending in parts if f".{ending.rpartition('.')[2]}" in SUFFIXES]
            if not pictures:
                continue
            plain = [ending for ending in pictures if "." not in ending] or pictures  # "mask.png" goes with "jpg"
            if len(plain) > 1:
                raise InputError(f"images: expected one image in the sample {key} of {shard}, got {', '.join(plain)}")
            offset, length = parts[plain[0]]
            if offset + length > size:
                raise InputError(f"images: {shard} is truncated in the sample {key}")
            places.append((shard, offset, length))
            ids.append(f"{shard.name}/{key}")
            texts.append(_sample_label(shard, key, parts))
    if not ids:
        raise InputError(f"images: expected images in {shards[0]}, got none")
    check_unique("images: sample", ids)
    labels, known = _named(texts, classes, shards[0])
    return Images(ids, labels, known, TarMembers(places), "webdataset")


def _sample_label(shard: Path, key: str, parts: Mapping[str, tuple[int, int]]) -> str:
    """The label of a webdataset sample, from its .cls or .label, or the entry `label` of its .json, or its .txt."""
    for ending in ("cls", "label", "json", "txt"):  # a text is a caption more often than a label
        if ending not in parts:
            continue
        offset, size = parts[ending]
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                text = file.read(min(size, 1 << 20)).decode()
            if ending == "json":
                label = json.loads(text)["label"]
                if type(label) not in (int, str):
                    raise TypeError(f"expected a number or a name, got {json.dumps(label)[:40]}")
                text = str(label)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"images: {shard} has no label in {key}.{ending}: {error!r}") from error
        return text.strip()
    raise InputError(f"images: expected a label (.cls or .json) beside {key} in {shard}, got {', '.join(parts)}")


def _parquet(files: list[Path], classes: Sequence[str] | None, image: str, label: str) -> Images:
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
                column = _column("image", present, image or column, ("image", "img"), path)
                wanted = _column("label", present, label, ("label", "labels", "fine_label"), path)
                own = _hub_names(file.schema_arrow.metadata, wanted)
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
            raise InputError(f"images: {path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    check_unique("images: id", ids)
    labels, known = _values(cells, names, classes, files[0])
    return Images(ids, labels, known, ParquetRows(groups, column), "parquet")


def _hub_names(metadata: Mapping[bytes, bytes] | None, label: str) -> list[str] | None:
    """The class names that Hugging Face notes in its Parquet files."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _hub(source: Any, classes: Sequence[str] | None, image: str, label: str) -> Images:
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
    column = _column("image", source.column_names, image, ("image", "img"), place)
    wanted = _column("label", source.column_names, label, ("label", "labels", "fine_label"), place)
    names = getattr(source.features[wanted], "names", None)
    labels, known = _values(list(source[wanted]), names, classes, place)
    if isinstance(source.features[column], datasets.Image):
        source = source.cast_column(column, datasets.Image(decode=False))
    ids = list(map(str, source["id"])) if "id" in source.column_names else list(map(str, range(len(source))))
    check_unique("images: id", ids)
    return Images(ids, labels, known, HubRows(source, column), "huggingface")


def _column(what: str, present: Sequence[str], wanted: str, usual: Sequence[str], place: object) -> str:
    found = [name for name in ((wanted,) if wanted else usual) if name in present]
    if not found:
        raise InputError(
            f"{what}: expected the column {wanted or ' or '.join(usual)} in {place}, got {', '.join(present)}"
        )
    return found[0]


def _values(
    cells: list[Any], names: Sequence[str] | None, classes: Sequence[str] | None, place: object
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels from cells of a table, which are numbers, with names or without, or names."""
    if not cells:
        raise InputError(f"images: expected at least one row in {place}, got none")
    if names is not None:
        outside = [cell for cell in cells if type(cell) is not int or not 0 <= cell < len(names)]
        if outside:
            raise InputError(f"images: expected labels 0 to {len(names) - 1} in {place}, got {outside[0]!r}")
        texts = [names[cell] for cell in cells]
        known = tuple(classes) if classes is not None else tuple(names)
        return _numbers(texts, known, place), known
    for row, cell in enumerate(cells):
        if type(cell) not in (int, str) or (isinstance(cell, int) and cell < 0):
            raise InputError(f"images: expected labels from 0 or names in {place}, got {cell!r} in row {row}")
    return _named([str(cell) for cell in cells], classes, place)


def _named(texts: list[str], classes: Sequence[str] | None, place: object) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels from names, or from numbers where they are no names."""
    known = tuple(classes) if classes is not None else tuple(sorted(set(texts)))
    numeric = all(text.isascii() and text.isdigit() for text in texts)
    if numeric and classes is None:
        largest = max(map(int, texts))
        if largest >= max(len(texts), MOST_CLASSES):
            raise InputError(f"images: expected labels below {MOST_CLASSES} in {place}, got {largest}")
        known = tuple(map(str, range(largest + 1)))
    elif numeric and not set(texts) <= set(known):
        numbers = np.array(list(map(int, texts)), dtype=np.int64)
        if numbers.max() >= len(known):
            raise InputError(f"images: expected labels 0 to {len(known) - 1} in {place}, got {numbers.max()}")
        return numbers, known
    return _numbers(texts, known, place), known


def _numbers(names: Sequence[str], classes: Sequence[str], place: object) -> NDArray[np.int64]:
    number = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(names) - set(number))
    if unknown:
        shown = ", ".join(map(repr, unknown[:5]))
        raise InputError(f"images: expected the classes {', '.join(classes[:10])} in {place}, got {shown} too")
    return np.array([number[name] for name in names], dtype=np.int64)


def read_classes(path: str | os.PathLike[str]) -> dict[str, str]:
    """The classes of a YAML file: each name, and what it is called in a prompt.

    Args:
        path: A list of names, or a mapping of names (of folders, of labels) to what prompts call them. The order is
            the order of the class numbers.

    Raises:
        InputError: No such file, or something else in it.
    """
    content = read_yaml("classes", path, text=True)
    pairs = [(one, one) for one in content] if isinstance(content, list) else content
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if not isinstance(pairs, list) or not pairs:
        raise InputError(f"classes: expected a list of names, or names with what prompts call them, in {path}")
    for name, text in pairs:
        for part in (name, text):
            if not isinstance(part, str) or not part.strip():
                raise InputError(f"classes: expected text in {path}, got {str(part)[:80]!r}")
    names = [name for name, _ in pairs]
    check_unique(f"classes in {path}", names)
    for name in names:
        check_folder_name(f"classes in {path}", name)
    return dict(zip(names, (text for _, text in pairs), strict=True))
