"""A review in, the numbers behind the charts of its page out."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from synth_refine._io.check import check_array
from synth_refine.labels.artifact import Artifact
from synth_refine.review.evidence import Evidence, SweepRow

FLOWS, BOXES = 100, 24
"""Pairs of classes that are shown, and classes on either side; the other pairs are counted."""


@dataclass(frozen=True)
class Review:
    """Everything that the page shows.

    Attributes:
        artifact: What was decided, (N,) rows.
        evidence: What it was decided by.
        image: Gives the decoded real image of a row; an `InputError` of it stands in the page instead of the image.
        synthetic_image: The same for synthetic images.
        names: Class names, (C,), each once; by default those of the artifact, or else numbers.
        folder: The folder in which the artifact's ids are image files, for pictures in full size; None where they are
            no such files.
    """

    artifact: Artifact
    evidence: Evidence
    image: Callable[[int], Image.Image]
    synthetic_image: Callable[[int], Image.Image]
    names: Sequence[str] | None = None
    folder: Path | None = None

    @property
    def classes(self) -> Sequence[str]:
        """The name of every class, (C,)."""
        return self.names or self.artifact.classes or list(map(str, range(self.artifact.num_classes)))


def _flows(review: Review) -> dict[str, Any]:
    """Ribbons from given to proposed classes, the widest first, and the boxes that they leave and enter, in pixels."""
    artifact = review.artifact
    rows = artifact.changed
    pairs = Counter(zip(artifact.given[rows].tolist(), artifact.labels[rows].tolist(), strict=True))
    widest = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:FLOWS]
    while any(len({pair[side] for pair, _ in widest}) > BOXES for side in (0, 1)):
        widest.pop()
    unit = 340 / max(sum(count for _, count in widest), 1)  # pixels per image
    totals: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    for pair, count in widest:
        for side in (0, 1):
            totals[side][pair[side]] += count
    # A box is at least as high as its name.
    heights = [{label: max(side[label] * unit, 16.0) for label in sorted(side)} for side in totals]
    full = max(sum(side.values()) + 5 * len(side) for side in heights)
    boxes: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    free: tuple[dict[int, float], dict[int, float]] = ({}, {})  # where the next ribbon of a box begins
    for side in (0, 1):
        top = (full - sum(heights[side].values()) - 5 * len(heights[side])) / 2
        for label, height in heights[side].items():
            count = totals[side][label]
            boxes[side].append({"label": label, "count": count, "y": top, "height": height})
            free[side][label] = top + (height - count * unit) / 2
            top += height + 5
    ribbons = []
    for (old, new), count in sorted(widest):
        thick = count * unit
        ends = {"y0": free[0][old] + thick / 2, "y1": free[1][new] + thick / 2}
        ribbons.append({"old": old, "new": new, "count": count, "thick": thick, **ends})
        free[0][old] += thick
        free[1][new] += thick
    return {
        "boxes": boxes,
        "ribbons": ribbons,
        "height": full,
        "pairs": [(old, new, count, count / widest[0][1]) for (old, new), count in widest],
        "total": len(pairs),
    }


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within a range."""
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = min((factor * size for factor in (1, 2, 2.5, 5, 10)), key=lambda one: abs(one - raw))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _threshold(review: Review) -> tuple[float | None, str]:
    """Where the charts draw the threshold, and what they call it."""
    known = review.evidence.threshold
    values = np.atleast_1d(np.asarray([] if known is None else known, dtype=np.float64))
    values = values[np.isfinite(values)]
    if not values.size:
        return None, ""
    mean, low, high = float(values.mean()), values.min(), values.max()
    if low == high:
        return mean, f"threshold {mean:.3g}"
    return (
        mean,
        f"mean of the classes' thresholds, {mean:.3g} ({low:.3g} to {high:.3g}); what counts is the new class's",
    )


def _histogram(review: Review) -> dict[str, Any] | None:
    """How sure the proposed changes and the abstentions are, in 25 bins over 560 by 200 pixels."""
    threshold, _ = _threshold(review)
    artifact = review.artifact
    known = np.isfinite(artifact.confidence) & (artifact.action != "keep")
    values, change = artifact.confidence[known], artifact.action[known] == "change"
    if not values.size:
        return None
    limits = [*values.tolist(), *([threshold] if threshold is not None else [])]
    low, high = (0.0, 1.0) if min(limits) >= 0 and max(limits) <= 1 else (min(limits), max(limits))
    high = high if high > low else low + 1
    edges = np.linspace(low, high, 26)
    bins = [np.histogram(values[which], edges)[0] for which in (change, ~change)]
    top = int((bins[0] + bins[1]).max())
    unit = 200 / top

    def across(value: float) -> float:
        return 560 * (value - low) / (high - low)

    return {
        "bars": [
            {"x": across(edges[place]) + 0.5, "width": 560 / 25 - 1, "low": edges[place], "high": edges[place + 1]}
            | {"change": int(first), "abstain": int(second), "y": 200 - first * unit, "height": first * unit}
            | {"y2": 200 - (first + second) * unit, "height2": second * unit}
            for place, (first, second) in enumerate(zip(*bins, strict=True))
        ],
        "across": [(across(tick), f"{tick:g}") for tick in _ticks(low, high)],
        "up": [(200 - tick * unit, f"{tick:,.0f}") for tick in _ticks(0, top, 4) if tick == int(tick)],
        "threshold": None if threshold is None else across(threshold),
        "abstained": bool((~change).any()),
    }


