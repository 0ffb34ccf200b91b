"""Pictures of every kind are decoded rightly, or refused in one line within bounds of memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import RED, close, data, noise
from PIL import Image, ImageOps

from synth_refine import InputError
from synth_refine.images.decode import decode, fitted
from synth_refine.images.encoders import Preprocess
from synth_refine.images.sources import open_images


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
def test_wide_pictures_have_one_scale_and_none_is_black_in_silence(kind: str, dtype: type) -> None:
    values = np.array([[0, 100, 255, 60_000]], dtype=dtype)
    assert np.asarray(decode(data(Image.fromarray(values), kind)))[0, :, 2].tolist() == [0, 0, 1, 233]
    with pytest.raises(InputError, match="image: expected 16 bits per pixel, got values to 255; save it with 8 bits"):
        decode(data(Image.fromarray(values[:, :3]), kind))


def test_a_damaged_exif_block_does_not_lose_good_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("tag")

    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    assert np.array_equal(np.asarray(decode(data(noise(0)))), np.asarray(noise(0)))


@pytest.mark.parametrize("size", [(1, 4_000_000), (30_000, 1), (1, 1)])
def test_thin_pictures_are_cut_before_they_are_enlarged(size: tuple[int, int]) -> None:
    picture = decode(data(Image.new("RGB", size, RED)))
    assert close(fitted(picture, Preprocess((224, 224))), RED)
    assert close(fitted(picture, Preprocess((224, 100), crop=False)), RED)


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(40 << 30)
    with pytest.raises(InputError, match="image: expected at most 268435456 bytes, got 42949672960"):
        decode(tmp_path / "large.png")


@pytest.mark.parametrize("path", ["/proc/kmsg", "/dev/zero", "/dev/kmsg", "pipe"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.csv").write_text(f"path,label\n{path},cat\n")
    images = open_images(tmp_path / "a.csv")
    with pytest.raises(InputError, match="^image"):
        images.image(0)


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
