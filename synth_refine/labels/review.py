"""An artifact and the decisions of people in, another artifact out, which every command takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from synth_refine._io.atomic import file_hash
from synth_refine._io.check import InputError
from synth_refine._io.csv import check_unique, read_csv
from synth_refine.labels.artifact import NO_CLASS, Artifact, WrongBase, WrongIds, record
from synth_refine.labels.audit import NO_LABEL, audit
from synth_refine.labels.labelstudio import read_answers

COLUMNS = ("id", "given", "decision", "label")
"""Of decisions.csv."""

AUDITS = AUDIT, AUDIT_NONE, AUDIT_UNCLEAR = "audit", "audit-none", "audit-unclear"
"""Decisions that are answers of the audit: the right class, none of the classes, and that nobody can tell."""


def reviewed(
    artifact: Artifact,
    decisions: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    *,
    format: str = "csv",
) -> Artifact:
    """The artifact that the decisions of people make of another one: it changes what they accepted or corrected
    and leaves out what they removed.

    Write it with `write_artifact`; its run.json says under `reviewed` which artifact and which decisions it came from,
    and under `audit` what the answers of an audit say, see `audit`. Those answers change no label.

    Args:
        artifact: The artifact that the page showed.
        decisions: The file that the page exports: id, given, decision (accept, reject, correct or remove; for answers
            of the audit audit, audit-none or audit-unclear), label. The label of a rejected or removed image is the
            given one.
        classes: Class names, (C,), in the order of their labels; by default those that the artifact holds, or else the
            labels' numbers.
        format: `csv`, or `labelstudio` for the JSON that Label Studio exports of the tasks of `export`. There the
            chosen class says the decision: the proposed, the given or another one, or `NONE`. Where annotators chose
            different classes, nothing is decided; run.json says of how many images, as `disputed` under `reviewed`.

    Returns:
        An artifact of the same given labels. Accepted changes are in it as they were, corrected ones with the label
        that was chosen; where the refiner abstained, accept takes the class that the page named. Removed images are
        marked `remove` and keep the given label. Changes and removals that nobody decided on keep the given label and
        are marked `abstain`.

    Raises:
        WrongIds: An id that is not the artifact's.
        WrongBase: A given or accepted label that is not the artifact's: the decisions are about another refinement.
        InputError: No such file, or another kind of file, or an unknown decision or class.
    """
    if format not in FORMATS:
        raise InputError(f"format: expected {' or '.join(FORMATS)}, got {format!r}")
    entries, disputed = FORMATS[format](decisions)
    if classes is None:
        classes = artifact.classes or list(map(str, range(artifact.num_classes)))
    if len(classes) != artifact.num_classes:
        raise InputError(f"classes: expected {artifact.num_classes} names, got {len(classes)}")
    check_unique("classes", classes)
    rows = [entry for entry in entries if entry[2] not in AUDITS]
    asked = [entry for entry in entries if entry[2] in AUDITS]
    for some in (rows, asked):
        check_unique(f"decisions: id in {decisions}", [one for one, *_ in some])
    row_of = {one: row for row, one in enumerate(artifact.names)}
    class_of = {name: number for number, name in enumerate(classes)}
    labels = artifact.given.astype(np.int64)
    reason, open_rows = artifact.reason.copy(), artifact.action != "keep"
    removed = np.zeros(len(labels), dtype=bool)
    answers: dict[int, int] = {}
    for one, old, decision, name in (*rows, *asked):
        if one not in row_of:
            raise WrongIds(f"decisions: expected ids of the artifact, got {one!r}")
        row = row_of[one]
        for cell in (old, name) if decision not in (AUDIT_NONE, AUDIT_UNCLEAR) else (old,):
            if cell not in class_of:
                raise InputError(f"decisions: expected class names for {one!r}, got {cell!r}")
        given, label = int(artifact.given[row]), class_of.get(name, NO_LABEL)
        if decision in AUDITS:
            if class_of[old] != given:
                raise WrongBase(f"decisions: expected {one!r} to be given as {classes[given]!r}, got {old!r}")
            if decision != AUDIT_UNCLEAR:
                answers[row] = label if decision == AUDIT else NO_LABEL
            continue
        accepted = label if artifact.action[row] == "abstain" else int(artifact.labels[row])
        expected = {"accept": accepted, "reject": given, "correct": label, "remove": given}
        if decision not in expected:
            raise InputError(f"decisions: expected accept, reject, correct or remove for {one!r}, got {decision!r}")
        if class_of[old] != given or expected[decision] != label:
            raise WrongBase(
                f"decisions: expected {decision} of {classes[expected[decision]]!r} for {one!r}, given as "
                f"{classes[given]!r}, got {name!r}, given as {old!r}: they are about another refinement"
            )
        labels[row], open_rows[row], removed[row] = label, False, decision == "remove"
        if decision == "correct":
            reason[row] = "corrected by hand"
        elif removed[row] and reason[row] != NO_CLASS:
            reason[row] = "removed by hand"
    made = record(
        artifact.given,
        labels,
        num_classes=artifact.num_classes,
        ids=artifact.ids,
        abstained=open_rows,
        confidence=artifact.confidence,
        margin=artifact.margin,
        reason=reason,
        no_class=artifact.no_class,
        removed=removed,
        inputs=artifact.run["inputs"],
        settings=artifact.run.get("settings"),
    )
    about: dict[str, Any] = {"reviewed": {"artifact": artifact.hash, "decisions": file_hash(decisions)}}
    about["reviewed"] |= {"disputed": disputed} if disputed else {}
    if asked:
        about["audit"] = audit(artifact, made, answers, unclear=len(asked) - len(answers))
    return replace(made, run={**made.run, **about})


def _read_table(path: str | os.PathLike[str]) -> tuple[list[tuple[str, str, str, str]], int]:
    """The rows of decisions.csv, none of them disputed."""
    table = read_csv("decisions", path)
    if missing := [name for name in COLUMNS if name not in table]:
        raise InputError(f"decisions: expected the columns {', '.join(COLUMNS)} in {path}, got no {missing[0]}")
    ids, given, decisions, labels = (table[column] for column in COLUMNS)
    return list(zip(ids, given, decisions, labels, strict=True)), 0


FORMATS = {"csv": _read_table, "labelstudio": read_answers}
"""What decisions are read from."""
