"""The paper's rule over shards: millions of images in the memory of a shard per thread, on one machine or many.

Every piece of at most `SHARD_ROWS` rows becomes one Parquet file, written whole or not at all and then listed in
manifest.jsonl with its hash. A run that was killed resumes: what is listed and undamaged is kept.

Letters in shapes: N images, D features, C classes, K classes reported per image.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from synth_refine._io.atomic import file_hash, locked, make_folder, remove_unfinished, write_atomic
from synth_refine._io.check import Array, InputError, check_array, check_floating, float_tensor
from synth_refine._io.ray import check_engine, on_cluster
from synth_refine.labels.artifact import versions
from synth_refine.refine.paper import Refinement, chunk_rows, class_thresholds, prototype_directions, score_rows
from synth_refine.scale.tables import (
    SHARD_ROWS,
    Shard,
    cut_shards,
    digest,
    input_digests,
    read_chunks,
    read_given,
    shard_table,
)

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1

TOP = 5


@dataclass(frozen=True)
class Rule:
    """The paper's rule ready to be applied to any shard, on any machine.

    Attributes:
        directions: Prototypes of length one times `weight`, (D, C) float32.
        thresholds: Smallest score at which a label is replaced, (C,).
        weight: Weight of the cosine.
        head: Linear classifier on the features, (C, D), or (C, D + 1) with the bias as the last column.
    """

    directions: NDArray[np.float32]
    thresholds: NDArray[np.float64]
    weight: float
    head: NDArray[np.float32] | None


@dataclass(frozen=True)
class Summary:
    """What a run over shards left behind.

    Attributes:
        rows: Images, N.
        changed: Labels that were replaced.
        skipped: Images that could not be scored and kept their label.
        shards: Output files.
        reused: Those of them that an earlier run had finished.
    """

    rows: int
    changed: int
    skipped: int
    shards: int
    reused: int


def refine_shards(
    features: str | os.PathLike[str],
    given: str | os.PathLike[str],
    prototypes: Array,
    threshold: float | Sequence[float] | Array,
    out: str | os.PathLike[str],
    *,
    logits: str | os.PathLike[str] | None = None,
    head: Array | None = None,
    weight: float | None = None,
    shard_rows: int = SHARD_ROWS,
    engine: str = "local",
    address: str | None = None,
    progress: bool = False,
) -> Summary:
    """Refine the labels of any number of images, one shard at a time.

    The scores are those of `refine_labels`, in float32. Its classifier comes in one of three ways: as `logits` on disk;
    as a linear `head` whose logits are computed chunk by chunk and stored nowhere (ten million times a thousand of
    them would be 40 GB); or not at all, and the score is then the cosine alone.

    Args:
        features: A .npy file of (N, D) floats, or a folder of .npy or of Parquet files, taken in the order of their
            names; a Parquet file has the features in the column `features`, a list per row.
        given: Given labels of the same images in the same order: a .npy file of (N,) integers, or a folder with as many
            files and rows as that of the features; in Parquet the column `given`.
        prototypes: Mean feature of each class's synthetic images, (C, D).
        threshold: Smallest score at which a label is replaced, one number or one per class, (C,).
        out: Folder of the result: shards/part-*.parquet with the columns `row`, `given`, `refined`, `confidence` and,
            best first, `classes` and `scores` of the five best classes (-1 and NaN where the image could not be
            scored); manifest.jsonl; config.json; and, once all is done, labels.npy, (N,) int64.
        logits: Classifier outputs, (N, C), stored as the features are; in Parquet the column `logits`.
        head: Weights of a linear classifier on the features, (C, D), or (C, D + 1) with the bias in the last column.
        weight: Weight of the cosine, in [0, 1]; by default 0.5 with a classifier and 1 without.
        shard_rows: Most rows of a .npy file that make a shard; a Parquet file is one shard.
        engine: `local`, this process; or `ray`, a Ray Data cluster whose nodes see the same folders.
        address: Of the Ray cluster; by default the one that RAY_ADDRESS names, one that runs on this machine, or a new
            local one.
        progress: Show a progress bar on stderr.

    Returns:
        Counts over all shards, those of earlier runs included.

    Raises:
        InputError: An input has the wrong kind, type, shape or range, or `out` holds the result of another
            configuration or of inputs that have changed since.
        BlockingIOError: Another process is writing to `out`.
    """
    check_engine(engine)
    rule = make_rule(prototypes, threshold, head, weight, logits is not None)
    shards = cut_shards(features, given, logits, shard_rows)
    _check_width(shards[0], rule)
    config = _config(rule, shards)
    root = make_folder("out", out)
    with locked(root):
        settle_config(root, config)
        return write_shards(root, shards, config, partial(refine_shard, rule), engine, address, progress)


def write_shards(
    root: Path,
    shards: list[Shard],
    config: dict[str, Any],
    score: Callable[[Shard], tuple[pa.Table, int]],
    engine: str,
    address: str | None,
    progress: bool,
) -> Summary:
    """Write every shard that is not there as its manifest line says, then the labels of all; `root` is locked."""
    (root / "shards").mkdir(exist_ok=True)
    config_hash = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    done = _verified(root, shards, config_hash)
    todo = [shard for shard in shards if shard.number not in done]
    reused = len(done)
    work = _Work(score, str(root / "shards"))
    results = _here(work, todo) if engine == "local" else _on_ray(work, todo, address)
    with open(root / "manifest.jsonl", "ab") as manifest:
        bar = tqdm(results, "shards", total=len(shards), initial=reused, disable=not progress)
        for line in bar:
            done[line["shard"]] = line
            manifest.write(json.dumps({**line, "config": config_hash}).encode() + b"\n")
            manifest.flush()
            os.fsync(manifest.fileno())
    if missing := [shard.name for shard in shards if shard.number not in done]:
        raise RuntimeError(f"engine: expected every shard back, {missing[0]} did not come")
    remove_unfinished(root)  # by workers of a cluster that were killed
    _write_labels(root, shards)
    rows, changed, skipped = (sum(line[name] for line in done.values()) for name in ("rows", "changed", "skipped"))
    return Summary(rows, changed, skipped, len(shards), reused)


def _on_ray(work: _Work, todo: list[Shard], address: str | None) -> Iterator[dict[str, Any]]:
    """The work on a Ray cluster, a task per shard; retries and backpressure are Ray Data's.

    A task that is repeated, because its worker or its node died, writes the same file again, whole or not at all.
    """
    return on_cluster(todo, lambda shard: [work(shard)], address)


@dataclass(frozen=True)
class _Work:
    """What is done to one shard, wherever: score it, write it, and say what was written."""

    score: Callable[[Shard], tuple[pa.Table, int]]
    folder: str

    def __call__(self, shard: Shard) -> dict[str, Any]:
        import pyarrow.parquet as pq

        table, skipped = self.score(shard)
        data = io.BytesIO()
        # Scores hardly repeat: a dictionary of them costs time and space.
        pq.write_table(table, data, use_dictionary=["given", "refined"])
        with write_atomic(Path(self.folder, shard.name)) as file:
            file.write(data.getbuffer())
        return {
            "shard": shard.number,
            "rows": shard.features.rows,
            "sha256": hashlib.sha256(data.getbuffer()).hexdigest(),
            "changed": int((table["given"].to_numpy() != table["refined"].to_numpy()).sum()),
            "skipped": skipped,
        }


def _here(work: _Work, todo: list[Shard]) -> Iterator[dict[str, Any]]:
    """The work in this process, a shard per thread of torch.

    The search for the best classes runs on one thread only, so that several shards at once keep more cores busy than
    several threads on one matrix product; and the result does not depend on how many there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(1, min(threads, len(todo)))) as pool:
            pending: deque[Future[dict[str, Any]]] = deque()
            for shard in todo:
                pending.append(pool.submit(work, shard))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(threads)


