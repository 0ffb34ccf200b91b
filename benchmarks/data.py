"""Tasks by name: what a method may look at, and beside it the true labels that only measuring may see.

Letters in shapes: N training images, V validation images, M synthetic images, D features, C classes.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from adapters.base import Split, Task
from synth_refine import InputError, noise
from synth_refine._io.untrusted import open_plain
from synth_refine.labels.files import as_labels, read_labels, transition_matrix
from synth_refine.synthetic.glyphs import render_glyphs
from third_party.parallel import first_process_first

Labels = NDArray[np.int64]

SYNTHETIC_PER_CLASS = 100  # the paper's number
HOLD_OUT = 0.1  # of the training rows, for validation, where nothing else is there
VALIDATION_ROWS, TEST_ROWS = 237, 360  # of the 1,797 digits; the other 1,200 are for training
CIFAR_TRAIN_ROWS = 45_000  # the published label files are about the first 45,000; the last 5,000 are validation

DIGITS_SEED = 834  # its draws come within two points of the named rate in the training and in the validation set

LABEL_FILES = "https://raw.githubusercontent.com/pxiangwu/PLC/HEAD/cifar/noisy_labels/"
LABEL_FILES_MD5 = {
    "cifar10-1-0.35.npy": "61dce5ddce57b1bb8a662858cc65dce1",
    "cifar10-1-0.70.npy": "bdbdcb0dbadb506ade942071d43ed15e",
    "cifar100-1-0.35.npy": "4c72386acaf9c027bd7b8884605b69ae",
    "cifar100-1-0.70.npy": "c7b9f5687766186aae42458de4c13bfb",
}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Benchmark:
    """A task and what is needed to measure on it.

    Attributes:
        task: Everything a method may look at.
        true_labels: True labels of the training images, (N,) int64; None where nobody knows them.
        name: The data set.
        noise_name: Where the given labels come from.
        class_names: One per class.
    """

    task: Task
    true_labels: Tensor | None
    name: str
    noise_name: str
    class_names: tuple[str, ...]


def load(
    dataset: str,
    noise_name: str = "given",
    *,
    data_root: Path | None = None,
    synthetic: Path | None = None,
    given: Path | None = None,
) -> Benchmark:
    """Build a task by name.

    Args:
        dataset: "digits", "cifar10", "cifar100", or the path of an .npz file (see `npz`).
        noise_name: "clean", or one or more of these joined by "+": pmd-KIND-RATE, uniform-LEVEL, asymmetric-LEVEL,
            for example "pmd-1-0.35+uniform-0.3". Not for an .npz file, whose noise is in its labels.
        data_root: Folder for downloads, for CIFAR.
        synthetic: Folder with one folder of synthetic images per class, for CIFAR.
        given: Label file; it takes the place of the noise. Not for digits.

    Raises:
        InputError: One line that says what was expected, or what to fetch and where to put it.
    """
    if dataset.endswith(".npz"):
        return npz(Path(dataset), given)
    if dataset == "digits":
        if given is not None:
            raise InputError(f"given: expected none for digits, whose labels are made by name, got {given}")
        return digits(noise_name)
    if dataset in CIFAR:
        return cifar(dataset, noise_name, data_root or Path("data"), synthetic, given)
    raise InputError(f"dataset: expected digits, {', '.join(CIFAR)} or a path that ends in .npz, got {dataset!r}")


# ---- noise by name ----


def noisy_labels(
    noise_name: str,
    true_labels: Labels,
    num_classes: int,
    pmd_labels: Callable[[int, str], Labels],
    flips: Mapping[int, int] | None = None,
) -> Labels:
    """Labels with the named noise, each part applied to what the one before it gave.

    Args:
        noise_name: See `load`.
        true_labels: True labels, (N,).
        num_classes: C.
        pmd_labels: Gives PMD labels for a kind and a rate as written.
        flips: Class map of the asymmetric noise; None where the data set has none.
    """
    labels = true_labels
    for place, part in enumerate(noise_name.split("+")):
        if match := re.fullmatch(r"(uniform|asymmetric)-(0\.\d+)", part):
            level = float(match[2])
            if match[1] == "uniform":
                labels = noise.uniform(labels, level, num_classes)
            elif flips is None:
                raise InputError(
                    f"noise: expected no asymmetric part, this data set has no class map, got {noise_name}"
                )
            else:
                labels = noise.asymmetric(labels, level, flips, num_classes=num_classes)
        elif place == 0 and (match := re.fullmatch(r"pmd-([123])-(0\.\d+)", part)):
            labels = pmd_labels(int(match[1]), match[2])
        elif noise_name != "clean":
            example = "pmd-1-0.35, uniform-0.3 or pmd-1-0.35+asymmetric-0.3"
            raise InputError(f"noise: expected clean or a name like {example}, got {noise_name!r}")
    return labels


# ---- digits ----


def digits(noise_name: str) -> Benchmark:
    """Real handwritten digits, 32x32, with rendered glyphs as synthetic images; offline, in seconds.

    The 1,797 images come with scikit-learn (E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI).
    They have 8x8 pixels and are enlarged with the same filter as the glyphs. The split is fixed and stratified: 1,200
    training, 237 validation and 360 test images. PMD noise comes from a small network trained on the true labels of the
    training and validation images with the published recipe, but ten times its learning rate.
    """
    images, truth, train, validation, test = _digit_images()

    def pmd_labels(kind: int, rate: str) -> Labels:
        rows = np.concatenate([train, validation])
        posterior = _digit_posterior()
        factor = noise.pmd_factor(posterior, truth[rows], kind, float(rate))
        labels: Labels = truth.copy()
        labels[rows] = noise.pmd(posterior, kind, factor, seed=DIGITS_SEED)
        return labels

    given = noisy_labels(noise_name, truth, 10, pmd_labels)
    measured = torch.from_numpy(test)
    test_split = Split(images[measured], torch.from_numpy(truth)[measured])
    task = _task(10, images, given, truth, train, validation, Split(*_digit_glyphs()), test_split)
    return Benchmark(task, torch.from_numpy(truth[train]), "digits", noise_name, tuple("0123456789"))


@lru_cache(maxsize=1)
def _digit_images() -> tuple[Tensor, Labels, Labels, Labels, Labels]:
    """Images (1797, 3, 32, 32), true labels, and the rows of the training, validation and test set."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
        from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'synth-refine[bench]'") from error
    data = load_digits()
    truth = data.target.astype(np.int64)
    small = np.rint(data.images * (255 / 16)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(one).resize((32, 32), Image.Resampling.LANCZOS)) for one in small])
    rest, test = train_test_split(np.arange(len(truth)), test_size=TEST_ROWS, stratify=truth, random_state=0)
    train, validation = train_test_split(rest, test_size=VALIDATION_ROWS, stratify=truth[rest], random_state=0)
    return (
        torch.from_numpy(large)[:, None].repeat(1, 3, 1, 1),
        truth,
        np.sort(train),
        np.sort(validation),
        np.sort(test),
    )


