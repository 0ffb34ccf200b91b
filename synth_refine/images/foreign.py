"""Models of others are data: a folder, or files of a hub, in; an error by name where they choose code to run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from synth_refine._io.error import InputError
from synth_refine._io.untrusted import read_json

CODE_KEYS = ("trust_remote_code", "auto_map", "custom_pipeline", "custom_pipelines", "custom_code")
SETTINGS = (
    *("open_clip_config.json", "config.json", "tokenizer_config.json", "processor_config.json"),
    *("preprocessor_config.json", "image_processor_config.json", "generation_config.json", "scheduler_config.json"),
    *("model_index.json", "modular_model_index.json"),
)
"""The files in which libraries look for names of classes and code; the others, such as vocabularies, are tables."""

MOST_FILES = 10_000
LIBRARIES = {"diffusers", "transformers"}  # whose classes may be parts of a pipeline


def check_model_folder(name: str, folder: Path) -> None:
    """Refuse a folder whose settings choose code to run.

    Raises:
        InputError: Such a key, with the file that it stands in; or settings that are no JSON.
    """
    for number, path in enumerate(folder.rglob("*.json")):
        if number >= MOST_FILES:
            raise InputError(f"{name}: expected a model's folder, got more than {MOST_FILES} .json files in {folder}")
        if path.name not in SETTINGS:
            continue
        content = read_json(name, path)
        for key, value in _entries(content):
            if key in CODE_KEYS and value:
                raise InputError(f"{name}: {path} asks to run code of its own with {key!r}; a model's folder is data")
        if path.name in ("model_index.json", "modular_model_index.json"):
            _check_parts(name, path, content)


def _entries(content: object) -> Iterator[tuple[str, object]]:
    """Every key with its value, however deep."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield str(key), value
            yield from _entries(value)
    elif isinstance(content, list):
        for value in content:
            yield from _entries(value)


def _check_parts(name: str, path: Path, content: object) -> None:
    """Refuse parts of a pipeline that are of no library that we know."""
    parts = content if isinstance(content, dict) else {}
    kind = parts.get("_class_name")
    if not isinstance(kind, str):
        raise InputError(f"{name}: {path} asks to run code of its own with '_class_name': {kind!r}")
    from diffusers import pipelines

    for key, part in parts.items():
        library = part[0] if isinstance(part, list) and part and not key.startswith("_") else None
        known = library is None or (isinstance(library, str) and (library in LIBRARIES or hasattr(pipelines, library)))
        if not known:
            raise InputError(f"{name}: {path} asks to run code of its own with {key!r}: {part!r}")


@contextmanager
def no_foreign_code() -> Iterator[None]:
    """Let no library import code from a model's folder or the hub, or ask on a terminal whether it should.

    The keys that choose such code are refused by `check_model_folder`; this holds where a library finds another way.
    """
    with ExitStack() as undo:
        modules = ["transformers.dynamic_module_utils"] if find_spec("transformers") else []
        if "diffusers" in sys.modules:  # who loads a pipeline has imported it
            modules.append("diffusers.utils.dynamic_modules_utils")
        for module in modules:
            place: Any = import_module(module)
            for name in ("get_class_in_module", "get_cached_module_file"):
                undo.callback(setattr, place, name, getattr(place, name))
                setattr(place, name, _refused)
            undo.callback(setattr, place, "TIME_OUT_REMOTE_CODE", place.TIME_OUT_REMOTE_CODE)
            place.TIME_OUT_REMOTE_CODE = 0  # seconds that it would wait for an answer
        yield


def _refused(*_: object, **__: object) -> NoReturn:
    raise ValueError("it asks to run code of its own, which is never run")


def fetch_settings(name: str, model: str, revision: str | None = None) -> Path:
    """Fetch the settings of a model on the hub, and nothing else, and check them; their folder."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(model, revision=revision, allow_patterns=[f"*{one}" for one in SETTINGS]))
    check_model_folder(name, folder)
    return folder
