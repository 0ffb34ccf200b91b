"""Images in, features (N, D) float32 out, kept in a store that a killed run resumes.

Letters in shapes: N images, D features.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from synth_refine._io.check import InputError
from synth_refine._io.csv import csv_bytes
from synth_refine._io.progress import progress as count_on_stderr
from synth_refine._io.ray import check_engine, on_cluster
from synth_refine._io.store import Store, open_store
from synth_refine._io.untrusted import read_npy
from synth_refine.images.batches import Batches, decoded_shard, embed_good, embedder, first_size, why_bad
from synth_refine.images.encoders import Encoder, check_images
from synth_refine.images.hashes import SHARD_ROWS, content_hashes, images_hash
from synth_refine.images.listing import Images
from synth_refine.images.readers import part_of

FEATURES = "features.npy"
KEEP_SECONDS = 10.0  # after which finished batches are kept: a kill costs these and one batch
CPU_ROWS, GPU_ROWS = 16, 64  # images per batch: a large network takes half a minute for 16 on two cores


@dataclass(frozen=True)
class Embedded:
    """Images with their features."""

    images: Images
    features: NDArray[np.float32]  # (N, D), NaN where an image could not be decoded
    hashes: list[str]  # the SHA-256 of every file
    bad: dict[int, str] = field(default_factory=dict)  # why it could not, by row

    @property
    def usable(self) -> NDArray[np.int64]:
        """The rows that have features."""
        return np.setdiff1d(np.arange(len(self.features)), list(self.bad))


def bad_table(**sets: Embedded) -> bytes:
    """The images without features as .csv: set, id and reason."""
    rows = [(name, one.images.ids[row], one.bad[row]) for name, one in sets.items() for row in sorted(one.bad)]
    return csv_bytes({name: [row[place] for row in rows] for place, name in enumerate(("set", "id", "reason"))})


def embed_cached(encoder: Encoder, images: Tensor, folder: Path | str, *, batch_rows: int = 256) -> Tensor:
    """Features from disk, computed and kept where they are missing.

    They lie in a folder named by the encoder's id and the images' hash, with their checksum. So another encoder or
    other images never meet features that are not theirs, and a killed run loses half a minute at most.

    Args:
        encoder: The encoder.
        images: (N, 3, H, W) uint8.
        folder: Where the features of all encoders are kept; made if it is missing.
        batch_rows: Images per call of the encoder.

    Returns:
        (N, D) float32, on the device of `images`.

    Raises:
        InputError: As the encoder's `embed`.
    """
    check_images(images)
    if batch_rows < 1:
        raise InputError(f"batch_rows: expected 1 or more, got {batch_rows}")
    settings = {"encoder": encoder.id, "pixels": images_hash(images), "batch_rows": batch_rows}
    parts = torch.split(images, batch_rows)

    def compute(missing: Sequence[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for number in tqdm(missing, "embedding", disable=None, leave=False):
            yield number, encoder.embed(parts[number]).cpu().numpy()

    with open_store(_place(folder, settings), settings, name="folder", wait=True) as store:
        features = _kept(store, [len(part) for part in parts], compute)
        store.finish()
    return torch.from_numpy(features).to(images.device)


def embed_images(
    encoder: Encoder,
    images: Images,
    folder: str | os.PathLike[str],
    *,
    hashes: Sequence[str] | None = None,
    **options: Any,
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Features of images on disk, kept as `embed_cached` keeps them.

    Args:
        encoder: The encoder. Where its `preprocess` has a size, images are brought to it; else all must be of one size.
        images: From `open_images`.
        folder: Where the features of all encoders and images are kept; made if it is missing.
        hashes: From `content_hashes`, where they are known already.
        options: Of `Embedding`.

    Returns:
        Features, (N, D) float32, NaN for images that could not be decoded, and why, by row.

    Raises:
        InputError: No image at all could be decoded, or as the encoder's `embed`; or Ray is missing, or a node has
            another encoder or cannot read an image that has a hash.
    """
    job = Embedding(encoder, images, hashes, **options)
    with open_store(_place(folder, job.settings), job.settings, name="folder", wait=True) as store:
        features = job.fill(store)
        store.finish()
    return features, job.bad(features)