@lru_cache(maxsize=1)
def _digit_glyphs() -> tuple[Tensor, Tensor]:
    return render_glyphs("0123456789", SYNTHETIC_PER_CLASS, size=32, detail=8)


@lru_cache(maxsize=1)
def _digit_posterior() -> NDArray[np.float32]:
    """How sure a network trained on true labels is of the training and validation images, (1437, 10)."""
    images, truth, train, validation, _ = _digit_images()
    rows = torch.from_numpy(np.concatenate([train, validation]))
    pixels = nn.functional.avg_pool2d(images[rows, :1].float() / 255, 4).flatten(1)  # (1437, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return noise.train_posterior(model, pixels, torch.from_numpy(truth)[rows], noise.PosteriorConfig(lr=0.01))


# ---- arrays of a user ----


def npz(path: Path, given: Path | None = None, *, seed: int = 0) -> Benchmark:
    """Anybody's arrays: train, train_labels, test, test_labels, synthetic, synthetic_labels.

    (N, H, W, 3) uint8 is pixels; (N, D) is features, floating-point or uint8 codes, and becomes float32.

    With `given`, train_labels are the true labels, for measuring, and `given` has the noisy labels of the first rows of
    train. Further rows are the validation set. Their true labels are known and nobody has annotated them, so their
    noisy labels are simulated: drawn, with a fixed seed, from the transition matrix between given and true labels.
    Without `given`, train_labels are the given labels, the true ones are unknown, and there is no clean validation.
    Where no rows are left for validation, a fixed random tenth of the training rows is held out.

    Args:
        path: The .npz file. It is never unpickled.
        given: Label file, see `synth_refine.labels.read_labels`.
        seed: Of the held-out rows and of the simulated labels.

    Raises:
        InputError: An array is missing or does not fit, or the label file is longer than the training set.
    """
    arrays = _read_arrays(path)
    inputs = {name: _inputs(name, arrays[name]) for name in ("train", "test", "synthetic")}
    for name in ("test", "synthetic"):
        expected, actual = (tuple(inputs[key].shape[1:]) for key in ("train", name))
        if expected != actual:
            raise InputError(f"{name}: expected rows of shape {expected} as in train, got {actual}")
    labels = {}
    for name in ("train", "test", "synthetic"):
        labels[name] = as_labels(f"{name}_labels", arrays[f"{name}_labels"])
        if len(labels[name]) != len(inputs[name]):
            counts = f"{len(inputs[name])} labels as {name} has rows, got {len(labels[name])}"
            raise InputError(f"{name}_labels: expected {counts}")
    observed = labels["train"] if given is None else read_labels(given)
    if len(observed) > len(labels["train"]):
        raise InputError(
            f"given: expected at most {len(labels['train'])} labels, the rows of train, got {len(observed)}"
        )
    num_classes = 1 + max(int(values.max()) for values in (*labels.values(), observed))
    missing = sorted(set(range(num_classes)) - set(labels["synthetic"].tolist()))
    if missing:
        raise InputError(f"synthetic_labels: expected an image of every class, got none of class {missing[0]}")

    truth = labels["train"]
    rows = np.arange(len(truth))
    if len(observed) < len(truth):
        train, validation = rows[: len(observed)], rows[len(observed) :]
        matrix = transition_matrix(observed, truth[train], num_classes)
        observed = np.concatenate([observed, _annotate(truth[validation], matrix, seed)])
    else:
        held_out = np.random.default_rng(seed).permutation(rows)[: round(HOLD_OUT * len(rows))]
        train, validation = np.setdiff1d(rows, held_out), np.sort(held_out)
    splits = {name: Split(inputs[name], torch.from_numpy(labels[name])) for name in ("synthetic", "test")}
    known = None if given is None else truth
    task = _task(num_classes, inputs["train"], observed, known, train, validation, **splits)
    return Benchmark(
        task,
        None if known is None else torch.from_numpy(known[train]),
        path.stem,
        "given" if given is None else given.stem,
        tuple(map(str, range(num_classes))),
    )


