"""The one list of settings: command line, config file and checks are made from it.

Each field of `Settings` says in its metadata which commands take it, when it is of use, what it means, and its unit.
Nothing here imports torch or NumPy, so that help and complaints about wrong usage come at once.

Letters in shapes: N real images, M synthetic images, D features, C classes.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from glob import glob
from pathlib import Path
from typing import Any

from synth_refine._io.error import InputError
from synth_refine._io.ray import ADDRESS_HELP, ENGINE_HELP, ENGINES
from synth_refine.refine.options import REFINERS, USER_OF

WAYS = {
    "anchored": "--refiner anchored",
    "paper": "--refiner paper",
    "prototypes": "--refiner paper with --prototypes",
    "outputs": "--refiner paper with --synthetic and --logits",
    "heads": "--refiner paper with --synthetic and without --logits",
    "one classifier": "--refiner paper without --logits",
    "generated": "generated images, without --synthetic",
    "embedded": "images",
    "ray": "--engine ray",
}
"""The ways in which a command can go, as messages name them; see `ways`."""

IMAGES = "a folder of images per class, a .csv with path and label, or a saved dataset, .tar or .parquet files"
STORED = ".npy, for scale also a folder of shards"
GIVEN = f"the labels as given: {STORED}, .csv with id, such as embed's given.csv, or for refine CIFAR-N's .pt"
CLASSES = "class names, or folder names with what prompts call them; beside embed's features there are some"
COLUMN = "in a dataset or Parquet file, where several could be meant"
REFINER = "anchored where there are synthetic features, else paper"
LOGITS = (
    "outputs of a classifier, (N, C) floats; anchored reads them as a second annotator: they must be cross-validated, "
    "from a classifier that sees the images otherwise than the encoder does"
)
HEAD = "instead of --logits a linear classifier, (C, D), or (C, D + 1) with bias"
THRESHOLD = "smallest score that changes a label, a number or auto: calibrated for each class on synthetic images"
MODEL = "what generates synthetic images: a model of diffusers by name or folder, or glyphs"

RUN, REFINES = {"commands": ("run",)}, {"commands": ("run", "refine", "scale")}
ARRAYS, EMBEDS = {"commands": ("refine", "scale")}, {"commands": ("run", "embed")}
GENERATES: dict[str, Any] = {"commands": ("run", "generate"), "use": ("generated",)}
SYNTHETIC: dict[str, Any] = {**ARRAYS, "use": ("anchored", "outputs", "heads"), "needed": True}
ENGINES_OF = {"commands": ("run", "scale", "embed")}
CLASSED = {"commands": ("run", "refine", "scale", "embed", "generate")}
ALL = {"commands": ("run", "refine", "scale", "embed", "generate")}
"""Who takes a setting."""


def _setting(default: Any, text: str, who: Mapping[str, Any], **known: Any) -> Any:
    """A field of `Settings`: its default, its help, the commands that take it, and what else is known of it.

    Args:
        default: Its value where nothing is given.
        text: The help.
        who: `commands`, with further entries as in `known`.
        known: use, the ways in which it is of use (by default all); needed, the commands or ways that cannot do without
            it (True: all in which it is of use); least and most, of a number; unit, of a number, as the help calls the
            value; choices, the only texts; metavar; shown, the default in the help where its own text says little;
            flag, what the command line calls it where that is not its name; resumable, whether it may differ from what
            a folder of results was begun with.
    """
    words = {"unit": "", "shown": "", "flag": "", "metavar": None, "least": None, "most": None, "resumable": False}
    metadata = {"use": (), "needed": (), "choices": (), **words, **who, **known, "text": text}
    if metadata["needed"] is True:
        metadata["needed"] = metadata["use"] or metadata["commands"]
    metadata["metavar"] = metadata["metavar"] or metadata["unit"].upper() or None
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What a command depends on; the entries of a config file have the same names."""

    images: str = _setting("", IMAGES, EMBEDS, needed=True, flag="IMAGES")
    out: str = _setting("", "of the results", ALL, needed=True, metavar="FOLDER", resumable=True)
    features: str = _setting(
        "", f"features of the images, (N, D) floats: {STORED}", ARRAYS, needed=True, metavar="PATH"
    )
    given: str = _setting("", GIVEN, ARRAYS, needed=True, metavar="PATH")
    key: str | None = _setting(None, "the entry of the given labels, for a .pt file", {"commands": ("refine",)})
    image_column: str | None = _setting(None, f"of the images {COLUMN}", EMBEDS, metavar="COLUMN", flag="--image")
    label_column: str | None = _setting(None, f"of the labels {COLUMN}", EMBEDS, metavar="COLUMN", flag="--label")
    classes: str | None = _setting(None, CLASSES, CLASSED, needed=("generate",), metavar="YAML")
    refiner: str | None = _setting(None, "what refines", REFINES, shown=REFINER, choices=REFINERS)
    synthetic: str | None = _setting(
        None, "synthetic images, like IMAGES; generated where not given", RUN, metavar="SOURCE"
    )
    test: str | None = _setting(
        None, "test images, like IMAGES, which are searched for copies of them", RUN, metavar="SOURCE", resumable=True
    )
    synthetic_features: str | None = _setting(
        None, "features of the synthetic images, (M, D) floats", SYNTHETIC, metavar="NPY", flag="--synthetic"
    )
    synthetic_labels: str | None = _setting(
        None, "the intended class of each synthetic image", SYNTHETIC, metavar="FILE"
    )
    prototypes: str | None = _setting(
        None,
        "in place of --synthetic: mean synthetic features, (C, D) floats",
        {**ARRAYS, "use": ("prototypes",), "needed": True},
        metavar="NPY",
    )
    logits: str | None = _setting(None, LOGITS, REFINES, use=REFINERS, metavar="PATH")
    head: str | None = _setting(None, HEAD, {"commands": ("scale",), "use": ("one classifier",)}, metavar="NPY")
    text_prototypes: str | None = _setting(
        None,
        "text features of the classes by the same encoder, (C, D)",
        REFINES,
        metavar="NPY",
    )
    threshold: float | str | None = _setting(
        None,
        THRESHOLD,
        REFINES,
        needed=("prototypes", "outputs"),
        metavar="auto|X",
        shown="anchored none, paper auto",
        least=-1,
        most=1,
    )
    weight: float | None = _setting(
        None,
        "weight of the similarity",
        REFINES,
        shown="0.5, without a classifier 1",
        least=0,
        most=1,
    )
    strict: bool = _setting(False, "refuse images that cannot be scored", {"commands": ("refine",)})
    force: bool = _setting(False, "change labels even if the do-no-harm check advises against it", REFINES)
    outliers: bool = _setting(
        False, "score which images show none of the classes and propose to remove them; takes twice as long", REFINES
    )
    seed: int = _setting(
        0,
        "same seed, same result",
        {"commands": ("run", "refine", "scale", "generate"), "use": ("anchored", "heads", "generated")},
        least=0,
    )
    encoder: str = _setting(
        "open_clip:ViT-L-14-quickgelu/openai", "open_clip:MODEL/TAG, timm:MODEL or an open_clip folder", EMBEDS
    )
    weights: str | None = _setting(None, "local weights of the encoder", EMBEDS, metavar="FILE")
    model: str = _setting("stabilityai/sdxl-turbo", MODEL, GENERATES)
    revision: str | None = _setting(None, "of the model on the hub", GENERATES)
    templates: Sequence[str] = _setting(
        ("A photo of {category}.",), "prompts, with {category} where the class goes", GENERATES, metavar="TEXT"
    )
    per_class: int = _setting(100, "synthetic images of each class", GENERATES, unit="images", least=1)
    steps: int = _setting(1, "denoising steps of the model", GENERATES, unit="steps", least=1)
    guidance: float = _setting(0.0, "guidance scale of the model", GENERATES, least=0)
    size: int | None = _setting(None, "side of an image", GENERATES, unit="pixels", shown="512, glyphs 32", least=1)
    batch_rows: int | None = _setting(None, "embedded at once", EMBEDS, unit="images", shown="16, on a GPU 64", least=1)
    batch_size: int = _setting(8, "generated at once", GENERATES, unit="images", least=1)
    shard_rows: int = _setting(
        262_144, "of a .npy file that make a shard", {"commands": ("scale",)}, unit="rows", least=1
    )
    device: str = _setting(
        "auto",
        "cpu, cuda, cuda:1; auto: the GPU if there is one",
        {"commands": ("run", "embed", "generate")},
        resumable=True,
    )
    workers: int = _setting(2, "that decode images", EMBEDS, unit="processes", least=0, resumable=True)
    cache: str | None = _setting(
        None,
        "where features are kept by encoder and content, to share them between results",
        RUN,
        metavar="FOLDER",
        shown="features in --out",
        resumable=True,
    )
    engine: str = _setting("local", ENGINE_HELP, ENGINES_OF, use=("embedded", "paper"), choices=ENGINES, resumable=True)
    address: str | None = _setting(None, ADDRESS_HELP, ENGINES_OF, use=("ray",), resumable=True)

    def check(self, command: str) -> None:
        """Refuse what the command cannot use or cannot do without, and values that no setting can have."""
        entries = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        check_entries(command, entries)

    @property
    def columns(self) -> dict[str, str]:
        """The columns that `open_images` takes."""
        return {"image": self.image_column or "", "label": self.label_column or ""}

    def used(self, command: str) -> dict[str, Any]:
        """The entries that the command depends on in the way it goes, as YAML and JSON take them."""
        going = ways(command, vars(self))
        found = {one.name: getattr(self, one.name) for one in of_command(command) if _useful(one, going)}
        if "refiner" in found:
            found["refiner"] = "anchored" if "anchored" in going else "paper"
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


