"""What a round of the expectation maximisation knows, how it reads an image, and how it is kept.

Letters in shapes: N images, K components, C classes, n rows of a chunk, V neighbours' labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synth_refine.refine.heads import Nearest, as_probs, fold_logits, new_head
from synth_refine.refine.rows import Bucket

VIEW_LEVELS = 8  # of confidence, at which a second view's answers are told apart
LED_EXPONENT = 0.5  # of the given labels' evidence, where a second view leads


@dataclass(frozen=True)
class State:
    """What a round knows.

    Attributes:
        heads: Of each round that is averaged, one head for all images, or one per fold.
        keys: What draws the folds of each round.
        by_given: p(given label | true class), (C, C), a row per *given* label, so that a chunk gathers whole rows.
        by_near: p(label of a neighbour | true class), likewise.
        by_view: p(answer of the second view | true class), (C * VIEW_LEVELS, C), likewise.
        votes: Independent votes that the labels of a neighbourhood are worth.
        exponent: Of what heads and neighbours say together, at most 1; below 1 they are too sure.
        view_leads: Whether the second view is so much better than the given labels that these are judged without
            being an annotator themselves.
        trust: Of a given label itself, times what its transition matrix says; see `count_changes`.
    """

    heads: list[list[nn.Module]]
    keys: list[int]
    by_given: Tensor
    by_near: Tensor
    by_view: Tensor
    votes: float = 0.0
    exponent: float = 1.0
    view_leads: bool = False
    trust: float = 1.0

    def head_probs(self, rows: Bucket) -> Tensor:
        """p(true class | image) by heads that did not see it, (n, C)."""
        features = rows.features.float()
        logits = (fold_logits(*one, features, rows.numbers) for one in zip(self.heads, self.keys, strict=True))
        probs = sum(one.softmax(dim=1) for one in logits)
        assert isinstance(probs, Tensor)
        return probs / len(self.heads)

    def join(self, head_probs: Tensor, rows: Bucket) -> Tensor:
        """The same with what all annotators but the given labels say, (n, C)."""
        if self.votes and rows.near_labels is not None:
            log_probs = F.embedding_bag(
                rows.near_labels, self.log_by_near, per_sample_weights=rows.near_weights, mode="sum"
            )
            votes = log_probs.sub_(log_probs.amax(dim=1, keepdim=True)).mul_(self.votes).exp_()
            head_probs = votes.mul_(head_probs)
        if self.exponent != 1:
            head_probs = as_probs(head_probs).log_().mul_(self.exponent).exp_()
        if rows.view is not None:
            head_probs = head_probs * self.by_view[rows.view]
        return as_probs(head_probs)

    @cached_property
    def log_by_near(self) -> Tensor:
        """Logarithms of `by_near`, (C, C)."""
        return self.by_near.log()

    def probs(self, rows: Bucket) -> Tensor:
        """p(true class | image, all annotators but the given labels), (n, C)."""
        return self.join(self.head_probs(rows), rows)

    def posterior(self, rows: Bucket) -> Tensor:
        """p(true class | image, all annotators), (n, C)."""
        return as_probs(self.probs(rows) * self.given_likelihood(rows.given))

    def given_likelihood(self, given: Tensor) -> Tensor:
        """What the given labels say of each class, (n, C)."""
        likelihood = self.by_given[given]
        likelihood = likelihood**LED_EXPONENT if self.view_leads else likelihood
        if self.trust != 1:
            likelihood[torch.arange(len(given), device=given.device), given] *= self.trust
        return likelihood


@dataclass(frozen=True)
class Saved:
    """What a step found: tensors, and what JSON can hold."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]


class Steps(Protocol):
    """Where finished steps are kept."""

    def load(self, name: str) -> Saved | None:
        """What was kept under this name, if it is there and undamaged."""

    def save(self, name: str, saved: Saved) -> Saved:
        """Keep it."""


class NoSteps:
    """Keeps nothing."""

    def load(self, name: str) -> Saved | None:
        """Nothing."""

    def save(self, name: str, saved: Saved) -> Saved:
        """What came."""
        return saved


def view_answers(logits: Tensor, scored: Tensor) -> Tensor:
    """What a second view says of each image: its class and, in levels of equally many images, how sure it is, (N,).

    Args:
        logits: (N, C).
        scored: Which images are there, (N,) bool; the others get 0.
    """
    answers = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    sure, winner = logits[scored].softmax(dim=1).max(dim=1)
    answers[scored] = leveled(winner, sure)
    return answers


def leveled(winner: Tensor, sure: Tensor) -> Tensor:
    """Classes and how sure of them a second view is, (n,) each, as its answers: in levels of equally many images."""
    return winner * VIEW_LEVELS + sure.argsort(stable=True).argsort() * VIEW_LEVELS // max(len(sure), 1)


def packed(state: State, info: dict[str, Any]) -> Saved:
    """A state as tensors by name."""
    heads = [head for one in state.heads for head in one]
    tensors = {f"{number}.{name}": one for number, head in enumerate(heads) for name, one in head.state_dict().items()}
    tensors |= {name: getattr(state, name) for name in ("by_given", "by_near", "by_view")}
    return Saved(
        tensors,
        {**info, "keys": state.keys, "votes": state.votes, "exponent": state.exponent, "view_leads": state.view_leads},
    )


def unpacked(saved: Saved) -> State:
    """What was packed."""
    heads: list[nn.Module] = []
    while own := _of_head(saved.tensors, len(heads)):
        if "prototypes" in own:
            heads.append(Nearest(own["prototypes"]))
            continue
        first, last = own["0.weight"], own.get("3.weight")  # a linear head has one layer, another one two
        sizes = (len(first), 0) if last is None else (len(last), len(first))
        head = new_head(first.shape[1], *sizes)
        head.load_state_dict(own)
        heads.append(head.eval().to(first.device))
    keys = list(saved.info["keys"])
    folds = len(heads) // len(keys)
    given, near, view = (saved.tensors[name] for name in ("by_given", "by_near", "by_view"))
    by_round = [heads[start : start + folds] for start in range(0, len(heads), folds)]
    return State(by_round, keys, given, near, view, *(saved.info[name] for name in ("votes", "exponent", "view_leads")))


def _of_head(tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    start = f"{number}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
