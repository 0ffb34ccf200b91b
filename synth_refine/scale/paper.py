"""The paper's rule over one shard: pieces of arrays on disk in, a table of scores out.

Letters in shapes: N images, D features, C classes, K classes reported per image, n rows of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from synth_refine._io.check import Array, InputError, check_array, check_floating, float_tensor
from synth_refine.refine.paper import chunk_rows, class_thresholds, prototype_directions, score_rows
from synth_refine.refine.result import CPU, Reason, Refinement
from synth_refine.scale.tables import TOP, Scores, Shard, digest, read_chunks, read_given


@dataclass(frozen=True)
class Rule:
    """The paper's rule ready to be applied to any shard, on any machine.

    Attributes:
        directions: Prototypes of length one times `weight`, (D, C) float32.
        thresholds: Smallest score at which a label is replaced, (C,).
        weight: Weight of the cosine.
        head: Linear classifier on the features, (C, D), or (C, D + 1) with the bias as the last column.
    """

    directions: NDArray[np.float32]
    thresholds: NDArray[np.float64]
    weight: float
    head: NDArray[np.float32] | None

    def settings(self) -> dict[str, Any]:
        """What the result depends on beside the inputs."""
        limits = self.thresholds
        single = bool(np.isfinite(limits[0]) and (limits == limits[0]).all())
        return {
            "weight": self.weight,
            "threshold": limits[0] if single else digest(limits.tobytes()),
            "prototypes": digest(self.directions.tobytes()),
            "head": None if self.head is None else digest(self.head.tobytes()),
        }


def score_shard(rule: Rule, shard: Shard) -> Scores:
    """Classes and scores of the images of one shard."""
    num_classes = rule.directions.shape[1]
    given = read_given(shard, num_classes)
    # Copies: what comes through Ray's object store is read-only.
    directions, limits = (float_tensor(values, torch.float32, CPU) for values in (rule.directions, rule.thresholds))
    head = None if rule.head is None else float_tensor(rule.head, torch.float32, CPU).T  # (D, C) or (D + 1, C)
    step, top = chunk_rows(num_classes, len(directions)), min(TOP, num_classes)
    outputs = None if shard.logits is None else read_chunks("logits", shard.logits, step, num_classes)
    classes = np.empty((shard.features.rows, top), dtype=np.int32)
    scores = np.empty((shard.features.rows, top), dtype=np.float32)
    ties, start = [np.empty((0, 2), dtype=np.int64)], 0
    with torch.no_grad():
        for values in read_chunks("features", shard.features, step, directions.shape[0]):
            chunk, logits = float_tensor(values, torch.float32, CPU), None
            if head is not None:
                logits = chunk @ head[: chunk.shape[1]]
                logits = logits.add_(head[-1]) if len(head) > chunk.shape[1] else logits
            elif outputs is not None:
                logits = float_tensor(next(outputs), torch.float32, CPU)
            scored = score_rows(chunk, logits, directions, rule.weight, top)
            rows = slice(start, start + len(chunk))
            classes[rows], scores[rows] = scored.classes.numpy(), scored.values.numpy()
            ties.append(scored.ties.numpy() + np.array([start, 0]))
            start += len(chunk)
    best, confidence = classes[:, 0].astype(np.int64), scores[:, 0]
    accepted = (best >= 0) & (confidence >= limits.numpy()[best])
    reason = np.where(accepted, int(Reason.ACCEPTED), int(Reason.BELOW_THRESHOLD))
    reason[best < 0] = int(Reason.UNSCORED)
    margin = scores[:, 0] - scores[:, 1] if top > 1 else scores[:, 0]
    decision = Refinement(best, confidence, margin, accepted, reason, np.concatenate(ties), num_classes)
    refined = np.asarray(decision.apply(given), dtype=np.int64)
    return Scores(given, refined, classes, scores, margin, decision.actions(given), reason)


def make_rule(
    prototypes: Array,
    threshold: float | Sequence[float] | Array,
    head: Array | None,
    weight: float | None,
    with_logits: bool,
) -> Rule:
    """The rule, after checking all that needs no shard."""
    check_array("prototypes", prototypes, ("C", "D"))
    check_floating("prototypes", prototypes)
    num_classes, width = prototypes.shape
    if num_classes == 0 or width == 0:
        raise InputError(f"prototypes: expected at least one class and one feature, got {tuple(prototypes.shape)}")
    classified = with_logits or head is not None
    if head is not None:
        if with_logits:
            raise InputError("head: expected None beside logits, got both; one classifier is enough")
        check_array("head", head, (num_classes, "D"))
        check_floating("head", head)
        if head.shape[1] not in (width, width + 1):
            raise InputError(
                f"head: expected shape ({num_classes}, {width}) or ({num_classes}, {width + 1}), "
                f"got {tuple(head.shape)}"
            )
    weight = (0.5 if classified else 1.0) if weight is None else weight
    if not 0 <= weight <= 1:
        raise InputError(f"weight: expected a number in [0, 1], got {weight}")
    if weight < 1 and not classified:
        raise InputError(f"weight: expected 1 without logits or head, got {weight}")
    cpu = torch.device("cpu")
    directions = prototype_directions(prototypes, torch.float32, cpu).T * weight
    return Rule(
        directions.contiguous().numpy(),
        class_thresholds(threshold, num_classes).numpy().copy(),
        weight,
        None if head is None else float_tensor(head, torch.float32, cpu).numpy(),
    )


def check_width(shard: Shard, rule: Rule) -> None:
    """Refuse at once what fits no shard."""
    width, num_classes = rule.directions.shape
    found = next(read_chunks("features", shard.features, 1, "D")).shape[1]
    if found != width:
        where = f"({num_classes}, {found}) like the features in {shard.features.path}"
        raise InputError(f"prototypes: expected shape {where}, got ({num_classes}, {width})")
    next(read_chunks("given", shard.given, 1))
    if shard.logits is not None:
        next(read_chunks("logits", shard.logits, 1, num_classes))
