"""Image files in, one memory-mapped array of their pixels out, which is decoded once and kept.

    settings.json   the images, by the hashes of their files, and the size
    images.npy      (N, H, W, 3) uint8; an image that cannot be decoded is black
    bad.csv         those images, and why
    manifest.jsonl  the SHA-256 of every block of rows

Letters in shapes: N images, H x W pixels.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from synth_refine import InputError
from synth_refine._io.csv import csv_bytes, read_csv
from synth_refine._io.store import Store, open_store
from synth_refine.images.batches import Batches, why_bad
from synth_refine.images.encoders import MOST_SIDE, Preprocess
from synth_refine.images.listing import Images
from third_party.mapped import KEPT_BYTES, MappedFile

ARRAY = "images.npy"
BLOCK_BYTES = 1 << 24  # of a block, which one worker decodes
MOST_ROWS = 512  # of a block: small images are shared between workers as well
KEEP_SECONDS = 5.0  # after which finished blocks are kept: a kill costs these


@dataclass(frozen=True)
class Resize(Preprocess):
    """How pictures of all sizes become one: resized to `before`, as `crop` says, and cut at the centre to `size`."""

    before: tuple[int, int] = (0, 0)

    def resized(self, rows: int, columns: int) -> tuple[int, int]:
        """Height and width before the cut."""
        return Preprocess(self.before, self.crop).resized(rows, columns)


def read_resize(settings: Mapping[str, Any] | None) -> Resize:
    """The `pixels` of a config.

    Args:
        settings: `resize`: pixels of the shorter side, or [height, width] that pictures are squeezed to; `crop`: side
            of the square that is cut at the centre, by default all of it; `interpolation`: bilinear, as torchvision's
            default, or bicubic.

    Raises:
        InputError: Something else.

    Example:
        >>> read_resize({"resize": 256, "crop": 224}).size
        (224, 224)
    """
    known = {"resize", "crop", "interpolation"}
    if not isinstance(settings, Mapping) or "resize" not in settings or not settings.keys() <= known:
        raise InputError(f"pixels: expected a block with resize and, if wanted, crop and interpolation, got {settings}")
    resize, interpolation = settings["resize"], settings.get("interpolation", "bilinear")
    before = (resize, resize) if isinstance(resize, int) else tuple(resize) if isinstance(resize, list) else ()
    if len(before) != 2 or not all(type(side) is int and 1 <= side <= MOST_SIDE for side in before):
        raise InputError(f"pixels.resize: expected a side from 1 to {MOST_SIDE} or two of them, got {resize!r}")
    crop = settings.get("crop", 0)
    if type(crop) is not int or not 0 <= crop <= min(before):
        raise InputError(f"pixels.crop: expected at most the resized side, {min(before)}, got {crop!r}")
    if interpolation not in ("bilinear", "bicubic"):
        raise InputError(f"pixels.interpolation: expected bilinear or bicubic, got {interpolation!r}")
    size = (crop, crop) if crop else before
    return Resize(size=size, crop=isinstance(resize, int), interpolation=interpolation, before=before)


class PixelStore:
    """The pixels of one source at one size; nothing is read or written before `open`.

    Args:
        images: From `open_images`.
        hashes: From `content_hashes`.
        resize: Its size.
        folder: Where all such stores lie.
    """

    def __init__(self, images: Images, hashes: Sequence[str], resize: Resize, folder: Path) -> None:
        assert resize.size is not None
        self.images, self.resize = images, resize
        self.shape = (len(images.ids), *resize.size, 3)
        self.settings = {
            "images": hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
            "shape": list(self.shape),
            "resize": [*resize.before, resize.crop, resize.interpolation],
        }
        name = hashlib.sha256(repr(sorted(self.settings.items())).encode()).hexdigest()[:16]
        self.root = folder / f"pixels-{name}"
        self.row_bytes = int(np.prod(self.shape[1:]))
        self.block_rows = max(1, min(MOST_ROWS, BLOCK_BYTES // self.row_bytes))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(_header(self.shape)) + self.shape[0] * self.row_bytes

    @property
    def missing(self) -> int:
        """Bytes that the disk does not hold yet."""
        path = self.root / ARRAY
        return max(0, self.size - path.stat().st_blocks * 512) if path.exists() else self.size

    def open(self, workers: int | None = None) -> tuple[MappedFile, NDArray[np.bool_]]:
        """The pixels, decoded where they are missing, and which images are good, (N,).

        Args:
            workers: Processes that decode; 0 decodes here. By default as many as there are processors, for more than
                a few hundred images.

        Raises:
            InputError: None of the images can be decoded, or the disk is full.
        """
        if workers is None:
            workers = min(len(os.sched_getaffinity(0)), self.shape[0] // 256)
        good = _opened(self, workers)
        return MappedFile(self.root / ARRAY, self.shape, len(_header(self.shape))), good

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PixelStore) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    def fill(self, store: Store, workers: int) -> None:
        """Decode what is missing or damaged, and list it."""
        path, header = self.root / ARRAY, _header(self.shape)
        with open(path, "r+b" if path.exists() else "w+b") as file:
            _reserve(file.fileno(), self.size, path)
            file.write(header)
            file.flush()
            blocks = [
                range(start, min(start + self.block_rows, self.shape[0]))
                for start in range(0, self.shape[0], self.block_rows)
            ]
            with tqdm(total=self.shape[0], desc="decoding", unit="image", disable=None, leave=False) as bar:
                todo = []
                for rows in blocks:
                    entry = store.done(_name(rows))
                    file.seek(len(header) + rows.start * self.row_bytes)
                    if entry is None or entry["pixels"] != _hash(file.read(len(rows) * self.row_bytes)):
                        todo.append(rows)
                    else:
                        bar.update(len(rows))
                size = self.shape[1], self.shape[2]
                work = _Blocks(Batches(self.images.read, todo, self.resize, size), path, len(header))
                fresh: list[tuple[range, str, list[int]]] = []
                begun = time.monotonic()
                loader = DataLoader(work, batch_size=None, num_workers=min(workers, len(todo)), collate_fn=_as_it_is)
                for rows, (digest, bad) in zip(todo, loader, strict=True):
                    fresh.append((rows, digest, bad))
                    bar.update(len(rows))
                    if time.monotonic() - begun > KEEP_SECONDS or rows is todo[-1]:
                        os.fsync(file.fileno())  # before the lines that say that they are there
                        for one, text, lost in fresh:
                            store.note(_name(one), None, pixels=text, bad=lost)
                        fresh.clear()
                        begun = time.monotonic()


@lru_cache(maxsize=16)
def _opened(pixels: PixelStore, workers: int) -> NDArray[np.bool_]:
    """Which images are good; the file is decoded and checked once in a process."""
    good = np.ones(pixels.shape[0], dtype=bool)
    with open_store(pixels.root, pixels.settings, name="pixels", wait=True) as store:
        pixels.fill(store, workers)
        bad = sorted(row for entry in store.entries.values() for row in entry.get("bad", ()))
        good[bad] = False
        size = pixels.shape[1], pixels.shape[2]
        if not good.any():
            why = why_bad(pixels.images, 0, pixels.resize, size)
            raise InputError(f"images: expected at least one that can be decoded, got {pixels.images.ids[0]}: {why}")
        if store.done("bad.csv") is None:
            reasons = [why_bad(pixels.images, row, pixels.resize, size) for row in bad]
            store.put("bad.csv", csv_bytes({"id": [pixels.images.ids[row] for row in bad], "reason": reasons}))
        store.finish()
    return good


def bad_images(pixels: PixelStore) -> list[str]:
    """Ids of the images that could not be decoded."""
    return read_csv("bad", pixels.root / "bad.csv")["id"]


class _Blocks(Dataset[tuple[str, list[int]]]):
    """Decodes blocks and writes each to its place in the file; gives their SHA-256 and the bad rows."""

    def __init__(self, batches: Batches, path: Path, offset: int) -> None:
        self.batches, self.path, self.offset = batches, path, offset

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[str, list[int]]:
        pixels, good = self.batches[number]
        data = pixels.permute(0, 2, 3, 1).numpy().tobytes()
        rows = self.batches.batches[number]
        with open(self.path, "r+b") as file:
            file.seek(self.offset + rows.start * (len(data) // len(rows)))
            file.write(data)
        return _hash(data), [rows[place] for place in np.flatnonzero(~good.numpy())]


def _as_it_is(item: Any) -> Any:
    return item


def _name(rows: range) -> str:
    return f"rows/{rows.start:09d}"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _header(shape: Sequence[int]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    return file.getvalue()


def _reserve(descriptor: int, size: int, path: Path) -> None:
    """Make a file as large as it will be, so that a full disk shows before the work."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        os.truncate(descriptor, size)
    except OSError as error:
        raise InputError(f"out: expected room for {gigabytes(size)} at {path}: {error.strerror}") from error


