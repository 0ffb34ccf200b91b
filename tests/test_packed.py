"""Tar files, Parquet files and datasets of images; classes in YAML."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import data, noise, save, shard

from synth_refine import InputError
from synth_refine.images.listing import read_classes
from synth_refine.images.readers import From, part_of
from synth_refine.images.sources import open_images


def test_webdataset_shards_as_its_own_writer_makes_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"s-{number}.tar")) as writer:
            for row in range(2):
                writer.write({"__key__": f"{row:03d}", "png": data(noise(2 * number + row)), "cls": 1 - row})
    images = open_images(tmp_path, ["cat", "dog"])
    assert images.ids == ["s-0.tar/000", "s-0.tar/001", "s-1.tar/000", "s-1.tar/001"]
    assert images.labels.tolist() == [1, 0, 1, 0]
    for row in range(4):
        assert np.array_equal(np.asarray(images.image(row)), np.asarray(noise(row)))
    assert open_images(str(tmp_path / "s-*.tar")).ids == images.ids


def test_webdataset_labels_in_json_and_names_that_lead_elsewhere(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"../../x.png": data(noise(0)), "../../x.json": json.dumps({"label": "dog"}).encode()})
    images = open_images(tmp_path / "a.tar")
    assert images.classes == ("dog",)
    assert np.array_equal(np.asarray(images.image(0)), np.asarray(noise(0)))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:600])
    with pytest.raises(InputError, match="images: "):
        open_images(tmp_path / "a.tar")


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """The header of a tar member, whatever its size says."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (header("x", b"\xff" * 12, b"Z"), "a member of -1 bytes"),
        (header("x", b"\xff" * 11 + b"\x00", b"0"), "a member of -256 bytes"),
        (header("x", b"77777777777\0", b"L"), "a member of 8589934591 bytes"),
        (header("x", b"00000000000\0", b"S"), "a sparse member"),
        (header("x", b"77777777777\0"), "truncated in 'x'"),
        (b"", "cut off: it has no end-of-archive marker"),
        (b"\x01" * 512, "damaged at byte 2048"),
        (header("x", b"00000000041\0", b"x") + b"33 size=-5".ljust(512, b"\n") + header("x", b"0" * 11 + b"\0"), ""),
    ],
)
def test_a_damaged_tar_file_is_one_line_and_never_hangs(tmp_path: Path, damage: bytes, message: str) -> None:
    shard(tmp_path / "a.tar", {"x.png": b"1", "x.cls": b"0"})
    good = (tmp_path / "a.tar").read_bytes()[:2048]
    (tmp_path / "a.tar").write_bytes(good + damage)
    with pytest.raises(InputError, match=f"images: .*a.tar is no whole, uncompressed tar file: .*{message}") as caught:
        open_images(tmp_path / "a.tar")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cls", "json"])
def test_a_label_of_any_depth_or_length_is_one_line(tmp_path: Path, name: str) -> None:
    for text in (b"[" * 100_000, b'{"label": ' + b"9" * 5000 + b"}", b"9" * 5000):
        shard(tmp_path / "a.tar", {"x.png": b"1", f"x.{name}": text})
        if name == "cls" and not text.isdigit():
            continue
        with pytest.raises(InputError, match="images: ") as caught:
            open_images(tmp_path / "a.tar")
        assert len(str(caught.value)) < 600


def test_a_sample_twice_in_a_shard_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"x.png": data(noise(0)), "x.cls": b"0", "x.PNG": data(noise(1))})
    with pytest.raises(InputError, match=r"images: expected every sample once in .*a.tar, got 'x.PNG' again"):
        open_images(tmp_path / "a.tar")


def test_the_image_of_a_sample_is_not_its_mask(tmp_path: Path) -> None:
    parts = {"x.mask.png": data(noise(0)), "x.bmp": data(noise(1), "BMP"), "x.cls": b"0"}
    shard(tmp_path / "a.tar", parts)
    assert np.array_equal(np.asarray(open_images(tmp_path / "a.tar").image(0)), np.asarray(noise(1)))
    shard(tmp_path / "a.tar", {**parts, "x.png": data(noise(2))})
    with pytest.raises(InputError, match="images: expected one image in the sample x of .*, got bmp, png"):
        open_images(tmp_path / "a.tar")


