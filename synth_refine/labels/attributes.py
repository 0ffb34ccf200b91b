"""The value of a dataset's attribute in, its labels out, (N,) int64, and new labels in the form of the old value."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synth_refine.labels.files import as_labels

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


def can_be_set(dataset: Any, name: str) -> bool:
    """Whether there is such an attribute, other than a property that only reads, as torchvision's MNIST has."""
    kind = getattr(type(dataset), name, None)
    return not (isinstance(kind, property) and kind.fset is None) and hasattr(dataset, name)


def is_integer(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "iu"
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def known_labels(value: Any, name: str, dataset: Any) -> NDArray[np.int64] | None:
    """The labels in the value of an attribute; None when these are no labels."""
    if isinstance(value, dict):
        return known_labels([value.get(key) for key in keys_of(value, dataset)], name, dataset)
    if isinstance(value, np.ndarray | Tensor):
        scalar = np.zeros((), value.dtype) if isinstance(value, np.ndarray) else value.new_zeros(())
        return as_labels(name, value) if value.ndim == 1 and is_integer(scalar) else None
    if not isinstance(value, list | tuple):
        return None
    if name == "samples":
        if not set(map(type, value)) <= {tuple, list} or min(map(len, value), default=2) < 2:
            return None
        value = list(map(itemgetter(1), value))
    if set(map(type, value)) <= {int}:  # quick for millions
        return np.array(value, dtype=np.int64)
    return np.array(list(map(int, value)), dtype=np.int64) if all(map(is_integer, value)) else None


def keys_of(labels: dict[Any, Any], dataset: Any) -> list[Any]:
    """The order of a dict from path to label: Clothing1M's loaders keep it in a list of its own."""
    order = getattr(dataset, "train_imgs", None)
    return list(labels) if order is None else list(order)


def like(old: Any, labels: NDArray[np.int64], dataset: Any) -> Any:
    """New labels in the container and the type of the old ones; never the caller's array."""
    if isinstance(old, dict):
        return {**old, **dict(zip(keys_of(old, dataset), labels.tolist(), strict=True))}
    if isinstance(old, Tensor):
        return torch.as_tensor(labels.copy()).to(device=old.device, dtype=old.dtype)
    if isinstance(old, np.ndarray):
        fits = labels.size == 0 or np.iinfo(old.dtype).max >= labels.max()
        return labels.astype(old.dtype if fits else np.int64)
    values: list[Any] = labels.tolist()
    if len(old) and isinstance(old[0], tuple | list):
        pairs = set(map(type, old)) == {tuple} and set(map(len, old)) == {2}  # quick for millions
        new = zip(map(itemgetter(0), old), values, strict=True)
        values = list(new) if pairs else [type(one)((*pair, *one[2:])) for one, pair in zip(old, new, strict=True)]
    return tuple(values) if isinstance(old, tuple) else values
