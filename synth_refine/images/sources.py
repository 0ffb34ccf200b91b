"""Image sources of users: a folder, a csv, shards or a dataset in; `Images` (ids, labels, readers) out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from synth_refine._io.check import InputError
from synth_refine._io.csv import check_unique, read_csv
from synth_refine._io.order import natural_key
from synth_refine.images.class_folders import class_by_folder, is_system
from synth_refine.images.decode import SUFFIXES
from synth_refine.images.listing import Images, alike, named, numbers
from synth_refine.images.packed import hub, parquet, webdataset
from synth_refine.images.readers import Files

CIFAKE_NAME = re.compile(r"\d+(?: \((\d+)\))?")
"""CIFAKE numbers its classes in the file names: "1000.jpg" is of the first class, "1000 (2).jpg" of the second."""

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
SPLIT = re.compile(rf"({'|'.join(SPLITS)})(?![A-Za-z])")
PACKED = {".tar": webdataset, ".parquet": parquet}
MOST_SHARDS = 100_000


def open_images(source: Any, classes: Sequence[str] | None = None, *, image: str = "", label: str = "") -> Images:
    """Find the images and labels of a source; no image is decoded yet.

    Args:
        source: A folder with one folder of images per class, named as in `SUFFIXES`; a .csv file with the columns
            `path` (or `id`) and `label`, paths relative to its folder; a folder that a Hugging Face dataset was saved
            to, or the dataset; a webdataset shard (.tar), or a folder of them, or a pattern such as "shards/*.tar" or
            "{00000..00099}.tar"; the same for .parquet files; or a folder of CIFAKE's (FAKE or REAL).
        classes: Names of all classes, in the order of their numbers; by default those that occur, in natural order.
        image: Column of the images in a dataset or Parquet file; by default `image` or `img`.
        label: Column of the labels; by default `label`, `labels` or `fine_label`.

    Raises:
        InputError: No such source, no images in it, several splits, an unknown class, an id twice, or a name that is
            not UTF-8.
    """
    if not isinstance(source, str | os.PathLike):
        return hub(source, classes, image, label)
    place, suffix = Path(source), Path(source).suffix.lower()
    if "://" in str(source) or str(source).startswith("pipe:"):
        raise InputError(f"images: expected local files, got {source}; fetch them first")
    if re.search(r"[*?\[{]", str(place)) and not place.exists():
        shards = _matching(place)
        if not shards or len({path.suffix for path in shards}) > 1 or shards[0].suffix not in PACKED:
            raise InputError(f"images: expected .tar or .parquet files that match {source}, got {len(shards)} files")
        return PACKED[shards[0].suffix](shards, classes, image, label)
    if suffix == ".csv":
        return _table(place, classes)
    if suffix in PACKED:
        return PACKED[suffix]([place], classes, image, label)
    if not place.is_dir():
        found = "another file" if place.exists() else "nothing"
        raise InputError(f"images: expected a folder, .csv, .tar or .parquet, got {found}: {place}")
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        return hub(place, classes, image, label)
    inside = sorted((path for path in place.iterdir() if not is_system(path.name)), key=natural_key)
    for kind, read in PACKED.items():
        if shards := [path for path in inside if path.suffix == kind]:
            if folder := next((path for path in inside if path.is_dir()), None):
                raise InputError(
                    f"images: expected shards or a folder per class in {place}, got {shards[0].name} beside "
                    f"{folder.name}; name the shards as {place}/*{kind}, or move them away"
                )
            return read(_of_one_split(place, shards), classes, image, label)
    return _folder(place, inside, classes)


def opened_as(name: str, source: str, classes: Sequence[str], **columns: str) -> Images:
    """`open_images`, whose errors begin with the name of the argument."""
    try:
        return open_images(source, classes, **columns)
    except InputError as error:
        raise InputError(f"{name}: {str(error).removeprefix('images: ')}") from error


def _matching(pattern: Path) -> list[Path]:
    """The files of a pattern in natural order; {00000..00002} stands for these numbers, whether there or not."""
    parts = re.split(r"\{(\d{1,9})\.\.(\d{1,9})\}", str(pattern))
    if len(parts) == 1:
        return sorted(pattern.parent.glob(pattern.name), key=natural_key)
    spans = [range(int(first), int(last) + 1) for first, last in zip(parts[1::3], parts[2::3], strict=True)]
    if np.prod([float(len(span)) for span in spans]) > MOST_SHARDS:
        raise InputError(f"images: expected at most {MOST_SHARDS} files of {pattern}, got more")
    made = []
    for values in product(*spans):
        texts = [f"{value:0{len(first)}d}" for value, first in zip(values, parts[1::3], strict=True)]
        made.append(Path("".join(a + b for a, b in zip(parts[::3], [*texts, ""], strict=True))))
    return made


def _of_one_split(place: Path, shards: list[Path]) -> list[Path]:
    """Refuse shards of which some are for training and others for tests."""
    splits = {match[1]: None for path in shards if (match := SPLIT.match(path.name))}
    if len(splits) > 1:
        [first, *_] = splits
        raise InputError(
            f"images: expected one split in {place}, got {', '.join(splits)}; name its files, such as "
            f"{place}/{first}*{shards[0].suffix}"
        )
    return shards


def _folder(place: Path, inside: list[Path], classes: Sequence[str] | None) -> Images:
    loose = [path for path in inside if path.suffix.lower() in SUFFIXES and path.is_file()]
    if loose:
        return _cifake(place, loose, classes)
    folders = [path for path in inside if path.is_dir()]
    names = [path.name for path in folders]
    if names in (["FAKE"], ["FAKE", "REAL"]) and "FAKE" not in (classes or ()) and any(folders[0].glob("* (*)*")):
        # Its numbered copies; else these are two classes of somebody's own.
        return _folder(folders[0], sorted(folders[0].iterdir(), key=natural_key), classes)
    if names and {name.lower() for name in names} <= SPLITS and not set(names) <= set(classes or ()):
        deep = any(path.is_dir() and not is_system(path.name) for folder in folders for path in folder.iterdir())
        if len(names) > 1 or deep:
            raise InputError(
                f"images: expected one split, got {', '.join(names)} in {place}; name its folder, such as {folders[0]}"
            )
    scan = _Scan()
    found = {folder.name: scan.images(folder, place) for folder in folders}
    for name, there in found.items():
        scan.count["class folders without images"].extend([] if there else [name])
    pairs = sorted(
        ((one, name) for name, there in found.items() for one in there), key=lambda pair: natural_key(pair[0])
    )
    if not pairs:
        raise InputError(
            "; ".join([f"images: expected a folder of images per class in {place}, got no image", *scan.notes])
        )
    class_of = class_by_folder(place)
    ids, texts = [one for one, _ in pairs], [class_of.get(name, name) for _, name in pairs]
    known = tuple(classes) if classes is not None else tuple(sorted(set(texts), key=natural_key))
    labels = numbers(texts, known, place)
    scan.count["system and hidden folders and files"].extend(
        path.name for path in place.iterdir() if is_system(path.name) and path.is_dir()
    )
    return Images(ids, labels, known, Files([place / one for one in ids]), "folder", (*scan.notes, *alike(known)))


class _Scan:
    """A walk through folders, and what it passed over."""

    def __init__(self) -> None:
        kinds = ("system and hidden folders and files", "links to folders", "files of other kinds")
        self.count: dict[str, list[str]] = {kind: [] for kind in (*kinds, "class folders without images")}

    def images(self, folder: Path, place: Path) -> list[str]:
        """The images below a folder, as paths relative to `place`."""
        found, (system, links, others) = [], list(self.count)[:3]

        def fail(error: OSError) -> None:  # os.walk would pass over a folder that cannot be read
            raise InputError(f"images: cannot be read, {error.strerror or error}: {error.filename}") from error

        for root, below, files in os.walk(folder, onerror=fail):
            self.count[links] += [name for name in below if os.path.islink(os.path.join(root, name))]
            self.count[system] += [name for name in (*below, *files) if is_system(name)]
            below[:] = [name for name in below if not is_system(name)]
            for name in files:
                if is_system(name):
                    continue
                if Path(name).suffix.lower() in SUFFIXES:
                    found.append(Path(root, name).relative_to(place).as_posix())
                else:
                    self.count[others].append(Path(name).suffix.lower() or name)
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each kind, with counts."""
        hint = "; convert .heic files to .jpg" if {".heic", ".heif"} & set(self.count["files of other kinds"]) else ""
        lines = []
        for kind, names in self.count.items():
            shown = ", ".join(f"{count} {name}" for name, count in Counter(names).most_common(5))
            if names:
                lines.append(
                    f"passed over {len(names)} {kind} ({shown}){hint if kind == 'files of other kinds' else ''}"
                )
        return tuple(lines)


