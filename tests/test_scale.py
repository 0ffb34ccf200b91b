"""Shards: the labels of the whole made piece by piece, resumed after any crash, with an artifact at the end."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gaussians import Problem, problem
from kills import content, kill_matrix
from torch.utils._python_dispatch import TorchDispatchMode

from synth_refine import InputError, refine_labels
from synth_refine._io.atomic import locked
from synth_refine._io.store import Store
from synth_refine.labels.artifact import read_artifact
from synth_refine.refine import em, front, rows
from synth_refine.refine.result import REASONS, Reason
from synth_refine.scale import anchored, shards
from synth_refine.scale.shards import Summary, refine_shards

CLASSES = 6
ENDS = (0, 60, 160, 250)
"""Where the files of a folder begin and end."""


class Data:
    """The same images as one .npy file each, as folders of .npy files and as a folder of Parquet files."""

    def __init__(self, root: Path, one: Problem, bad: tuple[int, ...] = (3, 200)) -> None:
        rng, count = np.random.default_rng(0), len(one.given)
        one.features[list(bad)] = np.nan
        self.root, self.one = root, one
        self.features, self.given = one.features.astype(np.float16), one.given
        self.prototypes = np.stack([one.synthetic[one.synthetic_labels == number].mean(0) for number in range(CLASSES)])
        self.head = rng.standard_normal((CLASSES, 9)).astype(np.float32)
        self.logits = (2 * np.eye(CLASSES)[one.true] + rng.standard_normal((count, CLASSES))).astype(np.float32)
        arrays = {"features": self.features, "logits": self.logits, "given": self.given}
        for name, values in arrays.items():
            np.save(root / f"{name}.npy", values)
            (root / name).mkdir()
            for number, start in enumerate(ENDS[:-1]):
                np.save(root / name / f"{number}.npy", values[start : ENDS[number + 1]])
        (root / "parquet").mkdir()
        for number, start in enumerate(ENDS[:-1]):
            part = slice(start, ENDS[number + 1])
            columns = {
                name: values[part] if values.ndim == 1 else list(values[part]) for name, values in arrays.items()
            }
            pq.write_table(pa.table(columns), root / "parquet" / f"{number}.parquet", row_group_size=7 + number)

    @property
    def synthetic(self) -> dict[str, Any]:
        return {"synthetic_features": self.one.synthetic, "synthetic_labels": self.one.synthetic_labels}

    def paper(self, out: Path, **options: Any) -> Summary:
        settings = {"prototypes": self.prototypes, "threshold": 0.4, **options}
        inputs = (settings.pop(name, self.root / f"{name}.npy") for name in ("features", "given"))
        return refine_shards(*inputs, out, **settings)

    def anchored(self, out: Path, **options: Any) -> Summary:
        settings = {"shard_rows": 100, "rounds": 2, **self.synthetic, **options}
        inputs = (settings.pop(name, self.root / f"{name}.npy") for name in ("features", "given"))
        return refine_shards(*inputs, out, **settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("data"), problem(250, CLASSES, noise=0.4, distance=4.0, off=0.5))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(em, "EPOCHS", (2,))


def columns(out: Path) -> dict[str, np.ndarray]:
    """The Parquet shards as one array per column."""
    table = pq.read_table(sorted((out / "shards").glob("*.parquet")))
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


# ---- the labels of the whole ----


@pytest.mark.parametrize(
    ("stored", "bucket_rows", "options"),
    [
        ("npy", 1 << 16, {}),
        ("parquet", 64, {}),
        ("folders", 64, {"second_view": True, "threshold": 0.8, "seed": 5}),
        ("parquet", 64, {"second_view": True, "threshold": "auto"}),
    ],
)
def test_the_anchored_labels_are_those_of_the_arrays_in_memory(
    stored: str, bucket_rows: int, options: dict[str, Any], data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BUCKET_ROWS", bucket_rows)
    places = {name: data.root / name if stored == "folders" else data.root / f"{name}.npy" for name in
              ("features", "given", "logits")}  # fmt: skip
    if stored == "parquet":
        places = dict.fromkeys(places, data.root / "parquet")
    memory, disk = dict(options), dict(options)
    if options:
        memory["second_view"], disk["second_view"] = data.logits, places["logits"]
    summary = data.anchored(tmp_path / "out", features=places["features"], given=places["given"], rounds=12, **disk)
    whole = front.refine(data.features, data.given, **data.synthetic, **memory)
    found = columns(tmp_path / "out")
    np.testing.assert_array_equal(found["refined"], whole.apply(data.given))
    np.testing.assert_array_equal(found["classes"][:, 0], whole.proposed)
    np.testing.assert_array_equal(found["confidence"], whole.confidence.astype(np.float32))
    assert found["reason"].tolist() == [REASONS[one] for one in whole.reason]
    names = ["keep", "change", "abstain"]
    assert found["action"].tolist() == [names[one] for one in whole.actions(data.given)]
    assert summary.warnings == whole.diagnostics.warnings
    assert summary.diagnostics is not None
    assert summary.diagnostics.estimates == whole.diagnostics.estimates
    assert summary.changed > 20
    assert summary.unscored == 2


@pytest.mark.parametrize("options", [{}, {"logits": True}, {"threshold": [0.3, 0.4, 2.0, 0.5, 0.3, 0.3]}], ids=str)
def test_the_papers_labels_are_those_of_the_arrays_in_memory(
    options: dict[str, Any], data: Data, tmp_path: Path
) -> None:
    logits = data.logits if options.get("logits") else None
    limits = options.get("threshold", 0.4)
    disk = {"logits": data.root / "logits.npy"} if logits is not None else {}
    summary = data.paper(tmp_path, threshold=limits, shard_rows=70, **disk)
    whole = refine_labels(data.features, logits, data.prototypes, limits)
    found, refined = columns(tmp_path), whole.apply(data.given)
    np.testing.assert_array_equal(found["row"], np.arange(250))
    np.testing.assert_array_equal(found["given"], data.given)
    np.testing.assert_array_equal(found["refined"], refined)
    np.testing.assert_array_equal(found["classes"][:, 0], whole.proposed)
    np.testing.assert_allclose(found["confidence"], whole.confidence, rtol=1e-5)
    np.testing.assert_allclose(found["margin"], whole.margin, rtol=1e-3, atol=1e-5)
    assert (summary.rows, summary.changed, summary.unscored) == (250, (refined != data.given).sum(), 2)
    assert (summary.shards, summary.reused, summary.diagnostics) == (4, 0, None)


def test_every_way_to_store_the_inputs_gives_the_papers_labels(data: Data, tmp_path: Path) -> None:
    ways = {
        "npy": ("features.npy", "given.npy", "logits.npy"),
        "folders": ("features", "given", "logits"),
        "mixed": ("features", "given.npy", "logits.npy"),
        "parquet": ("parquet",) * 3,
    }
    for name, places in ways.items():
        features, given, logits = (data.root / one for one in places)
        data.paper(tmp_path / name, features=features, given=given, logits=logits)
        found, expected = columns(tmp_path / name), columns(tmp_path / "npy")
        for column, values in expected.items():
            np.testing.assert_array_equal(found[column], values, err_msg=f"{name}: {column}")


def test_the_best_classes_are_those_of_all_scores_in_order(data: Data, tmp_path: Path) -> None:
    data.paper(tmp_path)
    features = data.features.astype(np.float64)
    cosine = features @ data.prototypes.T / np.linalg.norm(features, axis=1, keepdims=True)
    cosine /= np.linalg.norm(data.prototypes, axis=1)
    order = np.argsort(-cosine, axis=1)[:, :5]
    found, scored = columns(tmp_path), np.isfinite(cosine).all(axis=1)
    np.testing.assert_array_equal(found["classes"][scored], order[scored])
    np.testing.assert_allclose(found["scores"][scored], np.take_along_axis(cosine, order, 1)[scored], atol=1e-5)
    assert (found["classes"][~scored] == -1).all()
    assert np.isnan(found["scores"][~scored]).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_head_is_the_logits_it_gives(bias: bool, data: Data, tmp_path: Path) -> None:
    head = data.head if bias else data.head[:, :-1]
    logits = data.features.astype(np.float32) @ data.head[:, :-1].T + (data.head[:, -1] if bias else 0)
    np.save(tmp_path / "logits.npy", logits.astype(np.float32))
    data.paper(tmp_path / "head", head=head)
    data.paper(tmp_path / "logits", logits=tmp_path / "logits.npy")
    found, expected = columns(tmp_path / "head"), columns(tmp_path / "logits")
    np.testing.assert_array_equal(found["refined"], expected["refined"])
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-5)


@pytest.mark.parametrize("refiner", ["paper", "anchored"])
def test_an_artifact_is_left_behind(refiner: str, data: Data, tmp_path: Path) -> None:
    summary = getattr(data, refiner)(tmp_path, shard_rows=70)
    made, found = read_artifact(tmp_path), columns(tmp_path)
    np.testing.assert_array_equal(made.given, data.given)
    np.testing.assert_array_equal(made.labels, found["refined"])
    np.testing.assert_array_equal(made.apply(data.given), found["refined"])
    np.testing.assert_array_equal(made.revert(found["refined"]), data.given)
    assert made.action.tolist() == found["action"].tolist()
    assert (len(made.changed), (made.action == "abstain").sum()) == (summary.changed, summary.abstained)
    [first, *_] = made.changed
    assert made.confidence[first] == pytest.approx(float(found["confidence"][first]), rel=1e-6)
    assert made.reason[first] == REASONS[Reason.ACCEPTED]
    assert made.run["settings"]["refiner"] == refiner
    with pytest.raises(InputError, match="given: expected"):
        made.apply(np.roll(data.given, 1))


def test_rows_that_cannot_be_scored_keep_their_label(data: Data, tmp_path: Path) -> None:
    features = data.features.copy()
    features[100:200] = np.nan  # a whole shard
    np.save(tmp_path / "features.npy", features)
    assert data.anchored(tmp_path / "out", features=tmp_path / "features.npy").unscored == 102
    found, lost = columns(tmp_path / "out"), np.isnan(features).any(axis=1)
    np.testing.assert_array_equal(found["refined"][lost], data.given[lost])
    assert set(found["reason"][lost]) == {REASONS[Reason.UNSCORED]}


def test_nothing_changes_where_the_two_sides_contradict_each_other(data: Data, tmp_path: Path) -> None:
    shifted = (data.one.synthetic_labels + 1) % CLASSES
    summary = data.anchored(tmp_path / "out", synthetic_labels=shifted)
    assert summary.changed == 0
    assert any("nothing is changed: " in line for line in summary.warnings)
    assert data.anchored(tmp_path / "forced", synthetic_labels=shifted, force=True).changed > 50
    said: list[str] = []
    again = data.anchored(tmp_path / "out", synthetic_labels=shifted, say=said.append)  # nothing is left to do
    assert (again.warnings, again.estimates, again.reused) == (summary.warnings, summary.estimates, again.shards)
    assert tuple(said) == summary.warnings


def test_no_row_that_can_be_scored_is_told_as_in_memory(data: Data, tmp_path: Path) -> None:
    features = np.full_like(data.features, np.nan)
    np.save(tmp_path / "features.npy", features)
    summary = data.anchored(tmp_path / "out", features=tmp_path / "features.npy")
    whole = front.refine(features, data.given, **data.synthetic)
    assert summary.unscored == len(data.given) == whole.unscored
    assert read_artifact(tmp_path / "out").action.tolist() == ["abstain"] * len(data.given)
    assert summary.warnings == whole.diagnostics.warnings


def test_no_threshold_is_too_high_and_one_class_has_no_second(data: Data, tmp_path: Path) -> None:
    assert data.paper(tmp_path / "never", threshold=np.inf).changed == 0
    assert read_artifact(tmp_path / "never").labels.tolist() == data.given.tolist()
    np.save(tmp_path / "zeros.npy", data.given * 0)
    one = {"prototypes": data.prototypes[:1], "given": tmp_path / "zeros.npy"}
    data.paper(tmp_path / "one", **one)
    whole = refine_labels(data.features, None, data.prototypes[:1], 0.4)
    np.testing.assert_allclose(columns(tmp_path / "one")["margin"], whole.margin, rtol=1e-5)


def test_labels_in_another_order_are_refused(data: Data, tmp_path: Path) -> None:
    np.save(tmp_path / "given.npy", np.random.default_rng(0).permutation(data.given))
    for run in (data.anchored, data.paper):
        with pytest.raises(InputError, match="given: expected labels of these images in this order"):
            run(tmp_path / "out", given=tmp_path / "given.npy")
    assert not (tmp_path / "out").exists()


# ---- resumed, damaged, refused ----


@pytest.mark.slow
@pytest.mark.parametrize(("refiner", "every"), [("paper", 1), ("anchored", 6)])
def test_killed_at_any_write_and_resumed_the_bytes_are_the_same(
    refiner: str, every: int, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BUCKET_ROWS", 128)
    monkeypatch.setattr(em, "EPOCHS", (1,))
    assert kill_matrix(tmp_path, lambda folder: getattr(data, refiner)(folder, shard_rows=125), every) > 20


class Crash(Exception):
    """Stands for a killed process."""


def crash_after(patch: pytest.MonkeyPatch, files: int) -> None:
    """Let the run crash when it has listed so many files."""
    note, left = Store.note, [files]

    def failing(self: Store, *arguments: Any, **entry: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Crash
        return note(self, *arguments, **entry)

    patch.setattr(Store, "note", failing)


@pytest.mark.parametrize("flips", [0, 5])
def test_finished_steps_are_kept_and_damaged_ones_done_again(
    flips: int, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BUCKET_ROWS", 128)
    data.anchored(tmp_path / "calm")
    crashes, hit = 0, set()
    while True:  # every run gets a few files further
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, 6)
            try:
                data.anchored(tmp_path / "out")
                break
            except Crash:
                crashes += 1
        kept = [path for kind in ("steps", "scratch") for path in sorted((tmp_path / "out/shards" / kind).glob("*"))]
        if crashes <= flips:
            path = kept[crashes * 5 % len(kept)]
            data_of = bytearray(path.read_bytes())
            data_of[len(data_of) // 2] ^= 4
            path.write_bytes(data_of)
            hit.add(path.parent.name)
    assert content(tmp_path / "out") == content(tmp_path / "calm")
    assert crashes > 1
    assert hit == ({"steps", "scratch"} if flips else set())


def test_a_lost_or_damaged_shard_alone_is_made_again(data: Data, tmp_path: Path) -> None:
    first = data.paper(tmp_path, shard_rows=50)
    expected = content(tmp_path)
    folder = tmp_path / "shards"
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    (folder / "part-000001.parquet").unlink()
    damaged = bytearray((folder / "part-000003.parquet").read_bytes())
    damaged[40] ^= 1
    (folder / "part-000003.parquet").write_bytes(damaged)
    manifest = folder / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-10])  # torn inside the line of the last shard
    again = data.paper(tmp_path, shard_rows=50)
    assert (first.reused, again.reused) == (0, 2)
    assert replace(again, reused=0) == first
    assert content(tmp_path) == expected
    kept = [path.name for path in folder.glob("part-*") if path.stat().st_mtime_ns == times[path.name]]
    assert sorted(kept) == ["part-000000.parquet", "part-000002.parquet"]


@pytest.mark.parametrize(
    ("refiner", "change", "name"),
    [
        ("paper", {"threshold": 0.5}, "threshold"),
        ("paper", {"weight": 0.9, "head": np.ones((CLASSES, 8), np.float32)}, "weight"),
        ("paper", {"shard_rows": 99}, "features"),
        ("anchored", {"seed": 1}, "seed"),
        ("anchored", {"force": True}, "force"),
        ("anchored", {"rounds": 3}, "rounds"),
        ("anchored", {"threshold": 0.5}, "threshold"),
    ],
)
def test_other_settings_are_refused_by_name_and_nothing_is_written(
    refiner: str, change: dict[str, Any], name: str, data: Data, tmp_path: Path
) -> None:
    run = getattr(data, refiner)
    run(tmp_path)
    expected = content(tmp_path)
    with pytest.raises(InputError, match=f"out: expected the settings .* begun with, got (another|other) {name}: "):
        run(tmp_path, **change)
    assert content(tmp_path) == expected


def test_inputs_that_have_changed_since_and_another_refiner_are_refused(data: Data, tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", data.features)
    data.paper(tmp_path / "out", features=tmp_path / "features.npy")
    expected = content(tmp_path / "out")
    with pytest.raises(InputError, match="got another refiner"):
        data.anchored(tmp_path / "out")
    with pytest.raises(InputError, match="got other prototypes"):
        data.paper(tmp_path / "out", features=tmp_path / "features.npy", prototypes=2 * data.prototypes[::-1])
    np.save(tmp_path / "features.npy", data.features[:, ::-1])
    with pytest.raises(InputError, match="got other features|given: expected labels of these"):
        data.paper(tmp_path / "out", features=tmp_path / "features.npy")
    assert content(tmp_path / "out") == expected


def test_a_second_writer_and_a_foreign_folder_are_refused(data: Data, tmp_path: Path) -> None:
    (tmp_path / "out" / "shards").mkdir(parents=True)
    with locked(tmp_path / "out" / "shards"), pytest.raises(BlockingIOError, match="another process"):
        data.paper(tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(InputError, match=r"chapter\.tex"):
        data.paper(tmp_path / "thesis")
    assert list((tmp_path / "thesis").iterdir()) == [tmp_path / "thesis" / "chapter.tex"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"given": "features.npy"}, "given: expected integers, but .* holds float16"),
        ({"given": "short.npy"}, "given: expected 250 rows like the features, got 249"),
        ({"given": "high.npy"}, "given.*: expected classes 0 to 5, got 6 in row 0"),
        ({"given": "unlabelled.npy"}, r"given in .*unlabelled\.npy: expected classes .*, got -1 in row 177"),
        ({"features": "given.npy"}, "features: expected floats, but"),
        ({"features": "logits.npy"}, r"prototypes: expected shape \(M, 6\), got \(6, 8\)"),
        ({"features": "nothing"}, "features: expected .npy or .parquet files in the folder"),
        ({"logits": "features.npy"}, r"logits in .*: expected shape \(n, 6\), got"),
        ({"logits": "features"}, r"logits: expected files with the rows of the features' \[250\], got \[60, 100, 90\]"),
        ({"head": np.zeros((6, 3), np.float32)}, r"head: expected shape \(6, 8\) or \(6, 9\), got \(6, 3\)"),
        ({"weight": 0.5}, "weight: expected 1 without logits or head, got 0.5"),
        ({"threshold": None}, "threshold: expected a number for the paper's rule over shards"),
        ({"prototypes": None}, "synthetic_features: expected features of synthetic images, or prototypes, got neither"),
        ({"second_view": "logits.npy"}, "second_view: the paper refiner has no use for it"),
        ({"force": True}, "force: the paper refiner has no use for it"),
        ({"seed": 1}, "seed: the paper refiner over shards has no use for it"),
        ({"rounds": 3}, "rounds: the paper refiner over shards has no use for it"),
        ({"address": "head:6379"}, "address: expected None without engine ray, got 'head:6379'"),
        ({"num_classes": 7}, r"prototypes: expected shape \(7, D\), got \(6, 8\)"),
        ({"synthetic_labels": np.arange(6)}, "synthetic_labels: expected them beside synthetic_features"),
        ({"features": "mixed"}, "features: expected .npy or .parquet files in .*, got both: 0.npy and 0.parquet"),
        ({"engine": "spark"}, "engine: expected local or ray, got 'spark'"),
        ({"shard_rows": 0}, "shard_rows: expected at least 1, got 0"),
        ({"refiner": "anchored"}, "prototypes: the anchored refiner has no use for it"),
        ({"refiner": "anchored", "prototypes": None}, "synthetic_features: the anchored refiner needs it"),
    ],
    ids=str,
)
def test_bad_inputs_are_named_in_one_line(change: dict[str, Any], message: str, data: Data, tmp_path: Path) -> None:
    np.save(data.root / "short.npy", data.given[:-1])
    np.save(data.root / "high.npy", data.given * 0 + CLASSES)
    np.save(data.root / "unlabelled.npy", np.where(np.arange(len(data.given)) == 177, -1, data.given))
    for name in ("nothing", "mixed"):
        (data.root / name).mkdir(exist_ok=True)
    for name in ("0.npy", "0.parquet"):
        (data.root / "mixed" / name).touch()
    for name in ("features", "given", "logits", "second_view"):
        if name in change:
            change = {**change, name: data.root / change[name]}
    with pytest.raises(InputError, match=message) as caught:
        data.paper(tmp_path / "out", **change)
    assert "\n" not in str(caught.value)


# ---- as little memory and as many cores as said ----


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return result


def test_nothing_larger_than_what_a_bucket_asks_for_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BUCKET_ROWS", 256)
    monkeypatch.setattr(em, "EPOCHS", (1,))
    monkeypatch.setattr(anchored, "CHUNK_ELEMENTS", 256 * 8)
    monkeypatch.setattr(front, "ORDER_ROWS", 512)
    one = problem(8000, 16, 16, 0.3)
    np.save(tmp_path / "features.npy", one.features)
    np.save(tmp_path / "given.npy", one.given)
    with Largest() as largest:
        refine_shards(
            tmp_path / "features.npy", tmp_path / "given.npy", tmp_path / "out", rounds=1, shard_rows=512,
            synthetic_features=one.synthetic, synthetic_labels=one.synthetic_labels,
        )  # fmt: skip
    assert 256 * 16 <= largest.elements < 100_000  # the cosines of a bucket; all scores are 128,000


def test_a_shard_per_thread_of_torch_changes_no_byte(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.paper(tmp_path / "calm", shard_rows=125)
    meeting, threads, alone = threading.Barrier(2), [], shards.score_shard

    def together(*arguments: Any) -> Any:
        threads.append(torch.get_num_threads())
        meeting.wait(60)
        return alone(*arguments)

    monkeypatch.setattr(shards, "score_shard", together)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        data.paper(tmp_path / "two", shard_rows=125)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1]
    assert content(tmp_path / "two") == content(tmp_path / "calm")