def refine_shard(rule: Rule, shard: Shard) -> tuple[pa.Table, int]:
    """The table of one shard, and how many of its images could not be scored."""
    cpu, num_classes = torch.device("cpu"), rule.directions.shape[1]
    given = read_given(shard, num_classes)
    # Copies: what comes through Ray's object store is read-only.
    directions, limits = (float_tensor(values, torch.float32, cpu) for values in (rule.directions, rule.thresholds))
    head = None if rule.head is None else float_tensor(rule.head, torch.float32, cpu).T  # (D, C) or (D + 1, C)
    step, top = chunk_rows(num_classes, len(directions)), min(TOP, num_classes)
    outputs = None if shard.logits is None else read_chunks("logits", shard.logits, step, num_classes)
    classes = np.empty((shard.features.rows, top), dtype=np.int32)
    scores = np.empty((shard.features.rows, top), dtype=np.float32)
    ties, start = [np.empty((0, 2), dtype=np.int64)], 0
    with torch.no_grad():
        for values in read_chunks("features", shard.features, step, directions.shape[0]):
            chunk, logits = float_tensor(values, torch.float32, cpu), None
            if head is not None:
                logits = chunk @ head[: chunk.shape[1]]
                logits = logits.add_(head[-1]) if len(head) > chunk.shape[1] else logits
            elif outputs is not None:
                logits = float_tensor(next(outputs), torch.float32, cpu)
            scored = score_rows(chunk, logits, directions, rule.weight, top)
            rows = slice(start, start + len(chunk))
            classes[rows], scores[rows] = scored.classes.numpy(), scored.values.numpy()
            ties.append(scored.ties.numpy() + np.array([start, 0]))
            start += len(chunk)
    best, confidence = classes[:, 0].astype(np.int64), scores[:, 0]
    accepted = (best >= 0) & (confidence >= limits.numpy()[best])
    refined = Refinement(best, confidence, accepted, np.concatenate(ties)).apply(given)
    return shard_table(shard, given, refined, classes, scores), int((best < 0).sum())


