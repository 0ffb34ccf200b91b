"""A finished run in, its numbers and what people read of them out."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from synth_refine._io.check import InputError
from synth_refine._io.store import Store
from synth_refine.labels.artifact import Artifact
from synth_refine.refine.estimates import Estimate
from synth_refine.refine.result import Refinement

FLOWS = 8  # commonest changes that are listed
NOISIEST = 3  # classes that are listed as those to look at first


@dataclass(frozen=True)
class Summary:
    """A finished run in numbers; what is not estimated is None, as all estimates are with the paper's rule."""

    artifact: str  # its folder
    report: str  # the page
    count: int  # images
    changed: int  # labels that were changed
    abstained: int  # labels that somebody should look at
    bad: int  # images that could not be decoded
    synthetic: int  # synthetic images that were used
    warnings: tuple[str, ...]  # doubts
    synthetic_accuracy: float | None = None  # share of held-out synthetic images that are classified correctly
    noise_before: Estimate | None = None  # share of the given labels that are wrong
    noise_after: Estimate | None = None  # share of the refined labels
    wrong_changes: Estimate | None = None  # share of the changes
    health: Estimate | None = None  # share of the given labels that are right
    classes: tuple[str, ...] = ()  # what stands out in classes.json
    no_class: int | None = None  # images that are proposed for removal, since they seem to show none of the classes
    copies: Mapping[str, int] = field(default_factory=dict)  # groups, conflicting ones, images that other sources share

    def lines(self) -> dict[str, str]:
        """All of it as text for people."""
        found = {}
        for name, value in vars(self).items():
            text = f"{value:.3f}" if isinstance(value, float) else str(value)
            text = "; ".join(value) or "none" if isinstance(value, tuple) else text
            found[name.replace("_", " ")] = "not estimated" if value is None else text
        return found


def summarized(out: Path, artifact: Artifact, result: Refinement, bad: int, synthetic: int) -> Summary:
    """The numbers of a run: of so many images that could not be decoded, by so many synthetic images."""
    known = result.diagnostics
    estimates: dict[str, Any] = {**estimates_of(known)}
    return Summary(
        artifact=str(out / "refined"),
        report=str(out / "report" / "report.html"),
        count=len(artifact.labels),
        changed=len(artifact.changed),
        abstained=len(artifact.abstained),
        bad=bad,
        synthetic=synthetic,
        warnings=tuple(known.warnings),
        no_class=None if result.no_class is None else len(artifact.proposed_removals),
        synthetic_accuracy=None if math.isnan(accuracy := getattr(known, "synthetic_accuracy", math.nan)) else accuracy,
        **estimates,
    )


def read_back(known: Mapping[str, Any]) -> Summary:
    """The summary of a finished run from what its summary.json holds."""
    names = ("noise_before", "noise_after", "wrong_changes", "health")
    estimates = {name: Estimate(**one) if one and name in names else one for name, one in known.items()}
    return Summary(**estimates | {name: tuple(known.get(name, ())) for name in ("warnings", "classes")})


def estimates_of(known: object) -> dict[str, Estimate | None]:
    """How many labels are wrong before and after, and how many changes; None where that is not estimated."""
    estimates = getattr(known, "estimates", None)
    names = {"before": "noise_before", "after": "noise_after", "wrong_changes": "wrong_changes"}
    found = {} if estimates is None else vars(estimates)
    return {names[name]: one if np.isfinite(one.value) else None for name, one in found.items()}


def copies_lines(copies: Mapping[str, int]) -> list[str]:
    """What a run says of copies, with the most urgent first; nothing where there are none."""
    lines = []
    if test := copies.get("test"):
        lines.append(f"leakage: {test:,} test images are copies of given images")
    if synthetic := copies.get("synthetic"):
        lines.append(f"{synthetic:,} synthetic images are copies of given images, whose labels may be wrong")
    if groups := copies.get("groups"):
        lines.append(f"{groups:,} groups of copies, {copies['conflicting']:,} of them with different labels")
    return lines


