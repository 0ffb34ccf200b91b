"""What the answers of an audit say: an estimate of wrong labels that is unbiased and as sure as it claims."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from synth_refine import cli
from synth_refine._io.csv import csv_bytes
from synth_refine.labels.artifact import Artifact, WrongBase, read_artifact, record, write_artifact
from synth_refine.labels.audit import audit_sample, strata, wrong_share
from synth_refine.labels.review import reviewed

COLUMNS = ("id", "given", "decision", "label")


def refinement(count: int = 1000, seed: int = 0) -> tuple[Artifact, np.ndarray]:
    """Labels of three classes, 20 % wrong before; some are repaired, some good ones are spoilt. The truth beside it."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 3, count)
    given = np.where(random.random(count) < 0.2, (truth + 1) % 3, truth)
    labels = np.where((given != truth) & (random.random(count) < 0.7), truth, given)
    labels = np.where(random.random(count) < 0.02, (labels + 1) % 3, labels)
    abstained = (labels == given) & (random.random(count) < 0.1)
    confidence = np.where(random.random(count) < 0.02, np.nan, 0.9)
    return record(given, labels, num_classes=3, abstained=abstained, confidence=confidence), truth


def decisions(path: Path, rows: list[tuple[str, ...]]) -> Path:
    path.write_bytes(csv_bytes(dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))))
    return path


def answers(artifact: Artifact, truth: np.ndarray, count: int) -> list[tuple[str, ...]]:
    sample = audit_sample(artifact, count).tolist()
    return [(str(row), str(artifact.given[row]), "audit", str(truth[row])) for row in sample]


@pytest.mark.parametrize(
    ("sizes", "wrong"),
    [((2307, 600), (70, 90)), ((2307, 600), (230, 180)), ((10_000, 1_000), (100, 50)), ((60, 40), (3, 8))],
)
def test_the_interval_holds_the_truth_as_often_as_it_says_and_the_estimate_is_unbiased(
    sizes: tuple[int, int], wrong: tuple[int, int]
) -> None:
    random, times, truth = np.random.default_rng(0), 3_000, sum(wrong) / sum(sizes)
    seen = [min(50, size) for size in sizes]
    share = cache(lambda *found: wrong_share(list(zip(sizes, found, seen, strict=True))))
    draws = [
        random.hypergeometric(bad, size - bad, number, times)
        for bad, size, number in zip(wrong, sizes, seen, strict=True)
    ]
    found = np.array([share(*pair) for pair in zip(*(one.tolist() for one in draws), strict=True)])
    assert ((found[:, 1] <= truth) & (truth <= found[:, 2])).mean() > 0.935
    assert abs(found[:, 0].mean() - truth) < 4 * found[:, 0].std() / np.sqrt(times)


def test_once_all_were_seen_nothing_is_uncertain() -> None:
    assert wrong_share([(10, 2, 10), (5, 5, 5)]) == pytest.approx([7 / 15] * 3)
    assert wrong_share([(10, 2, 10), (0, 0, 0)]) == pytest.approx([0.2] * 3)
    assert wrong_share([(10, 2, 10), (5, 0, 0)]) is None
    assert wrong_share([]) is None


def test_the_sample_is_of_both_kinds_and_the_same_wherever_it_is_drawn(tmp_path: Path) -> None:
    artifact, _ = refinement()
    sample = audit_sample(artifact)
    changed = artifact.given[sample] != artifact.labels[sample]
    assert (changed.sum(), (~changed).sum()) == (50, 50)
    assert len(set(sample.tolist())) == 100
    assert 10 < changed[:50].sum() < 40  # mixed
    unscored = np.flatnonzero((artifact.action == "abstain") & np.isnan(artifact.confidence))
    assert len(unscored)
    assert not set(unscored.tolist()) & set(np.concatenate(list(strata(artifact).values())).tolist())
    write_artifact(tmp_path / "a", artifact)
    assert audit_sample(read_artifact(tmp_path / "a")).tolist() == sample.tolist()
    assert len(audit_sample(artifact, 10**6)) == 1000 - len(unscored)


def test_every_row_of_a_stratum_is_as_likely_to_be_asked_about() -> None:
    places, times = [], 200
    for seed in range(times):
        artifact, _ = refinement(60, seed)
        for rows in strata(artifact).values():
            chosen = np.isin(rows, audit_sample(artifact, 4))
            if len(rows) > 4:
                places += (np.flatnonzero(chosen) / (len(rows) - 1)).tolist()
    deviation = np.sqrt(1 / 12 / len(places))  # of the mean of places that are uniform in [0, 1]
    assert len(places) > times * 6
    assert abs(np.mean(places) - 0.5) < 4 * deviation


def test_review_tells_what_is_wrong_before_and_after_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    artifact, truth = refinement()
    write_artifact("refined", artifact)
    everyone = answers(artifact, truth, 10**6)
    accepted = [
        (str(row), str(artifact.given[row]), "accept", str(artifact.labels[row])) for row in artifact.changed[:50]
    ]
    decisions(tmp_path / "d.csv", accepted + everyone)
    assert cli.main(["review", "refined", "d.csv", "--out", "reviewed"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)["audit"]
    made = read_artifact("reviewed")
    assert made.run["audit"] == found
    rows = np.concatenate(list(strata(artifact).values()))
    for name, labels in (("before", artifact.given), ("proposed", artifact.labels), ("after", made.labels)):
        assert found[name] == pytest.approx([(labels[rows] != truth[rows]).mean()] * 3), name
    assert f"wrong labels as given: {found['before'][0]:.1%} (" in said.err
    plain = reviewed(artifact, decisions(tmp_path / "plain.csv", accepted))
    assert plain.labels.tolist() == made.labels.tolist()  # answers change no label
    assert "audit" not in plain.run


def test_no_class_is_wrong_and_what_nobody_can_tell_is_left_out(tmp_path: Path) -> None:
    artifact = record(np.array([0, 1, 0, 1]), np.array([1, 1, 0, 1]), num_classes=2)
    rows = [("0", "0", "audit", "1"), ("1", "1", "audit-none", ""), ("2", "0", "audit-unclear", "")]
    found = reviewed(artifact, decisions(tmp_path / "d.csv", rows)).run["audit"]
    assert found["sample"] == {"changed": [1, 1], "kept": [3, 1]}
    assert found["unclear"] == 1
    assert [found[name][0] for name in ("before", "proposed", "after")] == [1.0, 0.75, 1.0]
    rows[0] = ("0", "1", "audit", "1")
    with pytest.raises(WrongBase, match="expected '0' to be given as '0', got '1'"):
        reviewed(artifact, decisions(tmp_path / "d.csv", rows))


def test_accepting_what_was_left_to_a_person_takes_the_class_that_the_page_named(tmp_path: Path) -> None:
    artifact = record(np.array([0, 1]), np.array([0, 0]), num_classes=3, abstained=np.array([True, False]))
    rows = [("0", "0", "accept", "2"), ("1", "1", "accept", "0")]
    assert reviewed(artifact, decisions(tmp_path / "d.csv", rows)).labels.tolist() == [2, 0]
