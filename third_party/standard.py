"""Ordinary training with cross-entropy, from scratch and as fine-tuning on refined labels.

The recipes of "Noisy Label Refinement with Semantically Reliable Synthetic Images", Li, Mao, Matsui, ICIP 2025,
https://arxiv.org/abs/2509.04298. Letters in shapes: N images, D features, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from third_party.augment import Augmentation
from third_party.loop import (
    Loss,
    Measure,
    Progress,
    batch_loss,
    check_inputs,
    check_lengths,
    read_batches,
    seeded,
    sgd,
    shuffled_batches,
    stepped_rate,
    views,
)
from third_party.parallel import parallel, processes, set_part, summed
from third_party.resnet import Classifier


@dataclass(frozen=True)
class Config(Augmentation):
    """The recipe; the defaults are the paper's training from scratch."""

    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0005
    nesterov: bool = False
    milestones: tuple[int, ...] = (60, 120, 160)  # epochs, from 0, at which the learning rate is multiplied by gamma
    gamma: float = 0.2
    warmup: int = 1  # epochs over which the learning rate rises from 0, update by update
    warmup_overshoot: bool = False  # the published code's ramp: one epoch too long, so that the peak is too high
    bf16: bool = False  # autocast to bfloat16
    compiled: bool = False  # through torch.compile


FINE_TUNE = Config(epochs=50, lr=0.001, weight_decay=0.0001, milestones=(20, 40), gamma=0.1, warmup=0)
"""The paper's fine-tuning of all layers below a fresh head."""


@dataclass(frozen=True)
class Result:
    """What training left besides the model, which holds the weights of the last epoch.

    Attributes:
        history: One entry per epoch: epoch (from 0), lr of its last update, loss, and what `measure` returned.
        best_epoch: The earliest epoch with the highest `keep_best`; None without it.
        best_weights: Weights of that epoch; None without it.
    """

    history: list[dict[str, float]]
    best_epoch: int | None = None
    best_weights: dict[str, Tensor] | None = None


def learning_rate(config: Config, epoch: int, step: int, steps: int) -> float:
    """Learning rate of one update.

    The ramp is linear and starts at zero. With `warmup_overshoot` it lasts one epoch longer than intended,
    and the milestones count from where it ends: 0.2 from epoch 2, 0.04 from 62, 0.008 from 122, 0.0016 from 162 where
    the recipe says 0.1 from epoch 1, 0.02 from 60, 0.004 from 120, 0.0008 from 160.

    Args:
        config: The recipe.
        epoch: From 0.
        step: Update within the epoch, from 0.
        steps: Updates per epoch.

    Example:
        >>> [learning_rate(Config(), epoch, step, steps=4) for epoch, step in ((0, 0), (0, 2), (1, 0), (60, 0))]
        [0.0, 0.05, 0.1, 0.020000000000000004]
    """
    ramp_epochs = config.warmup + config.warmup_overshoot
    if epoch < ramp_epochs:
        return config.lr * (epoch * steps + step) / (config.warmup * steps)
    if not config.warmup_overshoot:
        return stepped_rate(config.lr, config.milestones, config.gamma, epoch)
    return stepped_rate(config.lr * ramp_epochs / config.warmup, config.milestones, config.gamma, epoch - ramp_epochs)


def train(
    model: Classifier,
    inputs: Tensor,
    labels: Tensor,
    config: Config,
    *,
    measure: Measure,
    seed: int,
    checkpoint: Path | None = None,
    keep_best: str | None = None,
    loss_of: Loss | None = None,
) -> Result:
    """Minimise the cross-entropy, or another loss, with SGD.

    Several processes that torchrun started and that have joined a process group share every batch: `batch_size` is that
    of all together, and each calls this with the same arguments but for the device.

    Args:
        model: The network, on the device of `inputs`; trained in place.
        inputs: Pixels, (N, 3, H, W) uint8, or features, (N, D).
        labels: Classes, (N,) int64, or soft labels, (N, C) float; left as they are.
        config: The recipe.
        measure: Called with the model after every epoch; its figures go into the history.
        seed: Same seed, same result on the CPU; 0 or more.
        checkpoint: Safetensors file to write to, and to resume from where it exists, with the same result.
        keep_best: Measured figure whose best epoch gives `Result.best_weights`.
        loss_of: What to minimise; None is the cross-entropy.

    Raises:
        ValueError: Inputs, labels or checkpoint do not fit, or the loss is not finite any more.
    """
    check_lengths(config.epochs, config.batch_size)
    check_inputs(model, inputs, labels, soft=True)
    if config.warmup_overshoot and config.warmup < 1:
        raise ValueError(f"warmup_overshoot: expected warmup of at least 1 epoch, got {config.warmup}")
    device = inputs.device
    if inputs.ndim == 4:
        model.to(memory_format=torch.channels_last)
    rank, count = processes()
    places = slice(rank, None, count)  # in every batch, of the rows of this process
    network = parallel(model, device, config.compiled)
    optimiser = sgd(model, config.lr, config.momentum, config.weight_decay, config.nesterov, device)
    history: list[dict[str, float]] = []
    best_epoch: int | None = None
    best_weights: dict[str, Tensor] | None = None
    loss_name = getattr(loss_of, "__name__", type(loss_of).__name__)
    progress = Progress(checkpoint, "standard", config, seed, inputs, labels, keep_best=keep_best, loss=loss_name)
    if state := progress.load(model, optimiser):
        history, best_epoch, best_weights = state["history"], state["best_epoch"], state["best_weights"]

    bar = tqdm(range(len(history), config.epochs), "standard", initial=len(history), total=config.epochs, disable=None)
    for epoch in bar:
        with seeded(device, seed, epoch):
            model.train()
            batches = list(shuffled_batches(len(inputs), config.batch_size, device))
            total = torch.zeros((), device=device)
            read = read_batches(inputs, [rows[places] for rows in batches])
            for step, (rows, images) in enumerate(zip(batches, read, strict=True)):
                optimiser.param_groups[0]["lr"] = learning_rate(config, epoch, step, len(batches))
                batch = views(images, config, len(rows), places)
                set_part(network, len(rows), places)
                with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                    logits = network(batch)
                loss = batch_loss(logits.float(), labels.index_select(0, rows[places]), len(rows), loss_of)
                optimiser.zero_grad()
                (loss * count).backward()  # type: ignore[no-untyped-call]  # averaged over processes, that is the sum
                optimiser.step()
                total += loss.detach()
            mean_loss = summed(total).item() / len(batches)
            if not math.isfinite(mean_loss):
                raise ValueError(
                    f"lr: expected a finite loss, got {mean_loss} in epoch {epoch}; lower lr ({config.lr})"
                )
            model.eval()
            with torch.no_grad():
                figures = dict(measure(model))
        if keep_best is not None and keep_best not in figures:
            raise ValueError(f"keep_best: expected one of {', '.join(figures) or 'no figures'}, got {keep_best!r}")
        rate = float(optimiser.param_groups[0]["lr"])
        history.append({"epoch": float(epoch), "lr": rate, "loss": mean_loss, **figures})
        if keep_best is not None and (best_epoch is None or figures[keep_best] > history[best_epoch][keep_best]):
            best_epoch = epoch
            best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        progress.save(
            {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "history": history,
                "best_epoch": best_epoch,
                "best_weights": best_weights,
            },
            last=epoch == config.epochs - 1,
        )
        bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
    return Result(history, best_epoch, best_weights)
