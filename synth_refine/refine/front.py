"""The one front door: any evidence in, a decision out, whichever command or script asks.

Letters in shapes: N real images, M synthetic images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synth_refine._io.check import (
    Array,
    ArrayT,
    InputError,
    check_array,
    check_labels,
    check_turned,
    float_tensor,
    is_auto,
    label_tensor,
)
from synth_refine.refine.anchored import CHUNK_ELEMENTS, check_options, checked_synthetic, refine_anchored
from synth_refine.refine.checks import agreement_doubt, check_row_order, domain_gap, prototype_classes
from synth_refine.refine.copies import copies_doubts, without_copies
from synth_refine.refine.heads import fold_logits
from synth_refine.refine.options import REFINERS, USER_OF
from synth_refine.refine.paper import refine_labels
from synth_refine.refine.prototypes import class_prototypes
from synth_refine.refine.result import CPU, Reason, Refinement
from synth_refine.refine.rows import array_reader, fit_frame, rows_in_memory
from synth_refine.refine.solve import AnchoredDiagnostics, label_heads
from synth_refine.refine.thresholds import paper_thresholds

HEAD_EPOCHS = 8  # of the heads on the given labels, for the paper's rule
ORDER_ROWS = 50_000  # rows that the cheap checks look at
WIDE_GAP = 0.99  # domain gap from which on a warning says so
NEEDED = {"anchored": ("synthetic_features", "synthetic_labels"), "paper": ()}


def default_refiner(synthetic_features: object) -> str:
    """`anchored` where there are synthetic features, `paper` where there are only prototypes."""
    return "anchored" if synthetic_features is not None else "paper"


def check_use(refiner: str, values: Mapping[str, Any]) -> None:
    """Refuse options that the refiner has no use for, and the lack of what it needs.

    Args:
        refiner: One of `REFINERS`.
        values: Options by their names.

    Raises:
        InputError: As said.
    """
    if refiner not in REFINERS:
        raise InputError(f"refiner: expected {' or '.join(REFINERS)}, got {refiner!r}")
    for name, user in USER_OF.items():
        if user != refiner and not (values.get(name) is None or values[name] is False):
            raise InputError(f"{name}: the {refiner} refiner has no use for it")
    for name in NEEDED[refiner]:
        if values[name] is None:
            raise InputError(f"{name}: the {refiner} refiner needs it")
    if values["synthetic_labels"] is not None and values["synthetic_features"] is None:
        raise InputError("synthetic_labels: expected them beside synthetic_features alone, got no such features")


def check(
    features: Array,
    given: Array,
    *,
    synthetic_features: Array | None = None,
    synthetic_labels: Array | None = None,
    prototypes: Array | None = None,
    num_classes: int | None = None,
) -> tuple[str, ...]:
    """What is doubtful about the evidence, a line each, before any work.

    Raises:
        InputError: Shapes or kinds that do not fit, or given labels that are independent of the images.
    """
    check_array("features", features, ("N", "D"))
    check_array("given", given, ("N",))
    check_turned("features", features, given.shape[0])
    check_array("given", given, (features.shape[0],))
    reference, intended, classes = _reference(synthetic_features, synthetic_labels, prototypes, num_classes)
    check_array(
        "prototypes" if synthetic_features is None else "synthetic_features", reference, ("M", features.shape[1])
    )
    check_labels("given", given, classes)
    some = slice(None, None, -(-features.shape[0] // ORDER_ROWS) or 1)
    real, labels = float_tensor(features[some], torch.float32, CPU), label_tensor(given[some], CPU)
    known: tuple[Tensor, Tensor] | None = None
    if synthetic_features is not None:
        known = float_tensor(reference, torch.float32, CPU), label_tensor(intended, CPU)
    doubts = list(copies_doubts(real, labels, *(known or (None, None))))
    fine = without_copies(real, labels).isfinite().all(dim=1)
    real, labels = real[fine], labels[fine]
    nearest = torch.from_numpy(prototype_classes(real, reference, intended, classes))
    check_row_order(labels, nearest, classes)
    doubts.append(agreement_doubt(labels, nearest, classes))
    if known is not None and min(len(real), len(reference)) >= 4:
        gap = domain_gap(real, known[0])
        if gap >= WIDE_GAP:
            doubts.append(f"a line tells {gap:.1%} of the real images from the synthetic ones: do they look alike?")
    return tuple(filter(None, doubts))


def refine(
    features: ArrayT,
    given: ArrayT,
    *,
    refiner: str | None = None,
    synthetic_features: ArrayT | None = None,
    synthetic_labels: ArrayT | None = None,
    prototypes: ArrayT | None = None,
    logits: ArrayT | None = None,
    num_classes: int | None = None,
    threshold: Any = None,
    weight: float | None = None,
    strict: bool = False,
    text_prototypes: ArrayT | None = None,
    second_view: ArrayT | None = None,
    force: bool = False,
    outliers: bool = False,
    seed: int = 0,
    progress: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Refinement:
    """Refine given labels by whatever evidence there is.

    Args:
        features: Features of the real images, (N, D).
        given: Given labels, (N,) integers in [0, C).
        refiner: "anchored" or "paper"; by default `default_refiner`.
        synthetic_features: Features of the synthetic images, (M, D).
        synthetic_labels: Their intended classes, (M,).
        prototypes: For the paper's rule without synthetic features: mean feature of each class, (C, D).
        logits: For the paper's rule: classifier outputs, (N, C). Where there are none, but synthetic features, small
            heads are trained on the given labels; without those the score is the cosine.
        num_classes: C; by default the largest synthetic label plus one, or the number of prototypes.
        threshold: Smallest score of a new label: a number, or "auto" to calibrate one per class on the synthetic
            images. With the anchored refiner it is a posterior in [0, 1], and None asks for none. With the paper's rule
            it may be one number per class, None is "auto", and a number is needed where there are no synthetic features
            or where there are logits, since those of the synthetic images are not known.
        weight: For the paper's rule: weight of the cosine, by default 0.5.
        strict: For the paper's rule: refuse images that cannot be scored.
        text_prototypes: For the anchored refiner: text features of the classes, (C, D).
        second_view: For the anchored refiner: logits of another classifier, (N, C).
        force: For the anchored refiner: change labels although a check advises against it.
        outliers: For the anchored refiner: score which images show none of the classes, see `refine_anchored`.
        seed: Same seed, same result.
        progress: Show a progress bar on stderr.
        say: Called with every doubt: those about the evidence before the work, the others after it. The diagnostics of
            the result hold them too, as `warnings`.

    Raises:
        InputError: Evidence that does not fit together, is missing, or that the refiner has no use for.
    """
    refiner = default_refiner(synthetic_features) if refiner is None else refiner
    check_use(refiner, dict(locals()))
    about: dict[str, Any] = {"synthetic_features": synthetic_features, "synthetic_labels": synthetic_labels}
    if refiner == "paper" and logits is None and synthetic_features is None and weight not in (None, 1):
        raise InputError(f"weight: expected 1 where there is no classifier, got {weight}")
    check_options(None, seed=seed)
    if refiner == "paper" and (synthetic_features is None or logits is not None) and seed:
        raise InputError(f"seed: nothing is drawn without heads that are trained here, expected 0, got {seed}")
    doubts = check(features, given, **about, prototypes=prototypes, num_classes=num_classes)
    for doubt in doubts:
        say(doubt)
    features = without_copies(features, given)
    if refiner == "anchored":
        result = refine_anchored(
            features,
            given,
            **about,
            num_classes=num_classes,
            text_prototypes=text_prototypes,
            second_view=second_view,
            threshold=threshold,
            force=force,
            outliers=outliers,
            seed=seed,
            progress=progress,
        )
    else:
        half = 0.5 if weight is None else weight
        logits, prototypes, calibrated = _paper_evidence(
            features, given, synthetic_features, synthetic_labels, prototypes, logits, num_classes, half, seed
        )
        limits = calibrated if threshold is None or is_auto(threshold) else threshold
        if limits is None:
            raise InputError(
                "threshold: expected a number, since calibrating one takes synthetic features and no logits"
            )
        result = refine_labels(features, logits, prototypes, limits, weight=half, strict=strict)
    for warning in result.diagnostics.warnings:
        say(warning)
    return replace(result, diagnostics=replace(result.diagnostics, warnings=doubts + result.diagnostics.warnings))


def unchanged(given: NDArray[np.int64], num_classes: int, say: Callable[[str], object]) -> Refinement:
    """No change, where labels that came with their images have nothing to do with what synthetic images say of them.

    Args:
        given: Given labels, (N,).
        num_classes: C.
        say: Called with the reason, which the diagnostics hold too.
    """
    doubt = (
        "nothing is changed: the given labels have nothing to do with what the synthetic images say of the images; do "
        "the synthetic images show your classes (look at some), and does the encoder know them?"
    )
    say(doubt)
    nothing, about = np.full(len(given), np.nan), AnchoredDiagnostics(warnings=(doubt,))
    reason, ties = np.full(len(given), int(Reason.MISMATCH)), np.empty((0, 2), dtype=np.int64)
    accepted = np.zeros(len(given), dtype=bool)
    return Refinement(given, nothing, nothing, accepted, reason, ties, num_classes, given, diagnostics=about)


def _reference(
    synthetic_features: Array | None, synthetic_labels: Array | None, prototypes: Array | None, num_classes: int | None
) -> tuple[Array, Array, int]:
    """What images are compared with, (M, D), its classes, (M,), and C."""
    if synthetic_features is not None:
        if synthetic_labels is None:
            raise InputError("synthetic_labels: expected the class of each synthetic image, got none")
        return (
            synthetic_features,
            synthetic_labels,
            checked_synthetic(synthetic_features, synthetic_labels, num_classes),
        )
    if prototypes is None:
        raise InputError("synthetic_features: expected features of synthetic images, or prototypes, got neither")
    check_array("prototypes", prototypes, ("C" if num_classes is None else num_classes, "D"))
    return prototypes, np.arange(len(prototypes)), len(prototypes)


def _paper_evidence(
    features: Any,
    given: Array,
    synthetic_features: Any,
    synthetic_labels: Any,
    prototypes: Any,
    logits: Any,
    num_classes: int | None,
    weight: float,
    seed: int,
) -> tuple[Any, Any, NDArray[np.float32] | None]:
    """Logits, (N, C), prototypes, (C, D), and calibrated thresholds, (C,), where they can be had."""
    if synthetic_features is None or synthetic_labels is None:
        return logits, prototypes, None
    classes = checked_synthetic(synthetic_features, synthetic_labels, num_classes)
    if prototypes is None:
        prototypes = class_prototypes(synthetic_features, synthetic_labels, classes)
    if logits is not None:
        return logits, prototypes, None
    device = features.device if isinstance(features, Tensor) else CPU
    real, synthetic = (float_tensor(one, torch.float32, device) for one in (features, synthetic_features))
    spoken, synthetic_logits = given_logits(real, label_tensor(given, device), synthetic, classes, seed=seed)
    thresholds = paper_thresholds(synthetic.cpu(), label_tensor(synthetic_labels, CPU), synthetic_logits.cpu(), weight)
    return (spoken if isinstance(features, Tensor) else spoken.numpy()), prototypes, thresholds


def given_logits(
    features: Tensor, given: Tensor, synthetic: Tensor, classes: int, *, seed: int = 0, epochs: int = HEAD_EPOCHS
) -> tuple[Tensor, Tensor]:
    """Logits of small heads trained on the given labels, each row by a head that did not see it.

    They take the place of the classifier that the paper's rule asks for.

    Args:
        features: Features of the real images, (N, D) float32; rows that are not finite get logits that are not.
        given: Given labels, (N,) int64.
        synthetic: Features of the synthetic images, (M, D) float32; no head is trained on them.
        classes: C.
        seed: Same seed, same logits.
        epochs: Passes over the images.

    Returns:
        Logits of the real images, (N, C), and of the synthetic ones, (M, C): of the mean of the heads' probabilities.
    """
    logits = torch.full((len(features), classes), torch.nan, device=features.device)
    if not bool(features.isfinite().all(dim=1).any()):
        return logits, logits.new_zeros((len(synthetic), classes))
    read = array_reader(features, given, max(64, CHUNK_ELEMENTS // features.shape[1]))
    frame, ends = fit_frame(read, len(features), synthetic, seed)
    rows = rows_in_memory(read, frame, ends, seed, classes, near=False)
    reference = frame.synthetic(synthetic)
    with torch.random.fork_rng(devices=[features.device] if features.is_cuda else []):
        heads, key = label_heads(rows, classes, reference, seed, epochs=epochs)
    with torch.no_grad():
        for bucket in rows.buckets():
            logits[bucket.numbers] = fold_logits(heads, key, bucket.features.float(), bucket.numbers)
        probs = torch.stack([head(reference).softmax(dim=1) for head in heads]).mean(dim=0)
    return logits, probs.clamp_min(1e-12).log()
