"""The numbers behind the charts of the review page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synth_refine._io.check import check_array
from synth_refine.refine.prototypes import Quality
from synth_refine.refine.thresholds import SweepRow

FLOWS, BOXES = 100, 24
"""Pairs of classes that are drawn, and classes on either side; the other pairs are counted."""


@dataclass(frozen=True)
class Review:
    """Everything that the page shows.

    Attributes:
        classes: Class names, (C,), each once.
        ids: One id per image, (N,), each once: paths below the image folder, for example.
        given: Labels as given, (N,) integers in [0, C).
        proposed: Refined labels, (N,) integers in [0, C).
        action: keep, change or abstain, (N,).
        confidence: Score of every decision, (N,); NaN where none is known.
        reason: Why, (N,).
        nearest: Rows of the nearest synthetic images, (N, K) integers in [-1, M), -1 where there is none.
        image: Gives the decoded real image of a row; an `InputError` of it stands in the page instead of the image.
        synthetic_image: The same for synthetic images.
        synthetic_labels: The class each synthetic image was made for, (M,) integers in [0, C).
        threshold: Smallest confidence that changes a label, one number or those of the classes, of which the charts
            show the mean; None where the rule has no such number.
        sweep: What other thresholds would do; may be empty.
        quality: What is unfit in the synthetic set; None where it was not looked at.
        notes: Further numbers and facts to show, by name.
    """

    classes: Sequence[str]
    ids: Sequence[str]
    given: NDArray[np.int64]
    proposed: NDArray[np.int64]
    action: NDArray[np.str_]
    confidence: NDArray[np.float64]
    reason: NDArray[np.str_]
    nearest: NDArray[np.int64]
    image: Callable[[int], Image.Image]
    synthetic_image: Callable[[int], Image.Image]
    synthetic_labels: NDArray[np.int64]
    threshold: float | Sequence[float] | None = None
    sweep: Sequence[SweepRow] = ()
    quality: Quality | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


def _flows(review: Review) -> dict[str, Any]:
    """Ribbons from given to proposed classes, the widest first, and the boxes that they leave and enter, in pixels."""
    rows = np.flatnonzero(review.action == "change")
    pairs = Counter(zip(review.given[rows].tolist(), review.proposed[rows].tolist(), strict=True))
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
    values = np.atleast_1d(np.asarray([] if review.threshold is None else review.threshold, dtype=np.float64))
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
    """How sure the proposed and the undecided changes are, in 25 bins over 560 by 200 pixels."""
    threshold, _ = _threshold(review)
    known = np.isfinite(review.confidence) & (review.action != "keep")
    values, change = review.confidence[known], review.action[known] == "change"
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
    rows = [row for row in review.sweep if math.isfinite(row.threshold)]
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


def _quality(review: Review) -> dict[str, Any] | None:
    """What is unfit in the synthetic set, class by class."""
    quality = review.quality
    if quality is None:
        return None
    check_array("quality", quality.keep, review.synthetic_labels.shape)
    repeats = quality.duplicate_of >= 0
    table = []
    for label, name in enumerate(review.classes):
        own = review.synthetic_labels == label
        table.append(
            {
                "name": name,
                "images": int(own.sum()),
                "fit": int(quality.keep[own].sum()),
                "off": int(quality.off_class[own].sum()),
                "repeats": int(repeats[own].sum()),
                "few": label in quality.too_few,
                "like": [(review.classes[other], share) for made, other, share in quality.confused if made == label],
            }
        )
    return {
        "table": table,
        "images": len(quality.keep),
        "fit": int(quality.keep.sum()),
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
