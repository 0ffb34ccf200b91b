"""Kill a job at every point at which it changes the disk, resume it, and compare the bytes."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from synth_refine._io import store


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_child(run: Callable[[], object]) -> int:
    """Run in a forked child; the signal that killed it, 0 for none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def die_at(point: int) -> None:
    """Let this process be killed at its call number `point` of those that change a disk: before, after, or half way."""
    left = point

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **options)
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    for name in ("replace", "fsync", "unlink", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    whole = store._line

    def torn(*arguments: Any) -> bytes:  # the half of a line, and then nothing more
        nonlocal left
        left -= 1
        if left == 0:
            left = 1
            return whole(*arguments)[:30]
        return whole(*arguments)

    store._line = torn


def kill_matrix(tmp_path: Path, run: Callable[[Path], object], every: int = 1) -> int:
    """Kill `run(folder)` at every so many points, resume it, compare with an undisturbed run; the number of kills."""
    sync, os.fsync = os.fsync, lambda _: None  # a killed process loses nothing that the system has taken over
    try:
        return _kill_matrix(tmp_path, run, every)
    finally:
        os.fsync = sync


def _kill_matrix(tmp_path: Path, run: Callable[[Path], object], every: int) -> int:
    run(tmp_path / "whole")
    expected = content(tmp_path / "whole")
    for point in range(1, 2000, every):
        folder = tmp_path / str(point)

        def killed(folder: Path = folder, point: int = point) -> None:
            die_at(point)
            run(folder)

        died = in_child(killed)
        run(folder)
        assert content(folder) == expected, point
        if not died:
            return len(range(1, point, every))
    raise AssertionError("the job never ended")
