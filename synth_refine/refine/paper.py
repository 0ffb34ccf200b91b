"""The relabelling rule of "Noisy Label Refinement with Semantically Reliable Synthetic Images".

Li, Mao, Matsui, ICIP 2025, https://arxiv.org/abs/2509.04298. Letters in shapes: N images, D features, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from synth_refine._io.check import (
    Array,
    ArrayT,
    InputError,
    check_array,
    check_floating,
    check_turned,
    float_tensor,
)
from synth_refine.refine.result import Reason, Refinement

CHUNK_ELEMENTS = 1 << 21
"""Scores held at once, rows times classes: large enough for a fast matrix product, small enough for the cache. No more
features than that either."""

GPU_CHUNK_ELEMENTS = 1 << 27
"""The same for the fused kernel, half a gigabyte of scores: a chunk costs a GPU the start of a dozen kernels."""

CACHED_ELEMENTS = 1 << 17
"""Scores searched at once on the CPU: half a megabyte, which a core's own cache holds."""


@dataclass(frozen=True)
class PaperDiagnostics:
    """What the paper's rule used.

    Attributes:
        weight: Weight of the cosine; 1 without a classifier.
        thresholds: Smallest score at which a label is replaced by each class, (C,) float64.
        warnings: What the checks of `front.refine` doubt, a line each.
    """

    weight: float
    thresholds: NDArray[np.float64]
    warnings: tuple[str, ...] = ()


def refine_labels(
    features: ArrayT,
    logits: ArrayT | None,
    prototypes: ArrayT,
    threshold: float | Sequence[float] | Array,
    *,
    weight: float = 0.5,
    strict: bool = False,
) -> Refinement:
    """Score every image against every class and accept the winners that reach the threshold.

    The score is ``weight * cosine(feature, prototype) + (1 - weight) * softmax(logits)``, and a score equal to the
    threshold counts. Among equal scores the given label wins, then the lower class. Scores are computed in chunks, in
    float32 or better, so memory-mapped inputs of any length need little memory.

    Args:
        features: Features of the real images, (N, D), float16 to float64.
        logits: Classifier outputs for the same images in the same order, (N, C). None where there is no classifier: the
            score is then the cosine.
        prototypes: Mean feature of each class's synthetic images, (C, D); see `class_prototypes`.
        threshold: Smallest score at which a label is replaced, in [-0.5, 1] for the default weight; one number, or
            one per class, (C,). The authors' code uses 0.6; tune it for your encoder.
        weight: Weight of the cosine, in [0, 1]; the softmax has the rest. The paper's is 0.5.
        strict: Raise for an image that cannot be scored (non-finite, or a feature of length zero); by default it
            keeps its label and is counted in `Refinement.unscored`.

    Returns:
        The decision, NumPy for NumPy inputs and torch, on the device of `features`, for torch inputs.

    Raises:
        InputError: An argument has the wrong kind, type, shape or range, a prototype is zero or not finite, or, with
            `strict`, an image cannot be scored.

    Example:
        >>> decision = refine_labels(torch.eye(2), 4 * torch.eye(2), torch.eye(2), 0.6)
        >>> decision.apply(torch.tensor([1, 1])).tolist()
        [0, 1]
    """
    weight = 1.0 if logits is None else weight
    num_images, num_classes = _checked_shape(features, logits, prototypes, weight)
    arrays = [features, prototypes] + ([] if logits is None else [logits])
    device = features.device if isinstance(features, Tensor) else torch.device("cpu")
    double = any(str(value.dtype).endswith("float64") for value in arrays)
    dtype = torch.float64 if double else torch.float32
    thresholds = class_thresholds(threshold, num_classes)
    directions = prototype_directions(prototypes, dtype, device).T * weight  # (D, C)

    proposed = torch.empty(num_images, dtype=torch.int64, device=device)
    best = torch.full((num_images, 2), torch.nan, dtype=dtype, device=device)
    ties = [torch.empty((0, 2), dtype=torch.int64, device=device)]
    elements = GPU_CHUNK_ELEMENTS if _fused(device, dtype, num_classes) else CHUNK_ELEMENTS
    step = chunk_rows(num_classes, features.shape[1], elements)
    with torch.no_grad():
        for start in range(0, num_images, step):
            rows = slice(start, start + step)
            outputs = None if logits is None else float_tensor(logits[rows], dtype, device)
            scored = score_rows(float_tensor(features[rows], dtype, device), outputs, directions, weight, top=2)
            proposed[rows], best[rows, : scored.values.shape[1]] = scored.classes[:, 0], scored.values
            if len(scored.ties):
                ties.append(scored.ties + torch.tensor([start, 0], device=device))
    if strict and bool((proposed < 0).any()):
        first = int((proposed < 0).nonzero()[0, 0])
        raise InputError(
            f"features: expected finite features and logits and no feature of length zero, "
            f"got {int((proposed < 0).sum())} such rows, the first is row {first}"
        )
    limits = thresholds.to(device, dtype)
    accepted = (proposed >= 0) & (best[:, 0] >= limits[proposed.clamp(min=0)])
    reason = torch.where(accepted, int(Reason.ACCEPTED), int(Reason.BELOW_THRESHOLD))
    reason[proposed < 0] = int(Reason.UNSCORED)
    margin = best[:, 0] - best[:, 1] if num_classes > 1 else best[:, 0].clone()
    parts = (proposed, best[:, 0].contiguous(), margin, accepted, reason, torch.cat(ties))
    found = dict(zip(("proposed", "confidence", "margin", "accepted", "reason", "ties"), parts, strict=True))
    about = PaperDiagnostics(weight, thresholds.numpy())
    if isinstance(features, Tensor):
        return Refinement(**found, num_classes=num_classes, diagnostics=about)
    return Refinement(
        **{name: part.numpy() for name, part in found.items()}, num_classes=num_classes, diagnostics=about
    )


