"""From posteriors to decisions: keep, change or abstain, without doing harm.

Letters in shapes: N real images, M synthetic images, C classes, n rows of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from synth_refine.refine.heads import as_probs, fit_temperature, parts
from synth_refine.refine.result import Reason

NOISE_FLOOR = 0.03
"""Estimated noise below which the estimate is mostly the heads' own error: the smallest odds grow from there."""

CAUTION = 0.8
"""Exponent of the probabilities in the do-no-harm check, after they are honest about held-out synthetic images.

Chosen on CIFAR-10 label files by comparison with the true gain.
"""

INDEPENDENCE = 1 / 3
"""How far further annotators err independently of the heads: 0 not at all, 1 fully.

Chosen with true labels in sight: on clean CIFAR-10 labels, .25 to .4 counts the right labels that are contradicted
rightly, and twice as many would have to be there for harm to be done.
"""
LEAST_ODDS = 0.05  # below which no change is looked at, however many labels are wrong
DEVIATIONS = 2.0  # of the count of right labels that a set of changes has to outweigh
COUNTED_ELEMENTS = 1 << 29  # row x class x class of the rows from which the changes of right labels are counted
MODEST_STEPS = 30  # maximisation steps of the transition matrix of the more modest probabilities


@dataclass(frozen=True)
class Policy:
    """When a label changes.

    Attributes:
        min_odds: Posterior odds of the best class against the given one that a change has to exceed.
        safe_odds: The same, for a change that is expected to help; at least `min_odds`.
        thresholds: Smallest posterior of each class that a change needs, (C,).
        veto: Why no label changes at all, or None.
    """

    min_odds: float
    safe_odds: float
    thresholds: Tensor
    veto: Reason | None = None


@dataclass(frozen=True)
class Proposals:
    """What is proposed for a chunk of images, (n,) each.

    Attributes:
        proposed: The most probable class; among equals the given label, then the lower class.
        confidence: Its posterior.
        margin: By how much that exceeds the next best one.
        stays: Posterior of the given label.
        reason: `Reason` codes.
    """

    proposed: Tensor
    confidence: Tensor
    margin: Tensor
    stays: Tensor
    reason: Tensor


def propose(posterior: Tensor, given: Tensor, policy: Policy) -> Proposals:
    """Decide about a chunk of images.

    Args:
        posterior: (n, C).
        given: Given labels, (n,) int64.
        policy: When a label changes.
    """
    best, classes = posterior.topk(min(2, posterior.shape[1]), dim=1)
    stays = posterior.gather(1, given[:, None])[:, 0]
    winner = torch.where(stays >= best[:, 0], given, classes[:, 0])
    odds = best[:, 0] / stays.clamp_min(1e-9)
    reason = torch.full_like(winner, int(Reason.ACCEPTED if policy.veto is None else policy.veto))
    reason[best[:, 0] < policy.thresholds.to(best)[winner]] = int(Reason.BELOW_THRESHOLD)
    reason[odds <= policy.safe_odds] = int(Reason.NO_GAIN)
    reason[odds <= policy.min_odds] = int(Reason.WITHIN_ODDS)
    reason[winner == given] = int(Reason.SAME)
    margin = best[:, 0] - best[:, 1] if best.shape[1] > 1 else best[:, 0]
    return Proposals(winner, best[:, 0], margin, stays, reason)


def default_odds(noise: float) -> float:
    """The odds that a change has to exceed where this fraction of the given labels is wrong."""
    return 1 + (NOISE_FLOOR / max(noise, 1e-6)) ** 2


