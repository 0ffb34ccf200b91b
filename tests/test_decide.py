"""Posteriors to decisions: reasons, odds, the smallest set of changes that helps, thresholds and what they promise."""

import numpy as np
import pytest
import torch

from synth_refine import InputError
from synth_refine.refine.decide import (
    Policy,
    bayes,
    calibrated_probs,
    count_changes,
    default_odds,
    fit_transition,
    honest_exponent,
    log_likelihood,
    propose,
    safe_odds,
    tempered,
)
from synth_refine.refine.result import Reason
from synth_refine.refine.thresholds import (
    calibrate_thresholds,
    paper_thresholds,
    posterior_thresholds,
    sweep,
)


def naive_bayes(probs, by_given, label):
    """p(true class | image, given label) of one image."""
    joint = [one * by_given[label, number] for number, one in enumerate(probs)]
    return np.array(joint) / sum(joint)


def test_transition_and_posterior_against_the_rule_written_slowly():
    rng = np.random.default_rng(0)
    probs, given = rng.dirichlet(np.ones(3), 40), rng.integers(0, 3, 40)
    slow = np.full((3, 3), 1 / 3)
    for _ in range(3):
        counts = np.ones((3, 3))
        for row, label in zip(probs, given, strict=True):
            counts[label] += naive_bayes(row, slow, label)
        slow = counts / counts.sum(axis=0)
    inputs = torch.from_numpy(probs).float(), torch.from_numpy(given)
    found = fit_transition(*inputs, steps=2)
    np.testing.assert_allclose(found, slow, atol=1e-6)
    expected = [naive_bayes(row, slow, label) for row, label in zip(probs, given, strict=True)]
    np.testing.assert_allclose(bayes(inputs[0], found, inputs[1]), expected, atol=1e-5)
    values = [log_likelihood(inputs[0], fit_transition(*inputs, steps=steps), inputs[1]) for steps in (0, 5, 30)]
    assert values == sorted(values)


def decided(rows, given, thresholds=0.0, min_odds=1.0, safe=1.0, veto=None):
    table = torch.tensor(rows)
    policy = Policy(min_odds, safe, torch.full((table.shape[1],), thresholds), veto)
    return propose(table, torch.tensor(given), policy)


def test_every_reason():
    rows = [[0.9, 0.1], [0.1, 0.9], [0.45, 0.55], [0.2, 0.8], [0.3, 0.7], [0.5, 0.5]]
    found = decided(rows, [0, 0, 0, 0, 0, 1], thresholds=0.85, min_odds=2.0, safe=3.0)
    names = ["SAME", "ACCEPTED", "WITHIN_ODDS", "BELOW_THRESHOLD", "NO_GAIN", "SAME"]
    assert [Reason(one).name for one in found.reason.tolist()] == names
    assert found.proposed.tolist() == [0, 1, 1, 1, 1, 1]  # among equals the given label
    torch.testing.assert_close(found.confidence, torch.tensor([0.9, 0.9, 0.55, 0.8, 0.7, 0.5]))
    torch.testing.assert_close(found.margin, torch.tensor([0.8, 0.8, 0.1, 0.6, 0.4, 0.0]))
    torch.testing.assert_close(found.stays, torch.tensor([0.9, 0.1, 0.45, 0.2, 0.3, 0.5]))
    vetoed = decided(rows, [0, 0, 0, 0, 0, 1], min_odds=2.0, safe=2.0, veto=Reason.WEAK_ENCODER)
    assert vetoed.reason.tolist() == [0, 6, 2, 6, 6, 0]


def test_odds_equal_to_the_smallest_do_not_change_and_a_threshold_that_is_reached_does():
    assert decided([[0.25, 0.75]], [0], min_odds=3.0, safe=3.0).reason.tolist() == [Reason.WITHIN_ODDS]
    assert decided([[0.25, 0.75]], [0], thresholds=0.75).reason.tolist() == [Reason.ACCEPTED]


def test_the_smallest_odds_grow_as_the_noise_shrinks():
    odds = [default_odds(noise) for noise in (0.5, 0.1, 0.03, 0.01)]
    assert odds == sorted(odds)
    assert 1 < odds[0] < 1.01 < 2 <= odds[2]


