"""Features of images on disk: bad rows say why, and a killed run resumes."""

from __future__ import annotations

import io
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kills import content, kill_matrix
from pictures import RED, data, noise, save, shard
from PIL import Image
from torch import Tensor

from synth_refine import InputError
from synth_refine.images.batches import decoded_shard
from synth_refine.images.embed import embed_folder, embed_images
from synth_refine.images.encoders import Preprocess
from synth_refine.images.hashes import content_hashes
from synth_refine.images.readers import HubRows, TarMembers
from synth_refine.images.sources import open_images


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
        monkeypatch.setattr(f"synth_refine.images.{module}.check_engine", lambda *_: None)
    options: dict[str, Any] = {"shard_rows": 2, "engine": "ray"}
    assert content_hashes(images, **options) == content_hashes(images)
    _, bad = embed_images(Mean(), images, tmp_path / "kept", make=lambda **_: Mean(), batch_rows=2, **options)
    assert asked == [["cat/0.png", None], ["cat/2.png"]]
    assert list(bad) == [1]


def test_an_image_that_one_node_alone_cannot_read_has_no_empty_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "cat/0.png", "cat/1.png", "cat/2.png")
    monkeypatch.setattr("synth_refine.images.hashes.check_engine", lambda *_: None)
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
        image = Image.new("RGB", size, RED)
        image.putpixel((size[0] // 2, size[1] // 2), (0, 0, 0))
        image.save(tmp_path / "in" / "cat" / f"{row}.png")
    features, bad = embed_images(Mean((16, 16)), open_images(tmp_path / "in"), tmp_path / "kept")
    assert not bad
    assert np.allclose(features, RED, atol=5)


def test_blank_pictures_are_bad_and_copies_have_the_same_features_to_the_last_bit(tmp_path: Path) -> None:
    save(tmp_path / "in", *(f"cat/{row:02d}.png" for row in range(6)))
    for row, copy in ((0, "cat/30.png"), (3, "dog/31.png")):
        (tmp_path / "in" / copy).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "in" / f"cat/{row:02d}.png", tmp_path / "in" / copy)
    Image.new("RGBA", (8, 8), (9, 8, 7, 0)).save(tmp_path / "in" / "cat" / "clear.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "in" / "cat" / "grey.png")

    class Counting(Mean):
        """Every batch gives other features, as rounding does."""

        def embed(self, images: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().embed(images) + self.calls

    images = open_images(tmp_path / "in")
    features, bad = embed_images(Counting(None), images, tmp_path / "kept", batch_rows=2)
    assert {images.ids[row]: reason for row, reason in bad.items()} == {
        "cat/clear.png": "image: expected something to see, got one colour everywhere: (255, 255, 255)",
        "cat/grey.png": "image: expected something to see, got one colour everywhere: (77, 77, 77)",
    }
    row_of = {one: row for row, one in enumerate(images.ids)}
    for one, copy in (("cat/00.png", "cat/30.png"), ("cat/03.png", "dog/31.png")):
        assert np.array_equal(features[row_of[one]], features[row_of[copy]])
    assert len(np.unique(features[np.isfinite(features).all(axis=1)], axis=0)) == 6


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
        with pytest.raises(InputError, match=f"out: .* was begun with, got (another|other) {name}"):
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
