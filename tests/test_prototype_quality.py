"""The quality report of a synthetic set."""

import numpy as np
import pytest
import torch

from synth_refine import InputError
from synth_refine.refine import prototypes
from synth_refine.refine.prototypes import prototype_quality


def images(per_class=20, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    return 6 * np.eye(classes, 12)[labels] + rng.normal(size=(len(labels), 12)) + 3, labels


def test_a_clean_set_is_kept_whole():
    report = prototype_quality(*images())
    assert report.keep.all()
    assert report.confused == []
    assert report.too_few == []
    np.testing.assert_allclose(report.confusion, np.eye(3))


def test_an_image_of_another_class_is_found():
    features, labels = images()
    features[5] = features[45]
    report = prototype_quality(features, labels)
    assert report.off_class.nonzero()[0].tolist() == [5]
    assert report.looks_like[5] == 2
    assert not report.keep[5]
    assert report.confusion[0, 2] == pytest.approx(0.05)


def test_confused_classes_are_named_largest_first():
    features, labels = images()
    features[:8] = images(seed=1)[0][20:28]
    features[20:23] = images(seed=1)[0][40:43]
    report = prototype_quality(features, labels)
    assert [pair[:2] for pair in report.confused] == [(0, 1), (1, 2)]
    assert "40% of class 0 look like class 1" in report.lines()


@pytest.mark.parametrize("block", [1, 7, 2048])
def test_near_duplicates_keep_the_first(block, monkeypatch):
    monkeypatch.setattr(prototypes, "BLOCK_ROWS", block)
    features, labels = images()
    features[9] = features[3] + 0.001
    features[14] = features[3]
    report = prototype_quality(features, labels)
    assert report.duplicate_of[[3, 9, 14]].tolist() == [-1, 3, 3]
    assert (report.duplicate_of >= 0).sum() == 2
    assert report.keep.sum() == 58


def test_chunks_change_nothing(monkeypatch):
    arrays = images()
    whole = prototype_quality(*arrays)
    monkeypatch.setattr(prototypes, "CHUNK_ROWS", 7)
    parts = prototype_quality(*arrays)
    assert np.array_equal(whole.looks_like, parts.looks_like)
    assert np.array_equal(whole.off_class, parts.off_class)


def test_looks_against_the_rule_written_slowly():
    features, labels = images(per_class=3, seed=2)
    features += 2 * np.random.default_rng(3).normal(size=features.shape)
    centred = features - features.mean(axis=0)
    expected = []
    for row in range(9):
        others = np.arange(9) != row  # the image itself is left out of its class's prototype
        means = [centred[others & (labels == number)].mean(axis=0) for number in range(3)]
        expected.append(int(np.argmax([centred[row] @ mean / np.linalg.norm(mean) for mean in means])))
    assert expected != labels.tolist()
    assert prototype_quality(features, labels).looks_like.tolist() == expected


def test_too_few_images_are_named():
    features, labels = images(per_class=20)
    rows = np.r_[0:20, 20:24, 40:60]
    report = prototype_quality(features[rows], labels[rows])
    assert report.too_few == [1]
    assert "class 1 has only 4 fit images" in report.lines()


def test_torch_and_a_single_image_per_class():
    features, labels = images(per_class=1)
    report = prototype_quality(torch.from_numpy(features), torch.from_numpy(labels))
    assert report.keep.all()
    assert report.too_few == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -1}, r"margin: expected a number in \[0, 2\], got -1"),
        ({"duplicate": 2}, r"duplicate: expected a number in \[0, 1\], got 2"),
        ({"confused": 2}, r"confused: expected a number in \[0, 1\], got 2"),
        ({"num_classes": 4}, "labels: expected at least one synthetic image per class, got none for class 3"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(InputError, match=message):
        prototype_quality(*images(), **options)
