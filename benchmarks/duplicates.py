"""Copies that were put among photographs, and how many are found: python benchmarks/duplicates.py.

SYNTH_REFINE_DATA names the folder whose cifar10/ holds labels.npz and images/train_*.webp, sheets of 32 x 32 pictures.
Of 3,000 photographs 30 get an exact copy and 30 a copy that is resized or compressed again, half of them as another
class. The thresholds of `synth_refine.images.duplicates` were chosen on the photographs of seed 0.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started by its path; "adapters" is also the name of a package on PyPI
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adapters.lra_diffusion import GLYPH_CLIP
from benchmarks.make_folders import CIFAR10
from benchmarks.records import digest, environment, write_record
from benchmarks.speed import extra_memory
from synth_refine import InputError
from synth_refine.images.duplicates import Duplicates, find_duplicates
from synth_refine.images.embed import Embedded, embed_images
from synth_refine.images.encoders import encoder_by_name
from synth_refine.images.hashes import content_hashes
from synth_refine.images.sources import open_images

SIDE, COLUMNS = 32, 40  # of a picture in pixels, and of a sheet in pictures
WAYS = ("24 pixels", "48 pixels", "JPEG 60")  # of near copies, in turn


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the folder, search, compare with what was planted, and write a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=3_000, help="photographs (%(default)s)")
    parser.add_argument("--copies", type=int, default=30, help="of either kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--encoder", default="glyph-clip", help="or what `synth-refine run` takes (%(default)s)")
    parser.add_argument("--weights", help="local weights of the encoder")
    parser.add_argument("--out", type=Path, default=Path("runs/duplicates"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    folder: Path = options.out / "photographs"
    if folder.exists():
        shutil.rmtree(folder)
    exact, near = _plant(folder, options.images, options.copies, options.seed)
    encoder = encoder_by_name(str(GLYPH_CLIP) if options.encoder == "glyph-clip" else options.encoder, options.weights)
    images = open_images(folder)
    hashes = content_hashes(images)
    features, bad = embed_images(encoder, images, options.out / "features", hashes=hashes, workers=0)
    embedded = time.perf_counter()
    found: list[Duplicates] = []
    extra = extra_memory(lambda: found.append(find_duplicates({"images": Embedded(images, features, hashes, bad)})))
    searched = time.perf_counter()
    groups = [({one.id for one in group}, {one.kind for one in group}) for group in found[0].groups]
    same = [ids for ids, kinds in groups if kinds == {"exact"}]
    alike = [ids for ids, kinds in groups if kinds != {"exact"}]
    right = sum(pair in alike for pair in near)
    row = {
        "encoder": options.encoder,
        "seed": options.seed,
        "images": len(images.ids),
        "exact_found": sum(pair in same for pair in exact) / len(exact),
        "exact_precision": sum(ids in exact for ids in same) / max(len(same), 1),
        "near_found": right / len(near),
        "near_precision": right / max(len(alike), 1),
        "with_other_label": found[0].conflicting,
        "search_seconds": searched - embedded,
        "search_megabytes": extra / 1e6,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }
    notes = {"not_planted": [sorted(ids) for ids in [*same, *alike] if ids not in [*exact, *near]]}
    record = {"benchmark": "duplicates", "environment": environment(), "rows": [row], "notes": notes}
    write_record(options.out / f"duplicates_{digest(record)}.json", record)
    print(row)
    return 0


def _plant(folder: Path, count: int, copies: int, seed: int) -> tuple[list[set[str]], list[set[str]]]:
    """Write photographs and copies of some; the pairs of ids that are exact and near copies."""
    photographs, labels = _photographs(count, seed)
    names = []
    for row, (pixels, label) in enumerate(zip(photographs, labels.tolist(), strict=True)):
        names.append(f"{CIFAR10[label]}/{row:05d}.png")
        (folder / names[row]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / names[row])
    pairs = []
    for row in range(2 * copies):
        image, way = Image.open(folder / names[row]), row % len(WAYS)
        label = CIFAR10[(labels[row] + row % 2) % len(CIFAR10)]
        ending = "jpg" if row >= copies and way == WAYS.index("JPEG 60") else "png"
        place = folder / label / f"copy-{row:05d}.{ending}"
        if row < copies:
            shutil.copyfile(folder / names[row], place)
        elif ending == "jpg":
            image.save(place, quality=60)
        else:
            side = (24, 48)[way]
            image.resize((side, side), Image.Resampling.BILINEAR).save(place)
        pairs.append({names[row], place.relative_to(folder).as_posix()})
    return pairs[:copies], pairs[copies:]


def _photographs(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Photographs of CIFAR-10's training images and their true classes."""
    root = Path(os.environ.get("SYNTH_REFINE_DATA", "")) / "cifar10"
    if not (root / "labels.npz").is_file():
        raise InputError("SYNTH_REFINE_DATA: expected a folder with cifar10/labels.npz")
    sheets = []
    for path in sorted((root / "images").glob("train_*.webp")):
        sheet = np.asarray(Image.open(path).convert("RGB"))
        sheets.append(sheet.reshape(-1, SIDE, COLUMNS, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3))
    labels = np.load(root / "labels.npz", allow_pickle=False)["train"].astype(np.int64)
    rows = np.random.default_rng(seed).permutation(len(labels))[:count]
    return np.concatenate(sheets)[rows], labels[rows]


if __name__ == "__main__":
    sys.exit(main())
