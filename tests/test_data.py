"""Tasks by name: splits, noise, arrays of a user, folders of images, and one line for whatever is missing."""

import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from PIL import Image

from adapters import check_options
from benchmarks import cifar, data
from benchmarks.config import CONFIGS, read_config
from benchmarks.task import annotate
from synth_refine import InputError

DATA = os.environ.get("SYNTH_REFINE_DATA")

# ---- digits ----


@pytest.fixture(scope="module")
def digits() -> dict[str, data.Benchmark]:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    return {name: data.load("digits", name) for name in ("clean", "pmd-1-0.35", "pmd-1-0.70")}


def test_digits_are_split_once_and_stratified(digits: dict[str, data.Benchmark]) -> None:
    task = digits["clean"].task
    assert task.train.inputs.shape == (1200, 3, 32, 32)
    assert task.train.inputs.dtype == torch.uint8
    assert (len(task.noisy_validation.labels), len(task.test.labels)) == (237, 360)
    for split in (task.train, task.clean_validation, task.test):
        counts = torch.bincount(split.labels, minlength=10) / len(split.labels)
        assert float((counts - 0.1).abs().max()) < 0.01
    assert torch.bincount(task.synthetic.labels).tolist() == [100] * 10
    _, _, train, validation, test = data._digit_images()
    assert_array_equal(np.sort(np.concatenate([train, validation, test])), np.arange(1797))


@pytest.mark.parametrize(("name", "rate"), [("pmd-1-0.35", 0.35), ("pmd-1-0.70", 0.70)])
def test_digits_bear_the_named_noise(digits: dict[str, data.Benchmark], name: str, rate: float) -> None:
    bench, task = digits[name], digits[name].task
    assert bench.true_labels is not None
    assert abs(float((task.train.labels != bench.true_labels).double().mean()) - rate) < 0.02
    wrong = task.noisy_validation.labels != task.clean_validation.labels
    assert abs(float(wrong.double().mean()) - rate) < 0.02
    assert_array_equal(bench.true_labels, digits["clean"].task.train.labels)
    assert_array_equal(task.test.labels, digits["clean"].task.test.labels)
    assert (bench.name, bench.noise_name) == ("digits", name)


def test_at_seventy_percent_the_commonest_label_of_most_digits_is_wrong(digits: dict[str, data.Benchmark]) -> None:
    wrong = {}
    for name in ("pmd-1-0.35", "pmd-1-0.70"):
        bench = digits[name]
        counts = np.histogram2d(bench.true_labels, bench.task.train.labels, bins=10)[0]
        wrong[name] = int((counts.argmax(axis=1) != np.arange(10)).sum())
    assert wrong["pmd-1-0.35"] == 0
    assert wrong["pmd-1-0.70"] >= 5  # as in the published CIFAR-10 file


def test_digits_are_the_same_every_time(digits: dict[str, data.Benchmark]) -> None:
    data._digit_posterior.cache_clear()
    torch.manual_seed(99)
    again = data.load("digits", "pmd-1-0.70").task
    assert_array_equal(again.train.labels, digits["pmd-1-0.70"].task.train.labels)


# ---- noise by name ----


def pmd_stand_in(kind: int, rate: str) -> NDArray[np.int64]:
    return np.full(300, kind)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("clean", lambda labels, truth: (labels == truth).all()),
        ("pmd-2-0.70", lambda labels, truth: (labels == 2).all()),
        ("uniform-0.5", lambda labels, truth: 0.4 < (labels != truth).mean() < 0.6),
        ("symmetric-0.5", lambda labels, truth: (labels != truth).sum() == 150),
        ("pair-0.3", lambda labels, truth: [len(set(labels[truth == one])) for one in range(3)] == [2] * 3),
        ("asymmetric-0.9", lambda labels, truth: set(labels[truth == 0]) == {0, 1} and (labels != 0).mean() > 0.9),
        ("pmd-3-0.35+uniform-0.5", lambda labels, truth: 0.4 < (labels == 3).mean() < 0.6),
    ],
)
def test_noise_names_are_applied_in_order(name: str, check: Callable[..., bool]) -> None:
    truth = np.arange(3).repeat(100)
    assert check(data.noisy_labels(name, truth, 5, pmd_stand_in, {0: 1}), truth)


