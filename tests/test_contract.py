"""One contract over everything that has `.apply`, and over `inject`, `verify` and `export` with each of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import dataset_shapes as shapes
import numpy as np
import pytest
import torch
from dataset_shapes import CLASSES, given_labels

from synth_refine import InputError, refine_anchored, refine_labels
from synth_refine.labels.artifact import read_artifact, record, write_artifact
from synth_refine.labels.export import export
from synth_refine.labels.files import read_labels
from synth_refine.labels.inject import inject, verify
from synth_refine.labels.review import reviewed

GIVEN = given_labels()
REFINED = shapes.refined_labels(GIVEN)
EYE, LABELS = np.eye(CLASSES), np.arange(80) % CLASSES


def from_disk(folder: Path) -> Any:
    write_artifact(folder / "a", record(GIVEN, REFINED, num_classes=CLASSES))
    return read_artifact(folder / "a")


def after_review(folder: Path) -> Any:
    rows = [f"{row},{GIVEN[row]},accept,{REFINED[row]}\n" for row in np.flatnonzero(GIVEN != REFINED)]
    (folder / "decisions.csv").write_text("id,given,decision,label\n" + "".join(rows))
    return reviewed(record(GIVEN, REFINED, num_classes=CLASSES), folder / "decisions.csv")


@cache
def anchored() -> Any:
    return refine_anchored(EYE[REFINED], GIVEN, EYE, np.arange(CLASSES), rounds=1)


RESULTS: dict[str, Callable[[Path], Any]] = {
    "an artifact": lambda _: record(GIVEN, REFINED, num_classes=CLASSES),
    "an artifact from disk": from_disk,
    "a reviewed artifact": after_review,
    "the paper's rule": lambda _: refine_labels(EYE[REFINED], 4 * EYE[REFINED], EYE, 0.6),
    "the paper's rule in torch": lambda _: refine_labels(*map(torch.as_tensor, (EYE[REFINED], EYE[REFINED], EYE)), 0.6),
    "the anchored refiner": lambda _: anchored(),
}
"""Everything that has `.apply`; each of them makes REFINED of GIVEN."""


@pytest.fixture(params=RESULTS)
def result(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return RESULTS[request.param](tmp_path)


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i4", "<i8", torch.uint8, torch.int32, torch.int64])
def test_labels_come_back_in_the_kind_type_and_order_of_the_given_ones(result: Any, dtype: Any) -> None:
    given = GIVEN.astype(dtype) if isinstance(dtype, str) else torch.tensor(GIVEN, dtype=dtype)
    refined = result.apply(given)
    assert (type(refined), refined.dtype) == (type(given), given.dtype)
    assert refined.tolist() == REFINED.tolist()
    assert given.tolist() == GIVEN.tolist()
    if hasattr(result, "revert"):
        back = result.revert(refined)
        assert (type(back), back.dtype, back.tolist()) == (type(given), given.dtype, GIVEN.tolist())


@pytest.mark.parametrize(
    "given",
    [GIVEN[1:], GIVEN.tolist(), GIVEN.astype(float), GIVEN[:, None], None],
    ids=["short", "list", "float", "2d", "none"],
)
def test_what_are_no_such_labels_is_refused_in_one_line(result: Any, given: Any) -> None:
    with pytest.raises(InputError, match="^given: expected") as caught:
        result.apply(given)
    assert "\n" not in str(caught.value)


def test_other_labels_than_the_refined_ones_are_refused_where_these_are_known(result: Any) -> None:
    if getattr(result, "given", None) is None:
        pytest.skip("it was computed without given labels")
    with pytest.raises(InputError, match="1 of 40 differ, the first in row 7"):
        result.apply(np.where(np.arange(40) == 7, (GIVEN + 1) % CLASSES, GIVEN))


def test_it_goes_into_a_dataset_and_is_verified(result: Any) -> None:
    dataset = shapes.LraCifar(GIVEN)
    with pytest.raises(InputError, match="expected the refined labels from item access"):
        verify(dataset, result, k=None)
    report = inject(dataset, result)
    assert dataset.targets == REFINED.tolist()
    verify(dataset, result, k=None)
    assert inject(dataset, result).changed == 0
    assert report.revert().targets == GIVEN.tolist()


def test_it_is_exported(result: Any, tmp_path: Path) -> None:
    if getattr(result, "given", None) is None:
        with pytest.raises(InputError, match=r"labels: expected a result that knows .*; pass result\.apply\(given\)"):
            export(result, "csv", tmp_path / "labels.csv")
        result = result.apply(GIVEN)
    export(result, "csv", tmp_path / "labels.csv")
    assert read_labels(tmp_path / "labels.csv").tolist() == REFINED.tolist()
