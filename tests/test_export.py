"""Label files as the codebases read them: right length, name, classes and types, or a named error and no file."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synth_refine import InputError
from synth_refine.labels.artifact import Artifact, WrongIds, read_artifact, record, write_artifact
from synth_refine.labels.export import FORMATS, MissingClass, WrongLength, export
from synth_refine.labels.files import read_labels, read_labels_and_ids

HYBRIDS = ("cifar10-1-0.35", "cifar10-1-0.70", "cifar10-1-0.35_U_0.3", "cifar10-1-0.35_U_0.6", "cifar10-1-0.35_A_0.3")
SOME = np.array([3, 1, 2, 0, 1])
IDS = ["a/1.png", "a/2.png", "b/=3.png", "ä.png", "5"]


def many(count: int, classes: int = 10) -> np.ndarray:
    return np.random.default_rng(0).integers(0, classes, count)


def named(format: str, folder: Path) -> Path:
    names = {"plc": "cifar10-1-0.35-ours.npy", "lra": "cifar10-1-0.35-ours.npy", "dividemix": "0.2_sym.json"}
    names |= {"unicon": "clean_0.2000_sym.npz", "cifar-n": "CIFAR-10_human.pt", "kv": "noisy_label_kv.txt"}
    names |= {"imagefolder": "metadata.csv", "jsonl": "labels.jsonl", "parquet": "labels.parquet", "ssr": "ssr.json"}
    names |= {kind: f"labels.{kind}" for kind in ("npy", "json", "pt")}
    return folder / names.get(format, f"{format}.csv")


def read_back(format: str, path: Path) -> tuple[list[int], list[str] | None]:
    """The labels and ids as the codebase's own loader gets them."""
    if format in ("plc", "lra", "npy"):
        array = np.load(path, allow_pickle=False)
        assert array.dtype == np.int64
        return array.tolist(), None
    if format in ("dividemix", "json", "ssr"):
        content = json.loads(path.read_text())
        return content["noise_labels"] if format == "ssr" else content, None
    if format == "pt":
        return torch.load(path, weights_only=True).tolist(), None
    if format == "unicon":
        with np.load(path, allow_pickle=False) as file:
            assert set(file) == {"label", "index"}
            return file["label"].tolist(), None
    if format == "cifar-n":
        with torch.serialization.safe_globals(
            [np.ndarray, np.dtype, type(np.dtype("i8")), (_rebuild(), "numpy.core.multiarray._reconstruct"), _encode()]
        ):
            entries = torch.load(path, weights_only=True)
        assert read_labels(path, key="worse_label").tolist() == entries["worse_label"].tolist()
        return entries["worse_label"].reshape(-1).tolist(), None
    if format == "kv":
        pairs = [line.split() for line in path.read_text().splitlines()]
        return [int(label) for _, label in pairs], [one for one, _ in pairs]
    if format == "jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [line["label"] for line in lines], [line["id"] for line in lines]
    if format == "parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path).to_pydict()
        return table["label"], table["id"]
    if format == "csv":
        labels, ids = read_labels_and_ids(path)
        return labels.tolist(), ids
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    column, key = {"imagefolder": ("label", "file_name"), "fiftyone": ("refined", "filepath")}.get(
        format, ("predicted_label", "id")
    )
    return [int(row[column]) for row in rows], [row[key] for row in rows]


def _rebuild() -> Any:
    return np.array(0).__reduce__()[0]


def _encode() -> Any:
    import _codecs

    return _codecs.encode


@pytest.mark.parametrize("format", [name for name, rules in FORMATS.items() if rules.rows == "all"])
def test_every_format_is_read_back_equal(tmp_path: Path, format: str) -> None:
    """As the codebase reads it. An artifact gives the same file as its labels and ids do, where that is enough."""
    if format == "parquet":
        pytest.importorskip("pyarrow")
    count = FORMATS[format].count
    labels = SOME if count is None else many(count)
    ids = IDS if count is None else None
    path = named(format, tmp_path)
    options = {"clean_label": many(50_000)} if format == "cifar-n" else {}
    artifact = record(np.roll(labels, 1), labels, ids=ids)
    done = export(artifact, format, path, **options)
    assert (done.path, done.count) == (path, len(labels))
    assert done.note
    assert "{" not in done.note
    read, names = read_back(format, path)
    assert read == labels.tolist()
    assert names in (None, ids)
    if format not in ("cleanlab", "datalab", "fiftyone", "parquet"):  # which hold more of an artifact
        content = path.read_bytes()
        path.unlink()
        export(torch.from_numpy(labels), format, path, ids=ids, **options)
        assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_an_unknown_format_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"format: expected one of plc, lra, .*, got 'json-records'"):
        export(SOME, "json-records", tmp_path / "a.json")


