"""Kill a run on a Ray cluster at random moments and compare what it leaves with what an undisturbed run does.

    python benchmarks/kill_ray.py --kills 20 --out benchmarks/results/speed/kills

A real cluster of a head and two nodes, each with processes of its own, on this machine. For each kill it starts
`refine_shards` in a process, waits until a random number of shards is written and a random moment more, and kills -9 a
node's raylet (a node is then added anew), a worker that has a shard in hand, or the process itself (it is then started
again), at random. At its end every file is compared with those of the plain loop: the artifact, its
shards and their manifest, and that there are no others.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

if not __package__:  # started by its path; "adapters" is also the name of a package on PyPI
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from tqdm import tqdm

from benchmarks.records import digest, environment, write_record
from synth_refine.scale.shards import refine_shards

VICTIMS = ("node", "worker", "driver")
SHARDS, SHARD_ROWS, FEATURES, CLASSES, THRESHOLD = 120, 2_000, 64, 100, 0.1
TRIES = 3  # to start a node
PATIENCE = 600.0
"""Seconds until a wait is given up: a machine with other work to do may take minutes for what takes seconds."""

Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found | None]) -> Found:
    """What a condition gives once that is something true.

    Raises:
        TimeoutError: It stayed false.
    """
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"expected {getattr(condition, '__name__', 'a condition')} within {PATIENCE} s")
        time.sleep(0.01)
    return found


@contextmanager
def cluster(count: int = 2) -> Iterator[Any]:
    """A Ray cluster of a head that does no work and nodes of one CPU each, patient with a loaded machine.

    Each node says that it has a GPU too, so that there can be actors. Ray's library reads its settings when it is
    imported, so that it should not have been before.
    """
    with ExitStack() as undo:
        undo.callback(_set_environment, dict(os.environ))
        os.environ |= _settings()
        from ray.cluster_utils import Cluster

        made = Cluster()
        undo.callback(made.shutdown)
        _add(made, num_cpus=0, include_dashboard=False)
        for _ in range(count):
            add_node(made)
        made.wait_for_nodes(timeout=PATIENCE)
        yield made


def _settings() -> dict[str, str]:
    paths = filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_worker_register_timeout_seconds": str(int(PATIENCE)),
        "RAY_worker_niceness": "0",  # 15 by default: beside other work the workers would hardly get to theirs
        "RAY_health_check_timeout_ms": str(int(1000 * PATIENCE)),  # a dead raylet is noticed by its closed socket
    }


def _set_environment(wanted: Mapping[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ |= wanted


def add_node(made: Any) -> Any:
    """A node more, as those of `cluster`; `wait_for_nodes` waits for it."""
    return _add(made, num_cpus=1, num_gpus=1)


def _add(made: Any, **options: Any) -> Any:
    """A node more; tried again, because another process may take a port between its choice and its use."""
    for _ in range(TRIES - 1):
        with suppress(Exception):  # Ray raises bare ones
            return made.add_node(wait=False, **options, **_node_options())
    return made.add_node(wait=False, **options, **_node_options())


def _node_options() -> dict[str, int]:
    """Little memory, and ports, because a node that has to find some gives up where its agents start slowly."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in names]
        for one in held:
            one.bind(("", 0))
        ports = {name: one.getsockname()[1] for name, one in zip(names, held, strict=True)}
    return {"object_store_memory": 80 << 20, **ports}


def workers(made: Any, name: str = "ray::Map") -> list[tuple[Any, Any]]:
    """Each process that has a piece of a map in hand at this moment, and its node."""
    import psutil

    def children(node: Any) -> list[Any]:
        return _quietly(psutil.Process(node.all_processes["raylet"][0].process.pid).children) or []

    pairs = [(child, node) for node in nodes(made) for child in children(node)]
    return [(child, node) for child, node in pairs if (_quietly(child.name) or "").startswith(name)]


def nodes(made: Any) -> list[Any]:
    """The nodes that work, the oldest first."""
    return sorted(made.worker_nodes, key=lambda node: int(node.all_processes["raylet"][0].process.pid))


def _quietly(ask: Callable[[], Found]) -> Found | None:
    """What a process says, or None where it has just ended."""
    import psutil

    try:
        return ask()
    except psutil.Error:
        return None


def kill_node(made: Any, node: Any) -> None:
    """Kill -9 a node's raylet, which takes its workers along, and clear away what is left of the node."""
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    made.remove_node(node, allow_graceful=False)


