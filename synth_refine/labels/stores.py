"""A dataset in, the label of every item out, (n,) int64, and back into the place where it is kept.

A store is anything with `get_labels()` and `set_labels()`: what the user registered, the dataset itself, a column of a
Hugging Face dataset, or one of the attributes that known codebases use.

Letters in shapes: n items of the dataset, N labels of a store.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, DataLoader, Subset

from synth_refine._io.check import InputError
from synth_refine._io.error import WrongIds
from synth_refine.labels.attributes import can_be_set, keys_of, known_labels, like

METHODS = ("update_corrupted_label", "update_label", "update_labels")
"""Methods with which a dataset takes new labels: PLC's, LRA-diffusion's, SSR's."""

ATTRIBUTES = (
    *("samples", "noise_label", "train_noisy_labels", "noisy_labels", "cifar_label", "train_labels", "val_labels"),
    *("label_list", "targets", "labels", "_labels"),
)
"""Where labels live, the place that item access reads first: torchvision's folders, DivideMix and ProMix, Co-teaching
and CIFAR-N, others, SSR, ELR and SOP, T-Revision, PLC's Clothing1M, torchvision's CIFAR and SVHN, Food-101."""

TWINS = {
    "samples": ("imgs", "targets"),
    "label_list": ("targets",),
    "noise_label": ("train_noisy_labels",),
    "_labels": ("targets",),
}
"""Further copies of the same labels."""

INNER = ("dataset", "reader")
"""Where wrappers keep what they wrap: lightly's datasets, timm's."""

ITEM_KEYS = ("label", "labels", "target", "targets")


class LengthMismatch(InputError):
    """Not one label per item of the dataset."""


class Stale(InputError):
    """Something that was computed from the old labels would outlive them."""


@runtime_checkable
class Labelled(Protocol):
    """What a dataset, or an adapter registered for it, offers so that labels can be read and replaced.

    Two more methods are used where they exist: `sample_ids()` returns the id of every label, ints or texts, and
    `on_labels_changed()` drops caches and per-sample state.
    """

    def get_labels(self) -> NDArray[np.int64]:
        """The labels, (N,), in the order of the items."""

    def set_labels(self, labels: NDArray[np.int64]) -> None:
        """Replace the labels, (N,)."""


_ADAPTERS: dict[type, Callable[[Any], Labelled]] = {}


def register(kind: type, adapter: Callable[[Any], Labelled]) -> None:
    """Say how the labels of a class of datasets are read and replaced; it wins over everything else.

    Args:
        kind: The class; subclasses follow.
        adapter: Called with the dataset, returns what `Labelled` describes.

    Example:
        >>> class Pairs(list): ...
        >>> class PairLabels:
        ...     def __init__(self, pairs): self.pairs = pairs
        ...     def get_labels(self): return np.array([label for _, label in self.pairs])
        ...     def set_labels(self, labels):
        ...         self.pairs[:] = [(image, int(y)) for (image, _), y in zip(self.pairs, labels)]
        >>> register(Pairs, PairLabels)
        >>> pairs = Pairs([("a.png", 0), ("b.png", 1), ("c.png", 1)])
        >>> from synth_refine.labels.inject import inject
        >>> inject(pairs, np.array([0, 0, 1])).changed
        1
        >>> pairs
        [('a.png', 0), ('b.png', 0), ('c.png', 1)]
    """
    _ADAPTERS[kind] = adapter


