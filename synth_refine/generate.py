"""Synthetic images: one class per text, the same number of images for each.

`generate_images` fills a folder with what a `Generator` draws: a text-to-image model (`TextToImage`) or rendered glyphs
(`Glyphs`). An image depends on its prompt, its class, its index and the seed alone, so a killed run goes on to the same
bytes. A folder that was begun with other settings is refused, never mixed. `render_glyphs` gives glyphs as tensors.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor
from tqdm import tqdm

from synth_refine._check import InputError, check_folder_name
from synth_refine.encode import UNREACHABLE, hub_or_cache, not_in_cache
from synth_refine.files import file_hash, make_folder, remove_unfinished, write_atomic
from synth_refine.images import SUFFIXES

SDXL_TURBO = "stabilityai/sdxl-turbo"
TEMPLATES = ("A photo of {category}.",)
"""The paper's prompt."""
PER_CLASS = 100
"""The paper's number of images per class."""

OTHER_SIGNS = {"LastResortHE-Regular.ttf", "cmex10.ttf", "cmsy10.ttf"}
"""Fonts that show something else at the code points of letters and digits."""

OVERSAMPLING = 4  # drawn at this many times the size, so that the shrinking smooths the edges


def render_glyphs(
    texts: Sequence[str], per_class: int, *, size: int = 32, seed: int = 0, detail: int | None = None
) -> tuple[Tensor, Tensor]:
    """Render each text many times, light on dark, with the fonts that matplotlib carries.

    Font, size, proportions, position, rotation, shear, stroke thickness, blur and contrast are drawn at random for
    every image. Image `i` of a class does not depend on how many images or other classes are drawn. The same versions
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
        raise ImportError("glyphs are drawn with matplotlib's fonts: pip install 'synth-refine[bench]'") from error
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


# ---- a folder of images ----


@dataclass(frozen=True)
class Job:
    """One image to draw.

    Attributes:
        label: Number of the class.
        index: Number of the image in it.
        run_seed: Seed of the whole set.
        name: Name of the class, and of its folder.
        category: What prompts call it.
        prompt: The template with the category in it.
    """

    label: int
    index: int
    run_seed: int
    name: str
    category: str
    prompt: str

    @property
    def file(self) -> str:
        """Where the image goes, relative to the folder of the set."""
        return f"{self.name}/{self.index:05d}.png"

    @property
    def seed(self) -> int:
        """Its own seed, from the run's seed, its class and its index, in [0, 2**63)."""
        sequence = np.random.SeedSequence([self.run_seed, self.label, self.index])
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class Generator(Protocol):
    """Anything that draws images."""

    batch_size: int

    @property
    def about(self) -> dict[str, Any]:
        """All that its images depend on besides the jobs, as JSON takes it; `model` names it."""

    def load(self) -> str:
        """Get ready to draw; the revision of the model."""

    def draw(self, jobs: Sequence[Job]) -> list[Image.Image | None]:
        """One image per job; None where the model's own safety checker withheld it."""


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
        """The versions of the libraries that draw."""
        import PIL

        _charmaps()
        import matplotlib

        return f"pillow {PIL.__version__}, matplotlib {matplotlib.__version__}"

    def draw(self, jobs: Sequence[Job]) -> list[Image.Image | None]:
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


