"""Checks that need no true label: noise passes, however heavy; another order, data set or numbering does not."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from synth_refine import InputError
from synth_refine.refine.checks import (
    agreement_doubt,
    check_row_order,
    compare_stories,
    domain_gap,
    prototype_classes,
    row_order,
)
from synth_refine.refine.decide import fit_transition
from synth_refine.refine.em import EM
from synth_refine.refine.heads import fold_logits
from synth_refine.refine.rows import array_reader, fit_frame, rows_in_memory
from synth_refine.refine.solve import label_heads


def noisy(count, classes, agreement, wrong_given, seed=0):
    """Given labels that flip to any class, and an opinion that is right as often as `agreement`, or guesses."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, count)
    opinion = np.where(rng.random(count) < agreement, true, rng.integers(0, classes, count))
    given = np.where(rng.random(count) < wrong_given, rng.integers(0, classes, count), true)
    return given, opinion


# ---- row order ----


def chi_square(given, opinion, classes):
    """The sum over all cells of a table, one by one."""
    total = 0.0
    for left in range(classes):
        for right in range(classes):
            expected = (given == left).sum() * (opinion == right).sum() / len(given)
            if expected:
                total += (((given == left) & (opinion == right)).sum() - expected) ** 2 / expected
    return total


def test_the_score_is_measured_in_deviations_of_shuffled_rows():
    rng = np.random.default_rng(0)
    given, opinion = rng.choice(4, 300, p=[0.7, 0.1, 0.1, 0.1]), rng.choice(4, 300, p=[0.4, 0.3, 0.3, 0])
    shuffled = [chi_square(rng.permutation(given), opinion, 4) for _ in range(2000)]
    score = (chi_square(given, opinion, 4) - np.mean(shuffled)) / np.std(shuffled)
    found = row_order(given, opinion, 4)
    assert abs(found.score - score) < 0.1 + 0.05 * abs(score)
    assert found.agreement == (given == opinion).mean()
    noise = np.where(rng.random(300) < 0.2, opinion, given)
    score = (chi_square(noise, opinion, 4) - np.mean(shuffled)) / np.std(shuffled)
    assert abs(row_order(noise, opinion, 4).score - score) < 0.15 * score
    assert score > 4


@pytest.mark.parametrize(
    ("count", "classes", "agreement", "wrong"),
    [(45_000, 100, 0.5, 0.74), (5_000, 100, 0.5, 0.74), (1_000, 10, 0.7, 0.7)],
)
def test_very_noisy_labels_pass_and_systematic_flips_too(count, classes, agreement, wrong):
    given, opinion = noisy(count, classes, agreement, wrong)
    assert check_row_order(given, opinion, classes).score > 8
    assert check_row_order((given + 1) % classes, opinion, classes).agreement < 0.1


