"""From images on disk to a reviewed change of their labels: scan, synthetic images, features, refinement, page.

Everything is written into one folder, every file whole or not at all. Started again, a run takes finished synthetic
images and features from there and computes the rest again, with the same seed to the same bytes.

    config.yaml   the resolved settings                    features/   shards of features, by encoder and images
    images.csv    id, label and SHA-256 of every image     refined/    the artifact (labels.npy, changes.csv, run.json)
    bad.csv       images that could not be decoded         report/     the page to review
    synthetic/    generated images, where none were given  summary.json

Letters in shapes: N real images, M synthetic images, D features, C classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch.nn import functional as F

from synth_refine._io.atomic import check_folder, locked, make_folder, remove_unfinished, write_atomic
from synth_refine._io.check import InputError, check_threshold
from synth_refine._io.csv import csv_bytes
from synth_refine._io.ray import check_engine
from synth_refine._io.untrusted import open_plain
from synth_refine.images.embed import embed_folder, embed_images
from synth_refine.images.encoders import DEFAULT, Encoder, encoder_by_name
from synth_refine.images.hashes import content_hashes
from synth_refine.images.sources import Images, open_images, read_classes
from synth_refine.labels.artifact import Artifact, record, write_artifact
from synth_refine.refine import thresholds
from synth_refine.refine.anchored import FOLDS, anchored_posterior, fit_head, standardised
from synth_refine.refine.checks import agreement_doubt, check_row_order, domain_gap, prototype_classes
from synth_refine.refine.decide import REASONS, Answer, decide
from synth_refine.refine.paper import refine_labels
from synth_refine.refine.prototypes import class_prototypes, prototype_quality
from synth_refine.refine.thresholds import calibrate_thresholds, sweep
from synth_refine.review.charts import Review
from synth_refine.review.evidence import Evidence, Quality, SweepRow, nearest_synthetic, taken_from
from synth_refine.review.report import page_rows, write_report
from synth_refine.synthetic.generate import PER_CLASS, generate_images, generator_by_name
from synth_refine.synthetic.jobs import TEMPLATES, Generator, check_templates
from synth_refine.synthetic.text_to_image import SDXL_TURBO

HEAD_EPOCHS = 8  # of the head on the given labels, for the paper's rule
FREE = {
    "out",
    "device",
    "workers",
    "engine",
    "address",
}  # settings that a folder of results may be gone on with otherwise
NOT_ESTIMATED = "not estimated: fewer than half of the held-out synthetic images are recognised"


@dataclass(frozen=True)
class Settings:
    """What a run depends on; config.yaml has the same entries."""

    images: str  # see `synth_refine.images.open_images`
    out: str  # folder of all results
    classes: str | None = None  # YAML file of class names; by default those of the images
    synthetic: str | None = None  # synthetic images, a source like `images`; generated where there are none
    encoder: str = DEFAULT  # see `synth_refine.encode.encoder_by_name`
    weights: str | None = None  # local file of the encoder's weights
    refiner: str = "anchored"  # or paper
    threshold: float | str = "auto"  # smallest score that changes a label; auto: see `decide.calibrate_thresholds`
    model: str = SDXL_TURBO  # draws the synthetic images: a name on the hub, a local folder, or glyphs
    revision: str | None = None  # of that model
    templates: Sequence[str] = TEMPLATES  # prompts, with {category} where the class goes
    per_class: int = PER_CLASS  # synthetic images
    steps: int = 1  # of the model
    guidance: float = 0.0
    size: int | None = None  # pixels; by default 512, glyphs 32
    batch_size: int = 8  # images per call of the model
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # also of a cluster's nodes
    workers: int = 2  # processes that decode images
    engine: str = "local"  # what embeds images: this machine, or ray, a cluster whose nodes see the same files
    address: str | None = None  # of that cluster


@dataclass(frozen=True)
class Refined:
    """What a refiner made of features and given labels.

    Attributes:
        artifact: The decision, on record.
        threshold: The one that was used, or those of the classes; None where no class has one.
        sweep: What other thresholds would do; empty for the paper's rule.
        notes: Numbers for people.
    """

    artifact: Artifact
    threshold: float | list[float] | None
    sweep: Sequence[thresholds.SweepRow]
    notes: Mapping[str, str]


@dataclass(frozen=True)
class Summary:
    """A finished run in numbers.

    Attributes:
        artifact: Its folder.
        report: The page.
        count: Images.
        changed: Labels that were changed.
        abstained: Labels that somebody should look at.
        bad: Images that could not be decoded.
        synthetic: Synthetic images that were used.
        notes: Numbers for people.
    """

    artifact: str
    report: str
    count: int
    changed: int
    abstained: int
    bad: int
    synthetic: int
    notes: dict[str, str] = field(default_factory=dict)


def read_config(path: str) -> dict[str, Any]:
    """The entries of a config file, each of them one of `Settings`.

    Raises:
        InputError: No YAML mapping, or an unknown entry.
    """
    with open_plain("config", path) as file:
        data = file.read()
    try:
        content = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config: {path} is no YAML: {' '.join(str(error).split())[:160]}") from error
    kinds = {
        one.name: {"str": str, "int": int, "Sequence[str]": list}.get(str(one.type).split(" |")[0], object)
        for one in fields(Settings)
    }
    if not isinstance(content, dict) or not set(content) <= set(kinds):
        extra = ", ".join(map(str, set(content) - set(kinds))) if isinstance(content, dict) else "no mapping"
        raise InputError(f"config: expected the entries {', '.join(kinds)} in {path}, got {extra}")
    for name, value in content.items():
        optional = value is None and name in ("classes", "synthetic", "weights", "revision", "size", "address")
        if not optional and (not isinstance(value, kinds[name]) or isinstance(value, bool)):
            raise InputError(f"config: expected {kinds[name].__name__} for {name} in {path}, got {value!r}")
    return content


def run(settings: Settings, *, dry_run: bool = False) -> Summary | dict[str, Any]:
    """Do all of it, or with `dry_run` check all of it and say what would be done.

    Raises:
        InputError: A setting, an image source or the encoder cannot be used.
    """
    _check(settings)
    classes = read_classes(settings.classes) if settings.classes else None
    images = open_images(settings.images, list(classes) if classes else None)
    encoder = _encoder(settings)
    _check_outside(settings)
    if settings.synthetic is None:
        _generator(settings)
    else:
        _lacking(_synthetic(settings.synthetic, images.classes).labels, images)
    if dry_run:
        return {**asdict(settings), "classes": list(images.classes), "count": len(images.ids), "written": False}
    settings = replace(settings, out=os.path.abspath(settings.out))  # results are the same from any working directory
    out = make_folder("out", settings.out)
    with locked(out):
        _begin(out, settings)
        return _run(out, settings, images, classes, encoder)


def _begin(out: Path, settings: Settings) -> None:
    """Make the folder of results ready, or refuse one that holds something else."""
    place = out / "config.yaml"
    if place.exists():
        before, now = read_config(str(place)), yaml.safe_load(_config(settings))
        for name in now.keys() - FREE:
            if before.get(name) != now[name]:
                raise InputError(
                    f"out: expected the settings that {out} was begun with, got another {name}: {now[name]!r} for "
                    f"{before.get(name)!r}; take another folder; features/ may be copied into it"
                )
    elif other := next((path for path in sorted(out.iterdir()) if not path.name.startswith(".")), None):
        raise InputError(f"out: expected an empty folder or that of an earlier run, but {out} holds {other.name}")
    remove_unfinished(out)
    write(place, _config(settings))


def _run(out: Path, settings: Settings, images: Images, classes: Mapping[str, str] | None, encoder: Encoder) -> Summary:
    hashes = content_hashes(images, engine=settings.engine, address=settings.address)
    table = {"id": images.ids, "label": [images.classes[label] for label in images.labels], "sha256": hashes}
    write(out / "images.csv", csv_bytes(table))
    source = settings.synthetic
    if source is None:
        categories = classes if classes is not None else {name: name for name in images.classes}
        source = str(generate(replace(settings, out=str(out / "synthetic")), categories).parent)
    synthetic = _synthetic(source, images.classes)
    features, bad = _features(encoder, images, out, settings, "images", hashes)
    anchors, unfit = _features(encoder, synthetic, out, settings, "synthetic images")
    reasons = [bad[row] for row in sorted(bad)] + [unfit[row] for row in sorted(unfit)]
    sets = ["images"] * len(bad) + ["synthetic"] * len(unfit)
    ids = [images.ids[row] for row in sorted(bad)] + [synthetic.ids[row] for row in sorted(unfit)]
    write(out / "bad.csv", csv_bytes({"set": sets, "id": ids, "reason": reasons}))
    fit = np.setdiff1d(np.arange(len(synthetic.ids)), sorted(unfit))
    inputs = {
        "images": hashlib.sha256(csv_bytes(table)).hexdigest(),
        "synthetic": hashlib.sha256(anchors.tobytes()).hexdigest(),
        "encoder": encoder.id,
    }
    refined = refine(features, images, anchors[fit], synthetic.labels[fit], settings, inputs)
    write_artifact(out / "refined", refined.artifact)
    page = write_report(_review(refined, images, features, synthetic, anchors, fit), out / "report")
    summary = Summary(
        artifact=str(out / "refined"),
        report=str(page),
        count=len(images.ids),
        changed=len(refined.artifact.changed),
        abstained=int((refined.artifact.action == "abstain").sum()),
        bad=len(bad),
        synthetic=len(fit),
        notes=dict(refined.notes),
    )
    write(out / "summary.json", (json.dumps(asdict(summary), indent=2) + "\n").encode())
    return summary


def _synthetic(source: str, classes: Sequence[str]) -> Images:
    """`open_images` for synthetic images, which errors name as such."""
    try:
        return open_images(source, classes)
    except InputError as error:
        raise InputError(f"synthetic: {str(error).removeprefix('images: ')}") from error


def generate(settings: Settings, categories: Mapping[str, str]) -> Path:
    """Draw the synthetic images of classes, with what prompts call them, into the folder `out`; the manifest."""
    return generate_images(
        settings.out,
        categories,
        _generator(settings),
        per_class=settings.per_class,
        templates=settings.templates,
        seed=settings.seed,
    )


def _generator(settings: Settings) -> Generator:
    return generator_by_name(
        settings.model,
        steps=settings.steps,
        guidance=settings.guidance,
        size=settings.size,
        revision=settings.revision,
        device=settings.device,
        batch_size=settings.batch_size,
    )


def _review(
    refined: Refined,
    images: Images,
    features: NDArray[np.float32],
    synthetic: Images,
    anchors: NDArray[np.float32],
    fit: NDArray[np.int64],
) -> Review:
    """What the page shows; synthetic images that could not be decoded are left out of it."""
    reference: NDArray[Any] = anchors[fit]
    intended: NDArray[Any] = synthetic.labels[fit]
    rows = page_rows(refined.artifact)
    evidence = Evidence(
        rows=rows,
        nearest=nearest_synthetic(features, rows, reference),
        synthetic_labels=intended,
        synthetic_ids=[synthetic.ids[row] for row in fit.tolist()],
        threshold=refined.threshold,
        sweep=[taken_from(SweepRow, row) for row in refined.sweep],
        quality=taken_from(Quality, prototype_quality(reference, intended, len(images.classes))),
        notes=refined.notes,
    )
    return Review(refined.artifact, evidence, images.image, lambda row: synthetic.image(int(fit[row])))


def embed(settings: Settings) -> dict[str, Any]:
    """Write the features of images, (N, D), and their ids and labels, as `synth-refine refine` takes them.

    Raises:
        InputError: The images or the encoder cannot be used. Images that cannot be decoded have NaN features.
    """
    _check(settings)
    images = open_images(settings.images, list(read_classes(settings.classes)) if settings.classes else None)
    encoder = _encoder(settings)
    _check_outside(settings)
    return embed_folder(encoder, images, settings.out, **_work(settings))


def _config(settings: Settings) -> bytes:
    entries = asdict(settings) | {"templates": list(settings.templates)}
    for name in ("images", "classes", "synthetic", "encoder", "weights"):  # to make the result again from anywhere
        if entries[name] is not None and _is_place(entries[name]):
            entries[name] = str(Path(entries[name]).absolute())
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).encode()


def _is_place(name: str) -> bool:
    """Whether there is such a file or folder, or one of such a pattern."""
    return Path(name).exists() or bool(glob(name))


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with write_atomic(path) as file:
        file.write(data)


def _check(settings: Settings) -> None:
    if settings.refiner not in ("anchored", "paper"):
        raise InputError(f"refiner: expected anchored or paper, got {settings.refiner!r}")
    if settings.threshold != "auto":
        check_threshold(settings.threshold, "auto or a number")
    for name in ("per_class", "steps", "batch_size"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name}: expected 1 or more, got {getattr(settings, name)}")
    check_templates(settings.templates)
    if settings.seed < 0 or settings.workers < 0:
        raise InputError(f"seed, workers: expected 0 or more, got {settings.seed} and {settings.workers}")
    check_engine(settings.engine)
    check_folder("out", settings.out)
    try:
        torch.device(settings.device)
    except RuntimeError as error:
        raise InputError(f"device: expected one of torch such as cpu or cuda:1, got {settings.device!r}") from error
    if settings.engine == "local" and settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device: expected cpu where torch finds no GPU, got {settings.device}")


def _check_outside(settings: Settings) -> None:
    """Keep results out of the user's images."""
    if Path(settings.out).resolve().is_relative_to(Path(settings.images).resolve()):
        raise InputError(f"out: expected a folder outside {settings.images}, got {settings.out}")


