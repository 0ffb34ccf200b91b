"""From posteriors to decisions: keep, change or abstain, with the reason and the odds, and without doing harm.

Letters in shapes: N real images, M synthetic images, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from synth_refine._io.check import Array, ArrayT, InputError, check_array, check_labels, float_tensor, label_tensor
from synth_refine.refine.anchored import Posterior, bayes, fit_transition

NOISE_FLOOR = 0.03
"""Estimated noise below which the estimate is mostly the head's own error: the margin grows from there."""

SOFTENING = 0.7
"""Exponent of the head's probabilities in the do-no-harm check: what would be left to change if it were less sure.

Chosen on ten CIFAR-10 label files by comparison with the true gain: at 0.6 the check refuses a change set that halves
5 % uniform noise, at 0.8 it lets one through that breaks 0.1 % of clean labels.
"""

RECOGNISED = 0.5
"""Fraction of held-out synthetic images that heads must name rightly, or labels are left alone: features that do not
tell the classes apart say nothing worth a change. CIFAR-10 through a CLIP that knows letters alone has .41, and there
35 % wrong labels would become 60 %; through ImageNet networks it has .86 to .90.
"""


class Answer(IntEnum):
    """What happens to a label."""

    KEEP = 0
    CHANGE = 1
    ABSTAIN = 2  # the label stays, but somebody should look


REASONS = (
    "the given label is the most probable",
    "another class is more probable by more than the margin",
    "another class is more probable, but within the margin",
    "another class is more probable, but below that class's threshold",
    "the image could not be scored",
    "the change set would not lower the noise",
    "too few synthetic images are recognised to trust the features",
)


@dataclass(frozen=True)
class Decision:
    """One answer per image, kept apart from its application.

    Attributes:
        answers: `Answer` codes, (N,) int64.
        labels: The most probable class of each image, (N,) int64.
        odds: Posterior odds of that class against the given one, (N,); 1 where it is the given one.
        reasons: Index into `REASONS`, (N,) int64.
        margin: Odds that a change had to exceed.
        noise_before: Estimated noise of the given labels; NaN where the heads name fewer than half of the held-out
            synthetic images rightly: what they say of real ones is no estimate then.
        noise_after: Estimated noise after applying this decision; likewise.
        wrong_changes: Nominal fraction of the changes that are wrong, by the posterior: real and synthetic images
            differ, so read it beside the domain gap; NaN without a change.
        gain: Expected drop of the noise rate by the proposed changes if the head were less sure than it says.
        harmful: Whether the do-no-harm check advises against the proposed changes.
        blind: Whether it does so because the heads name fewer than half of the held-out synthetic images rightly, and
            not because the changes would not lower the noise.
    """

    answers: Array
    labels: Array
    odds: Array
    reasons: Array
    margin: float
    noise_before: float
    noise_after: float
    wrong_changes: float
    gain: float
    harmful: bool
    blind: bool

    def apply(self, given: ArrayT) -> ArrayT:
        """The refined labels: changed where so decided, the given label elsewhere. `given` is left as it is.

        Args:
            given: Given labels, (N,) integers, NumPy or torch as the decision's.

        Raises:
            InputError: `given` has another length or kind.
        """
        check_labels("given", given)
        check_array("given", given, tuple(self.labels.shape))
        if isinstance(given, Tensor) != isinstance(self.labels, Tensor):
            raise InputError(
                f"given: expected {type(self.labels).__name__} like the decision, got {type(given).__name__}"
            )
        change = self.answers == int(Answer.CHANGE)
        if isinstance(given, Tensor):
            return torch.where(cast(Tensor, change), given.new_tensor(cast(Tensor, self.labels).tolist()), given)
        return np.where(change, cast("NDArray[np.int64]", self.labels).astype(given.dtype), given)

    def summary(self) -> str:
        """One line for people."""
        count = [int((self.answers == int(answer)).sum()) for answer in Answer]
        noise = "noise not estimated"
        if not math.isnan(self.noise_before):
            noise = f"estimated noise {self.noise_before:.3f} -> {self.noise_after:.3f}"
        text = f"keep {count[0]}, change {count[1]}, abstain {count[2]}; {noise}"
        if not self.harmful:
            return text
        why = "the proposed changes would probably not lower the noise"
        if self.blind:
            why = (
                "fewer than half of the held-out synthetic images are recognised; try an encoder that knows the classes"
            )
        return f"{text}; {'changed on demand, although' if count[1] else 'nothing is changed:'} {why}"


