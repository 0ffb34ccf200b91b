"""The review page: what a refinement proposes, for people to accept, reject or correct, image by image.

One HTML file without a server and without remote parts. Labels, file names and class names are untrusted text: Jinja2
escapes them, the data is JSON that no tag can end, and the page's content security policy runs no script but its own.

Letters in shapes: N real images, M synthetic images, K nearest synthetic images, C classes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from synth_refine._check import InputError, check_array, check_labels
from synth_refine.artifact import Artifact, WrongBase, WrongIds, record
from synth_refine.decide import SweepRow
from synth_refine.files import file_hash, make_folder, write_atomic
from synth_refine.labels import check_unique, read_csv
from synth_refine.prototypes import Quality

SIDE = 192
"""Longest side of a thumbnail in pixels."""
NEAR_SIDE = 96
"""The same for synthetic images."""
EMBEDDED_BYTES = 4 << 20
"""Thumbnails up to this size together go into the page itself, more into files beside it."""
MOST_ROWS = 20_000
"""Images in one page; a browser holds their texts in memory."""
FLOWS, BOXES = 100, 24
"""Pairs of classes that are drawn, and classes on either side; the other pairs are counted."""
UNFIT = 12
"""Unfit synthetic images that are shown."""
COLUMNS = ("id", "given", "decision", "label")
"""Of decisions.csv."""


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


def write_report(review: Review, folder: str | os.PathLike[str], title: str = "Review of proposed labels") -> Path:
    """Write the page; the same review gives the same bytes.

    Many thumbnails are laid beside the page, in `thumbnails/`, under names that are their hashes, and the page comes
    last: killed at any moment, the folder holds the old page or the new one, each with all its pictures. Thumbnails do
    not wait for the disk, which takes a minute for 5,000; one that a power cut costs is written again by the next call.

    Args:
        review: What to show.
        folder: Where `report.html` goes; made if it is missing.
        title: Heading of the page.

    Returns:
        The path of the page.

    Raises:
        InputError: Shapes, types or ranges that do not fit.
        OSError: The folder cannot be written.
    """
    _check(review)
    root = make_folder("folder", folder)
    rows = _rows(review)
    pictures = _Pictures(root / "thumbnails")
    data = _data(review, rows, pictures)
    unfit = _unfit(review, pictures)
    sources = pictures.finish()
    page_files = resources.files("synth_refine").joinpath("page")
    style, script = (page_files.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=PackageLoader("synth_refine", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "count": _count}
    text = environment.get_template("page.html").render(
        title=title,
        review=review,
        shown=len(rows),
        counts={action: int((review.action == action).sum()) for action in ("keep", "change", "abstain")},
        flows=_flows(review),
        histogram=_histogram(review),
        sweep=_sweep(review),
        threshold=_threshold(review)[1],
        quality=_quality(review),
        unfit=[(sources[place], *rest) for place, *rest in unfit],
        data=data | {"thumbs": sources},
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script, embedded=pictures.embedded),
    )
    page = root / "report.html"
    with write_atomic(page) as file:
        file.write(text.encode("utf-8", "replace"))  # a lone surrogate, of a file name that is not UTF-8, as "?"
    pictures.remove_others()
    return page


def decided(artifact: Artifact, decisions: str | os.PathLike[str], classes: Sequence[str] | None = None) -> Artifact:
    """The artifact that people left of a refinement: what they accepted or corrected is changed, and nothing else.

    Args:
        artifact: The artifact that the page showed.
        decisions: The file that the page exports: id, given, decision (accept, reject or correct), label.
        classes: Class names, (C,), in the order of their labels; by default those that the artifact's settings hold, or
            else the labels' numbers.

    Returns:
        An artifact of the same given labels. Accepted changes are in it as they were, corrected ones with the label
        that was chosen. Changes that nobody decided on keep the given label and are marked `abstain`.

    Raises:
        WrongIds: An id that is not the artifact's.
        WrongBase: A given or accepted label that is not the artifact's: the decisions are about another refinement.
        InputError: No such file, or another kind of file, or an unknown decision or class.
    """
    table = read_csv("decisions", decisions)
    if missing := [name for name in COLUMNS if name not in table]:
        raise InputError(f"decisions: expected the columns {', '.join(COLUMNS)} in {decisions}, got no {missing[0]}")
    if classes is None:
        known = artifact.run.get("settings", {}).get("classes")
        classes = list(map(str, known if isinstance(known, list) else range(artifact.num_classes)))
    if len(classes) != artifact.num_classes:
        raise InputError(f"classes: expected {artifact.num_classes} names, got {len(classes)}")
    check_unique("classes", classes)
    check_unique(f"decisions: id in {decisions}", table["id"])
    own = artifact.ids if artifact.ids is not None else list(map(str, range(len(artifact.labels))))
    row_of, class_of = {one: row for row, one in enumerate(own)}, {name: number for number, name in enumerate(classes)}
    given = artifact.given.astype(np.int64)
    labels, reason = given.copy(), artifact.reason.astype(object)
    undecided = artifact.action != "keep"
    for one, old, decision, name in zip(*(table[column] for column in COLUMNS), strict=True):
        if one not in row_of:
            raise WrongIds(f"decisions: expected ids of the artifact, got {one!r}")
        row = row_of[one]
        for cell in (old, name):
            if cell not in class_of:
                raise InputError(f"decisions: expected class names for {one!r}, got {cell!r}")
        label = class_of[name]
        expected = {"accept": int(artifact.labels[row]), "reject": int(given[row]), "correct": label}
        if decision not in expected:
            raise InputError(f"decisions: expected accept, reject or correct for {one!r}, got {decision!r}")
        if class_of[old] != given[row] or expected[decision] != label:
            raise WrongBase(
                f"decisions: expected {decision} of {classes[expected[decision]]!r} for {one!r}, given as "
                f"{classes[int(given[row])]!r}, got {name!r}, given as {old!r}: they are about another refinement"
            )
        labels[row], undecided[row] = label, False
        if decision == "correct":
            reason[row] = "corrected by hand"
    return record(
        artifact.given,
        labels,
        num_classes=artifact.num_classes,
        ids=artifact.ids,
        abstained=undecided,
        confidence=artifact.confidence,
        margin=artifact.margin,
        reason=reason.astype(np.str_),
        inputs={**artifact.run["inputs"], "decisions": file_hash(decisions)},
        settings=artifact.run.get("settings", {}),
    )


# ---- input ----


def _check(review: Review) -> None:
    classes, count = len(review.classes), len(review.ids)
    check_unique("classes", review.classes)
    check_unique("ids", review.ids)
    for name in ("given", "proposed"):
        check_labels(name, getattr(review, name), classes)
    check_labels("synthetic_labels", review.synthetic_labels, classes)
    for name in ("given", "proposed", "action", "confidence", "reason"):
        check_array(name, getattr(review, name), (count,))
    check_array("nearest", review.nearest, (count, "K"))
    most = len(review.synthetic_labels) - 1
    outside = (review.nearest < -1) | (review.nearest > most)
    if bool(outside.any()):
        raise InputError(f"nearest: expected rows from -1 to {most}, got {review.nearest[outside][0]}")
    if other := set(np.unique(review.action).tolist()) - {"keep", "change", "abstain"}:
        raise InputError(f"action: expected keep, change or abstain, got {min(other)!r}")
    wrong = np.flatnonzero((review.given != review.proposed) != (review.action == "change"))
    if wrong.size:
        shown = f"{review.action[wrong[0]]} in row {wrong[0]}"
        raise InputError(f"action: expected change exactly where the label differs, got {shown}")


def _rows(review: Review) -> NDArray[np.int64]:
    """The rows to look at: changes first, then undecided ones, the surest first, as many as a page holds."""
    rows = np.flatnonzero(review.action != "keep")
    sure = np.nan_to_num(review.confidence[rows], nan=-np.inf)
    return rows[np.lexsort((rows, -sure, review.action[rows] != "change"))][:MOST_ROWS]


# ---- pictures ----


class _Pictures:
    """Thumbnails: in the page while they are small together, in files beside it otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: list[bytes] = []
        self.embedded = True
        self._names: list[str] = []

    def add(self, picture: Image.Image, side: int) -> int:
        """The number of a new thumbnail."""
        small = picture.convert("RGB")
        small.thumbnail((side, side))
        file = BytesIO()
        small.save(file, "WEBP", quality=85, method=2)  # twice as fast as the default, 5 % larger
        self.images.append(file.getvalue())
        return len(self.images) - 1

    def finish(self) -> list[str]:
        """Where the page finds each thumbnail."""
        self.embedded = sum(map(len, self.images)) <= EMBEDDED_BYTES
        if self.embedded:
            return ["data:image/webp;base64," + base64.b64encode(data).decode() for data in self.images]
        self.folder.mkdir(exist_ok=True)
        self._names = [hashlib.sha256(data).hexdigest()[:32] + ".webp" for data in self.images]
        for name, data in zip(self._names, self.images, strict=True):
            path = self.folder / name
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)
        return [f"{self.folder.name}/{name}" for name in self._names]

    def remove_others(self) -> None:
        """Remove the thumbnails of earlier pages."""
        used = set(self._names)
        for path in self.folder.glob("*.webp"):
            if path.name not in used and len(path.stem) == 32:
                path.unlink()


