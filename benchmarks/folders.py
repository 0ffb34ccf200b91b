"""Image folders, and whatever else `synth-refine run` reads, as tasks: photographs in, a `Benchmark` out.

Letters in shapes: N training images, V validation images, M synthetic images, C classes.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.base import Split, Task
from benchmarks.pixels import PixelStore, Resize, bad_images, check_disk
from benchmarks.task import Benchmark, Labels, annotate, hold_out, noisy_labels
from synth_refine import InputError, noise
from synth_refine._io.untrusted import read_npy
from synth_refine.images.hashes import content_hashes
from synth_refine.images.listing import Images, numbers, read_classes
from synth_refine.images.sources import open_images
from synth_refine.labels.files import read_label_file, transition_matrix
from third_party.mapped import MappedImages

SPLITS = ("train", "val", "test")
ENDINGS = ("", ".csv", "*.tar", "*.parquet")  # a folder of class folders or a saved data set, a table, shards


@dataclass(frozen=True)
class Source:
    """The images of one split, and the hash of each file."""

    images: Images
    hashes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Changes whenever an image, its name or its label does."""
        rows = zip(self.images.ids, self.images.labels.tolist(), self.hashes, strict=True)
        return hashlib.sha256("".join(f"{row}\n" for row in rows).encode()).hexdigest()


@dataclass(frozen=True)
class Folders:
    """Where the images of a task lie.

    Attributes:
        root: Has train, test and, optionally, val: each a folder with one folder of images per class, a saved Hugging
            Face data set, train.csv, or train*.tar or train*.parquet. The labels of val and test are taken as right.
        synthetic: The same for synthetic images, their folders named by the class or by its number in two digits.
        classes: YAML file of the classes in their order, with what prompts call them; by default the names in train.
    """

    root: Path
    synthetic: Path
    classes: Path | None = None

    @property
    def names(self) -> dict[str, str]:
        """What prompts call each class, in the order of the class numbers."""
        if self.classes is not None:
            return read_classes(self.classes)
        return {name: name for name in self.sources["train"].images.classes}

    @property
    def sources(self) -> dict[str, Source]:
        """The splits that are there and, as the last one, "synthetic".

        Raises:
            InputError: A split or a class is missing, or has another name in one of them.
        """
        return _sources(self)

    @property
    def digests(self) -> dict[str, str]:
        """What a record says of the images."""
        *real, synthetic = (source.digest for source in self.sources.values())
        return {"images": hashlib.sha256("".join(real).encode()).hexdigest(), "synthetic": synthetic}


@lru_cache(maxsize=4)
def _sources(folders: Folders) -> dict[str, Source]:
    places = {name: _place(folders.root, name) for name in SPLITS}
    for name in ("train", "test"):
        if places[name] is None:
            raise InputError(f"images: expected {name} (a folder, .csv, .tar or .parquet) in {folders.root}, got none")
    known = None if folders.classes is None else tuple(read_classes(folders.classes))
    found = {"train": open_images(places["train"], known)}
    known = found["train"].classes
    for name in ("val", "test"):
        if places[name] is not None:
            found[name] = open_images(places[name], known)
    if not folders.synthetic.exists():
        raise InputError(f"synthetic: expected a folder of images per class, got nothing: {folders.synthetic}")
    found["synthetic"] = _by_class(open_images(folders.synthetic), known, folders.synthetic)
    for name in ("train", "test", "synthetic"):
        absent = [known[label] for label in sorted(set(range(len(known))) - set(found[name].labels.tolist()))]
        if absent:
            argument = "synthetic" if name == "synthetic" else "images"
            shown = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
            raise InputError(f"{argument}: expected {name} images of every class, got none of {len(absent)}: {shown}")
    return {name: Source(images, tuple(content_hashes(images))) for name, images in found.items()}


def _place(root: Path, name: str) -> Path | None:
    """Where a split lies."""
    for ending in ENDINGS:
        pattern = root / f"{name}{ending}"
        if any(root.glob(pattern.name)) if "*" in ending else pattern.exists():
            return pattern
    return None


def _by_class(images: Images, classes: tuple[str, ...], place: Path) -> Images:
    """Synthetic images with the classes of the real ones; their folders may be named by two-digit numbers."""
    by_number = {f"{label:02d}": name for label, name in enumerate(classes)}
    names = [name if name in classes else by_number.get(name, name) for name in images.classes]
    labels = numbers(names, classes, place)[images.labels]
    return Images(images.ids, labels, classes, images.read, images.kind, images.notes)


