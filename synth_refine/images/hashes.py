"""The SHA-256 of image files and of pixels: a source in, (N,) texts out.

Letters in shapes: N images.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from synth_refine._io.check import InputError
from synth_refine._io.csv import csv_bytes
from synth_refine._io.progress import progress
from synth_refine._io.ray import check_engine, on_cluster
from synth_refine.images.listing import Images
from synth_refine.images.readers import ParquetRows, Reader, part_of

SHARD_ROWS = 4096  # images per task
PART_BYTES = 1 << 25  # of a tensor that are hashed at once


def images_hash(images: Tensor) -> str:
    """SHA-256 of the shape, the type and every byte of a tensor."""
    digest = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    row_bytes = max(1, images.numel() // max(1, len(images)) * images.element_size())
    for part in torch.split(images, max(1, PART_BYTES // row_bytes)):
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def content_hashes(
    images: Images,
    *,
    threads: int = 4,
    shard_rows: int = SHARD_ROWS,
    engine: str = "local",
    address: str | None = None,
) -> list[str]:
    """The SHA-256 of each image file, in hex; empty where it cannot be read.

    Args:
        images: From `open_images`.
        threads: That read at the same time, in each process.
        shard_rows: For ray: images per task; no more than these are read here, which is faster than to ask a cluster.
        engine: `local` or `ray`, as for `embed_images`.
        address: Of the Ray cluster, likewise.

    Raises:
        InputError: For ray: it is missing, or a node cannot read an image that can be read here.
    """
    check_engine(engine, address)
    count = len(images.ids)
    found = [""] * count
    shards = [range(count)[start : start + shard_rows] for start in range(0, count, shard_rows)]
    with progress(count, "scanning") as bar:
        if engine == "local" or len(shards) == 1:
            for row, one in enumerate(_hashes(images.read, count, threads)):
                found[row] = one
                bar.update()
            return found
        work = [(number, part_of(images.read, rows), len(rows)) for number, rows in enumerate(shards)]
        for number, hashes, node in on_cluster(work, partial(hashed_shard, threads=threads), address):
            rows = shards[number]
            found[rows.start : rows.stop] = hashes
            for row in rows:
                if not found[row] and _hash(images.read, row):
                    raise InputError(f"engine: {images.ids[row]} cannot be read on node {node}")
            bar.update(len(rows))
    return found


def image_table(ids: Sequence[str], labels: Sequence[str], hashes: Sequence[str]) -> bytes:
    """Images with the names of their classes and the SHA-256 of their files, (N,) each, as the .csv file of a run."""
    return csv_bytes({"id": ids, "label": labels, "sha256": hashes})


def _hashes(read: Reader, count: int, threads: int) -> Iterator[str]:
    # A reader that holds a row group of a Parquet file is not shared between threads.
    with ThreadPoolExecutor(1 if isinstance(read, ParquetRows) else threads) as pool:
        yield from pool.map(partial(_hash, read), range(count))


def _hash(read: Reader, row: int) -> str:
    try:
        return hashlib.sha256(read(row)).hexdigest()
    except InputError:
        return ""


def hashed_shard(part: tuple[int, Reader, int], *, threads: int) -> Iterator[tuple[int, list[str], str]]:
    """A task on a cluster: the hashes of a shard.

    Args:
        part: Number of the shard, a reader of its images, and how many they are.
        threads: See `content_hashes`.

    Yields:
        Once: number of the shard, a hash per image, and the node that read them.
    """
    number, read, count = part
    yield number, list(_hashes(read, count, threads)), platform.node()
