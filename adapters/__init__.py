"""Methods that learn from noisy labels, each behind the same call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from typing import Any

from adapters import lra_diffusion, plc, standard
from adapters.base import Adapter, Outcome, Split, Task
from adapters.network import resolve
from synth_refine import InputError
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

DEFAULTS: dict[str, Any] = {
    "initial": standard.InitialOptions(),
    "standard": StandardConfig(),
    "relabel": FINE_TUNE,
    "plc": PlcConfig(),
    "lra-clip": lra_diffusion.ClipOptions(),
    "lra-simclr": lra_diffusion.SimclrOptions(),
}
"""What every option of a method is unless it is given, as a dataclass."""


def find_adapter(method: str) -> Adapter:
    """The adapter of that name, or the function that "package.module:function" names.

    Raises:
        InputError: There is none.
    """
    if method in ADAPTERS:
        return ADAPTERS[method]
    module, _, function = method.partition(":")
    try:
        found: Adapter = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        names = ", ".join(ADAPTERS)
        raise InputError(f"method: expected {names} or package.module:function, got {method!r} ({error})") from error
    return found


def check_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse unknown options before anything runs.

    Args:
        method: A name for `find_adapter`, or "initial" for the initial classifier. What `ADAPTERS` does not hold checks
            its options itself.
        options: As for the method's `run`.

    Returns:
        Every setting that the method runs with, defaults included; the options of what `ADAPTERS` does not hold.

    Raises:
        TypeError: An unknown option, or one of the wrong type.
        InputError: A method of `ADAPTERS` without an entry in `DEFAULTS`.

    Example:
        >>> check_options("plc", {"epochs": 20})["warmup"]
        8
    """
    if method not in DEFAULTS:
        if method in ADAPTERS:
            raise InputError(f"method: expected the defaults of {method} in adapters.DEFAULTS, got none")
        return dict(options)
    defaults = DEFAULTS[method]
    if isinstance(defaults, lra_diffusion.Options):
        defaults = lra_diffusion.of_preset(type(defaults), options)
    config, network = resolve(method, defaults, options)
    return asdict(config) | asdict(network)


__all__ = ["ADAPTERS", "SOFT_LABELS", "Adapter", "Outcome", "Split", "Task", "check_options", "find_adapter"]
