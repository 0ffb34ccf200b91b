"""One expectation maximisation: rows, synthetic images and given labels in, a posterior of each true class out.

Every image has annotators: the given label, the labels of its nearest images, and a second view where there is one.
Each is read through a transition matrix of its own, T[y, a] = p(a | true class y), so that even labels that are mostly
wrong tell something. Heads, trained on the posteriors and on the synthetic images, say what an image shows; they only
score images that they were not trained on. Rounds of expectation maximisation join them all.

Work is of the order of N x C; nothing of N x C or C x C x N is held for more rows than one bucket has. Where steps are
kept (`steps`), a run that was killed resumes behind the last one, to the same bytes.

Letters in shapes: N images, M synthetic images, K components, C classes, n rows of a chunk, V neighbours' labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from synth_refine.refine.heads import (
    HIDDEN,
    LINEAR,
    Fit,
    Nearest,
    as_probs,
    fit_heads,
    fit_temperature,
    held_out_probs,
    parts,
    prototypes_of,
)
from synth_refine.refine.rows import Bucket, Rows, seed_of
from synth_refine.refine.state import VIEW_LEVELS, NoSteps, Saved, State, Steps, packed, unpacked

EPOCHS = (2, LINEAR, 8)
"""Kinds of heads, of which a later one must clearly beat those before it.

A short fit does not memorise wrong posteriors; few images of many classes need a linear one or a longer one.
"""
LIKELIER = 0.05  # nats per label by which it must raise the likelihood of the given labels
SETTLED = 0.001  # stop when a round changes fewer labels than this
FIRST_STEPS = 11  # maximisation steps of the transition matrices before the first round
ROUND_STEPS = 2  # and in every round, from those of the round before on
LAST_STEPS = 4  # and in the end
VOTES_PER_CORRELATION = 1 / 16
"""Votes that the labels of a neighbourhood are worth, times the correlation of its labels.

