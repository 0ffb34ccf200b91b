"""Images of users: every source and every odd file is decoded rightly or stays a row that says why not."""

from __future__ import annotations

import io
import json
import os
import pickle
import platform
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import content, kill_matrix
from PIL import Image, ImageOps
from PIL import features as pillow
from torch import Tensor

from synth_refine import InputError
from synth_refine.images.batches import decoded_shard
from synth_refine.images.decode import FORMATS, decode, fitted
from synth_refine.images.embed import embed_folder, embed_images
from synth_refine.images.encoders import Preprocess
from synth_refine.images.hashes import content_hashes
from synth_refine.images.readers import From, HubRows, TarMembers, part_of
from synth_refine.images.sources import open_images, read_classes

RED = (250, 10, 20)


def data(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(seed: int, width: int = 12, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def close(image: Image.Image, color: tuple[int, int, int], most: int = 3) -> bool:
    return bool((abs(np.asarray(image).astype(int) - color) <= most).all())


# ---- decode ----


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels(kind: str) -> None:
    assert np.array_equal(np.asarray(decode(data(noise(0), kind))), np.asarray(noise(0)))


def test_a_path_and_bytes_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data(noise(0)))
    assert np.array_equal(np.asarray(decode(tmp_path / "a.png")), np.asarray(noise(0)))


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = decode(data(noise(0), "PNG", exif=exif))
    assert turned.size == (8, 12)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(noise(0)), -1))


def test_cmyk_is_converted() -> None:
    image = Image.new("RGB", (16, 16), RED).convert("CMYK")
    assert close(decode(data(image, "TIFF")), RED)
    assert decode(data(image, "JPEG")).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(decode(data(Image.fromarray(values), kind)))[0, :, 1].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)])
def test_eight_bits_in_a_wider_file_are_not_black(kind: str, dtype: type) -> None:
    values = np.array([[0, 100, 255]], dtype=dtype)
    assert np.asarray(decode(data(Image.fromarray(values), kind)))[0, :, 2].tolist() == [0, 100, 255]


def test_thirty_two_bits_are_scaled_as_sixteen_where_these_are_enough() -> None:
    wide = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.int32))
    assert np.asarray(decode(data(wide, "TIFF")))[0, :, 0].tolist() == [0, 1, 255]
    wider = Image.fromarray(np.array([[0, 65536]], dtype=np.int32))
    with pytest.raises(InputError, match="image: expected at most 16 bits per pixel, got values 0 to 65536"):
        decode(data(wider, "TIFF"))


