"""Write files whole or not at all, lock folders, hash files."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from synth_refine._io.error import InputError

try:
    import fcntl
except ImportError as error:
    raise ImportError("files are written with locks of Linux and macOS: on Windows use WSL") from error

TEMPORARY = ".synth-refine.tmp"
_held: set[int] = set()  # descriptors of locks


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)  # or decoding workers would hold the lock of a run that was killed


def _lock(descriptor: int, wait: bool = False) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def write_atomic(path: str | os.PathLike[str], *, clean: bool = True) -> Iterator[BinaryIO]:
    """Write a file whole or not at all: after a crash at any moment the old content or the new one is there.

    The content goes to a temporary file in the same folder and onto the disk, and then takes the target's name. An
    exception inside the block leaves the target as it was. What a killed write of the same file left behind is removed
    first, unless `clean` is False, for folders that are cleaned as a whole.

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
    if clean:
        remove_unfinished(target.parent, _kind(target))
    temporary = temporary_name(target)
    try:
        with open(temporary, "xb") as file:
            _lock(file.fileno(), wait=True)  # so that nobody takes it for the rest of a killed write
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def temporary_name(target: Path) -> Path:
    """A new name beside a file, which `remove_unfinished` knows as ours."""
    return target.with_name(f".{_kind(target)}-{uuid.uuid4().hex}{TEMPORARY}")


def _kind(target: Path) -> str:
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]  # a name may be as long as the system allows


def remove_unfinished(folder: str | os.PathLike[str], kind: str | None = None) -> None:
    """Remove what killed calls of `write_atomic` left in a folder and those in it, or in the folder for one file."""
    paths = Path(folder).glob(f".{kind}-*{TEMPORARY}") if kind else Path(folder).rglob(f".*{TEMPORARY}")
    for path in paths:
        if re.fullmatch(r"\.[0-9a-f]{16}-[0-9a-f]{32}", path.name.removesuffix(TEMPORARY)) and path.is_file():
            with suppress(OSError), open(path, "rb") as file:
                _lock(file.fileno())
                path.unlink(missing_ok=True)


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


@contextmanager
def locked(folder: str | os.PathLike[str], *, wait: bool = False) -> Iterator[None]:
    """Keep other writers out of a folder; the lock goes with the process that holds it.

    Raises:
        BlockingIOError: Another process holds it, and `wait` is False.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        try:
            _lock(descriptor, wait)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process is writing to this folder", str(folder)) from error
        yield
    finally:
        if descriptor in _held:
            _held.discard(descriptor)
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
