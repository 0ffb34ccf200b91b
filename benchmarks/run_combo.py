"""Train noisy-label methods with and without refined labels, and print the table.

python benchmarks/run_combo.py --method plc
python benchmarks/run_combo.py --method standard,plc --refine none,paper,zero-shot --seeds 0,1,2 methods.plc.epochs=30
python benchmarks/run_combo.py --method plc --data arrays.npz --given labels.npy
python benchmarks/run_combo.py --method plc --images photos --synthetic synthetic --given labels.csv
torchrun --nproc_per_node 2 benchmarks/run_combo.py --method lra-clip
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby, repeat
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

if not __package__:  # started by its path; "adapters" is also the name of a package on PyPI
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.path.append("")  # for a method of the user's own

import torch
from torch import distributed

from adapters import ADAPTERS, SOFT_LABELS, check_options, find_adapter
from benchmarks.config import add_common, for_noise, resolve_config
from benchmarks.pixels import describe
from benchmarks.records import Record, digest, environment, read_records, write_record
from benchmarks.refined import GivenLabels, Refined, flows, folder_task, given_labels, hard, run_settings, wrong
from benchmarks.refiners import REFINERS, SOFT_REFINERS
from benchmarks.table import table
from synth_refine import InputError
from third_party.parallel import from_first, processes


@dataclass(frozen=True)
class Run:
    """One method on one refiner's labels."""

    labels: GivenLabels
    method: str
    refiner: str
    settings: Mapping[str, Any]  # what the outcome depends on besides
    path: Path  # of its record


def plan(config: Mapping[str, Any], arguments: argparse.Namespace) -> list[Run]:
    """Every run that the command line asks for, checked before any of them starts.

    Raises:
        InputError: An unknown method or refiner, or soft labels for a method that takes none.
        TypeError: An unknown option of a method.
    """
    methods = _names(arguments.method, list(config["methods"]))
    refiners = _names(arguments.refine, config.get("refiners", ["none", "paper"]))
    for refiner in refiners:
        if refiner not in REFINERS:
            raise InputError(f"refine: expected one of {', '.join(REFINERS)}, got {refiner!r}")
    for method in config["methods"]:
        find_adapter(method)
    for method in methods:
        find_adapter(method)
        if method not in config["methods"] and method in ADAPTERS:
            raise InputError(
                f"method: expected a block of settings at methods.{method} in {arguments.config}, got none"
            )
        for refiner in set(refiners) & SOFT_REFINERS:
            if method in ADAPTERS.keys() - SOFT_LABELS:
                takers = ", ".join(sorted(SOFT_LABELS))
                raise InputError(f"refine: {refiner} gives soft labels, which {takers} take and {method} does not")
    runs = []
    for labels in given_labels(config, arguments):
        own = for_noise(config, labels.noise)
        check_options("initial", own.get("initial") or {})
        for method in methods:
            check_options(method, own["methods"].get(method) or {})
            for refiner in refiners:
                settings = {**run_settings(own, method, refiner), **labels.files}
                name = f"{labels.noise}_{method.replace(':', '.')}_{refiner}_seed{labels.seed}_{digest(settings)}.json"
                runs.append(Run(labels, method, refiner, settings, labels.folder / name))
    return runs


def _names(asked: str | None, default: list[str]) -> list[str]:
    return list(dict.fromkeys(asked.split(",") if asked else default))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started; without it there is nothing to join."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The others wait while the first one embeds images or trains a SimCLR encoder; torchrun ends all when one fails.
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        distributed.destroy_process_group()


def execute(runs: Sequence[Run], config: Mapping[str, Any], arguments: argparse.Namespace) -> Iterator[Record]:
    """Yield the record of every run, in order; those that have one are not run again.

    Where the config has `jobs`, that many sets of given labels are worked on at once on the CPU, a process each.
    """
    groups = [list(group) for _, group in groupby(runs, key=lambda run: run.labels)]
    jobs = min(config.get("jobs", 1), len(groups))
    if jobs == 1 or arguments.device != "cpu" or processes()[1] > 1 or all(run.path.exists() for run in runs):
        yield from _execute_here(runs, config, arguments)
        return
    share = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (share,)) as pool:
        for records in pool.map(_execute_group, groups, repeat(config), repeat(arguments)):
            yield from records


