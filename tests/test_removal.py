"""Images that show none of the classes: proposed, removed by a decision, left out everywhere, and brought back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from synth_refine import InputError, Refinement, cli, inject, verify
from synth_refine._io.csv import read_csv
from synth_refine.labels.artifact import Artifact, Damaged, read_artifact, record, write_artifact
from synth_refine.labels.export import FORMATS, export
from synth_refine.labels.inject import NotInjected, by_key
from synth_refine.labels.review import reviewed
from synth_refine.labels.trees import apply_tree, revert_tree
from synth_refine.refine.result import Action, Reason

IDS = ["cat/1.png", "cat/2.png", "cat/3.png", "dog/1.png", "dog/2.png"]
GIVEN = np.array([0, 0, 0, 1, 1])
PROPOSED = np.array([0, 1, 1, 1, 0])
REASONS = np.array([Reason.SAME, Reason.ACCEPTED, Reason.NO_CLASS, Reason.NO_CLASS, Reason.ACCEPTED]).astype(int)
SCORES = np.array([0.1, 0.2, 0.9, 0.8, 0.3])
DECISIONS = "id,given,decision,label\ncat/3.png,cat,remove,cat\ncat/2.png,cat,accept,dog\ndog/1.png,dog,reject,dog\n"


def proposal() -> Artifact:
    one = np.ones(5)
    accepted, ties = REASONS == Reason.ACCEPTED, np.empty((0, 2), dtype=int)
    result = Refinement(PROPOSED, one, one, accepted, REASONS, ties, 2, given=GIVEN, no_class=SCORES)
    assert result.actions(GIVEN).tolist() == [Action.KEEP, Action.CHANGE, Action.ABSTAIN, Action.ABSTAIN, Action.CHANGE]
    return result.record(GIVEN, ids=IDS, settings={"classes": ["cat", "dog"], "source": "folder"})


@pytest.fixture
def removed(tmp_path: Path) -> Artifact:
    """cat/3.png is removed, cat/2.png is a dog, the rest stays; read back from disk."""
    (tmp_path / "decisions.csv").write_text(DECISIONS)
    write_artifact(tmp_path / "reviewed", reviewed(proposal(), tmp_path / "decisions.csv"))
    return read_artifact(tmp_path / "reviewed")


def fill(folder: Path) -> dict[str, bytes]:
    for one in IDS:
        (folder / one).parent.mkdir(parents=True, exist_ok=True)
        (folder / one).write_bytes(one.encode())
    (folder / "notes.txt").write_text("mine")
    return content(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_removal_is_proposed_and_nothing_else(tmp_path: Path) -> None:
    made = proposal()
    write_artifact(tmp_path / "a", made)
    read = read_artifact(tmp_path / "a")
    for one in (made, read):
        assert one.proposed_removals.tolist() == [2, 3]
        assert one.no_class[[2, 3]].tolist() == [0.9, 0.8]
        assert (one.removed.size, one.kept.size, one.run["format"]) == (0, 5, 1)
        assert one.apply(GIVEN).tolist() == [0, 1, 0, 1, 0]  # what is proposed for removal keeps its label
    assert read_csv("changes", tmp_path / "a" / "changes.csv")["no_class"][1] == "0.9"


def test_a_decision_removes_and_old_readers_refuse(tmp_path: Path, removed: Artifact) -> None:
    assert removed.action.tolist() == ["keep", "change", "remove", "keep", "abstain"]
    assert (removed.removed.tolist(), removed.kept.tolist(), removed.changed.tolist()) == ([2], [0, 1, 3, 4], [1])
    assert removed.apply(GIVEN).tolist() == [0, 1, 0, 1, 1]
    assert removed.run["format"] == 2
    (tmp_path / "by-hand.csv").write_text("id,given,decision,label\ncat/1.png,cat,remove,cat\n")
    assert reviewed(proposal(), tmp_path / "by-hand.csv").reason[0] == "removed by hand"  # which nobody had proposed
    (tmp_path / "wrong.csv").write_text("id,given,decision,label\ncat/1.png,cat,remove,dog\n")
    with pytest.raises(InputError, match="expected remove of 'cat' for 'cat/1.png'"):
        reviewed(proposal(), tmp_path / "wrong.csv")
    with pytest.raises(InputError, match="removed: expected rows that keep their label, got row 0"):
        record(np.array([0]), np.array([1]), removed=np.array([True]))
    run = json.loads((tmp_path / "reviewed" / "run.json").read_text())
    for change in ({"format": 3}, {"labels": {**run["labels"], "removed": 2}}):
        (tmp_path / "reviewed" / "run.json").write_text(json.dumps({**run, **change}))
        with pytest.raises(Damaged):
            read_artifact(tmp_path / "reviewed")


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_loses_the_image_and_gets_it_back(tmp_path: Path, removed: Artifact, link: bool) -> None:
    before = fill(tmp_path / "old")
    new, aside, back = tmp_path / "new", tmp_path / "new.removed", tmp_path / "back"
    apply_tree(removed, tmp_path / "old", new, link=link)
    assert sorted(content(new)) == ["cat/1.png", "dog/1.png", "dog/2.png", "dog/2~cat.png", "notes.txt"]
    assert content(aside) == {"cat/3.png": b"cat/3.png"}
    revert_tree(removed, new, back, link=link)
    assert content(back) == before == content(tmp_path / "old")

    (aside / "cat/3.png").unlink()
    with pytest.raises(InputError, match=r"expected the 1 removed ones in .*new\.removed, got no cat/3\.png"):
        revert_tree(removed, new, tmp_path / "again")


def test_what_a_killed_apply_left_beside_is_taken_and_nothing_else(tmp_path: Path, removed: Artifact) -> None:
    fill(tmp_path / "old")
    aside = tmp_path / "new.removed"
    (aside / "cat").mkdir(parents=True)
    (aside / "cat/3.png").write_bytes(b"something of mine")
    with pytest.raises(InputError, match=r"out: expected .*new\.removed to be free"):
        apply_tree(removed, tmp_path / "old", tmp_path / "new", dry_run=True)
    (aside / "cat/3.png").write_bytes(b"cat/3.png")
    apply_tree(removed, tmp_path / "old", tmp_path / "new")
    assert "cat/3.png" not in content(tmp_path / "new")


def test_the_commands_say_and_do_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = fill(tmp_path / "old")
    write_artifact("refined", proposal())
    Path("decisions.csv").write_text(DECISIONS)
    np.save("given.npy", GIVEN.astype(np.uint8))
    Path("given.csv").write_text("id,label\n" + "".join(f"{IDS[row]},{GIVEN[row]}\n" for row in (4, 2, 0, 1, 3)))

    def call(*words: str) -> dict[str, Any]:
        assert cli.main(words) == 0
        return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]

    found = call("verify", "refined")
    assert (found["no_class"], found["removed"]) == (2, 0)
    assert call("review", "refined", "decisions.csv", "--out", "reviewed")["removed"] == 1
    assert call("apply", "reviewed", "--images", "old", "--out", "new")["removed"] == 1
    call("revert", "reviewed", "--images", "new", "--out", "back")
    assert content(tmp_path / "back") == before
    for kind, kept in ((".npy", [0, 1, 3, 4]), (".csv", [0, 2, 3, 4])):  # rows of the file that is written
        done = call("apply", "reviewed", "--given", f"given{kind}", "--out", f"labels{kind}")
        assert np.load(done["kept"]).tolist() == kept
        call("verify", "reviewed", "--labels", f"labels{kind}")
        call("revert", "reviewed", "--labels", f"labels{kind}", "--out", f"again{kind}")
        assert Path(f"again{kind}").read_bytes() == Path(f"given{kind}").read_bytes()
    assert cli.main(["export", "reviewed", "--format", "npy", "--out", "out.npy"]) == 3
    assert "leave out the 1 removed images" in capsys.readouterr().err
    call("export", "reviewed", "--format", "npy", "--out", "out.npy", "--keep-removed")
    assert np.load("out.npy").tolist() == [0, 1, 0, 1, 1]


def test_a_table_of_images_keeps_its_rows_and_lists_those_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("path,label\nb.png,dog\na.png,cat\n")
    settings = {"classes": ["cat", "dog"], "source": "csv"}
    gone = np.array([False, True])
    artifact = record(np.array([0, 1]), np.array([1, 1]), ids=["a.png", "b.png"], settings=settings, removed=gone)
    apply_tree(artifact, tmp_path / "old.csv", tmp_path / "new.csv")
    assert np.load(tmp_path / "new.csv.kept.npy").tolist() == [1]
    revert_tree(artifact, tmp_path / "new.csv", tmp_path / "back.csv")
    assert (tmp_path / "back.csv").read_bytes() == (tmp_path / "old.csv").read_bytes()
    (tmp_path / "new.csv").unlink()
    whole = record(artifact.given, artifact.labels, ids=artifact.ids, settings=settings)
    with pytest.raises(InputError, match="new.csv.kept.npy to be free"):  # it would hide an image that is kept
        apply_tree(whole, tmp_path / "old.csv", tmp_path / "new.csv")


def test_each_format_leaves_removed_images_out_or_says_so_or_refuses(tmp_path: Path, removed: Artifact) -> None:
    left = {}
    for name, rules in FORMATS.items():
        ending = next((one for one in (".csv", ".npy", ".json") if one in rules.name.replace("\\", "")), ".x")
        path = tmp_path / f"{name}{ending}"
        if rules.removal == "refuse":
            with pytest.raises(InputError):
                export(removed, name, path)
        elif name == "parquet":
            pytest.importorskip("pyarrow.parquet")
            export(removed, name, path)
        else:
            left[name] = export(removed, name, path).path.read_bytes()
    assert set(left) == {"csv", "jsonl", "imagefolder", "kept", "cleanlab", "datalab", "fiftyone", "labelstudio"}
    assert json.loads(left["labelstudio"])[0]["data"]["image_id"] == "cat/2.png"
    assert b"cat/3.png" not in left["labelstudio"]
    for name in ("csv", "jsonl", "imagefolder"):
        assert [one.encode() in left[name] for one in IDS] == [True, True, False, True, True], name
    assert np.load(tmp_path / "kept.npy").tolist() == [0, 1, 3, 4]
    issues = read_csv("issues", tmp_path / "cleanlab.csv")
    assert issues["is_label_issue"] == ["False", "True", "True", "False", "False"]
    assert issues["label_quality"][2] == "0.0"
    bare = replace(removed, ids=None)
    export(bare, "csv", tmp_path / "bare.csv")
    assert read_csv("bare", tmp_path / "bare.csv")["id"] == ["0", "1", "3", "4"]
    with pytest.raises(InputError, match="format: expected one that can leave out the 1 removed images"):
        export(bare, "json", tmp_path / "labels.json")
    assert json.loads(export(bare, "json", tmp_path / "labels.json", keep_removed=True).path.read_text())[2] == 0


class Pictures(Dataset[tuple[int, int]]):
    def __init__(self) -> None:
        self.targets = GIVEN.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:  # type: ignore[override]
        return torch.tensor([float(row)]), self.targets[row]


def test_inject_leaves_the_image_out_and_verify_sees_it(removed: Artifact) -> None:
    removed = replace(removed, ids=None)
    pictures = Pictures()
    report = inject(pictures, removed)
    assert (report.count, report.changed, report.removed) == (5, 1, 1)
    assert [(int(image), label) for image, label in report.dataset] == [(0, 0), (1, 1), (3, 1), (4, 1)]
    verify(report.dataset, removed)
    verify(DataLoader(report.dataset), removed)
    with pytest.raises(NotInjected, match="expected the removed images to be left out, got 1"):
        verify(pictures, removed)
    assert inject(report.dataset, removed).removed == 0  # it is left out already
    assert report.revert() is pictures
    assert pictures.targets == GIVEN.tolist()
    part = inject(Subset(pictures, [4, 2, 1, 0]), removed)
    assert [int(image) for image, _ in part.dataset] == [4, 1, 0]


def test_inject_refuses_a_loader_and_changes_nothing(removed: Artifact) -> None:
    pictures = Pictures()
    with pytest.raises(InputError, match="expected one whose items can be left out, .* got DataLoader"):
        inject(DataLoader(pictures), replace(removed, ids=None))
    assert pictures.targets == GIVEN.tolist()


def test_a_stream_leaves_a_removed_key_out(removed: Artifact) -> None:
    relabel = by_key(removed)
    assert relabel({"__key__": "cat/3.png", "cls": 0}) is None
    assert relabel({"__key__": "cat/2.png", "cls": 0}) == {"__key__": "cat/2.png", "cls": 1}


def test_a_hugging_face_dataset_is_selected_from(removed: Artifact) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": list(range(5)), "label": GIVEN.tolist()})
    report = inject(data, replace(removed, ids=None))
    assert report.dataset["image"][:] == [0, 1, 3, 4]
    assert report.dataset["label"][:] == [0, 1, 1, 1]
