"""refine_labels against the rule written slowly, what must not change, and every bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synth_refine import InputError, refine_labels
from synth_refine.refine import paper as refine
from synth_refine.refine.result import REASONS, Action, Reason

THRESHOLD = 0.45


def naive(features, logits, prototypes, weight=0.5):
    """The rule of arXiv:2509.04298, one image and one class at a time, in double precision."""
    labels, confidence, margins = [], [], []
    for feature, output in zip(features.tolist(), logits.tolist(), strict=True):
        total = sum(math.exp(value - max(output)) for value in output)
        scores = []
        for index, prototype in enumerate(prototypes.tolist()):
            dot = sum(a * b for a, b in zip(feature, prototype, strict=True))
            cosine = dot / math.hypot(*feature) / math.hypot(*prototype)
            scores.append(weight * cosine + (1 - weight) * math.exp(output[index] - max(output)) / total)
        labels.append(scores.index(max(scores)))
        confidence.append(max(scores))
        ranked = sorted(scores)
        margins.append(ranked[-1] - ranked[-2] if len(ranked) > 1 else math.inf)
    return labels, confidence, margins


def arrays(seed=0, images=40, features=6, classes=5, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = ((images, features), (images, classes), (classes, features))
    return tuple((3 * rng.standard_normal(shape)).astype(dtype) for shape in shapes)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(0, 30),
    features=st.integers(1, 8),
    classes=st.integers(1, 7),
    weight=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_equals_the_rule_written_slowly(seed, images, features, classes, weight):
    values = arrays(seed, images, features, classes)
    decision = refine_labels(*values, THRESHOLD, weight=weight)
    labels, confidence, margins = naive(*values, weight=weight)
    clear = np.array(margins) > 1e-9  # rounding may decide between classes that are equally good
    assert decision.proposed[clear].tolist() == np.array(labels, dtype=int)[clear].tolist()
    np.testing.assert_allclose(decision.confidence, np.array(confidence), atol=1e-12)
    assert decision.accepted.tolist() == [value >= THRESHOLD for value in decision.confidence]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_gives_the_decision_of_its_own_numbers(dtype):
    values = [torch.from_numpy(value).to(dtype) for value in arrays(dtype=np.float32)]
    decision = refine_labels(*values, THRESHOLD)
    labels, confidence, _ = naive(*(value.double() for value in values))
    assert decision.proposed.tolist() == labels
    assert decision.confidence.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(decision.confidence.double(), torch.tensor(confidence).double(), atol=1e-5, rtol=0)


def test_chunks_do_not_show(monkeypatch):
    values = arrays(images=300)
    whole = refine_labels(*values, THRESHOLD)
    monkeypatch.setattr(refine, "CHUNK_ELEMENTS", 1)
    in_chunks = refine_labels(*values, THRESHOLD)
    for name in ("proposed", "confidence", "accepted", "ties"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(in_chunks, name))


def test_order_of_images_and_scale_of_features_do_not_matter():
    features, logits, prototypes = arrays()
    decision = refine_labels(features, logits, prototypes, THRESHOLD)
    order = np.random.default_rng(1).permutation(len(features))
    shuffled = refine_labels(1e-6 * features[order], logits[order], 1e6 * prototypes, THRESHOLD)
    np.testing.assert_array_equal(shuffled.proposed, decision.proposed[order])
    np.testing.assert_array_equal(shuffled.accepted, decision.accepted[order])


def test_renaming_the_classes_renames_the_labels():
    features, logits, prototypes = arrays()
    order = np.array([3, 0, 4, 1, 2])
    renamed = refine_labels(features, logits[:, order], prototypes[order], THRESHOLD)
    np.testing.assert_array_equal(order[renamed.proposed], refine_labels(features, logits, prototypes, 0.0).proposed)


def test_a_higher_threshold_never_changes_more_labels_and_the_highest_none():
    values = arrays()
    given_labels = np.zeros(40, dtype=np.int64)
    counts = [(refine_labels(*values, limit).apply(given_labels) != given_labels).sum() for limit in (-1, 0, 0.4, 0.8)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    np.testing.assert_array_equal(refine_labels(*values, 1.01).apply(given_labels), given_labels)


def test_applying_twice_is_applying_once():
    decision = refine_labels(*arrays(), THRESHOLD)
    once = decision.apply(np.arange(40) % 5)
    np.testing.assert_array_equal(decision.apply(once), once)


def test_a_score_equal_to_the_threshold_counts():
    features, logits, prototypes = np.eye(2), np.zeros((2, 2)), np.eye(2)
    confidence = refine_labels(features, logits, prototypes, 0.0).confidence
    assert confidence.tolist() == [0.75, 0.75]
    assert refine_labels(features, logits, prototypes, 0.75).accepted.all()
    assert not refine_labels(features, logits, prototypes, np.nextafter(0.75, 1)).accepted.any()


def test_one_threshold_per_class():
    features, logits, prototypes = arrays()
    limits = [0.0, 2.0, 0.0, 2.0, 0.5]
    decision = refine_labels(features, logits, prototypes, limits)
    np.testing.assert_array_equal(decision.accepted, decision.confidence >= np.array(limits)[decision.proposed])
    assert not decision.accepted[decision.proposed == 1].any()


def test_among_equal_scores_the_given_label_wins_then_the_lower_class():
    features, logits = np.ones((4, 2)), np.zeros((4, 3))
    prototypes = np.array([[-1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])  # classes 1 and 2 are equally good
    decision = refine_labels(features, logits, prototypes, 0.0)
    assert decision.proposed.tolist() == [1, 1, 1, 1]
    assert decision.apply(np.array([0, 1, 2, 2])).tolist() == [1, 1, 2, 2]


def test_callers_arrays_are_left_alone_and_may_be_read_only_mapped_or_strided(tmp_path):
    values = arrays(dtype=np.float32)
    expected = refine_labels(*values, THRESHOLD)
    mapped = []
    for index, value in enumerate(values):
        np.save(tmp_path / f"{index}.npy", np.repeat(value, 2, axis=0))
        mapped.append(np.load(tmp_path / f"{index}.npy", mmap_mode="r")[::2])
    given_labels = np.arange(40) % 5
    before = [value.copy() for value in (*mapped, given_labels)]
    decision = refine_labels(*mapped, THRESHOLD)
    decision.apply(given_labels)
    for value, copy in zip((*mapped, given_labels), before, strict=True):
        np.testing.assert_array_equal(value, copy)
    np.testing.assert_array_equal(decision.proposed, expected.proposed)
    reversed_rows = refine_labels(values[0][::-1], values[1][::-1], values[2], THRESHOLD)
    np.testing.assert_array_equal(reversed_rows.proposed, expected.proposed[::-1])


def test_kind_in_is_kind_out():
    values = arrays()
    decision = refine_labels(*values, THRESHOLD)
    tensors = refine_labels(*map(torch.from_numpy, values), THRESHOLD)
    for name in ("proposed", "confidence", "accepted", "ties"):
        assert isinstance(getattr(decision, name), np.ndarray)
        assert isinstance(getattr(tensors, name), torch.Tensor)
        np.testing.assert_array_equal(getattr(tensors, name).numpy(), getattr(decision, name))
    with_gradient = refine_labels(torch.from_numpy(values[0]).requires_grad_(), *map(torch.from_numpy, values[1:]), 0.5)
    assert not with_gradient.confidence.requires_grad


def test_without_a_classifier_the_score_is_the_cosine():
    features, logits, prototypes = arrays()
    alone = refine_labels(features, None, prototypes, THRESHOLD)
    cosine = refine_labels(features, logits, prototypes, THRESHOLD, weight=1.0)
    for name in ("proposed", "confidence", "accepted", "margin"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(cosine, name))
    assert alone.diagnostics.weight == 1
    with pytest.raises(InputError, match=r"prototypes: expected shape \(C, 6\), got \(5, 4\)"):
        refine_labels(features, None, prototypes[:, :4], THRESHOLD)


def test_a_record_says_what_was_done_to_each_image_and_why():
    features, logits, prototypes = arrays()
    features[7] = np.nan
    decision = refine_labels(features, logits, prototypes, THRESHOLD)
    given = np.arange(40) % 5
    made = decision.record(given, ids=[f"photo {row}" for row in range(40)], settings={"refiner": "paper"})
    np.testing.assert_array_equal(made.labels, decision.apply(given))
    np.testing.assert_array_equal(made.given, given)
    assert made.ids[3] == "photo 3"
    actions = decision.actions(given)
    changed = decision.apply(given) != given
    np.testing.assert_array_equal(actions == Action.CHANGE, changed)
    assert np.flatnonzero(actions == Action.ABSTAIN).tolist() == [7]  # a low score is no doubt about the label
    assert changed.any()
    assert {made.reason[row] for row in made.changed} == {REASONS[Reason.ACCEPTED]}
    assert made.reason[7] == REASONS[Reason.UNSCORED]
    with pytest.raises(InputError, match="ids: expected"):
        decision.record(given, ids=["one"] * 40)


BROKEN_ROWS = {
    "a feature is NaN": (0, math.nan),
    "a feature is infinite": (0, math.inf),
    "a logit is NaN": (1, math.nan),
    "a logit is infinite": (1, math.inf),
    "a logit is minus infinity": (1, -math.inf),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", BROKEN_ROWS)
def test_an_image_that_cannot_be_scored_keeps_its_label_and_is_counted(case, dtype):
    which, value = BROKEN_ROWS[case]
    values = arrays(dtype=dtype)
    expected = refine_labels(*values, -1.0)
    values[which][7, 1] = value
    decision = refine_labels(*values, -1.0)
    given_labels = np.full(40, 4)
    assert decision.unscored == 1
    assert decision.proposed[7] == -1
    assert math.isnan(decision.confidence[7])
    assert not decision.accepted[7]
    assert decision.apply(given_labels)[7] == 4
    np.testing.assert_array_equal(np.delete(decision.proposed, 7), np.delete(expected.proposed, 7))
    with pytest.raises(InputError, match=r"^features: expected finite features .* got 1 such rows, .* row 7$"):
        refine_labels(*values, -1.0, strict=True)


def test_a_feature_of_length_zero_cannot_be_scored():
    features, logits, prototypes = arrays()
    features[3] = 0
    assert refine_labels(features, logits, prototypes, 0.0).proposed[3] == -1


def swap(position, value):
    values = list(arrays(dtype=np.float32))
    values[position] = value
    return values


BAD_INPUTS = {
    "features with three axes": (
        swap(0, np.ones((40, 2, 3), np.float32)),
        "features: expected shape (N, D), got (40, 2, 3)",
    ),
    "features as a list": (
        swap(0, [[1.0]]),
        "features: expected a NumPy array or torch tensor, got list",
    ),
    "integer features": (
        swap(0, np.ones((40, 6), np.int64)),
        "features: expected floating-point numbers, got int64; convert with a scale you chose",
    ),
    "features of Python objects": (
        swap(0, np.ones((40, 6), object)),
        "features: expected floating-point numbers, got object; convert with a scale you chose",
    ),
    "complex features": (
        swap(0, np.ones((40, 6), np.complex64)),
        "features: expected floating-point numbers, got complex64; convert with a scale you chose",
    ),
    "transposed features": (
        swap(0, np.ones((6, 40), np.float32)),
        "features: expected shape (40, D), got (6, 40), which is transposed",
    ),
    "another number of logits": (
        swap(1, np.ones((39, 5), np.float32)),
        "logits: expected shape (40, C), got (39, 5)",
    ),
    "transposed prototypes": (
        swap(2, np.ones((6, 5), np.float32)),
        "prototypes: expected shape (5, 6), got (6, 5)",
    ),
    "a class without prototype": (
        swap(2, np.ones((4, 6), np.float32)),
        "prototypes: expected shape (5, 6), got (4, 6)",
    ),
    "a prototype of zeros": (
        swap(2, np.diag(np.ones(6, np.float32))[:5] * np.float32([[1], [1], [0], [1], [1]])),
        "prototypes: expected a finite, non-zero row per class, got only zeros for class 2",
    ),
    "non-finite prototypes": (
        swap(2, np.where(np.arange(5)[:, None] % 2, np.nan, np.ones((5, 6))).astype(np.float32)),
        "prototypes: expected a finite, non-zero row per class, got a non-finite one for classes 1, 3",
    ),
    "torch beside NumPy": (
        swap(1, torch.ones(40, 5)),
        "logits: expected ndarray like features, got Tensor",
    ),
    "no classes": (
        [np.ones((2, 3)), np.ones((2, 0)), np.ones((0, 3))],
        "prototypes: expected at least one class and one feature, got (0, 3)",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_arrays_are_named(case):
    values, message = BAD_INPUTS[case]
    with pytest.raises(InputError) as caught:
        refine_labels(*values, 0.5)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (math.nan, "threshold: expected numbers, got NaN"),
        ([0.5, 0.6], "threshold: expected shape (5,), got (2,)"),
        ("high", "threshold: expected a number or one per class, got 'high'"),
        (None, "threshold: expected a number or one per class, got None"),
    ],
)
def test_bad_thresholds_are_named(threshold, message):
    with pytest.raises(InputError) as caught:
        refine_labels(*arrays(), threshold)
    assert str(caught.value) == message


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_bad_weight_is_named(weight):
    with pytest.raises(InputError, match=r"^weight: expected a number in \[0, 1\], got"):
        refine_labels(*arrays(), 0.5, weight=weight)


def test_a_decision_cannot_be_changed():
    decision = refine_labels(*arrays(), THRESHOLD)
    with pytest.raises(AttributeError, match="cannot assign"):
        decision.proposed = None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_of_the_features_is_kept():
    values = [torch.from_numpy(value).float() for value in arrays()]
    on_gpu = refine_labels(*(value.cuda() for value in values), THRESHOLD)
    assert on_gpu.proposed.is_cuda
    assert on_gpu.proposed.tolist() == refine_labels(*values, THRESHOLD).proposed.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_equal_scores_on_a_gpu_are_decided_as_on_the_cpu():
    prototypes = torch.tensor([[-1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])  # classes 1 and 2 are equally good
    values = [value.cuda() for value in (torch.ones(4, 2), torch.zeros(4, 3), prototypes)]
    decision = refine_labels(*values, 0.0)
    assert decision.proposed.tolist() == [1, 1, 1, 1]
    assert decision.apply(torch.tensor([0, 1, 2, 2]).cuda()).tolist() == [1, 1, 2, 2]