def _start_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a word
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
    os._exit(1)  # a killed parent would leave it behind, writing records that another call also writes


def _execute_group(runs: Sequence[Run], config: Mapping[str, Any], arguments: argparse.Namespace) -> list[Record]:
    return list(_execute_here(runs, config, arguments))


def _execute_here(runs: Sequence[Run], config: Mapping[str, Any], arguments: argparse.Namespace) -> Iterator[Record]:
    refined: Refined | None = None
    for run in runs:
        if from_first(torch.tensor(run.path.exists(), device=arguments.device)):
            yield from read_records([run.path])
            continue
        if refined is None or refined.given != run.labels:
            refined = Refined(run.labels, config, arguments)
        yield _execute_one(run, refined, arguments.device)


def _execute_one(run: Run, refined: Refined, device: str) -> Record:
    benchmark = refined.benchmark
    task = benchmark.task
    labels, refine_seconds = refined.labels(run.refiner)
    if run.method == "relabel":
        task = dataclasses.replace(task, initial=refined.initial.weights)
    rank, count = processes()
    checkpoint: Path | None = refined.work / f"{run.path.stem}.safetensors"
    if run.method == "plc" and count > 1:  # its window is spread over the processes
        checkpoint = None
    start = time.perf_counter()
    outcome = find_adapter(run.method)(task, labels, run.settings["method"], run.labels.seed, checkpoint)
    train_seconds = time.perf_counter() - start
    record: Record = {
        "config": run.path.parent.name,
        "dataset": benchmark.name,
        "noise": benchmark.noise_name,
        "method": run.method,
        "refiner": run.refiner,
        "seed": run.labels.seed,
        "settings": {**run.settings, "method": outcome.settings},
        "settings_digest": digest(run.settings),
        "environment": environment(torch.device(device)),
        "refine_seconds": refine_seconds,
        "train_seconds": train_seconds,
        "labels": flows(task.train.labels, hard(labels), benchmark.true_labels),
        "wrong_after_training": wrong(outcome.labels, benchmark.true_labels),
        "test_accuracy": outcome.test_accuracy,
        "history": outcome.history,
    }
    if count > 1:
        torch.distributed.barrier()  # all have read the checkpoint that the first is about to remove
    if rank > 0:
        return record
    try:
        write_record(run.path, record)
    except FileExistsError:  # another process with the same command was faster
        [record] = read_records([run.path])
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--method",
        help=f"comma-separated: {', '.join(ADAPTERS)}, or package.module:function; default: all of the config",
    )
    add("--refine", help=f"comma-separated: {', '.join(REFINERS)}; default: those of the config")
    add_common(parser)
    add("--json", action="store_true", help="print the records instead of the table")
    add("--dry-run", action="store_true", help="list the runs, and the disk and memory of --images; do nothing")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Exit code 0 when all is done, 3 for bad input, 130 when stopped by Ctrl-C."""
    options = parse(arguments)
    try:
        config = resolve_config(options)
        runs = plan(config, options)
    except (InputError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    if options.dry_run:
        for run in runs:
            print(f"{'done ' if run.path.exists() else 'to do'}  {run.path}")
        if options.images:
            print("\n".join(describe(folder_task(config, options).pixels, options.device)))
        return 0
    records = []
    try:
        with process_group(torch.device(options.device)):
            first = processes()[0] == 0
            for run, record in zip(runs, execute(runs, config, options), strict=True):
                records.append(record)
                accuracy = ", ".join(f"{choice} {value:.2%}" for choice, value in record["test_accuracy"].items())
                name = f"{run.labels.noise} {run.method} {run.refiner} seed {run.labels.seed}"
                if first:
                    print(f"{name}: {accuracy}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError, BrokenExecutor) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    if first:
        print(json.dumps(records, indent=1) if options.json else table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
