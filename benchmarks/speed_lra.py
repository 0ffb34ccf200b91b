"""Steps per second of LRA-diffusion beside the released way of working: ``speed.py lra`` calls `lra`.

Both train the same network on the same batches. The released way finds the neighbours of every batch again, over the
whole bank, and makes the label tensor anew from a Python list in every step; this one looks both up.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from third_party.lra_diffusion import LabelDiffusion, draw_targets, loss_of, nearest
from third_party.resnet import FeatureHead


def lra(
    rows: int = 45_000,
    feature_dim: int = 1280,
    batch_size: int = 200,
    neighbours: int = 10,
    steps: int = 20,
    threads: int | None = None,
) -> dict[str, Any]:
    """Time both on random features, taking turns, so that a busy machine slows both.

    Args:
        rows: Training images, N.
        feature_dim: P.
        batch_size: B.
        neighbours: K.
        steps: Timed steps of each, after three untimed ones.
        threads: For torch; None leaves its choice.

    Returns:
        Steps per second, "ours" and "released", their ratio, "speedup", and the seconds that `nearest` took once.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    features = torch.randn(rows, feature_dim)
    labels = torch.randint(10, (rows,))
    as_list = labels.tolist()
    start = time.perf_counter()
    found = nearest(features, neighbours, exclude_self=False)
    search_seconds = time.perf_counter() - start
    found_again = torch.zeros_like(found)

    encoder = FeatureHead(512, features.mean(dim=0), features.std(dim=0))
    network = LabelDiffusion(encoder, 10, feature_dim).train()
    encoder.requires_grad_(False)
    optimiser = torch.optim.Adam(network.denoiser.parameters(), fused=True)

    def step(batch: Tensor, labels_now: Tensor, found_now: Tensor, places: Tensor) -> None:
        targets, weights = draw_targets(labels_now, found_now, places)
        inputs = features[batch]
        loss = loss_of(network, network.image_encoder(inputs), inputs, targets, weights)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's stubs
        nn.utils.clip_grad_norm_(network.denoiser.parameters(), 1.0)
        optimiser.step()

    def ours(batch: Tensor) -> None:
        step(batch, labels, found, batch)

    def released(batch: Tensor) -> None:
        labels_now = torch.tensor(as_list)
        near = torch.cdist(features[batch], features).topk(neighbours, dim=1, largest=False).indices
        found_again[batch] = near
        step(batch, labels_now, found_again, batch)

    seconds = {"ours": 0.0, "released": 0.0}
    for number in tqdm(range(steps + 3), "lra", disable=None):
        batch = torch.randint(rows, (batch_size,))
        for name, way in (("ours", ours), ("released", released)):
            start = time.perf_counter()
            way(batch)
            if number >= 3:
                seconds[name] += time.perf_counter() - start
    speed = {name: steps / value for name, value in seconds.items()}
    return {**speed, "speedup": speed["ours"] / speed["released"], "search_seconds": search_seconds}
