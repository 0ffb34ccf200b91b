"""Tasks by name: what a method may look at, and beside it the true labels that only measuring may see.

Letters in shapes: N training images, V validation images, M synthetic images, D features, C classes.
"""

from __future__ import annotations

import zipfile
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from adapters.base import Split
from benchmarks.cifar import CIFAR, cifar
from benchmarks.task import HOLD_OUT, Benchmark, Labels, annotate, build_task, hold_out, noisy_labels
from synth_refine import InputError, noise
from synth_refine._io.untrusted import open_plain
from synth_refine.labels.files import as_labels, read_labels, transition_matrix
from synth_refine.synthetic.glyphs import render_glyphs

SYNTHETIC_PER_CLASS = 100  # the paper's number
VALIDATION_ROWS, TEST_ROWS = 237, 360  # of the 1,797 digits; the other 1,200 are for training

DIGITS_SEED = 834  # its draws come within two points of the named rate in the training and in the validation set


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
        noise_name: "clean", or one or more of these joined by "+": pmd-KIND-RATE, uniform-LEVEL, symmetric-LEVEL,
            pair-LEVEL, asymmetric-LEVEL, for example "pmd-1-0.35+uniform-0.3"; "given" for an .npz file whose labels
            are noisy already.
        data_root: Folder for downloads, for CIFAR.
        synthetic: Folder with one folder of synthetic images per class, for CIFAR.
        given: Label file; it takes the place of the noise. Not for digits.

    Raises:
        InputError: One line that says what was expected, or what to fetch and where to put it.
    """
    if dataset.endswith(".npz"):
        return npz(Path(dataset), given, noise_name)
    if dataset == "digits":
        if given is not None:
            raise InputError(f"given: expected none for digits, whose labels are made by name, got {given}")
        return digits(noise_name)
    if dataset in CIFAR:
        return cifar(dataset, noise_name, data_root or Path("data"), synthetic, given)
    raise InputError(f"dataset: expected digits, {', '.join(CIFAR)} or a path that ends in .npz, got {dataset!r}")


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
        labels: Labels = truth.copy()
        labels[rows] = _pmd(_digit_posterior(), truth[rows], kind, rate, DIGITS_SEED)
        return labels

    given = noisy_labels(noise_name, truth, 10, pmd_labels)
    measured = torch.from_numpy(test)
    test_split = Split(images[measured], torch.from_numpy(truth)[measured])
    task = build_task(10, images, given, truth, train, validation, Split(*_digit_glyphs()), test_split)
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
    return _posterior(pixels, truth[rows], 10, hidden=64, epochs=25)


def _posterior(inputs: Tensor, truth: Labels, num_classes: int, hidden: int, epochs: int) -> NDArray[np.float32]:
    """How sure a small network trained on the true labels is of each row, (N, C)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(inputs.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
    return noise.train_posterior(model, inputs, torch.from_numpy(truth), noise.PosteriorConfig(epochs, lr=0.01))


def _pmd(posterior: NDArray[np.float32], truth: Labels, kind: int, rate: str, seed: int) -> Labels:
    return noise.pmd(posterior, kind, noise.pmd_factor(posterior, truth, kind, float(rate)), seed=seed)


# ---- arrays of a user ----


def npz(path: Path, given: Path | None = None, noise_name: str = "given", *, seed: int = 0) -> Benchmark:
    """Anybody's arrays: train, train_labels, test, test_labels, synthetic, synthetic_labels.

    (N, H, W, 3) uint8 is pixels; (N, D) is features, floating-point or uint8 codes, and becomes float32.

    With `given`, train_labels are the true labels, for measuring, and `given` has the noisy labels of the first rows of
    train. Further rows are the validation set. Their true labels are known and nobody has annotated them, so their
    noisy labels are simulated: sampled, with a fixed seed, from the transition matrix between given and true labels.
    With a named noise, train_labels are the true labels as well, and the last tenth of train is the validation set.
    Without both, train_labels are the given labels, the true ones are unknown, and there is no clean validation.
    Where no rows are left for validation, a fixed random tenth of the training rows is held out.

    Args:
        path: The .npz file. It is never unpickled.
        given: Label file, see `synth_refine.labels.files.read_labels`.
        noise_name: See `load`. PMD noise needs features; asymmetric noise a name such as cifar10-clip.npz.
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
    named = given is None and noise_name != "given"
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
    if named:
        info = CIFAR.get(path.stem.split("-")[0])
        flips = None if info is None else info.flips
        observed = noisy_labels(noise_name, truth, num_classes, partial(_feature_pmd, inputs["train"], truth), flips)
        train, validation = np.split(rows, [len(rows) - round(HOLD_OUT * len(rows))])
    elif len(observed) < len(truth):
        train, validation = rows[: len(observed)], rows[len(observed) :]
        matrix = transition_matrix(observed, truth[train], num_classes)
        observed = np.concatenate([observed, annotate(truth[validation], matrix, seed)])
    else:
        train, validation = hold_out(len(rows), seed)
    splits = {name: Split(inputs[name], torch.from_numpy(labels[name])) for name in ("synthetic", "test")}
    known = truth if named or given is not None else None
    task = build_task(num_classes, inputs["train"], observed, known, train, validation, **splits)
    return Benchmark(
        task,
        None if known is None else torch.from_numpy(known[train]),
        path.stem,
        noise_name if given is None else given.stem,
        tuple(map(str, range(num_classes))),
    )


def _feature_pmd(inputs: Tensor, truth: Labels, kind: int, rate: str) -> Labels:
    """PMD labels for all rows, by a network on their features, which is trained on the true labels."""
    if inputs.ndim != 2:
        raise InputError("noise: expected features for PMD noise by name, got pixels; give a label file instead")
    features = (inputs - inputs.mean(dim=0)) / inputs.std(dim=0).clamp_min(1e-6)
    # Eight epochs: after more the network knows all labels by heart, and no image is hard any more.
    posterior = _posterior(features, truth, int(truth.max()) + 1, hidden=256, epochs=8)
    return _pmd(posterior, truth, kind, rate, seed=123)


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