@pytest.mark.parametrize("name", ["pmd", "pmd-4-0.35", "pmd-1-35", "uniform-0.3+pmd-1-0.35", "clean+uniform-0.3", ""])
def test_an_unknown_noise_is_one_clear_line(name: str) -> None:
    with pytest.raises(InputError, match=r"noise: expected clean or a name like pmd-1-0\.35") as caught:
        data.noisy_labels(name, np.zeros(300, dtype=np.int64), 5, pmd_stand_in)
    assert "\n" not in str(caught.value)


def test_asymmetric_noise_needs_a_class_map() -> None:
    with pytest.raises(InputError, match="noise: expected no asymmetric part, this data set has no class map"):
        data.noisy_labels("asymmetric-0.3", np.zeros(300, dtype=np.int64), 5, pmd_stand_in)


# ---- arrays of a user ----

Arrays = dict[str, NDArray[Any]]


def make_arrays(features: bool = False) -> Arrays:
    rng = np.random.default_rng(0)
    rows = {"train": 50, "test": 20, "synthetic": 15}
    shape = (6,) if features else (8, 8, 3)
    arrays: Arrays = {name: rng.integers(0, 256, (n, *shape), dtype=np.uint8) for name, n in rows.items()}
    labels = {f"{name}_labels": np.arange(n) % 5 for name, n in rows.items()}
    return arrays | labels


def save(folder: Path, arrays: Arrays, given: NDArray[Any] | None = None) -> tuple[Path, Path | None]:
    np.savez(folder / "mine.npz", **arrays)  # type: ignore[arg-type]
    if given is None:
        return folder / "mine.npz", None
    np.save(folder / "noisy.npy", given)
    return folder / "mine.npz", folder / "noisy.npy"


def test_pixels_become_channels_first_and_features_float32(tmp_path: Path) -> None:
    arrays = make_arrays()
    bench = data.npz(*save(tmp_path, arrays, arrays["train_labels"][:40]))
    assert bench.task.is_pixels
    assert_array_equal(bench.task.train.inputs.permute(0, 2, 3, 1), arrays["train"][:40])
    assert_array_equal(bench.task.test.inputs.permute(0, 2, 3, 1), arrays["test"])
    arrays = make_arrays(features=True)
    bench = data.npz(*save(tmp_path, arrays, arrays["train_labels"][:40]))
    assert bench.task.synthetic.inputs.dtype == torch.float32
    assert_array_equal(bench.task.synthetic.inputs, arrays["synthetic"].astype(np.float32))


def test_given_labels_belong_to_the_first_rows_and_the_rest_is_validation(tmp_path: Path) -> None:
    arrays = make_arrays()
    given = (arrays["train_labels"][:40] + 1) % 5
    bench = data.load(str(save(tmp_path, arrays, given)[0]), given=tmp_path / "noisy.npy")
    task = bench.task
    assert (bench.name, bench.noise_name, task.num_classes) == ("mine", "noisy", 5)
    assert_array_equal(task.train.labels, given)
    assert bench.true_labels is not None
    assert_array_equal(bench.true_labels, arrays["train_labels"][:40])
    assert_array_equal(task.clean_validation.labels, arrays["train_labels"][40:])
    # every training label is off by one, so the simulated annotator is too
    assert_array_equal(task.noisy_validation.labels, (arrays["train_labels"][40:] + 1) % 5)
    assert task.noisy_validation.inputs.data_ptr() == task.clean_validation.inputs.data_ptr()
    assert_array_equal(task.noisy_validation.inputs.permute(0, 2, 3, 1), arrays["train"][40:])