def test_transparent_pixels_become_white_whatever_is_below_them() -> None:
    layer = Image.new("RGBA", (4, 4), (*RED, 0))
    layer.paste((*RED, 255), (0, 0, 2, 4))
    pixels = np.asarray(decode(data(layer)))
    assert (pixels[:, :2] == RED).all()
    assert (pixels[:, 2:] == 255).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    pixels = np.asarray(decode(data(palette, "PNG", transparency=1)))
    assert pixels[0].tolist() == [list(RED), [255, 255, 255]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 0, 250))]
    animated = data(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert close(decode(animated), RED)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_truncated_file_is_bad(kind: str) -> None:
    whole = data(noise(1, 64, 64), kind)
    with pytest.raises(InputError, match="image: ") as caught:
        decode(whole[: len(whole) * 2 // 3])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got empty"),
        (b"<!doctype html>", "got an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", "got a Git LFS pointer"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "got no image"),
        (b"hello", "got no image of a known format"),
    ],
)
def test_what_is_no_image_is_named(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode(content)


def test_an_enormous_image_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(InputError, match="expected at most 50 pixels, got 12x8"):
        decode(data(noise(0)), max_pixels=50)
    bomb = data(Image.new("1", (12_000, 12_000)))
    assert len(bomb) < 100_000
    with pytest.raises(InputError, match="expected at most 89478485 pixels, got 12000x12000"):
        decode(bomb)


def test_a_large_jpeg_is_decoded_at_a_fraction_that_is_large_enough() -> None:
    picture = noise(2, 8, 8).resize((800, 640), Image.Resampling.BICUBIC)
    whole = data(picture, "JPEG", quality=95)
    small = decode(whole, at_least=(64, 64))
    assert 128 <= small.height < 640
    preprocess = Preprocess(size=(64, 64))
    difference = np.asarray(fitted(small, preprocess)).astype(int) - np.asarray(fitted(decode(whole), preprocess))
    assert abs(difference).mean() < 2


def test_fitting_is_that_of_the_tensors() -> None:
    image = ImageOps.scale(noise(3), 6)
    preprocess = Preprocess(size=(16, 16))
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    expected = (preprocess(tensor)[0].permute(1, 2, 0) * 255).numpy()
    assert abs(np.asarray(fitted(image, preprocess)) - expected).max() <= 2
    assert fitted(image, Preprocess()) is image


# ---- sources ----


def save(folder: Path, *names: str) -> dict[str, bytes]:
    files = {}
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files[name] = data(noise(seed))
        (folder / name).write_bytes(files[name])
    return files


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


def shard(path: Path, samples: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


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
    ["cat", "&a [b]: *a", "- &a [b]\n- *a\n", "- [[a]]", "[]", "- ../up\n", "- a\n- a\n", "{a: [1]}", "- [", "- ''\n"],
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


# ---- features ----


class Mean:
    """Features are the mean colour."""

    id = "mean"

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self.preprocess, self.seen, self.fail_after = Preprocess(size), 0, 1 << 30

    def embed(self, images: Tensor) -> Tensor:
        if self.seen >= self.fail_after:
            raise KeyboardInterrupt
        self.seen += len(images)
        return images.float().mean(dim=(2, 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_stay_rows_and_say_why(tmp_path: Path, workers: int) -> None:
    names = [f"cat/{row:02d}.png" for row in range(20)]
    save(tmp_path / "in", *names)
    (tmp_path / "in" / names[3]).write_bytes(b"<html>")
    (tmp_path / "in" / names[7]).write_bytes(data(noise(7))[:100])
    (tmp_path / "in" / names[8]).write_bytes(data(noise(8, 5, 5)))
    images = open_images(tmp_path / "in")
    features, bad = embed_images(Mean(), images, tmp_path / "kept", workers=workers, batch_rows=3)
    assert sorted(bad) == [3, 7, 8]
    assert "an HTML page" in bad[3]
    assert "truncated" in bad[7]
    assert bad[8] == "image: expected 12x8 pixels, as the first has, got 5x5"
    for row in range(20):
        if row in bad:
            assert np.isnan(features[row]).all()
        else:
            assert np.allclose(features[row], np.asarray(noise(row)).mean(axis=(0, 1)), atol=1e-3)


def test_a_damaged_page_and_a_cut_off_shard_are_bad_rows(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": [data(noise(row)) for row in range(6)], "label": ["cat"] * 6}
    place = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), place, row_group_size=2, compression="snappy", use_dictionary=False)
    start = pq.ParquetFile(place).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(place.read_bytes())
    content[start : start + 64] = b"\xff" * 64
    place.write_bytes(content)
    images = open_images(place)
    features, bad = embed_images(Mean(), images, tmp_path / "kept", workers=1)
    assert sorted(bad) == np.flatnonzero(np.isnan(features).any(axis=1)).tolist() == [2, 3]
    assert "image: row group 1 of " in bad[2]
    assert "a.parquet cannot be read" in bad[3]

    shard(tmp_path / "b.tar", {f"{row}.{end}": part for row in range(3) for end, part in parts(row).items()})
    images = open_images(tmp_path / "b.tar")
    assert isinstance(images.read, TarMembers)
    os.truncate(tmp_path / "b.tar", images.read.places[2][1] + 5)
    _, bad = embed_images(Mean(), images, tmp_path / "kept")
    assert list(bad) == [2]
    assert re.search(r"b\.tar was cut off: expected \d+ bytes from byte \d+ on, got 5", bad[2])


def test_what_a_node_does_not_see_is_no_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["cat/0.png", "cat/1.png"]
    save(tmp_path / "in", *names)
    (tmp_path / "in" / names[1]).write_bytes(b"<html>")  # bad wherever it is read
    monkeypatch.chdir(tmp_path)
    read = open_images("in").read
    options: dict[str, Any] = {"preprocess": None, "size": (8, 12)}
    rows = {7: range(2)}
    [(number, _, good)] = decoded_shard((rows, read, names), **options)
    assert (number, good.tolist()) == (7, [True, False])
    (tmp_path / "in" / names[0]).unlink()
    [(_, _, good)] = decoded_shard((rows, read, [None, *names[1:]]), **options)
    assert good.tolist() == [False, False]
    seen = rf"^engine: cat/0\.png cannot be read on node {re.escape(platform.node())}: image: .*No such file.*0\.png$"
    with pytest.raises(InputError, match=seen):
        list(decoded_shard((rows, read, names), **options))


def test_a_cluster_is_told_which_images_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in", "cat/0.png", "cat/1.png", "cat/2.png")
    images = open_images(tmp_path / "in")
    (tmp_path / "in" / "cat" / "1.png").unlink()
    asked = []

    def on_cluster(items: Any, task: Any, _: str | None, *, actor: Any = None, device: str = "") -> Iterator[Any]:
        results = (result for item in reversed(items) for result in task(item))
        if actor is not None:
            asked.extend(names for _, _, names in items)
            results = map(actor("cpu"), results)
        yield from results

    for module in ("embed", "hashes"):
        monkeypatch.setattr(f"synth_refine.images.{module}.on_cluster", on_cluster)
        monkeypatch.setattr(f"synth_refine.images.{module}.check_engine", lambda _: None)
    options: dict[str, Any] = {"shard_rows": 2, "engine": "ray"}
    assert content_hashes(images, **options) == content_hashes(images)
    _, bad = embed_images(Mean(), images, tmp_path / "kept", make=lambda **_: Mean(), batch_rows=2, **options)
    assert asked == [["cat/0.png", None], ["cat/2.png"]]
    assert list(bad) == [1]


def test_an_image_that_one_node_alone_cannot_read_has_no_empty_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "cat/0.png", "cat/1.png", "cat/2.png")
    monkeypatch.setattr("synth_refine.images.hashes.check_engine", lambda _: None)
    monkeypatch.setattr(
        "synth_refine.images.hashes.on_cluster", lambda *_: [(1, [""], "other"), (0, ["", ""], "other")]
    )
    with pytest.raises(InputError, match=r"^engine: cat/2\.png cannot be read on node other$"):
        content_hashes(open_images(tmp_path), shard_rows=2, engine="ray")


def test_a_row_that_a_dataset_cannot_give_is_a_bad_row() -> None:
    with pytest.raises(InputError, match="image: row 3 of the dataset cannot be read, KeyError"):
        HubRows({3: {"img": b""}}, "image")(3)


def parts(row: int) -> dict[str, bytes]:
    return {"png": data(noise(row)), "cls": b"0"}


def test_a_file_that_fails_while_it_is_read_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    save(tmp_path, "cat/1.png", "cat/2.png")
    images = open_images(tmp_path)
    monkeypatch.setattr(
        "synth_refine.images.readers.open_plain",
        lambda _, path: (Failing if path.name == "1.png" else io.BytesIO)(path.read_bytes()),
    )
    assert content_hashes(images)[0] == ""
    _, bad = embed_images(Mean(), images, tmp_path / "kept")
    assert bad == {0: f"image: cannot be read, Input/output error: {tmp_path / 'cat' / '1.png'}"}


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "cat/1.png", "dog/2.png")
    scan = os.scandir

    def refusing(path: str) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"images: cannot be read, Permission denied: .*dog"):
        open_images(tmp_path)


def test_images_of_any_size_come_to_the_size_of_the_encoder(tmp_path: Path) -> None:
    for row, size in enumerate([(40, 20), (16, 16), (9, 30)]):
        (tmp_path / "in" / "cat").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, RED).save(tmp_path / "in" / "cat" / f"{row}.png")
    features, bad = embed_images(Mean((16, 16)), open_images(tmp_path / "in"), tmp_path / "kept")
    assert not bad
    assert np.allclose(features, RED, atol=0.1)


