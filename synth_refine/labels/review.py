"""Decisions of people in, another artifact out."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from synth_refine._io.atomic import file_hash
from synth_refine._io.check import InputError
from synth_refine._io.csv import check_unique, read_csv
from synth_refine.labels.artifact import Artifact, WrongBase, WrongIds, record

COLUMNS = ("id", "given", "decision", "label")
"""Of decisions.csv."""


def decided(artifact: Artifact, decisions: str | os.PathLike[str], classes: Sequence[str] | None = None) -> Artifact:
    """The artifact that people left of a refinement: what they accepted or corrected is changed, and nothing else.

    Args:
        artifact: The artifact that the page showed.
        decisions: The file that the page exports: id, given, decision (accept, reject or correct), label.
        classes: Class names, (C,), in the order of their labels; by default those that the artifact's settings hold, or
            else the labels' numbers.

    Returns:
        An artifact of the same given labels. Accepted changes are in it as they were, corrected ones with the label
        that was chosen. Changes that nobody decided on keep the given label and are marked `abstain`.

    Raises:
        WrongIds: An id that is not the artifact's.
        WrongBase: A given or accepted label that is not the artifact's: the decisions are about another refinement.
        InputError: No such file, or another kind of file, or an unknown decision or class.
    """
    table = read_csv("decisions", decisions)
    if missing := [name for name in COLUMNS if name not in table]:
        raise InputError(f"decisions: expected the columns {', '.join(COLUMNS)} in {decisions}, got no {missing[0]}")
    if classes is None:
        known = artifact.run.get("settings", {}).get("classes")
        classes = list(map(str, known if isinstance(known, list) else range(artifact.num_classes)))
    if len(classes) != artifact.num_classes:
        raise InputError(f"classes: expected {artifact.num_classes} names, got {len(classes)}")
    check_unique("classes", classes)
    check_unique(f"decisions: id in {decisions}", table["id"])
    own = artifact.ids if artifact.ids is not None else list(map(str, range(len(artifact.labels))))
    row_of, class_of = {one: row for row, one in enumerate(own)}, {name: number for number, name in enumerate(classes)}
    given = artifact.given.astype(np.int64)
    labels, reason = given.copy(), artifact.reason.astype(object)
    undecided = artifact.action != "keep"
    for one, old, decision, name in zip(*(table[column] for column in COLUMNS), strict=True):
        if one not in row_of:
            raise WrongIds(f"decisions: expected ids of the artifact, got {one!r}")
        row = row_of[one]
        for cell in (old, name):
            if cell not in class_of:
                raise InputError(f"decisions: expected class names for {one!r}, got {cell!r}")
        label = class_of[name]
        expected = {"accept": int(artifact.labels[row]), "reject": int(given[row]), "correct": label}
        if decision not in expected:
            raise InputError(f"decisions: expected accept, reject or correct for {one!r}, got {decision!r}")
        if class_of[old] != given[row] or expected[decision] != label:
            raise WrongBase(
                f"decisions: expected {decision} of {classes[expected[decision]]!r} for {one!r}, given as "
                f"{classes[int(given[row])]!r}, got {name!r}, given as {old!r}: they are about another refinement"
            )
        labels[row], undecided[row] = label, False
        if decision == "correct":
            reason[row] = "corrected by hand"
    return record(
        artifact.given,
        labels,
        num_classes=artifact.num_classes,
        ids=artifact.ids,
        abstained=undecided,
        confidence=artifact.confidence,
        margin=artifact.margin,
        reason=reason.astype(np.str_),
        inputs={**artifact.run["inputs"], "decisions": file_hash(decisions)},
        settings=artifact.run.get("settings", {}),
    )
