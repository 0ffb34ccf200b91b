"""One contract for every method: a tiny task of pixels and one of features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import ADAPTERS, Outcome, Split, Task
from adapters.network import best_epoch, named_accuracies
from adapters.standard import initial_classifier, run
from synth_refine import InputError, class_prototypes, refine_labels
from synth_refine.images.encoders import module_encoder
from third_party import loop, lra_diffusion, simclr
from third_party.resnet import STATISTICS

QUICK: dict[str, Any] = {"epochs": 3, "batch_size": 16}
NETWORK: dict[str, dict[str, Any]] = {"pixels": {"network": "resnet_small"}, "features": {"hidden": 16}}
OWN: dict[str, dict[str, Any]] = {
    "lra-clip": {"warmup": 0, "measure_every": 1, "width": 16},
    "lra-simclr": {"warmup": 0, "measure_every": 1, "width": 16, "simclr": {"encoder": "resnet_small", "epochs": 1}},
}
PIXELS_ONLY = {"lra-simclr"}
SELECTIONS = ("last", "best_noisy_validation", "best_clean_validation")


def tiny_task(kind: str) -> Task:
    """Three separable classes, 48 training images of which a quarter is wrong, 24 for validation, 24 for the test."""
    generator = torch.Generator().manual_seed(5)
    true = torch.arange(96) % 3
    given = torch.where(torch.rand(96, generator=generator) < 0.25, (true + 1) % 3, true)
    if kind == "pixels":
        noise = torch.randint(0, 80, (96, 3, 16, 16), generator=generator)
        inputs = (noise + 90 * torch.eye(3, dtype=torch.int64)[true][:, :, None, None]).to(torch.uint8)
    else:
        inputs = torch.randn(96, 6, generator=generator) + 3 * torch.eye(3, 6)[true]
    validation = inputs[48:72]
    return Task(
        num_classes=3,
        train=Split(inputs[:48], given[:48]),
        synthetic=Split(inputs[84:], true[84:]),
        noisy_validation=Split(validation, given[48:72]),
        clean_validation=Split(validation, true[48:72]),
        test=Split(inputs[72:], true[72:]),
    )


@pytest.fixture(scope="module", params=["pixels", "features"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def task(kind: str) -> Task:
    without = tiny_task(kind)
    return replace(without, initial=initial_classifier(without, QUICK | NETWORK[kind], seed=0).weights)


def quick(method: str, kind: str) -> dict[str, Any]:
    if kind == "features" and method in PIXELS_ONLY:
        pytest.skip("needs pixels")
    return QUICK | NETWORK[kind] | OWN.get(method, {})


def same(one: Outcome, other: Outcome) -> bool:
    equal = one.history == other.history and one.test_accuracy == other.test_accuracy
    return equal and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("method", ADAPTERS)
def test_contract(method: str, kind: str, task: Task) -> None:
    labels, options = task.train.labels.clone(), quick(method, kind)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    outcome = ADAPTERS[method](task, labels, options, 0)

    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(labels, tiny_task(kind).train.labels)
    assert torch.equal(task.train.inputs, tiny_task(kind).train.inputs)
    assert tuple(outcome.test_accuracy) == SELECTIONS
    assert all(0 <= value <= 1 for value in outcome.test_accuracy.values())
    assert outcome.labels.shape == labels.shape
    assert outcome.labels.dtype == torch.int64
    assert outcome.labels.data_ptr() != labels.data_ptr()
    assert len(outcome.history) == 3
    assert {"epoch", "noisy_validation", "clean_validation", "test"} <= set(outcome.history[0])
    assert all(isinstance(value, float) for entry in outcome.history for value in entry.values())
    assert outcome.settings["epochs"] == 3
    assert options.items() <= outcome.settings.items()
    assert same(ADAPTERS[method](task, labels, options, 0), outcome)
    assert not same(ADAPTERS[method](task, labels, options, 1), outcome)


@pytest.mark.parametrize("method", ADAPTERS)
def test_killed_and_resumed(
    method: str, kind: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    options, path = quick(method, kind), tmp_path / "run.safetensors"
    expected = ADAPTERS[method](task, task.train.labels, options, 3)
    save, saved = loop.checkpoints.save, 0

    def save_once(target: Path, state: Mapping[str, Any]) -> None:
        nonlocal saved
        saved += 1
        if saved == 3:
            raise KeyboardInterrupt
        save(target, state)

    monkeypatch.setattr(loop.checkpoints, "save", save_once)
    with pytest.raises(KeyboardInterrupt):
        ADAPTERS[method](task, task.train.labels, options, 3, path)
    monkeypatch.setattr(loop.checkpoints, "save", save)
    assert path.exists()
    assert same(ADAPTERS[method](task, task.train.labels, options, 3, path), expected)


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1}, r": unknown option 'learning_rate'; known are batch_size, .*epochs.*network"),
        ({"lr": "1e-3"}, r": option 'lr': expected float, got '1e-3' \(str\)"),
        ({"epochs": True}, r": option 'epochs': expected int, got True \(bool\)"),
        ({"epochs": 2.5}, r": option 'epochs': expected int, got 2.5 \(float\)"),
    ],
)
def test_bad_option_is_named(method: str, task: Task, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=method + message):
        ADAPTERS[method](task, task.train.labels, options, 0)


@pytest.mark.parametrize("method", ADAPTERS)
def test_unfitting_network_is_named(method: str, kind: str, task: Task) -> None:
    quick(method, kind)
    wrong, fitting = (
        ("head", "resnet34 or resnet_small or resnet18 or resnet50 or vgg19_bn")
        if kind == "pixels"
        else ("resnet34", "head")
    )
    with pytest.raises(InputError, match=f"network: expected auto or {fitting} for {kind}, got '{wrong}'"):
        ADAPTERS[method](task, task.train.labels, {"network": wrong}, 0)


def test_task_holds_no_true_label_of_the_training_images() -> None:
    assert {field.name for field in fields(Task)} == {
        "num_classes", "train", "synthetic", "noisy_validation", "clean_validation", "test", "initial",
    }  # fmt: skip


def test_validation_and_test_labels_do_not_influence_training(kind: str, task: Task) -> None:
    def rolled(split: Split) -> Split:
        return Split(split.inputs, split.labels.roll(1))

    changed = replace(
        task,
        noisy_validation=rolled(task.noisy_validation),
        clean_validation=rolled(task.clean_validation),
        test=rolled(task.test),
    )
    for method in ADAPTERS.keys() - (PIXELS_ONLY if kind == "features" else set()):
        adapter, options = ADAPTERS[method], quick(method, kind)
        one, other = (adapter(version, task.train.labels, options, 0) for version in (task, changed))
        assert [entry["loss"] for entry in one.history] == [entry["loss"] for entry in other.history]
        assert torch.equal(one.labels, other.labels)


def test_empty_validation_has_no_best_epoch(task: Task, kind: str) -> None:
    none = Split(task.test.inputs[:0], task.test.labels[:0])
    without = replace(task, noisy_validation=none, clean_validation=none)
    options = QUICK | NETWORK[kind]
    assert list(run(without, task.train.labels, options, 0).test_accuracy) == ["last"]
    with pytest.raises(InputError, match="select: expected 'last' for a task without validation images"):
        initial_classifier(without, options, 0)
    assert initial_classifier(without, options | {"select": "last"}, 0).epoch == 2


def test_the_loss_of_standard_training_is_an_argument(task: Task, kind: str) -> None:
    def twice(logits: Tensor, labels: Tensor) -> Tensor:
        return 2 * torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    options = QUICK | NETWORK[kind] | {"lr": 1e-6}  # the first epoch's loss is then that of the fresh network
    usual, doubled = (run(task, task.train.labels, options, 0, loss_of=loss).history[0] for loss in (None, twice))
    assert doubled["loss"] == pytest.approx(2 * usual["loss"], rel=1e-4)


def test_ties_go_to_the_earliest_epoch() -> None:
    history = [
        {"noisy_validation": 0.2, "clean_validation": 0.9, "test": 0.1},
        {"noisy_validation": 0.6, "clean_validation": 0.9, "test": 0.2},
        {"noisy_validation": 0.6, "clean_validation": 0.1, "test": 0.3},
    ]
    assert best_epoch(history, "noisy_validation") == 1
    assert list(named_accuracies(history).items()) == list(zip(SELECTIONS, (0.3, 0.2, 0.1), strict=True))


@pytest.mark.parametrize("select", ["noisy_validation", "clean_validation", "last"])
def test_initial_classifier_is_the_selected_epoch_of_standard_training(select: str, kind: str) -> None:
    task, options = tiny_task(kind), QUICK | NETWORK[kind]
    initial = initial_classifier(task, options | {"select": select}, seed=2)
    assert same(initial.outcome, run(task, task.train.labels, options, 2))
    history = initial.outcome.history
    assert initial.epoch == (2 if select == "last" else best_epoch(history, select))
    assert initial.train_features.shape[0] == 48
    assert initial.train_logits.shape == (48, 3)
    assert initial.synthetic_features.shape == (12, initial.train_features.shape[1])
    predicted = initial.synthetic_logits.argmax(dim=1)
    assert predicted.shape == (12,)
    # The weights are those of that epoch: a head on the stored features gives the stored logits.
    head = initial.train_features @ initial.weights["head.weight"].T + initial.weights["head.bias"]
    assert torch.allclose(head, initial.train_logits, atol=1e-5)


def test_initial_classifier_feeds_the_refiner(kind: str) -> None:
    task = tiny_task(kind)
    initial = initial_classifier(task, QUICK | NETWORK[kind] | {"epochs": 12, "lr": 0.02}, seed=0)
    prototypes = class_prototypes(initial.synthetic_features, task.synthetic.labels, 3)
    refined = refine_labels(initial.train_features, initial.train_logits, prototypes, 0.6).apply(task.train.labels)
    true = torch.arange(48) % 3
    assert (refined != true).sum() < (task.train.labels != true).sum()


def test_relabel_starts_from_the_initial_weights_below_a_fresh_head(
    task: Task, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert task.initial is not None
    started: list[dict[str, Tensor]] = []

    def watched(model: torch.nn.Module, *_: object, **__: object) -> None:
        started.append({name: value.clone() for name, value in model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr("adapters.standard.standard.train", watched)
    with pytest.raises(KeyboardInterrupt):
        ADAPTERS["relabel"](task, task.train.labels, NETWORK[kind], 0)
    for name, value in task.initial.items():
        assert torch.equal(started[0][name], value) != (name in ("head.weight", "head.bias"))


def test_relabel_needs_the_initial_weights_of_its_network(task: Task, kind: str) -> None:
    with pytest.raises(InputError, match="initial: expected the weights of the initial classifier, got None"):
        ADAPTERS["relabel"](replace(task, initial=None), task.train.labels, QUICK | NETWORK[kind], 0)
    other = replace(task, initial={"head.weight": torch.zeros(3, 2)})
    with pytest.raises(InputError, match="initial: expected the weights of this network, got others"):
        ADAPTERS["relabel"](other, task.train.labels, QUICK | NETWORK[kind], 0)


def test_unknown_selection_and_statistics_are_named(task: Task, kind: str) -> None:
    with pytest.raises(InputError, match="select: expected noisy_validation, clean_validation or last, got 'best'"):
        initial_classifier(task, NETWORK[kind] | {"select": "best"}, 0)
    with pytest.raises(InputError, match="statistics: expected train, cifar10, cifar100, imagenet, got 'mnist'"):
        run(task, task.train.labels, NETWORK[kind] | {"statistics": "mnist"}, 0)


def test_several_processes_take_one_simclr_encoder_from_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.lra_diffusion.processes", lambda: (0, 2))
    task = tiny_task("pixels")
    with pytest.raises(InputError, match="cache: expected a folder where several processes take one encoder from"):
        ADAPTERS["lra-simclr"](task, task.train.labels, quick("lra-simclr", "pixels"), 0)


def test_simclr_learns_from_training_and_validation_images_with_the_named_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[simclr.SimCLR, Any]] = []
    train = simclr.train

    def watched(model: simclr.SimCLR, images: Any, config: simclr.Config, **more: Any) -> simclr.Result:
        seen.append((model, images))
        return train(model, images, config, **more)

    monkeypatch.setattr(simclr, "train", watched)
    task, options = tiny_task("pixels"), quick("lra-simclr", "pixels") | {"epochs": 1}
    for statistics in ("train", "cifar10"):
        ADAPTERS["lra-simclr"](task, task.train.labels, options | {"statistics": statistics}, 0)
    (ours, images), (published, _) = seen
    assert torch.equal(torch.cat(list(images)), torch.cat([task.train.inputs, task.noisy_validation.inputs]))
    assert (published.encoder.mean.flatten() / 255).tolist() == pytest.approx(STATISTICS["cifar10"][0])
    mean = task.train.inputs.double().mean(dim=(0, 2, 3))
    assert ours.encoder.mean.flatten().tolist() == pytest.approx(mean.tolist(), rel=1e-4)


def test_published_simclr_weights_are_taken_with_the_task_s_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = simclr.build(simclr.Config()).encoder
    parts = {ours: theirs for theirs, ours in simclr.PUBLISHED_PARTS.items()}
    weights = {}
    for name, value in encoder.state_dict().items():
        if name.startswith("network."):
            _, part, rest = name.split(".", 2)
            weights[f"f.{parts[part]}.{rest}"] = value
    torch.save(weights, tmp_path / "SimCLR_128_cifar10.pt")
    task = tiny_task("pixels")
    options = QUICK | NETWORK["pixels"] | {"epochs": 1, "width": 16, "warmup": 0, "statistics": "cifar10"}
    outcome = ADAPTERS["lra-simclr"](
        task, task.train.labels, options | {"weights": str(tmp_path / "SimCLR_128_cifar10.pt")}, 0
    )
    assert outcome.settings["frozen_encoder"] == module_encoder("simclr", encoder, normalise=True).id
    del weights["f.6.2.bn3.bias"]
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"weights: expected those of the encoder .*other.pt: Missing key"):
        ADAPTERS["lra-simclr"](task, task.train.labels, options | {"weights": str(tmp_path / "other.pt")}, 0)


class Trained(Exception):
    """Stands for the end of what is of interest."""


@pytest.mark.parametrize(
    ("options", "scale", "size"),
    [({}, 10.0, 0.5), ({}, 0.01, 0.01), ({"preset": "released"}, 10.0, 10.0), ({"feature_size": 0.0}, 10.0, 10.0)],
)
def test_only_large_features_are_scaled_down(
    options: dict[str, Any], scale: float, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, seen = tiny_task("features"), []
    inputs = scale * task.train.inputs / task.train.inputs.square().mean().sqrt()

    def train(network: Any, inputs: Tensor, features: Tensor, *_: Any, **more: Any) -> None:
        seen.append(features.square().mean().sqrt().item())
        raise Trained

    monkeypatch.setattr(lra_diffusion, "train", train)
    with pytest.raises(Trained):
        ADAPTERS["lra-clip"](replace(task, train=Split(inputs, task.train.labels)), task.train.labels, options, 0)
    assert seen == pytest.approx([size], rel=1e-4)


@pytest.mark.parametrize(("preset", "best"), [("paper", 0.9), ("released", 0.7)])
def test_released_chooses_among_the_epochs_that_are_due(
    preset: str, best: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {5: (0.6, 0.6), 10: (0.7, 0.7), 12: (0.8, 0.9)}  # by epoch: clean validation and test
    history = [
        {"epoch": float(epoch)} | ({"clean_validation": found[0], "test": found[1]} if found else {})
        for epoch in range(13)
        for found in [figures.get(epoch)]
    ]
    monkeypatch.setattr(lra_diffusion, "train", lambda *_, **__: lra_diffusion.Result(history))
    task = tiny_task("features")
    outcome = ADAPTERS["lra-clip"](task, task.train.labels, {"preset": preset, "epochs": 13}, 0)
    assert outcome.test_accuracy == {"last": 0.9, "best_clean_validation": best}
