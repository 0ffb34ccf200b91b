"""From images on disk to a reviewed change of their labels: scan, synthetic images, features, refinement, page.

Everything is written into one folder, every file whole or not at all. Run again, a run takes finished synthetic images
and features from there and computes the rest again, with the same seed to the same bytes.

    config.yaml    the settings                             features/  features of both, by encoder and images
    images.csv     id, label and SHA-256 of every image     refined/   the artifact (labels.npy, changes.csv, run.json)
    synthetic.csv  the same of the synthetic images         report/    the page to review
    bad.csv        images that could not be decoded         synthetic/ generated images, where none were given
    summary.json   the result in numbers                    evidence.json  what the page shows besides
    duplicates.csv copies, also in test and synthetic ones  classes.json   the table of the classes
    with-*/        the same of further refinements, by the settings in which they differ

Letters in shapes: N real images, M synthetic images, D features, C classes.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from synth_refine._io.atomic import check_folder, file_hash, locked
from synth_refine._io.check import InputError
from synth_refine._io.ray import check_engine
from synth_refine._io.store import Store, check_settings, differing, open_store
from synth_refine._io.untrusted import read_npy
from synth_refine.images.duplicates import Duplicates, check_not_given, find_duplicates
from synth_refine.images.embed import Embedded, bad_table, embed_folder, embed_images
from synth_refine.images.encoders import Encoder, encoder_by_name
from synth_refine.images.hashes import content_hashes, image_table
from synth_refine.images.listing import Images, read_classes, warn_of_prompts
from synth_refine.images.sources import open_images, opened_as
from synth_refine.labels.artifact import Artifact, read_artifact, write_artifact
from synth_refine.refine import front
from synth_refine.refine.checks import Unrelated
from synth_refine.refine.classes import class_table
from synth_refine.refine.prototypes import prototype_quality
from synth_refine.refine.result import Refinement
from synth_refine.review import evidence as page
from synth_refine.review.charts import Review
from synth_refine.review.report import write_report
from synth_refine.settings import REFINING, RESUMABLE, Settings, resolved
from synth_refine.summary import Summary, copies_lines, read_back, summarized
from synth_refine.synthetic.generate import generate_images, generator_by_name, say_withheld
from synth_refine.synthetic.jobs import Generator

NOTES = ("synthetic accuracy", "health", "noise before", "noise after", "wrong changes", "warnings")  # on the page
SET = ("per_class", "templates", "seed")  # what makes up a set of synthetic images
OPTIONS = ("refiner", "threshold", "weight", "strict", "force", "outliers", "seed")  # of the one front door


def run(
    settings: Settings, *, dry_run: bool = False, say: Callable[[str], object] = lambda _: None
) -> Summary | dict[str, Any]:
    """Do all of it, or with `dry_run` check all of it and return what would be done.

    Args:
        settings: Those of `run`.
        dry_run: Write nothing.
        say: Called with every doubt about the inputs, before the work that it is about.

    Raises:
        InputError: A setting, an image source or the encoder cannot be used, or the folder holds a run of others.
    """
    check(settings, "run")
    classes, images = opened(settings, say)
    encoder = encoder_of(settings)
    settings = apart(settings, about_run(settings, images, encoder))
    used, about = resolved(settings.used("run")), about_run(settings, images, encoder)
    generator = generator_of(settings) if settings.synthetic is None else None
    synthetic = None if settings.synthetic is None else open_synthetic(settings.synthetic, images.classes)
    test = None if settings.test is None else opened_as("test", settings.test, images.classes, **settings.columns)
    if dry_run:
        check_settings(Path(settings.out), about, RESUMABLE, "out")
        if generator is not None:
            generator.load()  # is the model there?
        return {**used, "class_names": list(images.classes), "count": len(images.ids), "written": False}
    out = Path(settings.out).absolute()  # results are the same from any working directory
    with open_store(out, about, resumable=RESUMABLE) as store:
        keep(store, "config.yaml", yaml.safe_dump(used, sort_keys=False, allow_unicode=True).encode())
        if generator is not None:
            made = generate_images(out / "synthetic", classes or images.classes, generator, **chosen(settings, *SET))
            say_withheld(made, say)
            synthetic = open_synthetic(str(out / "synthetic"), images.classes)
        assert synthetic is not None  # given, or generated just now
        sets = {"images": images, "synthetic": synthetic} | ({} if test is None else {"test": test})
        known = {name: hashed(store, name, one, settings) for name, one in sets.items()}
        check_not_given(known["images"], known["synthetic"])
        splits = {name: embedded(store, name, one, known[name], encoder, settings) for name, one in sets.items()}
        real, reference = splits["images"], splits["synthetic"]
        keep(store, "bad.csv", bad_table(**splits))
        duplicates = find_duplicates(splits)
        keep(store, "duplicates.csv", duplicates.table())
        hashes = {one: store.entries[f"{one}.csv"]["sha256"] for one in ("images", "synthetic")}
        result, artifact = refined(real, reference, settings, {**hashes, "encoder": encoder.id}, say)
        write_artifact(out / "refined", artifact)
        summary = summarized(out, artifact, result, len(real.bad), len(reference.usable))
        table = class_table(result, images.labels, synthetic.labels[reference.usable], images.classes)
        keep(store, "classes.json", table.to_json())
        summary = replace(summary, copies=duplicates.counts(sets), classes=tuple(table.lines()), health=table.health)
        evidence = evidence_of(artifact, result, real, reference, summary, duplicates)
        evidence = replace(evidence, classes=table.facts())
        page.write_evidence(out / "evidence.json", evidence)
        store.note("evidence.json", file_hash(out / "evidence.json"))
        draw_page(out, artifact, evidence, images, synthetic)
        keep(store, "summary.json", (json.dumps(asdict(summary), indent=2) + "\n").encode())
        store.finish()
    return summary


def about_run(settings: Settings, images: Images, encoder: Encoder) -> dict[str, Any]:
    """All that a run depends on besides the images."""
    used = resolved(settings.used("run"))
    about = {**used, "class_names": list(images.classes), "encoder_id": encoder.id}
    return about | {name: file_hash(used[name]) for name in ("logits", "text_prototypes") if used.get(name)}


def apart(settings: Settings, about: Mapping[str, Any]) -> Settings:
    """The same in a folder of its own within the result, where only the refinement differs from what is there.

    Synthetic images and features are those of the result. Its artifact stays: without it, what it was applied to could
    not be reverted.

    Raises:
        InputError: The result that is there is not finished.
    """
    out = Path(settings.out).absolute()
    other = {name: new for name, (_, new) in differing(out, about, "out").items() if name not in RESUMABLE}
    if not other or not other.keys() <= REFINING | ({"seed"} if settings.synthetic else set()):
        return settings
    if Store(out, 0).done("summary.json") is None:
        raise InputError(f"out: expected a finished run in {out} before it is refined otherwise; resume that one first")
    named = {name: new.strip('"') for name, new in other.items() if getattr(settings, name) != getattr(Settings, name)}
    name = re.sub(r"[^\w.]+", "-", "-".join(part for pair in named.items() for part in pair)[:100])
    synthetic, cache = settings.synthetic or str(out / "synthetic"), settings.cache or str(out / "features")
    return replace(settings, out=str(out / f"with-{name or 'defaults'}"), synthetic=synthetic, cache=cache)


def check(settings: Settings, command: str) -> None:
    """Refuse settings that the command cannot use, here or on this machine."""
    settings.check(command)
    check_engine(settings.engine)
    check_folder("out", settings.out)
    place = Path(settings.out).absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"out: expected a folder that can be written, got {there}")
    if settings.images and place.resolve().is_relative_to(Path(settings.images).resolve()):
        raise InputError(f"out: expected a folder outside {settings.images}, got {settings.out}")
    device = device_of(settings)
    if device not in ("cpu", "cuda", *map("cuda:{}".format, range(256))):
        raise InputError(f"device: expected auto, cpu or cuda, got {settings.device!r}")
    if settings.engine == "local" and device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"device: expected cpu where torch finds no GPU, got {settings.device}")


def device_of(settings: Settings) -> str:
    """The device's name as torch knows it."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device


