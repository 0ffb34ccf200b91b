"""The poster of arXiv:2509.04298: its two tables, what of them was run here, and the command of each cell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from adapters import check_options
from benchmarks.config import CONFIGS, for_noise, read_config

NOISES = {
    "pmd-1-0.35": "35 %",
    "pmd-1-0.70": "70 %",
    "pmd-1-0.35+uniform-0.3": "35 + 30U",
    "pmd-1-0.35+uniform-0.6": "35 + 60U",
    "pmd-1-0.35+asymmetric-0.3": "35 + 30A",
}
"""The given labels, in the order of the columns, and how the tables call them."""

ROWS = (
    ("standard", "none"),
    ("relabel", "paper"),
    ("plc", "none"),
    ("plc", "paper"),
    ("lra-simclr", "none"),
    ("lra-simclr", "paper"),
    ("lra-clip", "none"),
    ("lra-clip", "paper"),
)
"""Method and refiner of each row."""

PUBLISHED = {
    "cifar10": (
        (80.81, 40.32, 77.12, 67.92, 77.40),
        (82.46, 54.10, 79.76, 72.38, 78.97),
        (82.87, 38.65, 77.98, 61.87, 78.52),
        (83.26, 54.01, 81.38, 72.57, 80.49),
        (89.29, 40.87, 88.83, 83.67, 86.89),
        (88.87, 60.78, 88.41, 85.31, 87.95),
        (96.91, 41.78, 96.61, 88.66, 94.35),
        (96.93, 71.59, 96.68, 94.94, 96.78),
    ),
    "cifar100": (
        (59.28, 44.43, 55.98, 43.50, 52.23),
        (61.45, 47.15, 59.35, 44.91, 61.39),
        (60.06, 45.03, 57.67, 38.92, 59.34),
        (59.59, 46.13, 59.43, 43.25, 60.08),
        (54.95, 48.00, 55.23, 47.47, 53.99),
        (56.18, 49.34, 54.67, 48.54, 55.45),
        (75.91, 56.15, 74.69, 63.08, 69.97),
        (77.01, 66.88, 76.10, 66.27, 74.42),
    ),
}
"""Test accuracy in %, by data set, with `ROWS` and `NOISES`: pixels, ResNet-34, best epoch on clean validation, one
run."""

NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}

MAY_DIFFER = frozenset({"bf16", "cache", "measure_batch", "weights"})
"""Settings that may differ from the config's in a run that counts: how fast it is, and where its files lie."""

DIFFERS = {
    "standard": "the authors set no seed",
    "relabel": "which threshold each cell had is unknown; class names in the prompts, steps and seeds of the synthetic "
    "images are unknown",
    "plc": "the authors' own runs of PLC lie far below those of its paper at 35 + 60U; the cause is unknown",
    "lra-simclr": "the published encoders' training is inferred from their architecture; with `methods.lra-simclr."
    "weights=FILE` they are read; features come from the unaugmented image",
    "lra-clip": "features come from the unaugmented image, not from one crop and flip of it",
}
"""What is not as in the authors' runs, besides random draws; third_party/README.md has the details."""


def command(dataset: str, noise: str, method: str, refiner: str) -> str:
    """What runs one cell, and with two words for the data set and the noise, what runs a row."""
    return (
        f"python benchmarks/run_combo.py --config benchmarks/configs/{dataset}.yaml --data-root data "
        f"--method {method} --refine {refiner} --noise {noise}"
    )


def published(dataset: str, noise: str, method: str, refiner: str) -> float | None:
    """The figure of a cell, in %; None where the poster has none.

    Example:
        >>> published("cifar10", "cifar10-1-0.35_U_0.3", "plc", "none"), published("digits", "clean", "plc", "none")
        (77.98, None)
    """
    if dataset not in PUBLISHED or (method, refiner) not in ROWS:
        return None
    figures = dict(zip(map(_file_name, NOISES), PUBLISHED[dataset][ROWS.index((method, refiner))], strict=True))
    return figures.get(_file_name(noise).removeprefix(f"{dataset}-"))


def _file_name(noise: str) -> str:
    """How the published label files call a noise."""
    return noise.removeprefix("pmd-").replace("+uniform-", "_U_").replace("+asymmetric-", "_A_")


@cache
def settings(dataset: str, noise: str, method: str, refiner: str) -> dict[str, Any]:
    """What a cell runs with as its config stands, as a record has it."""
    config = for_noise(read_config(CONFIGS / f"{dataset}.yaml"), noise)
    resolved: dict[str, Any] = {"method": check_options(method, config["methods"][method])}
    resolved["refiner"] = {"threshold": config["threshold"]} if refiner == "paper" else {}
    if refiner == "paper" or method == "relabel":
        resolved["initial"] = config["initial"]
    plain: dict[str, Any] = json.loads(json.dumps(resolved))
    return plain


def counts(record: Mapping[str, Any], dataset: str, noise: str, method: str, refiner: str) -> bool:
    """Whether a record is a run of that cell with the settings of the config."""
    if (record["dataset"], record["method"], record["refiner"]) != (dataset, method, refiner):
        return False
    if _file_name(record["noise"]).removeprefix(f"{dataset}-") != _file_name(noise):
        return False
    wanted, found = settings(dataset, noise, method, refiner), record["settings"]
    same = all(found["method"].get(key) == value for key, value in wanted["method"].items() if key not in MAY_DIFFER)
    return same and all(found.get(key) == wanted[key] for key in wanted if key != "method")


def cells(records: Sequence[Mapping[str, Any]], dataset: str) -> dict[tuple[str, str, str], list[float]]:
    """Accuracies in % that were reached here, by method, refiner and noise; a seed each."""
    found = {}
    for method, refiner in ROWS:
        for noise in NOISES:
            found[method, refiner, noise] = [
                100 * record["test_accuracy"]["best_clean_validation"]
                for record in records
                if counts(record, dataset, noise, method, refiner)
            ]
    return found
