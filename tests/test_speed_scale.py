"""The benchmark of sharded refining: its arrays, its measures in this process, and what the table says of growth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import speed_scale, table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("speed") / "arrays"
    speed_scale.make_arrays(made, 70_000, 4, 3, logits=True)
    return made


def test_arrays_repeat_a_block_and_belong_together(folder: Path) -> None:
    features, logits, probabilities, given = (
        np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("features", "logits", "probabilities", "given")
    )
    assert (features.shape, features.dtype) == ((70_000, 4), np.float16)
    assert logits.shape == probabilities.shape == (70_000, 3)
    assert given.shape == (70_000,)
    np.testing.assert_array_equal(features[speed_scale.BLOCK :], features[: 70_000 - speed_scale.BLOCK])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_refining_is_measured_and_then_resumed(folder: Path) -> None:
    figures = speed_scale.refine(folder)
    assert figures["shards"] == 1
    assert figures["bare_seconds"] > 0
    written = (folder / "out" / "shards" / "part-000000.parquet").stat().st_mtime_ns
    speed_scale.resume(folder)
    assert (folder / "out" / "shards" / "part-000000.parquet").stat().st_mtime_ns > written


def test_growth_is_the_exponent_of_what_changed(tmp_path: Path) -> None:
    rows = [{"images": 1_000, "features": 4, "classes": 10, "seconds": 1.0, "peak_megabytes": 5, "growth": ""}]
    about = {"images": 100_000, "features": 4, "classes": 10}
    assert speed_scale._growth(rows, about, {"seconds": 100.0}) == {"growth": "1.00 in images"}
    assert speed_scale._growth(rows, {**about, "classes": 20}, {"seconds": 100.0}) == {"growth": ""}
    shown = table.speed_table([{"rows": [{**rows[0], **about, "seconds": 100.0, "growth": "1.00 in images"}]}])
    assert "| 1.00 in images |" in shown
    both = [{**row, "features": width} for row in rows for width in (256, 64)]
    speed_scale.plot(both, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 5_000
