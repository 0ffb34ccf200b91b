"""Label-retrieval-augmented diffusion: a label is denoised out of nothing, conditioned on the image.

Chen, Zhang, Yu, Nie, "Label-Retrieval-Augmented Diffusion Models for Learning from Noisy Labels", NeurIPS 2023,
https://arxiv.org/abs/2305.19518. A small network predicts the noise in a noisy label vector. It sees the features of a
frozen encoder and an embedding by an image encoder of its own. What it learns to denoise is the label of a neighbour:
the nearest images in the frozen encoder's space are known to be alike, whatever their labels say.

Letters in shapes: N training images, B images of a batch, K neighbours, P features of the frozen encoder, E width of
the network, C classes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from third_party.augment import EVERY, Augmentation, Places
from third_party.loop import Progress, read_batches, seeded, shuffled_batches, views
from third_party.parallel import from_first, in_parts, parallel, processes, set_part, summed
from third_party.resnet import rows_at_once

Predict = Callable[[Tensor, Tensor], Tensor]
"""Classes, (N,), of inputs and their frozen features, (N, P)."""

Measure = Callable[[Predict], Mapping[str, float]]
"""Figures by name; whoever writes it knows labels that the loop must not see."""


Weights = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True)
class Config(Augmentation):
    """The recipe; the defaults are what the paper describes, see `PRESETS`."""

    epochs: int = 200
    batch_size: int = 200
    lr: float = 0.001
    warmup: int = 5  # epochs over which the learning rate rises from 0, update by update
    lr_horizon: int = 0  # epoch at which the cosine reaches 0; 0: the last one
    clip: float = 1.0  # largest norm of the gradient, for the denoiser and the image encoder each
    neighbours: int = 10  # K
    exclude_self: bool = True  # an image is no neighbour of its own; its own label joins the draw once all the same
    sampling_steps: int = 10  # must divide the diffusion's steps
    train_image_encoder: bool = True  # False: it stays as it was initialised
    encoder_eval_mode: bool = True  # predict (and, untrained, train) with running statistics; False: with the batch's
    use_ema: bool = True  # predict with the moving average of the weights
    ema_decay: float = 0.9999  # at most; update n uses (1 + n) / (10 + n) while that is less, for short runs
    weighted: bool = True  # weigh each target by how many of its candidates agree with it; False: all alike
    per_class: int = 0  # images of each class, by their present labels, that an epoch draws afresh; 0: all images
    measure_every: int = 5  # epochs; the last one is always measured
    measure_batch: int = 1000  # images predicted at once
    bf16: bool = False  # autocast the image encoder to bfloat16
    compiled: bool = False  # through torch.compile


PRESETS: Mapping[str, Config] = {
    "paper": Config(),
    "released": Config(
        lr_horizon=1000,
        exclude_self=False,
        train_image_encoder=False,
        encoder_eval_mode=False,
        use_ema=False,
        measure_batch=200,
    ),
}
"""`released` behaves as the public code does on CIFAR with CLIP features."""


@dataclass(frozen=True)
class Result:
    """What training left besides the network, which holds the weights of the last epoch (averaged with `use_ema`).

    Attributes:
        history: One entry per epoch: epoch (from 0), lr of its last update, loss, and in measured epochs what `measure`
            returned.
    """

    history: list[dict[str, float]]


def signal_schedule(steps: int = 1000) -> Tensor:
    """How much of the label is left after each step of the cosine schedule: the cumulative product of 1 - beta.

    Example:
        >>> [f"{float(left):.6f}" for left in signal_schedule()[[0, 1, 901]]]
        ['0.999959', '0.999913', '0.023145']
    """
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    level = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(dim=0).float()


class GatedLinear(nn.Module):
    """A linear layer whose units are multiplied by gains that belong to the diffusion step."""

    def __init__(self, width_in: int, width: int, steps: int) -> None:
        """Map (B, width_in) to (B, width) at `steps` + 1 steps."""
        super().__init__()
        self.linear = nn.Linear(width_in, width)
        self.gain = nn.Embedding(steps + 1, width)
        nn.init.uniform_(self.gain.weight)


class Denoiser(nn.Module):
    """Predicts the noise in label vectors: three gated layers, the image embedding multiplied in after the first.

    Args:
        num_classes: C.
        feature_dim: P.
        width: E.
        steps: Steps of the diffusion.
    """

    def __init__(self, num_classes: int, feature_dim: int, width: int = 512, steps: int = 1000) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.first = GatedLinear(num_classes + feature_dim, width, steps)
        self.second, self.third = (GatedLinear(width, width, steps) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(3))
        self.embedding_norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, num_classes)

    def condition(self, features: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the work that is the same at every step: the first layer's share of the features, and the gate.

        Args:
            features: Of the frozen encoder, (B, P).
            embedding: Of the image encoder, (B, E).
        """
        linear = self.first.linear
        return F.linear(features, linear.weight[:, self.num_classes :], linear.bias), self.embedding_norm(embedding)

    def forward(self, noisy: Tensor, step: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
        """The noise in `noisy`, (B, C), at `step`, (B,) int64, under a condition from `condition`."""
        shared, gate = condition
        hidden = shared + F.linear(noisy, self.first.linear.weight[:, : self.num_classes])  # (B, E)
        hidden = gate * F.softplus(self.norms[0](self.first.gain(step) * hidden))
        for layer, norm in zip((self.second, self.third), self.norms[1:], strict=True):
            hidden = F.softplus(norm(layer.gain(step) * layer.linear(hidden)))
        noise: Tensor = self.head(hidden)
        return noise


class LabelDiffusion(nn.Module):
    """The denoiser, its image encoder and the schedule.

    Args:
        image_encoder: Maps a batch of inputs to embeddings, (B, width).
        num_classes: C.
        feature_dim: P.
        width: E.
        steps: Steps of the diffusion.
    """

    signal: Tensor

    def __init__(
        self, image_encoder: nn.Module, num_classes: int, feature_dim: int, width: int = 512, steps: int = 1000
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.denoiser = Denoiser(num_classes, feature_dim, width, steps)
        self.register_buffer("signal", signal_schedule(steps), persistent=False)

    @torch.no_grad()
    def sample(self, inputs: Tensor, features: Tensor, sampling_steps: int = 10) -> Tensor:
        """Denoise label vectors that start as zeros, without adding noise (DDIM, Song et al., arXiv:2010.02502).

        Args:
            inputs: What the image encoder takes, B rows.
            features: Of the frozen encoder, (B, P).
            sampling_steps: Evaluations of the denoiser.

        Returns:
            Label vectors, (B, C).
        """
        condition = self.denoiser.condition(features, self.image_encoder(inputs).float())
        stride = len(self.signal) // sampling_steps
        times = [1 + stride * index for index in range(sampling_steps)]
        vectors = features.new_zeros(len(features), self.denoiser.num_classes)
        for time, earlier in zip(reversed(times), [*reversed(times[:-1]), 0], strict=True):
            step = torch.full((len(features),), time, device=features.device)
            noise = self.denoiser(vectors, step, condition)
            now, then = self.signal[time], self.signal[earlier]
            clean = (vectors - (1 - now).sqrt() * noise) / now.sqrt()
            vectors = then.sqrt() * clean + (1 - then).sqrt() * noise
        return vectors


def decide(vectors: Tensor) -> Tensor:
    """The class whose coordinate is nearest to one, (N,), of label vectors (N, C).

    Example:
        >>> decide(torch.tensor([[1.8, 0.95, 0.0]])).tolist()
        [1]
    """
    return (vectors - 1).abs().argmin(dim=1)


@torch.no_grad()
def nearest(features: Tensor, count: int, *, exclude_self: bool, block: int = 4096) -> Tensor:
    """The nearest rows of each row by Euclidean distance: exact, without ever holding N x N distances.

    Every pair of blocks is multiplied once and serves the rows of both. The features are centred first, which changes
    no distance and keeps the rounding errors of large common values out of them.

    Args:
        features: (N, P) float32.
        count: K, less than N.
        exclude_self: Leave each row out of its own neighbours.
        block: Rows of a block.

    Returns:
        Row indices, (N, K) int64, in no particular order.

    Example:
        >>> nearest(torch.tensor([[0.0], [1.0], [5.0], [7.0]]), 1, exclude_self=True).tolist()
        [[1], [0], [3], [2]]
    """
    total = len(features)
    if not 1 <= count < total:
        raise ValueError(f"neighbours: expected 1 to {total - 1} for {total} rows, got {count}")
    features = features - features.mean(dim=0)
    squares = features.square().sum(dim=1)
    distances = features.new_full((total, count), torch.inf)  # squared
    indices = torch.zeros(total, count, dtype=torch.int64, device=features.device)

    def offer(rows: slice, candidates: Tensor, first: int) -> None:
        """Keep the nearest of what `rows` had and of `candidates`, which are the rows from `first` on."""
        values, columns = candidates.topk(min(count, candidates.shape[1]), largest=False, sorted=False)
        values = torch.cat([distances[rows], values], dim=1)
        columns = torch.cat([indices[rows], columns + first], dim=1)
        distances[rows], chosen = values.topk(count, largest=False, sorted=False)
        indices[rows] = columns.gather(1, chosen)

    starts = range(0, total, block)
    for one in tqdm(starts, "neighbours", disable=None):
        for other in range(one, total, block):
            rows, columns = slice(one, one + block), slice(other, other + block)
            between = torch.addmm(squares[columns], features[rows], features[columns].T, alpha=-2)
            between += squares[rows, None]
            if one == other and exclude_self:
                between.fill_diagonal_(torch.inf)
            offer(rows, between, other)
            if one != other:
                offer(columns, between.T.contiguous(), one)
    return indices


def draw_targets(labels: Tensor, neighbours: Tensor, rows: Tensor, weighted: bool = True) -> tuple[Tensor, Tensor]:
    """Draw each image's target among the present labels of its neighbours and its own.

    Args:
        labels: (N,) int64, as they are now.
        neighbours: Row indices, (N, K).
        rows: Rows of the batch, (B,).
        weighted: False weighs all alike.

    Returns:
        Target classes, (B,), and weights, (B,): how many of the K + 1 candidates agree with the target, scaled so that
        the batch sums to one.
    """
    candidates = labels[torch.cat([neighbours[rows], rows[:, None]], dim=1)]  # (B, K + 1)
    picks = torch.randint(candidates.shape[1], (len(rows), 1), device=labels.device)
    targets = candidates.gather(1, picks)
    votes = (candidates == targets).sum(dim=1) if weighted else torch.ones_like(rows)
    return targets[:, 0], votes / votes.sum()


def balanced_rows(labels: Tensor, per_class: int) -> Tensor:
    """Random rows, as many of each class: `per_class`, or as many as the smallest class that occurs has.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 2, 2, 0])
        >>> labels[balanced_rows(labels, 5)].sort().values.tolist()
        [0, 0, 2, 2]
    """
    order = torch.randperm(len(labels), device=labels.device)
    order = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    starts = (counts.cumsum(0) - counts)[labels[order]]
    rank = torch.arange(len(labels), device=labels.device) - starts
    return order[rank < min(per_class, int(counts[counts > 0].min()))]


def antithetic_steps(count: int, steps: int, device: torch.device) -> Tensor:
    """Diffusion steps of a batch, (count,): a uniform draw, then its mirror image, so that early and late balance."""
    half = torch.randint(steps, (count // 2 + 1,), device=device)
    return torch.cat([half, steps - 1 - half])[:count]


def loss_of(
    network: LabelDiffusion,
    embedding: Tensor,
    features: Tensor,
    targets: Tensor,
    weights: Tensor,
    places: Places = EVERY,
) -> Tensor:
    """Weighted squared error of the predicted noise, averaged over the classes.

    Args:
        network: In training mode.
        embedding: Of the image encoder, (B, E), or fewer rows, those at `places`.
        features: Of the frozen encoder, (B, P), or those rows.
        targets: Classes, (B,).
        weights: (B,), summing to one.
        places: The rows of the batch that count; steps and noise are drawn for all of them.
    """
    steps = antithetic_steps(len(targets), len(network.signal), targets.device)
    left = network.signal[steps, None]
    clean = F.one_hot(targets, network.denoiser.num_classes).float()
    noise = torch.randn_like(clean)
    noisy = left.sqrt() * clean + (1 - left).sqrt() * noise
    predicted = network.denoiser(noisy[places], steps[places], network.denoiser.condition(features, embedding))
    loss: Tensor = (weights[places] * (predicted - noise[places]).square().mean(dim=1)).sum()
    return loss


class _Objective(nn.Module):
    """The loss in one call, as several processes need it."""

    def __init__(self, network: LabelDiffusion, embedded: bool) -> None:
        """With `embedded` the inputs are the image encoder's outputs already."""
        super().__init__()
        self.network, self.embedded = network, embedded

    def forward(self, inputs: Tensor, features: Tensor, targets: Tensor, weights: Tensor, places: Places) -> Tensor:
        embedding = inputs if self.embedded else self.network.image_encoder(inputs).float()
        return loss_of(self.network, embedding, features, targets, weights, places)


def learning_rate(config: Config, epoch: float) -> float:
    """Learning rate at a fractional epoch: a linear ramp from zero, then half a cosine.

    Example:
        >>> [round(learning_rate(PRESETS["released"], epoch), 6) for epoch in (0, 2.5, 5, 200)]
        [0.0, 0.0005, 0.001, 0.000908]
    """
    if epoch < config.warmup:
        return config.lr * epoch / config.warmup
    horizon = config.lr_horizon or config.epochs
    return config.lr * (1 + math.cos(math.pi * (epoch - config.warmup) / (horizon - config.warmup))) / 2


def is_due(config: Config, epoch: int) -> bool:
    """Whether an epoch, from 0, is one of those that are measured regularly; besides these, the last one always is."""
    return epoch >= config.warmup and epoch % config.measure_every == 0


def predictor(network: LabelDiffusion, config: Config) -> Predict:
    """A function from inputs and features to classes; it puts the network in the mode that the config asks for.

    Several processes that train together each predict a part of every batch: all of them have to call it.
    """

    @torch.no_grad()
    def predict(inputs: Tensor, features: Tensor) -> Tensor:
        network.eval()
        rows = rows_at_once(inputs, config.measure_batch)
        if not config.encoder_eval_mode:
            network.image_encoder.train()
            for layer in network.image_encoder.modules():
                if isinstance(layer, nn.Dropout):  # the released code's encoder has none; a head on features does
                    layer.eval()
            rows = config.measure_batch  # the images of a batch are predicted by its statistics
        batches = zip(torch.split(inputs, rows), torch.split(features, rows), strict=True)
        return in_parts(network, batches, lambda some, of: decide(network.sample(some, of, config.sampling_steps)))

    return predict


@torch.no_grad()
def _embeddings(network: LabelDiffusion, inputs: Tensor, config: Config) -> Tensor:
    """What the untrained image encoder says of every image, (N, E)."""
    network.image_encoder.eval()
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=config.bf16):
        batches = ((some,) for some in torch.split(inputs, rows_at_once(inputs, config.measure_batch)))
        return in_parts(network, batches, lambda some: network.image_encoder(some).float())


def _average(decay: float) -> Callable[[Weights, Weights, Tensor | int], None]:
    def update(averaged: Weights, current: Weights, updates: Tensor | int) -> None:
        done = int(updates)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + done) / (10 + done)))

    return update


