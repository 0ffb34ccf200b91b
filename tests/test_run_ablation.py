"""Studies: one record each, resumed at the next setting, shown as a table and a picture."""

from types import SimpleNamespace

import pytest
import torch
from conftest import command

from benchmarks import refiners, run_ablation
from benchmarks.records import read_records


def study(name, arrays, out, *more):
    return ["--study", name, *command(arrays, out, *more)]


@pytest.mark.parametrize("name", ["threshold", "weight", "prototypes", "centring", "shards"])
def test_a_study_has_a_record_a_table_and_a_picture(name, arrays, tmp_path, capsys):
    assert run_ablation.main(study(name, arrays, tmp_path)) == 0
    out = capsys.readouterr().out
    [record] = read_records([tmp_path / "blobs" / "ablation"])
    points = run_ablation.STUDIES[name]
    assert [point["value"] for point in record["points"]] == [point.value for point in points]
    assert out.count("\n| ") == len(points)
    assert all(f"{point['labels']['noise_after']:.1%}" in out for point in record["points"])
    assert (tmp_path / "blobs" / "ablation" / f"{name}.png").stat().st_size > 1000


def test_estimates_are_recorded_beside_the_truth(arrays, tmp_path, capsys):
    assert run_ablation.main(study("estimates", arrays, tmp_path, "--noise", "uniform-0.4")) == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line[0].strip() for line in lines[2:]] == ["confused", "uniform-0.4"]
    for record, line in zip(read_records([tmp_path / "blobs" / "ablation"]), lines[2:], strict=True):
        [point] = record["points"]
        labels, estimated = point["labels"], point["estimates"]
        for name in ("before", "after"):
            value, low, high = estimated[name]
            assert low <= value <= high
            assert abs(value - labels[f"noise_{name}"]) < 0.1
        moved = sum(labels[way] for way in ("wrong_to_right", "right_to_wrong", "wrong_to_wrong"))
        assert moved == labels["changed"] > 20
        wrong = (labels["right_to_wrong"] + labels["wrong_to_wrong"]) / labels["changed"]
        shown = [f"{labels['noise_before']:.3f}", f"{labels['noise_after']:.3f}", f"{wrong:.3f}"]
        assert [cell.strip() for cell in line[2::2]] == shown
        assert line[1].strip() == "{:.3f} ({:.3f} to {:.3f})".format(*estimated["before"])


def test_a_killed_study_goes_on_at_its_next_setting(arrays, tmp_path, monkeypatch, capsys):
    counted = []
    original = run_ablation.measure

    def measure(study, point, refined, config):
        counted.append(point.value)
        if len(counted) == 3:
            raise KeyboardInterrupt
        return original(study, point, refined, config)

    monkeypatch.setattr(run_ablation, "measure", measure)
    arguments = study("threshold", arrays, tmp_path)
    assert run_ablation.main(arguments) == 130
    assert not (tmp_path / "blobs" / "ablation").exists()
    assert run_ablation.main(arguments) == 0
    values = [point.value for point in run_ablation.STUDIES["threshold"]]
    assert counted == values[:3] + values[2:]
    assert not list((tmp_path / "blobs" / ".work").glob("*.json"))


def test_discarding_takes_the_same_number_from_every_class(arrays, tmp_path, monkeypatch):
    monkeypatch.setitem(run_ablation.PUBLISHED_FILTER, "per_class", 10)
    assert run_ablation.main(study("discard", arrays, tmp_path)) == 0
    [record] = read_records([tmp_path / "blobs" / "ablation"])
    kept = {point["value"]: point["kept"] for point in record["points"]}
    assert kept == {
        "all": 200,
        "random discard": 170,
        "published filter": 170,
        "relabel (paper)": 200,
        "our filter + synthetic": 170,
        "all + synthetic": 200,
    }
    noise = {point["value"]: point["labels"]["noise_after"] for point in record["points"]}
    assert noise["published filter"] < noise["random discard"]
    assert all(0 <= point["test_accuracy"]["last"] <= 1 for point in record["points"])
    # As the authors do, it fine-tunes the initial classifier.
    started = {"relabel": lambda task, *_: SimpleNamespace(test_accuracy={"last": len(task.initial)})}
    monkeypatch.setattr(run_ablation, "ADAPTERS", started)
    assert run_ablation.main(study("discard", arrays, tmp_path / "again")) == 0
    [record] = read_records([tmp_path / "again" / "blobs" / "ablation"])
    assert all(point["test_accuracy"]["last"] > 0 for point in record["points"])


def test_the_filter_first_discards_what_the_rule_would_relabel_in_its_order(monkeypatch):
    monkeypatch.setitem(run_ablation.PUBLISHED_FILTER, "per_class", 2)
    looks = torch.eye(2)[[0, 0, 1, 0, 1, 1]]  # of images that are all labelled 0
    evidence = refiners.Evidence(looks, 9 * looks, torch.zeros(6, dtype=torch.int64), torch.eye(2), torch.arange(2), 2)
    labels = run_ablation.published_filter(evidence)
    assert (labels == run_ablation.DISCARDED).tolist() == [False, False, True, False, True, False]


def test_studies_that_cannot_run_say_why(arrays, tmp_path, capsys):
    assert run_ablation.main(study("modality", arrays, tmp_path)) == 3
    assert "error: study: expected an encoder that reads text" in capsys.readouterr().err
    assert run_ablation.main(study("luck", arrays, tmp_path)) == 3
    assert "error: study: expected one of refiners, estimates" in capsys.readouterr().err


def test_every_refiner_but_the_soft_ones_is_compared():
    compared = {point.value for point in run_ablation.STUDIES["refiners"]}
    assert compared == set(refiners.REFINERS) - refiners.SOFT_REFINERS
