"""Each way in which labels of other codebases went wrong in silence is an error or a warning now."""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import dataset_shapes as shapes
import numpy as np
import pytest
import torch
from dataset_shapes import CLASSES, given_labels, refined_labels
from PIL import Image
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import FashionMNIST, ImageFolder

from synth_refine import InputError
from synth_refine.labels.artifact import record
from synth_refine.labels.export import export
from synth_refine.labels.files import read_label_file, read_labels, write_labels
from synth_refine.labels.inject import (
    Stale,
    StaleWarning,
    WrongBase,
    WrongClasses,
    WrongIds,
    WrongOrder,
    by_key,
    inject,
    verify,
)
from synth_refine.labels.inject import (
    given_labels as labels_of,
)

GIVEN, REFINED = given_labels(count=400), refined_labels(given_labels(count=400))


# A. Right length, wrong order


def test_a_random_split_takes_no_labels_without_an_order() -> None:
    cifar = shapes.cifar10(GIVEN)
    part = random_split(cifar, [360, 40], torch.Generator().manual_seed(0))[0]
    for call in (inject, verify):
        with pytest.raises(WrongOrder, match=r"ids=range\(len\(labels\)\) .* rows=range\(len\(dataset\)\)"):
            call(part, REFINED[:360])
    assert cifar.targets == GIVEN.tolist()
    for labels, more in (
        (REFINED, {"ids": range(400)}),
        (REFINED, {"rows": part.indices}),
        (REFINED[part.indices], {"rows": range(360)}),
        (REFINED[part.indices], {"base": GIVEN[part.indices]}),
        (record(GIVEN, REFINED), {}),
        (record(GIVEN[part.indices], REFINED[part.indices]), {}),
    ):
        inject(part, labels, **more)  # type: ignore[arg-type]
        assert [part[row][1] for row in range(360)] == REFINED[part.indices].tolist()
        if "base" not in more:
            verify(part, labels, k=None, **more)  # type: ignore[arg-type]
        cifar.targets = GIVEN.tolist()


def test_labels_that_agree_at_chance_are_refused_unless_they_are_meant() -> None:
    dataset = shapes.TRevision(GIVEN)  # whose order nobody knows
    with pytest.raises(WrongOrder, match=r"agree with the old ones for .*, where chance gives 25"):
        inject(dataset, REFINED[:360])
    assert (dataset.train_labels == GIVEN[dataset.chosen]).all()
    inject(dataset, REFINED[:360], force=True)
    dataset = shapes.TRevision(GIVEN)
    inject(dataset, REFINED, rows=dataset.chosen)
    assert (dataset.train_labels == REFINED[dataset.chosen]).all()
    held_out = shapes.TRevision(GIVEN, train=False)
    inject(held_out, held_out.val_labels.copy())
    with pytest.raises(WrongIds, match="rows: expected rows from 0 to 399, got"):
        inject(dataset, REFINED, rows=dataset.chosen + 100)


def test_many_wrong_labels_are_no_wrong_order() -> None:
    """Labels of which 70 % are replaced agree with the old ones more often than by chance."""
    random = np.random.default_rng(0)
    noisy = np.where(random.random(4000) < 0.7, random.integers(0, 10, 4000), random.integers(0, 10, 4000))
    better = np.where(random.random(4000) < 0.3, noisy, random.integers(0, 10, 4000))
    inject(shapes.LraCifar(noisy), better)


# B. A module of that name


def test_a_package_called_datasets_is_not_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "datasets.arrow_dataset"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        dataset = shapes.LraCifar(GIVEN)
        inject(dataset, REFINED)
        verify(dataset, REFINED)


# C, D, G, I. Files


def test_another_file_is_never_overwritten_and_kept_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text("[1, 0]")
    with pytest.raises(InputError, match="path: expected a new file, but .* holds something else; overwrite keeps a b"):
        export(REFINED, "json", path)
    for number, name in ((1, "labels.json.bak"), (2, "labels.json.bak2")):
        path.write_text(f"[{number}]")
        assert export(REFINED, "json", path, overwrite=True).backup == tmp_path / name
        assert (tmp_path / name).read_text() == f"[{number}]"
    assert export(REFINED, "json", path).backup is None  # the same once more
    assert json.loads(path.read_text()) == REFINED.tolist()
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="path: expected a file to write, got a folder"):
        export(REFINED, "json", tmp_path / "folder.json", overwrite=True)


