"""Progressive Label Correction (PLC).

Zhang, Zheng, Wu, Goswami, Chen, "Learning with Feature-Dependent Label Noise: A Progressive Approach", ICLR 2021,
https://arxiv.org/abs/2103.07756. Letters in shapes: N images, D features, C classes, W epochs of the window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from third_party.augment import EVERY, Augmentation
from third_party.loop import (
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
    """The recipe; the defaults are the published code's for CIFAR."""

    epochs: int = 180
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0005
    nesterov: bool = True
    milestones: tuple[int, ...] = (40, 80)  # epochs, from 0, at which the learning rate is multiplied by gamma
    gamma: float = 0.5
    warmup: int = 8  # epochs before the first one that ends with a correction
    window: int = 5  # epochs whose predictions are averaged
    delta: float = 0.3  # initial likelihood ratio below which a label is replaced
    increment: float = 0.1
    limit: float = 0.9  # of delta, see cap
    few_flips: float = 0.001  # fraction of the images; fewer flips than that raise delta; 0: only none at all
    growth: str = "additive"  # the code: delta + increment after few flips; "multiplicative", the paper: delta *
    # (1 + increment) after no flip
    corrector: str = "ratio"  # "smoothed": the published code's for Clothing1M, see `correct_smoothed`
    drop_last: bool = False  # leave out a last batch that is not full, as the published code does but for CIFAR
    cap: str = "min"  # the code today: delta never above limit; "max", the code up to June 2021: never below it
    bf16: bool = False  # autocast to bfloat16
    compiled: bool = False  # through torch.compile


@dataclass(frozen=True)
class Result:
    """What training left besides the model, which holds the weights of the last epoch.

    Attributes:
        labels: The corrected labels, (N,) int64.
        history: One entry per epoch: epoch (from 0), lr, loss, flips (labels replaced at its end), delta (the ratio in
            force there), and what `measure` returned.
    """

    labels: Tensor
    history: list[dict[str, float]]


def correct(predictions: Tensor, labels: Tensor, delta: float) -> Tensor:
    """Replace a label by the likeliest class where its share of that class's likelihood is below `delta`.

    Args:
        predictions: Averaged predictions, (N, C); a common factor per image changes nothing.
        labels: Current labels, (N,) int64; left as they are.
        delta: Ratio in [0, 1]; a ratio equal to it keeps the label.

    Returns:
        Labels, (N,) int64. An image whose predictions are all zero keeps its label.

    Example:
        >>> correct(torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([1, 1]), 0.5).tolist()
        [0, 1]
    """
    highest, likeliest = predictions.max(dim=1)
    ratio = predictions.gather(1, labels[:, None])[:, 0] / highest  # 0 / 0 is NaN, which is below nothing
    return torch.where(ratio < delta, likeliest, labels)


