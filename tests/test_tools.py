"""Label Studio, pandas, Datalab, FiftyOne: what people use already gets the decisions, and gives answers back."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synth_refine import InputError, LabelRefiner, cli, export, refine_anchored, refine_labels
from synth_refine.labels.artifact import NO_CLASS, Artifact, WrongBase, read_artifact, record, write_artifact
from synth_refine.labels.labelstudio import NONE
from synth_refine.labels.review import reviewed

IDS = ["cat/1.png", "cat/2 ä&.png", "cat/3.png", "dog/1.png", "dog/2.png", "dog/3.png"]
CLASSES = ["cat", "dog", "fox & hound"]
GIVEN, REFINED = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 1, 0])
REASONS = ["", "another", "another", NO_CLASS, "doubt", "another"]


@pytest.fixture
def refined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """One image is kept, three are changed, one seems to show no class, one is left to a person; on disk."""
    monkeypatch.chdir(tmp_path)
    artifact = record(
        GIVEN,
        REFINED,
        num_classes=3,
        ids=IDS,
        abstained=np.array([False, False, False, True, True, False]),
        confidence=np.array([0.9, 0.8, np.nan, 0.4, 0.3, 0.7]),
        margin=np.full(6, 0.25),
        reason=REASONS,
        no_class=np.array([0.1, 0.1, 0.1, 0.75, 0.1, 0.1]),
        settings={"classes": CLASSES},
    )
    write_artifact("refined", artifact)
    return artifact


def answered(tasks: list[Any], answers: list[list[str | None]]) -> list[Any]:
    """The tasks as Label Studio exports them; None is a task that an annotator skipped."""
    made = []
    for number, (task, chosen) in enumerate(zip(tasks, answers, strict=True), 1):
        annotations = []
        for one in chosen:
            choice = {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [one]}}
            result = [] if one is None else [{"id": "x", "origin": "manual", **choice}]
            annotations.append({"id": number, "completed_by": 1, "result": result, "was_cancelled": one is None})
        made.append({"id": number, "annotations": annotations, "predictions": [], "data": task["data"], "project": 1})
    return made


def tasks_of() -> list[Any]:
    assert cli.main(["export", "refined", "--format", "labelstudio", "--out", "tasks.json"]) == 0
    return json.loads(Path("tasks.json").read_text())


def test_label_studio_gets_a_task_with_a_prediction_for_each_image_that_asks_for_a_person(
    refined: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tasks_of()
    said = capsys.readouterr()
    assert json.loads(said.out)["count"] == len(tasks) == 5
    for part in ('name="label" toName="image"', '<Choice value="fox &amp; hound"/>', f'<Choice value="{NONE}"/>'):
        assert part in said.err  # the interface that the predictions fit
    assert [task["data"]["image_id"] for task in tasks] == IDS[1:]
    assert tasks[0]["data"] == {
        "image": "/data/local-files/?d=cat/2%20%C3%A4%26.png",
        "image_id": IDS[1],
        "given": "cat",
        "proposed": "dog",
        "reason": "another",
    }
    [prediction] = tasks[0]["predictions"]
    assert prediction["score"] == 0.8
    assert prediction["model_version"].startswith("synth-refine ")
    assert prediction["result"] == [
        {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": ["dog"]}}
    ]
    assert "score" not in tasks[1]["predictions"][0]  # which JSON could not say
    assert tasks[2]["predictions"][0]["result"][0]["value"] == {"choices": [NONE]}
    assert tasks[2]["predictions"][0]["score"] == 0.75
    assert "predictions" not in tasks[3]  # no class is proposed where the refiner abstained
    export(refined, "labelstudio", "bucket.json", url_prefix="s3://photos/")
    assert json.loads(Path("bucket.json").read_text())[0]["data"]["image"] == f"s3://photos/{IDS[1]}"


def test_what_people_chose_in_label_studio_becomes_a_review(
    refined: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[list[str | None]] = [["dog"], ["cat", None], [NONE], ["fox & hound"], ["cat", "dog"]]
    Path("project.json").write_text(json.dumps(answered(tasks_of(), answers)))
    call = ["review", "refined", "project.json", "--format", "labelstudio", "--out", "reviewed"]
    assert cli.main(call) == 0
    assert "1 images stay undecided: their annotators chose different classes" in capsys.readouterr().err
    made = read_artifact("reviewed")
    assert made.labels.tolist() == [0, 1, 0, 1, 2, 1]
    assert made.action.tolist() == ["keep", "change", "keep", "remove", "change", "abstain"]
    assert made.reason[4] == "corrected by hand"
    assert made.run["reviewed"]["disputed"] == 1
    assert [task["data"]["image_id"] for task in _again("reviewed")] == ["cat/2 ä&.png", "dog/2.png", "dog/3.png"]
    Path("decisions.csv").write_text(
        "id,given,decision,label\ncat/2 ä&.png,cat,accept,dog\ncat/3.png,cat,reject,cat\ndog/1.png,dog,remove,dog\n"
        "dog/2.png,dog,correct,fox & hound\n"
    )
    by_page = reviewed(refined, "decisions.csv")  # the same decisions, taken on our own page
    for name in ("labels", "action", "reason"):
        assert getattr(by_page, name).tolist() == getattr(made, name).tolist()


def _again(folder: str) -> list[Any]:
    assert cli.main(["export", folder, "--format", "labelstudio", "--out", "again.json"]) == 0
    return json.loads(Path("again.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tasks: tasks[0]["data"].pop("image_id"), "no fitting entry: 'image_id'"),
        (lambda tasks: tasks[0].pop("annotations"), "no fitting entry: 'annotations'"),  # JSON-MIN, or the tasks
        (lambda tasks: tasks[0].update(annotations=[3]), "expected dict, got int"),
        (lambda tasks: tasks[0]["annotations"][0]["result"][0]["value"].update(choices=["a", "b"]), "expected one"),
        (lambda tasks: tasks[0]["annotations"][0]["result"][0]["value"].update(choices=[[]]), "expected str, got list"),
        (lambda tasks: tasks[0]["annotations"][0]["result"][0]["value"].update(choices=["cow"]), "got 'cow'"),
        (lambda tasks: tasks.append(tasks[0]), "expected every id once"),
        (lambda tasks: tasks[0]["data"].update(image_id="cat/9.png"), "expected ids of the artifact"),
    ],
)
def test_an_export_that_does_not_fit_is_refused_in_one_line(
    refined: Artifact, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = answered(tasks_of(), [["dog"], ["dog"], [NONE], ["dog"], ["cat"]])
    change(tasks)
    Path("project.json").write_text(json.dumps(tasks))
    capsys.readouterr()
    assert cli.main(["review", "refined", "project.json", "--format", "labelstudio", "--out", "reviewed"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("synth-refine: decisions: ")
    assert message in error
    assert error.count("\n") == 1
    assert not Path("reviewed").exists()


def test_answers_about_another_refinement_are_refused(refined: Artifact) -> None:
    tasks = answered(tasks_of(), [["dog"], ["dog"], [NONE], ["dog"], ["cat"]])
    tasks[0]["data"]["proposed"] = "fox & hound"
    tasks[0]["annotations"][0]["result"][0]["value"]["choices"] = ["fox & hound"]
    Path("project.json").write_text(json.dumps(tasks))
    with pytest.raises(WrongBase, match="they are about another refinement"):
        reviewed(refined, "project.json", format="labelstudio")
    with pytest.raises(InputError, match="format: expected csv or labelstudio, got 'xml'"):
        reviewed(refined, "project.json", format="xml")


def test_pandas_gets_a_row_per_image_with_all_that_is_known(refined: Artifact) -> None:
    pytest.importorskip("pandas")
    table = refined.to_pandas()
    names = ["id", "given", "refined", "action", "confidence", "margin", "reason", "no_class"]
    assert list(table) == [*names, "given_class", "refined_class"]
    assert table["id"].tolist() == IDS
    assert table["given"].tolist() == GIVEN.tolist()
    assert table["action"].tolist() == ["keep", "change", "change", "abstain", "abstain", "change"]
    assert table["refined_class"].tolist() == [CLASSES[label] for label in REFINED]
    assert table.loc[table["reason"] == NO_CLASS, "no_class"].tolist() == [0.75]
    assert table["confidence"].isna().tolist() == [False, False, True, False, False, False]
    assert read_artifact("refined").to_pandas()["refined"].tolist() == REFINED.tolist()


def test_pandas_gets_the_proposal_of_a_result_whether_accepted_or_not() -> None:
    pytest.importorskip("pandas")
    features = np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.7], [np.nan, 0.0]])
    result = refine_labels(features, None, np.eye(2), 0.9)
    given = np.array([1, 1, 1, 0])
    table = result.to_pandas(given, ids=list("abcd"), classes=["cat", "dog"])
    assert table["refined"].tolist() == result.apply(given).tolist() == [0, 1, 1, 0]
    assert table["proposed"].tolist() == [0, 1, 0, -1]
    assert table["proposed_class"].tolist()[:3] == ["cat", "dog", "cat"]
    assert table["proposed_class"].isna().tolist() == [False, False, False, True]
    with pytest.raises(InputError, match="given: expected the labels to refine"):
        result.to_pandas()
    with pytest.raises(InputError, match="classes: expected 2 names, got 1"):
        result.to_pandas(given, classes=["cat"])


def test_parquet_holds_all_that_pandas_does_of_the_images_to_train_on(refined: Artifact) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    Path("decisions.csv").write_text("id,given,decision,label\ndog/1.png,dog,remove,dog\n")
    assert cli.main(["review", "refined", "decisions.csv", "--out", "reviewed"]) == 0
    for folder, kept in (("refined", [0, 1, 2, 3, 4, 5]), ("reviewed", [0, 1, 2, 4, 5])):
        assert cli.main(["export", folder, "--format", "parquet", "--out", f"{folder}.parquet"]) == 0
        found = parquet.read_table(f"{folder}.parquet").to_pydict()
        known = read_artifact(folder).columns()
        known = {"label": known.pop("refined"), "class": known.pop("refined_class"), **known}
        assert set(found) == set(known)
        for name, values in known.items():
            assert str(found[name]) == str([values[row] for row in kept]), name


def test_datalab_has_the_same_columns_in_its_own_table(refined: Artifact) -> None:
    pandas, cleanlab = pytest.importorskip("pandas"), pytest.importorskip("cleanlab")
    assert cli.main(["export", "refined", "--format", "datalab", "--out", "issues.csv"]) == 0
    found = pandas.read_csv("issues.csv", index_col="id")
    given, probs = np.array(["cat", "dog"])[np.arange(40) % 2], np.full((40, 2), 0.1)
    probs[np.arange(40), np.arange(40) % 2] = 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lab = cleanlab.Datalab({"label": given}, label_name="label", verbosity=0)
        lab.find_issues(pred_probs=probs, issue_types={"label": {}})
    own = lab.get_issues("label")
    assert list(found) == list(own)
    assert found.dtypes.tolist() == own.dtypes.tolist()
    assert found["is_label_issue"].tolist() == (GIVEN != REFINED).tolist()
    assert found["label_score"].round(6).tolist()[1::4] == [0.2, 0.3]
    assert found["given_label"].tolist() == [CLASSES[label] for label in GIVEN]
    assert found["predicted_label"].tolist() == [CLASSES[label] for label in REFINED]


def test_fiftyone_reads_a_field_per_column_of_every_image(refined: Artifact) -> None:
    """As its CSVDataset does: paths below data_path, and no field where a cell is empty."""
    assert cli.main(["export", "refined", "--format", "fiftyone", "--out", "samples.csv"]) == 0
    with Path("samples.csv").open(newline="", encoding="utf-8") as file:
        rows = {row.pop("filepath"): row for row in csv.DictReader(file)}
    assert list(rows) == IDS
    assert rows[IDS[1]]["given"] == "cat"
    assert rows[IDS[1]]["refined"] == "dog"
    assert rows[IDS[1]]["action"] == "change"
    assert float(rows[IDS[1]]["confidence"]) == 0.8
    assert rows[IDS[3]]["reason"] == NO_CLASS
    assert float(rows[IDS[3]]["no_class"]) == 0.75
    assert rows[IDS[2]]["confidence"] == ""


def pictures() -> tuple[Any, ...]:
    """Features, true and given classes of images by name, and features and classes of synthetic ones."""
    rng, names = np.random.default_rng(0), np.array(["cat", "dog"])
    true, intended = names[np.arange(120) % 2], names[np.arange(20) % 2]
    given = np.where(rng.random(120) < 0.3, np.where(true == "cat", "dog", "cat"), true)
    features, synthetic = (rng.normal(size=(len(one), 4)) + 4 * (one == "dog")[:, None] for one in (true, intended))
    return features, true, given, synthetic, intended


def test_the_estimator_refines_as_the_call_does_and_can_be_cloned() -> None:
    base = pytest.importorskip("sklearn.base")
    features, true, given, synthetic, intended = pictures()
    about = {"synthetic_features": synthetic, "synthetic_labels": intended}
    refiner = base.clone(LabelRefiner(threshold=0.6, seed=3))
    assert refiner.get_params() == {"refiner": "anchored", "threshold": 0.6, "force": False, "seed": 3}
    assert refiner.fit(features, given, **about) is refiner
    refined = refiner.transform(given)
    assert refiner.classes_.tolist() == ["cat", "dog"]
    numbers = refine_anchored(
        features, (given == "dog") * 1, synthetic, (intended == "dog") * 1, threshold=0.6, seed=3
    ).apply((given == "dog") * 1)
    assert refined.tolist() == refiner.labels_.tolist() == refiner.classes_[numbers].tolist()
    assert (refined != true).mean() < 0.05 < (given != true).mean()
    for wrong, message in (
        (given[::-1], "expected the labels that were refined"),
        (given[:5], r"expected shape \(120,"),
    ):
        with pytest.raises(InputError, match=message):
            refiner.transform(wrong)
    with pytest.raises(InputError, match="given: expected the labels that were fitted, got .*cow"):
        refiner.transform(np.where(np.arange(120) == 7, "cow", given))
    with pytest.raises(InputError, match="synthetic_features: expected those of synthetic images"):
        LabelRefiner().fit(features, given)


class ByItsOwnImages(LabelRefiner):
    """With the synthetic images that scikit-learn's checks do not know of: the real ones, and their labels."""

    def fit(self, X: Any, y: Any) -> LabelRefiner:  # type: ignore[override]
        return super().fit(X, y, synthetic_features=X, synthetic_labels=y)


