"""A label file and features in, labels in the features' order and class numbers out, by the ids and names beside them.

`embed` writes given.csv (id, label, class) and classes.yaml beside features.npy. Ids and class names of other files are
compared with these, so that neither the order of rows nor that of classes has to be trusted.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from synth_refine._io.check import InputError
from synth_refine.images.listing import read_classes
from synth_refine.labels.files import LabelFile, read_label_file
from synth_refine.labels.refined import numbered_like


def read_beside(
    name: str, features: str | os.PathLike[str], path: str | os.PathLike[str], *, key: str | None = None
) -> LabelFile:
    """The labels of a file in the order of features, with the class names that their numbers stand for.

    Args:
        name: What the labels are called in messages.
        features: The file of features; what lies beside it says order and numbers.
        path: The label file, see `read_label_file`.
        key: As there.

    Raises:
        InputError: Other ids or other classes than those of the features.
    """
    found, folder = read_label_file(path, key=key), Path(features).parent
    table, names = folder / "given.csv", folder / "classes.yaml"
    if not table.is_file():
        return found
    own = read_label_file(table).ids
    if own is not None and found.ids is not None and own != found.ids:
        place = {one: row for row, one in enumerate(found.ids)}
        if set(place) != set(own):
            raise InputError(f"{name}: expected the ids of {table}, which belong to the features, got others")
        found = replace(found, labels=found.labels[[place[one] for one in own]], ids=own)
    if not names.is_file():
        return found
    classes = list(read_classes(names))
    check_classes(name, found.classes or (), classes, names)
    return replace(found, labels=numbered_like(found, classes), classes=classes, named=False)


def check_classes(name: str, found: list[str] | tuple[str, ...], known: list[str], place: object) -> None:
    """Refuse class names of which some are not known."""
    if missing := [one for one in found if one not in set(known)]:
        shown = ", ".join(map(repr, known[:5]))
        raise InputError(f"{name}: expected the classes {shown} of {place}, got {missing[0]!r}")
