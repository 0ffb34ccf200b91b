"""The anchored refiner on Gaussian classes of known truth: wrong labels go, right ones stay, nonsense is refused."""

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from gaussians import problem

from synth_refine import InputError, refine_anchored
from synth_refine.refine import em
from synth_refine.refine.result import Reason


@pytest.fixture(autouse=True)
def short_fits(request, monkeypatch):
    """Skip the trial of longer fits."""
    if "recovered" not in request.node.name and "cifar" not in request.node.name:
        monkeypatch.setattr(em, "EPOCHS", (2,))


@cache
def solved(**options):
    one = problem(**options)
    return one, one.refine()


@pytest.mark.parametrize(
    "options",
    [
        {"noise": 0.55},
        {"noise": 0.7, "flips": "next"},
        {"noise": 0.7, "classes": 10, "width": 12, "count": 1000, "distance": 5.0},
    ],
    ids=str,
)
def test_labels_that_are_mostly_wrong_are_recovered(options):
    one, result = solved(**options)
    assert one.noise > 0.5
    assert one.wrong(result) < 0.25 * one.noise
    classes = result.num_classes
    counts = np.bincount(one.true * classes + one.given, minlength=classes**2).reshape(classes, classes)
    truth = counts / counts.sum(axis=1, keepdims=True)
    assert np.abs(result.diagnostics.transition - truth).max() < 0.2
    np.testing.assert_allclose(result.diagnostics.transition.sum(axis=1), 1, atol=1e-4)


def test_clean_labels_stay_though_the_heads_alone_would_change_some():
    one, result = solved(noise=0.0, distance=2.5)
    assert 1 - result.diagnostics.synthetic_accuracy > 0.1
    assert one.wrong(result) <= 0.005


@pytest.mark.parametrize("flips", ["uniform", "next"])
def test_little_noise_does_not_grow(flips):
    one, result = solved(noise=0.08, distance=2.5, count=1500, flips=flips)
    assert one.wrong(result) <= one.noise + 0.003


def test_labels_that_people_mistook_change_too():
    one = problem(noise=0.0, distance=4.0, count=3000)
    seen = one.features[:, :3]  # an annotator who sees three of the eight features confuses what differs in the others
    centers = np.stack([seen[one.true == number].mean(axis=0) for number in range(4)])
    taken = np.exp(-((seen[:, None] - centers) ** 2).sum(axis=2) / 2)
    taken /= taken.sum(axis=1, keepdims=True)
    rng = np.random.default_rng(0)
    guess = (taken.cumsum(axis=1) > rng.random((3000, 1))).argmax(axis=1)
    one.given = np.where(rng.random(3000) < 0.4, guess, one.true)
    result = one.refine()
    assert one.wrong(result) < 0.65 * one.noise
    assert abs(result.diagnostics.gain - (one.noise - one.wrong(result))) < 0.05


def test_a_second_view_is_heard_and_what_it_gets_wrong_is_seen_through():
    one, alone = solved(noise=0.4, distance=2.0)
    rng = np.random.default_rng(1)
    # Confidently right on half of the images; on the others unsure, and then always naming the next class.
    right = rng.random(600) < 0.5
    answer = np.where(right, one.true, (one.true + 1) % 4)
    view = (np.eye(4)[answer] * np.where(right, 6.0, 1.0)[:, None]).astype(np.float32)
    both = one.wrong(one.refine(second_view=view))
    assert both < 0.6 * one.wrong(alone)
    assert both < 0.6 * (answer != one.true).mean()


def test_a_second_view_that_says_nothing_does_little_harm():
    one, alone = solved(noise=0.4, distance=2.0)
    nothing = np.random.default_rng(1).normal(size=(600, 4)).astype(np.float32)
    assert one.wrong(one.refine(second_view=nothing)) < one.wrong(alone) + 0.03


def test_a_second_view_may_say_anything_of_images_that_cannot_be_scored():
    one = problem(count=100)
    one.features[7] = np.nan
    view = 4 * np.eye(4, dtype=np.float32)[one.true]
    expected = one.refine(second_view=view)
    view[7] = np.nan
    np.testing.assert_array_equal(one.refine(second_view=view).confidence, expected.confidence)
    view[8] = np.inf
    with pytest.raises(InputError, match="second_view: expected finite numbers, got a non-finite one in row 8"):
        one.refine(second_view=view)


def test_text_prototypes_join_where_the_images_say_little():
    one = problem(noise=0.5, per_class=2)
    vague = replace(one, synthetic=one.synthetic + np.random.default_rng(1).normal(0, 2, (8, 8)).astype(np.float32))
    text = np.stack([one.features[one.true == number].mean(axis=0) for number in range(4)])
    alone, helped = (vague.wrong(vague.refine(text_prototypes=words, force=True)) for words in (None, text))
    assert helped < alone - 0.05


