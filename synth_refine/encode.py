"""Frozen encoders behind one protocol, and their features on disk.

An encoder maps images to features and has an `id` that changes with its weights and its preprocessing. `embed_cached`
keeps features under that id and the hash of the images, so that what is read is never stale, and goes on where an
interrupted run stopped. Weights from files are read without unpickling: safetensors, or torch's weights-only reader.

Letters in shapes: N images, H x W pixels, D features, C classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from synth_refine._check import InputError, check_array
from synth_refine.files import file_hash, open_plain, read_npy, what_is, write_atomic

TEMPLATES = ("A photo of {}.", "a photo of a {}.", "a picture of a {}.", "a blurry photo of a {}.")
"""Prompts that text prototypes are averaged over; {} is the class name."""

SHARD_ROWS = 4096
CONNECT_SECONDS = 5  # until the hub counts as unreachable
UNREACHABLE = "not in the cache, and the hub cannot be reached"


class Encoder(Protocol):
    """Anything that turns images into features."""

    @property
    def id(self) -> str:
        """Changes whenever the weights or the preprocessing do."""

    def embed(self, images: Tensor) -> Tensor:
        """Features, (N, D) float32, of images, (N, 3, H, W) uint8."""


@dataclass(frozen=True)
class Preprocess:
    """What happens to uint8 images before the network sees them.

    Attributes:
        size: Height and width that the network wants; None leaves the images as they are.
        crop: Keep the proportions, shrinking the shorter side to `size` and cutting the centre out; False squeezes.
        mean: Of each channel, for pixels in [0, 1].
        std: Likewise.
        interpolation: "bicubic" or "bilinear", antialiased.
    """

    size: tuple[int, int] | None = None
    crop: bool = True
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    interpolation: str = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) uint8 to (N, 3, *size) float32.

        Example:
            >>> Preprocess(size=(2, 2))(torch.full((1, 3, 4, 8), 255, dtype=torch.uint8))[0, 0]
            tensor([[1., 1.],
                    [1., 1.]])
        """
        pixels = images.float() / 255
        if self.size is not None and self.size != tuple(pixels.shape[2:]):
            height, width = self.size
            target = self.size
            if self.crop:  # the longer side is rounded down, as in torchvision's Resize
                scale = max(height / pixels.shape[2], width / pixels.shape[3])
                target = (max(height, int(pixels.shape[2] * scale)), max(width, int(pixels.shape[3] * scale)))
            pixels = F.interpolate(pixels, target, mode=self.interpolation, antialias=True, align_corners=False)
            top, left = round((target[0] - height) / 2), round((target[1] - width) / 2)
            pixels = pixels[:, :, top : top + height, left : left + width].clamp(0, 1)
        mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


class TorchEncoder:
    """A network in evaluation mode behind the protocol.

    Args:
        name: For messages and progress; part of the id.
        module: Called on preprocessed images unless it has a method `features` or `encode_image`, which comes first.
        preprocess: What the module expects; None hands it the uint8 images, for networks that normalise themselves.
        normalise: Scale every feature vector to unit length.
        batch_size: Images per forward pass.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        preprocess: Preprocess | None,
        *,
        normalise: bool = False,
        batch_size: int = 256,
    ) -> None:
        self.name, self.module, self.preprocess = name, module.eval().requires_grad_(False), preprocess
        self.normalise, self.batch_size = normalise, batch_size
        self._forward: Any = getattr(module, "encode_image", None) or getattr(module, "features", None) or module

    @property
    def id(self) -> str:
        """SHA-256 of the name, the preprocessing and every weight."""
        preprocess = None if self.preprocess is None else asdict(self.preprocess)
        about = [self.name, type(self.module).__name__, preprocess, self.normalise]
        digest = hashlib.sha256(json.dumps(about).encode())
        for name, value in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Features, batch by batch.

        Args:
            images: (N, 3, H, W) uint8, on any device.

        Returns:
            (N, D) float32, on the device of `images`.

        Raises:
            InputError: Not such images, or features that are no finite (N, D).
        """
        check_images(images)
        if len(images) == 0:
            raise InputError("images: expected at least one, got none")
        state = [*self.module.parameters(), *self.module.buffers()]
        device = state[0].device if state else images.device
        parts = []
        single = len(images) <= self.batch_size  # whoever embeds batch by batch has a bar already
        for batch in tqdm(torch.split(images, self.batch_size), self.name, disable=single or None, leave=False):
            pixels = batch.to(device)
            features = self._forward(pixels if self.preprocess is None else self.preprocess(pixels)).float()
            if features.ndim != 2 or not bool(features.isfinite().all()):
                what = "NaN or infinity" if features.ndim == 2 else f"shape {tuple(features.shape)}"
                raise InputError(f"encoder: expected finite features (N, D) from {self.name}, got {what}")
            parts.append((F.normalize(features, dim=1) if self.normalise else features).to(images.device))
        return torch.cat(parts)