class TextToImage:
    """Any text-to-image pipeline of diffusers.

    Weights are read from safetensors files alone, and no code from a hub is run. The model's safety checker, where it
    has one, stays on: what it withholds is left out of the set and noted in the manifest.

    Args:
        model: Name on the Hugging Face hub, or a local folder.
        revision: Branch, tag or commit on the hub; the manifest notes the commit, or the hash of a local folder.
        variant: Kind of weights, such as "fp16", which SDXL-Turbo has.
        steps: Denoising steps.
        guidance: Scale of the guidance; 0 for turbo models.
        size: Height and width in pixels.
        device: Where it computes, in half precision on a GPU.
        batch_size: Images per call. They depend on it by rounding errors, so it belongs to the settings of a set.
    """

    def __init__(
        self,
        model: str = SDXL_TURBO,
        *,
        revision: str | None = None,
        variant: str | None = None,
        steps: int = 1,
        guidance: float = 0.0,
        size: int = 512,
        device: torch.device | str = "cpu",
        batch_size: int = 8,
    ) -> None:
        _check_least(("steps", steps, 1), ("size", size, 8), ("batch_size", batch_size, 1))
        if variant is None and model == SDXL_TURBO:
            variant = "fp16"
        self.model, self.revision, self.variant = model, revision, variant
        self.steps, self.guidance, self.size, self.device = steps, guidance, size, torch.device(device)
        self.batch_size = batch_size
        self._pipeline: Any = None

    @property
    def about(self) -> dict[str, Any]:
        """The settings that its images depend on."""
        names = ("model", "revision", "variant", "steps", "guidance", "size", "batch_size")
        return {name: getattr(self, name) for name in names} | {"device": self.device.type}

    def load(self) -> str:
        """Load the pipeline; the commit of a hub model, the hash of the files of a local folder.

        Raises:
            InputError: No such model here, and none to be fetched.
            ImportError: transformers is not installed.
        """
        try:
            import transformers  # noqa: F401
            from diffusers import AutoPipelineForText2Image, DiffusionPipeline
        except ImportError as error:
            raise ImportError("text-to-image needs transformers: pip install 'synth-refine[generate]'") from error
        folder = Path(self.model)
        try:
            if folder.is_dir():
                revision = _folder_hash(folder)
            else:
                with hub_or_cache(True):
                    fetched = DiffusionPipeline.download(
                        self.model, revision=self.revision, variant=self.variant, use_safetensors=True
                    )
                folder, revision = Path(fetched), Path(fetched).name
            automatic: Any = AutoPipelineForText2Image
            pipeline = automatic.from_pretrained(folder, variant=self.variant, use_safetensors=True)
        except Exception as error:  # a hub client may raise anything
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            text = UNREACHABLE if not_in_cache(error) else first
            raise InputError(
                f"model: {self.model} cannot be had here: {text[:200]}; fetch its folder elsewhere and give its path "
                f"as --model, or give images that you have as --synthetic"
            ) from error
        self._pipeline = pipeline.to(self.device, torch.float16 if self.device.type == "cuda" else torch.float32)
        self._pipeline.set_progress_bar_config(disable=True)
        return revision

    def draw(self, jobs: Sequence[Job]) -> list[Image.Image | None]:
        """One call of the pipeline, with a random generator per image."""
        result = self._pipeline(
            prompt=[job.prompt for job in jobs],
            generator=[torch.Generator("cpu").manual_seed(job.seed) for job in jobs],  # the same noise on every device
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            height=self.size,
            width=self.size,
        )
        withheld = getattr(result, "nsfw_content_detected", None) or [False] * len(jobs)
        return [None if hidden else image for image, hidden in zip(result.images, withheld, strict=True)]


def generator_by_name(
    model: str,
    *,
    steps: int = 1,
    guidance: float = 0.0,
    size: int | None = None,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
) -> Generator:
    """`TextToImage` for a model's name or folder, 512 pixels by default; `Glyphs` for "glyphs", 32 by default.

    Raises:
        InputError: A name that is neither "glyphs" nor "owner/name", as all models of diffusers on the hub are called,
            nor a folder; or a number out of range.
    """
    if model == "glyphs":
        return Glyphs(32 if size is None else size)
    if "/" not in model and not (model and Path(model).is_dir()):
        raise InputError(
            f"model: expected glyphs, a name on the hub as owner/name, such as {SDXL_TURBO}, or a folder, got {model!r}"
        )
    return TextToImage(
        model,
        revision=revision,
        steps=steps,
        guidance=guidance,
        size=512 if size is None else size,
        device=device,
        batch_size=batch_size,
    )


