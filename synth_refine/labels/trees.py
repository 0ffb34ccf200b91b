"""An artifact and a folder per class or a .csv table in, a new one beside it out; nothing old is changed.

An image goes into the folder of its refined class under the name that it has. Where another image has or had that name,
"~" and its old class are added. So an artifact alone says where every image is, and the way back needs no notes.

Images that a person removed are not in the new folder. They go to the folder NAME.removed beside it, from which the way
back takes them, and which can be deleted. A table keeps all its rows; NAME.kept.npy beside it lists those to train on.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import unicodedata
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np

from synth_refine._io.atomic import TEMPORARY, file_hash, locked, sync_folder, write_atomic
from synth_refine._io.check import InputError
from synth_refine._io.csv import check_unique, read_csv
from synth_refine._io.error import WrongBase, WrongIds
from synth_refine.images.class_folders import MOST_BYTES, can_be_folder, class_by_folder
from synth_refine.images.hashes import content_hashes, image_table
from synth_refine.images.sources import open_images
from synth_refine.labels.artifact import Artifact, record
from synth_refine.labels.cells import with_column
from synth_refine.labels.kept import write_kept


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
            that are no images stay where they are. Removed images go to the folder `out`.removed instead. A table goes
            beside the old one, since the paths in it are relative, and only cells of the column `label` differ. Images
            that could not be scored keep their place whatever is in them now, and may be missing.
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
        source: What `apply_tree` wrote; the removed images are taken from `source`.removed.
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


def new_places(artifact: Artifact, folders: Sequence[str] | None = None) -> list[str]:
    """Where every image of a folder per class goes, relative to the new folder, in the order of the ids.

    A removed image has the place that it had, and no other image takes it.

    Names that differ by case or by the composition of accents alone count as the same, as they do on many disks.

    Args:
        artifact: What changed.
        folders: The folder of each class, (C,); by default it has the name of the class.
    """
    ids, folders = _ids(artifact), _classes(artifact) if folders is None else folders
    if bad := [name for name in folders if not can_be_folder(name)]:
        raise InputError(f"artifact: expected classes with names that a folder can have, got {bad[0][:80]!r}")
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
        rest = PurePosixPath(folders[artifact.labels[row]], *path.parts[1:])
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
    aside = (old if undo else new).absolute()
    aside = aside.with_name(f"{aside.name}.removed")
    places, removed = _found(artifact, old, undo=undo, aside=aside)
    moves = {old / here: there for here, there in places.items()}
    gone = {(aside if undo else old) / one: one for one in removed}
    # Notes and files of other kinds stay where they are.
    others = [path for path in sorted(old.rglob("*")) if path.is_file() and path not in moves and path not in gone]
    moves |= {path: path.relative_to(old).as_posix() for path in others} | (gone if undo else {})
    if len(set(moves.values())) < len(moves):
        raise InputError(f"images: expected names that are free in {old}, but a file is where an image has to go")
    folders = [name for name in _folders(artifact, old) if (old / name).is_dir() or (undo and (aside / name).is_dir())]
    ready = not undo and bool(gone) and _holds(aside, gone)
    if not dry_run:
        if gone and not undo and not ready:
            _copy(aside, gone, [], link)
        _copy(new, moves, folders, link)
    return new


def _found(artifact: Artifact, old: Path, *, undo: bool, aside: Path | None = None) -> tuple[dict[str, str], list[str]]:
    """Where each image of a folder goes, and those that are removed or, with `undo`, brought back from `aside`.

    Checks that the images are those of the artifact, as before `apply` or, with `undo`, as after it. Without `aside`
    nobody asks for the removed ones.
    """
    ids, classes = _ids(artifact), _classes(artifact)
    found = open_images(old, classes) if old.is_dir() else None
    if found is None or {found.kind, artifact.run["settings"].get("source", "folder")} != {"folder"}:
        raise InputError(f"images: expected the folder per class or the .csv that was refined, got {old}")
    before, after = ids, new_places(artifact, _folders(artifact, old))
    if undo:
        before, after = after, before
    there, unscored = set(found.ids), _unscored(artifact)
    gone = {ids[row]: row for row in artifact.removed.tolist()}
    expected, other = set(before), set(after)
    if undo:
        expected -= set(gone)
    else:
        other -= set(gone)
    if there != expected and there == other:
        raise WrongIds(
            f"images: expected them where apply puts them, but {old} holds them as given: not applied yet?"
            if undo
            else f"images: expected them as given, but {old} holds them where apply puts them: already applied?"
        )
    if undo and (lost := sorted(expected - there - unscored)):
        raise WrongIds(f"images: expected every image of {old} where apply puts it, got none at {lost[0]}")
    back = dict(zip(before, ids, strict=True))
    names, labels, hashes = [back.get(one, one) for one in found.ids], found.labels, content_hashes(found)
    removed = [] if undo else [one for one in gone if one in there]
    if undo and aside is not None:
        removed = [one for one in gone if one not in unscored or (aside / one).is_file()]
        if lost := [one for one in removed if not (aside / one).is_file()]:
            raise InputError(f"images: expected the {len(gone)} removed ones in {aside}, got no {lost[0]}")
        names += removed
        labels = np.concatenate([labels, artifact.given[[gone[one] for one in removed]]])
        hashes += [file_hash(aside / one) for one in removed]
    absent = unscored if not undo or aside is not None else unscored | set(gone)
    part = _without(artifact, absent - set(names))
    part.rows_of(names)  # says which images are too many before it is said that their number is wrong
    _ = part.revert(labels, names) if undo else part.apply(labels, names)
    if absent <= unscored:  # or else the hash of all of them is not to be had
        _check_contents(artifact, dict(zip(names, hashes, strict=True)))
    return {here: to for here, to in zip(before, after, strict=True) if here in there and here not in removed}, removed


def _holds(folder: Path, files: dict[Path, str]) -> bool:
    """Whether a folder has these files, as a killed run leaves it; a folder of anything else is an error."""
    if not os.path.lexists(folder):
        return False
    there = {path for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else set()
    wanted = {folder / place: path for path, place in files.items()}
    if there != set(wanted) or any(file_hash(path) != file_hash(wanted[path]) for path in there):
        raise InputError(f"out: expected {folder} to be free for the removed images, but it holds something else")
    return True


def _unscored(artifact: Artifact) -> set[str]:
    """Images without features when they were refined: they may have been mended or taken away since."""
    found = artifact.run["settings"].get("unscored", ())
    return {one for one in found if isinstance(one, str)} if isinstance(found, list) else set()


def _without(artifact: Artifact, gone: set[str]) -> Artifact:
    """An artifact of the other images alone."""
    rows = [row for row, one in enumerate(artifact.names) if one not in gone]
    return record(artifact.given[rows], artifact.labels[rows], ids=[artifact.names[row] for row in rows])


def _check_contents(artifact: Artifact, hashes: dict[str, str]) -> None:
    """Refuse images that have changed since they were refined, where the artifact knows their hashes."""
    inputs = artifact.run["inputs"]
    known = str(inputs.get("scored_images", inputs.get("images", "")))  # the latter in artifacts of earlier versions
    if not re.fullmatch("[0-9a-f]{64}", known):
        return
    unscored = _unscored(artifact)
    rows = [row for row, one in enumerate(artifact.names) if one not in unscored]
    ids = [artifact.names[row] for row in rows]
    labels = [_classes(artifact)[artifact.given[row]] for row in rows]
    if hashlib.sha256(image_table(ids, labels, [hashes[one] for one in ids])).hexdigest() != known:
        raise WrongBase("images: expected the files that were refined, got some of another content, by their SHA-256")


def _copy(new: Path, moves: dict[Path, str], folders: list[str], link: bool) -> None:
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
                    os.link(os.path.realpath(here), target)  # of the file, where a symbolic link leads to it
                else:
                    shutil.copy2(here, target)
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
    if not undo:
        write_kept(new, artifact.action[artifact.rows_of(found.ids)] != "remove", dry_run=dry_run)
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
    check_unique("artifact's classes", names)
    return names


def _folders(artifact: Artifact, root: Path) -> list[str]:
    """The folder of each class, (C,): what the table in `root` says, else the name of the class."""
    folder_of = {name: folder for folder, name in class_by_folder(root).items()}
    folders = [folder_of.get(name, name) for name in _classes(artifact)]
    check_unique(f"folders of classes in {root}", folders)
    return folders