def test_the_simulated_annotator_follows_the_transition_matrix() -> None:
    matrix = np.array([[0.6, 0.3, 0.1], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    truth = np.arange(3).repeat(5000)
    labels = annotate(truth, matrix, seed=0)
    assert_array_equal(labels, annotate(truth, matrix, seed=0))
    shares = np.bincount(labels[:5000], minlength=3) / 5000
    assert abs(shares - matrix[0]).max() < 0.03
    assert_array_equal(labels[5000:], truth[5000:])  # class 2 has no example


def test_without_further_rows_a_tenth_is_held_out(tmp_path: Path) -> None:
    arrays = make_arrays()
    arrays["train"][:, 0, 0, 0] = np.arange(50)
    given = (arrays["train_labels"] + 2) % 5
    bench = data.npz(*save(tmp_path, arrays, given))
    task = bench.task
    train, held_out = (split.inputs[:, 0, 0, 0].numpy() for split in (task.train, task.noisy_validation))
    assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(50))
    assert len(held_out) == 5
    assert_array_equal(task.train.labels, given[train])
    assert_array_equal(task.noisy_validation.labels, given[held_out])
    assert_array_equal(task.clean_validation.labels, arrays["train_labels"][held_out])
    assert_array_equal(bench.true_labels, arrays["train_labels"][train])


def test_noise_by_name_on_features_leaves_the_last_tenth_for_validation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = make_arrays(features=True)
    arrays |= {"train_labels": rng.integers(0, 5, 600), "train": rng.normal(size=(600, 6))}
    arrays["train"][np.arange(600), arrays["train_labels"]] += 2
    path = save(tmp_path, arrays)[0].rename(tmp_path / "cifar10-mine.npz")
    for name, rate in {"clean": 0.0, "uniform-0.5": 0.5, "pmd-1-0.30": 0.3}.items():
        bench = data.load(str(path), name)
        assert bench.noise_name == name
        assert bench.true_labels is not None
        assert_array_equal(bench.true_labels, arrays["train_labels"][:540])
        assert_array_equal(bench.task.clean_validation.labels, arrays["train_labels"][540:])
        assert abs(float((bench.task.train.labels != bench.true_labels).double().mean()) - rate) < 0.05
    with pytest.raises(InputError, match="noise: expected features for PMD noise by name, got pixels"):
        data.load(str(save(tmp_path, make_arrays())[0]), "pmd-1-0.30")
    with pytest.raises(InputError, match="noise: expected no asymmetric part, this data set has no class map"):
        data.load(str(tmp_path / "mine.npz"), "asymmetric-0.4")


def test_without_a_label_file_nobody_knows_the_true_labels(tmp_path: Path) -> None:
    arrays = make_arrays()
    bench = data.npz(*save(tmp_path, arrays))
    assert bench.true_labels is None
    assert bench.noise_name == "given"
    assert (len(bench.task.train.labels), len(bench.task.noisy_validation.labels)) == (45, 5)
    assert len(bench.task.clean_validation.labels) == 0
    assert bench.task.clean_validation.inputs.shape == (0, 3, 8, 8)


def replace(name: str, value: Any) -> Callable[[Arrays], Arrays]:
    return lambda arrays: arrays | {name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda arrays: {key: arrays[key] for key in arrays if key != "test"},
            "data: expected the array test in .*mine.npz, got train, synthetic, .*; needed are train, train_labels,",
        ),
        (replace("train", np.zeros((50, 8, 8, 3))), r"train: expected pixels .*, got \(50, 8, 8, 3\) float64"),
        (replace("train", np.zeros((50, 3, 8, 8), np.uint8)), r"train: expected pixels .*, got \(50, 3, 8, 8\) uint8"),
        (replace("train", np.zeros((50, 4), np.int64)), r"train: expected pixels .*, got \(50, 4\) int64"),
        (replace("train", np.zeros((0, 4))), "train: expected at least one row, got none"),
        (replace("test", np.full((20, 6), np.nan)), "test: expected finite features, got others in row 0"),
        (
            replace("synthetic", np.zeros((15, 4, 4, 3), np.uint8)),
            r"synthetic: expected rows of shape \(3, 8, 8\) as in train, got \(3, 4, 4\)",
        ),
        (replace("test_labels", np.zeros(7, np.int64)), "test_labels: expected 20 labels as test has rows, got 7"),
        (replace("test_labels", np.zeros(20)), "test_labels: expected integer class indices, got float64"),
        (replace("train_labels", np.full(50, -1)), "train_labels: expected classes 0 to .*, got -1 in row 0"),
        (
            replace("synthetic_labels", np.zeros(15, np.int64)),
            "synthetic_labels: expected an image of every class, got none of class 1",
        ),
        (
            replace("train", np.array([object()] * 50)),
            "data: expected an .npz file of plain arrays, .*mine.npz is not one",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_one_clear_line(
    tmp_path: Path, change: Callable[[Arrays], Arrays], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        data.npz(*save(tmp_path, change(make_arrays())))
    assert "\n" not in str(caught.value)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    (tmp_path / "mine.npz").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"data: expected an \.npz file of plain arrays"):
        data.npz(tmp_path / "mine.npz")
    np.savez(tmp_path / "mine.npz", **make_arrays() | {"train": np.array([Bomb(tmp_path / "ran")])})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"data: expected an \.npz file of plain arrays"):
        data.npz(tmp_path / "mine.npz")
    assert not (tmp_path / "ran").exists()


def test_other_files_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npz.npy", np.zeros(3))
    (tmp_path / "array.npz.npy").rename(tmp_path / "array.npz")
    complete = save(tmp_path, make_arrays())[0].read_bytes()
    (tmp_path / "cut.npz").write_bytes(complete[: len(complete) // 2])
    for name in ("text", "array", "cut", "absent"):
        with pytest.raises(InputError, match=f"data: .*{name}.npz") as caught:
            data.npz(tmp_path / f"{name}.npz")
        assert "\n" not in str(caught.value)


def test_too_many_given_labels_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="given: expected at most 50 labels, the rows of train, got 60"):
        data.npz(*save(tmp_path, make_arrays(), np.zeros(60, np.int64)))


def test_a_label_file_needs_no_name_of_noise_on_digits() -> None:
    with pytest.raises(InputError, match="given: expected none for digits"):
        data.load("digits", "clean", given=Path("labels.npy"))
    with pytest.raises(InputError, match=r"dataset: expected digits, cifar10, cifar100 or a path .*, got 'mnist'"):
        data.load("mnist")


# ---- CIFAR ----


def fill_folders(folder: Path, names: list[str]) -> None:
    for shade, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in (2, 0, 1):
            Image.new("RGB", (64, 64), (10 * shade, index, 0)).save(folder / name / f"{index:05d}.png")
        (folder / name / "notes.txt").write_text("not an image")


def test_image_folders_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    fill_folders(tmp_path, ["cat", "01", "ship"])
    images, labels = cifar.read_image_folders(tmp_path, ["cat", "dog", "ship"], 32)
    assert images.shape == (9, 3, 32, 32)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert images[:, 0, 5, 5].tolist() == [0, 0, 0, 10, 10, 10, 20, 20, 20]
    assert images[:, 1, 5, 5].tolist() == [0, 1, 2] * 3


def test_of_a_synthetic_image_that_is_not_square_the_middle_is_taken(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    wide = np.zeros((40, 80, 3), dtype=np.uint8)
    wide[:, 20:60] = 200
    Image.fromarray(wide).save(tmp_path / "cat" / "00000.png")
    square = np.random.default_rng(0).integers(256, size=(48, 48, 3), dtype=np.uint8)
    Image.fromarray(square).save(tmp_path / "cat" / "00001.png")
    images, _ = cifar.read_image_folders(tmp_path, ["cat"], 32)
    assert images[0, :, :, 1:-1].unique().tolist() == [200]  # its edges take part of what lies beside the square
    expected = np.array(Image.fromarray(square).resize((32, 32), Image.Resampling.BILINEAR))
    assert_array_equal(images[1].permute(1, 2, 0), expected)


def test_missing_double_empty_and_damaged_folders_are_one_clear_line(tmp_path: Path) -> None:
    fill_folders(tmp_path, ["cat", "01"])
    (tmp_path / "empty").mkdir()
    for names, message in (
        (["cat", "dog", "ship"], r'expected a folder ship or 02 in .*, got none; 100 .* "A photo of ship\." would do'),
        (["cat", "empty"], "expected a folder empty or 01 in .*, got .*empty and .*01"),
        (["empty"], "expected a folder empty or 00 in .*, got .*empty without an image"),
    ):
        with pytest.raises(InputError, match=f"synthetic: {message}") as caught:
            cifar.read_image_folders(tmp_path, names, 32)
        assert "\n" not in str(caught.value)
    (tmp_path / "cat" / "00001.png").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"synthetic: expected an image, .*00001\.png cannot be read"):
        cifar.read_image_folders(tmp_path, ["cat"], 32)


def stand_in_for_cifar(monkeypatch: pytest.MonkeyPatch, train: NDArray[np.int64], classes: int) -> None:
    """CIFAR with these training labels and with images of one pixel."""
    images = {"train": torch.zeros(len(train), 3, 1, 1, dtype=torch.uint8)}
    images["test"] = images["train"][:100]
    names = [f"class{label}" for label in range(classes)]
    monkeypatch.setattr(cifar, "_cifar_images", lambda *_: (images, {"train": train, "test": train[:100]}, names))


def test_cifar_keeps_the_last_five_thousand_for_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = np.random.default_rng(0).integers(10, size=50_000)
    stand_in_for_cifar(monkeypatch, truth, 10)
    fill_folders(tmp_path / "synthetic" / "cifar10", [f"{label:02d}" for label in range(10)])
    bench = data.load("cifar10", "uniform-0.3", data_root=tmp_path)
    assert bench.true_labels is not None
    assert_array_equal(bench.true_labels, truth[:45_000])
    assert_array_equal(bench.task.clean_validation.labels, truth[45_000:])
    for given, true in (
        (bench.task.train.labels, bench.true_labels),
        (bench.task.noisy_validation.labels, bench.task.clean_validation.labels),
    ):
        assert abs(float((given != true).double().mean()) - 0.3) < 0.03
    np.save(tmp_path / "mine.npy", truth)
    with pytest.raises(InputError, match="given: expected 45000 labels, one per training image, got 50000"):
        data.load("cifar10", data_root=tmp_path, given=tmp_path / "mine.npy")


@pytest.mark.skipif(DATA is None, reason="SYNTH_REFINE_DATA does not name the folder with real label files")
@pytest.mark.parametrize(("name", "classes", "rate"), [("cifar10", 10, 0.5330), ("cifar100", 100, 0.5474)])
def test_the_named_noise_on_cifar_is_that_of_the_published_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, classes: int, rate: float
) -> None:
    folder = Path(str(DATA)) / name
    truth = np.load(folder / "labels.npz", allow_pickle=False)["train"].astype(np.int64)
    stand_in_for_cifar(monkeypatch, truth, classes)
    fill_folders(tmp_path, [f"{label:02d}" for label in range(classes)])
    bench = data.load(name, "pmd-1-0.35+uniform-0.3", data_root=folder, synthetic=tmp_path)
    published = np.load(folder / "noise_labels" / f"{name}-1-0.35_U_0.3.npy", allow_pickle=False)
    assert_array_equal(bench.task.train.labels, published)
    wrong = bench.task.noisy_validation.labels != bench.task.clean_validation.labels
    assert abs(float(wrong.double().mean()) - rate) < 0.03


def test_without_a_network_one_line_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(
        InputError, match=r"fetch https://\S+cifar-100-python\.tar\.gz \(md5 \w{32}\) and put"
    ) as caught:
        data.load("cifar100", "clean", data_root=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"fetch https://\S+/cifar10-1-0\.35\.npy \(md5 \w{32}\) and put") as caught:
        cifar._label_file("cifar10-1-0.35.npy", tmp_path / "noise_labels")
    assert "\n" not in str(caught.value)


# ---- configs ----


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100"])
def test_configs_name_a_data_set_its_noise_and_known_options(name: str) -> None:
    config = read_config(CONFIGS / f"{name}.yaml")
    assert config["dataset"] == name
    for noise_name in config["noise"]:
        data.noisy_labels(noise_name, np.arange(300) % 100, 100, pmd_stand_in, {0: 1})
    for method, options in config["methods"].items():
        check_options(method, options)
    check_options("initial", config["initial"])
