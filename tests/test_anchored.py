"""The anchored posterior on Gaussian classes of known truth."""

import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from synth_refine import InputError
from synth_refine.refine.anchored import anchored_posterior, bayes, fit_transition, log_likelihood
from synth_refine.refine.checks import check_row_order, prototype_classes
from synth_refine.refine.decide import decide


def problem(count=600, classes=4, width=8, noise=0.4, per_class=10, seed=0, shift=1.0, distance=4.0):
    """Gaussian classes, anchors of another domain, and given labels of which some flip to the next class."""
    rng = np.random.default_rng(seed)
    centers = distance * rng.normal(size=(classes, width)) / np.sqrt(2)
    true = rng.integers(0, classes, count)
    features = centers[true] + rng.normal(size=(count, width))
    given = np.where(rng.random(count) < noise, (true + 1) % classes, true)
    anchor_labels = np.repeat(np.arange(classes), per_class)
    anchors = centers[anchor_labels] + rng.normal(size=(len(anchor_labels), width)) + shift
    return features.astype(np.float32), given, anchors.astype(np.float32), anchor_labels, true


def test_labels_that_are_mostly_wrong_are_recovered():
    features, given, anchors, anchor_labels, true = problem(noise=0.7)
    result = anchored_posterior(features, given, anchors, anchor_labels)
    assert (given != true).mean() > 0.6
    assert (result.posterior.argmax(axis=1) != true).mean() < 0.05
    assert result.transition[0, 1] > 0.5
    assert abs(result.noise_before - (given != true).mean()) < 0.05


def test_clean_labels_stay():
    features, given, anchors, anchor_labels, _ = problem(noise=0.0, distance=2.0)
    result = anchored_posterior(features, given, anchors, anchor_labels)
    assert (result.head.argmax(axis=1) != given).mean() > 0.02  # the head alone would do harm
    assert (decide(result, given).apply(given) != given).mean() <= 0.005


def test_a_second_view_is_heard_and_what_it_gets_wrong_is_seen_through():
    features, given, anchors, anchor_labels, true = problem(noise=0.5, distance=1.5)
    rng = np.random.default_rng(1)
    # Confidently right on half of the images; on the others unsure, and then always naming the next class.
    right = rng.random(len(true)) < 0.5
    answer = np.where(right, true, (true + 1) % 4)
    logits = (np.eye(4)[answer] * np.where(right, 6.0, 1.0)[:, None]).astype(np.float32)
    alone = anchored_posterior(features, given, anchors, anchor_labels)
    both = anchored_posterior(features, given, anchors, anchor_labels, second_view=logits)
    wrong_alone, wrong_both = ((one.posterior.argmax(axis=1) != true).mean() for one in (alone, both))
    assert wrong_both < 0.5 * wrong_alone
    assert wrong_both < 0.5 * (answer != true).mean()


def test_a_second_view_may_say_anything_of_images_that_are_skipped():
    features, given, anchors, anchor_labels, true = problem(count=60)
    features[7] = np.nan
    view = np.eye(4, dtype=np.float32)[true]
    expected = anchored_posterior(features, given, anchors, anchor_labels, second_view=view)
    view[7] = np.nan
    found = anchored_posterior(features, given, anchors, anchor_labels, second_view=view)
    np.testing.assert_array_equal(found.posterior, expected.posterior)
    view[8] = np.inf
    with pytest.raises(InputError, match="second_view: expected finite numbers, got a non-finite one in row 8"):
        anchored_posterior(features, given, anchors, anchor_labels, second_view=view)


def test_linear_heads():
    features, given, anchors, anchor_labels, true = problem(noise=0.7)
    linear = anchored_posterior(features, given, anchors, anchor_labels, hidden=0)
    assert (linear.posterior.argmax(axis=1) != true).mean() < 0.05
    hidden = anchored_posterior(features, given, anchors, anchor_labels)
    assert not np.array_equal(linear.posterior, hidden.posterior)


def test_shapes_sums_and_types():
    features, given, anchors, anchor_labels, _ = problem(count=80)
    result = anchored_posterior(features, given, anchors, anchor_labels, rounds=2)
    assert result.posterior.shape == result.head.shape == (80, 4)
    assert result.transition.shape == (4, 4)
    assert result.anchor_head.shape == (40, 4)
    for part in (result.posterior, result.transition, result.head, result.anchor_head):
        assert part.dtype == np.float32
        np.testing.assert_allclose(part.sum(axis=1), 1, atol=1e-4)
    assert len(result.history) <= 2
    assert set(result.history[0]) == {"log_likelihood", "changed", "noise", "tau", "epochs"}


