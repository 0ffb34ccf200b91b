"""Ordinary training, from scratch ("standard") and as fine-tuning of the initial classifier ("relabel").

Also the initial classifier itself: the network trained on the given labels that refiners take logits and features of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters.base import Outcome, Task
from adapters.network import (
    VALIDATIONS,
    build_network,
    hard,
    measure_on,
    named_accuracies,
    resolve,
    restore,
)
from synth_refine import InputError
from third_party import standard
from third_party.resnet import embed


@dataclass(frozen=True)
class InitialClassifier:
    """The classifier that a refiner looks through. K pooled features, M synthetic images.

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


def run(task: Task, labels: Tensor, options: Mapping[str, Any], seed: int, checkpoint: Path | None = None) -> Outcome:
    """Train a fresh network on `labels`; the options are those of `third_party.standard.Config` and the network's."""
    config, network = resolve("standard", standard.Config(), options)
    model = build_network(task, network, seed)
    result = standard.train(
        model, task.train.inputs, labels, config, measure=measure_on(task), seed=seed, checkpoint=checkpoint
    )
    settings = dataclasses.asdict(config) | dataclasses.asdict(network)
    return Outcome(named_accuracies(result.history), hard(labels), result.history, settings)


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
    settings = dataclasses.asdict(config) | dataclasses.asdict(network)
    return Outcome(named_accuracies(result.history), hard(labels), result.history, settings)


def initial_classifier(
    task: Task, options: Mapping[str, Any], seed: int, checkpoint: Path | None = None
) -> InitialClassifier:
    """Train on the given labels of the task and look at training and synthetic images through the chosen epoch.

    Args:
        task: The task; its `initial` is not used.
        options: As for `run`, and `select`: "noisy_validation" (the default, which needs no clean label),
            "clean_validation" (the paper) or "last".
        seed: Same seed, same classifier on the CPU.
        checkpoint: File that a killed run goes on from.

    Raises:
        InputError: `select` is unknown or names a validation set that the task does not have.
        TypeError: An unknown option.
    """
    select = options.get("select", "noisy_validation")
    if select not in (*VALIDATIONS, "last"):
        raise InputError(f"select: expected {', '.join(VALIDATIONS)} or last, got {select!r}")
    if select != "last" and not len(getattr(task, select).labels):
        raise InputError(f"select: expected 'last' for a task without validation images, got {select!r}")
    rest = {name: value for name, value in options.items() if name != "select"}
    config, network = resolve("initial classifier", standard.Config(), rest)
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
    settings = dataclasses.asdict(config) | dataclasses.asdict(network)
    outcome = Outcome(named_accuracies(result.history), task.train.labels.clone(), result.history, settings)
    return InitialClassifier(
        weights,
        config.epochs - 1 if result.best_epoch is None else result.best_epoch,
        *embed(model, task.train.inputs),
        *embed(model, task.synthetic.inputs),
        outcome,
    )
