"""What every adapter needs: options made settings, the network for a task, and the figures of an epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from adapters.base import Task
from synth_refine import InputError
from synth_refine.images.weights import load_weights
from third_party.loop import Measure, seeded
from third_party.resnet import (
    STATISTICS,
    TORCHVISION,
    Classifier,
    FeatureHead,
    Torchvision,
    embed,
    input_statistics,
    resnet34,
    resnet_small,
)

ConfigT = TypeVar("ConfigT")

VALIDATIONS = ("noisy_validation", "clean_validation")
"""Measured figures by which an epoch can be chosen."""


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """Which network to build."""

    # head for features; for images of 32 pixels resnet34 or resnet_small; for those of some 224 torchvision's resnet18,
    # resnet50 or vgg19_bn; auto is head or resnet34
    network: str = "auto"
    pretrained: str = ""  # file with the weights of one of torchvision's; its last layer is left out
    statistics: str = "train"  # of the pixels: of the training images, or the published cifar10, cifar100 or imagenet
    crop: int = 0  # side in pixels of the square at the centre that the network sees; 0: all of the image
    hidden: int = 512  # units of the head on features
    dropout: float = 0.3  # of the head on features


def resolve(method: str, defaults: ConfigT, options: Mapping[str, Any]) -> tuple[ConfigT, NetworkOptions]:
    """Put the options into a loop's config and the network's.

    Args:
        method: Name for the error message.
        defaults: The loop's config.
        options: Settings that differ, by field name, as YAML or a command line gives them.

    Raises:
        TypeError: An unknown option, or one of the wrong type.

    Example:
        >>> from third_party import plc
        >>> resolve("plc", plc.Config(), {"epochs": 20})[0].epochs
        20
    """
    config, network = _replace(method, defaults, options), _replace(method, NetworkOptions(), options)
    known = {field.name for part in (config, network) for field in dataclasses.fields(part)}  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise TypeError(f"{method}: unknown option {name!r}; known are {', '.join(sorted(known))}")
    return config, network


def _replace(method: str, config: ConfigT, options: Mapping[str, Any]) -> ConfigT:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if field.name not in options:
            continue
        value, default = options[field.name], getattr(config, field.name)
        if isinstance(default, tuple) and isinstance(value, list | tuple):
            value = tuple(value)
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        if not isinstance(value, type(default)) or (isinstance(value, bool) and not isinstance(default, bool)):
            kind = type(default).__name__
            raise TypeError(f"{method}: option {field.name!r}: expected {kind}, got {value!r} ({type(value).__name__})")
        changes[field.name] = value
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def build_network(task: Task, options: NetworkOptions, seed: int, draw: int = 1) -> Classifier:
    """A fresh network for the task, on the device of its inputs.

    Its preprocessing is part of it and comes from the training inputs, never from their labels.

    Args:
        task: The task.
        options: Which network.
        seed: Same seed, same weights.
        draw: Another positive number gives other weights for the same seed.

    Raises:
        InputError: No such network, or one that does not fit the inputs.
    """
    name = options.network
    if name == "auto":
        name = "resnet34" if task.is_pixels else "head"
    fitting = ("resnet34", "resnet_small", *TORCHVISION) if task.is_pixels else ("head",)
    if name not in fitting:
        kind = "pixels" if task.is_pixels else "features"
        raise InputError(f"network: expected {' or '.join(('auto', *fitting))} for {kind}, got {options.network!r}")
    if options.pretrained and name not in TORCHVISION:
        raise InputError(f"pretrained: expected one of {', '.join(TORCHVISION)} as the network, got {name!r}")
    inputs = task.train.inputs
    check_statistics(options.statistics)
    with seeded(torch.device("cpu"), seed, 0, draw):
        if name == "head":
            mean, std = input_statistics(inputs)
            head = FeatureHead(task.num_classes, mean.cpu(), std.cpu(), options.hidden, options.dropout)
            return head.to(inputs.device)
        statistics = channel_statistics(inputs, options.statistics)
        if name in TORCHVISION:
            network = Torchvision(name, task.num_classes, *statistics)
            if options.pretrained:
                load_weights(network.network, options.pretrained, keep=set(network.network.state_dict()))
            model: Classifier = network
        else:
            build = resnet34 if name == "resnet34" else resnet_small
            model = build(task.num_classes, *statistics)
    model.crop = options.crop
    return model.to(inputs.device)


def check_statistics(name: str) -> None:
    """Refuse what `channel_statistics` does not know.

    Raises:
        InputError: Neither "train" nor a published set.
    """
    if name != "train" and name not in STATISTICS:
        raise InputError(f"statistics: expected {', '.join(('train', *STATISTICS))}, got {name!r}")


def channel_statistics(inputs: Tensor, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for pixels in [0, 1]: of the inputs ("train") or published ones."""
    check_statistics(name)
    if name != "train":
        return STATISTICS[name]
    mean, std = (tuple(values.tolist()) for values in input_statistics(inputs))
    return mean, tuple(value or 1.0 for value in std)


def restore(model: Classifier, weights: Mapping[str, Tensor], *, fresh_head: bool) -> None:
    """Load weights of the same network; with `fresh_head` all but the last layer.

    Raises:
        InputError: The weights belong to another network.
    """
    own = model.state_dict()
    keep = {name: value for name, value in own.items() if fresh_head and name.startswith("head.")}
    try:
        model.load_state_dict({**weights, **keep})
    except RuntimeError as error:
        raise InputError("initial: expected the weights of this network, got others; use the same options") from error


def measure_on(task: Task) -> Measure:
    """Accuracy on both validation sets and on the test set, as fractions; an empty set has no figure."""
    splits = {"noisy_validation": task.noisy_validation, "clean_validation": task.clean_validation, "test": task.test}
    used = {name: split for name, split in splits.items() if len(split.labels)}

    def measure(model: Classifier) -> dict[str, float]:
        predicted: dict[int, Tensor] = {}  # both validation sets share their inputs: one pass for two figures
        figures: dict[str, float] = {}
        for name, split in used.items():
            key = id(split.inputs)
            if key not in predicted:
                predicted[key] = embed(model, split.inputs)[1].argmax(dim=1)
            figures[name] = (predicted[key] == split.labels).double().mean().item()
        return figures

    return measure


def best_epoch(history: list[dict[str, float]], figure: str) -> int:
    """Index of the earliest epoch with the highest figure."""
    return max(range(len(history)), key=lambda index: history[index][figure])


def named_accuracies(history: list[dict[str, float]]) -> dict[str, float]:
    """Test accuracy at each choice of the epoch that the measured figures allow.

    Example:
        >>> epochs = [{"noisy_validation": 0.5, "test": 0.8}, {"noisy_validation": 0.5, "test": 0.7}]
        >>> named_accuracies(epochs)
        {'last': 0.7, 'best_noisy_validation': 0.8}
    """
    if not history:
        return {}
    best = {f"best_{name}": history[best_epoch(history, name)]["test"] for name in VALIDATIONS if name in history[0]}
    return {"last": history[-1]["test"], **best}


def hard(labels: Tensor) -> Tensor:
    """Labels as classes, (N,) int64; soft ones, (N, C), by their largest entry."""
    return labels.argmax(dim=1) if labels.ndim == 2 else labels.clone()
