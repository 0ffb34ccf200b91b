"""Images with features and hashes in, groups of copies out: within the images, and shared with other sources.

Exact copies have the same bytes. Near copies, resized or compressed again, are searched by the cosine of the features
and confirmed by the pixels: features of a weak encoder lie close together for images that only look alike.

Letters in shapes: N images of all sources, D features, K candidates of an image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]
from torch.nn import functional as F

from synth_refine._io.check import InputError
from synth_refine._io.csv import csv_bytes
from synth_refine._io.progress import progress
from synth_refine.images.decode import decode
from synth_refine.images.embed import Embedded

CANDIDATES = 16  # nearest images whose pixels are compared
COSINE = 0.35  # of centred features, from which on they are: ImageNet networks see little in common at another size
PIXELS = 0.975  # correlation of thumbnails that makes a copy; chosen on photographs of CIFAR-10
SIDE, DECODED_SIDE = 16, 64  # of these thumbnails, and of what they are made from at least, in pixels
COLUMNS = ("group", "id", "split", "label", "kind", "similarity")  # of duplicates.csv
QUERY_ROWS, BLOCK_ROWS = 1024, 8192  # of the products that are held at a time
SAME_SOURCE = 0.5  # share of the synthetic images that are given images, from which on they are refused


@dataclass(frozen=True)
class Copy:
    """An image that has copies.

    Attributes:
        group: Number of its group, from 1 on, the most urgent first.
        split: The source it lies in.
        row: Its row there.
        id: Its id there.
        label: The name of its class there.
        kind: exact, if an image of the group has the same bytes, else near.
        similarity: 1 for exact, else the correlation with the most similar image of the group.
    """

    group: int
    split: str
    row: int
    id: str
    label: str
    kind: str
    similarity: float


@dataclass(frozen=True)
class Duplicates:
    """Groups of copies. Groups with different labels come first, then those that lie in several sources."""

    copies: tuple[Copy, ...]

    @cached_property
    def groups(self) -> list[list[Copy]]:
        """The images of each group."""
        found: dict[int, list[Copy]] = defaultdict(list)
        for one in self.copies:
            found[one.group].append(one)
        return list(found.values())

    @property
    def conflicting(self) -> int:
        """Number of groups with different labels."""
        return sum(_differs(group) for group in self.groups)

    def shared(self, split: str) -> int:
        """Number of images of a source that are copies of given images."""
        return sum(one.split == split for one in self.copies)

    def counts(self, splits: Iterable[str]) -> dict[str, int]:
        """Groups, those with different labels, and the images of each other source that are copies of given ones."""
        _, *others = splits
        known = {"groups": len(self.groups), "conflicting": self.conflicting}
        return known | {name: self.shared(name) for name in others}

    def rows(self) -> list[tuple[str, ...]]:
        """A line of texts per image, in the order of `COLUMNS`."""
        return [
            (str(one.group), one.id, one.split, one.label, one.kind, f"{one.similarity:.4f}") for one in self.copies
        ]

    def table(self) -> bytes:
        """As the .csv file of a run."""
        rows = self.rows()
        return csv_bytes({name: [row[place] for row in rows] for place, name in enumerate(COLUMNS)})


def find_duplicates(splits: Mapping[str, Embedded]) -> Duplicates:
    """The copies among the images of the first source, and of them in the others.

    Args:
        splits: Images of each source, by the name of the source. Copies that lie in other sources alone are left out.

    Returns:
        Groups of two or more images.
    """
    sets, starts = list(splits.values()), np.cumsum([0, *(len(one.hashes) for one in splits.values())])
    first: dict[str, int] = {}
    hashes = [one for each in sets for one in each.hashes]
    origin = np.array([first.setdefault(one, row) if one else row for row, one in enumerate(hashes)], dtype=np.int64)
    exact = np.bincount(origin, minlength=len(origin))[origin] > 1
    pairs, similarity = _near(sets, starts, np.flatnonzero(origin == np.arange(len(origin))))
    ends = np.concatenate([pairs, np.stack([np.arange(len(origin)), origin], axis=1)])
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(origin), len(origin)))
    number = connected_components(graph, directed=False)[1]
    best = np.zeros(len(origin))
    for end in pairs.T:
        np.maximum.at(best, end, similarity)
    members: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero(np.bincount(number)[number] > 1).tolist():
        members[int(number[row])].append(row)
    names, groups = list(splits), []
    for rows in members.values():
        if rows[0] >= starts[1]:
            continue
        group = []
        for row in rows:
            place = int(np.searchsorted(starts, row, side="right")) - 1
            images, own = sets[place].images, row - int(starts[place])
            kind, value = ("exact", 1.0) if exact[row] else ("near", float(best[row]))
            label = images.classes[images.labels[own]]
            group.append(Copy(0, names[place], own, images.ids[own], label, kind, value))
        groups.append(group)
    groups.sort(key=lambda group: (not _differs(group), len({one.split for one in group}) == 1, group[0].row))
    numbered = (Copy(**vars(one) | {"group": place}) for place, group in enumerate(groups, 1) for one in group)
    return Duplicates(tuple(numbered))


def check_not_given(given: Iterable[str], synthetic: Sequence[str]) -> None:
    """Refuse synthetic images that are the given ones: their classes would be the labels to repair.

    Args:
        given: Hashes of the given images, from `content_hashes`.
        synthetic: Those of the synthetic images.

    Raises:
        InputError: Half of the synthetic images or more are given images, byte for byte.
    """
    known = set(given) - {""}
    same = sum(one in known for one in synthetic)
    if same and same >= SAME_SOURCE * len(synthetic):
        raise InputError(
            f"synthetic: expected other images than the given ones, got {same} of {len(synthetic)} that are the same "
            "files; their labels cannot tell which labels are wrong"
        )


def _differs(group: Sequence[Copy]) -> bool:
    return len({one.label for one in group}) > 1


def _near(
    sets: Sequence[Embedded], starts: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pairs of images with nearly the same pixels, (P, 2), and how similar they are, (P,)."""

    def features(some: NDArray[np.int64]) -> torch.Tensor:
        places = np.searchsorted(starts, some, side="right") - 1
        parts = [one.features[some[places == place] - starts[place]] for place, one in enumerate(sets)]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32))  # rows are sorted, and so are sources

    blocks = [rows[start : start + BLOCK_ROWS] for start in range(0, len(rows), BLOCK_ROWS)]
    good = [features(block).isfinite().all(dim=1).numpy() for block in blocks]
    blocks = [block[fine] for block, fine in zip(blocks, good, strict=True) if fine.any()]
    nothing = np.empty((0, 2), dtype=np.int64), np.empty(0)
    if not blocks:
        return nothing
    total = sum(map(len, blocks))
    mean = torch.stack([features(block).double().sum(dim=0) for block in blocks]).sum(dim=0).div(total).float()
    queries = np.concatenate(blocks)
    queries = queries[queries < starts[1]]
    found = []
    with progress(len(queries), "searching copies") as bar:
        for start in range(0, len(queries), QUERY_ROWS):
            some = queries[start : start + QUERY_ROWS]
            left = F.normalize(features(some) - mean, dim=1)
            scores, near = torch.empty(len(some), 0), torch.empty(len(some), 0, dtype=torch.int64)
            for block in blocks:
                product = left @ F.normalize(features(block) - mean, dim=1).T
                product[torch.from_numpy(some[:, None] == block[None, :])] = -1  # itself
                part = product.topk(min(CANDIDATES, len(block)), dim=1)
                scores = torch.cat([scores, part.values], dim=1)
                near = torch.cat([near, torch.from_numpy(block)[part.indices]], dim=1)
                scores, order = scores.topk(min(CANDIDATES, scores.shape[1]), dim=1)
                near = near.gather(1, order)
            query, place = (scores >= COSINE).nonzero(as_tuple=True)
            found.append(np.stack([some[query.numpy()], near[query, place].numpy()], axis=1))
            bar.update(len(some))
    pairs = np.unique(np.sort(np.concatenate([nothing[0], *found]), axis=1), axis=0)
    seen = np.unique(pairs)
    thumbs = np.zeros((len(seen), 3 * SIDE**2), dtype=np.uint8)
    with progress(len(seen), "comparing copies") as bar:
        for number, one in enumerate(seen.tolist()):
            source = int(np.searchsorted(starts, one, side="right")) - 1
            thumbs[number] = _thumb(sets[source], one - int(starts[source]))
            bar.update()
    ends = np.searchsorted(seen, pairs)
    similarity = np.zeros(len(pairs))
    for start in range(0, len(pairs), BLOCK_ROWS):
        left, right = (_standardized(thumbs[ends[start : start + BLOCK_ROWS, side]]) for side in (0, 1))
        similarity[start : start + BLOCK_ROWS] = (left * right).sum(dim=1).numpy()
    alike = similarity >= PIXELS
    return pairs[alike], similarity[alike]


def _thumb(source: Embedded, row: int) -> NDArray[np.uint8]:
    """A small picture of an image, flat; black where it cannot be read any more."""
    try:
        image = decode(source.images.read(row), at_least=(DECODED_SIDE, DECODED_SIDE))
        small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    except (InputError, OSError):
        return np.zeros(3 * SIDE**2, dtype=np.uint8)
    return np.asarray(small).ravel()


def _standardized(thumbs: NDArray[np.uint8]) -> torch.Tensor:
    values = torch.from_numpy(thumbs).float()
    return F.normalize(values - values.mean(dim=1, keepdim=True), dim=1)
