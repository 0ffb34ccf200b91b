"""Given and refined labels in, a folder out that says what was changed, why and from what, and can undo it.

    labels.npy   the refined labels, (N,) int64
    changes.csv  one row per image that is not kept as it is: id, old, new, action, confidence, margin, reason and,
                 where they are known, no_class and the class names old_class and new_class
    ids.csv      the id of every row, where the given labels came with ids
    run.json     hashes of the inputs and of the files above, settings, seed, versions

The new files are laid beside the old ones under names that hold their hash, then run.json is written, which is the one
moment that counts, then the files take their plain names. A reader takes the files whose hashes run.json holds, under
whichever of the two names they stand. An artifact is never replaced by another one: without it, what it was applied to
could not be reverted.

An image that seems to show none of the classes is proposed for removal: its action is `abstain` with the reason
`NO_CLASS`, so that nothing happens to it unless a person decides so. The decision `remove` makes the action `remove`. A
removed image keeps its given label in labels.npy and in what `apply` returns, which have a label for every image;
`Artifact.kept` lists the rows to train on. An artifact that removes something is of format 2, which a version that does
not know removals refuses; all others are of format 1, as ever.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from synth_refine._io.atomic import locked, make_folder
from synth_refine._io.check import Array, InputError, LabelsT, check_array, labels_like
from synth_refine._io.csv import check_unique, csv_bytes, read_csv
from synth_refine._io.error import WrongBase as WrongBase
from synth_refine._io.error import WrongIds as WrongIds
from synth_refine._io.untrusted import read_npy
from synth_refine.labels.files import as_labels, labels_hash
from synth_refine.labels.run import NAMES, check_free, find_file, read_run, run_of, write_files
from synth_refine.labels.run import Damaged as Damaged

if TYPE_CHECKING:
    import pandas

NO_CLASS = "no class: the image seems to show none of the classes"
"""The reason of a proposal to remove an image."""


@dataclass(frozen=True)
class Artifact:
    """What a refinement did to given labels.

    Attributes:
        given: The labels as given, (N,), in the integer type they came in.
        labels: The refined labels, (N,) int64.
        ids: The id of every row; None where the row number is the id.
        action: What was decided for every row, (N,) texts: keep, change, abstain or remove.
        confidence: The score of the decision, (N,); NaN where none is known. Kept rows lose it on disk.
        margin: By how much the best class beats the second, (N,); NaN where it is not known. Kept rows lose it on disk.
        reason: Why a row was changed, abstained from or removed, (N,) texts; empty for kept rows.
        no_class: How likely the image shows none of the classes, (N,); NaN where not known. Kept rows lose it on disk.
        run: Hashes of the inputs, settings, seed and versions, as run.json holds them.
    """

    given: NDArray[np.integer[Any]]
    labels: NDArray[np.int64]
    ids: list[str] | None
    action: NDArray[np.object_]
    confidence: NDArray[np.float64]
    margin: NDArray[np.float64]
    reason: NDArray[np.object_]
    no_class: NDArray[np.float64]
    run: dict[str, Any] = field(repr=False)

    @property
    def changed(self) -> NDArray[np.int64]:
        """The rows whose label was changed."""
        return np.flatnonzero(self.given != self.labels)

    @property
    def abstained(self) -> NDArray[np.int64]:
        """The rows that keep their label until a person has looked at them."""
        return np.flatnonzero(self.action == "abstain")

    @property
    def removed(self) -> NDArray[np.int64]:
        """The rows that a person decided to leave out."""
        return np.flatnonzero(self.action == "remove")

    @property
    def kept(self) -> NDArray[np.int64]:
        """The rows to train on: all but the removed ones."""
        return np.flatnonzero(self.action != "remove")

    @property
    def proposed_removals(self) -> NDArray[np.int64]:
        """The rows that seem to show none of the classes and wait for a person's decision."""
        return np.flatnonzero((self.action == "abstain") & (self.reason == NO_CLASS))

    @property
    def waiting(self) -> NDArray[np.int64]:
        """The rows that a person may decide on: changes, abstentions and proposed removals."""
        return np.flatnonzero((self.action == "change") | (self.action == "abstain"))

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return int(self.run["num_classes"])

    @property
    def names(self) -> Sequence[str]:
        """The id of every row: its own, or else its number."""
        return list(map(str, range(len(self.labels)))) if self.ids is None else self.ids

    @property
    def classes(self) -> list[str] | None:
        """The class names, (C,), where the settings hold them."""
        classes = self.run.get("settings", {}).get("classes")
        return list(map(str, classes)) if isinstance(classes, list) and len(classes) == self.num_classes else None

    @property
    def hash(self) -> str:
        """The SHA-256, in hex, of all that run.json says besides the hashes of files: tells artifacts apart."""
        return hashlib.sha256(json.dumps(self.run, sort_keys=True).encode()).hexdigest()

    def apply(self, given: LabelsT, ids: Sequence[str] | None = None) -> LabelsT:
        """The refined labels, in the order, kind (NumPy or torch), type and device of `given`, which stays as it is.

        There is one for every image; removed images keep their given label, see `kept`.

        Args:
            given: The labels that were refined, (N,) integers; with `ids` in any order.
            ids: The id of every label.

        Raises:
            WrongBase: `given` are other labels than the refined ones.
            WrongIds: Other ids than the artifact's.
            InputError: `given` are no labels, or of a type that cannot hold the refined ones.

        Example:
            >>> artifact = record(np.array([0, 1, 1]), np.array([0, 1, 0]))
            >>> artifact.apply(np.array([0, 1, 1]))
            array([0, 1, 0])
        """
        return self._swap("given", given, ids, self.given, self.labels)

    def revert(self, labels: LabelsT, ids: Sequence[str] | None = None) -> LabelsT:
        """The given labels for the refined ones; the inverse of `apply`, with the same contract."""
        return self._swap("labels", labels, ids, self.labels, self.given)

    def _swap(
        self,
        name: str,
        labels: LabelsT,
        ids: Sequence[str] | None,
        before: NDArray[np.integer[Any]],
        after: NDArray[np.integer[Any]],
    ) -> LabelsT:
        values = as_labels(name, labels)
        if len(values) != len(before):
            raise WrongBase(f"{name}: expected the {len(before)} labels that this artifact is about, got {len(values)}")
        order = slice(None) if ids is None else self.rows_of(ids)
        differ = np.flatnonzero(values != before[order])
        if differ.size:
            raise WrongBase(
                f"{name}: expected the labels with hash {labels_hash(before)[:12]} that this artifact is about, "
                f"got others: {differ.size} of {len(values)} differ, the first in row {differ[0]}"
            )
        return labels_like(name, labels, after[order])

    def rows_of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """The row of every id; the ids must be the artifact's, in any order."""
        check_unique("ids", ids)
        rows = {one: row for row, one in enumerate(self.names)}
        if len(ids) != len(rows):
            raise WrongIds(f"ids: expected the artifact's {len(rows)}, got {len(ids)}")
        unknown = [one for one in ids if one not in rows]
        if unknown:
            raise WrongIds(f"ids: expected ids of the artifact, got {len(unknown)} others, the first is {unknown[0]!r}")
        return np.array([rows[one] for one in ids], dtype=np.int64)

    def table(self) -> dict[str, list[Any]]:
        """The columns of changes.csv: the rows that are not kept as they were."""
        table = self._columns(np.flatnonzero(self.action != "keep"), "old", "new")
        if not np.isfinite(self.no_class).any():
            table.pop("no_class")
        return table

    def columns(self) -> dict[str, list[Any]]:
        """All that is known of every image: id, given, refined, action, confidence, margin, reason, no_class.

        Where the class names are known, given_class and refined_class follow. Images that were removed are in it.
        """
        return self._columns(np.arange(len(self.labels)), "given", "refined")

    def to_pandas(self) -> pandas.DataFrame:
        """The `columns` as a pandas DataFrame, a row per image.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError("to_pandas: needs pandas; pip install 'synth-refine[pandas]'") from error
        return pandas.DataFrame(self.columns())

    def _columns(self, rows: NDArray[np.int64], given: str, refined: str) -> dict[str, list[Any]]:
        columns = {given: self.given, refined: self.labels, "action": self.action, "confidence": self.confidence}
        columns |= {"margin": self.margin, "reason": self.reason, "no_class": self.no_class}
        ids = rows.tolist() if self.ids is None else [self.ids[row] for row in rows]
        table = {"id": ids, **{name: values[rows].tolist() for name, values in columns.items()}}
        if classes := self.classes:
            table |= {f"{name}_class": [classes[label] for label in table[name]] for name in (given, refined)}
        return table


def record(
    given: Array,
    labels: Array,
    *,
    num_classes: int | None = None,
    ids: Sequence[str] | None = None,
    abstained: NDArray[np.bool_] | None = None,
    confidence: Array | None = None,
    margin: Array | None = None,
    reason: Sequence[str] | NDArray[Any] | str = "",
    no_class: Array | None = None,
    removed: NDArray[np.bool_] | None = None,
    inputs: Mapping[str, str] | None = None,
    settings: Mapping[str, object] | None = None,
) -> Artifact:
    """Put what a refiner decided on record.

    Args:
        given: Labels before, (N,) integers in [0, C).
        labels: Labels after, (N,) integers in [0, C).
        num_classes: C; by default the largest label plus one.
        ids: One id per row, unique.
        abstained: Rows that the refiner would not decide, (N,); they keep their label.
        confidence: The score of every decision, (N,).
        margin: By how much the best class beats the second, (N,).
        reason: Why rows were changed, abstained from or removed, one text or (N,).
        no_class: How likely the images show none of the classes, (N,).
        removed: Rows that a person decided to leave out, (N,); they keep their label.
        inputs: Hashes or names of the data, encoder and prototypes.
        settings: Refiner, threshold, seed, class names as `classes`.

    Raises:
        InputError: Shapes, types, ranges or ids that do not fit, or an abstained or removed row with a changed
            label.
    """
    before = as_labels("given", given, num_classes)
    after = as_labels("labels", labels, num_classes)
    check_array("labels", after, before.shape)
    if num_classes is None:
        num_classes = int(max(before.max(), after.max())) + 1 if before.size else 0
    changed = before != after
    marked = {}
    for name, rows in (("abstained", abstained), ("removed", removed)):
        marked[name] = np.zeros(len(before), dtype=bool) if rows is None else np.asarray(rows, dtype=bool)
        check_array(name, marked[name], before.shape)
        if bool((changed & marked[name]).any()):
            bad = (changed & marked[name]).argmax()
            raise InputError(f"{name}: expected rows that keep their label, got row {bad}")
    out = marked["removed"]
    open_rows = marked["abstained"] & ~out
    names = None if ids is None else [str(one) for one in ids]
    if names is not None:
        if len(names) != len(before):
            raise InputError(f"ids: expected {len(before)}, one per label, got {len(names)}")
        check_unique("ids", names)
        if bad := next((one for one in names if "\0" in one), None):
            raise InputError(f"ids: expected text without zero bytes, got {bad!r}")
    # Objects, since NumPy's texts take the room of the longest one in every row.
    reasons = np.full(len(before), reason, object) if isinstance(reason, str) else np.asarray(reason, dtype=object)
    check_array("reason", reasons, before.shape)
    scores = {}
    for name, values in (("confidence", confidence), ("margin", margin), ("no_class", no_class)):
        scores[name] = np.full(len(before), np.nan) if values is None else np.array(values, dtype=np.float64)
        check_array(name, scores[name], before.shape)
    dtype = np.dtype(str(given.dtype).removeprefix("torch."))
    return Artifact(
        given=before.astype(dtype),
        labels=after,
        ids=names,
        action=np.array(["keep", "change", "abstain", "remove"], dtype=object)[changed + 2 * open_rows + 3 * out],
        reason=np.where(changed | open_rows | out, reasons, ""),
        **scores,
        run=run_of(
            num_classes,
            labels_hash(before),
            dtype,
            len(before),
            labels_hash(after),
            int(changed.sum()),
            int(open_rows.sum()),
            int(out.sum()),
            settings or {},
            inputs or {},
        ),
    )


def write_artifact(folder: str | os.PathLike[str], artifact: Artifact, *, lock: bool = True) -> None:
    """Write an artifact whole or not at all; after a kill at any moment, run it again.

    Args:
        folder: A new or empty folder, one of a refinement over shards, or one that holds the same artifact. Hidden
            files in it stay.
        artifact: What to write.
        lock: Keep other writers out; False where the caller does.

    Raises:
        InputError: The folder holds something else, or an artifact of other inputs or settings.
        OSError: The folder cannot be written, or another process is writing to it.
    """
    root = make_folder("folder", folder)
    labels = io.BytesIO()
    np.save(labels, artifact.labels, allow_pickle=False)
    contents = {"labels.npy": labels.getvalue(), "changes.csv": csv_bytes(artifact.table())}
    if artifact.ids is not None:
        contents["ids.csv"] = csv_bytes({"id": artifact.ids})
    with locked(root) if lock else nullcontext():
        check_free(root, artifact.run)
        write_files(root, {name: partial(_put, data) for name, data in contents.items()}, artifact.run)


def _put(data: bytes, file: BinaryIO) -> None:
    file.write(data)


def read_artifact(folder: str | os.PathLike[str]) -> Artifact:
    """Read an artifact and check every hash in it.

    Raises:
        Damaged: A file was changed, swapped or lost after it was written.
        InputError: The folder holds no artifact.
    """
    root = Path(folder)
    run = read_run(root)
    paths = {name: find_file(root, name, run["files"][name]) for name in NAMES if name in run["files"]}
    labels = np.array(read_npy("labels", paths["labels.npy"], "i"), dtype=np.int64)
    ids = read_csv("ids", paths["ids.csv"])["id"] if "ids.csv" in paths else None
    table = read_csv("changes", paths["changes.csv"])
    try:
        if ids is not None:
            row_of = {one: row for row, one in enumerate(ids)}
            if not len(row_of) == len(ids) == len(labels):
                raise ValueError(f"{len(labels)} labels have {len(row_of)} ids")
        rows = np.array([int(one) if ids is None else row_of[one] for one in table["id"]], dtype=np.int64)
        given = labels.astype(np.dtype(run["given"]["dtype"]))
        given[rows] = np.array(table["old"], dtype=np.int64)
        columns: dict[str, NDArray[Any]] = {}
        table.setdefault("no_class", [""] * len(rows))  # not scored
        for name in ("confidence", "margin", "no_class"):
            columns[name] = np.full(len(labels), np.nan)
            columns[name][rows] = [float(cell) if cell else np.nan for cell in table[name]]
        for name, rest in (("action", "keep"), ("reason", "")):
            columns[name] = np.full(len(labels), rest, dtype=object)
            columns[name][rows] = table[name]
        if (columns["action"] == "remove").sum() != run["labels"].get("removed", 0):
            raise ValueError("another number of images is removed")
        if labels_hash(given) != run["given"]["sha256"] or labels_hash(labels) != run["labels"]["sha256"]:
            raise ValueError("the labels do not have the recorded hash")
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise Damaged(f"{root}: run.json and changes.csv contradict each other: {error}") from error
    run.pop("files")
    return Artifact(given=given, labels=labels, ids=ids, **columns, run=run)
