"""Checked labels in, the bytes of one kind of file out: the layouts and rules of other codebases and tools."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from synth_refine._io.check import InputError
from synth_refine._io.csv import csv_bytes
from synth_refine._io.error import WrongIds
from synth_refine.labels.artifact import Artifact
from synth_refine.labels.kept import kept_bytes
from synth_refine.labels.labelstudio import LOCAL_FILES, task_bytes


@dataclass(frozen=True)
class Rows:
    """What a writer gets: checked labels, (N,), with the rest of what the caller gave."""

    labels: NDArray[np.int64]
    ids: list[str] | None
    path: Path
    artifact: Artifact | None
    clean_label: NDArray[np.int64] | None
    key: str
    classes: Sequence[str] | None = None
    url_prefix: str = LOCAL_FILES

    def named(self) -> list[str]:
        return list(map(str, range(len(self.labels)))) if self.ids is None else self.ids

    def known(self) -> Artifact:
        """The artifact, where an array does not tell enough."""
        if self.artifact is None:
            raise InputError("labels: expected an artifact, which knows more than the refined labels, got an array")
        return self.artifact

    def class_names(self) -> Sequence[str]:
        """The class names, (C,), or else the numbers of the classes."""
        count = int(self.labels.max(initial=-1)) + 1 if self.artifact is None else self.artifact.num_classes
        return list(map(str, range(count))) if self.classes is None else self.classes


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
        removal: What becomes of removed images: the file is refused, leaves them out, or says which they are.
        rows: Which rows of an artifact it holds.
    """

    write: Callable[[Rows], bytes]
    note: str
    count: int | None = None
    name: str = ""
    name_text: str = ""
    every_class: bool = False
    needs_ids: bool = False
    removal: Literal["refuse", "leave out", "say so"] = "refuse"
    rows: Literal["all", "kept", "waiting"] = "all"


def _npy(rows: Rows) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows.labels, allow_pickle=False)
    return buffer.getvalue()


def _json(rows: Rows) -> bytes:
    return json.dumps(rows.labels.tolist()).encode()


def _ssr(rows: Rows) -> bytes:
    return json.dumps({"noise_labels": rows.labels.tolist(), "open_noise": [], "closed_noise": []}).encode()


def _npz(rows: Rows) -> bytes:
    buffer = io.BytesIO()
    # `index` lists images considered noisy and feeds a list that nothing reads; empty says that none is claimed.
    np.savez(buffer, label=rows.labels, index=np.empty(0, dtype=np.int64))
    return buffer.getvalue()


def _tensor(rows: Rows) -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(rows.labels), buffer)
    return buffer.getvalue()


def _pt(rows: Rows) -> bytes:
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


def _kv(rows: Rows) -> bytes:
    for one in rows.named():
        if one.split() != [one]:
            raise WrongIds(f"ids: expected paths without white space, where the file is split, got {one!r}")
    return _text(f"{one} {label}" for one, label in zip(rows.named(), rows.labels.tolist(), strict=True))


def _jsonl(rows: Rows) -> bytes:
    columns = _columns(rows)
    lines = zip(*columns.values(), strict=True)
    return _text(json.dumps(dict(zip(columns, one, strict=True)), ensure_ascii=True) for one in lines)


def _text(lines: Any) -> bytes:
    try:
        return "".join(f"{line}\n" for line in lines).encode()
    except UnicodeEncodeError as error:
        raise WrongIds(f"ids: expected text that UTF-8 can write, got {error.object[error.start]!r}") from error


def _columns(rows: Rows) -> dict[str, list[Any]]:
    """Ids, labels and, where they are known, class names, so that whoever numbers classes otherwise can tell."""
    columns: dict[str, list[Any]] = {"id": rows.named(), "label": rows.labels.tolist()}
    return columns if rows.classes is None else {**columns, "class": [rows.classes[one] for one in columns["label"]]}


def _csv(rows: Rows) -> bytes:
    return csv_bytes(_columns(rows))


def _imagefolder(rows: Rows) -> bytes:
    return csv_bytes({"file_name": rows.named(), "label": rows.labels.tolist()}, guarded=False)  # opened as they are


def _parquet(rows: Rows) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("format: parquet needs pyarrow; pip install 'synth-refine[parquet]'") from error
    buffer = io.BytesIO()
    table = _columns(rows)
    if rows.artifact is not None:  # all that it knows; `label` and `class` are the refined ones
        more = rows.artifact.columns()
        left = slice(None) if len(rows.labels) == len(more["id"]) else rows.artifact.kept
        table |= {
            name: np.array(values, dtype=object)[left].tolist()
            for name, values in more.items()
            if name not in ("id", "refined", "refined_class")
        }
    pyarrow.parquet.write_table(pyarrow.table(table), buffer)
    return buffer.getvalue()


def _kept(rows: Rows) -> bytes:
    return kept_bytes(rows.known().kept)


