"""Refined labels reach the items of every known dataset, and whatever keeps them out is named."""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dataset_shapes as shapes
import numpy as np
import pytest
import torch
from dataset_shapes import CLASSES, SHAPES, Labels, given_labels, refined_labels
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torchvision.datasets import CIFAR10

from synth_refine import InputError
from synth_refine.labels.artifact import WrongBase, WrongIds, record
from synth_refine.labels.attributes import is_integer
from synth_refine.labels.inject import (
    EmptiedClassWarning,
    LengthMismatch,
    NotInjected,
    OrderWarning,
    Stale,
    StaleWarning,
    WrongOrder,
    inject,
    register,
    verify,
)


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    if request.param == "hugging-face":
        pytest.importorskip("datasets")
    return str(request.param)


@contextmanager
def ignoring_stale() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleWarning)
        warnings.simplefilter("ignore", OrderWarning)
        yield


def inner(dataset: Any) -> Any:
    return dataset.dataset if isinstance(dataset, DataLoader) else dataset


def item_labels(dataset: Any) -> list[int]:
    """Every item's label, read as a training loop does."""
    dataset = inner(dataset)
    items = [dataset[index] for index in range(len(dataset))]
    return [int(item["label"]) if isinstance(item, dict) else int(item[label_place(item)]) for item in items]


def label_place(item: Any) -> int:
    return next(place for place, part in enumerate(item) if place and is_integer(part))


def built(shape: str, folder: Path) -> tuple[Any, Labels, Any, dict[str, Any]]:
    """A dataset, the labels it was built from, the row of every item in them, and how `inject` is told where it is."""
    given = given_labels()
    dataset = SHAPES[shape].build(given, folder)
    rows = SHAPES[shape].items(inner(dataset))
    current = np.array(item_labels(dataset))
    if shape == "elr":
        return dataset, given, rows, {"rows": rows}
    return dataset, current, rows, {"rows": rows} if SHAPES[shape].permuted else {}


def test_after_inject_every_item_has_its_label(shape: str, tmp_path: Path) -> None:
    dataset, given, rows, how = built(shape, tmp_path)
    refined = refined_labels(given)
    before = refined.copy()
    with ignoring_stale():
        report = inject(dataset, refined, **how)
    assert item_labels(report.dataset) == refined[rows].tolist()
    assert report.changed == int((given[rows] != refined[rows]).sum())
    assert report.count == len(rows)
    assert report.written
    assert (refined == before).all()
    verify(report.dataset, refined, k=None, **how)
    with pytest.raises(NotInjected, match=r"expected the refined labels from item access, got others for"):
        verify(report.dataset, given, k=None, **how)


def test_injecting_again_changes_nothing(shape: str, tmp_path: Path) -> None:
    dataset, given, _, how = built(shape, tmp_path)
    refined = refined_labels(given)
    with ignoring_stale():
        first = inject(dataset, refined, **how)
    labels = item_labels(first.dataset)
    again = inject(first.dataset, refined, **how)  # nothing becomes stale either, so nothing is warned of
    assert again.changed == 0
    assert again.stale == ()
    assert item_labels(again.dataset) == labels


def test_revert_restores(shape: str, tmp_path: Path) -> None:
    dataset, given, _, how = built(shape, tmp_path)
    before = item_labels(dataset)
    with ignoring_stale():
        report = inject(dataset, refined_labels(given), **how)
        assert item_labels(report.dataset) != before
        assert item_labels(report.revert()) == before
        again = inject(dataset, refined_labels(given), **how)
        back = inject(again.dataset, given, **how)  # the other way back
    assert item_labels(back.dataset) == before


def test_an_artifact_goes_in_and_out(shape: str, tmp_path: Path) -> None:
    dataset, given, rows, _ = built(shape, tmp_path)
    artifact = record(given, refined_labels(given), num_classes=CLASSES)
    with ignoring_stale():
        report = inject(dataset, artifact)
        verify(report.dataset, artifact)
        assert item_labels(report.dataset) == artifact.labels[rows].tolist()
        assert inject(report.dataset, artifact).changed == 0
        other = record(np.roll(given, 1), artifact.labels, num_classes=CLASSES)
        report.revert()
        with pytest.raises(WrongBase, match=r"dataset: expected the labels that were refined, got others: .* differ"):
            inject(dataset, other)


