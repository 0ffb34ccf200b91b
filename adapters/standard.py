"""Ordinary training, from scratch ("standard") and as fine-tuning of the initial classifier ("relabel").

Also the initial classifier itself: the network trained on the given labels that refiners take logits and features of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.base import Outcome, Task
from adapters.network import (
    VALIDATIONS,
    NetworkOptions,
    build_network,
    hard,
    measure_on,
    named_accuracies,
    resolve,
    restore,
)
from synth_refine import InputError
from third_party import standard
from third_party.loop import Loss
from third_party.resnet import embed


@dataclass(frozen=True)
class InitialOptions(standard.Config):
    """How the initial classifier is trained, and what refiners get of it."""

    select: str = "noisy_validation"  # or "clean_validation" (the paper) or "last": its epoch
    average: int = 1  # classifiers, of different seeds, whose mean probabilities give the logits


@dataclass(frozen=True)
class InitialClassifier:
    """The classifier whose features and logits a refiner uses. K pooled features, M synthetic images.

    Attributes:
        weights: Its state, for `Task.initial`, on the CPU.
        epoch: The chosen epoch, from 0.
        train_features: (N, K).
        train_logits: (N, C).
        synthetic_features: (M, K).
        synthetic_logits: (M, C).
        outcome: Its training as an outcome, equal to that of `run` with the same options on the given labels.
    """

    weights: dict[str, Tensor]
    epoch: int
    train_features: Tensor
    train_logits: Tensor
    synthetic_features: Tensor
    synthetic_logits: Tensor
    outcome: Outcome


def run(
    task: Task,
    labels: Tensor,
    options: Mapping[str, Any],
    seed: int,
    checkpoint: Path | None = None,
    loss_of: Loss | None = None,
) -> Outcome:
    """Train a fresh network on `labels`; the options are those of `third_party.standard.Config` and the network's.

    `loss_of` gives the loss of each image, (B,), from logits and labels; None is the cross-entropy.
    """
    config, network = resolve("standard", standard.Config(), options)
    model = build_network(task, network, seed)
    result = standard.train(
        model,
        task.train.inputs,
        labels,
        config,
        measure=measure_on(task),
        seed=seed,
        checkpoint=checkpoint,
        loss_of=loss_of,
    )
    return _outcome(result, labels, config, network)


def run_relabel(
    task: Task, labels: Tensor, options: Mapping[str, Any], seed: int, checkpoint: Path | None = None
) -> Outcome:
    """Fine-tune all layers of the initial classifier below a fresh head, as the refinement paper does with its labels.

    The options are those of `third_party.standard.Config`, with `FINE_TUNE` as defaults, and the network's, which must
    be those of the initial classifier.

    Raises:
        InputError: The task has no initial classifier, or one of another network.
    """
    if task.initial is None:
        raise InputError("initial: expected the weights of the initial classifier, got None; see initial_classifier")
    config, network = resolve("relabel", standard.FINE_TUNE, options)
    model = build_network(task, network, seed, draw=2)
    restore(model, task.initial, fresh_head=True)
    result = standard.train(
        model, task.train.inputs, labels, config, measure=measure_on(task), seed=seed, checkpoint=checkpoint
    )
    return _outcome(result, labels, config, network)


def initial_classifier(
    task: Task, options: Mapping[str, Any], seed: int, checkpoint: Path | None = None
) -> InitialClassifier:
    """Train on the given labels of the task; what the chosen epoch says of training and synthetic images.

    Args:
        task: The task; its `initial` is not used.
        options: Those of `InitialOptions` and the network's.
        seed: Same seed, same classifier on the CPU.
        checkpoint: File that a killed run resumes from.

    Raises:
        InputError: `select` is unknown or names a validation set that the task does not have.
        TypeError: An unknown option.
    """
    chosen, config, network = _initial(options)
    select = chosen.select
    if select not in (*VALIDATIONS, "last"):
        raise InputError(f"select: expected {', '.join(VALIDATIONS)} or last, got {select!r}")
    if select != "last" and not len(getattr(task, select).labels):
        raise InputError(f"select: expected 'last' for a task without validation images, got {select!r}")
    model = build_network(task, network, seed)
    result = standard.train(
        model,
        task.train.inputs,
        task.train.labels,
        config,
        measure=measure_on(task),
        seed=seed,
        checkpoint=checkpoint,
        keep_best=None if select == "last" else select,
    )
    if result.best_weights is not None:
        model.load_state_dict(result.best_weights)
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    own = InitialClassifier(
        weights,
        config.epochs - 1 if result.best_epoch is None else result.best_epoch,
        *embed(model, task.train.inputs),
        *embed(model, task.synthetic.inputs),
        _outcome(result, task.train.labels, config, network),
    )
    if chosen.average <= 1:
        return own
    # One classifier trained on few noisy labels differs much between seeds and, by rounding, between machines.
    everyone = [own]
    for number in range(1, chosen.average):
        path = None if checkpoint is None else checkpoint.with_stem(f"{checkpoint.stem}_{number}")
        everyone.append(initial_classifier(task, {**options, "average": 1}, seed + 1000 * number, path))

    def mean(kind: str) -> Tensor:
        probabilities = torch.stack([getattr(one, kind).softmax(dim=1) for one in everyone]).mean(dim=0)
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()

    return dataclasses.replace(own, train_logits=mean("train_logits"), synthetic_logits=mean("synthetic_logits"))


def _initial(options: Mapping[str, Any]) -> tuple[InitialOptions, standard.Config, NetworkOptions]:
    chosen, network = resolve("initial classifier", InitialOptions(), options)
    config = {setting.name: getattr(chosen, setting.name) for setting in dataclasses.fields(standard.Config)}
    return chosen, standard.Config(**config), network


def _outcome(result: standard.Result, labels: Tensor, config: standard.Config, network: NetworkOptions) -> Outcome:
    settings = dataclasses.asdict(config) | dataclasses.asdict(network)
    return Outcome(named_accuracies(result.history), hard(labels), result.history, settings)
