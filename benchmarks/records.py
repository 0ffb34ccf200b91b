"""Records: one JSON file per run and seed, written once and never changed; every table is made from them alone."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import torch

from synth_refine import InputError
from synth_refine._io.atomic import file_hash, write_atomic
from third_party.parallel import processes

Record: TypeAlias = "dict[str, Any]"

PACKAGES = ("synth-refine", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "open_clip_torch", "cleanlab")


def digest(value: object) -> str:
    """Eight hex digits that name a setting; equal settings have equal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def content_digest(path: Path) -> str:
    """Names a file by its content, or a folder by the names and contents of all files in it."""
    if path.is_file():
        return file_hash(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    names = "".join(f"{file.relative_to(path)} {file_hash(file)}\n" for file in files)
    return hashlib.sha256(names.encode()).hexdigest()


def weights_used(settings: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files that the settings encoder, encoder_weights, weights and pretrained name; tags have none."""
    used = {}
    for name in {"encoder", "encoder_weights", "weights", "pretrained"} & settings.keys():
        path = Path(str(settings[name]))
        found = path / "open_clip_config.json" if name == "encoder" else path
        if found.is_file() and settings[name] != "glyph-clip":  # which is the project's own, wherever one works
            used[name] = content_digest(path)
    return used


def environment(device: torch.device | None = None) -> Record:
    """What a figure depends on besides its settings: commit, versions and hardware."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = device is not None and device.type == "cuda"
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes()[1],
    }


def _git(*arguments: str) -> str:
    """Output of a git command about this repository; empty outside a checkout."""
    try:
        here = Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, whole or not at all.

    Raises:
        FileExistsError: There is one of that name: a record is never overwritten.
    """
    if path.exists():
        raise FileExistsError(f"record: expected no file of that name, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(path) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Read records from files and from all .json files in folders, in the order of their names.

    Raises:
        InputError: A path does not exist, or a file is no record.
    """
    records = []
    for path in paths:
        if not path.exists():
            raise InputError(f"records: expected a file or folder, got {path}")
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            try:
                record = json.loads(file.read_text())
                records.append({**record})
            except (ValueError, TypeError) as error:
                raise InputError(f"records: expected a JSON object, {file} is none: {error}") from error
    return records