def test_nothing_that_the_caller_holds_is_changed_or_kept(shape: str, tmp_path: Path) -> None:
    """Neither the labels passed nor, where an attribute is replaced, the list that was in it."""
    dataset, given, _, how = built(shape, tmp_path)
    store = inner(dataset)
    held = {
        name: getattr(store, name) for name in ("samples", "targets", "labels", "train_labels") if hasattr(store, name)
    }
    copies = {name: list(value) for name, value in held.items()}
    refined = refined_labels(given)
    with ignoring_stale():
        report = inject(dataset, refined, **how)
    expected = item_labels(report.dataset)
    refined[:] = 0  # the dataset must not look into this array
    assert item_labels(report.dataset) == expected
    if report.written[0] not in ("update_corrupted_label", "update_label"):
        for name, value in held.items():
            assert list(value) == copies[name]


@pytest.mark.parametrize("wrong", [39, 41])
def test_a_wrong_length_is_refused(shape: str, tmp_path: Path, wrong: int) -> None:
    """Also where the codebase itself would take it: a slice assignment grows the list."""
    dataset, given, *_ = built(shape, tmp_path)
    before = item_labels(dataset)
    if shape == "elr":
        wrong -= 10  # one label more may be right there: the data set that was split is not at hand
    labels = np.resize(refined_labels(given), wrong)
    with pytest.raises(LengthMismatch, match=f"labels: expected .*, got {wrong}"):
        inject(dataset, labels)
    with pytest.raises(LengthMismatch):
        verify(dataset, labels)
    assert item_labels(dataset) == before


# Traps of single codebases


def test_image_folder_has_three_lists_and_all_are_written(tmp_path: Path) -> None:
    dataset = shapes.image_folder(tmp_path / "images", given_labels())
    given = np.array(dataset.targets)
    with ignoring_stale():
        report = inject(dataset, refined_labels(given))
    assert report.written == ("samples", "imgs", "targets")
    assert dataset.samples is dataset.imgs
    assert dataset.targets == [label for _, label in dataset.samples] == refined_labels(given).tolist()


def test_setting_only_the_second_list_is_noticed(tmp_path: Path) -> None:
    dataset = shapes.image_folder(tmp_path / "images", given_labels())
    dataset.targets = refined_labels(np.array(dataset.targets)).tolist()  # what item access does not read
    with pytest.raises(NotInjected):
        verify(dataset, np.array(dataset.targets))


@pytest.mark.parametrize("relative", [True, False])
def test_image_folder_by_path(tmp_path: Path, relative: bool) -> None:
    """Labels keyed by path, in any order."""
    dataset = shapes.image_folder(tmp_path / "images", given_labels())
    given = np.array(dataset.targets)
    root = Path(dataset.root)
    ids = [Path(path).relative_to(root).as_posix() if relative else path for path, _ in dataset.samples]
    refined = refined_labels(given)
    order = np.random.default_rng(0).permutation(len(ids))
    inject(dataset, refined[order], ids=[ids[row] for row in order])
    assert dataset.targets == refined.tolist()
    with pytest.raises(WrongIds, match=r"got none for 1 of 40, the first is .*class0"):
        inject(dataset, refined[1:], ids=ids[1:])
    with pytest.raises(WrongIds, match="got none for 40 of 40"):
        inject(dataset, refined, ids=[f"other/{one}" for one in ids])


@pytest.mark.parametrize("build", [shapes.Elr, shapes.Sop])
def test_a_split_takes_labels_by_position(build: Any) -> None:
    given = given_labels()
    dataset = build(given)
    items, truth = len(dataset), dataset.train_labels_gt.copy()
    refined = refined_labels(given)
    with pytest.raises(WrongOrder, match=r"the dataset does not stand in the original order: ids=range"):
        inject(dataset, refined[:items])  # in which order?
    for labels, more in [(refined, {"ids": range(40)}), (record(given, refined), {})]:
        inject(dataset, labels, **more)
        assert (dataset.train_labels == refined[dataset.indexs]).all()
        verify(dataset, labels, k=None, **more)
        inject(dataset, given, ids=range(40))
    assert (dataset.train_labels_gt == truth).all()
    inject(dataset, given[dataset.indexs], rows=range(items))
    assert (dataset.train_labels == given[dataset.indexs]).all()
    inject(Subset(dataset, range(30)), refined, ids=np.arange(40))
    assert (dataset.train_labels[:30] == refined[dataset.indexs[:30]]).all()
    assert (dataset.train_labels[30:] == given[dataset.indexs[30:]]).all()


