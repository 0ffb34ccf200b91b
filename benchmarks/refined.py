"""Given labels, the evidence about them, and what each refiner makes of them; all computed once, when first needed."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters import Split
from adapters.lra_diffusion import named_encoder
from adapters.standard import InitialClassifier, initial_classifier
from benchmarks import data
from benchmarks.cifar import CIFAR
from benchmarks.config import as_list, for_noise
from benchmarks.evidence import Evidence
from benchmarks.folders import Folders, FolderTask
from benchmarks.pixels import read_resize
from benchmarks.records import Record, content_digest, digest, weights_used
from benchmarks.refiners import REFINERS
from benchmarks.task import Benchmark
from synth_refine import InputError
from synth_refine._io.atomic import file_hash
from synth_refine.images.embed import embed_cached
from synth_refine.images.encoders import ClipEncoder
from synth_refine.images.hashes import images_hash
from third_party.parallel import first_process_first, from_first


@dataclass(frozen=True)
class GivenLabels:
    """The labels that one group of runs starts from, and the seed of its random numbers."""

    noise: str  # a name of the config, or the stem of a label file
    path: Path | None  # the label file
    seed: int
    folder: Path  # of the records
    files: Mapping[str, Any]  # hashes, and the size that images are brought to


def given_labels(config: Mapping[str, Any], arguments: argparse.Namespace) -> list[GivenLabels]:
    """The noises and seeds of the command line, or else of the config."""
    noises: list[tuple[str, Path | None]] = [(path.stem, path) for path in arguments.given or ()]
    if arguments.noise:
        noises += [(name, None) for name in arguments.noise.split(",")]
    if not noises:
        default = "given" if arguments.data or arguments.images else "clean"
        noises = [(name, None) for name in (["given"] if arguments.data else as_list(config.get("noise", default)))]
    seeds = arguments.seeds if arguments.seeds is not None else as_list(config.get("seeds", 0))
    own = arguments.images.resolve().name if arguments.images else arguments.data.stem if arguments.data else None
    folder = arguments.out / (own or arguments.config.stem)
    if own is None and "dataset" not in config:
        raise InputError(f"dataset: expected a name in {arguments.config}, or --data or --images, got none")
    source: dict[str, Any] = {"data": _file_hash("data", arguments.data)}
    if arguments.images:
        source = {**folder_task(config, arguments).folders.digests, "pixels": config["pixels"]}
        source |= {"posterior": _file_hash("posterior", path)} if (path := config.get("posterior")) else {}
    elif not arguments.data:
        synthetic = arguments.synthetic
        if synthetic is None and config["dataset"] in CIFAR:
            synthetic = arguments.data_root / "synthetic" / config["dataset"]
        there = synthetic is not None and synthetic.exists()
        source = {"dataset": config["dataset"], "synthetic": content_digest(synthetic) if there else None}
    return [
        GivenLabels(noise, path, int(seed), folder, {**source, "given": _file_hash("given", path)})
        for noise, path in noises
        for seed in seeds
    ]


def run_settings(config: Mapping[str, Any], method: str, refiner: str) -> dict[str, Any]:
    """What the outcome of a run depends on, so that a changed setting is another record."""
    settings: dict[str, Any] = {"method": config["methods"].get(method) or {}, "refiner": {}}
    if refiner == "paper":
        settings["refiner"] = {key: config[key] for key in ("threshold", "weight") if key in config}
    if refiner != "none":
        settings["encoder"] = config.get("encoder", "classifier")
        if "encoder_weights" in config:
            settings["encoder_weights"] = config["encoder_weights"]
        settings["synthetic_per_class"] = config.get("synthetic_per_class")
    if refiner != "none" or method == "relabel":
        settings["initial"] = config.get("initial") or {}
    weights = {**weights_used(settings.get("initial", {})), **weights_used(settings["method"])}
    weights |= weights_used(config) if refiner != "none" else {}
    if weights:
        settings["weights_used"] = weights
    return settings


def _file_hash(argument: str, path: Path | str | None) -> str | None:
    if path is None:
        return None
    try:
        return file_hash(path)
    except OSError as error:
        raise InputError(f"{argument}: {path} cannot be read: {error.strerror}") from error


def load(labels: GivenLabels, config: Mapping[str, Any], arguments: argparse.Namespace) -> Benchmark:
    """The task of the command line, on the device, with as many synthetic images per class as the config says."""
    if arguments.images:
        return _on_device(folder_task(config, arguments).load(labels.noise, labels.path), config, arguments)
    benchmark = data.load(
        str(arguments.data) if arguments.data else config["dataset"],
        labels.noise,
        data_root=arguments.data_root,
        synthetic=arguments.synthetic,
        given=labels.path,
    )
    return _on_device(benchmark, config, arguments)


def folder_task(config: Mapping[str, Any], arguments: argparse.Namespace) -> FolderTask:
    """The task of `--images`; nothing is decoded yet."""
    flips, posterior = config.get("flips"), config.get("posterior")
    if flips is not None and not isinstance(flips, dict):
        raise InputError(f"flips: expected a block from class to class, got {flips!r}")
    return FolderTask(
        Folders(arguments.images, arguments.synthetic, arguments.classes),
        read_resize(config.get("pixels")),
        arguments.out / "pixels",
        flips,
        None if posterior is None else Path(posterior),
    )


def _on_device(benchmark: Benchmark, config: Mapping[str, Any], arguments: argparse.Namespace) -> Benchmark:
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
        self.work = given.folder / ".work"  # for what a killed run resumes from
        self._config, self._arguments = for_noise(config, given.noise), arguments
        self._labels: dict[str, tuple[Tensor, float]] = {}

    @cached_property
    def benchmark(self) -> Benchmark:
        """The task, on the device."""
        return load(self.given, self._config, self._arguments)

    @cached_property
    def initial(self) -> InitialClassifier:
        """The classifier trained on the given labels."""
        task, options = self.benchmark.task, self._config.get("initial") or {}
        splits = (task.train, task.noisy_validation, task.clean_validation)
        contents = [images_hash(part) for split in splits for part in (split.inputs, split.labels)]
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
            evidence, options = self.evidence, run_settings(self._config, "", refiner)["refiner"]
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
                "classifier, the name of a CLIP or timm:NAME for pixels"
                if task.is_pixels
                else "classifier or given for features"
            )
            raise InputError(f"encoder: expected {wanted}, got {encoder!r}")
        if encoder == "given":
            return task.train.inputs, task.synthetic.inputs, None
        frozen = named_encoder(encoder, self._config.get("encoder_weights", ""), task.train.inputs.device)
        with first_process_first():
            parts = [
                embed_cached(frozen, split.inputs, self.work / "encoded") for split in (task.train, task.synthetic)
            ]
        features, synthetic = parts
        texts = frozen.text_prototypes(self.benchmark.class_names) if isinstance(frozen, ClipEncoder) else None
        return features, synthetic, texts


def hard(labels: Tensor) -> Tensor:
    return labels.argmax(dim=1) if labels.ndim == 2 else labels


def wrong(labels: Tensor, truth: Tensor | None) -> float | None:
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
        "noise_before": wrong(given, truth),
        "noise_after": wrong(refined, truth),
    }
    if truth is not None:
        before, after = given == truth, refined == truth
        counts["wrong_to_right"] = int((~before & after).sum())
        counts["right_to_wrong"] = int((before & ~after).sum())
        counts["wrong_to_wrong"] = int((~before & ~after & (given != refined)).sum())
    return counts
