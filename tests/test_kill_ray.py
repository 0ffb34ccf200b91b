"""What the benchmark of kills leaves behind when something fails, without a cluster."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import kill_ray


class Nodes:
    """Stands for Ray's cluster; some of its nodes do not start."""

    def __init__(self, failing: int) -> None:
        self.failing, self.added, self.down = failing, 0, False

    def add_node(self, **options: Any) -> None:
        assert "RAY_health_check_timeout_ms" in os.environ
        if self.failing:
            self.failing -= 1
            raise Exception("The current node timed out during startup.")  # as Ray does
        self.added += 1

    def wait_for_nodes(self, timeout: float) -> None:
        pass

    def shutdown(self) -> None:
        self.down = True


@pytest.mark.parametrize("failing", [2, 3])
def test_a_node_is_tried_again_and_the_environment_is_put_back(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, before = Nodes(failing), dict(os.environ)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ray.cluster_utils", SimpleNamespace(Cluster=lambda: made))
    if failing < kill_ray.TRIES:
        with kill_ray.cluster(2):
            assert made.added == 3
    else:
        with pytest.raises(Exception, match="timed out during startup"), kill_ray.cluster(2):
            pass
    assert made.down
    assert dict(os.environ) == before


def test_what_was_found_before_an_error_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kills(*_: Any) -> Iterator[dict[str, Any]]:
        yield {"killed": "node", "equal": True}
        raise TimeoutError("expected workers within 600 s")

    monkeypatch.setattr(kill_ray, "kills", kills)
    with pytest.raises(TimeoutError):
        kill_ray.main(["--kills", "2", "--out", str(tmp_path)])
    [path] = tmp_path.iterdir()
    assert json.loads(path.read_text())["rows"][0] == {"killed": "node", "kills": 1, "equal": 1}


def test_a_kill_that_came_too_late_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([{"equal": True}, None, {"equal": False}, {"equal": True}])
    monkeypatch.setattr(kill_ray, "SHARDS", 1)
    monkeypatch.setattr(kill_ray, "cluster", lambda: nullcontext())
    monkeypatch.setattr(kill_ray, "disturbed_run", lambda *_: next(found))
    assert list(kill_ray.kills(2, 0, tmp_path)) == [{"equal": True}, {"equal": False}]