def test_noise_that_the_dataset_adds_is_noticed() -> None:
    """ELR's `percent`: the labels at hand are no longer the ones that were refined."""
    given = given_labels()
    noisy = given.copy()
    noisy[:4] = (noisy[:4] + 1) % CLASSES
    with pytest.raises(WrongBase, match="does the dataset add noise"):
        inject(shapes.Elr(noisy), record(given, refined_labels(given)))
    with pytest.raises(WrongBase):
        inject(shapes.LraCifar(noisy), refined_labels(given), base=given)
    with pytest.raises(InputError, match=r"base: expected shape \(40,\), got \(39,\)"):
        inject(shapes.LraCifar(noisy), refined_labels(given), base=given[1:])


def test_true_labels_are_never_touched() -> None:
    dataset = shapes.CoTeaching(given_labels())
    truth = dataset.train_labels.copy()
    with pytest.warns(StaleWarning, match=r"noise_or_not \(noise flags\) came from the old labels"):
        report = inject(dataset, refined_labels(given_labels()))
    assert report.written == ("train_noisy_labels",)
    assert dataset.train_labels == truth


def test_a_dataset_rebuilt_from_its_file_is_noticed(tmp_path: Path) -> None:
    """DivideMix makes new objects for every epoch; what was injected into an old one is gone."""
    dataset, given, *_ = built("dividemix", tmp_path)
    refined = refined_labels(given)
    inject(dataset, refined)
    verify(dataset, refined)
    rebuilt = shapes.DivideMix(tmp_path / "0.3_sym.json", mode="labeled")
    with pytest.raises(NotInjected):
        verify(rebuilt, refined, k=None)
    (tmp_path / "0.3_sym.json").write_text(json.dumps(refined.tolist()))
    verify(shapes.DivideMix(tmp_path / "0.3_sym.json", mode="labeled"), refined, k=None)


def test_an_attribute_that_item_access_ignores_is_noticed_and_undone() -> None:
    dataset = shapes.Frozen(given_labels())
    before = dataset.labels
    with pytest.raises(NotInjected, match=r"item \d+ has \d for \d"):
        inject(dataset, refined_labels(given_labels()))
    assert dataset.labels is before


def test_one_changed_label_among_many_is_still_checked() -> None:
    """A sample of all items would miss it; the changed ones are read first."""
    given = given_labels(count=4000)
    refined = given.copy()
    refined[1234] = (refined[1234] + 1) % CLASSES
    with pytest.raises(NotInjected, match="item 1234 has"):
        inject(shapes.Frozen(given), refined)
    with pytest.raises(NotInjected, match="item 1234 has"):
        verify(shapes.Frozen(given), record(given, refined))


def test_workers_with_old_copies_are_noticed() -> None:
    loader = DataLoader(shapes.LraCifar(given_labels()), num_workers=1, persistent_workers=True)
    next(iter(loader))
    with pytest.raises(Stale, match="persistent workers of this DataLoader hold copies"):
        inject(loader, refined_labels(given_labels()))
    del loader


def test_stale_state_is_named_or_refused(tmp_path: Path) -> None:
    refined = refined_labels(given_labels())
    with pytest.warns(StaleWarning, match=r"softlabel \(soft labels\)"):
        assert inject(shapes.PlcCifar(given_labels()), refined).stale == ("softlabel (soft labels)",)
    dataset = shapes.PlcCifar(given_labels())
    with pytest.raises(Stale, match="softlabel"):
        inject(dataset, refined, on_stale="error")
    assert dataset.targets == given_labels().tolist()
    cache = tmp_path / "fp_knn_food.npy"
    inject(shapes.LraCifar(given_labels()), refined, on_stale="error", caches=[cache])  # there is none
    cache.touch()
    with pytest.raises(Stale, match=r"the file .*fp_knn_food\.npy came from the old labels"):
        inject(shapes.LraCifar(given_labels()), refined, on_stale="error", caches=[cache])


