"""Progress on stderr: a bar on a terminal, else a line now and then, each with the time that is left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 20.0  # between lines where stderr is no terminal; shorter work says nothing


class _Lines(tqdm):  # type: ignore[type-arg]
    """A bar whose every state is a line of its own."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write the state; nothing at the end, where a bar is wiped out."""
        if msg is None:
            print(self, file=sys.stderr, flush=True)


def progress(total: int, text: str, **options: Any) -> tqdm[Any]:
    """Count images on stderr; use it as tqdm."""
    known: dict[str, Any] = {"total": total, "desc": text, "unit": "image", "leave": False, **options}
    if sys.stderr.isatty():
        return tqdm(**known)
    return _Lines(**known, mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS, delay=LINE_SECONDS, miniters=1)
