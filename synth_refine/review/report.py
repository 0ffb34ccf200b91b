"""A review in, its page out: one HTML file, with the thumbnails beside it where they are many."""

from __future__ import annotations

import base64
import hashlib
import json
import os
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

from synth_refine._io.atomic import make_folder, write_atomic
from synth_refine._io.check import InputError, check_array, check_labels
from synth_refine._io.csv import check_unique
from synth_refine.labels.artifact import Artifact
from synth_refine.review.charts import (
    Review,
    _count,
    _flows,
    _histogram,
    _isolated,
    _number,
    _percent,
    _quality,
    _sweep,
    _threshold,
)

SIDE = 192
"""Longest side of a thumbnail in pixels."""

NEAR_SIDE = 96
"""The same for synthetic images."""

EMBEDDED_BYTES = 4 << 20
"""Thumbnails up to this size together go into the page itself, more into files beside it."""

MOST_ROWS = 20_000
"""Images in one page; a browser holds their texts in memory."""

UNUSABLE = 12
"""Synthetic images of another class that are shown."""


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
    rows = page_rows(review.artifact)
    pictures = _Pictures(root / "thumbnails")
    data = _data(review, rows, pictures)
    unusable = _unusable(review, pictures)
    sources = pictures.finish()
    page_files = resources.files("synth_refine.review").joinpath("page")
    style, script = (page_files.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=PackageLoader("synth_refine.review", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "count": _count, "isolated": _isolated}
    text = environment.get_template("page.html").render(
        title=title,
        classes=review.classes,
        notes=review.evidence.notes,
        shown=len(rows),
        images=len(review.artifact.labels),
        counts={action: int((review.artifact.action == action).sum()) for action in ("change", "abstain")},
        flows=_flows(review),
        histogram=_histogram(review),
        sweep=_sweep(review),
        threshold=_threshold(review)[1],
        quality=_quality(review),
        unusable=[(sources[place], *rest) for place, *rest in unusable],
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


def _check(review: Review) -> None:
    artifact, evidence = review.artifact, review.evidence
    check_unique("classes", review.classes)
    if len(review.classes) != artifact.num_classes:
        raise InputError(f"classes: expected {artifact.num_classes} names, got {len(review.classes)}")
    check_labels("synthetic_labels", evidence.synthetic_labels, artifact.num_classes)
    check_labels("rows", evidence.rows, len(artifact.labels))
    check_array("nearest", evidence.nearest, (len(evidence.rows), "K"))
    most = len(evidence.synthetic_labels) - 1
    outside = (evidence.nearest < -1) | (evidence.nearest > most)
    if bool(outside.any()):
        raise InputError(f"nearest: expected rows from -1 to {most}, got {evidence.nearest[outside][0]}")


def page_rows(artifact: Artifact) -> NDArray[np.int64]:
    """The rows to look at: changes first, then what was abstained from, the surest first, as many as a page holds."""
    rows = np.flatnonzero(artifact.action != "keep")
    sure = np.nan_to_num(artifact.confidence[rows], nan=-np.inf)
    return rows[np.lexsort((rows, -sure, artifact.action[rows] != "change"))][:MOST_ROWS]


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
    reasons = {text: number for number, text in enumerate(dict.fromkeys(review.artifact.reason[rows].tolist()))}
    near_places: dict[int, int] = {}
    thumbs, problems = [], {}
    for place, row in enumerate(tqdm(rows.tolist(), "thumbnails", disable=None, leave=False)):
        try:
            thumbs.append(pictures.add(review.image(row), SIDE))
        except (InputError, OSError) as error:
            thumbs.append(-1)
            problems[place] = str(error)
    artifact, evidence = review.artifact, review.evidence
    nearest = np.full((len(artifact.labels), evidence.nearest.shape[1]), -1, dtype=np.int64)
    nearest[evidence.rows] = evidence.nearest
    ids, wanted = artifact.names, np.unique(nearest[rows])
    for row in wanted[wanted >= 0].tolist():
        try:
            near_places[row] = pictures.add(review.synthetic_image(row), NEAR_SIDE)
        except (InputError, OSError):
            near_places[row] = -1
    number = {row: place for place, row in enumerate(near_places)}
    about = json.dumps(
        [
            list(review.classes),
            list(ids),
            *(getattr(artifact, name).tolist() for name in ("given", "labels", "action")),
        ]
    )
    return {
        "key": hashlib.sha256(about.encode()).hexdigest()[:32],
        "classes": list(review.classes),
        "row": rows.tolist(),
        "id": [ids[row] for row in rows.tolist()],
        "given": artifact.given[rows].tolist(),
        "proposed": artifact.labels[rows].tolist(),
        "change": (artifact.action[rows] == "change").astype(int).tolist(),
        "confidence": [_number(value) for value in artifact.confidence[rows].tolist()],
        "reasons": list(reasons),
        "reason": [reasons[text] for text in artifact.reason[rows].tolist()],
        "thumb": thumbs,
        "problems": problems,
        "near": [[number[one] for one in near if one >= 0] for near in nearest[rows].tolist()],
        "synthetic": list(near_places.values()),
        "synthetic_class": [int(evidence.synthetic_labels[row]) for row in near_places],
    }


def _unusable(review: Review, pictures: _Pictures) -> list[tuple[int, str, str]]:
    """Synthetic images that look like another class, evenly chosen: thumbnail, intended class, looks like."""
    quality = review.evidence.quality
    if quality is None:
        return []
    rows = np.flatnonzero(quality.off_class)
    found = []
    for row in rows[np.unique(np.linspace(0, len(rows) - 1, UNUSABLE).astype(int))].tolist() if len(rows) else []:
        names = [review.classes[int(one[row])] for one in (review.evidence.synthetic_labels, quality.looks_like)]
        try:
            found.append((pictures.add(review.synthetic_image(row), NEAR_SIDE), names[0], names[1]))
        except (InputError, OSError):
            continue
    return found


def _policy(style: str, script: str, embedded: bool) -> str:
    """The content security policy: this style, this script, these pictures, and nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    images = "data:" if embedded else "data: 'self' file:"  # 'self' is no file: to every browser
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; img-src {images}; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
