"""A dataset object of an existing codebase and refined labels in, the dataset with these labels out, and the proof.

Codebases keep their labels in different places (a list, a second list that item access ignores, an array in the order
of a random split, a table that cannot be changed), so the place is looked up, written, and then read back the way a
training loop reads it: item by item. Codebases that read label files are served by `synth_refine.labels.export`.

Letters in shapes: n items of the dataset, M labels.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from synth_refine._io.check import Array, InputError, check_array
from synth_refine._io.csv import check_unique
from synth_refine._io.error import WrongBase, WrongIds
from synth_refine.labels.artifact import Artifact
from synth_refine.labels.attributes import DERIVED, is_integer
from synth_refine.labels.files import as_labels
from synth_refine.labels.items import NotInjected, compare
from synth_refine.labels.refined import Refined, Wanted, WrongClasses, WrongOrder, by_key, check_related
from synth_refine.labels.stores import (
    ColumnStore,
    Labelled,
    LengthMismatch,
    Places,
    Stale,
    is_hugging_face,
    register,
)

__all__ = [
    "EmptiedClassWarning",
    "Labelled",
    "LengthMismatch",
    "NotInjected",
    "OrderWarning",
    "Report",
    "Stale",
    "StaleWarning",
    "WrongBase",
    "WrongClasses",
    "WrongIds",
    "WrongOrder",
    "by_key",
    "given_labels",
    "inject",
    "register",
    "verify",
]


class StaleWarning(UserWarning):
    """Something that was computed from the old labels outlives them."""


class OrderWarning(UserWarning):
    """Nothing but their number says that labels belong to the files of a folder."""


class EmptiedClassWarning(UserWarning):
    """A class has lost its last image."""


@dataclass(frozen=True)
class Report:
    """What `inject` did.

    Attributes:
        dataset: The dataset to train on: the one passed; a new one where that cannot be changed (Hugging Face); or,
            where images were removed, a `Subset` of the others.
        written: The attributes or methods that took the labels.
        count: Number of items of the dataset.
        changed: Number of items whose label is another one now.
        removed: Number of items that `dataset` leaves out.
        stale: Attributes, files and loaders that hold what was computed from the old labels.
    """

    dataset: Any
    written: tuple[str, ...]
    count: int
    changed: int
    removed: int
    stale: tuple[str, ...]
    _undo: Callable[[], Any] = field(repr=False, compare=False)

    def revert(self) -> Any:
        """Put the old labels back, the very objects where the dataset held objects, and return the dataset."""
        return self._undo()


def inject(
    dataset: Any,
    labels: Refined,
    ids: Sequence[int] | Sequence[str] | Array | None = None,
    *,
    rows: Sequence[int] | Array | None = None,
    base: Array | None = None,
    fill: Literal["error", "keep"] = "error",
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    column: str | None = None,
    on_stale: Literal["warn", "error"] = "warn",
    caches: Sequence[str | os.PathLike[str]] = (),
    label_of: Callable[[Any], int] | None = None,
    force: bool = False,
) -> Report:
    """Put refined labels into a dataset object and read them back through item access.

    `Subset`, `ConcatDataset`, `DataLoader` and wrappers that keep a `dataset` are looked through. Where the items stand
    in the order of the original data set, labels need no ids. Where a split or a shuffle has changed the order, `ids`,
    `rows`, `base` or an artifact says which label belongs to which item.

    Images that a person removed are left out: go on with `Report.dataset`.

    Args:
        dataset: The dataset; for a Hugging Face dataset go on with `Report.dataset`.
        labels: Refined labels, (M,) integers; what `read_label_file` returns; an artifact, or a result of a refiner
            that knows its given labels, which the dataset must hold; or another result, which is applied to what the
            dataset holds.
        ids: The id of every label: positions in the data set below any `Subset` or split (in a `ConcatDataset`, of the
            whole), or paths, which may be relative to the root of an image folder. An artifact brings its own.
        rows: Instead of ids, the row of the label that every item gets, (n,); `range(n)` says that the labels stand in
            the order of the items.
        base: The labels that were refined, (M,); the dataset must hold them, or the refined ones already.
        fill: What becomes of an item without a label, possible with ids only: an error, or it keeps its label.
        num_classes: C; by default the artifact's, or what the dataset says.
        classes: Class names, (C,), in the order of the labels' numbers; by default those of the artifact or file. Where
            the dataset numbers the same names otherwise, its numbers are written.
        column: Where the labels are: a column of a Hugging Face dataset, or an attribute.
        on_stale: Warn of soft labels, noise flags and the like that were computed from the old labels, and of loaders
            whose workers hold them, or refuse.
        caches: Files that hold labels of neighbours; one that exists is stale.
        label_of: The label in an item; by default the first integer of a tuple, or the entry `label` of a dict.
        force: Take labels that agree with the dataset's no more often than by chance.

    Returns:
        What was written and changed, and `revert()`.

    Raises:
        LengthMismatch: Not one label per item.
        WrongIds: Ids that occur twice, or items without one.
        WrongBase: The dataset holds other labels than the ones that were refined.
        WrongOrder: The dataset is permuted and nothing says which labels are whose, or labels and dataset agree no more
            often than by chance.
        WrongClasses: The dataset has no class of one of the names.
        Stale: With `on_stale="error"`; and always for a `DataLoader` whose persistent workers hold old copies.
        NotInjected: Item access still returns old labels; the dataset has been put back.
        InputError: Labels of another shape, type or range, a dataset whose labels are nowhere known, or a loader or
            stream that removed images cannot be left out of.

    Warns:
        EmptiedClassWarning: A class has lost its last image.
        OrderWarning: The dataset is a folder of files, and nothing tells their order.
        StaleWarning: With `on_stale="warn"`.
    """
    if fill not in ("error", "keep") or on_stale not in ("error", "warn"):
        raise InputError(f"fill, on_stale: expected error or keep, error or warn, got {fill!r}, {on_stale!r}")
    places = Places(dataset, column)
    before = places.labels()
    wanted = Wanted.of(labels, ids, base=base, current=before, classes=classes).numbered(places.classes())
    row = _rows(places, wanted, rows, fill)
    after = wanted.on(before, row)
    for leaf in places.datasets:
        known = num_classes or _num_classes(labels, leaf, column)
        as_labels("labels", after, known)
        if known is None and not places.wrapped:  # in a few items of a subset classes come and go
            _check_counted_from_0(before, after)
    _check_base(before, after, row, wanted.given)
    if not force and wanted.given is None:
        check_related("labels", after[row >= 0], before[row >= 0], "if they are meant so, pass force=True")

    changed, out = np.flatnonzero(before != after), wanted.left_out(row)
    if out.any() and (isinstance(dataset, DataLoader) or not hasattr(dataset, "__getitem__")):
        raise InputError(
            f"dataset: expected one whose items can be left out, since {out.sum()} of its images were removed, got "
            f"{type(dataset).__name__}; inject into the dataset below and load its Report.dataset"
        )
    lost = np.setdiff1d(before, after[~out])
    if lost.size:
        warnings.warn(f"labels: no image is left in class {_shown(lost)}", EmptiedClassWarning, stacklevel=2)
    named = wanted.ids is not None or wanted.given is not None or rows is not None
    if changed.size and not named and any(getattr(store, "name", None) == "samples" for store in places.stores):
        warnings.warn(
            "labels: without ids they are taken to stand in the order of the dataset's `samples`, which is that of the "
            "sorted paths; pass ids to be sure",
            OrderWarning,
            stacklevel=2,
        )
    stale = _stale(places, caches) if changed.size else ()
    if stale:
        text = f"dataset: {'; '.join(stale)} came from the old labels; recompute or delete what the training reads"
        if on_stale == "error":
            raise Stale(text)
        warnings.warn(text, StaleWarning, stacklevel=2)

    undo = places.keep()
    try:
        written = places.write(after)
        # Labels that already were right prove nothing, so most of the sample is taken from the changed ones.
        sample = _sample(changed, 48) + _sample(np.arange(len(after)), 16)
        compare(places, after, sample, label_of)
    except BaseException:
        undo()
        raise
    left, kept = places.outer, np.flatnonzero(~out).tolist()
    if out.any():
        left = left.select(kept) if is_hugging_face(left) else Subset(left, kept)
    return Report(left, written, len(after), len(changed), int(out.sum()), stale, undo)


def verify(
    dataset: Any,
    labels: Refined,
    ids: Sequence[int] | Sequence[str] | Array | None = None,
    *,
    rows: Sequence[int] | Array | None = None,
    fill: Literal["error", "keep"] = "error",
    classes: Sequence[str] | None = None,
    column: str | None = None,
    k: int | None = 64,
    seed: int = 0,
    label_of: Callable[[Any], int] | None = None,
) -> None:
    """Read items as a training loop does and fail where one has another label than the refined one.

    This finds the second list that item access ignores, labels in the order of a split, a dataset that was rebuilt from
    its label file since, images that should have been left out, and, where the running loader is passed, workers with
    old copies. Transforms run, and the random states are put back.

    Args:
        dataset: The dataset or, better, the loader of the running epoch.
        labels: The refined labels, as for `inject`.
        ids: As for `inject`.
        rows: As for `inject`.
        fill: As for `inject`; with `keep`, items without a label are left out.
        classes: As for `inject`.
        column: As for `inject`.
        k: Number of items to read; all of them for None. Changed rows come first where they are known.
        seed: Chooses the items.
        label_of: As for `inject`.

    Raises:
        NotInjected: An item has another label, of which the message shows the first five, or was removed.
        LengthMismatch, WrongIds, WrongOrder, WrongClasses, Stale, InputError: As for `inject`.
    """
    places = Places(dataset, column)
    before = places.labels()
    wanted = Wanted.of(labels, ids, current=before, classes=classes).numbered(places.classes())
    row = _rows(places, wanted, rows, fill)
    if count := int(wanted.left_out(row).sum()):
        raise NotInjected(f"dataset: expected the removed images to be left out, got {count}; use Report.dataset")
    known = np.flatnonzero(row >= 0)
    if k is not None:
        first = known[:0] if wanted.given is None else known[(wanted.labels != wanted.given)[row[known]]]
        known = np.array(_sample(first, k, seed) + _sample(known, k - min(k // 2, len(first)), seed), dtype=np.int64)
    compare(places, wanted.on(before, row), known.tolist(), label_of)


def given_labels(dataset: Any, *, column: str | None = None) -> tuple[NDArray[np.int64], list[int] | list[str]]:
    """The labels that a dataset holds and their ids, in the order of its items: the way out that matches `inject`.

    Args:
        dataset: As for `inject`.
        column: As for `inject`.

    Returns:
        Labels, (n,) int64, and the id of each: paths, relative to the root of an image folder, or positions in the data
        set below any `Subset` or split. `record(labels, ..., ids=ids)` is an artifact that `inject` takes for this
        dataset and for any other split of the same data set.
    """
    places = Places(dataset, column)
    positions, texts = places.ids(int), places.ids(str, inside=True)
    return places.labels(), positions if texts == list(map(str, positions)) else texts


def _rows(places: Places, wanted: Wanted, rows: Any, fill: str) -> NDArray[np.int64]:
    """Which label belongs to every item, (n,); -1 for an item that keeps its own."""
    ids, count, items = wanted.ids, len(wanted.labels), len(places.store)
    if rows is not None:
        found = np.array(rows.cpu() if isinstance(rows, Tensor) else rows, dtype=np.int64)
        check_array("rows", found, (items,))
        if found.size and not 0 <= int(found.min()) <= int(found.max()) < count:
            raise WrongIds(f"rows: expected rows from 0 to {count - 1}, got {found.min()} to {found.max()}")
        return found
    if ids is None and count == items and _in_order(places, wanted):
        return np.arange(items)
    if ids is None and wanted.given is not None and count >= items:
        ids = range(count)  # an artifact of the whole data set: its rows are positions
    if ids is None:
        if count != items:
            raise LengthMismatch(
                f"labels: expected {items}, one per item of the dataset, got {count}; pass ids, or a Subset"
            )
        raise WrongOrder(
            "labels: expected ids, since the dataset does not stand in the original order: ids=range(len(labels)) for "
            "labels in the original order, rows=range(len(dataset)) for labels in the order of the items"
        )
    own: list[Any] = ids.tolist() if isinstance(ids, np.ndarray | Tensor) else list(ids)
    if len(own) != count:
        raise WrongIds(f"ids: expected {count}, one per label, got {len(own)}")
    texts = set(map(type, own)) <= {str, np.str_}
    if not (texts or all(map(is_integer, own))):
        raise WrongIds("ids: expected whole numbers or texts")
    row_of = dict(zip(own, range(count), strict=True))
    if len(row_of) != count:
        check_unique("ids", [str(one) for one in own])
    items_ids = places.ids(str if own and texts else int)
    if own and texts and row_of.keys().isdisjoint(items_ids[:1000]):  # a million misses would take a second
        inside = places.ids(str, inside=True)
        items_ids = items_ids if row_of.keys().isdisjoint(inside) else inside
    found = np.fromiter(map(row_of.get, items_ids, repeat(-1)), np.int64, items)
    missing = np.flatnonzero(found < 0)
    if missing.size and fill == "error":
        raise WrongIds(
            f"ids: expected one for every item, got none for {missing.size} of {items}, the first is "
            f"{items_ids[missing[0]]!r} (the ids begin with {own[:1]}); with fill='keep' such items keep their label"
        )
    return found


def _in_order(places: Places, wanted: Wanted) -> bool:
    """Whether labels, one per item, can be taken to stand in the order of the items."""
    if not places.permuted():
        return True
    before = places.labels()
    return wanted.given is not None and any(np.array_equal(before, one) for one in (wanted.given, wanted.labels))


def _check_base(
    before: NDArray[np.int64], after: NDArray[np.int64], rows: NDArray[np.int64], given: NDArray[np.int64] | None
) -> None:
    if given is None or not given.size or bool((before == after).all()):
        return
    differ = np.flatnonzero((rows >= 0) & (before != given[rows]))
    if differ.size:
        first = differ[0]
        raise WrongBase(
            f"dataset: expected the labels that were refined, got others: {differ.size} of {len(before)} differ, first "
            f"item {first} with {before[first]} for {given[rows[first]]}; is the order another, or does the dataset "
            "add noise?"
        )


def _check_counted_from_0(before: NDArray[np.int64], after: NDArray[np.int64]) -> None:
    """Refuse labels from 1 to C where the dataset's are 0 to C - 1 and nothing else says how many classes there are."""
    classes = np.unique(before)
    if classes.size and classes[0] == 0 and np.array_equal(np.unique(after), classes + 1):
        high = int(classes[-1])
        raise InputError(
            f"labels: expected classes from 0 to {high}, as the dataset has them, got 1 to {high + 1}: are they "
            "counted from 1? If they are right, pass num_classes"
        )


