"""Time and memory of the anchored refiner on arrays in memory: ``speed.py anchored`` calls `anchored`.

Every figure comes from a process of its own, which this file starts by its path, so that its peak of resident memory
is its own: python benchmarks/speed_anchored.py CODE IMAGES FEATURES CLASSES SYNTHETIC_PER_CLASS THREADS.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZES = [(50_000, 512, 1_000, 5), (45_000, 1_280, 10, 100)]  # images, features, classes, synthetic images per class
BEFORE_SIZE = (50_000, 256, 1_000, 5)  # at which older code is measured too
WRONG = 0.35  # of the given labels, evenly over the classes
APART = 5.6  # distance of the classes' means, in which the spread of a class is one


def make(images: int, features: int, classes: int, per_class: int) -> tuple[Any, ...]:
    """Features, given labels, synthetic features and their classes; and the true labels, for measuring."""
    rng = np.random.default_rng(0)
    means = APART / features**0.5 * rng.standard_normal((classes, features), dtype=np.float32)
    true, intended = rng.integers(0, classes, images), np.repeat(np.arange(classes), per_class)
    given = np.where(rng.random(images) < WRONG, rng.integers(0, classes, images), true)
    real, synthetic = (
        means[labels] + rng.standard_normal((len(labels), features), dtype=np.float32) for labels in (true, intended)
    )
    return real, given, synthetic, intended, true


def measure(images: int, features: int, classes: int, per_class: int) -> dict[str, float]:
    """One call of whatever code the path leads to, and how many labels are wrong before and after."""
    *arrays, true = make(images, features, classes, per_class)
    given = arrays[1]
    start, start_cpu = time.perf_counter(), time.process_time()
    try:
        refine = importlib.import_module("synth_refine.refine.anchored").refine_anchored
        refined, rounds = (result := refine(*arrays)).apply(given), len(result.diagnostics.history)
    except ImportError:  # commit 79f50c7 and others of its time
        posterior = importlib.import_module("synth_refine.anchored").anchored_posterior(*arrays)
        refined = importlib.import_module("synth_refine.decide").decide(posterior, given).apply(given)
        rounds = len(posterior.history)
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - start_cpu,
        "peak_megabytes": round(next(int(one.split()[1]) * 1024 / 1e6 for one in lines if one.startswith("VmHWM"))),
        "rounds": rounds,
        "wrong_before": float((given != true).mean()),
        "wrong_after": float((refined != true).mean()),
    }


def anchored(before: Path | None = None, threads: int = 1) -> list[dict[str, Any]]:
    """A row per size; with the folder of older code, two more, of that code and of this one.

    Args:
        before: A checkout of an older commit.
        threads: For torch.
    """
    here = Path(__file__).resolve().parent.parent
    runs = [("this", here, size) for size in SIZES]
    if before is not None:
        runs += [("before", before, BEFORE_SIZE), ("this", here, BEFORE_SIZE)]
    return [
        {"code": name, **dict(zip(("images", "features", "classes", "synthetic"), size, strict=True)), **figures}
        for name, code, size in runs
        for figures in [_measured(code, size, threads)]
    ]


def _measured(code: Path, size: tuple[int, ...], threads: int) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), str(code.resolve()), *map(str, (*size, threads))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{code}: expected figures, got exit code {done.returncode}: {done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    sys.path[0], *numbers = sys.argv[1:]
    *size, threads = map(int, numbers)
    torch.set_num_threads(threads)
    print(json.dumps(measure(*size)))
