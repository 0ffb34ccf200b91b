"""Folders and tables of images: what an artifact changes in them, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from synth_refine import InputError
from synth_refine._io.csv import read_csv
from synth_refine.labels.artifact import Artifact, WrongBase, WrongIds, record
from synth_refine.labels.trees import apply_tree, new_places, revert_tree, verify_tree


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small(ids: list[str], given: list[int], labels: list[int], kind: str = "folder") -> Artifact:
    settings = {"classes": ["cat", "dog"], "source": kind}
    return record(np.array(given), np.array(labels), num_classes=2, ids=ids, settings=settings)


def fill(folder: Path, ids: list[str]) -> None:
    for one in ids:
        (folder / one).parent.mkdir(parents=True, exist_ok=True)
        (folder / one).write_bytes(one.encode())


def test_no_two_images_meet_in_one_place(tmp_path: Path) -> None:
    ids = ["cat/1.png", "cat/in/2.png", "dog/1.png", "dog/1~cat.png"]
    artifact = small(ids, [0, 0, 1, 1], [1, 1, 0, 1])
    assert new_places(artifact) == ["dog/1~cat~cat.png", "dog/in/2.png", "cat/1~dog.png", "dog/1~cat.png"]
    fill(tmp_path / "old", ids)
    for link in (False, True):
        new, back = tmp_path / f"new{link}", tmp_path / f"back{link}"
        apply_tree(artifact, tmp_path / "old", new, link=link)
        assert sorted(content(new)) == sorted(new_places(artifact))
        assert (new / "dog/in/2.png").samefile(tmp_path / "old/cat/in/2.png") == link
        revert_tree(artifact, new, back, link=link)
        assert content(back) == content(tmp_path / "old")


def test_images_go_to_the_folder_that_the_table_beside_them_names(tmp_path: Path) -> None:
    ids, classes = ["dog/1.png", "cat/1.png", "top/1.png"], ["cat", "dog", "T-shirt / top"]
    fill(tmp_path / "old", ids)
    (tmp_path / "old" / "class_folders.csv").write_text("folder,class\ndog,cat\ncat,dog\ntop,T-shirt / top\n")
    settings = {"classes": classes, "source": "folder"}
    artifact = record(np.array([0, 1, 2]), np.array([2, 1, 0]), ids=ids, settings=settings)
    apply_tree(artifact, tmp_path / "old", tmp_path / "new")
    assert {"top/1~dog.png", "cat/1.png", "dog/1~top.png"} < set(content(tmp_path / "new"))
    verify_tree(artifact, tmp_path / "new")
    revert_tree(artifact, tmp_path / "new", tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "old")


def test_a_class_that_loses_all_its_images_keeps_its_folder(tmp_path: Path) -> None:
    fill(tmp_path / "old", ["cat/1.png"])
    apply_tree(small(["cat/1.png"], [0], [1]), tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new" / "cat").is_dir()
    assert list(content(tmp_path / "new")) == ["dog/1.png"]


def test_a_table_is_written_beside_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("path,label,by\na.png,cat,me\nb.png,dog,=you\n")
    artifact = small(["a.png", "b.png"], [0, 1], [1, 1], "csv")
    apply_tree(artifact, tmp_path / "old.csv", tmp_path / "new.csv")
    assert read_csv("new", tmp_path / "new.csv")["label"] == ["dog", "dog"]
    revert_tree(artifact, tmp_path / "new.csv", tmp_path / "back.csv")
    assert read_csv("back", tmp_path / "back.csv") == read_csv("old", tmp_path / "old.csv")
    with pytest.raises(InputError, match=r"out: expected a \.csv beside"):
        apply_tree(artifact, tmp_path / "old.csv", tmp_path / "new.txt")


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    ids = ["cat/1.png", "dog/2.png"]
    artifact = small(ids, [0, 1], [1, 1])
    fill(tmp_path / "old", ids)
    fill(tmp_path / "moved", ["dog/1.png", "dog/2.png"])
    fill(tmp_path / "more", [*ids, "dog/3.png"])
    before = content(tmp_path)
    for name, out, error in (
        ("moved", "new", WrongIds),
        ("more", "new", WrongIds),
        ("old", "more", InputError),
        ("old", "old/new", InputError),
        ("old", "no/new", InputError),
        ("nowhere", "new", InputError),
    ):
        with pytest.raises(error):
            apply_tree(artifact, tmp_path / name, tmp_path / out)
    apply_tree(artifact, tmp_path / "old", tmp_path / "new", dry_run=True)
    assert content(tmp_path) == before
    with pytest.raises(WrongBase):
        apply_tree(small(ids, [1, 1], [0, 1]), tmp_path / "old", tmp_path / "new")
    with pytest.raises(InputError, match=r"ids such as class/name\.jpg, got 'cat/\.\./\.\./x\.png'"):
        new_places(small(["cat/../../x.png"], [0], [1]))


def test_class_names_that_lead_out_of_a_folder_are_refused() -> None:
    given, settings = np.array([0, 1]), {"source": "folder", "classes": ["A", "../../B"]}
    with pytest.raises(InputError, match="artifact: expected classes with names that a folder can have"):
        new_places(record(given, given[::-1], ids=["A/0.png", "B/0.png"], settings=settings))
