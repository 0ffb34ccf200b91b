"""Class names in, a folder of synthetic images with a manifest out; resumable, and shared by several processes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from synth_refine._io.check import InputError
from synth_refine._io.progress import progress
from synth_refine._io.store import Store, open_store, write_file
from synth_refine.images.class_folders import TABLE, folder_table, folders_of
from synth_refine.images.decode import SUFFIXES
from synth_refine.synthetic.glyphs import Glyphs, _check_least
from synth_refine.synthetic.jobs import TEMPLATES, Generator, Job, check_templates
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

    Where a class has a name that no folder can have, `class_folders.csv` says which folder is its.

    Killed or out of disk space at any moment, it resumes to the same files when called again. Started by `accelerate
    launch` or `torchrun` on several GPUs, each process generates its share.

    Args:
        folder: Where the images go; made if it is missing.
        classes: Names of the classes, with what prompts call them where that is something else.
        generator: What generates them.
        per_class: Images per class.
        templates: Prompts with `{category}` in them, taken in turn within a class.
        seed: Not negative. One seed per image is made of it, the class and the index.

    Returns:
        The manifest: JSON lines of file, class, prompt, seed, model, revision and sha256, sorted by class and index.
        The sha256 of an image that the model withheld is null.

    Raises:
        InputError: An argument is out of range, or the folder was begun with other settings or holds something else.
        OSError: The folder cannot be written.
    """
    categories = dict(classes) if isinstance(classes, Mapping) else {name: name for name in classes}
    _check_least(("per_class", per_class, 1), ("seed", seed, 0))
    if not categories:
        raise InputError("classes: expected at least one, got none")
    check_templates(templates)
    folders = folders_of(list(categories))
    jobs = [
        Job(
            label, index, seed, name, text, templates[index % len(templates)].replace("{category}", text), folders[name]
        )
        for label, (name, text) in enumerate(categories.items())
        for index in range(per_class)
    ]
    settings = {"classes": categories, "templates": list(templates), "per_class": per_class, "seed": seed}
    settings["generator"] = generator.about
    root, share = Path(folder), _Share()
    with ExitStack() as opened:
        if share.first:
            store = opened.enter_context(open_store(root, settings, name="folder"))
            _check_alone(root, jobs)
            if names := folder_table(folders):
                write_file(root / TABLE, names)
        share.wait()
        if not share.first:
            store = opened.enter_context(open_store(root, settings, part=share.number))
        done = {job.file for job in jobs if store.done(job.file) is not None}
        share.wait()  # nobody writes before everybody has read
        size = generator.batch_size
        batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        # A batch is generated as a whole even if some of it is there: rounding makes its images depend on each other.
        if missing := [batch for batch in batches if any(job.file not in done for job in batch)]:
            revision = generator.load()
            _check_revision(store, revision)
            _generate(store, generator, revision, share.part(missing), done)
        share.wait()
        if share.first:
            store.finish([job.file for job in jobs])
        share.wait()
    return root / "manifest.jsonl"


class _Share:
    """The part of a job that falls to this process, by accelerate; all of it for a single process."""

    def __init__(self) -> None:
        self.state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import PartialState
            except ImportError as error:
                raise ImportError("several processes need accelerate: pip install 'synth-refine[generate]'") from error
            self.state = PartialState(cpu=not torch.cuda.is_available())
            if self.state.num_processes != int(os.environ["WORLD_SIZE"]):  # else all would generate everything
                raise InputError(f"WORLD_SIZE: expected {self.state.num_processes}, as accelerate counts processes")
        self.number = 0 if self.state is None else self.state.process_index
        self.first = self.number == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def part(self, batches: list[list[Job]]) -> list[list[Job]]:
        """What this process generates."""
        if self.state is None:
            return batches
        with self.state.split_between_processes(batches) as mine:
            return list(mine)


def _check_alone(root: Path, jobs: Sequence[Job]) -> None:
    """Refuse images that would be taken for some of this set."""
    ours = {job.file for job in jobs}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.relative_to(root).as_posix() not in ours:
            raise InputError(
                f"folder: expected images of this set alone in {root}, got {path.name}; take another folder"
            )


def _check_revision(store: Store, revision: str) -> None:
    others = {str(entry["revision"]) for entry in store.entries.values()} - {revision}
    if others:
        raise InputError(
            f"folder: expected the model's revision {min(others)[:40]} that {store.root} was begun with, got "
            f"{revision[:40]}; take another folder"
        )


def _generate(
    store: Store, generator: Generator, revision: str, batches: Sequence[Sequence[Job]], done: Collection[str]
) -> None:
    """Generate the missing images of batches; an image that the model withheld is listed without a hash."""
    model = generator.about["model"]
    count = sum(job.file not in done for batch in batches for job in batch)
    with progress(count, "generating") as bar:
        for batch in batches:
            for job, image in zip(batch, generator.generate(batch), strict=True):
                if job.file in done:
                    continue
                about = {"class": job.name, "prompt": job.prompt, "seed": job.seed, "model": model}
                about["revision"] = revision
                if image is None:
                    store.note(job.file, None, **about)
                else:
                    store.put(job.file, partial(image.save, format="PNG"), **about)
                bar.update()


def say_withheld(manifest: Path, say: Callable[[str], object]) -> None:
    """Say how many images the model's safety checker withheld, and of which classes."""
    entries = [json.loads(line) for line in manifest.read_bytes().splitlines()]
    if withheld := Counter(entry["class"] for entry in entries if entry["sha256"] is None):
        shown = ", ".join(f"{count} of {name}" for name, count in withheld.most_common(5))
        say(
            f"warning: the model's safety checker withheld {withheld.total()} of {len(entries)} images ({shown}); "
            "give other words for these classes in --classes, or other --templates"
        )
