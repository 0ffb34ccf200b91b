"""LRA-diffusion behind one call, on features of a frozen encoder ("lra-clip") or of a SimCLR encoder ("lra-simclr")."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from adapters.base import Outcome, Split, Task
from adapters.network import NetworkOptions, build_network, channel_statistics, named_accuracies, resolve
from synth_refine import InputError
from synth_refine._io.atomic import write_atomic
from synth_refine._io.untrusted import read_npy
from synth_refine.images.embed import embed_cached
from synth_refine.images.encoders import Encoder, TorchEncoder, module_encoder, open_clip_encoder, timm_encoder
from synth_refine.images.hashes import images_hash
from synth_refine.images.weights import read_weights
from third_party import lra_diffusion, simclr
from third_party.loop import seeded
from third_party.lra_diffusion import Config, LabelDiffusion, Predict, is_due, nearest
from third_party.parallel import first_process_first, processes
from third_party.resnet import Classifier

GLYPH_CLIP = Path(__file__).resolve().parents[1] / "benchmarks" / "glyph_clip"
"""The project's own CLIP, for the digits."""


@dataclass(frozen=True)
class Options(Config):
    """The recipe, and where the frozen features come from."""

    preset: str = "paper"  # what the recipe's settings are unless they are given: "paper" or "released"
    width: int = 512  # of the denoiser and of the image embedding
    feature_size: float = 0.5  # root mean square that larger frozen features are scaled down to; 0: none are
    best_of_all: bool = True  # False: the last epoch, which is always measured, is a best one only if it is due
    cache: str = ""  # folder for features, neighbours and trained encoders; "" is beside the checkpoint


@dataclass(frozen=True)
class ClipOptions(Options):
    """For pixels: which frozen encoder; a task of features brings its own."""

    encoder: str = "glyph-clip"  # or a name or folder that open_clip knows, such as ViT-L-14-quickgelu, or timm:NAME
    weights: str = ""  # its tag, such as openai, or a file


@dataclass(frozen=True)
class SimclrOptions(Options):
    """Which SimCLR encoder."""

    weights: str = ""  # a file of weights, ours or a published one; "" trains one on training and validation images
    simclr: dict[str, Any] = field(default_factory=dict)  # settings of third_party.simclr.Config that differ


OptionsT = TypeVar("OptionsT", bound=Options)


def named_encoder(name: str, weights: str, device: torch.device) -> TorchEncoder:
    """The project's own CLIP, "glyph-clip", any other that open_clip knows, or a network of timm.

    Args:
        name: "glyph-clip", a name or folder that open_clip knows, such as ViT-L-14-quickgelu, or timm:NAME.
        weights: Their tag, such as openai, or a file; "" for glyph-clip, folders and timm's own.
        device: Where it runs.

    Raises:
        InputError: No such model, or its weights cannot be fetched or read.
    """
    kind, _, network = name.partition(":")
    if kind == "timm":
        return timm_encoder(network, weights or None, device=device)
    model = str(GLYPH_CLIP) if name == "glyph-clip" else name
    with seeded(torch.device("cpu"), 0):  # a model is built with random weights before its own are loaded
        return open_clip_encoder(model, weights or None, device=device)


def run_clip(
    task: Task, labels: Tensor, options: Mapping[str, Any], seed: int, checkpoint: Path | None = None
) -> Outcome:
    """Train LRA-diffusion on the features of a CLIP, or on the task's own where it has features instead of pixels.

    The options are those of `ClipOptions` and of the image encoder's network.
    """
    config, network = resolve("lra-clip", of_preset(ClipOptions, options), options)
    image_encoder = _image_encoder(task, config, network, seed)
    encoder: Encoder | None = None
    if task.is_pixels:
        encoder = named_encoder(config.encoder, config.weights, task.train.inputs.device)
    return _run(task, labels, config, network, image_encoder, encoder, seed, checkpoint)


def run_simclr(
    task: Task, labels: Tensor, options: Mapping[str, Any], seed: int, checkpoint: Path | None = None
) -> Outcome:
    """Train LRA-diffusion on the features of a SimCLR encoder, which is trained first if no weights are given.

    The options are those of `SimclrOptions` and of the image encoder's network.

    Raises:
        InputError: The task has no pixels.
    """
    config, network = resolve("lra-simclr", of_preset(SimclrOptions, options), options)
    if not task.is_pixels:
        raise InputError("lra-simclr: expected pixels, got features, from which no SimCLR encoder can be trained")
    image_encoder = _image_encoder(task, config, network, seed)
    recipe, _ = resolve("lra-simclr: simclr", simclr.Config(), config.simclr)
    validation = max(task.noisy_validation, task.clean_validation, key=lambda split: len(split.labels))
    images = [task.train.inputs, validation.inputs]  # it needs no label
    statistics = channel_statistics(images[0], network.statistics)
    with seeded(torch.device("cpu"), seed, 0):
        model = simclr.build(recipe, *statistics).to(images[0].device)
    weights = Path(config.weights) if config.weights else None
    if weights is None:
        about = f"{recipe} {statistics} {seed}"
        weights = _trained(model, images, recipe, about, seed, _cache(config, checkpoint))
    elif (published := simclr.from_published(read_weights(weights))) is not None:
        _load_published(model.encoder, published, weights)
        weights = None
    encoder = module_encoder("simclr", model.encoder, weights, normalise=True)
    return _run(task, labels, config, network, image_encoder, encoder, seed, checkpoint)


