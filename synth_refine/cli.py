"""The command `synth-refine`: results on stdout, progress and remarks on stderr.

Nothing here imports torch or NumPy, so that help and complaints about wrong usage come at once.

Exit codes: 0 fine, 1 a problem was found, 2 the command was called wrongly, 3 an input cannot be used.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from synth_refine._io.error import InputError
from synth_refine._io.ray import ADDRESS_HELP, ENGINE_HELP, ENGINES

FINE, BAD_INPUT, INTERRUPTED = 0, 3, 130

NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "refine": {"paper": ("logits", "prototypes", "threshold"), "anchored": ("anchors", "anchor_labels")},
    "scale": {"paper": ("prototypes", "threshold"), "anchored": ("anchors", "anchor_labels")},
}
"""What each refiner needs besides features and given labels, and nobody else can use."""

SPARED: dict[str, dict[str, tuple[str, ...]]] = {
    "scale": {"paper": ("logits", "head", "weight", "address"), "anchored": ("seed",)}
}
"""What it can do without, and nobody else can use."""

FORMATS = ("plc", "lra", "dividemix", "unicon", "cifar-n", "kv", "imagefolder", "csv", "jsonl", "parquet", "cleanlab")
"""Those of `synth_refine.export.FORMATS`."""

IMAGES = "a folder of images per class, a .csv with path and label, or a saved dataset, .tar or .parquet files"

TREE = (
    "a folder per class, or a .csv of paths and labels, in place of a label file: its images are copied into a new "
    "folder per class and the old one is left as it is, or a new .csv is written beside the old one"
)

REFINE = """examples:
  synth-refine refine --features features.npy --logits logits.npy --prototypes prototypes.npy \\
      --given given.npy --threshold 0.6 --out refined
  synth-refine refine --refiner anchored --features features.npy --anchors synthetic.npy \\
      --anchor-labels synthetic_labels.npy --given given.npy --out refined-by-posterior"""
SCALE = """examples:
  synth-refine scale --features features.npy --given given.npy --prototypes prototypes.npy \\
      --threshold 0.5 --out refined-shards
  synth-refine scale --features features.npy --given given.npy --prototypes prototypes.npy \\
      --head head.npy --threshold 0.6 --out refined-with-classifier
  synth-refine scale --refiner anchored --features features.npy --anchors synthetic.npy \\
      --anchor-labels synthetic_labels.npy --given given.npy --out refined-by-posterior"""
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
  synth-refine embed photos --out embedded --encoder open_clip:ViT-L-14-quickgelu/openai"""