def make_rule(
    prototypes: Array,
    threshold: float | Sequence[float] | Array,
    head: Array | None,
    weight: float | None,
    with_logits: bool,
) -> Rule:
    """The rule, after checking all that needs no shard."""
    check_array("prototypes", prototypes, ("C", "D"))
    check_floating("prototypes", prototypes)
    num_classes, width = prototypes.shape
    if num_classes == 0 or width == 0:
        raise InputError(f"prototypes: expected at least one class and one feature, got {tuple(prototypes.shape)}")
    classified = with_logits or head is not None
    if head is not None:
        if with_logits:
            raise InputError("head: expected None beside logits, got both; one classifier is enough")
        check_array("head", head, (num_classes, "D"))
        check_floating("head", head)
        if head.shape[1] not in (width, width + 1):
            raise InputError(
                f"head: expected shape ({num_classes}, {width}) or ({num_classes}, {width + 1}), "
                f"got {tuple(head.shape)}"
            )
    weight = (0.5 if classified else 1.0) if weight is None else weight
    if not 0 <= weight <= 1:
        raise InputError(f"weight: expected a number in [0, 1], got {weight}")
    if weight < 1 and not classified:
        raise InputError(f"weight: expected 1 without logits or head, got {weight}")
    cpu = torch.device("cpu")
    directions = prototype_directions(prototypes, torch.float32, cpu).T * weight
    return Rule(
        directions.contiguous().numpy(),
        class_thresholds(threshold, num_classes).numpy().copy(),
        weight,
        None if head is None else float_tensor(head, torch.float32, cpu).numpy(),
    )


