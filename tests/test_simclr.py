"""SimCLR: its loss, its views, learning on real digits, and the way back from a kill."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.transforms.functional import resized_crop

from synth_refine.images.encoders import module_encoder
from third_party import loop, simclr
from third_party.resnet import embed
from third_party.simclr import Config, knn_accuracy, nt_xent, random_view

SMALL = Config(encoder="resnet_small", epochs=3, batch_size=32, flip=False)


def images(count: int = 64, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_loss_is_the_mean_over_every_view_of_the_paper_s_formula() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(5, 4), torch.randn(5, 4)
    views = [view / view.norm() for view in [*first, *second]]
    losses = []
    for i in range(10):
        scores = [math.exp(float(views[i] @ views[j]) / 0.5) for j in range(10)]
        losses.append(-math.log(scores[(i + 5) % 10] / (sum(scores) - scores[i])))
    assert float(nt_xent(first, second, 0.5)) == pytest.approx(sum(losses) / 10, rel=1e-5)


def test_views_without_any_change_are_the_images() -> None:
    calm = replace(SMALL, smallest_crop=1.0, jitter=0.0, grayscale=0.0)
    torch.manual_seed(0)
    torch.testing.assert_close(random_view(images(200), calm), images(200).float(), atol=1e-2, rtol=0)


def test_crops_are_those_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = simclr.random_boxes(20_000, 32, 32, Config().smallest_crop, torch.device("cpu"))[:, 2:]
    assert float(sizes.prod(dim=1).mean() / 1024) == pytest.approx(0.490, abs=0.004)  # clamped to the image: 0.534
    box = torch.tensor([[3.0, 5.0, 9.0, 7.0]])
    monkeypatch.setattr(simclr, "random_boxes", lambda *_: box)
    calm = replace(SMALL, jitter=0.0, grayscale=0.0)
    expected = resized_crop(images(1).float(), top=5, left=3, height=7, width=9, size=[16, 16], antialias=True)
    torch.testing.assert_close(random_view(images(1), calm), expected, atol=1e-2, rtol=0)


def test_only_flip_mirrors() -> None:
    ramp = torch.arange(0, 160, 10, dtype=torch.uint8).expand(300, 3, 16, 16)
    torch.manual_seed(0)
    for flip in (False, True):
        views = random_view(ramp, replace(SMALL, flip=flip, jitter=0.0, grayscale=0.0))
        falling = (views[:, 0, 8, -1] < views[:, 0, 8, 0]).double().mean().item()
        assert 0.4 < falling < 0.6 if flip else falling == 0


def test_gray_images_stay_gray_and_grayscale_removes_colour() -> None:
    gray = images()[:, :1].repeat(1, 3, 1, 1)
    views = random_view(gray, replace(SMALL, jitter=1.0))
    torch.testing.assert_close(views[:, 0], views[:, 2], atol=0.3, rtol=0)
    colourless = random_view(images(), replace(SMALL, jitter=0.0, grayscale=1.0))
    torch.testing.assert_close(colourless[:, 0], colourless[:, 2])
    assert float(views.min()) >= 0
    assert float(views.max()) <= 255


def test_published_encoder_and_head() -> None:
    model = simclr.build(Config())
    assert sum(value.numel() for value in model.encoder.parameters()) == 23_500_352
    assert [tuple(value.shape) for value in model.head.parameters()] == [
        (512, 2048), (512,), (512,), (128, 512), (128,),
    ]  # fmt: skip
    assert tuple(model.encoder.eval().features(images(1)).shape) == (1, 2048)


def test_a_published_encoder_is_read_under_its_names() -> None:
    torch.manual_seed(0)
    whole = resnet50()
    whole.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    layers = [layer for layer in whole.children() if not isinstance(layer, nn.MaxPool2d | nn.Linear)]
    published = nn.ModuleDict(
        {"f": nn.Sequential(*layers), "g": nn.Sequential(nn.Linear(2048, 512, bias=False))}
    ).eval()
    weights = published.state_dict()
    assert sum(name.startswith("f.") for name in weights) == 318
    encoder = simclr.build(Config()).encoder.eval()
    found = simclr.from_published({**weights, "f.total_ops": torch.zeros(1), "f.0.total_params": torch.zeros(1)})
    assert found is not None
    encoder.load_state_dict({"mean": encoder.mean, "std": encoder.std, **found})
    pixels = (images(4).float() - encoder.mean) / encoder.std
    with torch.no_grad():
        torch.testing.assert_close(encoder.features(images(4)), published["f"](pixels).flatten(1))
    assert simclr.from_published(encoder.state_dict()) is None


def test_two_sets_of_images_are_learnt_as_one_and_batches_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    view = simclr.random_view
    monkeypatch.setattr(simclr, "random_view", lambda batch, config: seen.append(batch) or view(batch, config))
    histories = []
    for some in (images(70), [images(70)[:50], images(70)[50:]]):
        torch.manual_seed(0)
        histories.append(simclr.train(simclr.build(SMALL), some, SMALL, seed=1).history)
    assert histories[0] == histories[1]
    assert [len(batch) for batch in seen] == [32] * 24  # of 70 images six are left out


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)

    def fresh() -> simclr.SimCLR:
        torch.manual_seed(0)
        return simclr.build(SMALL)

    whole = fresh()
    expected = simclr.train(whole, images(), SMALL, seed=1)
    epochs, batches_of = 0, simclr.shuffled_batches

    def fatal(*arguments: object) -> object:
        nonlocal epochs
        epochs += 1
        if epochs > killed_after:
            raise KeyboardInterrupt
        return batches_of(*arguments)  # type: ignore[arg-type]

    path = tmp_path / "run.checkpoint"
    monkeypatch.setattr(simclr, "shuffled_batches", fatal)
    with pytest.raises(KeyboardInterrupt):
        simclr.train(fresh(), images(), SMALL, seed=1, checkpoint=path)
    monkeypatch.setattr(simclr, "shuffled_batches", batches_of)
    resumed = fresh()
    assert simclr.train(resumed, images(), SMALL, seed=1, checkpoint=path) == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_exported_encoder_is_the_trained_one(tmp_path: Path) -> None:
    model = simclr.build(SMALL)
    simclr.train(model, images(), replace(SMALL, epochs=1), seed=0)
    simclr.export(model, tmp_path / "encoder.safetensors")
    other = simclr.build(SMALL)
    encoder = module_encoder("simclr", other.encoder, tmp_path / "encoder.safetensors", normalise=True)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.encoder.features(images()), dim=1)
    torch.testing.assert_close(encoder.embed(images()), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_knn_readout_counts_near_neighbours_more() -> None:
    bank = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
    labels = torch.tensor([0, 1, 1])
    queries, truth = torch.tensor([[1.0, 0.01]]), torch.tensor([0])
    assert knn_accuracy(bank, labels, queries, truth) == 1  # exp(2) outvotes 2 exp(-2)
    assert knn_accuracy(bank, labels, -queries, 1 - truth) == 1


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"images: expected \(N, 3, H, W\) uint8, N >= 2, got \(4, 3, 8, 8\) torch.f"):
        simclr.train(simclr.build(SMALL), torch.zeros(4, 3, 8, 8), SMALL, seed=0)
    with pytest.raises(ValueError, match="encoder: expected resnet50, resnet34 or .* or resnet50_224, got 'vgg'"):
        simclr.build(replace(SMALL, encoder="vgg"))


@pytest.mark.slow
def test_it_learns_the_digits_in_under_a_minute_of_processor_time() -> None:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    small = np.rint(data.images * (255 / 16)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(one).resize((32, 32), Image.Resampling.LANCZOS)) for one in small])
    pictures, truth = torch.from_numpy(large)[:, None].repeat(1, 3, 1, 1), torch.from_numpy(data.target)
    torch.manual_seed(0)
    config = replace(SMALL, epochs=3, batch_size=200, smallest_crop=0.4)
    model = simclr.build(config)

    def readout() -> float:
        features, _ = embed(model.encoder, pictures)  # type: ignore[arg-type]
        return knn_accuracy(features[:1200], truth[:1200], features[1200:], truth[1200:], neighbours=10)

    start, before = time.process_time(), readout()
    simclr.train(model, pictures[:1200], config, seed=0)
    assert time.process_time() - start < 60
    assert readout() > max(0.85, before)
