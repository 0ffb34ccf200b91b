"""Rendered glyphs: what comes back, what an image depends on, and bad input; class names in folders of them."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from torch.nn import functional as F

from synth_refine import InputError
from synth_refine.images.sources import open_images
from synth_refine.synthetic import glyphs
from synth_refine.synthetic.generate import generate_images
from synth_refine.synthetic.glyphs import render_glyphs

pytest.importorskip("matplotlib")


def test_images_and_classes_have_the_promised_shape_and_order() -> None:
    images, labels = render_glyphs(["0", "7", "é", "ab"], 3, size=24)
    assert images.shape == (12, 3, 24, 24)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert_array_equal(images[:, 0], images[:, 2])


def test_an_image_depends_on_its_class_its_index_and_the_seed_alone() -> None:
    few, _ = render_glyphs("01", 2, seed=5)
    many, _ = render_glyphs("012", 4, seed=5)
    other, _ = render_glyphs("01", 2, seed=6)
    assert_array_equal(few, many[[0, 1, 4, 5]])
    assert all(not torch.equal(a, b) for a, b in zip(few, other, strict=True))


def test_no_two_images_are_equal_and_none_is_empty_or_flat() -> None:
    images, _ = render_glyphs("0123456789", 20, detail=8)
    assert len(np.unique(images.flatten(1).numpy(), axis=0)) == 200
    gray = images[:, 0].flatten(1).int()
    assert int((gray.amax(1) - gray.amin(1)).min()) > 100
    border = torch.cat([images[:, 0, :, 0], images[:, 0, :, -1]], dim=1)
    assert border.float().mean() < 40  # light on dark, inside the frame


def test_the_mean_image_of_a_class_resembles_its_own_class() -> None:
    images, _ = render_glyphs("0123456789", 40)
    pixels = images[:, 0].flatten(1).double()
    centred = (pixels - pixels.mean(0)).view(10, 40, -1)
    means, held_out = F.normalize(centred[:, :20].mean(1), dim=1), centred[:, 20:]
    right = (held_out @ means.T).argmax(2) == torch.arange(10)[:, None]
    assert right.double().mean() > 0.6  # chance is 0.1


def test_less_detail_is_smoother() -> None:
    fine, _ = render_glyphs("8", 10, size=32)
    coarse, _ = render_glyphs("8", 10, size=32, detail=8)

    def roughness(images: torch.Tensor) -> float:
        return float(images[:, 0].float().diff(n=2, dim=2).abs().mean())

    assert roughness(coarse) < 0.7 * roughness(fine)


def test_fonts_that_lack_the_sign_or_show_another_are_not_used() -> None:
    assert not {path.name for path in glyphs._fonts_with("5")} & glyphs.OTHER_SIGNS
    assert 0 < len(glyphs._fonts_with("☃")) < len(glyphs._fonts_with("5"))


def test_class_names_that_no_folder_can_have_get_one_and_a_table_that_is_kept(tmp_path: Path) -> None:
    """As in Fashion-MNIST, "T - shirt / top"; whoever reads the folder gets the names back."""
    names = ["T - shirt / top", "T - shirt _ top", "..", ".x", "x" * 300, "x" * 299, "@eaDir", "-zero"]
    classes = {name: str(number) for number, name in enumerate(names)}
    generate_images(tmp_path / "drawn", classes, glyphs.Glyphs(8), per_class=1)
    generate_images(tmp_path / "drawn", classes, glyphs.Glyphs(8), per_class=1)  # finished, and found so
    images = open_images(tmp_path / "drawn", names)
    assert sorted(images.labels.tolist()) == list(range(8))
    manifest = [json.loads(line) for line in (tmp_path / "drawn" / "manifest.jsonl").read_text().splitlines()]
    found = {one: names[label] for one, label in zip(images.ids, images.labels.tolist(), strict=True)}
    assert found == {entry["file"]: entry["class"] for entry in manifest}
    assert {one.split("/")[0] for one in found} > {"T - shirt _ top", "-zero"}
    assert set(open_images(tmp_path / "drawn").classes) == set(names)
    generate_images(tmp_path / "plain", ["a", "b"], glyphs.Glyphs(8), per_class=1)
    assert not list((tmp_path / "plain").glob("*.csv"))
    (tmp_path / "plain" / "class_folders.csv").write_text("folder,class\na,x\nb,x\n")
    with pytest.raises(InputError, match="images: class in .*: expected every id once, got 'x' 2 times"):
        open_images(tmp_path / "plain")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "texts: expected at least one text, got none"),
        ({"texts": ["a", " "]}, "texts: expected something to show, got ' '"),
        ({"texts": ["\U0010fff0"]}, "texts: expected characters that a font of matplotlib has"),
        ({"per_class": 0}, "per_class: expected 1 or more, got 0"),
        ({"size": 4}, "size: expected 8 or more, got 4"),
        ({"detail": 0}, "detail: expected 1 or more, got 0"),
        ({"detail": 64}, "detail: expected at most the size, 32, got 64"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        render_glyphs(**{"texts": ["0"], "per_class": 1, **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *rest: object, **options: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *rest, **options)  # type: ignore[arg-type]

    glyphs._charmaps.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'synth-refine\[bench\]'"):
        render_glyphs("0", 1)
