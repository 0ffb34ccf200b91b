"""Keep, change, abstain; thresholds; the do-no-harm check; the row-order guard."""

import math

import numpy as np
import pytest
import torch

from synth_refine import InputError
from synth_refine.refine.anchored import Posterior, anchored_posterior
from synth_refine.refine.checks import agreement_doubt, check_row_order, domain_gap, prototype_classes, row_order
from synth_refine.refine.decide import REASONS, Answer, decide
from synth_refine.refine.thresholds import calibrate_thresholds, plot_sweep, sweep, sweep_table


def posterior(rows, noise_before=0.5, head=None, skipped=None, recognised=1.0):
    values = np.array(rows, dtype=np.float32)
    count, classes = values.shape
    return Posterior(
        posterior=values,
        transition=np.eye(classes, dtype=np.float32),
        head=values if head is None else np.array(head, dtype=np.float32),
        noise_before=noise_before,
        noise_after=0.1,
        history=[],
        skipped=np.zeros(count, dtype=bool) if skipped is None else np.array(skipped),
        anchor_head=np.eye(classes, dtype=np.float32),
        recognised=recognised,
    )


def test_three_answers_with_reason_and_odds():
    result = posterior(
        [[0.9, 0.1], [0.1, 0.9], [0.45, 0.55], [0.2, 0.8], [0.5, 0.5], [1, 0]], skipped=[False] * 5 + [True]
    )
    given = np.array([0, 0, 0, 0, 1, 0])
    decision = decide(result, given, margin=2.0, thresholds=[0.0, 0.85], force=True)
    answers = [Answer.KEEP, Answer.CHANGE, Answer.ABSTAIN, Answer.ABSTAIN, Answer.KEEP, Answer.ABSTAIN]
    assert decision.answers.tolist() == answers
    assert decision.reasons.tolist() == [0, 1, 2, 3, 0, 4]
    assert len(REASONS) == 7
    np.testing.assert_allclose(decision.odds[:5], [1, 9, 11 / 9, 4, 1], rtol=1e-5)
    assert decision.apply(given).tolist() == [0, 1, 0, 0, 1, 0]
    assert given.tolist() == [0, 0, 0, 0, 1, 0]
    assert decision.wrong_changes == pytest.approx(0.1)
    assert "keep 2, change 1, abstain 3" in decision.summary()


def test_odds_equal_to_the_margin_do_not_change():
    result = posterior([[0.25, 0.75]])
    assert decide(result, np.array([0]), margin=3.0, force=True).answers.tolist() == [Answer.ABSTAIN]
    assert decide(result, np.array([0]), margin=2.99, force=True).answers.tolist() == [Answer.CHANGE]


def test_the_margin_grows_as_the_noise_shrinks():
    margins = [decide(posterior([[1, 0]], noise), np.array([0])).margin for noise in (0.5, 0.1, 0.03, 0.01)]
    assert margins == sorted(margins)
    assert margins[0] < 1.01
    assert margins[2] == pytest.approx(2)


def test_a_change_set_that_would_not_help_is_refused_unless_forced():
    rng = np.random.default_rng(0)
    given = rng.integers(0, 2, 2000)
    head = np.where(given[:, None] == np.arange(2), 0.98, 0.02)
    claimed = head.copy()
    head[:40] = [[0.45, 0.55]]  # all but undecided,
    claimed[:40] = np.where(given[:40, None] == np.arange(2), 0.2, 0.8)  # yet the posterior would change them
    result = posterior(claimed, 0.3, head)
    decision = decide(result, given)
    assert decision.harmful
    assert decision.gain <= 0
    assert np.array_equal(decision.apply(given), given)
    assert set(decision.reasons[:40]) == {5}
    assert decision.summary().endswith("; nothing is changed: the proposed changes would probably not lower the noise")
    forced = decide(result, given, force=True)
    assert forced.harmful
    assert (forced.apply(given) != given).sum() == 40


def test_a_change_set_that_helps_is_made():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 2000)
    given = np.where(rng.random(2000) < 0.3, (true + 1) % 3, true)
    head = np.where(true[:, None] == np.arange(3), 0.9, 0.05)
    decision = decide(posterior(head, 0.3), given)
    assert not decision.harmful
    assert decision.gain > 0
    assert np.array_equal(decision.apply(given), true)


def test_features_that_do_not_tell_the_classes_apart_change_nothing():
    """Unrelated noise as features: the anchors are not recognised, so nothing they say of real images counts."""
    rng = np.random.default_rng(0)
    given = rng.integers(0, 5, 500)
    labels = np.repeat(np.arange(5), 20)
    features, anchors = (rng.normal(size=(count, 16)).astype(np.float32) for count in (500, 100))
    blind = anchored_posterior(features, given, anchors, labels, rounds=2)
    assert blind.recognised < 0.5
    assert np.array_equal(decide(blind, given).apply(given), given)
    rows, before = [[0.1, 0.9]] * 10, np.zeros(10, dtype=np.int64)
    assert decide(posterior(rows, recognised=0.5), before).apply(before).all()
    kept = decide(posterior(rows, recognised=0.49), before)
    assert math.isnan(kept.noise_before)
    assert math.isnan(kept.noise_after)
    assert kept.summary().startswith("keep 0, change 0, abstain 10; noise not estimated; nothing is changed: ")
    why = "fewer than half of the held-out synthetic images are recognised; try an encoder that knows the classes"
    assert kept.summary().endswith(f"; nothing is changed: {why}")
    forced = decide(posterior(rows, recognised=0.49), before, force=True)
    assert forced.summary().endswith(f"; changed on demand, although {why}")
    assert kept.harmful
    assert not kept.apply(before).any()
    assert decide(posterior(rows, recognised=0.49), before, force=True).apply(before).all()


