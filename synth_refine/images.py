"""Images of users: where they lie, what they are labelled, and one function that decodes them.

A source is a folder per class, a .csv table, a saved Hugging Face dataset, webdataset shards or Parquet files. Each
becomes an `Images`: ids, given labels and the bytes of a row on demand. An image that cannot be decoded stays a row, so
that ids never shift; its features are NaN and its label is kept.

Letters in shapes: N images, H x W pixels, D features, C classes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from synth_refine._check import InputError, check_folder_name
from synth_refine.encode import SHARD_ROWS, Encoder, Preprocess, kept_shards
from synth_refine.files import open_plain, what_is
from synth_refine.labels import check_unique, read_csv
from synth_refine.on_ray import check_engine, on_cluster

FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
    if name != "AVIF" or find_spec("PIL.AvifImagePlugin") is not None  # which Pillow has from 11.3 on
)
"""Decoders that Pillow may use. Others start programs (EPS) or are rarely tested against hostile files."""
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
}
"""Endings of names, in upper or lower case, by which images are found in folders and shards: the usual ones of these
formats. Which of them a file is, its content tells.
"""
MAX_PIXELS = 89_478_485
"""Pillow's own limit for a decompression bomb, where it only warns."""
BATCH_ROWS = 64
MOST_CLASSES = 100_000  # a larger number in a column of labels is no class
Embedded: TypeAlias = tuple[int, int, Tensor]  # number of a shard, place of a batch in it, features
Decoded: TypeAlias = "tuple[int, int, NDArray[np.uint8], NDArray[np.bool_]]"  # likewise pixels, and which are good
CIFAKE_NAME = re.compile(r"\d+(?: \((\d+)\))?")
"""CIFAKE numbers its classes in the file names: "1000.jpg" is of the first class, "1000 (2).jpg" of the second."""


# ---- one image ----