def test_same_seed_same_result_and_the_global_generator_is_left_alone():
    arrays = problem(count=100)[:4]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = anchored_posterior(*arrays, rounds=2, seed=3)
    assert torch.equal(torch.rand(1), expected)
    again = anchored_posterior(*arrays, rounds=2, seed=3)
    other = anchored_posterior(*arrays, rounds=2, seed=4)
    assert np.array_equal(first.posterior, again.posterior)
    assert not np.array_equal(first.posterior, other.posterior)


def test_torch_gives_torch_and_the_same_numbers():
    arrays = problem(count=100)[:4]
    expected = anchored_posterior(*arrays, rounds=2)
    result = anchored_posterior(*map(torch.from_numpy, arrays), rounds=2)
    for entry in fields(result):
        value = getattr(result, entry.name)
        if isinstance(value, torch.Tensor):
            np.testing.assert_allclose(value.numpy(), getattr(expected, entry.name), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_float_types(dtype):
    features, given, anchors, anchor_labels, true = problem(count=200, noise=0.2)
    result = anchored_posterior(features.astype(dtype), given, anchors.astype(dtype), anchor_labels, rounds=3)
    assert (result.posterior.argmax(axis=1) != true).mean() < 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"count": 1},
        {"count": 2},
        {"count": 30, "per_class": 1},
        {"count": 60, "classes": 2, "width": 2},
        {"count": 60, "width": 500},
        {"count": 150, "classes": 100, "per_class": 1},
    ],
    ids=str,
)
def test_small_and_odd_problems_degrade_gracefully(options):
    features, given, anchors, anchor_labels, _ = problem(**options)
    result = anchored_posterior(features, given, anchors, anchor_labels, rounds=2)
    assert np.isfinite(result.posterior).all()
    assert np.isfinite(result.anchor_head).all()


def test_prototypes_are_not_given_up_for_a_worse_head():
    rng = np.random.default_rng(0)
    features, given, anchors, anchor_labels, true = problem(
        count=2000, classes=100, width=64, noise=0.0, per_class=5, shift=0.5, distance=1.0
    )
    given = np.where(rng.random(2000) < 0.5, rng.integers(0, 100, 2000), true)
    result = anchored_posterior(features, given, anchors, anchor_labels, rounds=3)
    nearest = prototype_classes(features, anchors, anchor_labels, 100)
    wrong = (decide(result, given).apply(given) != true).mean()
    assert wrong <= min((nearest != true).mean(), (given != true).mean()) + 0.005


def test_classes_may_be_missing_from_the_given_labels():
    features, given, anchors, anchor_labels, _ = problem(count=200)
    result = anchored_posterior(features, np.where(given == 2, 1, given), anchors, anchor_labels, rounds=3)
    assert np.isfinite(result.posterior).all()


def test_constant_features_keep_the_given_labels():
    _, given, anchors, anchor_labels, _ = problem(count=200)
    features = np.zeros((200, 8), dtype=np.float32)
    result = anchored_posterior(features, given, anchors, anchor_labels, rounds=2)
    assert np.isfinite(result.posterior).all()


def test_a_non_finite_row_keeps_its_label_and_harms_no_other():
    features, given, anchors, anchor_labels, _ = problem(count=100)
    features[7, 0] = np.nan
    result = anchored_posterior(features, given, anchors, anchor_labels, rounds=2)
    assert result.skipped.nonzero()[0].tolist() == [7]
    assert result.posterior[7].argmax() == given[7]
    assert np.isfinite(result.posterior).all()


def test_text_prototypes_join_where_the_images_say_little():
    features, given, anchors, anchor_labels, true = problem(noise=0.6, per_class=1)
    vague = anchors + 6 * np.random.default_rng(1).normal(size=anchors.shape).astype(np.float32)
    text = np.stack([features[true == number].mean(axis=0) for number in range(4)])
    alone = anchored_posterior(features, given, vague, anchor_labels, rounds=1)
    helped = anchored_posterior(features, given, vague, anchor_labels, text_prototypes=text, rounds=1)
    wrong = [(result.posterior.argmax(axis=1) != true).mean() for result in (alone, helped)]
    assert wrong[1] < wrong[0] - 0.1


