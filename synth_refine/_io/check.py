"""What the public functions ask of their input, and the one error they raise for it."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synth_refine._io.error import InputError as InputError

Array: TypeAlias = "NDArray[Any] | Tensor"
ArrayT = TypeVar("ArrayT", "NDArray[np.generic]", Tensor)
LabelsT = TypeVar("LabelsT", "NDArray[np.integer[Any]]", Tensor)


def shape_text(shape: tuple[int | str, ...]) -> str:
    """A shape as a message shows it: (10, 512), (N,)."""
    return f"({shape[0]},)" if len(shape) == 1 else f"({', '.join(map(str, shape))})"


def check_array(name: str, value: object, shape: tuple[int | str, ...]) -> None:
    """Refuse what is no array or has another shape; a letter in `shape` stands for any length."""
    if not isinstance(value, np.ndarray | Tensor):
        raise InputError(f"{name}: expected a NumPy array or torch tensor, got {type(value).__name__}")
    actual = tuple(value.shape)
    fits = len(actual) == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, actual, strict=True)
    )
    if not fits:
        raise InputError(f"{name}: expected shape {shape_text(shape)}, got {shape_text(actual) if actual else '()'}")


def check_turned(name: str, value: Array, rows: int) -> None:
    """Refuse a table of which the other inputs show that its rows and columns are exchanged."""
    if value.shape[0] != rows == value.shape[1]:
        shape = shape_text(tuple(value.shape))
        raise InputError(f"{name}: expected shape ({rows}, D), got {shape}, which is transposed")


def is_auto(threshold: object) -> bool:
    """Whether a threshold is to be calibrated; arrays of thresholds are not."""
    return isinstance(threshold, str) and threshold == "auto"


def check_threshold(value: object, expected: str = "a number") -> None:
    """Refuse what is no number from -1 to 1, as scores and probabilities are; NaN, too."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not -1 <= float(value) <= 1:  # type: ignore[arg-type]
        raise InputError(f"threshold: expected {expected} from -1 to 1, got {value!r}")


def check_floating(name: str, value: Array) -> None:
    """Refuse integers, booleans, complex numbers and objects."""
    floating = value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"
    if not floating:
        raise InputError(f"{name}: expected floating-point numbers, got {value.dtype}; convert with a scale you chose")


def check_labels(name: str, value: Array, num_classes: int | None = None, first: int = 0) -> None:
    """Refuse what is no (N,) array of integers in [0, num_classes); `first` is the number of its first row."""
    check_array(name, value, ("N",))
    if isinstance(value, Tensor):
        integral = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    else:
        integral = value.dtype.kind in "iu"
    if not integral:
        raise InputError(f"{name}: expected integer class indices, got {value.dtype}")
    if num_classes is None or value.shape[0] == 0:
        return
    wide = value.long() if isinstance(value, Tensor) else value  # torch would squeeze num_classes into the labels' type
    outside = (wide < 0) | (wide >= num_classes)
    rows = np.flatnonzero(outside.cpu() if isinstance(outside, Tensor) else outside)
    if len(rows):
        shown = ", ".join(f"{int(value[int(row)])} in row {first + row}" for row in rows[:5])
        raise InputError(f"{name}: expected classes 0 to {num_classes - 1}, got {shown}")


def float_tensor(value: Array, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An array, or a chunk of one, as a tensor without gradient; NumPy arrays, which may be read-only, are copied."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype)
    if value.dtype == np.float16:  # torch widens these six times as fast as NumPy
        return torch.from_numpy(np.array(value)).to(device, dtype)
    return torch.from_numpy(np.array(value, dtype="f8" if dtype == torch.float64 else "f4")).to(device)


def label_tensor(value: Array, device: torch.device) -> Tensor:
    """Labels as int64 on a device; NumPy arrays, which may be read-only, are copied."""
    return torch.as_tensor(value if isinstance(value, Tensor) else np.array(value, np.int64), device=device).long()


def labels_like(name: str, given: LabelsT, labels: NDArray[np.integer[Any]]) -> LabelsT:
    """Labels in the kind (NumPy or torch), type and device of the ones given, whose type must hold every class."""
    most = torch.iinfo(given.dtype).max if isinstance(given, Tensor) else np.iinfo(given.dtype).max
    if labels.size and int(labels.max()) > most:
        raise InputError(f"{name}: expected a type that holds class {labels.max()}, got {given.dtype}")
    if isinstance(given, Tensor):
        return torch.from_numpy(labels.astype(np.int64)).to(given)
    return labels.astype(given.dtype)
