"""Label files in, (N,) int64 out with ids and class names where they have some, and back."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from synth_refine._io.atomic import write_atomic
from synth_refine._io.check import Array, InputError, check_array, check_labels
from synth_refine._io.csv import check_unique, csv_bytes, read_csv
from synth_refine._io.order import natural_key
from synth_refine._io.untrusted import open_plain, read_npy, read_pt, what_is
from synth_refine.labels.cells import with_column

UNLABELLED = {"", "-1", "?", "nan", "none", "null", "n/a", "na"}
"""What tables write for images without a label, in lower case."""

MAX_CLASS = 2**31 - 1
"""No class index is larger; labels of the wrong byte order are."""

MOST_BYTES = 1 << 30
"""No array in an .npz file is larger."""


@dataclass(frozen=True)
class LabelFile:
    """What a label file holds.

    Attributes:
        labels: The labels, (N,) int64, each in [0, 2**31).
        ids: The id of every row, (N,) texts; None where the file has none.
        classes: The class names, (C,), in the order of the labels' numbers; None where the file has none.
        named: Whether its column `label` holds these names.
    """

    labels: NDArray[np.int64]
    ids: list[str] | None = None
    classes: list[str] | None = None
    named: bool = False


def read_labels(path: str | os.PathLike[str], *, key: str | None = None) -> NDArray[np.int64]:
    """The labels of a file that numbers its classes, (N,) int64, in the order of its rows; see `read_label_file`."""
    return read_label_file(path, key=key, names=False).labels


def read_labels_and_ids(
    path: str | os.PathLike[str], *, key: str | None = None
) -> tuple[NDArray[np.int64], list[str] | None]:
    """Labels and, from a .csv file with the column `id`, the id of every row; see `read_labels`."""
    found = read_label_file(path, key=key, names=False)
    return found.labels, found.ids


def read_label_file(path: str | os.PathLike[str], *, key: str | None = None, names: bool = True) -> LabelFile:
    """Read the labels of a file, in the order of its rows, and what it says of them.

    Args:
        path: A .npy file of integers; a .csv file with the column `label` and, if there are such, `id` and `class`; a
            .json list, such as DivideMix's, or a .json object with a list in it, such as SSR's; an .npz file such as
            UNICON's; or one of CIFAR-N's .pt files.
        key: Which entry of a .pt, .npz or .json file, for example `worse_label`.
        names: Take class names in the column `label` of a .csv file, too; they are numbered in natural order.

    Raises:
        InputError: The file is something else (the message says what), is damaged, or holds no (N,) integer labels.
            Nothing is ever unpickled.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        return _from_csv(path, names)
    if suffix == ".npy":
        values: NDArray[Any] = np.asarray(read_npy("labels", path, "iu"))
    elif suffix in (".pt", ".npz", ".json"):
        reader: Callable[[Any], dict[str, NDArray[Any]]] = {".npz": _from_npz, ".json": _from_json}.get(
            suffix, _from_pt
        )
        found = reader(path)
        if key is None and len(found) == 1 and suffix != ".pt":
            key = next(iter(found))
        if key is None or key not in found:
            raise InputError(f"labels: {path} has the entries {', '.join(found)}; name one of them, got {key}")
        values = found[key]
    else:
        raise InputError(f"labels: expected a .npy, .csv, .json, .npz or .pt file, got {path}")
    check_labels("labels", values)
    if values.size and not (int(values.min()) >= 0 and int(values.max()) <= MAX_CLASS):
        raise InputError(f"labels: expected class indices from 0 on in {path}, got {values.min()} to {values.max()}")
    return LabelFile(values.astype(np.int64))


