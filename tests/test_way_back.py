"""What was applied can be taken back to the same bytes, and nothing of the user's is changed on the way."""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synth_refine import InputError
from synth_refine._io.atomic import TEMPORARY, locked
from synth_refine.cli import main
from synth_refine.images.hashes import content_hashes, image_table
from synth_refine.images.sources import open_images
from synth_refine.labels.artifact import Artifact, WrongBase, read_artifact, record, write_artifact
from synth_refine.labels.cells import with_column
from synth_refine.labels.export import export
from synth_refine.labels.files import read_label_file, read_labels
from synth_refine.labels.trees import apply_tree, new_places, revert_tree

CLASSES = ["cat", "dog"]


def artifact_of(ids: list[str], before: list[int], after: list[int], **inputs: str) -> Artifact:
    known = {"classes": CLASSES, "source": "folder"}
    return record(np.array(before), np.array(after), num_classes=2, ids=ids, inputs=inputs, settings=known)


def photos(root: Path) -> list[str]:
    ids = ["cat/1.png", "cat/2.png", "dog/1.png"]
    for one in ids:
        (root / one).parent.mkdir(parents=True, exist_ok=True)
        (root / one).write_bytes(one.encode())
    return ids


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Tables


TABLE = b'\xef\xbb\xbfpath,label,note\r\na.png,"cat",-0.25\r\nb.png,dog,\'@anna\r\n"c,1.png",cat,"=1 ""x"""\r\n'


def test_only_label_cells_of_a_table_change_and_the_way_back_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_bytes(TABLE)
    artifact = artifact_of(["a.png", "b.png", "c,1.png"], [0, 1, 0], [1, 0, 0])
    apply_tree(artifact, tmp_path / "old.csv", tmp_path / "new.csv")
    assert (tmp_path / "new.csv").read_bytes() == TABLE.replace(b'"cat"', b'"dog"').replace(b",dog,", b",cat,")
    revert_tree(artifact, tmp_path / "new.csv", tmp_path / "back.csv")
    assert (tmp_path / "back.csv").read_bytes() == TABLE


def test_so_does_a_label_file_with_other_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given_file = b"id,weight,label,class\na,-0.25,0,cat\nb,@anna,1,dog\nc,+1,1,dog\n"
    Path("given.csv").write_bytes(given_file)
    write_artifact("refined", artifact_of(["a", "b", "c"], [0, 1, 1], [1, 1, 0]))
    assert main(["apply", "refined", "--given", "given.csv", "--out", "new.csv"]) == 0
    assert Path("new.csv").read_bytes() == b"id,weight,label,class\na,-0.25,1,dog\nb,@anna,1,dog\nc,+1,0,cat\n"
    assert main(["revert", "refined", "--labels", "new.csv", "--out", "back.csv"]) == 0
    assert Path("back.csv").read_bytes() == given_file


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["a", "b,c", 'd"e', "f\ng", "", " h"]), st.sampled_from(["x", "y,z", 'v"w'])),
        min_size=1,
        max_size=8,
    ),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    ending=st.sampled_from(["\n", "\r\n"]),
    data=st.data(),
)
@settings(deadline=None, max_examples=200)
def test_any_table_comes_back(rows: list[tuple[str, str]], quoting: int, ending: str, data: st.DataObject) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=quoting, lineterminator=ending)  # type: ignore[arg-type]
    writer.writerows([("note", "label"), *rows])
    table, labels = text.getvalue().encode(), [label for _, label in rows]
    new = [data.draw(st.sampled_from(["x", "y,z", 'v"w', "u"])) for _ in rows]
    changed = with_column(table, "label", new)
    found = list(csv.reader(io.StringIO(changed.decode(), newline="")))
    assert found == [["note", "label"], *([note, label] for (note, _), label in zip(rows, new, strict=True))]
    assert with_column(changed, "label", labels) == table


def test_a_label_file_of_class_names_is_applied_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = {"classes": CLASSES[::-1]}
    write_artifact("refined", record(np.array([1, 0]), np.array([0, 0]), ids=["a", "b"], settings=known))
    Path("given.csv").write_text("id,label\na,cat\nb,dog\n")  # numbered the other way round in the artifact
    assert main(["apply", "refined", "--given", "given.csv", "--out", "new.csv"]) == 0
    assert Path("new.csv").read_text() == "id,label\na,dog\nb,dog\n"
    assert main(["revert", "refined", "--labels", "new.csv", "--out", "back.csv"]) == 0
    assert Path("back.csv").read_bytes() == Path("given.csv").read_bytes()
    Path("other.csv").write_text("id,label\na,cat\nb,frog\n")
    assert main(["apply", "refined", "--given", "other.csv", "--out", "x.csv"]) == 3
    export(read_artifact("refined"), "csv", "export.csv")
    found = read_label_file("export.csv")
    assert (found.labels.tolist(), found.ids, found.classes) == ([0, 0], ["a", "b"], ["dog"])
    export(record(np.array([1, 0]), np.array([1, 0]), settings={"classes": CLASSES}), "csv", "both.csv")
    assert read_label_file("both.csv").classes == CLASSES