def decode(
    source: bytes | str | os.PathLike[str],
    *,
    at_least: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode an image to RGB, upright, on white where it is transparent; the first frame of an animated one.

    Whole numbers of 16 or 32 bits per pixel are taken as of 8 bits where an image has none above 255, else as of 16.

    Args:
        source: The bytes of a file, or its path.
        at_least: Height and width that are enough: a JPEG may be decoded at a fraction of its size that is still twice
            as large, which is several times as fast.
        max_pixels: Larger images are refused before they are decoded.

    Raises:
        InputError: Not an image of a known format, truncated, damaged or too large; one line says why.

    Example:
        >>> file = io.BytesIO()
        >>> Image.new("CMYK", (4, 2)).save(file, "JPEG")
        >>> image = decode(file.getvalue())
        >>> image.mode, image.size
        ('RGB', (4, 2))
    """
    if isinstance(source, bytes):
        data = source
    else:
        data = _bytes(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow remarks on damaged metadata, which the pixels do not need
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise InputError(f"image: expected at most {max_pixels} pixels, got {image.width}x{image.height}")
                if at_least is not None:
                    image.draft("RGB", (2 * at_least[1], 2 * at_least[0]))
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except UnidentifiedImageError as error:
        kind = what_is(data[:512]) or "no image of a known format"
        raise InputError(f"image: expected {', '.join(FORMATS)}, got {kind}") from error
    except Exception as error:  # a damaged file can fail in any way a decoder can
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"image: damaged or truncated, {text[:160]}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # of 16 or 32 bits per pixel, of which Pillow takes the upper ones or clips them
        values = np.asarray(image).astype(np.int64)
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        if low < 0 or high > 65535:
            raise InputError(f"image: expected at most 16 bits per pixel, got values {low} to {high}")
        if high > 255:  # values that 8 bits can hold are such, or else the image would be black in any case
            values = (values + 128) // 257
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InputError("image: expected pixels in whole numbers, got floating-point ones, whose range is not known")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def fitted(image: Image.Image, preprocess: Preprocess | None) -> Image.Image:
    """An image resized and cut to the size that a network wants; unchanged where it wants none."""
    if preprocess is None or preprocess.size is None:
        return image
    height, width = preprocess.size
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    if (image.height, image.width) == (height, width):
        return image
    target = (width, height)
    if preprocess.crop:  # the longer side is rounded down, as in torchvision's Resize
        scale = max(height / image.height, width / image.width)
        target = (max(width, int(image.width * scale)), max(height, int(image.height * scale)))
    image = image.resize(target, filters[preprocess.interpolation])
    left, top = round((target[0] - width) / 2), round((target[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))


# ---- many images ----


class Reader(Protocol):
    """The bytes of a row; it can be sent to another process."""

    def __call__(self, row: int) -> bytes:
        """The image file of a row; raises InputError where it cannot be read."""


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


def _bytes(path: str | os.PathLike[str], offset: int = 0, size: int = -1) -> bytes:
    """The bytes of a file, or `size` of them from `offset` on."""
    with open_plain("image", path) as file:
        try:
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
    with open_plain("classes", path) as file:
        data = file.read()
    try:
        content = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"classes: {path} is no YAML: {' '.join(str(error).split())[:160]}") from error
    pairs = [(one, one) for one in content] if isinstance(content, list) else content
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if not isinstance(pairs, list) or not pairs:
        raise InputError(f"classes: expected a list of names, or names with what prompts call them, in {path}")
    for name, text in pairs:
        for part in (name, text):
            if not isinstance(part, str | int) or isinstance(part, bool) or not str(part).strip():
                raise InputError(f"classes: expected text in {path}, got {part!r}; put it in quotes")
    names = [str(name) for name, _ in pairs]
    check_unique(f"classes in {path}", names)
    for name in names:
        check_folder_name(f"classes in {path}", name)
    return dict(zip(names, (str(text) for _, text in pairs), strict=True))


def content_hashes(
    images: Images,
    *,
    threads: int = 4,
    shard_rows: int = SHARD_ROWS,
    engine: str = "local",
    address: str | None = None,
) -> list[str]:
    """The SHA-256 of each image file, in hex; empty where it cannot be read.

    Args:
        images: From `open_images`.
        threads: That read at the same time, in each process.
        shard_rows: For ray: images per task; no more than these are read here, which is faster than to ask a cluster.
        engine: `local` or `ray`, as for `embed_images`.
        address: Of the Ray cluster, likewise.

    Raises:
        InputError: For ray: it is missing, or a node cannot read an image that can be read here.
    """
    check_engine(engine)
    count = len(images.ids)
    found = [""] * count
    shards = _cut(range(count), shard_rows)
    with tqdm(total=count, desc="scanning", unit="image", disable=None, leave=False) as bar:
        if engine == "local" or len(shards) == 1:
            for row, one in enumerate(_hashes(images.read, count, threads)):
                found[row] = one
                bar.update()
            return found
        work = [(number, part_of(images.read, rows), len(rows)) for number, rows in enumerate(shards)]
        for number, hashes, node in on_cluster(work, partial(hashed_shard, threads=threads), address):
            rows = shards[number]
            found[rows.start : rows.stop] = hashes
            for row in rows:
                if not found[row] and _hash(images.read, row):
                    raise InputError(f"engine: {images.ids[row]} cannot be read on node {node}")
            bar.update(len(rows))
    return found


def _hashes(read: Reader, count: int, threads: int) -> Iterator[str]:
    # A reader that holds a row group of a Parquet file is not shared between threads.
    with ThreadPoolExecutor(1 if isinstance(read, ParquetRows) else threads) as pool:
        yield from pool.map(partial(_hash, read), range(count))


def _hash(read: Reader, row: int) -> str:
    try:
        return hashlib.sha256(read(row)).hexdigest()
    except InputError:
        return ""


def hashed_shard(part: tuple[int, Reader, int], *, threads: int) -> Iterator[tuple[int, list[str], str]]:
    """A task on a cluster: the hashes of a shard.

    Args:
        part: Number of the shard, a reader of its images, and how many they are.
        threads: See `content_hashes`.

    Yields:
        Once: number of the shard, a hash per image, and the node that read them.
    """
    number, read, count = part
    yield number, list(_hashes(read, count, threads)), platform.node()


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Decoded images in batches of one size: (B, 3, H, W) uint8, and which of them are good, (B,) bool."""

    def __init__(
        self,
        read: Reader,
        batches: list[range],
        preprocess: Preprocess | None,
        size: tuple[int, int],
        there: Sequence[str | None] = (),
    ):
        """Batches of rows; `size` is the height and width that all images come in.

        `there` names, row by row, the images that others could read, so that no row is bad only on this node.
        """
        self.read, self.batches, self.preprocess, self.size, self.there = read, batches, preprocess, size, there
        self.enough = None if preprocess is None else preprocess.size

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """One batch; a bad image is black in it.

        Raises:
            InputError: An image that others could read cannot be read here.
        """
        rows = self.batches[number]
        pixels = np.zeros((len(rows), *self.size, 3), dtype=np.uint8)
        good = np.zeros(len(rows), dtype=bool)
        for place, row in enumerate(rows):
            try:
                data = self.read(row)
            except InputError as error:
                if self.there and self.there[row] is not None:
                    raise InputError(
                        f"engine: {self.there[row]} cannot be read on node {platform.node()}: {error}"
                    ) from error
                continue
            try:
                image = fitted(decode(data, at_least=self.enough), self.preprocess)
            except InputError:
                continue
            if (image.height, image.width) == self.size:
                pixels[place], good[place] = np.asarray(image), True
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(good)


def embed_images(
    encoder: Encoder,
    images: Images,
    folder: str | os.PathLike[str],
    *,
    hashes: Sequence[str] | None = None,
    workers: int = 0,
    batch_rows: int = BATCH_ROWS,
    shard_rows: int = SHARD_ROWS,
    progress: str = "embedding",
    engine: str = "local",
    address: str | None = None,
    make: Callable[..., Encoder] | None = None,
    device: str = "cuda",
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Features of images on disk, decoded by workers while the encoder computes, and kept as `embed_cached` keeps them.

    Args:
        encoder: The encoder. Where its `preprocess` has a size, images are brought to it; else all must be of one size.
        images: From `open_images`.
        folder: Where the features of all encoders are kept; made if it is missing.
        hashes: From `content_hashes`, where they are known already.
        workers: Processes that decode; 0 decodes between the batches.
        batch_rows: Images per batch.
        shard_rows: Images per shard, in which an interrupted run goes on.
        progress: What the bar says.
        engine: `local`, this process and its workers; or `ray`, a cluster whose nodes see the same images and weights
            under the same paths. A shard is decoded and embedded in one task, or embedded by actors with a GPU each; on
            processors of one kind both engines write the same bytes, and either goes on with what the other began.
        address: Of the Ray cluster; by default the one that RAY_ADDRESS names, one that runs on this machine, or a new
            local one.
        make: For ray: called as make(device=...) in every process that embeds, gives the encoder there, such as
            partial(encoder_by_name, "timm:resnet50.a1_in1k").
        device: For ray: what they compute on, a GPU each for cuda; cpu where no GPU shall be taken.

    Returns:
        Features, (N, D) float32, NaN for images that could not be decoded, and why, by row.

    Raises:
        InputError: No image at all could be decoded, or as the encoder's `embed`; or Ray is missing, or a node has
            another encoder or cannot read an image that has a hash.
    """
    check_engine(engine)
    wanted = encoder.id
    actor = None if make is None else partial(embedder, make, wanted)
    if engine == "ray" and actor is None:
        raise InputError("make: expected what builds the encoder on a node of the cluster, got None")
    if hashes is None:
        hashes = content_hashes(images, shard_rows=shard_rows, engine=engine, address=address)
    preprocess = getattr(encoder, "preprocess", None)
    size = preprocess.size if preprocess is not None and preprocess.size is not None else _first_size(images)
    count = len(images.ids)
    digest = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    # Features depend on how a file becomes pixels too; "files" keeps them apart from those of tensors.
    about = {"encoder": wanted, "files": digest, "rows": count, "size": list(size), "shard_rows": shard_rows}
    shards = [range(start, min(start + shard_rows, count)) for start in range(0, count, shard_rows)]
    bar = tqdm(total=count, desc=progress, unit="image", disable=None, leave=False)

    def here(missing: list[int]) -> Iterator[Embedded]:
        keys = [(number, *one) for number in missing for one in enumerate(_cut(shards[number], batch_rows))]
        dataset = Batches(images.read, [rows for _, _, rows in keys], preprocess, size)
        loader = DataLoader(dataset, batch_size=None, num_workers=min(workers, len(keys)))
        for (number, place, _), (pixels, good) in zip(keys, loader, strict=True):
            yield number, place, _embed_good(encoder, pixels, good)

    def on_ray(missing: list[int]) -> Iterator[Embedded]:
        names = [one if known else None for one, known in zip(images.ids, hashes, strict=True)]
        work = [
            (number, part_of(images.read, rows), names[rows.start : rows.stop])
            for number, rows in ((number, shards[number]) for number in missing)
        ]
        task = partial(decoded_shard, batch_rows=batch_rows, preprocess=preprocess, size=size)
        for number, place, features in on_cluster(work, task, address, actor=actor, device=device):
            yield number, place, torch.from_numpy(features)

    def compute(missing: list[int]) -> Iterator[tuple[int, Tensor]]:
        bar.update(count - sum(len(shards[number]) for number in missing))
        parts: dict[int, dict[int, Tensor]] = {number: {} for number in missing}
        for number, place, features in (here if engine == "local" else on_ray)(missing):
            bar.update(len(features))
            parts[number][place] = features
            if len(parts[number]) == len(_cut(shards[number], batch_rows)):
                whole = parts.pop(number)
                yield number, torch.cat([whole[place] for place in sorted(whole)])

    features = kept_shards(folder, about, [len(rows) for rows in shards], compute).numpy()
    bar.close()
    bad = np.flatnonzero(np.isnan(features).all(axis=1))
    if len(bad) == count:
        raise InputError(
            f"images: expected at least one that can be decoded, got {why_bad(images, 0, preprocess, size)}"
        )
    return features, {int(row): why_bad(images, int(row), preprocess, size) for row in bad}


def _cut(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def decoded_shard(
    part: tuple[int, Reader, list[str | None]], *, batch_rows: int, preprocess: Preprocess | None, size: tuple[int, int]
) -> Iterator[Decoded]:
    """A task on a cluster: the batches of a shard.

    Args:
        part: Number of the shard, a reader of its images, and the id of each, None where it could not be read before.
        batch_rows: See `embed_images`.
        preprocess: Of the encoder.
        size: Height and width.

    Yields:
        Number of the shard, place in it, pixels, (B, H, W, 3), and which are good, (B,).

    Raises:
        InputError: This node cannot read an image that could be read before, as where it sees other folders.
    """
    number, read, names = part
    batches = Batches(read, _cut(range(len(names)), batch_rows), preprocess, size, names)
    for place in range(len(batches)):
        pixels, good = batches[place]
        yield number, place, pixels.permute(0, 2, 3, 1).numpy(), good.numpy()


def embedder(make: Callable[..., Encoder], wanted: str, device: str) -> Callable[[Decoded], tuple[int, int, Any]]:
    """An actor on a cluster: embeds what `decoded_shard` gives.

    Raises:
        InputError: The encoder that `make` builds on this node cannot be had or has another id than `wanted`.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"engine: expected a GPU that torch can use on node {platform.node()}, got none")
    encoder = make(device=device)
    if encoder.id != wanted:
        raise InputError(f"encoder: expected the same weights on every node, got others on node {platform.node()}")

    def embed(batch: Decoded) -> tuple[int, int, Any]:
        number, place, pixels, good = batch
        # The same order of bytes as here, or a convolution may round otherwise.
        features = _embed_good(encoder, torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(good))
        return number, place, features.numpy()

    return embed


def _embed_good(encoder: Encoder, pixels: Tensor, good: Tensor) -> Tensor:
    """Features of a batch, (B, D), NaN for bad images."""
    if bool(good.all()):
        return encoder.embed(pixels).cpu()
    found = encoder.embed(pixels[good] if bool(good.any()) else pixels[:1]).cpu()  # a black one tells D
    features = found.new_full((len(good), found.shape[1]), torch.nan)
    if bool(good.any()):
        features[good] = found
    return features


def _first_size(images: Images) -> tuple[int, int]:
    """Height and width of the first image that can be decoded."""
    for row in range(len(images.ids)):
        try:
            image = images.image(row)
        except InputError:
            continue
        return image.height, image.width
    raise InputError(f"images: expected at least one that can be decoded, got {len(images.ids)} bad ones")


def why_bad(images: Images, row: int, preprocess: Preprocess | None, size: tuple[int, int]) -> str:
    """Why an image was left out."""
    try:
        image = fitted(images.image(row), preprocess)
    except InputError as error:
        return str(error)
    return f"image: expected {size[1]}x{size[0]} pixels, as the first has, got {image.width}x{image.height}"
