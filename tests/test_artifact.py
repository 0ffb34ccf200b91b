"""The artifact of a refinement is read back as written, undone bit for bit, and survives being killed anywhere."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synth_refine import InputError
from synth_refine._io import atomic
from synth_refine.labels.artifact import Artifact, Damaged, WrongBase, WrongIds, read_artifact, record, write_artifact


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed loses nothing the system has taken over, so waiting for the disk proves nothing here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def example(seed: int = 0, count: int = 30, *, ids: bool = True, sure: float = 1) -> Artifact:
    random = np.random.default_rng(seed)
    before, after = random.integers(0, 4, (2, count))
    undecided = (random.random(count) < 0.2) & (before == after)
    return record(
        before,
        after,
        num_classes=4,
        ids=[f"{seed}/{row}.png" for row in range(count)] if ids else None,
        abstained=undecided,
        confidence=sure * random.random(count),
        margin=random.random(count),
        reason=[f"reason {row}" for row in range(count)],
        inputs={"features": "0" * 64},
        settings={"threshold": 0.6, "seed": seed},
    )


def same(one: Artifact, other: Artifact) -> bool:
    return one.table() == other.table() and one.run == other.run and (one.given == other.given).all()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.mark.parametrize("ids", [True, False])
def test_an_artifact_is_read_back_equal(tmp_path: Path, ids: bool) -> None:
    written = example(ids=ids)
    write_artifact(tmp_path / "a", written)
    read = read_artifact(tmp_path / "a")
    assert same(read, written)
    assert read.ids == written.ids
    assert read.labels.tolist() == written.labels.tolist() == np.load(tmp_path / "a" / "labels.npy").tolist()
    assert set(content(tmp_path / "a")) == {"labels.npy", "changes.csv", "run.json"} | ({"ids.csv"} if ids else set())
    header = (tmp_path / "a" / "changes.csv").read_text().splitlines()[0].replace('"', "")
    assert header == "id,old,new,action,confidence,margin,reason"


@given(
    labels=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=40),
    dtype=st.sampled_from(["i1", "u1", "<i2", ">i4", "<i8", "<u8"]),
)
@settings(deadline=None, max_examples=40)
def test_apply_and_revert_are_inverse_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, labels: list[tuple[int, int]], dtype: str
) -> None:
    before = np.array([old for old, _ in labels], dtype=dtype)
    after = np.array([new for _, new in labels], dtype=np.int64)
    folder = tmp_path_factory.mktemp("a")
    write_artifact(folder, record(before, after))
    read = read_artifact(folder)
    assert read.apply(before).tolist() == after.tolist()
    again = read.revert(read.apply(before))
    assert again.dtype == before.dtype
    assert again.tobytes() == before.tobytes()


def test_the_inputs_stay_as_they_are() -> None:
    before, after = torch.tensor([0, 1, 1]), np.array([0, 0, 1])
    made = record(before, after)
    made.labels[0] = 7
    made.given[0] = 7
    assert before.tolist() == [0, 1, 1]
    assert after.tolist() == [0, 0, 1]
    assert record(before, after).apply(before).tolist() == [0, 0, 1]


def test_labels_of_another_kind_are_refused() -> None:
    made = record(np.array([0, 1, 2]), np.array([2, 1, 0]), ids=["a", "b", "c"])
    for error, message, call in [
        (WrongBase, "given: .* hash .* 1 of 3 differ, the first in row 2", lambda: made.apply(np.array([0, 1, 1]))),
        (WrongBase, "labels: expected the labels with hash", lambda: made.revert(np.array([0, 1, 2]))),
        (WrongBase, "given: expected the 3 labels .* is about, got 2", lambda: made.apply(np.array([0, 1]))),
        (WrongIds, "got 1 others, the first is 'd'", lambda: made.apply(np.array([0, 1, 2]), ids=["a", "b", "d"])),
        (WrongIds, "ids: expected the artifact's 3, got 2", lambda: made.apply(np.array([0, 1, 2]), ids=["a", "b"])),
        (InputError, "every id once, got 'a' 2", lambda: made.apply(np.array([0, 1, 2]), ids=["a", "a", "b"])),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0])}, r"labels: expected shape \(2,\), got \(1,\)"),
        ({"labels": np.array([0, 3]), "num_classes": 3}, "labels: expected classes 0 to 2, got 3 in row 1"),
        ({"given": np.array([0, 3]), "num_classes": 3}, "given: expected classes 0 to 2, got 3 in row 1"),
        ({"given": np.array([0.0, 1.0])}, "given: expected integer class indices, got float64"),
        ({"ids": ["a"]}, "ids: expected 2, one per label, got 1"),
        ({"ids": ["a", "a"]}, "ids: expected every id once"),
        ({"abstained": np.array([True, True])}, "abstained: expected rows that keep their label, got row 1"),
        ({"ids": ["a", "b\0"]}, "ids: expected text without zero bytes, got 'b"),
        ({"confidence": np.zeros(3)}, r"confidence: expected shape \(2,\), got \(3,\)"),
        ({"reason": ["a"]}, r"reason: expected shape \(2,\), got \(1,\)"),
    ],
)
def test_what_cannot_be_recorded_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"given": np.array([0, 1]), "labels": np.array([0, 0]), **changes}
    with pytest.raises(InputError, match=message):
        record(**arguments)


def _edit_run(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        run = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**run, **changes}))

    return edit


def _append(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"\n") and None


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "labels changed": (_append("labels.npy"), "labels.npy is not the file that run.json describes"),
    "changes changed": (_append("changes.csv"), "changes.csv is not the file that run.json describes"),
    "ids changed": (_append("ids.csv"), "ids.csv is not the file that run.json describes"),
    "labels lost": (lambda folder: (folder / "labels.npy").unlink(), "changed, swapped or lost"),
    "run lost": (lambda folder: (folder / "run.json").unlink(), "artifact: cannot be read, No such file"),
    "run empty": (lambda folder: (folder / "run.json").write_text(""), "run.json is damaged"),
    "run a list": (lambda folder: (folder / "run.json").write_text("[]"), "run.json is damaged"),
    "run a page": (lambda folder: (folder / "run.json").write_text("<html>"), "run.json is damaged"),
    "run nested": (lambda folder: (folder / "run.json").write_text("[" * 100_000), "run.json is damaged"),
    "run binary": (lambda folder: (folder / "run.json").write_bytes(b"\xff"), "run.json is damaged"),
    "newer format": (_edit_run(format=3), "run.json is damaged: it is of none of the formats 1, 2"),
    "no hashes": (
        _edit_run(files={"labels.npy": None, "changes.csv": None}),
        "run.json is damaged: a file has no hash",
    ),
    "a file outside": (_edit_run(files={"../labels.npy": "0" * 64}), "run.json is damaged: it names the files"),
    "other base": (_edit_run(given={"sha256": "0" * 64, "dtype": "<i8"}), "contradict each other"),
    "base of objects": (_edit_run(given={"sha256": "0" * 64, "dtype": "O"}), "damaged: its labels are of type O"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_artifact_is_refused(tmp_path: Path, kind: str) -> None:
    write_artifact(tmp_path / "a", example())
    damage, message = DAMAGE[kind]
    damage(tmp_path / "a")
    with pytest.raises(InputError, match=message) as caught:
        read_artifact(tmp_path / "a")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, Damaged) or kind == "run lost"


@pytest.mark.parametrize("kind", ["O", "V8", "<M8[s]", "|S999999999", "<f8", "x", 5, ["i8"]])
def test_labels_of_a_type_that_is_no_integer_are_damage(tmp_path: Path, kind: object) -> None:
    write_artifact(tmp_path, record(np.array([0, 1]), np.array([1, 1])))
    run = json.loads((tmp_path / "run.json").read_text())
    for key, value in (("given", {**run["given"], "dtype": kind}), ("settings", [1]), ("inputs", "x")):
        (tmp_path / "run.json").write_text(json.dumps({**run, key: value}))
        with pytest.raises(Damaged, match="run.json is damaged"):
            read_artifact(tmp_path)


def test_a_file_of_another_artifact_is_noticed(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", example(0))
    write_artifact(tmp_path / "b", example(1))
    shutil.copy(tmp_path / "a" / "changes.csv", tmp_path / "b")
    with pytest.raises(Damaged, match=r"changes\.csv is not the file"):
        read_artifact(tmp_path / "b")


def test_only_what_is_ours_is_in_the_way_or_removed(tmp_path: Path) -> None:
    (tmp_path / "labels.npy").write_text("mine")
    with pytest.raises(InputError, match=r"folder: expected an artifact or an empty folder, but .* holds labels.npy"):
        write_artifact(tmp_path, example())
    assert content(tmp_path) == {"labels.npy": b"mine"}
    folder, mine = (
        tmp_path / "a",
        ("shards", ".my-labels.npy.backup", ".~lock.ids.csv#", ".old_ids.csv", ".x.labels.npy"),
    )
    folder.mkdir()
    for name in mine:
        (folder / name).write_text("mine")
    write_artifact(folder, example(ids=False))
    (folder / "ids.csv").write_text("mine")
    write_artifact(folder, example(ids=False))
    assert {name for name, data in content(folder).items() if data == b"mine"} == {*mine, "ids.csv"}


def test_another_artifact_never_takes_the_place_of_one(tmp_path: Path) -> None:
    write_artifact(tmp_path, example(0))
    before = content(tmp_path)
    write_artifact(tmp_path, example(0))  # the same once more
    other = record(example(0).given, example(0).labels, num_classes=4, settings={"threshold": 0.7})
    for changed, name in ((example(1), "given"), (other, "inputs")):
        with pytest.raises(
            InputError, match=f"folder: expected the same artifact as in .*, got other {name}; .* reverted"
        ):
            write_artifact(tmp_path, changed)
    assert content(tmp_path) == before


def test_a_second_writer_is_turned_away(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", example(0))
    with atomic.locked(tmp_path / "a"), pytest.raises(BlockingIOError, match="another process is writing"):
        write_artifact(tmp_path / "a", example(0))
    with atomic.locked(tmp_path / "a"):
        write_artifact(tmp_path / "a", example(0), lock=False)
    assert same(read_artifact(tmp_path / "a"), example(0))


# Killed or failing anywhere. Every call that changes the disk passes through one of these, and the n-th one is hit.


class _Counter:
    def __init__(self, hit_at: int, hit: Callable[[], None]) -> None:
        self.count, self.hit_at, self.hit = 0, hit_at, hit

    def step(self) -> bool:
        self.count += 1
        return self.count == self.hit_at


class _File:
    """A file whose write stops in the middle when its turn has come."""

    def __init__(self, file: Any, counter: _Counter) -> None:
        self.file, self.counter = file, counter

    def write(self, data: bytes) -> int:
        if self.counter.step():
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            self.counter.hit()
        return int(self.file.write(data))

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextmanager
def _hit(counter: _Counter) -> Iterator[None]:
    def counted(call: Callable[..., Any], before: bool) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            mine = counter.step()
            if mine and before:
                counter.hit()
            try:
                return call(*arguments, **options)
            finally:
                if mine and not before:
                    counter.hit()

        return wrapper

    real_open = builtins.open

    def opened(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if not set(mode) & set("wxa+"):
            return real_open(path, mode, *rest, **options)
        return _File(counted(real_open, True)(path, mode, *rest, **options), counter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)  # what pathlib calls
        for name in ("fsync", "replace", "unlink", "mkdir"):
            both = counted(counted(getattr(os, name), False), True)  # just before it and just after it
            patch.setattr(os, name, both)
        yield


def _killed_at(point: int, run: Callable[[], None]) -> bool:
    """Run in a forked child that dies by SIGKILL at the point; whether it died."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child only writes files
        child = os.fork()
    if child == 0:
        try:
            with _hit(_Counter(point, lambda: os.kill(os.getpid(), signal.SIGKILL))):
                run()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_killed_at_any_write_the_old_or_the_new_artifact_is_there(tmp_path: Path, first: bool) -> None:
    """And a later write, or one that is killed at the same point again, still ends well."""
    old, new, third = (example(sure=sure) for sure in (1, 0.5, 0.2))  # of other scores
    outcomes: list[str] = []
    for point in range(1, 1000):
        folder = tmp_path / str(point)
        if not first:
            write_artifact(folder, old)
        died = _killed_at(point, lambda folder=folder: write_artifact(folder, new))
        if first and not (folder / "run.json").exists():
            outcomes.append("old")
        else:
            read = read_artifact(folder)
            assert same(read, new) or (not first and same(read, old))
            outcomes.append("new" if same(read, new) else "old")
        if point % 3 == 0:
            _killed_at(point, lambda folder=folder: write_artifact(folder, third))
        write_artifact(folder, third)
        assert same(read_artifact(folder), third)
        assert set(content(folder)) == {"labels.npy", "changes.csv", "ids.csv", "run.json"}
        shutil.rmtree(folder)
        if not died:
            break
    assert len(outcomes) >= 30
    assert outcomes == sorted(outcomes, reverse=True)  # first old, then new, and one moment in between
    assert {"old", "new"} == set(outcomes)


