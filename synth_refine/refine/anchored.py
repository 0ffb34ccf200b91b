"""The anchored refiner: features, given labels and synthetic images in, a decision per label out.

Synthetic images say which class is which; the given labels, read through transition matrices, say the rest. `em` has
the algorithm, `decide` the decision. Everything is chosen without true labels.

Letters in shapes: N real images, M synthetic images, D features, C classes.

Tried on CIFAR-10 (MobileNetV2 features, 100 synthetic images per class) and left out, because it did not help:

* One pair of heads trained on from round to round instead of anew: it keeps what it learned from early, wrong
  posteriors (.264 wrong for .235 at 70 % PMD).
* The temperature of the prototypes by the likelihood of the given labels: it asks for softer ones, which lets the
  systematic part of the noise lead (.287 for .241 at 70 % PMD).
* Transition matrices per level of the heads' confidence, or tilted towards look-alike classes by the heads: no file
  gained (.226 for .223 at 70 % PMD, .161 for .158 at 35 %).
* A second view's features beside the first's instead of its logits: .15 to .19 for .09 on the digits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from synth_refine._io.check import (
    Array,
    ArrayT,
    InputError,
    check_array,
    check_floating,
    check_labels,
    check_threshold,
    check_turned,
    float_tensor,
    is_auto,
    label_tensor,
)
from synth_refine.refine.decide import propose
from synth_refine.refine.em import EM
from synth_refine.refine.heads import HIDDEN
from synth_refine.refine.outliers import proposed, solve_without
from synth_refine.refine.result import CPU, Reason, Refinement
from synth_refine.refine.rows import array_reader, fit_frame, rows_in_memory
from synth_refine.refine.solve import AnchoredDiagnostics, check_order, diagnostics, solve
from synth_refine.refine.state import view_answers
from synth_refine.refine.thresholds import sweep

ROUNDS = 12
CHUNK_ELEMENTS = 1 << 21  # features that are standardized at once


def refine_anchored(
    features: ArrayT,
    given: ArrayT,
    synthetic_features: ArrayT,
    synthetic_labels: ArrayT,
    *,
    num_classes: int | None = None,
    text_prototypes: ArrayT | None = None,
    second_view: ArrayT | None = None,
    threshold: float | str | None = None,
    force: bool = False,
    outliers: bool = False,
    seed: int = 0,
    rounds: int = ROUNDS,
    hidden: int = HIDDEN,
    progress: bool = False,
) -> Refinement:
    """Refine labels by synthetic images of known class, the labels of neighbours and a model of how labels go wrong.

    Args:
        features: Features of the real images, (N, D), float16 to float64, of any frozen encoder.
        given: Given labels, (N,) integers in [0, C). Classes may be missing.
        synthetic_features: Features of the synthetic images by the same encoder, (M, D), at least one per class.
        synthetic_labels: Their intended classes, (M,) integers in [0, C).
        num_classes: C; by default the largest synthetic label plus one.
        text_prototypes: Text features of the classes by the same encoder, (C, D).
        second_view: Logits, (N, C), of a classifier that sees the images otherwise than through `features`, best
            cross-validated. It counts as one more annotator. Finite, but where the features are not.
        threshold: Smallest posterior of the new class that a change needs, from 0 to 1 (down to -1 is taken, and asks
            for none); "auto" calibrates one per class for nine right changes in ten; None asks for none.
        force: Change labels although a check advises against it.
        outliers: Score which images show none of the classes, keep them from teaching, and propose to remove them;
            takes about as long again.
        seed: Same seed, inputs and thread count, same result; not negative.
        rounds: Most rounds of expectation maximisation.
        hidden: Units of the heads' hidden layer; 0 makes them linear.
        progress: Show a progress bar on stderr.

    Returns:
        The decision, NumPy for NumPy inputs, torch on the device of `features` for torch inputs.

    Raises:
        InputError: An argument has the wrong kind, type, shape or range, a class has no synthetic image, or the given
            labels are independent of the images (another order of the rows, or another data set).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> true = rng.integers(0, 2, 400)
        >>> given = np.where(rng.random(400) < 0.3, 1 - true, true)
        >>> images, synthetic = rng.normal(size=(400, 4)) + 4 * true[:, None], rng.normal(size=(20, 4))
        >>> synthetic[10:] += 4
        >>> result = refine_anchored(images, given, synthetic, np.repeat([0, 1], 10))
        >>> bool((result.apply(given) != true).mean() < 0.02)
        True
    """
    classes = _checked(features, given, synthetic_features, synthetic_labels, num_classes, text_prototypes, second_view)
    check_options(threshold, seed=seed, rounds=rounds, hidden=hidden)
    device = features.device if isinstance(features, Tensor) else CPU
    tensors = [float_tensor(one, torch.float32, device) for one in (features, synthetic_features)]
    real, synthetic = tensors
    labels, intended = label_tensor(given, device), label_tensor(synthetic_labels, device)
    count = len(real)
    scored = real.isfinite().all(dim=1)
    parts = _empty(count, device)
    if not bool(scored.any()):
        return _result(parts, labels, classes, isinstance(features, Tensor), AnchoredDiagnostics())
    read = array_reader(real, labels, max(64, CHUNK_ELEMENTS // real.shape[1]))
    frame, ends = fit_frame(read, count, synthetic, seed)
    view = None if second_view is None else view_answers(float_tensor(second_view, torch.float32, device), scored)
    rows = rows_in_memory(read, frame, ends, seed, classes, view)
    words = None if text_prototypes is None else frame.text(float_tensor(text_prototypes, torch.float32, device))
    with tqdm(total=rounds, unit=" rounds", disable=not progress, leave=False) as bar:
        em = EM(rows, frame.synthetic(synthetic), intended, classes, seed, rounds, hidden, words, bar=bar)
        check_order(em)
        solution = (solve_without if outliers else solve)(em, threshold=threshold, force=force)
    stays = torch.full((count,), math.nan, device=device)
    for bucket, posterior in em.posteriors(solution.state):
        found, places = propose(posterior, bucket.given, solution.policy), bucket.numbers
        for name in parts:
            parts[name][places] = getattr(found, name).to(parts[name])
        stays[places] = found.stays
    if solution.no_class is not None:
        parts["no_class"] = torch.full((count,), math.nan, device=device)
        parts["no_class"][: len(solution.no_class)] = solution.no_class
        parts["reason"][proposed(parts["no_class"], torch.arange(count, device=device))] = int(Reason.NO_CLASS)
    allowed = (parts["reason"] == Reason.ACCEPTED) | (parts["reason"] == Reason.BELOW_THRESHOLD)
    rows_swept = sweep(parts["proposed"], parts["confidence"], stays, labels, allowed, classes)
    return _result(parts, labels, classes, isinstance(features, Tensor), diagnostics(em, solution, rows_swept))


def check_options(threshold: float | str | None, **least: int) -> None:
    """Refuse options out of their range."""
    if not is_auto(threshold) and threshold is not None:
        check_threshold(threshold, "auto or a number")
    for name, value in least.items():
        lowest = int(name == "rounds")
        if value < lowest:
            raise InputError(f"{name}: expected at least {lowest}, got {value}")


def _empty(count: int, device: torch.device) -> dict[str, Tensor]:
    """What is said of images that cannot be scored."""
    return {
        "proposed": torch.full((count,), -1, device=device),
        "confidence": torch.full((count,), math.nan, device=device),
        "margin": torch.full((count,), math.nan, device=device),
        "reason": torch.full((count,), int(Reason.UNSCORED), device=device),
    }


def _result(
    parts: dict[str, Tensor], given: Tensor, classes: int, torch_kind: bool, about: AnchoredDiagnostics
) -> Refinement:
    ties = torch.empty((0, 2), dtype=torch.int64, device=given.device)
    arrays: dict[str, Any] = {**parts, "accepted": parts["reason"] == Reason.ACCEPTED, "ties": ties, "given": given}
    if not torch_kind:
        arrays = {name: np.asarray(one) for name, one in arrays.items()}
    return Refinement(**arrays, num_classes=classes, diagnostics=about)


def _checked(
    features: Array,
    given: Array,
    synthetic_features: Array,
    synthetic_labels: Array,
    num_classes: int | None,
    text_prototypes: Array | None,
    second_view: Array | None,
) -> int:
    """Refuse what does not fit together; the number of classes."""
    check_array("features", features, ("N", "D"))
    check_array("given", given, ("N",))
    check_turned("features", features, given.shape[0])
    check_array("given", given, (features.shape[0],))
    check_array("synthetic_features", synthetic_features, ("M", features.shape[1]))
    optional = {"text_prototypes": text_prototypes, "second_view": second_view}
    floating = {"features": features, "synthetic_features": synthetic_features}
    floating |= {name: value for name, value in optional.items() if value is not None}
    for name, value in floating.items():
        check_floating(name, value)
    for name, value in (("given", given), ("synthetic_labels", synthetic_labels), *floating.items()):
        if isinstance(value, Tensor) != isinstance(features, Tensor):
            raise InputError(f"{name}: expected {type(features).__name__} like features, got {type(value).__name__}")
    if features.shape[0] == 0 or features.shape[1] == 0:
        raise InputError(f"features: expected at least one row and one column, got {tuple(features.shape)}")
    num_classes = checked_synthetic(synthetic_features, synthetic_labels, num_classes)
    check_labels("given", given, num_classes)
    if text_prototypes is not None:
        check_array("text_prototypes", text_prototypes, (num_classes, features.shape[1]))
        check_finite("text_prototypes", text_prototypes)
    if second_view is not None:
        check_array("second_view", second_view, (features.shape[0], num_classes))
        check_finite("second_view", second_view, features)  # of unscored images a second view may say anything
    return num_classes


def checked_synthetic(features: Array, labels: Array, num_classes: int | None) -> int:
    """Refuse synthetic images that leave a class out or are not finite; the number of classes."""
    check_array("synthetic_features", features, ("M", "D"))
    check_floating("synthetic_features", features)
    check_labels("synthetic_labels", labels)
    check_array("synthetic_labels", labels, (features.shape[0],))
    if num_classes is None:
        num_classes = int(labels.max()) + 1 if len(labels) else 0
    check_labels("synthetic_labels", labels, num_classes)
    counts = torch.bincount(label_tensor(labels, CPU), minlength=num_classes)
    if num_classes == 0 or not bool(counts.all()):
        missing = int((counts == 0).nonzero()[0, 0]) if num_classes else 0
        raise InputError(f"synthetic_labels: expected at least one image per class, got none for class {missing}")
    check_finite("synthetic_features", features)
    return num_classes


def check_finite(name: str, value: Array, features: Array | None = None) -> None:
    """Refuse rows that are not finite, but where those of `features` are not either."""
    finite = float_tensor(value, torch.float32, CPU).isfinite().all(dim=1)
    if features is not None:
        finite |= ~float_tensor(features, torch.float32, CPU).isfinite().all(dim=1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0, 0])
        raise InputError(f"{name}: expected finite numbers, got a non-finite one in row {bad}")