@pytest.mark.parametrize(("count", "classes"), [(45_000, 100), (1_000, 10), (200, 2)])
@pytest.mark.parametrize("way", ["shifted", "shuffled", "other"])
def test_labels_of_another_order_or_data_set_are_refused(count, classes, way):
    given, opinion = noisy(count, classes, 0.7, 0.35)
    wrong = {
        "shifted": np.roll(given, count // 9),
        "shuffled": np.random.default_rng(1).permutation(given),
        "other": np.random.default_rng(2).integers(0, classes, count),
    }[way]
    with pytest.raises(InputError, match="given: expected labels of these images in this order"):
        check_row_order(wrong, opinion, classes)


def test_too_few_rows_or_one_class_are_never_refused():
    assert not row_order(np.arange(10) % 5, np.arange(10) // 2, 5).conclusive
    assert not check_row_order(np.zeros(1000, int), np.arange(1000) % 4, 4).conclusive
    assert not check_row_order(np.zeros(0, int), np.zeros(0, int), 4).conclusive


# ---- agreement, prototypes, gap ----


@pytest.mark.parametrize(("count", "classes", "wrong"), [(45_000, 100, 0.74), (1_000, 10, 0.7)])
def test_agreement_by_chance_is_doubted_and_noise_is_not(count, classes, wrong):
    given, opinion = noisy(count, classes, 0.7, wrong)
    assert agreement_doubt(given, opinion, classes) == ""
    few = slice(20 * classes - 1)
    assert agreement_doubt(given[few], opinion[::-1][few], classes) == ""
    for other in (opinion[::-1], classes - 1 - opinion, np.random.default_rng(1).permutation(opinion)):
        doubt = agreement_doubt(given, other, classes)
        assert doubt.startswith("given labels and nearest prototypes name the same class for ")
        assert "\n" not in doubt


def test_chance_is_that_of_shuffled_rows():
    rng = np.random.default_rng(0)
    given, opinion = rng.choice(5, 2_000, p=[0.6, 0.1, 0.1, 0.1, 0.1]), rng.choice(5, 2_000, p=[0.5, 0.3, 0.1, 0.1, 0])
    shuffled = [int((rng.permutation(given) == opinion).sum()) for _ in range(500)]
    score = ((given == opinion).sum() - np.mean(shuffled)) / np.std(shuffled)
    told = float(agreement_doubt(given, opinion, 5).split("(")[1].split()[0])
    assert abs(told - score) < 0.3
    assert agreement_doubt(np.zeros(500, int), np.arange(500) % 5, 5) == ""  # nothing varies
    assert "for 20.0% of the images" in agreement_doubt(np.arange(500) % 5, np.zeros(500, int), 5)  # a dead encoder


def test_prototype_classes_are_those_of_the_centred_cosine():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 5)
    synthetic, features = rng.normal(size=(15, 4)) + 3, rng.normal(size=(50, 4)) - 2
    means = np.stack([(synthetic - synthetic.mean(axis=0))[labels == number].mean(axis=0) for number in range(3)])
    centred = features - features.mean(axis=0)
    cosine = centred @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    np.testing.assert_array_equal(prototype_classes(features, synthetic, labels, 3), cosine.argmax(axis=1))


def test_domain_gap_tells_equal_from_different():
    rng = np.random.default_rng(0)
    real, same = rng.normal(size=(2, 2000, 10))
    assert abs(domain_gap(real, same) - 0.5) < 0.05
    assert domain_gap(real, same + 2) > 0.95
    with pytest.raises(InputError, match="synthetic_features: expected at least 4 rows, got 2"):
        domain_gap(real, same[:2])


# ---- two stories ----


def stories(given, shown, learnt, classes):
    """What is compared, from labels alone: prototypes name `shown`, heads on the given labels name `learnt`."""
    given, shown, learnt = (torch.from_numpy(np.asarray(one)) for one in (given, shown, learnt))
    probs = torch.full((len(given), classes), 0.1 / classes)
    probs[torch.arange(len(given)), shown] += 0.9
    return compare_stories(shown, learnt, given, fit_transition(probs, given))


def flipped(true, rate, kind, classes=10, seed=1):
    rng = np.random.default_rng(seed)
    other = {
        "uniform": (true + rng.integers(1, classes, len(true))) % classes,
        "half of the classes": np.where(true % 2, (true + 1) % classes, true),
        "into one class": np.zeros_like(true),
        "cyclic": (true + 1) % classes,
    }[kind]
    return np.where(rng.random(len(true)) < rate, other, true)


@pytest.mark.parametrize(
    ("kind", "rate"), [("uniform", 0.8), ("half of the classes", 0.9), ("into one class", 0.7), ("cyclic", 0.55)]
)
def test_heavy_noise_is_no_contradiction(kind, rate):
    true = np.random.default_rng(0).integers(0, 10, 20_000)
    shown, learnt = (noisy_view(true, 0.85, seed) for seed in (2, 3))
    story = stories(flipped(true, rate, kind), shown, learnt, 10)
    assert story.message == ""
    assert story.cycles == ()


def noisy_view(true, right, seed):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(true)) < right, true, rng.integers(0, 10, len(true)))


