"""A dataset object of an existing codebase and refined labels in, the dataset with these labels out, and the proof.

Codebases keep their labels in different places (a list, a second list that item access ignores, an array in the order
of a random split, a table that cannot be changed), so the place is looked up, written, and then read back the way a
training loop reads it: item by item. Codebases that read label files are served by `synth_refine.export`.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synth_refine._io.check import Array, InputError
from synth_refine._io.csv import check_unique
from synth_refine.labels.artifact import Artifact, WrongBase, WrongIds
from synth_refine.labels.files import as_labels
from synth_refine.labels.refined import Refined, Wanted
from synth_refine.labels.stores import (
    ITEM_KEYS,
    AttributeStore,
    ColumnStore,
    IdKind,
    Labelled,
    LengthMismatch,
    Places,
    Stale,
    is_hugging_face,
    is_integer,
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
    "WrongIds",
    "inject",
    "register",
    "verify",
]

DERIVED = {
    "softlabel": "soft labels",
    "soft_labels": "soft labels",
    "noise_or_not": "noise flags",
    "noise_prior": "a noise estimate",
    "class_ind": "an index of the classes",
    "class_weights": "class weights",
    "sample_weights": "sample weights",
    "neighbor_labels": "labels of neighbours",
    "knn_labels": "labels of neighbours",
}
"""Attributes that codebases compute from the labels once."""


class NotInjected(InputError):
    """Item access returns other labels than the refined ones."""


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
        dataset: The dataset to train on: the one passed, or a new one where it cannot be changed (Hugging Face).
        written: The attributes or methods that took the labels.
        count: Number of items of the dataset.
        changed: Number of items whose label is another one now.
        stale: Attributes and files that were computed from the old labels and are still there.
    """

    dataset: Any
    written: tuple[str, ...]
    count: int
    changed: int
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
    base: Array | None = None,
    fill: Literal["error", "keep"] = "error",
    num_classes: int | None = None,
    on_stale: Literal["warn", "error"] = "warn",
    caches: Sequence[str | os.PathLike[str]] = (),
    label_of: Callable[[Any], int] | None = None,
) -> Report:
    """Put refined labels into a dataset object and read them back through item access.

    Labels without ids stand in the order of the items; a dataset that knows a random split (`indexs`, as ELR's and
    SOP's) takes them in the order of the original data set. `Subset`, `ConcatDataset` and `DataLoader` are looked
    through.

    Args:
        dataset: The dataset; for a Hugging Face dataset go on with `Report.dataset`.
        labels: Refined labels, (M,) integers; an artifact, or a result of a refiner that knows its given labels, which
            the dataset must hold; or another result, which is applied to the dataset's labels.
        ids: The id of every label: positions in the data set below any `Subset` or split (in a `ConcatDataset`, of the
            whole), or paths, which may be relative to the root of an image folder. An artifact brings its own.
        base: The labels that were refined, (M,); the dataset must hold them, or the refined ones already.
        fill: What becomes of an item without a label, possible with ids only: an error, or it keeps its label.
        num_classes: C; by default the artifact's, or what the dataset says.
        on_stale: Warn of soft labels, noise flags and the like that were computed from the old labels, or refuse.
        caches: Files that hold labels of neighbours; one that exists is stale.
        label_of: The label in an item; by default the first integer of a tuple, or the entry `label` of a dict.

    Returns:
        What was written and changed, and `revert()`.

    Raises:
        LengthMismatch: Not one label per item.
        WrongIds: Ids that occur twice, or items without one.
        WrongBase: The dataset holds other labels than the ones that were refined.
        Stale: With `on_stale="error"`; and always for a `DataLoader` whose persistent workers hold old copies.
        NotInjected: Item access still returns old labels; the dataset has been put back.
        InputError: Labels of another shape, type or range, or a dataset whose labels are nowhere known.

    Warns:
        EmptiedClassWarning: A class has lost its last image.
        OrderWarning: The dataset is a folder of files, and neither `ids` nor `base` nor an artifact tells their order.
        StaleWarning: With `on_stale="warn"`.
    """
    if fill not in ("error", "keep") or on_stale not in ("error", "warn"):
        raise InputError(f"fill, on_stale: expected error or keep, error or warn, got {fill!r}, {on_stale!r}")
    places = Places(dataset)
    before = places.labels()
    wanted = Wanted.of(labels, ids, base, current=before)
    rows = _rows(places, wanted, fill)
    after = wanted.on(before, rows)
    for leaf in places.datasets:
        known = num_classes or _num_classes(labels, leaf)
        as_labels("labels", after, known)
        if known is None and not places.wrapped:  # in a few items of a subset classes come and go
            _check_counted_from_0(before, after)
    _check_base(before, after, rows, wanted.given)

    changed = np.flatnonzero(before != after)
    lost = np.setdiff1d(before, after)
    if lost.size:
        warnings.warn(f"labels: no image is left in class {_shown(lost)}", EmptiedClassWarning, stacklevel=2)
    named = wanted.ids is not None or wanted.given is not None
    if changed.size and not named and any(_of_files(store) for store in places.stores):
        warnings.warn(
            "labels: without ids they are taken to stand in the order of the dataset's `samples`, which is that of the "
            "sorted paths; pass ids to be sure",
            OrderWarning,
            stacklevel=2,
        )
    stale = _stale(places.datasets, caches) if changed.size else ()
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
        _compare(places.outer, after, sample, label_of)
    except BaseException:
        undo()
        raise
    return Report(places.outer, written, len(after), len(changed), stale, undo)


