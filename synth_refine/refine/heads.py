"""Heads: components and soft targets in, small classifiers out that are cross-fitted, so that none scores what it saw.

Most heads are small networks. Where classes are many and images of each few, a network learns too little in a short
fit, and a linear discriminant, which one pass over the images gives in closed form, knows more: see `LINEAR`.

Letters in shapes: N images, M synthetic images, K components, C classes, n rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
LINEAR = 0  # epochs of linear discriminants
CHUNK_ELEMENTS = 1 << 21  # probabilities of a chunk of rows
RIDGE = 0.1  # times the mean variance within classes, added to each variance of a linear discriminant

Targets = Callable[[Bucket, "Tensor | slice"], Tensor]
"""Soft targets, (n, C), of rows at these places of a bucket."""


@dataclass(frozen=True)
class Fit:
    """What heads are fitted to, beside the targets, and how.

    Attributes:
        rows: Real images.
        synthetic: Components of the synthetic images, (M, K); none where M is 0.
        labels: Their intended classes, (M,) int64.
        classes: C.
        epochs: Passes over the images; `LINEAR` stands for linear discriminants in closed form.
        hidden: Units of the hidden layer; 0 makes the networks linear.
    """

    rows: Rows
    synthetic: Tensor
    labels: Tensor
    classes: int
    epochs: int
    hidden: int = HIDDEN


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


def fit_heads(fit: Fit, targets: Targets, key: int, picked: Sequence[Tensor] | None = None) -> list[nn.Module]:
    """A head per fold, trained on the other folds' images with soft targets and on synthetic images.

    Args:
        fit: Images, and the kind of heads.
        targets: Gives soft targets, anew for every batch.
        key: Draws folds, weights and batches; `hashed(numbers, key, FOLDS)` is the fold of a row.
        picked: Synthetic images that each fold's head is trained on; all by default.
    """
    picked = picked or [torch.arange(len(fit.synthetic))] * FOLDS
    return _discriminants(fit, targets, key, picked) if fit.epochs == LINEAR else _networks(fit, targets, key, picked)


def _networks(fit: Fit, targets: Targets, key: int, picked: Sequence[Tensor]) -> list[nn.Module]:
    rows, device = fit.rows, fit.synthetic.device
    generator = torch.Generator().manual_seed(key)
    torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=generator)))
    batch = min(max(BATCH[0], len(rows) // FOLDS // STEPS_PER_EPOCH), BATCH[1])
    steps = fit.epochs * max(STEPS_PER_EPOCH, rows.count(batch * FOLDS))
    drawn = max(round(SYNTHETIC_SHARE * batch), 1)
    heads = [new_head(fit.synthetic.shape[1], fit.classes, fit.hidden).to(device) for _ in range(FOLDS)]
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
                    inputs.append(fit.synthetic[picks])
                    outputs.append(F.one_hot(fit.labels[picks], fit.classes).float())
                if sum(map(len, inputs)):
                    step(F.cross_entropy(head(torch.cat(inputs)), torch.cat(outputs)))
            done += 1
    return [head.eval() for head in heads]


@torch.no_grad()
def _discriminants(fit: Fit, targets: Targets, key: int, picked: Sequence[Tensor]) -> list[nn.Module]:
    """Linear discriminants: a mean per class, one covariance within all, in one pass over the images."""
    classes, width, device = fit.classes, fit.synthetic.shape[1], fit.synthetic.device
    sums = torch.zeros((FOLDS, classes, width), dtype=torch.float64, device=device)
    counts = torch.zeros((FOLDS, classes), dtype=torch.float64, device=device)
    squares = torch.zeros((FOLDS, width, width), dtype=torch.float64, device=device)
    for bucket in fit.rows.buckets():
        folds = hashed(bucket.numbers, key, FOLDS)
        for part in parts(len(bucket), classes):
            features, wanted = bucket.features[part].float(), targets(bucket, part)
            for fold in range(FOLDS):
                others = (folds[part] != fold).nonzero()[:, 0]
                seen, shares = features[others], wanted[others]
                sums[fold] += shares.T @ seen
                counts[fold] += shares.sum(dim=0)
                squares[fold] += seen.T @ seen
    heads: list[nn.Module] = []
    for fold, own in enumerate(picked):
        seen, intended = fit.synthetic[own.to(device)].double(), fit.labels[own.to(device)]
        weight = SYNTHETIC_SHARE * float(counts[fold].sum()) / max(len(seen), 1)
        count = counts[fold] + weight * torch.bincount(intended, minlength=classes)
        means = sums[fold].index_add(0, intended, weight * seen) / count[:, None].clamp_min(1e-9)
        total = count.sum().clamp_min(1e-9)
        within = (squares[fold] + weight * seen.T @ seen - means.T @ (count[:, None] * means)) / total
        within.diagonal().add_(RIDGE * within.diagonal().mean().clamp_min(1e-6))
        weights = torch.linalg.solve(within, means.T).T
        head = new_head(width, classes, 0).to(device)
        prior = (count / total).clamp_min(1e-9).log()
        values = {"0.weight": weights, "0.bias": prior - (weights * means).sum(dim=1) / 2}
        head.load_state_dict(values)
        heads.append(head.eval())
    return heads


def as_probs(values: Tensor) -> Tensor:
    """Non-negative rows, (n, C), divided by their sums; several times as fast as `F.normalize`."""
    return values / values.sum(dim=1, keepdim=True).clamp_min(1e-12)


def parts(count: int, classes: int) -> Iterator[slice]:
    """So many rows in chunks that the cache of a processor holds for the most part."""
    step = max(64, CHUNK_ELEMENTS // max(classes, HIDDEN))
    return (slice(start, start + step) for start in range(0, count, step))


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


def held_out_probs(fit: Fit, targets: Targets, key: int) -> Tensor:
    """What heads that were not trained on them say of synthetic images, (M, C)."""
    count = len(fit.synthetic)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(key))
    fold_of = torch.arange(count) % FOLDS
    others = [order[fold_of != fold] if count >= FOLDS else order for fold in range(FOLDS)]
    heads = fit_heads(fit, targets, key, others)
    probs = fit.synthetic.new_empty((count, fit.classes))
    with torch.no_grad():
        for fold, head in enumerate(heads):
            held_out = order[fold_of == fold].to(fit.synthetic.device)
            probs[held_out] = head(fit.synthetic[held_out]).softmax(dim=1)
    return probs


def prototypes_of(synthetic: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, float]:
    """Prototypes of length one, (C, K), and how often those of the other images are right about a synthetic image."""
    sums = torch.zeros((classes, synthetic.shape[1]), device=synthetic.device).index_add_(0, labels, synthetic)
    counts = torch.bincount(labels, minlength=classes)[:, None]
    prototypes = F.normalize(sums / counts, dim=1)
    several = counts[labels, 0] > 1  # a class's only image cannot be left out
    if not bool(several.any()):
        return prototypes, TYPICAL_CONFIDENCE
    own = F.normalize(synthetic, dim=1)
    cosine = own @ prototypes.T
    rest = F.normalize(sums[labels] - synthetic, dim=1)
    cosine[torch.arange(len(cosine), device=cosine.device), labels] = (own * rest).sum(dim=1)
    right = float((cosine.argmax(dim=1) == labels)[several].float().mean())
    return prototypes, min(max(right, 1.5 / classes, 0.3), 0.95)


def fit_temperature(cosine: Tensor, confidence: float) -> float:
    """The factor at which softmax(factor * cosine) has this mean confidence, by bisection of its logarithm."""
    low, high = 0.1, 1000.0
    # The largest probability is one over the sum of the exponentials of these.
    below = cosine - cosine.amax(dim=1, keepdim=True)
    for _ in range(30):
        middle = math.sqrt(low * high)
        if float((middle * below).exp_().sum(dim=1).reciprocal_().mean()) < confidence:
            low = middle
        else:
            high = middle
    return middle
