"""Where rows lie: features and given labels in, buckets of components out.

Rows are dealt at random into buckets of some 65,000, so that an epoch reads whole buckets one after the other and yet
sees its images in random order, however the inputs are sorted. In memory and on disk the same rows lie in the same
buckets, as float16 components, so that the same algorithm gives the same labels. Few rows are one bucket.

Letters in shapes: N images, M synthetic images, D features, K components, C classes, n rows of a bucket, V neighbours.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from synth_refine._io.error import InputError
from synth_refine.refine.neighbours import nearest, neighbour_labels

BUCKET_ROWS = 1 << 16
"""Mean rows of a bucket, which is held whole: 50 MB of 384 float16 components."""

COMPONENTS = 384  # principal components that the heads read
COVARIANCE_ROWS = 20_000  # rows that the components are computed from
NEIGHBOURS = 50
NEAR_COMPONENTS = 128  # leading ones, by which neighbours are sought
NEAR_LABELS = 10  # commonest labels of a neighbourhood that are kept
SHARPNESS = 10.0  # a neighbour weighs exp(SHARPNESS * cosine)

LARGEST = 6e4
"""Standardized features are cut off there: float16 ends at 65,504."""

Chunk: TypeAlias = "tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]"
"""Finite features, (n, D) float32, their given labels, (n,), and their places among all images, (n,)."""

Read: TypeAlias = Callable[[], Iterator[Chunk]]
"""A pass over all images."""


@dataclass(frozen=True)
class Bucket:
    """A few rows.

    Attributes:
        features: Components, (n, K) float16.
        given: Given labels, (n,) int64.
        numbers: Their places among all images, (n,) int64.
        view: What a second annotator says, (n,) int64, or None.
        near_labels: The commonest given labels of the nearest images, (n, V) int64, or None.
        near_weights: Their share of the neighbourhood, (n, V) float32, or None.
    """

    features: Tensor
    given: Tensor
    numbers: Tensor
    view: Tensor | None = None
    near_labels: Tensor | None = None
    near_weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, rows: Tensor | slice) -> Bucket:
        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return Bucket(
            self.features[rows],
            self.given[rows],
            self.numbers[rows],
            part(self.view),
            part(self.near_labels),
            part(self.near_weights),
        )


class Rows(ABC):
    """All finite rows, in buckets.

    Attributes:
        ends: Where each bucket begins, and where the last one ends.
        neighbours: How many equally weighted neighbours the neighbourhoods are like.
    """

    ends: list[int]
    neighbours: float

    @abstractmethod
    def bucket(self, number: int) -> Bucket:
        """The rows of one bucket."""

    def __len__(self) -> int:
        return self.ends[-1]

    def buckets(self) -> Iterator[Bucket]:
        """All of them."""
        return map(self.bucket, range(len(self.ends) - 1))

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Bucket, Tensor]]:
        """A pass in random order: a bucket and the places in it of about `size` rows at a time."""
        for number in torch.randperm(len(self.ends) - 1, generator=generator).tolist():
            bucket = self.bucket(number)
            order = torch.randperm(len(bucket), generator=generator)
            for places in order.tensor_split(_parts(len(order), size)):
                if len(places):
                    yield bucket, places.to(bucket.given.device)

    def count(self, size: int) -> int:
        """The batches of a pass."""
        return sum(_parts(stop - start, size) for start, stop in pairwise(self.ends) if stop > start)


@dataclass(frozen=True)
class MemoryRows(Rows):
    """Rows in memory, in the order of their buckets."""

    all: Bucket
    ends: list[int]
    neighbours: float = 0.0

    def bucket(self, number: int) -> Bucket:
        """A view of one bucket's rows."""
        return self.all[slice(self.ends[number], self.ends[number + 1])]


