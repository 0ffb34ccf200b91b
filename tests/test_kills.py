"""Every writing command stopped at any step: run again, it leaves the same bytes; two at once, one of them says so."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from synth_refine import cli, pipeline
from synth_refine.labels.artifact import read_artifact
from synth_refine.synthetic.glyphs import Glyphs
from synth_refine.synthetic.jobs import Job

CLASSES = "AOX"
POINTS = 12
"""Steps at which each command is stopped; a prime stride spreads them over its kinds of steps."""

COMMANDS = {
    "run": "run photos --out out --refiner paper --model glyphs --per-class 9 --threshold 0 --workers 0",
    "embed": "embed photos --out out --workers 0",
    "generate": "generate --classes classes.yaml --out out --model glyphs --per-class 4",
    "refine": "refine --features features.npy --given given.npy --prototypes prototypes.npy --threshold 0.5 --out out",
    "scale": "scale --features features.npy --given given.npy --prototypes prototypes.npy --threshold 0.5 "
    "--shard-rows 20 --out out",
    "scale anchored": "scale --features features.npy --given given.npy --synthetic synthetic.npy "
    "--synthetic-labels labels.npy --shard-rows 20 --out out",
    "review": "review result/refined decisions.csv --out out",
    "apply": "apply refined --given given.npy --out out.npy",
    "apply images": "apply result/refined --images photos --out out",
    "revert images": "revert result/refined --images applied --out out",
    "export": "export refined --format csv --out out.csv",
}


class Pixels:
    """Features are coarse pixels."""

    id, preprocess = "pixels", None

    def embed(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images.float() / 255, 4).flatten(1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read."""
    pytest.importorskip("matplotlib")
    root, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
        Path("classes.yaml").write_text("".join(f"- {name}\n" for name in CLASSES))
        for row in range(24):
            folder = Path("photos", CLASSES[row % 3 if row % 4 else (row + 1) % 3])
            folder.mkdir(parents=True, exist_ok=True)
            [image] = Glyphs(32).generate([Job(row % 3, row, 99, "", CLASSES[row % 3], "")])
            assert image is not None
            image.save(folder / f"{row:02d}.png")
        truth = np.arange(90) % 3
        for name, count in (("features", 90), ("synthetic", 60)):
            np.save(f"{name}.npy", (np.eye(3, 8)[truth[:count]] + 0.1 * rng.normal(size=(count, 8))).astype(np.float32))
        np.save("labels.npy", truth[:60])
        np.save("given.npy", np.where(np.arange(90) < 20, (truth + 1) % 3, truth))
        np.save("prototypes.npy", np.eye(3, 8, dtype=np.float32))
        for name, out in (("refine", "refined"), ("run", "result")):
            assert cli.main(shlex.split(COMMANDS[name].replace("--out out", f"--out {out}"))) == 0
        assert cli.main(shlex.split(COMMANDS["apply images"].replace("--out out", "--out applied"))) == 0
        found = read_artifact("result/refined")
        assert found.ids is not None
        assert len(found.changed) > 1
        names = [found.run["settings"]["classes"][label] for label in (*found.given, *found.labels)]
        rows = [f"{found.ids[row]},{names[row]},accept,{names[len(found.ids) + row]}\n" for row in found.changed[1:]]
        Path("decisions.csv").write_text("id,given,decision,label\n" + "".join(rows))
    return root


@pytest.fixture
def work(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a killed process loses nothing that the system has taken over
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Pixels())
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def child(command: str, at_step: Callable[[int], object]) -> int:
    """Start the command in a process of its own; before every step that changes a file, `at_step` gets its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forks of processes with threads
        process = os.fork()
    if process:
        return process
    count, here, code = 0, os.getcwd(), 1

    def step(*_: object) -> None:
        nonlocal count
        count += 1
        at_step(count - 1)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"):
            path = arguments[0]
            if isinstance(path, str | bytes | os.PathLike) and os.path.abspath(os.fsdecode(path)).startswith(here):
                step()

    try:
        os.fsync = step  # type: ignore[assignment]
        sys.stderr = sys.stdout = open("said.txt", "a")  # noqa: SIM115
        sys.addaudithook(audit)
        code = cli.main(shlex.split(command))
    finally:
        sys.stderr.flush()
        Path("steps.txt").write_text(str(count))
        os._exit(code)


def ended(process: int) -> int:
    """The exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def send(sent: signal.Signals, point: int, step: int) -> None:
    """Stop this process at a step."""
    if step == point:
        os.kill(os.getpid(), sent)


def remove(*patterns: str) -> None:
    for path in (one for pattern in patterns for one in Path().glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


WORDS = ("said.txt", "steps.txt")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_stopped_at_any_step_and_run_again_the_bytes_are_the_same(name: str, work: Path) -> None:
    assert ended(child(COMMANDS[name], lambda _: None)) == 0
    count = int(Path("steps.txt").read_text())
    remove(*WORDS)
    expected = content(work)
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGHUP)
    points = sorted({round(point * (count - 1) / (POINTS - 1)) for point in range(POINTS)})
    for number, point in enumerate(points):
        remove("out*", *WORDS)
        sent = signals[number % len(signals)]
        code = ended(child(COMMANDS[name], partial(send, sent, point)))
        said = Path("said.txt").read_text()
        assert code == (-sent if sent == signal.SIGKILL else 128 + sent), said
        assert "Traceback" not in said
        remove(*WORDS)
        if sent != signal.SIGKILL:
            assert not [one for one in content(work) if one.endswith(".tmp")]
        again = cli.main(shlex.split(COMMANDS[name]))
        assert again == 0 or "images" in name  # a finished folder of images is not written again
        assert content(work) == expected, (sent, point)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("apply", "export")])
def test_of_two_at_once_one_says_so_and_the_result_is_whole(
    name: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(child(COMMANDS[name], lambda _: None)) == 0
    half = int(Path("steps.txt").read_text()) // 2
    remove(*WORDS)
    expected = content(work)
    remove("out*", *WORDS)
    first = child(COMMANDS[name], partial(send, signal.SIGSTOP, half))
    os.waitpid(first, os.WUNTRACED)
    capsys.readouterr()
    code = cli.main(shlex.split(COMMANDS[name]))
    said = capsys.readouterr().err.splitlines()
    os.kill(first, signal.SIGCONT)
    codes = {code, ended(first)}
    words = said if code else Path("said.txt").read_text().splitlines()
    assert codes == {0, 3}, said
    assert any(word in words[-1] for word in ("another process", "exists", "made meanwhile")), words
    remove(*WORDS)
    assert content(work) == expected