def holds_features(path: Path) -> bool:
    """Whether the training inputs of an .npz file are features; it reads their header alone.

    Raises:
        InputError: No such file, or no .npz file with an array called train.
    """
    try:
        with open_plain("data", path) as file, zipfile.ZipFile(file) as archive, archive.open("train.npy") as member:
            version = np.lib.format.read_magic(member)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            return len(read_header(member)[0]) == 2
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"data: expected an .npz file with an array train, got {path}: {error}") from error


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    names = [f"{part}{ending}" for part in ("train", "test", "synthetic") for ending in ("", "_labels")]
    with open_plain("data", path) as file:
        try:
            archive = np.load(file, allow_pickle=False)
            present = archive.files if isinstance(archive, np.lib.npyio.NpzFile) else []
            absent = [name for name in names if name not in present]
            arrays = {} if absent else {name: archive[name] for name in names}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            text = str(error).splitlines()[0]
            raise InputError(f"data: expected an .npz file of plain arrays, {path} is not one: {text}") from error
    if absent:
        has = ", ".join(present) or "none"
        raise InputError(f"data: expected the array {absent[0]} in {path}, got {has}; needed are {', '.join(names)}")
    return arrays


def _inputs(name: str, values: NDArray[Any]) -> Tensor:
    """Pixels (N, 3, H, W) uint8 or features (N, D) float32."""
    if values.ndim == 0 or len(values) == 0:
        raise InputError(f"{name}: expected at least one row, got none")
    if values.ndim == 4 and values.shape[3] == 3 and values.dtype == np.uint8:
        return torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()
    if values.ndim == 2 and (values.dtype == np.uint8 or values.dtype.kind == "f"):
        features = torch.from_numpy(values.astype(np.float32))
        bad = ~features.isfinite().all(dim=1)
        if bool(bad.any()):
            raise InputError(f"{name}: expected finite features, got others in row {int(bad.nonzero()[0, 0])}")
        return features
    wanted = "pixels (N, H, W, 3) uint8 or features (N, D) of floating-point numbers or uint8 codes"
    raise InputError(f"{name}: expected {wanted}, got {values.shape} {values.dtype}")


