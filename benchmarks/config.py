"""A benchmark's YAML config, with `key=value` overrides, and the arguments that the scripts share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import data
from synth_refine import InputError

CONFIGS = Path(__file__).parent / "configs"
KEYS = {
    "dataset",
    "noise",
    "by_noise",
    "encoder",
    "encoder_weights",
    "synthetic_per_class",
    "refiners",
    "threshold",
    "weight",
    "pixels",
    "flips",
    "posterior",
    "initial",
    "methods",
    "seeds",
    "jobs",
}


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML config and put `key=value` overrides into it; dots lead into a block.

    Raises:
        InputError: No such file, no mapping, an unknown key, or an override without "=".
    """
    config = _read(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"override: expected key=value, got {override!r}")
        *blocks, last = _steps(key)
        target = config
        for block in blocks:
            inner = target.setdefault(block, {})
            if not isinstance(inner, dict):
                raise InputError(f"override: expected a block at {block}, got {inner!r} in {override!r}")
            target = inner
        try:
            target[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"override: expected a YAML value, got {override!r}") from error
        for changes in _by_noise(config).values():  # the command line has the last word
            for block in blocks:
                changes = changes.get(block) or {}
            changes.pop(last, None)
    unknown = sorted(set(config) - KEYS)
    if unknown:
        raise InputError(f"config: expected the keys {', '.join(sorted(KEYS))}, got {unknown[0]!r} in {path}")
    config.setdefault("methods", {})
    _check_types(config)
    for changes in _by_noise(config).values():
        _check_types(_merged(deepcopy(config), changes))
    return config


def for_noise(config: Mapping[str, Any], noise: str) -> dict[str, Any]:
    """The config for given labels of that name: blocks of `by_noise` that fit are put over the rest, in their order.

    Example:
        >>> config = {"threshold": 0.8, "by_noise": {"clean, *_U_*": {"threshold": 0}}}
        >>> for_noise(config, "cifar100-1-0.35_U_0.3"), for_noise(config, "pmd-1-0.35")
        ({'threshold': 0}, {'threshold': 0.8})
    """
    chosen = {key: deepcopy(value) for key, value in config.items() if key != "by_noise"}
    for patterns, changes in _by_noise(config).items():
        if any(fnmatchcase(noise, pattern.strip()) for pattern in str(patterns).split(",")):
            chosen = _merged(chosen, deepcopy(changes))
    return chosen


def _by_noise(config: Mapping[str, Any]) -> Mapping[Any, dict[str, Any]]:
    """Changes of the config by patterns of noise names."""
    blocks = config.get("by_noise") or {}
    if not isinstance(blocks, dict) or not all(isinstance(changes, dict) for changes in blocks.values()):
        raise InputError(f"by_noise: expected blocks of settings by names of noise, got {blocks!r}")
    for patterns, changes in blocks.items():
        if unknown := sorted(set(changes) - {"threshold", "weight", "initial", "methods"}):
            raise InputError(
                f"by_noise: expected threshold, weight, initial or methods, got {unknown[0]!r} for {patterns}"
            )
    return blocks


def _read(path: Path) -> dict[str, Any]:
    """The mapping of a file, over that of the file beside it which `base` names."""
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"config: expected a YAML file, {path} cannot be read: {reason}") from error
    if not isinstance(config, dict):
        raise InputError(f"config: expected a mapping in {path}, got {type(config).__name__}")
    base = config.pop("base", None)
    return config if base is None else _merged(_read(path.parent / str(base)), config)


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        base[key] = _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return base


def _steps(key: str) -> list[str]:
    """The names on the way to a value; that of a method of the user's own, package.module:function, is one."""
    if ":" not in key:
        return key.split(".")
    module, _, rest = key.partition(":")
    block, _, module = module.partition(".")
    function, *names = rest.split(".")
    return [block, f"{module}:{function}", *names]


def _check_types(config: Mapping[str, Any]) -> None:
    """Refuse values that would only fail in the middle of a run."""
    blocks = {"methods": config["methods"], "initial": config.get("initial") or {}}
    if isinstance(config["methods"], dict):
        blocks |= {f"methods.{name}": block or {} for name, block in config["methods"].items()}
    for name, block in blocks.items():
        if not isinstance(block, dict):
            raise InputError(f"{name}: expected a block of settings, got {block!r}")
    for name, kinds in {
        "threshold": (int, float),
        "weight": (int, float),
        "synthetic_per_class": (int,),
        "jobs": (int,),
    }.items():
        if name in config and not isinstance(config[name], kinds):
            raise InputError(f"{name}: expected a number, got {config[name]!r}")
    weight = config.get("weight", 0.5)
    if not 0 <= weight <= 1:
        raise InputError(f"weight: expected a number in [0, 1], got {weight}")
    threshold = config.get("threshold", 0)
    if not -weight <= threshold <= 1:
        raise InputError(f"threshold: expected a score, in [{-weight:g}, 1] at weight {weight:g}, got {threshold}")
    for seed in as_list(config.get("seeds", 0)):
        if not isinstance(seed, int) or seed < 0:
            raise InputError(f"seeds: expected integers from 0, got {seed!r}")


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def add_common(parser: argparse.ArgumentParser) -> None:
    """The arguments that this script shares with run_ablation.py."""
    add = parser.add_argument
    add("--config", type=Path, help="YAML file; default: digits.yaml, with --data features.yaml or cifar10.yaml")
    add("--data", type=Path, help="your arrays, an .npz file: train, train_labels, test, test_labels, synthetic, ...")
    add("--images", type=Path, help="your images: a folder with train, test and perhaps val, see benchmarks/README.md")
    add("--classes", type=Path, help="--images: YAML file of class names, or of class names and what prompts call them")
    add("--given", type=Path, action="append", help="noisy labels of the training images or rows; may be repeated")
    add("--noise", help="comma-separated, for example clean,uniform-0.3: noise added to the true labels")
    add("--data-root", type=Path, default=Path("data"), help="folder of CIFAR's files (default: %(default)s)")
    add("--synthetic", type=Path, help="folder with one folder of synthetic images per class, for CIFAR and --images")
    add("--seeds", type=lambda text: [int(part) for part in text.split(",")], help="for example 0,1,2")
    add("--out", type=Path, default=Path("runs"), help="folder for the records (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("overrides", nargs="*", metavar="key=value", help="config values, for example methods.plc.epochs=30")


def resolve_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fill in the device and the config's path, and read the config."""
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and "LOCAL_RANK" in os.environ:
        arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: expected auto, cpu or a device that is there, got {arguments.device!r}") from error
    if arguments.images and arguments.data:
        raise InputError(f"images: expected --images or --data, got both: {arguments.images} and {arguments.data}")
    if arguments.images and not arguments.synthetic:
        raise InputError("synthetic: expected a folder of synthetic images per class beside --images, got none")
    if arguments.config is None:
        name = "folder" if arguments.images else _default_config(arguments.data)
        arguments.config = CONFIGS / f"{name}.yaml"
    return read_config(arguments.config, arguments.overrides)


def _default_config(arrays: Path | None) -> str:
    if arrays is None:
        return "digits"
    return "features" if data.holds_features(arrays) else "cifar10"
