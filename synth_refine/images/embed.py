"""Features of images on disk: pixels in, (N, D) float32 out, kept in shards that resume.

Letters in shapes: N images, H x W pixels, D features.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from synth_refine._io.atomic import file_hash, write_atomic
from synth_refine._io.check import InputError
from synth_refine._io.ray import check_engine, on_cluster
from synth_refine._io.untrusted import read_npy
from synth_refine.images.decode import decode, fitted
from synth_refine.images.encoders import Encoder, Preprocess, check_images
from synth_refine.images.readers import BATCH_ROWS, ParquetRows, Reader, part_of
from synth_refine.images.sources import Images

SHARD_ROWS = 4096


def images_hash(images: Tensor) -> str:
    """SHA-256 of the shape, the type and every byte of a tensor."""
    digest = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    for part in torch.split(images, SHARD_ROWS):
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def embed_cached(encoder: Encoder, images: Tensor, folder: Path | str, *, shard_rows: int = SHARD_ROWS) -> Tensor:
    """Features from disk, computed and kept where they are missing.

    They lie in a folder named by the encoder's id and the images' hash, in shards that are written whole or not at all
    and listed with their checksums. So another encoder or other images never meet features that are not theirs, an
    interrupted run goes on behind the last shard, and a damaged shard is computed again.

    Args:
        encoder: The encoder.
        images: (N, 3, H, W) uint8.
        folder: Where the features of all encoders are kept; made if it is missing.
        shard_rows: Images per shard.

    Returns:
        (N, D) float32, on the device of `images`.

    Raises:
        InputError: As the encoder's `embed`.
    """
    check_images(images)
    if shard_rows < 1:
        raise InputError(f"shard_rows: expected 1 or more, got {shard_rows}")
    about = {"encoder": encoder.id, "images": images_hash(images), "shard_rows": shard_rows}
    parts = torch.split(images, shard_rows)

    def compute(missing: list[int]) -> Iterator[tuple[int, Tensor]]:
        for number in tqdm(missing, "embedding", disable=None, leave=False):
            yield number, encoder.embed(parts[number]).cpu()

    return kept_shards(folder, about, [len(part) for part in parts], compute).to(images.device)


def kept_shards(
    folder: Path | str | os.PathLike[str],
    about: dict[str, Any],
    counts: Sequence[int],
    compute: Callable[[list[int]], Iterator[tuple[int, Tensor]]],
) -> Tensor:
    """Features from the shards on disk; what is missing there or damaged is computed and kept.

    Args:
        folder: Where the features of all encoders and images are kept; made if it is missing.
        about: All that the features depend on, as JSON takes it; it names their folder.
        counts: Rows of each shard.
        compute: Gives the features of the shards of these numbers, with the number of each, in any order.

    Returns:
        The features of all shards, (N, D) float32, on the CPU.

    Raises:
        RuntimeError: A shard did not come.
    """
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    place = Path(folder) / f"features-{key}"
    place.mkdir(parents=True, exist_ok=True)
    listed = _listed(place / "manifest.json", about)
    names = [f"shard-{number:05d}.npy" for number in range(len(counts))]
    found = [_shard(place / name, listed.get(name), rows) for name, rows in zip(names, counts, strict=True)]
    missing = [number for number, features in enumerate(found) if features is None]
    for number, features in compute(missing):
        with write_atomic(place / names[number]) as file:
            np.save(file, features.numpy(), allow_pickle=False)
        listed[names[number]] = file_hash(place / names[number])
        with write_atomic(place / "manifest.json") as file:
            file.write(json.dumps({**about, "shards": dict(sorted(listed.items()))}, indent=1).encode())
        found[number] = features
    whole = [features for features in found if features is not None]
    if len(whole) < len(found):
        raise RuntimeError(f"compute: expected {len(found)} shards, got {len(whole)}")
    return torch.cat(whole)


def _listed(manifest: Path, about: dict[str, Any]) -> dict[str, str]:
    """Checksums of finished shards by name; none where the manifest is missing, damaged or about something else."""
    try:
        content = json.loads(manifest.read_bytes())
        shards = content.pop("shards")
        return dict(shards) if content == about else {}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def _shard(path: Path, checksum: str | None, rows: int) -> Tensor | None:
    """A finished shard, or None where it is missing or not what was written."""
    if checksum is None or not path.is_file() or file_hash(path) != checksum:
        return None
    features = torch.from_numpy(np.array(read_npy("features", path)))
    return features if len(features) == rows else None


Embedded: TypeAlias = tuple[int, int, Tensor]  # number of a shard, place of a batch in it, features

Decoded: TypeAlias = "tuple[int, int, NDArray[np.uint8], NDArray[np.bool_]]"  # likewise pixels, and which are good


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
    check_engine(engine)
    count = len(images.ids)
    found = [""] * count
    shards = _cut(range(count), shard_rows)
    with tqdm(total=count, desc="scanning", unit="image", disable=None, leave=False) as bar:
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


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Decoded images in batches of one size: (B, 3, H, W) uint8, and which of them are good, (B,) bool."""

    def __init__(
        self,
        read: Reader,
        batches: list[range],
        preprocess: Preprocess | None,
        size: tuple[int, int],
        there: Sequence[str | None] = (),
    ):
        """Batches of rows; `size` is the height and width that all images come in.

        `there` names, row by row, the images that others could read, so that no row is bad only on this node.
        """
        self.read, self.batches, self.preprocess, self.size, self.there = read, batches, preprocess, size, there
        self.enough = None if preprocess is None else preprocess.size

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """One batch; a bad image is black in it.

        Raises:
            InputError: An image that others could read cannot be read here.
        """
        rows = self.batches[number]
        pixels = np.zeros((len(rows), *self.size, 3), dtype=np.uint8)
        good = np.zeros(len(rows), dtype=bool)
        for place, row in enumerate(rows):
            try:
                data = self.read(row)
            except InputError as error:
                if self.there and self.there[row] is not None:
                    raise InputError(
                        f"engine: {self.there[row]} cannot be read on node {platform.node()}: {error}"
                    ) from error
                continue
            try:
                image = fitted(decode(data, at_least=self.enough), self.preprocess)
            except InputError:
                continue
            if (image.height, image.width) == self.size:
                pixels[place], good[place] = np.asarray(image), True
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(good)


