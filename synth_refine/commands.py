"""Run one command and return its exit code. Importing this takes seconds; `cli` does it for valid calls alone."""

from __future__ import annotations

import json
import os
import platform
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synth_refine import pipeline
from synth_refine._io.atomic import check_folder, file_hash, write_atomic
from synth_refine._io.check import InputError, check_array, check_turned
from synth_refine._io.csv import csv_bytes
from synth_refine._io.untrusted import read_npy
from synth_refine.images.listing import read_classes
from synth_refine.labels.artifact import (
    Artifact,
    Damaged,
    WrongBase,
    WrongIds,
    read_artifact,
    write_artifact,
)
from synth_refine.labels.beside import check_classes, read_beside
from synth_refine.labels.export import export
from synth_refine.labels.files import LabelFile, label_bytes, read_label_file, read_labels, read_labels_and_ids
from synth_refine.labels.kept import write_kept
from synth_refine.labels.refined import numbered_like
from synth_refine.labels.review import reviewed
from synth_refine.labels.run import check_free, versions
from synth_refine.labels.trees import apply_tree, revert_tree, verify_tree
from synth_refine.refine.estimates import Estimate
from synth_refine.scale.shards import refine_shards
from synth_refine.settings import Settings, read_settings
from synth_refine.summary import Summary, estimates_of, findings, gate

FINE, PROBLEM = 0, 1


def _run(options: Namespace) -> int:
    settings = _announced(_settings(options))
    done = pipeline.run(settings, dry_run=options.dry_run, say=_say)
    if isinstance(done, dict):
        _show(options, done)
        return FINE
    _found(options, done)
    _say(f"next: open {done.report}, decide, export decisions.csv; then")
    for step in (
        f"review {done.artifact} decisions.csv --out reviewed",
        f"apply reviewed --images {settings.images} --out cleaner",
        "export reviewed --format csv --out labels.csv",
    ):
        _say(f"  synth-refine {step}")
    return FINE


def _found(options: Namespace, summary: Summary) -> None:
    _show(options, asdict(summary), findings(summary, read_artifact(summary.artifact)))


def _settings(options: Namespace) -> Settings:
    return read_settings(options.command, vars(options), getattr(options, "config", None))


def _announced(settings: Settings) -> Settings:
    """The same, after a word on where the encoder comes from: it may be large and take its time to come."""
    if settings.weights is None and not Path(settings.encoder).exists():
        _say(f"{settings.encoder} is taken from this machine or else from its hub; HF_HUB_OFFLINE=1 never asks a hub")
    return settings


def _report(options: Namespace) -> int:
    config = str(Path(options.folder) / "config.yaml")
    form = {"single_file": options.single_file, "audit": options.audit, "say": _say}
    _found(options, pipeline.redraw(read_settings("run", {"out": options.folder}, config), **form))
    return FINE


def _generate(options: Namespace) -> int:
    manifest = pipeline.generate(_settings(options), say=_say)
    _show(options, {"manifest": str(manifest), "sha256": file_hash(manifest)})
    return FINE


def _embed(options: Namespace) -> int:
    _show(options, pipeline.embed(_announced(_settings(options)), say=_say))
    return FINE


def _refine(options: Namespace) -> int:
    settings = _settings(options)
    check_folder("out", settings.out)
    check_free(settings.out)
    features = read_npy("features", settings.features, "f")
    check_array("features", features, ("N", "D"))
    found = read_beside("given", settings.features, settings.given, key=settings.key)
    check_turned("features", features, len(found.labels))
    names = _class_names(settings, found)
    inputs, given = _arrays(settings, found, names), numbered_like(found, names)
    if settings.logits:
        inputs["logits"] = read_npy("logits", settings.logits, "f")
    result = pipeline.refine_arrays(features, given, settings, _say, **inputs)
    artifact = result.record(
        given.astype(_dtype(settings.given)),
        ids=found.ids,
        inputs=_hashes(settings),
        settings=pipeline.recorded(settings, "refine", result) | ({} if names is None else {"classes": names}),
    )
    if (lost := np.setdiff1d(artifact.given, artifact.labels)).size:
        _say(f"no image is left in class {', '.join(map(str, lost[:5]))}; some codebases refuse such labels")
    return _keep(options, artifact, estimates_of(result.diagnostics))


def _class_names(settings: Settings, given: LabelFile) -> list[str] | None:
    """The class names in the order of their numbers, of --classes or of what belongs to the given labels."""
    own, names = given.classes, list(read_classes(settings.classes)) if settings.classes else None
    if own is None or names is None or (given.named and set(own) <= set(names)):  # names alone have no order
        return names or own
    if own != names:
        raise InputError(
            f"classes: expected {', '.join(map(repr, own[:5]))} in this order, by which the given labels are numbered, "
            f"got {', '.join(map(repr, names[:5]))} in {settings.classes}"
        )
    return own