def _encoder(settings: Settings) -> Encoder:
    device = settings.device if settings.engine == "local" else "cpu"  # a cluster computes; this only says what with
    return encoder_by_name(settings.encoder, settings.weights, device=device)


def _features(
    encoder: Encoder, images: Images, out: Path, settings: Settings, what: str, hashes: list[str] | None = None
) -> tuple[NDArray[np.float32], dict[int, str]]:
    return embed_images(
        encoder,
        images,
        out / "features",
        hashes=hashes,
        progress=f"embedding {what}",
        **_work(settings),
    )


def _work(settings: Settings) -> dict[str, Any]:
    """Where and by what images are embedded."""
    return {
        "workers": settings.workers,
        "engine": settings.engine,
        "address": settings.address,
        "make": partial(encoder_by_name, settings.encoder, settings.weights),
        "device": settings.device,
    }


def refine(
    features: NDArray[Any],
    images: Images,
    anchors: NDArray[Any],
    anchor_labels: NDArray[Any],
    settings: Settings,
    inputs: Mapping[str, str],
) -> Refined:
    """Refine the given labels of images whose features are known.

    Args:
        features: Features of the real images, (N, D), NaN where one could not be decoded.
        images: The real images.
        anchors: Features of the synthetic images, (M, D), finite.
        anchor_labels: The class of each, (M,).
        settings: Refiner, threshold and seed.
        inputs: Goes on record.

    Raises:
        InputError: A class has no synthetic image, or the labels say nothing about the images.
    """
    count = len(images.classes)
    _lacking(anchor_labels, images)
    good = np.isfinite(features).all(axis=1)
    nearest = prototype_classes(features[good], anchors, anchor_labels, count)
    order = check_row_order(images.labels[good], nearest, count, seed=settings.seed)
    notes = {"agreement of given labels and prototypes": f"{order.agreement:.3f}"}
    if doubt := agreement_doubt(images.labels[good], nearest, count):
        notes["warning"] = doubt
    if min(good.sum(), len(anchors)) >= 4:
        notes["domain gap (0.5 or less none, 1 full)"] = f"{domain_gap(features[good], anchors):.3f}"
    method = _anchored if settings.refiner == "anchored" else _paper
    decided, threshold, rows, more = method(features, images.labels, anchors, anchor_labels, count, settings)
    known = {"refiner": settings.refiner, "seed": settings.seed, "threshold": settings.threshold}
    artifact = record(
        images.labels,
        **decided,
        num_classes=count,
        ids=images.ids,
        inputs=inputs,
        settings={**known, "encoder": settings.encoder, "source": images.kind, "classes": list(images.classes)},
    )
    return Refined(artifact, threshold, rows, {**notes, **more})


