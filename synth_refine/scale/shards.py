"""Labels of millions of images refined shard by shard: arrays on disk in, an artifact with its scores out.

    labels.npy, changes.csv, run.json   the artifact, which apply, revert, export and the others take
    shards/                             part-*.parquet with the scores of all rows, settings.json, manifest.jsonl

Every piece of at most `SHARD_ROWS` rows becomes one Parquet file, written whole or not at all and then listed with its
checksum. A run that was killed resumes behind what is listed and undamaged, to the same bytes.

Letters in shapes: N images, M synthetic images, D features, C classes, K classes reported per image.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from synth_refine._io.atomic import make_folder, write_atomic
from synth_refine._io.check import Array, InputError, is_auto
from synth_refine._io.csv import check_unique
from synth_refine._io.ray import check_engine, on_cluster
from synth_refine._io.store import Store, open_store
from synth_refine.labels.run import check_free
from synth_refine.refine import front
from synth_refine.refine.anchored import ROUNDS, check_options
from synth_refine.refine.estimates import Estimate, Estimates
from synth_refine.refine.solve import AnchoredDiagnostics
from synth_refine.scale.anchored import Anchored, prepare_anchored
from synth_refine.scale.artifact import write_from_shards
from synth_refine.scale.paper import check_width, make_rule, score_shard
from synth_refine.scale.tables import (
    SHARD_ROWS,
    Scores,
    Shard,
    cut_shards,
    digest,
    input_digests,
    shard_table,
    shards_sample,
)

WORK = ("steps/", "scratch/")  # what is kept until the shards are there
FOUND = "found"  # what the anchored refiner found: an entry of the store without a file


@dataclass(frozen=True)
class Summary:
    """What a run over shards left behind.

    Attributes:
        rows: Images, N.
        changed: Labels that were replaced.
        abstained: Labels that a person should look at.
        unscored: Images that could not be scored and kept their label.
        shards: Output files.
        reused: Those of them that an earlier run had finished.
        diagnostics: What the anchored refiner found; None for the paper's rule, or where all shards were reused.
        estimates: Its estimates of wrong labels, also where all shards were reused; None for the paper's rule.
        warnings: What a person should know, a line each, also where all shards were reused.
    """

    rows: int
    changed: int
    abstained: int
    unscored: int
    shards: int
    reused: int
    diagnostics: AnchoredDiagnostics | None
    estimates: Estimates | None
    warnings: tuple[str, ...]


def refine_shards(
    features: str | os.PathLike[str],
    given: str | os.PathLike[str] | NDArray[Any],
    out: str | os.PathLike[str],
    *,
    ids: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    refiner: str | None = None,
    synthetic_features: Array | None = None,
    synthetic_labels: Array | None = None,
    prototypes: Array | None = None,
    num_classes: int | None = None,
    threshold: Any = None,
    logits: str | os.PathLike[str] | None = None,
    head: Array | None = None,
    weight: float | None = None,
    text_prototypes: Array | None = None,
    second_view: str | os.PathLike[str] | None = None,
    force: bool = False,
    outliers: bool = False,
    seed: int = 0,
    rounds: int = ROUNDS,
    shard_rows: int = SHARD_ROWS,
    engine: str = "local",
    address: str | None = None,
    progress: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Summary:
    """Refine the labels of any number of images, in the memory of a bucket or a shard per thread.

    Decisions are those of `front.refine`, by the same algorithm, but for three or more copies of a picture with
    different labels: here they are scored too, since they may lie in any two shards. The paper's rule takes its
    classifier in one of three ways: as `logits` on disk; as a linear `head` whose logits are computed chunk by chunk
    and stored nowhere; or not at all, and the score is then the cosine. While the anchored refiner runs, the disk must
    hold a copy of the features with min(D, 384) float16 columns.

    Args:
        features: A .npy file of (N, D) floats, or a folder of .npy or of Parquet files, in the order of their names; a
            Parquet file has the features in the column `features`, a list per row.
        given: Given labels of the same images in the same order: a .npy file of (N,) integers, or a folder with as many
            files and rows as that of the features; in Parquet the column `given`; or the labels themselves.
        out: Folder of the artifact. Its shards/part-*.parquet have the columns `row`, `given`, `refined`, `action`,
            `reason`, `margin`, `confidence` and, best first, `classes` and `scores` of the five best classes (-1 and
            NaN where the image cannot be scored).
        ids: One per image, unique, for the artifact; by default the number of the row.
        class_names: Class names, (C,), for the artifact, which `apply` on a folder of images needs.
        refiner: "anchored" or "paper"; by default the first where there are synthetic features.
        synthetic_features: Features of the synthetic images by the same encoder, (M, D), at least one per class.
        synthetic_labels: Their intended classes, (M,) integers in [0, C).
        prototypes: For the paper's rule: mean feature of each class's synthetic images, (C, D).
        num_classes: C; by default the largest synthetic label plus one, or the number of prototypes.
        threshold: As for `front.refine`; the paper's rule needs a number here, or one per class, (C,).
        logits: For the paper's rule: classifier outputs, (N, C), stored as the features are; in Parquet the column
            `logits`.
        head: For the paper's rule: weights of a linear classifier, (C, D), or (C, D + 1) with the bias in the last
            column.
        weight: For the paper's rule: weight of the cosine, in [0, 1]; by default 0.5 with a classifier and 1 without.
        text_prototypes: For the anchored refiner: text features of the classes, (C, D).
        second_view: For the anchored refiner: logits of another classifier, (N, C), stored as `logits` are.
        force: For the anchored refiner: change labels although a check advises against it.
        outliers: For the anchored refiner: score which images show none of the classes, see `refine_anchored`.
        seed: For the anchored refiner: same seed, inputs and thread count, same files; not negative.
        rounds: For the anchored refiner: most rounds.
        shard_rows: Most rows of a .npy file that make a shard; a Parquet file is one shard.
        engine: For the paper's rule: `local`, this process, or `ray`, a Ray Data cluster whose nodes see the same
            folders.
        address: Of the Ray cluster.
        progress: Show progress bars on stderr.
        say: Called with every doubt: those about a sample of the inputs before the work, the others after it.

    Returns:
        Counts over all shards, those of earlier runs included.

    Raises:
        InputError: An input has the wrong kind, type, shape or range, the given labels are independent of the images,
            or `out` holds the result of other settings or of inputs that have changed since.
        BlockingIOError: Another process is writing to `out`.
    """
    check_engine(engine, address)
    if engine != "local" and front.default_refiner(synthetic_features) == "anchored" and refiner in (None, "anchored"):
        raise InputError(f"engine: the anchored refiner trains in one process, expected local, got {engine}")
    values = dict(locals())
    refiner = front.default_refiner(synthetic_features) if refiner is None else refiner
    front.check_use(refiner, values)
    check_options(None, seed=seed, rounds=rounds)
    if refiner == "paper" and (seed, rounds) != (0, ROUNDS):
        raise InputError(f"{'seed' if seed else 'rounds'}: the paper refiner over shards has no use for it")
    shards = cut_shards(features, given, logits if refiner == "paper" else second_view, shard_rows)
    warnings = _doubts(features, given, synthetic_features, synthetic_labels, prototypes, num_classes)
    for doubt in warnings:
        say(doubt)
    root = make_folder("out", out)
    check_free(root)
    if (root / "run.json").exists() and not (root / "shards" / "settings.json").exists():
        raise InputError(f"out: expected a new or empty folder, but {root} holds another artifact")
    if refiner == "anchored":
        plan = prepare_anchored(
            shards,
            synthetic_features,
            synthetic_labels,
            num_classes,
            text_prototypes,
            threshold,
            force,
            outliers,
            seed,
            rounds,
        )
        settings, classes = plan.settings, plan.classes
    else:
        if synthetic_features is not None and prototypes is None:
            raise InputError("prototypes: expected them for the paper's rule over shards, got synthetic features alone")
        if threshold is None or is_auto(threshold):
            raise InputError("threshold: expected a number for the paper's rule over shards, got none")
        assert prototypes is not None
        rule = make_rule(prototypes, threshold, head, weight, logits is not None)
        check_width(shards[0], rule)
        plan, settings, classes = None, rule.settings(), rule.directions.shape[1]
    settings, inputs = {"refiner": refiner, **settings}, input_digests(shards)
    if class_names is not None:
        if len(class_names) != classes:
            raise InputError(f"class_names: expected {classes}, got {len(class_names)}")
        settings["class_names"] = list(class_names)
    if ids is not None:
        check_unique("ids", ids)
        if len(ids) != (count := sum(shard.features.rows for shard in shards)):
            raise InputError(f"ids: expected {count}, one per row, got {len(ids)}")
        inputs["ids"] = digest(json.dumps(list(ids)).encode())
    with open_store(root / "shards", {**settings, **inputs}, name="out") as store:
        todo = [shard for shard in shards if store.done(shard.name) is None]
        found = None
        if plan is None:
            _fill(store, todo, partial(score_shard, rule), engine, address, progress, len(shards))
        elif todo or FOUND not in store.entries:
            found = _solved(store, todo, plan, progress, len(shards))
        store.drop([name for name in store.entries if name.startswith(WORK)])
        for folder in WORK:
            shutil.rmtree(store.root / folder, ignore_errors=True)
        store.finish([shard.name for shard in shards] + [FOUND] * (plan is not None))
        later, known = (store.entries.get(FOUND, {}).get(name, {}) for name in ("warnings", "estimates"))
        lines = [store.entries[shard.name] for shard in shards]
        about = settings if class_names is None else {**settings, "classes": list(class_names)}
        write_from_shards(root, store.root, shards, classes, about, inputs, ids)
    sums = {name: sum(line[name] for line in lines) for name in ("rows", "changed", "abstained", "unscored")}
    for doubt in later:
        say(doubt)
    return Summary(
        **sums,
        shards=len(shards),
        reused=len(shards) - len(todo),
        diagnostics=found,
        estimates=None if plan is None else Estimates(**{name: Estimate(**one) for name, one in known.items()}),
        warnings=(*warnings, *later),
    )


def _doubts(
    features: str | os.PathLike[str],
    given: str | os.PathLike[str] | NDArray[Any],
    synthetic_features: Array | None,
    synthetic_labels: Array | None,
    prototypes: Array | None,
    num_classes: int | None,
) -> tuple[str, ...]:
    """`front.check` on a sample from all over the files."""
    reference = synthetic_features if synthetic_features is not None else prototypes
    if reference is None:
        raise InputError("synthetic_features: expected features of synthetic images, or prototypes, got neither")
    labels, rows = shards_sample(features, given, front.ORDER_ROWS)
    as_numpy = {
        "synthetic_features": synthetic_features,
        "synthetic_labels": synthetic_labels,
        "prototypes": None if synthetic_features is not None else prototypes,
    }
    return front.check(np.asarray(rows, dtype=np.float32), labels, **as_numpy, num_classes=num_classes)


def _solved(store: Store, todo: list[Shard], plan: Anchored, progress: bool, total: int) -> AnchoredDiagnostics:
    """The shards that are missing by the anchored refiner, whose steps are kept in the store until they are there."""
    with plan.solved(store, progress) as solved:
        known = solved.diagnostics
        store.note(FOUND, None, warnings=list(known.warnings), estimates=asdict(known.estimates))
        _fill(store, todo, solved.scores, "local", None, progress, total)
        return solved.diagnostics


def _fill(
    store: Store,
    todo: list[Shard],
    score: Callable[[Shard], Scores],
    engine: str,
    address: str | None,
    progress: bool,
    total: int,
) -> None:
    """Write the shards that are missing, each whole or not at all."""
    work = _Work(score, str(store.root))
    results = _here(work, todo) if engine == "local" else on_cluster(todo, lambda shard: [work(shard)], address)
    missing = {shard.name for shard in todo}
    for name, sha256, entry in tqdm(results, "shards", total=total, initial=total - len(todo), disable=not progress):
        store.note(name, sha256, **entry)
        missing.discard(name)
    if missing:
        raise RuntimeError(f"engine: expected every shard back, {min(missing)} did not come")


@dataclass(frozen=True)
class _Work:
    """What is done to one shard, wherever: score it, write it, and say what was written."""

    score: Callable[[Shard], Scores]
    folder: str

    def __call__(self, shard: Shard) -> tuple[str, str, dict[str, int]]:
        import pyarrow.parquet as pq

        scores = self.score(shard)
        data = io.BytesIO()
        # Scores hardly repeat: a dictionary of them costs time and space.
        pq.write_table(shard_table(shard, scores), data, use_dictionary=["given", "refined", "action", "reason"])
        with write_atomic(Path(self.folder, shard.name)) as file:
            file.write(data.getbuffer())
        return shard.name, hashlib.sha256(data.getbuffer()).hexdigest(), scores.counts()


def _here(work: _Work, todo: list[Shard]) -> Iterator[tuple[str, str, dict[str, int]]]:
    """The work in this process, a shard per thread of torch.

    The search for the best classes runs on one thread only, so that several shards at once keep more cores busy than
    several threads on one matrix product; and the result does not depend on how many there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(1, min(threads, len(todo)))) as pool:
            pending: deque[Future[tuple[str, str, dict[str, int]]]] = deque()
            for shard in todo:
                pending.append(pool.submit(work, shard))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(threads)
