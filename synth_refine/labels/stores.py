"""A dataset in, the label of every item out, (N,) int64, and back into the place where it is kept.

A store is anything with `get_labels()` and `set_labels()`: what the user registered, the dataset itself, a column of a
Hugging Face dataset, or one of the attributes that known codebases use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from synth_refine._io.check import InputError
from synth_refine.labels.artifact import WrongIds
from synth_refine.labels.files import as_labels

METHODS = ("update_corrupted_label", "update_label", "update_labels")
"""Methods with which a dataset takes new labels: PLC's, LRA-diffusion's."""

ATTRIBUTES = ("samples", "train_noisy_labels", "train_labels", "noise_label", "label_list", "targets", "labels")
"""Where labels live, the place that item access reads first: torchvision's folders, Co-teaching and CIFAR-N, ELR and
SOP, DivideMix, PLC's Clothing1M, torchvision's CIFAR and SVHN."""

TWINS = {"samples": ("imgs", "targets"), "label_list": ("targets",)}
"""Second copies of the same labels."""

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


IdKind: TypeAlias = Literal["position", "text", "inside"]
"""Positions in the original data set; texts as the dataset has them; paths relative to the root of an image folder."""

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
        values = _known(getattr(self.dataset, self.name), self.name, self.dataset)
        if values is None:
            raise InputError(f"dataset: expected integer labels in {type(self.dataset).__name__}.{self.name}")
        return values

    def set_labels(self, labels: NDArray[np.int64]) -> None:
        if self.method is not None:
            getattr(self.dataset, self.method)(labels.tolist())
            return
        new: dict[int, Any] = {}  # twins that are one object stay one object
        for name in self.attributes():
            old = getattr(self.dataset, name)
            if id(old) not in new:
                new[id(old)] = _like(old, labels, self.dataset)
            setattr(self.dataset, name, new[id(old)])

    def attributes(self) -> list[str]:
        twins = [name for name in TWINS.get(self.name, ()) if hasattr(self.dataset, name)]
        return [self.name, *twins]

    def sample_ids(self) -> Sequence[Any] | None:
        value = getattr(self.dataset, self.name)
        if self.name == "samples":
            return [os.fspath(sample[0]) for sample in value]
        if isinstance(value, dict):
            return _keys(value, self.dataset)
        indexs = getattr(self.dataset, "indexs", None) if self.name == "train_labels" else None
        return None if indexs is None else np.asarray(indexs, dtype=np.int64).tolist()


@dataclass
class ColumnStore:
    """The labels in a column of a Hugging Face dataset, which is never changed but replaced."""

    dataset: Any

    @property
    def column(self) -> str:
        features = self.dataset.features
        found = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
        found = found or [name for name in ITEM_KEYS if name in features]
        if len(found) != 1:
            raise InputError(f"dataset: expected one column of labels, got {', '.join(found or features)}")
        return str(found[0])

    def get_labels(self) -> NDArray[np.int64]:
        return np.array(self.dataset.with_format(None)[self.column], dtype=np.int64)

    def set_labels(self, labels: NDArray[np.int64]) -> None:
        order, name = self.dataset.column_names, self.column
        feature = self.dataset.features[name]
        columns = self.dataset.remove_columns(name).add_column(name, labels.tolist(), feature=feature)
        self.dataset = columns.select_columns(order)


class Places:
    """Where the label of every item of a possibly wrapped dataset lives."""

    def __init__(self, dataset: Any) -> None:
        self.outer = dataset
        if isinstance(dataset, DataLoader):
            if dataset.persistent_workers and getattr(dataset, "_iterator", None) is not None:
                raise Stale("dataset: the persistent workers of this DataLoader hold copies of it; make a new loader")
            self.outer = dataset.dataset
        self.datasets: list[Any] = []
        self.stores: list[Any] = []
        pairs = self._find(self.outer)  # (n, 2): store, position in it
        self.store, self.position = pairs[:, 0], pairs[:, 1]
        self.wrapped = isinstance(self.outer, Subset | ConcatDataset)

    def _find(self, dataset: Any) -> NDArray[np.int64]:
        if isinstance(dataset, Subset):
            return self._find(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
        if isinstance(dataset, ConcatDataset):
            return np.concatenate([self._find(part) for part in dataset.datasets])
        known = [number for number, other in enumerate(self.datasets) if other is dataset]
        if not known:
            self.datasets.append(dataset)
            self.stores.append(_store(dataset))
        number = known[0] if known else len(self.datasets) - 1
        count = len(self.stores[number].get_labels())
        if len(dataset) != count:
            name = type(dataset).__name__
            raise LengthMismatch(f"dataset: {name} has {len(dataset)} items, but {count} labels")
        return np.stack([np.full(count, number), np.arange(count)], axis=1)

    def labels(self) -> NDArray[np.int64]:
        """The current label of every item, (n,)."""
        values = np.empty(len(self.store), dtype=np.int64)
        for number, store in enumerate(self.stores):
            here = self.store == number
            values[here] = store.get_labels()[self.position[here]]
        return values

    def split_order(self) -> bool:
        """Whether a dataset below stands in the order of a random split."""
        return any(_ids_of(store, "position") is not None for store in self.stores)

    def ids(self, kind: IdKind) -> list[Any]:
        """The id of every item, of the kind the labels come with."""
        if kind == "position" and len(self.stores) > 1 and not self.split_order():
            return list(range(len(self.store)))
        columns = [_ids_of(store, kind) or range(len(store.get_labels())) for store in self.stores]
        ids = [columns[number][position] for number, position in zip(self.store, self.position, strict=True)]
        return ids if kind == "position" else [str(one) for one in ids]

    def keep(self) -> Callable[[], Any]:
        """What puts everything back as it is now and returns the dataset."""
        restore, outer = [_keep(store) for store in self.stores], self.outer

        def revert() -> Any:
            for one in restore:
                one()
            return outer

        return revert

    def write(self, labels: NDArray[np.int64]) -> tuple[str, ...]:
        """Write the label of every item; returns the names of what took them."""
        new = []
        for number, store in enumerate(self.stores):
            here = self.store == number
            values = np.array(store.get_labels(), dtype=np.int64)
            values[self.position[here]] = labels[here]
            if bool((values[self.position[here]] != labels[here]).any()):
                raise WrongIds("labels: expected one label per image, got two for an image that occurs twice")
            new.append(values)
        if self.wrapped and any(isinstance(store, ColumnStore) for store in self.stores):
            raise InputError(
                "dataset: a Hugging Face dataset cannot be changed inside a Subset; inject before wrapping"
            )
        written = [name for store, values in zip(self.stores, new, strict=True) for name in _write(store, values)]
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


def _keep(store: Any) -> Callable[[], None]:
    """What puts a store back as it is now."""
    attributes = store.attributes() if isinstance(store, AttributeStore) and store.method is None else []
    old = {name: getattr(store.dataset, name) for name in attributes}
    values = np.array(store.get_labels(), dtype=np.int64)

    def restore() -> None:
        if isinstance(store, ColumnStore):
            return  # the dataset that was passed has never been changed
        for name, value in old.items():
            setattr(store.dataset, name, value)
        if not old:
            _write(store, values)

    return restore


def _store(dataset: Any) -> Any:
    """How the labels of a dataset are read and replaced."""
    for kind in type(dataset).__mro__:
        if kind in _ADAPTERS:
            return _ADAPTERS[kind](dataset)
    if isinstance(dataset, Labelled):
        return dataset
    if is_hugging_face(dataset):
        return ColumnStore(dataset)
    method = next((name for name in METHODS if callable(getattr(dataset, name, None))), None)
    for name in ATTRIBUTES:
        if hasattr(dataset, name) and _known(getattr(dataset, name), name, dataset) is not None:
            return AttributeStore(dataset, name, method)
    raise InputError(
        f"dataset: expected labels in {', '.join(ATTRIBUTES)}, but {type(dataset).__name__} has none of them; "
        "say where they are with register()"
    )


def is_hugging_face(dataset: Any) -> bool:
    library = sys.modules.get("datasets")  # never imported for the question alone
    return library is not None and isinstance(dataset, library.Dataset)


def is_integer(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "iu"
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _known(value: Any, name: str, dataset: Any) -> NDArray[np.int64] | None:
    """The labels in the value of an attribute; None when these are no labels."""
    if isinstance(value, dict):
        keys = _keys(value, dataset)
        return _known([value.get(key) for key in keys], name, dataset)
    if isinstance(value, np.ndarray | Tensor):
        scalar = np.zeros((), value.dtype) if isinstance(value, np.ndarray) else value.new_zeros(())
        return as_labels(name, value) if value.ndim == 1 and is_integer(scalar) else None
    if not isinstance(value, list | tuple):
        return None
    if name == "samples":
        if not all(isinstance(sample, tuple) and len(sample) > 1 for sample in value):
            return None
        value = [sample[1] for sample in value]
    return np.array([int(label) for label in value], dtype=np.int64) if all(map(is_integer, value)) else None


def _keys(labels: dict[Any, Any], dataset: Any) -> list[Any]:
    """The order of a dict from path to label: Clothing1M's loaders keep it in a list of its own."""
    order = getattr(dataset, "train_imgs", None)
    return list(labels) if order is None else list(order)


