"""Images that show none of the classes: rows and a solved refinement in, how likely each image is one of them out.

Pictures of something else lie together, as others do, but the labels around them have little to do with each other:
they follow the share of each label in the whole set, and not what any class is given. That is read from the neighbours'
labels by the transition matrix that the refiner has found. Two-class heads, trained on the answer and on the synthetic
images, then say what such pictures look like, and both are joined by expectation maximisation. It needs no true labels
and no share of such pictures.

cleanlab's OutOfDistribution scores by the distance to neighbours or by a classifier's probabilities, which finds fewer:
`benchmarks/no_class.py` compares all three.

Limits: where pictures of no class all have the label of the class that they resemble, only their looks tell, and fewer
are found. A class without a synthetic image that looks like it may be taken for none.

Letters in shapes: N images, M synthetic images, C classes, n rows of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from synth_refine.refine.em import EM
from synth_refine.refine.heads import Fit, as_probs, fit_heads, fold_logits
from synth_refine.refine.rows import Bucket, MemoryRows, Rows, seed_of
from synth_refine.refine.solve import RECOGNIZED, Solution, solve
from synth_refine.refine.state import Saved, State, Steps

PRIOR = 0.05  # share of such pictures that the first round expects; the heads find out how many there are
VOTES = 0.5
"""Votes that the labels of a neighbourhood are worth, per independent draw of those that would scatter as much."""
ROUNDS = 16  # at most
AVERAGED = 3  # last rounds whose heads speak together
GROWTH = 1.05  # of the expected share in a round; where it grows no faster, there is no more to find
EPOCHS = 4  # of the heads
PROPOSED = 2 / 3
"""Probability from which on a removal is proposed; chosen, with the numbers above, on CIFAR-10 by true labels."""
TEACHING = 0.005  # share of proposed removals from which on the refiner runs again without them


def solve_without(em: EM, *, threshold: float | str | None = None, force: bool = False) -> Solution:
    """`solve`, and how likely images show none of the classes; where some do, solved again without them.

    Args:
        em: The algorithm and its rows, in memory or on disk.
        threshold: See `solve`.
        force: See `solve`.

    Returns:
        The solution, with `no_class` by row number, where it is scored: not where nothing tells the classes apart.
    """
    solution = solve(em, threshold=threshold, force=force)
    if not solution.history or solution.synthetic_accuracy < RECOGNIZED:
        return solution
    if (saved := em.steps.load("no-class")) is None:
        em.bar.set_description("images of no class")
        with torch.random.fork_rng(devices=[em.synthetic.device] if em.synthetic.is_cuda else []):
            saved = em.steps.save("no-class", Saved({"probs": no_class(em, solution.state)}, {}))
    probs = saved.tensors["probs"]
    if float((probs > PROPOSED).sum()) > TEACHING * len(em.rows):
        em.bar.reset()
        rest = replace(em, rows=_rest(em.rows, partial(proposed, probs)), steps=_Later(em.steps))
        solution = solve(rest, threshold=threshold, force=force)
    return replace(solution, no_class=probs)


def proposed(probs: Tensor, numbers: Tensor) -> Tensor:
    """Which rows of these numbers are proposed for removal, (n,) bool, by the probabilities of all."""
    return probs.to(numbers.device)[numbers] > PROPOSED


@torch.no_grad()
def no_class(em: EM, state: State) -> Tensor:
    """How likely each image shows none of the classes, by row number, (N,); NaN where it cannot be scored."""
    size = 1 + max(int(bucket.numbers.max()) for bucket in em.rows.buckets() if len(bucket))
    device = em.synthetic.device
    evidence = torch.full((size,), torch.nan, device=device)
    total = sum(torch.bincount(bucket.given, minlength=em.classes) for bucket in em.rows.buckets())
    assert isinstance(total, Tensor)
    log_share = as_probs(total[None] + 1.0)[0].log()
    sums = em.sums(state)
    votes = VOTES * sums.chance / sums.scatter if sums.scatter else 0.0
    for bucket in em.rows.buckets():
        for part in em.parts(len(bucket)):
            evidence[bucket.numbers[part]] = _evidence(bucket[part], state, log_share, votes)
    log_odds = evidence + math.log(PRIOR / (1 - PRIOR))
    some = torch.zeros_like(em.synthetic_labels)  # every synthetic image shows one of the classes
    looks: list[Tensor] = []
    share = 0.0
    for number in range(ROUNDS):
        key, probs = seed_of(4, em.seed, number), log_odds.sigmoid()
        before, share = share, float(probs.nanmean())
        if number > AVERAGED and share < GROWTH * before:
            break
        with torch.enable_grad():
            heads = fit_heads(Fit(em.rows, em.synthetic, some, 2, EPOCHS, em.hidden), partial(_targets, probs), key)
        look = torch.full_like(evidence, torch.nan)
        for bucket in em.rows.buckets():
            for part in em.parts(len(bucket)):
                logits = fold_logits(heads, key, bucket.features[part].float(), bucket.numbers[part])
                look[bucket.numbers[part]] = logits[:, 1] - logits[:, 0]
        looks = [*looks, look][-AVERAGED:]
        log_odds = torch.stack(looks).mean(dim=0) + evidence
    return log_odds.sigmoid()


def _targets(probs: Tensor, bucket: Bucket, places: Tensor | slice) -> Tensor:
    none = probs[bucket.numbers[places]]
    return torch.stack([1 - none, none], dim=1)


def _evidence(rows: Bucket, state: State, log_share: Tensor, votes: float) -> Tensor:
    """Log odds of what the labels around images say: that they follow no class, against any of the classes, (n,)."""
    if rows.near_labels is None or rows.near_weights is None:
        return torch.zeros(len(rows), device=rows.given.device)
    weights = votes * as_probs(rows.near_weights)
    none = (weights * log_share[rows.near_labels]).sum(dim=1)
    classes = F.embedding_bag(rows.near_labels, state.log_by_near, per_sample_weights=weights, mode="sum")  # (n, C)
    return none - classes.add_(state.head_probs(rows).clamp_min(1e-6).log()).logsumexp(dim=1)


def _rest(rows: Rows, out: Callable[[Tensor], Tensor]) -> Rows:
    """The rows whose numbers are not `out`."""
    if isinstance(rows, MemoryRows):
        kept = ~out(rows.all.numbers)
        counts = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(dim=0)])
        return MemoryRows(rows.all[kept.nonzero()[:, 0]], counts[torch.tensor(rows.ends)].tolist(), rows.neighbours)
    return _Rest(rows, out)


class _Rest(Rows):
    """Rows on disk without some of them."""

    def __init__(self, rows: Rows, out: Callable[[Tensor], Tensor]) -> None:
        self._rows, self._out, self.neighbours = rows, out, rows.neighbours
        counts = [int((~out(bucket.numbers)).sum()) for bucket in rows.buckets()]
        self.ends = [sum(counts[:number]) for number in range(len(counts) + 1)]

    def bucket(self, number: int) -> Bucket:
        """The rows of one bucket that are left."""
        bucket = self._rows.bucket(number)
        return bucket[(~self._out(bucket.numbers)).nonzero()[:, 0]]


@dataclass(frozen=True)
class _Later:
    """Where the steps of a second run are kept, beside those of the first."""

    steps: Steps

    def load(self, name: str) -> Saved | None:
        """As `Steps`."""
        return self.steps.load(f"later-{name}")

    def save(self, name: str, saved: Saved) -> Saved:
        """As `Steps`."""
        return self.steps.save(f"later-{name}", saved)
