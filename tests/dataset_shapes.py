"""Small datasets in the shape of public codebases, each with the trap that its label store holds.

Only the facts that matter to labels are kept: names of attributes and methods, what item access reads, what is derived
from the labels once, and in which order they stand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder

Labels = NDArray[np.int64]
CLASSES = 4
COUNT = 40
SIZE = 8


def given_labels(seed: int = 0, count: int = COUNT) -> Labels:
    """Labels in which every class occurs, (count,)."""
    return np.random.default_rng(seed).permutation(np.arange(count) % CLASSES)


def refined_labels(given: Labels, share: float = 0.3, seed: int = 1) -> Labels:
    """The same with some labels changed, and still every class, (N,)."""
    random = np.random.default_rng(seed)
    changed = np.flatnonzero(random.random(len(given)) < share)
    refined = given.copy()
    refined[changed] = (given[changed] + 1) % CLASSES
    assert len(np.unique(refined)) == CLASSES
    return refined


def images(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(2).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


TO_TENSOR = transforms.ToTensor()


class PlcCifar(Dataset[Any]):
    """PLC: a list that a method overwrites in place, with soft labels made once and returned with every item."""

    def __init__(self, given: Labels) -> None:
        self.data, self.targets = images(len(given)), given.tolist()
        self.softlabel = np.eye(CLASSES)[given] * (1 - 0.001) + 0.001 / CLASSES

    def update_corrupted_label(self, labels: Any) -> None:
        self.targets[:] = labels[:]

    def __getitem__(self, index: int) -> Any:
        return TO_TENSOR(self.data[index]), self.targets[index], self.softlabel[index], index

    def __len__(self) -> int:
        return len(self.data)


class PlcClothing(Dataset[Any]):
    """PLC's Clothing1M: item access reads `label_list`, which is the same list object as `targets`."""

    def __init__(self, given: Labels) -> None:
        self.data = images(len(given))
        self.label_list = given.tolist()
        self.targets = self.label_list

    def update_corrupted_label(self, labels: Any) -> None:
        self.label_list[:] = labels[:]
        self.targets = self.label_list

    def __getitem__(self, index: int) -> Any:
        return TO_TENSOR(self.data[index]), self.label_list[index], index

    def __len__(self) -> int:
        return len(self.label_list)


class ListAndTwin(PlcClothing):
    """The same without the method: two names of one list."""

    update_corrupted_label = None  # type: ignore[assignment]


class LraCifar(Dataset[Any]):
    """LRA-diffusion: a method without a length check, so that a longer list silently grows the dataset's."""

    def __init__(self, given: Labels) -> None:
        self.data, self.targets = images(len(given)), given.tolist()

    def update_label(self, labels: Any) -> None:
        self.targets[:] = labels[:]

    def __getitem__(self, index: int) -> Any:
        return TO_TENSOR(self.data[index]), self.targets[index], index

    def __len__(self) -> int:
        return len(self.targets)


class DivideMix(Dataset[Any]):
    """DivideMix: built anew from a JSON file for every loader, so that a change to the object is lost."""

    def __init__(self, file: Path, mode: str = "all") -> None:
        self.noise_label = json.loads(file.read_text())
        self.train_data, self.mode = images(len(self.noise_label)), mode

    def __getitem__(self, index: int) -> Any:
        image = TO_TENSOR(self.train_data[index])
        if self.mode == "labeled":
            return image, image, self.noise_label[index], 0.5
        return image, self.noise_label[index], index

    def __len__(self) -> int:
        return len(self.train_data)


class KeyValue(Dataset[Any]):
    """DivideMix's Clothing1M: a dict from path to label, and a list of paths that gives the order."""

    def __init__(self, given: Labels) -> None:
        paths = [f"images/{number}.jpg" for number in range(len(given))]
        self.train_labels = dict(zip(paths, given.tolist(), strict=True), **{"val/other.jpg": 3})
        self.train_imgs = paths[::-1]

    def __getitem__(self, index: int) -> Any:
        path = self.train_imgs[index]
        return torch.zeros(3, SIZE, SIZE), self.train_labels[path], path

    def __len__(self) -> int:
        return len(self.train_imgs)


