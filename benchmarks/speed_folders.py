"""Speed and memory of folder tasks: python benchmarks/speed.py folders | folder_memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.pixels import PixelStore, _opened, read_resize
from synth_refine.images.hashes import content_hashes
from synth_refine.images.sources import open_images
from third_party.augment import Augmentation, augment
from third_party.mapped import MappedImages

SIDES = (500, 375)  # of the JPEG files: ImageNet's usual ones
BATCH = 64
PIXELS = 4_000_000_000  # bytes of the task whose memory is measured


def pictures(folder: Path, count: int, kind: str, sides: tuple[int, int]) -> None:
    """Files with about the detail of photographs, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        rough = Image.fromarray(rng.integers(0, 256, (sides[1] // 8, sides[0] // 8, 3), dtype=np.uint8))
        rough.resize(sides, Image.Resampling.BICUBIC).save(place / f"{number:06d}.{kind}", quality=90)


def folders(rounds: int = 3, workers: int = 2) -> list[dict[str, Any]]:
    """Epochs of shuffled batches from image files, against torchvision's ImageFolder and DataLoader.

    Both have as many workers.
    Ours hashes, decodes and keeps all images before the first epoch, and reads the batches of every epoch from the
    file. The images are brought to the same size in both ways, and then cropped and mirrored: theirs by the workers,
    image by image, ours by this process, batch by batch.
    """
    torch.set_num_threads(1)
    return [
        _against_torchvision("png", (32, 32), {"resize": 32}, 4_000, rounds, workers),
        _against_torchvision("jpg", SIDES, {"resize": 256, "crop": 224}, 600, rounds, workers),
    ]


def _against_torchvision(
    kind: str, sides: tuple[int, int], size: dict[str, int], count: int, rounds: int, workers: int
) -> dict[str, Any]:
    from torchvision import transforms  # type: ignore[import-untyped]
    from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

    resize = read_resize(size)
    assert resize.size is not None
    side = resize.size[0]
    steps = [transforms.Resize(size["resize"]), transforms.CenterCrop(side), transforms.RandomCrop(side, padding=4)]
    steps += [transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        pictures(root / "images", count, kind, sides)
        theirs = ImageFolder(str(root / "images"), transforms.Compose(steps))

        def one_epoch() -> None:
            for _ in DataLoader(theirs, BATCH, shuffle=True, num_workers=workers):
                pass

        def opened(number: int) -> MappedImages:
            images = open_images(root / "images")
            store = PixelStore(images, content_hashes(images), resize, root / f"store{number}")
            return MappedImages(store.open(workers)[0])

        def ours(images: MappedImages) -> None:
            for batch in images.batches(torch.split(torch.randperm(count), BATCH)):
                augment(batch, Augmentation())

        def first(number: int) -> MappedImages:
            images = opened(number)
            ours(images)
            return images

        times: list[tuple[float, float, float]] = []
        for number in range(rounds):
            their_seconds = seconds(one_epoch)
            first_seconds = seconds(lambda number=number: first(number))  # type: ignore[misc]
            images = opened(number)
            times.append((their_seconds, first_seconds, seconds(lambda images=images: ours(images))))  # type: ignore[misc]
            _opened.cache_clear()
    return {
        "files": f"{kind} {sides[0]}x{sides[1]}",
        "pixels": side,
        "images": count,
        "workers": workers,
        "torchvision_images_per_second": count / statistics.median(one for one, _, _ in times),
        "first_epoch_speed": statistics.median(one / two for one, two, _ in times),
        "later_epoch_speed": statistics.median(one / three for one, _, three in times),
    }


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


MEMORY = """
import json, resource, sys
from benchmarks import run_combo
code = run_combo.main(sys.argv[1:])
print(json.dumps({"code": code, "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def folder_memory(size: int = PIXELS, side: int = 512) -> list[dict[str, Any]]:
    """Peak of resident memory of a benchmark run on the CPU whose training images have so many bytes of pixels.

    The files are hard links to a few pictures. It decodes them, trains for an epoch on crops, which keep the network's
    part of the memory and of the time small, and measures.
    """
    count = size // (3 * side * side)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        pictures(root / "few", 40, "jpg", (side, side))
        few = sorted((root / "few").rglob("*.jpg"))
        for part, number in (("images/train", count), ("images/test", 40), ("synthetic", 40)):
            for row in range(number):
                source = few[row % len(few)]
                place = root / part / source.parent.name
                place.mkdir(parents=True, exist_ok=True)
                os.link(source, place / f"{row:06d}.jpg")
        arguments = ["--images", f"{root}/images", "--synthetic", f"{root}/synthetic", "--out", f"{root}/runs"]
        arguments += ["--method", "standard", "--refine", "none", "--noise", "uniform-0.3", "--device", "cpu"]
        arguments += [f"pixels.resize={side}", "methods.standard.epochs=1", "methods.standard.crop=128"]
        start = time.perf_counter()
        command = [sys.executable, "-c", MEMORY, *arguments]
        where = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, cwd=where, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
    if found["code"]:
        raise SystemExit(f"folder_memory: expected the run to succeed, got exit code {found['code']}")
    return [
        {
            "images": count,
            "pixels": side,
            "gigabytes_of_pixels": 3 * side * side * count / 1e9,
            "peak_resident_gigabytes": found["peak"] / 1e9,
            "seconds": time.perf_counter() - start,
        }
    ]
