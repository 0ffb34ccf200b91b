"""A review in, its page out: one HTML file, with the thumbnails beside it where they are many."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from tqdm import tqdm

from synth_refine._io.atomic import make_folder, write_atomic
from synth_refine._io.check import InputError, check_array, check_labels
from synth_refine._io.csv import check_unique
from synth_refine.labels.audit import SAMPLE, audit_sample, strata
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
    class_rows,
)

SIDE = 192
"""Longest side of a thumbnail in pixels."""

ALONE_SIDE = 448
"""The same where a page cannot show the image file itself: in a single file, and where images lie in archives."""

NEAR_SIDE = 96
"""The same for synthetic images."""

EMBEDDED_BYTES = 4 << 20
"""Thumbnails up to this size together go into the page itself, more into files beside it."""

UNUSABLE = 12
"""Synthetic images of another class that are shown."""

CHOICES = 6
"""Classes that the audit offers at once."""

SCRIPTS = ("core.js", "gallery.js", "choose.js", "full.js", "audit.js", "files.js", "main.js")
"""The files that make up the page's one script, in this order."""


def write_report(
    review: Review,
    folder: str | os.PathLike[str],
    title: str = "Review of proposed labels",
    *,
    single_file: bool = False,
    audit: int = SAMPLE,
    say: Callable[[str], object] = lambda _: None,
) -> Path:
    """Write the page; the same review gives the same bytes.

    Many thumbnails are laid beside the page, in `thumbnails/`, under names that are their hashes, and the page comes
    last: killed at any moment, the folder holds the old page or the new one, each with all its pictures. Thumbnails do
    not wait for the disk, which takes a minute for 5,000; one that a power cut costs is written again by the next call.

    Args:
        review: What to show.
        folder: Where `report.html` goes; made if it is missing.
        title: Heading of the page.
        single_file: Put all pictures into the page, however many, so that it can be moved or sent alone.
        audit: Changes, and kept labels, that the audit asks about; see `audit_sample`.
        say: Called with the size of a single file before it is written.

    Returns:
        The path of the page.

    Raises:
        InputError: Shapes, types or ranges that do not fit.
        OSError: The folder cannot be written.
    """
    _check(review, audit)
    root = make_folder("folder", folder)
    pictures = _Pictures(root / "thumbnails", SIDE if review.folder and not single_file else ALONE_SIDE, single_file)
    data = _data(review, pictures) | _audit(review, audit, pictures)
    data["folder"] = None if single_file else _address(review.folder, root)
    unusable = _unusable(review, pictures)
    if single_file:
        size = sum(map(len, pictures.images)) * 4 // 3 / 1e6  # base64
        say(f"report.html will hold {len(pictures.images):,} pictures, about {size:.1f} MB")
    sources = pictures.finish()
    page_files = resources.files("synth_refine.review").joinpath("page")
    style = page_files.joinpath("page.css").read_text("utf-8")
    parts = "\n".join(page_files.joinpath(name).read_text("utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{parts}}})();\n'
    environment = Environment(
        loader=PackageLoader("synth_refine.review", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "count": _count, "isolated": _isolated}
    artifact = review.artifact
    counts = {"change": len(artifact.changed), "abstain": len(artifact.abstained)}
    shown = sum(kind < KEPT for kind in data["kind"])
    text = environment.get_template("page.html").render(
        title=title,
        classes=review.classes,
        notes=review.evidence.notes,
        shown=shown,
        kept=len(data["row"]) - shown,
        copied=any(data["copy"]),
        asked=len(data["audit"]),
        images=len(artifact.labels),
        counts=counts,
        flows=_flows(review),
        histogram=_histogram(review),
        sweep=_sweep(review),
        threshold=_threshold(review)[1],
        quality=_quality(review),
        class_rows=class_rows(review),
        findings=review.evidence.findings,
        unusable=[(sources[place], *rest) for place, *rest in unusable],
        data=data | {"thumbs": sources},
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script, local=not pictures.embedded or data["folder"] is not None),
    )
    page = root / "report.html"
    with write_atomic(page) as file:
        file.write(text.encode("utf-8", "replace"))  # a lone surrogate, of a file name that is not UTF-8, as "?"
    pictures.remove_others()
    return page


def _check(review: Review, audit: int) -> None:
    artifact, evidence = review.artifact, review.evidence
    check_unique("classes", review.classes)
    if len(review.classes) != artifact.num_classes:
        raise InputError(f"classes: expected {artifact.num_classes} names, got {len(review.classes)}")
    check_labels("synthetic_labels", evidence.synthetic_labels, artifact.num_classes)
    check_labels("rows", evidence.rows, len(artifact.labels))
    check_array("nearest", evidence.nearest, (len(evidence.rows), "K"))
    for name in ("probable", "odds", "copies"):
        if (values := getattr(evidence, name)) is not None:
            check_array(name, values, (len(evidence.rows),))
    ranges = [("nearest", evidence.nearest, len(evidence.synthetic_labels) - 1)]
    ranges += [] if evidence.probable is None else [("probable", evidence.probable, artifact.num_classes - 1)]
    for name, values, most in ranges:
        outside = (values < -1) | (values > most)
        if bool(outside.any()):
            raise InputError(f"{name}: expected numbers from -1 to {most}, got {values[outside][0]}")
    if audit < 0:
        raise InputError(f"audit: expected a number of images, 0 or more, got {audit}")


class _Pictures:
    """Thumbnails: in the page while they are small together, in files beside it otherwise."""

    def __init__(self, folder: Path, side: int, single_file: bool) -> None:
        self.folder, self.side, self.single_file = folder, side, single_file
        self.images: list[bytes] = []
        self.problems: dict[int, str] = {}
        self.embedded = True
        self._names: list[str] = []
        self._real: dict[int, int] = {}

    def add(self, picture: Image.Image, side: int) -> int:
        """The number of a new thumbnail."""
        small = picture.convert("RGB")
        small.thumbnail((side, side))
        file = BytesIO()
        small.save(file, "WEBP", quality=85, method=2)  # twice as fast as the default, 5 % larger
        self.images.append(file.getvalue())
        return len(self.images) - 1

    def real(self, review: Review, row: int) -> int:
        """The number of a real image's thumbnail, made once; -1 where it cannot be read, and `problems` says why."""
        if row not in self._real:
            try:
                self._real[row] = self.add(review.image(row), self.side)
            except (InputError, OSError) as error:
                self._real[row], self.problems[row] = -1, str(error)
        return self._real[row]

    def finish(self) -> list[str]:
        """Where the page finds each thumbnail."""
        self.embedded = self.single_file or sum(map(len, self.images)) <= EMBEDDED_BYTES
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


REMOVE = -2
"""What the page has in place of a proposed class where the image seems to show none."""

CHANGE, ABSTAIN, KEPT = 0, 1, 2
"""What a row of the page is about: a proposed change, a label left to a person, a suspicious one that is kept."""


def _data(review: Review, pictures: _Pictures) -> dict[str, Any]:
    """What the script works on: one list per column, one entry per shown row."""
    artifact, evidence = review.artifact, review.evidence
    rows = evidence.rows
    action = artifact.action[rows]
    kind = np.where(action == "change", CHANGE, np.where(action == "keep", KEPT, ABSTAIN))
    order = np.argsort(kind, kind="stable")
    rows, kind, nearest = rows[order], kind[order], evidence.nearest[order]
    likely = None if evidence.probable is None else evidence.probable[order]
    proposed = np.where(kind == CHANGE, artifact.labels[rows], -1 if likely is None else likely)
    proposed[np.isin(rows, artifact.proposed_removals)] = REMOVE
    odds = np.full(len(rows), np.nan) if evidence.odds is None else evidence.odds[order]
    reasons = {text: number for number, text in enumerate(dict.fromkeys(artifact.reason[rows].tolist()))}
    thumbs = [pictures.real(review, row) for row in tqdm(rows.tolist(), "thumbnails", disable=None, leave=False)]
    near_places: dict[int, int] = {}
    for row in np.unique(nearest[nearest >= 0]).tolist():
        try:
            near_places[row] = pictures.add(review.synthetic_image(row), NEAR_SIDE)
        except (InputError, OSError):
            near_places[row] = -1
    number = {row: place for place, row in enumerate(near_places)}
    columns = [getattr(artifact, name).tolist() for name in ("given", "labels", "action")]
    about = json.dumps([list(review.classes), list(artifact.names), *columns])
    ids = artifact.names
    return {
        "key": hashlib.sha256(about.encode()).hexdigest()[:32],
        "classes": list(review.classes),
        "row": rows.tolist(),
        "id": [ids[row] for row in rows.tolist()],
        "given": artifact.given[rows].tolist(),
        "proposed": proposed.tolist(),
        "kind": kind.tolist(),
        "copy": [0] * len(rows) if evidence.copies is None else evidence.copies[order].tolist(),
        "confidence": [_number(value) for value in np.where(kind == KEPT, np.nan, artifact.confidence[rows]).tolist()],
        "odds": [float(f"{value:.4g}") if np.isfinite(value) else None for value in odds.tolist()],
        "reasons": list(reasons),
        "reason": [reasons[text] for text in artifact.reason[rows].tolist()],
        "thumb": thumbs,
        "problems": {
            place: pictures.problems[row] for place, row in enumerate(rows.tolist()) if row in pictures.problems
        },
        "near": [[number[one] for one in near if one >= 0] for near in nearest.tolist()],
        "synthetic": list(near_places.values()),
        "synthetic_class": [int(evidence.synthetic_labels[row]) for row in near_places],
    }


def _audit(review: Review, count: int, pictures: _Pictures) -> dict[str, Any]:
    """The images that the audit asks about, with the classes that it offers for each in a fixed random order."""
    artifact, ids = review.artifact, review.artifact.names
    known = review.evidence.probable
    likely = {} if known is None else dict(zip(review.evidence.rows.tolist(), known.tolist(), strict=True))
    # Classes that are confused with the given one come before others, or what is proposed would stand out.
    moves = np.zeros((artifact.num_classes, artifact.num_classes), dtype=np.int64)
    np.add.at(moves, (artifact.given, artifact.labels), 1)
    moves = moves + moves.T
    found = []
    for row in audit_sample(artifact, count).tolist():
        given, proposed = int(artifact.given[row]), int(artifact.labels[row])
        random = np.random.default_rng(row)
        near = [likely.get(row, -1), *np.lexsort((random.permutation(artifact.num_classes), -moves[given])).tolist()]
        offered = list(dict.fromkeys([given, proposed, *(one for one in near if one >= 0)]))[:CHOICES]
        found.append(
            {"row": row, "id": ids[row], "given": given, "proposed": proposed}
            | {"thumb": pictures.real(review, row), "offered": random.permutation(offered).tolist()}
        )
    return {"audit": found, "strata": {name: len(rows) for name, rows in strata(artifact).items()}}


def _address(folder: Path | None, root: Path) -> str | None:
    """Where the page finds the image files, as a relative URL that ends in a slash."""
    return None if folder is None else quote(os.path.relpath(folder, root)) + "/"


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


def _policy(style: str, script: str, local: bool) -> str:
    """The content security policy: this style, this script, these pictures, and nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    images = "data: 'self' file:" if local else "data:"  # 'self' is no file: to every browser
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; img-src {images}; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
