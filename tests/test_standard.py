"""Ordinary training: the learning rate in both schedules, soft labels, the best epoch, resume; checkpoints."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from third_party import checkpoint, loop, plc, standard
from third_party.resnet import Classifier, FeatureHead, ResNet, embed

QUICK = standard.Config(epochs=5, batch_size=16, lr=0.05, milestones=(3,))


def simulated_overshoot(config: standard.Config, steps: int) -> list[list[float]]:
    """The published code's two schedulers, step by step.

    The ramp is stepped after every update while the epoch's index is at most `warmup`; the other schedule is stepped
    after every later epoch and multiplies whatever rate it finds.
    """
    rate, updates, later_epochs = 0.0, 0, 0
    rates = []
    for epoch in range(config.epochs):
        rates.append([])
        for _ in range(steps):
            rates[-1].append(rate)
            if epoch <= config.warmup:
                updates += 1
                rate = config.lr * updates / (config.warmup * steps)
        if epoch > config.warmup:
            later_epochs += 1
            if later_epochs in config.milestones:
                rate *= config.gamma
    return rates


@pytest.mark.parametrize("warmup", [1, 3])
def test_overshoot_is_the_published_codes_schedule(warmup: int) -> None:
    config = standard.Config(warmup_overshoot=True, warmup=warmup)
    rates = [[standard.learning_rate(config, epoch, step, 7) for step in range(7)] for epoch in range(config.epochs)]
    for mine, expected in zip(rates, simulated_overshoot(config, 7), strict=True):
        assert mine == pytest.approx(expected)


def test_overshoot_reaches_twice_the_rate() -> None:
    config = standard.Config(warmup_overshoot=True)
    starts = {epoch: standard.learning_rate(config, epoch, 0, 10) for epoch in (0, 1, 2, 61, 62, 121, 122, 162, 199)}
    expected = {0: 0.0, 1: 0.1, 2: 0.2, 61: 0.2, 62: 0.04, 121: 0.04, 122: 0.008, 162: 0.0016, 199: 0.0016}
    assert starts == pytest.approx(expected)


def test_nominal_schedule() -> None:
    config = standard.Config()
    assert [standard.learning_rate(config, 0, step, 4) for step in range(4)] == pytest.approx([0, 0.025, 0.05, 0.075])
    starts = {epoch: standard.learning_rate(config, epoch, 0, 4) for epoch in (1, 59, 60, 119, 120, 160, 199)}
    assert starts == pytest.approx({1: 0.1, 59: 0.1, 60: 0.02, 119: 0.02, 120: 0.004, 160: 0.0008, 199: 0.0008})


def test_fine_tuning_starts_at_its_full_rate() -> None:
    rates = [standard.learning_rate(standard.FINE_TUNE, epoch, 0, 4) for epoch in (0, 19, 20, 39, 40, 49)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    assert (standard.FINE_TUNE.epochs, standard.FINE_TUNE.weight_decay) == (50, 1e-4)


def toy(pixels: bool = False) -> tuple[Classifier, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(49) % 3
    with torch.random.fork_rng():
        torch.manual_seed(4)
        if pixels:
            inputs = torch.randint(0, 256, (49, 3, 8, 8), generator=generator).to(torch.uint8)
            # At least 8 channels: with fewer, oneDNN of torch 2.14 overruns the heap on processors with AVX2 alone.
            return ResNet(3, (8, 8, 16, 16), (1, 1, 1, 1)), inputs, labels
        inputs = torch.randn(49, 6, generator=generator) + 2 * torch.eye(3, 6)[labels]
        return FeatureHead(3, torch.zeros(6), torch.ones(6), hidden=16), inputs, labels


def no_figures(_: Classifier) -> dict[str, float]:
    return {}


def test_loop_is_plain_sgd_on_the_scheduled_rates() -> None:
    """One batch per epoch and no dropout: the same updates written with torch's optimiser and nothing else."""
    model, inputs, labels = toy()
    model.dropout = torch.nn.Identity()  # type: ignore[assignment]
    config = replace(QUICK, batch_size=49, warmup=2)
    slow = copy.deepcopy(model)
    optimiser = torch.optim.SGD(slow.parameters(), lr=1.0, momentum=0.9, weight_decay=0.0005, foreach=False)
    losses = []
    for rate in (0, 0.025, 0.05, 0.01, 0.01):
        optimiser.param_groups[0]["lr"] = rate
        loss = F.cross_entropy(slow(inputs), labels)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    result = standard.train(model, inputs, labels, config, measure=no_figures, seed=0)
    assert [entry["loss"] for entry in result.history] == pytest.approx(losses, rel=1e-5)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, slow.state_dict()[name], atol=1e-6)


