"""The networks that the training loops share: the CIFAR ResNet and a head on features of a frozen encoder.

He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385, in the form that the
noisy-label papers use for 32x32 images: a 3x3 stem without pooling, four stages of basic blocks. Letters in shapes:
N images, H x W pixels, D features of the frozen encoder, K pooled features before the last layer, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Published means and standard deviations of the three channels, for pixels in [0, 1]."""


class Classifier(nn.Module):
    """A network that ends in one linear layer, so that its head can be replaced and its features can be read."""

    head: nn.Linear  # (K) -> (C)
    mean: Tensor
    std: Tensor
    crop = 0  # side of the square at the centre of larger images that the network looks at; 0: all of it

    def normalised(self, inputs: Tensor) -> Tensor:
        """What the first layer sees: inputs of training and measuring alike, cut and standardized."""
        if self.crop and inputs.ndim == 4:
            top, left = ((side - self.crop) // 2 for side in inputs.shape[2:])
            inputs = inputs[:, :, top : top + self.crop, left : left + self.crop]
        return (inputs.to(self.mean.dtype) - self.mean) / self.std

    def features(self, inputs: Tensor) -> Tensor:
        """What the last linear layer sees, (N, K)."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (N, C)."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; a projection where the stride or the width changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        """Map (N, width_in, H, W) to (N, width, H / stride, W / stride)."""
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            projection = nn.Conv2d(width_in, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Activations after the last ReLU."""
        hidden = F.relu(self.norm1(self.conv1(inputs)), inplace=True)
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(inputs), inplace=True)


class ResNet(Classifier):
    """A residual network for small images, complete with its normalisation.

    Args:
        num_classes: C.
        widths: Channels of the four stages; the last one is K.
        blocks: Basic blocks of each stage.
        stem_stride: Stride of the first convolution; 2 quarters the work and is for two CPU cores.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].

    Example:
        >>> network = resnet_small(num_classes=10)
        >>> network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (3, 4, 6, 3),
        stem_stride: int = 1,
        mean: Sequence[float] = STATISTICS["cifar10"][0],
        std: Sequence[float] = STATISTICS["cifar10"][1],
    ) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))
        self.stem = nn.Conv2d(3, widths[0], 3, stride=stem_stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        layers: list[nn.Module] = []
        width_in = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                layers.append(BasicBlock(width_in, width, stride=2 if stage > 0 and block == 0 else 1))
                width_in = width
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(width_in, num_classes)

    def features(self, inputs: Tensor) -> Tensor:
        """Averaged activations of the last stage, (N, K), of images (N, 3, H, W) uint8."""
        pixels = self.stem(self.normalised(inputs))
        hidden: Tensor = self.stages(F.relu(self.norm(pixels), inplace=True))  # (N, K, H / 8, W / 8)
        return hidden.mean(dim=(2, 3))


def resnet34(
    num_classes: int,
    mean: Sequence[float] = STATISTICS["cifar10"][0],
    std: Sequence[float] = STATISTICS["cifar10"][1],
) -> ResNet:
    """The CIFAR ResNet-34 of PLC and of the refinement paper; 21,282,122 parameters for ten classes."""
    return ResNet(num_classes, mean=mean, std=std)


def resnet_small(
    num_classes: int,
    mean: Sequence[float] = STATISTICS["cifar10"][0],
    std: Sequence[float] = STATISTICS["cifar10"][1],
) -> ResNet:
    """The same network, one block per stage and narrow: a small training set on two CPU cores."""
    return ResNet(num_classes, (16, 32, 64, 128), (1, 1, 1, 1), stem_stride=2, mean=mean, std=std)


class Torchvision(Classifier):
    """A network of torchvision for images of some 224 pixels, complete with its normalisation, without weights.

    Args:
        name: resnet50, resnet18, vgg19_bn or any other whose last layer is linear.
        num_classes: C.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].

    Example:
        >>> network = Torchvision("resnet18", 10)
        >>> network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        mean: Sequence[float] = STATISTICS["imagenet"][0],
        std: Sequence[float] = STATISTICS["imagenet"][1],
    ) -> None:
        from torchvision import models  # type: ignore[import-untyped]  # takes seconds to import

        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))
        self.network: nn.Module = getattr(models, name)(weights=None)
        *_, (place, last) = ((place, one) for place, one in self.network.named_modules() if isinstance(one, nn.Linear))
        parent, _, own = place.rpartition(".")
        setattr(self.network.get_submodule(parent), own, nn.Identity())
        self.head = nn.Linear(last.in_features, num_classes)

    def features(self, inputs: Tensor) -> Tensor:
        """What the last layer sees, (N, K), of images (N, 3, H, W) uint8."""
        hidden: Tensor = self.network(self.normalised(inputs))
        return hidden