TAKES_LABELS = "it gives `transform` features, which takes the labels that were fitted"
RANDOM_LABELS = "its labels are random, and labels that have nothing to do with the images are refused"
NOT_APPLICABLE = {
    **dict.fromkeys(
        (
            *("check_n_features_in_after_fitting", "check_estimators_dtypes", "check_dtype_object"),
            *("check_estimators_nan_inf", "check_estimators_pickle", "check_f_contiguous_array_estimator"),
            *("check_methods_sample_order_invariance", "check_methods_subset_invariance", "check_dict_unchanged"),
            *("check_fit2d_predict1d", "check_transformer_data_not_an_array", "check_transformer_general"),
            *("check_transformer_preserve_dtypes",),
        ),
        TAKES_LABELS,
    ),
    **dict.fromkeys(("check_fit_idempotent", "check_fit_check_is_fitted", "check_n_features_in"), RANDOM_LABELS),
    "check_pipeline_consistency": "a step of a pipeline hands features on, not labels",
    "check_array_api_input": "it is run on request alone",
}


@pytest.mark.slow
def test_the_estimator_passes_scikit_learns_checks_that_apply() -> None:
    pytest.importorskip("sklearn")
    from sklearn.utils.estimator_checks import estimator_checks_generator

    seen, ran = set(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # doubts about made-up images, and checks that are to come
        for estimator, check in estimator_checks_generator(ByItsOwnImages()):
            name = check.func.__name__
            seen.add(name)
            if name not in NOT_APPLICABLE:
                check(estimator)
                ran += 1
    assert NOT_APPLICABLE.keys() <= seen
    assert ran >= 25
