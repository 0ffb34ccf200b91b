"""Train noisy-label methods with and without refined labels, and print the table.

python benchmarks/run_combo.py --method plc
python benchmarks/run_combo.py --method standard,plc --refine none,paper,zero-shot --seeds 0,1,2 methods.plc.epochs=30
python benchmarks/run_combo.py --method plc --data arrays.npz --given labels.npy
torchrun --nproc_per_node 2 benchmarks/run_combo.py --method lra-clip
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

if not __package__:  # started by its path; "adapters" is also the name of a package on PyPI
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import yaml
from torch import Tensor, distributed

from adapters import ADAPTERS, SOFT_LABELS, Split, check_options
from adapters.lra_diffusion import named_clip
from adapters.standard import InitialClassifier, initial_classifier
from benchmarks import data
from benchmarks.records import (
    Record,
    content_digest,
    digest,
    environment,
    read_records,
    tensor_digest,
    weights_used,
    write_record,
)
from benchmarks.refiners import REFINERS, SOFT_REFINERS, Evidence
from benchmarks.table import table
from synth_refine import InputError
from synth_refine._io.atomic import file_hash
from synth_refine.images.embed import embed_cached
from third_party.parallel import first_process_first, from_first, processes

CONFIGS = Path(__file__).parent / "configs"
KEYS = {
    "dataset",
    "noise",
    "encoder",
    "encoder_weights",
    "synthetic_per_class",
    "refiners",
    "threshold",
    "weight",
    "initial",
    "methods",
    "seeds",
}


@dataclass(frozen=True)
class GivenLabels:
    """The labels that one group of runs starts from, and the seed of its random numbers."""

    noise: str  # a name of the config, or the stem of a label file
    path: Path | None  # the label file
    seed: int
    folder: Path  # of the records
    files: Mapping[str, str | None]  # hashes


@dataclass(frozen=True)
class Run:
    """One method on one refiner's labels."""

    labels: GivenLabels
    method: str
    refiner: str
    settings: Mapping[str, Any]  # what the outcome depends on besides
    path: Path  # of its record


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML config and put `key=value` overrides into it; dots lead into a block.

    Raises:
        InputError: No such file, no mapping, an unknown key, or an override without "=".
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"config: expected a YAML file, {path} cannot be read: {reason}") from error
    if not isinstance(config, dict):
        raise InputError(f"config: expected a mapping in {path}, got {type(config).__name__}")
    config = copy.deepcopy(config)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"override: expected key=value, got {override!r}")
        *blocks, last = key.split(".")
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
    unknown = sorted(set(config) - KEYS)
    if unknown:
        raise InputError(f"config: expected the keys {', '.join(sorted(KEYS))}, got {unknown[0]!r} in {path}")
    config.setdefault("methods", {})
    _check_types(config)
    return config


def _check_types(config: Mapping[str, Any]) -> None:
    """Refuse values that would only fail in the middle of a run."""
    blocks = {"methods": config["methods"], "initial": config.get("initial") or {}}
    if isinstance(config["methods"], dict):
        blocks |= {f"methods.{name}": block or {} for name, block in config["methods"].items()}
    for name, block in blocks.items():
        if not isinstance(block, dict):
            raise InputError(f"{name}: expected a block of settings, got {block!r}")
    for name, kinds in {"threshold": (int, float), "weight": (int, float), "synthetic_per_class": (int,)}.items():
        if name in config and not isinstance(config[name], kinds):
            raise InputError(f"{name}: expected a number, got {config[name]!r}")
    weight = config.get("weight", 0.5)
    if not 0 <= weight <= 1:
        raise InputError(f"weight: expected a number in [0, 1], got {weight}")
    threshold = config.get("threshold", 0)
    if not -weight <= threshold <= 1:
        raise InputError(f"threshold: expected a score, in [{-weight:g}, 1] at weight {weight:g}, got {threshold}")
    for seed in _list(config.get("seeds", 0)):
        if not isinstance(seed, int) or seed < 0:
            raise InputError(f"seeds: expected integers from 0, got {seed!r}")


