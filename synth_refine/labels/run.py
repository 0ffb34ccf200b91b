"""What a refinement did in numbers and hashes in, the content of run.json out, and back from its folder."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from synth_refine import __version__
from synth_refine._io.error import InputError
from synth_refine._io.untrusted import open_plain

FORMAT = 1
NAMES = ("labels.npy", "changes.csv", "ids.csv")


class Damaged(InputError):
    """An artifact whose files do not have the hashes that its run.json holds."""


def run_of(
    num_classes: int,
    given_hash: str,
    dtype: np.dtype[Any],
    count: int,
    labels_hash: str,
    changed: int,
    abstained: int,
    settings: Mapping[str, object],
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    """What run.json says besides the hashes of files."""
    return {
        "format": FORMAT,
        "num_classes": num_classes,
        "given": {"sha256": given_hash, "dtype": dtype.str, "count": count},
        "labels": {"sha256": labels_hash, "changed": changed, "abstained": abstained},
        "inputs": dict(inputs),
        "settings": dict(settings),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of the libraries that numbers depend on."""
    others = {name: metadata.version(name) for name in ("numpy", "torch")}
    return {"python": platform.python_version(), "synth-refine": __version__, **others}


def read_run(root: Path) -> dict[str, Any]:
    if not (root / "run.json").exists() and (root / "refined" / "run.json").exists():
        raise InputError(f"artifact: {root} is the result of a run; its artifact is {root / 'refined'}")
    if root.is_file():
        what = "; `synth-refine review` makes one of decisions" if root.suffix.lower() == ".csv" else ""
        raise InputError(f"artifact: expected the folder of one, got the file {root}{what}")
    with open_plain("artifact", root / "run.json") as file:
        data = file.read()
    try:
        run = json.loads(data)
        if not isinstance(run, dict) or run["format"] != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        if not {"labels.npy", "changes.csv"} <= set(run["files"]) <= set(NAMES):
            raise ValueError(f"it names the files {', '.join(run['files'])}")
        if not {"given", "labels", "inputs", "num_classes"} <= set(run):
            raise ValueError("an entry is missing")
        if not all(isinstance(value, str) and len(value) == 64 and value.isalnum() for value in run["files"].values()):
            raise ValueError("a file has no hash")
        return run
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{root / 'run.json'} is damaged: {error}") from error
