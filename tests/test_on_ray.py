"""What stands between us and Ray, without a cluster."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from synth_refine import InputError
from synth_refine._io import ray as on_ray


@pytest.mark.parametrize(
    ("address", "variable", "message"),
    [
        (None, "", "engine: no Ray cluster answers or starts on this machine: no room"),
        ("head", "", "address: no Ray cluster answers at head: no room"),
        (None, "other", "address: no Ray cluster answers at other: no room"),
    ],
)
def test_a_cluster_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, address: str | None, variable: str, message: str
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("no room\nat all")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ray)
    monkeypatch.setenv("RAY_ADDRESS", variable)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with pytest.raises(InputError) as caught:
        on_ray._connected(address)
    assert str(caught.value) == message


def test_a_relative_path_means_what_it_does_to_the_driver_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("driver", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    on_ray._enter(str(tmp_path / "driver"))
    assert Path("file").read_text() == "driver"
    on_ray._enter(str(tmp_path / "none"))
    assert os.listdir() == []
    with on_ray._empty_folder():
        on_ray._empty_folder.cache_clear()


class Rows(list[dict[str, Any]]):
    """Stands for rows of Ray Data, whose steps are done at once and here."""

    context = SimpleNamespace()
    steps: list[dict[str, Any]]

    def map_batches(self, step: Callable[[Any], Iterator[Any]], **options: Any) -> Rows:
        self.steps.append(options)
        step = step() if isinstance(step, type) else step
        return self.of(one for row in self for table in step(on_ray._row(row["data"])) for one in table.to_pylist())

    def of(self, rows: Any) -> Rows:
        made = Rows(rows)
        made.steps = self.steps
        return made

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return iter(self)


@pytest.fixture(params=[0, 2], ids=["no GPUs", "GPUs"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a cluster is asked for, which has GPUs or none."""
    pytest.importorskip("pyarrow")
    source = Rows()
    source.steps = []
    data = SimpleNamespace(from_items=lambda items, **_: source.of(items), ActorPoolStrategy=SimpleNamespace)
    ray = SimpleNamespace(data=data, cloudpickle=pickle, cluster_resources=lambda: {"CPU": 2.0, "GPU": request.param})
    monkeypatch.setattr(on_ray, "_connected", lambda _: ray)
    return source.steps


def test_actors_have_a_gpu_each_or_tasks_do_all_of_the_work(steps: list[dict[str, Any]]) -> None:
    loads = []

    def double(device: str) -> Callable[[int], tuple[str, int]]:
        loads.append(device)
        return lambda number: (device, 2 * number)

    found = list(on_ray.on_cluster([3, 4, 5], lambda item: [item, -item], actor=double))
    [device] = loads
    assert found == [(device, number) for item in (3, 4, 5) for number in (2 * item, -2 * item)]
    needs = [(one.get("num_cpus"), one.get("num_gpus")) for one in steps]
    assert needs == ([(1, None), (0, 1)] if device == "cuda" else [(1, None)])
    assert "compute" not in steps[0]
    assert len(steps) == 1 or vars(steps[1]["compute"]) == {"min_size": 1, "initial_size": 2}


def test_what_a_task_or_an_actor_cannot_use_is_one_line(steps: list[dict[str, Any]]) -> None:
    def refuse(*_: Any) -> Any:
        raise InputError("weights: none")

    def odd(item: int) -> int:
        return item if item % 2 else refuse()

    for task, actor in ((refuse, lambda _: odd), (lambda item: [item], refuse), (lambda item: [item], lambda _: odd)):
        found = on_ray.on_cluster([3, 4, 5], task, actor=actor)
        with pytest.raises(InputError, match="^weights: none$"):
            list(found)
    assert steps