def plan(config: Mapping[str, Any], arguments: argparse.Namespace) -> list[Run]:
    """Every run that the command line asks for, checked before any of them starts.

    Raises:
        InputError: An unknown method or refiner, or soft labels for a method that takes none.
        TypeError: An unknown option of a method.
    """
    methods = _names("method", arguments.method, list(config["methods"]), ADAPTERS)
    refiners = _names("refine", arguments.refine, config.get("refiners", ["none", "paper"]), REFINERS)
    for method in config["methods"]:
        if method not in ADAPTERS:
            raise InputError(f"methods: expected settings of {', '.join(ADAPTERS)}, got {method!r}")
    for method in methods:
        if method not in config["methods"]:
            raise InputError(
                f"method: expected a block of settings at methods.{method} in {arguments.config}, got none"
            )
        check_options(method, config["methods"][method] or {})
        for refiner in set(refiners) & SOFT_REFINERS:
            if method not in SOFT_LABELS:
                takers = ", ".join(sorted(SOFT_LABELS))
                raise InputError(f"refine: {refiner} gives soft labels, which {takers} take and {method} does not")
    check_options("initial", config.get("initial") or {})
    runs = []
    for labels in given_labels(config, arguments):
        for method in methods:
            for refiner in refiners:
                settings = {**_settings(config, method, refiner), **labels.files}
                name = f"{labels.noise}_{method}_{refiner}_seed{labels.seed}_{digest(settings)}.json"
                runs.append(Run(labels, method, refiner, settings, labels.folder / name))
    return runs


def given_labels(config: Mapping[str, Any], arguments: argparse.Namespace) -> list[GivenLabels]:
    """The noises and seeds of the command line, or else of the config."""
    noises: list[tuple[str, Path | None]] = [(path.stem, path) for path in arguments.given or ()]
    if not noises:
        noises = [(name, None) for name in (["given"] if arguments.data else _list(config.get("noise", "clean")))]
    seeds = arguments.seeds if arguments.seeds is not None else _list(config.get("seeds", 0))
    folder = arguments.out / (arguments.data.stem if arguments.data else arguments.config.stem)
    if not arguments.data and "dataset" not in config:
        raise InputError(f"dataset: expected a name in {arguments.config}, or --data, got neither")
    source: dict[str, str | None] = {"data": _file_hash("data", arguments.data)}
    if not arguments.data:
        synthetic = arguments.synthetic
        if synthetic is None and config["dataset"] in data.CIFAR:
            synthetic = arguments.data_root / "synthetic" / config["dataset"]
        there = synthetic is not None and synthetic.exists()
        source = {"dataset": config["dataset"], "synthetic": content_digest(synthetic) if there else None}
    return [
        GivenLabels(noise, path, int(seed), folder, {**source, "given": _file_hash("given", path)})
        for noise, path in noises
        for seed in seeds
    ]


def _settings(config: Mapping[str, Any], method: str, refiner: str) -> dict[str, Any]:
    """What the outcome of a run depends on, so that a changed setting is another record."""
    settings: dict[str, Any] = {"method": config["methods"].get(method) or {}, "refiner": {}}
    if refiner == "paper":
        settings["refiner"] = {key: config[key] for key in ("threshold", "weight") if key in config}
    if refiner != "none":
        settings["encoder"] = config.get("encoder", "classifier")
        if "encoder_weights" in config:
            settings["encoder_weights"] = config["encoder_weights"]
        settings["synthetic_per_class"] = config.get("synthetic_per_class")
    weights = {**weights_used(settings["method"]), **(weights_used(config) if refiner != "none" else {})}
    if weights:
        settings["weights_used"] = weights
    if refiner != "none" or method == "relabel":
        settings["initial"] = config.get("initial") or {}
    return settings


