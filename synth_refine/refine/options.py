"""The refiners, and which of them has a use for which option: for the front door and for the command line alike.

Nothing here imports torch or NumPy, so that help and complaints about wrong usage come at once.
"""

from __future__ import annotations

REFINERS = ("anchored", "paper")

USER_OF = {
    **dict.fromkeys(("text_prototypes", "second_view", "force", "outliers"), "anchored"),
    **dict.fromkeys(("prototypes", "logits", "head", "weight", "strict"), "paper"),
}
"""The one refiner that has a use for an option; options that are not named are for both."""