TORCHVISION = ("resnet18", "resnet50", "vgg19_bn")
"""Names that `Torchvision` takes."""


class FeatureHead(Classifier):
    """Two linear layers on the features of a frozen encoder, which they standardize first.

    Args:
        num_classes: C.
        mean: Mean of each feature over the training set, (D,).
        std: Standard deviation of each feature, (D,).
        hidden: K.
        dropout: Fraction of the hidden units dropped in training, in [0, 1).

    Example:
        >>> inputs = torch.rand(8, 5)
        >>> FeatureHead(3, inputs.mean(dim=0), inputs.std(dim=0))(inputs).shape
        torch.Size([8, 3])
    """

    def __init__(self, num_classes: int, mean: Tensor, std: Tensor, hidden: int = 512, dropout: float = 0.3) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().float().clone())
        self.register_buffer("std", torch.where(std == 0, 1, std.detach()).float())
        self.hidden = nn.Linear(len(mean), hidden)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, num_classes)

    def features(self, inputs: Tensor) -> Tensor:
        """Hidden units after ReLU, (N, K), of features (N, D)."""
        hidden: Tensor = self.dropout(F.relu(self.hidden(self.normalised(inputs))))
        return hidden


def rows_at_once(inputs: Tensor, rows: int) -> int:
    """As many rows as have the pixels of `rows` images of 32x32; all these rows of smaller images and of features.

    Example:
        >>> rows_at_once(torch.zeros(1, 3, 64, 64), 1024)
        256
    """
    return max(1, rows * 1024 // max(1024, inputs.shape[2] * inputs.shape[3])) if inputs.ndim == 4 else rows


def input_statistics(inputs: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel or feature, chunk by chunk in float64.

    Args:
        inputs: Pixels, (N, 3, H, W) uint8, or features, (N, D).
        chunk: Rows converted at once; fewer of large images, see `rows_at_once`.

    Returns:
        Mean and population standard deviation, (3,) for pixels scaled to [0, 1], (D,) for features; float32.

    Example:
        >>> input_statistics(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        (tensor([1., 1.]), tensor([1., 0.]))
    """
    pixels = inputs.ndim == 4
    dims = (0, 2, 3) if pixels else (0,)
    scale = 255 if pixels else 1

    def mean_of(shift: Tensor | float, power: int) -> Tensor:
        parts = torch.split(inputs, rows_at_once(inputs, chunk))
        sums = [part.double().div_(scale).sub_(shift).pow_(power).sum(dim=dims) for part in parts]
        return torch.stack(sums).sum(dim=0) / (inputs.numel() / inputs.shape[1])

    mean = mean_of(0.0, 1)
    std = mean_of(mean[:, None, None] if pixels else mean, 2).sqrt()
    return mean.float(), std.float()


@torch.no_grad()
def embed(model: Classifier, inputs: Tensor, batch_size: int = 1024) -> tuple[Tensor, Tensor]:
    """Pooled features and logits in evaluation mode, without augmentation; the model's mode is put back.

    Args:
        model: The network, on the device of `inputs`.
        inputs: (N, 3, H, W) uint8 or (N, D).
        batch_size: Rows per forward pass; fewer of large images, see `rows_at_once`.

    Returns:
        Features, (N, K), and logits, (N, C).
    """
    batch_size = rows_at_once(inputs, batch_size)
    training = model.training
    model.eval()
    features = torch.empty(len(inputs), model.head.in_features, device=inputs.device)
    logits = torch.empty(len(inputs), model.head.out_features, device=inputs.device)
    for start in range(0, len(inputs), batch_size):
        rows = slice(start, start + batch_size)
        features[rows] = model.features(inputs[rows])
        logits[rows] = model.head(features[rows])
    model.train(training)
    return features, logits
