"""The anchored refiner over shards: as good as in memory, in whatever order, resumed after any crash."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_anchored import problem
from test_scale import columns, files
from torch.utils._python_dispatch import TorchDispatchMode

from synth_refine import InputError, cli
from synth_refine.refine.anchored import _first_opinion, anchored_posterior, fit_transition, standardised
from synth_refine.refine.decide import REASONS, decide
from synth_refine.scale import anchored as anchored_shards
from synth_refine.scale.anchored import AnchoredSummary
from synth_refine.scale.shards import refine_shards
from synth_refine.scale.tables import cut_shards


class Data:
    """Features and labels on disk, with what made them."""

    def __init__(self, root: Path, order: np.ndarray | None = None, **options: Any) -> None:
        features, given, self.anchors, self.anchor_labels, true = problem(**options)
        order = np.arange(len(true)) if order is None else order
        self.root, self.true, self.given = root, true[order], given[order]
        self.features = features[order].astype(np.float16)
        root.mkdir(exist_ok=True)
        self.paths = (root / "features.npy", root / "given.npy")
        for name in ("features", "given", "anchors", "anchor_labels"):
            np.save(root / f"{name}.npy", getattr(self, name))

    def run(self, out: Path, **options: Any) -> AnchoredSummary:
        settings = {"shard_rows": 100, "hidden": 32, **options}
        return anchored_shards.anchored_shards(*self.paths, self.anchors, self.anchor_labels, out, **settings)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchored_shards, "BUCKET_ROWS", 64)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("small"), count=300, noise=0.5, distance=2.0)


@pytest.fixture(scope="module")
def undisturbed(small: Data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What two rounds on the small data leave."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anchored_shards, "BUCKET_ROWS", 64)
        small.run(out, rounds=2)
    return files(out)


def wrong(out: Path, data: Data) -> float:
    return float((np.load(out / "labels.npy", allow_pickle=False) != data.true).mean())


@pytest.mark.parametrize("noise", [0.0, 0.6])
def test_as_good_as_in_memory_though_sorted_by_class(
    noise: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchored_shards, "BUCKET_ROWS", 300)
    made: dict[str, Any] = {"count": 1000, "noise": noise, "distance": 2.0, "per_class": 20}
    settings = {"rounds": 4, "hidden": 64}
    features, given, anchors, anchor_labels, true = problem(**made)
    in_memory = decide(anchored_posterior(features, given, anchors, anchor_labels, **settings), given).apply(given)
    data = Data(tmp_path, np.argsort(true, kind="stable"), **made)
    summary = data.run(tmp_path / "out", **settings)
    assert wrong(tmp_path / "out", data) <= (in_memory != true).mean() + 0.01
    assert wrong(tmp_path / "out", data) <= 0.5 * noise
    assert abs(summary.noise_before - (given != true).mean()) < 0.05
    assert summary.noise_after <= summary.noise_before
    assert summary.recognised > 0.7


@pytest.mark.parametrize("width", [8, 400])
def test_every_bucket_is_a_random_sample_though_rows_are_sorted(width: int, tmp_path: Path) -> None:
    made: dict[str, Any] = {"count": 1000, "width": width}
    data = Data(tmp_path, np.argsort(problem(**made)[-1], kind="stable"), **made)
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 1)
        with pytest.raises(Crash):
            data.run(tmp_path / "out")
    work = next((tmp_path / "out" / "work").iterdir())
    saved = anchored_shards._load(work / "prepared.safetensors")
    assert saved is not None
    info, bar = saved.info, anchored_shards.tqdm(disable=True)
    buckets = list(anchored_shards.Scratch(work, info["ends"], info["width"], bar).buckets())
    numbers = torch.cat([bucket.numbers for bucket in buckets])
    assert numbers.sort().values.tolist() == list(range(1000))
    assert torch.cat([bucket.given for bucket in buckets]).tolist() == data.given[numbers].tolist()
    real, reference, _ = standardised(torch.from_numpy(data.features).float(), torch.from_numpy(data.anchors))
    # The signs of principal components are arbitrary; lengths are not.
    lengths = torch.cat([bucket.features.float().square().sum(dim=1) for bucket in buckets])
    torch.testing.assert_close(lengths, real[numbers].square().sum(dim=1), rtol=0.01, atol=0)
    torch.testing.assert_close(
        saved.tensors["reference"].square().sum(dim=1), reference.square().sum(dim=1), rtol=0.01, atol=0
    )
    for bucket in buckets:
        share = np.bincount(data.true[bucket.numbers], minlength=4) / len(bucket.numbers)
        np.testing.assert_allclose(share, 0.25, atol=0.22)  # four deviations of some 60 rows


def test_the_first_transition_is_the_one_in_memory(small: Data, tmp_path: Path) -> None:
    small.run(tmp_path / "calm", rounds=1)
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 2)  # prepared, first
        with pytest.raises(Crash):
            small.run(tmp_path / "out", rounds=1)
    features, anchors = (torch.from_numpy(one).float() for one in (small.features, small.anchors))
    given, anchor_labels = torch.from_numpy(small.given), torch.from_numpy(small.anchor_labels)
    real, reference, _ = standardised(features, anchors)
    opinion, _ = _first_opinion(real, reference, anchor_labels, None, given, 4)
    saved = anchored_shards._load(next((tmp_path / "out" / "work").glob("*/first.safetensors")))
    assert saved is not None
    torch.testing.assert_close(saved.tensors["by_given"].T, fit_transition(opinion, given), atol=0.02, rtol=0)


def test_shards_say_what_the_posterior_is(small: Data, tmp_path: Path) -> None:
    summary = small.run(tmp_path / "out", rounds=2, shard_rows=70)
    found = columns(tmp_path / "out")
    np.testing.assert_array_equal(found["row"], np.arange(300))
    np.testing.assert_array_equal(found["given"], small.given)
    np.testing.assert_array_equal(found["refined"], np.load(tmp_path / "out" / "labels.npy", allow_pickle=False))
    np.testing.assert_array_equal(found["confidence"], found["scores"][:, 0])
    assert (np.diff(found["scores"], axis=1) <= 0).all()
    np.testing.assert_allclose(found["scores"].sum(axis=1), 1, atol=1e-5)  # all four classes are among the best five
    changed = found["refined"] != found["given"]
    np.testing.assert_array_equal(found["refined"][changed], found["classes"][changed, 0])
    assert (summary.rows, summary.changed, summary.skipped) == (300, changed.sum(), 0)
    assert (summary.shards, summary.reused, summary.rounds, summary.note) == (5, 0, 2, "")
    assert summary.changed > 80
    estimate = np.where(
        changed, found["scores"][:, 0], (found["scores"] * (found["classes"] == found["given"][:, None])).sum(1)
    )
    assert summary.noise_after == pytest.approx(1 - estimate.mean(), abs=1e-5)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "labels.npy", "manifest.jsonl", "model.safetensors", "shards"}


def test_rows_that_cannot_be_scored_keep_their_label(tmp_path: Path) -> None:
    data = Data(tmp_path / "data", count=300, noise=0.5)
    data.features[[5, 250], [0, 3]] = [np.nan, np.inf]
    data.features[100:200] = np.nan  # a whole shard
    np.save(data.root / "features.npy", data.features)
    assert data.run(tmp_path / "out", rounds=2).skipped == 102
    found = columns(tmp_path / "out")
    lost = ~np.isfinite(data.features).all(axis=1)
    np.testing.assert_array_equal(found["refined"][lost], data.given[lost])
    assert (found["classes"][lost] == -1).all()
    assert np.isnan(found["scores"][lost]).all()
    assert (found["refined"][~lost] != data.true[~lost]).mean() < 0.1
    np.save(data.root / "features.npy", np.full_like(data.features, np.nan))
    with pytest.raises(InputError, match="features: expected at least one row of finite numbers, got none"):
        data.run(tmp_path / "nothing")


def test_every_way_to_store_the_inputs_gives_the_same_labels(small: Data, tmp_path: Path) -> None:
    ends, parquet = (0, 120, 130, 300), tmp_path / "parquet"
    parquet.mkdir()
    for number in range(3):
        rows = slice(ends[number], ends[number + 1])
        table = pa.table({"features": list(small.features[rows]), "given": small.given[rows]})
        pq.write_table(table, parquet / f"{number}.parquet", row_group_size=50)
    small.run(tmp_path / "npy", rounds=2)
    anchors = (small.anchors, small.anchor_labels)
    anchored_shards.anchored_shards(parquet, parquet, *anchors, tmp_path / "shards", rounds=2, hidden=32)
    found, expected = columns(tmp_path / "shards"), columns(tmp_path / "npy")
    np.testing.assert_array_equal(found["refined"], expected["refined"])
    np.testing.assert_allclose(found["confidence"], expected["confidence"], atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"count": 1}, {"count": 2}, {"count": 30, "per_class": 1}, {"count": 60, "width": 500}, {"hidden": 0}],
    ids=str,
)
def test_small_and_odd_problems_degrade_gracefully(options: dict[str, Any], tmp_path: Path) -> None:
    hidden = options.pop("hidden", 16)
    data = Data(tmp_path / "data", **{"count": 100, **options})
    data.run(tmp_path / "out", rounds=2, hidden=hidden)
    found = columns(tmp_path / "out")
    assert np.isfinite(found["scores"]).all()
    assert len(found["refined"]) == len(data.given)


def test_features_that_say_nothing_change_nothing(tmp_path: Path) -> None:
    data = Data(tmp_path / "data", count=300, noise=0.5)
    np.save(data.root / "features.npy", np.zeros_like(data.features))
    data.run(tmp_path / "out", rounds=2)
    assert np.isfinite(columns(tmp_path / "out")["scores"]).all()


def unrecognisable(root: Path) -> Data:
    """Anchors most of which show any class."""
    data = Data(root, count=300, noise=0.5, per_class=40)
    rng = np.random.default_rng(0)
    data.anchor_labels = np.where(rng.random(160) < 0.95, rng.permutation(data.anchor_labels), data.anchor_labels)
    np.save(root / "anchor_labels.npy", data.anchor_labels)
    return data


def test_labels_stay_where_anchors_are_not_recognised(tmp_path: Path) -> None:
    data = unrecognisable(tmp_path / "data")
    summary = data.run(tmp_path / "out", rounds=2)
    assert summary.recognised < 0.5
    assert summary.note == REASONS[6]
    assert summary.changed == 0
    assert np.isnan([summary.noise_before, summary.noise_after]).all()
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "labels.npy", allow_pickle=False), data.given)


def test_labels_in_another_order_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchored_shards, "BUCKET_ROWS", 1000)
    data = Data(tmp_path / "data", count=1000, noise=0.3)
    np.save(data.root / "given.npy", np.random.default_rng(0).permutation(data.given))
    with pytest.raises(InputError, match="row order"):
        data.run(tmp_path / "out")


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return result


def test_nothing_as_large_as_all_scores_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchored_shards, "BUCKET_ROWS", 512)
    monkeypatch.setattr(anchored_shards, "EPOCHS", (1,))
    count, classes = 16_000, 32
    data = Data(tmp_path / "data", count=count, classes=classes, noise=0.3)
    with Largest() as largest:
        data.run(tmp_path / "out", rounds=1, hidden=16, shard_rows=512)
        # The run scores in threads of its own, where the spy is not.
        model = anchored_shards.Model.loaded(anchored_shards._load(tmp_path / "out" / "model.safetensors"))
        anchored_shards.score_shard(model, cut_shards(*data.paths, None, 512)[0])
    assert largest.elements < count * classes / 10
    assert largest.elements >= 400 * classes  # the spy saw a bucket's scores


class Crash(Exception):
    """Stands for a killed process."""


def fail_after(patch: pytest.MonkeyPatch, writes: int) -> None:
    """Let the run crash after so many files of finished steps."""
    save, left = anchored_shards._save, [writes]

    def failing(*arguments: Any) -> Any:
        if not left[0]:
            raise Crash
        left[0] -= 1
        return save(*arguments)

    patch.setattr(anchored_shards, "_save", failing)


def fail_at_bucket(patch: pytest.MonkeyPatch, reads: int) -> None:
    """Let the run crash when it has read so many buckets."""
    bucket, left = anchored_shards.Scratch.bucket, [reads]

    def failing(self: Any, number: int) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Crash
        return bucket(self, number)

    patch.setattr(anchored_shards.Scratch, "bucket", failing)


def test_goes_on_after_every_step_to_the_same_bytes(small: Data, tmp_path: Path) -> None:
    rounds = small.run(tmp_path / "calm", rounds=3).rounds
    crashes = 0
    while True:  # every run gets one step further
        with pytest.MonkeyPatch.context() as patch:
            fail_after(patch, 1)
            try:
                small.run(tmp_path / "out", rounds=3)
                break
            except Crash:
                crashes += 1
    assert crashes == 5 + rounds  # prepared, first, two trials, the rounds, recognised; the model is the last file
    assert files(tmp_path / "out") == files(tmp_path / "calm")


@pytest.mark.parametrize("reads", [0, 20, 150, 400])
def test_goes_on_from_within_a_step_to_the_same_bytes(
    reads: int, small: Data, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_at_bucket(patch, reads)
        with pytest.raises(Crash):
            small.run(tmp_path / "out", rounds=2)
    next((tmp_path / "out" / "work").glob("*/given")).write_bytes(b"damaged")
    small.run(tmp_path / "out", rounds=2)
    assert files(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("reads", [150, None])
def test_a_run_that_was_given_up_leaves_nothing_to_one_with_another_seed(
    reads: int | None, small: Data, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if reads is None:  # trained, and no shard is written
            patch.setattr(anchored_shards, "write_shards", Mock(side_effect=Crash))
        else:
            fail_at_bucket(patch, reads)
        with pytest.raises(Crash):
            small.run(tmp_path / "out", rounds=2, seed=1)
    small.run(tmp_path / "out", rounds=2)
    assert files(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("seed", [0, 5])
def test_every_bucket_trains_both_heads_in_every_round(seed: int, tmp_path: Path) -> None:
    data, folds = Data(tmp_path / "data", count=256, noise=0.5), []  # four buckets: an odd number would hide it
    with pytest.MonkeyPatch.context() as patch:
        hashed = anchored_shards._hashed

        def noted(numbers: torch.Tensor, key: int, values: int) -> torch.Tensor:
            found = hashed(numbers, key, values)
            if len(numbers) >= 20 and values == anchored_shards.FOLDS:
                folds.append(float(found.float().mean()))
            return found

        patch.setattr(anchored_shards, "_hashed", noted)
        data.run(tmp_path / "out", rounds=2, seed=seed)
    assert min(folds) > 0
    assert max(folds) < 1


def test_a_lost_shard_is_made_again_without_training(small: Data, tmp_path: Path) -> None:
    first = small.run(tmp_path / "out", rounds=2)
    expected = files(tmp_path / "out")
    (tmp_path / "out" / "shards" / "part-000001.parquet").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(anchored_shards._Training, "model")
        again = small.run(tmp_path / "out", rounds=2)
    assert (first.reused, again.reused) == (0, 2)
    assert files(tmp_path / "out") == expected


def test_another_configuration_is_refused(small: Data, tmp_path: Path) -> None:
    small.run(tmp_path / "out", rounds=1)
    expected = files(tmp_path / "out")
    with pytest.raises(InputError, match="seed: expected what the shards in .* were made from .0., got 1"):
        small.run(tmp_path / "out", rounds=1, seed=1)
    with pytest.raises(InputError, match="anchors: expected what"):
        Data(tmp_path / "data", count=300, seed=1).run(tmp_path / "out", rounds=1)
    with pytest.raises(InputError, match="format|refiner|weight"):
        refine_shards(small.root / "features.npy", small.root / "given.npy", small.anchors[:4], 0.5, tmp_path / "out")
    assert files(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchors": np.zeros((40, 8), int)}, "anchors: expected floating-point numbers, got int64"),
        ({"anchors": np.zeros((40, 3), np.float32)}, r"features in .*: expected shape \(n, 3\), got \(1, 8\)"),
        ({"anchors": np.full((40, 8), np.nan)}, "anchors: expected finite numbers, got a non-finite one in row 0"),
        ({"anchor_labels": np.zeros(3, int)}, r"anchor_labels: expected shape \(40,\), got \(3,\)"),
        ({"num_classes": 5}, "anchor_labels: expected at least one image per class, got none for class 4"),
        ({"given": "features.npy"}, "given: expected integers, but .* holds float16"),
        ({"given": "high.npy"}, "given in .*: expected classes 0 to 3, got 4 in row 0"),
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"shard_rows": 0}, "shard_rows: expected at least 1, got 0"),
    ],
)
def test_bad_inputs_are_named_in_one_line(change: dict[str, Any], message: str, small: Data, tmp_path: Path) -> None:
    np.save(small.root / "high.npy", small.given * 0 + 4)
    arguments: dict[str, Any] = {"given": "given.npy", "anchors": small.anchors, "anchor_labels": small.anchor_labels}
    arguments |= change
    arguments["given"] = small.root / arguments["given"]
    with pytest.raises(InputError, match=message) as caught:
        anchored_shards.anchored_shards(small.root / "features.npy", out=tmp_path / "out", **arguments)
    assert "\n" not in str(caught.value)


def command(data: Data, out: Path, *more: str) -> list[str]:
    names = ("features", "given", "anchors", "anchor_labels")
    inputs = [f"--{name.replace('_', '-')}={data.root / name}.npy" for name in names]
    return ["scale", "--refiner=anchored", *inputs, f"--out={out}", "--shard-rows=100", *more]


def test_the_command_reports_counts_and_goes_on(
    small: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(small, tmp_path / "out")) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["rows"], first["shards"], first["reused"], first["note"]) == (300, 3, 0, "")
    assert first["changed"] > 80
    assert wrong(tmp_path / "out", small) < 0.1
    assert cli.main(command(small, tmp_path / "out")) == 0
    assert json.loads(capsys.readouterr().out) == {**first, "reused": 3}
    assert cli.main(command(small, tmp_path / "out", "--seed=5")) == 3
    assert "seed: expected what the shards in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--threshold=0.5"], "--refiner anchored has no use for --threshold"),
        (["--head=head.npy"], "--refiner anchored has no use for --head"),
        (["--address=auto"], "--refiner anchored has no use for --address"),
        (["--engine=ray"], "--refiner anchored has no use for --engine ray: it trains in one process"),
        (["--refiner=paper"], "--refiner paper needs --prototypes"),
        (["--refiner=paper", "--prototypes=p.npy", "--threshold=0"], "--refiner paper has no use for --anchors"),
    ],
)
def test_options_of_the_other_refiner_are_refused(
    more: list[str], message: str, small: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(command(small, tmp_path / "out", *more))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_says_when_nothing_is_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(unrecognisable(tmp_path / "data"), tmp_path / "out")) == 0
    captured = capsys.readouterr()
    assert f"nothing is changed: {REASONS[6]}" in captured.err
    assert json.loads(captured.out)["changed"] == 0


FORKED = """
import os, sys
import numpy as np
import torch
from synth_refine.scale import anchored as anchored_shards
torch.optim.AdamW([torch.zeros(1)])  # imports for seconds, once here instead of in each run
anchored_shards.BUCKET_ROWS = 64
root = sys.argv[1]
anchors, labels = (np.load(f"{root}/{name}.npy") for name in ("anchors", "anchor_labels"))
while out := sys.stdin.readline().strip():  # importing torch takes seconds, so it is done once and each run is a fork
    child = os.fork()
    if child == 0:
        anchored_shards.anchored_shards(
            f"{root}/features.npy", f"{root}/given.npy", anchors, labels, out, rounds=3, hidden=32, shard_rows=20
        )
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()  # until then even a finished child is there to be killed
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_kills_change_nothing(small: Data, tmp_path: Path) -> None:
    inputs: dict[str, Any] = {"rounds": 3, "shard_rows": 20}
    small.run(tmp_path / "warm", **inputs)
    start = time.monotonic()
    small.run(tmp_path / "calm", **inputs)
    longest = time.monotonic() - start
    chance, killed = random.Random(0), 0
    path = os.pathsep.join([str(Path(anchored_shards.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    program = [sys.executable, "-c", FORKED, str(small.root)]
    with subprocess.Popen(program, env={**os.environ, "PYTHONPATH": path}, **pipes) as runs:
        while killed < 10:
            out = tmp_path / f"killed-{killed}"
            for _ in range(5):
                print(out, file=runs.stdin, flush=True)
                child = int(runs.stdout.readline())
                time.sleep(chance.uniform(0, longest / 2))
                os.kill(child, signal.SIGKILL)
                print(file=runs.stdin, flush=True)
                killed += int(runs.stdout.readline()) == signal.SIGKILL
            small.run(out, **inputs)
            assert files(out) == files(tmp_path / "calm")
        runs.stdin.close()