def test_a_caption_is_no_label_where_there_is_one(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"x.png": data(noise(0)), "x.txt": b"a dog on a lawn", "x.json": b'{"label": "dog"}'})
    assert open_images(tmp_path / "a.tar").classes == ("dog",)


def test_a_label_that_is_missing_is_named_by_its_own_shard(tmp_path: Path) -> None:
    for number, label in enumerate((b"0", b"-1")):
        shard(tmp_path / f"{number}.tar", {"x.png": data(noise(number)), "x.cls": label})
    with pytest.raises(InputError, match=r"a label for every image in .*, got '-1' for '1\.tar/x'"):
        open_images(tmp_path)
    parts = {"x.jpg": data(noise(0), "JPEG"), "x.json": b'{"caption": "a cat", "width": 9}', "x.txt": b"a cat"}
    shard(tmp_path / "0.tar", parts)  # as img2dataset writes them
    with pytest.raises(InputError, match=r"0\.tar has no label in x\.json: .*got caption, width; put .* into x\.cls"):
        open_images(tmp_path / "0.tar")


@pytest.mark.parametrize(("label", "shown"), [(None, "null"), (True, "true"), (1.5, "1.5"), (["cat"], '["cat"]')])
def test_a_json_label_that_is_none_is_refused(tmp_path: Path, label: object, shown: str) -> None:
    shard(tmp_path / "a.tar", {"x.png": data(noise(0)), "x.json": json.dumps({"label": label}).encode()})
    with pytest.raises(
        InputError, match=r"a\.tar has no label in x\.json: .*expected a number or a name, got"
    ) as caught:
        open_images(tmp_path / "a.tar")
    assert shown in str(caught.value)


@pytest.mark.parametrize("source", ["pipe:cat x.tar", "https://example.org/x.tar"])
def test_no_program_is_started_and_nothing_fetched(source: str) -> None:
    with pytest.raises(InputError, match="images: expected local files"):
        open_images(source)


def test_a_dataset_in_memory_on_disk_and_as_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [{"bytes": data(noise(row)), "path": None} for row in range(5)], "label": [1, 0, 1, 1, 0]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    dataset.select(range(3)).to_parquet(str(tmp_path / "parquet" / "0.parquet"), batch_size=2)
    dataset.select(range(3, 5)).to_parquet(str(tmp_path / "parquet" / "1.parquet"))
    for source in (dataset, tmp_path / "saved", tmp_path / "parquet"):
        images = open_images(source)
        assert images.classes == ("cat", "dog")
        assert images.labels.tolist() == [1, 0, 1, 1, 0]
        for row in (4, 0, 2, 3, 1):
            assert np.array_equal(np.asarray(images.image(row)), np.asarray(noise(row)))
        assert open_images(source, ["dog", "cat"]).labels.tolist() == [0, 1, 0, 0, 1]
    with pytest.raises(InputError, match="image: expected the column picture in .*, got img, label"):
        open_images(tmp_path / "parquet", image="picture")
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(InputError, match="images: expected one split, got train"):
        open_images(tmp_path / "splits")