def images(count, noise, sure, seed=0):
    """Probabilities of the true class by a head that is as often right as it says, given and true labels."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 3, count)
    shown = np.where(rng.random(count) < sure, true, (true + rng.integers(1, 3, count)) % 3)
    given = np.where(rng.random(count) < noise, (true + 1) % 3, true)
    probs = np.where(shown[:, None] == np.arange(3), sure, (1 - sure) / 2)
    return torch.from_numpy(probs).float(), torch.from_numpy(given), torch.from_numpy(true)


def test_changes_that_help_are_made_and_those_of_clean_labels_are_not():
    for noise in (0.3, 0.0):
        probs, given, true = images(3000, noise, 0.9)
        posterior = bayes(probs, fit_transition(probs, given, 30), given)
        safe, gain = safe_odds(probs, posterior, given, 1.0, 1.0)
        found = propose(posterior, given, Policy(1.0, safe, torch.zeros(3)))
        refined = torch.where(found.reason == Reason.ACCEPTED, found.proposed, given)
        if noise:
            assert gain > 0.1
            assert (refined != true).float().mean() < 0.4 * noise
        else:
            assert (refined != true).float().mean() <= 0.002


def test_where_the_unsure_changes_would_do_harm_the_sure_ones_are_made_alone():
    probs, given, _ = images(3000, 0.3, 0.95)
    undecided = torch.tensor([[0.3, 0.35, 0.35]]).repeat(6000, 1)
    labels = torch.tensor([1, 2]).repeat(3000)
    posterior = bayes(probs, fit_transition(probs, given, 30), given)
    claimed = torch.tensor([[0.6, 0.2, 0.2]]).repeat(6000, 1)  # what nothing but the posterior itself supports
    every = torch.cat([probs, undecided]), torch.cat([posterior, claimed]), torch.cat([given, labels])
    safe, gain = safe_odds(*every, 1.0, 1.0)
    assert safe == pytest.approx(3)  # which a change has to exceed
    assert gain > 0
    sure = propose(every[1], every[2], Policy(1.0, safe, torch.zeros(3))).reason == Reason.ACCEPTED
    assert sure[:3000].sum() > 700
    assert not sure[3000:].any()
    assert safe_odds(undecided, claimed, labels, 1.0, 1.0)[0] == torch.inf


def test_where_noise_follows_the_image_as_many_labels_change_as_counting_bears_out():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(4, 0.15), 8000)
    true = (probs.cumsum(axis=1) > rng.random((8000, 1))).argmax(axis=1)  # the heads are as often right as they say
    first, second = probs.argsort(axis=1)[:, :-3:-1].T
    unsure = (probs[np.arange(8000), second] > 0.02) & (rng.random(8000) < 0.4)
    for flips in (unsure & (true == first), np.zeros(8000, dtype=bool)):
        given, known = torch.from_numpy(np.where(flips, second, true)), torch.from_numpy(true)
        table = torch.from_numpy(probs).float()
        by_given = fit_transition(table, given, 30)
        counted = count_changes(table, calibrated_probs(table, table, 1.0), by_given, given)
        odds = counted.least_odds()
        if not flips.any():
            assert odds == torch.inf
            continue
        assert odds < 1
        heard = table * by_given[given]
        own = heard.gather(1, given[:, None])[:, 0]
        best, winner = heard.scatter(1, given[:, None], 0).max(dim=1)
        every, some = (torch.where(best > least * own, winner, given) for least in (odds, 1.0))
        noise, left, shy = (float((one != known).float().mean()) for one in (given, every, some))
        assert left < 0.85 * noise
        assert left < shy - 0.01  # the posterior alone changes too few
        gain, wrong = counted.of(int((every != given).sum()))
        assert abs(gain - (noise - left)) < 0.02
        changed = every != given
        assert abs(wrong - float((every != known)[changed].float().mean())) < 0.1


def test_heads_that_are_too_sure_are_softened_until_they_are_honest():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 4, 2000))
    shown = np.where(rng.random(2000) < 0.7, labels.numpy(), rng.integers(0, 4, 2000))
    boastful = torch.full((2000, 4), 0.003)
    boastful[torch.arange(2000), torch.from_numpy(shown)] = 0.991
    honest = tempered(boastful, honest_exponent(boastful, labels))
    right = (honest.argmax(dim=1) == labels).float().mean()
    assert abs(honest.amax(dim=1).mean() - right) < 0.05
    modest = tempered(boastful, 0.2)
    assert honest_exponent(modest, labels) == 1


# ---- thresholds ----


def test_thresholds_are_the_smallest_that_keep_the_promise():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    scores = rng.dirichlet(np.ones(3), 300) + 0.7 * np.eye(3)[labels] * rng.random((300, 1))
    scores = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
    winner, best = scores.argmax(axis=1), scores.max(axis=1)
    expected = []
    for number in range(3):  # written slowly: every score is tried
        fits = [
            one
            for one in best[winner == number]
            if (labels[(winner == number) & (best >= one)] == number).mean() >= 0.9
        ]
        expected.append(min(fits))
    found = calibrate_thresholds(scores, labels, 0.9)
    np.testing.assert_array_equal(found, np.float32(expected))
    assert (found > best.min()).all()
    assert np.isinf(calibrate_thresholds(scores, (winner + 1) % 3)).all()
    with pytest.raises(InputError, match=r"precision: expected a number in \(0, 1\], got 0"):
        calibrate_thresholds(scores, labels, 0)


def test_nine_in_ten_changes_are_right_from_the_posteriors_thresholds_on():
    true = torch.from_numpy(np.random.default_rng(0).integers(0, 3, 40_000))
    transition = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.4, 0.0, 0.6]])  # a row per true class

    def world(labels, seed):
        """What heads say of images, whose features scatter more in some classes."""
        generator = torch.Generator().manual_seed(seed)
        scatter = torch.tensor([0.8, 1.0, 1.4])[labels]
        logits = torch.eye(3)[labels] + scatter[:, None] * torch.randn(len(labels), 3, generator=generator)
        return logits.softmax(dim=1)

    known = torch.arange(3).repeat(2000)
    probs, generator = world(true, 1), torch.Generator().manual_seed(2)
    given = torch.multinomial(transition[true], 1, generator=generator)[:, 0]
    thresholds = torch.from_numpy(posterior_thresholds(world(known, 3), known, transition.T.contiguous()))
    found = propose(bayes(probs, transition.T, given), given, Policy(1.0, 1.0, torch.zeros(3)))
    changed = found.proposed != given
    accepted = changed & (found.confidence >= thresholds[found.proposed])
    right = found.proposed == true
    assert right[changed].float().mean() < 0.8
    for number in range(3):
        rows = accepted & (found.proposed == number)
        if rows.sum() > 100:
            assert abs(right[rows].float().mean() - 0.9) < 0.04, number
    assert accepted.sum() > 1000
    on_heads = torch.from_numpy(calibrate_thresholds(world(known, 3), known))  # what was promised before
    before = changed & (found.confidence >= on_heads[found.proposed])
    assert abs(right[before].float().mean() - 0.9) > abs(right[accepted].float().mean() - 0.9)


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_the_papers_thresholds_score_each_image_against_prototypes_without_it(weight):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 8)
    features = 2 * np.eye(3, 5)[labels] + rng.normal(size=(24, 5))
    logits = rng.normal(size=(24, 3))
    scores = np.empty((24, 3))
    for row in range(24):
        chances = np.exp(logits[row]) / np.exp(logits[row]).sum()
        for number in range(3):
            others = (labels == number) & (np.arange(24) != row)
            mean = features[others].mean(axis=0)
            cosine = features[row] @ mean / np.linalg.norm(features[row]) / np.linalg.norm(mean)
            scores[row, number] = weight * cosine + (1 - weight) * chances[number]
    found = paper_thresholds(*map(torch.from_numpy, (features, labels, logits)), weight)
    np.testing.assert_allclose(found, calibrate_thresholds(scores, labels))
    assert np.isfinite(found).any()


def test_a_sweep_against_the_rule_written_slowly(tmp_path):
    rng = np.random.default_rng(0)
    table, given = rng.dirichlet(0.5 * np.ones(4), 60), rng.integers(0, 4, 60)
    proposed, allowed = table.argmax(axis=1), rng.random(60) < 0.8
    confidence, stays = table.max(axis=1), table[np.arange(60), given]
    found = sweep(*map(torch.from_numpy, (proposed, confidence, stays, given, allowed)), classes=4)
    assert [row.threshold for row in found][:2] == [0.0, 0.05]
    for row in found:
        refined, right, changes = list(given), [], []
        for number in range(60):
            best = confidence[number]
            change = allowed[number] and proposed[number] != given[number] and best >= row.threshold
            if change:
                refined[number] = proposed[number]
                changes.append(best)
            right.append(best if change else stays[number])
        wrong = 1 - np.mean(changes) if changes else np.nan
        expected = (len(changes) / 60, 1 - np.mean(right), wrong, 4 - len(set(refined)))
        np.testing.assert_allclose((row.changed, row.noise_after, row.wrong_changes, row.empty_classes), expected)
    assert found[0].changed > 0.3
    assert found[-1] != found[0]