def test_an_emptied_class_is_named() -> None:
    given = given_labels()
    with pytest.warns(EmptiedClassWarning, match="labels: no image is left in class 3"):
        inject(shapes.LraCifar(given), np.where(given == 3, 0, given))


def test_labels_for_files_without_ids_are_warned_of(tmp_path: Path) -> None:
    given = given_labels()
    refined = refined_labels(np.sort(given))
    dataset = shapes.image_folder(tmp_path / "images", given)
    with pytest.warns(OrderWarning, match="in the order of the dataset's `samples`, .*; pass ids to be sure") as caught:
        report = inject(dataset, refined)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    base = np.array(report.revert().targets)
    cases: list[tuple[Any, Any]] = [(refined, {"base": base}), (record(base, refined), {})]  # these tell the order
    for labels, more in [*cases, (base, {})]:  # and where nothing changes it does not matter
        report = inject(dataset, labels, **more)
        report.revert()


def test_labels_counted_from_1_are_refused(tmp_path: Path) -> None:
    given = given_labels()
    known = shapes.image_folder(tmp_path / "images", given)
    for dataset, message in (
        (known, "labels: expected classes 0 to 3, got 4 in row"),
        (shapes.LraCifar(given), "labels: expected classes from 0 to 3, .* got 1 to 4: are they counted from 1"),
    ):
        before = item_labels(dataset)
        with pytest.raises(InputError, match=message):
            inject(dataset, np.array(before) + 1)
        assert item_labels(dataset) == before
    with pytest.warns(EmptiedClassWarning, match="class 0"):
        inject(shapes.LraCifar(given), given + 1, num_classes=5, force=True)


def test_hooks_are_called() -> None:
    dataset = shapes.Own(given_labels())
    inject(dataset, refined_labels(given_labels()))
    assert dataset.cache == ""


def test_types_stay() -> None:
    for build, kind in ((shapes.Svhn, np.ndarray), (shapes.TensorTargets, torch.Tensor)):
        dataset = build(given_labels())
        name = "targets" if kind is torch.Tensor else "labels"
        dtype = getattr(dataset, name).dtype
        inject(dataset, refined_labels(given_labels()))
        assert isinstance(getattr(dataset, name), kind)
        assert getattr(dataset, name).dtype == dtype
    plc = shapes.PlcCifar(given_labels())
    plc.targets = [torch.tensor(label) for label in plc.targets]  # what PLC's own correction leaves behind
    with ignoring_stale():
        inject(plc, refined_labels(given_labels()))
    assert all(type(label) is int for label in plc.targets)


def test_classes_that_do_not_fit_a_small_type_widen_it() -> None:
    dataset = shapes.Svhn(given_labels())
    inject(dataset, given_labels() + np.where(np.arange(40) == 3, 300, 0))
    assert item_labels(dataset)[3] == given_labels()[3] + 300


def test_hugging_face_datasets_are_replaced_not_changed() -> None:
    pytest.importorskip("datasets")
    given = given_labels()
    dataset = shapes.hugging_face(given)
    report = inject(dataset, refined_labels(given))
    assert report.dataset is not dataset
    assert dataset["label"][:] == given.tolist()
    assert report.dataset["label"][:] == refined_labels(given).tolist()
    assert report.dataset.features == dataset.features
    assert report.dataset.column_names == dataset.column_names
    assert report.revert() is dataset
    shuffled = dataset.shuffle(seed=0)
    with pytest.raises(WrongOrder):
        inject(shuffled, given)
    assert inject(shuffled, np.array(shuffled["label"][:]), rows=range(40)).changed == 0
    assert inject(shuffled, given, rows=list(map(int, shuffled["name"]))).changed == 0
    with pytest.raises(InputError, match="labels: expected classes 0 to 3, got 7 in row 0"):
        inject(dataset, given + 4)
    with pytest.raises(InputError, match="cannot be changed inside another; inject before wrapping"):
        inject(Subset(dataset, range(10)), given[:10])
    with pytest.raises(InputError, match="expected one column of labels, got name, pixels"):
        inject(dataset.remove_columns("label"), given)