def encoder_of(settings: Settings) -> Encoder:
    """The encoder; where a cluster computes, it stays on the processor here."""
    device = device_of(settings) if settings.engine == "local" else "cpu"
    return encoder_by_name(settings.encoder, settings.weights, device=device)


def generator_of(settings: Settings) -> Generator:
    """What generates the synthetic images."""
    options = chosen(settings, "steps", "guidance", "size", "revision", "batch_size")
    return generator_by_name(settings.model, device=device_of(settings), **options)


def chosen(settings: Settings, *names: str) -> dict[str, Any]:
    """Some settings by name."""
    return {name: getattr(settings, name) for name in names}


def opened(settings: Settings, say: Callable[[str], object]) -> tuple[Mapping[str, str] | None, Images]:
    """The class names with what prompts call them, where a file has them, and the images."""
    classes = read_classes(settings.classes) if settings.classes else None
    warn_of_prompts(classes or {}, say)
    return classes, open_images(settings.images, list(classes) if classes else None, **settings.columns).told(say)


def open_synthetic(source: str, classes: tuple[str, ...]) -> Images:
    """`open_images` for synthetic images, at least one of every class."""
    synthetic = opened_as("synthetic", source, classes)
    if lacking := sorted(set(range(len(classes))) - set(synthetic.labels.tolist())):
        raise InputError(f"synthetic: expected an image of every class, got none of {classes[lacking[0]]}")
    return synthetic


