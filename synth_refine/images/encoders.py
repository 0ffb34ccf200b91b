"""Frozen encoders behind one protocol: (N, 3, H, W) uint8 in, (N, D) float32 out.

An encoder has an `id` that changes with its weights and its preprocessing.

Letters in shapes: N images, H x W pixels, D features, C classes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from synth_refine._io.check import InputError, check_array
from synth_refine.images.foreign import check_model_folder, fetch_settings
from synth_refine.images.weights import _unfetched, _weights_in, hub_or_cache, load_weights

DEFAULT = "open_clip:ViT-L-14-quickgelu/openai"  # the paper's, see `encoder_by_name`
MOST_SIDE = 4096  # pixels that an encoder may ask for

TEMPLATES = ("A photo of {}.", "a photo of a {}.", "a picture of a {}.", "a blurry photo of a {}.")
"""Prompts that text prototypes are averaged over; {} is the class name."""


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
            target = self.resized(pixels.shape[2], pixels.shape[3])
            pixels = F.interpolate(pixels, target, mode=self.interpolation, antialias=True, align_corners=False)
            top, left = round((target[0] - height) / 2), round((target[1] - width) / 2)
            pixels = pixels[:, :, top : top + height, left : left + width]
            pixels = pixels.mul_(255).round_().clamp_(0, 255) / 255  # to whole grey levels, as pictures are resized
        mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def resized(self, rows: int, columns: int) -> tuple[int, int]:
        """Height and width before the crop; the longer side is rounded down, as in torchvision's Resize."""
        if self.size is None:
            return rows, columns
        height, width = self.size
        if not self.crop:
            return self.size
        if height * columns >= width * rows:  # the height decides
            return height, max(width, height * columns // rows)
        return max(height, width * rows // columns), width


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

    @cached_property
    def id(self) -> str:
        """SHA-256 of the name, the preprocessing, the kind of every layer and every weight, when first asked for."""
        preprocess = None if self.preprocess is None else asdict(self.preprocess)
        layers = [[name, type(layer).__name__] for name, layer in self.module.named_modules()]
        about = [self.name, layers, preprocess, self.normalise]
        digest = hashlib.sha256(json.dumps(about).encode())
        for name, value in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device | None:
        """Where it computes; None for a network without weights, which computes where the images are."""
        state = next(chain(self.module.parameters(), self.module.buffers()), None)
        return None if state is None else state.device

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
        device = self.device or images.device
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
        model: A name that open_clip knows, such as "ViT-L-14-quickgelu", "hf-hub:organisation/name", or a local folder
            with open_clip_config.json and weights, with or without "local-dir:" in front.
        weights: A tag of open_clip's, such as "openai", which may be downloaded, or a local file of weights. None is
            for folders and hub names, which have their own. A file does not say which activation it was trained with:
            the model's name does, and that of OpenAI's weights ends in "-quickgelu".
        device: Where it computes.

    Raises:
        InputError: No such model, weights that are neither there nor to be fetched, that do not fit, or that were
            trained with another activation; or settings that ask to run code.
    """
    try:
        import open_clip  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("CLIP encoders need open_clip: pip install open_clip_torch") from error
    folder = Path(model.removeprefix("local-dir:"))
    is_folder = model.startswith("local-dir:") or (folder / "open_clip_config.json").is_file()
    on_hub = model.startswith("hf-hub:")
    name = f"local-dir:{folder}" if is_folder else model
    file = Path(weights) if weights is not None and Path(weights).exists() else None
    if is_folder:
        check_model_folder("model", folder)
        file = file or _weights_in(folder)
    if file is None and weights is None and not on_hub:
        raise InputError(f"weights: expected a tag or a file for {model!r}, got none")
    if file is None and weights is not None and not is_folder and not on_hub:
        check_activation(model, str(weights), open_clip.get_model_config(model), open_clip.get_pretrained_cfg)
    try:
        with hub_or_cache(on_hub or (file is None and not is_folder)):
            if on_hub:
                fetch_settings("model", model.removeprefix("hf-hub:"))
            network = open_clip.create_model(
                name,
                None if file or is_folder else weights,
                load_weights=file is None,
                require_pretrained=file is None,
                weights_only=True,
                device="cpu",
            )
            tokenizer = open_clip.get_tokenizer(name)
            settings = open_clip.get_model_preprocess_cfg(network)
    except InputError:
        raise
    except Exception as error:  # a hub client may raise anything, and so may a network of odd settings
        raise InputError(_unfetched(model, weights, error)) from error
    if file is not None:
        load_weights(network, file, open_clip.load_checkpoint)
    preprocess = _clip_preprocess(model, settings)
    label = folder.name if is_folder else f"{model} {weights if file is None else file.name}"
    return ClipEncoder(label, network.to(device), preprocess, tokenizer)


def check_activation(model: str, tag: str, config: Any, tags: Callable[[str, str], Any]) -> None:
    """Refuse weights that were trained with another activation than the network has.

    Args:
        model: A name of open_clip's.
        tag: Of its weights.
        config: What the library knows of the model; None where it knows none.
        tags: What it knows of a tag.

    Raises:
        InputError: GELU and QuickGELU do not agree, with the name that does.
    """
    known = tags(model, tag) or tags(model.removesuffix("-quickgelu"), tag)
    if config is None or not known or bool(known.get("quick_gelu")) == bool(config.get("quick_gelu")):
        return
    other = model.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{model}-quickgelu"
    kinds = ("GELU", "QuickGELU")
    raise InputError(
        f"model: the weights {tag!r} were trained with {kinds[bool(known.get('quick_gelu'))]}, but {model} computes "
        f"with {kinds[bool(config.get('quick_gelu'))]}; take {other}"
    )


def _clip_preprocess(model: str, settings: Mapping[str, Any]) -> Preprocess:
    """What open_clip's settings ask for, checked."""
    size = settings.get("size", 224)
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    mean, std = (settings.get(name) for name in ("mean", "std"))
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MOST_SIDE for side in sides):
        raise InputError(f"model: expected an image size from 1 to {MOST_SIDE} in {model!r}, got {size!r}")
    for name, values in (("mean", mean), ("std", std)):
        numbers = values if isinstance(values, list | tuple) else ()
        if len(numbers) != 3 or not all(type(one) in (int, float) and math.isfinite(one) for one in numbers):
            raise InputError(f"model: expected three numbers as the {name} in {model!r}, got {values!r}")
    if settings.get("resize_mode", "shortest") not in ("shortest", "squash"):
        raise InputError(f"model: {model!r} pads its images, which is not supported")
    return Preprocess(
        (sides[0], sides[1]),
        settings.get("resize_mode", "shortest") == "shortest",
        tuple(settings["mean"]),
        tuple(settings["std"]),
        "bilinear" if settings.get("interpolation") == "bilinear" else "bicubic",
    )


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
        name: "open_clip:MODEL" or "open_clip:MODEL/TAG", such as "open_clip:ViT-L-14-quickgelu/openai"; "timm:MODEL";
            or a local folder with open_clip_config.json and weights, such as benchmarks/glyph_clip.
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
