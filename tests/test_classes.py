"""The class table: noise by class, where labels go, classes that synthetic images cannot tell apart, one figure."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from synth_refine import cli, pipeline
from synth_refine.images.decode import Preprocess

CLASSES = ("cat", "dog", "fox", "car")
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [60, 60, 200]])  # fox and car look the same


class Means:
    """Features are the mean colours of four quarters."""

    id, preprocess = "means", Preprocess((16, 16), True, (0.0,) * 3, (1.0,) * 3, "bicubic")

    def embed(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images.float() / 255, 8).flatten(1)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """200 images, half of the cats among them given as dogs; foxes and cars cannot be told apart."""
    rng = np.random.default_rng(0)
    for name, count in (("photos", 200), ("drawn", 80)):
        for number in range(count):
            true = number % 4
            given = 1 if name == "photos" and true == 0 and number % 8 == 0 else true
            values = (
                COLOURS[true] + rng.normal(0, 25, (16, 16, 3)) + rng.normal(0, 12, (2, 2, 3)).repeat(8, 0).repeat(8, 1)
            )
            place = tmp_path / name / CLASSES[given] / f"{number:03d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(place)
    (tmp_path / "classes.yaml").write_text("".join(f"- {name}\n" for name in CLASSES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Means())
    return tmp_path


def rows(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in table["classes"]}


def test_a_run_says_what_is_wrong_with_which_class(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "run photos --synthetic drawn --classes classes.yaml --out out --workers 0 --device cpu"
    assert cli.main(command.split()) == 0
    summary = json.loads(capsys.readouterr().out)
    table = json.loads((source / "out" / "classes.json").read_text())
    found = rows(table)
    assert [found[name]["given"] for name in CLASSES] == [25, 75, 50, 50]
    noise = found["dog"]["noise"]
    assert noise["low"] <= 1 / 3 <= noise["high"]
    assert found["dog"]["goes_to"][0][0] == "cat"
    assert found["dog"]["goes_to"][0][1] == pytest.approx(25, abs=6)
    assert found["cat"]["comes_from"][0][0] == "dog"
    assert found["cat"]["synthetic_accuracy"] > 0.9 > 0.8 > found["fox"]["synthetic_accuracy"]
    assert {frozenset(pair[:2]) for pair in table["merge"]} == {frozenset(("fox", "car"))}
    parts = [one["noise"]["value"] * one["given"] for one in table["classes"]]
    assert sum(parts) / 200 == pytest.approx(summary["noise_before"]["value"], abs=0.01)
    assert table["health"]["value"] == pytest.approx(1 - summary["noise_before"]["value"])
    assert any(line == "ask to be merged: fox and car" for line in summary["classes"])
    page = (source / "out" / "report" / "report.html").read_text()
    assert "ask to be merged: fox and car" in page
    cells = re.sub(r"<[^>]+>", " ", page[page.index("Class by class") :]).split()
    assert "told" in cells
    assert f"{noise['value']:.1%}" in cells


def test_without_posteriors_only_what_is_known_is_said(source: Path) -> None:
    for place in sorted((source / "drawn" / "car").iterdir())[5:]:
        place.unlink()
    command = "run photos --synthetic drawn --classes classes.yaml --out out --workers 0 --refiner paper --device cpu"
    assert cli.main(command.split()) == 0
    table = json.loads((source / "out" / "classes.json").read_text())
    assert table["health"] is None
    assert all(one["noise"] is None and one["synthetic_accuracy"] is None for one in table["classes"])
    assert [one["name"] for one in table["classes"] if one["few"]] == ["car"]