EMBED_AS = ("encoder", "weights", "batch_rows", "device", "workers")
"""What `embed` takes of the config of a run."""

RESUMABLE = frozenset(one.name for one in fields(Settings) if one.metadata["resumable"])
"""Settings that may change between resumed runs."""


REFINING = frozenset(one.name for one in fields(Settings) if one.metadata["commands"] == REFINES["commands"])
"""Settings of the refinement alone, on which no synthetic image and no feature depends."""


def of_command(command: str) -> list[Field[Any]]:
    """The fields that a command takes."""
    return [one for one in fields(Settings) if command in one.metadata["commands"]]


def ways(command: str, entries: Mapping[str, Any]) -> set[str]:
    """How a command goes with these entries, as a set of keys of `WAYS`; the refiner is among them if there is one."""
    found = {"ray"} if entries.get("engine") == "ray" else set()
    if command in ("run", "embed"):
        found.add("embedded")
    if command == "generate" or (command == "run" and not entries.get("synthetic")):
        found.add("generated")
    if command in ("embed", "generate"):
        return found
    synthetic = command == "run" or entries.get("synthetic_features")
    if (entries.get("refiner") or ("anchored" if synthetic else "paper")) == "anchored":
        return found | {"anchored"}
    if not entries.get("logits"):
        found.add("one classifier")
    if not synthetic or command == "scale":
        return found | {"paper", "prototypes"}
    return found | {"paper", "outputs" if entries.get("logits") else "heads"}