class Elr(Dataset[Any]):
    """ELR: labels in the order of a random split, `indexs` the original positions, and the truth in every item."""

    def __init__(self, given: Labels, seed: int = 3) -> None:
        self.indexs = np.random.default_rng(seed).permutation(len(given))[: len(given) * 9 // 10]
        self.train_data = images(len(given))[self.indexs]
        self.train_labels = np.array(given)[self.indexs]
        self.train_labels_gt = (self.train_labels + 2) % CLASSES

    def __getitem__(self, index: int) -> Any:
        image = TO_TENSOR(self.train_data[index])
        return image, int(self.train_labels[index]), index, int(self.train_labels_gt[index])

    def __len__(self) -> int:
        return len(self.train_data)


class Sop(Elr):
    """SOP: the same with all images in a random order, and two views in every item."""

    def __init__(self, given: Labels, seed: int = 3) -> None:
        self.indexs: Any = np.random.default_rng(seed).permutation(len(given)).tolist()
        self.targets = ((given + 2) % CLASSES).tolist()  # torchvision's, the true ones
        self.train_data, self.train_labels = images(len(given))[self.indexs], np.array(given)[self.indexs]
        self.train_labels_gt = (self.train_labels + 2) % CLASSES

    def __getitem__(self, index: int) -> Any:
        image, label, _, truth = super().__getitem__(index)
        return image, image, label, index, truth


class TRevision(Dataset[Any]):
    """T-Revision: drawn in a random order that nobody keeps, the labels of both splits in either object."""

    def __init__(self, given: Labels, train: bool = True) -> None:
        np.random.seed(1)  # noqa: NPY002
        self.chosen = np.random.choice(len(given), len(given) * 9 // 10, replace=False)  # noqa: NPY002
        others, self.train = np.delete(np.arange(len(given)), self.chosen), train
        self.data = images(len(given))[self.chosen if train else others]
        self.train_labels, self.val_labels = given[self.chosen], given[others]

    def __getitem__(self, index: int) -> Any:
        return TO_TENSOR(self.data[index]), (self.train_labels if self.train else self.val_labels)[index]

    def __len__(self) -> int:
        return len(self.data)


class Ssr(Dataset[Any]):
    """SSR: a file of noise that is read where it exists, and a method that wants a tensor."""

    def __init__(self, given: Labels | None = None, noise_file: str = "") -> None:
        labels = json.loads(Path(noise_file).read_text())["noise_labels"] if noise_file else given
        assert labels is not None
        self.cifar_label, self.cifar_data = list(map(int, labels)), images(min(len(labels), COUNT))
        self.clean_label = [(label + 2) % CLASSES for label in self.cifar_label]

    def update_labels(self, new: torch.Tensor) -> None:
        self.cifar_label = new.cpu()  # type: ignore[assignment]

    def __getitem__(self, index: int) -> Any:
        return TO_TENSOR(self.cifar_data[index % COUNT]), self.cifar_label[index], self.clean_label[index], index

    def __len__(self) -> int:
        return len(self.cifar_label)


class ProMix(Dataset[Any]):
    """ProMix: CIFAR-N's attributes, of which item access reads another one."""

    def __init__(self, given: Labels) -> None:
        self.train_data, self.noise_label = images(len(given)), given.copy()
        self.train_labels, self.train_noisy_labels = ((given + 2) % CLASSES).tolist(), given.tolist()

    def __getitem__(self, index: int) -> Any:
        image = TO_TENSOR(self.train_data[index])
        return image, image, self.noise_label[index], index

    def __len__(self) -> int:
        return len(self.train_data)


class Ldmi(Dataset[Any]):
    """L_DMI: every item begins with its index."""

    def __init__(self, given: Labels) -> None:
        self.data, self.targets = images(len(given)), given.tolist()

    def __getitem__(self, index: int) -> Any:
        return index, TO_TENSOR(self.data[index]), self.targets[index]

    def __len__(self) -> int:
        return len(self.data)


class Wrapper(Dataset[Any]):
    """lightly: a dataset around another one, whose items have one part more."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        return *self.dataset[index][:2], f"{index}.png"

    def __len__(self) -> int:
        return len(self.dataset)


class Hidden(Dataset[Any]):
    """Labels in an attribute of a name that nobody knows."""

    def __init__(self, given: Labels, name: str = "_labels") -> None:
        self.data, self.name = images(len(given)), name
        setattr(self, name, given.tolist())

    def __getitem__(self, index: int) -> Any:
        return TO_TENSOR(self.data[index]), getattr(self, self.name)[index]

    def __len__(self) -> int:
        return len(self.data)


class CoTeaching(Dataset[Any]):
    """Co-teaching and CIFAR-N: true labels beside the noisy ones, and flags of what is noisy made once."""

    def __init__(self, given: Labels) -> None:
        self.train_data = images(len(given))
        self.train_labels = ((given + 2) % CLASSES).tolist()
        self.train_noisy_labels = given.tolist()
        self.noise_or_not = np.array(self.train_labels) == given

    def __getitem__(self, index: int) -> Any:
        return TO_TENSOR(self.train_data[index]), self.train_noisy_labels[index], index

    def __len__(self) -> int:
        return len(self.train_data)


class Svhn(Dataset[Any]):
    """torchvision's SVHN: a NumPy array called `labels`, here of bytes."""

    def __init__(self, given: Labels) -> None:
        self.data, self.labels = images(len(given)), given.astype(np.uint8)

    def __getitem__(self, index: int) -> Any:
        return TO_TENSOR(self.data[index]), int(self.labels[index])

    def __len__(self) -> int:
        return len(self.data)


class TensorTargets(Svhn):
    """A tensor called `targets`, as torchvision's MNIST has it."""

    def __init__(self, given: Labels) -> None:
        super().__init__(given)
        self.targets = torch.from_numpy(np.array(given))

    def __getitem__(self, index: int) -> Any:
        return TO_TENSOR(self.data[index]), int(self.targets[index])


class Own(Dataset[Any]):
    """A dataset that offers get and set itself and drops its cache when told."""

    def __init__(self, given: Labels) -> None:
        self.hidden, self.cache = given.copy(), "made of the labels"

    def get_labels(self) -> Labels:
        return self.hidden

    def set_labels(self, labels: Labels) -> None:
        self.hidden = labels

    def on_labels_changed(self) -> None:
        self.cache = ""

    def __getitem__(self, index: int) -> Any:
        return {"image": torch.zeros(3, SIZE, SIZE), "label": torch.tensor(self.hidden[index])}

    def __len__(self) -> int:
        return len(self.hidden)


class Frozen(Svhn):
    """Item access reads a private copy, so that the public attribute changes nothing."""

    def __init__(self, given: Labels) -> None:
        super().__init__(given)
        self._labels = self.labels.copy()

    def __getitem__(self, index: int) -> Any:
        return TO_TENSOR(self.data[index]), int(self._labels[index])


def cifar10(given: Labels) -> CIFAR10:
    """torchvision's CIFAR10 around local arrays, nothing downloaded."""
    dataset = CIFAR10.__new__(CIFAR10)
    dataset.data, dataset.targets = images(len(given)), given.tolist()
    dataset.transform, dataset.target_transform, dataset.train = TO_TENSOR, None, True
    dataset.classes = [str(number) for number in range(CLASSES)]
    return dataset


def image_folder(root: Path, given: Labels) -> ImageFolder:
    """torchvision's ImageFolder over files: `samples` is read, `imgs` the same list, `targets` a second one."""
    for number, (label, pixels) in enumerate(zip(given, images(len(given)), strict=True)):
        folder = root / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return ImageFolder(str(root), transform=TO_TENSOR)


def hugging_face(given: Labels) -> Any:
    """A Hugging Face dataset with a ClassLabel column between two others."""
    import datasets

    features = datasets.Features(
        {
            "name": datasets.Value("string"),
            "label": datasets.ClassLabel(names=[f"c{number}" for number in range(CLASSES)]),
            "pixels": datasets.Array3D((SIZE, SIZE, 3), "uint8"),
        }
    )
    columns = {"name": [str(n) for n in range(len(given))], "label": given.tolist(), "pixels": images(len(given))}
    return datasets.Dataset.from_dict(columns, features=features)


@dataclass(frozen=True)
class Shape:
    """How a dataset is built from given labels, and the labels of its items in the order of the labels."""

    build: Callable[[Labels, Path], Any]
    items: Callable[[Any], Any] = lambda dataset: np.arange(len(dataset))  # label row of every item
    permuted: bool = False  # whether labels need ids or rows


def _dividemix(given: Labels, folder: Path) -> DivideMix:
    (folder / "0.3_sym.json").write_text(json.dumps(given.tolist()))
    return DivideMix(folder / "0.3_sym.json")


def _folder_order(given: Labels, folder: Path) -> ImageFolder:
    """Labels stand in the order of the folder, sorted by class, not in that of the files' numbers."""
    return image_folder(folder / "images", given)


def _subset(given: Labels, folder: Path) -> Subset[Any]:
    base = cifar10(np.concatenate([given, given[:10]]))
    return Subset(base, list(np.random.default_rng(5).permutation(len(given))))


SHAPES: dict[str, Shape] = {
    "plc": Shape(lambda given, _: PlcCifar(given)),
    "plc-clothing": Shape(lambda given, _: PlcClothing(given)),
    "list-and-twin": Shape(lambda given, _: ListAndTwin(given)),
    "lra": Shape(lambda given, _: LraCifar(given)),
    "dividemix": Shape(_dividemix),
    "key-value": Shape(lambda given, _: KeyValue(given)),
    "elr": Shape(lambda given, _: Elr(given), items=lambda dataset: dataset.indexs, permuted=True),
    "co-teaching": Shape(lambda given, _: CoTeaching(given)),
    "cifar10": Shape(lambda given, _: cifar10(given)),
    "svhn": Shape(lambda given, _: Svhn(given)),
    "mnist": Shape(lambda given, _: TensorTargets(given)),
    "image-folder": Shape(_folder_order),
    "own": Shape(lambda given, _: Own(given)),
    "ssr": Shape(lambda given, _: Ssr(given)),
    "promix": Shape(lambda given, _: ProMix(given)),
    "wrapper": Shape(lambda given, _: Wrapper(Wrapper(cifar10(given)))),
    "subset-of-subset": Shape(lambda given, _: Subset(Subset(cifar10(given), range(40)), range(40))),
    "hidden": Shape(lambda given, _: Hidden(given)),
    "hugging-face": Shape(lambda given, _: hugging_face(given)),
    "subset": Shape(_subset, permuted=True),
    "concat": Shape(lambda given, _: ConcatDataset([cifar10(given[:10]), LraCifar(given[10:])])),
    "subset-of-concat": Shape(
        lambda given, _: Subset(ConcatDataset([Svhn(given[:20]), cifar10(given[20:])]), list(range(len(given)))[::-1]),
        permuted=True,
    ),
    "loader": Shape(lambda given, _: DataLoader(LraCifar(given), batch_size=4)),
}
