"""Pictures of no class among the images: found without being told how many, and no teachers of the others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from gaussians import problem
from sklearn.metrics import roc_auc_score

from benchmarks import no_class
from synth_refine import Refinement, cli, refine_anchored
from synth_refine.labels.artifact import read_artifact
from synth_refine.refine.result import Action, Reason

COUNT = 1500


def with_pictures(count: int = 150) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Features, given labels, synthetic features and their labels, and the true labels, -1 for pictures of no class."""
    easy, rng = problem(COUNT, width=16, noise=0.3, distance=6.0), np.random.default_rng(1)
    centers = 6 * np.eye(16)[10:13]
    features = np.concatenate([easy.features, centers[rng.integers(0, 3, count)] + rng.normal(size=(count, 16))])
    given = np.concatenate([easy.given, rng.integers(0, 4, count)])
    order = rng.permutation(len(given))
    true = np.concatenate([easy.true, np.full(count, -1)])[order]
    return (features[order].astype(np.float32), given[order], easy.synthetic, easy.synthetic_labels), true


def wrong(result: Refinement, given: np.ndarray, true: np.ndarray) -> float:
    return float((result.apply(given) != true)[true >= 0].mean())


def test_pictures_of_no_class_are_proposed_for_removal_and_teach_nothing() -> None:
    arrays, true = with_pictures()
    arrays[0][[0, -1]] = np.nan
    result = refine_anchored(*arrays, rounds=3, outliers=True)
    assert np.flatnonzero(np.isnan(result.no_class)).tolist() == [0, len(true) - 1]
    assert (result.reason[[0, -1]] == Reason.UNSCORED).all()
    found = result.reason == Reason.NO_CLASS
    assert (true[found] < 0).mean() > 0.9
    assert found[true < 0].mean() > 0.5
    assert np.nanmean(result.no_class[true < 0]) > 0.5 > 0.1 > np.nanmean(result.no_class[true >= 0])
    assert (result.actions(arrays[1])[found] == Action.ABSTAIN).all()  # nothing happens without a person
    assert (result.apply(arrays[1])[found] == arrays[1][found]).all()
    alone, alone_true = with_pictures(0)
    assert wrong(result, arrays[1], true) < wrong(refine_anchored(*alone, rounds=3), alone[1], alone_true) + 0.01


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_next_to_nothing_is_proposed_where_there_are_none(noise: float) -> None:
    result = problem(COUNT, noise=noise).refine(outliers=True)
    assert (result.reason == Reason.NO_CLASS).mean() < 0.01


def test_the_commands_propose_the_same_in_memory_and_over_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arrays, true = with_pictures()
    for name, array in zip(("features", "given", "synthetic", "labels"), arrays, strict=True):
        np.save(f"{name}.npy", array)
    options = ["--features", "features.npy", "--given", "given.npy", "--synthetic", "synthetic.npy"]
    options += ["--synthetic-labels", "labels.npy"]
    assert cli.main(["refine", *options, "--outliers", "--out", "refined"]) == 0
    counted = json.loads(capsys.readouterr().out.splitlines()[-1])
    pytest.importorskip("pyarrow")
    assert cli.main(["scale", *options, "--outliers", "--out", "scaled", "--shard-rows", "500"]) == 0
    one, other = read_artifact("refined"), read_artifact("scaled")
    assert counted["no_class"] == len(one.proposed_removals) > 50
    assert one.proposed_removals.tolist() == other.proposed_removals.tolist()
    assert one.labels.tolist() == other.labels.tolist()
    assert (true[one.proposed_removals] < 0).mean() > 0.9
    assert one.no_class[one.proposed_removals].min() > 0.5


@pytest.mark.slow
def test_the_benchmark_measures_with_pictures_and_without(tmp_path: Path) -> None:
    easy, (arrays, true) = problem(600, width=16, noise=0.3, distance=6.0), with_pictures()
    data = {"train": easy.features, "train_labels": easy.true, "no_class": arrays[0][true < 0][:60]}
    data |= {"synthetic": easy.synthetic, "synthetic_labels": easy.synthetic_labels}
    np.savez(tmp_path / "features.npz", **data)
    np.save(tmp_path / "given.npy", easy.given)
    words = ["--data", f"{tmp_path}/features.npz", "--given", f"{tmp_path}/given.npy", "--out", f"{tmp_path}/out"]
    assert no_class.main(words) == 0
    [path] = (tmp_path / "out").glob("*.json")
    without, random, alike = json.loads(path.read_text())["rows"]
    assert without["proposed %"] < 1
    assert random["AUROC"] > max(0.9, random["AUROC, cleanlab"], random["AUROC, cleanlab on posterior"])
    assert (without["wrong before %"], alike["pictures' labels"]) == (100 * easy.noise, "look-alike")


@pytest.mark.slow
def test_frogs_among_the_other_classes_of_cifar10_are_ranked_first() -> None:
    """Frogs among the nine other classes, 35 % of whose labels are wrong."""
    if "SYNTH_REFINE_DATA" not in os.environ:
        pytest.skip("SYNTH_REFINE_DATA does not name the folder with CIFAR-10")
    folder = Path(os.environ["SYNTH_REFINE_DATA"]) / "cifar10"
    with np.load(folder / "features_mobilenetv2.npz", allow_pickle=False) as archive:
        features, synthetic, labels = (archive[name] for name in ("train", "synthetic", "synthetic_labels"))
    with np.load(folder / "labels.npz", allow_pickle=False) as archive:
        true = archive["train"][:45_000].astype(np.int64)
    given = np.load(folder / "noise_labels" / "cifar10-1-0.35.npy", allow_pickle=False)
    frogs, others = np.flatnonzero(true == 6)[:300], np.flatnonzero((true != 6) & (given != 6))[::10]
    rows, rng = np.sort(np.concatenate([frogs, others])), np.random.default_rng(0)
    true, given = true[rows], given[rows].copy()
    frog = true == 6
    given[frog] = rng.choice([one for one in range(10) if one != 6], frog.sum())
    given, some = given - (given > 6), np.flatnonzero(labels != 6)
    known = labels[some] - (labels[some] > 6)
    result = refine_anchored(
        features[rows].astype(np.float32), given, synthetic[some].astype(np.float32), known, outliers=True
    )
    found = result.reason == Reason.NO_CLASS
    assert (found & ~frog).mean() < 0.01
    assert roc_auc_score(frog, result.no_class) > 0.92