# Folders


def test_files_of_the_user_stay_and_dead_copies_go(tmp_path: Path) -> None:
    ids = photos(tmp_path / "old")
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "mine").write_text("mine")
    (tmp_path / "old" / "cat" / "notes.txt").write_text("mine")
    (tmp_path / "old" / "raw.heic").write_text("mine")
    artifact = artifact_of(ids, [0, 0, 1], [1, 0, 1])
    apply_tree(artifact, tmp_path / "old", tmp_path / "first")
    kind = hashlib.sha256(b"new").hexdigest()[:16]
    dead, alive = (tmp_path / f".{kind}-{letter * 32}{TEMPORARY}" for letter in "ab")
    for path in (dead, alive):
        path.mkdir()
    with locked(alive):
        apply_tree(artifact, tmp_path / "old", tmp_path / "new")
    assert (dead.exists(), alive.exists()) == (False, True)
    assert (tmp_path / ".new.partial" / "mine").read_text() == "mine"
    assert set(content(tmp_path / "new")) == {*new_places(artifact), "cat/notes.txt", "raw.heic"}
    revert_tree(artifact, tmp_path / "new", tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "old")


def test_of_two_at_once_one_wins_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = photos(tmp_path / "old")
    artifact = artifact_of(ids, [0, 0, 1], [1, 0, 1])
    monkeypatch.setattr("os.sync", lambda: photos(tmp_path / "new"))  # another process is faster
    with pytest.raises(InputError, match="out: expected a new name, but .* was made meanwhile"):
        apply_tree(artifact, tmp_path / "old", tmp_path / "new")
    assert content(tmp_path / "new") == content(tmp_path / "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.parametrize("name", ["scored_images", "images"])  # the second by earlier versions
def test_images_of_another_content_are_refused(tmp_path: Path, name: str) -> None:
    ids = photos(tmp_path / "old")
    found = open_images(tmp_path / "old", CLASSES)
    table = image_table(found.ids, ["cat", "cat", "dog"], content_hashes(found))
    artifact = artifact_of(ids, [0, 0, 1], [1, 0, 1], **{name: hashlib.sha256(table).hexdigest()})
    apply_tree(artifact, tmp_path / "old", tmp_path / "new")
    revert_tree(artifact, tmp_path / "new", tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "old")
    (tmp_path / "old" / "dog" / "1.png").write_bytes(b"other")
    (tmp_path / "new" / "dog" / "1.png").write_bytes(b"other")
    for call, source in ((apply_tree, "old"), (revert_tree, "new")):
        with pytest.raises(WrongBase, match="images: .* of another content"):
            call(artifact, tmp_path / source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_a_disk_takes_for_the_same_never_meet() -> None:
    assert new_places(artifact_of(["cat/A.png", "dog/a.png"], [0, 1], [1, 1])) == ["dog/A~cat.png", "dog/a.png"]
    composed, decomposed = "cat/\u00e4.png", "dog/a\u0308.png"
    assert new_places(artifact_of([composed, decomposed], [0, 1], [1, 1]))[0] == "dog/\u00e4~cat.png"
    long = f"{'x' * 248}.png"
    with pytest.raises(InputError, match="artifact: expected names of at most 255 bytes, but cat/x+"):
        new_places(artifact_of([f"cat/{long}", f"dog/{long}"], [0, 1], [1, 1]))


# Label files by name


@pytest.mark.parametrize("cell", ["-1", "nan", "", "?", "NaN", " "])
def test_images_without_a_label_are_no_class(tmp_path: Path, cell: str) -> None:
    (tmp_path / "a.csv").write_text(f"id,label\na,cat\nb,{cell}\n")
    for read in (read_labels, read_label_file):
        with pytest.raises(InputError, match="labels: expected a "):
            read(tmp_path / "a.csv")
    with pytest.raises(InputError, match="in row 3 of .*: leave such images out"):
        read_label_file(tmp_path / "a.csv")


def test_class_names_are_numbered_in_natural_order_and_007_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,label\na,bird10\nb,bird2\nc,bird10\n")
    found = read_label_file(tmp_path / "a.csv")
    assert (found.labels.tolist(), found.classes) == ([1, 0, 1], ["bird2", "bird10"])
    (tmp_path / "b.csv").write_text("id,label\na,007\nb,00\n")
    assert read_label_file(tmp_path / "b.csv").classes == ["00", "007"]
    with pytest.raises(InputError, match="expected a class index from 0 on in row 2 of .*, got '007'"):
        read_labels(tmp_path / "b.csv")
