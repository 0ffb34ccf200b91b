"""Turn one knob at a time and measure the refined labels, or what training on them reaches.

python benchmarks/run_ablation.py --study threshold,weight
python benchmarks/run_ablation.py --study images --data features.npz --given noisy_labels.npy

One record per study, labels and seed, one table and one picture per study, both from the records alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

if not __package__:  # started by its path; "adapters" is also the name of a package on PyPI
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from torch import Tensor

from adapters import ADAPTERS, Split
from benchmarks import refiners
from benchmarks.config import add_common, for_noise, resolve_config
from benchmarks.evidence import Evidence
from benchmarks.records import Record, digest, environment, read_records, weights_used, write_record
from benchmarks.refined import Refined, first_per_class, flows, given_labels
from benchmarks.table import figure_of, is_wide, study_table
from synth_refine import InputError, Refinement, class_prototypes, refine_anchored, refine_labels
from synth_refine._io.atomic import write_atomic
from synth_refine.refine.solve import AnchoredDiagnostics

DISCARDED = -1
PUBLISHED_FILTER = {"threshold": 0.8, "per_class": 300}  # of the paper's code; its iterative variant is left out


@dataclass(frozen=True)
class Point:
    """One setting of a study's knob."""

    series: str  # one line of the picture
    value: float | str  # its place on the horizontal axis
    refine: Callable[[Evidence], Tensor | Refinement]  # refined labels, (N,), of which DISCARDED takes an image out
    add_synthetic: bool = False  # train on the synthetic images as well
    images: int = 0  # synthetic images per class that it needs; with fewer, the point is left out


Study: TypeAlias = "list[Point]"


def on(change: Callable[[Evidence], Evidence], refine: refiners.Refiner) -> Callable[[Evidence], Tensor]:
    """The refiner on changed evidence."""
    return lambda evidence: refine(change(evidence))


def as_is(evidence: Evidence) -> Evidence:
    """No change."""
    return evidence


def centred(evidence: Evidence, *, scale: bool = False) -> Evidence:
    """Features of both domains, each centred on its own mean and, with `scale`, divided by its own deviation."""

    def place(features: Tensor) -> Tensor:
        features = features - features.mean(dim=0)
        return features / features.std(dim=0).clamp_min(1e-6) if scale else features

    return dataclasses.replace(evidence, features=place(evidence.features), synthetic=place(evidence.synthetic))


def fewer_images(evidence: Evidence, count: int) -> Evidence:
    """The first `count` synthetic images of every class."""
    split = first_per_class(Split(evidence.synthetic, evidence.synthetic_labels), count)
    return dataclasses.replace(evidence, synthetic=split.inputs, synthetic_labels=split.labels)


def several_prototypes(evidence: Evidence, count: int) -> Tensor:
    """The class of the nearest of `count` prototypes per class, which are found by k-means."""
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]

    centres = []
    for label in range(evidence.num_classes):
        rows = evidence.synthetic[evidence.synthetic_labels == label].cpu().numpy()
        means = KMeans(min(count, len(rows)), n_init=3, random_state=evidence.seed).fit(rows).cluster_centers_
        centres.append(torch.from_numpy(np.resize(means, (count, means.shape[1]))).to(evidence.features))
    prototypes = torch.cat(centres)  # (C * count, D)
    return torch.as_tensor(refine_labels(evidence.features, None, prototypes, -1.0, weight=1.0).proposed) // count


def tuned(evidence: Evidence, **options: Any) -> Tensor:
    """The anchored refiner with options that only a study turns."""
    return refine_anchored(
        evidence.features,
        evidence.given,
        evidence.synthetic,
        evidence.synthetic_labels,
        num_classes=evidence.num_classes,
        text_prototypes=evidence.text_prototypes,
        second_view=refiners.second_view(evidence),
        seed=evidence.seed,
        **options,
    ).apply(evidence.given)


def over_shards(evidence: Evidence, *, sort: bool = False) -> Tensor:
    """The anchored refiner over files, in shards and buckets of 4,096 rows; with `sort` in the given labels' order."""
    from synth_refine.scale.shards import refine_shards

    order = evidence.given.argsort() if sort else torch.arange(len(evidence.given))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        np.save(root / "features.npy", evidence.features[order].cpu().numpy())
        np.save(root / "given.npy", evidence.given[order].cpu().numpy())
        with patch("synth_refine.refine.rows.BUCKET_ROWS", 4096):  # several of them, as with millions of images
            refine_shards(
                root / "features.npy",
                root / "given.npy",
                root / "out",
                synthetic_features=evidence.synthetic.cpu().numpy(),
                synthetic_labels=evidence.synthetic_labels.cpu().numpy(),
                seed=evidence.seed,
                shard_rows=4096,
            )
        labels = evidence.given.clone()
        labels[order] = torch.from_numpy(np.load(root / "out" / "labels.npy", allow_pickle=False)).to(labels)
    return labels