def _from_csv(path: str | os.PathLike[str], names: bool) -> LabelFile:
    rows = read_csv("labels", path)
    if "label" not in rows:
        raise InputError(f"labels: expected the column label in {path}, got {', '.join(rows)}")
    ids = rows.get("id")
    if ids is not None:
        check_unique(f"labels: id in {path}", ids)
    for number, cell in enumerate(rows["label"], 2):
        if cell.strip().lower() in UNLABELLED:
            raise InputError(f"labels: expected a label in row {number} of {path}, got {cell!r}: leave such images out")
    if names and not all(map(_is_index, rows["label"])):
        classes = sorted(set(rows["label"]), key=natural_key)
        number_of = {name: number for number, name in enumerate(classes)}
        return LabelFile(np.array([number_of[cell] for cell in rows["label"]], dtype=np.int64), ids, classes, True)
    labels = _parse_labels(path, rows["label"])
    if not rows.get("class"):
        return LabelFile(labels, ids)
    name_of = dict(zip(labels.tolist(), rows["class"], strict=True))
    pairs = set(zip(labels.tolist(), rows["class"], strict=True))
    if not len(pairs) == len(name_of) == len(set(name_of.values())):
        raise InputError(f"labels: expected one class name per label in {path}, and one label per class name")
    if name_of.keys() != set(range(len(name_of))):
        return LabelFile(labels, ids)  # a class has no image, so that its name is not known
    return LabelFile(labels, ids, [name_of[number] for number in range(len(name_of))])


