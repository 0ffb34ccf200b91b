"""Repair systematically wrong image labels with prototypes of synthetic images."""

from importlib import import_module
from typing import TYPE_CHECKING

from synth_refine._io.error import InputError

if TYPE_CHECKING:
    from synth_refine.refine.anchored import refine_anchored
    from synth_refine.refine.paper import refine_labels
    from synth_refine.refine.prototypes import class_prototypes
    from synth_refine.refine.result import Refinement

__all__ = ["InputError", "Refinement", "class_prototypes", "refine_anchored", "refine_labels"]
__version__ = "0.1.0"

_MODULES = {
    "Refinement": "refine.result",
    "class_prototypes": "refine.prototypes",
    "refine_anchored": "refine.anchored",
    "refine_labels": "refine.paper",
}


def __getattr__(name: str) -> object:
    """Import what needs torch, which takes seconds, where it is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
