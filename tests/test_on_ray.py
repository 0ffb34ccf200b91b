"""What stands between us and Ray, without a cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from synth_refine import on_ray


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