def test_features_are_kept_and_an_interrupted_run_resumes(tmp_path: Path) -> None:
    save(tmp_path / "in", *(f"cat/{row:02d}.png" for row in range(20)))
    images = open_images(tmp_path / "in")
    encoder = Mean()
    encoder.fail_after = 12
    with pytest.raises(KeyboardInterrupt):
        embed_images(encoder, images, tmp_path / "kept", batch_rows=4)
    fresh = Mean()
    features, _ = embed_images(fresh, images, tmp_path / "kept", batch_rows=4)
    assert fresh.seen == 8  # the first three batches are there
    assert np.array_equal(embed_images(fresh, images, tmp_path / "kept", batch_rows=4)[0], features)
    assert fresh.seen == 8
    (tmp_path / "in" / "cat" / "00.png").write_bytes(data(noise(99)))
    other, _ = embed_images(fresh, images, tmp_path / "kept", batch_rows=4)
    assert not np.array_equal(other[0], features[0])
    assert np.array_equal(other[1:], features[1:])


@pytest.mark.slow
def test_embed_killed_at_every_point_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in", *(f"cat/{row:02d}.png" for row in range(5)))
    (tmp_path / "in" / "cat" / "03.png").write_bytes(b"<html>")
    monkeypatch.setattr("synth_refine.images.embed.KEEP_SECONDS", 0.0)  # every batch is kept at once
    images = open_images(tmp_path / "in")
    assert kill_matrix(tmp_path, lambda folder: embed_folder(Mean(), images, folder, batch_rows=2)) > 60


