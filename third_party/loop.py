"""What the training loops share: seeds, batches, the stepped learning rate and the way back from a checkpoint."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from third_party import checkpoint as checkpoints
from third_party.augment import EVERY, Augmentation, Places, augment
from third_party.mapped import MappedImages
from third_party.parallel import processes
from third_party.resnet import Classifier

Measure = Callable[[Classifier], Mapping[str, float]]
"""Figures of a network in evaluation mode, by name; whoever writes it knows labels that the loop must not see."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""The loss of each image, (B,), from logits, (B, C), and labels, (B,) or (B, C)."""

CHECKPOINT_SECONDS = 15.0
"""Least time between two checkpoints; a killed run repeats no more than that and one epoch."""


@contextmanager
def seeded(device: torch.device, *seed: int) -> Iterator[None]:
    """Random numbers that depend on `seed` alone; the caller's generators are left as they were.

    Example:
        >>> with seeded(torch.device("cpu"), 0, 7):
        ...     first = torch.rand(2)
        >>> with seeded(torch.device("cpu"), 0, 7):
        ...     bool((torch.rand(2) == first).all())
        True
    """
    mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(mixed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(mixed)
        yield


def shuffled_batches(count: int, batch_size: int, device: torch.device, drop_last: bool = False) -> Iterator[Tensor]:
    """Row indices of one epoch, (batch_size,) each; a last batch of one row is left out, as in PLC's code.

    With `drop_last` the last batch is left out whenever it is not full, unless it is the only one.
    """
    for rows in torch.split(torch.randperm(count, device=device), batch_size):
        if len(rows) > 1 and not (drop_last and len(rows) < batch_size <= count):
            yield rows


def read_batches(inputs: Tensor, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The inputs of each batch of rows, one batch after the other; those in a file are read ahead."""
    if isinstance(inputs, MappedImages):
        yield from inputs.batches(batches)
    else:
        for rows in batches:
            yield inputs.index_select(0, rows)


def views(batch: Tensor, how: Augmentation, rows: int, places: Places = EVERY) -> Tensor:
    """A batch, augmented where it is pixels: those at `places` of a batch of so many rows, with draws for all of it."""
    return augment(batch, how, of=rows, places=places) if batch.ndim == 4 else batch


def batch_loss(logits: Tensor, targets: Tensor, batch_rows: int, loss: Loss | None = None) -> Tensor:
    """This process's part of the mean loss of a batch of `batch_rows`, of which it may hold some or none.

    The loss is the cross-entropy unless another one is given.
    """
    if loss is not None:
        return loss(logits, targets).sum() / batch_rows
    if len(logits) == batch_rows:
        return F.cross_entropy(logits, targets)
    return F.cross_entropy(logits, targets, reduction="sum") / batch_rows


def stepped_rate(lr: float, milestones: Sequence[int], gamma: float, epoch: int) -> float:
    """Learning rate of an epoch: multiplied by `gamma` at every milestone reached.

    Example:
        >>> [stepped_rate(0.01, (40, 80), 0.5, epoch) for epoch in (0, 39, 40, 80)]
        [0.01, 0.01, 0.005, 0.0025]
    """
    return float(lr * gamma ** sum(epoch >= milestone for milestone in milestones))


def sgd(
    model: nn.Module, lr: float, momentum: float, weight_decay: float, nesterov: bool, device: torch.device
) -> torch.optim.SGD:
    """SGD on all parameters, in one kernel where the device has it."""
    fused = True if device.type in ("cpu", "cuda") else None
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fused
    )


def check_lengths(epochs: int, batch_size: int) -> None:
    """Refuse an empty run and batches that batch normalisation cannot take.

    Raises:
        ValueError: One line that names the argument, what was expected and what came.
    """
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 2)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_inputs(model: Classifier, inputs: Tensor, labels: Tensor, *, soft: bool) -> None:
    """Refuse what a loop cannot train on.

    Raises:
        ValueError: One line that names the argument, what was expected and what came.
    """
    if inputs.ndim not in (2, 4):
        raise ValueError(f"inputs: expected shape (N, 3, H, W) or (N, D), got {tuple(inputs.shape)}")
    if inputs.ndim == 4 and inputs.dtype != torch.uint8:
        raise ValueError(f"inputs: expected uint8 pixels, got {inputs.dtype}")
    count, num_classes = len(inputs), model.head.out_features
    if count < 2:
        raise ValueError(f"inputs: expected at least two rows, got {count}")
    if soft and labels.is_floating_point():
        if tuple(labels.shape) != (count, num_classes):
            raise ValueError(f"labels: expected soft labels ({count}, {num_classes}), got {tuple(labels.shape)}")
        return
    if labels.dtype != torch.int64 or tuple(labels.shape) != (count,):
        raise ValueError(f"labels: expected ({count},) int64, got {tuple(labels.shape)} {labels.dtype}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels: expected classes 0 to {num_classes - 1}, got {low} to {high}")


class Progress:
    """The checkpoint of one run: what it belongs to, and when it is due."""

    def __init__(
        self, path: Path | None, method: str, config: Any, seed: int, inputs: Tensor, labels: Tensor, **more: Any
    ) -> None:
        """Describe the run; nothing is read or written before `load` and `save`."""
        self.path = path
        self.written = time.monotonic()
        settings = asdict(config)
        settings.pop("compiled", None)  # a run may be resumed with it or without
        self.run = {
            "method": method,
            "seed": seed,
            "inputs": f"{tuple(inputs.shape)} {inputs.dtype}",
            "labels": f"{tuple(labels.shape)} {zlib.crc32(labels.cpu().numpy().tobytes()):08x}",
            **{key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
            **more,
        }

    def load(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Put the weights back and return the state, or None where the run starts afresh.

        Raises:
            ValueError: The file is damaged or belongs to a run with other labels or settings.
        """
        if self.path is None or not self.path.exists():
            return None
        state = checkpoints.load(self.path)
        saved = state.get("run", {})
        for key, value in self.run.items():
            if saved.get(key) != value:
                raise ValueError(
                    f"checkpoint: expected a run with {key} = {value}, got {saved.get(key)} in {self.path}; "
                    "remove the file to start afresh"
                )
        try:
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
        except RuntimeError as error:
            raise ValueError(f"checkpoint: expected the weights of this network, got others in {self.path}") from error
        for parameter, values in optimiser.state.items():
            # The fused kernel reads a buffer in the memory order of its parameter, whatever the buffer's own is.
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter).copy_(value)
        return state

    def save(self, state: Mapping[str, Any], *, last: bool) -> None:
        """Write the state if it is time, and always after the last epoch; of several processes, the first does it."""
        if (
            self.path is None
            or processes()[0] > 0
            or not (last or time.monotonic() - self.written >= CHECKPOINT_SECONDS)
        ):
            return
        checkpoints.save(self.path, {"run": self.run, **state})
        self.written = time.monotonic()
