"""Folders and tables of images: names before positions, nothing passed over in silence."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import RED, close, data, noise, save, shard
from PIL import Image
from PIL import features as pillow

from synth_refine import InputError
from synth_refine._io.csv import csv_bytes
from synth_refine.images.decode import FORMATS
from synth_refine.images.sources import open_images
from synth_refine.scale.tables import cut_shards


def test_a_folder_per_class(tmp_path: Path) -> None:
    files = save(tmp_path, "dog/b.png", "cat/a.PNG", "cat/deep/é=1.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "._a.png").write_bytes(b"of a Mac")
    images = open_images(tmp_path)
    assert images.ids == ["cat/a.PNG", "cat/deep/é=1.png", "dog/b.png"]
    assert images.labels.tolist() == [0, 0, 1]
    assert images.classes == ("cat", "dog")
    assert [images.read(row) for row in range(3)] == [files[one] for one in images.ids]
    assert open_images(tmp_path, ["dog", "bird", "cat"]).labels.tolist() == [2, 2, 0]


def test_names_are_in_natural_order_everywhere(tmp_path: Path) -> None:
    numbers = [str(number) for number in range(12)]
    save(tmp_path / "in", *(f"{number}/IMG_{row}.png" for number in numbers for row in (10, 2)))
    folder = open_images(tmp_path / "in")
    assert folder.classes == tuple(numbers)
    assert folder.ids[:3] == ["0/IMG_2.png", "0/IMG_10.png", "1/IMG_2.png"]
    (tmp_path / "in" / "t.csv").write_text(
        "path,label\n" + "".join(f"{one},{one.split('/')[0]}\n" for one in folder.ids)
    )
    table = open_images(tmp_path / "in" / "t.csv")
    assert (table.classes, table.labels.tolist()) == (folder.classes, folder.labels.tolist())
    for number in (2, 10):
        shard(tmp_path / f"s-{number}.tar", {"x.png": data(noise(0)), "x.cls": b"0"})
    assert open_images(str(tmp_path / "s-*.tar")).ids == ["s-2.tar/x", "s-10.tar/x"]


def test_splits_are_no_classes(tmp_path: Path) -> None:
    save(tmp_path / "d", "train/cat/1.png", "test/dog/1.png")
    with pytest.raises(InputError, match="images: expected one split, got test, train in .*; name its folder, such as"):
        open_images(tmp_path / "d")
    assert open_images(tmp_path / "d" / "train").classes == ("cat",)
    save(tmp_path / "v", "train/1.png", "bus/1.png")
    assert open_images(tmp_path / "v").classes == ("bus", "train")
    (tmp_path / "t").mkdir()
    for name in ("train-0", "test-0"):
        shard(tmp_path / "t" / f"{name}.tar", {"x.png": data(noise(0)), "x.cls": b"0"})
    with pytest.raises(InputError, match=r"images: expected one split in .*, got test, train; name its files, such as"):
        open_images(tmp_path / "t")
    assert len(open_images(tmp_path / "t" / "train*.tar").ids) == 1


def test_what_is_passed_over_is_said_with_counts(tmp_path: Path) -> None:
    save(
        tmp_path / "in", "cat/1.png", "cat/@eaDir/1.png", "cat/.thumbnails/1.png", "cat/._1.png", "$RECYCLE.BIN/x/1.png"
    )
    save(tmp_path / "elsewhere", "1.png")
    (tmp_path / "in" / "cat" / "2.heic").write_bytes(b"x")
    (tmp_path / "in" / "dog").mkdir()
    (tmp_path / "in" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    images = open_images(tmp_path / "in")
    assert images.ids == ["cat/1.png"]
    notes = "; ".join(images.notes)
    for part in (
        "passed over 4 system and hidden folders and files",
        "1 links to folders (1 more)",
        "1 files of other kinds (1 .heic); convert .heic files to .jpg",
        "1 class folders without images (1 dog)",
    ):
        assert part in notes


def test_names_that_look_alike_are_said(tmp_path: Path) -> None:
    save(tmp_path, "cat/1.png", "Cat/1.png", "caf\u00e9/1.png", "cafe\u0301/1.png", "dog/1.png")
    [note] = open_images(tmp_path).notes
    assert "'Cat' and 'cat'" in note
    assert "dog" not in note


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (["3", "17", "90"], None, (("3", "17", "90"), [0, 1, 2])),
        (["00", "01", "007"], None, (("00", "01", "007"), [0, 1, 2])),
        (["1", "0"], ["cat", "dog"], (("cat", "dog"), [1, 0])),
        (["1", "2"], ["1", "2", "3"], "got 1, which is the name of one class and the number of another, '2'"),
        (["1", "3"], ["1", "2", "3"], (("1", "2", "3"), [0, 2])),
        (["cat", ""], None, "expected a label for every image in .*, got '' for '1.*'"),
        (["0", "-1"], None, "expected a label for every image in .*, got '-1' for '1.*'"),
        (["cat", "NaN"], None, "expected a label for every image in .*, got 'NaN' for '1.*'"),
        (["cat", "?"], None, "expected a label for every image"),
        (["0", "9" * 5000], None, "expected labels of at most 6 digits in .*, got 99999999999999999999$"),
    ],
)
def test_labels_are_names_before_they_are_numbers(
    tmp_path: Path, labels: list[str], classes: list[str] | None, expected: Any
) -> None:
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"{row}.png,{one}\n" for row, one in enumerate(labels)))
    for row, one in enumerate(labels):
        shard(tmp_path / f"{row}.tar", {"x.png": b"1", "x.cls": one.encode()})
    for source in (tmp_path / "t.csv", str(tmp_path / f"{{0..{len(labels) - 1}}}.tar")):
        if isinstance(expected, str):
            with pytest.raises(InputError, match=expected):
                open_images(source, classes)
        else:
            images = open_images(source, classes)
            assert (images.classes, images.labels.tolist()) == expected


def test_a_table_for_people_is_read_or_told_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "t.CSV").write_text("path,label\na.png,cat\n\n\n")
    assert open_images(tmp_path / "t.CSV").ids == ["a.png"]
    (tmp_path / "t.CSV").write_text("path;label\na.png;cat\n")
    with pytest.raises(InputError, match="images: expected commas between the cells of .*, got ';'"):
        open_images(tmp_path / "t.CSV")


def test_every_usual_name_of_an_image_is_found(tmp_path: Path) -> None:
    names = ["1.jfif", "2.jpe", "3.pgm", "4.JPG", "5.apng"]
    kinds = ["JPEG", "JPEG", "PPM", "JPEG", "PNG"]
    (tmp_path / "cat").mkdir()
    for name, kind in zip(names, kinds, strict=True):
        (tmp_path / "cat" / name).write_bytes(data(Image.new("RGB", (8, 8), RED), kind))
    images = open_images(tmp_path)
    assert images.ids == [f"cat/{name}" for name in names]
    assert all(close(images.image(row), RED) for row in range(len(names)))


@pytest.mark.skipif("AVIF" not in FORMATS or not pillow.check("avif"), reason="needs a Pillow that decodes AVIF")
def test_avif_is_read_where_pillow_can(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.avif").write_bytes(data(Image.new("RGB", (8, 8), RED), "AVIF"))
    assert close(open_images(tmp_path).image(0), RED)


def test_a_name_that_is_not_utf8_is_refused_at_once(tmp_path: Path) -> None:
    save(tmp_path, "cat/1.png", "cat/caf\udce9.png")
    with pytest.raises(InputError, match=r"images: expected names in UTF-8, got b'cat/caf\\xe9\.png'; rename it"):
        open_images(tmp_path)


@pytest.mark.parametrize("label", ["names", "numbers"])
def test_a_table_of_paths_and_labels(tmp_path: Path, label: str) -> None:
    files = save(tmp_path, "x/2.png", "x/1.png")
    cells = ["dog", "cat"] if label == "names" else ["1", "0"]
    (tmp_path / "t.csv").write_text(f"path,label,by\nx/2.png,{cells[0]},me\nx/1.png,{cells[1]},you\n")
    images = open_images(tmp_path / "t.csv", ["cat", "dog"])
    assert images.ids == ["x/2.png", "x/1.png"]
    assert images.labels.tolist() == [1, 0]
    assert images.read(0) == files["x/2.png"]


def test_cifake_numbers_its_classes_in_the_names(tmp_path: Path) -> None:
    save(tmp_path / "FAKE", "1000.png", "1000 (2).png", "1001 (10).png")
    images = open_images(tmp_path, list("abcdefghij"))
    assert dict(zip(images.ids, images.labels.tolist(), strict=True)) == {
        "1000.png": 0,
        "1000 (2).png": 1,
        "1001 (10).png": 9,
    }


def test_shards_of_features_are_in_natural_order_too(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for number in range(12):
        for name, values in (("f", np.full((1, 2), number, np.float32)), ("g", np.array([0]))):
            (tmp_path / name).mkdir(exist_ok=True)
            np.save(tmp_path / name / f"img_emb_{number}.npy", values)
    shards = cut_shards(tmp_path / "f", tmp_path / "g", None, 10)
    assert [Path(one.features.path).stem for one in shards] == [f"img_emb_{number}" for number in range(12)]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(TEXT, TEXT, min_size=1, max_size=8), st.randoms())
def test_rows_in_any_order_give_the_same_labels_by_name_or_one_line(
    tmp_path: Path, rows: dict[str, str], random: Random
) -> None:
    """Whatever a table calls its images and classes, each image keeps the class that it has there."""
    found = []
    for _ in range(2):
        order = random.sample(sorted(rows), len(rows))
        (tmp_path / "t.csv").write_bytes(csv_bytes({"path": order, "label": [rows[one] for one in order]}))
        try:
            images = open_images(tmp_path / "t.csv")
        except InputError as error:
            found.append(str(error).splitlines()[1:])
            continue
        assert images.ids == order
        found.append({one: images.classes[label] for one, label in zip(images.ids, images.labels, strict=True)})
    assert found[0] == found[1]
    assert found[0] in (rows, [])
