"""CIFAR-10 as folders of PNG files, for `run_combo.py --images`: python benchmarks/make_folders.py --data FILE.npz ...

The .npz file is the one that `benchmarks/data.py` describes, of CIFAR-10 in its original order. Then:

python benchmarks/run_combo.py --images OUT/cifar10-folders --synthetic OUT/synthetic --given OUT/LABELS.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started by its path; "adapters" is also the name of a package on PyPI
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synth_refine._io.csv import csv_bytes
from synth_refine._io.untrusted import open_plain
from synth_refine.labels.files import read_labels

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def save(folder: Path, images: NDArray[Any], labels: NDArray[Any], names: Sequence[str] = CIFAR10) -> list[str]:
    """Write images, (N, H, W, 3) uint8, into the folders of their classes; their paths in the folder."""
    ids = [f"{names[label]}/{row:05d}.png" for row, label in enumerate(labels)]
    for one, image in zip(ids, images, strict=True):
        (folder / one).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / one)
    return ids


def main(arguments: Sequence[str] | None = None) -> int:
    """Write train (in folders of the true classes), test, synthetic and the given labels by id."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=".npz file of images")
    parser.add_argument("--given", type=Path, required=True, help="noisy labels of the first training images")
    parser.add_argument("--train", type=int, default=2_000, help="training images (%(default)s)")
    parser.add_argument("--test", type=int, default=1_000, help="test images (%(default)s)")
    parser.add_argument("--synthetic", type=int, default=100, help="synthetic images per class (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/folders"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    with open_plain("data", options.data) as file, np.load(file, allow_pickle=False) as arrays:
        parts = {
            name: (arrays[name][:count], arrays[f"{name}_labels"][:count])
            for name, count in (("train", options.train), ("test", options.test))
        }
        labels = arrays["synthetic_labels"]
        rows = np.concatenate([np.flatnonzero(labels == one)[: options.synthetic] for one in range(len(CIFAR10))])
        save(options.out / "synthetic", arrays["synthetic"][rows], labels[rows])
    ids = {name: save(options.out / "cifar10-folders" / name, *part) for name, part in parts.items()}
    given = read_labels(options.given)[: options.train]
    table = {"id": ids["train"], "label": [CIFAR10[label] for label in given]}
    (options.out / f"{options.given.stem}.csv").write_bytes(csv_bytes(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
