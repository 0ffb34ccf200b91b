"""The one front door: which refiner, which options, what is doubted, and that it changes nothing of what it calls."""

import numpy as np
import pytest
import torch
from gaussians import problem

from synth_refine import InputError, class_prototypes, refine_anchored, refine_labels
from synth_refine.refine import em, front
from synth_refine.refine.front import check, refine
from synth_refine.refine.paper import PaperDiagnostics
from synth_refine.refine.solve import AnchoredDiagnostics


@pytest.fixture(autouse=True)
def short_fits(monkeypatch):
    monkeypatch.setattr(em, "EPOCHS", (2,))


@pytest.fixture(scope="module")
def one():
    return problem(noise=0.3)


@pytest.fixture(scope="module")
def images(one):
    return {"synthetic_features": one.synthetic, "synthetic_labels": one.synthetic_labels}


@pytest.fixture(scope="module")
def prototypes(one):
    return class_prototypes(one.synthetic, one.synthetic_labels)


def same(left, right):
    for name in ("proposed", "confidence", "accepted", "reason"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), name)


def test_synthetic_images_are_anchored_and_prototypes_alone_are_the_papers(one, images, prototypes):
    anchored = refine(one.features, one.given, **images)
    paper = refine(one.features, one.given, prototypes=prototypes, threshold=0.5)
    assert isinstance(anchored.diagnostics, AnchoredDiagnostics)
    assert isinstance(paper.diagnostics, PaperDiagnostics)
    same(anchored, refine_anchored(*one.arrays))
    same(paper, refine_labels(one.features, None, prototypes, 0.5))


@pytest.mark.parametrize("options", [{}, {"weight": 0.8}, {"threshold": [0.2, 0.3, 0.9, 0.4]}], ids=str)
def test_the_papers_rule_with_logits_is_refine_labels(options, one, images, prototypes):
    logits = np.random.default_rng(0).normal(size=(600, 4))
    given = {"threshold": 0.4, **options}
    limit, rest = given["threshold"], {name: value for name, value in given.items() if name != "threshold"}
    expected = refine_labels(one.features, logits, prototypes, limit, **rest)
    same(refine(one.features, one.given, refiner="paper", logits=logits, prototypes=prototypes, **given), expected)
    same(refine(one.features, one.given, refiner="paper", logits=logits, **images, **given), expected)


def test_the_papers_rule_trains_heads_on_the_given_labels_and_calibrates(one, images):
    result = refine(one.features, one.given, refiner="paper", **images)
    limits = result.diagnostics.thresholds
    np.testing.assert_array_equal(result.accepted, result.confidence >= limits[result.proposed].astype(np.float32))
    assert len(set(limits)) == 4
    assert one.wrong(result) < 0.8 * one.noise
    changed = result.apply(one.given) != one.given
    assert (result.apply(one.given) == one.true)[changed].mean() > 0.85
    same(refine(one.features, one.given, refiner="paper", threshold="auto", **images), result)
    high = refine(one.features, one.given, refiner="paper", threshold=0.99, **images)
    assert high.accepted.sum() < result.accepted.sum()
    heads = refine(one.features, one.given, refiner="paper", weight=0.0, **images)
    assert (heads.proposed == one.true)[heads.accepted].mean() > 0.8  # calibrated for this score too
    assert heads.accepted.mean() > 0.3
    other = refine(one.features, one.given, refiner="paper", seed=1, **images)
    assert not np.array_equal(other.confidence, result.confidence)


def test_heads_of_the_papers_rule_do_not_see_what_they_score(one, images):
    """Labels of unrelated noise: a head that saw them would remember some."""
    given = np.random.default_rng(7).integers(0, 4, 600)
    arrays = [front.float_tensor(value, front.torch.float32, front.CPU) for value in (one.features, one.synthetic)]
    logits, spoken = front.given_logits(arrays[0], front.label_tensor(given, front.CPU), arrays[1], 4)
    assert abs((logits.argmax(dim=1).numpy() == given).mean() - 0.25) < 0.06
    assert spoken.shape == (80, 4)


