"""Shards of features and of images on a real Ray cluster, with workers, a node and an actor killed in the middle.

What is killed is always in the middle of its work: the work waits for a file that is made after the kill.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import kill_ray
from synth_refine import InputError
from synth_refine._io.ray import on_cluster
from synth_refine.images import embed, hashes
from synth_refine.images.batches import embedder
from synth_refine.images.embed import embed_images
from synth_refine.images.encoders import Preprocess, TorchEncoder
from synth_refine.images.sources import open_images
from synth_refine.refine import front
from synth_refine.scale import shards as scale
from synth_refine.scale.shards import refine_shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own sockets and files outlive it, and it announces changes to come
    pytest.mark.skipif(find_spec("ray") is None or find_spec("psutil") is None, reason="needs ray and psutil"),
]

SHARDS, SHARD_ROWS = 40, 20
PHOTOS, PHOTO_SHARD, BATCH = 30, 6, 2
GATED = 10  # shards, or calls of an actor, that are done before the gate is asked for


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that does no work and two nodes that do, each with a process of its own for everything."""
    with warnings.catch_warnings(), kill_ray.cluster() as made:
        import ray  # not before the cluster's settings stand

        warnings.simplefilter("ignore")
        ray.init(address=made.address, log_to_driver=False)
        try:
            yield made
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    root = tmp_path_factory.mktemp("inputs")
    rng, given = np.random.default_rng(0), np.arange(SHARDS * SHARD_ROWS) % 10
    features = 2 * np.eye(10, 16)[given] + rng.standard_normal((len(given), 16))
    np.save(root / "features.npy", features.astype(np.float16))
    np.save(root / "given.npy", np.where(rng.random(len(given)) < 0.3, 0, given))
    settings = {"prototypes": np.eye(10, 16, dtype=np.float32), "threshold": 0.3, "shard_rows": SHARD_ROWS}
    return root / "features.npy", root / "given.npy", settings