def test_linear_heads_do_as_well_where_a_line_is_enough():
    one, hidden = solved(noise=0.55)
    linear = one.refine(hidden=0)
    assert one.wrong(linear) < 0.25 * one.noise
    assert not np.array_equal(linear.confidence, hidden.confidence)


def test_the_same_seed_repeats_itself_and_leaves_the_global_generator_alone():
    one, first = solved(noise=0.4)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = one.refine()
    assert torch.equal(torch.rand(1), expected)
    np.testing.assert_array_equal(again.confidence, first.confidence)
    assert not np.array_equal(one.refine(seed=1).confidence, first.confidence)


def test_torch_in_is_torch_out_to_the_same_bits():
    one, expected = solved(noise=0.4)
    result = refine_anchored(*map(torch.from_numpy, one.arrays), rounds=2)
    for name in ("proposed", "confidence", "margin", "accepted", "reason", "ties", "given"):
        value = getattr(result, name)
        assert isinstance(value, torch.Tensor), name
        assert isinstance(getattr(expected, name), np.ndarray), name
        np.testing.assert_array_equal(value.numpy(), getattr(expected, name), name)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_the_type_of_the_features_hardly_shows(dtype):
    one, expected = solved(noise=0.4)
    result = replace(one, features=one.features.astype(dtype), synthetic=one.synthetic.astype(dtype)).refine()
    assert (result.apply(one.given) != expected.apply(one.given)).mean() < 0.02


def test_callers_arrays_are_left_alone_and_may_be_read_only():
    one = problem(count=60)
    copies = [array.copy() for array in one.arrays]
    for array in one.arrays:
        array.setflags(write=False)
    one.refine(rounds=1)
    assert all(np.array_equal(*pair) for pair in zip(one.arrays, copies, strict=True))


def test_confidence_and_margin_are_those_of_the_posterior():
    one, result = solved(noise=0.4)
    rows, posterior = (torch.cat(parts) for parts in zip(*result.diagnostics.posteriors(), strict=True))
    table = posterior.numpy()[rows.argsort().numpy()]
    np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-4)
    np.testing.assert_array_equal(result.proposed, table.argmax(axis=1))
    ranked = np.sort(table, axis=1)
    np.testing.assert_array_equal(result.confidence, ranked[:, -1])
    np.testing.assert_allclose(result.margin, ranked[:, -1] - ranked[:, -2], atol=1e-6)
    assert (result.reason == Reason.SAME).tolist() == (result.proposed == one.given).tolist()


def test_a_threshold_keeps_labels_that_are_less_sure():
    one, free = solved(noise=0.4)
    strict = one.refine(threshold=0.9)
    np.testing.assert_array_equal(strict.confidence, free.confidence)
    np.testing.assert_array_equal(strict.accepted, free.accepted & (free.confidence >= np.float32(0.9)))
    assert set(strict.reason[free.accepted & ~strict.accepted]) == {Reason.BELOW_THRESHOLD}
    [row] = [row for row in free.diagnostics.sweep if row.threshold == 0.9]
    assert row.changed == strict.accepted.mean()
    auto = one.refine(threshold="auto")
    assert (auto.confidence >= auto.diagnostics.thresholds[auto.proposed])[auto.accepted].all()
    right = auto.proposed[auto.accepted] == one.true[auto.accepted]
    assert right.mean() > 0.85


# ---- odd inputs ----


def test_images_that_cannot_be_scored_keep_their_label_and_harm_no_other():
    one, whole = solved(noise=0.4)
    broken = replace(one, features=one.features.copy())
    broken.features[[7, 300], 0] = [np.nan, np.inf]
    result = broken.refine()
    assert np.flatnonzero(result.reason == Reason.UNSCORED).tolist() == [7, 300]
    assert result.unscored == 2
    assert result.proposed[7] == -1
    assert np.isnan(result.confidence[[7, 300]]).all()
    assert (result.apply(one.given) == one.given)[[7, 300]].all()
    assert (np.delete(result.apply(one.given) != whole.apply(one.given), [7, 300])).mean() < 0.02
    nothing = replace(one, features=np.full_like(one.features, np.nan)).refine()
    assert nothing.unscored == 600
    np.testing.assert_array_equal(nothing.apply(one.given), one.given)


def test_classes_may_be_missing_from_the_given_labels():
    one = problem(noise=0.2)
    one.given[one.given == 2] = 1
    result = one.refine()
    assert one.wrong(result) < 0.25 * one.noise
    assert (result.apply(one.given) == 2).sum() > 100


