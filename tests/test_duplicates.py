"""Copies among the images, in the test images and in the synthetic ones: found, listed, shown and removed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from synth_refine import cli, pipeline
from synth_refine._io.csv import read_csv
from synth_refine.images.decode import Preprocess

CLASSES = ("A", "O", "X")


class Coarse:
    """Features are coarse pixels."""

    id, preprocess = "coarse", Preprocess((32, 32), True, (0.0,) * 3, (1.0,) * 3, "bicubic")

    def embed(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images.float() / 255, 8).flatten(1)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder per class of real, synthetic and test pictures, of which no two are alike."""
    rng = np.random.default_rng(0)
    for name, count in (("photos", 60), ("drawn", 30), ("test", 12)):
        for number in range(count):
            small = rng.integers(0, 160, (6, 6, 3), dtype=np.uint8)
            small[number % 3 :: 3] += 90
            place = tmp_path / name / CLASSES[number % 3] / f"{number:02d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).resize((40, 40), Image.Resampling.BICUBIC).save(place)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Coarse())
    return tmp_path


def copy(old: Path, new: Path, **options: object) -> None:
    image = Image.open(old)
    image.resize((24, 24) if new.suffix == ".png" else image.size).save(new, **options)  # type: ignore[arg-type]


RUN = ["run", "photos", "--synthetic", "drawn", "--out", "out", "--workers", "0", "--device", "cpu", "--json"]


def test_copies_are_found_listed_shown_and_removed(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = source / "photos"
    (photos / "A" / "same.png").write_bytes((photos / "A" / "00.png").read_bytes())
    (photos / "O" / "other.png").write_bytes((photos / "X" / "02.png").read_bytes())
    copy(photos / "A" / "03.png", photos / "A" / "small.png")
    copy(photos / "O" / "04.png", photos / "X" / "jpeg.jpg", quality=60)
    assert cli.main(RUN) == 0
    assert json.loads(capsys.readouterr().out)["copies"] == {"groups": 4, "conflicting": 2, "synthetic": 0}
    assert cli.main(["check", "out", "--no-leakage"]) == 1  # nobody looked
    assert json.loads(capsys.readouterr().out)["conditions"][0]["value"] is None

    copy(photos / "X" / "05.png", source / "test" / "X" / "leak.jpg", quality=60)
    assert cli.main([*RUN, "--test", "test"]) == 0  # in the finished run: nothing else is done again
    said = json.loads(capsys.readouterr().out)
    assert said["copies"] == {"groups": 5, "conflicting": 2, "synthetic": 0, "test": 1}
    table = read_csv("duplicates", source / "out" / "duplicates.csv")
    found = list(zip(*(table[name] for name in ("group", "id", "split", "label", "kind")), strict=True))
    assert found == [
        ("1", "O/04.png", "images", "O", "near"),
        ("1", "X/jpeg.jpg", "images", "X", "near"),
        ("2", "O/other.png", "images", "O", "exact"),
        ("2", "X/02.png", "images", "X", "exact"),
        ("3", "X/05.png", "images", "X", "near"),
        ("3", "X/leak.jpg", "test", "X", "near"),
        ("4", "A/00.png", "images", "A", "exact"),
        ("4", "A/same.png", "images", "A", "exact"),
        ("5", "A/03.png", "images", "A", "near"),
        ("5", "A/small.png", "images", "A", "near"),
    ]
    assert all(float(one) > 0.975 for one in table["similarity"])

    summary = json.loads((source / "out" / "summary.json").read_text())
    noise = summary["noise_before"]["value"]
    for command, code, conditions in (
        (f"--max-noise {noise + 0.001}", 0, [["noise", noise, True]]),
        (f"--max-noise {noise - 0.001}", 1, [["noise", noise, False]]),
        ("--max-noise 1 --no-leakage", 1, [["noise", noise, True], ["leakage", 1, False]]),
    ):
        assert cli.main(["check", "out", *command.split()]) == code
        said = json.loads(capsys.readouterr().out)
        assert said["holds"] is (code == 0)
        assert [[one["name"], one["value"], one["holds"]] for one in said["conditions"]] == conditions
    assert cli.main(["check", "photos", "--no-leakage"]) == 3
    assert "result: expected the folder of a finished run" in capsys.readouterr().err
    for command, message in (("", "expected --max-noise"), ("--max-noise 5", "from 0 to 1, got '5'")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["check", "out", *command.split()])
        assert message in capsys.readouterr().err

    page = (source / "out" / "report" / "report.html").read_text()
    assert "Leakage: 1 test images are copies of given images; 5 groups of copies, 2 of them with different" in page
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])  # type: ignore[index]
    groups = dict(zip(shown["id"], shown["copy"], strict=True))
    assert {one: groups[one] for one in table["id"] if one in groups} == {
        one: int(group) for group, one, split, *_ in found if split == "images"
    }
    (source / "decisions.csv").write_text("id,given,decision,label\nA/same.png,A,remove,A\n")
    assert cli.main(["review", "out/refined", "decisions.csv", "--out", "reviewed"]) == 0
    assert cli.main(["apply", "reviewed", "--images", "photos", "--out", "cleaner"]) == 0
    assert not (source / "cleaner" / "A" / "same.png").exists()
    assert (photos / "A" / "same.png").exists()


def test_given_images_are_no_synthetic_images(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20):
        own = source / "photos" / CLASSES[number % 3] / f"{number:02d}.png"
        (source / "drawn" / CLASSES[number % 3] / f"{number:02d}.png").write_bytes(own.read_bytes())
    assert cli.main(RUN) == 3
    assert "synthetic: expected other images than the given ones, got 20 of 30" in capsys.readouterr().err
    for number in range(19):
        (source / "drawn" / CLASSES[number % 3] / f"{number:02d}.png").unlink()
    (source / "drawn" / "A" / "18.png").write_bytes((source / "drawn" / "A" / "21.png").read_bytes())
    assert cli.main([*RUN, "--out", "fewer"]) == 0
    assert json.loads(capsys.readouterr().out)["copies"] == {"groups": 1, "conflicting": 0, "synthetic": 1}