@pytest.mark.filterwarnings("ignore::synth_refine.labels.inject.EmptiedClassWarning")
def test_a_subset_changes_its_own_images_alone() -> None:
    given = given_labels()
    base = shapes.cifar10(given)
    indices = [7, 3, 30]
    with pytest.raises(WrongOrder):
        inject(Subset(base, indices), np.array([1, 2, 3]))
    report = inject(Subset(base, indices), np.array([1, 2, 3]), rows=range(3))
    assert report.count == 3
    expected = given.copy()
    expected[indices] = [1, 2, 3]
    assert base.targets == expected.tolist()
    report.revert()
    assert base.targets == given.tolist()
    with pytest.raises(LengthMismatch, match="labels: expected 3, one per item of the dataset, got 40"):
        inject(Subset(base, indices), given)
    inject(Subset(base, indices), expected, ids=range(40))  # positions below the Subset
    assert base.targets == expected.tolist()
    inject(Subset(base, [0, 0]), np.array([1, 1]), rows=range(2))
    with pytest.raises(WrongIds, match="got two for an image that occurs twice"):
        inject(Subset(base, [0, 0]), np.array([1, 2]), rows=range(2))
    inject(ConcatDataset([Subset(base, [0, 1]), Subset(base, [2])]), np.array([3, 2, 1]), rows=range(3))
    assert base.targets[:3] == [3, 2, 1]


def test_items_without_a_label_keep_theirs_only_when_told() -> None:
    given = given_labels()
    dataset = shapes.cifar10(given)
    refined = refined_labels(given)[:30]
    with pytest.raises(LengthMismatch):
        inject(dataset, refined)
    with pytest.raises(WrongIds, match="got none for 10 of 40, the first is 30"):
        inject(dataset, refined, ids=range(30))
    inject(dataset, refined, ids=range(30), fill="keep")
    assert dataset.targets == [*refined, *given[30:]]
    verify(dataset, refined, ids=range(30), fill="keep", k=None)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0] * 40, "ids: expected every id once, got '0' 40 times"),
        (list(range(39)), "ids: expected 40, one per label, got 39"),
        (list(range(1, 41)), "got none for 1 of 40, the first is 0"),
        ([0.5] * 40, "ids: expected whole numbers or texts"),
        (["a", *range(39)], "ids: expected whole numbers or texts"),
    ],
)
def test_wrong_ids_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inject(shapes.cifar10(given_labels()), given_labels(), ids=ids)


def test_ids_as_text_count_as_positions_where_images_have_no_names() -> None:
    """What a .csv file with row numbers holds."""
    dataset = shapes.cifar10(given_labels())
    refined = refined_labels(given_labels())
    inject(dataset, refined[::-1].copy(), ids=[str(row) for row in range(40)][::-1])
    assert dataset.targets == refined.tolist()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (given_labels().astype(float), "labels: expected integer class indices, got float64"),
        (given_labels()[:, None], r"labels: expected shape \(N,\), got \(40, 1\)"),
        (given_labels() + 1, "labels: expected classes 0 to 3, got 4 in row"),  # 1-based, as Food-101N's files
        (given_labels() - 1, "labels: expected classes 0 to .*, got -1 in row"),
        ([0.5] * 40, "labels: expected a NumPy array or torch tensor, got list"),
    ],
)
def test_bad_labels_are_refused(labels: Any, message: str) -> None:
    dataset = shapes.cifar10(given_labels())
    with pytest.raises(InputError, match=message):
        inject(dataset, labels)
    assert dataset.targets == given_labels().tolist()


def test_bad_options_are_refused() -> None:
    dataset = shapes.cifar10(given_labels())
    with pytest.raises(InputError, match="fill, on_stale: expected error or keep, error or warn, got 'zero', 'warn'"):
        inject(dataset, given_labels(), fill="zero")  # type: ignore[arg-type]


def test_a_dataset_with_labels_nowhere_known_is_registered() -> None:
    class Adapter:
        def __init__(self, dataset: TensorDataset) -> None:
            self.dataset = dataset

        def get_labels(self) -> Labels:
            return np.asarray(self.dataset.tensors[1])

        def set_labels(self, labels: Labels) -> None:
            self.dataset.tensors = (self.dataset.tensors[0], torch.as_tensor(labels.copy()))

    class Pairs(TensorDataset):
        pass

    dataset = Pairs(torch.zeros(40, 3), torch.as_tensor(given_labels()))
    with pytest.raises(InputError, match="Pairs has none of them; .* say where they are with register"):
        inject(dataset, given_labels())
    register(Pairs, Adapter)
    inject(dataset, refined_labels(given_labels()))
    assert dataset.tensors[1].tolist() == refined_labels(given_labels()).tolist()


