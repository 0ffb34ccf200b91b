"""Shards: the rule of the whole applied piece by piece, resumed after any crash, on one process or a Ray cluster."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from synth_refine import InputError, cli, refine_labels
from synth_refine._io.atomic import locked
from synth_refine.labels.files import read_labels
from synth_refine.scale import shards as scale
from synth_refine.scale.shards import refine_shards

ROWS, WIDTH, CLASSES = 250, 8, 6
SIZES = (60, 100, 90)
"""Rows of the files of a folder of shards."""


class Data:
    """The same images as one .npy file each, as folders of .npy files and as a folder of Parquet files."""

    def __init__(self, root: Path) -> None:
        rng = np.random.default_rng(0)
        true = rng.integers(0, CLASSES, ROWS)
        self.root = root
        self.prototypes = rng.standard_normal((CLASSES, WIDTH)).astype(np.float32)
        self.features = (self.prototypes[true] + rng.standard_normal((ROWS, WIDTH))).astype(np.float16)
        self.features[[3, 200]] = [[0] * WIDTH, [np.nan] * WIDTH]
        self.logits = (2 * rng.standard_normal((ROWS, CLASSES))).astype(np.float32)
        self.head = rng.standard_normal((CLASSES, WIDTH + 1)).astype(np.float32)
        self.given = np.where(rng.random(ROWS) < 0.4, rng.integers(0, CLASSES, ROWS), true)
        arrays = {"features": self.features, "logits": self.logits, "given": self.given}
        ends = np.cumsum((0, *SIZES))
        for name, values in arrays.items():
            np.save(root / f"{name}.npy", values)
            (root / name).mkdir()
            for number, size in enumerate(SIZES):
                np.save(root / name / f"{number}.npy", values[ends[number] : ends[number] + size])
        np.save(root / "prototypes.npy", self.prototypes)
        np.save(root / "head.npy", self.head)
        (root / "parquet").mkdir()
        for number, size in enumerate(SIZES):
            rows = slice(ends[number], ends[number] + size)
            columns = {
                name: values[rows] if values.ndim == 1 else list(values[rows]) for name, values in arrays.items()
            }
            pq.write_table(pa.table(columns), root / "parquet" / f"{number}.parquet", row_group_size=7 + number)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("data"))


def columns(out: Path) -> dict[str, np.ndarray]:
    """The Parquet shards as one array per column."""
    table = pq.read_table(out / "shards")
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def files(out: Path) -> dict[str, bytes]:
    """The bytes of all that a run left behind, but for the order of the manifest's lines."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found["manifest.jsonl"] = b"\n".join(sorted(found["manifest.jsonl"].split(b"\n")))
    return found


def test_equals_the_rule_applied_to_the_whole(data: Data, tmp_path: Path) -> None:
    summary = refine_shards(
        data.root / "features.npy", data.root / "given.npy", data.prototypes, 0.4, tmp_path / "out",
        logits=data.root / "logits.npy", shard_rows=70,
    )  # fmt: skip
    whole = refine_labels(data.features, data.logits, data.prototypes, 0.4)
    refined = whole.apply(data.given)
    found = columns(tmp_path / "out")
    np.testing.assert_array_equal(found["row"], np.arange(ROWS))
    np.testing.assert_array_equal(found["given"], data.given)
    np.testing.assert_array_equal(found["refined"], refined)
    np.testing.assert_allclose(found["confidence"], whole.confidence, rtol=1e-6)
    np.testing.assert_array_equal(read_labels(tmp_path / "out" / "labels.npy"), refined)
    assert summary == scale.Summary(ROWS, int((refined != data.given).sum()), 2, 4, 0)
    assert found["classes"][3].tolist() == [-1] * 5
    assert np.isnan(found["scores"][3]).all()


