"""The folder of an artifact: files and what run.json says of them in, the folder out, whole or not at all, and back."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from synth_refine import __version__
from synth_refine._io.atomic import file_hash, remove_unfinished, sync_folder, temporary_name
from synth_refine._io.error import InputError
from synth_refine._io.store import write_file
from synth_refine._io.untrusted import open_plain

FORMATS = (1, 2)  # with removed images it is 2, so that versions that know no removal refuse it
NAMES = ("labels.npy", "changes.csv", "ids.csv")
BESIDE = {"shards"}
"""What a refinement over shards keeps in the folder of its artifact."""


class Damaged(InputError):
    """An artifact whose files do not have the hashes that its run.json holds."""


def run_of(
    num_classes: int,
    given_hash: str,
    dtype: np.dtype[Any],
    count: int,
    labels_hash: str,
    changed: int,
    abstained: int,
    removed: int,
    settings: Mapping[str, object],
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    """What run.json says besides the hashes of files."""
    return {
        "format": FORMATS[removed > 0],
        "num_classes": num_classes,
        "given": {"sha256": given_hash, "dtype": dtype.str, "count": count},
        "labels": {"sha256": labels_hash, "changed": changed, "abstained": abstained}
        | ({"removed": removed} if removed else {}),
        "inputs": dict(inputs),
        "settings": dict(settings),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of the libraries that numbers depend on."""
    others = {name: metadata.version(name) for name in ("numpy", "torch")}
    return {"python": platform.python_version(), "synth-refine": __version__, **others}


def read_run(root: Path) -> dict[str, Any]:
    if not (root / "run.json").exists() and (root / "refined" / "run.json").exists():
        raise InputError(f"artifact: {root} is the result of a run; its artifact is {root / 'refined'}")
    if root.is_file():
        what = "; `synth-refine review` makes one of decisions" if root.suffix.lower() == ".csv" else ""
        raise InputError(f"artifact: expected the folder of one, got the file {root}{what}")
    with open_plain("artifact", root / "run.json") as file:
        data = file.read()
    try:
        run = json.loads(data)
        if not isinstance(run, dict) or run["format"] not in FORMATS:
            raise ValueError(f"it is of none of the formats {', '.join(map(str, FORMATS))}; is it of a later version?")
        if not {"labels.npy", "changes.csv"} <= set(run["files"]) <= set(NAMES):
            raise ValueError(f"it names the files {', '.join(run['files'])}")
        if not {"given", "labels", "inputs", "num_classes"} <= set(run):
            raise ValueError("an entry is missing")
        if not isinstance(run.get("settings", {}), dict) or not isinstance(run["inputs"], dict):
            raise ValueError("its settings or inputs are no entries by name")
        if np.dtype(run["given"]["dtype"]).kind not in "iu":
            raise ValueError(f"its labels are of type {str(run['given']['dtype'])[:40]}")
        if not all(isinstance(value, str) and len(value) == 64 and value.isalnum() for value in run["files"].values()):
            raise ValueError("a file has no hash")
        return run
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{root / 'run.json'} is damaged: {error}") from error


def write_files(root: Path, contents: Mapping[str, Callable[[BinaryIO], object]], run: Mapping[str, Any]) -> None:
    """Write the files of an artifact, however large, into a folder that is locked and free for them.

    Args:
        root: The folder.
        contents: What writes each of `NAMES`.
        run: As `Artifact.run`.
    """
    _settle(root)
    hashes = {}
    for name, write in contents.items():
        place = temporary_name(root / name)
        try:
            hashes[name] = write_file(place, write)
            os.replace(place, _staged(root, name, hashes[name]))
        finally:
            place.unlink(missing_ok=True)
    write_file(root / "run.json", (json.dumps({**run, "files": hashes}, indent=2, allow_nan=False) + "\n").encode())
    _settle(root)


def check_free(folder: str | os.PathLike[str], run: Mapping[str, Any] | None = None) -> None:
    """Refuse a folder of something else, or of another artifact, which alone can revert what it was applied to.

    Args:
        folder: Where an artifact is to be written.
        run: Its `Artifact.run`; None where that is not known yet.

    Raises:
        InputError: As said; the message names what differs.
    """
    root = Path(folder)
    if not (root / "run.json").exists():
        found = (path.name for path in sorted(root.glob("[!.]*")) if path.name not in BESIDE)
        if (other := next(found, None)) is not None:
            raise InputError(f"folder: expected an artifact or an empty folder, but {root} holds {other}")
        return
    if run is None:
        return
    there = read_run(root)
    for name in sorted((run.keys() | there.keys()) - {"versions", "files"}):
        if json.dumps(there.get(name), sort_keys=True) != json.dumps(run.get(name), sort_keys=True):
            raise InputError(
                f"folder: expected the same artifact as in {root}, got other {name}; without that one, what it was "
                "applied to cannot be reverted: choose another folder"
            )


def _staged(root: Path, name: str, digest: str) -> Path:
    return root / f".{digest}.{name}"


def find_file(root: Path, name: str, digest: str) -> Path:
    # First the name with the hash: a rename in between can only move the file on to the other one.
    for path in (_staged(root, name, digest), root / name):
        if path.is_file() and file_hash(path) == digest:
            return path
    raise Damaged(f"{root / name} is not the file that run.json describes: it was changed, swapped or lost")


def _settle(root: Path) -> None:
    """Finish what an interrupted write had decided, and remove what it had not; only names of our own are touched."""
    files = read_run(root)["files"] if (root / "run.json").exists() else {}
    for name, digest in files.items():
        if _staged(root, name, digest).exists():
            os.replace(_staged(root, name, digest), root / name)
    sync_folder(root)
    for path in root.glob(".*"):
        if re.fullmatch(rf"\.[0-9a-f]{{64}}\.({'|'.join(map(re.escape, NAMES))})", path.name):
            path.unlink()
    remove_unfinished(root)