class ClipEncoder(TorchEncoder):
    """A CLIP, whose text tower names the classes. Features are not normalised."""

    def __init__(self, name: str, module: nn.Module, preprocess: Preprocess, tokenizer: Any) -> None:
        """Wrap a model of open_clip; see `open_clip_encoder`."""
        super().__init__(name, module, preprocess)
        self.tokenizer = tokenizer

    @torch.no_grad()
    def text_prototypes(self, class_names: Sequence[str], templates: Iterable[str] = TEMPLATES) -> Tensor:
        """One unit vector per class: the mean direction of its prompts, (C, D), on the device of the model."""
        templates = tuple(templates)
        for template in templates:
            if "{}" not in template:
                raise InputError(f"templates: expected {{}} where the class name goes, got {template!r}")
        if not class_names or not templates:
            raise InputError("class_names, templates: expected at least one of each")
        device = next(self.module.parameters()).device
        encode: Any = self.module.encode_text
        rows = []
        for name in class_names:
            tokens = self.tokenizer([template.format(name) for template in templates]).to(device)
            rows.append(F.normalize(encode(tokens).float(), dim=1).mean(dim=0))
        return F.normalize(torch.stack(rows), dim=1)


def check_images(images: object) -> None:
    """Refuse what is no (N, 3, H, W) uint8 tensor."""
    check_array("images", images, ("N", 3, "H", "W"))
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise InputError(f"images: expected a torch tensor of uint8, got {getattr(images, 'dtype', type(images))}")


# ---- encoders ----


def module_encoder(
    name: str, module: nn.Module, weights: Path | str | None = None, *, normalise: bool = False
) -> TorchEncoder:
    """A trained network that normalises its input itself: a classifier's pooled features, a SimCLR encoder.

    Args:
        name: For messages; part of the id.
        module: Maps (N, 3, H, W) uint8 to features by its method `features`, or when called.
        weights: File of weights to load into it; None keeps what it has.
        normalise: Scale every feature vector to unit length, as SimCLR's features are compared.

    Raises:
        InputError: The file cannot be read safely or does not fit.
    """
    if weights is not None:
        load_weights(module, weights)
    return TorchEncoder(name, module, None, normalise=normalise)


