"""Small images and sources for the tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RED = (250, 10, 20)


def data(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(seed: int, width: int = 12, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def close(image: Image.Image, color: tuple[int, int, int], most: int = 3) -> bool:
    return bool((abs(np.asarray(image).astype(int) - color) <= most).all())


def save(folder: Path, *names: str) -> dict[str, bytes]:
    files = {}
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files[name] = data(noise(seed))
        (folder / name).write_bytes(files[name])
    return files


def shard(path: Path, samples: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
