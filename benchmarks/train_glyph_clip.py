"""Train glyph-clip, a CLIP of five megabytes that has read rendered digits and letters.

    python benchmarks/train_glyph_clip.py [--steps 1500] [--folder benchmarks/glyph_clip]

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020, with
open_clip's model, tokenizer and loss. Every picture is a glyph of a font that matplotlib carries, distorted until it
could pass for a small scan of handwriting; no picture of any data set is used, so that the handwritten digits of the
benchmark are new to it. Takes some ten minutes on two CPU cores. The model is
loaded by ``open_clip.create_model("local-dir:benchmarks/glyph_clip")``.

Letters in shapes: B images, S x S pixels.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import open_clip  # type: ignore[import-untyped]
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from synth_refine._io.atomic import write_atomic
from synth_refine.synthetic.glyphs import render_glyphs

FOLDER = Path(__file__).parent / "glyph_clip"

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 12, "head_width": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.25, 0.25, 0.25], "std": [0.35, 0.35, 0.35], "interpolation": "bicubic"},
}

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("{}", "A photo of {}.", "a photo of {}", "a picture of {}", "a scan of {}", "handwritten {}", "a small {}")
LOOKALIKES = "oOiIlL"  # no telling them from 0 and 1, and they are not what this is for


def names_of(character: str) -> list[str]:
    """What a caption may call a character."""
    if character.isdigit():
        word = DIGITS[int(character)]
        return [character, word, f"the digit {character}", f"the number {character}", f"the number {word}"]
    return [f"the letter {character}", f"letter {character}", character]


def glyphs(per_character: int, seed: int) -> tuple[list[str], Tensor]:
    """Characters, upper and lower case together, and glyphs of each, (characters, per_character, S, S) in [0, 1]."""
    characters = [*string.digits, *(letter for letter in string.ascii_lowercase if letter not in LOOKALIKES)]
    kinds = [[one] if one == one.upper() else [one, one.upper()] for one in characters]
    pictures = []
    for number, kind in enumerate(tqdm(kinds, "glyphs", disable=None)):
        images, _ = render_glyphs(kind, per_character // len(kind), size=32, seed=seed + number)
        pictures.append(images[:, 0].float() / 255)
    return characters, torch.stack(pictures)


def distort(images: Tensor, scan: float = 0.8) -> Tensor:
    """Bend, lean, thicken and blur glyphs, and shrink most of them to eight pixels and back.

    Args:
        images: (B, S, S) in [0, 1], light on dark.
        scan: Fraction that passes through eight pixels, as small scans of handwriting have.

    Returns:
        (B, S, S) in [0, 1].
    """
    count, size = len(images), images.shape[-1]
    images = images[:, None]
    thick = F.max_pool2d(images, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-images, 3, stride=1, padding=1)
    weight = torch.empty(count, 1, 1, 1).uniform_(-0.7, 1)
    images = torch.where(weight > 0, images.lerp(thick, weight), images.lerp(thin, -weight))

    turn = torch.empty(count).normal_(0, 0.12)
    lean = torch.empty(count).normal_(0, 0.2)
    wide, high = torch.empty(2, count).uniform_(0.8, 1.2)
    cosine, sine = turn.cos(), turn.sin()
    rows = [cosine / wide, (cosine * lean - sine) / wide, sine / high, (sine * lean + cosine) / high]
    matrix = torch.stack(rows, dim=1).view(count, 2, 2)
    affine = torch.cat([matrix, torch.empty(count, 2, 1).uniform_(-0.12, 0.12)], dim=2)
    grid = F.affine_grid(affine, [count, 1, size, size], align_corners=False)
    waves = torch.randn(count, 2, 5, 5) * torch.empty(count, 1, 1, 1).uniform_(0, 0.16)
    grid = grid + F.interpolate(waves, size=size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)

    small = F.interpolate(F.adaptive_avg_pool2d(images, 8), size=size, mode="bicubic", align_corners=False)
    images = torch.where(torch.rand(count, 1, 1, 1) < scan, small, images).clamp(0, 1)
    gamma = torch.empty(count, 1, 1, 1).uniform_(-0.6, 0.4).exp()
    return (images.clamp(min=1e-6) ** gamma)[:, 0]


def build() -> torch.nn.Module:
    """The model with fresh weights."""
    model: torch.nn.Module = open_clip.CLIP(**json.loads(json.dumps(CONFIG["model_cfg"])), output_dict=False)
    return model


def train(steps: int, per_character: int = 240, groups: int = 3, lr: float = 0.003, seed: int = 0) -> torch.nn.Module:
    """Train on batches that show every character once in each group, so that no two captions mean the same.

    Args:
        steps: Updates.
        per_character: Glyphs rendered per character.
        groups: Groups per update.
        lr: Highest learning rate of the one-cycle schedule.
        seed: Of everything random.
    """
    torch.manual_seed(seed)
    draw = random.Random(seed)
    characters, pictures = glyphs(per_character, seed)
    model = build()
    model.to(memory_format=torch.channels_last)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])
    captions = [[caption.format(name) for name in names_of(one) for caption in CAPTIONS] for one in characters]
    tokens = [tokenizer(list(texts)) for texts in captions]
    loss_of = open_clip.ClipLoss()
    mean, std = CONFIG["preprocess_cfg"]["mean"][0], CONFIG["preprocess_cfg"]["std"][0]
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    model.train()
    bar = tqdm(range(steps), "glyph-clip", disable=None)
    for step in bar:
        which = torch.randint(pictures.shape[1], (groups, len(characters)))
        images = pictures[torch.arange(len(characters)), which].flatten(0, 1)  # (groups * characters, S, S)
        images = ((distort(images) - mean) / std)[:, None].expand(-1, 3, -1, -1)
        texts = torch.stack([draw.choice(list(own)) for _ in range(groups) for own in tokens])
        image_features, text_features, scale = model(images, texts)
        pairs = zip(image_features.chunk(groups), text_features.chunk(groups), strict=True)
        loss = torch.stack([loss_of(*pair, scale) for pair in pairs]).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's stubs
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.get_parameter("logit_scale").clamp_(max=4.6052)  # the paper's limit, a factor of 100
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def write(model: torch.nn.Module, folder: Path) -> None:
    """Write weights (half precision) and config as open_clip reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    with write_atomic(folder / "open_clip_model.safetensors") as file:
        file.write(save(weights))
    with write_atomic(folder / "open_clip_config.json") as file:
        file.write((json.dumps(CONFIG, indent=2) + "\n").encode())


def main() -> None:
    """Read the command line, train, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="updates")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the model goes")
    arguments = parser.parse_args()
    write(train(arguments.steps), arguments.folder)


if __name__ == "__main__":
    main()