def _check(
    network: LabelDiffusion, inputs: Tensor, features: Tensor, labels: Tensor, config: Config, neighbours: Tensor | None
) -> None:
    count, num_classes = len(inputs), network.denoiser.num_classes
    feature_dim = network.denoiser.first.linear.in_features - num_classes
    if tuple(features.shape) != (count, feature_dim) or features.dtype != torch.float32:
        raise ValueError(
            f"features: expected ({count}, {feature_dim}) float32, got {tuple(features.shape)} {features.dtype}"
        )
    if labels.dtype != torch.int64 or tuple(labels.shape) != (count,):
        raise ValueError(f"labels: expected ({count},) int64, got {tuple(labels.shape)} {labels.dtype}")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"labels: expected classes 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    if neighbours is not None and tuple(neighbours.shape) != (count, config.neighbours):
        raise ValueError(f"neighbours: expected ({count}, {config.neighbours}), got {tuple(neighbours.shape)}")
    steps = len(network.signal)
    if not 1 <= config.sampling_steps < steps or steps % config.sampling_steps:
        raise ValueError(f"sampling_steps: expected a divisor of {steps}, got {config.sampling_steps}")


def train(
    network: LabelDiffusion,
    inputs: Tensor,
    features: Tensor,
    labels: Tensor,
    config: Config,
    *,
    measure: Measure,
    seed: int,
    neighbours: Tensor | None = None,
    checkpoint: Path | None = None,
) -> Result:
    """Train the denoiser, and the image encoder if it is to be, on labels drawn from the neighbourhood of each image.

    Several processes that torchrun started and that have joined a process group share every batch: `batch_size` is that
    of all together, and each calls this with the same arguments but for the device, the checkpoint in a folder that all
    of them see.

    Args:
        network: On the device of `inputs`; trained in place.
        inputs: Pixels, (N, 3, H, W) uint8, or features, (N, D), for the image encoder.
        features: Of the frozen encoder, (N, P) float32, row by row of the same images.
        labels: Classes, (N,) int64; looked up afresh for every batch and left as they are.
        config: The recipe.
        measure: Called after every `measure_every` epochs and the last one; its figures go into the history.
        seed: Same seed, same result on the CPU; 0 or more.
        neighbours: What `nearest` found for these features and this config, if it has been done; (N, K).
        checkpoint: Safetensors file to write to, and to resume from where it exists, with the same result.

    Raises:
        ValueError: Arguments do not fit each other, or the loss is no number any more.
    """
    _check(network, inputs, features, labels, config, neighbours)
    device = inputs.device
    if neighbours is None:
        neighbours = nearest(features, config.neighbours, exclude_self=config.exclude_self)
    neighbours = from_first(neighbours)  # of equally near ones each process may have found others
    network.image_encoder.requires_grad_(config.train_image_encoder)
    untrained = not config.train_image_encoder and config.encoder_eval_mode
    # Without augmentation its outputs are the same in every epoch.
    embedded = untrained and (inputs.ndim == 2 or not config.is_random)
    objective = parallel(_Objective(network, embedded), device, config.compiled)
    trained = [network.denoiser, network.image_encoder] if config.train_image_encoder else [network.denoiser]
    fused = device.type in ("cpu", "cuda")
    optimiser = torch.optim.Adam([{"params": list(part.parameters())} for part in trained], lr=config.lr, fused=fused)
    average = AveragedModel(network, multi_avg_fn=_average(config.ema_decay)) if config.use_ema else None
    predicting = network if average is None else cast(LabelDiffusion, average.module)

    history: list[dict[str, float]] = []
    embeddings = _embeddings(network, inputs, config) if embedded else None
    rank, count = processes()
    places = slice(rank, None, count)
    found = f"{zlib.crc32(neighbours.cpu().numpy().tobytes()):08x}"  # another encoder finds other ones
    progress = Progress(checkpoint, "lra_diffusion", config, seed, inputs, labels, neighbours_found=found)
    if state := progress.load(network, optimiser):
        history = state["history"]
        if average is not None:
            average.load_state_dict(state["average"])

    bar = tqdm(range(len(history), config.epochs), "lra", initial=len(history), total=config.epochs, disable=None)
    for epoch in bar:
        with seeded(device, seed, epoch):
            network.train()
            network.image_encoder.train(not untrained)
            if config.per_class:
                drawn = balanced_rows(labels, config.per_class)
                batches = [drawn[places] for places in shuffled_batches(len(drawn), config.batch_size, device)]
            else:
                batches = list(shuffled_batches(len(inputs), config.batch_size, device))
            total = torch.zeros((), device=device)
            read = read_batches(inputs if embeddings is None else embeddings, [rows[places] for rows in batches])
            for index, (rows, batch) in enumerate(zip(batches, read, strict=True)):
                rate = learning_rate(config, epoch + index / len(batches))
                for group in optimiser.param_groups:
                    group["lr"] = rate
                targets, weights = draw_targets(labels, neighbours, rows, config.weighted)
                batch = views(batch, config, len(rows), places)
                set_part(network, len(rows), places)
                with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                    loss = objective(batch, features[rows[places]], targets, weights, places)
                optimiser.zero_grad()
                (loss * count).backward()  # averaged over processes, that is the sum
                for part in trained:
                    nn.utils.clip_grad_norm_(part.parameters(), config.clip)
                optimiser.step()
                if average is not None:
                    average.update_parameters(network)
                total += loss.detach()
            mean_loss = summed(total).item() / len(batches)
            if not math.isfinite(mean_loss):
                raise ValueError(f"lr: expected training to converge, got a loss of {mean_loss} in epoch {epoch}")
            figures: Mapping[str, float] = {}
            last = epoch == config.epochs - 1
            if last or is_due(config, epoch):
                figures = measure(predictor(predicting, config))
        history.append({"epoch": float(epoch), "lr": rate, "loss": mean_loss, **figures})
        averaged = {} if average is None else average.state_dict()
        progress.save(
            {
                "model": network.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": averaged,
                "history": history,
            },
            last=last,
        )
        bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
    if average is not None:
        network.load_state_dict(predicting.state_dict())
    return Result(history)