def _from_pt(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    return {**read_pt("labels", path)}


def _from_json(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    with open_plain("labels", path) as file:
        data = file.read()
    if kind := what_is(data[:512]):
        raise InputError(f"labels: expected a .json file, but {path} is {kind}")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"labels: {path} is no JSON: {' '.join(str(error).split())[:100]}") from error
    entries = content if isinstance(content, dict) else {"labels": content}
    lists = {str(name): one for name, one in entries.items() if isinstance(one, list) and set(map(type, one)) == {int}}
    if not lists or any(abs(number) > 2**62 for one in lists.values() for number in one):
        raise InputError(f"labels: expected a list of class indices in {path}, got {type(content).__name__}")
    return {name: np.array(one, dtype=np.int64) for name, one in lists.items()}


def _from_npz(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    try:
        with open_plain("labels", path) as file, zipfile.ZipFile(file) as archive, TemporaryDirectory() as folder:
            for member in archive.infolist():
                if member.file_size > MOST_BYTES or not member.filename.endswith(".npy") or "/" in member.filename:
                    raise InputError(f"labels: expected arrays of labels in {path}, got {member.filename[:80]!r}")
                place = Path(folder, "array.npy")
                place.write_bytes(archive.read(member))
                array = np.array(read_npy(f"labels: {member.filename} of {path}", place, "iu"))
                if array.ndim == 1 and array.size:
                    found[member.filename.removesuffix(".npy")] = array
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise InputError(f"labels: {path} is no .npz file that can be read: {error}") from error
    return found


def write_labels(
    path: str | os.PathLike[str],
    labels: Array,
    ids: Sequence[str] | Sequence[int] | None = None,
    *,
    classes: Sequence[str] | None = None,
    dtype: DTypeLike = np.int64,
) -> None:
    """Write labels whole or not at all; what is written is read back equal by `read_labels`.

    Args:
        path: A .npy file or a .csv file with the columns `id` and `label`, and `class` where names are given.
        labels: Labels, (N,) integers in [0, 2**31).
        ids: One id per label, unique, for .csv only; the row numbers by default.
        classes: Class names, (C,), for .csv only, so that whoever numbers classes otherwise can tell.
        dtype: The integer type in a .npy file; almost every codebase expects the default.

    Raises:
        InputError: Another kind of file, labels of the wrong shape, type or range, or ids that do not fit.
    """
    data = label_bytes(path, labels, ids, classes=classes, dtype=dtype)
    with write_atomic(path) as file:
        file.write(data)


def label_bytes(
    path: str | os.PathLike[str],
    labels: Array,
    ids: Sequence[str] | Sequence[int] | None = None,
    *,
    classes: Sequence[str] | None = None,
    dtype: DTypeLike = np.int64,
    like: str | os.PathLike[str] | None = None,
) -> bytes:
    """What `write_labels` writes.

    Args:
        path: As there, and the other arguments likewise.
        labels: As there.
        ids: As there.
        classes: As there.
        dtype: As there.
        like: A .csv file of the user with the same rows: every byte of it but the changed labels stays as it is.

    Raises:
        InputError: As there.
    """
    values = as_labels("labels", labels)
    suffix = Path(path).suffix.lower()
    if suffix == ".npy":
        if ids is not None:
            raise InputError("ids: a .npy file has no place for them, expected None; write a .csv file")
        if len(values) and int(values.max()) > np.iinfo(dtype).max:
            raise InputError(
                f"labels: expected at most {np.iinfo(dtype).max} for {np.dtype(dtype)}, got {values.max()}"
            )
        buffer = io.BytesIO()
        np.save(buffer, values.astype(dtype), allow_pickle=False)
        return buffer.getvalue()
    if suffix != ".csv":
        raise InputError(f"path: expected a .npy or .csv file, got {path}")
    if like is not None and Path(like).suffix.lower() == ".csv":
        found = read_label_file(like)
        known = classes or found.classes
        texts = None if known is None else [known[label] for label in as_labels("labels", values, len(known)).tolist()]
        numbers = [str(label) for label in values.tolist()]
        data = with_column(Path(like).read_bytes(), "label", texts if found.named and texts else numbers)
        return data if found.named or found.classes is None or texts is None else with_column(data, "class", texts)
    names = [str(one) for one in (range(len(values)) if ids is None else ids)]
    if len(names) != len(values):
        raise InputError(f"ids: expected {len(values)}, one per label, got {len(names)}")
    check_unique("ids", names)
    columns: dict[str, list[Any]] = {"id": names, "label": values.tolist()}
    if classes is not None:
        as_labels("labels", values, len(classes))
        columns["class"] = [classes[label] for label in values.tolist()]
    return csv_bytes(columns)


def noise_rate(labels: Array, true_labels: Array) -> float:
    """The share of labels that are wrong. For measuring only: true labels never reach a refiner or a training loop.

    Example:
        >>> noise_rate(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]))
        0.25
    """
    values, truth = _pair("labels", labels, true_labels)
    if not values.size:
        raise InputError("labels: expected at least one label, got none")
    return float((values != truth).mean())


def transition_matrix(given: Array, true_labels: Array, num_classes: int) -> NDArray[np.float64]:
    """How often each true class bears each label: row t, column g is the share of class t's images with label g.

    Args:
        given: Given labels, (N,) integers in [0, C).
        true_labels: True labels, (N,) integers in [0, C). For measuring only.
        num_classes: C.

    Returns:
        (C, C) float64; every row sums to one, and the row of a class without an image is zero.

    Example:
        >>> transition_matrix(np.array([0, 1, 1]), np.array([0, 0, 1]), 2)
        array([[0.5, 0.5],
               [0. , 1. ]])
    """
    values, truth = _pair("given", given, true_labels, num_classes)
    counts = np.bincount(truth * num_classes + values, minlength=num_classes**2).reshape(num_classes, num_classes)
    totals: NDArray[np.int64] = counts.sum(axis=1, keepdims=True)
    return counts / np.maximum(totals, 1)


def as_labels(name: str, labels: object, num_classes: int | None = None) -> NDArray[np.int64]:
    """A copy of labels as (N,) int64 NumPy, after checking type, shape and range."""
    check_labels(name, labels, MAX_CLASS + 1 if num_classes is None else num_classes)  # type: ignore[arg-type]
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy()
    return np.array(labels, dtype=np.int64)


def labels_hash(labels: NDArray[np.integer[Any]]) -> str:
    """The SHA-256, in hex, of labels as little-endian int64: the same for every type and file they came in."""
    return hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()


def _pair(
    name: str, labels: Array, true_labels: Array, num_classes: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    values = as_labels(name, labels, num_classes)
    truth = as_labels("true_labels", true_labels, num_classes)
    check_array("true_labels", truth, values.shape)
    return values, truth


def _is_index(cell: str) -> bool:
    # Ten digits are enough for every class; int() would also take "1_0", " 1", digits of other scripts, and 007 as 7.
    return cell.isascii() and cell.isdigit() and len(cell) <= 10 and int(cell) <= MAX_CLASS and cell == str(int(cell))


def _parse_labels(path: str | os.PathLike[str], cells: list[str]) -> NDArray[np.int64]:
    for number, cell in enumerate(cells, 2):
        if not _is_index(cell):
            raise InputError(f"labels: expected a class index from 0 on in row {number} of {path}, got {cell[:40]!r}")
    return np.array(list(map(int, cells)), dtype=np.int64)
