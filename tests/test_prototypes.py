"""Class prototypes: means as the paper takes them, and what cannot be averaged."""

import numpy as np
import pytest
import torch

from synth_refine import InputError, class_prototypes
from synth_refine.refine import prototypes


def arrays(dtype=np.float32, images=50, classes=4):
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, images - classes)])
    return rng.standard_normal((images, 7)).astype(dtype), labels


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_prototypes_are_plain_means(dtype):
    features, labels = arrays(dtype)
    expected = np.stack([features[labels == label].astype(np.float64).mean(axis=0) for label in range(4)])
    means = class_prototypes(features, labels)
    np.testing.assert_allclose(means, expected, atol=1e-6)
    assert means.dtype == (np.float64 if dtype == np.float64 else np.float32)


def test_normalised_prototypes_average_directions():
    features, labels = arrays()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = np.stack([unit[labels == label].mean(axis=0) for label in range(4)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(class_prototypes(features, labels, normalize=True), expected, atol=1e-6)


def test_chunks_and_memory_maps_do_not_show(monkeypatch, tmp_path):
    features, labels = arrays()
    whole = class_prototypes(features, labels)
    np.save(tmp_path / "features.npy", features)
    monkeypatch.setattr(prototypes, "CHUNK_ROWS", 3)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    np.testing.assert_allclose(class_prototypes(mapped, labels), whole, atol=1e-6)


def test_torch_in_is_torch_out():
    features, labels = map(torch.from_numpy, arrays())
    means = class_prototypes(features, labels)
    assert isinstance(means, torch.Tensor)
    np.testing.assert_allclose(means.numpy(), class_prototypes(*arrays()), atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.ones((50, 7), int)}, "features: expected floating-point numbers, got int64"),
        ({"features": np.ones(50)}, "features: expected shape (M, D), got (50,)"),
        ({"labels": np.zeros(49, int)}, "labels: expected shape (50,), got (49,)"),
        ({"labels": np.zeros(50)}, "labels: expected integer class indices, got float64"),
        ({"labels": np.full(50, -1)}, "labels: expected classes 0 to 0, got -1 in row 0"),
        ({"num_classes": 5}, "labels: expected at least one synthetic image per class, got none for class 4"),
        ({"num_classes": 2}, "labels: expected classes 0 to 1, got 2 in row 2"),
        ({"labels": np.full(50, 1)}, "labels: expected at least one synthetic image per class, got none for class 0"),
    ],
)
def test_bad_input_is_named(change, message):
    features, labels = arrays()
    with pytest.raises(InputError) as caught:
        class_prototypes(**{"features": features, "labels": labels, **change})
    assert str(caught.value).startswith(message)


def test_a_non_finite_feature_is_found():
    features, labels = arrays()
    features[31, 2] = np.inf
    with pytest.raises(InputError, match="^features: expected finite numbers, got a non-finite one in row 31$"):
        class_prototypes(features, labels)


def test_nothing_to_average():
    with pytest.raises(InputError, match="^labels: expected at least one synthetic image per class"):
        class_prototypes(np.ones((0, 3)), np.ones(0, int))
