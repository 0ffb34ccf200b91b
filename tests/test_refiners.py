"""The contract that every refiner of the benchmarks keeps, and the rivals against their rules written slowly."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from benchmarks.evidence import Evidence
from benchmarks.refiners import REFINERS
from benchmarks.rivals import FARTHEST, NEAREST, nearest
from synth_refine import InputError


def evidence(count=300, classes=3, noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    centers = 5 * rng.normal(size=(classes, 6))
    true = rng.integers(0, classes, count)
    given = np.where(rng.random(count) < noise, (true + 1) % classes, true)
    synthetic_labels = np.repeat(np.arange(classes), 12)
    synthetic = centers[synthetic_labels] + rng.normal(size=(len(synthetic_labels), 6))
    arrays = centers[true] + rng.normal(size=(count, 6)), 3 * np.eye(classes)[given], given, synthetic, synthetic_labels
    features, logits, labels, *pair = map(torch.from_numpy, arrays)
    built = Evidence(features.float(), logits.float(), labels, pair[0].float(), pair[1], classes)
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
    if name not in ("none", "paper", "knn-vote-200"):  # 200 of 300 are no neighbours
        assert (hard != true).float().mean() < 0.1


@pytest.mark.parametrize("name", REFINERS)
def test_an_unknown_option_is_a_type_error(name):
    with pytest.raises(TypeError, match="colour"):
        REFINERS[name](evidence()[0], colour="red")


def test_labels_in_another_order_are_refused():
    given, _ = evidence(noise=0.0)
    shuffled = replace(given, given=given.given[torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    with pytest.raises(InputError, match="check the row order"):
        REFINERS["anchored"](shuffled)


# ---- rivals, written slowly ----


def standard(features):
    features = features.double().numpy()
    return (features - features.mean(axis=0)) / features.std(axis=0, ddof=1)


def cosines(left, right):
    return (left @ right.T) / np.linalg.norm(left, axis=1)[:, None] / np.linalg.norm(right, axis=1)


def ranked(features, row):
    """The other rows, nearest first."""
    cosine = cosines(features[row : row + 1], features)[0]
    return [other for other in np.argsort(-cosine) if other != row], cosine


def heads(features, given, rows, seed=0):
    """Two-fold logistic regressions on the chosen rows, of whitened features."""
    parts = features @ np.linalg.eigh(features.T @ features)[1]
    features = parts / parts.std(axis=0, ddof=1)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).numpy()
    probabilities = np.empty((len(features), 3))
    for fold in (0, 1):
        others = [row for row in order[1 - fold :: 2] if rows[row]]
        model = LogisticRegression(max_iter=1000, tol=1e-8).fit(features[others], given[others])
        probabilities[order[fold::2]] = model.predict_proba(features[order[fold::2]])
    return probabilities


def slow_knn_vote(features, given, row, neighbours):
    votes = np.bincount(given[ranked(features, row)[0][:neighbours]], minlength=3) + 1.5 * np.eye(3)[given[row]]
    return votes.argmax()


def slow_ssr(known, neighbours):
    features, given = standard(known.features), known.given.numpy()
    clean = np.zeros(len(given), dtype=bool)
    for row in range(len(given)):
        order, cosine = ranked(features, row)
        votes = np.zeros(3)
        for other in order[:neighbours]:
            votes[given[other]] += np.exp(10 * cosine[other])
        clean[row] = votes.argmax() == given[row]
    return np.where(clean, given, heads(features, given, clean).argmax(axis=1))


def slow_wann(known):
    features, given = standard(known.features), known.given.numpy()
    orders = [ranked(features, row)[0][:FARTHEST] for row in range(len(given))]

    def size(row):
        for count in range(NEAREST, FARTHEST + 1):
            if np.bincount(given[orders[row][:count]], minlength=3).argmax() == given[row]:
                return count
        return FARTHEST

    sizes = [size(row) for row in range(len(given))]
    labels = []
    for order, own in zip(orders, sizes, strict=True):
        votes = np.zeros(3)
        for other in order[:own]:
            votes[given[other]] += 1 / sizes[other]
        labels.append(votes.argmax())
    return np.array(labels)


def slow_clipcleaner(known):
    features, given, synthetic = standard(known.features), known.given.numpy(), standard(known.synthetic)
    prototypes = np.stack([synthetic[known.synthetic_labels.numpy() == label].mean(axis=0) for label in range(3)])
    zero_shot = np.exp(10 * cosines(features, prototypes))
    clean = np.ones(len(given), dtype=bool)
    for probabilities in (zero_shot, heads(features, given, clean)):
        own = np.array([probabilities[row, label] for row, label in enumerate(given)])
        clean = clean & (own >= 0.8 * probabilities.max(axis=1))
    return np.where(clean, given, heads(features, given, clean).argmax(axis=1))


def test_rivals_follow_their_rules():
    known, _ = evidence(count=150, noise=0.4)
    known = replace(
        known, features=known.features + 3 * torch.randn(150, 6, generator=torch.Generator().manual_seed(1))
    )
    raw, given = known.features.double().numpy(), known.given.numpy()
    indices, cosine = nearest(known.features, 7)
    for row in range(150):
        order, all_of_them = ranked(raw, row)
        assert indices[row].tolist() == order[:7]
        np.testing.assert_allclose(cosine[row], all_of_them[order[:7]], rtol=1e-5)
    expected = {
        "knn-vote-10": [slow_knn_vote(raw, given, row, 10) for row in range(150)],
        "ssr": slow_ssr(known, 20),
        "wann": slow_wann(known),
        "clipcleaner": slow_clipcleaner(known),
    }
    for name, labels in expected.items():
        options = {"neighbours": 20} if name == "ssr" else {}
        found = REFINERS[name](known, **options)
        assert 0 < (found != known.given).sum() < 150
        np.testing.assert_array_equal(found, labels, err_msg=name)