def _synthetic_labels(settings: Settings, given: LabelFile, names: list[str] | None) -> NDArray[np.int64]:
    """The intended classes of the synthetic images, by name where there are names, numbered as the given labels are."""
    assert settings.synthetic_features is not None
    assert settings.synthetic_labels is not None
    found = read_beside("synthetic_labels", settings.synthetic_features, settings.synthetic_labels)
    if found.classes is None or (names is None and not found.named):
        if given.named and settings.classes is None:
            raise InputError("synthetic_labels: expected class names, as the given labels are, or --classes")
        return found.labels
    if names is None:
        raise InputError("given: expected class names, as the synthetic labels are, or --classes, got numbers")
    check_classes("synthetic_labels", found.classes, names, settings.classes or settings.given)
    return numbered_like(found, names)


def _arrays(settings: Settings, given: LabelFile, classes: list[str] | None) -> dict[str, Any]:
    """What refines besides features, given labels and logits, as arrays by name."""
    names = ("prototypes", "text_prototypes", "head")
    found: dict[str, Any] = {name: read_npy(name, path, "f") for name in names if (path := getattr(settings, name))}
    if settings.synthetic_features and settings.synthetic_labels:
        features = read_npy("synthetic_features", settings.synthetic_features, "f")
        labels = _synthetic_labels(settings, given, classes)
        check_array("synthetic_features", features, ("M", "D"))
        check_array("synthetic_labels", labels, (len(features),))
        usable = np.isfinite(features).all(axis=1)
        if not usable.all():  # `embed` gives such features to images that it cannot decode
            _say(f"{(~usable).sum()} of {len(usable)} synthetic images are left out: their features are not finite")
        count = int(labels.max()) + 1 if len(labels) else 0
        count = max(count, len(classes or ()))
        found |= {"synthetic_features": features[usable], "synthetic_labels": labels[usable], "num_classes": count}
    count = found.get("num_classes", len(found.get("prototypes", ())))
    if classes is not None and len(classes) != count:
        raise InputError(f"classes: expected {count} names in {settings.classes or settings.given}, got {len(classes)}")
    return found


def _hashes(settings: Settings) -> dict[str, str]:
    """The hash of every file that a refinement depends on."""
    names = ("features", "given", "synthetic_features", "synthetic_labels", "prototypes", "logits", "text_prototypes")
    return {name: file_hash(path) for name in names if (path := getattr(settings, name))}


def _keep(options: Namespace, artifact: Artifact, estimates: Mapping[str, Estimate | None]) -> int:
    """Write an artifact, but never over another one."""
    check_free(options.out, artifact.run)
    if not options.dry_run:
        write_artifact(options.out, artifact)
    known: dict[str, object] = {name: one and one.value for name, one in estimates.items()}
    known |= {"audit": artifact.run["audit"]} if "audit" in artifact.run else {}
    _show(options, {"artifact": options.out, "written": not options.dry_run, **_counts(artifact), **known})
    return FINE


def _scale(options: Namespace) -> int:
    settings = _settings(options)
    check_folder("out", settings.out)
    is_table = Path(settings.given).suffix.lower() == ".csv"
    found = read_beside("given", settings.features, settings.given) if is_table else LabelFile(np.empty(0, np.int64))
    names = _class_names(settings, found)
    inputs = _arrays(settings, found, names)
    inputs["second_view" if "synthetic_features" in inputs else "logits"] = settings.logits
    summary = refine_shards(
        settings.features,
        numbered_like(found, names) if is_table else settings.given,
        settings.out,
        ids=found.ids,
        class_names=names,
        shard_rows=settings.shard_rows,
        engine=settings.engine,
        address=settings.address,
        progress=sys.stderr.isatty(),
        say=pipeline.warning(_say),
        **pipeline.options_of(settings),
        **inputs,
    )
    counts = ("rows", "changed", "abstained", "unscored", "shards", "reused")
    known = {name: one and one.value for name, one in estimates_of(summary).items()}
    _show(options, {"artifact": settings.out, **{name: getattr(summary, name) for name in counts}, **known})
    return FINE


def _review(options: Namespace) -> int:
    check_folder("out", options.out)
    made = reviewed(read_artifact(options.artifact), options.decisions, format=options.format)
    if disputed := made.run["reviewed"].get("disputed"):
        _say(f"{disputed} images stay undecided: their annotators chose different classes")
    if (found := made.run.get("audit")) is not None:
        for name, text in (("before", "as given"), ("proposed", "with every proposal"), ("after", "after this review")):
            share = "not known: answer some of both kinds" if found[name] is None else _interval(*found[name])
            _say(f"audit: wrong labels {text}: {share}")
    return _keep(options, made, {})


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.1%} ({low:.1%} to {high:.1%} at 95 %)"


def _apply(options: Namespace) -> int:
    return _turn(options, Artifact.apply, apply_tree)


def _revert(options: Namespace) -> int:
    return _turn(options, Artifact.revert, revert_tree)


