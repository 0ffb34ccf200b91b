"""What a page shows beside the artifact: a refiner's findings in, one plain file out, and back.

Letters in shapes: N real images, M synthetic images, D features, C classes, R rows of the page, K neighbours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from synth_refine._io.atomic import write_atomic
from synth_refine._io.check import Array, InputError, check_array, float_tensor
from synth_refine._io.untrusted import open_plain
from synth_refine.labels.artifact import Artifact

MOST_BYTES = 1 << 28
MOST_ROWS = 20_000
"""Images in one page; a browser holds their texts in memory."""

KEPT_ROWS, KEPT_OF_CLASS, MOST_KEPT = 500, 20, 2000
"""Images with a kept label that a page shows: so many, or so many of each class, but never more than the last."""

REAL_ROWS, SYNTHETIC_ROWS = 4096, 32768  # of the products that a search holds at a time

T = TypeVar("T")


@dataclass(frozen=True)
class SweepRow:
    """What one threshold would do; fractions are NaN where they are not estimated."""

    threshold: float
    changed: float
    noise_after: float
    wrong_changes: float
    empty_classes: int


@dataclass(frozen=True)
class Quality:
    """Which synthetic images are usable, (M,) each but the last two, which are about classes."""

    keep: NDArray[np.bool_]
    looks_like: NDArray[np.int64]
    off_class: NDArray[np.bool_]
    duplicate_of: NDArray[np.int64]
    confused: Sequence[tuple[int, int, float]]
    too_few: Sequence[int]


@dataclass(frozen=True)
class Finding:
    """A table that the page shows in a panel of its own, such as duplicates or images that could not be read.

    Attributes:
        title: Its heading.
        text: What it means and what to do, in a sentence or two.
        columns: Headings of the columns, K.
        rows: Lines of texts, K each; may be empty.
        shows: What its button shows among the images, a value of the page's filter; none without a button.
    """

    title: str
    text: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    shows: str = ""


@dataclass(frozen=True)
class Evidence:
    """What the page shows beside the artifact.

    Attributes:
        rows: Rows of the artifact that the page shows, (R,); see `shown_rows`.
        nearest: Those, (R, K) integers in [-1, M), -1 where there is none; see `nearest_synthetic`.
        synthetic_labels: The intended class of every synthetic image, (M,).
        synthetic_ids: Its id, (M,) texts.
        threshold: Smallest confidence that changes a label, one number or those of the classes, of which the charts
            show the mean; None where the rule has no such number.
        sweep: What other thresholds would do; may be empty.
        quality: Which synthetic images are usable; None where nobody looked.
        notes: Further numbers and facts to show, by name.
        probable: The most probable class other than the given one, (R,), -1 where it is not known; None where it is
            known of none.
        odds: By how much that class is more probable than the given one, (R,), NaN where it is not known.
        findings: Tables to show besides.
        copies: Number of the group of copies that an image belongs to, (R,), 0 where it has none; None where nobody
            looked.
        classes: What the refiner knows of every class, C: estimated share of wrong labels among those given as it, as
            value, low and high, and the share of its held-out synthetic images that is classified correctly; None each
            where it is not known.
    """

    rows: NDArray[np.int64]
    nearest: NDArray[np.int64]
    synthetic_labels: NDArray[np.int64]
    synthetic_ids: Sequence[str]
    threshold: float | Sequence[float] | None = None
    sweep: Sequence[SweepRow] = ()
    quality: Quality | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    probable: NDArray[np.int64] | None = None
    odds: NDArray[np.float64] | None = None
    findings: Sequence[Finding] = ()
    copies: NDArray[np.int64] | None = None
    classes: Sequence[tuple[Sequence[float] | None, float | None]] = ()


def taken_from(kind: type[T], source: object) -> T:
    """A `SweepRow` or a `Quality` of an object that has the same attributes, such as a refiner's."""
    return kind(**{one.name: getattr(source, one.name) for one in fields(kind)})  # type: ignore[arg-type]


