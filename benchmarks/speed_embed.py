"""Speed of embedding image files, against a bare loop and on Ray: python benchmarks/speed.py embed | embed_ray."""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from synth_refine.images.decode import fitted
from synth_refine.images.embed import embed_images
from synth_refine.images.encoders import TorchEncoder, encoder_by_name, timm_encoder
from synth_refine.images.hashes import content_hashes
from synth_refine.images.sources import open_images

MODEL = "resnet18"  # small, at the usual 224 pixels; random weights take as long as trained ones
SMALL_MODEL = "test_resnet"  # half a million weights
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


def embed_ray(count: int = 2_000, shard_rows: int = 250) -> list[dict[str, Any]]:
    """PNG files of CIFAR's size through a small network, by the plain loop and by Ray Data on this machine.

    The loop decodes in one process beside its own. Ray's figures are of the first run, with the start of a cluster, and
    of a second one on the cluster that then stands, whose processes load the weights anew but not the libraries.
    """
    import ray
    from safetensors.torch import save_file
    from timm import create_model

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "images" / "one").mkdir(parents=True)
        rng = np.random.default_rng(0)
        for number in range(count):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / "one" / f"{number:05d}.png")
        weights = {name: value.contiguous() for name, value in create_model(SMALL_MODEL).state_dict().items()}
        save_file(weights, folder / "weights.safetensors")
        make = partial(encoder_by_name, f"timm:{SMALL_MODEL}", folder / "weights.safetensors")
        encoder, images = make(), open_images(folder / "images")
        encoder.embed(torch.zeros((64, 3, 32, 32), dtype=torch.uint8))  # warm
        hashes, times = content_hashes(images), []
        for number, engine in enumerate(("local", "ray", "ray")):
            start = time.perf_counter()
            embed_images(
                encoder, images, folder / f"kept{number}", hashes=hashes, workers=1, shard_rows=shard_rows,
                engine=engine, address="local", make=make,
            )  # fmt: skip
            times.append(time.perf_counter() - start)
        ray.shutdown()
    return [
        {
            "model": SMALL_MODEL,
            "images": count,
            "shards": -(-count // shard_rows),
            "loop_seconds": times[0],
            "ray_seconds": times[2],
            "ray_seconds_with_its_start": times[1],
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