def open_clip_encoder(
    model: str, weights: Path | str | None = None, *, device: torch.device | str = "cpu"
) -> ClipEncoder:
    """Any model of open_clip.

    Args:
        model: A name that open_clip knows, such as "ViT-L-14", "hf-hub:organisation/name", or a local folder with
            open_clip_config.json and weights, with or without "local-dir:" in front.
        weights: A tag of open_clip's, such as "openai", which may be downloaded, or a local file of weights. None is
            for folders and hub names, which have their own.
        device: Where it computes.

    Raises:
        InputError: No such model, weights that are neither there nor to be fetched, or that do not fit.
    """
    try:
        import open_clip  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("CLIP encoders need open_clip: pip install open_clip_torch") from error
    folder = Path(model.removeprefix("local-dir:"))
    is_folder = model.startswith("local-dir:") or (folder / "open_clip_config.json").is_file()
    name = f"local-dir:{folder}" if is_folder else model
    file = Path(weights) if weights is not None and Path(weights).exists() else None
    if is_folder and file is None:
        file = _weights_in(folder)
    if file is None and weights is None and not model.startswith("hf-hub:"):
        raise InputError(f"weights: expected a tag or a file for {model!r}, got none")
    try:
        with hub_or_cache(model.startswith("hf-hub:") or (file is None and not is_folder)):
            network = open_clip.create_model(
                name,
                None if file or is_folder else weights,
                load_weights=file is None,
                require_pretrained=file is None,
                weights_only=True,
                device="cpu",
            )
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # a hub client may raise anything
        raise InputError(_unfetched(model, weights, error)) from error
    if file is not None:
        load_weights(network, file, open_clip.load_checkpoint)
    settings = open_clip.get_model_preprocess_cfg(network)
    size = settings.get("size", 224)
    if settings.get("resize_mode", "shortest") not in ("shortest", "squash"):
        raise InputError(f"model: {model!r} pads its images, which is not supported")
    preprocess = Preprocess(
        (size, size) if isinstance(size, int) else (size[0], size[1]),
        settings.get("resize_mode", "shortest") == "shortest",
        tuple(settings["mean"]),
        tuple(settings["std"]),
        "bilinear" if settings.get("interpolation") == "bilinear" else "bicubic",
    )
    label = folder.name if is_folder else f"{model} {weights if file is None else file.name}"
    return ClipEncoder(label, network.to(device), preprocess, tokenizer)


def timm_encoder(model: str, weights: Path | str | None = None, *, device: torch.device | str = "cpu") -> TorchEncoder:
    """The pooled features of any model of timm, with the preprocessing that its weights were made for.

    Args:
        model: A name that timm knows, such as "resnet50.a1_in1k".
        weights: A local file of weights; None takes those that belong to the name, which may be downloaded.
        device: Where it computes.

    Raises:
        InputError: No such model, weights that are neither there nor to be fetched, or that do not fit.
    """
    try:
        import timm
        from timm.data.config import resolve_data_config
    except ImportError as error:
        raise ImportError("timm encoders need timm: pip install timm") from error
    try:
        with hub_or_cache(weights is None):
            network = timm.create_model(model, pretrained=weights is None, num_classes=0)
    except Exception as error:
        raise InputError(_unfetched(model, weights, error)) from error
    if weights is not None:
        wanted = set(network.state_dict())
        load_weights(network, weights, keep=wanted)
    settings = resolve_data_config({}, model=network)  # type: ignore[no-untyped-call]
    preprocess = Preprocess(
        tuple(settings["input_size"][1:]),
        settings["crop_mode"] != "squash",
        tuple(settings["mean"]),
        tuple(settings["std"]),
        "bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
    )
    return TorchEncoder(model, network.to(device), preprocess)


def encoder_by_name(name: str, weights: Path | str | None = None, *, device: torch.device | str = "cpu") -> Encoder:
    """An encoder from one text, as command lines and configs have it.

    Args:
        name: "open_clip:MODEL" or "open_clip:MODEL/TAG", such as "open_clip:ViT-L-14/openai"; "timm:MODEL"; or a
            local folder with open_clip_config.json and weights, such as benchmarks/glyph_clip.
        weights: A local file of weights for the model.
        device: Where it computes.

    Raises:
        InputError: No such encoder, or its weights are neither there nor to be fetched.
    """
    kind, _, model = name.partition(":")
    if kind == "timm" and model:
        return timm_encoder(model, weights, device=device)
    if kind == "open_clip" and model:
        model, _, tag = (model, "", "") if model.startswith("hf-hub:") else model.partition("/")
        return open_clip_encoder(model, weights if weights is not None else tag or None, device=device)
    if not (Path(name) / "open_clip_config.json").is_file():
        raise InputError(
            f"encoder: expected open_clip:MODEL/TAG, timm:MODEL or a folder with open_clip_config.json, got {name!r}"
        )
    return open_clip_encoder(name, weights, device=device)