def test_other_numbers_are_named():
    true = np.random.default_rng(0).integers(0, 10, 20_000)
    given, learnt, shown = flipped(true, 0.3, "uniform"), noisy_view(true, 0.8, 2), noisy_view(true, 0.8, 3)
    shifted = stories(given, (shown + 1) % 10, learnt, 10)
    assert shifted.message.startswith("images that look like a synthetic class mostly carry the label of another")
    assert sorted(shifted.cycles[0]) == list(range(10))
    order = np.arange(10)
    order[[3, 5, 7, 8]] = order[[5, 3, 8, 7]]
    swapped = stories(given, order[shown], learnt, 10)
    assert [sorted(one) for one in swapped.cycles] == [[3, 5], [7, 8]]
    assert "3 -> 5 -> 3; 7 -> 8 -> 7" in swapped.message


def test_synthetic_images_of_something_else_are_noticed():
    true = np.random.default_rng(0).integers(0, 10, 20_000)
    given, learnt = flipped(true, 0.3, "uniform"), noisy_view(true, 0.8, 2)
    merged = stories(given, true // 5 * 5, learnt, 10)  # they tell two groups apart and nothing else
    assert 0.2 < merged.share < 0.6
    assert f"the synthetic images tell only {merged.share:.0%} of what the features tell" in merged.message
    letters = stories(given, np.random.default_rng(9).permutation(true), learnt, 10)
    assert letters.share < 0.05
    assert letters.message
    nothing = stories(given, np.zeros_like(true), np.zeros_like(true), 10)
    assert nothing.message.startswith("neither the features nor the synthetic images tell anything")
    assert stories(given[:100], np.zeros(100, int), np.zeros(100, int), 10).message == ""  # too few to say so


@pytest.fixture(scope="module")
def cifar():
    """Every seventh image of CIFAR-10, and 100 synthetic images per class."""
    if "SYNTH_REFINE_DATA" not in os.environ:
        pytest.skip("SYNTH_REFINE_DATA does not name the folder with CIFAR-10")
    folder = Path(os.environ["SYNTH_REFINE_DATA"]) / "cifar10"
    with np.load(folder / "features_mobilenetv2.npz", allow_pickle=False) as archive:
        features = archive["train"][:45_000:7].astype(np.float32)
        classes = archive["synthetic_labels"].astype(np.int64)
        some = np.concatenate([np.flatnonzero(classes == number)[:100] for number in range(10)])
        synthetic = archive["synthetic"][some].astype(np.float32)
    return folder / "noise_labels", *map(torch.from_numpy, (features, synthetic, classes[some]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0.35", "0.70", "0.35_U_0.3", "0.35_U_0.6", "0.35_A_0.3"])
def test_published_noise_passes_and_mismatched_synthetic_images_do_not(name, cifar):
    folder, features, synthetic, labels = cifar
    given = np.load(folder / f"cifar10-1-{name}.npy", allow_pickle=False)[::7].astype(np.int64)
    for wrong in (np.roll(given, 500), np.random.default_rng(0).permutation(given)):
        with pytest.raises(InputError, match="row order"):
            check_row_order(wrong, prototype_classes(features, synthetic, labels, 10), 10)
    given = torch.from_numpy(given)
    frame, ends = fit_frame(array_reader(features, given, 8192), len(features), synthetic, 0)
    rows = rows_in_memory(array_reader(features, given, 8192), frame, ends, 0, 10)
    reference, sample = frame.synthetic(synthetic), rows.bucket(0)
    heads, key = label_heads(rows, 10, reference, 0)
    with torch.no_grad():
        learnt = fold_logits(heads, key, sample.features.float(), sample.numbers).argmax(dim=1)

    def story(reference, labels):
        first, _ = EM(rows, reference, labels, 10).first()
        with torch.no_grad():
            shown = first.head_probs(sample)
        return compare_stories(shown.argmax(dim=1), learnt, sample.given, fit_transition(shown, sample.given))

    swapped = torch.tensor([0, 1, 2, 3, 4, 6, 5, 7, 8, 9])[labels]  # dogs and frogs; 70 % noise swaps cats and dogs
    turned = torch.linalg.qr(torch.randn(384, 384, generator=torch.Generator().manual_seed(0)))[0]
    assert story(reference, labels).message == ""
    assert "5 -> 6 -> 5" in story(reference, swapped).message
    assert story(reference, (labels + 1) % 10).message
    assert story(reference @ turned, labels).message