def _annotate(truth: Labels, matrix: NDArray[np.float64], seed: int) -> Labels:
    """What an annotator with these confusions would have said, (V,); a class without an example is got right."""
    rows = np.where(matrix.sum(axis=1, keepdims=True) > 0, matrix, np.eye(len(matrix)))
    drawn = np.random.default_rng(seed).random(len(truth))
    labels: Labels = (rows.cumsum(axis=1)[truth] <= drawn[:, None]).sum(axis=1).clip(max=len(rows) - 1)
    return labels


# ---- CIFAR ----


@dataclass(frozen=True)
class CifarInfo:
    """What tells one CIFAR from the other."""

    dataset_class: str  # in torchvision.datasets
    flips: Mapping[int, int]


CIFAR = {"cifar10": CifarInfo("CIFAR10", noise.CIFAR10_FLIPS), "cifar100": CifarInfo("CIFAR100", noise.CIFAR100_FLIPS)}


def cifar(
    name: str, noise_name: str, data_root: Path, synthetic: Path | None = None, given: Path | None = None
) -> Benchmark:
    """CIFAR-10 or CIFAR-100 in the order and split of the published label files.

    Training images are the first 45,000, validation images the last 5,000. PMD labels are the published files, in
    data_root/noise_labels, and noise on top of them is drawn as published. The noisy labels of the validation images
    are simulated as `npz` does it. Images and label files are downloaded where they are missing.

    Args:
        name: "cifar10" or "cifar100".
        noise_name: See `load`.
        data_root: Folder for the downloads.
        synthetic: Folder with one folder of images per class, named by the class or by its two-digit index;
            data_root/synthetic/NAME by default.
        given: Label file of the 45,000 training images; takes the place of the noise.

    Raises:
        InputError: Something is missing and cannot be downloaded; the message says what to fetch and where to put it.
    """
    info = CIFAR[name]
    images, labels, class_names = _cifar_images(info.dataset_class, data_root)
    truth, held_out = labels["train"][:CIFAR_TRAIN_ROWS], labels["train"][CIFAR_TRAIN_ROWS:]
    num_classes = len(class_names)

    def pmd_labels(kind: int, rate: str) -> Labels:
        return read_labels(_label_file(f"{name}-{kind}-{rate}.npy", data_root / "noise_labels"))

    if given is not None:
        observed = read_labels(given)
    else:
        observed = noisy_labels(noise_name, truth, num_classes, pmd_labels, info.flips)
    observed = as_labels("given", observed, num_classes)
    if len(observed) != len(truth):
        raise InputError(f"given: expected {len(truth)} labels, one per training image, got {len(observed)}")
    simulated = _annotate(held_out, transition_matrix(observed, truth, num_classes), seed=0)
    size = images["train"].shape[-1]
    fake, fake_labels = read_image_folders(synthetic or data_root / "synthetic" / name, class_names, size)
    rows = np.arange(len(labels["train"]))
    task = _task(
        num_classes,
        images["train"],
        np.concatenate([observed, simulated]),
        labels["train"],
        rows[:CIFAR_TRAIN_ROWS],
        rows[CIFAR_TRAIN_ROWS:],
        Split(fake, fake_labels),
        Split(images["test"], torch.from_numpy(labels["test"])),
    )
    return Benchmark(
        task, torch.from_numpy(truth), name, noise_name if given is None else given.stem, tuple(class_names)
    )


