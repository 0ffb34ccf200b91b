"""Any class names, file names and order: embed, refine, apply and revert give the same bytes, and labels go by name."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from synth_refine import cli, pipeline
from synth_refine._io.csv import csv_bytes, read_csv
from synth_refine.labels.artifact import read_artifact

# What a disk takes as a name and a scan does not pass over; names that look alike are told apart by no disk.
LETTERS = st.characters(exclude_characters="/\0", exclude_categories=["Cs"])
NAMES = st.text(LETTERS, min_size=1, max_size=12).filter(lambda name: not name.startswith(".") and name.strip() == name)
PLAIN = st.sampled_from(
    ["0", "1", "2", "10", "007", "no", "-zero", "=x", "'q", "a,b", "true", "cat ~", "train", "T.png"]
)
CLASSES = st.lists(
    NAMES | PLAIN, min_size=2, max_size=4, unique_by=lambda name: unicodedata.normalize("NFKC", name).casefold()
)


class Colours:
    """Features are the mean colour."""

    id, preprocess = "colours", None

    def embed(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "encoder_by_name", lambda *_, **__: Colours())
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "sync", lambda: None)


def picture(path: Path, colour: int, number: int) -> None:
    """A picture of one of four colours with some noise."""
    pixels = np.random.default_rng(number).integers(0, 60, (4, 4, 3), dtype=np.uint8)
    pixels[..., :2] += np.array([[20, 20], [180, 20], [20, 180], [180, 180]], dtype=np.uint8)[colour]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def done(*arguments: str) -> bool:
    """Whether a command did its work; if not, it said so in one line."""
    code = cli.main(list(arguments))
    assert code in (0, 3), arguments
    return code == 0


def labels_by_name(root: Path, real: str, synthetic: str, out: str, given_file: Path) -> dict[str, str] | None:
    """The refined class of every image; None where a line says that the files do not belong together."""
    at = [str(root / name) for name in (f"{real}/features.npy", f"{real}/classes.yaml", f"{synthetic}/features.npy")]
    more = ["--synthetic-labels", str(root / synthetic / "given.csv"), "--out", str(root / out), "--refiner", "paper"]
    arguments = ["--features", at[0], "--classes", at[1], "--synthetic", at[2], "--given", str(given_file), *more]
    if not done("refine", *arguments, "--threshold", "-1", "--weight", "1"):
        return None
    artifact = read_artifact(root / out)
    assert artifact.classes is not None
    return {one: artifact.classes[label] for one, label in zip(artifact.names, artifact.labels.tolist(), strict=True)}


@given(classes=CLASSES, files=st.lists(NAMES, min_size=3, max_size=6, unique_by=str.casefold), data=st.data())
@settings(deadline=None, max_examples=15, phases=[Phase.explicit, Phase.generate])  # to shrink takes minutes
def test_any_names_go_round_and_labels_go_by_name(classes: list[str], files: list[str], data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        root, number = Path(folder), 0
        for label, name in enumerate(classes):
            for file in files:
                number += 1
                wrong = data.draw(st.integers(0, 3)) == 0
                picture(root / "photos" / name / f"{file}.png", (label + wrong) % len(classes), number)
                picture(root / "drawn" / name / f"{file}.png", label, 1000 + number)
        orders = [classes, data.draw(st.permutations(classes)), data.draw(st.permutations(classes))]
        for place, order in enumerate(orders):
            (root / f"{place}.yaml").write_text(yaml.safe_dump(list(order), allow_unicode=True))
            names = ["--classes", str(root / f"{place}.yaml"), "--workers", "0", "--device", "cpu", "--out"]
            for kind in ("photos", "drawn"):
                if not done("embed", str(root / kind), *names, str(root / f"{kind}{place}")):
                    return  # one line: these names are not taken
        own = root / "photos0" / "given.csv"
        found = labels_by_name(root, "photos0", "drawn0", "refined", own)
        if found is None:
            return  # by chance no label agrees with its picture
        before = content(root / "photos")
        if done("apply", str(root / "refined"), "--images", str(root / "photos"), "--out", str(root / "new")):
            assert sorted(content(root / "new").values()) == sorted(before.values())
            assert done("revert", str(root / "refined"), "--images", str(root / "new"), "--out", str(root / "back"))
            assert content(root / "back") == before
        table = read_csv("given", own)
        order = data.draw(st.permutations(range(len(table["id"]))))
        (root / "shuffled.csv").write_bytes(csv_bytes({name: [table[name][row] for row in order] for name in table}))
        for real, synthetic, given_file in (
            ("photos0", "drawn0", root / "shuffled.csv"),
            ("photos1", "drawn1", root / "photos1" / "given.csv"),
            ("photos1", "drawn2", root / "photos1" / "given.csv"),
        ):
            again = labels_by_name(root, real, synthetic, f"refined-{real}-{synthetic}-{given_file.stem}", given_file)
            assert again in (None, found), synthetic
