"""Checkpoints without pickle: tensors in a safetensors file, everything else as JSON in its metadata."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a nested state; a kill at any moment leaves either the old file or the new one.

    Args:
        path: Target; its folder is made.
        state: Dictionaries, lists and tuples of tensors, numbers, text, booleans and None, nested at will.

    Raises:
        TypeError: Something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(state, tensors))
    write_tensors(path, tensors, {"tree": tree, "checksum": str(_checksum(tree, tensors))})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        path: Target; its folder is made.
        tensors: Contiguous, on the CPU.
        metadata: For the file's header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(dict(tensors), partial, None if metadata is None else dict(metadata))
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, tensors on the CPU.

    Raises:
        ValueError: The file is damaged or was not written by `save`.
        FileNotFoundError: There is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if int(metadata["checksum"]) != _checksum(metadata["tree"], tensors):
            raise ValueError("the checksum does not match")
        state: dict[str, Any] = _unpack(json.loads(metadata["tree"]), tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"checkpoint: expected a file written by a training run, got {path}: {error}") from error
    return state


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; its tensors move to `tensors` under a running number."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state: expected tensors, numbers, text and containers of them, got {type(value).__name__}")


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_pack`."""
    if not isinstance(tree, dict):
        return tree
    [(kind, content)] = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _checksum(tree: str, tensors: Mapping[str, Tensor]) -> int:
    value = zlib.crc32(tree.encode())
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return value
