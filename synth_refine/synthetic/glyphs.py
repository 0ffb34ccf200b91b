"""Rendered characters as synthetic images: a class name in, pixels out, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from synth_refine._io.check import InputError
from synth_refine.synthetic.jobs import Job

OTHER_SIGNS = {"LastResortHE-Regular.ttf", "cmex10.ttf", "cmsy10.ttf"}
"""Fonts that show something else at the code points of letters and digits."""

OVERSAMPLING = 4  # rendered at this many times the size; shrinking smooths the edges


def render_glyphs(
    texts: Sequence[str], per_class: int, *, size: int = 32, seed: int = 0, detail: int | None = None
) -> tuple[Tensor, Tensor]:
    """Render each text many times, light on dark, with the fonts that matplotlib carries.

    Font, size, proportions, position, rotation, shear, stroke thickness, blur and contrast are random for
    every image. Image `i` of a class does not depend on how many images or other classes there are. The same versions
    of Pillow and matplotlib give the same bytes.

    Args:
        texts: What the images of each class show, usually one character; C texts.
        per_class: Images per class.
        size: Height and width in pixels, 8 or more.
        seed: Not negative; another seed gives other images.
        detail: Pixels per side that the picture is shrunk to before it is enlarged to `size`, for the look of small
            originals; by default nothing is lost.

    Returns:
        Images, (C * per_class, 3, size, size) uint8, sorted by class, and their classes, (C * per_class,) int64.

    Raises:
        InputError: An argument is out of range, or no font has all the characters of a text.
        ImportError: matplotlib is not installed.

    Example:
        >>> images, labels = render_glyphs("01", per_class=3)
        >>> images.shape, labels.tolist()
        (torch.Size([6, 3, 32, 32]), [0, 0, 0, 1, 1, 1])
    """
    if len(texts) == 0:
        raise InputError("texts: expected at least one text, got none")
    detail = size if detail is None else detail
    _check_least(("per_class", per_class, 1), ("size", size, 8), ("detail", detail, 1), ("seed", seed, 0))
    if detail > size:
        raise InputError(f"detail: expected at most the size, {size}, got {detail}")

    images = np.empty((len(texts), per_class, size, size), dtype=np.uint8)
    for label, text in enumerate(texts):
        fonts = _fonts_with(text)
        for index in range(per_class):
            rng = np.random.default_rng(np.random.SeedSequence([seed, label, index]))
            images[label, index] = _glyph(text, fonts[rng.integers(len(fonts))], size, detail, rng)
    gray = torch.from_numpy(images).flatten(0, 1)  # (M, size, size)
    labels = torch.arange(len(texts)).repeat_interleave(per_class)
    return gray[:, None].repeat(1, 3, 1, 1), labels


def _check_least(*triples: tuple[str, int, int]) -> None:
    for name, value, lowest in triples:
        if value < lowest:
            raise InputError(f"{name}: expected {lowest} or more, got {value}")


def _glyph(text: str, font_file: Path, size: int, detail: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One picture, (size, size)."""
    canvas = OVERSAMPLING * size
    font = _font(font_file, 3 * canvas // 4)
    stroke = int(rng.integers(canvas // 64, 1 + canvas // 28))
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text, stroke_width=stroke))
    width, height = max(1, right - left), max(1, bottom - top)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font, stroke_width=stroke)

    # Stretch, lean and turn, then fill a box of random size; what is too wide for it is squeezed, up to a point.
    turn, lean, stretch = np.deg2rad(rng.uniform(-10, 10)), rng.uniform(-0.1, 0.3), rng.uniform(0.7, 1.1)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shape = rotation @ np.array([[stretch, -lean], [0, 1]])
    extent = np.abs(shape) @ (width, height)
    box = canvas * rng.uniform((0.55, 0.88), (0.8, 1.04))
    squeeze = np.clip(box[0] / extent[0] * extent[1] / box[1], 0.6, 1.0)
    shape, extent = np.diag([squeeze, 1]) @ shape, extent * (squeeze, 1)
    scale = (box / extent).min()
    centre = (canvas + rng.uniform(-0.4, 0.4, 2) * (canvas - scale * extent)) / 2
    inverse = np.linalg.inv(scale * shape)
    offset = np.array([width, height]) / 2 - inverse @ centre
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])  # Pillow asks where each target pixel comes from
    picture = mask.transform((canvas, canvas), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)

    picture = picture.filter(ImageFilter.GaussianBlur(canvas * rng.uniform(0, 0.012)))
    picture = picture.resize((detail, detail), Image.Resampling.BOX).resize((size, size), Image.Resampling.LANCZOS)
    dark, light = rng.uniform(0, 12), rng.uniform(215, 255)
    return np.rint(dark + np.asarray(picture) / 255 * (light - dark)).astype(np.uint8)


@lru_cache(maxsize=256)
def _font(path: Path, pixels: int) -> ImageFont.FreeTypeFont:
    # The basic layout is in every build of Pillow; the other one depends on a system library.
    return ImageFont.truetype(str(path), pixels, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1)
def _charmaps() -> dict[Path, frozenset[int]]:
    """The code points of each font, by file, in the order of the file names."""
    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font
    except ImportError as error:
        raise ImportError("glyphs are rendered with matplotlib's fonts: pip install 'synth-refine[bench]'") from error
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = sorted(path for path in folder.glob("*.ttf") if path.name not in OTHER_SIGNS)
    return {path: frozenset(FT2Font(str(path)).get_charmap()) for path in files}


def _fonts_with(text: str) -> list[Path]:
    if not text.strip():
        raise InputError(f"texts: expected something to show, got {text!r}")
    fonts = [path for path, codes in _charmaps().items() if codes.issuperset(map(ord, text))]
    if not fonts:
        raise InputError(f"texts: expected characters that a font of matplotlib has, got {text!r}")
    return fonts


class Glyphs:
    """Renders each category as text; see `render_glyphs`."""

    batch_size = 64

    def __init__(self, size: int = 32, detail: int | None = None) -> None:
        """Pictures of `size` x `size` pixels with the look of `detail` x `detail`."""
        _check_least(("size", size, 8), ("detail", size if detail is None else detail, 1))
        self.size, self.detail = size, size if detail is None else detail

    @property
    def about(self) -> dict[str, Any]:
        """Its name and sizes."""
        return {"model": "glyphs", "size": self.size, "detail": self.detail}

    def load(self) -> str:
        """The versions of the libraries that render."""
        import PIL

        _charmaps()
        import matplotlib

        return f"pillow {PIL.__version__}, matplotlib {matplotlib.__version__}"

    def generate(self, jobs: Sequence[Job]) -> list[Image.Image | None]:
        """The same pictures as `render_glyphs` gives for these classes and indices."""
        images: list[Image.Image | None] = []
        for job in jobs:
            rng, fonts = (
                np.random.default_rng(np.random.SeedSequence([job.run_seed, job.label, job.index])),
                _fonts_with(job.category),
            )
            pixels = _glyph(job.category, fonts[rng.integers(len(fonts))], self.size, self.detail, rng)
            images.append(Image.fromarray(pixels).convert("RGB"))
        return images
