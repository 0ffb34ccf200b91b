"""Label noise: the published files bit for bit, the rules written slowly, the solver, and bad input."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from torch import Tensor, nn

from synth_refine import InputError
from synth_refine.noise import (
    CIFAR10_FLIPS,
    CIFAR100_FLIPS,
    PosteriorConfig,
    asymmetric,
    keep_function,
    pair,
    pmd,
    pmd_factor,
    symmetric,
    train_posterior,
    uniform,
)

DATA = os.environ.get("SYNTH_REFINE_DATA")


def make_posterior(rows: int, classes: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities of any sharpness and true labels that they mostly get right."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, classes)) * rng.uniform(0.5, 6, (rows, 1))
    posterior = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = np.where(rng.random(rows) < 0.8, posterior.argmax(1), rng.integers(classes, size=rows))
    return posterior, truth


@pytest.mark.skipif(DATA is None, reason="SYNTH_REFINE_DATA does not name the folder with real label files")
@pytest.mark.parametrize(
    ("name", "flips", "rates"),
    [("cifar10", CIFAR10_FLIPS, (0.5330, 0.7177, 0.4124)), ("cifar100", CIFAR100_FLIPS, (0.5474, 0.7403, 0.5433))],
)
def test_the_published_hybrid_files_are_reproduced_bit_for_bit(
    name: str, flips: dict[int, int], rates: tuple[float, ...]
) -> None:
    folder = Path(str(DATA)) / name
    given = np.load(folder / "noise_labels" / f"{name}-1-0.35.npy", allow_pickle=False)
    truth = np.load(folder / "labels.npz", allow_pickle=False)["train"][: len(given)]
    num_classes = len(np.unique(truth))
    made = {
        "U_0.3": uniform(given, 0.3, num_classes),
        "U_0.6": uniform(given, 0.6, num_classes),
        "A_0.3": asymmetric(given, 0.3, flips),
    }
    for (ending, labels), rate in zip(made.items(), rates, strict=True):
        published = np.load(folder / "noise_labels" / f"{name}-1-0.35_{ending}.npy", allow_pickle=False)
        assert labels.dtype == published.dtype
        assert_array_equal(labels, published, err_msg=ending)
        assert abs((labels != truth).mean() - rate) < 5e-5


def naive_rate(posterior: NDArray[np.float64], truth: NDArray[np.int64], kind: int, factor: float) -> float:
    """The expected noise rate, one image at a time."""
    total = 0.0
    for eta, label in zip(posterior, truth, strict=True):
        first, second = sorted(range(len(eta)), key=lambda c: -eta[c])[:2]
        d = eta[first] - eta[second]
        g = {1: 0.5 + d * d / 2, 2: d * d * d, 3: (d * d * d + d * d + d) / 3}[kind]
        keep = min(1.0, g / factor)
        total += keep * (first != label) + (1 - keep) * (second != label)
    return total / len(posterior)


@pytest.mark.parametrize("kind", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.43, 3.4])
def test_pmd_keeps_the_most_probable_class_as_often_as_the_rule_says(kind: int, factor: float) -> None:
    posterior, truth = make_posterior(400, 5, seed=kind)
    draws = np.stack([pmd(posterior, kind, factor, seed=seed) for seed in range(100)])
    order = np.argsort(-posterior, axis=1)
    assert ((draws == order[:, 0]) | (draws == order[:, 1])).all()
    assert abs((draws != truth).mean() - naive_rate(posterior, truth, kind, factor)) < 0.01
    margin = np.sort(posterior, axis=1)[:, -1] - np.sort(posterior, axis=1)[:, -2]
    kept = (draws == order[:, 0]).mean(axis=0)
    assert abs(kept - np.minimum(1, keep_function(margin, kind) / factor)).max() < 0.25


@pytest.mark.parametrize("kind", [1, 2, 3])
@pytest.mark.parametrize(("low", "high"), [(1.43, 3.4), (0.5, 1.0)])
def test_a_larger_factor_only_moves_labels_to_the_second_class(kind: int, low: float, high: float) -> None:
    posterior, _ = make_posterior(500, 4, seed=0)
    few, many = pmd(posterior, kind, low, seed=3), pmd(posterior, kind, high, seed=3)
    second = np.argsort(-posterior, axis=1)[:, 1]
    assert_array_equal(many[few != many], second[few != many])
    assert (few != many).any()


def test_the_keep_function_has_the_published_range() -> None:
    ends = np.array([0.0, 1.0])
    assert_allclose(keep_function(ends, 1) / 1.43, [0.350, 0.699], atol=5e-4)
    assert_allclose(keep_function(ends, 2) / 1.32, [0, 0.758], atol=5e-4)
    assert_allclose(keep_function(ends, 3) / 1.35, [0, 0.741], atol=5e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from([1, 2, 3]), rate=st.floats(0.05, 0.95))
def test_the_solved_factor_gives_the_wanted_rate(seed: int, kind: int, rate: float) -> None:
    posterior, truth = make_posterior(30, 4, seed)
    reachable = [naive_rate(posterior, truth, kind, factor) for factor in np.geomspace(1e-3, 1e3, 50)]
    if min(reachable) <= rate <= max(reachable):
        factor = pmd_factor(posterior, truth, kind, rate)
        assert abs(naive_rate(posterior, truth, kind, factor) - rate) < 1e-9
        larger = [naive_rate(posterior, truth, kind, factor * up) - rate for up in np.geomspace(1.01, 1e4, 20)]
        assert min(larger) > 0 or max(larger) < 0  # no larger factor fits


def test_an_unreachable_rate_says_what_can_be_reached() -> None:
    posterior, truth = np.array([[0.8, 0.1, 0.1]] * 4), np.array([0, 0, 0, 2])
    with pytest.raises(InputError, match=r"rate: .*, 0\.250 to 1\.000, got 0\.1$"):
        pmd_factor(posterior, truth, 1, 0.1)


class Recorder(nn.Module):
    """A linear model that remembers what it was asked and answered in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layer(inputs)
        self.calls.append((inputs.clone(), logits.detach().softmax(1)))
        assert self.training
        return logits