ENV = """example:
  synth-refine env"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: The command line without the program; the process's own by default.
    """
    options = _parser().parse_args(arguments)
    _check_usage(options)
    try:
        from synth_refine.commands import COMMANDS

        code = COMMANDS[options.command](options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of stdout has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except (InputError, OSError, ImportError) as error:
        print(f"synth-refine: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("synth-refine: interrupted; nothing was left half written", file=sys.stderr)
        return INTERRUPTED


def _check_usage(options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    usage: Callable[[str], NoReturn] = options.usage
    if options.command in NEEDED:
        for refiner, names in NEEDED[options.command].items():
            spared = SPARED.get(options.command, {}).get(refiner, ())
            for name in names if refiner == options.refiner else (*names, *spared):
                if (getattr(options, name) is None) == (refiner == options.refiner):
                    fault = "needs" if refiner == options.refiner else "has no use for"
                    usage(f"--refiner {options.refiner} {fault} --{name.replace('_', '-')}")
    if options.command == "scale" and options.refiner == "anchored" and options.engine != "local":
        usage(f"--refiner anchored has no use for --engine {options.engine}: it trains in one process")
    if options.command == "run" and options.config is None:
        for name, shown in (("images", "IMAGES"), ("out", "--out FOLDER")):
            if getattr(options, name) is None:
                usage(f"the following arguments are required: {shown}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="synth-refine",
        description="Repair wrong image labels with prototypes of synthetic images.",
        epilog="Exit codes: 0 fine, 1 a problem was found, 2 wrong usage, 3 an input that cannot be used.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str, epilog: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(command=name, usage=made.error)
        return made

    refine = command("refine", "refine given labels and write the artifact", REFINE)
    refine.add_argument("--features", required=True, metavar="NPY", help="features of the images, (N, D) floats")
    refine.add_argument("--refiner", choices=("anchored", "paper"), default="paper", help="(%(default)s)")
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
    refine.add_argument("--classes", metavar="YAML", help="class names, as embed writes them, for apply --images")
    refine.add_argument("--out", required=True, metavar="FOLDER", help="the artifact")

    scale = command("scale", "refine millions of labels shard by shard; started again, it goes on", SCALE)
    scale.add_argument("--features", required=True, metavar="PATH", help="(N, D) floats: .npy, or folder of shards")
    scale.add_argument("--given", required=True, metavar="PATH", help="the labels as given: .npy, or folder of shards")
    scale.add_argument("--refiner", choices=("anchored", "paper"), default="paper", help="(%(default)s)")
    scale.add_argument("--prototypes", metavar="NPY", help="paper: mean synthetic features, (C, D) floats")
    scale.add_argument("--threshold", type=_finite, help="paper: smallest score that replaces a label")
    scores = scale.add_mutually_exclusive_group()
    scores.add_argument("--logits", metavar="PATH", help="paper: outputs of a classifier, (N, C), stored like features")
    scores.add_argument("--head", metavar="NPY", help="paper: instead a linear one, (C, D), or (C, D + 1) with bias")
    scale.add_argument("--weight", type=float, help="paper: of the similarity (0.5 with a classifier, 1 without)")
    scale.add_argument("--anchors", metavar="NPY", help="anchored: features of the synthetic images, (M, D) floats")
    scale.add_argument("--anchor-labels", metavar="FILE", help="anchored: the class each of them was made for")
    scale.add_argument("--seed", type=int, help="anchored: same seed, same result (0)")
    scale.add_argument("--shard-rows", type=int, help="rows of a .npy per shard (262144)")
    scale.add_argument("--engine", choices=ENGINES, default="local", help=ENGINE_HELP)
    scale.add_argument("--address", help=ADDRESS_HELP)
    scale.add_argument("--out", required=True, metavar="FOLDER", help="Parquet shards, manifest and labels.npy")

    apply = command("apply", "turn given labels into the refined ones", APPLY)
    apply.add_argument("artifact", help="folder of an artifact")
    _labels_option(apply, "--given", "the labels that were refined", TREE)
    apply.add_argument("--out", required=True, metavar="FILE", help="label file, or with --images new folder, to write")

    revert = command("revert", "turn refined labels back into the given ones, bit for bit", REVERT)
    revert.add_argument("artifact", help="folder of an artifact")
    _labels_option(revert, "--labels", "the refined labels", TREE)
    revert.add_argument(
        "--out", required=True, metavar="FILE", help="label file, or with --images new folder, to write"
    )

    diff = command("diff", "list what an artifact changes, or where two sets of labels differ", DIFF)
    diff.add_argument("first", help="folder of an artifact, or a label file")
    diff.add_argument("second", nargs="?", help="another one; exit code 1 when they differ")

    send = command("export", "write the label file that a codebase reads", EXPORT)
    send.add_argument("labels", help="folder of an artifact, or a label file")
    send.add_argument("--format", required=True, choices=FORMATS, help="the codebase or kind of file")
    send.add_argument("--out", required=True, metavar="FILE", help="file to write; some codebases prescribe its name")
    send.add_argument("--fill", metavar="FILE", help="labels of all images, to fill up what was not refined")
    send.add_argument("--truncate", action="store_true", help="drop the labels that the codebase does not read")
    send.add_argument("--clean-label", metavar="FILE", help="cifar-n: the labels its loader compares with the data set")
    send.add_argument("--entry", default="worse_label", help="cifar-n: the entry of the noise type (%(default)s)")

    for reader, text in (
        (apply, "what the review page exported: what was accepted or corrected is changed, all else stays as given"),
        (revert, "those that the labels were applied with: what was accepted or corrected in them is turned back"),
    ):
        reader.add_argument("--decisions", metavar="CSV", help=text)

    verify = command("verify", "check an artifact's hashes, and that labels are its refined ones", VERIFY)
    verify.add_argument("artifact", help="folder of an artifact")
    verify.add_argument("--labels", metavar="FILE", help="labels that should be the refined ones")
    verify.add_argument("--key", help="the entry, for a .pt file")

    page = command("report", "make the page of a run again, from its config and features", REPORT)
    page.add_argument("folder", help="what `run` wrote")
    run = command("run", "refine a folder of images per class and write a page to review", RUN)
    run.usage = "synth-refine run IMAGES --out FOLDER [options]\n       synth-refine run --config YAML [options]"
    run.add_argument("--synthetic", metavar="SOURCE", help="synthetic images, like IMAGES; generated where not given")
    run.add_argument("--refiner", choices=("anchored", "paper"), help="(anchored)")
    run.add_argument("--threshold", type=_auto, metavar="auto|X", help="smallest score that changes a label (auto)")
    run.add_argument("--seed", type=int, help="same seed, same result (0)")
    run.add_argument("--config", metavar="YAML", help="settings, as in the config.yaml of a result; options come first")
    for one in (run, page):
        one.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    embed = command("embed", "write the features of images for the command refine", EMBED)
    draw = command("generate", "draw synthetic images for classes, with a manifest", GENERATE)
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
        needed = reader is embed  # `run` may find these two in its config
        reader.add_argument("images", nargs=None if needed else "?", metavar="IMAGES", help=IMAGES)
        reader.add_argument("--classes", metavar="YAML", help="class names, or folder names with what prompts say")
        reader.add_argument("--encoder", metavar="NAME", help="open_clip:MODEL/TAG, timm:MODEL or an open_clip folder")
        reader.add_argument("--weights", metavar="FILE", help="local weights of the encoder")
        reader.add_argument("--device", help="cpu, cuda (the GPU if there is one)")
        reader.add_argument("--workers", type=int, help="processes that decode images (2)")
        reader.add_argument("--engine", choices=ENGINES, help=f"what embeds; {ENGINE_HELP}")
        reader.add_argument("--address", help=ADDRESS_HELP)
        reader.add_argument("--out", required=needed, metavar="FOLDER", help="all results")

    command("env", "show the versions that numbers depend on, as JSON", ENV)
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


def _finite(text: str, expected: str = "a finite number") -> float:
    """A number for argparse."""
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


def _auto(text: str) -> float | str:
    return text if text == "auto" else _finite(text, "auto or a finite number")


if __name__ == "__main__":
    sys.exit(main())
