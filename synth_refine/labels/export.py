"""Refined labels in, the label file that an existing codebase or another tool reads out.

Each codebase fixes the number of rows, the file name and the layout; what does not fit is refused before anything is
written, because none of them would notice: a wrong length is cut, filled or shifted in silence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from synth_refine._io.atomic import write_atomic
from synth_refine._io.check import Array, InputError, check_array
from synth_refine._io.csv import check_unique
from synth_refine._io.error import WrongIds
from synth_refine.labels.artifact import Artifact
from synth_refine.labels.files import as_labels
from synth_refine.labels.formats import FORMATS as FORMATS
from synth_refine.labels.formats import Rows
from synth_refine.labels.labelstudio import LOCAL_FILES, interface
from synth_refine.labels.refined import Refined, Wanted, check_related


class WrongLength(InputError):
    """Another number of labels than the codebase reads."""


class MissingClass(InputError):
    """A class without an image, which the codebase refuses."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: The file.
        count: Number of rows in it.
        note: How the codebase is told to read it, and what else has to follow the labels.
        backup: Where the file is now that stood there before; None where there was none.
    """

    path: Path
    count: int
    note: str
    backup: Path | None = None


def export(
    labels: Refined,
    format: str,
    path: str | os.PathLike[str],
    *,
    ids: Sequence[str] | Sequence[int] | None = None,
    fill: Literal["error", "truncate"] | Array = "error",
    clean_label: Array | None = None,
    key: str = "worse_label",
    overwrite: bool = False,
    force: bool = False,
    keep_removed: bool = False,
    url_prefix: str = LOCAL_FILES,
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
        overwrite: Take the place of another file, which is kept beside it with the ending .bak.
        force: Take labels that agree with `fill` or `clean_label` no more often than by chance.
        keep_removed: Write labels of removed images too: a file with a place for every image cannot leave them out,
            and is refused otherwise. The format `kept` lists the rows to train on.
        url_prefix: For `labelstudio`, what comes before the path of an image in its address: that of a web server, a
            bucket, or of Label Studio's local files with the name of the folder below its document root.
        dry_run: Check everything and write nothing.

    Returns:
        The path, the number of labels, and how the codebase is told.

    Raises:
        WrongLength: Another number of labels than the codebase reads, and no `fill`.
        MissingClass: PLC stops when a class has no image.
        WrongIds: Ids that are no positions, or paths that the file cannot hold.
        WrongOrder: The labels are not of the same images as `fill` or `clean_label`.
        InputError: Another file is there, removed images that the format cannot leave out, an unknown format, a name
            that the codebase would misread, or labels of the wrong shape or range.

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
    if wanted.removed is not None and rules.removal == "refuse" and not keep_removed:
        able = ", ".join(name for name, one in FORMATS.items() if one.removal == "leave out")
        raise InputError(
            f"format: expected one that can leave out the {wanted.removed.sum()} removed images ({able}), got "
            f"{format}; or write their labels too with keep_removed, and the rows to train on with the format kept"
        )
    if texts is not None:
        if len(texts) != len(values):
            raise WrongIds(f"ids: expected {len(values)}, one per label, got {len(texts)}")
        check_unique("ids", texts)
    if rules.name and not re.fullmatch(rules.name, target.name):
        raise InputError(f"path: expected {rules.name_text}, got {target.name}")
    if rules.needs_ids and texts is None:
        raise WrongIds(f"ids: expected the path of every image, which {format} needs, got None")
    clean = None if clean_label is None else as_labels("clean_label", clean_label)
    if rules.count is not None:
        _check_from_0(values)
        values, texts = _by_position(values, texts), None
        for name, others in (("fill", fill), ("clean_label", clean)):
            if not (others is None or isinstance(others, str) or force):
                same = min(len(values), len(others))
                others = as_labels(name, others)[:same]
                check_related("labels", values[:same], others, f"they differ from {name}; if meant so, pass force=True")
        values = _counted(values, format, rules.count, fill)
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
    if clean is not None:
        check_array("clean_label", clean, values.shape)
    if wanted.removed is not None and rules.removal == "leave out" and not keep_removed:
        left = np.flatnonzero(~wanted.removed)
        values, texts = values[left], [str(row) if texts is None else texts[row] for row in left.tolist()]
    made = Rows(values, texts, target, artifact, clean, key, wanted.classes, url_prefix)
    data = rules.write(made)
    shown = interface(made.class_names()) if "{interface}" in rules.note else ""
    note = rules.note.format(name=target.name, stem=target.stem, path=target, key=key, interface=shown)
    count = len(values) if artifact is None or rules.rows == "all" else len(getattr(artifact, rules.rows))
    backup = None
    if os.path.lexists(target) and not (target.is_file() and target.read_bytes() == data):
        if target.is_dir():
            raise InputError(f"path: expected a file to write, got a folder: {target}")
        if not overwrite or not target.is_file():
            raise InputError(f"path: expected a new file, but {target} holds something else; overwrite keeps a backup")
        backup = _kept(target) if not dry_run else None
    if not dry_run:
        with write_atomic(target) as file:
            file.write(data)
    return Exported(target, count, note, backup)


def _kept(target: Path) -> Path:
    """Another name for a file that is going to be replaced, one that nothing has."""
    for number in range(1, 1000):
        backup = target.with_name(f"{target.name}.bak" if number == 1 else f"{target.name}.bak{number}")
        with suppress(FileExistsError):
            os.link(target, backup, follow_symlinks=False)
            return backup
    raise InputError(f"path: expected fewer than 1000 backups of {target}")


def _check_from_0(labels: NDArray[np.int64]) -> None:
    """Refuse the classes 1 to 10 or 1 to 100 of a data set that has 0 to 9 or 0 to 99."""
    if labels.size and labels.min() == 1 and labels.max() in (10, 100):
        raise InputError(f"labels: expected classes from 0, got 1 to {labels.max()}: are they counted from 1?")


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
