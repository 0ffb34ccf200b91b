"""What each command does. Importing this takes seconds, so that `synth_refine.cli` does it for a valid call only."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synth_refine import pipeline
from synth_refine._io.atomic import check_folder, file_hash
from synth_refine._io.check import InputError, check_array, check_threshold, check_turned
from synth_refine._io.csv import csv_bytes
from synth_refine._io.untrusted import read_npy
from synth_refine.images.sources import read_classes
from synth_refine.labels.artifact import (
    Artifact,
    Damaged,
    WrongBase,
    WrongIds,
    read_artifact,
    record,
    versions,
    write_artifact,
)
from synth_refine.labels.export import export
from synth_refine.labels.files import read_labels, read_labels_and_ids, write_labels
from synth_refine.labels.review import reviewed
from synth_refine.labels.trees import apply_tree, revert_tree
from synth_refine.refine.anchored import anchored_posterior
from synth_refine.refine.checks import agreement_doubt, check_row_order, prototype_classes
from synth_refine.refine.decide import REASONS, Answer, decide
from synth_refine.refine.paper import refine_labels
from synth_refine.scale.anchored import anchored_shards
from synth_refine.scale.shards import refine_shards
from synth_refine.scale.tables import SHARD_ROWS, shards_sample

FINE, PROBLEM = 0, 1
ORDER_ROWS = 50_000  # images that are compared with the prototypes, to tell whether labels stand in their order


def _settings(options: argparse.Namespace) -> pipeline.Settings:
    """What the options say, over what the config says."""
    entries = pipeline.read_config(options.config) if getattr(options, "config", None) else {}
    names = [one.name for one in fields(pipeline.Settings)]
    entries |= {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    for name, shown in (("images", "IMAGES"), ("out", "--out FOLDER")):
        if name not in entries:
            options.usage(f"the following arguments are required, here or in the config: {shown}")
    return pipeline.Settings(**entries)


def _announced(settings: pipeline.Settings) -> pipeline.Settings:
    """The same, after a word on where the encoder comes from: it may be large and take its time to come."""
    if settings.weights is None and not Path(settings.encoder).exists():
        _say(f"{settings.encoder} is taken from this machine or else from its hub; HF_HUB_OFFLINE=1 never asks a hub")
    return settings


def _run(options: argparse.Namespace) -> int:
    return _tell(options, pipeline.run(_announced(_settings(options)), dry_run=options.dry_run))


def _report(options: argparse.Namespace) -> int:
    entries = pipeline.read_config(str(Path(options.folder) / "config.yaml"))
    return _tell(options, pipeline.run(pipeline.Settings(**{**entries, "out": options.folder})))


def _tell(options: argparse.Namespace, done: pipeline.Summary | dict[str, Any]) -> int:
    result = done if isinstance(done, dict) else asdict(done)
    if options.json:
        _show(result)
    else:
        notes = result.pop("notes", {})
        print("\n".join(f"{name}: {value}" for name, value in {**result, **notes}.items()))
    return FINE


def _generate(options: argparse.Namespace) -> int:
    options.images = ""
    check_folder("out", _settings(options).out)
    manifest = pipeline.generate(_settings(options), read_classes(options.classes))
    _show({"manifest": str(manifest), "sha256": file_hash(manifest)})
    return FINE


def _embed(options: argparse.Namespace) -> int:
    _show(pipeline.embed(_announced(_settings(options))))
    return FINE


def _refine(options: argparse.Namespace) -> int:
    check_folder("out", options.out)
    features = read_npy("features", options.features, "f")
    check_array("features", features, ("N", "D"))
    given, ids = read_labels_and_ids(options.given, key=options.key)
    check_turned("features", features, len(given))
    method = _paper if options.refiner == "paper" else _anchored
    files = ["features", "given", *(("logits", "prototypes") if method is _paper else ("anchors", "anchor_labels"))]
    artifact = record(
        given.astype(_dtype(options.given)),
        **method(options, features, given),
        ids=ids,
        inputs={name: file_hash(getattr(options, name)) for name in files} | {"encoder": options.encoder},
    )
    lost = np.setdiff1d(artifact.given, artifact.labels)
    if lost.size:
        _say(f"no image is left in class {', '.join(map(str, lost[:5]))}; PLC, for one, refuses such labels")
    if (Path(options.out) / "run.json").exists():
        there = read_artifact(options.out).run
        if any(there.get(name) != value for name, value in artifact.run.items() if name != "versions"):
            raise InputError(
                f"out: {options.out} holds the artifact of other settings or inputs, without which what it was applied "
                "to cannot be reverted; choose another folder, or delete that one"
            )
    if not options.dry_run:
        write_artifact(options.out, artifact)
    _show({"artifact": options.out, "written": not options.dry_run, **_counts(artifact)})
    return FINE


def _paper(options: argparse.Namespace, features: NDArray[Any], given: NDArray[np.int64]) -> dict[str, Any]:
    """What the paper's rule decides, as arguments of `record`."""
    check_threshold(options.threshold)
    logits, prototypes = (read_npy(name, getattr(options, name), "f") for name in ("logits", "prototypes"))
    if logits.shape[:1] == given.shape:  # the two against the features, which are then at fault
        check_array("features", features, (len(given), "D"))
    check_array("logits", logits, (len(features), "C"))
    check_array("given", given, (len(features),))
    named = _class_names(options, logits.shape[1])
    decision = refine_labels(
        features, logits, prototypes, options.threshold, weight=options.weight, strict=options.strict
    )
    some = slice(None, None, -(-len(given) // ORDER_ROWS) or 1)
    nearest = prototype_classes(features[some], prototypes, np.arange(len(prototypes)), len(prototypes))
    _doubt(given[some], nearest, len(prototypes))
    undecided = np.asarray(decision.labels) < 0
    return {
        "labels": decision.apply(given),
        "num_classes": logits.shape[1],
        "abstained": undecided,
        "confidence": decision.confidence,
        "reason": np.where(undecided, "cannot be scored", "score reaches the threshold"),
        "settings": {"refiner": "paper", "threshold": options.threshold, "weight": options.weight, **named},
    }


def _anchored(options: argparse.Namespace, features: NDArray[Any], given: NDArray[np.int64]) -> dict[str, Any]:
    """What the anchored refiner decides, as arguments of `record`."""
    check_array("given", given, (len(features),))
    anchors, anchor_labels, num_classes = _read_anchors(options)
    check_array("anchors", anchors, ("M", features.shape[1]))
    named = _class_names(options, num_classes)
    nearest = prototype_classes(features, anchors, anchor_labels, num_classes)
    check_row_order(given, nearest, num_classes)
    _doubt(given, nearest, num_classes)
    posterior = anchored_posterior(
        features,
        given,
        anchors,
        anchor_labels,
        num_classes=num_classes,
        seed=options.seed,
        progress=sys.stderr.isatty(),
    )
    decision = decide(posterior, given, force=options.force)
    _say(decision.summary())
    best = np.sort(np.asarray(posterior.posterior), axis=1)
    return {
        "labels": decision.apply(given),
        "num_classes": num_classes,
        "abstained": np.asarray(decision.answers) == Answer.ABSTAIN,
        "confidence": best[:, -1],
        "margin": best[:, -1] - best[:, -2] if num_classes > 1 else best[:, -1],
        "reason": np.array(REASONS)[np.asarray(decision.reasons)],
        "settings": {"refiner": "anchored", "seed": options.seed, "force": options.force, **named},
    }


def _class_names(options: argparse.Namespace, count: int) -> dict[str, list[str]]:
    """The entry of class names in an artifact's settings, where there are some."""
    if options.classes is None:
        return {}
    names = list(read_classes(options.classes))
    if len(names) != count:
        raise InputError(f"classes: expected {count} names in {options.classes}, got {len(names)}")
    return {"classes": names}


def _read_anchors(options: argparse.Namespace) -> tuple[NDArray[Any], NDArray[np.int64], int]:
    """Features of the synthetic images that have some, (M, D), the class of each, (M,), and the number of classes."""
    anchors, anchor_labels = read_npy("anchors", options.anchors, "f"), read_labels(options.anchor_labels)
    check_array("anchors", anchors, ("M", "D"))
    check_array("anchor_labels", anchor_labels, (len(anchors),))
    num_classes = int(anchor_labels.max()) + 1 if len(anchor_labels) else 0
    fit = np.isfinite(anchors).all(axis=1)
    if not fit.all():  # `embed` gives such features to images that it cannot decode
        _say(f"{(~fit).sum()} of {len(fit)} anchors are left out: their features are not finite")
    return anchors[fit], anchor_labels[fit], num_classes


def _scale(options: argparse.Namespace) -> int:
    shard_rows = SHARD_ROWS if options.shard_rows is None else options.shard_rows
    if options.refiner == "anchored":
        anchors, anchor_labels, num_classes = _read_anchors(options)
        done = anchored_shards(
            options.features,
            options.given,
            anchors,
            anchor_labels,
            options.out,
            num_classes=num_classes,
            seed=options.seed or 0,
            shard_rows=shard_rows,
            progress=sys.stderr.isatty(),
        )
        if done.note:
            _say(f"nothing is changed: {done.note}")
        _show({"out": options.out, **asdict(done)})
        return FINE
    check_threshold(options.threshold)
    prototypes = read_npy("prototypes", options.prototypes, "f")
    summary = refine_shards(
        options.features,
        options.given,
        prototypes,
        options.threshold,
        options.out,
        logits=options.logits,
        head=None if options.head is None else read_npy("head", options.head, "f"),
        weight=options.weight,
        shard_rows=shard_rows,
        engine=options.engine,
        address=options.address,
        progress=sys.stderr.isatty(),
    )
    given, features = shards_sample(options.features, options.given, len(prototypes), ORDER_ROWS)
    classes = np.arange(len(prototypes))
    _doubt(given, prototype_classes(features, prototypes, classes, len(prototypes)), len(prototypes))
    _show({"out": options.out, **asdict(summary)})
    return FINE


def _apply(options: argparse.Namespace) -> int:
    artifact = _reviewed(options)
    if options.images:
        return _tree(options, artifact, apply_tree)
    given, ids = read_labels_and_ids(options.given, key=options.key)
    return _write(options, artifact, artifact.apply(given, ids), ids)


def _revert(options: argparse.Namespace) -> int:
    artifact = _reviewed(options)
    if options.images:
        return _tree(options, artifact, revert_tree)
    labels, ids = read_labels_and_ids(options.labels, key=options.key)
    return _write(options, artifact, artifact.revert(labels, ids), ids)


def _tree(options: argparse.Namespace, artifact: Artifact, write: Callable[..., Path]) -> int:
    write(artifact, options.images, options.out, link=options.link, dry_run=options.dry_run)
    _show({"images": options.out, "written": not options.dry_run, **_counts(artifact)})
    return FINE


def _reviewed(options: argparse.Namespace) -> Artifact:
    """The artifact, or what the decisions of people left of it."""
    artifact = read_artifact(options.artifact)
    return artifact if options.decisions is None else reviewed(artifact, options.decisions)


def _write(
    options: argparse.Namespace, artifact: Artifact, labels: NDArray[np.integer[Any]], ids: list[str] | None
) -> int:
    if Path(options.out).exists() and Path(options.out).samefile(getattr(options, "given", None) or options.labels):
        raise InputError(f"out: expected another file than the labels read, got {options.out}")
    names = (ids or artifact.ids) if Path(options.out).suffix.lower() == ".csv" else None
    _check_free(options.out, labels, names)
    if not options.dry_run:
        write_labels(options.out, labels, names, dtype=labels.dtype)
    _show({"labels": options.out, "written": not options.dry_run, **_counts(artifact)})
    return FINE


def _check_free(out: str, labels: NDArray[np.integer[Any]], names: list[str] | None) -> None:
    """Refuse to write labels over anything else; over the same ones, as a command that is repeated does, is fine."""
    if Path(out).is_dir():
        raise InputError(f"out: expected a file to write, got a folder: {out}")
    if not os.path.lexists(out) or Path(out).suffix.lower() not in (".npy", ".csv"):  # which nothing is written to
        return
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, Path(out).name)
        write_labels(new, labels, names, dtype=labels.dtype)
        if not Path(out).is_file() or new.read_bytes() != Path(out).read_bytes():
            raise InputError(f"out: expected a new file, or one of the same labels, but {out} holds something else")


def _diff(options: argparse.Namespace) -> int:
    if options.second is None:
        artifact = read_artifact(options.first)
        sys.stdout.write(csv_bytes(artifact.table()).decode())
        pairs = zip(artifact.given[artifact.changed].tolist(), artifact.labels[artifact.changed].tolist(), strict=True)
        for (old, new), count in Counter(pairs).most_common(10):
            _say(f"{old} -> {new}: {count}")
        return FINE
    (before, ids), (after, other) = _load(options.first), _load(options.second)
    if ids is not None and other is not None:
        place = {one: row for row, one in enumerate(other)}
        if set(place) != set(ids):
            raise InputError(f"{options.second}: expected the ids of {options.first}, got others")
        after = after[[place[one] for one in ids]]
    check_array(options.second, after, before.shape)
    rows = np.flatnonzero(before != after)
    names = ids or other or range(len(before))
    table = {"id": [names[row] for row in rows], "old": before[rows].tolist(), "new": after[rows].tolist()}
    sys.stdout.write(csv_bytes(table).decode())
    _say(f"{len(rows)} of {len(before)} labels differ")
    return PROBLEM if len(rows) else FINE


def _export(options: argparse.Namespace) -> int:
    artifact = read_artifact(options.labels) if Path(options.labels).is_dir() else None
    labels, ids = (artifact, artifact.ids) if artifact is not None else _load(options.labels)
    done = export(
        labels,
        options.format,
        options.out,
        ids=ids,
        fill=read_labels(options.fill) if options.fill else "truncate" if options.truncate else "error",
        clean_label=read_labels(options.clean_label, key="clean_label") if options.clean_label else None,
        key=options.entry,
        dry_run=options.dry_run,
    )
    _say(done.note)
    _show({"labels": str(done.path), "written": not options.dry_run, "count": done.count})
    return FINE


def _verify(options: argparse.Namespace) -> int:
    try:
        artifact = read_artifact(options.artifact)
        if options.labels:
            labels, ids = read_labels_and_ids(options.labels, key=options.key)
            artifact.revert(labels, ids)
    except (Damaged, WrongBase, WrongIds) as error:
        _say(f"synth-refine: {error}")
        return PROBLEM
    _show({"artifact": options.artifact, **_counts(artifact)})
    return FINE


def _env(options: argparse.Namespace) -> int:
    _show({**versions(), "platform": platform.platform()})
    return FINE


def _load(path: str) -> tuple[NDArray[np.int64], list[str] | None]:
    """The labels, and the ids if there are some, of a label file or of an artifact."""
    if not Path(path).is_dir():
        return read_labels_and_ids(path)
    artifact = read_artifact(path)
    return artifact.labels, artifact.ids


def _dtype(path: str) -> np.dtype[Any]:
    """The integer type of given labels, so that reverting restores it too."""
    return read_npy("given", path, "iu").dtype if Path(path).suffix.lower() == ".npy" else np.dtype(np.int64)


def _counts(artifact: Artifact) -> dict[str, int]:
    undecided = int((artifact.action == "abstain").sum())
    return {"count": len(artifact.labels), "changed": len(artifact.changed), "abstained": undecided}


def _show(result: Mapping[str, object]) -> None:
    """One line of JSON, which knows no NaN: what was not estimated is null."""
    print(json.dumps({name: None if value != value else value for name, value in result.items()}))


def _doubt(given: NDArray[np.int64], nearest: NDArray[np.int64], num_classes: int) -> None:
    if text := agreement_doubt(given, nearest, num_classes):
        _say(f"warning: {text}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "refine": _refine,
    "scale": _scale,
    "apply": _apply,
    "revert": _revert,
    "diff": _diff,
    "export": _export,
    "verify": _verify,
    "report": _report,
    "run": _run,
    "embed": _embed,
    "generate": _generate,
    "env": _env,
}