# ---- weights ----


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a file that torch's weights-only reader takes.

    Args:
        path: A state dict, or a training checkpoint with one under "state_dict" or "model"; "module." in front of every
            name is dropped.

    Raises:
        InputError: Missing, truncated, damaged, a pickle that asks for more than tensors, or not finite.
    """
    with open_plain("weights", path) as file:
        head = file.read(512)
    is_torch = head.startswith(b"PK\x03\x04")
    is_safetensors = head[8:9] == b"{"  # behind the header's length, which may look like the beginning of anything
    kind = None if is_torch or is_safetensors else what_is(head)
    if kind is not None:
        raise InputError(f"weights: expected safetensors or a torch state dict, but {path} is {kind}")
    try:
        content: Any = torch.load(path, "cpu", weights_only=True) if is_torch else load_file(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(f"weights: {path} cannot be read safely as weights: {_first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"weights: expected a dict of tensors in {path}")
    for name, value in content.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"weights: {name} in {path} holds NaN or infinity")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    weights: dict[str, Tensor] = content
    return weights


def load_weights(module: nn.Module, path: Path | str, loader: Any = None, keep: set[str] | None = None) -> None:
    """Put the weights of a file into a network; every name and shape must fit.

    Args:
        module: The network.
        path: See `read_weights`, which looks at the file first in any case.
        loader: open_clip's loader, which knows other names for the same weights; called as loader(module, path).
        keep: Names to take from the file, which may hold more, such as the head of a classifier.

    Raises:
        InputError: As `read_weights`, or the weights belong to another network.
    """
    weights = read_weights(path)
    try:
        if loader is not None:
            loader(module, str(path), weights_only=True)
        else:
            module.load_state_dict({name: value for name, value in weights.items() if keep is None or name in keep})
    except Exception as error:  # conversions of foreign names may fail in any way
        raise InputError(f"weights: {path} does not fit {type(module).__name__}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first concrete complaint of torch's long message about weights that do not fit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 and lines[0].startswith("Error") else _first_line(error))[:200]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _weights_in(folder: Path) -> Path:
    """The weights of a local open_clip folder."""
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"model: expected open_clip_model.safetensors beside open_clip_config.json in {folder}")


@contextmanager
def hub_or_cache(asked: bool) -> Iterator[None]:
    """Let a library load from the Hugging Face hub, or from the cache alone where the hub cannot be reached.

    It would try for a minute, with a warning for every attempt; those are kept away, and those about "no weights" for
    weights that are loaded a line later. What goes wrong is raised in any case.

    Args:
        asked: Whether it may have to ask the hub.
    """
    from huggingface_hub import constants

    loggers = [logging.getLogger(name) for name in ("", "huggingface_hub", "diffusers")]
    before = [logger.level for logger in loggers], constants.HF_HUB_OFFLINE
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        # The same as the environment variable of this name, which is read once, before anybody can know.
        constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or (asked and not _hub_answers())
        yield
    finally:
        levels, constants.HF_HUB_OFFLINE = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _hub_answers() -> bool:
    """Whether there is a way to the hub; any answer of it will do."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except Exception:  # a name that is not known, no route, no answer in time, no trust, depending on the client
        return False
    return True


