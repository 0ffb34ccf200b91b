"""Read weights of encoders without unpickling, and say what is wrong where that fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from synth_refine._io.check import InputError
from synth_refine._io.untrusted import open_plain, what_is
from synth_refine.images.foreign import no_foreign_code

CONNECT_SECONDS = 5  # until the hub counts as unreachable

UNREACHABLE = "not in the cache, and the hub cannot be reached"


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a file that torch's weights-only reader takes.

    Args:
        path: A state dict, or a training checkpoint with one under "state_dict" or "model"; "module." in front of every
            name is dropped.

    Raises:
        InputError: Missing, truncated, damaged, a pickle that asks for more than tensors, or not finite.
    """
    with open_plain("weights", path) as file:
        head = file.read(512)
    is_torch = head.startswith(b"PK\x03\x04")
    is_safetensors = head[8:9] == b"{"  # behind the header's length, which may look like the beginning of anything
    kind = None if is_torch or is_safetensors else what_is(head)
    if kind is not None:
        raise InputError(f"weights: expected safetensors or a torch state dict, but {path} is {kind}")
    try:
        content: Any = torch.load(path, "cpu", weights_only=True) if is_torch else load_file(path)
    except Exception as error:  # a damaged archive can fail in any way
        raise InputError(f"weights: {path} cannot be read safely as weights: {_first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"weights: expected a dict of tensors in {path}")
    for name, value in content.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"weights: {name} in {path} holds NaN or infinity")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    weights: dict[str, Tensor] = content
    return weights


def load_weights(module: nn.Module, path: Path | str, loader: Any = None, keep: set[str] | None = None) -> None:
    """Put the weights of a file into a network; every name and shape must fit.

    Args:
        module: The network.
        path: See `read_weights`, which looks at the file first in any case.
        loader: open_clip's loader, which knows other names for the same weights; called as loader(module, path).
        keep: Names to take from the file, which may hold more, such as the head of a classifier.

    Raises:
        InputError: As `read_weights`, or the weights belong to another network.
    """
    weights = read_weights(path)
    try:
        if loader is not None:
            loader(module, str(path), weights_only=True)
        else:
            module.load_state_dict({name: value for name, value in weights.items() if keep is None or name in keep})
    except Exception as error:  # conversions of foreign names may fail in any way
        raise InputError(f"weights: {path} does not fit {type(module).__name__}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first concrete complaint of torch's long message about weights that do not fit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 and lines[0].startswith("Error") else _first_line(error))[:200]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _weights_in(folder: Path) -> Path:
    """The weights of a local open_clip folder."""
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"model: expected open_clip_model.safetensors beside open_clip_config.json in {folder}")


@contextmanager
def hub_or_cache(asked: bool) -> Iterator[None]:
    """Let a library load from the Hugging Face hub, or from the cache alone where the hub cannot be reached.

    No code of a model is run meanwhile; see `no_foreign_code`.

    It would try for a minute, with a warning for every attempt; those are kept away, and those about "no weights" for
    weights that are loaded a line later. What goes wrong is raised in any case.

    Args:
        asked: Whether it may have to ask the hub.
    """
    from huggingface_hub import constants

    loggers = [logging.getLogger(name) for name in ("", "huggingface_hub", "diffusers")]
    before = [logger.level for logger in loggers], constants.HF_HUB_OFFLINE
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        # The same as the environment variable of this name, which is read once, before anybody can know.
        constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or (asked and not _hub_answers())
        with no_foreign_code():
            yield
    finally:
        levels, constants.HF_HUB_OFFLINE = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _hub_answers() -> bool:
    """Whether there is a way to the hub; any answer of it will do."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except Exception:  # a name that is not known, no route, no answer in time, no trust, depending on the client
        return False
    return True


def not_in_cache(error: BaseException | None) -> bool:
    """Whether something failed because it is not in the cache and the hub was not, or could not be, asked."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        error = error.__cause__ or error.__context__
    return False


def _unfetched(model: str, weights: object, error: Exception) -> str:
    """What to give where weights could not be had."""
    source = model
    try:
        from open_clip.pretrained import get_pretrained_cfg  # type: ignore[import-untyped]

        source = get_pretrained_cfg(model, str(weights)).get("hf_hub", "").rstrip("/") or model
    except ImportError:
        pass
    tag = f" ({weights})" if weights is not None else ""
    why = UNREACHABLE if not_in_cache(error) else _first_line(error)
    return (
        f"weights: those of {model}{tag} cannot be had here: {why}; fetch the safetensors file of {source} from the "
        f"Hugging Face hub elsewhere and give its path as --weights (`weights` in Python), or name a "
        f"local folder as the encoder"
    )