def _labelstudio(rows: Rows) -> bytes:
    return task_bytes(rows.known(), rows.named(), rows.class_names(), rows.url_prefix)


def _cleanlab(rows: Rows) -> bytes:
    """CleanLearning's table, in numbers of classes."""
    issue, quality = _issues(rows.known())
    labels = {"given_label": rows.known().given.tolist(), "predicted_label": rows.known().labels.tolist()}
    return csv_bytes({"id": rows.named(), "is_label_issue": issue, "label_quality": quality, **labels})


def _datalab(rows: Rows) -> bytes:
    """What Datalab's get_issues("label") returns, in names of classes."""
    issue, score = _issues(rows.known())
    names = rows.class_names()
    labels = {"given_label": rows.known().given, "predicted_label": rows.known().labels}
    named = {column: [names[label] for label in values] for column, values in labels.items()}
    return csv_bytes({"id": rows.named(), "is_label_issue": issue, "label_score": score, **named})


def _issues(artifact: Artifact) -> tuple[list[bool], list[float]]:
    """Whether each given label is wrong, and how likely it is right, (N,)."""
    changed = artifact.given != artifact.labels
    # What is known stands against the given label where another one is proposed, and for it where it is kept; of a kept
    # label the files of an artifact hold nothing, and its cell is empty. A removed image has no right label.
    doubted, known = artifact.action != "keep", np.clip(artifact.confidence, 0, 1)
    removed = artifact.action == "remove"
    quality = np.where(removed, 0.0, np.where(doubted, 1 - known, known))
    return (changed | removed).tolist(), quality.tolist()


def _fiftyone(rows: Rows) -> bytes:
    """FiftyOne's CSVDataset: a column per field of a sample."""
    table, names = rows.known().columns(), rows.class_names()
    fields = {name: table[name] for name in ("action", "confidence", "margin", "reason", "no_class")}
    labels = {name: [names[label] for label in table[name]] for name in ("given", "refined")}
    return csv_bytes({"filepath": rows.named(), **labels, **fields}, guarded=False)  # opened as they are


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
        "start with --noise_path {path} --is_human and the noise type of {key}; else labels are sampled anew",
        count=50_000,
        name=r".+\.pt",
        name_text="a .pt file",
    ),
    "ssr": Format(
        _ssr,
        "start with --noise_file {path}; it is read where it exists",
        count=50_000,
        name=r".+\.json",
        name_text="a .json file",
    ),
    "npy": Format(_npy, "an array of int64", name=r".+\.npy", name_text="a .npy file"),
    "json": Format(_json, "a list of whole numbers", name=r".+\.json", name_text="a .json file"),
    "pt": Format(_tensor, "an int64 tensor for torch.load", name=r".+\.pt", name_text="a .pt file"),
    "kv": Format(_kv, "put it where the loader opens noisy_label_kv.txt, before the first epoch", needs_ids=True),
    "imagefolder": Format(
        _imagefolder,
        "put it beside the images as metadata.csv, or pass its rows to inject() with an ImageFolder",
        name=r".+\.csv",
        name_text="a .csv file, such as metadata.csv",
        needs_ids=True,
        removal="leave out",
    ),
    "csv": Format(_csv, "columns id and label", name=r".+\.csv", name_text="a .csv file", removal="leave out"),
    "jsonl": Format(_jsonl, "one object with id and label per line", removal="leave out"),
    "parquet": Format(
        _parquet,
        "columns id and label; of an artifact also given, action, confidence, margin, reason and no_class",
        removal="leave out",
    ),
    "kept": Format(
        _kept,
        "the rows to train on: torch.utils.data.Subset(dataset, numpy.load('{name}'))",
        name=r".+\.npy",
        name_text="a .npy file",
        removal="say so",
        rows="kept",
    ),
    "cleanlab": Format(
        _cleanlab,
        "read it with pandas and pass it as label_issues to cleanlab's CleanLearning.fit",
        name=r".+\.csv",
        name_text="a .csv file",
        removal="say so",
    ),
    "datalab": Format(
        _datalab,
        "a table as that of cleanlab's Datalab.get_issues('label'), with names of classes",
        name=r".+\.csv",
        name_text="a .csv file",
        removal="say so",
    ),
    "fiftyone": Format(
        _fiftyone,
        "import it with fiftyone.types.CSVDataset, the folder of the images as data_path and this file as labels_path",
        name=r".+\.csv",
        name_text="a .csv file",
        needs_ids=True,
        removal="say so",
    ),
    "labelstudio": Format(
        _labelstudio,
        "import {name} into a project with the labeling interface {interface}, export that as JSON, and pass it to "
        "`synth-refine review --format labelstudio`",
        name=r".+\.json",
        name_text="a .json file",
        needs_ids=True,
        removal="say so",
        rows="waiting",
    ),
}
"""The kinds of file that `export` writes, each with its rules."""
