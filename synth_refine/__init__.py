"""Repair systematically wrong image labels with prototypes of synthetic images."""

from importlib import import_module
from typing import TYPE_CHECKING

from synth_refine._io.error import InputError

if TYPE_CHECKING:
    from synth_refine.labels.artifact import Artifact, read_artifact
    from synth_refine.labels.export import export
    from synth_refine.labels.inject import inject, verify
    from synth_refine.refine.anchored import refine_anchored
    from synth_refine.refine.estimator import LabelRefiner
    from synth_refine.refine.paper import refine_labels
    from synth_refine.refine.prototypes import class_prototypes
    from synth_refine.refine.result import Refinement

__all__ = [
    "Artifact",
    "InputError",
    "LabelRefiner",
    "Refinement",
    "class_prototypes",
    "export",
    "inject",
    "read_artifact",
    "refine_anchored",
    "refine_labels",
    "verify",
]
__version__ = "0.1.0"

_PLACES = {
    "refine.paper": ("refine_labels",),
    "refine.anchored": ("refine_anchored",),
    "refine.estimator": ("LabelRefiner",),
    "refine.prototypes": ("class_prototypes",),
    "refine.result": ("Refinement",),
    "labels.artifact": ("Artifact", "read_artifact"),
    "labels.export": ("export",),
    "labels.inject": ("inject", "verify"),
}


def __getattr__(name: str) -> object:
    """Import what needs torch, which takes seconds, when it is asked for."""
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
