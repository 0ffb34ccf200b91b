"""Sets of synthetic images: the real diffusers code on a tiny random pipeline, kills, changed settings, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import content, kill_matrix
from PIL import Image

from synth_refine import InputError
from synth_refine._io.atomic import file_hash
from synth_refine.images import weights
from synth_refine.synthetic import generate
from synth_refine.synthetic.generate import generate_images, generator_by_name, say_withheld
from synth_refine.synthetic.glyphs import Glyphs, render_glyphs
from synth_refine.synthetic.jobs import Job
from synth_refine.synthetic.text_to_image import TextToImage

CLASSES = {"cat": "tabby cat", "dog": "dog"}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed loses nothing the system has taken over, so waiting for the disk proves nothing here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline with random weights and a vocabulary of letters, in a folder."""
    pytest.importorskip("transformers")
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("tiny")
    letters = [*"abcdefghijklmnopqrstuvwxyz.", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz.")]
    words = {word: number for number, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=32)
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipeline = StableDiffusionPipeline(
        vae,
        CLIPTextModel(text),
        tokenizer,
        unet,
        DDIMScheduler(steps_offset=1, clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def drawer(tiny: Path, **options: Any) -> TextToImage:
    return TextToImage(str(tiny), **{"size": 16, "batch_size": 3, **options})


def lines(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def test_the_manifest_tells_where_every_image_comes_from(tiny: Path, tmp_path: Path) -> None:
    templates = ["A photo of {category}.", "a {category} on grass"]
    manifest = generate_images(tmp_path / "set", CLASSES, drawer(tiny), per_class=3, templates=templates, seed=7)
    entries = lines(manifest)
    assert [entry["file"] for entry in entries] == [f"{name}/{index:05d}.png" for name in CLASSES for index in range(3)]
    assert [entry["prompt"] for entry in entries[:3]] == [
        "A photo of tabby cat.",
        "a tabby cat on grass",
        "A photo of tabby cat.",
    ]
    assert {entry["model"] for entry in entries} == {str(tiny)}
    assert len({entry["seed"] for entry in entries}) == 6
    revision = entries[0]["revision"]
    assert len(revision) == 64
    for entry in entries:
        path = tmp_path / "set" / entry["file"]
        assert entry["sha256"] == file_hash(path)
        assert entry["class"] == path.parent.name
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("RGB", (16, 16))
    assert len({entry["sha256"] for entry in entries}) == 6


def test_the_pipeline_gets_the_prompts_steps_guidance_and_seeds(tiny: Path) -> None:
    ours = drawer(tiny, steps=2, guidance=1.5)
    ours.load()
    jobs = [Job(0, index, 5, "cat", "cat", "A photo of cat.") for index in range(2)]
    from diffusers import AutoPipelineForText2Image

    automatic: Any = AutoPipelineForText2Image
    theirs = automatic.from_pretrained(tiny)
    theirs.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(job.seed) for job in jobs]
    expected = theirs(
        ["A photo of cat."] * 2, generator=seeds, num_inference_steps=2, guidance_scale=1.5, height=16, width=16
    ).images
    for image, other in zip(ours.generate(jobs), expected, strict=True):
        assert image is not None
        assert np.array_equal(np.asarray(image), np.asarray(other))


def test_default_is_sdxl_turbo_as_the_paper_used_it() -> None:
    about = generator_by_name(generate.SDXL_TURBO).about
    assert about["model"] == "stabilityai/sdxl-turbo"
    assert (about["steps"], about["guidance"], about["size"], about["variant"]) == (1, 0.0, 512, "fp16")
    assert generate.TEMPLATES == ("A photo of {category}.",)
    assert generate.PER_CLASS == 100


@pytest.mark.parametrize("model", ["glyps", ""])
def test_an_unknown_model_is_refused_with_the_names_that_there_are(model: str) -> None:
    message = f"model: expected glyphs, a name on the hub as owner/name, such as .*, or a folder, got {model!r}$"
    with pytest.raises(InputError, match=message):
        generator_by_name(model)


def test_a_model_is_a_folder_or_a_name_with_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for model in ("mine", str(tmp_path / "mine"), "owner/name"):
        assert generator_by_name(model).about["model"] == model


def test_an_image_depends_on_run_seed_class_and_index_alone() -> None:
    seeds = {Job(label, index, seed, "", "", "").seed for label in range(3) for index in range(3) for seed in range(3)}
    assert len(seeds) == 27
    assert Job(1, 2, 3, "a", "b", "c").seed == Job(1, 2, 3, "x", "y", "z").seed
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.slow
def test_killed_at_every_point_and_resumed_equals_uninterrupted(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = drawer(tiny, batch_size=1)
    revision = generator.load()
    monkeypatch.setattr(generator, "load", lambda: revision)
    assert kill_matrix(tmp_path, lambda folder: generate_images(folder, CLASSES, generator, per_class=1)) > 30


def test_a_lost_and_a_damaged_image_are_generated_again(tiny: Path, tmp_path: Path) -> None:
    generate_images(tmp_path, CLASSES, drawer(tiny), per_class=2)
    expected = content(tmp_path)
    (tmp_path / "cat" / "00000.png").unlink()
    (tmp_path / "cat" / "00001.png").write_bytes(b"else")
    generate_images(tmp_path, CLASSES, drawer(tiny), per_class=2)
    assert content(tmp_path) == expected


def test_a_finished_set_needs_no_model(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_images(tmp_path, CLASSES, drawer(tiny), per_class=1)
    expected = content(tmp_path)
    monkeypatch.setattr(TextToImage, "load", lambda self: pytest.fail("loaded"))
    generate_images(tmp_path, CLASSES, drawer(tiny), per_class=1)
    assert content(tmp_path) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": ["A painting of {category}."]}, "got other templates"),
        ({"classes": {"cat": "cat", "dog": "dog"}}, "got other classes"),
        ({"seed": 1}, "got another seed: 1 for 0"),
        ({"per_class": 2}, "got other per_class: 2 for 1"),
        ({"generator": Glyphs(16)}, "got another generator"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_mixed(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"classes": {"cat": "c", "dog": "d"}, "generator": Glyphs(8), "per_class": 1}
    generate_images(tmp_path, **arguments)
    expected = content(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        generate_images(tmp_path, **{**arguments, **change})
    assert "\n" not in str(caught.value)
    assert content(tmp_path) == expected


def test_another_revision_of_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_images(tmp_path, ["a", "b"], Glyphs(8), per_class=1)
    (tmp_path / "a" / "00000.png").unlink()
    monkeypatch.setattr(Glyphs, "load", lambda self: "another")
    with pytest.raises(InputError, match="expected the model's revision pillow"):
        generate_images(tmp_path, ["a", "b"], Glyphs(8), per_class=1)


def test_a_folder_with_other_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "mine.jpg")
    for _ in range(2):
        with pytest.raises(InputError, match=r"folder: expected a new or empty folder, but .* holds a; take"):
            generate_images(tmp_path, ["a"], Glyphs(8), per_class=1)
        assert list(content(tmp_path)) == ["a/mine.jpg"]
    generate_images(tmp_path / "set", ["a"], Glyphs(8), per_class=1)
    (tmp_path / "a" / "mine.jpg").rename(tmp_path / "set" / "a" / "mine.TIF")
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"got mine\.TIF; take another folder"):
        generate_images(tmp_path / "set", ["a"], Glyphs(8), per_class=1)
    assert content(tmp_path) == before


def test_a_folder_of_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()
    generate_images(tmp_path, ["a"], Glyphs(8), per_class=1)
    (tmp_path / "settings.json").rename(tmp_path / "notes.txt")
    before = content(tmp_path)
    with pytest.raises(InputError, match="holds a; take another folder"):
        generate_images(tmp_path, ["a"], Glyphs(8), per_class=1)
    assert content(tmp_path) == before


def test_glyphs_are_those_of_render_glyphs(tmp_path: Path) -> None:
    generate_images(tmp_path, {"zero": "0", "one": "1"}, Glyphs(16), per_class=2, seed=3)
    expected, _ = render_glyphs("01", 2, size=16, seed=3)
    for place, name in enumerate(["zero/00000", "zero/00001", "one/00000", "one/00001"]):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert np.array_equal(np.asarray(image).transpose(2, 0, 1), expected[place].numpy())


class Shy:
    """Withholds every second image, as a safety checker may."""

    batch_size = 2
    about = {"model": "shy"}  # noqa: RUF012

    def load(self) -> str:
        return "1"

    def generate(self, jobs: Sequence[Job]) -> list[Image.Image | None]:
        return [None if job.index % 2 else Image.new("RGB", (4, 4)) for job in jobs]


def test_withheld_images_are_noted_and_left_out(tmp_path: Path) -> None:
    for _ in range(2):  # and not generated again
        entries = lines(generate_images(tmp_path, ["a"], Shy(), per_class=4))
    assert [entry["sha256"] is None for entry in entries] == [False, True, False, True]
    assert len(list(tmp_path.rglob("*.png"))) == 2
    said: list[str] = []
    say_withheld(tmp_path / "manifest.jsonl", said.append)
    assert "withheld 2 of 4 images (2 of a)" in said[0]


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    script = (
        "import sys; from synth_refine.synthetic.generate import Glyphs, generate_images\n"
        "g = Glyphs(8); g.batch_size = 2; generate_images(sys.argv[1], ['a', 'b'], g, per_class=4)"
    )
    (tmp_path / "draw.py").write_text(script)
    root = Path(generate.__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*arguments, str(tmp_path / "draw.py"), str(tmp_path / "two")], env=environment, check=True, capture_output=True
    )
    whole = Glyphs(8)
    whole.batch_size = 2
    generate_images(tmp_path / "one", ["a", "b"], whole, per_class=4)
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": []}, "classes: expected at least one, got none"),
        ({"templates": ["a photo"]}, "templates: expected {category} where the class goes, got 'a photo'"),
        ({"templates": []}, r"templates: expected a list of at least one prompt, got \[\]"),
        ({"templates": "{category}"}, "templates: expected a list of at least one prompt, got '{category}'"),
        ({"per_class": 0}, "per_class: expected 1 or more, got 0"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate_images(tmp_path, **{"classes": ["a"], "generator": Glyphs(8), **arguments})
    assert content(tmp_path) == {}


def test_a_pipeline_that_fails_is_one_clear_line(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model: .* failed while it generated images: .*divisible") as caught:
        generate_images(tmp_path, ["a"], drawer(tiny, size=12), per_class=1)
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_be_had_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"cannot be had here: .*give its path as --model") as caught:
        TextToImage(str(tmp_path)).load()
    assert "\n" not in str(caught.value)


def test_a_model_without_a_network_is_looked_for_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "_hub_answers", lambda: False)
    why = "model: owner/name cannot be had here: not in the cache, and the hub cannot be reached; fetch its folder"
    with pytest.raises(InputError, match=why):
        TextToImage("owner/name").load()
    assert capfd.readouterr() == ("", "")