def verify(
    dataset: Any,
    labels: Refined,
    ids: Sequence[int] | Sequence[str] | Array | None = None,
    *,
    fill: Literal["error", "keep"] = "error",
    k: int | None = 64,
    seed: int = 0,
    label_of: Callable[[Any], int] | None = None,
) -> None:
    """Read items as a training loop does and fail where one has another label than the refined one.

    This finds the second list that item access ignores, labels in the order of a split, a dataset that was rebuilt from
    its label file since, and workers with old copies. Transforms run, and the random states are put back.

    Args:
        dataset: The dataset or loader, for example the one of the running epoch.
        labels: The refined labels, as for `inject`.
        ids: As for `inject`.
        fill: As for `inject`; with `keep`, items without a label are left out.
        k: Number of items to read; all of them for None. An artifact's changed rows come first.
        seed: Chooses the items.
        label_of: As for `inject`.

    Raises:
        NotInjected: An item has another label; the message shows the first five.
        LengthMismatch, WrongIds, InputError: As for `inject`.
    """
    places = Places(dataset)
    before = places.labels()
    wanted = Wanted.of(labels, ids, current=before)
    rows = _rows(places, wanted, fill)
    known = np.flatnonzero(rows >= 0)
    if k is not None:
        changed = known[:0] if wanted.given is None else known[(wanted.labels != wanted.given)[rows[known]]]
        known = np.array(
            _sample(changed, k, seed) + _sample(known, k - min(k // 2, len(changed)), seed), dtype=np.int64
        )
    _compare(places.outer, wanted.on(before, rows), known.tolist(), label_of)


def _rows(places: Places, wanted: Wanted, fill: str) -> NDArray[np.int64]:
    """Which label belongs to every item, (n,); -1 for an item that keeps its own."""
    ids, count, items = wanted.ids, len(wanted.labels), len(places.store)
    if ids is None:
        if not places.split_order():
            if count != items:
                raise LengthMismatch(
                    f"labels: expected {items}, one per item of the dataset, got {count}; pass ids, or a Subset"
                )
            return np.arange(items)
        if places.wrapped:
            raise WrongIds("ids: expected the original position of every label, since the dataset is a random split")
        ids, last = range(count), max(places.ids("position"), default=-1)
        if last >= count:
            raise LengthMismatch(
                f"labels: expected one per image of the original data set, since the dataset is a random split with "
                f"positions up to {last}, got {count}; pass ids"
            )
    own: list[Any] = ids.tolist() if isinstance(ids, np.ndarray | Tensor) else list(ids)
    if len(own) != count:
        raise WrongIds(f"ids: expected {count}, one per label, got {len(own)}")
    if not (all(isinstance(one, str) for one in own) or all(map(is_integer, own))):
        raise WrongIds("ids: expected whole numbers or texts")
    if len(set(own)) != count:
        check_unique("ids", [str(one) for one in own])
    row_of = {one: row for row, one in enumerate(own)}
    kinds: tuple[IdKind, ...] = ("text", "inside") if own and isinstance(own[0], str) else ("position",)
    for kind in kinds:
        items_ids = places.ids(kind)
        rows = np.array([row_of.get(one, -1) for one in items_ids], dtype=np.int64)
        if (rows >= 0).any():
            break
    missing = np.flatnonzero(rows < 0)
    if missing.size and fill == "error":
        raise WrongIds(
            f"ids: expected one for every item, got none for {missing.size} of {items}, the first is "
            f"{items_ids[missing[0]]!r} (the ids begin with {own[:1]}); with fill='keep' such items keep their label"
        )
    return rows


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


def _of_files(store: Any) -> bool:
    return isinstance(store, AttributeStore) and store.name == "samples"


def _num_classes(labels: Any, dataset: Any) -> int | None:
    if isinstance(labels, Artifact):
        return labels.num_classes
    if is_hugging_face(dataset):
        return getattr(dataset.features[ColumnStore(dataset).column], "num_classes", None)
    classes = getattr(dataset, "classes", None)
    return len(classes) if isinstance(classes, list | tuple | dict) and classes else None


def _stale(datasets: list[Any], caches: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    found = [
        f"{name} ({what})"
        for dataset in datasets
        for name, what in DERIVED.items()
        if getattr(dataset, name, None) is not None
    ]
    return tuple(dict.fromkeys(found + [f"the file {os.fspath(path)}" for path in caches if Path(path).exists()]))


def _sample(values: NDArray[np.int64], k: int, seed: int = 0) -> list[int]:
    return [int(value) for value in np.random.default_rng(seed).permutation(values)[:k]]


def _compare(
    dataset: Any, labels: NDArray[np.int64], sample: Sequence[int], label_of: Callable[[Any], int] | None
) -> None:
    read = label_of or _label_of
    if is_hugging_face(dataset):
        column = ColumnStore(dataset).column
        dataset = dataset.select_columns(column).with_format(None)  # the images need no decoding
        read = label_of or (lambda item: int(item[column]))
    wrong = []
    with _random_states_kept():
        for item in sample:
            found = read(dataset[item])
            if found != labels[item]:
                wrong.append(f"item {item} has {found} for {labels[item]}")
    if wrong:
        shown = ", ".join(wrong[:5])
        raise NotInjected(
            f"dataset: expected the refined labels from item access, got others for {len(wrong)} of {len(sample)} "
            f"items read: {shown}"
        )


def _label_of(item: Any) -> int:
    if isinstance(item, Mapping):
        parts = [item[key] for key in ITEM_KEYS if key in item]
    else:
        parts = list(item) if isinstance(item, tuple | list) else []
    for part in parts:
        if is_integer(part):
            return int(part)
    raise InputError("dataset: expected items with an integer label, (image, label, ...) or a dict; pass label_of")


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Transforms draw random numbers; a check must not change the training that follows."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    # Looking at a GPU that nobody uses would start CUDA, which a loader's forked workers do not survive.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _shown(classes: NDArray[np.int64]) -> str:
    return ", ".join(map(str, classes[:5].tolist())) + (", ..." if len(classes) > 5 else "")