def _file_hash(argument: str, path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return file_hash(path)
    except OSError as error:
        raise InputError(f"{argument}: {path} cannot be read: {error.strerror}") from error


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _names(argument: str, asked: str | None, default: list[str], known: Mapping[str, object]) -> list[str]:
    names = asked.split(",") if asked else default
    for name in names:
        if name not in known:
            raise InputError(f"{argument}: expected one of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(names))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started; without it there is nothing to join."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The others wait while the first one embeds images or trains a SimCLR encoder; torchrun ends all when one fails.
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        distributed.destroy_process_group()


def execute(runs: Sequence[Run], config: Mapping[str, Any], arguments: argparse.Namespace) -> Iterator[Record]:
    """Yield the record of every run, in order; those that have one are not run again."""
    refined: Refined | None = None
    for run in runs:
        if from_first(torch.tensor(run.path.exists(), device=arguments.device)):
            yield from read_records([run.path])
            continue
        if refined is None or refined.given != run.labels:
            refined = Refined(run.labels, config, arguments)
        yield _execute_one(run, refined, arguments.device)


def load(labels: GivenLabels, config: Mapping[str, Any], arguments: argparse.Namespace) -> data.Benchmark:
    """The task of the command line, on the device, with as many synthetic images per class as the config says."""
    benchmark = data.load(
        str(arguments.data) if arguments.data else config["dataset"],
        labels.noise,
        data_root=arguments.data_root,
        synthetic=arguments.synthetic,
        given=labels.path,
    )
    device = torch.device(arguments.device)
    task, truth = benchmark.task, benchmark.true_labels
    if config.get("synthetic_per_class") is not None:
        task = dataclasses.replace(task, synthetic=first_per_class(task.synthetic, config["synthetic_per_class"]))
    return dataclasses.replace(benchmark, task=task.to(device), true_labels=None if truth is None else truth.to(device))


def first_per_class(split: Split, count: int) -> Split:
    """The first `count` rows of every class, in their order."""
    ranks = torch.zeros_like(split.labels)
    for label in range(int(split.labels.max()) + 1):
        rows = split.labels == label
        ranks[rows] = torch.arange(int(rows.sum()), device=ranks.device)
    keep = ranks < count
    return Split(split.inputs[keep], split.labels[keep])


class Refined:
    """Refined labels of one task and seed; the initial classifier and each refiner run once, when first asked for."""

    def __init__(self, given: GivenLabels, config: Mapping[str, Any], arguments: argparse.Namespace) -> None:
        """Remember what to work on."""
        self.given = given
        self.work = given.folder / ".work"  # for what a killed run goes on from
        self._config, self._arguments = config, arguments
        self._labels: dict[str, tuple[Tensor, float]] = {}

    @cached_property
    def benchmark(self) -> data.Benchmark:
        """The task, on the device."""
        return load(self.given, self._config, self._arguments)

    @cached_property
    def initial(self) -> InitialClassifier:
        """The classifier trained on the given labels."""
        task, options = self.benchmark.task, self._config.get("initial") or {}
        splits = (task.train, task.noisy_validation, task.clean_validation)
        contents = [tensor_digest(part) for split in splits for part in (split.inputs, split.labels)]
        name = digest([*contents, self.given.seed, options])
        return initial_classifier(task, options, self.given.seed, self.work / f"initial_{name}.safetensors")

    @cached_property
    def evidence(self) -> Evidence:
        """What refiners look at."""
        task = self.benchmark.task
        features, synthetic, text_prototypes = self._embeddings()
        return Evidence(
            features,
            self.initial.train_logits,
            task.train.labels,
            synthetic,
            task.synthetic.labels,
            task.num_classes,
            self.given.seed,
            text_prototypes,
            two_views=self._config.get("encoder", "classifier") not in ("classifier", "given"),
        )

    def labels(self, refiner: str) -> tuple[Tensor, float]:
        """A refiner's labels and the seconds it took, without the initial classifier's training."""
        if refiner == "none":
            return self.benchmark.task.train.labels, 0.0
        if refiner not in self._labels:
            evidence, options = self.evidence, _settings(self._config, "", refiner)["refiner"]
            start = time.perf_counter()
            labels = from_first(REFINERS[refiner](evidence, **options))
            self._labels[refiner] = labels, time.perf_counter() - start
        return self._labels[refiner]

    def _embeddings(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features of training and synthetic images by the config's encoder, and its text prototypes if it reads."""
        encoder, task = self._config.get("encoder", "classifier"), self.benchmark.task
        if encoder == "classifier":
            return self.initial.train_features, self.initial.synthetic_features, None
        if task.is_pixels == (encoder == "given"):
            wanted = (
                "classifier or the name of a CLIP for pixels" if task.is_pixels else "classifier or given for features"
            )
            raise InputError(f"encoder: expected {wanted}, got {encoder!r}")
        if encoder == "given":
            return task.train.inputs, task.synthetic.inputs, None
        clip = named_clip(encoder, self._config.get("encoder_weights", ""), task.train.inputs.device)
        with first_process_first():
            parts = [embed_cached(clip, split.inputs, self.work) for split in (task.train, task.synthetic)]
        features, synthetic = parts
        return features, synthetic, clip.text_prototypes(self.benchmark.class_names)


def _execute_one(run: Run, refined: Refined, device: str) -> Record:
    benchmark = refined.benchmark
    task = benchmark.task
    labels, refine_seconds = refined.labels(run.refiner)
    if run.method == "relabel":
        task = dataclasses.replace(task, initial=refined.initial.weights)
    rank, count = processes()
    checkpoint: Path | None = refined.work / f"{run.path.stem}.safetensors"
    if run.method == "plc" and count > 1:  # its window is spread over the processes
        checkpoint = None
    start = time.perf_counter()
    outcome = ADAPTERS[run.method](task, labels, run.settings["method"], run.labels.seed, checkpoint)
    train_seconds = time.perf_counter() - start
    record: Record = {
        "config": run.path.parent.name,
        "dataset": benchmark.name,
        "noise": benchmark.noise_name,
        "method": run.method,
        "refiner": run.refiner,
        "seed": run.labels.seed,
        "settings": {**run.settings, "method": outcome.settings},
        "settings_digest": digest(run.settings),
        "environment": environment(torch.device(device)),
        "refine_seconds": refine_seconds,
        "train_seconds": train_seconds,
        "labels": flows(task.train.labels, _hard(labels), benchmark.true_labels),
        "wrong_after_training": _wrong(outcome.labels, benchmark.true_labels),
        "test_accuracy": outcome.test_accuracy,
        "history": outcome.history,
    }
    if count > 1:
        torch.distributed.barrier()  # all have read the checkpoint that the first is about to remove
    if rank > 0:
        return record
    try:
        write_record(run.path, record)
    except FileExistsError:  # another process with the same command was faster
        [record] = read_records([run.path])
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return record


def _hard(labels: Tensor) -> Tensor:
    return labels.argmax(dim=1) if labels.ndim == 2 else labels


def _wrong(labels: Tensor, truth: Tensor | None) -> float | None:
    """Fraction of wrong labels; None where nobody knows."""
    return None if truth is None else (labels.to(truth.device) != truth).double().mean().item()


def flows(given: Tensor, refined: Tensor, truth: Tensor | None) -> Record:
    """How many labels a refiner changed, and which way.

    Example:
        >>> flows(*(torch.tensor(row) for row in ([0, 1, 1, 2], [0, 0, 2, 1], [0, 0, 1, 0])))["wrong_to_right"]
        1
    """
    counts: Record = {
        "images": len(given),
        "changed": int((given != refined).sum()),
        "noise_before": _wrong(given, truth),
        "noise_after": _wrong(refined, truth),
    }
    if truth is not None:
        before, after = given == truth, refined == truth
        counts["wrong_to_right"] = int((~before & after).sum())
        counts["right_to_wrong"] = int((before & ~after).sum())
        counts["wrong_to_wrong"] = int((~before & ~after & (given != refined)).sum())
    return counts


def add_common(parser: argparse.ArgumentParser) -> None:
    """The arguments that this script shares with run_ablation.py."""
    add = parser.add_argument
    add("--config", type=Path, help="YAML file; default: digits.yaml, with --data features.yaml or cifar10.yaml")
    add("--data", type=Path, help="your arrays, an .npz file: train, train_labels, test, test_labels, synthetic, ...")
    add("--given", type=Path, action="append", help="noisy labels of the first training rows; may be repeated")
    add("--data-root", type=Path, default=Path("data"), help="folder of CIFAR's files (default: %(default)s)")
    add("--synthetic", type=Path, help="folder with one folder of synthetic images per class, for CIFAR")
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
    if arguments.config is None:
        arguments.config = CONFIGS / f"{_default_config(arguments.data)}.yaml"
    return read_config(arguments.config, arguments.overrides)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", help=f"comma-separated: {', '.join(ADAPTERS)}; default: all of the config")
    add("--refine", help=f"comma-separated: {', '.join(REFINERS)}; default: those of the config")
    add_common(parser)
    add("--json", action="store_true", help="print the records instead of the table")
    add("--dry-run", action="store_true", help="list the runs and do nothing")
    return parser.parse_args(arguments)


def _default_config(arrays: Path | None) -> str:
    if arrays is None:
        return "digits"
    return "features" if data.holds_features(arrays) else "cifar10"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Exit code 0 when all is done, 3 for bad input, 130 when stopped by Ctrl-C."""
    options = _parse(arguments)
    try:
        config = resolve_config(options)
        runs = plan(config, options)
    except (InputError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    if options.dry_run:
        for run in runs:
            print(f"{'done ' if run.path.exists() else 'to do'}  {run.path}")
        return 0
    records = []
    try:
        with process_group(torch.device(options.device)):
            first = processes()[0] == 0
            for run, record in zip(runs, execute(runs, config, options), strict=True):
                records.append(record)
                accuracy = ", ".join(f"{choice} {value:.2%}" for choice, value in record["test_accuracy"].items())
                name = f"{run.labels.noise} {run.method} {run.refiner} seed {run.labels.seed}"
                if first:
                    print(f"{name}: {accuracy}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    if first:
        print(json.dumps(records, indent=1) if options.json else table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
