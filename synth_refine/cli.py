"""The command `synth-refine`: results on stdout, progress and remarks on stderr.

Nothing here imports torch or NumPy, so that help and complaints about wrong usage come at once.

Exit codes: 0 fine, 1 a problem was found, 2 the command was called wrongly, 3 an input cannot be used, 128 and the
number of a signal that ended it.
"""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field
from io import TextIOWrapper
from typing import Any

from synth_refine._io.error import InputError
from synth_refine.settings import expected, fits, flag, kind_of, of_command, usage_fault, use_of

FINE, BAD_INPUT = 0, 3

FORMATS = (
    *("plc", "lra", "dividemix", "unicon", "cifar-n", "ssr", "npy", "json", "pt"),
    *("kv", "imagefolder", "csv", "jsonl", "parquet", "kept", "cleanlab", "datalab", "fiftyone", "labelstudio"),
)
"""Those of `synth_refine.labels.export.FORMATS`."""

DECISIONS = """

decisions.csv has a row for each image that somebody decided on, with class names:
  id,given,decision,label
  cat/1.jpg,cat,accept,dog     the proposed label
  cat/2.jpg,cat,reject,cat     the given label
  cat/3.jpg,cat,correct,fox    any label
A proposal without a row keeps its given label and counts as undecided."""

TREE = (
    "a folder per class, or a .csv of paths and labels, in place of a label file: its images are copied into a new "
    "folder per class and the old one is left as it is, or a new .csv is written beside the old one"
)