@dataclass(frozen=True)
class Frame:
    """How features become components: each domain centred and scaled on its own, then rotated alike.

    Attributes:
        center: Mean of the real images, (D,).
        scale: What they are divided by, (D,).
        synthetic_center: Mean of the synthetic images, (D,).
        synthetic_scale: What those are divided by, (D,).
        columns: Principal components, (D, K), or None where there are few enough features.
    """

    center: Tensor
    scale: Tensor
    synthetic_center: Tensor
    synthetic_scale: Tensor
    columns: Tensor | None

    @property
    def width(self) -> int:
        """K."""
        return len(self.center) if self.columns is None else self.columns.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """All that is there, by name."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: one for name, one in found.items() if one is not None}

    def real(self, features: Tensor) -> Tensor:
        """Components of finite features of real images, (n, K) float16."""
        return self._rotated((features - self.center) / self.scale).clamp_(-LARGEST, LARGEST).half()

    def synthetic(self, features: Tensor) -> Tensor:
        """Components of features of synthetic images, (M, K) float32."""
        return self._rotated((features - self.synthetic_center) / self.synthetic_scale)

    def text(self, features: Tensor) -> Tensor:
        """Components of text features, centred on their own mean, (C, K) float32."""
        return self._rotated((features - features.mean(dim=0)) / self.scale)

    def _rotated(self, values: Tensor) -> Tensor:
        return values if self.columns is None else values @ self.columns


def fit_frame(read: Read, total: int, synthetic: Tensor, seed: int) -> tuple[Frame, list[int]]:
    """The frame, by one pass, and where the buckets of the finite rows end.

    Args:
        read: A pass over the images.
        total: N, rows that are not finite included.
        synthetic: Features of the synthetic images, (M, D) float32, finite.
        seed: Draws the buckets and the rows of the covariance.

    Raises:
        InputError: No row is finite.
    """
    width, device = synthetic.shape[1], synthetic.device
    counts = np.zeros(max(1, math.ceil(total / BUCKET_ROWS)), dtype=np.int64)
    mean, squares = torch.zeros((2, width), dtype=torch.float64, device=device)  # squares of deviations from the mean
    rotated = width > COMPONENTS
    rng, few = np.random.default_rng(seed), min(total, COVARIANCE_ROWS) if rotated else 0
    drawn, sample = rng.choice(total, few, replace=False), [synthetic[:0]]
    count = 0
    for chunk, _, numbers in read():
        if not len(numbers):
            continue
        counts += np.bincount(bucket_of(numbers, len(counts), seed), minlength=len(counts))
        sample.append(chunk[torch.from_numpy(np.isin(numbers, drawn)).to(device)])
        spread, center = (part.double() for part in torch.var_mean(chunk, dim=0, correction=0))
        count, share = count + len(chunk), len(chunk) / (count + len(chunk))
        squares += len(chunk) * (spread + (center - mean).square() * (1 - share))
        mean += (center - mean) * share
    if not count:
        raise InputError("features: expected at least one row of finite numbers, got none")
    center = mean.float()
    scale, synthetic_scale = _scales((squares / count).float(), synthetic)
    columns = None
    if rotated:
        rows = (torch.cat(sample) - center) / scale
        columns = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -COMPONENTS:]
    return Frame(center, scale, synthetic.mean(dim=0), synthetic_scale, columns), [0, *np.cumsum(counts).tolist()]


def _scales(spread: Tensor, synthetic: Tensor) -> tuple[Tensor, Tensor]:
    """What the centred real images, of this variance, and the centred synthetic ones are divided by, (D,) each.

    The spread of a handful of synthetic images says little: it is drawn towards that of the real ones, with the weight
    of 20 images.
    """
    floor = 1e-4 * spread.mean().clamp_min(1e-12)
    count = len(synthetic)
    synthetic_spread = (count * synthetic.var(dim=0, unbiased=False) + 20 * spread) / (count + 20)
    return (spread + floor).sqrt(), (synthetic_spread + floor).sqrt()


def array_reader(features: Tensor, given: Tensor, step: int) -> Read:
    """Passes over arrays in memory, `step` rows at a time."""
    labels = given.cpu().numpy()

    def read() -> Iterator[Chunk]:
        for start in range(0, len(features), step):
            chunk = features[start : start + step].float()
            fine = chunk.isfinite().all(dim=1)
            numbers = start + fine.nonzero()[:, 0].cpu().numpy()
            yield (chunk if len(numbers) == len(chunk) else chunk[fine]), labels[numbers], numbers

    return read


def rows_in_memory(
    read: Read,
    frame: Frame,
    ends: list[int],
    seed: int,
    classes: int,
    view: Tensor | None = None,
    *,
    near: bool = True,
) -> MemoryRows:
    """All rows, dealt into their buckets, each with its nearest in its bucket.

    Args:
        read: A pass over the images.
        frame: From features to components.
        ends: Where the buckets end.
        seed: Draws the buckets.
        classes: C.
        view: What a second annotator says of all images, (N,) int64.
        near: Whether to look for neighbours.
    """
    parts = [(frame.real(chunk), given, numbers) for chunk, given, numbers in read()]
    features = torch.cat([part[0] for part in parts])
    given, numbers = (np.concatenate([part[place] for part in parts]) for place in (1, 2))
    device = features.device
    if len(ends) > 2:
        order = bucket_of(numbers, len(ends) - 1, seed).argsort(kind="stable")
        features, given, numbers = features[torch.from_numpy(order).to(device)], given[order], numbers[order]
    labels, places = (torch.from_numpy(values).to(device) for values in (given, numbers))
    rows = Bucket(features, labels, places, None if view is None else view[places])
    if not near:
        return MemoryRows(rows, ends)
    found = [neighbourhood(rows[slice(*pair)], classes) for pair in pairwise(ends)]
    near_labels, near_weights = (torch.cat([one[place] for one in found]) for place in (0, 1))
    rows = replace(rows, near_labels=near_labels, near_weights=near_weights)
    return MemoryRows(rows, ends, neighbours_like([one[2] for one in found]))


def neighbourhood(bucket: Bucket, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The commonest given labels among the nearest rows of a bucket, (n, V), their share, (n, V), and the share of each
    single neighbour squared and summed, (n,)."""
    rows, cosines = nearest(bucket.features[:, -NEAR_COMPONENTS:], NEIGHBOURS)
    weights = F.normalize((SHARPNESS * cosines).exp(), p=1, dim=1)
    return *neighbour_labels(rows, weights, bucket.given, classes, NEAR_LABELS), weights.square().sum(dim=1)


def neighbours_like(squares: Sequence[Tensor]) -> float:
    """How many equally weighted neighbours the neighbourhoods are like."""
    every = torch.cat(list(squares))
    return float((1 / every[every > 0]).mean()) if bool((every > 0).any()) else 0.0


def bucket_of(numbers: NDArray[np.int64], buckets: int, seed: int) -> NDArray[np.int64]:
    """The bucket of each row number, (n,)."""
    return hashed(torch.from_numpy(numbers), seed_of(0, seed), buckets).numpy()


def seed_of(*parts: int) -> int:
    """A number that looks random, from these; what it is for comes first, since zeros at the end change nothing."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def hashed(numbers: Tensor, key: int, values: int) -> Tensor:
    """For each row number one of so many values by splitmix64: random to all appearance, the same in every pass."""
    mixed = numbers.cpu().numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed % np.uint64(values)).astype(np.int64)).to(numbers.device)


def _parts(rows: int, size: int) -> int:
    return max(1, round(rows / size))
