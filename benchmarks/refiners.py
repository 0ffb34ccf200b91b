"""The refiners that the benchmarks compare, each one function from the evidence to labels.

Letters in shapes: N real images, M synthetic images, D features, C classes. A refiner's options are its keyword
arguments, so that an unknown one is a TypeError. A new refiner is one function and one entry in `REFINERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from synth_refine import class_prototypes, refine_labels
from synth_refine.refine.anchored import HIDDEN, Posterior, anchored_posterior, cross_fit, standardised
from synth_refine.refine.checks import check_row_order, prototype_classes
from synth_refine.refine.decide import decide

VOTE_ROWS = 1024  # rows of a block of neighbours


@dataclass(frozen=True)
class Evidence:
    """Everything a refiner may look at. The true labels of the real images are not in it."""

    features: Tensor  # (N, D) of the real images
    logits: Tensor  # (N, C) of a classifier trained on the given labels
    given: Tensor  # (N,) int64
    synthetic: Tensor  # (M, D), features of the synthetic images by the same encoder
    synthetic_labels: Tensor  # (M,) int64, the class each image was made for
    num_classes: int
    seed: int = 0
    text_prototypes: Tensor | None = None  # (C, D), of an encoder that reads text
    two_views: bool = False  # whether the classifier behind `logits` sees the images otherwise than through `features`


Refiner = Callable[..., Tensor]
"""`refiner(evidence, **options)`: labels, (N,) int64, or soft labels, (N, C) float32 with rows that sum to one."""


def none(evidence: Evidence) -> Tensor:
    """The given labels."""
    return evidence.given.clone()


def paper(evidence: Evidence, threshold: float = 0.6, weight: float = 0.5) -> Tensor:
    """The rule of arXiv:2509.04298: the best class by cosine and softmax where its score reaches the threshold."""
    decision = refine_labels(evidence.features, evidence.logits, _prototypes(evidence), threshold, weight=weight)
    return decision.apply(evidence.given)


def zero_shot(evidence: Evidence) -> Tensor:
    """The class of the nearest prototype by cosine, whatever the given label."""
    logits = torch.zeros_like(evidence.logits)
    decision = refine_labels(evidence.features, logits, _prototypes(evidence), threshold=-1.0, weight=1.0)
    return decision.apply(evidence.given)


def anchored(evidence: Evidence, margin: float | None = None, rounds: int = 12, hidden: int = HIDDEN) -> Tensor:
    """The most probable true class where `decide` changes the label, the given label elsewhere."""
    return decide(_posterior(evidence, rounds, hidden), evidence.given, margin=margin).apply(evidence.given)


def anchored_soft(evidence: Evidence, rounds: int = 12, hidden: int = HIDDEN) -> Tensor:
    """The posterior of the true class as soft labels."""
    posterior = _posterior(evidence, rounds, hidden).posterior
    assert isinstance(posterior, Tensor)
    return posterior


def cleanlab(evidence: Evidence) -> Tensor:
    """Confident learning: the issues that cleanlab finds get the class that a cross-fitted head says.

    The head is the anchored refiner's, trained on the given labels and without the synthetic images.
    """
    from cleanlab.filter import find_label_issues  # type: ignore[import-untyped]

    device = evidence.features.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(evidence.seed)
        real, reference, _ = standardised(evidence.features.float(), evidence.synthetic.float())
        targets = F.one_hot(evidence.given, evidence.num_classes).float()
        nothing = reference[:0], evidence.synthetic_labels[:0]
        opinion, _ = cross_fit(real, targets, *nothing, seed=evidence.seed)
    issues = find_label_issues(evidence.given.cpu().numpy(), opinion.double().cpu().numpy(), n_jobs=1)
    return torch.where(torch.from_numpy(issues).to(evidence.given.device), opinion.argmax(dim=1), evidence.given)


def knn_vote(evidence: Evidence, neighbours: int = 10) -> Tensor:
    """The commonest given label among the nearest images by cosine and the image itself, as in SimiFeat.

    Zhu, Dong, Liu, ICML 2022, https://arxiv.org/abs/2110.06283. Exact, in blocks; ties go to the given label, then
    to the lower class.
    """
    directions = F.normalize(evidence.features.float(), dim=1)
    onehot = F.one_hot(evidence.given, evidence.num_classes).float()
    labels = evidence.given.clone()
    count = min(neighbours + 1, directions.shape[0])  # the image is its own nearest neighbour
    for start in range(0, directions.shape[0], VOTE_ROWS):
        rows = slice(start, start + VOTE_ROWS)
        nearest = (directions[rows] @ directions.T).topk(count, dim=1).indices  # (n, k)
        votes = onehot[nearest].sum(dim=1) + onehot[rows] / 2
        labels[rows] = votes.argmax(dim=1)
    return labels


def _posterior(evidence: Evidence, rounds: int, hidden: int) -> Posterior:
    opinion = prototype_classes(evidence.features, evidence.synthetic, evidence.synthetic_labels, evidence.num_classes)
    opinions = torch.from_numpy(opinion).to(evidence.given.device)
    check_row_order(evidence.given, opinions, evidence.num_classes)
    return anchored_posterior(
        evidence.features,
        evidence.given,
        evidence.synthetic,
        evidence.synthetic_labels,
        num_classes=evidence.num_classes,
        text_prototypes=evidence.text_prototypes,
        second_view=evidence.logits if evidence.two_views else None,
        seed=evidence.seed,
        rounds=rounds,
        hidden=hidden,
    )


def _prototypes(evidence: Evidence) -> Tensor:
    return class_prototypes(evidence.synthetic, evidence.synthetic_labels, evidence.num_classes)


REFINERS: dict[str, Refiner] = {
    "none": none,
    "paper": paper,
    "zero-shot": zero_shot,
    "anchored": anchored,
    "anchored-soft": anchored_soft,
    "cleanlab": cleanlab,
    "knn-vote": knn_vote,
}

SOFT_REFINERS = frozenset({"anchored-soft"})
"""Refiners that give soft labels."""
