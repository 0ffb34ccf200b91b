"""Label diffusion: the network's size, the schedule, neighbours, targets, learning, and the way back from a kill."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from third_party import lra_diffusion
from third_party.lra_diffusion import (
    PRESETS,
    Config,
    Denoiser,
    LabelDiffusion,
    Predict,
    antithetic_steps,
    decide,
    draw_targets,
    learning_rate,
    nearest,
    predictor,
    signal_schedule,
)
from third_party.resnet import FeatureHead, resnet34

SHORT = Config(epochs=4, batch_size=50, warmup=1, neighbours=5, measure_every=1)


def blobs(count: int = 600, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (N, 6) in well-separated groups, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = 4 * torch.eye(classes, 6)
    return centres[labels] + torch.randn(count, 6, generator=generator), labels


def network(features: Tensor, classes: int = 3, width: int = 32) -> LabelDiffusion:
    torch.manual_seed(0)
    encoder = FeatureHead(width, features.mean(dim=0), features.std(dim=0), hidden=32)
    return LabelDiffusion(encoder, classes, features.shape[1], width)


def silent(predict: Predict) -> dict[str, float]:
    return {}


@pytest.mark.parametrize(
    ("classes", "feature_dim", "parameters"),
    [(10, 2048, 3_126_282), (100, 2048, 3_218_532), (10, 768, 2_470_922), (100, 768, 2_563_172)],
)
def test_denoiser_has_the_published_size(classes: int, feature_dim: int, parameters: int) -> None:
    assert sum(value.numel() for value in Denoiser(classes, feature_dim).parameters()) == parameters


def test_image_encoder_for_cifar_has_the_published_size() -> None:
    assert sum(value.numel() for value in resnet34(512).parameters()) == 21_539_648


def test_schedule_matches_the_published_values() -> None:
    signal = signal_schedule()
    times = [1 + 100 * index for index in range(10)]
    expected = [0.999913, 0.971054, 0.896816, 0.784352, 0.644497, 0.490727, 0.337858, 0.200619, 0.092234, 0.023145]
    assert signal[times].tolist() == pytest.approx(expected, abs=1e-6)
    assert 1 - float(signal[0]) == pytest.approx(4.1284e-5, rel=2e-3)
    assert float(signal[-1]) == pytest.approx(2.4e-9, rel=0.02)
    assert bool((signal.diff() < 0).all())


def slow_denoise(denoiser: Denoiser, noisy: Tensor, step: Tensor, features: Tensor, embedding: Tensor) -> Tensor:
    """The network as it is described, the label vector and the features joined."""
    hidden = torch.cat([noisy, features], dim=1)
    for index, (layer, norm) in enumerate(
        zip((denoiser.first, denoiser.second, denoiser.third), denoiser.norms, strict=True)
    ):
        hidden = nn.functional.softplus(norm(layer.linear(hidden) * layer.gain.weight[step]))
        if index == 0:
            hidden = denoiser.embedding_norm(embedding) * hidden
    noise: Tensor = denoiser.head(hidden)
    return noise


@pytest.mark.parametrize("training", [False, True])
def test_splitting_the_first_layer_changes_nothing(training: bool) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(4, 6, width=8).train(training)
    noisy, features, embedding = torch.randn(5, 4), torch.randn(5, 6), torch.randn(5, 8)
    step = torch.tensor([0, 1, 500, 901, 999])
    fast = denoiser(noisy, step, denoiser.condition(features, embedding))
    torch.testing.assert_close(fast, slow_denoise(denoiser, noisy, step, features, embedding))


def test_sampling_follows_the_ten_steps_from_zero() -> None:
    model = network(blobs()[0]).eval()
    features = blobs(7)[0]
    times = [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    signal, vectors = signal_schedule().double(), torch.zeros(7, 3)
    with torch.no_grad():
        embedding = model.image_encoder(features)
        for index, time in enumerate(times):
            now, then = float(signal[time]), float(signal[times[index + 1] if index < 9 else 0])
            noise = slow_denoise(model.denoiser, vectors, torch.full((7,), time), features, embedding)
            clean = (vectors - math.sqrt(1 - now) * noise) / math.sqrt(now)
            vectors = math.sqrt(then) * clean + math.sqrt(1 - then) * noise
    torch.testing.assert_close(model.sample(features, features), vectors, rtol=1e-3, atol=1e-3)


def test_the_nearest_to_one_wins_over_the_largest() -> None:
    assert decide(torch.tensor([[1.8, 0.95, 0.0], [-3.0, 0.1, -0.5]])).tolist() == [1, 1]


def test_steps_are_antithetic() -> None:
    for count in (1, 6, 7):
        steps = antithetic_steps(count, 1000, torch.device("cpu"))
        half = count // 2 + 1
        assert len(steps) == count
        assert int(steps.min()) >= 0
        assert int(steps.max()) <= 999
        assert steps[half:].tolist() == (999 - steps[: count - half]).tolist()


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("block", [3, 16, 100])
def test_neighbours_are_exact_for_every_block_size(exclude_self: bool, block: int) -> None:
    features = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)) + 100  # far from the origin
    distance = (features[:, None].double() - features.double()).square().sum(dim=2)
    if exclude_self:
        distance.fill_diagonal_(torch.inf)
    expected = distance.topk(4, largest=False).indices.sort().values
    found = nearest(features, 4, exclude_self=exclude_self, block=block)
    assert found.sort().values.tolist() == expected.tolist()


def test_targets_are_drawn_from_the_present_labels() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2])
    neighbours = torch.tensor([[1, 2], [0, 3], [3, 4], [2, 4], [2, 3]])
    rows = torch.tensor([0, 2, 4])
    torch.manual_seed(0)
    seen: list[set[int]] = [set(), set(), set()]
    for _ in range(200):
        targets, weights = draw_targets(labels, neighbours, rows)
        assert float(weights.sum()) == pytest.approx(1)
        votes = [
            sum(int(labels[near]) == int(target) for near in [*neighbours[row].tolist(), int(row)])
            for row, target in zip(rows, targets, strict=True)
        ]
        assert weights.tolist() == pytest.approx([vote / sum(votes) for vote in votes])
        for own, target in zip(seen, targets.tolist(), strict=True):
            own.add(target)
    assert seen == [{0, 1}, {1, 2}, {1, 2}]
    # A change of the labels is felt at once: nothing but row numbers was kept.
    assert draw_targets(torch.full((5,), 7), neighbours, rows)[0].tolist() == [7, 7, 7]


def test_labels_changed_between_epochs_reach_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = blobs(200)
    drawn: list[set[int]] = []
    original = lra_diffusion.draw_targets

    def watched(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        targets, weights = original(*arguments)
        drawn.append(set(targets.tolist()))
        return targets, weights

    def refine(predict: Predict) -> dict[str, float]:
        labels.fill_(2)
        return {}

    monkeypatch.setattr(lra_diffusion, "draw_targets", watched)
    config = replace(SHORT, epochs=3, batch_size=200, warmup=0)
    lra_diffusion.train(network(features), features, features, labels, config, measure=refine, seed=0)
    assert drawn == [{0, 1, 2}, {2}, {2}]


def test_learning_rate_of_both_presets() -> None:
    paper, released = PRESETS["paper"], PRESETS["released"]
    assert learning_rate(paper, 0) == learning_rate(released, 0) == 0
    assert learning_rate(paper, 2.5) == learning_rate(released, 2.5) == pytest.approx(0.0005)
    assert learning_rate(paper, 200) == pytest.approx(0)
    assert learning_rate(released, 200) == pytest.approx(9.08e-4, rel=1e-3)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_neighbours_outvote_wrong_labels(preset: str) -> None:
    features, truth = blobs(1200)
    torch.manual_seed(1)
    wrong = torch.rand(1200) < 0.3
    given = torch.where(wrong, torch.randint(3, (1200,)), truth)
    kept = given.clone()

    def measure(predict: Predict) -> dict[str, float]:
        return {"right": (predict(features, features) == truth).double().mean().item()}

    config = replace(PRESETS[preset], epochs=40, warmup=2, lr=0.003, batch_size=100)
    result = lra_diffusion.train(network(features), features, features, given, config, measure=measure, seed=0)
    assert result.history[-1]["right"] > 0.9
    assert given.tolist() == kept.tolist()
    assert [entry["epoch"] for entry in result.history if "right" in entry] == [5, 10, 15, 20, 25, 30, 35, 39]


def test_released_leaves_the_image_encoder_as_it_was_and_in_training_mode() -> None:
    features, labels = blobs(200)
    model = network(features)
    model.image_encoder = nn.Sequential(model.image_encoder, nn.BatchNorm1d(32))
    before = {name: value.clone() for name, value in model.image_encoder.named_parameters()}
    modes: list[bool] = []

    def measure(predict: Predict) -> dict[str, float]:
        predict(features, features)
        modes.extend([model.image_encoder.training, model.denoiser.training])
        return {}

    config = replace(PRESETS["released"], epochs=1, warmup=0, batch_size=50)
    lra_diffusion.train(model, features, features, labels, config, measure=measure, seed=0)
    for name, value in model.image_encoder.named_parameters():
        assert torch.equal(value, before[name])
    assert modes == [True, False]


def test_nothing_is_dropped_out_in_predictions_of_released() -> None:
    features, _ = blobs(200)
    predict = predictor(network(features), PRESETS["released"])
    assert predict(features, features).tolist() == predict(features, features).tolist()


def test_an_epoch_may_draw_as_many_images_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = blobs(400)
    labels[labels.bincount()[0] :] = 1  # an uneven start
    drawn: list[Tensor] = []
    original = lra_diffusion.draw_targets

    def watched(labels: Tensor, neighbours: Tensor, rows: Tensor, weighted: bool) -> tuple[Tensor, Tensor]:
        targets, weights = original(labels, neighbours, rows, weighted)
        assert weights.unique().tolist() == pytest.approx([1 / len(rows)])
        drawn.append(rows)
        return targets, weights

    monkeypatch.setattr(lra_diffusion, "draw_targets", watched)
    config = replace(SHORT, epochs=2, per_class=20, batch_size=20, weighted=False)
    lra_diffusion.train(network(features), features, features, labels, config, measure=silent, seed=0)
    half = len(drawn) // 2
    epochs = [torch.cat(drawn[:half]), torch.cat(drawn[half:])]
    assert [labels[rows].bincount().tolist() for rows in epochs] == 2 * [[20] * int(labels.max() + 1)]
    assert [len(rows.unique()) for rows in epochs] == [len(rows) for rows in epochs]
    assert set(epochs[0].tolist()) != set(epochs[1].tolist())


def test_paper_trains_the_image_encoder() -> None:
    features, labels = blobs(200)
    model = network(features)
    before = [value.clone() for value in model.image_encoder.parameters()]
    config = replace(SHORT, epochs=1, warmup=0)
    lra_diffusion.train(model, features, features, labels, config, measure=silent, seed=0)
    assert not any(torch.equal(value, old) for value, old in zip(model.image_encoder.parameters(), before, strict=True))


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("use_ema", [True, False])
@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int, use_ema: bool
) -> None:
    monkeypatch.setattr("third_party.loop.CHECKPOINT_SECONDS", 0.0)
    features, labels = blobs(200)
    config = replace(SHORT, use_ema=use_ema)

    def measure(predict: Predict) -> dict[str, float]:
        return {"mean": predict(features, features).double().mean().item()}

    whole = network(features)
    expected = lra_diffusion.train(whole, features, features, labels, config, measure=measure, seed=3)
    calls = 0

    def fatal(predict: Predict) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls > killed_after:
            raise Killed
        return measure(predict)

    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        lra_diffusion.train(
            network(features),
            features,
            features,
            labels,
            replace(config, warmup=config.warmup),
            measure=fatal,
            seed=3,
            checkpoint=checkpoint,
        )
    resumed = network(features)
    result = lra_diffusion.train(
        resumed, features, features, labels, config, measure=measure, seed=3, checkpoint=checkpoint
    )
    assert result == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_checkpoint_of_other_features_is_refused(tmp_path: Path) -> None:
    features, labels = blobs(200)
    checkpoint = tmp_path / "run.safetensors"
    lra_diffusion.train(
        network(features), features, features, labels, SHORT, measure=silent, seed=0, checkpoint=checkpoint
    )
    other = features.flip(1) + torch.randn_like(features)
    with pytest.raises(ValueError, match="expected a run with neighbours_found = "):
        lra_diffusion.train(
            network(features), features, other, labels, SHORT, measure=silent, seed=0, checkpoint=checkpoint
        )


def test_bad_input_is_named() -> None:
    features, labels = blobs(60)

    def fails(message: str, **changes: object) -> None:
        arguments: dict[str, object] = {"features": features, "labels": labels, "config": SHORT, "neighbours": None}
        arguments |= changes
        with pytest.raises(ValueError, match=message):
            lra_diffusion.train(
                network(features),
                features,
                measure=silent,
                seed=0,
                **arguments,  # type: ignore[arg-type]
            )

    fails(r"features: expected \(60, 6\) float32, got \(59, 6\)", features=features[:59])
    fails(r"features: expected \(60, 6\) float32, got \(60, 6\) torch.float64", features=features.double())
    fails(r"labels: expected \(60,\) int64, got \(60, 3\)", labels=torch.zeros(60, 3))
    fails(r"labels: expected classes 0 to 2, got 0 to 3", labels=labels.clone().index_fill(0, torch.tensor([0]), 3))
    fails(r"neighbours: expected \(60, 5\), got \(60, 4\)", neighbours=torch.zeros(60, 4, dtype=torch.int64))
    fails(r"neighbours: expected 1 to 59 for 60 rows, got 60", config=replace(SHORT, neighbours=60))
    fails(r"sampling_steps: expected a divisor of 1000, got 3", config=replace(SHORT, sampling_steps=3))


def test_an_untrained_image_encoder_is_asked_once_where_nothing_changes_its_answers() -> None:
    features, labels = blobs(count=100)
    asked = 0

    def count(*_: object) -> None:
        nonlocal asked
        asked += 1

    for config, expected in (
        (replace(SHORT, train_image_encoder=False), 1),
        (replace(SHORT, train_image_encoder=False, encoder_eval_mode=False), 8),
    ):
        asked, model = 0, network(features)
        model.image_encoder.register_forward_hook(count)
        lra_diffusion.train(model, features, features, labels, config, measure=silent, seed=0)
        assert asked == expected