def test_a_folder_of_features_takes_no_other_images_labels_or_encoder(tmp_path: Path) -> None:
    save(tmp_path / "in", "cat/0.png", "cat/1.png", "dog/2.png")
    images = open_images(tmp_path / "in")
    embed_folder(Mean(), images, tmp_path / "out")
    before = content(tmp_path / "out")
    assert set(before) >= {"features.npy", "given.csv", "classes.yaml", "bad.csv", "manifest.jsonl"}
    assert embed_folder(Mean(), images, tmp_path / "out")["count"] == 3
    other = Mean()
    other.id = "other"
    (tmp_path / "in" / "cat" / "1.png").write_bytes(data(noise(99)))
    changed = open_images(tmp_path / "in")
    for encoder, source, name in (
        (other, images, "encoder"),
        (Mean(), changed, "images"),
        (Mean(), open_images(tmp_path / "in", ["dog", "cat"]), "images"),
    ):
        with pytest.raises(InputError, match=f"out: .* was begun with, got another {name}"):
            embed_folder(encoder, source, tmp_path / "out")
    (tmp_path / "in" / "cat" / "1.png").write_bytes(data(noise(1)))
    with pytest.raises(InputError, match="out: .* was begun with, got another given"):
        embed_folder(Mean(), open_images(tmp_path / "in", ["dog", "cat"]), tmp_path / "out")
    with pytest.raises(InputError, match="holds cat; take another folder"):
        embed_folder(Mean(), changed, tmp_path / "in")
    assert content(tmp_path / "out") == before


def test_nothing_but_bad_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "1.png").write_bytes(b"")
    images = open_images(tmp_path / "in")
    for encoder in (Mean(), Mean((4, 4))):
        with pytest.raises(InputError, match="images: expected at least one that can be decoded, got"):
            embed_images(encoder, images, tmp_path / "kept")
    assert content_hashes(images)[0]