def embed_images(
    encoder: Encoder,
    images: Images,
    folder: str | os.PathLike[str],
    *,
    hashes: Sequence[str] | None = None,
    workers: int = 0,
    batch_rows: int = BATCH_ROWS,
    shard_rows: int = SHARD_ROWS,
    progress: str = "embedding",
    engine: str = "local",
    address: str | None = None,
    make: Callable[..., Encoder] | None = None,
    device: str = "cuda",
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Features of images on disk, decoded by workers while the encoder computes, and kept as `embed_cached` keeps them.

    Args:
        encoder: The encoder. Where its `preprocess` has a size, images are brought to it; else all must be of one size.
        images: From `open_images`.
        folder: Where the features of all encoders are kept; made if it is missing.
        hashes: From `content_hashes`, where they are known already.
        workers: Processes that decode; 0 decodes between the batches.
        batch_rows: Images per batch.
        shard_rows: Images per shard, in which an interrupted run goes on.
        progress: What the bar says.
        engine: `local`, this process and its workers; or `ray`, a cluster whose nodes see the same images and weights
            under the same paths. A shard is decoded and embedded in one task, or embedded by actors with a GPU each; on
            processors of one kind both engines write the same bytes, and either goes on with what the other began.
        address: Of the Ray cluster; by default the one that RAY_ADDRESS names, one that runs on this machine, or a new
            local one.
        make: For ray: called as make(device=...) in every process that embeds, gives the encoder there, such as
            partial(encoder_by_name, "timm:resnet50.a1_in1k").
        device: For ray: what they compute on, a GPU each for cuda; cpu where no GPU shall be taken.

    Returns:
        Features, (N, D) float32, NaN for images that could not be decoded, and why, by row.

    Raises:
        InputError: No image at all could be decoded, or as the encoder's `embed`; or Ray is missing, or a node has
            another encoder or cannot read an image that has a hash.
    """
    check_engine(engine)
    wanted = encoder.id
    actor = None if make is None else partial(embedder, make, wanted)
    if engine == "ray" and actor is None:
        raise InputError("make: expected what builds the encoder on a node of the cluster, got None")
    if hashes is None:
        hashes = content_hashes(images, shard_rows=shard_rows, engine=engine, address=address)
    preprocess = getattr(encoder, "preprocess", None)
    size = preprocess.size if preprocess is not None and preprocess.size is not None else _first_size(images)
    count = len(images.ids)
    digest = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    # Features depend on how a file becomes pixels too; "files" keeps them apart from those of tensors.
    about = {"encoder": wanted, "files": digest, "rows": count, "size": list(size), "shard_rows": shard_rows}
    shards = [range(start, min(start + shard_rows, count)) for start in range(0, count, shard_rows)]
    bar = tqdm(total=count, desc=progress, unit="image", disable=None, leave=False)

    def here(missing: list[int]) -> Iterator[Embedded]:
        keys = [(number, *one) for number in missing for one in enumerate(_cut(shards[number], batch_rows))]
        dataset = Batches(images.read, [rows for _, _, rows in keys], preprocess, size)
        loader = DataLoader(dataset, batch_size=None, num_workers=min(workers, len(keys)))
        for (number, place, _), (pixels, good) in zip(keys, loader, strict=True):
            yield number, place, _embed_good(encoder, pixels, good)

    def on_ray(missing: list[int]) -> Iterator[Embedded]:
        names = [one if known else None for one, known in zip(images.ids, hashes, strict=True)]
        work = [
            (number, part_of(images.read, rows), names[rows.start : rows.stop])
            for number, rows in ((number, shards[number]) for number in missing)
        ]
        task = partial(decoded_shard, batch_rows=batch_rows, preprocess=preprocess, size=size)
        for number, place, features in on_cluster(work, task, address, actor=actor, device=device):
            yield number, place, torch.from_numpy(features)

    def compute(missing: list[int]) -> Iterator[tuple[int, Tensor]]:
        bar.update(count - sum(len(shards[number]) for number in missing))
        parts: dict[int, dict[int, Tensor]] = {number: {} for number in missing}
        for number, place, features in (here if engine == "local" else on_ray)(missing):
            bar.update(len(features))
            parts[number][place] = features
            if len(parts[number]) == len(_cut(shards[number], batch_rows)):
                whole = parts.pop(number)
                yield number, torch.cat([whole[place] for place in sorted(whole)])

    features = kept_shards(folder, about, [len(rows) for rows in shards], compute).numpy()
    bar.close()
    bad = np.flatnonzero(np.isnan(features).all(axis=1))
    if len(bad) == count:
        raise InputError(
            f"images: expected at least one that can be decoded, got {why_bad(images, 0, preprocess, size)}"
        )
    return features, {int(row): why_bad(images, int(row), preprocess, size) for row in bad}


def _cut(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def decoded_shard(
    part: tuple[int, Reader, list[str | None]], *, batch_rows: int, preprocess: Preprocess | None, size: tuple[int, int]
) -> Iterator[Decoded]:
    """A task on a cluster: the batches of a shard.

    Args:
        part: Number of the shard, a reader of its images, and the id of each, None where it could not be read before.
        batch_rows: See `embed_images`.
        preprocess: Of the encoder.
        size: Height and width.

    Yields:
        Number of the shard, place in it, pixels, (B, H, W, 3), and which are good, (B,).

    Raises:
        InputError: This node cannot read an image that could be read before, as where it sees other folders.
    """
    number, read, names = part
    batches = Batches(read, _cut(range(len(names)), batch_rows), preprocess, size, names)
    for place in range(len(batches)):
        pixels, good = batches[place]
        yield number, place, pixels.permute(0, 2, 3, 1).numpy(), good.numpy()


def embedder(make: Callable[..., Encoder], wanted: str, device: str) -> Callable[[Decoded], tuple[int, int, Any]]:
    """An actor on a cluster: embeds what `decoded_shard` gives.

    Raises:
        InputError: The encoder that `make` builds on this node cannot be had or has another id than `wanted`.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"engine: expected a GPU that torch can use on node {platform.node()}, got none")
    encoder = make(device=device)
    if encoder.id != wanted:
        raise InputError(f"encoder: expected the same weights on every node, got others on node {platform.node()}")

    def embed(batch: Decoded) -> tuple[int, int, Any]:
        number, place, pixels, good = batch
        # The same order of bytes as here, or a convolution may round otherwise.
        features = _embed_good(encoder, torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(good))
        return number, place, features.numpy()

    return embed


def _embed_good(encoder: Encoder, pixels: Tensor, good: Tensor) -> Tensor:
    """Features of a batch, (B, D), NaN for bad images."""
    if bool(good.all()):
        return encoder.embed(pixels).cpu()
    found = encoder.embed(pixels[good] if bool(good.any()) else pixels[:1]).cpu()  # a black one tells D
    features = found.new_full((len(good), found.shape[1]), torch.nan)
    if bool(good.any()):
        features[good] = found
    return features


def _first_size(images: Images) -> tuple[int, int]:
    """Height and width of the first image that can be decoded."""
    for row in range(len(images.ids)):
        try:
            image = images.image(row)
        except InputError:
            continue
        return image.height, image.width
    raise InputError(f"images: expected at least one that can be decoded, got {len(images.ids)} bad ones")


def why_bad(images: Images, row: int, preprocess: Preprocess | None, size: tuple[int, int]) -> str:
    """Why an image was left out."""
    try:
        image = fitted(images.image(row), preprocess)
    except InputError as error:
        return str(error)
    return f"image: expected {size[1]}x{size[0]} pixels, as the first has, got {image.width}x{image.height}"
