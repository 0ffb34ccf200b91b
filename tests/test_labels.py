"""Label files are read back as written; noise is measured as the slow rule says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synth_refine import InputError
from synth_refine._io.atomic import write_atomic
from synth_refine.cli import main
from synth_refine.labels.artifact import read_artifact, record, write_artifact
from synth_refine.labels.files import noise_rate, read_labels, read_labels_and_ids, transition_matrix, write_labels
from synth_refine.labels.review import reviewed

LABELS = st.lists(st.integers(0, 2**31 - 1), max_size=50)
# A file name can hold anything but a zero byte and, on disk, half a surrogate pair.
IDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)


@given(labels=LABELS)
@settings(deadline=None)
def test_npy_is_read_back_equal(tmp_path_factory: pytest.TempPathFactory, labels: list[int]) -> None:
    path = tmp_path_factory.getbasetemp() / "labels.npy"
    write_labels(path, np.array(labels, dtype=np.int64))
    read = read_labels(path)
    assert read.dtype == np.int64
    assert read.tolist() == labels == np.load(path, allow_pickle=False).tolist()


@given(labels=st.dictionaries(IDS, st.integers(0, 2**31 - 1), max_size=20))
@settings(deadline=None)
def test_csv_is_read_back_equal_whatever_the_ids(
    tmp_path_factory: pytest.TempPathFactory, labels: dict[str, int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "labels.csv"
    write_labels(path, np.array(list(labels.values()), dtype=np.int64), ids=list(labels))
    read, ids = read_labels_and_ids(path)
    assert read.tolist() == list(labels.values())
    assert ids == list(labels)


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i2", "<u4", ">i8", "<u8"])
def test_any_integer_type_becomes_int64(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "labels.npy", np.array([3, 1, 2], dtype=dtype))
    assert read_labels(tmp_path / "labels.npy").tolist() == [3, 1, 2]
    assert read_labels(tmp_path / "labels.npy").dtype == np.dtype("=i8")


def test_labels_are_a_copy_that_may_be_changed(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels.npy", torch.tensor([0, 1]))
    labels = read_labels(tmp_path / "labels.npy")
    labels[0] = 5
    assert read_labels(tmp_path / "labels.npy").tolist() == [0, 1]


def test_a_formula_in_an_id_is_disarmed(tmp_path: Path) -> None:
    ids = ["=1+1", "+1", "-1", "@x", "'=x", "'plain", "a.png"]
    write_labels(tmp_path / "labels.csv", np.zeros(7, dtype=np.int64), ids=ids)
    for line in (tmp_path / "labels.csv").read_text().splitlines()[1:]:
        assert line[1] not in "=+-@\t\r"
    assert read_labels_and_ids(tmp_path / "labels.csv")[1] == ids


@pytest.mark.parametrize(
    "text", ["\ufeffid,label\r\na,1\r\nb,0\r\n", "label,id\n1,a\n0,b\n", "id,given,label\na,7,1\nb,7,0\n"]
)
def test_csv_of_others_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.csv").write_bytes(text.encode())
    labels, ids = read_labels_and_ids(tmp_path / "labels.csv")
    assert labels.tolist() == [1, 0]
    assert ids == ["a", "b"]


def test_blank_rows_are_left_out_at_the_end_and_named_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_artifact("refined", record(np.array([0, 1]), np.array([1, 1]), ids=["a", "b"]))
    for end in ("\n", "\n\n", ",\n,\n"):
        Path("a.csv").write_text(f"id,label\na,0\nb,1\n{end}")
        assert read_labels_and_ids("a.csv")[1] == ["a", "b"]
        Path("new.csv").unlink(missing_ok=True)
        assert main(["apply", "refined", "--given", "a.csv", "--out", "new.csv"]) == 0
        assert Path("new.csv").read_text() == f"id,label\na,1\nb,1\n{end}"
    for blank in ("\n", ",\n"):
        Path("a.csv").write_text(f"id,label\na,0\n{blank}b,1\n")
        with pytest.raises(InputError, match=r"labels: row 3 of a\.csv is blank; delete it"):
            read_labels_and_ids("a.csv")
    text = "id,given,decision,label\na,0,accept,1\n"
    Path("decisions.csv").write_text(text + ",,,\n\n")
    assert reviewed(read_artifact("refined"), "decisions.csv").labels.tolist() == [1, 1]
    Path("decisions.csv").write_text(text.replace(",", ";"))
    with pytest.raises(InputError, match="decisions: expected commas between the cells of .*, got ';'; save"):
        reviewed(read_artifact("refined"), "decisions.csv")


def test_csv_without_ids_has_none(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("label\n4\n")
    assert read_labels_and_ids(tmp_path / "labels.csv")[1] is None


@pytest.mark.parametrize(
    ("name", "labels", "ids", "message"),
    [
        ("a.npy", np.array([0.0]), None, "labels: expected integer class indices, got float64"),
        ("a.npy", np.array([-1]), None, "labels: expected classes 0 to 2147483647, got -1 in row 0"),
        ("a.npy", np.zeros((2, 1), int), None, r"labels: expected shape \(N,\), got \(2, 1\)"),
        ("a.npy", np.array([0]), ["a"], "ids: a .npy file has no place for them"),
        ("a.csv", np.array([0]), ["a", "b"], "ids: expected 1, one per label, got 2"),
        ("a.csv", np.array([0, 0]), ["a", "a"], "ids: expected every id once, got 'a' 2 times"),
        ("a.csv", np.array([0]), ["\udc80"], "expected text that UTF-8 can write"),
        ("a.txt", np.array([0]), None, "path: expected a .npy or .csv file, got"),
        ("a.npy", [0], None, "labels: expected a NumPy array or torch tensor, got list"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    tmp_path: Path, name: str, labels: np.ndarray, ids: list[str] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_labels(tmp_path / name, labels, ids)
    assert list(tmp_path.iterdir()) == []


def test_an_exception_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def interrupted() -> None:
        with write_atomic(tmp_path / "file") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_noise_and_transitions_follow_the_slow_rule(pairs: list[tuple[int, int]]) -> None:
    labels, truth = (np.array(side) for side in zip(*pairs, strict=True))
    assert noise_rate(labels, truth) == sum(a != b for a, b in pairs) / len(pairs)
    matrix = transition_matrix(torch.from_numpy(labels), truth, 5)
    for true in range(5):
        of_class = [a for a, b in pairs if b == true]
        for label in range(5):
            assert matrix[true, label] == (of_class.count(label) / len(of_class) if of_class else 0)


def test_measures_refuse_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"true_labels: expected shape \(2,\), got \(3,\)"):
        noise_rate(np.array([0, 1]), np.array([0, 1, 2]))
    with pytest.raises(InputError, match="labels: expected at least one label, got none"):
        noise_rate(np.array([], dtype=int), np.array([], dtype=int))
    with pytest.raises(InputError, match="given: expected classes 0 to 1, got 2 in row 1"):
        transition_matrix(np.array([0, 2]), np.array([0, 1]), 2)
