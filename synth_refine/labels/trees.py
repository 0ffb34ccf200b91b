"""An artifact and a folder per class or a .csv table in, a new one beside it out; nothing old is changed.

An image goes into the folder of its refined class under the name that it has. Where another image has or had that name,
"~" and its old class are added. So an artifact alone says where every image is, and the way back needs no notes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import unicodedata
import uuid
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from synth_refine._io.atomic import TEMPORARY, locked, sync_folder, write_atomic
from synth_refine._io.check import InputError, check_folder_name
from synth_refine._io.csv import check_unique, csv_bytes, read_csv
from synth_refine._io.error import WrongBase, WrongIds
from synth_refine.images.hashes import content_hashes
from synth_refine.images.listing import Images
from synth_refine.images.sources import open_images
from synth_refine.labels.artifact import Artifact
from synth_refine.labels.cells import with_column

MOST_BYTES = 255  # of a name, on almost every disk


def apply_tree(
    artifact: Artifact,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    link: bool = False,
    dry_run: bool = False,
) -> Path:
    """Write the images of a folder per class, or the rows of a .csv table, with their refined labels.

    Args:
        artifact: From `synth_refine.pipeline.run`, or with ids and class names in its settings, or what the
            decisions of people left of one.
        source: The folder or the table that was refined.
        out: The folder or the table to write, which must not exist. It appears whole or not at all. Files of a folder
            that are no images stay where they are. A table goes beside the old one, since the paths in it are relative,
            and only cells of the column `label` differ.
        link: Hard links instead of copies; whoever edits such a file in place then edits both.
        dry_run: Check everything, write nothing.

    Returns:
        `out`.

    Raises:
        WrongBase: Images have other labels, that is folders, than those that were refined, or another content.
        WrongIds: Other images than those that were refined.
        InputError: Another kind of source, or `out` exists.
        OSError: `out` cannot be written.
    """
    return _write(artifact, source, out, link=link, dry_run=dry_run, undo=False)


def revert_tree(
    artifact: Artifact,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    link: bool = False,
    dry_run: bool = False,
) -> Path:
    """Write what `apply_tree` was given from what it wrote: the same names with the same bytes.

    Args:
        artifact: The one that was applied.
        source: What `apply_tree` wrote.
        out: As there.
        link: As there.
        dry_run: As there.

    Raises:
        As `apply_tree`.
    """
    return _write(artifact, source, out, link=link, dry_run=dry_run, undo=True)


def verify_tree(artifact: Artifact, source: str | os.PathLike[str]) -> None:
    """Check that a folder per class or a .csv table is what `apply_tree` writes: each image, its place and its bytes.

    Raises:
        WrongBase: Images with other labels than the refined ones, or another content.
        WrongIds: Other images.
        InputError: Another kind of source.
    """
    old = Path(source)
    if old.is_file() and old.suffix.lower() == ".csv":
        found = open_images(old, _classes(artifact))
        artifact.revert(found.labels, found.ids)
    else:
        _found(artifact, old, undo=True)


def new_places(artifact: Artifact) -> list[str]:
    """Where every image of a folder per class goes, relative to the new folder, in the order of the ids.

    Names that differ by case or by the composition of accents alone count as the same, as they do on many disks.
    """
    ids, classes = _ids(artifact), _classes(artifact)
    changed = set(artifact.changed.tolist())
    taken = set(map(_folded, ids))
    places = []
    for row, one in enumerate(ids):
        path = PurePosixPath(one)
        if path.is_absolute() or ".." in path.parts or len(path.parts) < 2 or str(path) != one:
            raise InputError(f"artifact: expected ids such as class/name.jpg, got {one!r}")
        if row not in changed:
            places.append(one)
            continue
        rest = PurePosixPath(classes[artifact.labels[row]], *path.parts[1:])
        place, mark = str(rest), ""
        while _folded(place) in taken:
            mark += f"~{path.parts[0]}"
            place = str(rest.with_name(f"{rest.stem}{mark}{rest.suffix}"))
        if any(len(os.fsencode(part)) > MOST_BYTES for part in PurePosixPath(place).parts):
            raise InputError(f"artifact: expected names of at most {MOST_BYTES} bytes, but {one} would become {place}")
        taken.add(_folded(place))
        places.append(place)
    return places


def _folded(name: str) -> str:
    return name if name.isascii() and name.islower() else unicodedata.normalize("NFC", name).casefold()


def _write(
    artifact: Artifact,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    link: bool,
    dry_run: bool,
    undo: bool,
) -> Path:
    old, new = Path(source), Path(out)
    if os.path.lexists(new):
        raise InputError(f"out: expected a new name, but {new} exists; what is there is never changed")
    if not new.absolute().parent.is_dir():
        raise InputError(f"out: expected an existing folder {new.parent} to write {new.name} into, got none")
    if old.is_file() and old.suffix.lower() == ".csv":
        return _write_table(artifact, old, new, dry_run, undo)
    if new.resolve().is_relative_to(old.resolve()):
        raise InputError(f"out: expected a folder outside {old}, got {new}")
    moves = _found(artifact, old, undo=undo)
    others = [path.relative_to(old).as_posix() for path in sorted(old.rglob("*")) if path.is_file()]
    moves |= {one: one for one in others if one not in moves}  # notes, files of other kinds: they stay where they are
    if len(set(moves.values())) < len(moves):
        raise InputError(f"images: expected names that are free in {old}, but a file is where an image has to go")
    if not dry_run:
        _copy(old, new, moves, [name for name in _classes(artifact) if (old / name).is_dir()], link)
    return new


def _found(artifact: Artifact, old: Path, *, undo: bool) -> dict[str, str]:
    """Where each image of a folder goes, checked that they are those of the artifact, before or after `apply`."""
    ids, classes = _ids(artifact), _classes(artifact)
    found = open_images(old, classes) if old.is_dir() else None
    if found is None or {found.kind, artifact.run["settings"].get("source", "folder")} != {"folder"}:
        raise InputError(f"images: expected the folder per class or the .csv that was refined, got {old}")
    before, after = ids, new_places(artifact)
    if undo:
        before, after = after, before
    there = set(found.ids)
    if there != set(before) and there == set(after):
        raise WrongBase(
            f"images: expected them where apply puts them, but {old} holds them as given: not applied yet?"
            if undo
            else f"images: expected them as given, but {old} holds them where apply puts them: already applied?"
        )
    if undo and there != set(before) and (lost := sorted(set(before) - there)):
        raise WrongIds(f"images: expected every image of {old} where apply puts it, got none at {lost[0]}")
    back = dict(zip(before, ids, strict=True))
    names = [back.get(one, one) for one in found.ids]
    rows = artifact.rows_of(names)  # says which images are too many before it is said that their number is wrong
    _ = artifact.revert(found.labels, names) if undo else artifact.apply(found.labels, names)
    _check_contents(artifact, found, rows)
    return dict(zip(before, after, strict=True))


def _check_contents(artifact: Artifact, found: Images, rows: NDArray[np.int64]) -> None:
    """Refuse images that have changed since they were refined, where the artifact knows their hashes."""
    known = artifact.run["inputs"].get("images", "")
    if not re.fullmatch("[0-9a-f]{64}", known):
        return
    hashes = np.empty(len(rows), dtype=object)
    hashes[rows] = content_hashes(found)
    labels = [_classes(artifact)[label] for label in artifact.given.tolist()]
    table = csv_bytes({"id": artifact.names, "label": labels, "sha256": hashes.tolist()})
    if hashlib.sha256(table).hexdigest() != known:
        raise WrongBase("images: expected the files that were refined, got some of another content, by their SHA-256")


def _copy(old: Path, new: Path, moves: dict[str, str], folders: list[str], link: bool) -> None:
    """Copy or link files and make folders under a name that nothing has, then give the whole its name."""
    parent = new.absolute().parent
    kind = hashlib.sha256(os.fsencode(new.name)).hexdigest()[:16]
    for path in parent.glob(f".{kind}-*{TEMPORARY}"):
        if re.fullmatch(r"\.[0-9a-f]{16}-[0-9a-f]{32}", path.name.removesuffix(TEMPORARY)) and path.is_dir():
            with suppress(OSError), locked(path):  # or else it belongs to a process that runs
                shutil.rmtree(path)
    partial = parent / f".{kind}-{uuid.uuid4().hex}{TEMPORARY}"
    partial.mkdir()
    try:
        with locked(partial):
            for here, there in moves.items():
                target = partial / there
                target.parent.mkdir(parents=True, exist_ok=True)
                if link:
                    os.link(os.path.realpath(old / here), target)  # of the file, where a symbolic link leads to it
                else:
                    shutil.copy2(old / here, target)
            for name in folders:
                (partial / name).mkdir(exist_ok=True)  # a class that lost all its images
            os.sync()  # the files before the name that says that they are there
            if os.path.lexists(new):
                raise InputError(f"out: expected a new name, but {new} was made meanwhile")
            os.rename(partial, new)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(parent)


def _write_table(artifact: Artifact, old: Path, new: Path, dry_run: bool, undo: bool) -> Path:
    if new.suffix.lower() != ".csv" or new.absolute().parent != old.absolute().parent:
        raise InputError(f"out: expected a .csv beside {old}, whose paths are relative, got {new}")
    classes = _classes(artifact)
    found = open_images(old, classes)
    labels = artifact.revert(found.labels, found.ids) if undo else artifact.apply(found.labels, found.ids)
    texts = read_csv("images", old)["label"]
    numeric = not set(texts) <= set(classes)
    texts = [
        text if before == after else str(after) if numeric else classes[after]
        for text, before, after in zip(texts, found.labels.tolist(), labels.tolist(), strict=True)
    ]
    data = with_column(old.read_bytes(), "label", texts)
    if not dry_run:
        with write_atomic(new) as file:
            file.write(data)
    return new


def _ids(artifact: Artifact) -> list[str]:
    if artifact.ids is None:
        raise InputError(
            "artifact: expected one with ids, of `run`, or of `refine` with the given.csv that `embed` wrote, got row "
            "numbers; use it on the label file instead of the images"
        )
    return artifact.ids


def _classes(artifact: Artifact) -> list[str]:
    classes = artifact.run["settings"].get("classes")
    if not isinstance(classes, list) or len(classes) != artifact.num_classes:
        raise InputError(
            "artifact: expected one with class names, of `run`, or of `refine` with the classes.yaml that `embed` "
            "wrote as --classes, got none; use it on the label file instead of the images"
        )
    names = [str(name) for name in classes]
    for name in names:
        check_folder_name("artifact", name)
    check_unique("artifact's classes", names)
    return names