def _like(old: Any, labels: NDArray[np.int64], dataset: Any) -> Any:
    """New labels in the container and the type of the old ones; never the caller's array."""
    if isinstance(old, dict):
        return {**old, **dict(zip(_keys(old, dataset), labels.tolist(), strict=True))}
    if isinstance(old, Tensor):
        return torch.as_tensor(labels.copy()).to(device=old.device, dtype=old.dtype)
    if isinstance(old, np.ndarray):
        fits = labels.size == 0 or np.iinfo(old.dtype).max >= labels.max()
        return labels.astype(old.dtype if fits else np.int64)
    values: list[Any] = labels.tolist()
    if len(old) and isinstance(old[0], tuple):
        values = [(sample[0], label, *sample[2:]) for sample, label in zip(old, values, strict=True)]
    return tuple(values) if isinstance(old, tuple) else values


def _ids_of(store: Any, kind: IdKind) -> Sequence[Any] | None:
    """A store's own ids as this kind; None where the position in it is the id."""
    ids: Sequence[Any] | None = store.sample_ids() if hasattr(store, "sample_ids") else None
    if ids is None or not len(ids) or (kind == "position" and isinstance(ids[0], str)):
        return None
    root = getattr(getattr(store, "dataset", None), "root", None)
    if kind == "inside" and root is not None and all(Path(one).is_relative_to(root) for one in ids):
        return [Path(one).relative_to(root).as_posix() for one in ids]
    return ids