The correlation is that by which neighbourhoods scatter more, around the mean of their class, than independent labels
would: near 0 where noise is uniform, and large where labels follow the image. It needs no true label. Chosen, with the
next five, on CIFAR-10 label files with true labels in sight.
"""
TRUSTED_NOISE = 0.3  # estimated noise up to which the votes grow with it
MOST_VOTES = 12.0
FINAL_VOTES = 1.5  # times the votes in the end, when no head learns from them any more
LEAST_FINAL_VOTES = 1.2
EXPONENTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
EXPONENT_STEPS = 3
TRUST = (0.20, 0.30)  # estimated noise up to which likelihood alone chooses the exponent, and from which on it does not
VIEW_EXPONENT = 0.5  # of heads and neighbours, where a second view leads: both err on the same images
VIEW_STEPS = 10  # maximisation steps in every round, where there is a second view
LEADING = (0.05, 0.5)  # noise from which on, and share of it up to which a second view's errors make it lead
AVERAGED = 5  # last rounds whose heads speak together in the end
HELD_ELEMENTS = 1 << 26  # probabilities that are kept between passes, where all rows are one bucket
SAMPLE_ELEMENTS = 1 << 23  # scores from which the temperature of the prototypes is chosen


@dataclass(frozen=True)
class Sums:
    """What a pass over all images adds up.

    Attributes:
        given: Expected images by given label and true class, (C, C).
        near: Expected labels of neighbours by label and true class, (C, C).
        view: Expected answers of the second view, (C * VIEW_LEVELS, C).
        scatter: Squared distances of the neighbourhoods' labels from the mean of their class.
        chance: The same if every neighbourhood were a single independent draw.
        log_likelihood: Log p(given label | image, other annotators).
        stays: Probability that the given label is right.
        view_stays: Probability that the second view is right.
    """

    given: Tensor
    near: Tensor
    view: Tensor
    scatter: float
    chance: float
    log_likelihood: float
    stays: float
    view_stays: float


@dataclass
class EM:
    """The algorithm, in steps that can be kept.

    Attributes:
        rows: Real images.
        synthetic: Components of the synthetic images, (M, K) float32.
        synthetic_labels: Their intended classes, (M,) int64.
        classes: C.
        seed: Draws folds, weights and batches.
        rounds: Most rounds.
        hidden: Units of the heads' hidden layer.
        words: Components of the classes' text features, (C, K), or None.
        steps: Where finished steps are kept.
        bar: Shows what is being done.
    """

    rows: Rows
    synthetic: Tensor
    synthetic_labels: Tensor
    classes: int
    seed: int = 0
    rounds: int = 12
    hidden: int = HIDDEN
    words: Tensor | None = None
    steps: Steps = field(default_factory=NoSteps)
    bar: tqdm[Any] = field(default_factory=lambda: tqdm(disable=True))

    def __post_init__(self) -> None:
        self.has_view = self.rows.bucket(0).view is not None
        self._kept: tuple[State, Tensor] | None = None
        self._posteriors: tuple[State, Tensor] | None = None

    def run(self) -> tuple[State, list[dict[str, float]]]:
        """The last state, and an entry per round.

        An entry has `log_likelihood` of the given labels under held-out heads (mean per label), `changed` (fraction of
        images whose most probable class moved), `noise` (estimated, of the given labels), `epochs` of each fit and
        `votes`.
        """
        first, least = self.first()
        state, history = self._all_rounds(first)
        if history[-1]["log_likelihood"] < least and not self.has_view:
            return first, history  # the heads never came up to the prototypes
        state, _ = self.maximised(self._honest(state, history[-1]["noise"]), LAST_STEPS)
        return state, history

    # -- the first state --

    def first(self) -> tuple[State, float]:
        """What the prototypes say, and how likely that makes the given labels."""
        if (saved := self.steps.load("first")) is None:
            self.bar.set_description("prototypes")
            best: tuple[State, Sums] | None = None
            for prototypes in self._prototypes():
                state, sums = self.maximised(self._blank(Nearest(prototypes)), FIRST_STEPS)
                if best is None or sums.log_likelihood > best[1].log_likelihood:
                    best = state, sums
            assert best is not None
            info = {"log_likelihood": best[1].log_likelihood / len(self.rows)}
            saved = self.steps.save("first", packed(best[0], info))
        return unpacked(saved), saved.info["log_likelihood"]

    def _prototypes(self) -> Iterator[Tensor]:
        """Prototypes of the images, of the texts, of both, as sharp as they are right about held-out images."""
        images, confidence = prototypes_of(self.synthetic, self.synthetic_labels, self.classes)
        choices = [images]
        if self.words is not None:
            texts = F.normalize(self.words, dim=1)
            choices += [texts, (images + texts) / 2]
        bucket = self.rows.bucket(0)
        sample = bucket[slice(None, None, math.ceil(len(bucket) * self.classes / SAMPLE_ELEMENTS))]
        for prototypes in choices:
            cosine = Nearest(prototypes)(sample.features.float())
            yield prototypes * fit_temperature(cosine, confidence)

    @property
    def image_prototypes(self) -> Tensor:
        """Prototypes of the synthetic images, of length one, (C, K)."""
        return prototypes_of(self.synthetic, self.synthetic_labels, self.classes)[0]

    def _blank(self, head: nn.Module) -> State:
        """A state in which annotators say nothing yet."""
        classes, device = self.classes, self.synthetic.device
        tables = (torch.full((size, classes), 1 / size, device=device) for size in (classes, classes, self._answers))
        given, near, view = tables
        return State([[head]], [0], given, near, view)

    @property
    def _answers(self) -> int:
        return self.classes * VIEW_LEVELS if self.has_view else 1

    # -- rounds --

    def _all_rounds(self, first: State) -> tuple[State, list[dict[str, float]]]:
        if (saved := self.steps.load("rounds")) is None:
            most = -math.inf
            for epochs in EPOCHS:  # the first kind that a later one does not clearly beat
                if (trial := self.steps.load(f"trial-{epochs}")) is None:
                    state, entry = self._round(first, 0, epochs)
                    trial = self.steps.save(f"trial-{epochs}", packed(state, {"history": [entry]}))
                value = trial.info["history"][0]["log_likelihood"]
                if saved is None or value > most + LIKELIER:
                    saved, most = trial, value
            assert saved is not None
            saved = self.steps.save("rounds", saved)
        averaged, history = unpacked(saved), list(saved.info["history"])
        state = replace(averaged, heads=averaged.heads[-1:], keys=averaged.keys[-1:])
        while len(history) < self.rounds and history[-1]["changed"] >= SETTLED:
            state, entry = self._round(state, len(history), int(history[0]["epochs"]))
            history.append(entry)
            heads, keys = [*averaged.heads, *state.heads], [*averaged.keys, *state.keys]
            averaged = replace(state, heads=heads[-AVERAGED:], keys=keys[-AVERAGED:])
            self.steps.save("rounds", packed(averaged, {"history": history}))
        return averaged, history

    def _round(self, before: State, number: int, epochs: int) -> tuple[State, dict[str, float]]:
        self.bar.set_description(f"round {number + 1}")
        key = seed_of(1, self.seed, number)
        heads = fit_heads(self._fit(epochs), partial(self._posterior, before), key)
        steps = VIEW_STEPS if self.has_view else ROUND_STEPS
        state, sums = self.maximised(replace(before, heads=[heads], keys=[key]), steps)
        leads = self._view_leads(sums)
        exponent = VIEW_EXPONENT if leads else 1.0
        state = replace(state, votes=self._votes(sums), view_leads=leads, exponent=exponent)
        sample = self.rows.bucket(0)
        old, new = (
            torch.cat([self._posterior(one, sample, part).argmax(dim=1) for part in self.parts(len(sample))])
            for one in (before, state)
        )
        entry = {
            "log_likelihood": sums.log_likelihood / len(self.rows),
            "changed": float((old != new).float().mean()),
            "noise": 1 - sums.stays / len(self.rows),
            "epochs": epochs,
            "votes": state.votes,
        }
        self.bar.set_postfix(changed=f"{entry['changed']:.4f}", refresh=False)
        self.bar.update()
        return state, entry

    def _votes(self, sums: Sums) -> float:
        """How many independent votes a neighbourhood is worth; see `VOTES_PER_CORRELATION`."""
        if not sums.scatter or self.rows.neighbours <= 1:  # a single neighbour cannot scatter
            return 0.0
        independent = sums.chance / sums.scatter  # draws that would scatter as much
        correlation = (1 / independent - 1 / self.rows.neighbours) / (1 - 1 / self.rows.neighbours)
        noise = 1 - sums.stays / len(self.rows)
        votes = VOTES_PER_CORRELATION / max(correlation, 1e-6) * min(1.0, noise / TRUSTED_NOISE)
        return float(min(votes, MOST_VOTES))

    def _view_leads(self, sums: Sums) -> bool:
        wrong, view_wrong = (1 - one / len(self.rows) for one in (sums.stays, sums.view_stays))
        return self.has_view and wrong > LEADING[0] and view_wrong < LEADING[1] * wrong

    def _honest(self, state: State, noise: float) -> State:
        """The state with its last votes, and the exponent at which the given labels are likeliest.

        Where few labels are wrong, a lower exponent tells how far heads and neighbours are too sure. Where many are
        wrong in a systematic way, it only makes room for them: it is trusted the less, the more labels are wrong.
        """
        if self.rows.neighbours:
            votes = min(max(FINAL_VOTES * state.votes, LEAST_FINAL_VOTES), MOST_VOTES)
            state = replace(state, votes=votes)
        if self.has_view:
            return state
        trust = min(max((TRUST[1] - noise) / (TRUST[1] - TRUST[0]), 0.0), 1.0)
        best, chosen = -math.inf, 1.0
        for exponent in EXPONENTS if trust else ():
            _, sums = self.maximised(replace(state, exponent=exponent), EXPONENT_STEPS)
            if sums.log_likelihood <= best:  # it has one peak
                break
            best, chosen = sums.log_likelihood, exponent
        return replace(state, exponent=1 - (1 - chosen) * trust)

    def _fit(self, epochs: int) -> Fit:
        return Fit(self.rows, self.synthetic, self.synthetic_labels, self.classes, epochs, self.hidden)

    def held_out_probs(self, state: State, epochs: int) -> Tensor:
        """What heads of the same kind say of synthetic images that they were not trained on, (M, C)."""
        if (saved := self.steps.load("held-out")) is None:
            self.bar.set_description("held-out synthetic images")
            probs = held_out_probs(self._fit(epochs), partial(self._posterior, state), seed_of(2, self.seed))
            saved = self.steps.save("held-out", Saved({"probs": probs}, {}))
        return saved.tensors["probs"]

    # -- passes --

    def maximised(self, state: State, steps: int, softening: float = 1.0) -> tuple[State, Sums]:
        """The state after so many steps of its transition matrices, and the sums that the last of them came from."""
        for _ in range(steps):
            sums = self.sums(state, softening)
            tables = ((sums.given, 1.0), (sums.near, 1.0), (sums.view, 1 / VIEW_LEVELS))
            given, near, view = (F.normalize(one + count, p=1, dim=0) for one, count in tables)
            state = replace(state, by_given=given, by_near=near, by_view=view)
        return state, sums

    @torch.no_grad()
    def sums(self, state: State, softening: float = 1.0) -> Sums:
        """One pass over all images."""
        shapes = ((self.classes,) * 2, (self.classes,) * 2, (self._answers, self.classes))
        totals = [torch.zeros(shape, dtype=torch.float64, device=self.synthetic.device) for shape in shapes]
        scatter = chance = log_likelihood = stays = view_stays = 0.0
        lengths = state.by_near.square().sum(dim=0)  # (C,)
        for bucket in self.rows.buckets():
            # Sums of a bucket first: float32 would lose small numbers that are added to millions one by one.
            given, near, view = (torch.zeros_like(total, dtype=torch.float32) for total in totals)
            for part in self.parts(len(bucket)):
                chunk = bucket[part]
                joint = state.join(self._head_probs(state, bucket, part, softening), chunk)
                if state.view_leads:
                    given.index_add_(0, chunk.given, joint)
                joint.mul_(state.given_likelihood(chunk.given))
                likelihood = joint.sum(dim=1, keepdim=True).clamp_min_(1e-30)
                posterior = joint.div_(likelihood)
                if not state.view_leads:
                    given.index_add_(0, chunk.given, posterior)
                if chunk.near_labels is not None and chunk.near_weights is not None:
                    near += _summed(posterior, chunk.near_labels, chunk.near_weights, self.classes)
                    winner = posterior.argmax(dim=1)
                    means = state.by_near[chunk.near_labels, winner[:, None]]  # (n, V)
                    apart = chunk.near_weights.square().sum() - 2 * (chunk.near_weights * means).sum()
                    scatter += float(apart + lengths[winner].sum())
                    chance += float((1 - lengths[winner]).sum())
                if chunk.view is not None:
                    view.index_add_(0, chunk.view, posterior)
                    view_stays += float(posterior.gather(1, chunk.view[:, None] // VIEW_LEVELS).sum())
                stays += float(posterior.gather(1, chunk.given[:, None]).sum())
                log_likelihood += float(likelihood.log_().sum())
            for total, counts in zip(totals, (given, near, view), strict=True):
                total += counts
        sums = [total.float() for total in totals]
        return Sums(sums[0], sums[1], sums[2], scatter, chance, log_likelihood, stays, view_stays)

    @torch.no_grad()
    def posteriors(self, state: State) -> Iterator[tuple[Bucket, Tensor]]:
        """All rows and their posteriors, (n, C), a chunk at a time."""
        for bucket in self.rows.buckets():
            for part in self.parts(len(bucket)):
                yield bucket[part], self._posterior(state, bucket, part)

    def parts(self, count: int) -> Iterator[slice]:
        """So many rows in chunks."""
        return parts(count, self.classes)

    @property
    def _holds(self) -> bool:
        return len(self.rows.ends) == 2 and len(self.rows) * self.classes <= HELD_ELEMENTS

    @torch.no_grad()
    def _head_probs(self, state: State, bucket: Bucket, part: slice, softening: float = 1.0) -> Tensor:
        """p(true class | image)^softening of a part of a bucket, (n, C); computed once where rows are one bucket."""
        if not self._holds:
            probs = state.head_probs(bucket[part])
        else:
            if self._kept is None or self._kept[0].heads is not state.heads:
                every = [state.head_probs(bucket[one]) for one in self.parts(len(bucket))]
                self._kept = state, torch.cat(every)
            probs = self._kept[1][part]
        return probs if softening == 1 else probs**softening

    @torch.no_grad()
    def _posterior(self, state: State, bucket: Bucket, places: Tensor | slice) -> Tensor:
        """Posteriors of some rows of a bucket, (n, C); computed once where all rows are one bucket."""
        if not self._holds:
            return state.posterior(bucket[places])
        if self._posteriors is None or self._posteriors[0] is not state:
            every = []
            for part in self.parts(len(bucket)):
                chunk = bucket[part]
                joint = state.join(self._head_probs(state, bucket, part), chunk) * state.given_likelihood(chunk.given)
                every.append(as_probs(joint))
            self._posteriors = state, torch.cat(every)
        return self._posteriors[1][places]


def _summed(values: Tensor, labels: Tensor, weights: Tensor, count: int) -> Tensor:
    """Sums of rows, (n, C), by the labels, (n, V), that each of them has, times the weights of these, (count, C)."""
    order = labels.flatten().argsort(stable=True)
    many = torch.bincount(labels.flatten(), minlength=count)
    return F.embedding_bag(
        order // labels.shape[1],
        values,
        many.cumsum(dim=0) - many,
        per_sample_weights=weights.flatten()[order],
        mode="sum",
    )
