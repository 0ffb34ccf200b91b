"""Work on a Ray cluster: items in, results out, through Ray Data, whose are backpressure, retries and autoscaling.

Every node needs this package and the same folders under the same paths. What travels is bytes: an item, a result, or
why an input cannot be used, which no other attempt could mend and which ends the work with one line.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from synth_refine._io.error import InputError

if TYPE_CHECKING:
    import pyarrow as pa

ENGINES = ("local", "ray")
ENGINE_HELP = "ray: a cluster whose nodes see the same folders; what is written is the same"
ADDRESS_HELP = "ray: of the cluster; by default RAY_ADDRESS, a cluster running on this machine, or a new one"
MISSING = "engine: ray is not installed; install it with `pip install 'synth-refine[ray]'`"
PASSED_ON = (InputError, OSError, ImportError)
"""What a user can do something about; all else is a fault of ours and comes with Ray's traceback."""


def check_engine(engine: str, address: str | None = None) -> None:
    """Refuse an unknown engine, Ray where it is not installed, or the address of a cluster without Ray."""
    if engine not in ENGINES:
        raise InputError(f"engine: expected {' or '.join(ENGINES)}, got {engine!r}")
    if engine == "ray" and find_spec("ray") is None:
        raise InputError(MISSING)
    if engine != "ray" and address is not None:
        raise InputError(f"address: expected None without engine ray, got {address!r}")


def on_cluster(
    items: Sequence[Any],
    task: Callable[[Any], Iterable[Any]],
    address: str | None = None,
    *,
    actor: Callable[[str], Callable[[Any], Any]] | None = None,
    device: str = "cuda",
) -> Iterator[Any]:
    """Do something with each item, a task each, and what comes of it in actors, where there is something to load.

    Without GPUs the tasks do both, for the same processors, and what is loaded stays in the processes that do them
    until the driver or Ray ends them. A task that was lost goes to any node with room; a call, to the same actor, which
    Ray starts anew, and with its node lost this may have to wait for another actor to end.

    Everything given and made must be such as cloudpickle takes. A task or a call that is repeated, because its worker
    or its node died, has to come to the same again.

    Args:
        items: What the tasks are about; without any, no cluster is asked for.
        task: Called with an item; gives results one by one, and waits where nobody takes them.
        address: Of the cluster; by default the one that RAY_ADDRESS names, one that runs on this machine, or a new one.
        actor: Called once in each process that Ray takes for it, with its device. What it gives is called with every
            result of the tasks, and gives the results to hand out.
        device: Of the actors: with cuda each has a GPU of its own where the cluster has GPUs, else "cpu".

    Yields:
        The results, each once, in no certain order.

    Raises:
        InputError: Ray is not installed, no cluster answers, or a task or an actor met an input it cannot use.
    """
    if not items:
        return
    ray = _connected(address)
    cloudpickle, folder = ray.cloudpickle, os.getcwd()

    def row(value: Any) -> pa.Table:
        return _row(cloudpickle.dumps(value))

    def produced(batch: pa.Table) -> Iterator[Any]:
        _enter(folder)
        try:
            yield from task(cloudpickle.loads(_data(batch)))
        except PASSED_ON as error:
            yield _failure(error)

    def produce(batch: pa.Table) -> Iterator[pa.Table]:
        yield from map(row, produced(batch))

    gpus = int(ray.cluster_resources().get("GPU", 0)) if device.startswith("cuda") else 0
    name = uuid4().hex

    def load() -> Callable[[Any], Any]:
        _enter(folder)
        try:
            act = actor("cuda" if gpus else "cpu")  # type: ignore[misc]
        except PASSED_ON as error:
            failure = _failure(error)
            return lambda _: failure

        def act_on(given: Any) -> Any:
            try:
                return given if isinstance(given, Failure) else act(given)
            except PASSED_ON as error:
                return _failure(error)

        return act_on

    class Acting:
        def __init__(self) -> None:
            self.act = load()

        def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
            yield row(self.act(cloudpickle.loads(_data(batch))))

    def do_both(batch: pa.Table) -> Iterator[pa.Table]:
        act = _kept(name, load)
        yield from (row(act(given)) for given in produced(batch))

    rows = ray.data.from_items([{"data": cloudpickle.dumps(item)} for item in items], override_num_blocks=len(items))
    rows.context.enable_progress_bars = rows.context.print_on_execution_start = False  # the caller shows what is done
    whole: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    if actor is not None and gpus:
        # As many actors as there is room for begin at once: each takes long to load its libraries. They take no CPU, or
        # with one for each GPU the tasks would wait for the actors, and these for them.
        pool = ray.data.ActorPoolStrategy(min_size=1, initial_size=min(len(items), gpus))
        done = rows.map_batches(produce, num_cpus=1, **whole)
        done = done.map_batches(Acting, compute=pool, num_cpus=0, num_gpus=1, **whole)
    else:
        done = rows.map_batches(produce if actor is None else do_both, num_cpus=1, **whole)
    for one in done.iter_rows():
        result = cloudpickle.loads(one["data"])
        if isinstance(result, Failure):
            raise InputError(result.message)
        yield result


_loaded: dict[str, Any] = {}


def _kept(name: str, load: Callable[[], Any]) -> Any:
    """What was loaded under a name, in this process, which keeps it until it ends or loads something else."""
    if name not in _loaded:
        _loaded.clear()
        _loaded[name] = load()
    return _loaded[name]


@dataclass(frozen=True)
class Failure:
    """Why an input cannot be used, as a value: Ray would wrap an exception, or try again."""

    message: str


def _failure(error: Exception) -> Failure:
    if isinstance(error, InputError):
        return Failure(str(error))
    # A folder that this node does not see, perhaps, or its full disk.
    return Failure(f"engine: {type(error).__name__} on node {platform.node()}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _connected(address: str | None) -> Any:
    """Ray, connected to a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what Ray reports to its makers is for the user to switch on
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(MISSING) from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it remarks that its bars are off
    if not ray.is_initialized():
        known = address or os.environ.get("RAY_ADDRESS")
        try:
            _check_reachable(known or "")
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError) as error:
            what = (
                f"address: no Ray cluster answers at {known}"
                if known
                else "engine: no Ray cluster answers or starts on this machine"
            )
            raise InputError(f"{what}: {_first_line(error)}") from error
    return ray


def _check_reachable(address: str) -> None:
    """Fail at once where nothing listens; Ray would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _enter(folder: str) -> None:
    """Let relative paths mean what they do to the driver; absolute ones need no such folder on this node.

    Without it nothing lies at a relative path, rather than what an earlier task or the worker itself has there.
    """
    try:
        os.chdir(folder)
    except OSError:
        os.chdir(_empty_folder().name)


@cache
def _empty_folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="synth-refine-")


def _row(data: bytes) -> pa.Table:
    import pyarrow as pa

    return pa.table({"data": pa.array([data], pa.large_binary())})


def _data(batch: pa.Table) -> bytes:
    data: bytes = batch["data"][0].as_py()
    return data