def findings(summary: Summary, artifact: Artifact) -> list[str]:
    """What a run found and what to look at first, in at most 20 lines, for any number of classes."""
    names = artifact.classes or list(map(str, range(artifact.num_classes)))
    lines = [f"{summary.count:,} images of {len(names)} classes, {summary.synthetic:,} synthetic images"]
    if summary.bad:
        lines.append(f"{summary.bad:,} images could not be decoded and keep their label: see bad.csv")
    if copies := copies_lines(summary.copies):
        lines.append(f"{'; '.join(copies)}: see duplicates.csv")
    if summary.synthetic_accuracy is not None:
        lines.append(f"{summary.synthetic_accuracy:.0%} of the held-out synthetic images are classified correctly")
    if summary.noise_before and summary.noise_after:
        before, after = summary.noise_before, summary.noise_after
        lines.append(f"wrong labels, estimated: {_percent(before)} as given, {_percent(after)} with the changes")
    lines += summary.classes
    wrong = f", of which {_percent(summary.wrong_changes)} are wrong, estimated" if summary.wrong_changes else ""
    lines.append(f"{summary.changed:,} labels change{wrong}; {summary.abstained:,} more ask for a look")
    if summary.no_class:
        lines.append(f"{summary.no_class:,} of these seem to show none of the classes; the page can remove them (D)")
    rows = artifact.changed
    pairs = Counter(zip(artifact.given[rows].tolist(), artifact.labels[rows].tolist(), strict=True))
    lines += [f"  {names[old]} -> {names[new]}: {count:,}" for (old, new), count in pairs.most_common(FLOWS)]
    if len(rows):
        sizes = np.bincount(artifact.given, minlength=len(names))
        changed = np.bincount(artifact.given[rows], minlength=len(names))
        worst = np.argsort(-changed / np.maximum(sizes, 1), kind="stable")[:NOISIEST]
        shares = (f"{names[one]} ({changed[one]:,} of {sizes[one]:,} change)" for one in worst if changed[one])
        lines.append(f"look first at {', '.join(shares)}")
    return lines


@dataclass(frozen=True)
class Condition:
    """What a gate asks of a finished run."""

    name: str  # noise, no_class or leakage
    most: float  # a share, or a number of images
    value: float | None  # what was found; None where nobody looked, and then it does not hold
    holds: bool

    def __str__(self) -> str:
        found = "not known" if self.value is None else f"{self.value:.4g}"
        return f"{'ok' if self.holds else 'FAILED'}: {self.name} {found}, at most {self.most:g}"


def gate(
    folder: str | os.PathLike[str],
    max_noise: float | None = None,
    max_no_class: float | None = None,
    no_leakage: bool = False,
) -> list[Condition]:
    """Whether a finished run found the data set good enough; a condition of which nothing is known does not hold.

    Args:
        folder: What `run` wrote.
        max_noise: Largest estimated share of wrong labels among the given ones; None asks for none.
        max_no_class: Largest share of images that are proposed for removal because they show none of the classes.
        no_leakage: Whether no test image may be a copy of a given one.

    Raises:
        InputError: The folder holds no finished run.
    """
    root = Path(folder)
    if Store(root, 0).done("summary.json") is None:
        raise InputError(
            f"result: expected the folder of a finished run, but {root / 'summary.json'} is missing or damaged"
        )
    summary = read_back(json.loads((root / "summary.json").read_bytes()))
    share = None if summary.no_class is None else summary.no_class / max(summary.count, 1)
    copies = summary.copies.get("test")
    noise = summary.noise_before
    asked = {
        "noise": (max_noise, None if noise is None else noise.value),
        "no_class": (max_no_class, share),
        "leakage": (0 if no_leakage else None, copies),
    }
    return [
        Condition(name, most, value, value is not None and value <= most)
        for name, (most, value) in asked.items()
        if most is not None
    ]


def _percent(one: Estimate) -> str:
    return f"{one.value:.1%} ({one.low:.1%} to {one.high:.1%})"
