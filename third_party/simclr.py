"""SimCLR: an encoder that learns from images alone, by telling two views of an image from views of all others.

Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
https://arxiv.org/abs/2002.05709, with the settings for CIFAR that the encoders of LRA-diffusion point to. Letters in
shapes: N images, B images of a batch, H x W pixels, K features of the encoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from third_party.augment import random_boxes, resized_crop
from third_party.checkpoint import write_tensors
from third_party.loop import Progress, seeded, shuffled_batches
from third_party.resnet import STATISTICS, Classifier, Torchvision, resnet34, resnet_small


@dataclass(frozen=True)
class Config:
    """The recipe; the defaults are those of the encoders that LRA-diffusion uses."""

    encoder: str = "resnet50"  # or resnet34, resnet_small; or, with the usual stem for large images, resnet50_224
    epochs: int = 500
    batch_size: int = 512
    lr: float = 0.001
    weight_decay: float = 0.000001
    temperature: float = 0.5
    projection: int = 128  # width of the projection that the loss compares
    smallest_crop: float = 0.08  # fraction of the area
    flip: bool = True  # digits and letters must not be mirrored
    jitter: float = 0.8  # how often brightness, contrast, saturation and hue change
    grayscale: float = 0.2  # how often the colours go
    bf16: bool = False  # autocast to bfloat16
    compiled: bool = field(default=False, repr=False)  # through torch.compile; an encoder is cached by the others


@dataclass(frozen=True)
class Result:
    """What training left besides the model.

    Attributes:
        history: One entry per epoch: epoch (from 0) and loss.
    """

    history: list[dict[str, float]]


class ResNet50(nn.Module):
    """torchvision's ResNet-50 with a stem for small images, complete with its normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take the mean and standard deviation of each channel, for pixels in [0, 1]."""
        from torchvision.models import resnet50  # type: ignore[import-untyped]  # takes seconds to import

        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))
        self.network = resnet50(weights=None)
        self.network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.network.maxpool = nn.Identity()
        self.network.fc = nn.Identity()

    def features(self, images: Tensor) -> Tensor:
        """Averaged activations of the last stage, (B, 2048), of pixels in [0, 255]."""
        hidden: Tensor = self.network((images.to(self.mean.dtype) - self.mean) / self.std)
        return hidden


class SimCLR(nn.Module):
    """An encoder and the projection head that only its training needs.

    Attributes:
        encoder: Its method `features` gives (B, K); compare them by cosine.
    """

    def __init__(self, encoder: Classifier | ResNet50, width: int, projection: int = 128) -> None:
        """Take an encoder with K = `width`."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.Linear(width, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, projection)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Projections, (B, projection), of pixels in [0, 255]."""
        projected: Tensor = self.head(self.encoder.features(images))
        return projected


def build(
    config: Config,
    mean: Sequence[float] = STATISTICS["cifar10"][0],
    std: Sequence[float] = STATISTICS["cifar10"][1],
) -> SimCLR:
    """A fresh model with the encoder that the config names."""
    if config.encoder == "resnet50":
        return SimCLR(ResNet50(mean, std), 2048, config.projection)
    builders: dict[str, Callable[..., Classifier]] = {
        "resnet34": resnet34,
        "resnet_small": resnet_small,
        "resnet50_224": partial(Torchvision, "resnet50"),
    }
    if config.encoder not in builders:
        raise ValueError(f"encoder: expected resnet50, {' or '.join(builders)}, got {config.encoder!r}")
    network = builders[config.encoder](1, mean, std)  # its one logit is never asked for
    return SimCLR(network, network.head.in_features, config.projection)


