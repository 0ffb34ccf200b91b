"""Methods that learn from noisy labels, each behind the same call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters import lra_diffusion, plc, standard
from adapters.base import Adapter, Outcome, Split, Task
from adapters.network import resolve
from third_party.plc import Config as PlcConfig
from third_party.standard import FINE_TUNE
from third_party.standard import Config as StandardConfig

ADAPTERS: dict[str, Adapter] = {
    "standard": standard.run,
    "relabel": standard.run_relabel,
    "plc": plc.run,
    "lra-clip": lra_diffusion.run_clip,
    "lra-simclr": lra_diffusion.run_simclr,
}

SOFT_LABELS = frozenset({"standard", "relabel"})
"""Methods whose loss takes soft labels; the others work on classes."""

_DEFAULTS: dict[str, Any] = {
    "initial": StandardConfig(),
    "standard": StandardConfig(),
    "relabel": FINE_TUNE,
    "plc": PlcConfig(),
    "lra-clip": lra_diffusion.ClipOptions(),
    "lra-simclr": lra_diffusion.SimclrOptions(),
}


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse unknown options before anything runs.

    Args:
        method: A key of `ADAPTERS`, or "initial" for the initial classifier.
        options: As for the method's `run`.

    Raises:
        TypeError: An unknown option, or one of the wrong type.
    """
    known = {name: value for name, value in options.items() if (method, name) != ("initial", "select")}
    resolve(method, _DEFAULTS[method], known)


__all__ = ["ADAPTERS", "SOFT_LABELS", "Adapter", "Outcome", "Split", "Task", "check_options"]
