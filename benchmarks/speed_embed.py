"""Speed of embedding image files against a bare loop over the same model: python benchmarks/speed.py embed."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from synth_refine.encode import TorchEncoder, timm_encoder
from synth_refine.images import content_hashes, embed_images, fitted, open_images

MODEL = "resnet18"  # small, at the usual 224 pixels; random weights take as long as trained ones
COUNT = 128
SIDES = (500, 375)  # of the JPEG files: ImageNet's usual ones


def embed(rounds: int = 3, count: int = COUNT) -> list[dict[str, Any]]:
    """Features from JPEG files on disk, decoded by one process, against the same encoder on pixels in memory.

    The model computes on one thread, so that one of two cores decodes. Both ways begin with the sizes that the network
    wants; files are read, hashed, decoded, brought to that size and kept as shards in our way alone.
    """
    torch.set_num_threads(1)
    encoder = _encoder()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _pictures(folder / "images", count)
        images = open_images(folder / "images")
        preprocess = encoder.preprocess
        pixels = np.stack([np.asarray(fitted(images.image(row), preprocess)) for row in range(count)])
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        encoder.embed(tensor[:64])  # warm
        pairs = []
        for number in range(rounds):
            start = time.perf_counter()
            for batch in torch.split(tensor, 64):
                encoder.embed(batch)
            bare = time.perf_counter() - start
            start = time.perf_counter()
            hashes = content_hashes(images)
            hashed = time.perf_counter() - start
            start = time.perf_counter()
            embed_images(encoder, images, folder / f"kept{number}", hashes=hashes, workers=1)
            pairs.append((bare, time.perf_counter() - start, hashed))
    return [
        {
            "model": MODEL,
            "images": count,
            "threads": 1,
            "workers": 1,
            "bare_images_per_second": count / statistics.median(bare for bare, _, _ in pairs),
            "hash_seconds": statistics.median(hashed for _, _, hashed in pairs),
            "speed_of_bare_loop": statistics.median(bare / ours for bare, ours, _ in pairs),
        }
    ]


def _encoder() -> TorchEncoder:
    import timm
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        network = timm.create_model(MODEL, pretrained=False)
        weights = {name: value.contiguous() for name, value in network.state_dict().items()}
        save_file(weights, Path(place) / "weights.safetensors")
        return timm_encoder(MODEL, Path(place) / "weights.safetensors")


def _pictures(folder: Path, count: int) -> None:
    """JPEG files with about the detail of photographs."""
    (folder / "one").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        rough = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        rough.resize(SIDES, Image.Resampling.BICUBIC).save(folder / "one" / f"{number:04d}.jpg", quality=90)