def test_a_failing_disk_is_reported_and_leaves_the_old_or_the_new_artifact(tmp_path: Path) -> None:
    write_artifact(tmp_path / "start", example(0))
    for point in range(1, 1000):
        code = (errno.ENOSPC, errno.EACCES, errno.EIO)[point % 3]

        def fail(code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        folder = shutil.copytree(tmp_path / "start", tmp_path / str(point))
        counter = _Counter(point, fail)
        try:
            with _hit(counter):
                write_artifact(folder, example(sure=0.5))
            failed = False
        except OSError as error:
            failed = error.errno == code
        read = read_artifact(folder)
        assert same(read, example(sure=0.5)) or (failed and same(read, example(0)))  # done, or reported and undone
        write_artifact(folder, example(sure=0.2))
        assert same(read_artifact(folder), example(sure=0.2))
        shutil.rmtree(folder)
        if counter.count < point:
            break
    assert point > 20


def test_a_label_file_killed_at_any_write_is_old_or_new(tmp_path: Path) -> None:
    target = tmp_path / "file"

    def write() -> None:
        with atomic.write_atomic(target) as file:
            file.write(b"new" * 1000)

    for point in range(1, 100):
        target.write_bytes(b"old")
        died = _killed_at(point, write)
        assert target.read_bytes() in (b"old", b"new" * 1000)
        if not died:
            break
    assert target.read_bytes() == b"new" * 1000
    assert point > 5
