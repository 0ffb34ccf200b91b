"""Settings and finished files in, a folder that a killed run resumes out.

    settings.json     what the files depend on; a folder that was begun with others is refused by their name
    manifest.jsonl    a line per file with its SHA-256 and what is known of it, written last
    .journal-*.jsonl  the same lines while work is under way, one journal per process

Each line has a checksum of its own, so that a damaged line costs the work on its file and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from synth_refine._io.atomic import file_hash, locked, make_folder, remove_unfinished, write_atomic
from synth_refine._io.error import InputError

Entry = dict[str, Any]


class Store:
    """The files of one folder; see `open_store`.

    Attributes:
        root: The folder.
        entries: What is known of every finished file, by its name; `sha256` is None for what has no file.
    """

    def __init__(self, root: Path, part: int) -> None:
        """A store of what lies in `root`, whose lines go into the journal of this number."""
        self.root, self.part = root, part
        self.entries: dict[str, Entry] = {}
        self._listed: set[str] = set()  # names that a line of the manifest or of a journal has
        self._load()

    def done(self, name: str) -> Entry | None:
        """The entry of a finished file whose bytes are those that were written; None means that it is to be made."""
        entry = self.entries.get(name)
        if entry is None or entry["sha256"] is None:
            return entry
        path = self.root / name
        return entry if path.is_file() and file_hash(path) == entry["sha256"] else None

    def put(self, name: str, content: bytes | Callable[[BinaryIO], object], **entry: Any) -> Entry:
        """Write a file, whole or not at all, and list it with what `entry` says of it."""
        return self.note(name, write_file(self.root / name, content), **entry)

    def note(self, name: str, sha256: str | None, **entry: Any) -> Entry:
        """List a file that another process has written, or None for something that has no file."""
        self.entries[name] = {**entry, "sha256": sha256}
        self._append(_line(name, self.entries[name]))
        return self.entries[name]

    def drop(self, names: Sequence[str]) -> None:
        """Remove files of this store, finished or not."""
        for name in names:
            if self.entries.pop(name, None) is not None:
                self._append(_line(name, {"dropped": True}))
            (self.root / name).unlink(missing_ok=True)

    def remove_unfinished(self) -> None:
        """Remove what killed processes left half written."""
        remove_unfinished(self.root)

    def finish(self, names: Sequence[str] | None = None) -> None:
        """Write the manifest, in the order of `names` or sorted, with the entries of all processes."""
        self._load()
        data = b"".join(_line(name, self.entries[name]) for name in (sorted(self.entries) if names is None else names))
        manifest = self.root / "manifest.jsonl"
        if not manifest.exists() or manifest.read_bytes() != data:
            write_file(manifest, data)
        self.remove_unfinished()
        for journal in self._journals():
            journal.unlink()

    def compact(self) -> None:
        """Bring all journals into one, without the half lines of killed processes."""
        if journals := self._journals():
            dropped = sorted(self._listed - self.entries.keys())
            lines = [*self.entries.items(), *((name, {"dropped": True}) for name in dropped)]
            write_file(self.root / ".journal-0.jsonl", b"".join(_line(*one) for one in lines))
            for journal in journals[1:] if journals[0].name == ".journal-0.jsonl" else journals:
                journal.unlink()

    def _journals(self) -> list[Path]:
        return sorted(self.root.glob(".journal-*.jsonl"))

    def _load(self) -> None:
        self.entries.clear()
        for path in (self.root / "manifest.jsonl", *self._journals()):
            for line in path.read_bytes().split(b"\n") if path.exists() else ():
                content = _checked(line)
                if content is not None and isinstance(name := content.pop("file", None), str):
                    self._listed.add(name)
                    if content.pop("dropped", False):
                        self.entries.pop(name, None)
                    else:
                        self.entries[name] = content

    def _append(self, line: bytes) -> None:
        with open(self.root / f".journal-{self.part}.jsonl", "ab", buffering=0) as journal:
            journal.write(line)
            os.fsync(journal.fileno())


@contextmanager
def open_store(
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    resumable: frozenset[str] = frozenset(),
    name: str = "out",
    wait: bool = False,
    part: int = 0,
) -> Iterator[Store]:
    """Open a store, or begin one in a new or empty folder, and keep other processes out of it.

    Args:
        folder: Its folder; made if it is missing. Hidden files in it are no hindrance and stay.
        settings: All that the files depend on, as JSON takes it.
        resumable: Names of settings that may differ from those that the folder was begun with.
        name: The argument that `folder` came as; it begins every message.
        wait: Wait for a process that has it open instead of raising an error.
        part: Number of this process where several fill one store: only the first, 0, locks and begins it.

    Raises:
        InputError: The folder was begun with other settings, or holds something else.
        BlockingIOError: Another process has it open.
    """
    root = make_folder(name, folder)
    if part:
        yield Store(root, part)
        return
    with locked(root, wait=wait):
        _begin(root, dict(settings), resumable, name)
        remove_unfinished(root)
        store = Store(root, part)
        store.compact()
        yield store


def write_file(path: Path, content: bytes | Callable[[BinaryIO], object]) -> str:
    """Write a file whole or not at all; the SHA-256 of its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(path, clean=False) as file:
        if callable(content):
            content(file)
        else:
            file.write(content)
        file.flush()
        return file_hash(file.name) if callable(content) else hashlib.sha256(content).hexdigest()


def _begin(root: Path, settings: dict[str, Any], resumable: frozenset[str], name: str) -> None:
    """Write the settings down, or refuse those of another run."""
    check_settings(root, settings, resumable, name)
    if not (root / "settings.json").exists():
        write_file(root / "settings.json", _line("settings.json", {"settings": settings}))


def check_settings(root: Path, settings: Mapping[str, Any], resumable: frozenset[str], name: str) -> None:
    """Refuse a folder that was begun with other settings, or holds something else; nothing is written.

    Raises:
        InputError: As said; the message names what differs.
    """
    place = root / "settings.json"
    if not place.exists():
        found = sorted(root.iterdir()) if root.is_dir() else []
        if other := next((path.name for path in found if not path.name.startswith(".")), None):
            raise InputError(f"{name}: expected a new or empty folder, but {root} holds {other}; take another folder")
        return
    for key, (old, new) in differing(root, settings, name).items():
        if key not in resumable:
            raise InputError(
                f"{name}: expected the settings that {root} was begun with, got "
                f"{'other' if key.endswith('s') else 'another'} {key}: {new[:80]} for "
                f"{old[:80]}; take another folder, or delete that one to start afresh"
            )


def differing(root: Path, settings: Mapping[str, Any], name: str) -> dict[str, tuple[str, str]]:
    """The settings in which a folder was begun otherwise, as JSON before and now; none where it was not begun."""
    place = root / "settings.json"
    if not place.exists():
        return {}
    before = (_checked(place.read_bytes()) or {}).get("settings")
    if not isinstance(before, dict):
        raise InputError(f"{name}: {place} is damaged; take another folder, or delete that one to start afresh")
    keys = [*settings, *(before.keys() - settings)]
    pairs = {key: (json.dumps(before.get(key)), json.dumps(settings.get(key))) for key in keys}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}  # as text: the order of classes counts


def _line(name: str, content: Mapping[str, Any]) -> bytes:
    text = json.dumps({"file": name, **content})
    return f'{text[:-1]}, "check": "{_check(text)}"}}\n'.encode()


def _check(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checked(line: bytes) -> dict[str, Any] | None:
    """The content of a line, None where it is not what was written."""
    try:
        content = json.loads(line)
        check = content.pop("check")
        return content if check == _check(json.dumps(content)) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