def _load_published(encoder: torch.nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Weights without the normalisation, which is the task's."""
    own = encoder.state_dict()
    try:
        encoder.load_state_dict({name: own[name] for name in ("mean", "std")} | dict(weights))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"weights: expected those of the encoder that `simclr` names in {path}: {reason}") from error


def _trained(
    model: simclr.SimCLR, images: list[Tensor], recipe: simclr.Config, about: str, seed: int, cache: Path | None
) -> Path | None:
    """Train the model, unless the cache has the weights that would come out; their file, if there is a cache."""
    if cache is None:
        if processes()[1] > 1:
            raise InputError("cache: expected a folder where several processes take one encoder from, got none")
        simclr.train(model, images, recipe, seed=seed)
        return None
    about = f"{[images_hash(part) for part in images]} {about}"
    weights = cache / f"simclr-{hashlib.sha256(about.encode()).hexdigest()[:32]}.safetensors"
    with first_process_first():
        if not weights.exists():
            partial = weights.with_suffix(".checkpoint")
            simclr.train(model, images, recipe, seed=seed, checkpoint=partial)
            simclr.export(model, weights)
            partial.unlink()
    return weights


def of_preset(kind: type[OptionsT], options: Mapping[str, Any]) -> OptionsT:
    """The defaults of the preset that the options name.

    Raises:
        InputError: An unknown preset.
    """
    preset = options.get("preset", "paper")
    if preset not in lra_diffusion.PRESETS:
        raise InputError(f"preset: expected {' or '.join(lra_diffusion.PRESETS)}, got {preset!r}")
    defaults = kind(**dataclasses.asdict(lra_diffusion.PRESETS[preset]))
    if preset == "released":
        defaults = dataclasses.replace(defaults, feature_size=0.0, best_of_all=False)
    return defaults


def _image_encoder(task: Task, config: Options, network: NetworkOptions, seed: int) -> Classifier:
    """The classifier of the other methods, its last layer as wide as the denoiser."""
    return build_network(dataclasses.replace(task, num_classes=config.width), network, seed)


def _cache(config: Options, checkpoint: Path | None) -> Path | None:
    if config.cache:
        return Path(config.cache)
    return None if checkpoint is None else checkpoint.parent / "encoded"


def _run(
    task: Task,
    labels: Tensor,
    config: Options,
    network: NetworkOptions,
    image_encoder: Classifier,
    encoder: Encoder | None,
    seed: int,
    checkpoint: Path | None,
) -> Outcome:
    if labels.ndim != 1:
        raise InputError(f"labels: LRA-diffusion draws among classes, expected (N,) int64, got {tuple(labels.shape)}")

    cache = _cache(config, checkpoint)

    def frozen(split: Split) -> Tensor:
        if encoder is None or len(split.inputs) == 0:
            return split.inputs.float()
        if cache is None:
            return encoder.embed(split.inputs)
        with first_process_first():
            return embed_cached(encoder, split.inputs, cache)

    features = frozen(task.train)
    neighbours = _neighbours(features, config, cache)
    # The first layer adds features and noisy labels up: beside large features the labels would not be seen.
    size = features.square().mean().sqrt()
    # Small ones stay: unit vectors of a thousand numbers are learnt worse once they are enlarged.
    factor = min(1.0, (config.feature_size / size).item()) if config.feature_size and size else 1.0
    features = features * factor
    with seeded(torch.device("cpu"), seed, 0, 2):
        model = LabelDiffusion(image_encoder.cpu(), task.num_classes, features.shape[1], config.width)
    measured = {
        name: (split, frozen(split) * factor)
        for name, split in (
            ("noisy_validation", task.noisy_validation),
            ("clean_validation", task.clean_validation),
            ("test", task.test),
        )
        if len(split.labels)
    }

    def measure(predict: Predict) -> dict[str, float]:
        predicted: dict[int, Tensor] = {}  # both validation sets are the same images: one pass for two figures
        figures = {}
        for name, (split, split_features) in measured.items():
            place = id(split.inputs)
            if place not in predicted:
                predicted[place] = predict(split.inputs, split_features)
            figures[name] = (predicted[place] == split.labels).double().mean().item()
        return figures

    result = lra_diffusion.train(
        model.to(task.train.inputs.device),
        task.train.inputs,
        features,
        labels,
        Config(**{setting.name: getattr(config, setting.name) for setting in dataclasses.fields(Config)}),
        measure=measure,
        seed=seed,
        neighbours=neighbours,
        checkpoint=checkpoint,
    )
    settings = dataclasses.asdict(config) | dataclasses.asdict(network)
    settings["frozen_encoder"] = "features of the task" if encoder is None else encoder.id
    epochs = [entry for entry in result.history if "test" in entry]
    chosen_of = [entry for entry in epochs if config.best_of_all or is_due(config, int(entry["epoch"]))]
    accuracies = named_accuracies(chosen_of) | {"last": epochs[-1]["test"]}
    return Outcome(accuracies, labels.clone(), result.history, settings)


def _neighbours(features: Tensor, config: Config, cache: Path | None) -> Tensor:
    """Neighbours from the cache where they lie; they depend on the features alone, never on labels."""
    if cache is None:
        return nearest(features, config.neighbours, exclude_self=config.exclude_self)
    key = f"{images_hash(features)} {config.neighbours} {config.exclude_self}"
    path = cache / f"neighbours-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    with first_process_first():
        if path.exists():
            return torch.from_numpy(np.array(read_npy("neighbours", path, "i"))).to(features.device)
        found = nearest(features, config.neighbours, exclude_self=config.exclude_self)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomic(path) as file:
            np.save(file, found.cpu().numpy(), allow_pickle=False)
    return found