def _num_classes(labels: Any, dataset: Any, column: str | None) -> int | None:
    if is_hugging_face(dataset):
        return getattr(dataset.features[ColumnStore(dataset, column).column], "num_classes", None)
    if isinstance(labels, Artifact) and labels.classes is None:
        return labels.num_classes
    classes = getattr(dataset, "classes", None)
    return len(classes) if isinstance(classes, list | tuple | dict) and classes else None


def _stale(places: Places, caches: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    found = [
        f"{name} ({what})"
        for dataset in places.datasets
        for name, what in DERIVED.items()
        if getattr(dataset, name, None) is not None
    ]
    ours = [*places.datasets, *places.around]
    if any(_has_workers(one, ours) for one in gc.get_objects() if issubclass(type(one), DataLoader)):
        found.append("a DataLoader (its persistent workers hold copies of the dataset; make a new one)")
    return tuple(dict.fromkeys(found + [f"the file {os.fspath(path)}" for path in caches if Path(path).exists()]))


def _has_workers(loader: Any, datasets: list[Any]) -> bool:
    running = loader.num_workers > 0 and getattr(loader, "_iterator", None) is not None
    return running and any(loader.dataset is one for one in datasets)


def _sample(values: NDArray[np.int64], k: int, seed: int = 0) -> list[int]:
    return [int(value) for value in np.random.default_rng(seed).permutation(values)[:k]]


def _shown(classes: NDArray[np.int64]) -> str:
    return ", ".join(map(str, classes[:5].tolist())) + (", ..." if len(classes) > 5 else "")