def _lacking(anchor_labels: NDArray[Any], images: Images) -> None:
    """Refuse synthetic images that leave a class out."""
    lacking = sorted(set(range(len(images.classes))) - set(anchor_labels.tolist()))
    if lacking:
        raise InputError(f"synthetic: expected an image of every class, got none of {images.classes[lacking[0]]}")


def _anchored(
    features: NDArray[Any],
    given: NDArray[Any],
    anchors: NDArray[Any],
    anchor_labels: NDArray[Any],
    num_classes: int,
    settings: Settings,
) -> tuple[dict[str, Any], float | list[float] | None, list[thresholds.SweepRow], dict[str, str]]:
    posterior = anchored_posterior(
        features,
        given,
        anchors,
        anchor_labels,
        num_classes=num_classes,
        seed=settings.seed,
        progress=sys.stderr.isatty(),
    )
    limits: Any = settings.threshold
    if settings.threshold == "auto":
        limits = calibrate_thresholds(posterior.anchor_head, anchor_labels)
    decision = decide(posterior, given, thresholds=limits)
    best = np.sort(np.asarray(posterior.posterior), axis=1)
    decided = {
        "labels": decision.apply(given),
        "abstained": np.asarray(decision.answers) == Answer.ABSTAIN,
        "confidence": best[:, -1],
        "margin": best[:, -1] - best[:, -2] if num_classes > 1 else best[:, -1],
        "reason": np.array(REASONS)[np.asarray(decision.reasons)],
    }
    noise = {
        name: NOT_ESTIMATED if np.isnan(share) else f"{share:.3f}"
        for name, share in (("before", decision.noise_before), ("after", decision.noise_after))
    }
    notes = {
        "held-out synthetic images recognised": f"{posterior.recognised:.3f}",
        "wrong labels before (estimated)": noise["before"],
        "wrong labels after (estimated)": noise["after"],
        "decision": decision.summary(),
    }
    return decided, _shown(limits), sweep(posterior, given), notes


