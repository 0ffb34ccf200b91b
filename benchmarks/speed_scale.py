"""Time and memory of sharded refining: ``speed.py scale`` calls `scale`.

Every figure comes from a process of its own, which this file starts by its path, so that its peak of resident memory
is its own: python benchmarks/speed_scale.py refine FOLDER THREADS.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # started by its path; "adapters" is also the name of a package on PyPI
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from synth_refine._io.check import float_tensor
from synth_refine.refine.paper import chunk_rows
from synth_refine.scale.shards import refine_shards
from synth_refine.scale.tables import SHARD_ROWS, cut_shards, read_chunks

ROWS = (10_000, 100_000, 1_000_000, 10_000_000)  # at 256 features and 1,000 classes
CLASSES = (10, 100, 1_000, 10_000)  # at 1,000,000 images of 64 features
RIVAL_SIZE = (200_000, 256, 1_000)  # cleanlab's: images, features, classes
ANCHORED_SIZES = [(100_000, 64, 100), (1_000_000, 64, 100)]
RIVALS = {
    "refine_shards": "ours",
    "cleanlab find_label_issues": "cleanlab_whole",
    "cleanlab find_label_issues_batched": "cleanlab_batched",
}
TIMES_OURS = {"seconds": "seconds", "memory": "peak_megabytes"}
BLOCK = 1 << 16
THRESHOLD = 0.5


def make_arrays(folder: Path, rows: int, width: int, num_classes: int, *, logits: bool = False) -> None:
    """Float16 features, given labels and prototypes of a class each; blocks repeat, time does not depend on values."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    prototypes = rng.standard_normal((num_classes, width), dtype=np.float32)
    np.save(folder / "prototypes.npy", prototypes)
    given = rng.integers(0, num_classes, min(rows, BLOCK))
    np.save(folder / "given.npy", np.resize(given, rows))
    block = prototypes[given] + 3 * rng.standard_normal((len(given), width), dtype=np.float32)
    _save_repeated(folder / "features.npy", block.astype(np.float16), rows)
    if logits:
        scores = 3 * rng.standard_normal((min(rows, BLOCK // 8), num_classes), dtype=np.float32)
        _save_repeated(folder / "logits.npy", scores, rows)
        _save_repeated(folder / "probabilities.npy", torch.from_numpy(scores).softmax(dim=1).numpy(), rows)


def _save_repeated(path: Path, block: Any, rows: int) -> None:
    with open(path, "wb") as file:
        about = {"descr": block.dtype.str, "fortran_order": False, "shape": (rows, block.shape[1])}
        np.lib.format.write_array_header_1_0(file, about)
        for start in range(0, rows, len(block)):
            file.write(block[: rows - start].tobytes())


def make_classes(folder: Path, rows: int, width: int, num_classes: int) -> None:
    """Float16 features of classes that can be told apart, a third of them labelled wrong, and ten synthetic of each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    means = 2 * rng.standard_normal((num_classes, width), dtype=np.float32)
    true = np.arange(rows) * num_classes // rows  # sorted by class, as folders are read
    given = np.where(rng.random(rows) < 1 / 3, rng.integers(0, num_classes, rows), true)
    np.save(folder / "given.npy", given)
    block = rng.standard_normal((BLOCK, width), dtype=np.float32)
    with open(folder / "features.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (rows, width)})
        for start in range(0, rows, BLOCK):
            part = means[true[start : start + BLOCK]]
            file.write((part + block[: len(part)]).astype(np.float16).tobytes())
    labels = np.repeat(np.arange(num_classes), 10)
    np.save(folder / "synthetic_labels.npy", labels)
    np.save(folder / "synthetic.npy", means[labels] + rng.standard_normal((len(labels), width), dtype=np.float32))


def anchored(folder: Path) -> dict[str, float]:
    """The anchored refiner over shards."""
    features, labels = (np.load(folder / f"synthetic{end}.npy", allow_pickle=False) for end in ("", "_labels"))
    about = {"synthetic_features": features, "synthetic_labels": labels}
    start = time.perf_counter()
    done = refine_shards(folder / "features.npy", folder / "given.npy", folder / "out", **about)
    return {"seconds": time.perf_counter() - start, "changed": done.changed}


def refine(folder: Path) -> dict[str, float]:
    """One run over all shards, and the bare matrix product over the same chunks, half of it before and half after."""
    prototypes = np.load(folder / "prototypes.npy", allow_pickle=False)
    shards = cut_shards(folder / "features.npy", folder / "given.npy", None, SHARD_ROWS)
    directions = torch.from_numpy(prototypes.T.copy())
    step = chunk_rows(len(prototypes), prototypes.shape[1])

    def product(part: slice) -> float:
        start = time.perf_counter()
        for shard in shards[part]:
            for values in read_chunks("features", shard.features, step, len(directions)):
                _ = float_tensor(values, torch.float32, torch.device("cpu")) @ directions
        return time.perf_counter() - start

    bare = product(slice(0, None, 2))
    start = time.perf_counter()
    _paper(folder, "out", prototypes)
    taken = time.perf_counter() - start
    bare += product(slice(1, None, 2))
    return {"seconds": taken, "bare_seconds": bare, "shards": len(shards)}


def _paper(folder: Path, out: str, prototypes: Any, **more: Any) -> None:
    paths = (folder / "features.npy", folder / "given.npy", folder / out)
    refine_shards(*paths, prototypes=prototypes, threshold=THRESHOLD, **more)


def resume(folder: Path) -> dict[str, float]:
    """Started again with all shards done, and with one of them lost."""
    prototypes = np.load(folder / "prototypes.npy", allow_pickle=False)

    def again() -> float:
        start = time.perf_counter()
        _paper(folder, "out", prototypes)
        return time.perf_counter() - start

    nothing_to_do = again()
    (folder / "out" / "shards" / "part-000000.parquet").unlink()
    return {"seconds": nothing_to_do, "one_lost_seconds": again()}


def on_ray(folder: Path) -> dict[str, float]:
    """The same shards by the plain loop and by Ray Data on this machine, the first time and once its workers are up."""
    import ray

    prototypes = np.load(folder / "prototypes.npy", allow_pickle=False)
    times = []
    for number, engine in enumerate(("local", "ray", "ray")):
        start = time.perf_counter()
        _paper(folder, f"ray-{number}", prototypes, shard_rows=SHARD_ROWS // 8, engine=engine)
        times.append(time.perf_counter() - start)
    ray.shutdown()
    return dict(zip(("seconds", "ray_seconds_with_start", "ray_seconds"), times, strict=True))


def ours(folder: Path) -> dict[str, float]:
    """The paper's rule on the logits and the features."""
    prototypes = np.load(folder / "prototypes.npy", allow_pickle=False)
    start = time.perf_counter()
    _paper(folder, "ours", prototypes, logits=folder / "logits.npy")
    return {"seconds": time.perf_counter() - start}


def cleanlab_whole(folder: Path) -> dict[str, float]:
    """cleanlab's find_label_issues on the probabilities of the same logits."""
    from cleanlab.filter import find_label_issues  # type: ignore[import-untyped]

    labels = np.load(folder / "given.npy", allow_pickle=False)
    start = time.perf_counter()
    probabilities = np.load(folder / "probabilities.npy", allow_pickle=False)
    find_label_issues(labels, probabilities, n_jobs=torch.get_num_threads())
    return {"seconds": time.perf_counter() - start}


def cleanlab_batched(folder: Path) -> dict[str, float]:
    """cleanlab's find_label_issues_batched on the same files."""
    from cleanlab.experimental.label_issues_batched import find_label_issues_batched  # type: ignore[import-untyped]

    start = time.perf_counter()
    find_label_issues_batched(
        labels_file=str(folder / "given.npy"), pred_probs_file=str(folder / "probabilities.npy"), verbose=False
    )
    return {"seconds": time.perf_counter() - start}


MEASURES: dict[str, Callable[[Path], dict[str, float]]] = {
    one.__name__: one for one in (refine, anchored, resume, on_ray, ours, cleanlab_whole, cleanlab_batched)
}


def measured(name: str, folder: Path, threads: int) -> dict[str, float]:
    """What a measure says in a process of its own, and that process's peak of resident memory."""
    command = [sys.executable, str(Path(__file__).resolve()), name, str(folder.resolve()), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: expected figures, got exit code {done.returncode}: {done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def peak_megabytes() -> float:
    """The most memory of this process that was resident at once (Linux); what its parent held does not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def scale(scratch: Path, largest: int = ROWS[-1], threads: int = 1) -> dict[str, list[dict[str, Any]]]:
    """All tables of sharded refining, by the name of the benchmark.

    Args:
        scratch: Folder for the arrays, 6 GB at ten million rows; emptied again.
        largest: Most rows to try.
        threads: For torch.
    """
    sizes = [(rows, 256, 1_000) for rows in ROWS if rows <= largest]
    sizes += [(min(1_000_000, largest), 64, classes) for classes in CLASSES]
    names = ("scale", "scale_resume", "scale_ray", "scale_anchored", "scale_rivals")
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    row: dict[str, Any]
    for size in sizes:
        about = dict(zip(("images", "features", "classes"), size, strict=True))
        with _folder(scratch) as folder:
            make_arrays(folder, *size)
            figures = measured("refine", folder, threads)
            taken, peak = figures["seconds"], round(figures["peak_megabytes"])
            row = {
                **about,
                "seconds": taken,
                "images_per_second": round(size[0] / taken),
                "shards_per_second": figures["shards"] / taken,
                "share_of_matmul_speed": figures["bare_seconds"] / taken,
                "peak_megabytes": peak,
            }
            tables["scale"].append({**row, **_growth(tables["scale"], about, figures)})
            if size != (*sizes[-1][:2], 1_000):
                continue
            again = measured("resume", folder, threads)
            row = {**about, "shards": int(figures["shards"]), "seconds": taken}
            row |= {"again_all_done_seconds": again["seconds"], "again_one_lost_seconds": again["one_lost_seconds"]}
            tables["scale_resume"].append(row)
            ray = measured("on_ray", folder, threads)
            row = {**about, "shards": math.ceil(size[0] / (SHARD_ROWS // 8)), "loop_seconds": ray["seconds"]}
            row |= {"ray_seconds": ray["ray_seconds"], "ray_seconds_with_its_start": ray["ray_seconds_with_start"]}
            tables["scale_ray"].append(row)
    for rows, width, classes in ANCHORED_SIZES:
        about = {"images": min(rows, largest), "features": width, "classes": classes}
        with _folder(scratch) as folder:
            make_classes(folder, *about.values())
            figures = measured("anchored", folder, threads)
        row = {**about, "changed": round(figures["changed"] / about["images"], 3)}
        cost = {"seconds": figures["seconds"], "peak_megabytes": round(figures["peak_megabytes"])}
        tables["scale_anchored"].append({**row, **cost})
    rows, width, classes = min(RIVAL_SIZE[0], largest), *RIVAL_SIZE[1:]
    with _folder(scratch) as folder:
        make_arrays(folder, rows, width, classes, logits=True)
        found = {method: measured(name, folder, threads) for method, name in RIVALS.items()}
    own = found["refine_shards"]
    for method, figures in found.items():
        row = {"method": method, "images": rows, "classes": classes, "seconds": figures["seconds"]}
        row |= {"peak_megabytes": round(figures["peak_megabytes"])}
        row |= {f"times_our_{what}": figures[key] / own[key] for what, key in TIMES_OURS.items()}
        tables["scale_rivals"].append(row)
    return tables


@contextmanager
def _folder(scratch: Path) -> Iterator[Path]:
    yield scratch / "arrays"
    shutil.rmtree(scratch / "arrays")


def _growth(before: list[dict[str, Any]], about: dict[str, int], figures: dict[str, float]) -> dict[str, float | str]:
    """How time grows with what differs from the row before: 1.00 is proportional, 0.00 is not at all."""
    if not before:
        return {"growth": ""}
    changed = [name for name in about if about[name] != before[-1][name]]
    if len(changed) != 1:
        return {"growth": ""}
    [name] = changed
    slope = math.log(figures["seconds"] / before[-1]["seconds"]) / math.log(about[name] / before[-1][name])
    return {"growth": f"{slope:.2f} in {name}"}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory against images and against classes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for panel, name, width in zip(panels, ("images", "classes"), (256, 64), strict=True):
        shown = [row for row in rows if row["features"] == width]
        values = [row[name] for row in shown]
        panel.loglog(values, [row["seconds"] for row in shown], "o-", label="seconds")
        panel.loglog(values, [row["peak_megabytes"] for row in shown], "s--", label="peak memory, MB")
        fixed = "classes" if name == "images" else "images"
        panel.set(xlabel=f"{name} ({shown[0][fixed]:,} {fixed}, {width} features)")
        panel.grid(alpha=0.3)
        panel.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    name, place, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    pq.write_table(
        pa.table({"row": np.zeros(1)}), io.BytesIO()
    )  # its first use imports, which takes seconds and is none of what is measured
    figures = MEASURES[name](Path(place))
    print(json.dumps({**figures, "peak_megabytes": peak_megabytes()}))