def _turn(options: Namespace, turn: Callable[..., NDArray[np.integer[Any]]], tree: Callable[..., Path]) -> int:
    """Write the labels that an artifact turns others into, or a folder of images by them."""
    artifact = read_artifact(options.artifact)
    if options.images:
        tree(artifact, options.images, options.out, link=options.link, dry_run=options.dry_run)
        _show(options, {"images": options.out, "written": not options.dry_run, **_counts(artifact)})
        return FINE
    found = read_label_file(options.labels, key=options.key)
    before = numbered_like(found, artifact.classes)
    labels = turn(artifact, before.astype(_dtype(options.labels)), found.ids)  # the type that is written
    if Path(options.out).exists() and Path(options.out).samefile(options.labels):
        raise InputError(f"out: expected another file than the labels read, got {options.out}")
    names = (found.ids or artifact.ids) if Path(options.out).suffix.lower() == ".csv" else None
    out = Path(options.out)
    if out.is_dir():
        raise InputError(f"out: expected a file to write, got a folder: {out}")
    data = label_bytes(out, labels, names, classes=artifact.classes, dtype=labels.dtype, like=options.labels)
    if os.path.lexists(out) and not (out.is_file() and out.read_bytes() == data):  # as a command that is repeated finds
        shown = "something else" if out.is_file() else "no file"
        raise InputError(f"out: expected a new file, or one of the same labels, but {out} holds {shown}")
    rows = slice(None) if found.ids is None else artifact.rows_of(found.ids)
    kept = None
    if turn is Artifact.apply:
        kept = write_kept(out, artifact.action[rows] != "remove", dry_run=options.dry_run)
    if not options.dry_run:
        with write_atomic(out) as file:
            file.write(data)
    more = {} if kept is None else {"kept": str(kept)}
    _show(options, {"labels": options.out, **more, "written": not options.dry_run, **_counts(artifact)})
    return FINE


def _diff(options: Namespace) -> int:
    if options.second is None:
        artifact = read_artifact(options.first)
        sys.stdout.write(csv_bytes(artifact.table()).decode())
        pairs = zip(artifact.given[artifact.changed].tolist(), artifact.labels[artifact.changed].tolist(), strict=True)
        classes = artifact.classes or range(artifact.num_classes)
        for (old, new), count in Counter(pairs).most_common(10):
            _say(f"{classes[old]} -> {classes[new]}: {count}")
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


def _export(options: Namespace) -> int:
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
        overwrite=options.overwrite,
        force=options.force,
        keep_removed=options.keep_removed,
        url_prefix=options.url_prefix,
        dry_run=options.dry_run,
    )
    _say(done.note if done.backup is None else f"{done.note}; what was there is now {done.backup}")
    _show(options, {"labels": str(done.path), "written": not options.dry_run, "count": done.count})
    return FINE


def _verify(options: Namespace) -> int:
    try:
        artifact = read_artifact(options.artifact)
        if options.labels:
            found = read_label_file(options.labels, key=options.key)
            artifact.revert(numbered_like(found, artifact.classes), found.ids)
        if options.images:
            verify_tree(artifact, options.images)
    except (Damaged, WrongBase, WrongIds) as error:
        _say(f"synth-refine: {error}")
        return PROBLEM
    _show(options, {"artifact": options.artifact, **_counts(artifact)})
    return FINE


def _check(options: Namespace) -> int:
    found = gate(options.result, options.max_noise, options.max_no_class, options.no_leakage)
    holds, conditions = all(one.holds for one in found), [vars(one) for one in found]
    _show(options, {"result": options.result, "holds": holds, "conditions": conditions}, list(map(str, found)))
    return FINE if holds else PROBLEM


def _env(options: Namespace) -> int:
    _show(options, {**versions(), "platform": platform.platform()})
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
    name = "undecided" if "reviewed" in artifact.run else "abstained"  # by people, or by a refiner
    counts = {"count": len(artifact.labels), "changed": len(artifact.changed)}
    counts |= {name: len(artifact.abstained)}
    return counts | {"no_class": len(artifact.proposed_removals), "removed": len(artifact.removed)}


def _show(options: Namespace, result: Mapping[str, object], lines: Sequence[str] | None = None) -> None:
    """The result on stdout: lines for people on a terminal, else one line of JSON, as with --json.

    JSON knows no NaN: what was not estimated is null.
    """
    known = {name: None if value != value else value for name, value in result.items()}
    if options.json or not sys.stdout.isatty():
        print(json.dumps(known), flush=True)
    else:
        words = (f"{name.replace('_', ' ')}: {'not estimated' if one is None else one}" for name, one in known.items())
        print("\n".join(words if lines is None else lines), flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "run": _run,
    "refine": _refine,
    "scale": _scale,
    "embed": _embed,
    "generate": _generate,
    "review": _review,
    "apply": _apply,
    "revert": _revert,
    "diff": _diff,
    "export": _export,
    "verify": _verify,
    "report": _report,
    "check": _check,
    "env": _env,
}
