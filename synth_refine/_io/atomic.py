"""Write files whole or not at all, lock folders, hash files."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from synth_refine._io.check import InputError


@contextmanager
def write_atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file whole or not at all: after a crash at any moment the old content or the new one is there.

    The content goes to a temporary file in the same folder and onto the disk, and then takes the target's name. An
    exception inside the block leaves the target as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with write_atomic(Path(folder, "record.json")) as file:
        ...         _ = file.write(b"{}")
        ...     Path(folder, "record.json").read_text()
        '{}'
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"path: expected a file to write, got a folder: {target}")
    if not target.parent.is_dir():
        raise InputError(f"path: expected an existing folder {target.parent} to write {target.name} into, got none")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def check_folder(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse a place for a folder where a file is in the way.

    Raises:
        InputError: The place itself, or one above it, is something else than a folder.
    """
    place = Path(path).absolute()
    there = next((one for one in (place, *place.parents) if os.path.lexists(one)), place)
    if os.path.lexists(there) and not there.is_dir():
        raise InputError(f"{name}: expected a folder, got {'a file' if there.is_file() else 'no folder'}: {there}")


def make_folder(name: str, path: str | os.PathLike[str]) -> Path:
    """The folder, made if it is missing, with those above it; see `check_folder`."""
    check_folder(name, path)
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Remove what killed calls of `write_atomic` left in a folder of ours and the folders in it."""
    for path in Path(folder).rglob(".*.tmp"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", path.name) and path.is_file() and not path.is_symlink():
            path.unlink()


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other writers out of a folder; the lock goes with the process that holds it.

    Raises:
        BlockingIOError: Another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process is writing to this folder", str(folder)) from error
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Put a folder's entries onto the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
