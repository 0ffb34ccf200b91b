"""Repair systematically wrong image labels with prototypes of synthetic images."""

from synth_refine._check import InputError
from synth_refine.prototypes import class_prototypes
from synth_refine.refine import Refinement, refine_labels

__all__ = ["InputError", "Refinement", "class_prototypes", "refine_labels"]
__version__ = "0.1.0"