def _folder_hash(folder: Path) -> str:
    """SHA-256 of the names and contents of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    text = "".join(f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n" for path in files)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def generate_images(
    folder: str | os.PathLike[str],
    classes: Mapping[str, str] | Sequence[str],
    generator: Generator,
    *,
    per_class: int = PER_CLASS,
    templates: Sequence[str] = TEMPLATES,
    seed: int = 0,
) -> Path:
    """Fill a folder with one folder of images per class, and a manifest.

    Killed or out of disk space at any moment, it goes on when called again, to the same files. Started by `accelerate
    launch` or `torchrun` on several GPUs, each process draws its share.

    Args:
        folder: Where the images go; made if it is missing.
        classes: Names of the classes, with what prompts call them where that is something else.
        generator: What draws.
        per_class: Images per class.
        templates: Prompts with `{category}` in them, taken in turn within a class.
        seed: Not negative. One seed per image is made of it, the class and the index.

    Returns:
        The manifest: JSON lines of file, class, prompt, seed, model, revision and sha256, sorted by class and index.

    Raises:
        InputError: An argument is out of range, or the folder was begun with other settings or holds something else.
        OSError: The folder cannot be written.
    """
    categories = dict(classes) if isinstance(classes, Mapping) else {name: name for name in classes}
    _check_least(("per_class", per_class, 1), ("seed", seed, 0))
    if not categories or not templates:
        raise InputError("classes, templates: expected at least one of each")
    for template in templates:
        if "{category}" not in template:
            raise InputError(f"templates: expected {{category}} where the class goes, got {template!r}")
    for name in categories:
        check_folder_name("classes", name)
    jobs = [
        Job(label, index, seed, name, text, templates[index % len(templates)].replace("{category}", text))
        for label, (name, text) in enumerate(categories.items())
        for index in range(per_class)
    ]
    about = {"classes": categories, "templates": list(templates), "per_class": per_class, "seed": seed}
    share = _Share()
    root = Path(folder)
    done: dict[str, dict[str, Any]] = {}
    if share.first:
        make_folder("folder", root)
        _begin(root, {**about, "generator": generator.about}, jobs)
    share.wait()
    done = _finished(root, generator.about["model"], jobs)
    share.wait()  # nobody writes before everybody has read
    size = generator.batch_size
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    # A batch is drawn as a whole even if some of it is there: its images depend on each other by rounding errors.
    open_ones = [batch for batch in batches if any(job.file not in done for job in batch)]
    if open_ones:
        revision = generator.load()
        _same_revision(root, done, revision)
        _draw(root, generator, revision, share.part(open_ones), done, share.number)
    share.wait()
    if share.first:
        _finish(root, _finished(root, generator.about["model"], jobs), jobs)
    share.wait()
    return root / "manifest.jsonl"


class _Share:
    """The part of this process in a job of several, by accelerate; all of it where there is only one."""

    def __init__(self) -> None:
        self.state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import PartialState
            except ImportError as error:
                raise ImportError("several processes need accelerate: pip install 'synth-refine[generate]'") from error
            self.state = PartialState(cpu=not torch.cuda.is_available())
            if self.state.num_processes != int(os.environ["WORLD_SIZE"]):  # else all would draw everything
                raise InputError(f"WORLD_SIZE: expected {self.state.num_processes}, as accelerate counts processes")
        self.number = 0 if self.state is None else self.state.process_index
        self.first = self.number == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def part(self, batches: list[list[Job]]) -> list[list[Job]]:
        """What this process draws."""
        if self.state is None:
            return batches
        with self.state.split_between_processes(batches) as mine:
            return list(mine)


def _begin(root: Path, settings: dict[str, Any], jobs: Sequence[Job]) -> None:
    """Make a folder ready, or refuse one that was begun with other settings or holds something else."""
    place = root / "settings.json"
    if place.exists():
        try:
            before = json.loads(place.read_bytes())
            if not isinstance(before, dict):
                raise ValueError
        except ValueError as error:
            raise InputError(f"folder: {place} is damaged; take another folder") from error
        if json.dumps(before) != json.dumps(settings):  # as text, since the order of the classes counts
            differing = [key for key in settings if json.dumps(before.get(key)) != json.dumps(settings[key])]
            [name, *_] = differing or ["entries"]
            raise InputError(
                f"folder: expected the settings that {root} was begun with, got another {name}: "
                f"{json.dumps(settings.get(name))[:80]} for {json.dumps(before.get(name))[:80]}; take another folder"
            )
    elif other := next((path for path in sorted(root.iterdir()) if not path.name.startswith(".")), None):
        raise InputError(
            f"folder: expected a new or empty one, or what generate began there, but {root} holds {other.name}; "
            "take another folder"
        )
    ours = {job.file for job in jobs}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.relative_to(root).as_posix() not in ours:
            raise InputError(
                f"folder: expected images of this set alone in {root}, got {path.name}; take another folder"
            )
    remove_unfinished(root)
    if not place.exists():
        with write_atomic(place) as file:
            file.write((json.dumps(settings, indent=1) + "\n").encode())
    for name in {job.name for job in jobs}:
        (root / name).mkdir(exist_ok=True)


def _finished(root: Path, model: str, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """Entries of the images that are there, whole and as noted, by file."""
    wanted = {job.file: job for job in jobs}
    done: dict[str, dict[str, Any]] = {}
    for notes in (root / "manifest.jsonl", *sorted(root.glob(".drawn-*.jsonl"))):
        for line in notes.read_text("utf-8", "replace").splitlines() if notes.exists() else ():
            try:
                entry = json.loads(line)
                job = wanted[entry["file"]]
                digest = entry["sha256"]
                if entry != _entry(job, model, entry["revision"], digest):
                    continue
                if digest is None or file_hash(root / job.file) == digest:
                    done[job.file] = entry
            except (ValueError, KeyError, TypeError, OSError):  # half a line, or a file that is not there any more
                continue
    return done


def _entry(job: Job, model: str, revision: str, digest: str | None) -> dict[str, Any]:
    """A line of the manifest; without a hash where the image was withheld."""
    return {
        "file": job.file,
        "class": job.name,
        "prompt": job.prompt,
        "seed": job.seed,
        "model": model,
        "revision": revision,
        "sha256": digest,
    }


def _same_revision(root: Path, done: Mapping[str, Mapping[str, Any]], revision: str) -> None:
    others = {entry["revision"] for entry in done.values()} - {revision}
    if others:
        raise InputError(
            f"folder: expected the model's revision {min(others)[:40]} that {root} was begun with, got "
            f"{revision[:40]}; take another folder"
        )


def _draw(
    root: Path,
    generator: Generator,
    revision: str,
    batches: Sequence[Sequence[Job]],
    done: Mapping[str, Mapping[str, Any]],
    number: int,
) -> None:
    """Draw the missing images of batches; each is on the disk before its line is."""
    notes = root / f".drawn-{number}.jsonl"
    kept = list(done.values()) if number == 0 else []
    with write_atomic(notes) as file:  # without the half line that a killed process may have left
        file.write(_lines(kept))
    model = generator.about["model"]
    count = sum(job.file not in done for batch in batches for job in batch)
    with tqdm(total=count, desc="drawing", unit="image", disable=None, leave=False) as bar, open(notes, "ab") as log:
        for batch in batches:
            for job, image in zip(batch, generator.draw(batch), strict=True):
                if job.file in done:
                    continue
                digest = None
                if image is not None:
                    data = io.BytesIO()
                    image.save(data, "PNG")
                    with write_atomic(root / job.file) as file:
                        file.write(data.getvalue())
                    digest = hashlib.sha256(data.getvalue()).hexdigest()
                log.write(_lines([_entry(job, model, revision, digest)]))
                log.flush()
                bar.update()


def _lines(entries: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def _finish(root: Path, done: Mapping[str, Mapping[str, Any]], jobs: Sequence[Job]) -> None:
    missing = [job.file for job in jobs if job.file not in done]
    if missing:
        raise InputError(f"folder: expected {len(jobs)} images in {root}, {missing[0]} is missing; start again")
    with write_atomic(root / "manifest.jsonl") as file:
        file.write(_lines([done[job.file] for job in jobs]))
    for notes in root.glob(".drawn-*.jsonl"):
        notes.unlink()