def embed_folder(encoder: Encoder, images: Images, out: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """Write the features of images and what belongs to them into a folder, as `synth-refine refine` takes them.

    The folder holds features.npy, (N, D), NaN for images that could not be decoded; given.csv, ids, labels and class
    names of the same rows; classes.yaml; bad.csv, why an image could not be decoded; and what a store keeps. Called
    again, it resumes; other images, labels, classes or another encoder are refused.

    Args:
        encoder: See `embed_images`.
        images: From `open_images`.
        out: The folder; made if it is missing.
        options: Of `Embedding`.

    Returns:
        Path of the features, number of images, and of bad ones.

    Raises:
        InputError: As `embed_images`, or the folder holds something else or other features.
    """
    job = Embedding(encoder, images, None, **options)
    names = [images.classes[label] for label in images.labels]
    given = csv_bytes({"id": images.ids, "label": images.labels.tolist(), "class": names})
    settings = {**job.settings, "given": hashlib.sha256(given).hexdigest(), "classes": list(images.classes)}
    with open_store(out, settings) as store:
        features = job.fill(store)
        bad = job.bad(features)
        files = {
            "given.csv": given,
            "classes.yaml": yaml.safe_dump(list(images.classes), allow_unicode=True).encode(),
            "bad.csv": csv_bytes({"id": [images.ids[row] for row in bad], "reason": list(bad.values())}),
        }
        for name, data in files.items():
            if store.done(name) is None:
                store.put(name, data)
        store.finish()
    return {"features": str(Path(out) / FEATURES), "count": len(features), "bad": len(bad)}


class Embedding:
    """The features of one source by one encoder: what they depend on, and how they come.

    Args:
        encoder: See `embed_images`.
        images: Likewise.
        hashes: Likewise.
        workers: Processes that decode; 0 decodes between the batches.
        batch_rows: Images per batch; by default 64 on a GPU, else 16.
        shard_rows: Images per task of a cluster.
        progress: What the bar says.
        engine: `local`, this process and its workers; or `ray`, a cluster whose nodes see the same images and weights
            under the same paths. Batches are decoded and embedded in one task, or embedded by actors with a GPU each;
            on processors of one kind both engines write the same bytes, and either resumes what the other began.
        address: Of the Ray cluster; by default the one that RAY_ADDRESS names, one that runs on this machine, or a new
            local one.
        make: For ray: called as make(device=...) in every process that embeds, gives the encoder there, such as
            partial(encoder_by_name, "timm:resnet50.a1_in1k").
        device: For ray: what they compute on, a GPU each for cuda; cpu where no GPU shall be taken.
    """

    def __init__(
        self,
        encoder: Encoder,
        images: Images,
        hashes: Sequence[str] | None = None,
        *,
        workers: int = 0,
        batch_rows: int | None = None,
        shard_rows: int = SHARD_ROWS,
        progress: str = "embedding",
        engine: str = "local",
        address: str | None = None,
        make: Callable[..., Encoder] | None = None,
        device: str = "cuda",
    ) -> None:
        check_engine(engine, address)
        if engine == "ray" and make is None:
            raise InputError("make: expected what builds the encoder on a node of the cluster, got None")
        self.encoder, self.images, self.make, self.device = encoder, images, make, device
        self.workers, self.engine, self.address, self.progress = workers, engine, address, progress
        self.id, self.preprocess = encoder.id, getattr(encoder, "preprocess", None)
        if hashes is None:
            hashes = content_hashes(images, shard_rows=shard_rows, engine=engine, address=address)
        self.hashes = hashes
        own = None if self.preprocess is None else self.preprocess.size
        self.size: tuple[int, int] = own if own is not None else first_size(images)
        on_gpu = (device if engine == "ray" else str(getattr(encoder, "device", "cpu"))).startswith("cuda")
        self.batch_rows = rows = batch_rows or (GPU_ROWS if on_gpu else CPU_ROWS)
        count = len(images.ids)
        self.batches = [range(start, min(start + rows, count)) for start in range(0, count, rows)]
        self.task_batches = max(shard_rows // rows, 1)

    @property
    def settings(self) -> dict[str, Any]:
        """All that the features depend on."""
        return {
            "encoder": self.id,
            "images": hashlib.sha256("\n".join(self.hashes).encode()).hexdigest(),
            "size": list(self.size),
            "batch_rows": self.batch_rows,
        }

    def fill(self, store: Store) -> NDArray[np.float32]:
        """The features, from the store or computed and kept there.

        Raises:
            InputError: As `embed_images`.
        """
        compute = self._here if self.engine == "local" else self._on_ray
        with count_on_stderr(len(self.images.ids), self.progress) as bar:

            def counted(missing: Sequence[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
                bar.initial = bar.n = len(self.images.ids) - sum(len(self.batches[number]) for number in missing)
                for number, features in compute(missing):
                    bar.update(len(features))
                    yield number, features

            features = _kept(store, [len(rows) for rows in self.batches], counted, _copies(self.hashes))
        if np.isnan(features).all():
            why = why_bad(self.images, 0, self.preprocess, self.size)
            raise InputError(f"images: expected at least one that can be decoded, got {why}")
        return features

    def bad(self, features: NDArray[np.float32]) -> dict[int, str]:
        """Why images could not be decoded, by row."""
        rows = np.flatnonzero(np.isnan(features).all(axis=1)).tolist()
        return {row: why_bad(self.images, row, self.preprocess, self.size) for row in rows}

    def _here(self, missing: Sequence[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        _keep_freed_memory()
        dataset = Batches(self.images.read, [self.batches[number] for number in missing], self.preprocess, self.size)
        loader = DataLoader(dataset, batch_size=None, num_workers=min(self.workers, len(missing)))
        for number, (pixels, good) in zip(missing, loader, strict=True):
            yield number, embed_good(self.encoder, pixels, good).numpy()

    def _on_ray(self, missing: Sequence[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        assert self.make is not None
        names = [one if known else None for one, known in zip(self.images.ids, self.hashes, strict=True)]
        work = []
        for _, numbers in groupby(missing, lambda number: number // self.task_batches):
            group = list(numbers)
            rows = range(self.batches[group[0]].start, self.batches[group[-1]].stop)
            inside = {number: _shifted(self.batches[number], -rows.start) for number in group}
            work.append((inside, part_of(self.images.read, rows), names[rows.start : rows.stop]))
        task = partial(decoded_shard, preprocess=self.preprocess, size=self.size)
        actor = partial(embedder, self.make, self.id)
        yield from on_cluster(work, task, self.address, actor=actor, device=self.device)


def _keep_freed_memory() -> None:
    """Let glibc keep the buffers of a batch for the next one: to give them back costs a page fault per 4 KiB of them.

    Two thirds of the time of a small network went into those. Other C libraries have no such call.
    """
    trim_threshold, mmap_threshold, most = -1, -3, 1 << 30
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, most)
        libc.mallopt(trim_threshold, most)


def _shifted(rows: range, by: int) -> range:
    return range(rows.start + by, rows.stop + by)


def _place(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> Path:
    """A store of its own for each encoder and images."""
    return Path(folder) / f"features-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]}"


def _kept(
    store: Store,
    counts: Sequence[int],
    compute: Callable[[Sequence[int]], Iterator[tuple[int, NDArray[np.float32]]]],
    copies: Mapping[int, int] | None = None,
) -> NDArray[np.float32]:
    """The features of all batches, (N, D), which `store` keeps in parts until they are whole.

    Args:
        store: It has features.npy at the end.
        counts: Rows of each batch.
        compute: Gives the features of the batches of these numbers, with the number of each, in any order.
        copies: Rows of images that are the same files as other ones, and the rows of these.

    Raises:
        RuntimeError: A batch did not come.
    """
    path, parts = store.root / FEATURES, store.root / "parts"
    if store.done(FEATURES) is None:
        found = _parts(store, counts)
        fresh: dict[int, NDArray[np.float32]] = {}

        def keep() -> None:
            if fresh:
                rows = np.concatenate(list(fresh.values()))
                name = f"parts/{min(fresh):08d}.npy"
                store.put(name, partial(np.save, arr=rows, allow_pickle=False), batches=list(fresh))
                found.update(_split(read_npy("features", store.root / name), list(fresh), counts))
                fresh.clear()

        begun = time.monotonic()
        try:
            for number, features in compute([number for number in range(len(counts)) if number not in found]):
                fresh[number] = features
                if time.monotonic() - begun > KEEP_SECONDS or sum(map(len, fresh.values())) >= SHARD_ROWS:
                    keep()
                    begun = time.monotonic()
        finally:
            keep()
        if missing := [number for number in range(len(counts)) if number not in found]:
            raise RuntimeError(f"compute: expected {len(counts)} batches, {missing[0]} did not come")
        whole = [found[number] for number in range(len(counts))]
        if copies:  # in another batch the last bit of a feature may be another one
            starts = np.cumsum([0, *counts])
            whole = [np.array(features) for features in whole]
            for row, first in copies.items():
                here, there = (int(np.searchsorted(starts, one, side="right")) - 1 for one in (row, first))
                whole[here][row - starts[here]] = whole[there][first - starts[there]]

        def write(file: BinaryIO) -> None:
            header = {"descr": "<f4", "fortran_order": False, "shape": (sum(counts), whole[0].shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
            for features in whole:
                file.write(np.ascontiguousarray(features, "<f4").tobytes())

        store.put(FEATURES, write)
    store.drop([f"parts/{one.name}" for one in sorted(parts.glob("*.npy"))])
    if parts.is_dir() and not any(parts.iterdir()):
        parts.rmdir()
    return np.array(read_npy("features", path))


def _copies(hashes: Sequence[str]) -> dict[int, int]:
    """Rows of images that are the same files as earlier ones, with the rows of these."""
    first: dict[str, int] = {}
    found = {row: first.setdefault(one, row) for row, one in enumerate(hashes) if one}
    return {row: other for row, other in found.items() if row != other}


def _parts(store: Store, counts: Sequence[int]) -> dict[int, NDArray[np.float32]]:
    """The features of the batches that are on the disk, as they were written."""
    found: dict[int, NDArray[np.float32]] = {}
    for name, entry in store.entries.items():
        if name.startswith("parts/") and store.done(name):
            found |= _split(read_npy("features", store.root / name), entry["batches"], counts)
    return found


def _split(rows: NDArray[np.float32], numbers: Sequence[int], counts: Sequence[int]) -> dict[int, NDArray[np.float32]]:
    ends = np.cumsum([counts[number] for number in numbers])
    return dict(zip(numbers, np.split(rows, ends[:-1]), strict=True))