EXAMPLES = {
    "run": """
  synth-refine run photos --classes classes.yaml --synthetic generated --out result
  synth-refine run photos --classes classes.yaml --out result --encoder timm:resnet50.a1_in1k --dry-run""",
    "refine": """
  synth-refine refine --features features.npy --given given.npy --synthetic synthetic.npy \\
      --synthetic-labels synthetic_labels.npy --out refined
  synth-refine refine --features features.npy --given given.npy --prototypes prototypes.npy \\
      --logits logits.npy --threshold 0.6 --out refined-by-paper""",
    "scale": """
  synth-refine scale --features features.npy --given given.npy --synthetic synthetic.npy \\
      --synthetic-labels synthetic_labels.npy --out refined-shards
  synth-refine scale --features features.npy --given given.npy --prototypes prototypes.npy \\
      --threshold 0.5 --out refined-by-similarity
  synth-refine scale --features features.npy --given given.npy --prototypes prototypes.npy \\
      --head head.npy --threshold 0.6 --out refined-with-classifier""",
    "embed": """
  synth-refine embed photos --out embedded --encoder open_clip:ViT-L-14-quickgelu/openai
  synth-refine embed photos --out embedded --config result/config.yaml""",
    "generate": """
  synth-refine generate --classes classes.yaml --out generated --model glyphs --per-class 20
  synth-refine generate --classes classes.yaml --out generated \\
      --templates "A photo of {category}." "{category}, sketched"
  accelerate launch -m synth_refine.cli generate --classes classes.yaml --out generated""",
    "review": """
  synth-refine review refined decisions.csv --out reviewed""",
    "apply": """
  synth-refine apply refined --given given.npy --out labels.npy
  synth-refine apply reviewed --given given.npy --out reviewed.npy""",
    "revert": """
  synth-refine revert refined --labels labels.npy --out given-again.npy""",
    "diff": """
  synth-refine diff refined
  synth-refine diff given.npy labels.npy""",
    "export": """
  synth-refine export refined --format csv --out labels.csv""",
    "verify": """
  synth-refine verify refined
  synth-refine verify refined --labels labels.npy""",
    "report": """
  synth-refine report result
  synth-refine report result --single-file""",
    "check": """
  synth-refine check result --max-noise 0.05
  synth-refine check result --max-noise 0.05 --max-no-class 0.02 --no-leakage""",
    "env": """
  synth-refine env""",
}
"""Calls that the help of each command shows."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: The command line without the program; the process's own by default.
    """
    options = _parser().parse_args(arguments)
    if getattr(options, "config", None) is None and of_command(options.command):
        given = {one.name: getattr(options, one.name) for one in of_command(options.command)}
        if fault := usage_fault(options.command, {name: value for name, value in given.items() if value is not None}):
            options.usage(fault)
    if options.command == "check" and (options.max_noise, options.max_no_class, options.no_leakage) == (
        None,
        None,
        False,
    ):
        options.usage("expected --max-noise, --max-no-class or --no-leakage")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a class name that the terminal cannot write ends no command
            stream.reconfigure(errors="backslashreplace")
    try:
        with _signals_raise():
            from synth_refine.commands import COMMANDS

            code = COMMANDS[options.command](options)
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader of stdout has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except (InputError, OSError, ImportError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, ImportError) and error.name == "fcntl":
            text = "expected Linux or macOS, which can lock files; on Windows use WSL"
        print(f"synth-refine: {text}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print("synth-refine: interrupted; run the same command again to resume", file=sys.stderr)
        return 128 + number


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let a request to stop or a closed terminal end the command as Ctrl-C does: unfinished files are removed."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    before = {}
    try:
        names = ("SIGINT", "SIGTERM", "SIGHUP")
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                before[number] = signal.signal(number, stop)
    except ValueError:  # called from another thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="synth-refine",
        description="Repair wrong image labels with prototypes of synthetic images.",
        epilog="Exit codes: 0 fine, 1 a problem was found, 2 wrong usage, 3 an input that cannot be used.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"examples:{EXAMPLES[name]}",
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(command=name, usage=made.error)
        _add_settings(made, name)
        return made

    run = command("run", "refine the labels of images and write a page to review")
    run.usage = "synth-refine run IMAGES --out FOLDER [options]\n       synth-refine run --config YAML [options]"
    refine = command("refine", "refine given labels and write the artifact")
    scale = command("scale", "refine millions of labels, shard by shard; run it again to resume")
    scale.description = (
        f"{scale.description} Unlike `refine`, it warns of copies of one picture with different labels, where a sample "
        "shows them, but changes their labels as all others: sort them out before."
    )
    embed = command("embed", "write the features of images for the command refine")
    generate = command("generate", "generate synthetic images of classes, with a manifest")
    for one in (run, generate, embed):
        text = "settings, as in the config.yaml of a result; options come first"
        one.add_argument(
            "--config", metavar="YAML", help=text if one is not embed else "the encoder of a result, by its config.yaml"
        )

    review = command("review", "make another artifact of what people decided on the page")
    review.description = f"{review.description}{DECISIONS}"
    review.add_argument("artifact", help="folder of an artifact")
    review.add_argument(
        "decisions",
        metavar="FILE",
        help="what the page exported: decisions, and answers of its audit, which tell what is wrong before and after; "
        "what is not in it keeps its given label",
    )
    review.add_argument(
        "--format",
        choices=("csv", "labelstudio"),
        default="csv",
        help="labelstudio: the JSON that Label Studio exports of the tasks of `export --format labelstudio`; where "
        "annotators disagree, nothing is decided (%(default)s)",
    )
    review.add_argument("--out", required=True, metavar="FOLDER", help="the new artifact")

    apply = command("apply", "turn given labels into the refined ones")
    revert = command("revert", "turn refined labels back into the given ones, bit for bit")
    for one, name, text in (
        (apply, "--given", "the labels that were refined"),
        (revert, "--labels", "the refined labels"),
    ):
        one.add_argument("artifact", help="folder of an artifact")
        either = one.add_mutually_exclusive_group(required=True)
        either.add_argument(name, dest="labels", metavar="FILE", help=f"{text}; .npy, .csv with id, or CIFAR-N's .pt")
        either.add_argument("--images", metavar="SOURCE", help=TREE)
        one.add_argument("--link", action="store_true", help="with --images: hard links instead of copies")
        one.add_argument("--key", help="the entry, for a .pt file")
        one.add_argument(
            "--out", required=True, metavar="FILE", help="label file, or with --images new folder, to write"
        )

    diff = command("diff", "list what an artifact changes, or where two sets of labels differ")
    diff.add_argument("first", help="folder of an artifact, or a label file")
    diff.add_argument("second", nargs="?", help="another one; exit code 1 when they differ")

    export = command("export", "write the label file that a codebase reads")
    export.add_argument("labels", help="folder of an artifact, or a label file")
    export.add_argument("--format", required=True, choices=FORMATS, help="the codebase or kind of file")
    export.add_argument("--out", required=True, metavar="FILE", help="file to write; some codebases prescribe its name")
    export.add_argument("--fill", metavar="FILE", help="labels of all images, to fill up what was not refined")
    export.add_argument("--truncate", action="store_true", help="drop the labels that the codebase does not read")
    export.add_argument("--overwrite", action="store_true", help="replace another file, which is kept beside as .bak")
    export.add_argument("--force", action="store_true", help="take labels unlike those of --fill or --clean-label")
    export.add_argument(
        "--keep-removed", action="store_true", help="write labels of removed images too, where all have a place"
    )
    export.add_argument(
        "--clean-label", metavar="FILE", help="cifar-n: the labels its loader compares with the data set"
    )
    export.add_argument("--entry", default="worse_label", help="cifar-n: the entry of the noise type (%(default)s)")
    export.add_argument(
        "--url-prefix",
        default="/data/local-files/?d=",
        metavar="TEXT",
        help="labelstudio: what comes before the path of an image in its address, as http://host/photos/ or, for "
        "local files, /data/local-files/?d=photos/ with the folder below its document root (%(default)s)",
    )

    verify = command("verify", "check an artifact's hashes, and that labels are its refined ones")
    verify.add_argument("artifact", help="folder of an artifact")
    verify.add_argument("--labels", metavar="FILE", help="labels that should be the refined ones")
    verify.add_argument(
        "--images", metavar="SOURCE", help="a folder per class or .csv that `apply` should have written"
    )
    verify.add_argument("--key", help="the entry, for a .pt file")

    report = command("report", "draw the page of a run again")
    report.add_argument("folder", help="what `run` wrote")
    report.add_argument(
        "--single-file", action="store_true", help="put all pictures into report.html, so that it can be sent alone"
    )
    report.add_argument(
        "--audit",
        type=int,
        default=50,
        metavar="N",
        help="changes, and kept labels, of the random sample (%(default)s)",
    )
    check = command("check", "say whether a finished run found the data set good enough; exit code 1 if not, for CI")
    check.description = f"{check.description} A condition of which the run knows nothing does not hold."
    check.add_argument("result", help="what `run` wrote, with --test SOURCE for --no-leakage")
    limits = {
        "--max-noise": "largest estimated share of wrong labels among the given ones",
        "--max-no-class": "largest share of images that seem to show none of the classes",
    }
    for name, text in limits.items():
        check.add_argument(name, type=_share, metavar="X", help=f"{text}, from 0 to 1")
    check.add_argument("--no-leakage", action="store_true", help="no test image may be a copy of a given one")
    command("env", "show the versions that numbers depend on, as JSON")
    for name, one in commands.choices.items():
        if name != "diff":  # whose result is a table
            one.add_argument("--json", action="store_true", help="JSON on stdout, also where that is a terminal")
    for one in (run, refine, review, apply, revert, export):
        one.add_argument("--dry-run", action="store_true", help="check and report everything, write nothing")
    return parser


def _share(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    try:
        if 0 <= (value := float(text)) <= 1:
            return value
    except ValueError:
        pass
    raise ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")


def _add_settings(parser: ArgumentParser, command: str) -> None:
    """The options that `synth_refine.settings` lists for a command; what is not given is None."""
    for one in of_command(command):
        known, kind = one.metadata, kind_of(one)
        refiner = [way for way in ("anchored", "paper") if use_of(one) == (way,)]
        text = "".join(f"{way}: " for way in refiner) + known["text"]
        default = " ".join(one.default) if isinstance(one.default, tuple) else one.default
        shown = known["shown"] or ("" if default in (None, "") or default is False else str(default))
        options: dict[str, Any] = {"help": text.replace("%", "%%") + (f" ({shown})" if shown else "")}
        if kind == "bool":
            parser.add_argument(flag(one), dest=one.name, action="store_true", default=None, **options)
        elif known["choices"]:
            parser.add_argument(flag(one), dest=one.name, choices=known["choices"], **options)
        elif known["flag"] == "IMAGES":
            parser.add_argument(one.name, nargs="?", metavar="IMAGES", **options)
        else:
            options |= {
                "type": _word(one),
                "metavar": known["metavar"],
                "nargs": "+" if kind == "Sequence[str]" else None,
            }
            parser.add_argument(flag(one), dest=one.name, **options)


def _word(one: Field[Any]) -> Callable[[str], Any]:
    """What turns a word of the command line into a setting's value, for argparse."""
    kind = kind_of(one)

    def parse(text: str) -> Any:
        value: Any = text
        try:
            if kind == "int":
                value = int(text)
            elif kind.startswith("float") and text != "auto":
                value = float(text)
        except ValueError:
            pass
        if not fits(one, [text] if kind == "Sequence[str]" else value):
            raise ArgumentTypeError(f"expected {expected(one)}, got {text!r}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