def written(out: Path) -> dict[str, bytes]:
    """The files of a run."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def drive(folder: str, out: str, address: str) -> None:
    """One run; what is started, killed and started again."""
    prototypes = np.load(Path(folder, "prototypes.npy"), allow_pickle=False)
    arrays = (Path(folder, "features.npy"), Path(folder, "given.npy"))
    engine = "ray" if address else "local"
    about: dict[str, Any] = {"prototypes": prototypes, "threshold": THRESHOLD, "shard_rows": SHARD_ROWS}
    refine_shards(*arrays, out, **about, engine=engine, address=address or None)


def disturbed_run(
    made: Any, folder: Path, out: Path, rng: np.random.Generator, expected: dict[str, bytes]
) -> dict[str, Any] | None:
    """Start a run, kill something in it, and compare what it leaves; None where the kill came too late."""
    command = [sys.executable, str(Path(__file__).resolve()), "--drive", str(folder), str(out), made.address]
    victim, after, delay = str(rng.choice(VICTIMS)), int(rng.integers(SHARDS)), float(rng.random() / 4)

    def done() -> int:
        return len(list(out.glob("shards/part-*.parquet")))

    with open(out.with_suffix(".log"), "ab") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(lambda: run.poll() is not None or done() >= after)
        time.sleep(delay)
        if victim == "worker":
            at_work = wait_for(lambda: workers(made) or run.poll() is not None)
            if isinstance(at_work, list):  # else the run is over
                at_work[int(rng.integers(len(at_work)))][0].kill()
        elif victim == "node":
            kill_node(made, nodes(made)[int(rng.integers(len(made.worker_nodes)))])
        else:
            run.kill()
        shards, in_time = done(), run.poll() != 0
        if victim == "node":
            add_node(made)
        code = run.wait(PATIENCE)
        if victim == "driver" and code == -signal.SIGKILL:
            code = subprocess.run(command, stdout=log, stderr=log, timeout=PATIENCE, check=False).returncode
    made.wait_for_nodes(timeout=PATIENCE)
    if not in_time:
        return None
    equal = code == 0 and written(out) == expected
    return {"killed": victim, "shards_done": shards, "delay_seconds": delay, "exit_code": code, "equal": equal}


def kills(count: int, seed: int, scratch: Path) -> Iterator[dict[str, Any]]:
    """As many kills of a node, a worker or the process that drives, each in a run of its own."""
    rng = np.random.default_rng(seed)
    folder = scratch / "arrays"
    folder.mkdir(parents=True)
    prototypes, given = rng.standard_normal((CLASSES, FEATURES)), rng.integers(0, CLASSES, SHARDS * SHARD_ROWS)
    features = prototypes[given] + 3 * rng.standard_normal((len(given), FEATURES))
    np.save(folder / "features.npy", features.astype(np.float16))
    np.save(folder / "given.npy", given)
    np.save(folder / "prototypes.npy", prototypes.astype(np.float32))
    drive(str(folder), str(scratch / "calm"), "")
    expected = written(scratch / "calm")
    with cluster() as made:
        runs = (disturbed_run(made, folder, scratch / f"run-{number}", rng, expected) for number in range(5 * count))
        yield from tqdm(islice(filter(None, runs), count), "kills", count, disable=None)


def table(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per kind of victim and one of all: kills, and how many of the runs they were in ended equal."""
    rows = []
    for victim in (*VICTIMS, "all"):
        equal = [one["equal"] for one in found if victim in (one["killed"], "all")]
        rows.append({"killed": victim, "kills": len(equal), "equal": sum(equal)})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill as often as asked, and write a record of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/kills"), help="folder of the record (%(default)s)")
    parser.add_argument("--drive", nargs=3, help=argparse.SUPPRESS)  # what this script starts itself
    options = parser.parse_args(arguments)
    if options.drive:
        drive(*options.drive)
        return 0
    found: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            found.extend(kills(options.kills, options.seed, Path(scratch)))
    finally:  # whatever ends it, the kills before count
        record = {
            "benchmark": "kill_ray",
            "environment": environment(),
            "seed": options.seed,
            "rows": table(found),
            "kills": found,
        }
        write_record(options.out / f"kill_ray_{digest(record)}.json", record)
        print(json.dumps(record["rows"], indent=1))
    return 0 if len(found) == options.kills and all(one["equal"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