def safe_odds(probs: Tensor, posterior: Tensor, given: Tensor, honesty: float, min_odds: float) -> tuple[float, float]:
    """The odds from which on changes are expected to help by the account of more modest probabilities.

    The posterior itself cannot judge: by its own account every change helps. A modest one, whose transition matrix is
    fitted anew, blames itself and not the labels where they are clean.

    Args:
        probs: Without the given label, (n, C).
        posterior: With it, (n, C).
        given: Given labels, (n,) int64.
        honesty: Exponent at which the heads are honest about held-out synthetic images; see `honest_exponent`.
        min_odds: Smaller odds are not looked at.

    Returns:
        Odds that a change has to exceed, infinite where none helps, and the expected drop of the noise rate.
    """
    best, winner = posterior.max(dim=1)
    odds = best / posterior.gather(1, given[:, None])[:, 0].clamp_min(1e-9)
    rows = ((winner != given) & (odds > min_odds)).nonzero()[:, 0]
    if not len(rows):
        return min_odds, 0.0
    modest = tempered(probs, CAUTION * honesty)
    doubtful = bayes(modest, fit_transition(modest, given, MODEST_STEPS), given)[rows]
    gain = (doubtful.gather(1, winner[rows, None]) - doubtful.gather(1, given[rows, None]))[:, 0]
    order = odds[rows].argsort(descending=True, stable=True)
    total = gain[order].double().cumsum(dim=0)
    if not bool((total > 0).any()):
        return torch.inf, float(total[-1]) / len(given)
    last = int((total > 0).nonzero()[-1, 0])
    if last == len(rows) - 1:
        return min_odds, float(total[last]) / len(given)
    return float(odds[rows[order[last + 1]]]), float(total[last]) / len(given)


@dataclass(frozen=True)
class Counted:
    """What changes do, in falling order of their odds, by counting.

    Attributes:
        odds: Of the best other class against the given label, (k,).
        right: Right labels that are expected to change with so many changes, (k,).
        named: Mean probability that a changed label, if it was wrong, becomes the true one, (k,).
        labels: n, of all labels.
    """

    odds: Tensor
    right: Tensor
    named: Tensor
    labels: int

    def gain(self) -> Tensor:
        """The expected drop of the number of wrong labels, (k,)."""
        changes = torch.arange(1, len(self.odds) + 1, device=self.odds.device)
        return (changes - self.right).clamp_min(0) * self.named - self.right

    def least_odds(self) -> float:
        """The odds that a change has to exceed, so that most labels are expected to become right; infinite if none."""
        sure = self.gain() - DEVIATIONS * (self.right + 1).sqrt()
        last = int(sure.argmax()) if len(sure) else 0
        if not len(sure) or sure[last] <= 0:
            return math.inf
        return float(self.odds[last + 1]) if last + 1 < len(sure) else LEAST_ODDS

    def of(self, changes: int) -> tuple[float, float] | None:
        """The expected drop of the noise rate by so many changes, and the fraction of them that are wrong."""
        if not 0 < changes <= len(self.odds):
            return None
        gain, right = float(self.gain()[changes - 1]), float(self.right[changes - 1])
        return gain / self.labels, 1 - (gain + right) / changes


def count_changes(probs: Tensor, calibrated: Tensor, by_given: Tensor, given: Tensor) -> Counted:
    """Count what a change of all labels from some odds on does, also below 1.

    A transition matrix says how often a class is mislabelled, and too little of images that are hard to tell: there
    labels are wrong more often, and odds below 1 may be enough. Calibrated probabilities say how many right labels
    would be contradicted by such odds. As many more as are contradicted are wrong. Where labels are clean, none are.

    Args:
        probs: By all annotators but the given label, (n, C).
        calibrated: The same as sure as they are right, (n, C); see `calibrated_probs`.
        by_given: p(given label | true class), (C, C), a row per given label.
        given: Given labels, (n,) int64.
    """
    count, classes = probs.shape
    own = given[:, None]
    heard = probs * by_given[given]
    best, winner = heard.scatter(1, own, 0).max(dim=1)
    odds, order = (best / heard.gather(1, own)[:, 0].clamp_min(1e-30)).sort(descending=True, stable=True)
    odds = odds[odds > LEAST_ODDS]
    order = order[: len(odds)]
    step = max(1, math.ceil(count * classes**2 / COUNTED_ELEMENTS))
    some, chances = probs[::step], calibrated[::step]
    right = torch.zeros(len(odds) + 1, device=probs.device)  # expected, between one observed odds and the next
    for label in range(classes):  # as if it were the given one, everywhere
        heard = some * by_given[label]
        against = heard[:, label].clone().clamp_min_(1e-30)
        heard[:, label] = 0
        places = torch.searchsorted(-odds, -(heard.amax(dim=1) / against))
        right.index_add_(0, places, chances[:, label])
    right = right[:-1].double().cumsum(dim=0) * (count / len(some))
    changes = torch.arange(1, len(odds) + 1, device=probs.device)
    share = 1.0  # of right labels
    for _ in range(3 if len(odds) else 0):
        share = 1 - float((changes - share * right).max().clamp_min(0)) / count
    stays, named = (calibrated[order].gather(1, one[order, None])[:, 0].double() for one in (given, winner))
    named = (named / (1 - stays).clamp_min(1e-6)).cumsum(dim=0) / changes
    return Counted(odds, share * right, named, count)