def test_the_best_classes_are_those_of_all_scores_in_order(data: Data, tmp_path: Path) -> None:
    refine_shards(data.root / "features.npy", data.root / "given.npy", data.prototypes, 0.4, tmp_path / "out")
    features = data.features.astype(np.float64)
    with np.errstate(invalid="ignore"):
        cosine = features @ data.prototypes.T / np.linalg.norm(features, axis=1, keepdims=True)
    cosine /= np.linalg.norm(data.prototypes, axis=1)
    order = np.argsort(-cosine, axis=1)[:, :5]
    found, scored = columns(tmp_path / "out"), np.isfinite(cosine).all(axis=1)
    np.testing.assert_array_equal(found["classes"][scored], order[scored])
    np.testing.assert_allclose(found["scores"][scored], np.take_along_axis(cosine, order, 1)[scored], atol=1e-5)


def test_every_way_to_store_the_inputs_gives_the_same_labels(data: Data, tmp_path: Path) -> None:
    ways = {
        "npy": (data.root / "features.npy", data.root / "given.npy", data.root / "logits.npy"),
        "folders": (data.root / "features", data.root / "given", data.root / "logits"),
        "mixed": (data.root / "features", data.root / "given.npy", data.root / "logits.npy"),
        "parquet": (data.root / "parquet",) * 3,
    }
    for name, (features, given, logits) in ways.items():
        refine_shards(features, given, data.prototypes, 0.4, tmp_path / name, logits=logits)
        found, expected = columns(tmp_path / name), columns(tmp_path / "npy")
        for column, values in expected.items():
            np.testing.assert_array_equal(found[column], values, err_msg=f"{name}: {column}")


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_head_is_the_logits_it_gives(bias: bool, data: Data, tmp_path: Path) -> None:
    head = data.head if bias else data.head[:, :-1]
    logits = data.features.astype(np.float32) @ data.head[:, :-1].T + (data.head[:, -1] if bias else 0)
    np.save(tmp_path / "logits.npy", logits.astype(np.float32))
    inputs = (data.root / "features.npy", data.root / "given.npy", data.prototypes, [0.3] * CLASSES)
    refine_shards(*inputs, tmp_path / "head", head=head)
    refine_shards(*inputs, tmp_path / "logits", logits=tmp_path / "logits.npy")
    found, expected = columns(tmp_path / "head"), columns(tmp_path / "logits")
    np.testing.assert_array_equal(found["refined"], expected["refined"])
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-5)


def test_a_shard_per_thread_of_torch_changes_no_byte(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = (data.root / "features.npy", data.root / "given.npy", data.prototypes, 0.3)
    refine_shards(*inputs, tmp_path / "calm", shard_rows=125)
    meeting, threads, alone = threading.Barrier(2), [], scale.refine_shard

    def together(rule: scale.Rule, shard: scale.Shard) -> Any:
        threads.append(torch.get_num_threads())
        meeting.wait(60)
        return alone(rule, shard)

    monkeypatch.setattr(scale, "refine_shard", together)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        refine_shards(*inputs, tmp_path / "two", shard_rows=125)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1]
    assert files(tmp_path / "two") == files(tmp_path / "calm")


@pytest.mark.parametrize("content", ['{"architectures": ["CLIPModel"]}', '{"config": {"hidden": 3}}', "[]", ""])
def test_a_folder_with_another_programs_config_is_left_alone(data: Data, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"out: .*config.json is not, or no longer, the configuration of such a run"):
        refine_shards(data.root / "features.npy", data.root / "given.npy", data.prototypes, 0.3, tmp_path)
    assert (tmp_path / "config.json").read_text() == content


def test_resumes_with_what_is_missing_or_damaged_alone(data: Data, tmp_path: Path) -> None:
    def run() -> scale.Summary:
        return refine_shards(
            data.root / "features.npy", data.root / "given.npy", data.prototypes, 0.4, tmp_path, shard_rows=50
        )

    first = run()
    expected = files(tmp_path)
    manifest, shards = tmp_path / "manifest.jsonl", tmp_path / "shards"
    times = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    (shards / "part-000001.parquet").unlink()
    damaged = bytearray((shards / "part-000003.parquet").read_bytes())
    damaged[40] ^= 1
    (shards / "part-000003.parquet").write_bytes(damaged)
    manifest.write_bytes(manifest.read_bytes()[:-10])  # torn inside the line of the last shard
    (shards / f".{0:016x}-{0:032x}.synth-refine.tmp").write_bytes(b"half")
    again = run()
    assert (first.reused, again.reused) == (0, 2)
    assert (again.rows, again.changed, again.skipped) == (first.rows, first.changed, first.skipped)
    assert files(tmp_path) == expected
    kept = [path.name for path in shards.iterdir() if path.stat().st_mtime_ns == times[path.name]]
    assert sorted(kept) == ["part-000000.parquet", "part-000002.parquet"]