def test_the_posterior_is_what_the_last_training_pass_saw() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(33, 3)
    labels = (inputs[:, 0] > 0).long()
    model = Recorder()
    config = PosteriorConfig(epochs=3, lr=0.5, batch_size=16)
    posterior = train_posterior(model, inputs, labels, config, augment=lambda batch: batch + 10)
    assert [len(seen) for seen, _ in model.calls] == [16, 17] * 3  # no batch of one row
    for seen, answered in model.calls[-2:]:
        for row, answer in zip(seen, answered, strict=True):
            index = int(((inputs + 10 - row).abs().sum(1)).argmin())
            assert_allclose(posterior[index], answer, atol=1e-6)
    assert posterior.dtype == np.float32


def test_the_posterior_is_the_same_for_the_same_seed_and_leaves_the_generator_alone() -> None:
    inputs, labels = torch.randn(40, 3), torch.arange(40) % 2
    before = torch.get_rng_state()
    results = []
    for seed in (1, 1, 2):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.1)
        torch.set_rng_state(before)
        results.append(train_posterior(model, inputs, labels, PosteriorConfig(epochs=2, batch_size=8), seed=seed))
        assert torch.equal(before, torch.get_rng_state())
    assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_uniform_noise_is_uniform() -> None:
    labels = np.arange(5).repeat(4000)
    noisy = uniform(labels, 0.4, 5, seed=1)
    matrix = np.histogram2d(labels, noisy, bins=5)[0] / 4000
    assert_allclose(matrix, 0.1 + 0.5 * np.eye(5), atol=0.03)
    assert_array_equal(uniform(labels, 0.0, 5), labels)
    assert (uniform(labels, 1.0, 5) != labels).all()


def test_asymmetric_noise_follows_the_map_alone() -> None:
    labels = np.arange(10).repeat(2000)
    noisy = asymmetric(labels, 0.3, CIFAR10_FLIPS, seed=1)
    for label in range(10):
        mine = noisy[labels == label]
        assert set(mine) == {label} | ({CIFAR10_FLIPS[label]} if label in CIFAR10_FLIPS else set())
        assert abs((mine != label).mean() - 0.3 * (label in CIFAR10_FLIPS)) < 0.05


