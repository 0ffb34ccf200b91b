"""Refined labels in, the label file that an existing codebase or another tool reads out.

Each codebase fixes the number of rows, the file name and the layout; what does not fit is refused before anything is
written, because none of them would notice: a wrong length is cut, filled or shifted in silence.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from synth_refine._io.atomic import write_atomic
from synth_refine._io.check import Array, InputError, check_array
from synth_refine._io.csv import check_unique, csv_bytes
from synth_refine.labels.artifact import Artifact, WrongIds
from synth_refine.labels.files import as_labels
from synth_refine.labels.refined import Refined, Wanted


class WrongLength(InputError):
    """Another number of labels than the codebase reads."""


class MissingClass(InputError):
    """A class without an image, which the codebase refuses."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: The file.
        count: Number of labels in it.
        note: How the codebase is told to read it, and what else has to follow the labels.
    """

    path: Path
    count: int
    note: str


@dataclass(frozen=True)
class _Rows:
    """What a writer gets: checked labels, (N,), with the rest of what the caller gave."""

    labels: NDArray[np.int64]
    ids: list[str] | None
    path: Path
    artifact: Artifact | None
    clean_label: NDArray[np.int64] | None
    key: str

    def named(self) -> list[str]:
        return list(map(str, range(len(self.labels)))) if self.ids is None else self.ids


@dataclass(frozen=True)
class Format:
    """The rules of one kind of file.

    Attributes:
        write: Labels to the bytes of the file.
        note: How the codebase is told to read it.
        count: The number of labels it reads; None for any.
        name: What the file must be called, a regular expression, since the codebase reads the data set or the noise
            from the name.
        name_text: The same in words.
        every_class: Whether it refuses labels in which a class does not occur.
        needs_ids: Whether the file is a table by path.
    """

    write: Callable[[_Rows], bytes]
    note: str
    count: int | None = None
    name: str = ""
    name_text: str = ""
    every_class: bool = False
    needs_ids: bool = False


def export(
    labels: Refined,
    format: str,
    path: str | os.PathLike[str],
    *,
    ids: Sequence[str] | Sequence[int] | None = None,
    fill: Literal["error", "truncate"] | Array = "error",
    clean_label: Array | None = None,
    key: str = "worse_label",
    dry_run: bool = False,
) -> Exported:
    """Write refined labels as the file that a codebase reads, whole or not at all.

    Args:
        labels: Refined labels, (N,) integers in the order of the data set's files; an artifact; or a result of a
            refiner that knows its given labels.
        format: One of `FORMATS`.
        path: The file to write; PLC, LRA-diffusion, DivideMix and UNICON prescribe its name.
        ids: The id of every label. Formats without a place for ids take positions and sort the labels by them; `kv` and
            `imagefolder` need paths. An artifact brings its own.
        fill: What to do when the codebase reads another number of labels than there are: refuse; `truncate`, to train
            on the first ones; or the labels of all images, (M,), whose rest is appended as it is. Never guessed, since
            zeros or true labels at the end would spoil the comparison.
        clean_label: For `cifar-n`, whose loader compares it with the data set's own labels, (N,). It is written, and
            read by nothing else.
        key: For `cifar-n`, the entry the loader's noise type reads.
        dry_run: Check everything and write nothing.

    Returns:
        The path, the number of labels, and how the codebase is told.

    Raises:
        WrongLength: Another number of labels than the codebase reads, and no `fill`.
        MissingClass: PLC stops when a class has no image.
        WrongIds: Ids that are no positions, or paths that the file cannot hold.
        InputError: An unknown format, a name that the codebase would misread, or labels of the wrong shape or range.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = export(np.array([1, 0]), "jsonl", Path(folder, "labels.jsonl"), ids=["a.png", "b.png"])
        ...     print(done.path.read_text(), end="")
        {"id": "a.png", "label": 1}
        {"id": "b.png", "label": 0}
    """
    if format not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    rules, target = FORMATS[format], Path(path)
    artifact = labels if isinstance(labels, Artifact) else None
    wanted = Wanted.of(labels, ids)
    values, texts = wanted.labels, None if wanted.ids is None else [str(one) for one in wanted.ids]
    if texts is not None:
        if len(texts) != len(values):
            raise WrongIds(f"ids: expected {len(values)}, one per label, got {len(texts)}")
        check_unique("ids", texts)
    if rules.name and not re.fullmatch(rules.name, target.name):
        raise InputError(f"path: expected {rules.name_text}, got {target.name}")
    if rules.needs_ids and texts is None:
        raise WrongIds(f"ids: expected the path of every image, which {format} needs, got None")
    if rules.count is not None:
        values, texts = _counted(_by_position(values, texts), format, rules.count, fill), None
    elif not isinstance(fill, str) or fill != "error":
        raise InputError(f"fill: expected none, since {format} takes any number of labels")
    classes = _classes(target.name) if rules.name.startswith("cifar") else None
    if classes is not None:
        as_labels("labels", values, classes)
        lost = np.setdiff1d(np.arange(classes), values)
        if rules.every_class and lost.size:
            raise MissingClass(
                f"labels: expected every class 0 to {classes - 1}, which {format} asserts, got none of {lost[0]}"
            )
    clean = None if clean_label is None else as_labels("clean_label", clean_label)
    if clean is not None:
        check_array("clean_label", clean, values.shape)
    data = rules.write(_Rows(values, texts, target, artifact, clean, key))
    if not dry_run:
        with write_atomic(target) as file:
            file.write(data)
    return Exported(target, len(values), rules.note.format(name=target.name, stem=target.stem, path=target, key=key))


def _by_position(labels: NDArray[np.int64], ids: list[str] | None) -> NDArray[np.int64]:
    """The labels in the order of their positions."""
    if ids is None:
        return labels
    try:
        positions = np.array(ids, dtype=np.int64)
    except (ValueError, OverflowError):
        positions = np.full(len(ids), -1)
    if not np.array_equal(np.sort(positions), np.arange(len(labels))):
        raise WrongIds(f"ids: expected the positions 0 to {len(labels) - 1}, since the file holds none, got {ids[:2]}")
    return labels[np.argsort(positions)]


def _counted(labels: NDArray[np.int64], format: str, count: int, fill: str | Array) -> NDArray[np.int64]:
    """Exactly as many labels as the codebase reads."""
    if isinstance(fill, str) and fill not in ("error", "truncate"):
        raise InputError(f"fill: expected error, truncate or the labels of all images, got {fill!r}")
    if len(labels) == count:
        return labels
    if isinstance(fill, str):
        if fill == "truncate" and len(labels) > count:
            return labels[:count]
        policy = "fill='truncate'" if len(labels) > count else "fill with the given labels of all images"
        raise WrongLength(f"labels: expected {count}, which {format} reads, got {len(labels)}; if meant so, {policy}")
    rest = as_labels("fill", fill)
    check_array("fill", rest, (count,))
    if len(labels) > count:
        raise WrongLength(f"labels: expected at most {count}, which {format} reads, got {len(labels)}")
    return np.concatenate([labels, rest[len(labels) :]])


def _classes(name: str) -> int:
    return 100 if name.startswith("cifar100-") else 10


def _npy(rows: _Rows) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows.labels, allow_pickle=False)
    return buffer.getvalue()


def _json(rows: _Rows) -> bytes:
    return json.dumps(rows.labels.tolist()).encode()


def _npz(rows: _Rows) -> bytes:
    buffer = io.BytesIO()
    # `index` lists images considered noisy and feeds a list that nothing reads; empty says that none is claimed.
    np.savez(buffer, label=rows.labels, index=np.empty(0, dtype=np.int64))
    return buffer.getvalue()


def _pt(rows: _Rows) -> bytes:
    if rows.clean_label is None:
        raise InputError("clean_label: expected the labels that CIFAR-N's loader compares with the data set, got None")
    if rows.key == "clean_label":
        raise InputError("key: expected the entry of a noise type, such as worse_label, got clean_label")
    content = pickle.dumps({"clean_label": rows.clean_label, rows.key: rows.labels}, protocol=2)
    # NumPy 2 writes a module name that the NumPy of that codebase does not have.
    content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{rows.path.stem}/data.pkl", content)
        archive.writestr(f"{rows.path.stem}/version", b"3\n")
    return buffer.getvalue()


def _kv(rows: _Rows) -> bytes:
    for one in rows.named():
        if one.split() != [one]:
            raise WrongIds(f"ids: expected paths without white space, where the file is split, got {one!r}")
    return _text(f"{one} {label}" for one, label in zip(rows.named(), rows.labels.tolist(), strict=True))


def _jsonl(rows: _Rows) -> bytes:
    pairs = zip(rows.named(), rows.labels.tolist(), strict=True)
    return _text(json.dumps({"id": one, "label": label}, ensure_ascii=True) for one, label in pairs)


def _text(lines: Any) -> bytes:
    try:
        return "".join(f"{line}\n" for line in lines).encode()
    except UnicodeEncodeError as error:
        raise WrongIds(f"ids: expected text that UTF-8 can write, got {error.object[error.start]!r}") from error


def _csv(rows: _Rows) -> bytes:
    return csv_bytes({"id": rows.named(), "label": rows.labels.tolist()})


def _imagefolder(rows: _Rows) -> bytes:
    return csv_bytes({"file_name": rows.named(), "label": rows.labels.tolist()})


def _parquet(rows: _Rows) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("format: parquet needs pyarrow; pip install 'synth-refine[parquet]'") from error
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": rows.named(), "label": rows.labels}), buffer)
    return buffer.getvalue()


def _cleanlab(rows: _Rows) -> bytes:
    artifact = rows.artifact
    if artifact is None:
        raise InputError(
            "labels: expected an artifact, since a table of issues holds the given labels too, got an array"
        )
    changed = artifact.given != artifact.labels
    # The confidence in the new label stands against the given one; a kept label has nothing against it.
    quality = np.where(changed, 1 - np.clip(np.nan_to_num(artifact.confidence, nan=1.0), 0, 1), 1.0)
    return csv_bytes(
        {
            "id": rows.named(),
            "is_label_issue": changed.tolist(),
            "label_quality": quality.tolist(),
            "given_label": artifact.given.tolist(),
            "predicted_label": artifact.labels.tolist(),
        }
    )


_CIFAR = r"cifar(10|100)-.*\.npy"
_CIFAR_TEXT = "cifar10-*.npy or cifar100-*.npy, from which the data set is read"
_BY_RATE = (
    "put it into the data path; it is read for the --r and --noise_mode in its name, and r should be the noise left"
)

FORMATS: Mapping[str, Format] = {
    "plc": Format(
        _npy,
        "put it into noisy_labels/ and start with --noise_label_file {name} --noise_level 0; a level adds noise",
        count=45_000,
        every_class=True,
        name=_CIFAR,
        name_text=_CIFAR_TEXT,
    ),
    "lra": Format(
        _npy,
        "put it into noise_label/ and start with --noise_type {stem}",
        count=45_000,
        name=_CIFAR,
        name_text=_CIFAR_TEXT,
    ),
    "dividemix": Format(
        _json,
        _BY_RATE,
        count=50_000,
        name=r"\d\.\d_\w+\.json",
        name_text="<r with one decimal>_<noise mode>.json, such as 0.2_sym.json",
    ),
    "unicon": Format(
        _npz,
        _BY_RATE,
        count=50_000,
        name=r"clean_\d\.\d{4}_\w+\.npz",
        name_text="clean_<r with four decimals>_<noise mode>.npz, such as clean_0.2000_sym.npz",
    ),
    "cifar-n": Format(
        _pt,
        "start with --noise_path {path} --is_human and the noise type of {key}; else labels are drawn anew",
        count=50_000,
        name=r".+\.pt",
        name_text="a .pt file",
    ),
    "kv": Format(_kv, "replace annotations/noisy_label_kv.txt by it, before the first epoch", needs_ids=True),
    "imagefolder": Format(
        _imagefolder,
        "put it beside the images as metadata.csv, or pass its rows to inject() with an ImageFolder",
        name=r".+\.csv",
        name_text="a .csv file, such as metadata.csv",
        needs_ids=True,
    ),
    "csv": Format(_csv, "columns id and label", name=r".+\.csv", name_text="a .csv file"),
    "jsonl": Format(_jsonl, "one object with id and label per line"),
    "parquet": Format(_parquet, "columns id and label"),
    "cleanlab": Format(
        _cleanlab,
        "read it with pandas and pass it as label_issues to cleanlab's CleanLearning.fit",
        name=r".+\.csv",
        name_text="a .csv file",
    ),
}
"""The kinds of file that `export` writes, each with its rules."""