@pytest.mark.parametrize(("format", "name"), [("dividemix", "0.2_ours.json"), ("cifar-n", "a.pt"), ("ssr", "a.json")])
def test_labels_counted_from_1_and_those_of_other_images_are_refused(tmp_path: Path, format: str, name: str) -> None:
    labels = np.random.default_rng(0).integers(0, 10, 50_000)
    more: dict[str, Any] = {"clean_label": labels} if format == "cifar-n" else {}
    with pytest.raises(InputError, match="labels: expected classes from 0, got 1 to 10: are they counted from 1"):
        export(labels + 1, format, tmp_path / name, **more)
    others = np.random.default_rng(1).integers(0, 10, 50_000)
    if format == "cifar-n":
        with pytest.raises(WrongOrder, match="labels: .* differ from clean_label; if meant so, pass force=True"):
            export(labels, format, tmp_path / name, clean_label=others)
    else:
        with pytest.raises(WrongOrder, match="labels: .* differ from fill"):
            export(labels[:45_000], format, tmp_path / name, fill=others)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["json", "pt", "npy", "unicon", "ssr"])
def test_label_files_of_other_codebases_are_read_back(tmp_path: Path, format: str) -> None:
    labels = np.random.default_rng(0).integers(0, 10, 50_000)
    name = {"unicon": "clean_0.2000_sym.npz", "ssr": "a.json"}.get(format, f"a.{format}")
    export(labels, format, tmp_path / name)
    if format == "pt":
        assert torch.load(tmp_path / name, weights_only=True).tolist() == labels.tolist()
        return
    key = {"unicon": "label", "ssr": "noise_labels"}.get(format)
    assert read_labels(tmp_path / name, key=key).tolist() == labels.tolist()


