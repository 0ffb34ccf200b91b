"""The one order of names: IMG_2 before IMG_10."""

from __future__ import annotations

import re
from pathlib import Path


def natural_key(name: str | Path) -> tuple[object, ...]:
    """What to sort names by: runs of digits count as numbers, all else by its characters.

    Example:
        >>> sorted(["10", "9", "a10", "a2", "b"], key=natural_key)
        ['9', '10', 'a2', 'a10', 'b']
    """
    parts = re.split(r"([0-9]+)", str(name))
    numbers = [(len(part.lstrip("0")), part.lstrip("0")) for part in parts[1::2]]  # int() has a limit of digits
    return (*[one for pair in zip(parts[::2], [*numbers, (0, "")], strict=True) for one in pair], str(name))
