"""What crosses between tasks, adapters and the benchmark.

Letters in shapes: N training images, V validation images, D features, C classes. Inputs are pixels, (N, 3, H, W) uint8,
or features of a frozen encoder, (N, D) float32; the methods are the same, only the network differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from third_party.mapped import MappedImages


@dataclass(frozen=True)
class Split:
    """Inputs and the labels that belong to them, row by row."""

    inputs: Tensor  # (N, 3, H, W) uint8, in memory or in a file (see third_party/mapped.py), or (N, D) float32
    labels: Tensor  # (N,) int64

    def to(self, device: torch.device) -> Split:
        """The same rows on another device."""
        here = self.inputs
        return Split(here.on(device) if isinstance(here, MappedImages) else here.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Task:
    """Everything a method may look at. The true labels of the training images are not in it."""

    num_classes: int
    train: Split  # with the given labels
    synthetic: Split  # with the intended class of each image
    noisy_validation: Split  # given labels: a choice of epoch that anybody can make
    clean_validation: Split  # the same rows with true labels: a privilege of the published protocols
    test: Split
    initial: Mapping[str, Tensor] | None = None  # weights of the classifier trained on the given labels

    @property
    def is_pixels(self) -> bool:
        """Whether the inputs are images; otherwise they are features."""
        return self.train.inputs.ndim == 4

    def to(self, device: torch.device) -> Task:
        """The same task on another device; inputs that two splits share are still shared."""
        clean = self.clean_validation
        noisy = self.noisy_validation.to(device)
        shared = clean.inputs is self.noisy_validation.inputs
        return replace(
            self,
            train=self.train.to(device),
            synthetic=self.synthetic.to(device),
            noisy_validation=noisy,
            clean_validation=Split(noisy.inputs, clean.labels.to(device)) if shared else clean.to(device),
            test=self.test.to(device),
        )


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
            checkpoint: File that a killed run resumes from; removed by the caller when the record is written.
        """