def hashed(store: Store, name: str, images: Images, settings: Settings) -> list[str]:
    """The hashes of images, which are kept in the store as NAME.csv; test images may be others when a run resumes."""
    hashes = content_hashes(images, engine=settings.engine, address=settings.address)
    (keep if name == "test" else keep_input)(store, f"{name}.csv", input_table(images, hashes))
    return hashes


def embedded(
    store: Store, name: str, images: Images, hashes: list[str], encoder: Encoder, settings: Settings
) -> Embedded:
    """Embed images; the features are kept in the store."""
    options = work_of(settings) | {"hashes": hashes, "progress": f"embedding {name}"}
    features, bad = embed_images(encoder, images, settings.cache or store.root / "features", **options)
    return Embedded(images, features, hashes, bad)


def work_of(settings: Settings) -> dict[str, Any]:
    """Where and by what images are embedded."""
    make = partial(encoder_by_name, settings.encoder, settings.weights)
    return {
        **chosen(settings, "workers", "batch_rows", "engine", "address"),
        "make": make,
        "device": device_of(settings),
    }


def input_table(images: Images, hashes: list[str]) -> bytes:
    """Images, their classes and hashes as a .csv file."""
    return image_table(images.ids, [images.classes[label] for label in images.labels], hashes)


def keep_input(store: Store, name: str, data: bytes) -> None:
    """Write down which images a run began with, or refuse others: what was applied could not be reverted."""
    before = store.entries.get(name)
    if before is not None and before["sha256"] != sha256(data).hexdigest():
        raise InputError(
            f"out: expected the images and labels that {store.root} was begun with, got others than in {name}; "
            "take another folder, or delete that one to start afresh"
        )
    keep(store, name, data)


def keep(store: Store, name: str, data: bytes) -> None:
    """Put a file into the store, unless it is there already."""
    if (store.done(name) or {}).get("sha256") != sha256(data).hexdigest():
        store.put(name, data)


def refined(
    real: Embedded, synthetic: Embedded, settings: Settings, inputs: Mapping[str, str], say: Callable[[str], object]
) -> tuple[Refinement, Artifact]:
    """Refine the given labels of images whose features are known, and put the result on record."""
    images, usable, names = real.images, synthetic.usable, ("logits", "text_prototypes")
    evidence: dict[str, Any] = {
        "num_classes": len(images.classes),
        "synthetic_features": synthetic.features[usable],
        "synthetic_labels": synthetic.images.labels[usable],
        **{name: read_npy(name, path, "f") for name in names if (path := getattr(settings, name))},
    }
    try:
        result = refine_arrays(real.features, images.labels, settings, say, **evidence)
    except Unrelated:  # labels that were read with their images cannot be in another order
        result = front.unchanged(images.labels, len(images.classes), warning(say))
    known = {**recorded(settings, "run", result), "encoder": settings.encoder, "source": images.kind}
    known["classes"] = list(images.classes)
    texts = [images.classes[label] for label in images.labels]
    rows = np.flatnonzero(np.asarray(result.proposed) >= 0).tolist()
    scored = image_table(*([one[row] for row in rows] for one in (images.ids, texts, real.hashes)))
    inputs = {**inputs, "scored_images": sha256(scored).hexdigest()}  # what `apply` compares
    return result, result.record(images.labels, ids=images.ids, inputs=inputs, settings=known)


def refine_arrays(
    features: NDArray[Any], given: NDArray[Any], settings: Settings, say: Callable[[str], object], **inputs: Any
) -> Refinement:
    """The one way from arrays to a refinement, for `run` and `refine`: doubts first, then the work.

    `inputs` are the arrays that `front.refine` takes besides; a second view comes as `logits` too.
    """
    inputs |= options_of(settings)
    if (settings.refiner != "paper") and "synthetic_features" in inputs and "logits" in inputs:
        inputs["second_view"] = inputs.pop("logits")
    return front.refine(features, given, progress=sys.stderr.isatty(), say=warning(say), **inputs)