def decide(
    posterior: Posterior,
    given: ArrayT,
    *,
    margin: float | None = None,
    thresholds: Sequence[float] | Array | float | None = None,
    force: bool = False,
) -> Decision:
    """Keep, change or abstain, image by image.

    A label is changed when the posterior odds of the best class against it exceed the margin, and the best class's
    probability reaches that class's threshold. The default margin is 1 + (0.03 / estimated noise)^2: one where the
    labels are noisy, and large where they are nearly clean, since the head's errors then outnumber those of the labels.

    Args:
        posterior: From `anchored_posterior`.
        given: The given labels it was computed from, (N,) integers.
        margin: Smallest odds, at least 1, that a change must exceed.
        thresholds: Smallest probability of the new class, one number or one per class, (C,); see
            `calibrate_thresholds`. None asks for none.
        force: Change labels even if the do-no-harm check advises against it.

    Returns:
        The decision; NumPy for NumPy inputs, torch for torch inputs.

    Raises:
        InputError: An argument has the wrong kind, shape or range.
    """
    classes = posterior.posterior.shape[1]
    check_labels("given", given, classes)
    check_array("given", given, (posterior.posterior.shape[0],))
    if isinstance(given, Tensor) != isinstance(posterior.posterior, Tensor):
        kind = type(posterior.posterior).__name__
        raise InputError(f"given: expected {kind} like the posterior, got {type(given).__name__}")
    if margin is not None and not margin >= 1:
        raise InputError(f"margin: expected odds of at least 1, got {margin}")
    limits = _limits(thresholds, classes)
    device = given.device if isinstance(given, Tensor) else torch.device("cpu")
    belief = float_tensor(posterior.posterior, torch.float32, device)
    labels_given = label_tensor(given, device)
    best, stays, winner = winners(belief, labels_given)
    odds = best / stays.clamp_min(1e-9)
    if margin is None:
        margin = default_margin(posterior.noise_before)

    skipped = torch.as_tensor(posterior.skipped, device=device)
    reasons = torch.ones_like(winner)
    reasons[best < limits.to(device)[winner]] = 3
    reasons[odds <= margin] = 2
    reasons[winner == labels_given] = 0
    reasons[skipped] = 4
    proposed = reasons == 1
    gain = _gain(posterior, labels_given, winner, proposed)
    blind = posterior.recognised < RECOGNISED
    harmful = bool(proposed.any()) and (gain <= 0 or blind)
    if harmful and not force:
        reasons[proposed] = 6 if blind else 5
    changed = reasons == 1
    answers = torch.full_like(winner, int(Answer.ABSTAIN))
    answers[reasons == 0] = int(Answer.KEEP)
    answers[changed] = int(Answer.CHANGE)
    kept = torch.where(changed, best, stays)
    scored = ~skipped
    before = 1 - float(stays[scored].mean()) if bool(scored.any()) else 0.0
    after = 1 - float(kept[scored].mean()) if bool(scored.any()) else 0.0
    if blind:
        before = after = math.nan
    wrong = 1 - float(best[changed].mean()) if bool(changed.any()) else float("nan")
    parts: dict[str, Array] = {"answers": answers, "labels": winner, "odds": odds, "reasons": reasons}
    if not isinstance(given, Tensor):
        parts = {name: np.asarray(part) for name, part in parts.items()}
    return Decision(
        **parts,
        margin=float(margin),
        noise_before=before,
        noise_after=after,
        wrong_changes=wrong,
        gain=gain,
        harmful=harmful,
        blind=harmful and blind,
    )


def winners(belief: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best class's probability, the given one's, and the best class, (N,) each; ties go to the given label."""
    stays = belief[torch.arange(belief.shape[0], device=belief.device), given]
    best, winner = belief.max(dim=1) if belief.shape[0] else (belief.new_empty(0), given)
    return best, stays, torch.where(stays >= best, given, winner)


def default_margin(noise: float) -> float:
    """The odds that a change has to exceed where this fraction of the given labels is wrong."""
    return 1 + (NOISE_FLOOR / max(noise, 1e-6)) ** 2


def _limits(thresholds: Sequence[float] | Array | float | None, classes: int) -> Tensor:
    try:
        values = torch.as_tensor(0.0 if thresholds is None else thresholds, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"thresholds: expected a number or one per class, got {thresholds!r}") from error
    if values.ndim == 0:
        values = values.expand(classes)
    check_array("thresholds", values, (classes,))
    if bool(values.isnan().any()):
        raise InputError("thresholds: expected numbers, got NaN")
    return values


def _gain(posterior: Posterior, given: Tensor, winner: Tensor, proposed: Tensor) -> float:
    """Expected drop of the noise rate by the proposed changes, under softened opinions and a transition fitted to them.

    The posterior itself cannot judge: by its own account every change to its best class helps.
    """
    if not bool(proposed.any()):
        return 0.0
    opinion = float_tensor(posterior.head, torch.float32, given.device).clamp_min(1e-9) ** SOFTENING
    opinion = F.normalize(opinion, p=1, dim=1)
    scored = (~torch.as_tensor(posterior.skipped, device=given.device)).nonzero()[:, 0]
    belief = torch.zeros_like(opinion)
    belief[scored] = bayes(opinion[scored], fit_transition(opinion[scored], given[scored], steps=30), given[scored])
    rows = proposed.nonzero()[:, 0]
    return float((belief[rows, winner[rows]] - belief[rows, given[rows]]).sum()) / given.shape[0]