@dataclass
class AttributeStore:
    """The labels in an attribute of a dataset, or of one that also has a method for taking them."""

    dataset: Any
    name: str
    method: str | None

    def get_labels(self) -> NDArray[np.int64]:
        values = known_labels(getattr(self.dataset, self.name), self.name, self.dataset)
        if values is None:
            raise InputError(f"dataset: expected integer labels in {type(self.dataset).__name__}.{self.name}")
        return values

    def set_labels(self, labels: NDArray[np.int64]) -> None:
        if self.method is not None:
            take = getattr(self.dataset, self.method)
            try:
                take(labels.tolist())
            except AttributeError:  # SSR's wants a tensor
                take(torch.from_numpy(labels.copy()))
            return
        new: dict[int, Any] = {}  # twins that are one object stay one object
        for name in self.attributes():
            old = getattr(self.dataset, name)
            if id(old) not in new:
                new[id(old)] = like(old, labels, self.dataset)
            setattr(self.dataset, name, new[id(old)])

    def attributes(self) -> list[str]:
        return [self.name, *(name for name in TWINS.get(self.name, ()) if can_be_set(self.dataset, name))]

    def sample_ids(self) -> Sequence[Any] | None:
        value = getattr(self.dataset, self.name)
        if self.name == "samples":
            return list(map(os.fspath, map(itemgetter(0), value)))
        if isinstance(value, dict):
            return keys_of(value, self.dataset)
        indexs = getattr(self.dataset, "indexs", None) if self.name == "train_labels" else None
        return None if indexs is None else np.asarray(indexs, dtype=np.int64).tolist()


@dataclass
class ColumnStore:
    """The labels in a column of a Hugging Face dataset, which is never changed but replaced."""

    dataset: Any
    name: str | None = None

    @property
    def column(self) -> str:
        features = self.dataset.features
        found = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
        found = [self.name] if self.name in features else found or [name for name in ITEM_KEYS if name in features]
        if len(found) != 1 or self.name not in (None, found[0]):
            shown = ", ".join(found if len(found) > 1 else features)
            raise InputError(f"dataset: expected one column of labels, got {shown}; name it with column=")
        return str(found[0])

    def get_labels(self) -> NDArray[np.int64]:
        values = self.dataset.with_format(None)[self.column]
        return np.array(values, dtype=np.int64)

    def sample_ids(self) -> Sequence[str] | None:
        known = "id" in self.dataset.column_names
        return list(map(str, self.dataset.with_format(None)["id"])) if known else None

    def set_labels(self, labels: NDArray[np.int64]) -> None:
        order, name = self.dataset.column_names, self.column
        feature = self.dataset.features[name]
        columns = self.dataset.remove_columns(name).add_column(name, labels.tolist(), feature=feature)
        self.dataset = columns.select_columns(order)