@pytest.mark.parametrize(
    ("refiner", "name", "value"),
    [
        ("anchored", "weight", 0.5),
        ("anchored", "strict", True),
        ("anchored", "logits", "array"),
        ("anchored", "prototypes", "array"),
        ("paper", "force", True),
        ("paper", "text_prototypes", "array"),
        ("paper", "second_view", "array"),
    ],
)
def test_an_option_that_a_refiner_has_no_use_for_is_refused(refiner, name, value, one, images):
    value = np.ones((4, 8)) if isinstance(value, str) else value
    with pytest.raises(InputError, match=f"{name}: the {refiner} refiner has no use for it"):
        refine(one.features, one.given, refiner=refiner, **images, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refiner": "best"}, "refiner: expected anchored or paper, got 'best'"),
        ({"refiner": "anchored"}, "synthetic_features: the anchored refiner needs it"),
        ({"synthetic_features": np.ones((4, 8))}, "synthetic_labels: the anchored refiner needs it"),
        ({"refiner": "paper", "threshold": 0.5}, "synthetic_features: expected .*, or prototypes, got neither"),
        ({"prototypes": np.eye(4, 8)}, "threshold: expected a number, since"),
        ({"prototypes": np.eye(4, 7), "threshold": 0.5}, r"prototypes: expected shape \(M, 8\), got \(4, 7\)"),
        ({"prototypes": np.eye(3, 8), "threshold": 0.5}, "given: expected classes 0 to 2, got 3"),
        ({"prototypes": np.eye(4, 8), "threshold": 0.5, "num_classes": 5}, r"prototypes: expected shape \(5, D\)"),
        ({"prototypes": np.eye(4, 8), "threshold": 0.5, "seed": 1}, "seed: nothing is drawn"),
        ({"prototypes": np.eye(4, 8), "threshold": 0.5, "seed": -1}, "seed: expected at least 0, got -1"),
        (
            {"prototypes": np.eye(4, 8), "threshold": 0.5, "synthetic_labels": np.arange(4)},
            "synthetic_labels: expected",
        ),
    ],
    ids=str,
)
def test_what_is_missing_or_does_not_fit_is_named(options, message, one):
    with pytest.raises(InputError, match=message):
        refine(one.features, one.given, **options)


def test_doubts_are_said_before_the_work_and_in_the_result(one, images, prototypes):
    assert check(one.features, one.given, **images) == ()
    apart = {**images, "synthetic_features": one.synthetic + 100}
    [gap] = check(one.features, one.given, **apart)
    assert gap.startswith("a line tells 100.0% of the real images from the synthetic ones")
    said = []
    assert refine(one.features, one.given, **apart, say=said.append).diagnostics.warnings == (gap,)
    assert said == [gap]
    said.clear()
    turned = {**images, "synthetic_labels": (one.synthetic_labels + 1) % 4}
    result = refine(one.features, one.given, **turned, say=said.append)
    assert result.diagnostics.warnings == tuple(said)  # each once, those of the work behind those of the inputs
    assert [line.startswith("nothing is changed") for line in said] == [False, True]
    [doubt] = check(one.features, (one.given + 1) % 4, prototypes=prototypes)
    assert "given labels and nearest prototypes name the same class for" in doubt
    paper = refine(one.features, (one.given + 1) % 4, prototypes=prototypes, threshold=0.5)
    assert paper.diagnostics.warnings == (doubt,)


@pytest.mark.parametrize("refiner", ["anchored", "paper"])
def test_labels_in_another_order_are_an_error_whichever_refiner(refiner, one, images):
    with pytest.raises(InputError, match="given: expected labels of these images in this order"):
        refine(one.features, np.roll(one.given, 100), refiner=refiner, **images)


@pytest.mark.parametrize("refiner", ["anchored", "paper"])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_a_picture_with_many_labels_says_nothing_and_keeps_them(refiner, kind, one, images):
    features = one.features.copy()
    rows = {label: np.flatnonzero(one.given == label)[:3] for label in range(4)}
    shown = np.concatenate([rows[0], rows[1]])
    features[shown] = features[rows[3][0]] + 1  # six copies with two labels
    features[rows[2]] = features[rows[2][0]]  # three with one: a photo that somebody counts thrice
    arrays = {name: kind(value) for name, value in images.items()}
    before = features.copy()
    result = refine(kind(features), kind(one.given), refiner=refiner, **arrays)
    assert (features == before).all()
    unscored = np.flatnonzero(np.asarray(result.proposed) < 0).tolist()
    assert unscored == sorted(shown.tolist())
    artifact = result.record(kind(one.given), ids=[str(row) for row in range(600)])
    assert set(artifact.action[shown]) == {"abstain"}
    assert any(
        text.startswith("6 of 600 images that were looked at are copies") for text in result.diagnostics.warnings
    )


def test_where_all_images_are_one_picture_all_labels_stay(one, images):
    features = np.repeat(one.features[:1], 600, axis=0)
    for refiner in ("anchored", "paper"):
        result = refine(features, one.given, refiner=refiner, **images)
        assert (result.apply(one.given) == one.given).all()
        assert set(result.record(one.given).action) == {"abstain"}


def test_a_class_whose_synthetic_images_are_one_picture_is_named(one, images):
    synthetic = one.synthetic.copy()
    assert not any("one picture" in text for text in check(one.features, one.given, **images))
    synthetic[one.synthetic_labels == 2] = synthetic[one.synthetic_labels == 2][0]
    [doubt] = check(one.features, one.given, synthetic_features=synthetic, synthetic_labels=one.synthetic_labels)
    assert doubt.startswith("all synthetic images of class 2 are one picture")