@pytest.mark.parametrize("format", [name for name, rules in FORMATS.items() if rules.count])
def test_a_wrong_length_is_never_guessed_right(tmp_path: Path, format: str) -> None:
    count = FORMATS[format].count
    assert count
    options: dict[str, Any] = {"clean_label": many(count + 5000)[:count]} if format == "cifar-n" else {}
    path = named(format, tmp_path)
    long = many(count + 5000)
    short = long[: count - 5000]
    for labels, policy in ((short, "fill with the given labels of all images"), (long, "fill='truncate'")):
        with pytest.raises(WrongLength, match=f"labels: expected {count}, .* got {len(labels)}; if meant so, {policy}"):
            export(labels, format, path, **options)
    with pytest.raises(WrongLength):
        export(short, format, path, fill="truncate", **options)
    with pytest.raises(WrongLength, match="expected at most"):
        export(long, format, path, fill=long[:count], **options)
    with pytest.raises(InputError, match=rf"fill: expected shape \({count},\), got \(5000,\)"):
        export(short, format, path, fill=long[:5000], **options)
    with pytest.raises(InputError, match="fill: expected error, truncate or the labels of all images, got 'zeros'"):
        export(short, format, path, fill="zeros", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    given = np.where(np.arange(count) % 3 == 0, (long[:count] + 1) % 10, long[:count])
    export(short, format, path, fill=given, **options)
    assert read_back(format, path)[0] == [*short, *given[-5000:]]
    export(long, format, path, fill="truncate", overwrite=True, **options)
    assert read_back(format, path)[0] == long[:count].tolist()


def test_fill_is_refused_where_any_length_fits(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fill: expected none, since csv takes any number"):
        export(SOME, "csv", tmp_path / "a.csv", fill="truncate")


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("plc", "refined.npy"),
        ("plc", "cifar10-1.txt"),
        ("lra", "cifar-1.npy"),
        ("dividemix", "0.25_sym.json"),
        ("dividemix", "labels.json"),
        ("unicon", "clean_0.2_sym.npz"),
        ("unicon", "0.2000_sym.npz"),
        ("cifar-n", "labels.npy"),
        ("csv", "labels.txt"),
        ("ssr", "labels.npy"),
    ],
)
def test_a_name_that_the_codebase_would_misread_is_refused(tmp_path: Path, format: str, name: str) -> None:
    labels = many(FORMATS[format].count or 5)
    with pytest.raises(InputError, match=f"path: expected .*, got {name}"):
        export(labels, format, tmp_path / name, clean_label=labels if format == "cifar-n" else None)
    assert list(tmp_path.iterdir()) == []


def test_classes_are_those_of_the_data_set_in_the_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labels: expected classes 0 to 9, got 10 in row 7"):
        export(np.where(np.arange(45_000) == 7, 10, many(45_000)), "lra", tmp_path / "cifar10-a.npy")
    export(many(45_000, 100), "plc", tmp_path / "cifar100-a.npy")
    lost = many(45_000)
    lost[lost == 4] = 5
    with pytest.raises(MissingClass, match="labels: expected every class 0 to 9, which plc asserts, got none of 4"):
        export(lost, "plc", tmp_path / "cifar10-a.npy")
    export(lost, "lra", tmp_path / "cifar10-a.npy")


def test_positions_sort_the_labels_of_files_that_hold_none(tmp_path: Path) -> None:
    labels, order = many(45_000), np.random.default_rng(1).permutation(45_000)
    export(labels[order], "plc", tmp_path / "cifar10-a.npy", ids=order.tolist())
    assert np.load(tmp_path / "cifar10-a.npy").tolist() == labels.tolist()
    with pytest.raises(WrongIds, match="ids: expected the positions 0 to 44999, since the file holds none, got"):
        export(labels, "plc", tmp_path / "cifar10-a.npy", ids=[f"{row}.png" for row in range(45_000)])
    with pytest.raises(WrongIds, match="ids: expected the positions 0 to 44999"):
        export(labels, "plc", tmp_path / "cifar10-a.npy", ids=range(5_000, 50_000))