def warning(say: Callable[[str], object]) -> Callable[[str], object]:
    """Says a doubt as a warning."""
    return lambda doubt: say(f"warning: {doubt}")


def recorded(settings: Settings, command: str, result: Refinement) -> dict[str, Any]:
    """The settings that labels depend on besides the inputs, for the artifact."""
    used = settings.used(command)
    if "weight" in used:
        used["weight"] = getattr(result.diagnostics, "weight", used["weight"])
    return {name: used[name] for name in OPTIONS if name in used}


def options_of(settings: Settings) -> dict[str, Any]:
    """The settings that the front door takes, without those left at their default."""
    return {name: getattr(settings, name) for name in OPTIONS if getattr(settings, name) != getattr(Settings, name)}


def evidence_of(
    artifact: Artifact,
    result: Refinement,
    real: Embedded,
    synthetic: Embedded,
    summary: Summary,
    duplicates: Duplicates,
) -> page.Evidence:
    """What the page shows beside the artifact; synthetic images that could not be decoded are left out of it."""
    usable, known = synthetic.usable, result.diagnostics
    reference: NDArray[Any] = synthetic.features[usable]
    intended: NDArray[Any] = synthetic.images.labels[usable]
    copies = {one.row: one.group for one in duplicates.copies if one.split == "images"}
    shown: dict[str, Any] = page.shown_rows(artifact, result.proposed, getattr(known, "posteriors", None), copies)
    limits = np.asarray(known.thresholds, dtype=np.float64).ravel()
    return page.Evidence(
        **shown,
        nearest=page.nearest_synthetic(real.features, shown["rows"], reference),
        synthetic_labels=intended,
        synthetic_ids=[synthetic.images.ids[row] for row in usable],
        threshold=limits[np.isfinite(limits)].tolist() or None,
        sweep=[page.taken_from(page.SweepRow, row) for row in getattr(known, "sweep", ())],
        quality=page.taken_from(page.Quality, prototype_quality(reference, intended, len(real.images.classes))),
        notes={name: text for name, text in summary.lines().items() if name in NOTES},
        findings=[
            *page.unreadable(*((one.images.ids, one.bad) for one in (real, synthetic))),
            *page.duplicated(copies_lines(summary.copies), duplicates.rows()),
            *page.stood_out(summary.classes),
        ],
    )


def draw_page(
    out: Path, artifact: Artifact, evidence: page.Evidence, images: Images, synthetic: Images, **form: Any
) -> None:
    """Write the page of a run."""
    row_of = {one: row for row, one in enumerate(synthetic.ids)}
    if artifact.ids != images.ids or not set(evidence.synthetic_ids) <= set(row_of):
        raise InputError(f"images: expected those of the run in {out}, got others")
    rows = [row_of[one] for one in evidence.synthetic_ids]
    review = Review(artifact, evidence, images.image, lambda row: synthetic.image(rows[row]), folder=images.folder)
    write_report(review, out / "report", **form)


def redraw(settings: Settings, **form: Any) -> Summary:
    """Draw the page of a finished run again, from what the run left, with options of `write_report`.

    Raises:
        InputError: The folder holds no finished run, or its images are other ones now.
    """
    out = Path(settings.out).absolute()
    with locked(out):
        for name in ("summary.json", "evidence.json"):
            if Store(out, 0).done(name) is None:
                raise InputError(f"folder: expected a finished run in {out}, but {name} is missing or damaged")
        known = json.loads((out / "summary.json").read_bytes())
        evidence = page.read_evidence(out / "evidence.json")
        artifact = read_artifact(out / "refined")
        images = open_images(settings.images, artifact.classes, **settings.columns)
        synthetic = open_synthetic(settings.synthetic or str(out / "synthetic"), images.classes)
        draw_page(out, artifact, evidence, images, synthetic, **form)
    return read_back(known)


def embed(settings: Settings, *, say: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """Write the features of images, (N, D), and their ids and labels, as `synth-refine refine` takes them."""
    check(settings, "embed")
    _, images = opened(settings, say)
    return embed_folder(encoder_of(settings), images, settings.out, **work_of(settings))


def generate(settings: Settings, *, say: Callable[[str], object] = lambda _: None) -> Path:
    """Generate the synthetic images of classes into the folder `out`; the manifest."""
    check(settings, "generate")
    classes = read_classes(settings.classes or "")
    warn_of_prompts(classes, say)
    made = generate_images(settings.out, classes, generator_of(settings), **chosen(settings, *SET))
    say_withheld(made, say)
    return made
