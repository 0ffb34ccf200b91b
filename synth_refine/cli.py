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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
from synth_refine.labels import csv_bytes, read_labels, read_labels_and_ids, write_labels
from synth_refine.refine import refine_labels
from synth_refine.scale import ENGINES, SHARD_ROWS, refine_shards

FINE, PROBLEM, BAD_INPUT = 0, 1, 3

REFINERS = {"paper": ("logits", "prototypes", "threshold"), "anchored": ("anchors", "anchor_labels")}
"""What each refiner needs besides features and given labels."""

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
APPLY = """example:
  synth-refine apply refined --given given.npy --out labels.npy"""
REVERT = """example:
  synth-refine revert refined --labels labels.npy --out given-again.npy"""
DIFF = """examples:
  synth-refine diff refined
  synth-refine diff given.npy labels.npy"""
EXPORT = """example:
  synth-refine export refined --format csv --out labels.csv"""
VERIFY = """examples:
  synth-refine verify refined
  synth-refine verify refined --labels labels.npy"""
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
    except (InputError, OSError) as error:
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
    scale.add_argument("--engine", choices=ENGINES, default="local", help="(%(default)s)")
    scale.add_argument("--address", help="ray: of the cluster; by default RAY_ADDRESS, or a new one on this machine")
    scale.add_argument("--out", required=True, metavar="FOLDER", help="Parquet shards, manifest and labels.npy")

    apply = command("apply", _apply, "turn given labels into the refined ones", APPLY)
    apply.add_argument("artifact", help="folder of an artifact")
    _labels_option(apply, "--given", "the labels that were refined")
    apply.add_argument("--out", required=True, metavar="FILE", help="label file to write, .npy or .csv")

    revert = command("revert", _revert, "turn refined labels back into the given ones, bit for bit", REVERT)
    revert.add_argument("artifact", help="folder of an artifact")
    _labels_option(revert, "--labels", "the refined labels")
    revert.add_argument("--out", required=True, metavar="FILE", help="label file to write, .npy or .csv")

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

    verify = command("verify", _verify, "check an artifact's hashes, and that labels are its refined ones", VERIFY)
    verify.add_argument("artifact", help="folder of an artifact")
    verify.add_argument("--labels", metavar="FILE", help="labels that should be the refined ones")
    verify.add_argument("--key", help="the entry, for a .pt file")

    command("env", _env, "show the versions that numbers depend on, as JSON", ENV)
    for writer in (refine, apply, revert, send):
        writer.add_argument("--dry-run", action="store_true", help="check and report everything, write nothing")
    return parser


def _labels_option(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    parser.add_argument(name, required=True, metavar="FILE", help=f"{text}; .npy, .csv with id, or CIFAR-N's .pt")
    parser.add_argument("--key", help="the entry, for a .pt file")


def _finite(text: str) -> float:
    """A number for argparse; its own message covers the rest."""
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


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
    decided = _paper(options, features, given) if options.refiner == "paper" else _anchored(options, features, given)
    files = ["features", "given", *(name for name in needed if name != "threshold")]
    artifact = record(
        given.astype(_dtype(options.given)),
        **decided,
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
    artifact = read_artifact(options.artifact)
    given, ids = read_labels_and_ids(options.given, key=options.key)
    return _write(options, artifact, artifact.apply(given, ids), ids)


def _revert(options: argparse.Namespace) -> int:
    artifact = read_artifact(options.artifact)
    labels, ids = read_labels_and_ids(options.labels, key=options.key)
    return _write(options, artifact, artifact.revert(labels, ids), ids)


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