class Places:
    """Where the label of every item of a possibly wrapped dataset lives."""

    def __init__(self, dataset: Any, column: str | None = None) -> None:
        self.outer, self.column = dataset, column
        if isinstance(dataset, DataLoader):
            if dataset.persistent_workers and getattr(dataset, "_iterator", None) is not None:
                raise Stale("dataset: the persistent workers of this DataLoader hold copies of it; make a new loader")
            self.outer = dataset.dataset
        self.datasets: list[Any] = []  # that hold labels
        self.around: list[Any] = []  # wrappers
        self.stores: list[Any] = []
        self.values: list[NDArray[np.int64]] = []  # the labels of each store
        pairs = self._find(self.outer)  # (n, 2): store, position in it
        self.store, self.position = pairs[:, 0], pairs[:, 1]
        self._ids: dict[int, Sequence[Any] | None] = {}

    def _find(self, dataset: Any) -> NDArray[np.int64]:
        if isinstance(dataset, Subset):
            self.around.append(dataset)
            return self._find(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
        if isinstance(dataset, ConcatDataset):
            self.around.append(dataset)
            return np.concatenate([self._find(part) for part in dataset.datasets])
        known = [number for number, other in enumerate(self.datasets) if other is dataset]
        if not known:
            store, values = _store(dataset, self.column)
            if store is None:
                self.around.append(dataset)
                return self._find(next(getattr(dataset, name) for name in INNER if hasattr(dataset, name)))
            self.datasets.append(dataset)
            self.stores.append(store)
            self.values.append(np.asarray(store.get_labels(), dtype=np.int64) if values is None else values)
        number = known[0] if known else len(self.datasets) - 1
        count = len(self.values[number])
        if len(dataset) != count:
            name = type(dataset).__name__
            raise LengthMismatch(f"dataset: {name} has {len(dataset)} items, but {count} labels")
        return np.stack([np.full(count, number), np.arange(count)], axis=1)

    @property
    def wrapped(self) -> bool:
        """Whether the labels lie in a dataset below the one that was passed."""
        return bool(self.around)

    def labels(self) -> NDArray[np.int64]:
        """The current label of every item, (n,)."""
        labels = np.empty(len(self.store), dtype=np.int64)
        for number, values in enumerate(self.values):
            here = self.store == number
            labels[here] = values[self.position[here]]
        return labels

    def permuted(self) -> bool:
        """Whether the items stand in another order than the original data set, as far as the dataset knows."""
        if any(getattr(one, "_indices", None) is not None for one in self.datasets if is_hugging_face(one)):
            return True  # shuffled, or some of its rows
        if self.split():
            return True
        starts = np.flatnonzero(np.diff(self.store, prepend=-1))
        ordered = np.arange(len(self.store)) - np.repeat(starts, np.diff(np.append(starts, len(self.store))))
        return bool((self.position != ordered).any()) or len(starts) != len(self.stores)

    def split(self) -> bool:
        """Whether a dataset below knows the positions that a random split took."""
        return any(self._known_ids(number, True) is not None for number in range(len(self.stores)))

    def _known_ids(self, number: int, position: bool) -> Sequence[Any] | None:
        """A store's own ids, as positions or as texts; None where the position in it is the id."""
        if number not in self._ids:
            store = self.stores[number]
            self._ids[number] = store.sample_ids() if hasattr(store, "sample_ids") else None
        ids = self._ids[number]
        return None if ids is None or not len(ids) or (position and isinstance(ids[0], str)) else ids

    def ids(self, kind: type, *, inside: bool = False) -> list[Any]:
        """The id of every item: positions (int), or texts as the dataset has them or relative to its root (str)."""
        if kind is int and len(self.stores) > 1 and not self.split():
            return list(range(len(self.store)))
        columns: list[Sequence[Any]] = []
        for number, values in enumerate(self.values):
            ids = self._known_ids(number, kind is int) or range(len(values))
            if kind is str and inside and len(ids) and isinstance(ids[0], str):
                ids = _inside(ids, getattr(self.datasets[number], "root", None))
            columns.append(ids if kind is int or (len(ids) and isinstance(ids[0], str)) else list(map(str, ids)))
        if len(columns) == 1:
            whole = np.array_equal(self.position, np.arange(len(columns[0])))
            return list(columns[0] if whole else map(columns[0].__getitem__, self.position.tolist()))
        return [columns[number][row] for number, row in zip(self.store.tolist(), self.position.tolist(), strict=True)]

    def classes(self) -> list[str] | None:
        """The class names, in the order of the labels, where the datasets know and agree on them."""
        found = [_classes(one, self.column) for one in self.datasets]
        return found[0] if found and all(one == found[0] for one in found) else None

    def keep(self) -> Callable[[], Any]:
        """What puts everything back as it is now and returns the dataset."""
        restore = [_keep(store, values) for store, values in zip(self.stores, self.values, strict=True)]
        outer = self.outer

        def revert() -> Any:
            for one in restore:
                one()
            return outer

        return revert

    def write(self, labels: NDArray[np.int64]) -> tuple[str, ...]:
        """Write the label of every item; returns the names of what took them."""
        new = []
        for number, values in enumerate(self.values):
            here = self.store == number
            values = values.copy()
            values[self.position[here]] = labels[here]
            if bool((values[self.position[here]] != labels[here]).any()):
                raise WrongIds("labels: expected one label per image, got two for an image that occurs twice")
            new.append(values)
        if self.wrapped and any(isinstance(store, ColumnStore) for store in self.stores):
            raise InputError("dataset: a Hugging Face dataset cannot be changed inside another; inject before wrapping")
        written = [name for store, values in zip(self.stores, new, strict=True) for name in _write(store, values)]
        self.values = new
        if isinstance(self.stores[0], ColumnStore):
            self.outer = self.stores[0].dataset
        return tuple(dict.fromkeys(written))


def _write(store: Any, values: NDArray[np.int64]) -> list[str]:
    store.set_labels(values)
    if hasattr(store, "on_labels_changed"):
        store.on_labels_changed()
    if isinstance(store, AttributeStore):
        return store.attributes() if store.method is None else [store.method]
    return [store.column if isinstance(store, ColumnStore) else "set_labels"]


def _keep(store: Any, values: NDArray[np.int64]) -> Callable[[], None]:
    """What puts a store back as it is now."""
    attributes = store.attributes() if isinstance(store, AttributeStore) and store.method is None else []
    old, values = {name: getattr(store.dataset, name) for name in attributes}, values.copy()

    def restore() -> None:
        if isinstance(store, ColumnStore):
            return  # the dataset that was passed has never been changed
        for name, value in old.items():
            setattr(store.dataset, name, value)
        if not old:
            _write(store, values)

    return restore


def _store(dataset: Any, column: str | None) -> tuple[Any, NDArray[np.int64] | None]:
    """How the labels of a dataset are read and replaced, and the labels where they have been read already.

    None where the dataset wraps another one that has them.
    """
    for kind in type(dataset).__mro__:
        if kind in _ADAPTERS:
            return _ADAPTERS[kind](dataset), None
    if isinstance(dataset, Labelled):
        return dataset, None
    if is_hugging_face(dataset):
        return ColumnStore(dataset, column), None
    method = next((name for name in METHODS if callable(getattr(dataset, name, None))), None)
    found: list[str] = []
    for name in ATTRIBUTES if column is None else (column,):
        values = known_labels(getattr(dataset, name), name, dataset) if can_be_set(dataset, name) else None
        if values is not None:
            found.append(name)
            if hasattr(dataset, "__len__") and len(values) == len(dataset):  # T-Revision's keep both splits
                return AttributeStore(dataset, name, method), values
    if found:
        return AttributeStore(dataset, found[0], method), None
    if any(hasattr(dataset, name) for name in INNER):
        return None, None
    raise InputError(
        f"dataset: expected labels in {', '.join(ATTRIBUTES)}, but {type(dataset).__name__} has none of them; "
        "name the attribute with column=, or say where they are with register()"
    )


def is_hugging_face(dataset: Any) -> bool:
    # The library is never imported for the question alone, and codebases have modules of their own by its name.
    kind = getattr(sys.modules.get("datasets.arrow_dataset"), "Dataset", None)
    return isinstance(kind, type) and isinstance(dataset, kind)


def _inside(paths: Sequence[Any], root: Any) -> Sequence[Any]:
    """Paths relative to a folder, where all of them lie in it."""
    if root is None:
        return paths
    start = os.path.join(os.fspath(root), "")
    if min(paths).startswith(start) and max(paths).startswith(start):  # so do all between them
        return list(map(itemgetter(slice(len(start), None)), paths))
    if not all(Path(one).is_relative_to(root) for one in paths):
        return paths
    return [Path(one).relative_to(root).as_posix() for one in paths]


def _classes(dataset: Any, column: str | None) -> list[str] | None:
    if is_hugging_face(dataset):
        names = getattr(dataset.features[ColumnStore(dataset, column).column], "names", None)
    else:
        names = getattr(dataset, "classes", None)
        numbers = getattr(dataset, "class_to_idx", None)
        if not isinstance(names, list | tuple) and isinstance(numbers, dict):
            names = sorted(numbers, key=numbers.__getitem__)
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        return list(names)
    return None
