"""Heads: components and soft targets in, small classifiers out that are cross-fitted, so that none scores what it saw.

Letters in shapes: N images, M synthetic images, K components, C classes, n rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synth_refine.refine.rows import Bucket, Rows, hashed

HIDDEN = 256
FOLDS = 2
STEPS_PER_EPOCH = 22  # the batch follows, within BATCH
BATCH = (32, 1024)  # real images of a fold per step
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 1e-2
DROPOUT = 0.3
TYPICAL_CONFIDENCE = 0.8  # of the prototypes, where a single synthetic image per class leaves nothing to hold out
SYNTHETIC_SHARE = 0.3  # synthetic images drawn per real image of a batch

Targets = Callable[[Bucket, Tensor], Tensor]
"""Soft targets, (n, C), of rows at these places of a bucket."""


class Nearest(nn.Module):
    """A head that needs no training: its logits are sharpened cosines to prototypes."""

    def __init__(self, prototypes: Tensor) -> None:
        """Take prototypes, (C, K), as long as the cosines are to be sharp."""
        super().__init__()
        self.register_buffer("prototypes", prototypes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits, (n, C)."""
        return F.linear(F.normalize(features, dim=1), self.get_buffer("prototypes"))


def new_head(width: int, classes: int, hidden: int) -> nn.Sequential:
    """A head that nothing has been fitted to, from K components to C logits; linear where `hidden` is 0."""
    layers = [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(DROPOUT)] if hidden else []
    return nn.Sequential(*layers, nn.Linear(hidden or width, classes))


def fit_heads(
    rows: Rows,
    targets: Targets,
    reference: Tensor,
    reference_labels: Tensor,
    key: int,
    *,
    classes: int,
    epochs: int,
    hidden: int = HIDDEN,
    reference_rows: Sequence[Tensor] | None = None,
) -> list[nn.Module]:
    """A head per fold, trained on the other folds' images with soft targets and on synthetic images.

    Args:
        rows: Real images.
        targets: Gives soft targets, anew for every batch.
        reference: Components of the synthetic images, (M, K); none where M is 0.
        reference_labels: Their intended classes, (M,) int64.
        key: Draws folds, weights and batches; `hashed(numbers, key, FOLDS)` is the fold of a row.
        classes: C.
        epochs: Passes over the images.
        hidden: Units of the hidden layer; 0 makes the heads linear.
        reference_rows: Rows of `reference` that each fold's head is trained on; all by default.
    """
    device = reference.device
    generator = torch.Generator().manual_seed(key)
    torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=generator)))
    batch = min(max(BATCH[0], len(rows) // FOLDS // STEPS_PER_EPOCH), BATCH[1])
    steps = epochs * max(STEPS_PER_EPOCH, rows.count(batch * FOLDS))
    drawn = max(round(SYNTHETIC_SHARE * batch), 1)
    picked = reference_rows or [torch.arange(len(reference))] * FOLDS
    heads = [new_head(reference.shape[1], classes, hidden).to(device) for _ in range(FOLDS)]
    stepping = [optimizer_step(head, steps) for head in heads]
    done = 0
    while done < steps:
        for bucket, places in islice(rows.batches(batch * FOLDS, generator), steps - done):
            features, wanted = bucket.features[places].float(), targets(bucket, places)
            folds = hashed(bucket.numbers[places], key, FOLDS)
            for fold, (head, step) in enumerate(zip(heads, stepping, strict=True)):
                others = (folds != fold).nonzero()[:, 0]
                inputs, outputs = [features[others]], [wanted[others]]
                if len(picked[fold]):
                    picks = picked[fold][torch.randint(len(picked[fold]), (drawn,), generator=generator)].to(device)
                    inputs.append(reference[picks])
                    outputs.append(F.one_hot(reference_labels[picks], classes).float())
                if sum(map(len, inputs)):
                    step(F.cross_entropy(head(torch.cat(inputs)), torch.cat(outputs)))
            done += 1
    return [head.eval() for head in heads]


def optimizer_step(head: nn.Module, steps: int) -> Callable[[Tensor], None]:
    """What takes the next of `steps` AdamW steps, on a one-cycle schedule, down a loss of the head."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()

    return step


def fold_logits(heads: Sequence[nn.Module], key: int, features: Tensor, numbers: Tensor) -> Tensor:
    """Logits of rows, (n, C) float32, each by the head of its fold, which did not see it; by the one head there is."""
    if len(heads) == 1:
        logits: Tensor = heads[0](features)
        return logits
    folds, order = hashed(numbers, key, len(heads)).sort(stable=True)
    ends = torch.bincount(folds, minlength=len(heads)).tolist()
    parts = [head(features[rows]) for head, rows in zip(heads, torch.split(order, ends), strict=True)]
    joined = torch.cat(parts)
    return torch.empty_like(joined).index_copy_(0, order, joined)


def held_out_probs(
    rows: Rows,
    targets: Targets,
    reference: Tensor,
    reference_labels: Tensor,
    key: int,
    *,
    classes: int,
    epochs: int,
    hidden: int = HIDDEN,
) -> Tensor:
    """What heads that were not trained on them say of synthetic images, (M, C)."""
    count = len(reference)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(key))
    fold_of = torch.arange(count) % FOLDS
    others = [order[fold_of != fold] if count >= FOLDS else order for fold in range(FOLDS)]
    more = {"classes": classes, "epochs": epochs, "hidden": hidden}
    heads = fit_heads(rows, targets, reference, reference_labels, key, **more, reference_rows=others)
    probs = reference.new_empty((count, classes))
    with torch.no_grad():
        for fold, head in enumerate(heads):
            held_out = order[fold_of == fold].to(reference.device)
            probs[held_out] = head(reference[held_out]).softmax(dim=1)
    return probs


def prototypes_of(reference: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, float]:
    """Prototypes of length one, (C, K), and how often those of the other images are right about a synthetic image."""
    sums = torch.zeros((classes, reference.shape[1]), device=reference.device).index_add_(0, labels, reference)
    counts = torch.bincount(labels, minlength=classes)[:, None]
    prototypes = F.normalize(sums / counts, dim=1)
    several = counts[labels, 0] > 1  # a class's only image cannot be left out
    if not bool(several.any()):
        return prototypes, TYPICAL_CONFIDENCE
    own = F.normalize(reference, dim=1)
    cosine = own @ prototypes.T
    rest = F.normalize(sums[labels] - reference, dim=1)
    cosine[torch.arange(len(cosine), device=cosine.device), labels] = (own * rest).sum(dim=1)
    right = float((cosine.argmax(dim=1) == labels)[several].float().mean())
    return prototypes, min(max(right, 1.5 / classes, 0.3), 0.95)


def sharpness(cosine: Tensor, confidence: float) -> float:
    """The factor at which softmax(factor * cosine) has this mean confidence, by bisection of its logarithm."""
    low, high = 0.1, 1000.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        if float((middle * cosine).softmax(dim=1).max(dim=1).values.mean()) < confidence:
            low = middle
        else:
            high = middle
    return middle