@dataclass(frozen=True)
class FolderTask:
    """A task on folders, at one size of the images.

    Attributes:
        folders: Where the images lie.
        resize: See `pixels.read_resize`.
        store: Folder for the pixels.
        flips: Class map of asymmetric noise, by name.
        posterior: .npy file with the posterior of the training images that PMD noise is made of, (N, C).
    """

    folders: Folders
    resize: Resize
    store: Path
    flips: Mapping[str, str] | None = None
    posterior: Path | None = None

    @property
    def pixels(self) -> dict[str, PixelStore]:
        """The pixels of each split; nothing is decoded yet."""
        return {
            name: PixelStore(source.images, source.hashes, self.resize, self.store)
            for name, source in self.folders.sources.items()
        }

    def load(self, noise_name: str, given: Path | None = None) -> Benchmark:
        """Decode the images, where they are not, and build the task.

        With `given`, or with a named noise, the labels in train are the true ones, for measuring. `given` has the noisy
        label of every training image by its id, which is its path in train, or in the order of the ids. The noisy
        labels of val are then simulated as `data.npz` does it. With the noise "given" the labels in train are the given
        ones and the true ones are unknown; those of val are a clean validation set. Without val a fixed random tenth of
        train is held out.

        Raises:
            InputError: A folder, a class, a label or room on the disk is missing.
        """
        pixels = self.pixels
        check_disk(list(pixels.values()), self.store)
        images = pixels["train"].images
        truth: Labels | None = images.labels
        if given is not None:
            observed = read_given(given, images)
        elif noise_name == "given":
            observed, truth = images.labels, None
        else:
            observed = noisy_labels(noise_name, images.labels, len(images.classes), self._pmd, self._flips(images))
        opened = {name: store.open() for name, store in pixels.items()}
        for name, store in pixels.items():
            if bad := bad_images(store):
                shown = f"{', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''}"
                said = f"{name}: {len(bad)} unreadable images left out, {shown}; listed in {store.root / 'bad.csv'}"
                print(said, file=sys.stderr)
        good = {name: np.flatnonzero(good) for name, (_, good) in opened.items()}
        inputs = {name: MappedImages(file, torch.from_numpy(good[name])) for name, (file, _) in opened.items()}
        labels = {name: store.images.labels[good[name]] for name, store in pixels.items()}
        observed, truth = observed[good["train"]], None if truth is None else truth[good["train"]]

        def split(name: str) -> Split:
            return Split(inputs[name], torch.from_numpy(labels[name]))

        train = np.arange(len(observed))
        if "val" in inputs:
            clean = split("val")
            noisy = Split(clean.inputs[:0], clean.labels[:0])
            if truth is not None:
                matrix = transition_matrix(observed, truth, len(images.classes))
                noisy = Split(clean.inputs, torch.from_numpy(annotate(labels["val"], matrix, seed=0)))
        else:
            train, held_out = hold_out(len(observed), seed=0)
            noisy = Split(inputs["train"][torch.from_numpy(held_out)], torch.from_numpy(observed[held_out]))
            clean = Split(noisy.inputs[:0], noisy.labels[:0])
            if truth is not None:
                clean = Split(noisy.inputs, torch.from_numpy(truth[held_out]))
        kept = torch.from_numpy(train)
        return Benchmark(
            Task(
                num_classes=len(images.classes),
                train=Split(inputs["train"][kept], torch.from_numpy(observed[train])),
                synthetic=split("synthetic"),
                noisy_validation=noisy,
                clean_validation=clean,
                test=split("test"),
            ),
            None if truth is None else torch.from_numpy(truth[train]),
            self.folders.root.resolve().name,
            noise_name if given is None else given.stem,
            tuple(self.folders.names.values()),
        )

    def _flips(self, images: Images) -> dict[int, int] | None:
        if self.flips is None:
            return None
        ends = (numbers(list(map(str, names)), images.classes, "flips") for names in (self.flips, self.flips.values()))
        return dict(zip(*(one.tolist() for one in ends), strict=True))

    def _pmd(self, kind: int, rate: str) -> Labels:
        images = self.pixels["train"].images
        shape = len(images.ids), len(images.classes)
        if self.posterior is None:
            raise InputError(f"noise: expected a posterior {shape} for PMD noise by name, got none; see its config key")
        posterior: NDArray[Any] = np.array(read_npy("posterior", self.posterior, "f"))
        if posterior.shape != shape:
            raise InputError(f"posterior: expected shape {shape}, got {posterior.shape} in {self.posterior}")
        factor = noise.pmd_factor(posterior, images.labels, kind, float(rate))
        return noise.pmd(posterior, kind, factor)


def read_given(path: Path, images: Images) -> Labels:
    """The given label of every image, (N,): by its id where the file has ids, else in the order of the images.

    Raises:
        InputError: An image has no label, or a label no class.
    """
    found = read_label_file(path)
    if found.classes is not None:
        labels = numbers(found.classes, images.classes, path)[found.labels]
    else:
        labels = found.labels
    if found.ids is not None:
        row_of = {one: row for row, one in enumerate(found.ids)}
        if absent := [one for one in images.ids if one not in row_of]:
            shown = ", ".join(absent[:3])
            raise InputError(f"given: expected a label for every image in {path}, got none for {len(absent)}: {shown}")
        labels = labels[[row_of[one] for one in images.ids]]
    if len(labels) != len(images.ids):
        raise InputError(f"given: expected {len(images.ids)} labels, one per training image, got {len(labels)}")
    if int(labels.max()) >= len(images.classes):
        raise InputError(f"given: expected classes 0 to {len(images.classes) - 1}, got {labels.max()} in {path}")
    return labels
