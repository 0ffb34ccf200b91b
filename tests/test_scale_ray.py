"""The same shards on a real Ray cluster of several nodes, with a worker and a node killed in the middle."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synth_refine import InputError, scale
from synth_refine.scale import refine_shards

psutil = pytest.importorskip("psutil")
ray = pytest.importorskip("ray")
# Ray's own sockets and files outlive it, and it announces changes to come.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SHARDS, SHARD_ROWS = 150, 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that does no work and two nodes that do, each with a process of its own for everything."""
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(scale.__file__).parent.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = {"object_store_memory": 80 << 20}
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
        workers = [made.add_node(num_cpus=1, **small) for _ in range(2)]
        ray.init(address=made.address, log_to_driver=False)
        try:
            yield made, workers
        finally:
            ray.shutdown()
            made.shutdown()
            os.environ.pop("PYTHONPATH")
            if before is not None:
                os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    root = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    np.save(root / "features.npy", rng.standard_normal((SHARDS * SHARD_ROWS, 16)).astype(np.float16))
    np.save(root / "given.npy", rng.integers(0, 10, SHARDS * SHARD_ROWS))
    return root / "features.npy", root / "given.npy", rng.standard_normal((10, 16)).astype(np.float32), 0.3


def written(out: Path) -> dict[str, bytes]:
    """The files of a run; the manifest's lines come in the order in which the shards were finished."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found["manifest.jsonl"] = b"\n".join(sorted(found["manifest.jsonl"].splitlines()))
    return found


def wait_for(lines: int, manifest: Path, run: threading.Thread) -> None:
    while run.is_alive() and not (manifest.exists() and manifest.read_bytes().count(b"\n") >= lines):
        time.sleep(0.02)
    assert run.is_alive()


def test_a_killed_worker_and_a_killed_node_change_nothing(cluster: Any, inputs: Any, tmp_path: Path) -> None:
    made, nodes = cluster
    refine_shards(*inputs, tmp_path / "calm", shard_rows=SHARD_ROWS)
    outcome: list[scale.Summary] = []

    def run() -> None:
        outcome.append(refine_shards(*inputs, tmp_path / "ray", shard_rows=SHARD_ROWS, engine="ray"))

    thread = threading.Thread(target=run)
    thread.start()
    manifest = tmp_path / "ray" / "manifest.jsonl"
    wait_for(5, manifest, thread)
    raylet = psutil.Process(nodes[0].all_processes["raylet"][0].process.pid)
    [worker, *_] = [child for child in raylet.children() if child.name().startswith("ray::Map")]
    worker.kill()
    wait_for(20, manifest, thread)
    made.remove_node(nodes[1], allow_graceful=False)
    thread.join(timeout=120)
    [summary] = outcome
    assert summary == scale.Summary(SHARDS * SHARD_ROWS, summary.changed, 0, SHARDS, 0)
    assert written(tmp_path / "ray") == written(tmp_path / "calm")


def test_a_bad_shard_is_one_line_and_the_rest_is_kept(cluster: Any, inputs: Any, tmp_path: Path) -> None:
    given = np.load(inputs[1])
    given[-1] = 10
    np.save(tmp_path / "given.npy", given)
    with pytest.raises(InputError, match=f"given in .*: expected classes 0 to 9, got 10 in row {SHARD_ROWS - 1}$"):
        refine_shards(
            inputs[0], tmp_path / "given.npy", *inputs[2:], tmp_path / "out", shard_rows=SHARD_ROWS, engine="ray"
        )