def test_soft_labels_that_are_certain_equal_classes() -> None:
    model, inputs, labels = toy()
    soft = F.one_hot(labels, 3).float()
    results = [
        standard.train(copy.deepcopy(model), inputs, target, QUICK, measure=no_figures, seed=0)
        for target in (labels, soft)
    ]
    losses = [[entry["loss"] for entry in result.history] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.equal(soft, F.one_hot(labels, 3).float())


def test_best_weights_are_those_of_the_earliest_best_epoch() -> None:
    model, inputs, labels = toy()
    figures = iter([0.1, 0.7, 0.7, 0.2, 0.6])
    snapshots: list[dict[str, Tensor]] = []

    def measure(network: Classifier) -> dict[str, float]:
        assert not network.training
        snapshots.append(copy.deepcopy(network.state_dict()))
        return {"figure": next(figures)}

    result = standard.train(model, inputs, labels, QUICK, measure=measure, seed=0, keep_best="figure")
    assert result.best_epoch == 1
    assert result.best_weights is not None
    assert all(torch.equal(value, snapshots[1][name]) for name, value in result.best_weights.items())
    assert all(torch.equal(value, snapshots[4][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("killed_after", [1, 4])
def test_resumed_run_equals_an_uninterrupted_one(
    pixels: bool, killed_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    model, inputs, labels = toy(pixels)
    path = tmp_path / "folder" / "run.safetensors"
    calls = 0

    def measure(network: Classifier) -> dict[str, float]:
        torch.rand(3)  # a figure that draws disturbs nothing
        return {"figure": embed(network, inputs)[1].sum().item()}

    def killing(network: Classifier) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls > killed_after:
            raise KeyboardInterrupt
        return measure(network)

    whole, resumed = copy.deepcopy(model), copy.deepcopy(model)
    expected = standard.train(whole, inputs, labels, QUICK, measure=measure, seed=7, keep_best="figure")
    with pytest.raises(KeyboardInterrupt):
        standard.train(model, inputs, labels, QUICK, measure=killing, seed=7, checkpoint=path, keep_best="figure")
    result = standard.train(
        resumed, inputs, labels, QUICK, measure=measure, seed=7, checkpoint=path, keep_best="figure"
    )
    assert result.history == expected.history
    assert result.best_epoch == expected.best_epoch
    assert result.best_weights is not None
    assert expected.best_weights is not None
    for one, other in ((resumed.state_dict(), whole.state_dict()), (result.best_weights, expected.best_weights)):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert [file.name for file in path.parent.iterdir()] == ["run.safetensors"]


def test_bfloat16_is_a_switch() -> None:
    model, inputs, labels = toy()
    seen = []
    forward = model.forward

    def watched(batch: Tensor) -> Tensor:
        logits = forward(batch)
        seen.append(logits.dtype)
        return logits

    model.forward = watched  # type: ignore[method-assign]
    result = standard.train(model, inputs, labels, replace(QUICK, bf16=True), measure=no_figures, seed=0)
    assert set(seen) == {torch.bfloat16}
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize("method", [standard, plc])
def test_torch_compile_is_a_switch(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []

    def trace(network: nn.Module) -> Any:
        """torch.compile as far as a graph of the whole network, run as it is."""
        traced.append(network)
        return compile_(network, backend="eager", fullgraph=True)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", trace)
    losses = []
    for compiled in (False, True):
        model, inputs, labels = toy()
        config = method.Config(epochs=2, batch_size=16, crop_padding=0, flip=False, compiled=compiled)
        losses.append(method.train(model, inputs, labels, config, measure=no_figures, seed=0).history[-1]["loss"])
    assert traced == [model]
    runs = [loop.Progress(None, "", method.Config(compiled=one), 0, inputs, labels).run for one in (False, True)]
    assert runs[0] == runs[1]  # a checkpoint is gone on with either way
    assert losses[1] == pytest.approx(losses[0])


@pytest.mark.parametrize(
    ("bad_inputs", "bad_labels", "changes", "message"),
    [
        (torch.zeros(49), None, {}, r"inputs: expected shape \(N, 3, H, W\) or \(N, D\), got \(49,\)"),
        (torch.zeros(49, 3, 8, 8), None, {}, r"inputs: expected uint8 pixels, got torch.float32"),
        (torch.zeros(1, 6), None, {}, r"inputs: expected at least two rows, got 1"),
        (None, torch.zeros(49, 4), {}, r"labels: expected soft labels \(49, 3\), got \(49, 4\)"),
        (None, None, {"warmup": 0, "warmup_overshoot": True}, r"warmup_overshoot: expected warmup of at least 1"),
    ],
)
def test_bad_input_is_named(
    bad_inputs: Tensor | None, bad_labels: Tensor | None, changes: dict[str, int], message: str
) -> None:
    model, inputs, labels = toy()
    inputs = inputs if bad_inputs is None else bad_inputs
    labels = labels if bad_labels is None else bad_labels
    with pytest.raises(ValueError, match=message):
        standard.train(model, inputs, labels, replace(QUICK, **changes), measure=no_figures, seed=0)  # type: ignore[arg-type]


def test_unknown_figure_is_named() -> None:
    model, inputs, labels = toy()
    with pytest.raises(ValueError, match=r"keep_best: expected one of no figures, got 'accuracy'"):
        standard.train(model, inputs, labels, QUICK, measure=no_figures, seed=0, keep_best="accuracy")


STATE = {
    "numbers": [1, 2.5, None, True, "text"],
    "pair": (torch.arange(3), {7: torch.tensor(0.5, dtype=torch.bfloat16)}),
    "transposed": torch.arange(6).view(2, 3).T,
    "none": {},
    "empty": torch.empty(0, 2),
}


def test_checkpoint_returns_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save(path, STATE)
    state = checkpoint.load(path)
    assert list(state) == list(STATE)
    assert state["numbers"] == STATE["numbers"]
    assert isinstance(state["pair"], tuple)
    assert state["pair"][1][7].dtype == torch.bfloat16
    assert torch.equal(state["transposed"], torch.arange(6).view(2, 3).T)
    assert state["empty"].shape == (0, 2)


def test_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save(path, {"epoch": 1})

    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.os, "fsync", broken)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "other file", "empty"])
def test_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save(path, STATE)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-3]
    elif damage == "flipped bit":
        content[-1] ^= 1
    elif damage == "other file":
        content = bytearray(b"PK\x03\x04 a pickle in a zip file")
    else:
        content = bytearray()
    path.write_bytes(content)
    message = r"checkpoint: expected a file written by a training run, got .*state\.safetensors"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path)


def test_safetensors_file_of_others_is_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="checkpoint: expected a file written by a training run"):
        checkpoint.load(tmp_path / "model.safetensors")


def test_objects_do_not_enter_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="state: expected tensors, numbers, text and containers of them, got "):
        checkpoint.save(tmp_path / "state.safetensors", {"path": Path()})
