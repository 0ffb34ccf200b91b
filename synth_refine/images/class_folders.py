"""Class names in, names of folders for them out, with a table that is kept beside the folders where the two differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from synth_refine._io.check import InputError
from synth_refine._io.csv import check_unique, csv_bytes, read_csv

TABLE = "class_folders.csv"
SYSTEM = {"@eaDir", "$RECYCLE.BIN", "__MACOSX", "System Volume Information", "lost+found", "Thumbs.db"}
"""What systems leave in folders, besides hidden files."""

MOST_BYTES = 255  # of a name, on almost every disk
KEPT_CHARACTERS = 40  # of a name that no folder can have; four bytes each at most


def is_system(name: str) -> bool:
    """Whether a scan passes over files and folders of this name."""
    return name.startswith(".") or name in SYSTEM


def can_be_folder(name: str) -> bool:
    """Whether a folder can have this name, so that its images stay inside and are found again."""
    inside = name and "/" not in name and "\0" not in name and not is_system(name)
    return bool(inside) and len(name.encode("utf-8", "surrogatepass")) <= MOST_BYTES


def folders_of(classes: Sequence[str]) -> dict[str, str]:
    """The name of a folder for each class: the class's own wherever a folder can have it.

    Example:
        >>> folders_of(["cat", "T - shirt / top", ".."])
        {'cat': 'cat', 'T - shirt / top': 'T - shirt _ top', '..': '_'}
    """
    fits = {name: can_be_folder(name) for name in classes}
    taken = {name for name in classes if fits[name]}
    found = {}
    for name in classes:
        plain = name if fits[name] else re.sub(r"[/\0]", "_", name.lstrip("."))[:KEPT_CHARACTERS] or "_"
        folder, number = plain, 1
        while not fits[name] and (folder in taken or not can_be_folder(folder)):
            number += 1
            folder = f"{plain}~{number}"
        taken.add(folder)
        found[name] = folder
    return found


def folder_table(folders: dict[str, str]) -> bytes | None:
    """The table to keep; None where every folder has the name of its class."""
    if all(name == folder for name, folder in folders.items()):
        return None
    return csv_bytes({"folder": folders.values(), "class": folders.keys()})


def class_by_folder(place: Path) -> dict[str, str]:
    """What the table in a folder says, empty where there is none.

    Raises:
        InputError: It is another table, or names a folder or a class twice.
    """
    if not (place / TABLE).exists():
        return {}
    found = read_csv("images", place / TABLE)
    if list(found) != ["folder", "class"]:
        raise InputError(f"images: expected the columns folder and class in {place / TABLE}, got {', '.join(found)}")
    for column, cells in found.items():
        check_unique(f"images: {column} in {place / TABLE}", cells)
    return dict(zip(found["folder"], found["class"], strict=True))
