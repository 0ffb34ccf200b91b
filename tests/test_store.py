"""The store that every long job resumes from: killed at any moment, damaged, opened twice, with other settings."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from kills import content, in_child, kill_matrix

from synth_refine import InputError
from synth_refine._io.atomic import remove_unfinished, write_atomic
from synth_refine._io.store import open_store, write_file

SETTINGS = {"seed": 1, "classes": {"cat": "tabby", "dog": "dog"}}
NAMES = [f"shards/{number}.bin" for number in range(4)]


def work(folder: Path) -> int:
    """A job as they all are: what is missing is made, a part is put together and dropped; how many were made."""
    made = 0
    with open_store(folder, SETTINGS) as store:
        for number, name in enumerate(NAMES):
            if store.done(name) is None and store.done("whole.bin") is None:
                store.put(name, bytes([number]) * 1000, number=number)
                made += 1
        if store.done("whole.bin") is None:
            store.put("whole.bin", lambda file: [file.write((folder / name).read_bytes()) for name in NAMES])
        store.note("withheld", None, why="shy")
        store.drop(NAMES[2:])
        store.finish()
    return made


def test_killed_at_every_point_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    assert kill_matrix(tmp_path, work) > 60


def test_what_is_done_is_not_made_again(tmp_path: Path) -> None:
    assert work(tmp_path) == 4
    before = content(tmp_path)
    assert set(before) == {"settings.json", "manifest.jsonl", "whole.bin", *NAMES[:2]}
    assert work(tmp_path) == 0
    assert content(tmp_path) == before


def test_what_was_dropped_before_a_kill_stays_dropped(tmp_path: Path) -> None:
    with open_store(tmp_path, SETTINGS) as store:
        store.note("kept", None)
        store.note("gone", None)
        store.finish()
    with open_store(tmp_path, SETTINGS) as store:
        store.drop(["gone"])  # and killed before the manifest is written again
    for _ in range(2):  # the first one brings the journals together
        with open_store(tmp_path, SETTINGS) as store:
            assert list(store.entries) == ["kept"]


@pytest.mark.parametrize("setting", ["seed", "classes"])
def test_other_settings_are_refused_by_name(tmp_path: Path, setting: str) -> None:
    work(tmp_path)
    before = content(tmp_path)
    other = {**SETTINGS, setting: {"dog": "dog", "cat": "tabby"} if setting == "classes" else 2}
    with (
        pytest.raises(InputError, match=f"got (another|other) {setting}") as caught,
        open_store(tmp_path, other),
    ):
        pass
    assert "\n" not in str(caught.value)
    with open_store(tmp_path, other, resumable=frozenset({setting})) as store:
        assert store.done("whole.bin")
    assert content(tmp_path) == before


def test_every_flipped_bit_costs_that_file_and_nothing_else(tmp_path: Path) -> None:
    with open_store(tmp_path, SETTINGS) as store:
        for name in NAMES:
            store.put(name, name.encode(), number=1)
        store.finish()
    manifest = (tmp_path / "manifest.jsonl").read_bytes()
    start = manifest.index(b"\n") + 1
    for place in range(start, manifest.index(b"\n", start)):
        flipped = bytearray(manifest)
        flipped[place] ^= 1 << place % 8
        (tmp_path / "manifest.jsonl").write_bytes(flipped)
        with open_store(tmp_path, SETTINGS) as store:
            assert [name for name in NAMES if store.done(name)] == [NAMES[0], *NAMES[2:]], place
    (tmp_path / "manifest.jsonl").write_bytes(manifest)
    (tmp_path / NAMES[3]).write_bytes(b"shards/2.bin")
    with open_store(tmp_path, SETTINGS) as store:
        assert [name for name in NAMES if store.done(name)] == NAMES[:3]
    settings = bytearray((tmp_path / "settings.json").read_bytes())
    settings[40] ^= 1
    (tmp_path / "settings.json").write_bytes(settings)
    with pytest.raises(InputError, match=r"settings\.json is damaged"), open_store(tmp_path, SETTINGS):
        pass


def test_files_of_others_are_neither_taken_nor_removed(tmp_path: Path) -> None:
    (tmp_path / ".notes.tmp").touch()
    (tmp_path / ".labels.npy.backup").touch()
    work(tmp_path)
    assert (tmp_path / ".notes.tmp").exists()
    assert (tmp_path / ".labels.npy.backup").exists()
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InputError, match=r"out: expected a new or empty folder, but .* holds manifest\.jsonl"):
        work(tmp_path)


def test_one_process_at_a_time_and_none_after_a_kill(tmp_path: Path) -> None:
    def begin(*then: Any) -> None:
        with open_store(tmp_path, SETTINGS):
            if os.fork() == 0:  # a decoding worker, which lives on for a while
                time.sleep(3)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    with open_store(tmp_path, SETTINGS) as store:
        with pytest.raises(BlockingIOError, match="another process is writing"), open_store(tmp_path, SETTINGS):
            pass
        store.put("a", b"a")
    assert in_child(begin) == signal.SIGKILL
    with open_store(tmp_path, SETTINGS) as store:
        assert store.done("a")


def test_several_processes_fill_one_store(tmp_path: Path) -> None:
    with open_store(tmp_path, SETTINGS) as first:
        first.put("0", b"0")
        with open_store(tmp_path, SETTINGS, part=1) as second:
            second.put("1", b"1")
        first.note("2", write_file(tmp_path / "2", b"2"))
        first.finish(["2", "1", "0"])
    assert [line.split('"')[3] for line in (tmp_path / "manifest.jsonl").read_text().splitlines()] == ["2", "1", "0"]
    with open_store(tmp_path, SETTINGS) as store:
        assert all(map(store.done, "012"))


def test_a_full_disk_leaves_nothing_half_done_and_no_folder_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(tmp_path / "whole")
    sync, calls = os.fsync, 0
    for point in range(100):
        left = point

        def full(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device")
            sync(descriptor)

        folder = tmp_path / str(point)
        with monkeypatch.context() as patch, suppress(OSError):
            patch.setattr(os, "fsync", full)
            work(folder)
        if left >= 0:
            break
        calls += 1
        assert not list(folder.rglob("*.tmp"))
        work(folder)
        assert content(folder) == content(tmp_path / "whole")
    assert calls > 15


def test_the_next_write_of_a_file_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    target, others = tmp_path / ("x" * 250 + ".npy"), [tmp_path / ".x.tmp", tmp_path / ".~lock.x#"]
    for other in others:
        other.touch()

    def killed() -> None:
        with write_atomic(target) as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == signal.SIGKILL
    [left] = set(tmp_path.iterdir()) - set(others)
    with write_atomic(tmp_path / "other") as file:
        file.write(b"whole")
    assert left.exists()
    with write_atomic(target) as file:  # which nobody else takes for the rest of a killed one
        remove_unfinished(tmp_path)
        file.write(b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {target.name, "other", ".x.tmp", ".~lock.x#"}