def test_symmetric_and_pair_noise_move_exact_counts_of_every_class() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(11), 103))
    moved = 61  # 60 % of 103, rounded down
    matrix = np.histogram2d(labels, symmetric(labels, 0.6, 11, seed=1), bins=11)[0]
    assert_array_equal(matrix.diagonal(), np.full(11, 103 - moved))
    for label in range(11):
        assert sorted(np.delete(matrix[label], label)) == [6] * 9 + [7]
    noisy = pair(labels, 0.6, 11, seed=1)
    matrix = np.histogram2d(labels, noisy, bins=11)[0]
    assert_array_equal(np.sort(matrix, axis=1)[:, -2:], np.tile([103 - moved, moved], (11, 1)))
    assert_array_equal(matrix.sum(axis=0), np.full(11, 103))
    place, seen = 0, []  # all classes lie on one cycle
    for _ in range(11):
        place = int(np.flatnonzero(matrix[place] == moved)[0])
        seen.append(place)
    assert sorted(seen) == list(range(11))
    assert seen != [*range(1, 11), 0]
    assert (pair(labels, 0.3, 11)[labels == 3] != 3).sum() == 30
    assert_array_equal(pair(labels, 1.0, 11, seed=2), pair(labels, 1.0, 11, seed=2))


def test_the_blocks_of_cifar100_are_cycles_of_five() -> None:
    assert sorted(CIFAR100_FLIPS.values()) == list(range(100))
    for label, target in CIFAR100_FLIPS.items():
        assert target // 5 == label // 5
        assert target == (label + 1 if label % 5 < 4 else label - 4)


def test_the_caller_keeps_its_labels_and_may_pass_tensors() -> None:
    labels = np.array([0, 1, 2, 1])
    copy = labels.copy()
    assert_array_equal(uniform(torch.from_numpy(labels), 0.9, 3), uniform(labels, 0.9, 3))
    assert_array_equal(labels, copy)
    assert_array_equal(pmd(torch.tensor([[0.2, 0.8]]), 2, 100.0), [0])


GOOD = np.array([[0.7, 0.3], [0.4, 0.6]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pmd(GOOD, 4, 1.0), "kind: expected 1, 2 or 3, got 4"),
        (lambda: pmd(GOOD, 1, 0.0), "factor: expected a number above 0, got 0.0"),
        (lambda: pmd(GOOD, 1, float("nan")), "factor: expected a number above 0, got nan"),
        (lambda: pmd(GOOD[0], 1, 1.0), r"posterior: expected shape \(N, C\), got \(2,\)"),
        (lambda: pmd(GOOD * 9, 1, 1.0), r"posterior: expected probabilities in \[0, 1\]"),
        (lambda: pmd(GOOD * np.nan, 1, 1.0), r"posterior: expected probabilities in \[0, 1\]"),
        (lambda: pmd(GOOD[:, :1], 1, 1.0), r"posterior: expected at least two classes, got shape \(2, 1\)"),
        (lambda: pmd_factor(GOOD, np.array([0]), 1, 0.3), r"true_labels: expected shape \(2,\), got \(1,\)"),
        (lambda: pmd_factor(GOOD, np.array([0, 5]), 1, 0.3), "true_labels: expected classes 0 to 1, got 5 in row 1"),
        (lambda: pmd_factor(GOOD, np.array([0, 1]), 1, 70), r"rate: expected a number in \(0, 1\), got 70"),
        (lambda: uniform(np.array([0, 3]), 0.3, 3), "labels: expected classes 0 to 2, got 3 in row 1"),
        (lambda: uniform(np.array([0.0]), 0.3, 3), "labels: expected integer class indices, got float64"),
        (lambda: uniform(np.array([0]), 30, 3), r"level: expected a number in \[0, 1\], got 30"),
        (lambda: uniform(np.array([0]), 0.3, 1), "num_classes: expected 2 or more, got 1"),
        (lambda: pair(np.array([0, 3]), 0.3, 3), "labels: expected classes 0 to 2, got 3 in row 1"),
        (lambda: symmetric(np.array([0]), 1.5, 3), r"level: expected a number in \[0, 1\], got 1.5"),
        (lambda: asymmetric(np.array([0]), 0.3, {0: 4}, num_classes=3), "flips: expected classes 0 to 2, got 4"),
        (lambda: asymmetric(np.array([0]), -0.1, {0: 1}), r"level: expected a number in \[0, 1\], got -0.1"),
        (
            lambda: train_posterior(nn.Linear(3, 2), torch.zeros(4, 3), torch.zeros(3).long()),
            r"true_labels: expected shape \(4,\), got \(3,\)",
        ),
        (
            lambda: train_posterior(nn.Linear(3, 2), torch.zeros(1, 3), torch.zeros(1).long()),
            "inputs: expected at least two rows and one epoch, got 1 rows and 25 epochs",
        ),
    ],
)
def test_bad_input_is_one_clear_line(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
