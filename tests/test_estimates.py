"""Estimates of wrong labels against the truth, on Gaussian classes where it is known."""

import math

import numpy as np
import pytest
import torch
from gaussians import problem

from synth_refine.refine.decide import bayes, fit_transition
from synth_refine.refine.estimates import estimate_noise


def seen(one):
    """p(true class | image) by the rule of Bayes, as perfect heads would say it."""
    centers = np.stack([one.features[one.true == number].mean(axis=0) for number in range(4)])
    distances = ((one.features[:, None] - centers) ** 2).sum(axis=2)
    return torch.from_numpy(-distances / 2).softmax(dim=1).float()


def by_image(one, rate):
    """Labels that flip to the image's own runner-up, the likelier the less plain the image is."""
    probs = seen(one).numpy()
    probs[np.arange(len(probs)), one.true] = -1
    unsure = probs.max(axis=1).argsort().argsort() / len(probs)
    flips = np.random.default_rng(3).random(len(probs)) < 2 * rate * unsure
    return np.where(flips, probs.argmax(axis=1), one.true)


def judged(one):
    """Estimates and truths of the labels that the posterior takes for the most probable ones."""
    given, true, probs = torch.from_numpy(one.given), torch.from_numpy(one.true), seen(one)
    posterior = bayes(probs, fit_transition(probs, given), given)
    refined = posterior.argmax(dim=1)
    changed = refined != given
    wrong = {"before": given != true, "after": refined != true, "wrong_changes": (refined != true)[changed]}
    truths = {name: float(one.double().mean()) for name, one in wrong.items()}
    own = 1 - float(posterior.amax(dim=1).mean())
    return estimate_noise(probs, given, refined), truths, own


@pytest.mark.parametrize("kind", ["uniform", "next"])
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4])
def test_estimates_are_near_the_truth_and_their_intervals_hold_it(kind, rate):
    found, truths, _ = judged(problem(4000, noise=rate, distance=3.0, flips=kind))
    for name in ("before", "after"):
        estimate = getattr(found, name)
        assert abs(estimate.value - truths[name]) < 0.05, name
        assert estimate.low <= truths[name] <= estimate.high, name
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1, name
        assert estimate.high - estimate.low < 0.15, name
    assert abs(found.wrong_changes.value - truths["wrong_changes"]) < 0.15


def test_noise_that_follows_the_image_is_not_taken_for_none():
    one = problem(4000, distance=3.0)
    one.given = by_image(one, 0.25)
    found, truths, own = judged(one)
    assert own < 0.6 * truths["after"]  # what the posterior thinks of itself
    assert abs(found.after.value - truths["after"]) < 0.7 * abs(own - truths["after"])
    assert found.after.low <= truths["after"] <= found.after.high


def test_nothing_is_estimated_from_nothing():
    found = estimate_noise(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    assert math.isnan(found.before.value)
    labels = torch.arange(3).repeat(100)
    same = estimate_noise(torch.eye(3)[labels] * 0.9 + 0.03, labels, labels)
    assert math.isnan(same.wrong_changes.high)  # no label has changed
    assert same.before.value == pytest.approx(same.after.value, abs=0.03)
    assert str(same.before).startswith("0.0")
