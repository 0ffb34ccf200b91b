"""The nearest images of each image and the labels they carry, against the rule written slowly."""

import numpy as np
import pytest
import torch
from gaussians import problem

from synth_refine.refine import em, neighbours
from synth_refine.refine.neighbours import nearest, neighbour_labels


@pytest.mark.parametrize("block", [1, 100, 1 << 25])
def test_the_nearest_are_those_of_all_cosines_but_never_the_row_itself(block, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 6)).astype(np.float16)
    features[7] = features[3]  # a double is a neighbour, the row itself is not
    rows, cosines = nearest(torch.from_numpy(features), 4)
    unit = features.astype(float) / np.linalg.norm(features.astype(float), axis=1, keepdims=True)
    for number in range(30):
        order = sorted((one for one in range(30) if one != number), key=lambda one: -unit[one] @ unit[number])
        np.testing.assert_allclose(cosines[number], [unit[one] @ unit[number] for one in order[:4]], atol=1e-6)
        assert set(rows[number].tolist()) == set(order[:4])
    assert rows[3, 0] == 7


def test_fewer_rows_than_neighbours():
    assert [nearest(torch.ones(count, 2), 5)[0].shape for count in (0, 1, 2, 4)] == [(0, 0), (1, 0), (2, 1), (4, 3)]


@pytest.mark.parametrize("block", [1, 1 << 25])
def test_labels_are_weighed_and_the_commonest_kept(block, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(0)
    rows, weights, given = rng.integers(0, 20, (20, 6)), rng.random((20, 6)), rng.integers(0, 5, 20)
    labels, shares = neighbour_labels(*map(torch.from_numpy, (rows, weights, given)), classes=5, keep=3)
    for number in range(20):
        table = np.zeros(5)
        for one, weight in zip(rows[number], weights[number], strict=True):
            table[given[one]] += weight / weights[number].sum()
        assert (np.diff(shares[number]) <= 0).all()
        np.testing.assert_allclose(shares[number], np.sort(table)[::-1][:3], atol=1e-6)
        np.testing.assert_allclose(table[labels[number]], shares[number], atol=1e-6)
    labels, shares = neighbour_labels(*map(torch.from_numpy, (rows, weights, given)), classes=5, keep=10)
    np.testing.assert_allclose(shares.sum(dim=1), 1, atol=1e-6)


def test_neighbours_help_where_images_lie_in_groups_that_no_head_tells_apart(monkeypatch):
    monkeypatch.setattr(em, "EPOCHS", (2,))
    one = problem(1200, noise=0.4, distance=2.5, off=0.5)
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 1200)  # scenes: who shares one has the same class
    one.true = groups % 4
    one.given = np.where(rng.random(1200) < 0.4, (one.true + rng.integers(1, 4, 1200)) % 4, one.true)
    spots = 3 * rng.normal(size=(40, 8))
    one.features = (one.features * 0 + spots[groups] + 0.3 * rng.normal(size=(1200, 8))).astype(np.float32)
    centers = np.stack([spots[number::4].mean(axis=0) for number in range(4)])
    one.synthetic = (centers[one.synthetic_labels] + rng.normal(size=one.synthetic.shape)).astype(np.float32)
    result = one.refine(rounds=4)
    with monkeypatch.context() as patch:
        patch.setattr(em, "MOST_VOTES", 0.0)
        alone = one.refine(rounds=4)
    assert one.wrong(result) < one.wrong(alone) - 0.02