def _checked_shape(features: Array, logits: Array | None, prototypes: Array, weight: float) -> tuple[int, int]:
    """Refuse what does not fit together; N and C."""
    check_array("features", features, ("N", "D"))
    check_array("prototypes", prototypes, ("C", "D"))
    if logits is not None:
        check_array("logits", logits, ("N", "C"))
        check_turned("features", features, logits.shape[0])
        check_array("logits", logits, (features.shape[0], "C"))
        check_array("prototypes", prototypes, (logits.shape[1], features.shape[1]))
    check_array("prototypes", prototypes, ("C", features.shape[1]))
    for name, value in (("features", features), ("logits", logits), ("prototypes", prototypes)):
        if value is None:
            continue
        check_floating(name, value)
        if isinstance(value, Tensor) != isinstance(features, Tensor):
            raise InputError(f"{name}: expected {type(features).__name__} like features, got {type(value).__name__}")
    if prototypes.shape[0] == 0 or features.shape[1] == 0:
        raise InputError(f"prototypes: expected at least one class and one feature, got {tuple(prototypes.shape)}")
    if not 0 <= weight <= 1:
        raise InputError(f"weight: expected a number in [0, 1], got {weight}")
    return features.shape[0], prototypes.shape[0]


@dataclass(frozen=True)
class Scored:
    """The best classes of a chunk of images.

    Attributes:
        classes: Classes from the best score down, the lower class first among equals, (n, K) int64; -1 where the image
            could not be scored.
        values: Their scores, (n, K); NaN where the image could not be scored.
        ties: Row and class of every score that equals the best one, (T, 2); only rows with several best classes.
    """

    classes: Tensor
    values: Tensor
    ties: Tensor