def use_of(one: Field[Any]) -> tuple[str, ...]:
    """The ways in which a setting is of use; none for a setting that always is."""
    return tuple(one.metadata["use"]) or ((USER_OF[one.name],) if one.name in USER_OF else ())


def flag(one: Field[Any]) -> str:
    """What the command line calls a setting."""
    return str(one.metadata["flag"]) or f"--{one.name.replace('_', '-')}"


def usage_fault(command: str, entries: Mapping[str, Any]) -> str | None:
    """What is missing in or needless among the entries that were given, in one line; None where all is well."""
    going = ways(command, entries)
    for one in of_command(command):
        if one.name in entries and not _useful(one, going):
            return f"{flag(one)} is only for {' or '.join(WAYS[way] for way in use_of(one))}"
    for why in (command, *sorted(going)):
        missing = [one for one in of_command(command) if why in one.metadata["needed"]]
        if names := [
            f"{flag(one)} {one.metadata['metavar'] or ''}".strip()
            for one in missing
            if entries.get(one.name) in (None, "", "auto")
        ]:
            return f"{WAYS.get(why, why)} needs {', '.join(names)}"
    return None


def _useful(one: Field[Any], going: set[str]) -> bool:
    return not use_of(one) or bool(going & set(use_of(one)))


def check_entries(command: str, entries: Mapping[str, Any], source: str = "") -> None:
    """Refuse entries that are unknown, needless, missing or out of range; `source` is the file they come from."""
    known = {one.name: one for one in of_command(command)}
    where = f" in {source}" if source else ""
    if extra := [name for name in entries if name not in known]:
        raise InputError(f"config: expected entries of {command} ({', '.join(known)}), got {shorten(extra[0])}{where}")
    for name, value in entries.items():
        if not (value is None and known[name].default is None) and not fits(known[name], value):
            raise InputError(f"{name}: expected {expected(known[name])}, got {shorten(value)}{where}")
    if fault := usage_fault(command, entries):
        raise InputError(f"{'config' if source else 'settings'}: {fault}{where}")