def test_two_columns_of_labels_are_asked_for_and_a_transform_is_taken_off(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = {name: datasets.ClassLabel(names=["cat", "dog"]) for name in ("label", "coarse")}
    features = datasets.Features({"img": datasets.Image(), **kinds})
    rows = {"img": [{"bytes": data(noise(0)), "path": None}], "label": [1], "coarse": [0]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    for source in (dataset, tmp_path / "a.parquet"):
        with pytest.raises(InputError, match="label: expected one column of labels in .*, got label, coarse; name one"):
            open_images(source)
        assert open_images(source, label="coarse").labels.tolist() == [0]
    dataset.set_transform(lambda rows: {"img": ["changed"] * len(rows["img"])})
    assert np.array_equal(np.asarray(open_images(dataset, label="label").image(0)), np.asarray(noise(0)))


def test_metadata_of_a_parquet_file_may_hold_anything(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [data(noise(0))], "label": [0]})

    def note(names: object) -> bytes:
        kind = {"names": names, "_type": "ClassLabel"}
        return json.dumps({"info": {"features": {"label": kind}}}).encode()

    for metadata in (b"[" * 100_000, b"9" * 5000, b"{}", note("cat"), note([])):
        pq.write_table(table.replace_schema_metadata({b"huggingface": metadata}), tmp_path / "a.parquet")
        assert open_images(tmp_path / "a.parquet").classes == ("0",)
    pq.write_table(table.replace_schema_metadata({b"huggingface": note(["a", "a", "b"])}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="images: classes in .*: expected every id once, got 'a' 2 times"):
        open_images(tmp_path / "a.parquet")


def test_shards_beside_class_folders_are_asked_about(tmp_path: Path) -> None:
    save(tmp_path, "cat/1.png")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="expected shards or a folder per class in .*, got metadata.parquet beside"):
        open_images(tmp_path)


@pytest.mark.parametrize("names", [["dog", "cat"], ["cat", "dog", "cow"], ["cat"]])
def test_parquet_shards_that_number_their_classes_otherwise_are_refused(tmp_path: Path, names: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    for number, classes in enumerate([["cat", "dog"], names]):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
        rows = {"img": [{"bytes": data(noise(number)), "path": None}], "label": [0]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{number}.parquet"))
    with pytest.raises(InputError, match=r"images: expected the class .* of .*0\.parquet in .*1\.parquet too, got"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        ([], None, "expected a folder of images per class in .*, got no image"),
        (["a.png"], None, "expected one folder per class in .*, got the image a.png"),
        (["cat/1.png", "cow/1.png"], ["cat"], "expected the classes cat in .*, got 'cow' too"),
    ],
)
def test_bad_folders_are_one_clear_line(
    tmp_path: Path, names: list[str], classes: list[str] | None, message: str
) -> None:
    save(tmp_path, *names)
    with pytest.raises(InputError, match=message) as caught:
        open_images(tmp_path, classes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("- cat\n- 007\n- no\n- 12:30\n", {one: one for one in ("cat", "007", "no", "12:30")}),
        ("n01: tabby cat\nn02: dog\n", {"n01": "tabby cat", "n02": "dog"}),
    ],
)
def test_classes_with_and_without_what_prompts_say(tmp_path: Path, text: str, classes: dict[str, str]) -> None:
    (tmp_path / "classes.yaml").write_text(text)
    assert read_classes(tmp_path / "classes.yaml") == classes


@pytest.mark.parametrize(
    "text",
    ["cat", "&a [b]: *a", "- &a [b]\n- *a\n", "- [[a]]", "[]", "- a\n- a\n", "{a: [1]}", "- [", "- ''\n"],
)
def test_classes_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.yaml").write_text(text)
    with pytest.raises(InputError, match="classes"):
        read_classes(tmp_path / "classes.yaml")


def test_a_part_of_a_reader_reads_the_same_and_carries_no_more_than_its_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    names = [f"cat/{row:02d}.png" for row in range(12)]
    save(tmp_path / "in", *names)
    pictures = [(tmp_path / "in" / name).read_bytes() for name in names]
    table = pytest.importorskip("pyarrow").table({"image": pictures, "label": [0] * 12})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=5)
    with tarfile.open(tmp_path / "rows.tar", "w") as archive:
        for row in range(12):
            for ending, content in (("png", pictures[row]), ("cls", b"0")):
                member = tarfile.TarInfo(f"{row:02d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"image": pictures, "label": [0] * 12})
    saved.save_to_disk(tmp_path / "saved")
    for source in (*(tmp_path / name for name in ("in", "rows.parquet", "rows.tar")), saved):
        read = open_images(source).read
        assert read(11) == pictures[11]
        for rows in (range(12), range(3, 6), range(5, 10), range(11, 12)):
            part = part_of(read, rows)
            assert [part(row) for row in range(len(rows))] == [pictures[row] for row in rows]
        small, whole = (len(pickle.dumps(part_of(read, rows))) for rows in (range(11, 12), range(12)))
        assert small < whole
    read = part_of(open_images(tmp_path / "saved").read, range(5, 10))  # it stays a file, of which the place travels
    assert len(pickle.dumps(part_of(open_images(saved).read, range(12)))) > sum(map(len, pictures))
    assert len(pickle.dumps(read)) < sum(map(len, pictures[5:10]))
    assert [read(row) for row in range(5)] == pictures[5:10]
    read = From(open_images(tmp_path / "in").read, 7)
    assert read(2) == pictures[9]