def modality(evidence: Evidence, source: str) -> Tensor:
    """The class of the nearest prototype: of the images, of the class names, or of both (the mean direction)."""
    if evidence.text_prototypes is None:
        raise InputError("study: expected an encoder that reads text for modality, such as encoder=glyph-clip")
    images = class_prototypes(evidence.synthetic, evidence.synthetic_labels, evidence.num_classes, normalize=True)
    choices = {"text": evidence.text_prototypes, "image": images, "both": images + evidence.text_prototypes}
    decision = refine_labels(evidence.features, None, choices[source], -1.0, weight=1.0)
    return decision.apply(evidence.given)


def published_filter(evidence: Evidence, *, at_random: bool = False) -> Tensor:
    """The paper's discard variant: the same number of images leaves every class of given labels.

    First the images that the rule at 0.8 would relabel, in their order, then those with the lowest scores; with
    `at_random` any.
    """
    prototypes = class_prototypes(evidence.synthetic, evidence.synthetic_labels, evidence.num_classes)
    decision = refine_labels(evidence.features, evidence.logits, prototypes, PUBLISHED_FILTER["threshold"])
    flagged = decision.apply(evidence.given) != evidence.given
    rank = torch.as_tensor(decision.confidence).double() + 2  # after every flagged image, whose rank is below 1
    rank[flagged] = torch.arange(len(rank)).to(rank)[flagged] / len(rank)
    if at_random:
        rank = torch.rand(len(rank), generator=torch.Generator().manual_seed(evidence.seed)).to(rank)
    labels = evidence.given.clone()
    for label in range(evidence.num_classes):
        rows = (evidence.given == label).nonzero()[:, 0]
        labels[rows[rank[rows].argsort()[: int(PUBLISHED_FILTER["per_class"])]]] = DISCARDED
    return labels


