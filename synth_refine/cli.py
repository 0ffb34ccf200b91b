"""The command `synth-refine`: results on stdout, progress and remarks on stderr.

Exit codes: 0 fine, 1 a problem was found, 2 the command was called wrongly, 3 an input cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synth_refine import pipeline
from synth_refine._check import InputError, check_array
from synth_refine.anchored import anchored_posterior
from synth_refine.artifact import (
    Artifact,
    Damaged,
    WrongBase,
    WrongIds,
    read_artifact,
    record,
    versions,
    write_artifact,
)
from synth_refine.decide import REASONS, Answer, check_row_order, decide, prototype_classes
from synth_refine.export import FORMATS, export
from synth_refine.files import file_hash, read_npy
from synth_refine.images import read_classes
from synth_refine.labels import csv_bytes, read_labels, read_labels_and_ids, write_labels
from synth_refine.on_ray import ADDRESS_HELP, ENGINE_HELP, ENGINES
from synth_refine.refine import refine_labels
from synth_refine.report import decided
from synth_refine.scale import SHARD_ROWS, refine_shards
from synth_refine.trees import apply_tree, revert_tree

FINE, PROBLEM, BAD_INPUT = 0, 1, 3

REFINERS = {"paper": ("logits", "prototypes", "threshold"), "anchored": ("anchors", "anchor_labels")}
"""What each refiner needs besides features and given labels."""

IMAGES = "a folder of images per class, a .csv with path and label, or a saved dataset, .tar or .parquet files"

TREE = (
    "a folder per class, or a .csv of paths and labels, in place of a label file: its images are copied into a new "
    "folder per class and the old one is left as it is, or a new .csv is written beside the old one"
)

REFINE = """examples:
  synth-refine refine --features features.npy --logits logits.npy --prototypes prototypes.npy \\
      --given given.npy --threshold 0.6 --out refined
  synth-refine refine --refiner anchored --features features.npy --anchors synthetic.npy \\
      --anchor-labels synthetic_labels.npy --given given.npy --out refined"""
SCALE = """examples:
  synth-refine scale --features features.npy --given given.npy --prototypes prototypes.npy \\
      --threshold 0.5 --out refined-shards
  synth-refine scale --features features.npy --given given.npy --prototypes prototypes.npy \\
      --head head.npy --threshold 0.6 --out refined-with-classifier"""
APPLY = """examples:
  synth-refine apply refined --given given.npy --out labels.npy
  synth-refine apply refined --given given.npy --out reviewed.npy --decisions decisions.csv"""
REVERT = """examples:
  synth-refine revert refined --labels labels.npy --out given-again.npy
  synth-refine revert refined --labels reviewed.npy --out given-once-more.npy --decisions decisions.csv"""
DIFF = """examples:
  synth-refine diff refined
  synth-refine diff given.npy labels.npy"""
EXPORT = """example:
  synth-refine export refined --format csv --out labels.csv"""
VERIFY = """examples:
  synth-refine verify refined
  synth-refine verify refined --labels labels.npy"""
RUN = """examples:
  synth-refine run photos --classes classes.yaml --synthetic drawn --out result
  synth-refine run photos --classes classes.yaml --out result --encoder timm:resnet50.a1_in1k --dry-run"""
REPORT = """example:
  synth-refine report result"""
GENERATE = """examples:
  synth-refine generate --classes classes.yaml --out drawn --model glyphs --per-class 20
  synth-refine generate --classes classes.yaml --out drawn --templates "A photo of {category}." "{category}, sketched"
  accelerate launch -m synth_refine.cli generate --classes classes.yaml --out drawn"""
EMBED = """example:
  synth-refine embed photos --out embedded --encoder open_clip:ViT-L-14/openai"""
ENV = """example:
  synth-refine env"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: The command line without the program; the process's own by default.
    """
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        code = run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of stdout has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except (InputError, OSError, ImportError) as error:
        _say(f"synth-refine: {error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        _say("synth-refine: interrupted; nothing was left half written")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="synth-refine",
        description="Repair wrong image labels with prototypes of synthetic images.",
        epilog="Exit codes: 0 fine, 1 a problem was found, 2 wrong usage, 3 an input that cannot be used.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, epilog: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(run=run, usage=made.error)
        return made

    refine = command("refine", _refine, "refine given labels and write the artifact", REFINE)
    refine.add_argument("--features", required=True, metavar="NPY", help="features of the images, (N, D) floats")
    refine.add_argument("--refiner", choices=sorted(REFINERS), default="paper", help="(%(default)s)")
    refine.add_argument("--logits", metavar="NPY", help="paper: outputs of a classifier, (N, C) floats")
    refine.add_argument("--prototypes", metavar="NPY", help="paper: mean synthetic features, (C, D) floats")
    _labels_option(refine, "--given", "the labels as given")
    refine.add_argument("--threshold", type=_finite, help="paper: smallest score that replaces a label")
    refine.add_argument("--weight", type=float, default=0.5, help="paper: weight of the similarity (%(default)s)")
    refine.add_argument("--strict", action="store_true", help="paper: refuse images that cannot be scored")
    refine.add_argument("--anchors", metavar="NPY", help="anchored: features of the synthetic images, (M, D) floats")
    refine.add_argument("--anchor-labels", metavar="FILE", help="anchored: the class each of them was made for")
    refine.add_argument("--seed", type=int, default=0, help="anchored: same seed, same result (%(default)s)")
    refine.add_argument("--force", action="store_true", help="anchored: change labels though it may do harm")
    refine.add_argument("--encoder", default="", help="name and revision, or hash, of the encoder; goes on record")
    refine.add_argument("--out", required=True, metavar="FOLDER", help="the artifact")

    scale = command("scale", _scale, "refine millions of labels shard by shard; started again, it goes on", SCALE)
    scale.add_argument("--features", required=True, metavar="PATH", help="(N, D) floats: .npy, or folder of shards")
    scale.add_argument("--given", required=True, metavar="PATH", help="the labels as given: .npy, or folder of shards")
    scale.add_argument("--prototypes", required=True, metavar="NPY", help="mean synthetic features, (C, D) floats")
    scale.add_argument("--threshold", required=True, type=_finite, help="smallest score that replaces a label")
    scale.add_argument("--logits", metavar="PATH", help="outputs of a classifier, (N, C), stored as the features are")
    scale.add_argument("--head", metavar="NPY", help="instead: a linear classifier, (C, D), or (C, D + 1) with bias")
    scale.add_argument("--weight", type=float, help="weight of the similarity (0.5 with a classifier, 1 without)")
    scale.add_argument("--shard-rows", type=int, default=SHARD_ROWS, help="rows of a .npy per shard (%(default)s)")
    scale.add_argument("--engine", choices=ENGINES, default="local", help=ENGINE_HELP)
    scale.add_argument("--address", help=ADDRESS_HELP)
    scale.add_argument("--out", required=True, metavar="FOLDER", help="Parquet shards, manifest and labels.npy")

    apply = command("apply", _apply, "turn given labels into the refined ones", APPLY)
    apply.add_argument("artifact", help="folder of an artifact")
    _labels_option(apply, "--given", "the labels that were refined", TREE)
    apply.add_argument("--out", required=True, metavar="FILE", help="label file, or with --images new folder, to write")

    revert = command("revert", _revert, "turn refined labels back into the given ones, bit for bit", REVERT)
    revert.add_argument("artifact", help="folder of an artifact")
    _labels_option(revert, "--labels", "the refined labels", TREE)
    revert.add_argument(
        "--out", required=True, metavar="FILE", help="label file, or with --images new folder, to write"
    )

    diff = command("diff", _diff, "list what an artifact changes, or where two sets of labels differ", DIFF)
    diff.add_argument("first", help="folder of an artifact, or a label file")
    diff.add_argument("second", nargs="?", help="another one; exit code 1 when they differ")

    send = command("export", _export, "write the label file that a codebase reads", EXPORT)
    send.add_argument("labels", help="folder of an artifact, or a label file")
    send.add_argument("--format", required=True, choices=list(FORMATS), help="the codebase or kind of file")
    send.add_argument("--out", required=True, metavar="FILE", help="file to write; some codebases prescribe its name")
    send.add_argument("--fill", metavar="FILE", help="labels of all images, to fill up what was not refined")
    send.add_argument("--truncate", action="store_true", help="drop the labels that the codebase does not read")
    send.add_argument("--clean-label", metavar="FILE", help="cifar-n: the labels its loader compares with the data set")
    send.add_argument("--entry", default="worse_label", help="cifar-n: the entry of the noise type (%(default)s)")

    for reader in (apply, revert):
        text = "what the review page exported: what was accepted or corrected is changed, all else stays as given"
        reader.add_argument("--decisions", metavar="CSV", help=text)

    verify = command("verify", _verify, "check an artifact's hashes, and that labels are its refined ones", VERIFY)
    verify.add_argument("artifact", help="folder of an artifact")
    verify.add_argument("--labels", metavar="FILE", help="labels that should be the refined ones")
    verify.add_argument("--key", help="the entry, for a .pt file")

    page = command("report", _report, "make the page of a run again, from its config and features", REPORT)
    page.add_argument("folder", help="what `run` wrote")
    run = command("run", _run, "refine a folder of images per class and write a page to review", RUN)
    run.add_argument("--synthetic", metavar="SOURCE", help="synthetic images, like IMAGES; generated where not given")
    run.add_argument("--refiner", choices=sorted(REFINERS), help="(anchored)")
    run.add_argument("--threshold", type=_auto, metavar="auto|X", help="smallest score that changes a label (auto)")
    run.add_argument("--seed", type=int, help="same seed, same result (0)")
    run.add_argument("--config", metavar="YAML", help="settings, as in the config.yaml of a result; options come first")
    for one in (run, page):
        one.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    embed = command("embed", _embed, "write the features of images for the command refine", EMBED)
    draw = command("generate", _generate, "draw synthetic images for classes, with a manifest", GENERATE)
    draw.add_argument("--classes", required=True, metavar="YAML", help="class names, or names with what prompts say")
    draw.add_argument("--out", required=True, metavar="FOLDER", help="one folder of images per class")
    draw.add_argument("--seed", type=int, help="same seed, same images (0)")
    draw.add_argument("--device", help="cpu, cuda (the GPU if there is one)")
    draw.add_argument("--config", metavar="YAML", help="settings; options come first")
    for drawer in (draw, run):
        drawer.add_argument("--model", help="diffusers model by name or folder, or glyphs (stabilityai/sdxl-turbo)")
        drawer.add_argument("--revision", help="of the model on the hub")
        drawer.add_argument("--templates", nargs="+", metavar="TEXT", help="prompts (A photo of {category}.)")
        drawer.add_argument("--per-class", type=int, help="synthetic images per class (100)")
        drawer.add_argument("--steps", type=int, help="of the model (1)")
        drawer.add_argument("--guidance", type=float, help="of the model (0)")
        drawer.add_argument("--size", type=int, help="pixels of the synthetic images (512, glyphs 32)")
        drawer.add_argument("--batch-size", type=int, help="images drawn at once (8)")
    for reader in (run, embed):
        reader.add_argument("images", nargs="?", metavar="IMAGES", help=IMAGES)
        reader.add_argument("--classes", metavar="YAML", help="class names, or folder names with what prompts say")
        reader.add_argument("--encoder", metavar="NAME", help="open_clip:MODEL/TAG, timm:MODEL or an open_clip folder")
        reader.add_argument("--weights", metavar="FILE", help="local weights of the encoder")
        reader.add_argument("--device", help="cpu, cuda (the GPU if there is one)")
        reader.add_argument("--workers", type=int, help="processes that decode images (2)")
        reader.add_argument("--engine", choices=ENGINES, help=f"what embeds; {ENGINE_HELP}")
        reader.add_argument("--address", help=ADDRESS_HELP)
        reader.add_argument("--out", metavar="FOLDER", help="all results")

    command("env", _env, "show the versions that numbers depend on, as JSON", ENV)
    for writer in (refine, apply, revert, send, run):
        writer.add_argument("--dry-run", action="store_true", help="check and report everything, write nothing")
    return parser


def _labels_option(parser: argparse.ArgumentParser, name: str, text: str, images: str = "") -> None:
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument(name, metavar="FILE", help=f"{text}; .npy, .csv with id, or CIFAR-N's .pt")
    if images:
        group.add_argument("--images", metavar="SOURCE", help=images)
        parser.add_argument("--link", action="store_true", help="with --images: hard links instead of copies")
    parser.add_argument("--key", help="the entry, for a .pt file")


def _finite(text: str) -> float:
    """A number for argparse; its own message covers the rest."""
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def _auto(text: str) -> float | str:
    return text if text == "auto" else _finite(text)


def _settings(options: argparse.Namespace) -> pipeline.Settings:
    """What the options say, over what the config says."""
    entries = pipeline.read_config(options.config) if getattr(options, "config", None) else {}
    names = [one.name for one in fields(pipeline.Settings)]
    entries |= {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    for name, shown in (("images", "IMAGES"), ("out", "--out FOLDER")):
        if name not in entries:
            options.usage(f"the following arguments are required: {shown}")
    return pipeline.Settings(**entries)


def _run(options: argparse.Namespace) -> int:
    return _tell(options, pipeline.run(_settings(options), dry_run=options.dry_run))


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
    manifest = pipeline.generate(_settings(options), read_classes(options.classes))
    _show({"manifest": str(manifest), "sha256": file_hash(manifest)})
    return FINE


def _embed(options: argparse.Namespace) -> int:
    _show(pipeline.embed(_settings(options)))
    return FINE


def _refine(options: argparse.Namespace) -> int:
    needed, unused = REFINERS[options.refiner], REFINERS["paper" if options.refiner == "anchored" else "anchored"]
    for name in needed:
        if getattr(options, name) is None:
            options.usage(f"--refiner {options.refiner} needs --{name.replace('_', '-')}")
    for name in unused:
        if getattr(options, name) is not None:
            options.usage(f"--refiner {options.refiner} has no use for --{name.replace('_', '-')}")
    features = read_npy("features", options.features, "f")
    check_array("features", features, ("N", "D"))
    given, ids = read_labels_and_ids(options.given, key=options.key)
    method = _paper if options.refiner == "paper" else _anchored
    files = ["features", "given", *(name for name in needed if name != "threshold")]
    artifact = record(
        given.astype(_dtype(options.given)),
        **method(options, features, given),
        ids=ids,
        inputs={name: file_hash(getattr(options, name)) for name in files} | {"encoder": options.encoder},
    )
    lost = np.setdiff1d(artifact.given, artifact.labels)
    if lost.size:
        _say(f"no image is left in class {', '.join(map(str, lost[:5]))}; PLC, for one, refuses such labels")
    if not options.dry_run:
        write_artifact(options.out, artifact)
    _show({"artifact": options.out, "written": not options.dry_run, **_counts(artifact)})
    return FINE


def _paper(options: argparse.Namespace, features: NDArray[Any], given: NDArray[np.int64]) -> dict[str, Any]:
    """What the paper's rule decides, as arguments of `record`."""
    logits, prototypes = (read_npy(name, getattr(options, name), "f") for name in ("logits", "prototypes"))
    check_array("logits", logits, (len(features), "C"))
    check_array("given", given, (len(features),))
    decision = refine_labels(
        features, logits, prototypes, options.threshold, weight=options.weight, strict=options.strict
    )
    undecided = np.asarray(decision.labels) < 0
    return {
        "labels": decision.apply(given),
        "num_classes": logits.shape[1],
        "abstained": undecided,
        "confidence": decision.confidence,
        "reason": np.where(undecided, "cannot be scored", "score reaches the threshold"),
        "settings": {"refiner": "paper", "threshold": options.threshold, "weight": options.weight},
    }


