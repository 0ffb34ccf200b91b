"""What the benchmark of kills leaves behind when something fails, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kill_ray


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