def read_image_folders(folder: Path, class_names: Sequence[str], size: int) -> tuple[Tensor, Tensor]:
    """Read one folder of images per class, in the order of the sorted file names.

    Args:
        folder: Has one folder per class, named by the class or by its index in two digits.
        class_names: C names.
        size: Images are shrunk or enlarged to this height and width, bilinearly with antialiasing as in the paper.

    Returns:
        Images, (M, 3, size, size) uint8, and their classes, (M,) int64.

    Raises:
        InputError: A class has no folder, two, or no readable image.
    """
    images, labels = [], []
    for label, class_name in enumerate(class_names):
        names = (class_name, f"{label:02d}")
        found = [folder / one for one in dict.fromkeys(names) if (folder / one).is_dir()]
        files = sorted(path for one in found for path in one.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if len(found) != 1 or not files:
            got = "none" if not found else " and ".join(map(str, found)) + ("" if files else " without an image")
            advice = f'{SYNTHETIC_PER_CLASS} synthetic images made with "A photo of {class_name}." would do'
            raise InputError(f"synthetic: expected a folder {' or '.join(names)} in {folder}, got {got}; {advice}")
        for file in files:
            try:
                with Image.open(file) as image:
                    pixels = np.array(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
            except (OSError, Image.DecompressionBombError) as error:
                raise InputError(f"synthetic: expected an image, {file} cannot be read: {error}") from error
            images.append(torch.from_numpy(pixels).permute(2, 0, 1))
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def _cifar_images(dataset_class: str, root: Path) -> tuple[dict[str, Tensor], dict[str, Labels], list[str]]:
    """Images (N, 3, 32, 32) and labels of "train" and "test", in the published order, and the class names."""
    from torchvision import datasets  # type: ignore[import-untyped]

    kind = getattr(datasets, dataset_class)
    try:
        with first_process_first():
            parts = {part: kind(str(root), train=part == "train", download=True) for part in ("train", "test")}
    except (OSError, RuntimeError) as error:
        fetch = f"fetch {kind.url} (md5 {kind.tgz_md5}) and put it into {root}"
        raise InputError(f"data_root: {dataset_class} is not there and cannot be downloaded; {fetch}") from error
    images = {part: torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous() for part, data in parts.items()}
    labels = {part: np.array(data.targets, dtype=np.int64) for part, data in parts.items()}
    return images, labels, list(parts["train"].classes)


def _label_file(name: str, folder: Path) -> Path:
    """A published label file, downloaded if it is not there."""
    from torchvision.datasets.utils import download_url  # type: ignore[import-untyped]

    path, md5 = folder / name, LABEL_FILES_MD5.get(name)
    try:
        with first_process_first():
            if not path.exists():
                download_url(LABEL_FILES + name, str(folder), name, md5)
    except (OSError, RuntimeError) as error:
        check = f" (md5 {md5})" if md5 else ""
        fetch = f"fetch {LABEL_FILES}{name}{check} and put it into {folder}"
        raise InputError(f"noise: {name} is not there and cannot be downloaded; {fetch}") from error
    return path


# ---- shared ----


def _task(
    num_classes: int,
    inputs: Tensor,
    given: Labels,
    truth: Labels | None,
    train: Labels,
    validation: Labels,
    synthetic: Split,
    test: Split,
) -> Task:
    """Cut training and validation rows out of `inputs`; without `truth` there is no clean validation."""
    rows, given_labels = torch.from_numpy(validation), torch.from_numpy(given)
    shared = inputs[rows]  # by both validation sets
    noisy = Split(shared, given_labels[rows])
    clean = Split(shared[:0], given_labels[:0]) if truth is None else Split(shared, torch.from_numpy(truth)[rows])
    kept = torch.from_numpy(train)
    return Task(num_classes, Split(inputs[kept], given_labels[kept]), synthetic, noisy, clean, test)
