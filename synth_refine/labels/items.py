"""A dataset and the labels that its items should have in, an error out where item access returns others."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from synth_refine._io.check import InputError
from synth_refine.labels.attributes import is_integer
from synth_refine.labels.stores import ITEM_KEYS, ColumnStore, Places, is_hugging_face


class NotInjected(InputError):
    """Item access returns other labels than the refined ones."""


def compare(
    places: Places, labels: NDArray[np.int64], sample: Sequence[int], label_of: Callable[[Any], int] | None
) -> None:
    """Read some items and raise where one has another label, (n,) int64.

    Args:
        places: The dataset.
        labels: The label that every item should have, (n,).
        sample: The items to read.
        label_of: The label in an item; by default see `inject`.

    Raises:
        NotInjected: As said.
    """
    dataset, read = places.outer, label_of or _label_of
    if is_hugging_face(dataset):
        column = ColumnStore(dataset, places.column).column
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
    integers = [place for place, part in enumerate(parts) if is_integer(part)]
    if not integers:
        raise InputError("dataset: expected items with an integer label, (image, label, ...) or a dict; pass label_of")
    if integers[0] == 0 and len(integers) > 1 and not isinstance(item, Mapping):
        raise InputError(
            f"dataset: expected items that begin with an image, got integers in the places {integers}, the first "
            "perhaps an index; say which is the label, such as label_of=lambda item: item[2]"
        )
    return int(parts[integers[0]])


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