def _paper(
    features: NDArray[Any],
    given: NDArray[Any],
    anchors: NDArray[Any],
    anchor_labels: NDArray[Any],
    num_classes: int,
    settings: Settings,
) -> tuple[dict[str, Any], float | list[float] | None, list[thresholds.SweepRow], dict[str, str]]:
    logits, anchor_logits = given_logits(features, given, anchors, num_classes, seed=settings.seed)
    limits: Any = settings.threshold
    if settings.threshold == "auto":
        limits = paper_thresholds(anchors, anchor_labels, anchor_logits)
    decision = refine_labels(features, logits, class_prototypes(anchors, anchor_labels, num_classes), limits)
    undecided = np.asarray(decision.labels) < 0
    decided = {
        "labels": decision.apply(given),
        "abstained": undecided,
        "confidence": decision.confidence,
        "reason": np.where(undecided, "cannot be scored", "score reaches the threshold"),
    }
    return decided, _shown(limits), [], {}


def _shown(limits: Any) -> float | list[float] | None:
    """Thresholds without those that have no end."""
    values = np.asarray(limits, dtype=np.float64)
    finite: list[float] = values[np.isfinite(values)].tolist()
    return (finite if values.ndim else finite[0]) if finite else None


def given_logits(
    features: NDArray[Any],
    given: NDArray[Any],
    anchors: NDArray[Any],
    num_classes: int,
    *,
    seed: int = 0,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logits of small heads trained on the given labels, each row by heads that did not see it.

    They take the place of the classifier that the paper's rule asks for.

    Args:
        features: Features of the real images, (N, D); rows that are not finite get logits that are not.
        given: Given labels, (N,).
        anchors: Features of the synthetic images, (M, D), finite; no head is trained on them.
        num_classes: C.
        seed: Same seed, same logits.

    Returns:
        Logits of the real images, (N, C), and of the synthetic ones, (M, C), the mean over the heads' probabilities.
    """
    good = np.flatnonzero(np.isfinite(features).all(axis=1))
    logits = np.full((len(features), num_classes), np.nan, dtype=np.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        real, reference, _ = standardised(torch.from_numpy(features[good]), torch.from_numpy(anchors))
        targets = F.one_hot(torch.from_numpy(given[good]), num_classes).float()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(real), generator=generator)
        spoken = torch.zeros((len(anchors), num_classes))
        nothing = torch.empty((0, real.shape[1])), torch.empty((0, num_classes))
        for fold in range(min(FOLDS, len(good))):
            held_out = order[fold::FOLDS]
            others = torch.cat([order[other::FOLDS] for other in range(FOLDS) if other != fold])
            head = fit_head(real[others], targets[others], *nothing, generator, HEAD_EPOCHS)
            with torch.no_grad():
                logits[good[held_out.numpy()]] = head(real[held_out]).numpy()
                spoken += head(reference).softmax(dim=1) / FOLDS
    return logits, spoken.clamp_min(1e-12).log().numpy()


def paper_thresholds(anchors: NDArray[Any], anchor_labels: NDArray[Any], anchor_logits: NDArray[Any]) -> NDArray[Any]:
    """Per class, the smallest score from which on the paper's rule is right about nine in ten synthetic images.

    Each synthetic image is scored against prototypes without it, so no true label of a real image is needed.

    Args:
        anchors: Features of the synthetic images, (M, D), finite.
        anchor_labels: The class of each, (M,); every class has at least one.
        anchor_logits: What heads trained on the real images say of them, (M, C).

    Returns:
        Thresholds, (C,) float32; infinity where the rule is never right often enough.
    """
    features = torch.from_numpy(anchors).double()
    labels = torch.from_numpy(anchor_labels)
    classes = anchor_logits.shape[1]
    sums = torch.zeros((classes, features.shape[1]), dtype=torch.float64).index_add_(0, labels, features)
    directions = F.normalize(features, dim=1)
    cosine = directions @ F.normalize(sums, dim=1).T
    rest = sums[labels] - features  # zero for a class's only image, whose cosine is then zero
    cosine[torch.arange(len(labels)), labels] = (directions * F.normalize(rest, dim=1)).sum(dim=1)
    scores = 0.5 * cosine + 0.5 * torch.from_numpy(anchor_logits).double().softmax(dim=1)
    return calibrate_thresholds(scores.numpy(), anchor_labels)