@pytest.mark.parametrize(
    ("format", "ids", "message"),
    [
        ("kv", None, "ids: expected the path of every image, which kv needs, got None"),
        ("imagefolder", None, "ids: expected the path of every image, which imagefolder needs"),
        ("kv", ["a b", *IDS[1:]], "ids: expected paths without white space, where the file is split, got 'a b'"),
        ("kv", ["", *IDS[1:]], "ids: expected paths without white space"),
        ("kv", ["\udc80", *IDS[1:]], "ids: expected text that UTF-8 can write"),
        ("csv", ["\udc80", *IDS[1:]], "ids: expected text that UTF-8 can write"),
        ("csv", IDS[1:], "ids: expected 5, one per label, got 4"),
        ("csv", ["5", *IDS[1:]], "ids: expected every id once, got '5' 2 times"),
    ],
)
def test_ids_that_the_file_cannot_hold_are_refused(
    tmp_path: Path, format: str, ids: list[str] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export(SOME, format, named(format, tmp_path), ids=ids)
    assert list(tmp_path.iterdir()) == []


def test_cifar_n_needs_the_labels_its_loader_compares(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="clean_label: expected the labels that CIFAR-N's loader compares"):
        export(many(50_000), "cifar-n", tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"clean_label: expected shape \(50000,\), got \(5,\)"):
        export(many(50_000), "cifar-n", tmp_path / "a.pt", clean_label=SOME)
    with pytest.raises(InputError, match="key: expected the entry of a noise type"):
        export(many(50_000), "cifar-n", tmp_path / "a.pt", clean_label=many(50_000), key="clean_label")


def test_cleanlab_gets_a_table_of_issues(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labels: expected an artifact, which knows more"):
        export(SOME, "cleanlab", tmp_path / "a.csv")
    artifact = record(np.array([0, 1, 1]), np.array([0, 0, 1]), confidence=np.array([0.9, 0.8, 0.7]))
    export(artifact, "cleanlab", tmp_path / "a.csv")
    pandas = pytest.importorskip("pandas")
    table = pandas.read_csv(tmp_path / "a.csv")
    assert table["is_label_issue"].dtype == bool
    assert table["is_label_issue"].tolist() == [False, True, False]
    assert table["label_quality"].tolist() == pytest.approx([0.9, 0.2, 0.7])
    write_artifact(tmp_path / "artifact", artifact)  # its files hold no confidence of labels that are kept
    export(read_artifact(tmp_path / "artifact"), "cleanlab", tmp_path / "b.csv")
    assert pandas.read_csv(tmp_path / "b.csv")["label_quality"].tolist() == pytest.approx(
        [np.nan, 0.2, np.nan], nan_ok=True
    )
    assert table["given_label"].tolist() == [0, 1, 1]
    assert table["predicted_label"].tolist() == [0, 0, 1]


def test_a_folder_whose_name_looks_like_a_formula_keeps_it(tmp_path: Path) -> None:
    """Hugging Face opens the files of the table as they are written there."""
    export(SOME[:2], "imagefolder", tmp_path / "metadata.csv", ids=["-zero/1.png", "=x/2.png"])
    assert read_back("imagefolder", tmp_path / "metadata.csv") == ([3, 1], ["-zero/1.png", "=x/2.png"])


def test_a_dry_run_checks_and_writes_nothing(tmp_path: Path) -> None:
    assert export(SOME, "csv", tmp_path / "a.csv", dry_run=True).count == 5
    with pytest.raises(WrongLength):
        export(SOME, "plc", tmp_path / "cifar10-a.npy", dry_run=True)
    assert list(tmp_path.iterdir()) == []


def test_the_input_stays_as_it_is(tmp_path: Path) -> None:
    labels = many(45_000)
    labels.setflags(write=False)
    before = labels.copy()
    export(labels, "plc", tmp_path / "cifar10-a.npy")
    assert (labels == before).all()


# The published label files


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("SYNTH_REFINE_DATA")
    if not folder:
        pytest.skip("SYNTH_REFINE_DATA names no folder with the real label files")
    return Path(folder) / "cifar10"


def refined(data: Path, name: str) -> Artifact:
    """A label file with a tenth of its labels changed, as a refiner would."""
    given = read_labels(data / "noise_labels" / f"{name}.npy")
    labels = given.copy()
    labels[::10] = (labels[::10] + 1) % 10
    return record(given, labels, num_classes=10)


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("format", ["plc", "lra"])
def test_refined_published_labels_fit_plc_and_lra(tmp_path: Path, data: Path, name: str, format: str) -> None:
    artifact = refined(data, name)
    done = export(artifact, format, tmp_path / f"{name}-ours.npy")
    labels = np.load(done.path, allow_pickle=False)
    assert labels.shape == (45_000,)
    assert labels.dtype == np.int64
    assert np.unique(labels).tolist() == list(range(10))
    assert done.path.name.startswith("cifar10-")
    assert f"{name}-ours" in done.note
    assert artifact.revert(labels).tobytes() == np.load(data / "noise_labels" / f"{name}.npy").tobytes()


def test_published_labels_of_the_wrong_length_are_refused(tmp_path: Path, data: Path) -> None:
    artifact = refined(data, "cifar10-1-0.35")
    with pytest.raises(WrongLength, match="labels: expected 50000, which dividemix reads, got 45000"):
        export(artifact, "dividemix", tmp_path / "0.3_sym.json")
    with np.load(data / "labels.npz", allow_pickle=False) as file:
        all_images = file["train"].astype(np.int64)
    with pytest.raises(WrongLength, match="labels: expected 45000, which plc reads, got 50000"):
        export(all_images, "plc", tmp_path / "cifar10-a.npy")
    assert list(tmp_path.iterdir()) == []