def _sweep(review: Review) -> dict[str, Any] | None:
    """Lines over the threshold, in 560 by 200 pixels."""
    rows = [row for row in review.evidence.sweep if math.isfinite(row.threshold)]
    if len(rows) < 2:
        return None
    low, high = min(row.threshold for row in rows), max(row.threshold for row in rows)
    names = {"changed": "changed", "noise_after": "noise after (estimated)", "wrong_changes": "wrong changes (nominal)"}
    finite = [value for row in rows for name in names if math.isfinite(value := getattr(row, name))]
    top = max([*finite, 0.01]) * 1.05

    def place(row: SweepRow, value: float) -> tuple[float, float]:
        return 560 * (row.threshold - low) / max(high - low, 1e-9), 200 - 200 * value / top

    lines = []
    for name, text in names.items():
        points = [place(row, getattr(row, name)) for row in rows if math.isfinite(getattr(row, name))]
        if points:
            lines.append({"name": name, "text": text, "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points)})
    threshold, _ = _threshold(review)
    threshold = threshold if threshold is not None and low <= threshold <= high else None
    return {
        "lines": lines,
        "rows": rows,
        "across": [(560 * (tick - low) / max(high - low, 1e-9), f"{tick:g}") for tick in _ticks(low, high)],
        "up": [(200 - 200 * tick / top, f"{tick:.0%}") for tick in _ticks(0, top, 4)],
        "threshold": None if threshold is None else 560 * (threshold - low) / max(high - low, 1e-9),
    }


@dataclass(frozen=True)
class ClassRow:
    """One class in the table of the page; what is None is shown as unknown, or its column is left out.

    Attributes:
        name: Its name.
        given: Images given as it.
        refined: Images of it after the proposed changes.
        left: Images given as it that are left to a person.
        goes_to: Other classes and how many of its images would go there, the most first.
        comes_from: Other classes and how many of their images would come to it, the most first.
        noise: Estimated share of wrong labels among those given as it: estimate, low, high.
        synthetic: Its synthetic images.
        usable: Those that are usable.
        few: Whether these are too few.
        told: Share of its synthetic images that is classified correctly when held out.
        like: Other classes and the share of its synthetic images that look like them.
    """

    name: str
    given: int
    refined: int
    left: int
    goes_to: Sequence[tuple[str, int]] = ()
    comes_from: Sequence[tuple[str, int]] = ()
    noise: Sequence[float] | None = None
    synthetic: int | None = None
    usable: int | None = None
    few: bool = False
    told: float | None = None
    like: Sequence[tuple[str, float]] = ()


def class_rows(review: Review) -> list[ClassRow]:
    """The table of classes, a row each, from what the artifact and the evidence hold."""
    artifact, quality, names = review.artifact, review.evidence.quality, review.classes
    pairs = Counter(zip(artifact.given.tolist(), artifact.labels.tolist(), strict=True))
    moves = [(old, new, count) for (old, new), count in pairs.most_common() if old != new]
    goes: list[list[tuple[str, int]]] = [[] for _ in names]
    comes: list[list[tuple[str, int]]] = [[] for _ in names]
    for old, new, count in moves:
        goes[old].append((names[new], count))
        comes[new].append((names[old], count))
    counts = [
        np.bincount(labels, minlength=len(names)).tolist()
        for labels in (artifact.given, artifact.labels, artifact.given[artifact.action == "abstain"])
    ]
    about: list[dict[str, Any]] = [{} for _ in names]
    if quality is not None:
        intended = review.evidence.synthetic_labels
        check_array("quality", quality.keep, intended.shape)
        for label in range(len(names)):
            own = intended == label
            like = [(names[other], share) for made, other, share in quality.confused if made == label]
            about[label] = {"synthetic": int(own.sum()), "usable": int(quality.keep[own].sum()), "like": like}
            about[label]["few"] = label in quality.too_few
    for row, (noise, told) in zip(about, review.evidence.classes, strict=False):  # none where nothing is known
        row |= {"noise": noise, "told": told}
    return [
        ClassRow(name, given, refined, left, goes_to=goes[label], comes_from=comes[label], **about[label])
        for label, (name, given, refined, left) in enumerate(zip(names, *counts, strict=True))
    ]


def _quality(review: Review) -> dict[str, Any] | None:
    """What is usable in the synthetic set."""
    quality = review.evidence.quality
    if quality is None:
        return None
    repeats = quality.duplicate_of >= 0
    return {
        "images": len(quality.keep),
        "usable": int(quality.keep.sum()),
        "off": int(quality.off_class.sum()),
        "repeats": int(repeats.sum()),
        "few": len(quality.too_few),
    }


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "unknown"


def _count(value: int) -> str:
    return f"{value:,}"


def _isolated(text: str, most: int = 0) -> str:
    """A name for a picture, in isolates: marks in it that turn the direction of text turn nothing beside it."""
    plain = re.sub("[\u2066-\u2069]", "", text)
    return f"\u2068{plain[: most - 1] + '…' if 0 < most < len(plain) else plain}\u2069"
