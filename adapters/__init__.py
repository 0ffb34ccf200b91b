"""Methods that learn from noisy labels, each behind the same call."""

from adapters import plc, standard
from adapters.base import Adapter, Outcome, Split, Task

ADAPTERS: dict[str, Adapter] = {
    "standard": standard.run,
    "relabel": standard.run_relabel,
    "plc": plc.run,
}

__all__ = ["ADAPTERS", "Adapter", "Outcome", "Split", "Task"]