def test_another_configuration_stops_before_anything_is_written(data: Data, tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", data.features)
    inputs = (tmp_path / "features.npy", data.root / "given.npy", data.prototypes)
    refine_shards(*inputs, 0.4, tmp_path / "out")
    expected = files(tmp_path / "out")
    with pytest.raises(InputError, match="threshold: expected what the shards in .* were made from .0.4., got 0.5"):
        refine_shards(*inputs, 0.5, tmp_path / "out")
    with pytest.raises(InputError, match="prototypes: expected what"):
        refine_shards(*inputs[:2], data.prototypes[::-1].copy(), 0.4, tmp_path / "out")
    np.save(tmp_path / "features.npy", data.features[::-1])
    with pytest.raises(InputError, match="features: expected what"):
        refine_shards(*inputs, 0.4, tmp_path / "out")
    assert files(tmp_path / "out") == expected


def test_a_second_writer_and_a_foreign_folder_are_refused(data: Data, tmp_path: Path) -> None:
    inputs = (data.root / "features.npy", data.root / "given.npy", data.prototypes, 0.4)
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(BlockingIOError, match="another process is writing"):
        refine_shards(*inputs, tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(InputError, match="expected a new or empty folder.*chapter.tex"):
        refine_shards(*inputs, tmp_path / "thesis")
    assert list((tmp_path / "thesis").iterdir()) == [tmp_path / "thesis" / "chapter.tex"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"given": "features.npy"}, "given: expected integers, but .* holds float16"),
        ({"given": "short.npy"}, "given: expected 250 rows like the features, got 249"),
        ({"given": "high.npy"}, "given in .*: expected classes 0 to 5, got 6 in row 0"),
        ({"features": "given.npy"}, "features: expected floats, but"),
        ({"features": "logits.npy"}, r"prototypes: expected shape \(6, 6\) like the features in .*, got \(6, 8\)"),
        ({"features": "given"}, "features: expected floats, but .* holds int64"),
        ({"features": "nothing"}, "features: expected .npy or .parquet files in the folder"),
        ({"logits": "features.npy"}, r"logits in .*: expected shape \(n, 6\), got"),
        ({"logits": "features"}, r"logits: expected files with the rows of the features' \[250\], got \[60, 100, 90\]"),
        ({"head": np.zeros((6, 3), np.float32)}, r"head: expected shape \(6, 8\) or \(6, 9\), got \(6, 3\)"),
        ({"weight": 0.5}, "weight: expected 1 without logits or head, got 0.5"),
        ({"engine": "spark"}, "engine: expected local or ray, got 'spark'"),
        ({"shard_rows": 0}, "shard_rows: expected at least 1, got 0"),
    ],
)
def test_bad_inputs_are_named_in_one_line(change: dict[str, Any], message: str, data: Data, tmp_path: Path) -> None:
    np.save(data.root / "short.npy", data.given[:-1])
    np.save(data.root / "high.npy", data.given * 0 + CLASSES)
    (data.root / "nothing").mkdir(exist_ok=True)
    arguments: dict[str, Any] = {"features": "features.npy", "given": "given.npy", **change}
    for name in ("features", "given", "logits"):
        if name in arguments:
            arguments[name] = data.root / arguments[name]
    with pytest.raises(InputError, match=message) as caught:
        refine_shards(prototypes=data.prototypes, threshold=0.4, out=tmp_path / "out", **arguments)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out").exists() == ("classes 0 to 5" in message)  # labels are read as they are needed