def test_torch_gives_torch():
    values = posterior([[0.9, 0.1], [0.1, 0.9]])
    parts = {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in vars(values).items()
    }
    given = torch.tensor([0, 0])
    decision = decide(Posterior(**parts), given, force=True)
    assert decision.apply(given).tolist() == [0, 1]
    with pytest.raises(InputError, match="given: expected Tensor like the decision, got ndarray"):
        decision.apply(np.array([0, 0]))
    with pytest.raises(InputError, match="given: expected Tensor like the posterior, got ndarray"):
        decide(Posterior(**parts), np.array([0, 0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0.5}, "margin: expected odds of at least 1, got 0.5"),
        ({"thresholds": [0.1, 0.2, 0.3]}, r"thresholds: expected shape \(2,\), got \(3,\)"),
        ({"thresholds": float("nan")}, "thresholds: expected numbers, got NaN"),
        ({"thresholds": "high"}, "thresholds: expected a number or one per class, got 'high'"),
        ({"given": np.array([5])}, "given: expected classes 0 to 1, got 5 in row 0"),
        ({"given": np.array([0, 1])}, r"given: expected shape \(1,\), got \(2,\)"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(InputError, match=message):
        decide(posterior([[0.4, 0.6]]), **({"given": np.array([0])} | options))


def test_thresholds_reach_the_precision_on_held_out_images():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 3000)
    scores = rng.dirichlet(np.ones(3), 3000) + 0.7 * np.eye(3)[labels] * rng.random((3000, 1))
    scores = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
    thresholds = calibrate_thresholds(scores, labels, 0.9)
    winner, best = scores.argmax(axis=1), scores.max(axis=1)
    for number in range(3):
        rows = (winner == number) & (best >= thresholds[number])
        assert rows.any()
        assert (labels[rows] == number).mean() >= 0.9
    assert np.isinf(calibrate_thresholds(scores, (winner + 1) % 3)).all()
    with pytest.raises(InputError, match=r"precision: expected a number in \(0, 1\], got 0"):
        calibrate_thresholds(scores, labels, 0)


def test_a_sweep_changes_ever_less(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(4), 300)
    table = sweep(posterior(rows), rng.integers(0, 4, 300))
    changed = [row.changed for row in table]
    assert changed == sorted(changed, reverse=True)
    assert changed[0] > changed[-1]
    assert len(sweep_table(table).splitlines()) == len(table) + 2
    plot_sweep(table, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_domain_gap_tells_equal_from_different():
    rng = np.random.default_rng(0)
    real, same = rng.normal(size=(2, 2000, 10))
    assert abs(domain_gap(real, same) - 0.5) < 0.05
    assert domain_gap(real, same + 2) > 0.95
    with pytest.raises(InputError, match="anchors: expected at least 4 rows, got 2"):
        domain_gap(real, same[:2])


def noisy(count, classes, agreement, wrong_given, seed=0):
    """Labels and an opinion: the labels flip in a fixed way, the opinion is right as often as `agreement`."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, count)
    opinion = np.where(rng.random(count) < agreement, true, rng.integers(0, classes, count))
    given = np.where(rng.random(count) < wrong_given, rng.integers(0, classes, count), true)
    return given, opinion


@pytest.mark.parametrize(
    ("count", "classes", "agreement", "wrong"),
    [(45_000, 100, 0.5, 0.74), (5_000, 100, 0.5, 0.74), (45_000, 10, 0.7, 0.7)],
)
def test_very_noisy_labels_pass_the_guard(count, classes, agreement, wrong):
    given, opinion = noisy(count, classes, agreement, wrong)
    assert check_row_order(given, opinion, classes).score > 10


def test_labels_below_chance_by_systematic_flips_pass():
    given, opinion = noisy(2_000, 10, 0.7, 0.0)
    result = check_row_order((given + 1) % 10, opinion, 10)
    assert result.agreement < 0.1


@pytest.mark.parametrize(("count", "classes"), [(45_000, 100), (45_000, 10), (1_000, 10), (200, 2)])
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


@pytest.mark.parametrize(("count", "classes", "wrong"), [(45_000, 100, 0.74), (45_000, 10, 0.7), (1_000, 10, 0.7)])
def test_agreement_by_chance_is_doubted_and_noise_is_not(count, classes, wrong):
    given, opinion = noisy(count, classes, 0.7, wrong)
    assert agreement_doubt(given, opinion, classes) == ""
    assert agreement_doubt(given[: 20 * classes - 1], opinion[::-1][: 20 * classes - 1], classes) == ""  # too few
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


def test_too_few_rows_or_one_class_are_never_refused():
    assert not row_order(np.arange(10) % 5, np.arange(10) // 2, 5).conclusive
    assert not check_row_order(np.zeros(1000, int), np.arange(1000) % 4, 4).conclusive
    assert not check_row_order(np.zeros(0, int), np.zeros(0, int), 4).conclusive


def test_prototype_classes_are_those_of_the_centred_cosine():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 5)
    anchors, features = rng.normal(size=(15, 4)) + 3, rng.normal(size=(50, 4)) - 2
    means = np.stack([(anchors - anchors.mean(axis=0))[labels == number].mean(axis=0) for number in range(3)])
    centred = features - features.mean(axis=0)
    cosine = centred @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert np.array_equal(prototype_classes(features, anchors, labels, 3), cosine.argmax(axis=1))