def test_transition_and_bayes_against_the_rule_written_slowly():
    rng = np.random.default_rng(0)
    opinion = torch.from_numpy(rng.dirichlet(np.ones(3), 40))
    given = torch.from_numpy(rng.integers(0, 3, 40))
    slow = np.ones((3, 3))
    for row, label in zip(opinion.numpy(), given.numpy(), strict=True):
        slow[:, label] += row
    slow /= slow.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(fit_transition(opinion, given, steps=0), slow)
    belief = bayes(opinion, torch.from_numpy(slow), given)
    for number in range(40):
        joint = [opinion[number, y].item() * slow[y, given[number]] for y in range(3)]
        np.testing.assert_allclose(belief[number], np.array(joint) / sum(joint))
    values = [log_likelihood(opinion, fit_transition(opinion, given, steps=steps), given) for steps in (0, 5, 20)]
    assert values == sorted(values)


def test_inputs_are_left_as_they_are():
    arrays = problem(count=60)[:4]
    copies = [array.copy() for array in arrays]
    for array in arrays:
        array.setflags(write=False)
    anchored_posterior(*arrays, rounds=1)
    assert all(np.array_equal(*pair) for pair in zip(arrays, copies, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros((3,), np.float32)}, r"features: expected shape \(N, D\), got \(3,\)"),
        ({"features": np.zeros((8, 60), np.float32)}, r"features: expected shape \(60, D\), got \(8, 60\), which"),
        ({"features": np.zeros((60, 8), int)}, "features: expected floating-point numbers, got int64"),
        ({"features": np.zeros((0, 8), np.float32), "given": np.zeros(0, int)}, "features: expected at least one row"),
        ({"given": np.zeros(5, int)}, r"given: expected shape \(60,\), got \(5,\)"),
        ({"given": np.full(60, 9)}, "given: expected classes 0 to 3, got 9 in row 0"),
        ({"given": torch.zeros(60, dtype=torch.int64)}, "given: expected ndarray like features, got Tensor"),
        ({"anchors": np.zeros((40, 3), np.float32)}, r"anchors: expected shape \(M, 8\), got \(40, 3\)"),
        ({"anchors": np.full((40, 8), np.nan, np.float32)}, "anchors: expected finite numbers"),
        ({"anchor_labels": np.zeros(3, int)}, r"anchor_labels: expected shape \(40,\), got \(3,\)"),
        ({"num_classes": 5}, "anchor_labels: expected at least one image per class, got none for class 4"),
        ({"text_prototypes": np.zeros((3, 8), np.float32)}, r"text_prototypes: expected shape \(4, 8\), got \(3, 8\)"),
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
    ],
)
def test_bad_input_is_named(change, message):
    features, given, anchors, anchor_labels, _ = problem(count=60)
    arguments = {"features": features, "given": given, "anchors": anchors, "anchor_labels": anchor_labels} | change
    with pytest.raises(InputError, match=message):
        anchored_posterior(**arguments)


@pytest.mark.slow
def test_cifar10_at_70_percent_reaches_its_target():
    if "SYNTH_REFINE_DATA" not in os.environ:
        pytest.skip("SYNTH_REFINE_DATA does not name the folder with CIFAR-10")
    folder = Path(os.environ["SYNTH_REFINE_DATA"]) / "cifar10"
    archive = np.load(folder / "features_mobilenetv2.npz", allow_pickle=False)
    features = archive["train"][:45_000].astype(np.float32)
    classes = archive["synthetic_labels"].astype(np.int64)
    rows = np.concatenate([np.flatnonzero(classes == number)[:100] for number in range(10)])
    anchors, anchor_labels = archive["synthetic"][rows].astype(np.float32), classes[rows]
    opinion = prototype_classes(features, anchors, anchor_labels, 10)
    given = np.load(folder / "noise_labels" / "cifar10-1-0.70.npy", allow_pickle=False)
    for wrong in (np.roll(given, 5000), np.random.default_rng(0).permutation(given)):
        with pytest.raises(InputError, match="row order"):
            check_row_order(wrong, opinion, 10)
    for name in ("0.35", "0.35_U_0.3", "0.35_U_0.6", "0.35_A_0.3"):
        check_row_order(np.load(folder / "noise_labels" / f"cifar10-1-{name}.npy", allow_pickle=False), opinion, 10)
    check_row_order(given, opinion, 10)
    true = np.load(folder / "labels.npz", allow_pickle=False)["train"][:45_000]
    result = anchored_posterior(features, given, anchors, anchor_labels)
    assert (decide(result, given).apply(given) != true).mean() <= 0.245
