"""Speed as ratios within one run: python benchmarks/speed.py WHAT, see --help.

Machines differ and are noisy, so a figure here is always one way of doing the work against another way, timed in turn
in the same process, and the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started by its path; "adapters" is also the name of a package on PyPI
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.records import digest, environment, write_record
from benchmarks.speed_anchored import anchored
from benchmarks.speed_embed import embed, embed_ray
from benchmarks.speed_folders import folder_memory, folders
from benchmarks.speed_lra import lra
from benchmarks.speed_scale import ROWS, plot, scale
from benchmarks.speed_train import train
from synth_refine import refine_labels

SIZES = [(45_000, 512, 10), (200_000, 768, 1000)]  # images, features, classes
IMAGENET = (1_281_167, 768, 1000)
LOOP_ROWS = 2_000  # images of the per-image loop; its time is scaled to all images


def published_way(features: Tensor, logits: Tensor, prototypes: Tensor, threshold: float) -> list[int]:
    """The paper's rule one image and one class at a time, as the published script works."""
    labels = []
    for feature, output in zip(features, logits, strict=True):
        probabilities = F.softmax(output[None], dim=1)[0]
        scores = []
        for index, prototype in enumerate(prototypes):
            cosine = F.cosine_similarity(feature[None], prototype[None])
            scores.append(0.5 * cosine.item() + 0.5 * probabilities[index].item())
        best = max(range(len(scores)), key=scores.__getitem__)
        labels.append(best if scores[best] >= threshold else -1)
    return labels


def floor(features: Tensor, logits: Tensor, prototypes: Tensor) -> None:
    """The arithmetic that nobody can avoid: the matrix product and the softmax, each on the whole arrays."""
    _ = features @ prototypes.T
    _ = logits.softmax(dim=1)


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def resident() -> int:
    """Resident memory of this process in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def extra_memory(function: Callable[[], object]) -> int:
    """Peak of resident memory during one call above what was resident before it, in bytes, sampled each millisecond."""
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return max(0, peak - before)


def refine(rounds: int = 5) -> list[dict[str, Any]]:
    """refine_labels against its own matrix product plus softmax, and against the per-image loop."""
    rows = []
    for num_images, num_features, num_classes in SIZES:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(num_images, num_features, generator=generator)
        logits = torch.randn(num_images, num_classes, generator=generator)
        prototypes = torch.randn(num_classes, num_features, generator=generator)

        def ours(arrays: tuple[Tensor, Tensor, Tensor] = (features, logits, prototypes)) -> object:
            return refine_labels(*arrays, 0.6)

        def bare(arrays: tuple[Tensor, Tensor, Tensor] = (features, logits, prototypes)) -> None:
            floor(*arrays)

        memory = extra_memory(ours)
        bare()
        times = [(seconds(ours), seconds(bare)) for _ in range(rounds)]
        loop_rows = min(LOOP_ROWS, 200_000 // num_classes)

        def loop(
            arrays: tuple[Tensor, Tensor, Tensor] = (features[:loop_rows], logits[:loop_rows], prototypes),
        ) -> object:
            return published_way(*arrays, 0.6)

        loop_seconds = seconds(loop) * num_images / loop_rows
        our_seconds = statistics.median(time for time, _ in times)
        rows.append(
            {
                "images": num_images,
                "features": num_features,
                "classes": num_classes,
                "seconds": our_seconds,
                "times_matmul_and_softmax": statistics.median(a / b for a, b in times),
                "loop_seconds": loop_seconds,
                "times_faster_than_loop": loop_seconds / our_seconds,
                "extra_megabytes": memory / 1e6,
            }
        )
    return rows


def refine_card(rounds: int = 5, size: tuple[int, int, int] = IMAGENET) -> list[dict[str, Any]]:
    """refine_labels on a GPU against what it cannot avoid there: the matrix product, and a copy of the logits."""
    if not torch.cuda.is_available():
        raise SystemExit("refine_card: expected a CUDA device, got none")
    num_images, num_features, num_classes = size
    torch.manual_seed(0)
    features, logits, prototypes = (
        torch.randn(shape, device="cuda")
        for shape in ((num_images, num_features), (num_images, num_classes), (num_classes, num_features))
    )

    def timed(function: Callable[[], object]) -> float:
        def to_the_end() -> None:
            function()
            torch.cuda.synchronize()

        return seconds(to_the_end)

    ways: dict[str, Callable[[], object]] = {
        "seconds": lambda: refine_labels(features, logits, prototypes, 0.6),
        "matmul_seconds": lambda: features @ prototypes.T,
        "copy_seconds": logits.clone,
    }
    for way in ways.values():
        timed(way)
    times = {name: statistics.median(timed(way) for _ in range(rounds)) for name, way in ways.items()}
    bound = max(times["matmul_seconds"], times["copy_seconds"])
    about = {"device": torch.cuda.get_device_name(), "images": num_images, "features": num_features}
    return [{**about, "classes": num_classes, **times, "times_larger_of_both": times["seconds"] / bound}]


BENCHMARKS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "refine": refine,
    "refine_card": refine_card,
    "train": train,
    "lra": lambda: [lra()],
    "embed": embed,
    "embed_ray": embed_ray,
    "folders": folders,
    "folder_memory": folder_memory,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Time one thing and write a record of it; of `scale`, one per table and a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=sorted([*BENCHMARKS, "anchored", "scale"]))
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder of the record (%(default)s)")
    parser.add_argument("--largest", type=int, default=ROWS[-1], help="scale: most images to try (%(default)s)")
    parser.add_argument("--scratch", type=Path, help="scale: folder for up to 6 GB of arrays (the system's)")
    parser.add_argument("--before", type=Path, help="anchored: checkout of older code, which is measured too")
    options = parser.parse_args(arguments)
    if options.what == "scale":
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            tables = scale(Path(scratch), options.largest, torch.get_num_threads())
    elif options.what == "anchored":
        tables = {"anchored": anchored(options.before, torch.get_num_threads())}
    else:
        tables = {options.what: BENCHMARKS[options.what]()}
    for name, rows in tables.items():
        record = {"benchmark": name, "environment": environment(), "rows": rows}
        write_record(options.out / f"{name}_{digest(record)}.json", record)
    if options.what == "scale":
        plot(tables["scale"], options.out / "scale.png")
    print(json.dumps(tables, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
