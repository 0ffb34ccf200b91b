"""Records as Markdown tables, and the paper's tables beside what was run of them.

python benchmarks/table.py benchmarks/results/digits
python benchmarks/table.py --poster runs/cifar10 runs/cifar100
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started by its path; "adapters" is also the name of a package on PyPI
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import poster
from benchmarks.records import Record, read_records
from synth_refine import InputError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CHOICES = {"last": "last", "best_noisy_validation": "best noisy val", "best_clean_validation": "best clean val"}
"""Which epoch a test accuracy belongs to, and its heading in the table."""

BLOCK = re.compile(r"(<!-- python benchmarks/table\.py (?P<arguments>[^\n]+?) -->\n\n).*?\n?(<!-- end -->)", re.DOTALL)


def table(records: Sequence[Record]) -> str:
    """One row per noise, method and refiner, averaged over seeds; accuracies in percent.

    Runs with different settings are different rows, and the settings' digits then stand beside the refiner's name.
    """
    groups = _grouped(records, "noise", "method", "refiner", "settings_digest")
    ambiguous = len({key[:3] for key in groups}) < len(groups)
    published = any(_published(group[0]) is not None for group in groups.values())
    header = ["noise", "method", "refiner", "wrong labels", "wrong→right", "right→wrong", *CHOICES.values(), "seeds"]
    rows = [[*header, "published"] if published else header]
    for (noise, method, refiner, settings), group in groups.items():
        labels = [record["labels"] for record in group]
        row = [noise, method, f"{refiner} ({settings})" if ambiguous else refiner]
        if labels[0]["noise_before"] is None:
            row += ["unknown", "", ""]
        else:
            before, after = (_mean(labels, f"noise_{when}") for when in ("before", "after"))
            row.append(f"{before:.1%} → {after:.1%}")
            row += [f"{_mean(labels, flow):.0f}" for flow in ("wrong_to_right", "right_to_wrong")]
        row += [_accuracy([record["test_accuracy"].get(choice) for record in group]) for choice in CHOICES]
        row.append(str(len(group)))
        if published:
            figure = _published(group[0])
            row.append("" if figure is None else f"{figure:.2f}")
        rows.append(row)
    return markdown(rows)


def sentence(records: Sequence[Record]) -> str:
    """What refining does to wrong labels and to the last test accuracy, in words: one sentence per noise."""
    sentences = []
    for (noise,), group in _grouped(records, "noise").items():
        before = _mean([record["labels"] for record in group], "noise_before")
        refiners = {name: rows for (name,), rows in _grouped(group, "refiner").items()}
        accuracy = {name: _accuracy([row["test_accuracy"]["last"] for row in rows]) for name, rows in refiners.items()}
        changed = [name for name in refiners if name != "none"]
        left = [
            f"`{one}` leaves {_mean([row['labels'] for row in refiners[one]], 'noise_after'):.1%}" for one in changed
        ]
        reached = [f"{accuracy[one]} % with `{one}`" for one in changed]
        sentences.append(
            f"Of {before:.1%} wrong labels ({noise}), {' and '.join(left)}; the test accuracy is {accuracy['none']} % "
            f"with the labels as given, {' and '.join(reached)}."
        )
    seeds = len({record["seed"] for record in records})
    return textwrap.fill(f"{' '.join(sentences)} (Last epoch; mean ± standard deviation of {seeds} seeds.)", 120)


def study_table(records: Sequence[Record]) -> str:
    """The settings of one study against the given labels; means over seeds, in percent."""
    if records[0]["study"] == "estimates":
        return estimates_table(records)
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


def estimates_table(records: Sequence[Record]) -> str:
    """What the refiner estimates without true labels beside what is true, a row per set of given labels and seed."""
    rows = [["estimates: wrong labels", "before", "true", "after", "true", "wrong changes", "true"]]
    for record in records:
        [point] = record["points"]
        labels, row = point["labels"], [record["noise"]]
        changed_wrongly = labels["right_to_wrong"] + labels["wrong_to_wrong"]
        true = {
            "before": labels["noise_before"],
            "after": labels["noise_after"],
            "wrong_changes": changed_wrongly / labels["changed"] if labels["changed"] else None,
        }
        for name, figure in true.items():
            found = point["estimates"][name]
            row.append("none" if found is None else f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})")
            row.append("none" if figure is None else f"{figure:.3f}")
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


def speed_table(records: Sequence[Record]) -> str:
    """The figures of one speed benchmark, a row per size."""
    rows = [row for record in records for row in record["rows"]]
    header = [name.replace("_", " ") for name in rows[0]]
    return markdown([header, *([_figure(value) for value in row.values()] for row in rows)])


def updated(text: str) -> str:
    """The text with the output of each command `<!-- python benchmarks/table.py ... -->` up to `<!-- end -->`."""

    def made(block: re.Match[str]) -> str:
        return f"{block[1]}{_shown(shlex.split(block['arguments']), ROOT)}\n\n{block[3]}"

    return BLOCK.sub(made, text)


def _grouped(records: Sequence[Record], *keys: str) -> dict[tuple[str, ...], list[Record]]:
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def _published(record: Record) -> float | None:
    """The poster's figure for the same labels and method, whatever the record's inputs are."""
    dataset = record["dataset"].split("-")[0]
    return poster.published(dataset, record["noise"], record["method"], record["refiner"])


def poster_tables(records: Sequence[Record], commands: bool = True) -> str:
    """Both tables of the poster, "published / ours", the command of every row, and those of the cells without a run."""
    parts, missing = [], []
    for dataset, rows in poster.PUBLISHED.items():
        found = poster.cells(records, dataset)
        shown = [[f"{poster.NAMES[dataset]}: published / ours", "refiner", *poster.NOISES.values()]]
        for (method, refiner), figures in zip(poster.ROWS, rows, strict=True):
            ours = [found[method, refiner, noise] for noise in poster.NOISES]
            shown.append([method, refiner])
            for noise, figure, own in zip(poster.NOISES, figures, ours, strict=True):
                reached = _accuracy([value / 100 for value in own]) or "not run"
                shown[-1].append(f"{figure:.2f} / {reached}")
                if not own:
                    missing.append(poster.command(dataset, noise, method, refiner))
        parts.append(markdown(shown))
    columns = ", ".join(f"{short} is `{noise}`" for noise, short in poster.NOISES.items())
    parts.append(f"With `DATASET=cifar10` or `cifar100` and NOISE as the column says ({columns}) this runs a cell:")
    about = [["method", "refiner", "command", "what still differs"]]
    for method, refiner in poster.ROWS:
        line = poster.command("$DATASET", "$NOISE", method, refiner)
        about.append([method, refiner, f"`{line}`", poster.DIFFERS[method]])
    parts.append(markdown(about))
    if commands and missing:
        parts += [f"{len(missing)} cells have no run:", "\n".join(missing)]
    return "\n\n".join(parts)


def _figure(value: float | str) -> str:
    if isinstance(value, bool | str):
        return value if isinstance(value, str) else "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _mean(rows: Sequence[Mapping[str, float]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


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


def _shown(arguments: Sequence[str], root: Path = Path()) -> str:
    """What the command prints; record paths are relative to `root`."""
    options = _parser().parse_args(arguments)
    if options.poster:
        paths = [root / path for path in options.records]
        paths = paths or [path for name in poster.PUBLISHED if (path := RESULTS / name).is_dir()]
        return poster_tables([one for one in read_records(paths) if "method" in one], not options.short)
    records = read_records(root / path for path in options.records)
    for key in ("study", "method"):
        if wanted := getattr(options, key):
            records = [record for record in records if record.get(key) == wanted]
    if not records:
        raise InputError(f"records: expected .json files in {', '.join(map(str, options.records))}, got none")
    if options.sentence:
        return sentence(records)
    tables: list[str] = []
    for key, show in {"method": table, "study": study_table, "benchmark": speed_table}.items():
        groups = _grouped([record for record in records if key in record], key).values()
        tables += [show([one for group in groups for one in group])] if key == "method" and groups else []
        tables += [show(group) for group in groups if key != "method"]
    return "\n\n".join(tables)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="*", help="record files, or folders of them")
    parser.add_argument("--study", help="show this study alone")
    parser.add_argument("--method", help="show the runs of this method alone")
    parser.add_argument("--poster", action="store_true", help="the paper's tables, beside records of the CIFAR configs")
    parser.add_argument("--short", action="store_true", help="with --poster: without a command for every missing cell")
    parser.add_argument("--sentence", action="store_true", help="say it in words")
    parser.add_argument(
        "--update", type=Path, nargs="+", metavar="FILE", help="renew the tables in these Markdown files"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of the records in the named files and folders, or renew the tables of Markdown files."""
    options = _parser().parse_args(arguments)
    try:
        if options.update:
            for path in options.update:
                path.write_text(updated(path.read_text()))
        else:
            print(_shown(sys.argv[1:] if arguments is None else arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
