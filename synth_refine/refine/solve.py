"""From rows to a policy: run the algorithm, check it, and turn it into what decides about any row.

Letters in shapes: N real images, M synthetic images, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synth_refine._io.check import Array
from synth_refine.refine.checks import Story, check_row_order, compare_stories
from synth_refine.refine.decide import (
    Policy,
    calibrated_probs,
    count_changes,
    default_odds,
    fit_transition,
    honest_exponent,
    propose,
    safe_odds,
    tempered,
)
from synth_refine.refine.em import EM
from synth_refine.refine.estimates import Estimates, estimate_noise
from synth_refine.refine.heads import HIDDEN, Fit, Nearest, fit_heads, fold_logits
from synth_refine.refine.result import Reason
from synth_refine.refine.rows import Bucket, MemoryRows, Rows, seed_of
from synth_refine.refine.state import State
from synth_refine.refine.thresholds import SweepRow, posterior_thresholds

RECOGNIZED = 0.5
"""Fraction of held-out synthetic images that heads must classify correctly, or labels are left alone: features that do
not tell the classes apart say nothing worth a change. On CIFAR-10 a CLIP that knows letters alone has .41, and there
35 % wrong labels would become 60 %; ImageNet networks have .86 to .90."""
FEW_IMAGES = 10  # synthetic images per class below which their accuracy says little
SAMPLE_ELEMENTS = 1 << 24  # probabilities of the rows that decisions and estimates are made from


@dataclass(frozen=True)
class Solution:
    """What it takes to decide about any row.

    Attributes:
        state: Heads and transition matrices.
        policy: When a label changes.
        estimates: Fractions of wrong labels.
        story: Whether synthetic images and given labels contradict each other.
        synthetic_probs: What heads say of synthetic images that they were not trained on, (M, C).
        synthetic_accuracy: The fraction of those that they classify correctly.
        gain: Expected drop of the noise rate by the changes, by a modest account.
        history: An entry per round, see `EM.run`.
        warnings: What a person should know, a line each.
        no_class: How likely images show none of the classes, by row number; None where that is not scored.
    """

    state: State
    policy: Policy
    estimates: Estimates
    story: Story
    synthetic_probs: Tensor
    synthetic_accuracy: float
    gain: float
    history: list[dict[str, float]]
    warnings: tuple[str, ...]
    no_class: Tensor | None = None


def solve(em: EM, *, threshold: float | str | None = None, force: bool = False) -> Solution:
    """Run the algorithm and decide when labels change; all from the rows of `em`, in memory or on disk.

    Args:
        em: The algorithm and its rows.
        threshold: Smallest posterior of the new class that a change needs; "auto" calibrates one per class, None asks
            for none.
        force: Change labels although a check advises against it.
    """
    with torch.random.fork_rng(devices=[em.synthetic.device] if em.synthetic.is_cuda else []):
        first, _ = em.first()
        story = _story(em, first)
        if story.message and not force:
            return _refused(em, first, story)
        state, history = em.run()
        held_out = em.held_out_probs(state, int(history[-1]["epochs"]))
        return _decided(em, state, history, held_out, story, threshold, force)


def _story(em: EM, first: State) -> Story:
    """What prototypes and heads that were trained on the given labels alone tell about a sample of the images."""
    heads, key = label_heads(em.rows, em.classes, em.synthetic, em.seed, em.hidden)
    sample = _sample(em)
    with torch.no_grad():
        logits = fold_logits(heads, key, sample.features.float(), sample.numbers)
        prototypes = first.head_probs(sample)
    transition = fit_transition(prototypes, sample.given)
    return compare_stories(prototypes.argmax(dim=1), logits.argmax(dim=1), sample.given, transition)


def label_heads(
    rows: Rows, classes: int, synthetic: Tensor, seed: int, hidden: int = HIDDEN, epochs: int = 2
) -> tuple[list[nn.Module], int]:
    """Cross-fitted heads that were trained on the given labels alone, and what draws their folds."""

    def targets(bucket: Bucket, places: Tensor | slice) -> Tensor:
        return F.one_hot(bucket.given[places], classes).float()

    key, none = seed_of(3, seed), torch.empty(0, dtype=torch.int64, device=synthetic.device)
    return fit_heads(Fit(rows, synthetic[:0], none, classes, epochs, hidden), targets, key), key


def _sample(em: EM) -> Bucket:
    """Rows that decisions and estimates are made from: those of one bucket, which are drawn at random."""
    bucket = em.rows.bucket(0)
    return bucket[slice(None, None, max(1, math.ceil(len(bucket) * em.classes / SAMPLE_ELEMENTS)))]


def _refused(em: EM, first: State, story: Story) -> Solution:
    """Nothing changes, because the two sides contradict each other."""
    thresholds = torch.zeros(em.classes)
    policy = Policy(1.0, 1.0, thresholds, Reason.MISMATCH)
    probs = torch.full((len(em.synthetic), em.classes), 1 / em.classes)
    warnings = (f"nothing is changed: {story.message}",)
    return Solution(first, policy, Estimates(), story, probs, math.nan, 0.0, [], warnings)


def _decided(
    em: EM,
    state: State,
    history: list[dict[str, float]],
    held_out: Tensor,
    story: Story,
    threshold: float | str | None,
    force: bool,
) -> Solution:
    labels = em.synthetic_labels
    accuracy = float((held_out.argmax(dim=1) == labels).float().mean())
    weak = accuracy < RECOGNIZED
    min_odds = default_odds(history[-1]["noise"])
    if threshold == "auto":
        thresholds = torch.from_numpy(posterior_thresholds(held_out, labels, state.by_given, em.seed))
    else:
        thresholds = torch.full((em.classes,), 0.0 if threshold is None else float(threshold))
    sample = _sample(em)
    with torch.no_grad():
        probs, joined, posterior = state.head_probs(sample), state.probs(sample), state.posterior(sample)
        honesty = honest_exponent(held_out, labels)
        safe, gain = safe_odds(probs, posterior, sample.given, honesty, min_odds)
        counted = None
        if not isinstance(state.heads[0][0], Nearest) and not em.has_view:  # how sure those are is a guess
            calibrated = calibrated_probs(tempered(probs, honesty), joined, honesty / state.exponent)
            counted = count_changes(joined, calibrated, state.by_given, sample.given)
            if (odds := counted.least_odds()) < safe:  # either account will do
                safe, min_odds = max(odds, 1.0), min(min_odds, max(odds, 1.0))
                state = replace(state, trust=min(odds, 1.0))
                posterior = state.posterior(sample)
    policy = Policy(
        min_odds, min_odds if force else safe, thresholds, Reason.WEAK_ENCODER if weak and not force else None
    )
    found = propose(posterior, sample.given, policy)
    refined = torch.where(found.reason == Reason.ACCEPTED, found.proposed, sample.given)
    known = None if counted is None else counted.of(int((refined != sample.given).sum()))
    gain = gain if known is None else known[0]
    estimates = Estimates() if weak else estimate_noise(tempered(probs, honesty), sample.given, refined, known)
    warnings = [story.message] if story.message else []
    if weak:
        warnings.append(
            f"{'changed on demand, although' if force else 'nothing is changed:'} only {accuracy:.0%} of the held-out "
            "synthetic images are classified correctly; use an encoder that knows these classes"
        )
    elif math.isinf(safe):
        warnings.append("no change is expected to lower the noise" + (", changed on demand" if force else ""))
    few = (torch.bincount(labels, minlength=em.classes) < FEW_IMAGES).nonzero()[:, 0].tolist()
    if few:
        shown = ", ".join(map(str, few[:5])) + (", ..." if len(few) > 5 else "")
        warnings.append(
            f"{len(few)} classes have fewer than {FEW_IMAGES} synthetic images (class {shown}); the accuracy on "
            "held-out ones is then too high, and so may be the estimates"
        )
    return Solution(state, policy, estimates, story, held_out, accuracy, gain, history, tuple(warnings))


@dataclass(frozen=True)
class AnchoredDiagnostics:
    """What the anchored refiner knows beside its proposals.

    Attributes:
        estimates: Fractions of wrong labels before and after, and of wrong changes, with intervals; NaN where features
            or synthetic images allow no estimate.
        synthetic_accuracy: Fraction of the synthetic images that heads which were not trained on them classify
            correctly.
        synthetic_probs: What those heads say of them, (M, C).
        transition: p(given label | true class), (C, C), a row per true class.
        thresholds: Smallest posterior of each class that a change needs, (C,).
        safe_odds: Posterior odds that a change has to exceed; infinite where no change is expected to help.
        gain: Expected drop of the noise rate by the changes, by a modest account.
        votes: Independent votes that the given labels of an image's nearest images count for.
        story: Whether synthetic images and given labels contradict each other.
        vetoed: Whether no label changes at all.
        encoder_too_weak: Whether fewer than half of the held-out synthetic images are classified correctly.
        history: One entry per round.
        warnings: What a person should know, a line each.
        sweep: What other thresholds would do.
        posteriors: Computes row numbers, (n,), and posteriors, (n, C), of all images that can be scored, a chunk at a
            time; None over shards.
    """

    estimates: Estimates = field(default_factory=Estimates)
    synthetic_accuracy: float = math.nan
    synthetic_probs: Array | None = field(default=None, repr=False)
    transition: Array | None = field(default=None, repr=False)
    thresholds: Array | None = field(default=None, repr=False)
    safe_odds: float = math.inf
    gain: float = 0.0
    votes: float = 0.0
    story: Story | None = None
    vetoed: bool = True
    encoder_too_weak: bool = False
    history: tuple[dict[str, float], ...] = field(default=(), repr=False)
    warnings: tuple[str, ...] = ()
    sweep: tuple[SweepRow, ...] = field(default=(), repr=False)
    posteriors: Callable[[], Iterator[tuple[Tensor, Tensor]]] | None = field(default=None, repr=False)


def check_order(em: EM) -> None:
    """Refuse given labels that are independent of the images, by a sample.

    Raises:
        InputError: They are: another order of the rows, or another data set.
    """
    sample = em.rows.bucket(0)
    prototypes = em.image_prototypes
    nearest = [Nearest(prototypes)(sample.features[part].float()).argmax(dim=1) for part in em.parts(len(sample))]
    check_row_order(sample.given, torch.cat(nearest), em.classes)


def diagnostics(em: EM, solution: Solution, rows_swept: Sequence[SweepRow] = ()) -> AnchoredDiagnostics:
    """What the anchored refiner knows beside its proposals."""
    policy, estimates = solution.policy, solution.estimates
    return AnchoredDiagnostics(
        estimates=estimates,
        synthetic_accuracy=solution.synthetic_accuracy,
        synthetic_probs=solution.synthetic_probs.cpu().numpy(),
        transition=solution.state.by_given.T.cpu().numpy(),
        thresholds=policy.thresholds.numpy(),
        safe_odds=policy.safe_odds,
        gain=solution.gain,
        votes=solution.state.votes,
        story=solution.story,
        vetoed=policy.veto is not None or math.isinf(policy.safe_odds),
        encoder_too_weak=solution.synthetic_accuracy < RECOGNIZED,
        history=tuple(solution.history),
        warnings=solution.warnings,
        sweep=tuple(rows_swept),
        posteriors=partial(_posteriors, em, solution.state) if isinstance(em.rows, MemoryRows) else None,
    )


def _posteriors(em: EM, state: State) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers, (n,), and posteriors, (n, C), of all rows that can be scored, a chunk at a time."""
    return ((bucket.numbers, posterior) for bucket, posterior in em.posteriors(state))