def _data(review: Review, rows: NDArray[np.int64], pictures: _Pictures) -> dict[str, Any]:
    """What the script works on: one list per column, one entry per shown row."""
    reasons = {text: number for number, text in enumerate(dict.fromkeys(review.reason[rows].tolist()))}
    near_places: dict[int, int] = {}
    thumbs, problems = [], {}
    for place, row in enumerate(tqdm(rows.tolist(), "thumbnails", disable=None, leave=False)):
        try:
            thumbs.append(pictures.add(review.image(row), SIDE))
        except (InputError, OSError) as error:
            thumbs.append(-1)
            problems[place] = str(error)
    wanted = np.unique(review.nearest[rows])
    for row in wanted[wanted >= 0].tolist():
        try:
            near_places[row] = pictures.add(review.synthetic_image(row), NEAR_SIDE)
        except (InputError, OSError):
            near_places[row] = -1
    number = {row: place for place, row in enumerate(near_places)}
    about = json.dumps(
        [
            list(review.classes),
            list(review.ids),
            *(getattr(review, name).tolist() for name in ("given", "proposed", "action")),
        ]
    )
    return {
        "key": hashlib.sha256(about.encode()).hexdigest()[:32],
        "classes": list(review.classes),
        "row": rows.tolist(),
        "id": [review.ids[row] for row in rows.tolist()],
        "given": review.given[rows].tolist(),
        "proposed": review.proposed[rows].tolist(),
        "change": (review.action[rows] == "change").astype(int).tolist(),
        "confidence": [_number(value) for value in review.confidence[rows].tolist()],
        "reasons": list(reasons),
        "reason": [reasons[text] for text in review.reason[rows].tolist()],
        "thumb": thumbs,
        "problems": problems,
        "near": [[number[one] for one in near if one >= 0] for near in review.nearest[rows].tolist()],
        "synthetic": list(near_places.values()),
        "synthetic_class": [int(review.synthetic_labels[row]) for row in near_places],
    }


def _unfit(review: Review, pictures: _Pictures) -> list[tuple[int, str, str]]:
    """Synthetic images that look like another class, evenly chosen: thumbnail, made for, looks like."""
    if review.quality is None:
        return []
    rows = np.flatnonzero(review.quality.off_class)
    found = []
    for row in rows[np.unique(np.linspace(0, len(rows) - 1, UNFIT).astype(int))].tolist() if len(rows) else []:
        names = [review.classes[int(one[row])] for one in (review.synthetic_labels, review.quality.looks_like)]
        try:
            found.append((pictures.add(review.synthetic_image(row), NEAR_SIDE), names[0], names[1]))
        except (InputError, OSError):
            continue
    return found


# ---- charts: plain numbers that the template draws ----


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


# ---- text ----


def _policy(style: str, script: str, embedded: bool) -> str:
    """The content security policy: this style, this script, these pictures, and nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    images = "data:" if embedded else "data: 'self' file:"  # 'self' is no file: to every browser
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; img-src {images}; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "unknown"


def _count(value: int) -> str:
    return f"{value:,}"
