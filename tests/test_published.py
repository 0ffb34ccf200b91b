"""The configs of published experiments: their settings against the authors' constants, and the poster's tables."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adapters import ADAPTERS, check_options
from adapters.network import resolve
from benchmarks import poster, run_combo, table
from benchmarks.config import CONFIGS, for_noise, read_config
from benchmarks.records import read_records
from synth_refine import InputError
from third_party import simclr

CIFAR_VIEWS = {"crop_padding": 4, "smallest_crop": 1.0, "flip": True, "crop": 0}

# ---- CIFAR ----
# Constants of the authors' code: NoisyLabelRefinement-Syn 21dd897 and 8436a84, PLC 8c2bcfd, LRA-diffusion 231e587.

SCRATCH = CIFAR_VIEWS | {
    "network": "resnet34", "epochs": 200, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4,
    "nesterov": False, "milestones": (60, 120, 160), "gamma": 0.2, "warmup": 1, "warmup_overshoot": True,
}  # fmt: skip
FINE_TUNING = CIFAR_VIEWS | {
    "network": "resnet34", "batch_size": 128, "lr": 0.001, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False,
    "gamma": 0.1, "warmup": 0,
}  # fmt: skip
PLC = CIFAR_VIEWS | {
    "network": "resnet34", "statistics": "cifar10", "rotation": 0.0, "epochs": 180, "batch_size": 128, "lr": 0.01,
    "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True, "milestones": (40, 80), "gamma": 0.5, "window": 5,
    "delta": 0.3, "increment": 0.1, "limit": 0.9, "few_flips": 0.001, "growth": "additive", "cap": "min",
    "corrector": "ratio", "drop_last": False,
}  # fmt: skip
LRA = CIFAR_VIEWS | {
    "network": "resnet34", "statistics": "cifar10", "rotation": 0.0, "epochs": 200, "batch_size": 200, "lr": 0.001,
    "warmup": 5, "lr_horizon": 1000, "clip": 1.0, "neighbours": 10, "exclude_self": False, "sampling_steps": 10,
    "train_image_encoder": False, "encoder_eval_mode": False, "use_ema": False, "measure_every": 5,
    "measure_batch": 200, "width": 512, "feature_size": 0.0, "best_of_all": False, "weighted": True, "per_class": 0,
}  # fmt: skip
SIMCLR = {
    "encoder": "resnet50", "epochs": 500, "batch_size": 512, "lr": 1e-3, "weight_decay": 1e-6, "temperature": 0.5,
    "projection": 128, "smallest_crop": 0.08, "jitter": 0.8, "grayscale": 0.2, "flip": True,
}  # fmt: skip

MIXED = [noise for noise in poster.NOISES if "+" in noise]


def expected(dataset: str, noise: str, method: str) -> dict[str, Any]:
    """Settings of a method on one of the poster's label files."""
    hundred = dataset == "cifar100"
    own = {"statistics": dataset, "rotation": 15.0 if hundred else 0.0}
    if method in ("standard", "initial"):
        return SCRATCH | own | ({"select": "clean_validation"} if method == "initial" else {})
    if method == "relabel":
        length = {"epochs": 60, "milestones": (20, 40, 50)} if hundred else {"epochs": 50, "milestones": (20, 40)}
        return FINE_TUNING | own | length
    if method == "plc":
        return PLC | {"warmup": 15 if hundred and noise in MIXED else 8}
    return LRA | ({"encoder": "ViT-L-14-quickgelu", "weights": "openai"} if method == "lra-clip" else {})


@pytest.mark.parametrize("dataset", poster.PUBLISHED)
@pytest.mark.parametrize("noise", poster.NOISES)
def test_every_cell_of_the_poster_has_the_authors_settings(dataset: str, noise: str) -> None:
    config = for_noise(read_config(CONFIGS / f"{dataset}.yaml"), noise)
    assert config["threshold"] == (0.6 if dataset == "cifar10" else 0.0 if noise == "pmd-1-0.35" else 0.8)
    assert (config["encoder"], config.get("weight", 0.5)) == ("classifier", 0.5)
    assert noise in config["noise"]
    assert list(config["noise"]) == list(poster.NOISES)
    for method, options in {**config["methods"], "initial": config["initial"]}.items():
        found, wanted = check_options(method, options), expected(dataset, noise, method)
        assert {name: found[name] for name in wanted} == wanted, method
        if method == "lra-simclr":
            recipe = asdict(resolve("simclr", simclr.Config(), found["simclr"])[0])
            assert {name: recipe[name] for name in SIMCLR} == SIMCLR


# ---- photographs ----
# Constants of the authors' code: NoisyLabelRefinement-Syn 1f17663, PLC 8c2bcfd, LRA-diffusion 231e587.