def chunk_rows(num_classes: int, width: int, elements: int = CHUNK_ELEMENTS) -> int:
    """Images scored at once, for C classes and D features."""
    return max(64, elements // max(num_classes, width))


def score_rows(features: Tensor, logits: Tensor | None, directions: Tensor, weight: float, top: int) -> Scored:
    """The paper's score of a few images, and the best classes by it.

    Args:
        features: (n, D), of the type to compute in.
        logits: Classifier outputs, (n, C); None for a score by similarity alone.
        directions: Prototypes of length one times `weight`, (D, C).
        weight: Weight of the cosine.
        top: K, the number of classes wanted; all of them where there are fewer.
    """
    lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    scored = lengths.isfinite() & (lengths > 0)  # (n, 1)
    # Scores times the length of the feature: scaling the softmax up is cheaper than scaling the features down.
    scale, count = (1 - weight) * lengths, max(2, top)
    if fused := _fused(features.device, features.dtype, directions.shape[1]):
        scores = features @ directions  # (n, C)
        values, classes, finite = fused(scores, logits, scale, count)
        scored &= finite
    else:
        if logits is None:
            scores = features @ directions
        else:
            scores = logits.softmax(dim=1).mul_(scale).addmm_(features, directions)
            scored &= logits.amax(dim=1, keepdim=True).isfinite() & logits.amin(dim=1, keepdim=True).isfinite()
        values, classes = best_classes(scores, count)
    ties = torch.empty((0, 2), dtype=torch.int64, device=scores.device)
    if values.shape[1] > 1 and bool((tied := (values[:, 0] == values[:, 1]) & scored[:, 0]).any()):
        scores.scatter_(1, classes, values)  # what the search took out
        ties = ((scores == values[:, :1]) & tied[:, None]).nonzero()
    values, classes = values[:, :top] / lengths, classes[:, :top]
    return Scored(classes.masked_fill(~scored, -1), values.masked_fill(~scored, torch.nan), ties)


Fused: TypeAlias = Callable[[Tensor, Tensor | None, Tensor, int], tuple[Tensor, Tensor, Tensor]]


@cache
def _fused(device: torch.device, dtype: torch.dtype, num_classes: int) -> Fused | None:
    """What adds softmax and similarity and searches the best in one kernel, or None where it takes several.

    Triton comes with PyTorch on Linux, and wants a C compiler when it starts its first kernel.
    """
    if device.type != "cuda" or dtype != torch.float32:
        return None
    try:
        from synth_refine.refine._fused import MOST_CLASSES, best_of_rows

        if num_classes > MOST_CLASSES:
            return None
        zeros = torch.zeros((1, num_classes), device=device)
        best_of_rows(zeros.clone(), zeros, zeros[:, :1], 2)  # as score_rows asks
    except Exception as error:  # whatever Triton finds wrong, there is another way
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"refine_labels: no fused kernel on {device} ({what}); it takes some times as long", stacklevel=2)
        return None
    return best_of_rows


def best_classes(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest scores of each row and their columns, (n, count), the lower column first among equals.

    Found one after the other, each replaced by minus infinity in `scores`: for a handful of them that is two to three
    times as fast as topk, which moreover promises no order among equals.
    """
    count = min(count, scores.shape[1])
    values, classes = scores.new_empty((len(scores), count)), scores.new_empty((len(scores), count), dtype=torch.int64)
    if scores.device.type != "cpu":
        for place in range(count):
            winners = scores.argmax(dim=1, keepdim=True)
            values[:, place], classes[:, place] = scores.gather(1, winners)[:, 0], winners[:, 0]
            scores.scatter_(1, winners, -torch.inf)
        return values, classes
    # NumPy's argmax is vectorised, torch's on the CPU is not; a part that stays in the cache is searched fastest, and
    # one index into a flat part costs half of a pair of them.
    columns = scores.shape[1]
    step = max(1, CACHED_ELEMENTS // max(1, columns))
    starts = np.arange(min(step, len(scores))) * columns
    for start in range(0, len(scores), step):
        part = slice(start, start + step)
        table, best, places = scores[part].numpy(), values[part].numpy(), classes[part].numpy()
        flat = table.reshape(-1)
        for place in range(count):
            places[:, place] = winners = table.argmax(axis=1)
            winners += starts[: len(table)]
            best[:, place] = flat[winners]
            flat[winners] = -np.inf
    return values, classes


def prototype_directions(prototypes: Array, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Prototypes scaled to length one, (C, D)."""
    values = float_tensor(prototypes, dtype, device)
    for bad, what in ((~values.isfinite().all(dim=1), "a non-finite one"), ((values == 0).all(dim=1), "only zeros")):
        if bool(bad.any()):
            raise InputError(f"prototypes: expected a finite, non-zero row per class, got {what} for {_classes(bad)}")
    return F.normalize(values, dim=1)


def _classes(mask: Tensor) -> str:
    indices = [int(index) for index in mask.nonzero()[:, 0]]
    return ("class " if len(indices) == 1 else "classes ") + ", ".join(map(str, indices[:5]))


def class_thresholds(threshold: float | Sequence[float] | Array, num_classes: int) -> Tensor:
    """One threshold per class, (C,)."""
    try:
        values = torch.as_tensor(threshold, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"threshold: expected a number or one per class, got {threshold!r}") from error
    if values.ndim == 0:
        values = values.expand(num_classes)
    check_array("threshold", values, (num_classes,))
    if bool(values.isnan().any()):
        raise InputError("threshold: expected numbers, got NaN")
    return values