def _check_width(shard: Shard, rule: Rule) -> None:
    """Fail before the first shard where no shard could fit."""
    width, num_classes = rule.directions.shape
    found = next(read_chunks("features", shard.features, 1, "D")).shape[1]
    if found != width:
        where = f"({num_classes}, {found}) like the features in {shard.features.path}"
        raise InputError(f"prototypes: expected shape {where}, got ({num_classes}, {width})")
    next(read_chunks("given", shard.given, 1))
    if shard.logits is not None:
        next(read_chunks("logits", shard.logits, 1, num_classes))


def _config(rule: Rule, shards: list[Shard]) -> dict[str, Any]:
    """All that the result depends on. Files count by name, size and time of change, as for make."""
    limits = rule.thresholds
    config: dict[str, Any] = {
        "format": FORMAT,
        "weight": rule.weight,
        "threshold": limits[0] if (limits == limits[0]).all() else digest(limits.tobytes()),
        "prototypes": digest(rule.directions.tobytes()),
        "head": None if rule.head is None else digest(rule.head.tobytes()),
    }
    return config | input_digests(shards)


def settle_config(root: Path, config: dict[str, Any]) -> None:
    """Write down the configuration, or make sure that it is the one of the shards that are there."""
    path = root / "config.json"
    if path.exists():
        there = _config_there(path)
        if any((root / "shards").glob("*.parquet")):
            for name in {**config, **there}:  # the weight first: the prototypes are scaled by it
                if there.get(name) != config.get(name):
                    raise InputError(
                        f"{name}: expected what the shards in {root} were made from ({_brief(there.get(name))}), "
                        f"got {_brief(config.get(name))}; choose another folder, or delete that one to start afresh"
                    )
            return
        # Ours, but an input was refused or the run was stopped before the first shard was done.
    elif others := [one.name for one in (*root.iterdir(), *(root / "shards").glob("*")) if _is_foreign(one.name)]:
        raise InputError(f"out: expected a new or empty folder, but {root} holds {others[0]}")
    with write_atomic(path) as file:
        file.write(json.dumps({"config": config, "versions": versions()}, indent=1).encode() + b"\n")


def _config_there(path: Path) -> dict[str, Any]:
    try:
        there = dict(json.loads(path.read_bytes())["config"])
        if "format" in there:
            return there
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"out: {path} is not, or no longer, the configuration of such a run; choose another folder, or delete that one "
        "to start afresh"
    )


def _is_foreign(name: str) -> bool:
    return name != "shards" and not name.startswith(".")


def _brief(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _verified(root: Path, shards: list[Shard], config_hash: str) -> dict[int, dict[str, Any]]:
    """The lines of the manifest whose files are as they were written; the manifest is left with these alone."""
    remove_unfinished(root)
    path = root / "manifest.jsonl"
    lines: dict[int, dict[str, Any]] = {}
    for text in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            line = json.loads(text)
            if line.pop("config") == config_hash:
                lines[line["shard"]] = {**line, "rows": int(line["rows"])}
        except (ValueError, KeyError, TypeError, AttributeError):  # torn by a crash, or damaged: done again
            continue
    done = {}
    for shard in shards:
        line, file = lines.get(shard.number), root / "shards" / shard.name
        if line is not None and file.is_file() and file_hash(file) == line.get("sha256"):
            done[shard.number] = line
    with write_atomic(path) as manifest:
        for line in done.values():
            manifest.write(json.dumps({**line, "config": config_hash}).encode() + b"\n")
    return done


def _write_labels(root: Path, shards: list[Shard]) -> None:
    """The refined labels of all shards as one .npy file, streamed."""
    import pyarrow.parquet as pq

    count = sum(shard.features.rows for shard in shards)
    with write_atomic(root / "labels.npy") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (count,)})
        for shard in shards:
            table = pq.read_table(root / "shards" / shard.name, columns=["refined"])
            file.write(table["refined"].to_numpy().astype("<i8").tobytes())
