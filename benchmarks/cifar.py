"""CIFAR-10 and CIFAR-100 in the order and split of the published label files.

Letters in shapes: N images, M synthetic images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from adapters.base import Split
from benchmarks.task import Benchmark, Labels, annotate, build_task, noisy_labels
from synth_refine import InputError, noise
from synth_refine.labels.files import as_labels, read_labels, transition_matrix
from third_party.parallel import first_process_first

SYNTHETIC_PER_CLASS = 100  # the paper's number
CIFAR_TRAIN_ROWS = 45_000  # the published label files are about the first 45,000; the last 5,000 are validation
LABEL_FILES = "https://raw.githubusercontent.com/pxiangwu/PLC/HEAD/cifar/noisy_labels/"
LABEL_FILES_MD5 = {
    "cifar10-1-0.35.npy": "61dce5ddce57b1bb8a662858cc65dce1",
    "cifar10-1-0.70.npy": "bdbdcb0dbadb506ade942071d43ed15e",
    "cifar100-1-0.35.npy": "4c72386acaf9c027bd7b8884605b69ae",
    "cifar100-1-0.70.npy": "c7b9f5687766186aae42458de4c13bfb",
}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


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
    data_root/noise_labels, and noise on top of them is sampled as published. The noisy labels of the validation images
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
    simulated = annotate(held_out, transition_matrix(observed, truth, num_classes), seed=0)
    size = images["train"].shape[-1]
    fake, fake_labels = read_image_folders(synthetic or data_root / "synthetic" / name, class_names, size)
    rows = np.arange(len(labels["train"]))
    task = build_task(
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
        size: The largest square in the middle of an image is brought to this height and width, bilinearly with
            antialiasing as in the paper, whose network also sees the ends of the longer side.

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
                    pixels = np.array(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR))
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