def check_disk(stores: Sequence[PixelStore], folder: Path) -> None:
    """Refuse to begin where the disk has no room for all pixels.

    Raises:
        InputError: With both numbers.
    """
    needed = sum(store.missing for store in set(stores))
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"out: expected {gigabytes(needed)} of free disk for the pixels in {folder}, got {gigabytes(free)}"
        )


def describe(stores: Mapping[str, PixelStore], device: str) -> list[str]:
    """What the pixels take, and where, in a line for each split."""
    lines = []
    left = torch.cuda.mem_get_info(torch.device(device))[0] if device.startswith("cuda") else 0
    for name, store in stores.items():
        disk = f"{gigabytes(store.size)} of disk in {store.root}, of which {gigabytes(store.missing)} are to be written"
        where = f"some {gigabytes(KEPT_BYTES)} at most of memory, read from the file batch by batch"
        if device.startswith("cuda"):
            resident = store.size <= left // 2
            where = f"resident on {device}" if resident else f"read from the file batch by batch for {device}"
            left -= store.size if resident else 0
        lines.append(f"{name}: {' x '.join(map(str, store.shape))}, {disk}; {where}")
    return lines


def gigabytes(size: float) -> str:
    """Bytes for people.

    Example:
        >>> gigabytes(24_900_000_000), gigabytes(6_144_000)
        ('24.90 GB', '6.14 MB')
    """
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
