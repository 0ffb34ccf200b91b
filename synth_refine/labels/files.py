"""Label files: .npy, .csv and CIFAR-N's .pt in, (N,) int64 out, and back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from synth_refine._io.atomic import write_atomic
from synth_refine._io.check import Array, InputError, check_array, check_labels
from synth_refine._io.csv import check_unique, csv_bytes, read_csv
from synth_refine._io.untrusted import read_npy, read_pt

MAX_CLASS = 2**31 - 1
"""No class index is larger; labels of the wrong byte order are."""


def read_labels(path: str | os.PathLike[str], *, key: str | None = None) -> NDArray[np.int64]:
    """Read the labels of a file, in the order of its rows.

    Args:
        path: A .npy file of integers; a .csv file with the column `label` and, if there is one, `id`; or one of
            CIFAR-N's .pt files.
        key: Which entry of a .pt file, for example `worse_label`.

    Returns:
        Labels, (N,) int64, each in [0, 2**31).

    Raises:
        InputError: The file is something else (the message says what), is damaged, or holds no (N,) integer labels.
            Nothing is ever unpickled.
    """
    return read_labels_and_ids(path, key=key)[0]


def read_labels_and_ids(
    path: str | os.PathLike[str], *, key: str | None = None
) -> tuple[NDArray[np.int64], list[str] | None]:
    """Read labels and, from a .csv file with the column `id`, the id of every row; see `read_labels`."""
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        rows = read_csv("labels", path)
        if "label" not in rows:
            raise InputError(f"labels: expected the column label in {path}, got {', '.join(rows)}")
        ids = rows.get("id")
        if ids is not None:
            check_unique(f"labels: id in {path}", ids)
        return _parse_labels(path, rows["label"]), ids
    if suffix == ".npy":
        values: NDArray[Any] = np.asarray(read_npy("labels", path, "iu"))
    elif suffix == ".pt":
        entries = read_pt("labels", path)
        if key not in entries:
            raise InputError(f"labels: {path} has the entries {', '.join(entries)}; name one of them, got {key}")
        values = entries[key]
    else:
        raise InputError(f"labels: expected a .npy, .csv or .pt file, got {path}")
    check_labels("labels", values)
    if values.size and not (int(values.min()) >= 0 and int(values.max()) <= MAX_CLASS):
        raise InputError(f"labels: expected class indices from 0 on in {path}, got {values.min()} to {values.max()}")
    return values.astype(np.int64), None


def write_labels(
    path: str | os.PathLike[str],
    labels: Array,
    ids: Sequence[str] | Sequence[int] | None = None,
    *,
    dtype: DTypeLike = np.int64,
) -> None:
    """Write labels whole or not at all; what is written is read back equal by `read_labels`.

    Args:
        path: A .npy file or a .csv file with the columns `id` and `label`.
        labels: Labels, (N,) integers in [0, 2**31).
        ids: One id per label, unique, for .csv only; the row numbers by default.
        dtype: The integer type in a .npy file; almost every codebase expects the default.

    Raises:
        InputError: Another kind of file, labels of the wrong shape, type or range, or ids that do not fit.
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
        with write_atomic(path) as file:
            np.save(file, values.astype(dtype), allow_pickle=False)
    elif suffix == ".csv":
        names = [str(one) for one in (range(len(values)) if ids is None else ids)]
        if len(names) != len(values):
            raise InputError(f"ids: expected {len(values)}, one per label, got {len(names)}")
        check_unique("ids", names)
        data = csv_bytes({"id": names, "label": values.tolist()})
        with write_atomic(path) as file:
            file.write(data)
    else:
        raise InputError(f"path: expected a .npy or .csv file, got {path}")


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


def _parse_labels(path: str | os.PathLike[str], cells: list[str]) -> NDArray[np.int64]:
    for number, cell in enumerate(cells, 2):
        # Ten digits are enough for every class; int() would also take "1_0", " 1" and digits of other scripts.
        if not (cell.isascii() and cell.isdigit() and len(cell) <= 10 and int(cell) <= MAX_CLASS):
            raise InputError(f"labels: expected a class index from 0 on in row {number} of {path}, got {cell[:40]!r}")
    return np.array(list(map(int, cells)), dtype=np.int64)