def _cifake(place: Path, files: list[Path], classes: Sequence[str] | None) -> Images:
    """A flat folder whose file names hold the class, as CIFAKE's do."""
    matches = [CIFAKE_NAME.fullmatch(path.stem) for path in files]
    if place.name not in ("FAKE", "REAL") or not all(matches):
        raise InputError(f"images: expected one folder per class in {place}, got the image {files[0].name} beside them")
    texts = [(match and match[1]) or "1" for match in matches]
    labels = np.array([int(text) - 1 if len(text) < 7 else -1 for text in texts], dtype=np.int64)
    known = tuple(classes) if classes is not None else tuple(map(str, range(int(labels.max()) + 1)))
    if labels.max() >= len(known) or labels.min() < 0:
        row = int(((labels >= len(known)) | (labels < 0)).argmax())
        raise InputError(f"images: expected {len(known)} classes in {place}, got {files[row].name[:80]}")
    return Images([path.name for path in files], labels, known, Files(files), "cifake")


def _table(place: Path, classes: Sequence[str] | None) -> Images:
    rows = read_csv("images", place)
    column = "path" if "path" in rows else "id"
    if column not in rows or "label" not in rows:
        raise InputError(f"images: expected the columns path and label in {place}, got {', '.join(rows)[:160]}")
    ids = rows[column]
    check_unique(f"images: {column} in {place}", ids)
    if not ids:
        raise InputError(f"images: expected at least one row in {place}, got none")
    labels, known = named(rows["label"], classes, place, ids)
    return Images(ids, labels, known, Files([place.parent / one for one in ids]), "csv", alike(known))