@pytest.mark.parametrize(
    "options",
    [
        {"count": 1},
        {"count": 2},
        {"classes": 1, "noise": 0.0},
        {"count": 30, "per_class": 1},
        {"count": 60, "width": 500},
        {"count": 150, "classes": 100, "width": 100, "per_class": 1},
    ],
    ids=str,
)
def test_small_and_odd_problems_have_an_answer(options):
    one = problem(**options)
    result = one.refine()
    assert ((result.confidence > 0) & (result.confidence <= 1)).all()
    assert one.wrong(result) <= one.noise + (len(one.given) == 1)


def test_labels_in_another_order_are_an_error():
    one = problem(noise=0.2)
    with pytest.raises(InputError, match="given: expected labels of these images in this order"):
        replace(one, given=np.roll(one.given, 100)).refine()


# ---- evidence that deserves no trust ----


def exchanged(order):
    def change(one):
        return replace(one, synthetic_labels=np.array(order)[one.synthetic_labels])

    return change


def rotated(one):
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(8, 8)))[0]
    return replace(one, synthetic=(one.synthetic @ turn).astype(np.float32))


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        (exchanged([1, 2, 3, 4, 5, 0]), Reason.MISMATCH, "do the class numbers mean the same"),
        (exchanged([1, 0, 2, 3, 4, 5]), Reason.MISMATCH, "0 -> 1 -> 0"),
        (rotated, Reason.MISMATCH, "nothing is changed: "),
        (lambda one: replace(one, features=np.zeros_like(one.features)), Reason.MISMATCH, "does the encoder see"),
        (lambda one: problem(2000, 10, 12, 0.2, distance=1.0), Reason.WEAK_ENCODER, "use an encoder that knows"),
    ],
    ids=["shifted", "two swapped", "rotated", "constant features", "weak encoder"],
)
def test_nothing_changes_and_a_warning_says_why(change, reason, words):
    one = change(problem(1000, 6, noise=0.3))
    result = one.refine()
    np.testing.assert_array_equal(result.apply(one.given), one.given)
    assert set(result.reason) <= {Reason.SAME, Reason.WITHIN_ODDS, Reason.NO_GAIN, reason}
    assert result.diagnostics.vetoed
    assert np.isnan(result.diagnostics.estimates.after.value)
    [warning] = result.diagnostics.warnings
    assert words in warning
    assert "\n" not in warning
    forced = one.refine(force=True, rounds=1)
    assert (forced.apply(one.given) != one.given).mean() > 0.05
    assert any(words.removeprefix("nothing is changed: ") in line for line in forced.diagnostics.warnings)


def test_few_synthetic_images_are_remarked_on():
    one = problem(per_class=9)
    assert "4 classes have fewer than 10 synthetic images (class 0, 1, 2, 3)" in one.refine().diagnostics.warnings[0]
    assert solved(noise=0.4)[1].diagnostics.warnings == ()


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
        ({"synthetic": np.zeros((80, 3), np.float32)}, r"synthetic_features: expected shape \(M, 8\), got \(80, 3\)"),
        ({"synthetic": np.full((80, 8), np.nan, np.float32)}, "synthetic_features: expected finite numbers"),
        ({"synthetic_labels": np.zeros(3, int)}, r"synthetic_labels: expected shape \(80,\), got \(3,\)"),
    ],
)
def test_bad_arrays_are_named(change, message):
    with pytest.raises(InputError, match=message):
        replace(problem(count=60), **change).refine()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 5}, "synthetic_labels: expected at least one image per class, got none for class 4"),
        ({"text_prototypes": np.zeros((3, 8), np.float32)}, r"text_prototypes: expected shape \(4, 8\), got \(3, 8\)"),
        ({"second_view": np.zeros((60, 3), np.float32)}, r"second_view: expected shape \(60, 4\), got \(60, 3\)"),
        ({"threshold": "high"}, "threshold: expected auto or a number"),
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        problem(count=60).refine(**options)


@pytest.mark.slow
def test_cifar10_at_70_percent_is_more_than_halved():
    if "SYNTH_REFINE_DATA" not in os.environ:
        pytest.skip("SYNTH_REFINE_DATA does not name the folder with CIFAR-10")
    folder, rows = Path(os.environ["SYNTH_REFINE_DATA"]) / "cifar10", slice(None, 45_000, 7)
    with np.load(folder / "features_mobilenetv2.npz", allow_pickle=False) as archive:
        features, synthetic, labels = (archive[name] for name in ("train", "synthetic", "synthetic_labels"))
    given = np.load(folder / "noise_labels" / "cifar10-1-0.70.npy", allow_pickle=False)[rows]
    with np.load(folder / "labels.npz", allow_pickle=False) as archive:
        true = archive["train"][rows]
    some = np.concatenate([np.flatnonzero(labels == number)[:100] for number in range(10)])
    real, images = (one.astype(np.float32) for one in (features[rows], synthetic[some]))
    result = refine_anchored(real, given, images, labels[some])
    assert (given != true).mean() > 0.65
    assert (result.apply(given) != true).mean() < 0.3