def second_thoughts(
    given: Array, proposed: Array, posteriors: Callable[[], Iterable[tuple[Array, Array]]] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The most probable class of each image other than its given one, and how much more probable it is.

    Args:
        given: Given labels, (N,) integers in [0, C).
        proposed: What a refiner calls the best class, (N,); negative where it does not know.
        posteriors: Gives row numbers, (n,), and probabilities of the classes, (n, C), a chunk at a time; None where
            the refiner has no probabilities.

    Returns:
        That class, (N,), -1 where it is not known, and its odds against the given one, (N,), NaN where not known.

    Example:
        >>> probs = np.array([[0.2, 0.8], [0.1, 0.9]])
        >>> second_thoughts(np.array([0, 1]), np.array([1, 1]), lambda: [(np.arange(2), probs)])
        (array([1, 0]), array([4.        , 0.11111111]))
    """
    before, best = np.asarray(given, dtype=np.int64), np.asarray(proposed, dtype=np.int64)
    probable, odds = np.where(best != before, best, -1), np.full(len(before), np.nan)
    for numbers, posterior in posteriors() if posteriors is not None else ():
        rows = torch.as_tensor(numbers).cpu().numpy()
        probs = torch.as_tensor(posterior).cpu().double().clone().numpy()
        own, places = before[rows], np.arange(len(rows))
        stays = probs[places, own]
        probs[places, own] = -1
        if probs.shape[1] > 1:
            probable[rows] = probs.argmax(axis=1)
            odds[rows] = probs.max(axis=1) / np.maximum(stays, 1e-9)
    return probable, odds


def unreadable(*sets: tuple[Sequence[str], Mapping[int, str]]) -> list[Finding]:
    """A finding about the images that could not be read, where there are some: ids of a set, and why, by row."""
    rows = [(ids[row], bad[row]) for ids, bad in sets for row in sorted(bad)]
    text = "They have no features: a real one keeps its label, a synthetic one is left out."
    return [Finding("Images that could not be read", text, ("image", "why"), rows)] if rows else []


def duplicated(lines: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Finding]:
    """A finding about copies, where there are some: what they mean, and group, id, source, label, kind, similarity."""
    text = f"{'; '.join(lines)}. Keep one of each group and remove the others (D); the list is in duplicates.csv."
    columns = ("group", "image", "lies in", "label", "copy", "similarity")
    return [Finding("Duplicates", text[:1].upper() + text[1:], columns, rows, shows="copies")] if rows else []


def stood_out(lines: Sequence[str]) -> list[Finding]:
    """A finding about classes that stand out, where there are some."""
    text = "; ".join(lines)
    return [Finding("Classes to look at", f"{text[:1].upper()}{text[1:]}. The whole table is above.")] if lines else []


def shown_rows(
    artifact: Artifact,
    proposed: Array,
    posteriors: Callable[[], Iterable[tuple[Array, Array]]] | None = None,
    copies: Mapping[int, int] | None = None,
) -> dict[str, NDArray[Any]]:
    """The `rows`, `probable`, `odds` and `copies` of an `Evidence`, by name.

    Args:
        artifact: What was decided.
        proposed: As `second_thoughts` takes it.
        posteriors: Likewise.
        copies: The group of copies of some rows, which are shown too.
    """
    copies = copies or {}
    probable, odds = second_thoughts(artifact.given, proposed, posteriors)
    rows = page_rows(artifact, probable, odds)
    more = np.setdiff1d(list(copies)[:MOST_KEPT], rows)[: MOST_ROWS - len(rows)].astype(np.int64)
    rows = np.concatenate([rows, more])
    groups = np.array([copies.get(row, 0) for row in rows.tolist()], dtype=np.int64)
    return {"rows": rows, "probable": probable[rows], "odds": odds[rows], "copies": groups}


def page_rows(artifact: Artifact, probable: NDArray[np.int64], odds: NDArray[np.float64]) -> NDArray[np.int64]:
    """The rows to look at, as many as a page holds, (R,).

    Changes come first, then what was abstained from, the surest first, then the most suspicious of the kept labels, of
    every class the same number.

    Args:
        artifact: What was decided.
        probable: As `second_thoughts` gives it; a kept label of which it is not known is not shown.
        odds: The same.
    """
    open_rows = np.flatnonzero(artifact.action != "keep")
    sure = np.nan_to_num(artifact.confidence, nan=-np.inf)
    open_rows = open_rows[np.lexsort((open_rows, -sure[open_rows], artifact.action[open_rows] != "change"))]
    kept = np.flatnonzero((artifact.action == "keep") & (probable >= 0))
    rank = np.where(np.isfinite(odds), odds, sure)[kept]  # without odds, how sure the refiner is of the other class
    kept = kept[np.lexsort((kept, -rank))]
    own = artifact.given[kept]
    in_class = np.zeros(len(kept), dtype=np.int64)  # the place of each within its class
    for label in np.unique(own):
        in_class[own == label] = np.arange((own == label).sum())
    most = min(MOST_KEPT, max(KEPT_ROWS, KEPT_OF_CLASS * artifact.num_classes), max(0, MOST_ROWS - len(open_rows)))
    some = np.sort(np.argsort(in_class, kind="stable")[:most])
    return np.concatenate([open_rows[:MOST_ROWS], kept[some]])


def nearest_synthetic(
    features: NDArray[Any], rows: NDArray[np.int64], synthetic_features: NDArray[Any], k: int = 5
) -> NDArray[np.int64]:
    """The synthetic images that are nearest to some real ones, by the cosine, the nearest first.

    Each domain is centred on its own mean, or all synthetic images would be about equally near. Only a chunk of
    products is held at a time.

    Args:
        features: Features of the real images, (N, D); rows that are not finite have no neighbours.
        rows: The real images to search for, (R,) integers in [0, N).
        synthetic_features: Features of the synthetic images, (M, D), finite.
        k: Neighbours of each.

    Returns:
        Rows of synthetic images, (R, min(k, M)); -1 where there is none.

    Example:
        >>> real, synthetic = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[9.0, 1.0], [1.0, 9.0], [8.0, 1.0]])
        >>> nearest_synthetic(real, np.array([1]), synthetic, k=2)
        array([[0, 2]])
    """
    check_array("features", features, ("N", "D"))
    check_array("synthetic_features", synthetic_features, ("M", features.shape[1]))
    best = np.full((len(rows), min(k, len(synthetic_features))), -1, dtype=np.int64)
    usable = np.flatnonzero(np.isfinite(features[rows]).all(axis=1))
    if not usable.size or not best.shape[1]:
        return best
    real_mean, mean = _mean(features), _mean(synthetic_features)
    for start in range(0, len(usable), REAL_ROWS):
        some = usable[start : start + REAL_ROWS]
        left = _directions(features[rows[some]], real_mean)
        scores, found = torch.empty(len(some), 0), torch.empty(len(some), 0, dtype=torch.int64)
        for first in range(0, len(synthetic_features), SYNTHETIC_ROWS):
            product = left @ _directions(synthetic_features[first : first + SYNTHETIC_ROWS], mean).T
            part = product.topk(min(k, product.shape[1]), dim=1)
            scores, found = torch.cat([scores, part.values], 1), torch.cat([found, part.indices + first], 1)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            scores, found = scores[:, :k], found.gather(1, order)[:, :k]
        best[some] = found.numpy()
    return best


def _mean(features: NDArray[Any]) -> torch.Tensor:
    """The mean of the finite rows, (D,)."""
    total, count = torch.zeros(features.shape[1], dtype=torch.float64), 0
    for start in range(0, len(features), SYNTHETIC_ROWS):
        chunk = np.asarray(features[start : start + SYNTHETIC_ROWS], dtype=np.float64)
        chunk = chunk[np.isfinite(chunk).all(axis=1)]
        total, count = total + torch.from_numpy(chunk.sum(axis=0)), count + len(chunk)
    return (total / max(count, 1)).float()


def _directions(features: Array, mean: torch.Tensor) -> torch.Tensor:
    return F.normalize(float_tensor(features, torch.float32, torch.device("cpu")) - mean, dim=1)


def write_evidence(path: str | os.PathLike[str], evidence: Evidence) -> None:
    """Write evidence as one JSON file, whole or not at all; `read_evidence` reads it back equal."""
    with write_atomic(path) as file:
        file.write(json.dumps(asdict(evidence), default=lambda array: array.tolist()).encode() + b"\n")


def read_evidence(path: str | os.PathLike[str]) -> Evidence:
    """Read what `write_evidence` wrote.

    Raises:
        InputError: The file is something else, or damaged.
    """
    with open_plain("evidence", path) as file:
        data = file.read(MOST_BYTES)
    try:
        content = json.loads(data)
        for name in ("rows", "nearest", "synthetic_labels"):
            content[name] = np.array(content[name], dtype=np.int64)
        content["nearest"] = content["nearest"].reshape(len(content["rows"]), -1)
        content["sweep"] = [SweepRow(**row) for row in content["sweep"]]
        if (quality := content["quality"]) is not None:
            for name in ("keep", "looks_like", "off_class", "duplicate_of"):
                quality[name] = np.array(quality[name], dtype=bool if name in ("keep", "off_class") else np.int64)
            quality["confused"] = [(int(one), int(other), float(share)) for one, other, share in quality["confused"]]
            content["quality"] = Quality(**quality)
        for name, kind in (("probable", np.int64), ("odds", np.float64), ("copies", np.int64)):
            if content.get(name) is not None:
                content[name] = np.array(content[name], dtype=kind)
        content["classes"] = [(noise, told) for noise, told in content.get("classes", ())]
        content["findings"] = [Finding(**one) for one in content.get("findings", ())]
        content["synthetic_ids"] = list(map(str, content["synthetic_ids"]))
        content["notes"] = {str(name): str(note) for name, note in content["notes"].items()}
        return Evidence(**content)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"evidence: expected what a run wrote, but {path} is damaged: {error!r:.100}") from error
