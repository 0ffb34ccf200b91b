"""What every refiner returns: proposals with their reasons, kept apart from their application.

Letters in shapes: N images, C classes, K ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synth_refine._io.check import Array, InputError, LabelsT, check_array, check_labels, label_tensor, labels_like
from synth_refine._io.error import WrongBase
from synth_refine.labels.artifact import NO_CLASS, Artifact, record

if TYPE_CHECKING:
    import pandas

CPU = torch.device("cpu")


class Action(IntEnum):
    """What happens to a label."""

    KEEP = 0
    CHANGE = 1
    ABSTAIN = 2  # the label stays, but a person should look
    REMOVE = 3  # the image is left out; a person decides so, no refiner


class Reason(IntEnum):
    """Why a proposal is accepted or not."""

    SAME = 0
    ACCEPTED = 1
    WITHIN_ODDS = 2
    BELOW_THRESHOLD = 3
    UNSCORED = 4
    NO_GAIN = 5
    WEAK_ENCODER = 6
    MISMATCH = 7
    NO_CLASS = 8


REASONS = (
    "the given label is the best class",
    "another class is better by enough",
    "another class is more probable, but not by enough",
    "another class is better, but its score is below the threshold",
    "the image cannot be scored",
    "changes like this one would not lower the noise",
    "too few synthetic images are classified correctly to trust the features",
    "synthetic images and given labels contradict each other",
    NO_CLASS,
)
"""The texts of `Reason`."""


@dataclass(frozen=True)
class Refinement:
    """What a refiner decided.

    Attributes:
        proposed: The best class of each image, (N,) int64; -1 where the image cannot be scored.
        confidence: Its score or probability, (N,); NaN where the image cannot be scored.
        margin: By how much it beats the second best class, (N,); NaN where that is not known.
        accepted: Whether it replaces a given label that differs from it, (N,) bool.
        reason: `Reason` codes, (N,) int64; `REASONS` has their texts.
        ties: Image and class of every score that equals the best one, (K, 2); only images with several best classes.
        num_classes: C.
        given: The labels that the refiner saw, (N,), which alone `apply` takes; None for the paper's rule, which scores
            without them and applies to any labels.
        no_class: How likely each image shows none of the classes, (N,) in [0, 1]; None where that is not scored. Images
            that are proposed for removal have the reason `Reason.NO_CLASS`; they keep their label.
        diagnostics: What only this refiner knows, `PaperDiagnostics` or `AnchoredDiagnostics`.
    """

    proposed: Array
    confidence: Array
    margin: Array
    accepted: Array
    reason: Array
    ties: Array = field(repr=False)
    num_classes: int
    given: Array | None = field(default=None, repr=False)
    no_class: Array | None = field(default=None, repr=False)
    diagnostics: Any = field(default=None, repr=False)

    @property
    def unscored(self) -> int:
        """Number of images that cannot be scored; they keep their label."""
        return int((self.proposed < 0).sum())

    def apply(self, given: LabelsT) -> LabelsT:
        """The refined labels: the proposed class where it is accepted, the given label elsewhere.

        Args:
            given: Given labels, (N,) integers in [0, C), NumPy or torch; left as they are.

        Returns:
            Labels of the kind, type and device of `given`.

        Raises:
            InputError: `given` has another length, kind or range.
            WrongBase: `given` are not the labels that were refined.

        Example:
            >>> from synth_refine import refine_labels
            >>> result = refine_labels(np.eye(2), 4 * np.eye(2), np.eye(2), 0.6)
            >>> result.apply(np.array([1, 1]))
            array([0, 1])
        """
        old = self._checked(given)
        new = torch.where(self._changed(old), label_tensor(self.proposed, CPU), old)
        return labels_like("given", given, new.numpy())

    def actions(self, given: Array) -> NDArray[np.int64]:
        """`Action` codes for given labels, (N,)."""
        old = self._checked(given)
        changed = self._changed(old)
        abstains = (label_tensor(self.proposed, CPU) != old) & ~changed & ~self._ties_with(old) & self._doubted()
        abstains |= label_tensor(self.reason, CPU) == Reason.NO_CLASS
        actions = torch.full_like(old, int(Action.KEEP))
        actions[abstains] = int(Action.ABSTAIN)
        actions[changed] = int(Action.CHANGE)
        return actions.numpy()

    def record(
        self,
        given: Array,
        *,
        ids: Sequence[str] | None = None,
        inputs: Mapping[str, str] | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> Artifact:
        """The decision as an artifact, which can be written, applied and reverted.

        Args:
            given: Given labels, (N,) integers.
            ids: One unique id per row.
            inputs: Hashes or names of the data, the encoder and the synthetic images.
            settings: Refiner, threshold, seed and the like; the ids of images that cannot be scored are added.

        Raises:
            InputError: As `apply`, or ids that are not unique.
        """
        actions = self.actions(given)
        old = label_tensor(given, CPU)
        rows = np.flatnonzero(label_tensor(self.proposed, CPU).numpy() < 0).tolist()
        if ids is not None and rows:  # so that `apply` does without them
            settings = {**(settings or {}), "unscored": [str(ids[row]) for row in rows]}
        return record(
            given,
            torch.where(self._changed(old), label_tensor(self.proposed, CPU), old),
            num_classes=self.num_classes,
            ids=ids,
            abstained=actions == Action.ABSTAIN,
            confidence=torch.as_tensor(self.confidence).cpu().numpy(),
            margin=torch.as_tensor(self.margin).cpu().numpy(),
            reason=np.array(REASONS)[label_tensor(self.reason, CPU).numpy()],
            no_class=None if self.no_class is None else torch.as_tensor(self.no_class).cpu().numpy(),
            inputs=inputs,
            settings=settings,
        )

    def to_pandas(
        self, given: Array | None = None, *, ids: Sequence[str] | None = None, classes: Sequence[str] | None = None
    ) -> pandas.DataFrame:
        """A row per image: what `Artifact.to_pandas` has, and `proposed`, the best class whether accepted or not.

        Args:
            given: Given labels, (N,); by default those that the refiner saw, which the paper's rule does not.
            ids: One unique id per row; by default the row number.
            classes: Class names, (C,), for columns with the names of the given, refined and proposed classes.

        Raises:
            InputError: As `record`, no given labels, another number of classes, or pandas is not installed.
        """
        known = self.given if given is None else given
        if known is None:
            raise InputError("given: expected the labels to refine, which the paper's rule does not know, got None")
        if classes is not None and len(classes) != self.num_classes:
            raise InputError(f"classes: expected {self.num_classes} names, got {len(classes)}")
        settings = None if classes is None else {"classes": list(classes)}
        table = self.record(known, ids=ids, settings=settings).to_pandas()
        proposed = label_tensor(self.proposed, CPU).tolist()
        table.insert(3, "proposed", proposed)
        if classes is not None:
            table["proposed_class"] = [classes[one] if one >= 0 else None for one in proposed]
        return table

    def _checked(self, given: Array) -> Tensor:
        """The given labels as int64 on the CPU."""
        check_labels("given", given, self.num_classes)
        check_array("given", given, tuple(self.proposed.shape))
        old = label_tensor(given, CPU)
        if self.given is not None:
            differ = (old != label_tensor(self.given, CPU)).nonzero()
            if len(differ):
                raise WrongBase(
                    f"given: expected the labels that were refined, got others: {len(differ)} of {len(old)} differ, "
                    f"the first in row {int(differ[0, 0])}"
                )
        return old

    def _changed(self, given: Tensor) -> Tensor:
        accepted = torch.as_tensor(self.accepted).to(CPU)
        return accepted & (label_tensor(self.proposed, CPU) != given) & ~self._ties_with(given)

    def _ties_with(self, given: Tensor) -> Tensor:
        """Where the given label is one of several best classes, (N,) bool: there is nothing to correct."""
        rows, classes = label_tensor(self.ties, CPU).unbind(dim=1)
        best = torch.zeros(len(given), dtype=torch.bool)
        best[rows[given[rows] == classes]] = True
        return best

    def _doubted(self) -> Tensor:
        """Where a proposal that is not accepted asks for a person, (N,) bool; the paper's rule only where unscored.

        A score below the paper's threshold is no doubt about the label: the rule keeps it.
        """
        reason = label_tensor(self.reason, CPU)
        return reason == Reason.UNSCORED if self.given is None else reason > Reason.ACCEPTED
