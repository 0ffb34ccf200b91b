"""An artifact and a folder per class or a .csv table in, a new one beside it out; nothing old is changed.

An image goes into the folder of its refined class under the name that it has. Where another image has or had that name,
"~" and its old class are added. So an artifact alone says where every image is, and the way back needs no notes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath

from synth_refine._io.atomic import sync_folder, write_atomic
from synth_refine._io.check import InputError, check_folder_name
from synth_refine._io.csv import check_unique, csv_bytes, read_csv
from synth_refine.images.sources import open_images
from synth_refine.labels.artifact import Artifact


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
        out: The folder or the table to write, which must not exist. It appears whole or not at all. Of a folder, only
            the images are in it. A table goes beside the old one, since the paths in it are relative.
        link: Hard links instead of copies; whoever edits such a file in place then edits both.
        dry_run: Check everything, write nothing.

    Returns:
        `out`.

    Raises:
        WrongBase: Images have other labels, that is folders, than those that were refined.
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


def new_places(artifact: Artifact) -> list[str]:
    """Where every image of a folder per class goes, relative to the new folder, in the order of the ids."""
    ids, classes = _ids(artifact), _classes(artifact)
    changed = set(artifact.changed.tolist())
    taken = set(ids)
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
        while place in taken:
            mark += f"~{path.parts[0]}"
            place = str(rest.with_name(f"{rest.stem}{mark}{rest.suffix}"))
        taken.add(place)
        places.append(place)
    return places


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
    if old.is_file() and old.suffix == ".csv":
        return _write_table(artifact, old, new, dry_run, undo)
    ids, classes = _ids(artifact), _classes(artifact)
    found = open_images(old, classes) if old.is_dir() else None
    if found is None or {found.kind, artifact.run["settings"].get("source", "folder")} != {"folder"}:
        raise InputError(f"images: expected the folder per class or the .csv that was refined, got {old}")
    if new.resolve().is_relative_to(old.resolve()):
        raise InputError(f"out: expected a folder outside {old}, got {new}")
    before, after = ids, new_places(artifact)
    if undo:
        before, after = after, before
    back = dict(zip(before, ids, strict=True))
    names = [back.get(one, one) for one in found.ids]
    artifact.rows_of(names)  # says which images are too many before it is said that their number is wrong
    _ = artifact.revert(found.labels, names) if undo else artifact.apply(found.labels, names)
    if dry_run:
        return new
    partial = new.with_name(f".{new.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of a run that was killed
    for here, there in zip(before, after, strict=True):
        target = partial / there
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            os.link(os.path.realpath(old / here), target)  # of the image, where a symbolic link leads to it
        else:
            shutil.copy2(old / here, target)
    for name in classes:
        if (old / name).is_dir():
            (partial / name).mkdir(exist_ok=True)  # a class that lost all its images
    os.sync()  # the files before the name that says that they are there
    os.rename(partial, new)
    sync_folder(new.absolute().parent)
    return new


def _write_table(artifact: Artifact, old: Path, new: Path, dry_run: bool, undo: bool) -> Path:
    if new.suffix != ".csv" or new.absolute().parent != old.absolute().parent:
        raise InputError(f"out: expected a .csv beside {old}, whose paths are relative, got {new}")
    classes = _classes(artifact)
    found = open_images(old, classes)
    labels = artifact.revert(found.labels, found.ids) if undo else artifact.apply(found.labels, found.ids)
    table = read_csv("images", old)
    numeric = not set(table["label"]) <= set(classes)
    table["label"] = [
        text if before == after else str(after) if numeric else classes[after]
        for text, before, after in zip(table["label"], found.labels.tolist(), labels.tolist(), strict=True)
    ]
    if not dry_run:
        with write_atomic(new) as file:
            file.write(csv_bytes(table))
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