IMAGENET_SCRATCH = {
    "network": "resnet50", "pretrained": "", "statistics": "imagenet", "crop_padding": 0, "crop": 0,
    "smallest_crop": 1.0, "flip": True, "rotation": 15.0, "epochs": 60, "batch_size": 256, "lr": 0.1, "momentum": 0.9,
    "weight_decay": 1e-3, "nesterov": False, "milestones": (20, 40, 50), "gamma": 0.1, "warmup": 0,
}  # fmt: skip
PLC_PHOTOS = {
    "flip": True, "rotation": 0.0, "crop_padding": 0, "smallest_crop": 1.0, "drop_last": True, "statistics": "imagenet",
    "growth": "additive", "cap": "min", "corrector": "ratio", "limit": 0.9, "few_flips": 0.001,
}  # fmt: skip
LRA_PHOTOS = {
    "network": "resnet50", "pretrained": "data/resnet50.safetensors", "encoder": "ViT-L-14-quickgelu",
    "weights": "openai", "width": 1024, "batch_size": 256, "lr": 0.001, "clip": 1.0, "use_ema": False,
    "exclude_self": False, "sampling_steps": 10, "feature_size": 0.0, "flip": True, "crop_padding": 0, "epochs": 200,
}  # fmt: skip
TRAINED = {"train_image_encoder": True, "warmup": 1, "lr_horizon": 0, "weighted": False}
PHOTOS = {
    "imagenet100": {
        "": {"threshold": 0.6, "noise": ["pair-0.6", "symmetric-0.6"], "pixels": {"resize": 256, "crop": 224}},
        "initial": IMAGENET_SCRATCH | {"select": "clean_validation"},
        "standard": IMAGENET_SCRATCH,
        "relabel": IMAGENET_SCRATCH | {"epochs": 25, "milestones": (10, 20)},
    },
    "webvision50": {
        "lra-clip": LRA_PHOTOS | TRAINED | {"statistics": "imagenet", "crop": 224, "neighbours": 50, "per_class": 500},
    },
    "clothing1m": {
        "": {"pixels": {"resize": [256, 256], "crop": 224, "interpolation": "bicubic"}},
        "plc": PLC_PHOTOS | {
            "network": "resnet50", "pretrained": "data/resnet50.safetensors", "crop": 0, "epochs": 15, "batch_size": 32,
            "lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "milestones": (6, 11), "gamma": 0.5,
            "warmup": 1, "window": 5, "delta": 0.7, "increment": 0.1, "limit": float("inf"), "few_flips": 0.0,
            "corrector": "smoothed",
        },
        "lra-clip": LRA_PHOTOS | TRAINED | {"neighbours": 20, "per_class": 10_000},
    },
    "food101n": {
        "": {"pixels": {"resize": 256, "crop": 256, "interpolation": "bicubic"}},
        "plc": PLC_PHOTOS | {
            "network": "resnet50", "pretrained": "data/resnet50.safetensors", "crop": 224, "epochs": 30,
            "batch_size": 32, "lr": 5e-3, "momentum": 0.0, "nesterov": False, "weight_decay": 1e-3,
            "milestones": (10, 20), "gamma": 0.1, "warmup": 4, "window": 4, "delta": 0.1, "increment": 0.05,
        },
        "lra-clip": LRA_PHOTOS | {
            "crop": 224, "neighbours": 10, "per_class": 0, "weighted": True, "train_image_encoder": False, "warmup": 10,
            "lr_horizon": 200,
        },
    },
    "animal10n": {
        "": {"pixels": {"resize": 64}},
        "plc": PLC_PHOTOS | {
            "network": "vgg19_bn", "pretrained": "", "crop": 0, "epochs": 100, "batch_size": 128, "lr": 0.1,
            "momentum": 0.0, "nesterov": False, "weight_decay": 1e-3, "milestones": (50, 75), "gamma": 0.2,
            "warmup": 40, "window": 10, "delta": 0.3, "increment": 0.1,
        },
    },
}  # fmt: skip
"""Settings by config and method, as far as they are published; "" is for the config's own."""


@pytest.mark.parametrize("name", PHOTOS)
def test_settings_for_photographs_are_the_published_ones_and_all_methods_have_some(name: str) -> None:
    config = read_config(CONFIGS / f"{name}.yaml")
    assert set(config["methods"]) == set(ADAPTERS)
    for method, wanted in PHOTOS[name].items():
        options = config["initial"] if method == "initial" else config["methods"].get(method)
        found = check_options(method, options) if method else config
        assert {key: found[key] for key in wanted} == wanted, method
    for method, options in config["methods"].items():
        check_options(method, options)
    header = (CONFIGS / f"{name}.yaml").read_text().split("\npixels")[0].split("\nbase")[0]
    assert all(
        word in header for word in ("python benchmarks/run_combo.py", "Fetch: ", "Expect: ", "Unknown: ", "Ours")
    )


