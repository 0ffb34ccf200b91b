"""What a refiner leaves to people in, tasks for Label Studio out; and its exported JSON in, decisions out.

A task shows one image. Its `data` has `image`, the address that Label Studio serves the image from, `image_id`,
`given`, `proposed` (empty where the refiner abstained) and `reason`; its prediction chooses the proposed class. Both
ways speak the JSON that Label Studio documents for tasks, https://labelstud.io/guide/task_format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from synth_refine import __version__
from synth_refine._io.check import InputError
from synth_refine._io.error import WrongIds
from synth_refine._io.untrusted import read_json
from synth_refine.labels.artifact import NO_CLASS, Artifact

NONE = "none of these classes"
"""The choice that leaves an image out."""

LOCAL_FILES = "/data/local-files/?d="
"""Where Label Studio serves the files of its own machine."""

MOST_BYTES = 1 << 29  # of an export: a million tasks of 500 bytes


def interface(classes: Sequence[str]) -> str:
    """The labeling interface that the tasks are made for, in Label Studio's XML."""
    choices = "".join(f"<Choice value={quoteattr(one)}/>" for one in (*classes, NONE))
    return (
        '<View><Image name="image" value="$image"/><Header value="given: $given, proposed: $proposed"/>'
        f'<Choices name="label" toName="image" choice="single">{choices}</Choices></View>'
    )


def task_bytes(artifact: Artifact, ids: Sequence[str], classes: Sequence[str], prefix: str = LOCAL_FILES) -> bytes:
    """Tasks with predictions for all images that ask for a person: changes, abstentions, proposed removals.

    Args:
        artifact: What the refiner decided.
        ids: The path of every image, (N,).
        classes: Class names, (C,).
        prefix: What comes before a path in the address of an image; paths are percent-encoded where it begins with a
            slash or http, but not in names of objects such as s3://bucket/cat/1.jpg.

    Raises:
        InputError: A class is called as the choice that leaves an image out.
        WrongIds: A path that UTF-8 cannot write.
    """
    if NONE in classes:
        raise InputError(f"classes: expected none that is called {NONE!r}, which is a choice beside the classes")
    return json.dumps(
        [_task(artifact, row, ids[row], classes, prefix) for row in artifact.waiting.tolist()], indent=1
    ).encode()


def _task(artifact: Artifact, row: int, path: str, classes: Sequence[str], prefix: str) -> dict[str, Any]:
    given, label = int(artifact.given[row]), int(artifact.labels[row])
    removal = artifact.reason[row] == NO_CLASS
    proposed = NONE if removal else classes[label] if artifact.action[row] == "change" else ""
    try:
        address = prefix + (quote(path) if prefix.startswith(("/", "http")) else path)
    except UnicodeEncodeError as error:
        raise WrongIds(f"ids: expected text that UTF-8 can write, got {path!r}") from error
    data = {"image": address, "image_id": path, "given": classes[given], "proposed": proposed}
    task: dict[str, Any] = {"data": {**data, "reason": str(artifact.reason[row])}}
    if proposed:
        score = float((artifact.no_class if removal else artifact.confidence)[row])
        choice = {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [proposed]}}
        prediction = {"model_version": f"synth-refine {__version__}", "result": [choice]}
        task["predictions"] = [prediction if np.isnan(score) else {**prediction, "score": score}]
    return task


def read_answers(path: str | os.PathLike[str]) -> tuple[list[tuple[str, str, str, str]], int]:
    """Decisions as the rows of decisions.csv have them, from the JSON that Label Studio exports.

    Args:
        path: The file of the export as JSON.

    Returns:
        Id, given class, decision and class of every image that its annotators agree on, and the number of images on
        which they do not: those are left undecided, as are those that everybody skipped.

    Raises:
        InputError: No such file, or one of another layout.
    """
    tasks = read_json("decisions", path, MOST_BYTES)
    rows, disputed = [], 0
    try:
        for task in _typed(tasks, list):
            data = _typed(task["data"], dict)
            one, given, proposed = (_typed(data[name], str) for name in ("image_id", "given", "proposed"))
            chosen = {answer for annotation in _typed(task["annotations"], list) for answer in _chosen(annotation)}
            disputed += len(chosen) > 1
            rows += [(one, given, *_decision(given, proposed, answer)) for answer in chosen if len(chosen) == 1]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"decisions: expected tasks of `export --format labelstudio` that Label Studio exported as JSON in {path}; "
            f"task {len(rows)} or a later one has no fitting entry: {' '.join(str(error).split())[:100]}"
        ) from error
    return rows, disputed


def _chosen(annotation: Any) -> list[str]:
    """The class that an annotation chose; none where it was skipped or left empty."""
    if _typed(annotation, dict).get("was_cancelled"):
        return []
    results = [_typed(one, dict) for one in _typed(annotation["result"], list)]
    choices = [_typed(one["value"]["choices"], list) for one in results if one.get("from_name") == "label"]
    if any(len(one) != 1 for one in choices) or len(choices) > 1:
        raise ValueError(f"label: expected one choice, got {choices}")
    return [_typed(one[0], str) for one in choices]


def _decision(given: str, proposed: str, chosen: str) -> tuple[str, str]:
    if chosen == NONE:
        return "remove", given
    if chosen == given:
        return "reject", given
    return ("accept" if chosen == proposed else "correct"), chosen


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value