def not_in_cache(error: BaseException | None) -> bool:
    """Whether something failed because it is not in the cache and the hub was not, or could not be, asked."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        error = error.__cause__ or error.__context__
    return False


def _unfetched(model: str, weights: object, error: Exception) -> str:
    """What to give where weights could not be had."""
    source = model
    try:
        from open_clip.pretrained import get_pretrained_cfg  # type: ignore[import-untyped]

        source = get_pretrained_cfg(model, str(weights)).get("hf_hub", "").rstrip("/") or model
    except ImportError:
        pass
    tag = f" ({weights})" if weights is not None else ""
    why = UNREACHABLE if not_in_cache(error) else _first_line(error)
    return (
        f"weights: those of {model}{tag} cannot be had here: {why}; fetch the safetensors file of {source} from the "
        f"Hugging Face hub elsewhere and give its path as `weights`, or name a local folder as the encoder"
    )


# ---- features on disk ----


def images_hash(images: Tensor) -> str:
    """SHA-256 of the shape, the type and every byte of a tensor."""
    digest = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    for part in torch.split(images, SHARD_ROWS):
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def embed_cached(encoder: Encoder, images: Tensor, folder: Path | str, *, shard_rows: int = SHARD_ROWS) -> Tensor:
    """Features from disk, computed and kept where they are missing.

    They lie in a folder named by the encoder's id and the images' hash, in shards that are written whole or not at all
    and listed with their checksums. So another encoder or other images never meet features that are not theirs, an
    interrupted run goes on behind the last shard, and a damaged shard is computed again.

    Args:
        encoder: The encoder.
        images: (N, 3, H, W) uint8.
        folder: Where the features of all encoders are kept; made if it is missing.
        shard_rows: Images per shard.

    Returns:
        (N, D) float32, on the device of `images`.

    Raises:
        InputError: As the encoder's `embed`.
    """
    check_images(images)
    if shard_rows < 1:
        raise InputError(f"shard_rows: expected 1 or more, got {shard_rows}")
    about = {"encoder": encoder.id, "images": images_hash(images), "shard_rows": shard_rows}
    parts = torch.split(images, shard_rows)

    def compute(missing: list[int]) -> Iterator[tuple[int, Tensor]]:
        for number in tqdm(missing, "embedding", disable=None, leave=False):
            yield number, encoder.embed(parts[number]).cpu()

    return kept_shards(folder, about, [len(part) for part in parts], compute).to(images.device)


def kept_shards(
    folder: Path | str | os.PathLike[str],
    about: dict[str, Any],
    counts: Sequence[int],
    compute: Callable[[list[int]], Iterator[tuple[int, Tensor]]],
) -> Tensor:
    """Features from the shards on disk; what is missing there or damaged is computed and kept.

    Args:
        folder: Where the features of all encoders and images are kept; made if it is missing.
        about: All that the features depend on, as JSON takes it; it names their folder.
        counts: Rows of each shard.
        compute: Gives the features of the shards of these numbers, with the number of each, in any order.

    Returns:
        The features of all shards, (N, D) float32, on the CPU.

    Raises:
        RuntimeError: A shard did not come.
    """
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    place = Path(folder) / f"features-{key}"
    place.mkdir(parents=True, exist_ok=True)
    listed = _listed(place / "manifest.json", about)
    names = [f"shard-{number:05d}.npy" for number in range(len(counts))]
    found = [_shard(place / name, listed.get(name), rows) for name, rows in zip(names, counts, strict=True)]
    missing = [number for number, features in enumerate(found) if features is None]
    for number, features in compute(missing):
        with write_atomic(place / names[number]) as file:
            np.save(file, features.numpy(), allow_pickle=False)
        listed[names[number]] = file_hash(place / names[number])
        with write_atomic(place / "manifest.json") as file:
            file.write(json.dumps({**about, "shards": dict(sorted(listed.items()))}, indent=1).encode())
        found[number] = features
    whole = [features for features in found if features is not None]
    if len(whole) < len(found):
        raise RuntimeError(f"compute: expected {len(found)} shards, got {len(whole)}")
    return torch.cat(whole)


def _listed(manifest: Path, about: dict[str, Any]) -> dict[str, str]:
    """Checksums of finished shards by name; none where the manifest is missing, damaged or about something else."""
    try:
        content = json.loads(manifest.read_bytes())
        shards = content.pop("shards")
        return dict(shards) if content == about else {}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def _shard(path: Path, checksum: str | None, rows: int) -> Tensor | None:
    """A finished shard, or None where it is missing or not what was written."""
    if checksum is None or not path.is_file() or file_hash(path) != checksum:
        return None
    features = torch.from_numpy(np.array(read_npy("features", path)))
    return features if len(features) == rows else None
