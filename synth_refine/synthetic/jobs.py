"""One image to generate, and what every generator offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from synth_refine._io.error import InputError

TEMPLATES = ("A photo of {category}.",)
"""The paper's prompt."""


def check_templates(templates: object) -> None:
    """Refuse what is no list of prompts with a place for the class."""
    if not isinstance(templates, list | tuple) or not templates:
        raise InputError(f"templates: expected a list of at least one prompt, got {templates!r}")
    for template in templates:
        if not isinstance(template, str) or "{category}" not in template:
            raise InputError(f"templates: expected {{category}} where the class goes, got {template!r}")


@dataclass(frozen=True)
class Job:
    """One image to generate.

    Attributes:
        label: Number of the class.
        index: Number of the image in it.
        run_seed: Seed of the whole set.
        name: Name of the class.
        category: What prompts call it.
        prompt: The template with the category in it.
        folder: Name of its folder; by default that of the class.
    """

    label: int
    index: int
    run_seed: int
    name: str
    category: str
    prompt: str
    folder: str = ""

    @property
    def file(self) -> str:
        """Where the image goes, relative to the folder of the set."""
        return f"{self.folder or self.name}/{self.index:05d}.png"

    @property
    def seed(self) -> int:
        """Its own seed, from the run's seed, its class and its index, in [0, 2**63)."""
        sequence = np.random.SeedSequence([self.run_seed, self.label, self.index])
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class Generator(Protocol):
    """Anything that generates images."""

    batch_size: int

    @property
    def about(self) -> dict[str, Any]:
        """All that its images depend on besides the jobs, as JSON takes it; `model` names it."""

    def load(self) -> str:
        """Load the model; its revision."""

    def generate(self, jobs: Sequence[Job]) -> list[Image.Image | None]:
        """One image per job; None where the model's own safety checker withheld it."""
