"""A refinement in, the class table out: what is estimated and known of every class, and classes that are one.

Letters in shapes: N images, M synthetic images, C classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from synth_refine._io.check import Array, label_tensor
from synth_refine.refine.estimates import Estimate
from synth_refine.refine.result import CPU, Refinement

FEW = 10  # synthetic images of a class below which they say little
MOVES = 5  # other classes that a row names
OVERLAP = 0.25  # share of either class that is called the other, from which on the two ask to be merged
SIGMAS = 1.96  # of the sampling error, for an interval of 95 %
SHOWN = 3  # classes or pairs that a line names
HARD = 0.8  # share of held-out synthetic images below which a class is named as badly told apart


@dataclass(frozen=True)
class ClassInfo:
    """One class.

    Attributes:
        name: Its name.
        given: Images given as it.
        noise: Share of them that is wrong, estimated so that all classes together give the estimate of the set; the
            interval has the sampling error besides. None where nothing is estimated.
        goes_to: Classes that its images really show, with their expected number, the most first.
        comes_from: Classes that its images are given as instead, likewise.
        synthetic: Synthetic images of it.
        synthetic_accuracy: Share of them that is classified correctly when held out. None where that is not known.
        few: Whether they are too few to say much.
    """

    name: str
    given: int
    noise: Estimate | None
    goes_to: tuple[tuple[str, float], ...]
    comes_from: tuple[tuple[str, float], ...]
    synthetic: int
    synthetic_accuracy: float | None
    few: bool


@dataclass(frozen=True)
class ClassTable:
    """What is known of the classes.

    Attributes:
        health: Share of the given labels that is right, estimated: 1 minus the noise. None where that is not estimated.
        classes: One entry per class.
        merge: Pairs that ask to be merged, with the smaller of both shares that are called the other class, on held-out
            synthetic images or by what the images really show.
    """

    health: Estimate | None
    classes: tuple[ClassInfo, ...]
    merge: tuple[tuple[str, str, float], ...]

    def to_json(self) -> bytes:
        """As a file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode() + b"\n"

    def facts(self) -> list[tuple[list[float] | None, float | None]]:
        """Noise, as value, low and high, and synthetic accuracy of every class."""
        return [
            (None if one.noise is None else list(vars(one.noise).values()), one.synthetic_accuracy)
            for one in self.classes
        ]

    def lines(self) -> list[str]:
        """What is worth a line to people: noisy classes, those that are hard to tell apart, pairs, and small ones."""
        noisy = [(one.noise.value, one) for one in self.classes if one.noise is not None and one.given]
        noisy.sort(key=lambda pair: -pair[0])
        known = [(one.synthetic_accuracy, one) for one in self.classes if one.synthetic_accuracy is not None]
        hard = sorted((pair for pair in known if pair[0] < HARD), key=lambda pair: pair[0])
        few = [one.name for one in self.classes if one.few]
        pairs = [f"{one} and {other}" for one, other, _ in self.merge]
        texts = {
            "most wrong labels, estimated": [f"{one.name} {noise:.0%}" for noise, one in noisy],
            "synthetic images tell these apart worst": [f"{one.name} {share:.0%}" for share, one in hard],
            "ask to be merged": pairs,
            f"fewer than {FEW} synthetic images": few,
        }
        return [
            f"{text}: {', '.join(found[:SHOWN])}{f' and {len(found) - SHOWN} more' if found[SHOWN:] else ''}"
            for text, found in texts.items()
            if found
        ]


def class_table(
    result: Refinement, given: Array, synthetic_labels: NDArray[np.int64], names: Sequence[str]
) -> ClassTable:
    """The table of a refinement.

    Args:
        result: From any refiner. Without posteriors, the flows are those of its changes, and no noise is estimated.
        given: Given labels, (N,).
        synthetic_labels: The intended class of each synthetic image, (M,).
        names: Names of the classes, C.

    Returns:
        A row per class, in the order of `names`.
    """
    known, count = result.diagnostics, len(names)
    labels, intended = label_tensor(given, CPU), label_tensor(synthetic_labels, CPU)
    moves = torch.zeros(count, count, dtype=torch.float64)  # (C, C), images given as a row's class that show a column's
    estimates, posteriors = getattr(known, "estimates", None), getattr(known, "posteriors", None)
    if posteriors is None:
        moves.index_put_((labels, result.apply(labels)), torch.ones(len(labels)).double(), True)
    else:
        for numbers, posterior in posteriors():
            moves.index_add_(0, labels[numbers.cpu()], posterior.double().cpu())
    before: Estimate | None = None if posteriors is None else getattr(estimates, "before", None)
    before = before if before is not None and math.isfinite(before.value) else None
    noise = _noise(moves, before)
    shares = None
    if (probs := getattr(known, "synthetic_probs", None)) is not None and not math.isnan(known.synthetic_accuracy):
        shares = torch.zeros(count, count, dtype=torch.float64)
        called = torch.as_tensor(probs).cpu().argmax(dim=1)
        shares.index_put_((intended, called), torch.ones(len(intended)).double(), True)
        shares /= shares.sum(dim=1, keepdim=True).clamp_min(1)
    sizes, drawn = (torch.bincount(one, minlength=count).tolist() for one in (labels, intended))
    rows = [
        ClassInfo(
            name=name,
            given=sizes[label],
            noise=noise[label],
            goes_to=_most(moves[label], label, names),
            comes_from=_most(moves[:, label], label, names),
            synthetic=drawn[label],
            synthetic_accuracy=None if shares is None else float(shares[label, label]),
            few=drawn[label] < FEW,
        )
        for label, name in enumerate(names)
    ]
    tables = [moves / moves.sum(dim=1, keepdim=True).clamp_min(1)] + ([] if shares is None else [shares])
    overlap = torch.stack([torch.minimum(one, one.T) for one in tables]).amax(dim=0).triu(1)
    merge = [(names[one], names[other], float(overlap[one, other])) for one, other in (overlap >= OVERLAP).nonzero()]
    merge.sort(key=lambda pair: -pair[2])
    health = None if before is None else Estimate(1 - before.value, 1 - before.high, 1 - before.low)
    return ClassTable(health, tuple(rows), tuple(merge))


def _noise(moves: torch.Tensor, before: Estimate | None) -> list[Estimate | None]:
    """Share of wrong labels of each given class; the posteriors say how the noise of the set divides."""
    count = moves.sum(dim=1)
    wrong = 1 - moves.diagonal() / count.clamp_min(1)
    mean = float((wrong * count).sum() / count.sum().clamp_min(1))
    found: list[Estimate | None] = []
    for own, size in zip(wrong.tolist(), count.tolist(), strict=True):
        if before is None or not size or not mean:
            found.append(None)
            continue
        value, low, high = (min(1.0, own * one / mean) for one in (before.value, before.low, before.high))
        error = SIGMAS * math.sqrt(max(value * (1 - value), 1 / size) / size)
        found.append(Estimate(value, max(0.0, low - error), min(1.0, high + error)))
    return found


def _most(counts: torch.Tensor, own: int, names: Sequence[str]) -> tuple[tuple[str, float], ...]:
    order = counts.argsort(descending=True, stable=True).tolist()
    return tuple((names[one], round(float(counts[one]), 1)) for one in order if one != own and counts[one] >= 0.5)[
        :MOVES
    ]