def _anchored(options: argparse.Namespace, features: NDArray[Any], given: NDArray[np.int64]) -> dict[str, Any]:
    """What the anchored refiner decides, as arguments of `record`."""
    anchors, anchor_labels = read_npy("anchors", options.anchors, "f"), read_labels(options.anchor_labels)
    check_array("given", given, (len(features),))
    check_array("anchor_labels", anchor_labels, (len(anchors),))
    num_classes = int(anchor_labels.max()) + 1 if len(anchor_labels) else 0
    check_row_order(given, prototype_classes(features, anchors, anchor_labels, num_classes), num_classes)
    posterior = anchored_posterior(
        features, given, anchors, anchor_labels, seed=options.seed, progress=sys.stderr.isatty()
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
        "settings": {"refiner": "anchored", "seed": options.seed, "force": options.force},
    }


def _scale(options: argparse.Namespace) -> int:
    summary = refine_shards(
        options.features,
        options.given,
        read_npy("prototypes", options.prototypes, "f"),
        options.threshold,
        options.out,
        logits=options.logits,
        head=None if options.head is None else read_npy("head", options.head, "f"),
        weight=options.weight,
        shard_rows=options.shard_rows,
        engine=options.engine,
        address=options.address,
        progress=sys.stderr.isatty(),
    )
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
    return artifact if options.decisions is None else decided(artifact, options.decisions)


def _write(
    options: argparse.Namespace, artifact: Artifact, labels: NDArray[np.integer[Any]], ids: list[str] | None
) -> int:
    names = (ids or artifact.ids) if Path(options.out).suffix.lower() == ".csv" else None
    if not options.dry_run:
        write_labels(options.out, labels, names, dtype=labels.dtype)
    _show({"labels": options.out, "written": not options.dry_run, **_counts(artifact)})
    return FINE


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
    print(json.dumps(result))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