class Run(threading.Thread):
    """A run beside the test, with what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.outcome, self.error = work, None, None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self.work()
        except BaseException as error:
            self.error = error

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """What the condition gives while the work goes on."""
        found = kill_ray.wait_for(lambda: condition() or not self.is_alive())
        assert self.is_alive(), f"over before the kill: {self.error or self.outcome}"
        return found

    def result(self) -> Any:
        self.join(kill_ray.PATIENCE)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.outcome


def test_a_bad_shard_is_one_line(cluster: Any, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "ORDER_ROWS", 200)  # so that a worker finds it
    given = np.load(inputs[1])
    given[-1] = 10
    np.save(tmp_path / "given.npy", given)
    with pytest.raises(InputError, match=f"given in .*: expected classes 0 to 9, got 10 in row {len(given) - 1}$"):
        refine_shards(inputs[0], tmp_path / "given.npy", tmp_path / "out", **inputs[2], engine="ray")


def test_a_killed_actor_changes_nothing(cluster: Any, tmp_path: Path) -> None:
    gate, found = tmp_path / "gate", []

    def actor(device: str) -> Callable[[int], tuple[str, int]]:
        calls = count()

        def square(number: int) -> tuple[str, int]:
            called = next(calls)
            while called >= GATED and not gate.exists():
                time.sleep(0.05)
            return device, number**2

        return square

    run = Run(lambda: found.extend(on_cluster(range(SHARDS), lambda item: [item, item], actor=actor)))
    run.wait_for(lambda: len(found) >= GATED // 2)
    run.wait_for(lambda: kill_ray.workers(cluster, "ray::MapWorker"))[0][0].kill()
    gate.touch()
    run.result()
    assert sorted(found) == sorted(2 * [("cuda", number**2) for number in range(SHARDS)])


# ---- images ----


def tiny(weights: str, gate: Path | None = None) -> Callable[..., TorchEncoder]:
    """What makes a network; it comes to a gate after some batches, one of its shards being done and one in hand."""

    class Gated(TorchEncoder):
        seen = 0

        def embed(self, images: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            while gate is not None and self.seen > 4 and not gate.exists():
                time.sleep(0.05)
            return super().embed(images)

    def make(device: str = "cpu") -> TorchEncoder:
        network = nn.Sequential(nn.Conv2d(3, 8, 5, stride=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        network.load_state_dict(load_file(weights))
        return Gated("tiny", network.to(device), Preprocess(size=(32, 32)))

    return make


def interrupted(call: Callable[..., Any], after: int) -> Callable[..., Any]:
    """The call, which fails when it was made so many times."""
    calls = count()

    def counted(*arguments: Any) -> Any:
        if next(calls) >= after:
            raise KeyboardInterrupt
        return call(*arguments)

    return counted


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes, two of them bad, and the weights of a tiny network."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    (root / "in" / "cat").mkdir(parents=True)
    for number in range(PHOTOS):
        pixels = rng.integers(0, 256, (40 + number % 3, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "in" / "cat" / f"{number:02d}.png")
    (root / "in" / "cat" / "17.png").write_bytes(b"<html>")
    (root / "in" / "cat" / "28.png").write_bytes((root / "in" / "cat" / "27.png").read_bytes()[:300])
    torch.manual_seed(0)
    weights = nn.Sequential(nn.Conv2d(3, 8, 5, stride=3)).state_dict()
    save_file(weights, root / "weights.safetensors")
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_embedding_goes_on_on_the_cluster_to_the_same_bytes_though_a_worker_is_killed(
    cluster: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tiny("weights.safetensors")
    monkeypatch.chdir(photos)  # relative paths mean the same on the nodes
    sources = open_images("in")
    options: dict[str, Any] = {"batch_rows": BATCH, "shard_rows": PHOTO_SHARD}
    expected, bad = embed_images(build(), sources, tmp_path / "calm", workers=2, **options)
    assert sorted(bad) == [17, 28]
    assert np.isfinite(np.delete(expected, [17, 28], axis=0)).all()
    monkeypatch.setattr(embed, "KEEP_SECONDS", 0.0)
    begin = build()
    monkeypatch.setattr(begin, "embed", interrupted(begin.embed, 3))
    with pytest.raises(KeyboardInterrupt):  # begun here, and resumed there
        embed_images(begin, sources, tmp_path / "ray", **options)
    [begun] = (tmp_path / "ray").iterdir()
    asked = []

    def watched(items: Any, *rest: Any, **more: Any) -> Iterator[Any]:
        asked.append([sorted(first) if isinstance(first, dict) else first for first, _, _ in items])
        return on_cluster(items, *rest, **more)

    for module in (embed, hashes):
        monkeypatch.setattr(module, "on_cluster", watched)

    gate = tmp_path / "gate"
    options |= {"engine": "ray", "device": "cpu", "make": tiny("weights.safetensors", gate)}
    run = Run(lambda: embed_images(build(), sources, tmp_path / "ray", **options))
    run.wait_for(lambda: len(list(begun.glob("parts/*.npy"))) > 4)
    [(worker, _), *_] = run.wait_for(lambda: kill_ray.workers(cluster))
    worker.kill()
    gate.touch()
    features, also_bad = run.result()
    assert features.tobytes() == expected.tobytes()
    assert also_bad == bad
    assert content(tmp_path / "ray") == content(tmp_path / "calm")
    assert asked == [[0, 1, 2, 3, 4], [[3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14]]]  # to hash, to embed


def test_an_actor_refuses_other_weights_and_a_gpu_that_is_not_there(photos: Path) -> None:
    make = tiny(str(photos / "weights.safetensors"))
    with pytest.raises(InputError, match="encoder: expected the same weights on every node, got others on node"):
        embedder(make, "another", "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="engine: expected a GPU that torch can use on node .*, got none"):
            embedder(make, "", "cuda")


# ---- a node is lost: no other test comes after it ----


def test_a_killed_worker_and_a_killed_node_change_nothing(
    cluster: Any, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refine_shards(*inputs[:2], tmp_path / "calm", **inputs[2])
    gate = tmp_path / "gate"

    class Gated(scale._Work):
        def __call__(self, shard: scale.Shard) -> Any:
            while shard.number >= GATED and not gate.exists():
                time.sleep(0.05)
            return super().__call__(shard)

    monkeypatch.setattr(scale, "_Work", Gated)
    run = Run(lambda: refine_shards(*inputs[:2], tmp_path / "ray", **inputs[2], engine="ray"))
    folder = tmp_path / "ray" / "shards"
    run.wait_for(lambda: len(list(folder.glob("part-*.parquet"))) >= GATED // 2)
    [(worker, node), *_] = run.wait_for(lambda: kill_ray.workers(cluster))
    worker.kill()
    [(_, node), *_] = run.wait_for(lambda: [one for one in kill_ray.workers(cluster) if one[0].pid != worker.pid])
    kill_ray.kill_node(cluster, node)
    gate.touch()
    found = run.result()
    assert (found.rows, found.unscored, found.shards, found.reused) == (SHARDS * SHARD_ROWS, 0, SHARDS, 0)
    assert content(tmp_path / "ray") == content(tmp_path / "calm")
