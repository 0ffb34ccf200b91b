"""What callers hand over as refined labels (arrays, lists, artifacts, results of refiners) in, one form out.

Letters in shapes: M labels, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from synth_refine._io.check import Array, InputError, check_array
from synth_refine._io.csv import check_unique
from synth_refine._io.error import WrongIds
from synth_refine.labels.artifact import Artifact
from synth_refine.labels.files import LabelFile, as_labels


class WrongOrder(InputError):
    """Labels of which nothing says that they stand in the order of the images."""


class WrongClasses(InputError):
    """Labels and a dataset or an artifact name their classes otherwise."""


@runtime_checkable
class Applies(Protocol):
    """A result of a refiner; where it knows the labels that it was computed from, it has them as `given`."""

    def apply(self, given: Any) -> Any:
        """The refined labels for the given ones, (N,)."""


Refined: TypeAlias = "Artifact | LabelFile | Applies | Array | Sequence[int]"
"""Refined labels as `inject`, `verify` and `export` take them."""


@dataclass(frozen=True)
class Wanted:
    """Refined labels in one form.

    Attributes:
        labels: The refined labels, (M,).
        given: The labels that they were made from, (M,); None where these are not known.
        ids: The id of every label; None where their order says it.
        classes: The class names, (C,), where they are known.
        removed: Labels whose images a person left out, (M,) bool; None where none is.
    """

    labels: NDArray[np.int64]
    given: NDArray[np.int64] | None
    ids: Any
    classes: Sequence[str] | None = None
    removed: NDArray[np.bool_] | None = None

    @staticmethod
    def of(
        refined: Any,
        ids: Any = None,
        *,
        base: Array | None = None,
        current: Array | None = None,
        classes: Sequence[str] | None = None,
    ) -> Wanted:
        """Bring refined labels into this form.

        Args:
            refined: Labels, an artifact or a result of a refiner.
            ids: The id of every label; by default those of the artifact or the file.
            base: The labels that were refined; by default those that an artifact or a result knows.
            current: What a result that does not know its given labels is applied to.
            classes: The class names; by default those of the artifact or the file.
        """
        removed = None
        if isinstance(refined, Artifact) and refined.removed.size:
            removed = refined.action == "remove"
        if isinstance(refined, Artifact | LabelFile):
            ids, classes = refined.ids if ids is None else ids, refined.classes if classes is None else classes
            base = refined.given if base is None and isinstance(refined, Artifact) else base
            refined = refined.labels
        elif isinstance(refined, Applies):
            base = getattr(refined, "given", None) if base is None else base
            start = base if base is not None else current if ids is None else None
            if start is None:
                raise InputError("labels: expected a result that knows its given labels; pass result.apply(given)")
            refined = refined.apply(np.asarray(start.cpu() if isinstance(start, Tensor) else start))
        if isinstance(refined, list | tuple) and all(type(one) is int for one in refined):
            refined = np.array(refined, dtype=np.int64)
        labels = as_labels("labels", refined)
        if base is not None:
            base = as_labels("base", base)
            check_array("base", base, labels.shape)
        return Wanted(labels, base, ids, classes, removed)

    def numbered(self, classes: Sequence[str] | None) -> Wanted:
        """The same with the numbers that a dataset gives its classes, by their names.

        Raises:
            WrongClasses: The dataset lacks one of the names.
        """
        own = self.classes
        if own is None or classes is None or list(own) == list(classes):
            return self
        number = {name: place for place, name in enumerate(classes)}
        if missing := [name for name in own if name not in number]:
            raise WrongClasses(
                f"labels: expected the classes {', '.join(map(repr, classes[:5]))}, got {missing[0]!r}; if "
                "both number them alike, pass classes= with these names"
            )
        numbers = np.array([number[name] for name in own])
        for labels in (self.labels, self.given):
            if labels is not None and labels.size and int(labels.max()) >= len(own):
                raise InputError(f"labels: expected classes 0 to {len(own) - 1}, got {labels.max()}")
        return replace(self, labels=numbers[self.labels], given=None if self.given is None else numbers[self.given])

    def on(self, current: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The label of every item that has the label of a row, (n,); with row -1 the current one."""
        return np.where(rows >= 0, self.labels[rows] if self.labels.size else current, current)

    def left_out(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the item of each row was removed, (n,)."""
        if self.removed is None:
            return np.zeros(len(rows), dtype=bool)
        return (rows >= 0) & self.removed[rows]


def numbered_like(found: LabelFile, classes: Sequence[str] | None) -> NDArray[np.int64]:
    """The labels of a file with the numbers that others, such as an artifact, give the classes, by their names, (N,).

    Raises:
        WrongClasses: The others lack one of the names, or have none where the file has nothing else.
    """
    if found.named and classes is None:
        raise WrongClasses("labels: expected numbers of classes, since the artifact has no class names, got names")
    return Wanted.of(found).numbered(classes).labels


def check_related(name: str, labels: NDArray[np.int64], others: NDArray[np.int64], way_out: str) -> None:
    """Refuse labels that agree with others of the same images no more often than by chance.

    Nothing is said of so few labels that chance alone could look like this.

    Raises:
        WrongOrder: They do.
    """
    count = len(labels)
    if not count:
        return
    most = int(max(labels.max(), others.max())) + 1
    shares = [np.bincount(one, minlength=most) / count for one in (labels, others)]
    chance, agreement = float(shares[0] @ shares[1]), float((labels == others).mean())
    limit = chance + 4 * math.sqrt((chance * (1 - chance) + 1 / count) / count)
    if agreement <= limit < (1 + chance) / 2:
        raise WrongOrder(
            f"{name}: expected labels of the same images, got some that agree with the old ones for {agreement:.1%} of "
            f"{count}, where chance gives {chance:.1%}: is their order another? {way_out}"
        )


def by_key(
    labels: Refined, ids: Sequence[str] | None = None, *, key: str = "__key__", label: str = "cls"
) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    """A function for the `map` of an iterable dataset, such as webdataset's, that looks labels up by the samples' keys.

    Args:
        labels: Refined labels, as for `export`.
        ids: The key of every label. An artifact brings its own; those of `embed` and `run` begin with the shard's name,
            which a sample of webdataset has in `__url__`.
        key: The entry of a sample that holds its key.
        label: The entry that takes the label, by the name of the class where it holds one, as bytes where it holds
            bytes.

    Returns:
        Sample in, a copy with its refined label out; a sample of an unknown key raises `WrongIds`. A removed sample
        gives None, which the `map` of webdataset leaves out.

    Example:
        >>> relabel = by_key(np.array([3, 1]), ids=["a", "b"])
        >>> relabel({"__key__": "b", "cls": 0})
        {'__key__': 'b', 'cls': 1}
    """
    wanted = Wanted.of(labels, ids)
    if wanted.ids is None:
        raise WrongIds("ids: expected the key of every label, got None")
    keys, names = [str(one) for one in wanted.ids], wanted.classes or ()
    if len(keys) != len(wanted.labels):
        raise WrongIds(f"ids: expected {len(wanted.labels)}, one per label, got {len(keys)}")
    check_unique("ids", keys)
    label_by_key = dict(zip(keys, wanted.labels.tolist(), strict=True))
    removed = set() if wanted.removed is None else {keys[row] for row in np.flatnonzero(wanted.removed)}

    def relabel(sample: dict[str, Any]) -> dict[str, Any] | None:
        shard = str(sample.get("__url__", "")).rpartition("/")[2]
        one = next((name for name in (sample.get(key), f"{shard}/{sample.get(key)}") if name in label_by_key), None)
        if one is None:
            raise WrongIds(f"ids: expected a label for every sample, got none for {sample.get(key)!r}")
        if one in removed:
            return None
        old, new = sample.get(label), label_by_key[one]
        text = old.decode(errors="replace").strip() if isinstance(old, bytes) else str(old)
        new = names[new] if text in names else new
        kept = str(new).encode() if isinstance(old, bytes) else str(new) if isinstance(old, str) else int(new)
        return {**sample, label: kept}

    return relabel
