"""Whatever comes from a model's folder is data: no code of it runs, and nobody is asked whether it may."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_encode import TINY_CLIP

from benchmarks.train_glyph_clip import FOLDER
from synth_refine import InputError
from synth_refine.images.encoders import encoder_by_name
from synth_refine.images.foreign import no_foreign_code
from synth_refine.synthetic.text_to_image import TextToImage

pytest.importorskip("transformers")


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that foreign code would make; a question on the terminal fails the test."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "fired"


def poisoned(folder: Path, marker: Path, text_cfg: dict[str, Any], tokenizer: dict[str, Any]) -> Path:
    """A copy of a good CLIP folder with a tokenizer that brings Python of its own."""
    shutil.copytree(FOLDER, folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= text_cfg
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own:\n    pass\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "own"}))
    return folder


AUTO_MAP = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
TRUSTING = {"hf_tokenizer_name": "own", "tokenizer_kwargs": {"trust_remote_code": True}}


@pytest.mark.parametrize(
    ("text_cfg", "tokenizer", "key"),
    [
        (TRUSTING, AUTO_MAP, "auto_map|trust_remote_code"),
        (TRUSTING, {}, "trust_remote_code"),
        ({"hf_tokenizer_name": "own"}, AUTO_MAP, "auto_map"),
    ],
)
@pytest.mark.parametrize("on_hub", [False, True])
def test_an_encoder_runs_no_code_of_its_own(
    tmp_path: Path,
    marker: Path,
    monkeypatch: pytest.MonkeyPatch,
    text_cfg: dict[str, Any],
    tokenizer: dict[str, Any],
    key: str,
    on_hub: bool,
) -> None:
    folder = poisoned(tmp_path / "clip", marker, text_cfg, tokenizer)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setattr("synth_refine.images.weights._hub_answers", lambda: True)
    with pytest.raises(InputError, match=f"^model: .* asks to run code of its own with '({key})'") as caught:
        encoder_by_name("open_clip:hf-hub:some/body" if on_hub else str(folder))
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_a_text_tower_elsewhere_runs_no_code_either(tmp_path: Path, marker: Path) -> None:
    other = poisoned(tmp_path / "other", marker, {}, {})
    own = {"AutoConfig": "own.Own", "AutoModel": "own.Own"}
    (other / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    folder = tmp_path / "clip"
    shutil.copytree(FOLDER, folder)
    config = json.loads(json.dumps(TINY_CLIP))
    config["model_cfg"]["text_cfg"] = {"hf_model_name": str(other), "hf_tokenizer_name": str(other)}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        encoder_by_name(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["own", "Own"]},
        {"_class_name": "StableDiffusionPipeline", "unet": ["own", "Own"]},
        {"_class_name": "StableDiffusionPipeline", "custom_pipeline": "own"},
    ],
)
def test_a_pipeline_runs_no_code_of_its_own(tmp_path: Path, marker: Path, index: dict[str, Any]) -> None:
    folder = poisoned(tmp_path / "pipeline", marker, {}, {})
    (folder / "pipeline.py").write_text((folder / "own.py").read_text())
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="^model: .*model_index.json asks to run code of its own with "):
        TextToImage(str(folder)).load()
    assert not marker.exists()


def test_where_a_library_finds_another_way_nothing_runs(tmp_path: Path, marker: Path) -> None:
    from diffusers.utils import dynamic_modules_utils as of_diffusers
    from transformers import dynamic_module_utils as of_transformers

    folder = poisoned(tmp_path / "clip", marker, {}, {})
    before = of_transformers.get_class_in_module, of_diffusers.get_class_in_module
    with no_foreign_code():
        with pytest.raises(ValueError, match="never run"):
            of_transformers.get_class_from_dynamic_module("own.Own", str(folder))
        with pytest.raises(ValueError, match="never run"):
            of_diffusers.get_class_from_dynamic_module(str(folder), "own.py")
    assert (of_transformers.get_class_in_module, of_diffusers.get_class_in_module) == before
    assert not marker.exists()
