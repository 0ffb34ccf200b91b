"""What people say of a random sample of labels in, how many are wrong before and after out.

The sample is stratified: labels that a refinement changes, and labels that it leaves. A person names the right class of
each image without being told what was given and what was proposed, so that the answers say nothing about the refiner
but what is true, and the estimates are unbiased whatever the refiner believes.

Letters in shapes: N images, A images of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest  # type: ignore[import-untyped]

from synth_refine.labels.artifact import Artifact

SAMPLE = 50
"""Images of each stratum that a page asks about."""

NO_LABEL = -1
"""An answer: the image shows none of the classes."""


def strata(artifact: Artifact) -> dict[str, NDArray[np.int64]]:
    """The rows whose label is changed and those whose label stays; images that cannot be scored are in neither."""
    lost = (artifact.action == "abstain") & ~np.isfinite(artifact.confidence)
    if not np.isfinite(artifact.confidence[artifact.action != "keep"]).any():
        lost[:] = False  # nobody kept scores
    changed = artifact.given != artifact.labels
    return {"changed": np.flatnonzero(changed & ~lost), "kept": np.flatnonzero(~changed & ~lost)}


def audit_sample(artifact: Artifact, count: int = SAMPLE) -> NDArray[np.int64]:
    """Rows to ask a person about, in the order to ask in: `count` of each stratum, or all where it has fewer, (A,).

    The seed is the hash of the refined labels, so the sample of a refinement is the same wherever it is drawn.
    """
    random = np.random.default_rng(int(artifact.run["labels"]["sha256"][:16], 16))
    chosen = [random.permutation(rows)[:count] for rows in strata(artifact).values()]
    return random.permutation(np.concatenate(chosen))


def audit(artifact: Artifact, reviewed: Artifact, answers: Mapping[int, int], unclear: int = 0) -> dict[str, Any]:
    """What the answers say, for run.json and for people.

    Args:
        artifact: The refinement that the sample was drawn from.
        reviewed: What a review made of it.
        answers: The right class by row, or `NO_LABEL`.
        unclear: Images of the sample that nobody can tell.

    Returns:
        sample: Size of each stratum, and how many of its images were answered. unclear: as given. And the share of all
        images that carry a wrong label, each [estimate, low, high] at 95 %, or None where a stratum has no answer:
        before, as given; proposed, with every proposed change; after, with the decisions of the review. An image that
        a review removes carries no label any more.
    """
    sizes, seen = {}, {}
    for name, rows in strata(artifact).items():
        sizes[name], seen[name] = len(rows), [row for row in rows.tolist() if row in answers]
    gone = reviewed.action == "remove"
    wrong = {
        "before": {row: int(artifact.given[row]) != right for row, right in answers.items()},
        "proposed": {row: int(artifact.labels[row]) != right for row, right in answers.items()},
        "after": {row: int(reviewed.labels[row]) != right and not gone[row] for row, right in answers.items()},
    }
    shares = {
        name: wrong_share([(sizes[one], sum(found[row] for row in seen[one]), len(seen[one])) for one in sizes])
        for name, found in wrong.items()
    }
    return {"sample": {name: [sizes[name], len(seen[name])] for name in sizes}, "unclear": unclear, **shares}


def wrong_share(counts: Sequence[tuple[int, int, int]]) -> list[float] | None:
    """The share of wrong labels in all strata together, with an interval of 95 %.

    Each stratum has Wilson's interval, narrowed as the sample comes to hold all of the stratum; their distances from
    the estimates are combined by the method of variance estimates recovery (Zou and Donner, Statistics in Medicine
    2008).

    Args:
        counts: Of each stratum: images in it, wrong ones among those seen, those seen.

    Returns:
        Estimate, low and high; None where a stratum that has images has no answer.

    Example:
        >>> [round(value, 3) for value in wrong_share([(900, 2, 50), (100, 25, 50)])]
        [0.086, 0.059, 0.169]
    """
    counts = [one for one in counts if one[0]]
    if not counts or not all(seen for _, _, seen in counts):
        return None
    total, value, below, above = sum(size for size, _, _ in counts), 0.0, 0.0, 0.0
    for size, wrong, seen in counts:
        share, weight = wrong / seen, size / total
        interval = binomtest(wrong, seen).proportion_ci(0.95, "wilson")
        left = (size - seen) / max(size - 1, 1)  # finite population: nothing is uncertain once all were seen
        value += weight * share
        below += weight**2 * left * (share - interval.low) ** 2
        above += weight**2 * left * (interval.high - share) ** 2
    return [value, max(0.0, value - math.sqrt(below)), min(1.0, value + math.sqrt(above))]
