"""Class names in, a folder of synthetic images with a manifest out; resumable, and shared by several processes."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from synth_refine._io.atomic import file_hash, make_folder, remove_unfinished, write_atomic
from synth_refine._io.check import InputError, check_folder_name
from synth_refine.images.decode import SUFFIXES
from synth_refine.synthetic.glyphs import Glyphs, _check_least
from synth_refine.synthetic.jobs import TEMPLATES, Generator, Job
from synth_refine.synthetic.text_to_image import SDXL_TURBO, TextToImage

PER_CLASS = 100
"""The paper's number of images per class."""


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