def calibrated_probs(heads: Tensor, probs: Tensor, independent: float) -> Tensor:
    """Probabilities of heads and further annotators as sure as they are right, (n, C).

    The heads' errors are known from synthetic images, those of all together are not. If the others erred
    independently of the heads, the exponent would be `independent`; if they told nothing new, all together would be no
    surer than the heads. The truth lies between, see `INDEPENDENCE`.

    Args:
        heads: p(true class | image) by honest heads, (n, C).
        probs: The same by all annotators but the given label, (n, C).
        independent: Exponent of `probs` if they erred independently.
    """
    no_surer = fit_temperature(probs.clamp_min(1e-30).log(), float(heads.amax(dim=1).mean()))
    return tempered(probs, no_surer ** (1 - INDEPENDENCE) * independent**INDEPENDENCE)


def honest_exponent(probs: Tensor, labels: Tensor) -> float:
    """The exponent, at most 1, at which held-out synthetic images' own classes are likeliest.

    Below 1 the heads are too sure.

    Args:
        probs: What heads say of synthetic images that they were not trained on, (M, C).
        labels: Their intended classes, (M,) int64.
    """
    grid = torch.linspace(0.3, 1.0, 29).tolist()
    own = [float(tempered(probs, one).gather(1, labels[:, None]).clamp_min(1e-9).log().mean()) for one in grid]
    return float(grid[own.index(max(own))])


def tempered(probs: Tensor, exponent: float) -> Tensor:
    """Probabilities to a power, rows summing to one again, (n, C)."""
    return as_probs(probs.clamp_min(1e-9).log_().mul_(exponent).exp_())


def bayes(probs: Tensor, by_given: Tensor, given: Tensor) -> Tensor:
    """p(true class | image, given label), (n, C).

    Args:
        probs: p(true class | image), (n, C).
        by_given: p(given label | true class), (C, C), a row per given label.
        given: (n,) int64.
    """
    return as_probs(probs * by_given[given])


def fit_transition(probs: Tensor, given: Tensor, steps: int = 10) -> Tensor:
    """The likeliest transition matrix for fixed probabilities, by expectation maximisation with one count per cell.

    Args:
        probs: p(true class | image), (n, C).
        given: (n,) int64.
        steps: Maximisation steps after the first estimate.

    Returns:
        p(given label | true class), (C, C), a row per given label; columns sum to one.
    """
    classes = probs.shape[1]
    by_given = torch.ones((classes, classes), device=probs.device)
    for _ in range(steps + 1):
        counts = torch.zeros_like(by_given)
        for part in parts(len(probs), classes):
            counts.index_add_(0, given[part], bayes(probs[part], by_given, given[part]))
        by_given = F.normalize(counts + 1, p=1, dim=0)
    return by_given


def log_likelihood(probs: Tensor, by_given: Tensor, given: Tensor) -> float:
    """Mean log p(given label | image)."""
    return float((probs * by_given[given]).sum(dim=1).clamp_min(1e-30).log().mean())
