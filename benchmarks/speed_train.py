"""Images per second of training from scratch, by number format and torch.compile: ``speed.py train`` calls `train`."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

import torch

from third_party import standard
from third_party.resnet import resnet34

WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "compiled": {"compiled": True},
    "bf16": {"bf16": True},
    "both": {"bf16": True, "compiled": True},
}


def train(epochs: int = 4) -> list[dict[str, Any]]:
    """The loop of `third_party.standard` with a ResNet-34 on random CIFAR-sized images, on the GPU if there is one.

    Args:
        epochs: How many to time; of all but the first, in which torch.compile works, the median counts.

    Returns:
        A row per way: "images_per_second", "first_epoch_seconds", and "times_float32", the speed as a multiple of that
        of plain float32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size, steps = (128, 100) if device.type == "cuda" else (32, 4)
    count = batch_size * steps
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(0, 10, (count,), generator=generator).to(device)
    rows: list[dict[str, Any]] = []
    for name, switches in WAYS.items():
        config = standard.Config(epochs=epochs, batch_size=batch_size, **switches)
        model = resnet34(10).to(device)
        ends = [time.perf_counter()]

        def note_time(_: object, ends: list[float] = ends) -> dict[str, float]:
            ends.append(time.perf_counter())
            return {}

        standard.train(model, images, labels, config, measure=note_time, seed=0)
        seconds = [end - start for start, end in pairwise(ends)]
        speed = count / statistics.median(seconds[1:])
        rows.append(
            {
                "way": name,
                "device": device.type,
                "batch_size": batch_size,
                "images_per_second": speed,
                "first_epoch_seconds": seconds[0],
                "times_float32": speed / rows[0]["images_per_second"] if rows else 1.0,
            }
        )
    return rows
