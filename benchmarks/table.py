"""Records as a Markdown table: python benchmarks/table.py benchmarks/results/digits."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started by its path; "adapters" is also the name of a package on PyPI
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.records import Record, read_records
from synth_refine import InputError

# Test accuracy in %, CIFAR-10, pixels, ResNet-34, best epoch on clean validation, one run: the table on the paper's
# poster (arXiv:2509.04298). With the given labels, then with the refined ones.
PUBLISHED: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "cifar10-1-0.35": {
        "standard": (80.81, None),
        "relabel": (None, 82.46),
        "plc": (82.87, 83.26),
        "lra-simclr": (89.29, 88.87),
        "lra-clip": (96.91, 96.93),
    },
    "cifar10-1-0.70": {
        "standard": (40.32, None),
        "relabel": (None, 54.10),
        "plc": (38.65, 54.01),
        "lra-simclr": (40.87, 60.78),
        "lra-clip": (41.78, 71.59),
    },
    "cifar10-1-0.35_U_0.3": {
        "standard": (77.12, None),
        "relabel": (None, 79.76),
        "plc": (77.98, 81.38),
        "lra-simclr": (88.83, 88.41),
        "lra-clip": (96.61, 96.68),
    },
    "cifar10-1-0.35_U_0.6": {
        "standard": (67.92, None),
        "relabel": (None, 72.38),
        "plc": (61.87, 72.57),
        "lra-simclr": (83.67, 85.31),
        "lra-clip": (88.66, 94.94),
    },
    "cifar10-1-0.35_A_0.3": {
        "standard": (77.40, None),
        "relabel": (None, 78.97),
        "plc": (78.52, 80.49),
        "lra-simclr": (86.89, 87.95),
        "lra-clip": (94.35, 96.78),
    },
}

CHOICES = {"last": "last", "best_noisy_validation": "best noisy val", "best_clean_validation": "best clean val"}
"""Which epoch a test accuracy belongs to, and how the table calls it."""


def table(records: Sequence[Record]) -> str:
    """One row per noise, method and refiner, averaged over seeds; accuracies in percent.

    Runs with different settings are different rows, and the settings' digits then stand beside the refiner's name.
    """
    groups: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in records:
        key = (record["noise"], record["method"], record["refiner"], record["settings_digest"])
        groups.setdefault(key, []).append(record)
    ambiguous = len({key[:3] for key in groups}) < len(groups)
    published = any(key[0] in PUBLISHED for key in groups)
    header = ["noise", "method", "refiner", "wrong labels", "wrong→right", "right→wrong", *CHOICES.values(), "seeds"]
    rows = [[*header, "published"] if published else header]
    for (noise, method, refiner, settings), group in groups.items():
        labels = [record["labels"] for record in group]
        row = [noise, method, f"{refiner} ({settings})" if ambiguous else refiner]
        if labels[0]["noise_before"] is None:
            row += ["unknown", "", ""]
        else:
            before, after = (_mean([one[f"noise_{when}"] for one in labels]) for when in ("before", "after"))
            row.append(f"{before:.1%} → {after:.1%}")
            row += [f"{_mean([one[flow] for one in labels]):.0f}" for flow in ("wrong_to_right", "right_to_wrong")]
        row += [_accuracy([record["test_accuracy"].get(choice) for record in group]) for choice in CHOICES]
        row.append(str(len(group)))
        if published:
            pair = PUBLISHED.get(noise, {}).get(method)
            column = {"none": 0, "paper": 1}.get(refiner)
            figure = None if pair is None or column is None else pair[column]
            row.append("" if figure is None else f"{figure:.2f}")
        rows.append(row)
    return markdown(rows)


def figure_of(point: Mapping[str, Any]) -> float | None:
    """What a study's setting reached: test accuracy where it trained, else the fraction of wrong labels."""
    if "test_accuracy" in point:
        accuracy: dict[str, float] = point["test_accuracy"]
        return accuracy.get("best_noisy_validation", accuracy["last"])
    noise: float | None = point["labels"]["noise_after"]
    return noise


def is_wide(records: Sequence[Record]) -> bool:
    """Whether the given labels of a study are too many for columns."""
    return len({record["noise"] for record in records}) > 4


def study_table(records: Sequence[Record]) -> str:
    """The settings of one study against the given labels; means over seeds, in percent."""
    noises = list(dict.fromkeys(record["noise"] for record in records))
    what = "test accuracy" if "test_accuracy" in records[0]["points"][0] else "wrong labels"
    rows = [[f"{records[0]['study']}: {what}", *noises]]
    for index, point in enumerate(records[0]["points"]):
        row = [f"{point['series']} {point['value']}".strip()]
        for noise in noises:
            figures = [figure_of(one["points"][index]) for one in records if one["noise"] == noise]
            known = [figure for figure in figures if figure is not None]
            row.append(f"{statistics.fmean(known):.1%}" if known else "unknown")
        rows.append(row)
    return markdown([list(row) for row in zip(*rows, strict=True)] if is_wide(records) else rows)


def speed_table(records: Sequence[Record]) -> str:
    """The figures of one speed benchmark, a row per size."""
    rows = [row for record in records for row in record["rows"]]
    header = [name.replace("_", " ") for name in rows[0]]
    return markdown([header, *([_figure(value) for value in row.values()] for row in rows)])


def _figure(value: float | str) -> str:
    if isinstance(value, bool | str):
        return value if isinstance(value, str) else "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _accuracy(values: Sequence[float | None]) -> str:
    """Mean and, from two seeds on, sample standard deviation in percent."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.2f}{spread}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Cells padded, so that the table can be read in a terminal too."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of the records in the named files and folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, nargs="+", help="record files, or folders of them")
    options = parser.parse_args(arguments)
    try:
        records = read_records(options.records)
        if not records:
            raise InputError(f"records: expected .json files in {', '.join(map(str, options.records))}, got none")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    studies = list(dict.fromkeys(record["study"] for record in records if "study" in record))
    tables = [study_table([record for record in records if record.get("study") == study]) for study in studies]
    benchmarks = dict.fromkeys(record["benchmark"] for record in records if "benchmark" in record)
    tables += [speed_table([record for record in records if record.get("benchmark") == name]) for name in benchmarks]
    runs = [record for record in records if "method" in record]
    print("\n\n".join([table(runs), *tables] if runs else tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
