"""The networks: sizes, preprocessing inside, pooled features, embedding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import normalize

from third_party.resnet import STATISTICS, FeatureHead, ResNet, embed, input_statistics, resnet34, resnet_small


def random_pixels(count: int = 6, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize(("num_classes", "parameters"), [(10, 21_282_122), (100, 21_328_292)])
def test_resnet34_has_the_published_number_of_parameters(num_classes: int, parameters: int) -> None:
    with torch.device("meta"):
        network = resnet34(num_classes)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_resnet34_strides_reach_four_by_four_at_32_pixels() -> None:
    with torch.device("meta"):
        network = resnet34(10)
    assert network.stages(torch.empty(1, 64, 32, 32, device="meta")).shape == (1, 512, 4, 4)


def test_normalisation_is_torchvisions() -> None:
    pixels = random_pixels()
    network = ResNet(3, (8, 8, 8, 8), (1, 1, 1, 1))
    expected = normalize(pixels.float() / 255, *map(list, STATISTICS["cifar10"]))
    assert torch.allclose((pixels - network.mean) / network.std, expected, atol=1e-5)


def test_network_is_the_composition_of_its_layers() -> None:
    network = ResNet(3, (4, 6, 6, 8), (2, 1, 1, 1)).eval()
    hidden = normalize(random_pixels().float() / 255, *map(list, STATISTICS["cifar10"]))
    hidden = F.relu(network.norm(network.stem(hidden)))
    for block in network.stages:
        inside = F.relu(block.norm1(block.conv1(hidden)))
        hidden = F.relu(block.norm2(block.conv2(inside)) + block.shortcut(hidden))
    features = F.adaptive_avg_pool2d(hidden, 1)[:, :, 0, 0]
    assert torch.allclose(network.features(random_pixels()), features, atol=1e-5)
    assert torch.allclose(network(random_pixels()), network.head(features), atol=1e-5)


def test_shortcut_is_the_identity_only_where_nothing_changes() -> None:
    shortcuts = [
        isinstance(block.shortcut, torch.nn.Identity) for block in ResNet(3, (4, 6, 6, 6), (2, 1, 2, 1)).stages
    ]
    assert shortcuts == [True, True, False, False, True, False]


def test_head_standardises_by_the_training_features() -> None:
    inputs = 5 + 3 * torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    inputs[:, 2] = 7.0  # a feature that never changes must not divide by zero
    mean, std = input_statistics(inputs, chunk=10)
    assert torch.allclose(mean, inputs.mean(dim=0))
    assert torch.allclose(std, inputs.std(dim=0, correction=0), atol=1e-6)
    head = FeatureHead(3, mean, std, hidden=8, dropout=0.0)
    assert head(inputs).isfinite().all()
    expected = head.head(F.relu(head.hidden((inputs - mean) / torch.where(std == 0, 1, std))))
    assert torch.allclose(head(inputs), expected, atol=1e-6)


def test_pixel_statistics_are_those_of_each_channel_scaled_to_one() -> None:
    pixels = random_pixels(count=7)
    mean, std = input_statistics(pixels, chunk=2)
    scaled = pixels.double() / 255
    assert torch.allclose(mean.double(), scaled.mean(dim=(0, 2, 3)))
    assert torch.allclose(std.double(), scaled.std(dim=(0, 2, 3), correction=0))


def test_embedding_is_batch_free_and_leaves_the_network_alone() -> None:
    network = resnet_small(3).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    features, logits = embed(network, random_pixels(), batch_size=4)
    again, _ = embed(network, random_pixels(), batch_size=6)
    assert features.shape == (6, network.head.in_features)
    assert torch.allclose(features, again, atol=1e-5)
    assert torch.allclose(logits, network.head(features), atol=1e-6)
    assert network.training
    assert not features.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
