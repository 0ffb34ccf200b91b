"""What crosses between tasks, adapters and the benchmark.

Letters in shapes: N training images, V validation images, D features, C classes. Inputs are pixels, (N, 3, H, W) uint8,
or features of a frozen encoder, (N, D) float32; the methods are the same, only the network differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Inputs and the labels that belong to them, row by row."""

    inputs: Tensor  # (N, 3, H, W) uint8 or (N, D) float32
    labels: Tensor  # (N,) int64


@dataclass(frozen=True)
class Task:
    """Everything a method may look at. The true labels of the training images are not in it."""

    num_classes: int
    train: Split  # with the given labels
    synthetic: Split  # with the classes that the images were made for
    noisy_validation: Split  # given labels: a choice of epoch that anybody can make
    clean_validation: Split  # the same rows with true labels: a privilege of the published protocols
    test: Split
    initial: Mapping[str, Tensor] | None = None  # weights of the classifier trained on the given labels

    @property
    def is_pixels(self) -> bool:
        """Whether the inputs are images; otherwise they are features."""
        return self.train.inputs.ndim == 4


@dataclass(frozen=True)
class Outcome:
    """What a method reached with the labels it was given.

    Attributes:
        test_accuracy: Fraction of the test images that are right, under three named choices of the epoch: "last",
            "best_noisy_validation" and "best_clean_validation".
        labels: The labels after training, (N,) int64; a method that corrects labels itself has changed them.
        history: One entry per epoch.
        settings: The resolved settings, defaults included.
    """

    test_accuracy: dict[str, float]
    labels: Tensor
    history: list[dict[str, float]]
    settings: dict[str, Any] = field(default_factory=dict)


class Adapter(Protocol):
    """A method behind one call."""

    def __call__(
        self, task: Task, labels: Tensor, options: Mapping[str, Any], seed: int, checkpoint: Path | None = None
    ) -> Outcome:
        """Train on `labels` and measure.

        Args:
            task: Inputs on the device that trains.
            labels: Labels to train on, (N,) int64, or (N, C) float32 where the method takes soft labels.
            options: Settings that differ from the method's defaults; an unknown one is a TypeError.
            seed: Same seed, same outcome on the CPU.
            checkpoint: File that a killed run goes on from; removed by the caller when the record is written.
        """