def photographs(folder: Path) -> None:
    """Ten training images of each of three classes, fewer for the test, and synthetic ones."""
    rng = np.random.default_rng(0)
    for part, count in (("photos/train", 10), ("photos/val", 4), ("photos/test", 4), ("synthetic", 4)):
        for label, name in enumerate(("n01", "n02", "n03")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(100, size=(70, 80, 3)) + 150 * np.eye(3, dtype=np.int64)[label]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{index}.png")


def run_small(config: str, folder: Path, *more: str) -> int:
    """All methods of a config for one epoch on small images."""
    names = ["initial", *(f"methods.{method}" for method in ADAPTERS)]
    overrides = [
        f"{name}.{key}"
        for name in names
        for key in ("epochs=1", "batch_size=8", "crop=0", "network=resnet18", "pretrained=")
    ]
    overrides = [one if one[-1] != "=" else f"{one}''" for one in overrides]
    for method in ("lra-clip", "lra-simclr"):
        overrides += [f"methods.{method}.{key}" for key in ("neighbours=4", "per_class=5", "width=16", "warmup=0")]
    overrides += ["methods.lra-clip.encoder=glyph-clip", "methods.lra-clip.weights=''"]
    overrides += ["methods.lra-simclr.simclr.epochs=1", "methods.lra-simclr.simclr.batch_size=8"]
    overrides += ["pixels={resize: 64}", *more]
    places = ["--images", str(folder / "photos"), "--synthetic", str(folder / "synthetic"), "--device", "cpu"]
    path = CONFIGS / f"{config}.yaml"
    return run_combo.main(
        ["--config", str(path), *places, "--out", str(folder / "runs"), "--refine", "paper", *overrides]
    )


def test_imagenet100_runs_from_end_to_end_with_every_method(tmp_path: Path) -> None:
    photographs(tmp_path)
    assert run_small("imagenet100", tmp_path, "noise=pair-0.6") == 0
    records = read_records([tmp_path / "runs" / "photos"])
    assert {one["method"] for one in records} == set(ADAPTERS)
    for one in records:
        assert one["labels"]["noise_before"] == 0.6
        assert len(one["history"]) == 1
        assert set(one["test_accuracy"]) >= {"last"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PHOTOS.keys() - {"imagenet100"}))
def test_the_other_photographs_run_from_end_to_end_with_every_method(name: str, tmp_path: Path) -> None:
    photographs(tmp_path)
    own = ["encoder=glyph-clip", "encoder_weights=''"]
    assert run_small(name, tmp_path, *own) == 0
    assert {one["method"] for one in read_records([tmp_path / "runs" / "photos"])} == set(ADAPTERS)


# ---- the tables ----


def record(dataset: str, noise: str, method: str, refiner: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    settings = json.loads(json.dumps(poster.settings(dataset, noise, method, refiner)))
    settings["method"] |= changes
    return {
        "dataset": dataset, "noise": noise, "method": method, "refiner": refiner, "seed": 0, "settings": settings,
        "test_accuracy": {"last": 0.0, "best_clean_validation": accuracy},
    }  # fmt: skip


def test_the_poster_shows_ours_beside_the_published_and_a_command_for_every_missing_cell() -> None:
    cell = ("cifar100", "pmd-1-0.35+uniform-0.3", "plc", "paper")
    other = ("cifar10", "cifar10-1-0.70", "lra-clip", "none")  # by a label file
    runs = [
        record(*cell, 0.5),
        record(*cell, 0.6, bf16=True),
        record(*cell, 0.9, epochs=1),  # no such run
        record("cifar10", "pmd-1-0.70", "lra-clip", "none", 0.425) | {"noise": other[1]},
    ]
    text = table.poster_tables(runs)
    assert "59.43 / 55.00 ± 7.07" in text
    assert "41.78 / 42.50" in text
    assert text.count(" / not run") == 78
    commands = [line for line in text.splitlines() if line.startswith("python benchmarks/run_combo.py")]
    assert len(set(commands)) == 78
    assert poster.command(*cell) not in commands
    assert poster.command("cifar10", "pmd-1-0.35+asymmetric-0.3", "lra-simclr", "paper") in commands
    figures = [figure for rows in poster.PUBLISHED.values() for row in rows for figure in row]
    assert all(f"{figure:.2f} / " in text for figure in figures)
    assert len(figures) == 80


def test_the_poster_is_printed_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = ("cifar10", "pmd-1-0.35", "standard", "none")
    (tmp_path / "one.json").write_text(json.dumps(record(*cell, 0.8)))
    assert table.main(["--poster", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "80.81 / 80.00" in out
    assert out.rstrip().endswith(poster.command("cifar100", "pmd-1-0.35+asymmetric-0.3", "lra-clip", "paper"))
    assert table.main(["--poster", "--short", str(tmp_path)]) == 0
    assert "\npython " not in capsys.readouterr().out


def test_a_bad_preset_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match="preset: expected paper or released, got 'code'"):
        check_options("lra-clip", {"preset": "code"})