def random_view(images: Tensor, config: Config) -> Tensor:
    """One random view of every image, all at once, on the device of the images.

    A crop of random area and proportions enlarged to the full size, a mirroring, shifts of brightness, contrast,
    saturation and hue, and the loss of all colour; each image draws its own. Hue turns the colour plane of YIQ.

    Args:
        images: (B, 3, H, W) uint8.
        config: How much of it.

    Returns:
        (B, 3, H, W) float32 in [0, 255].
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, 1, device=device).uniform_(low, high)

    def chosen(chance: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, device=device) < chance

    height, width = images.shape[2:]
    boxes = random_boxes(count, height, width, config.smallest_crop, device)
    mirrored = chosen(0.5 if config.flip else 0).flatten()
    views = resized_crop(images, boxes, height, width, mirrored).clamp(0, 255) / 255

    def gray(pixels: Tensor) -> Tensor:
        return (pixels * pixels.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)

    bright = (views * uniform(0.6, 1.4)).clamp(0, 1)
    contrast = torch.lerp(gray(bright).mean(dim=(2, 3), keepdim=True), bright, uniform(0.6, 1.4)).clamp(0, 1)
    saturated = torch.lerp(gray(contrast), contrast, uniform(0.6, 1.4)).clamp(0, 1)
    jittered = _turn_hue(saturated, uniform(-0.1, 0.1)).clamp(0, 1)
    views = torch.where(chosen(config.jitter), jittered, views)
    views = torch.where(chosen(config.grayscale), gray(views), views)
    return 255 * views


def _turn_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Rotate the colour plane of YIQ by `turn` of a full circle, (B, 1, 1, 1)."""
    to_yiq = pixels.new_tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    luma, in_phase, quadrature = torch.einsum("ij,bjhw->ibhw", to_yiq, pixels)
    cosine, sine = (2 * math.pi * turn[:, 0]).cos(), (2 * math.pi * turn[:, 0]).sin()
    turned = torch.stack([luma, cosine * in_phase - sine * quadrature, sine * in_phase + cosine * quadrature])
    return torch.einsum("ij,jbhw->bihw", torch.linalg.inv(to_yiq), turned)


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each projection's other view among all projections of the batch.

    Args:
        first: Projections of one view, (B, P).
        second: Of the other, row by row.
        temperature: Divides the cosines.
    """
    views = F.normalize(torch.cat([first, second]), dim=1)  # (2 B, P)
    similarity = views @ views.T / temperature
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(views), device=views.device).roll(len(first))
    return F.cross_entropy(similarity, partner)


def train(
    model: SimCLR, images: Tensor | Sequence[Tensor], config: Config, *, seed: int, checkpoint: Path | None = None
) -> Result:
    """Train encoder and projection head on the images alone; batches that are not full are left out.

    Args:
        model: On the device of `images`; trained in place.
        images: (N, 3, H, W) uint8, two or more; or several of them, such as training and validation images.
        config: The recipe.
        seed: Same seed, same encoder on the CPU; 0 or more.
        checkpoint: Safetensors file to write to, and to resume from where it exists, with the same result.

    Raises:
        ValueError: Images or checkpoint do not fit, or the loss is no number any more.
    """
    parts = [images] if isinstance(images, Tensor) else [part for part in images if len(part)]
    total_rows = sum(map(len, parts))
    for part in parts:
        if part.ndim != 4 or part.dtype != torch.uint8 or total_rows < 2:
            raise ValueError(f"images: expected (N, 3, H, W) uint8, N >= 2, got {tuple(part.shape)} {part.dtype}")
    device = parts[0].device
    model.to(memory_format=torch.channels_last)
    fused = device.type in ("cpu", "cuda")
    optimiser = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    history: list[dict[str, float]] = []
    progress = Progress(
        checkpoint, "simclr", config, seed, parts[0], parts[0][:64].flatten(), images=[len(part) for part in parts]
    )
    if state := progress.load(model, optimiser):
        history = state["history"]

    network = torch.compile(model) if config.compiled else model
    model.train()
    bar = tqdm(range(len(history), config.epochs), "simclr", initial=len(history), total=config.epochs, disable=None)
    for epoch in bar:
        with seeded(device, seed, epoch):
            total, count = torch.zeros((), device=device), 0
            for rows in shuffled_batches(total_rows, config.batch_size, device, True):
                batch = _take(parts, rows)
                with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                    projections = [network(random_view(batch, config)).float() for _ in range(2)]
                loss = nt_xent(projections[0], projections[1], config.temperature)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch's stubs
                optimiser.step()
                total, count = total + loss.detach(), count + 1
            mean_loss = total.item() / count
            if not math.isfinite(mean_loss):
                raise ValueError(f"lr: expected training to converge, got a loss of {mean_loss} in epoch {epoch}")
        history.append({"epoch": float(epoch), "loss": mean_loss})
        progress.save(
            {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "history": history},
            last=epoch == config.epochs - 1,
        )
        bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
    model.eval()
    return Result(history)


def _take(parts: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Rows of several tensors as if they were one."""
    if len(parts) == 1:
        return parts[0].index_select(0, rows)
    batch = torch.empty((len(rows), *parts[0].shape[1:]), dtype=torch.uint8, device=rows.device)
    for part in parts:
        here = ((rows >= 0) & (rows < len(part))).nonzero()[:, 0]
        batch[here] = part.index_select(0, rows[here])
        rows = rows - len(part)
    return batch


PUBLISHED_PARTS = {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4"}
"""Layers of `ResNet50` by their place in the published encoders, whose names begin with f; the head's begin with g."""


def from_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Weights of a published encoder under the names of `ResNet50`; None where the names are no published ones.

    Args:
        weights: 318 tensors f.0.weight to f.6.2.bn3.num_batches_tracked, and others, which are left out.

    Example:
        >>> list(from_published(dict.fromkeys(["f.0.weight", "f.3.2.bn1.bias", "g.0.weight"], torch.zeros(1))))
        ['network.conv1.weight', 'network.layer1.2.bn1.bias']
    """
    found = {}
    for name, value in weights.items():
        match = re.fullmatch(r"f\.(\d)\.(.+)", name)
        if match and match[1] in PUBLISHED_PARTS and not name.endswith(("total_ops", "total_params")):
            found[f"network.{PUBLISHED_PARTS[match[1]]}.{match[2]}"] = value
    return found or None


def export(model: SimCLR, path: Path) -> None:
    """Write the encoder's weights as safetensors, without the projection head; whole or not at all."""
    state = model.encoder.state_dict()
    write_tensors(path, {name: value.detach().cpu().contiguous() for name, value in state.items()})


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, neighbours: int = 200, chunk: int = 1024
) -> float:
    """How well the features tell classes apart: a vote of the nearest bank images, each weighing exp(cosine / 0.5).

    Args:
        bank: Features that know their class, (N, K).
        bank_labels: (N,) int64.
        queries: Features to be classified, (M, K).
        labels: Their classes, (M,); for measuring.
        neighbours: How many vote; at most N do.
        chunk: Queries compared at once.

    Returns:
        Fraction of the queries that are right.

    Example:
        >>> corners = torch.eye(2)
        >>> knn_accuracy(corners, torch.tensor([0, 1]), 3 * corners, torch.tensor([0, 1]), neighbours=1)
        1.0
    """
    bank = F.normalize(bank, dim=1)
    votes_of = F.one_hot(bank_labels).float()
    right = 0
    for part, truth in zip(torch.split(F.normalize(queries, dim=1), chunk), torch.split(labels, chunk), strict=True):
        similarity, rows = (part @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        votes = ((similarity / 0.5).exp()[:, :, None] * votes_of[rows]).sum(dim=1)  # (chunk, C)
        right += int((votes.argmax(dim=1) == truth).sum())
    return right / len(labels)
