"""The shipped CLIP: its size, that open_clip loads it, what it can tell apart, and the script that makes it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks import train_glyph_clip
from synth_refine import class_prototypes
from synth_refine.images.encoders import ClipEncoder, open_clip_encoder
from synth_refine.synthetic.glyphs import render_glyphs


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    return open_clip_encoder(str(train_glyph_clip.FOLDER))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Real handwritten digits, (1797, 3, 32, 32) uint8, and their classes; the model has never seen one."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    small = np.rint(data.images * (255 / 16)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(one).resize((32, 32), Image.Resampling.LANCZOS)) for one in small])
    return torch.from_numpy(large)[:, None].repeat(1, 3, 1, 1), torch.from_numpy(data.target)


def test_it_is_small_and_its_config_is_the_script_s() -> None:
    files = {path.name: path for path in train_glyph_clip.FOLDER.iterdir()}
    assert set(files) == {"open_clip_config.json", "open_clip_model.safetensors"}
    assert files["open_clip_model.safetensors"].stat().st_size < 8_000_000
    assert json.loads(files["open_clip_config.json"].read_text()) == train_glyph_clip.CONFIG


def test_open_clip_loads_it_as_any_local_model(encoder: ClipEncoder) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{train_glyph_clip.FOLDER}")
    picture = render_glyphs("7", 1)[0]
    pixels: Callable[[Image.Image], Tensor] = preprocess
    with torch.no_grad():
        expected = model.eval().encode_image(pixels(Image.fromarray(picture[0].permute(1, 2, 0).numpy()))[None])
    torch.testing.assert_close(encoder.embed(picture), expected, atol=1e-4, rtol=1e-4)


def test_it_names_real_handwritten_digits(encoder: ClipEncoder, digits: tuple[Tensor, Tensor]) -> None:
    images, truth = digits
    features = F.normalize(encoder.embed(images), dim=1)

    def right(prototypes: Tensor) -> float:
        return ((features @ F.normalize(prototypes, dim=1).T).argmax(dim=1) == truth).double().mean().item()

    assert right(encoder.text_prototypes("0123456789", ["A photo of {}."])) > 0.6
    glyphs, labels = render_glyphs("0123456789", 20, detail=8)
    assert right(class_prototypes(encoder.embed(glyphs), labels, 10)) > 0.6


def test_distorted_glyphs_stay_pictures() -> None:
    glyphs = render_glyphs("38", 4)[0][:, 0].float() / 255
    torch.manual_seed(0)
    distorted = train_glyph_clip.distort(glyphs)
    assert distorted.shape == glyphs.shape
    assert 0 <= float(distorted.min()) < 0.2
    assert 0.6 < float(distorted.max()) <= 1
    assert not torch.equal(distorted, glyphs)


def test_no_two_captions_of_different_characters_are_equal() -> None:
    characters = "0123456789abcdefghjkmnpqrstuvwxyz"
    captions = [
        {caption.format(name) for name in train_glyph_clip.names_of(one)}
        for one in characters
        for caption in train_glyph_clip.CAPTIONS
    ]
    assert sum(map(len, captions)) == len(set().union(*captions))


@pytest.mark.slow
def test_the_script_trains_and_writes_what_open_clip_loads(tmp_path: Path) -> None:
    model = train_glyph_clip.train(steps=2, per_character=2, groups=1)
    train_glyph_clip.write(model, tmp_path / "glyph_clip")
    encoder = open_clip_encoder(str(tmp_path / "glyph_clip"))
    assert encoder.embed(render_glyphs("1", 2)[0]).shape == (2, 64)
    assert math.isfinite(float(encoder.text_prototypes(["1"]).sum()))