def test_after_a_refused_input_the_folder_takes_the_mended_one(data: Data, tmp_path: Path) -> None:
    np.save(tmp_path / "given.npy", data.given * 0 + CLASSES)
    inputs = (data.root / "features.npy", tmp_path / "given.npy", data.prototypes, 0.4, tmp_path / "out")
    with pytest.raises(InputError, match="expected classes 0 to 5, got 6 in row 0"):
        refine_shards(*inputs)
    np.save(tmp_path / "given.npy", data.given)
    assert refine_shards(*inputs).shards == 1


def arguments(data: Data, out: Path, *more: str) -> list[str]:
    files = [f"--{name}={data.root / name}.npy" for name in ("features", "given", "prototypes")]
    return ["scale", *files, "--threshold=0.4", f"--out={out}", *more]


def test_the_command_reports_counts_and_goes_on(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments(data, tmp_path / "out", f"--head={data.root}/head.npy", "--shard-rows=100")
    assert cli.main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["rows"], first["skipped"], first["shards"], first["reused"]) == (ROWS, 2, 3, 0)
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out) == {**first, "reused": 3}
    assert cli.main([*command, "--weight=0.9"]) == 3
    assert "weight: expected what the shards in" in capsys.readouterr().err


def test_labels_in_another_order_are_doubted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = np.arange(400) % 4
    np.save(tmp_path / "features.npy", np.eye(4, 8, dtype=np.float16)[given])
    np.save(tmp_path / "prototypes.npy", np.eye(4, 8, dtype=np.float32))
    files = [f"--{name}={tmp_path / name}.npy" for name in ("features", "given", "prototypes")]
    for order, doubted in ((given, False), (given[::-1], True)):
        np.save(tmp_path / "given.npy", order)
        assert cli.main(["scale", *files, "--threshold=1", f"--out={tmp_path}/{doubted}"]) == 0
        assert ("name the same class for 0.0% of the images" in capsys.readouterr().err) == doubted


FORKED = """
import os, sys, time
import numpy as np
from synth_refine.scale.shards import refine_shards
fsync = os.fsync
def slow(descriptor):  # stretches the moments in which a crash could do harm
    time.sleep(0.001)
    fsync(descriptor)
os.fsync = slow
root = sys.argv[1]
prototypes = np.load(f"{root}/prototypes.npy")
for out in map(str.strip, sys.stdin):  # importing torch takes seconds, so it is done once and each run is a fork
    child = os.fork()
    if child == 0:
        refine_shards(f"{root}/features.npy", f"{root}/given.npy", prototypes, 0.4, out, shard_rows=5)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_twenty_kills_change_nothing(data: Data, tmp_path: Path) -> None:
    inputs = (data.root / "features.npy", data.root / "given.npy", data.prototypes, 0.4)
    start = time.monotonic()
    refine_shards(*inputs, tmp_path / "calm", shard_rows=5)
    longest = time.monotonic() - start
    chance, killed = random.Random(0), 0
    path = os.pathsep.join([str(Path(scale.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", FORKED, str(data.root)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes) as runs:
        while killed < 20:
            out = tmp_path / f"killed-{killed}"
            for _ in range(min(5, 20 - killed)):
                print(out, file=runs.stdin, flush=True)
                child = int(runs.stdout.readline())
                time.sleep(chance.uniform(0, longest))
                os.kill(child, signal.SIGKILL)
                killed += int(runs.stdout.readline()) == signal.SIGKILL
            refine_shards(*inputs, out, shard_rows=5)
            assert files(out) == files(tmp_path / "calm")
        runs.stdin.close()


def test_a_worker_killed_while_it_wrote_leaves_no_file(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = scale._here

    def with_a_death(work: Any, todo: Any) -> Any:
        for line in plain(work, todo):
            (tmp_path / "out" / "shards" / f".{0:016x}-{1:032x}.synth-refine.tmp").write_bytes(b"PAR1")
            yield line

    monkeypatch.setattr(scale, "_here", with_a_death)
    refine_shards(data.root / "features.npy", data.root / "given.npy", data.prototypes, 0.4, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "shards").iterdir()] == ["part-000000.parquet"]
