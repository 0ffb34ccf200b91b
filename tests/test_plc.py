"""Progressive Label Correction: the correction, its threshold, the window and the loop."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from third_party import loop, plc
from third_party.resnet import Classifier, FeatureHead, ResNet, embed

QUICK = plc.Config(epochs=6, batch_size=16, lr=0.05, delta=0.5, warmup=2, window=3, milestones=(4,))


def naive_correction(predictions: Tensor, labels: Tensor, delta: float) -> list[int]:
    """The rule of the published code, one image at a time."""
    corrected = []
    for row, label in zip(predictions, labels.tolist(), strict=True):
        likeliest = 0
        for candidate in range(len(row)):
            if row[candidate] > row[likeliest]:
                likeliest = candidate
        ratio = row[label] / row[likeliest]
        corrected.append(likeliest if ratio < delta else label)
    return corrected


@given(st.integers(0, 10_000), st.floats(0, 1, width=32))
def test_correction_is_the_rule_written_slowly(seed: int, delta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randn(20, 4, generator=generator).mul(2).softmax(dim=1)
    labels = torch.randint(0, 4, (20,), generator=generator)
    before = labels.clone()
    assert plc.correct(predictions, labels, delta).tolist() == naive_correction(predictions, labels, delta)
    assert torch.equal(labels, before)
    assert torch.equal(plc.correct(predictions, labels, delta), plc.correct(predictions / 8, labels, delta))


def test_correction_boundaries() -> None:
    predictions = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.4, 0.4, 0.2], [0.0, 0.0, 0.0]])
    labels = torch.tensor([1, 1, 1, 2])
    assert plc.correct(predictions, labels, 0.5).tolist() == [1, 1, 1, 2]  # a ratio equal to delta keeps the label
    assert plc.correct(predictions, labels, 0.6).tolist() == [0, 0, 1, 2]  # a tie, and a row never seen, keep it


def deltas(config: plc.Config, flips: int, steps: int) -> list[float]:
    values = [config.delta]
    for _ in range(steps):
        values.append(plc.next_delta(values[-1], flips, 45_000, config))
    return values


def test_smoothed_correction_is_that_for_clothing1m_written_slowly() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = (4 * torch.randn(300, 14, generator=generator)).softmax(dim=1)
    predictions[:50] = torch.rand(50, 14, generator=generator).softmax(dim=1)  # nearly uniform
    labels = torch.randint(14, (300,), generator=generator)
    corrected, by_ratio = plc.correct_smoothed(predictions, labels, 0.7)
    kinds = set()
    for row in range(300):
        q = predictions[row].softmax(dim=0)
        best, label = int(q.argmax()), int(labels[row])
        unsure, small = bool(q[best] < 0.1), bool(q[label] / q[best] < 0.7)
        assert int(corrected[row]) == (best if unsure or small else label)
        assert bool(by_ratio[row]) == (small and not unsure)
        kinds.add((unsure, small))
    assert {(True, False), (False, True), (False, False)} <= kinds


def test_settings_of_the_larger_sets() -> None:
    only_none = plc.Config(few_flips=0.0)
    assert [plc.next_delta(0.5, flips, 10**6, only_none) for flips in (0, 1)] == [0.6, 0.5]
    sizes = [len(rows) for rows in loop.shuffled_batches(50, 8, torch.device("cpu"), True)]
    assert sizes == [8] * 6
    assert [len(rows) for rows in loop.shuffled_batches(5, 8, torch.device("cpu"), True)] == [5]
    model, inputs, labels = toy()
    smoothed = replace(QUICK, corrector="smoothed", drop_last=True)
    result = plc.train(model, inputs, labels, smoothed, measure=no_figures, seed=0)
    assert sum(entry["flips"] for entry in result.history) > 0


def test_delta_grows_after_few_flips_up_to_the_limit() -> None:
    assert deltas(plc.Config(), 44, 8) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9])
    assert deltas(plc.Config(), 45, 2) == [0.3, 0.3, 0.3]


def test_delta_of_the_paper_grows_by_a_factor_after_no_flip() -> None:
    config = plc.Config(growth="multiplicative")
    assert deltas(config, 0, 3) == pytest.approx([0.3, 0.33, 0.363, 0.3993])
    assert deltas(config, 1, 2) == [0.3, 0.3, 0.3]


def test_old_cap_jumps_to_the_limit() -> None:
    assert deltas(plc.Config(cap="max"), 0, 2) == pytest.approx([0.3, 0.9, 1.0])


def toy(pixels: bool = False) -> tuple[Classifier, Tensor, Tensor]:
    """Three separable classes, a third of the labels wrong."""
    generator = torch.Generator().manual_seed(3)
    true = torch.arange(49) % 3
    labels = torch.where(torch.rand(49, generator=generator) < 0.3, (true + 1) % 3, true)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        if pixels:
            noise = torch.randint(0, 60, (49, 3, 8, 8), generator=generator)
            inputs = (noise + 90 * torch.eye(3, dtype=torch.int64)[true][:, :, None, None]).to(torch.uint8)
            # At least 8 channels: with fewer, oneDNN of torch 2.14 overruns the heap on processors with AVX2 alone.
            return ResNet(3, (8, 8, 16, 16), (1, 1, 1, 1)), inputs, labels
        inputs = torch.randn(49, 6, generator=generator) + 3 * torch.eye(3, 6)[true]
        return FeatureHead(3, torch.zeros(6), torch.ones(6), hidden=16), inputs, labels


def no_figures(_: Classifier) -> dict[str, float]:
    return {}


def test_schedule_and_first_correction() -> None:
    model, inputs, labels = toy()
    result = plc.train(model, inputs, labels, QUICK, measure=no_figures, seed=0)
    assert [entry["lr"] for entry in result.history] == [0.05] * 4 + [0.025] * 2
    flips = [entry["flips"] for entry in result.history]
    assert flips[:2] == [0, 0]
    assert sum(flips[2:]) > 0
    assert result.history[0]["delta"] == result.history[2]["delta"] == 0.5
    assert result.labels.dtype == torch.int64


def test_labels_get_better_on_separable_classes() -> None:
    model, inputs, labels = toy()
    config = replace(QUICK, epochs=15, warmup=5, milestones=())
    true = torch.arange(49) % 3
    corrected = plc.train(model, inputs, labels, config, measure=no_figures, seed=0).labels
    assert (corrected == true).sum() > (labels == true).sum() + 5


@pytest.mark.parametrize("pixels", [False, True])
def test_window_holds_the_training_pass_itself(pixels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax in training mode, weights from before the update, mean over all rows of the window."""
    model, inputs, labels = toy(pixels)
    seen: list[Tensor] = []
    passes: list[tuple[Tensor, bool]] = []
    forward, batches = model.forward, loop.shuffled_batches
    order: list[Tensor] = []

    def watched_forward(batch: Tensor) -> Tensor:
        logits = forward(batch)
        passes.append((logits.detach().softmax(dim=1), model.training))
        return logits

    def watched_batches(count: int, batch_size: int, device: torch.device, drop_last: bool) -> list[Tensor]:
        order.extend(drawn := list(batches(count, batch_size, device)))
        return drawn

    def watched_correct(predictions: Tensor, current: Tensor, delta: float) -> Tensor:
        seen.append(predictions.clone())
        return current

    monkeypatch.setattr(model, "forward", watched_forward)
    monkeypatch.setattr(plc, "shuffled_batches", watched_batches)
    monkeypatch.setattr(plc, "correct", watched_correct)
    plc.train(model, inputs, labels, replace(QUICK, epochs=5, warmup=1), measure=no_figures, seed=0)

    assert all(training for _, training in passes)
    assert [len(rows) for rows in order] == [16, 16, 16] * 5  # the 49th image, a batch of one, is left out
    rolling = torch.zeros(3, 49, 3)
    expected = []
    for index, (rows, (probabilities, _)) in enumerate(zip(order, passes, strict=True)):
        rolling[index // 3 % 3, rows] = probabilities
        if index % 3 == 2 and index // 3 >= 1:
            expected.append(rolling.mean(dim=0))
    assert len(seen) == len(expected) == 4
    assert all(torch.allclose(mine, wanted, atol=1e-6) for mine, wanted in zip(seen, expected, strict=True))


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_resumed_run_equals_an_uninterrupted_one(
    pixels: bool, killed_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    model, inputs, labels = toy(pixels)
    given_labels = labels.clone()

    def measure(network: Classifier) -> dict[str, float]:
        return {"logit": embed(network, inputs)[1].sum().item()}

    path = tmp_path / "run.safetensors"
    whole = copy.deepcopy(model)
    expected = plc.train(whole, inputs, labels, QUICK, measure=measure, seed=7)
    assert torch.equal(labels, given_labels)
    calls = 0

    def killing(network: Classifier) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls > killed_after:
            raise KeyboardInterrupt
        return measure(network)

    with pytest.raises(KeyboardInterrupt):
        plc.train(copy.deepcopy(model), inputs, labels, QUICK, measure=killing, seed=7, checkpoint=path)
    torch.rand(5)  # a new process has another state
    resumed = copy.deepcopy(model)
    result = plc.train(resumed, inputs, labels, QUICK, measure=measure, seed=7, checkpoint=path)
    assert result.history == expected.history
    assert torch.equal(result.labels, expected.labels)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    again = plc.train(copy.deepcopy(model), inputs, labels, QUICK, measure=killing, seed=7, checkpoint=path)
    assert again.history == expected.history  # a finished run is read back without another epoch


def test_caller_keeps_its_random_state_and_the_seed_decides() -> None:
    model, inputs, labels = toy()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = plc.train(copy.deepcopy(model), inputs, labels, QUICK, measure=no_figures, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = plc.train(copy.deepcopy(model), inputs, labels, QUICK, measure=no_figures, seed=1)
    other = plc.train(copy.deepcopy(model), inputs, labels, QUICK, measure=no_figures, seed=2)
    assert first.history == second.history
    assert torch.equal(first.labels, second.labels)
    assert other.history != first.history


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"growth": "fast"}, r"growth: expected 'additive' or 'multiplicative', got 'fast'"),
        ({"cap": "none"}, r"cap: expected 'min' or 'max', got 'none'"),
        ({"window": 0}, r"window: expected at least 1 epoch, got 0"),
        ({"epochs": 0}, r"epochs: expected at least 1, got 0"),
        ({"batch_size": 1}, r"batch_size: expected at least 2, got 1"),
        ({"lr": 1e30}, r"lr: expected a finite loss, got nan in epoch \d"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, object], message: str) -> None:
    model, inputs, labels = toy()
    with pytest.raises(ValueError, match=message):
        plc.train(model, inputs, labels, replace(QUICK, **changes), measure=no_figures, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(48, dtype=torch.int64), r"labels: expected \(49,\) int64, got \(48,\) torch.int64"),
        (torch.zeros(49), r"labels: expected \(49,\) int64, got \(49,\) torch.float32"),
        (torch.zeros(49, 3), r"labels: expected \(49,\) int64, got \(49, 3\) torch.float32"),
        (torch.full((49,), 3), r"labels: expected classes 0 to 2, got 3 to 3"),
        (torch.full((49,), -1), r"labels: expected classes 0 to 2, got -1 to -1"),
    ],
)
def test_bad_labels_are_named(bad: Tensor, message: str) -> None:
    model, inputs, _ = toy()
    with pytest.raises(ValueError, match=message):
        plc.train(model, inputs, bad, QUICK, measure=no_figures, seed=0)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    model, inputs, labels = toy()
    path = tmp_path / "run.safetensors"
    plc.train(copy.deepcopy(model), inputs, labels, QUICK, measure=no_figures, seed=0, checkpoint=path)
    for changed, seed, name in ((labels, 1, "seed"), (labels.roll(1), 0, "labels")):
        with pytest.raises(ValueError, match=f"checkpoint: expected a run with {name} = "):
            plc.train(copy.deepcopy(model), inputs, changed, QUICK, measure=no_figures, seed=seed, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(
        ValueError, match=r"checkpoint: expected a file written by a training run, got .*run\.safetensors"
    ):
        plc.train(copy.deepcopy(model), inputs, labels, QUICK, measure=no_figures, seed=0, checkpoint=path)