@pytest.mark.parametrize(
    "text", ["", "[", "[1.5]", "[true]", "[]", "{}", '{"a": 1}', "[" * 100_000, f"[{10**30}]", "[-1]"]
)
def test_other_json_is_no_label_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match="^labels: ") as caught:
        read_labels(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


# E. Classes by name


def folder_of(root: Path, classes: tuple[str, ...], given: Any) -> ImageFolder:
    for row, label in enumerate(given):
        (root / classes[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(shapes.images(1)[0]).save(root / classes[label] / f"{row:03}.png")
    return ImageFolder(str(root), transform=shapes.TO_TENSOR)


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    classes, given = ("dog", "cat", "truck"), np.arange(60) % 3  # ImageFolder sorts them: cat, dog, truck
    dataset = folder_of(tmp_path / "images", classes, given)
    refined = np.where(np.arange(60) % 7 == 0, (given + 1) % 3, given)
    ids = [f"{classes[label]}/{row:03}.png" for row, label in enumerate(given)]
    artifact = record(given, refined, num_classes=3, ids=ids, settings={"classes": list(classes)})
    write_labels(tmp_path / "refined.csv", refined, ids, classes=classes)
    expected = {one: classes[label] for one, label in zip(ids, refined, strict=True)}
    for labels in (artifact, read_label_file(tmp_path / "refined.csv")):
        report = inject(dataset, labels)
        verify(dataset, labels, k=None)
        found = {str(Path(path).relative_to(tmp_path / "images")): dataset.classes[y] for path, y in dataset.samples}
        assert found == expected
        report.revert()
    other = record(given, refined, num_classes=3, ids=ids, settings={"classes": ["dog", "cat", "lorry"]})
    with pytest.raises(WrongClasses, match="labels: expected the classes 'cat', 'dog', 'truck', got 'lorry'"):
        inject(dataset, other)
    # Whoever says that the numbers are the dataset's gets them as they are, here for other labels than it holds.
    with pytest.raises(WrongBase):
        inject(dataset, other, classes=dataset.classes)


def test_a_label_file_with_contradicting_class_names_is_refused(tmp_path: Path) -> None:
    for rows in ("a,0,cat\nb,0,dog\n", "a,0,cat\nb,1,cat\n"):
        (tmp_path / "a.csv").write_text(f"id,label,class\n{rows}")
        with pytest.raises(InputError, match="expected one class name per label"):
            read_labels(tmp_path / "a.csv")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_timm_sorts_naturally_and_is_served_by_path_and_name(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm.data")
    classes, given = tuple(f"bird{number}" for number in (1, 2, 10)), np.arange(30) % 3
    folder_of(tmp_path / "images", classes, given)
    dataset = timm.ImageDataset(str(tmp_path / "images"), transform=shapes.TO_TENSOR)
    refined = np.where(np.arange(30) % 7 == 0, (given + 1) % 3, given)
    ids = [f"{classes[label]}/{row:03}.png" for row, label in enumerate(given)]
    artifact = record(given, refined, num_classes=3, ids=ids, settings={"classes": list(classes)})
    report = inject(dataset, artifact)
    assert report.written[0] == "samples"
    number = dataset.reader.class_to_idx
    expected = {one: number[classes[label]] for one, label in zip(ids, refined, strict=True)}
    found = {dataset.filename(row): dataset[row][1] for row in range(30)}
    assert {name.removeprefix(f"{tmp_path}/images/"): label for name, label in found.items()} == expected
    verify(dataset, artifact, k=None)


# F. A property without a setter


def test_torchvision_mnist_and_its_kin() -> None:
    dataset = FashionMNIST.__new__(FashionMNIST)
    dataset.data, dataset.targets = torch.zeros(400, 8, 8, dtype=torch.uint8), torch.from_numpy(GIVEN.copy())
    dataset.transform = dataset.target_transform = None
    dataset.train = True
    assert inject(dataset, REFINED, num_classes=CLASSES).written == ("targets",)
    assert dataset.targets.tolist() == REFINED.tolist()


# H. Workers with old copies


def test_a_living_loader_with_old_copies_is_warned_of_and_verified() -> None:
    dataset = shapes.LraCifar(GIVEN)
    loader = DataLoader(dataset, num_workers=1, persistent_workers=True)
    next(iter(loader))
    with pytest.warns(StaleWarning, match="a DataLoader \\(its persistent workers hold copies"):
        inject(dataset, REFINED)
    verify(dataset, REFINED)
    with pytest.raises(Stale, match="persistent workers"):
        verify(loader, REFINED)
    del loader
    verify(DataLoader(dataset), REFINED)


# More


def test_what_begins_with_an_index_is_asked_for() -> None:
    dataset = shapes.Ldmi(GIVEN)
    with pytest.raises(InputError, match=r"perhaps an index; say which is the label, such as label_of="):
        inject(dataset, REFINED)
    assert dataset.targets == GIVEN.tolist()
    inject(dataset, REFINED, label_of=lambda item: item[2])


def test_columns_and_attributes_are_named() -> None:
    dataset = shapes.Hidden(GIVEN, "mine")
    with pytest.raises(InputError, match="name the attribute with column="):
        inject(dataset, REFINED)
    inject(dataset, REFINED, column="mine")
    verify(dataset, REFINED, column="mine")
    datasets = pytest.importorskip("datasets")
    kinds = {"fine": datasets.ClassLabel(names=["a", "b", "c", "d"]), "coarse": datasets.ClassLabel(names=["x", "y"])}
    table = datasets.Dataset.from_dict({"fine": GIVEN, "coarse": GIVEN // 2}, features=datasets.Features(kinds))
    with pytest.raises(InputError, match="expected one column of labels, got fine, coarse; name it with column="):
        inject(table, REFINED)
    report = inject(table, REFINED, column="fine")
    verify(report.dataset, REFINED, column="fine", k=None)
    assert report.dataset["coarse"][:] == (GIVEN // 2).tolist()


def test_lists_of_labels_are_taken() -> None:
    dataset = shapes.cifar10(GIVEN)
    inject(dataset, REFINED.tolist())
    verify(dataset, REFINED.tolist())


def test_labels_are_looked_up_by_the_keys_of_a_stream() -> None:
    artifact = record(GIVEN, REFINED, ids=[f"{row:05}" for row in range(400)])
    relabel = by_key(artifact)
    stream = map(relabel, ({"__key__": f"{row:05}", "cls": int(GIVEN[row])} for row in range(399, -1, -1)))
    assert [sample["cls"] for sample in stream] == REFINED[::-1].tolist()
    for call in (lambda: relabel({"__key__": "x"}), lambda: by_key(REFINED), lambda: by_key(REFINED, ["a"])):
        with pytest.raises(WrongIds, match="^ids: expected"):
            call()


def test_labels_of_a_stream_keep_their_kind_and_are_found_by_shard_and_key() -> None:
    """As webdataset gives them before decoding, with the ids that `embed` gives samples of shards."""
    ids, classes = [f"{shard}.tar/a" for shard in range(3)], {"classes": ["3", "17", "90"]}
    relabel = by_key(record(np.array([0, 1, 2]), np.array([1, 2, 0]), ids=ids, settings=classes))
    for cells, expected in (
        ((3, 17, 90), [17, 90, 3]),
        ((b"3", b"17\n", b"90"), [b"17", b"90", b"3"]),
        (("3", "17", "90"), ["17", "90", "3"]),
        ((-1, -1, -1), [1, 2, 0]),
    ):
        samples = [{"__key__": "a", "__url__": f"data/{shard}.tar", "cls": cell} for shard, cell in enumerate(cells)]
        assert [relabel(sample)["cls"] for sample in samples] == expected


def test_hugging_face_rows_are_found_by_their_column_of_ids() -> None:
    datasets = pytest.importorskip("datasets")
    order = np.random.default_rng(0).permutation(400)
    table = datasets.Dataset.from_dict({"id": order.tolist(), "label": GIVEN})
    shuffled = table.shuffle(seed=1)
    for one in (table, shuffled):
        labels, ids = labels_of(one)
        assert ids == list(map(str, one["id"]))
        report = inject(shuffled, record(labels, refined_labels(labels), ids=ids))
        wanted = dict(zip(ids, refined_labels(labels).tolist(), strict=True))
        assert report.dataset["label"][:] == [wanted[str(one)] for one in shuffled["id"]]


@pytest.mark.parametrize("shape", ["cifar10", "elr", "image-folder", "subset", "hugging-face", "key-value", "wrapper"])
def test_the_way_out_matches_the_way_in(shape: str, tmp_path: Path) -> None:
    if shape == "hugging-face":
        pytest.importorskip("datasets")
    dataset = shapes.SHAPES[shape].build(given_labels(), tmp_path)
    labels, ids = labels_of(dataset)
    refined = refined_labels(labels)
    report = inject(dataset, record(labels, refined, ids=[str(one) for one in ids]))
    assert labels_of(report.dataset)[0].tolist() == refined.tolist()
    order = np.random.default_rng(0).permutation(len(labels))
    inject(report.dataset, labels[order], ids=[ids[row] for row in order])


class Samples:
    """An image folder of 1.28 million files that are not there."""

    def __init__(self, count: int) -> None:
        self.root = "/data"
        self.samples = [(f"/data/n{row % 1000:04}/{row:07}.jpg", row % 1000) for row in range(count)]
        self.targets = [label for _, label in self.samples]

    def __getitem__(self, index: int) -> tuple[int, int]:
        return torch.zeros(1), self.samples[index][1]  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.samples)


@pytest.mark.slow
def test_millions_of_labels_by_path_take_seconds() -> None:
    count = 1_280_000
    dataset = Samples(count)
    given = np.array(dataset.targets)
    refined = np.where(np.arange(count) % 7 == 0, (given + 1) % 1000, given)
    ids = [path.removeprefix("/data/") for path, _ in dataset.samples][::-1]
    start = time.process_time()
    inject(dataset, refined[::-1], ids=ids)
    middle = time.process_time()
    verify(dataset, refined[::-1], ids=ids)
    seconds = middle - start, time.process_time() - middle
    assert max(seconds) < 5, seconds
