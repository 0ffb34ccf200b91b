"""What callers hand over as refined labels (arrays, artifacts, results of refiners) in, one form out.

Letters in shapes: M labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synth_refine._io.check import Array, InputError, check_array
from synth_refine.labels.artifact import Artifact
from synth_refine.labels.files import as_labels


@runtime_checkable
class Applies(Protocol):
    """A result of a refiner; where it knows the labels that it was computed from, it has them as `given`."""

    def apply(self, given: Any) -> Any:
        """The refined labels for the given ones, (N,)."""


Refined: TypeAlias = "Artifact | Applies | Array"
"""Refined labels as `inject`, `verify` and `export` take them."""


@dataclass(frozen=True)
class Wanted:
    """Refined labels in one form.

    Attributes:
        labels: The refined labels, (M,).
        given: The labels that they were made from, (M,); None where these are not known.
        ids: The id of every label; None where their order says it.
    """

    labels: NDArray[np.int64]
    given: NDArray[np.int64] | None
    ids: Any

    @staticmethod
    def of(refined: Any, ids: Any = None, base: Array | None = None, current: Array | None = None) -> Wanted:
        """Bring refined labels into this form.

        Args:
            refined: Labels, an artifact or a result of a refiner.
            ids: The id of every label; by default those of the artifact.
            base: The labels that were refined; by default those that an artifact or a result knows.
            current: What a result that does not know its given labels is applied to.
        """
        if isinstance(refined, Artifact):
            ids, base = refined.ids if ids is None else ids, refined.given if base is None else base
            refined = refined.labels
        elif isinstance(refined, Applies):
            base = getattr(refined, "given", None) if base is None else base
            start = base if base is not None else current if ids is None else None
            if start is None:
                raise InputError("labels: expected a result that knows its given labels; pass result.apply(given)")
            device = getattr(getattr(refined, "proposed", None), "device", "cpu")
            tensor = isinstance(getattr(refined, "proposed", None), Tensor)
            refined = refined.apply(torch.as_tensor(start, device=device) if tensor else np.asarray(start))
        labels = as_labels("labels", refined)
        if base is not None:
            base = as_labels("base", base)
            check_array("base", base, labels.shape)
        return Wanted(labels, base, ids)

    def on(self, current: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The label of every item that has the label of a row, (n,); with row -1 the current one."""
        return np.where(rows >= 0, self.labels[rows] if self.labels.size else current, current)
