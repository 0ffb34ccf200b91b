"""Names in, the one order out in which this package lists classes, files and rows."""

from __future__ import annotations

import re


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """The key by which names sort as people count: numbers in them by their value, then all else as text.

    Example:
        >>> sorted(["bird10", "bird2", "Bird1", "10", "9", "09"], key=natural_key)
        ['09', '9', '10', 'Bird1', 'bird2', 'bird10']
    """
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(one), "") if one[0] in "0123456789" else (1, 0, one) for one in parts], name