PLACES: dict[str, Callable[[Evidence], Evidence]] = {
    "none": as_is,
    "mean": centred,
    "mean and deviation": partial(centred, scale=True),
}
SIMPLE: dict[str, refiners.Refiner] = {"zero-shot": refiners.zero_shot, "paper": refiners.paper}
STUDIES: dict[str, Study] = {
    "refiners": [
        Point("", name, refine) for name, refine in refiners.REFINERS.items() if name not in refiners.SOFT_REFINERS
    ],
    "estimates": [Point("", "anchored", refiners.anchored_result)],
    "threshold": [
        Point("paper", value, partial(refiners.paper, threshold=value)) for value in (0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    ],
    "weight": [
        Point("paper, threshold 0", value, partial(refiners.paper, threshold=0.0, weight=value))
        for value in (0, 0.25, 0.5, 0.75, 0.9, 1)
    ],
    "images": [
        Point(name, count, on(partial(fewer_images, count=count), refine), images=count)
        for name, refine in {**SIMPLE, "anchored": refiners.anchored}.items()
        for count in (1, 3, 10, 30, 100, 300, 480)
    ],
    "prototypes": [Point("zero-shot", count, partial(several_prototypes, count=count)) for count in (1, 2, 4, 8, 16)],
    "centring": [
        Point(name, how, on(place, refine)) for name, refine in SIMPLE.items() for how, place in PLACES.items()
    ],
    "rounds": [Point("anchored", value, partial(tuned, rounds=value)) for value in (1, 2, 4, 8, 12, 16)],
    "head": [
        Point("anchored", name, partial(tuned, hidden=units))
        for name, units in {"linear": 0, "64 hidden": 64, "256 hidden": 256, "1024 hidden": 1024}.items()
    ],
    "views": [  # two where the encoder is a frozen one and the initial classifier sees pixels
        Point("anchored", "features alone", on(partial(dataclasses.replace, two_views=False), refiners.anchored)),
        Point("anchored", "as configured", refiners.anchored),
    ],
    "shards": [
        Point("anchored", "in memory", refiners.anchored),
        Point("anchored", "over shards", over_shards),
        Point("anchored", "over shards, rows sorted by label", partial(over_shards, sort=True)),
    ],
    "modality": [Point("zero-shot", source, partial(modality, source=source)) for source in ("text", "image", "both")],
    "discard": [  # of these the figure is the test accuracy after fine-tuning, of the others the noise
        Point("fine-tuned", "all", refiners.none),
        Point("fine-tuned", "random discard", partial(published_filter, at_random=True)),
        Point("fine-tuned", "published filter", published_filter),
        Point("fine-tuned", "relabel (paper)", refiners.paper),
        # The authors' code puts one class's images into every folder; ours goes to their own classes.
        Point("fine-tuned", "our filter + synthetic", published_filter, add_synthetic=True),
        Point("fine-tuned", "all + synthetic", refiners.none, add_synthetic=True),
    ],
}


def measure(study: str, point: Point, refined: Refined, config: Mapping[str, Any]) -> Record:
    """Refine with one setting and, where the study asks for it, train."""
    task, truth = refined.benchmark.task, refined.benchmark.true_labels
    start = time.perf_counter()
    result = point.refine(refined.evidence)
    entry: Record = {"series": point.series, "value": point.value, "refine_seconds": time.perf_counter() - start}
    if isinstance(result, Refinement):
        entry["estimates"] = estimates(result)
    labels = result.apply(task.train.labels) if isinstance(result, Refinement) else result
    keep = labels != DISCARDED
    entry["kept"] = int(keep.sum())
    entry["labels"] = flows(task.train.labels[keep], labels[keep], None if truth is None else truth[keep])
    if study == "discard":
        inputs, labels = task.train.inputs[keep], labels[keep]
        if point.add_synthetic:
            inputs = torch.cat([inputs, task.synthetic.inputs])
            labels = torch.cat([labels, task.synthetic.labels])
        kept = dataclasses.replace(task, train=Split(inputs, labels), initial=refined.initial.weights)
        options = config["methods"].get("relabel") or {}
        entry["test_accuracy"] = ADAPTERS["relabel"](kept, labels, options, refined.given.seed).test_accuracy
    return entry


def estimates(result: Refinement) -> Record:
    """What the anchored refiner estimates: fraction, and both ends of its interval; None where it gives no estimate."""
    assert isinstance(result.diagnostics, AnchoredDiagnostics)
    found = asdict(result.diagnostics.estimates)
    return {
        name: None if isnan(one["value"]) else [one["value"], one["low"], one["high"]] for name, one in found.items()
    }


def run(study: str, refined: Refined, config: Mapping[str, Any], device: str) -> Record:
    """The record of one study on one set of given labels; read where it exists already."""
    config = for_noise(config, refined.given.noise)
    available = int(refined.benchmark.task.synthetic.labels.bincount().min())
    chosen = [point for point in STUDIES[study] if point.images <= available]
    settings = {
        "config": {key: value for key, value in config.items() if key not in ("noise", "seeds", "refiners", "jobs")},
        "files": {**refined.given.files, **weights_used(config)},
        "points": [[point.series, point.value] for point in chosen],
    }
    name = f"{study}_{refined.given.noise}_seed{refined.given.seed}_{digest(settings)}.json"
    path = refined.given.folder / "ablation" / name
    if path.exists():
        return read_records([path])[0]
    unfinished = refined.work / name
    measured: list[Record] = json.loads(unfinished.read_text()) if unfinished.exists() else []
    made_by = environment(torch.device(device))
    for point in chosen:
        if any((entry["series"], entry["value"]) == (point.series, point.value) for entry in measured):
            continue
        measured.append({**measure(study, point, refined, config), "commit": made_by["commit"]})
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with write_atomic(unfinished) as file:
            file.write(json.dumps(measured).encode())
    order = [(point.series, point.value) for point in chosen]
    points = sorted(measured, key=lambda entry: order.index((entry["series"], entry["value"])))
    record: Record = {
        "study": study,
        "dataset": refined.benchmark.name,
        "noise": refined.benchmark.noise_name,
        "seed": refined.given.seed,
        "settings": settings,
        "environment": made_by,
        "points": points,
    }
    write_record(path, record)
    unfinished.unlink()
    return record


def picture(records: Sequence[Record], path: Path) -> None:
    """The table as lines, or as bars where the knob has no scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, tuple[list[Any], list[float]]] = {}
    many = is_wide(records)
    for record in records:
        given = record["noise"] + (f", seed {record['seed']}" if record["seed"] else "")
        for point in record["points"]:
            setting = f"{point['series']} {point['value']}".strip()
            line, value = (setting, given) if many else (f"{point['series']}, {given}".strip(", "), point["value"])
            values, figures = lines.setdefault(line, ([], []))
            values.append(value)
            figure = figure_of(point)
            figures.append(np.nan if figure is None else figure)
    study = records[0]["study"]
    fig, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for line, (values, figures) in lines.items():
        axes.plot(values, figures, marker="o", linestyle="none" if many else "-", label=line)
    if study in ("images", "prototypes"):
        axes.set_xscale("log")
    if isinstance(next(iter(lines.values()))[0][0], str):
        axes.tick_params(axis="x", rotation=30)
    trained = "test_accuracy" in records[0]["points"][0]
    axes.set(xlabel="" if many else study, ylabel="test accuracy" if trained else "wrong labels after refining")
    fig.legend(loc="outside right upper", fontsize=7)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    pyplot.close(fig)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="threshold", help=f"comma-separated: {', '.join(STUDIES)}")
    add_common(parser)
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the studies. Exit code 0 when all is done, 3 for bad input, 130 when stopped by Ctrl-C."""
    options = parse(arguments)
    try:
        studies = options.study.split(",")
        for study in studies:
            if study not in STUDIES:
                raise InputError(f"study: expected one of {', '.join(STUDIES)}, got {study!r}")
        config = resolve_config(options)
        records: dict[str, list[Record]] = {study: [] for study in studies}
        groups = given_labels(config, options)
        for given in groups:  # one task in memory at a time
            refined = Refined(given, config, options)
            for study in studies:
                records[study].append(run(study, refined, config, options.device))
        for study in studies:
            path = groups[0].folder / "ablation" / f"{study}.png"
            picture(records[study], path)
            print(f"{study_table(records[study])}\n\n{path}\n")
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 130
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
