"""The rows that a person left in, as a list beside a label file, which keeps a label for every image."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from synth_refine._io.atomic import write_atomic
from synth_refine._io.check import InputError


def kept_bytes(rows: NDArray[np.int64]) -> bytes:
    """Row numbers, (K,) int64, as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, rows.astype("<i8"), allow_pickle=False)
    return buffer.getvalue()


def write_kept(labels: Path, kept: NDArray[np.bool_], *, dry_run: bool = False) -> Path | None:
    """Write the numbers of the rows to train on beside a label file NAME, as NAME.kept.npy.

    Args:
        labels: The label file.
        kept: Whether each of its rows is kept, (N,); where all are, there is nothing to write, nor may a list of an
            earlier review lie there, which would be taken for that of these labels.
        dry_run: Check everything, write nothing.

    Returns:
        The file; None where no row is removed.

    Raises:
        InputError: Something else has that name.
    """
    path, data = labels.with_name(f"{labels.name}.kept.npy"), kept_bytes(np.flatnonzero(kept))
    if os.path.lexists(path) and (kept.all() or not path.is_file() or path.read_bytes() != data):
        raise InputError(f"out: expected {path} to be free for the list of kept rows, but it holds something else")
    if kept.all():
        return None
    if not dry_run:
        with write_atomic(path) as file:
            file.write(data)
    return path
