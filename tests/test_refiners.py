"""The contract that every refiner of the benchmarks keeps."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from benchmarks.refiners import REFINERS, Evidence
from synth_refine import InputError


def evidence(count=300, classes=3, noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    centers = 5 * rng.normal(size=(classes, 6))
    true = rng.integers(0, classes, count)
    given = np.where(rng.random(count) < noise, (true + 1) % classes, true)
    anchor_labels = np.repeat(np.arange(classes), 12)
    tensors = (centers[true] + rng.normal(size=(count, 6)), 3 * np.eye(classes)[given], given)
    anchors = centers[anchor_labels] + rng.normal(size=(len(anchor_labels), 6)), anchor_labels
    features, logits, labels, synthetic, made_for = map(torch.from_numpy, (*tensors, *anchors))
    built = Evidence(features.float(), logits.float(), labels, synthetic.float(), made_for, classes)
    return built, torch.from_numpy(true)


@pytest.mark.parametrize("name", REFINERS)
def test_a_refiner_returns_labels_or_soft_labels_and_repeats_itself(name):
    given, true = evidence()
    before = {entry.name: getattr(given, entry.name) for entry in fields(given)}
    copies = {key: value.clone() for key, value in before.items() if isinstance(value, torch.Tensor)}
    labels = REFINERS[name](given)
    assert labels.shape[0] == 300
    if labels.ndim == 1:
        assert labels.dtype == torch.int64
        assert 0 <= int(labels.min()) <= int(labels.max()) < 3
    else:
        assert labels.shape == (300, 3)
        assert labels.dtype == torch.float32
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(300))
    assert torch.equal(labels, REFINERS[name](given))
    assert all(torch.equal(getattr(given, key), value) for key, value in copies.items())
    hard = labels if labels.ndim == 1 else labels.argmax(dim=1)
    assert (hard != true).float().mean() <= (given.given != true).float().mean()
    if name not in ("none", "paper"):
        assert (hard != true).float().mean() < 0.1


@pytest.mark.parametrize("name", REFINERS)
def test_an_unknown_option_is_a_type_error(name):
    with pytest.raises(TypeError, match="colour"):
        REFINERS[name](evidence()[0], colour="red")


def test_knn_vote_against_the_rule_written_slowly():
    given, _ = evidence(count=60)
    features = given.features.double().numpy()
    labels = REFINERS["knn-vote"](given, neighbours=5)
    for row in range(60):
        cosine = features @ features[row] / np.linalg.norm(features, axis=1) / np.linalg.norm(features[row])
        votes = np.bincount(given.given.numpy()[np.argsort(-cosine)[:6]], minlength=3).astype(float)
        votes[given.given[row]] += 0.5
        assert labels[row] == votes.argmax()


def test_labels_in_another_order_are_refused():
    given, _ = evidence(noise=0.0)
    shuffled = replace(given, given=given.given[torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    with pytest.raises(InputError, match="check the row order"):
        REFINERS["anchored"](shuffled)