def shorten(value: object) -> str:
    """A value as a message shows it; also of lists that hold each other."""
    return reprlib.repr(value)[:80]


def expected(one: Field[Any]) -> str:
    """What a setting takes, in words."""
    known, kind = one.metadata, kind_of(one)
    if known["choices"]:
        return " or ".join(known["choices"])
    if kind not in ("int", "float", "float | str"):
        texts = "a list of texts with {category} where the class goes"
        return {"bool": "true or false", "Sequence[str]": texts}.get(kind, "text")
    least, most = known["least"], known["most"]
    limits = f" of {least} or more" if most is None else f" from {least} to {most}"
    return {"int": "a whole number", "float": "a number", "float | str": "auto or a number"}[kind] + limits


def kind_of(one: Field[Any]) -> str:
    """The kind of a setting's value: str, int, float, float | str, bool or Sequence[str]."""
    return str(one.type).removesuffix(" | None")


def fits(one: Field[Any], value: object) -> bool:
    """Whether a setting can have this value."""
    known, kind = one.metadata, kind_of(one)
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "Sequence[str]":
        return isinstance(value, list | tuple) and bool(value) and all(_is_template(text) for text in value)
    if kind == "str" or (kind == "float | str" and value == "auto"):
        return isinstance(value, str) and (not known["choices"] or value in known["choices"])
    numbers = (int,) if kind == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, numbers) or not math.isfinite(value):
        return False
    return value >= known["least"] and (known["most"] is None or value <= known["most"])


def _is_template(text: object) -> bool:
    return isinstance(text, str) and "{category}" in text


def read_settings(command: str, options: Mapping[str, Any], config: str | None = None) -> Settings:
    """The settings that the options say, over what a config file says; checked.

    Raises:
        InputError: The file is no YAML mapping, or holds an entry that the command cannot use.
    """
    entries: dict[str, Any] = {}
    if config is not None:
        from synth_refine._io.untrusted import read_yaml  # which takes NumPy

        content = read_yaml("config", config)
        if not isinstance(content, dict):
            raise InputError(f"config: expected a mapping of names to values in {config}, got {shorten(content)}")
        entries = {name: value for name, value in content.items() if value is not None}
        if command == "embed":  # which takes the config.yaml of a run, so that it encodes as that did
            entries = {name: value for name, value in entries.items() if name in EMBED_AS and value != "auto"}
    names = {one.name for one in of_command(command)}
    entries |= {name: value for name, value in options.items() if name in names and value is not None}
    for name, value in entries.items():
        if isinstance(value, str) and value.startswith("~/"):  # which no shell has seen
            entries[name] = str(Path(value).expanduser())
    check_entries(command, entries, config or "")
    values: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in entries.items()}
    return Settings(**values)


def resolved(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries whose places are absolute, so that they mean the same from any folder."""
    found = dict(entries)
    for name in (
        "images",
        "classes",
        "synthetic",
        "test",
        "encoder",
        "weights",
        "logits",
        "text_prototypes",
        "out",
        "cache",
        "model",
    ):
        value = found.get(name)
        if value and value != "glyphs" and (name in ("out", "cache") or Path(value).exists() or bool(glob(value))):
            found[name] = str(Path(value).absolute())
    return found
