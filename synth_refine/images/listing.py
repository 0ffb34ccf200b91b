"""Labelled images as all sources give them: ids, labels in [0, C), class names, and a reader of bytes.

Letters in shapes: N images, C classes.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synth_refine._io.check import InputError
from synth_refine._io.csv import check_unique
from synth_refine._io.order import natural_key
from synth_refine._io.untrusted import read_yaml
from synth_refine.images.decode import decode
from synth_refine.images.readers import Files, Reader

MOST_DIGITS = 6  # a longer number in a column of labels is no class
UNLABELLED = {"", "-1", "nan", "?"}  # what tables write where there is no label


@dataclass(frozen=True)
class Images:
    """Labelled images somewhere on disk.

    Attributes:
        ids: One per image, unique; the path relative to the source, where there is one.
        labels: The class of each, (N,) int64 in [0, C).
        classes: Names of the classes, C.
        read: Gives the bytes of a row.
        kind: folder, csv, huggingface, webdataset, parquet or cifake.
        notes: What was passed over, with counts, and names that look alike; for people.
    """

    ids: list[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    read: Reader = field(repr=False)
    kind: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse ids that no result could be written with."""
        for one in self.ids:
            if "\0" in one:
                raise InputError(f"images: expected names without zero bytes, got {one!r}")
            try:
                one.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"images: expected names in UTF-8, got {os.fsencode(one)!r}; rename it") from error

    def told(self, say: Callable[[str], object]) -> Images:
        """The same, after every note was said."""
        for note in self.notes:
            say(note)
        return self

    @property
    def folder(self) -> Path | None:
        """The folder in which every id is the path of a file; None where the images are no such files."""
        paths = self.read.paths if isinstance(self.read, Files) else []
        root = Path(str(paths[0]).removesuffix(self.ids[0])) if paths else Path()
        own = (path == root / one and not os.path.isabs(one) for path, one in zip(paths, self.ids, strict=bool(paths)))
        return root if paths and all(own) else None

    def image(self, row: int) -> Image.Image:
        """The decoded image of a row.

        Raises:
            InputError: It cannot be read or decoded.
        """
        return decode(self.read(row))


def named(
    texts: list[str], classes: Sequence[str] | None, place: object, ids: Sequence[str]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels from a column of names, or of numbers where the classes have other names; and the names of the classes.

    Raises:
        InputError: A row without a label, an unknown class, or numbers that could be names or positions.
    """
    for row, text in enumerate(texts):
        if text.strip().lower() in UNLABELLED and text not in (classes or ()):
            raise InputError(
                f"images: expected a label for every image in {place}, got {text!r} for {ids[row]!r}; "
                "leave such images out"
            )
    found = set(texts)
    numeric = all(text.isascii() and text.isdigit() for text in found)
    if numeric and (longest := max(found, key=len)) and len(longest) > MOST_DIGITS:
        raise InputError(f"images: expected labels of at most {MOST_DIGITS} digits in {place}, got {longest[:20]}")
    if classes is None:
        known = tuple(sorted(found, key=natural_key))
    else:
        known = tuple(classes)
        if numeric and all(int(text) < len(known) for text in found):
            if not found <= set(known):
                return np.array(list(map(int, texts)), dtype=np.int64), known
            if odd := [text for text in sorted(found, key=natural_key) if known[int(text)] != text]:
                raise InputError(
                    f"images: expected names of classes or their numbers in {place}, got {odd[0]}, which is the name "
                    f"of one class and the number of another, {known[int(odd[0])]!r}"
                )
    return numbers(texts, known, place), known


def numbers(names: Sequence[str], classes: Sequence[str], place: object) -> NDArray[np.int64]:
    """The number of each name in the list of classes, (N,)."""
    number = {name: label for label, name in enumerate(classes)}
    if unknown := sorted(set(names) - set(number), key=natural_key):
        shown, known = ", ".join(map(repr, unknown[:5])), ", ".join(classes[:10])
        raise InputError(f"images: expected the classes {known} in {place}, got {shown} too")
    return np.array([number[name] for name in names], dtype=np.int64)


def alike(classes: Sequence[str]) -> tuple[str, ...]:
    """A note where two classes differ in spaces, capitals or the way accents are written alone."""
    first: dict[str, str] = {}
    pairs = [
        (first[key], name)
        for name in classes
        if first.setdefault(key := unicodedata.normalize("NFKC", name).strip().casefold(), name) != name
    ]
    shown = ", ".join(f"{one!r} and {other!r}" for one, other in pairs[:5])
    return (f"classes that look alike: {shown}",) if pairs else ()


def read_classes(path: str | os.PathLike[str]) -> dict[str, str]:
    """The classes of a YAML file: each name, and what it is called in a prompt.

    Args:
        path: A list of names, or a mapping of names (of folders, of labels) to what prompts call them. The order is
            the order of the class numbers. Names are taken as they are written: 007 and no are names, too.

    Raises:
        InputError: No such file, or something else in it.
    """
    content = read_yaml("classes", path, text=True)
    pairs = [(one, one) for one in content] if isinstance(content, list) else content
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if not isinstance(pairs, list) or not pairs:
        raise InputError(f"classes: expected a list of names, or names with what prompts call them, in {path}")
    for name, text in pairs:
        for part in (name, text):
            if not isinstance(part, str) or not part.strip():
                raise InputError(f"classes: expected text in {path}, got {str(part)[:80]!r}")
    names = [name for name, _ in pairs]
    check_unique(f"classes in {path}", names)
    return dict(pairs)


def warn_of_prompts(classes: Mapping[str, str], say: Callable[[str], object]) -> None:
    """Say it where two classes have one prompt: their synthetic images show the same."""
    [(text, count)] = Counter(classes.values()).most_common(1) or [("", 0)]
    if count > 1:
        names = ", ".join(name for name, one in classes.items() if one == text)
        say(f"warning: the classes {names} have one prompt, {text!r}, so that no synthetic image tells them apart")
