"""Synthetic images by a diffusion model of diffusers: prompts in, pixels out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from synth_refine._io.atomic import file_hash
from synth_refine._io.check import InputError
from synth_refine.images.foreign import check_model_folder, fetch_settings
from synth_refine.images.weights import UNREACHABLE, hub_or_cache, not_in_cache
from synth_refine.synthetic.glyphs import _check_least
from synth_refine.synthetic.jobs import Job

SDXL_TURBO = "stabilityai/sdxl-turbo"


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
            with hub_or_cache(not folder.is_dir()):
                if folder.is_dir():
                    check_model_folder("model", folder)
                    revision = _folder_hash(folder)
                else:
                    fetch_settings("model", self.model, self.revision)
                    fetched = DiffusionPipeline.download(
                        self.model, revision=self.revision, variant=self.variant, use_safetensors=True
                    )
                    folder, revision = Path(fetched), Path(fetched).name
                automatic: Any = AutoPipelineForText2Image
                pipeline = automatic.from_pretrained(folder, variant=self.variant, use_safetensors=True)
        except InputError:
            raise
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

    def generate(self, jobs: Sequence[Job]) -> list[Image.Image | None]:
        """One call of the pipeline, with a random generator per image."""
        try:
            result = self._pipeline(
                prompt=[job.prompt for job in jobs],
                # The same noise on every device.
                generator=[torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                height=self.size,
                width=self.size,
            )
        except Exception as error:  # a scheduler without so few steps, a size that the network cannot halve, ...
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"model: {self.model} failed while it generated images: {first[:200]}") from error
        withheld = getattr(result, "nsfw_content_detected", None) or [False] * len(jobs)
        return [None if hidden else image for image, hidden in zip(result.images, withheld, strict=True)]


def _folder_hash(folder: Path) -> str:
    """SHA-256 of the names and contents of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    text = "".join(f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n" for path in files)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
