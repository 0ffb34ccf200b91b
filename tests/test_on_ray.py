"""What stands between us and Ray, without a cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from synth_refine import InputError, on_ray


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
