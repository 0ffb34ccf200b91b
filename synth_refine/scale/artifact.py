"""The artifact of a refinement over shards, streamed from them: shards in, labels.npy, changes.csv and run.json out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from synth_refine._io.atomic import locked
from synth_refine._io.csv import csv_bytes
from synth_refine.labels.run import check_free, run_of, write_files
from synth_refine.scale.tables import Shard

COLUMNS = {"row": "id", "given": "old", "refined": "new"} | {
    name: name for name in ("action", "confidence", "margin", "reason")
}
"""Columns of changes.csv by those of the shards."""


def write_from_shards(
    root: Path,
    folder: Path,
    shards: list[Shard],
    num_classes: int,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    ids: Sequence[str] | None = None,
) -> None:
    """Write the artifact of finished shards into `root`, in the memory of one shard.

    Args:
        root: Folder of the artifact.
        folder: Folder of the shards.
        shards: All of them.
        num_classes: C.
        settings: Refiner, threshold, seed.
        inputs: What identifies the input files, see `input_digests`.
        ids: One per row; by default the row's number.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    def tables(columns: list[str]) -> Iterator[Any]:
        for shard in shards:
            yield pq.read_table(folder / shard.name, columns=columns)

    count = sum(shard.features.rows for shard in shards)
    hashes = {name: hashlib.sha256() for name in ("given", "refined")}
    changed = abstained = 0
    for table in tables(["given", "refined", "action"]):
        for name, hashed in hashes.items():
            hashed.update(table[name].to_numpy().astype("<i8").tobytes())
        changed += int((table["given"].to_numpy() != table["refined"].to_numpy()).sum())
        abstained += pc.sum(pc.equal(table["action"].cast("string"), "abstain")).as_py() or 0

    def labels(file: BinaryIO) -> None:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (count,)})
        for table in tables(["refined"]):
            file.write(table["refined"].to_numpy().astype("<i8").tobytes())

    def changes(file: BinaryIO) -> None:
        for number, table in enumerate(tables(list(COLUMNS))):
            some = table.filter(pc.not_equal(table["action"].cast("string"), "keep"))
            columns = {name: some[column].to_pylist() for column, name in COLUMNS.items()}
            if ids is not None:
                columns["id"] = [ids[row] for row in columns["id"]]
            if isinstance(names := settings.get("classes"), list):
                columns |= {f"{one}_class": [names[label] for label in columns[one]] for one in ("old", "new")}
            data = csv_bytes(columns)
            file.write(data if number == 0 else data.split(b"\n", 1)[1])

    digests = [hashed.hexdigest() for hashed in hashes.values()]
    run = run_of(num_classes, digests[0], np.dtype("<i8"), count, digests[1], changed, abstained, 0, settings, inputs)
    files: dict[str, Callable[[BinaryIO], object]] = {"labels.npy": labels, "changes.csv": changes}
    if ids is not None:
        files["ids.csv"] = lambda file: file.write(csv_bytes({"id": ids}))
    with locked(root):
        check_free(root, run)
        write_files(root, files, run)