def correct_smoothed(predictions: Tensor, labels: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """Correct as the published code does for Clothing1M: on the softmax of the averaged softmax outputs.

    Where even the likeliest class stays below 0.1 then, it replaces the label whatever the ratio.

    Args:
        predictions: Averaged predictions, (N, C), rows that sum to one.
        labels: Current labels, (N,) int64; left as they are.
        delta: Ratio below which a label is replaced elsewhere.

    Returns:
        Labels, (N,) int64, and which of them the ratio replaced, (N,) bool.

    Example:
        >>> labels = torch.tensor([1, 1])
        >>> correct_smoothed(torch.tensor([[0.8, 0.2], [0.6, 0.4]]), labels, 0.7)
        (tensor([0, 1]), tensor([ True, False]))
    """
    smooth = predictions.softmax(dim=1)
    highest, likeliest = smooth.max(dim=1)
    ruled = correct(smooth, labels, delta)
    unsure = highest < 0.1
    return torch.where(unsure, likeliest, ruled), ~unsure & (ruled != labels)


def next_delta(delta: float, flips: int, count: int, config: Config) -> float:
    """The ratio for the next correction, after one that replaced `flips` of `count` labels.

    Example:
        >>> next_delta(0.25, 44, 45_000, Config(increment=0.25)), next_delta(0.25, 45, 45_000, Config())
        (0.5, 0.25)
    """
    if config.growth == "additive":
        if flips >= max(config.few_flips * count, 1e-9):
            return delta
        raised = delta + config.increment
    else:
        if flips > 0:
            return delta
        raised = delta * (1 + config.increment)
    return min(raised, config.limit) if config.cap == "min" else max(raised, config.limit)


def train(
    model: Classifier,
    inputs: Tensor,
    labels: Tensor,
    config: Config,
    *,
    measure: Measure,
    seed: int,
    checkpoint: Path | None = None,
) -> Result:
    """Train with cross-entropy and correct the labels after every epoch from `warmup` on.

    Several processes that torchrun started and that have joined a process group share every batch, and each holds the
    window of its own rows, every n-th one; there is no checkpoint then.

    The window holds the predictions of the training pass itself: augmented inputs, batch statistics and dropout,
    weights from before the update.

    Args:
        model: The network, on the device of `inputs`; trained in place.
        inputs: Pixels, (N, 3, H, W) uint8, or features, (N, D).
        labels: Classes to start from, (N,) int64; left as they are.
        config: The recipe.
        measure: Called with the model after every epoch; its figures go into the history.
        seed: Same seed, same result on the CPU; 0 or more.
        checkpoint: Safetensors file to write to, and to resume from where it exists, with the same result.

    Raises:
        ValueError: Inputs, labels, a switch or the checkpoint do not fit, or the loss is not finite any more.
    """
    check_lengths(config.epochs, config.batch_size)
    check_inputs(model, inputs, labels, soft=False)
    for name, value, known in (
        ("growth", config.growth, ("additive", "multiplicative")),
        ("cap", config.cap, ("min", "max")),
        ("corrector", config.corrector, ("ratio", "smoothed")),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected {known[0]!r} or {known[1]!r}, got {value!r}")
    if config.window < 1:
        raise ValueError(f"window: expected at least 1 epoch, got {config.window}")
    device = inputs.device
    if inputs.ndim == 4:
        model.to(memory_format=torch.channels_last)
    rank, count = processes()
    if checkpoint is not None and count > 1:
        raise ValueError(f"checkpoint: expected None where {count} processes share the window, got {checkpoint}")
    network = parallel(model, device, config.compiled)
    optimiser = sgd(model, config.lr, config.momentum, config.weight_decay, config.nesterov, device)
    history: list[dict[str, float]] = []
    current, delta = labels.clone(), config.delta
    mine = torch.arange(rank, len(inputs), count, device=device)  # the rows of this process, all where there is one
    window = torch.zeros(config.window, len(mine), model.head.out_features, device=device)  # (W, N, C)
    progress = Progress(checkpoint, "plc", config, seed, inputs, labels)
    if state := progress.load(model, optimiser):
        history, delta = state["history"], state["delta"]
        current, window = state["labels"].to(device), state["window"].to(device)

    bar = tqdm(range(len(history), config.epochs), "plc", initial=len(history), total=config.epochs, disable=None)
    for epoch in bar:
        rate = stepped_rate(config.lr, config.milestones, config.gamma, epoch)
        optimiser.param_groups[0]["lr"] = rate
        predictions = window[epoch % config.window]  # (N, C)
        with seeded(device, seed, epoch):
            model.train()
            batches = list(shuffled_batches(len(inputs), config.batch_size, device, config.drop_last))
            total = torch.zeros((), device=device)
            parts = [(rows % count == rank).nonzero()[:, 0] if count > 1 else EVERY for rows in batches]
            read = read_batches(inputs, [rows[places] for rows, places in zip(batches, parts, strict=True)])
            for rows, places, images in zip(batches, parts, read, strict=True):
                own = rows[places]
                batch = views(images, config, len(rows), places)
                set_part(network, len(rows), places)
                with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                    logits = network(batch)
                logits = logits.float()
                predictions.index_copy_(0, own // count, logits.detach().softmax(dim=1))
                loss = batch_loss(logits, current.index_select(0, own), len(rows))
                optimiser.zero_grad()
                (loss * count).backward()  # type: ignore[no-untyped-call]  # averaged over processes, that is the sum
                optimiser.step()
                total += loss.detach()
            mean_loss = summed(total).item() / len(batches)
            if not math.isfinite(mean_loss):
                raise ValueError(
                    f"lr: expected a finite loss, got {mean_loss} in epoch {epoch}; lower lr ({config.lr})"
                )
            flips, delta_now = 0, delta
            if epoch >= config.warmup:
                corrected, ruled = torch.zeros_like(current), torch.zeros_like(current)
                if config.corrector == "ratio":
                    corrected[mine] = correct(window.mean(dim=0), current[mine], delta)
                    ruled[mine] = (corrected != current).long()[mine]
                else:
                    corrected[mine], found = correct_smoothed(window.mean(dim=0), current[mine], delta)
                    ruled[mine] = found.long()
                corrected, by_ratio = summed(corrected), int(summed(ruled).sum())
                flips = int((corrected != current).sum())
                current, delta = corrected, next_delta(delta, by_ratio, len(inputs), config)
            model.eval()
            with torch.no_grad():
                figures = dict(measure(model))
        entry = {"epoch": float(epoch), "lr": rate, "loss": mean_loss, "flips": float(flips), "delta": delta_now}
        history.append({**entry, **figures})
        progress.save(
            {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "history": history,
                "labels": current,
                "window": window,
                "delta": delta,
            },
            last=epoch == config.epochs - 1,
        )
        bar.set_postfix(loss=f"{mean_loss:.3f}", flips=flips, delta=f"{delta:.2f}", refresh=False)
    return Result(current, history)