def test_labels_in_unusual_items_are_found_or_asked_for() -> None:
    class Nested(shapes.LraCifar):
        def __getitem__(self, index: int) -> Any:
            return {"pixels": self.data[index], "annotation": (self.targets[index],)}

    with pytest.raises(InputError, match="expected items with an integer label"):
        inject(Nested(given_labels()), refined_labels(given_labels()))
    inject(Nested(given_labels()), refined_labels(given_labels()), label_of=lambda item: int(item["annotation"][0]))


def test_a_length_that_lies_is_noticed() -> None:
    class Short(shapes.LraCifar):
        def __len__(self) -> int:
            return 30

    with pytest.raises(LengthMismatch, match="dataset: Short has 30 items, but 40 labels"):
        inject(Short(given_labels()), given_labels()[:30])


def test_the_random_states_are_left_alone() -> None:
    class Drawing(shapes.LraCifar):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(1) + random.random() + np.random.rand(), self.targets[index]  # noqa: NPY002

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(1)), random.random(), float(np.random.rand())  # noqa: NPY002

    def seed() -> None:
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002

    seed()
    expected = draw()
    seed()
    inject(Drawing(given_labels()), refined_labels(given_labels()))
    assert draw() == expected


def test_the_random_states_of_used_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {0: 5, 1: 7}  # of two stand-ins for GPUs

    class Drawing(shapes.LraCifar):
        def __getitem__(self, index: int) -> Any:
            states[1] += 1
            return torch.zeros(1), self.targets[index]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    for initialised, unchanged in ((True, True), (False, False)):  # one that nobody uses is not even looked at
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=initialised: used)
        inject(Drawing(given_labels()), refined_labels(given_labels()))
        assert (states == {0: 5, 1: 7}) == unchanged


def test_no_library_is_imported_to_recognise_its_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuse:
        def find_spec(self, name: str, *_: object) -> None:
            assert name.split(".")[0] not in ("datasets", "pyarrow", "pandas")

    for name in [name for name in sys.modules if name.split(".")[0] in ("datasets", "pyarrow", "pandas")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])
    inject(shapes.LraCifar(given_labels()), refined_labels(given_labels()))


# One epoch on what was injected


def train_one_epoch(dataset: Any) -> dict[int, int]:
    """Train a linear layer for one epoch; returns the label that every image was trained on."""
    torch.manual_seed(0)
    head = nn.Linear(3 * shapes.SIZE**2, CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    seen: dict[int, int] = {}
    for batch in DataLoader(dataset, batch_size=8, shuffle=True):
        pixels, labels = (batch["pixels"] / 255, batch["label"]) if isinstance(batch, dict) else batch[:2]
        loss = nn.functional.cross_entropy(head(pixels.flatten(1).float()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        for image, label in zip(pixels, labels, strict=True):
            key = image if image.shape[0] == 3 else image.permute(2, 0, 1)
            seen[hash((key * 255).round().byte().numpy().tobytes())] = int(label)
    return seen


@pytest.mark.parametrize("shape", ["image-folder", "subset", "hugging-face", "elr"])
def test_one_epoch_trains_on_the_injected_labels(shape: str, tmp_path: Path) -> None:
    if shape == "hugging-face":
        pytest.importorskip("datasets")
    dataset, given, rows, how = built(shape, tmp_path)
    before = train_one_epoch(dataset.with_format("torch") if shape == "hugging-face" else dataset)
    refined = refined_labels(given)
    with ignoring_stale():
        dataset = inject(dataset, refined, **how).dataset
    seen = train_one_epoch(dataset.with_format("torch") if shape == "hugging-face" else dataset)
    if shape == "subset":
        assert isinstance(dataset.dataset, CIFAR10)
    assert len(seen) == len(rows)
    assert sum(seen[image] != before[image] for image in seen) == int((given != refined)[rows].sum()) > 5
    assert np.bincount(list(seen.values())).tolist() == np.bincount(refined[rows]).tolist()
