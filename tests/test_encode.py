"""Encoders: the id, preprocessing, loading without trust, the cache, and what happens offline."""

from __future__ import annotations

import json
import logging
import pickle
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from synth_refine import InputError
from synth_refine.images import weights as weights_module
from synth_refine.images.decode import fitted
from synth_refine.images.embed import embed_cached
from synth_refine.images.encoders import (
    DEFAULT,
    Preprocess,
    TorchEncoder,
    check_activation,
    module_encoder,
    open_clip_encoder,
    timm_encoder,
)
from synth_refine.images.hashes import images_hash
from synth_refine.images.weights import load_weights, read_weights

TINY_CLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}


def images(count: int = 10, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


class Pooled(nn.Module):
    """A classifier with pooled features, which takes uint8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def features(self, batch: Tensor) -> Tensor:
        pooled: Tensor = self.norm(self.convolution(batch / 255)).mean(dim=(2, 3))
        return pooled


@pytest.fixture
def classifier() -> Pooled:
    torch.manual_seed(0)
    return Pooled()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local CLIP with random weights, as anybody would hand one over."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**json.loads(json.dumps(TINY_CLIP["model_cfg"])))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(json.dumps(TINY_CLIP))
    return folder


# ---- embedding and the id ----


def test_pooled_features_do_not_depend_on_the_batch_size_or_the_mode(classifier: Pooled) -> None:
    classifier.train()
    encoder = TorchEncoder("pooled", classifier, None, batch_size=3)
    expected = Pooled.features(classifier.eval(), images())
    torch.testing.assert_close(encoder.embed(images()), expected)
    assert encoder.embed(images()).requires_grad is False


def test_id_changes_with_weights_preprocessing_and_name_alone(classifier: Pooled) -> None:
    first = TorchEncoder("one", classifier, None).id
    assert TorchEncoder("one", classifier, None, batch_size=1).id == first
    others = {
        TorchEncoder("other", classifier, None).id,
        TorchEncoder("one", classifier, None, normalise=True).id,
        TorchEncoder("one", classifier, Preprocess()).id,
        TorchEncoder("one", classifier, Preprocess(size=(8, 8))).id,
    }
    with torch.no_grad():
        classifier.norm.running_mean += 1  # type: ignore[operator]
    assert len(others | {first, TorchEncoder("one", classifier, None).id}) == 6


def test_the_weights_are_hashed_once(classifier: Pooled, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TorchEncoder("one", classifier, None)
    first = encoder.id
    monkeypatch.setattr(classifier, "state_dict", lambda: pytest.fail("hashed again"))
    assert encoder.id == first


def test_normalised_features_have_unit_length(classifier: Pooled) -> None:
    features = module_encoder("pooled", classifier, normalise=True).embed(images())
    torch.testing.assert_close(features.norm(dim=1), torch.ones(10))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 3, 4, 4), "images: expected a torch tensor of uint8, got torch.float32"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), r"images: expected shape \(N, 3, H, W\), got \(2, 4, 4, 3\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), "images: expected a torch tensor of uint8, got uint8"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "images: expected at least one, got none"),
    ],
)
def test_bad_images_are_named(classifier: Pooled, bad: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        module_encoder("pooled", classifier).embed(bad)


def test_features_that_are_not_finite_are_refused(classifier: Pooled) -> None:
    nn.init.constant_(classifier.convolution.weight, torch.nan)
    with pytest.raises(
        InputError, match=r"encoder: expected finite features \(N, D\) from pooled, got NaN or infinity"
    ):
        module_encoder("pooled", classifier).embed(images())


@pytest.mark.parametrize("size", [(20, 20), (40, 26), (26, 40), (375, 750)])
def test_preprocessing_agrees_with_open_clip_on_pictures(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    smooth = nn.functional.interpolate(torch.rand(1, 3, 5, 5, generator=generator), size, mode="bilinear")
    picture = (255 * smooth).to(torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    theirs = open_clip.image_transform(16, is_train=False, mean=mean, std=std)
    expected = theirs(Image.fromarray(picture[0].permute(1, 2, 0).numpy()))
    ours = Preprocess((16, 16), mean=mean, std=std)(picture)[0]
    torch.testing.assert_close(ours, expected, atol=1.01 / 255 / 0.2, rtol=0)  # one grey level, by rounding
    pillow = fitted(Image.fromarray(picture[0].permute(1, 2, 0).numpy()), Preprocess((16, 16)))
    exact = open_clip.image_transform(16, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)(
        Image.fromarray(picture[0].permute(1, 2, 0).numpy())
    )
    assert np.array_equal(np.asarray(pillow), (255 * exact).round().permute(1, 2, 0).numpy())


# ---- CLIP ----


def test_local_clip_goes_through_the_real_loading_code(clip_folder: Path) -> None:
    encoder = open_clip_encoder(str(clip_folder))
    model = open_clip.CLIP(**json.loads(json.dumps(TINY_CLIP["model_cfg"]))).eval()
    model.load_state_dict(load_file(clip_folder / "open_clip_model.safetensors"))
    with torch.no_grad():
        expected = model.encode_image((images() / 255 - 0.5) / 0.25)
    torch.testing.assert_close(encoder.embed(images()), expected)
    assert encoder.preprocess == Preprocess((16, 16), True, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert open_clip_encoder(f"local-dir:{clip_folder}").id == encoder.id


def test_the_default_encoder_is_openai_s_network_and_another_activation_is_refused() -> None:
    model, tag = DEFAULT.removeprefix("open_clip:").split("/")
    check_activation(model, tag, open_clip.get_model_config(model), open_clip.get_pretrained_cfg)
    assert open_clip.get_model_config(model)["quick_gelu"] is open_clip.get_pretrained_cfg(model, tag)["quick_gelu"]
    message = "'openai' were trained with QuickGELU, but ViT-L-14 computes with GELU; take ViT-L-14-quickgelu"
    with pytest.raises(InputError, match=message):
        open_clip_encoder("ViT-L-14", "openai")
    with pytest.raises(InputError, match="trained with GELU, but ViT-L-14-quickgelu computes with QuickGELU; take Vi"):
        open_clip_encoder("ViT-L-14-quickgelu", "laion2b_s32b_b82k")


@pytest.mark.parametrize("quick", [False, True])
def test_the_name_of_a_model_decides_the_activation_of_a_file(tmp_path: Path, quick: bool) -> None:
    """The graph, without weights of anybody: a block by hand, with the activation that the name says."""
    name = "tiny-quickgelu" if quick else "tiny"
    config = {**TINY_CLIP["model_cfg"], "quick_gelu": quick}
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.CLIP(**json.loads(json.dumps(config))).eval()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    encoder = open_clip_encoder(name, tmp_path / "w.safetensors")
    inputs = []
    mlp = encoder.module.visual.transformer.resblocks[0].mlp  # type: ignore[union-attr, index]
    mlp.register_forward_hook(lambda _, given, made: inputs.append((given[0], made)))  # type: ignore[union-attr]
    encoder.embed(images(2))
    [(given, made)] = inputs
    hidden = mlp.c_fc(given)  # type: ignore[union-attr]
    expected = hidden * torch.sigmoid(1.702 * hidden) if quick else nn.functional.gelu(hidden)
    torch.testing.assert_close(made, mlp.c_proj(expected))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_cfg": {**TINY_CLIP["model_cfg"]["vision_cfg"], "image_size": -1}}, "model|weights"),
        ({"preprocess_cfg": {"mean": [0.5, 0.5], "std": [1, 1, 1]}}, "model: expected three numbers as the mean in"),
        ({"preprocess_cfg": {"mean": [0.5, 0.5, "x"], "std": [1, 1, 1]}}, "model: expected three numbers as the mean"),
    ],
)
def test_odd_settings_of_a_folder_are_one_line(
    clip_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = {**TINY_CLIP, **{key: value for key, value in changes.items() if key != "vision_cfg"}}
    config["model_cfg"] = {**TINY_CLIP["model_cfg"], **{k: v for k, v in changes.items() if k == "vision_cfg"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.safetensors").write_bytes((clip_folder / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(InputError, match=message) as caught:
        open_clip_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_text_prototypes_are_mean_directions_of_the_prompts(clip_folder: Path) -> None:
    encoder = open_clip_encoder(str(clip_folder))
    prototypes = encoder.text_prototypes(["cat", "dog"], ["a {}", "the {}"])
    with torch.no_grad():
        texts = encoder.module.encode_text(open_clip.SimpleTokenizer(context_length=8)(["a dog", "the dog"]))  # type: ignore[operator]
    mean = nn.functional.normalize(texts, dim=1).mean(dim=0)
    torch.testing.assert_close(prototypes[1], mean / mean.norm())
    with pytest.raises(InputError, match=r"templates: expected \{\} where the class name goes, got 'a cat'"):
        encoder.text_prototypes(["cat"], ["a cat"])


def test_weights_only_file_loads_like_safetensors(clip_folder: Path, tmp_path: Path) -> None:
    weights = load_file(clip_folder / "open_clip_model.safetensors")
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "clip.pt")
    one, other = open_clip_encoder(str(clip_folder)), open_clip_encoder(str(clip_folder), tmp_path / "clip.pt")
    assert torch.equal(one.embed(images()), other.embed(images()))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "weights: .* cannot be read safely as weights: "),
        ("shapes", "weights: .* does not fit CLIP: size mismatch for "),
        ("missing", r"weights: .* does not fit CLIP: Missing key\(s\)"),
        ("nan", "weights: visual.proj in .* holds NaN or infinity"),
        ("html", "weights: expected safetensors or a torch state dict, but .* is an HTML page"),
        (
            "pickle",
            "weights: expected safetensors or a torch state dict, but .* is a Python pickle, which could run code",
        ),
        ("zipped pickle", "weights: .* cannot be read safely as weights: "),
        ("numpy", "weights: expected safetensors or a torch state dict, but .* is a NumPy array"),
    ],
)
def test_bad_weights_are_named_and_nothing_runs(clip_folder: Path, tmp_path: Path, damage: str, message: str) -> None:
    good = clip_folder / "open_clip_model.safetensors"
    file, fired = tmp_path / "weights.safetensors", tmp_path / "fired"
    weights = load_file(good)
    if damage == "truncated":
        file.write_bytes(good.read_bytes()[:-100])
    elif damage == "shapes":
        save_file(weights | {"visual.proj": torch.zeros(3, 3)}, file)
    elif damage == "missing":
        save_file({name: value for name, value in weights.items() if name != "visual.proj"}, file)
    elif damage == "nan":
        save_file(weights | {"visual.proj": torch.full_like(weights["visual.proj"], torch.nan)}, file)
    elif damage == "html":
        file.write_text("<!DOCTYPE html><title>404</title>")
    elif damage == "pickle":
        file.write_bytes(pickle.dumps(Bomb(fired)))
    elif damage == "zipped pickle":
        torch.save({"state_dict": Bomb(fired)}, file)
    else:
        with open(file, "wb") as target:
            np.save(target, np.zeros(3))
    with pytest.raises(InputError, match=message) as caught:
        open_clip_encoder(str(clip_folder), file)
    assert "\n" not in str(caught.value)
    assert not fired.exists()


def test_weights_that_cannot_be_fetched_are_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to the hub\nand many more lines")

    monkeypatch.setattr("open_clip.factory.download_pretrained", unreachable)
    monkeypatch.setattr(weights_module, "_hub_answers", lambda: True)
    with pytest.raises(
        InputError, match=r"weights: those of ViT-L-14-quickgelu \(openai\) cannot be had here: .*no route"
    ) as caught:
        open_clip_encoder("ViT-L-14-quickgelu", "openai")
    assert "\n" not in str(caught.value)
    assert "timm/vit_large_patch14_clip_224.openai" in str(caught.value)
    assert "give its path as --weights" in str(caught.value)


def test_without_a_network_the_cache_is_asked_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    requests: list[Any] = []
    get = huggingface_hub.get_session
    monkeypatch.setattr("huggingface_hub.get_session", lambda: requests.append(None) or get())
    levels = [logging.getLogger(name).level for name in ("", "huggingface_hub")]
    for make, source in (
        (lambda: timm_encoder("test_resnet.r160_in1k"), "test_resnet.r160_in1k"),
        (lambda: open_clip_encoder("ViT-L-14-quickgelu", "openai"), r"ViT-L-14-quickgelu \(openai\)"),
        (lambda: open_clip_encoder("hf-hub:somebody/something"), "hf-hub:somebody/something"),
    ):
        requests.clear()
        why = f"weights: those of {source} cannot be had here: not in the cache, and the hub cannot be reached; fetch"
        with pytest.raises(InputError, match=why) as caught:
            make()
        assert "\n" not in str(caught.value)
        assert len(requests) == 1
    assert capfd.readouterr() == ("", "")
    assert not constants.HF_HUB_OFFLINE
    assert levels == [logging.getLogger(name).level for name in ("", "huggingface_hub")]


def test_a_hub_that_answers_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with weights_module.hub_or_cache(True):
            assert not constants.HF_HUB_OFFLINE
        server.shutdown()
    with weights_module.hub_or_cache(True):
        assert constants.HF_HUB_OFFLINE
    with weights_module.hub_or_cache(False):
        assert not constants.HF_HUB_OFFLINE


def test_model_and_weights_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weights: expected a tag or a file for 'ViT-L-14', got none"):
        open_clip_encoder("ViT-L-14")
    with pytest.raises(
        InputError, match=r"model: expected open_clip_model\.safetensors beside open_clip_config\.json in "
    ):
        open_clip_encoder(f"local-dir:{tmp_path}")
    with pytest.raises(InputError, match="weights: cannot be read, No such file"):
        read_weights(tmp_path / "none.safetensors")


def test_timm_model_from_a_local_file(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    whole = timm.create_model("test_resnet.r160_in1k", pretrained=False)
    save_file({name: value.contiguous() for name, value in whole.state_dict().items()}, tmp_path / "t.safetensors")
    encoder = timm_encoder("test_resnet.r160_in1k", tmp_path / "t.safetensors")
    assert isinstance(encoder.preprocess, Preprocess)
    with torch.no_grad():
        hidden = whole.eval().forward_features(encoder.preprocess(images(2, size=32)))
        expected = whole.forward_head(hidden, pre_logits=True)
    torch.testing.assert_close(encoder.embed(images(2, size=32)), expected)


# ---- weights for any module ----


def test_weights_of_a_module_from_a_file(classifier: Pooled, tmp_path: Path) -> None:
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    torch.manual_seed(1)
    fresh = Pooled()
    encoder = module_encoder("pooled", fresh, tmp_path / "weights.safetensors")
    assert encoder.id == module_encoder("pooled", classifier).id
    with pytest.raises(InputError, match=r"weights: .* does not fit Linear: Missing key\(s\) in state_dict"):
        load_weights(nn.Linear(2, 2), tmp_path / "weights.safetensors")


# ---- the cache ----


class Counting:
    """An encoder that counts, and can be made to fail."""

    def __init__(self, name: str = "a" * 64) -> None:
        self.id, self.seen, self.fail_after = name, 0, 1_000_000

    def embed(self, batch: Tensor) -> Tensor:
        if self.seen >= self.fail_after:
            raise KeyboardInterrupt
        self.seen += len(batch)
        return batch.float().mean(dim=(2, 3))


def test_cached_features_are_the_computed_ones_and_computed_once(tmp_path: Path) -> None:
    encoder = Counting()
    first = embed_cached(encoder, images(), tmp_path, batch_rows=4)
    assert torch.equal(first, images().float().mean(dim=(2, 3)))
    assert torch.equal(embed_cached(encoder, images(), tmp_path, batch_rows=4), first)
    assert encoder.seen == 10
    assert not list(tmp_path.rglob("*.tmp"))


def test_other_weights_images_or_order_are_never_served_from_the_cache(tmp_path: Path) -> None:
    embed_cached(Counting(), images(), tmp_path)
    for encoder, batch in (
        (Counting("b" * 64), images()),
        (Counting(), images(seed=1)),
        (Counting(), images().flip(0)),
        (Counting(), images().reshape(10, 3, 8, 32)),
    ):
        result = embed_cached(encoder, batch, tmp_path)
        assert encoder.seen == 10
        assert torch.equal(result, batch.float().mean(dim=(2, 3)))


def test_interrupted_embedding_resumes_after_the_last_batch(tmp_path: Path) -> None:
    encoder = Counting()
    encoder.fail_after = 8
    with pytest.raises(KeyboardInterrupt):
        embed_cached(encoder, images(), tmp_path, batch_rows=4)
    fresh = Counting()
    result = embed_cached(fresh, images(), tmp_path, batch_rows=4)
    assert fresh.seen == 2
    assert torch.equal(result, images().float().mean(dim=(2, 3)))


@pytest.mark.parametrize("name", ["features.npy", "manifest.jsonl"])
def test_damaged_features_are_computed_again(tmp_path: Path, name: str) -> None:
    expected = embed_cached(Counting(), images(), tmp_path)
    [path] = tmp_path.rglob(name)
    path.write_bytes(path.read_bytes()[:-2])
    assert torch.equal(embed_cached(Counting(), images(), tmp_path), expected)


def test_hash_of_images_depends_on_shape_and_type() -> None:
    assert images_hash(images()) == images_hash(images().clone())
    assert len({images_hash(one) for one in (images(), images().flatten(1), images().view(torch.int8))}) == 3
