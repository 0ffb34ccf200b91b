"""One image file to pixels: bytes in, (H, W, 3) uint8 out, upright and within limits."""

from __future__ import annotations

import io
import os
import warnings
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from synth_refine._io.check import InputError
from synth_refine._io.untrusted import what_is
from synth_refine.images.encoders import Preprocess
from synth_refine.images.readers import MOST_BYTES, _bytes

FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
    if name != "AVIF" or find_spec("PIL.AvifImagePlugin") is not None  # which Pillow has from 11.3 on
)
"""Decoders that Pillow may use. Others start programs (EPS) or are rarely tested against hostile files."""

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
}
"""Endings of names, in upper or lower case, by which images are found in folders and shards: the usual ones of these
formats. Which of them a file is, its content tells.
"""

THINNEST = 16  # a side that is longer than so many times the other is cut, before a picture is enlarged

MAX_PIXELS = 89_478_485
"""Pillow's own limit for a decompression bomb, where it only warns."""


def decode(
    source: bytes | str | os.PathLike[str],
    *,
    at_least: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode an image to RGB, upright, on white where it is transparent; the first frame of an animated one.

    Whole numbers of 16 or 32 bits per pixel are divided by 257, in every image alike; one with none above 255 is
    refused, as it would be black.

    Args:
        source: The bytes of a file, or its path.
        at_least: Height and width that are enough: a JPEG may be decoded at a fraction of its size that is still twice
            as large, which is several times as fast.
        max_pixels: Larger images are refused before they are decoded.

    Raises:
        InputError: Not an image of a known format, truncated, damaged or too large; one line says why.

    Example:
        >>> file = io.BytesIO()
        >>> Image.new("CMYK", (4, 2)).save(file, "JPEG")
        >>> image = decode(file.getvalue())
        >>> image.mode, image.size
        ('RGB', (4, 2))
    """
    if isinstance(source, bytes):
        data = source
    else:
        data = _bytes(source)
    if len(data) > MOST_BYTES:
        raise InputError(f"image: expected at most {MOST_BYTES} bytes, got {len(data)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow remarks on damaged metadata, which the pixels do not need
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise InputError(f"image: expected at most {max_pixels} pixels, got {image.width}x{image.height}")
                if at_least is not None:
                    image.draft("RGB", (2 * at_least[1], 2 * at_least[0]))
                image.load()
                return _rgb(_upright(image))
    except InputError:
        raise
    except UnidentifiedImageError as error:
        kind = what_is(data[:512]) or "no image of a known format"
        raise InputError(f"image: expected {', '.join(FORMATS)}, got {kind}") from error
    except Exception as error:  # a damaged file can fail in any way a decoder can
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"image: damaged or truncated, {text[:160]}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF block says; as it is where that is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged block can fail in any way
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # of 16 or 32 bits per pixel, of which Pillow takes the upper ones or clips them
        values = np.asarray(image)
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        if low < 0 or high > 65535:
            raise InputError(f"image: expected at most 16 bits per pixel, got values {low} to {high}")
        if 0 < high <= 255:
            raise InputError(f"image: expected 16 bits per pixel, got values to {high}; save it with 8 bits per pixel")
        return Image.fromarray(((np.arange(65536) + 128) // 257).astype(np.uint8)[values]).convert("RGB")
    if image.mode == "F":
        raise InputError("image: expected pixels in whole numbers, got floating-point ones, whose range is not known")
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        page = Image.new("RGB", layer.size, "white")
        page.paste(layer, mask=layer)
        return page
    return image.convert("RGB")


def fitted(image: Image.Image, preprocess: Preprocess | None) -> Image.Image:
    """An image resized and cut to the size that a network wants; unchanged where it wants none."""
    if preprocess is None or preprocess.size is None:
        return image
    height, width = preprocess.size
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    if (image.height, image.width) == (height, width) == preprocess.resized(height, width):
        return image
    if preprocess.crop:  # what will be cut off is not enlarged: a picture of 1 x 4,000,000 would fill the memory
        image = _cut_thin(image, THINNEST * max(1, -(-max(height, width) // min(height, width))))
    rows, columns = preprocess.resized(image.height, image.width)
    image = image.resize((columns, rows), filters[preprocess.interpolation])
    left, top = round((columns - width) / 2), round((rows - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _cut_thin(image: Image.Image, most: int) -> Image.Image:
    """The middle of a picture that is more than `most` times as long as it is wide."""
    short = min(image.size)
    cut = [min(side, short * most) for side in image.size]
    left, top = ((side - kept) // 2 for side, kept in zip(image.size, cut, strict=True))
    return image if cut == list(image.size) else image.crop((left, top, left + cut[0], top + cut[1]))
