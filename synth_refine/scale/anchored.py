"""The anchored refiner over shards: arrays on disk in, what is decided about every row out, resumable.

A first pass over the inputs takes mean and variance, a second one deals the components of the features into random
buckets (`refine.rows`), a third one looks for neighbours. From there on the algorithm is that of `refine.em`; what is
decided about every row goes into one file by the rows' numbers, which the shards are then cut from. Every finished step
leaves a file in the store, so that a run that was killed resumes to the same bytes.

Letters in shapes: N images, M synthetic images, D features, K components, C classes, n rows of a chunk, V labels of
neighbours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from synth_refine._io.atomic import file_hash
from synth_refine._io.check import Array, InputError, check_array, check_floating, float_tensor, label_tensor
from synth_refine._io.store import Store
from synth_refine.refine.anchored import CHUNK_ELEMENTS, check_finite, check_options, checked_synthetic
from synth_refine.refine.decide import propose
from synth_refine.refine.em import EM
from synth_refine.refine.outliers import proposed, solve_without
from synth_refine.refine.paper import best_classes
from synth_refine.refine.result import CPU, Action, Reason
from synth_refine.refine.rows import Bucket, Chunk, Frame, Rows, bucket_of, fit_frame, neighbourhood, neighbours_like
from synth_refine.refine.solve import AnchoredDiagnostics, check_order, diagnostics, solve
from synth_refine.refine.state import Saved, leveled
from synth_refine.scale.tables import TOP, Scores, Shard, digest, read_chunks, read_given

FLAT = {"features": "<f2", "given": "<i4", "rows": "<i8", "view": "<i4"}
"""The scratch files of dealt rows, without headers, and the type of their numbers."""


@dataclass(frozen=True)
class DiskRows(Rows):
    """Rows in scratch files.

    Attributes:
        folder: Holds the `FLAT` files and, per bucket, the labels of neighbours.
        ends: Where each bucket begins, and where the last one ends.
        width: K.
        has_view: Whether there is a second annotator.
        neighbours: See `Rows`; 0 until neighbours are there.
        bar: Counts the rows that were read.
    """

    folder: Path
    ends: list[int]
    width: int
    has_view: bool
    neighbours: float
    bar: tqdm[Any] = field(repr=False)

    def bucket(self, number: int) -> Bucket:
        """The rows of one bucket, read whole."""
        start, stop = self.ends[number], self.ends[number + 1]

        def read(name: str, columns: int = 1) -> Tensor:
            dtype = np.dtype(FLAT[name])
            values = np.fromfile(
                self.folder / name, dtype, (stop - start) * columns, offset=start * columns * dtype.itemsize
            )
            return torch.from_numpy(values)

        self.bar.set_postfix_str(f"{stop:,} of {len(self):,} rows", refresh=False)
        features = read("features", self.width).reshape(-1, self.width)
        view = read("view").long() if self.has_view else None
        bucket = Bucket(features, read("given").long(), read("rows"), view)
        if not self.neighbours:
            return bucket
        with safe_open(self.folder / near_name(number), "pt") as file:
            labels, weights = file.get_tensor("labels").long(), file.get_tensor("weights")
        return Bucket(features, bucket.given, bucket.numbers, view, labels, weights)


def near_name(number: int) -> str:
    """The file of a bucket's neighbours."""
    return f"near-{number:05d}.safetensors"


@dataclass(frozen=True)
class StoreSteps:
    """Steps of the algorithm, kept in a store."""

    store: Store

    def load(self, name: str) -> Saved | None:
        """What was kept; None where there is nothing, or something damaged, which is then done again."""
        path = f"steps/{name}.safetensors"
        if self.store.done(path) is None:
            return None
        try:
            with safe_open(self.store.root / path, "pt") as file:
                names = file.keys()  # such a file cannot be iterated over itself
                return Saved({one: file.get_tensor(one) for one in names}, json.loads(file.metadata()["info"]))
        except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, name: str, saved: Saved) -> Saved:
        """Keep it."""
        tensors = {one: value.detach().contiguous() for one, value in saved.tensors.items()}
        self.store.put(f"steps/{name}.safetensors", save(tensors, {"info": json.dumps(saved.info)}))
        return saved


@dataclass(frozen=True)
class Anchored:
    """An anchored run over shards that is ready to start.

    Attributes:
        shards: The inputs in pieces.
        synthetic: Features of the synthetic images, (M, D) float32.
        intended: Their classes, (M,) int64.
        classes: C.
        text: Text features of the classes, (C, D) float32, or None.
        threshold: See `solve`.
        force: See `solve`.
        outliers: See `solve_without`.
        seed: Draws everything.
        rounds: Most rounds.
    """

    shards: list[Shard]
    synthetic: Tensor
    intended: Tensor
    classes: int
    text: Tensor | None
    threshold: float | str | None
    force: bool
    outliers: bool
    seed: int
    rounds: int

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on beside the inputs."""
        arrays = {"synthetic_features": self.synthetic, "synthetic_labels": self.intended, "text_prototypes": self.text}
        hashes = {name: None if one is None else digest(one.numpy().tobytes()) for name, one in arrays.items()}
        names = ("classes", "threshold", "force", "outliers", "seed", "rounds")
        return {**hashes, **{name: getattr(self, name) for name in names}}

    @contextmanager
    def solved(self, store: Store, progress: bool) -> Iterator[Solved]:
        """Run the algorithm, or what is left of it."""
        if not any(len(numbers) for _, _, numbers in self._read()):  # up to the first row that can be scored
            yield Solved(self._unscored(store), self.classes, AnchoredDiagnostics())
            return
        steps = StoreSteps(store)
        with tqdm(total=self.rounds, unit=" rounds", disable=not progress) as bar:
            frame, rows = self._rows(store, steps, bar)
            words = None if self.text is None else frame.text(self.text)
            synthetic = frame.synthetic(self.synthetic)
            em = EM(
                rows, synthetic, self.intended, self.classes, self.seed, self.rounds, words=words, steps=steps, bar=bar
            )
            check_order(em)
            solved = solve_without if self.outliers else solve
            solution = solved(em, threshold=self.threshold, force=self.force)
            path = self._results(store, em, solution, bar)
        yield Solved(path, self.classes, diagnostics(em, solution))

    def _rows(self, store: Store, steps: StoreSteps, bar: tqdm[Any]) -> tuple[Frame, DiskRows]:
        """The frame, and the rows in scratch files."""
        folder = store.root / "scratch"
        folder.mkdir(exist_ok=True)
        total, has_view = sum(shard.features.rows for shard in self.shards), self.shards[0].logits is not None
        names = [name for name in FLAT if has_view or name != "view"]
        saved = steps.load("frame")
        if saved is None or any(store.done(f"scratch/{name}") is None for name in names):
            bar.set_description("statistics")
            scored = np.zeros(total, dtype=bool)

            def noted() -> Iterator[Chunk]:
                for chunk in self._read():
                    scored[chunk[2]] = True
                    yield chunk

            frame, ends = fit_frame(noted, total, self.synthetic, self.seed)
            bar.set_description("copy")
            self._deal(folder, frame, ends, names, scored)
            for name in names:
                store.note(f"scratch/{name}", file_hash(folder / name))
            saved = steps.save("frame", Saved(frame.tensors(), {"ends": ends, "width": frame.width}))
        tensors = saved.tensors
        order = ("center", "scale", "synthetic_center", "synthetic_scale")
        center, scale, synthetic_center, synthetic_scale = (tensors[name] for name in order)
        frame = Frame(center, scale, synthetic_center, synthetic_scale, tensors.get("columns"))
        rows = DiskRows(folder, saved.info["ends"], saved.info["width"], has_view, 0.0, bar)
        squares = []
        for number in range(len(rows.ends) - 1):  # those of an earlier run are checked
            bar.set_description(f"neighbours, bucket {number + 1} of {len(rows.ends) - 1}")
            squares.append(self._near(store, rows, number))
        return frame, DiskRows(folder, rows.ends, rows.width, has_view, neighbours_like(squares), bar)

    def _near(self, store: Store, rows: DiskRows, number: int) -> Tensor:
        name = f"scratch/{near_name(number)}"
        if store.done(name) is None:
            labels, weights, squares = neighbourhood(rows.bucket(number), self.classes)
            tensors = {"labels": labels.int(), "weights": weights, "squares": squares}
            store.put(name, save(tensors))
        with safe_open(store.root / name, "pt") as file:
            found: Tensor = file.get_tensor("squares")
        return found

    def _read(self) -> Iterator[Chunk]:
        """The finite rows of the inputs chunk by chunk."""
        width = self.synthetic.shape[1]
        for shard in self.shards:
            given, start = read_given(shard, self.classes), 0
            for values in read_chunks("features", shard.features, max(64, CHUNK_ELEMENTS // width), width):
                chunk = float_tensor(values, torch.float32, CPU)
                fine = chunk.isfinite().all(dim=1)
                places = start + fine.nonzero()[:, 0].numpy()
                yield (chunk if len(places) == len(chunk) else chunk[fine]), given[places], shard.first + places
                start += len(chunk)

    def _deal(
        self, folder: Path, frame: Frame, ends: list[int], names: Sequence[str], scored: NDArray[np.bool_]
    ) -> None:
        """Write the scratch files: each finite row to the next free place of its bucket."""
        free, view = list(ends[:-1]), self._view(scored) if "view" in names else None
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(folder / name, "wb")) for name in names}
            for chunk, given, numbers in self._read():
                columns: dict[str, NDArray[Any]] = {
                    "features": frame.real(chunk).numpy(),
                    "given": given,
                    "rows": numbers,
                }
                if view is not None:
                    columns["view"] = view[numbers]
                bucket = bucket_of(numbers, len(free), self.seed)
                order, many = bucket.argsort(kind="stable"), np.bincount(bucket, minlength=len(free))
                for number, rows in enumerate(np.split(order, many.cumsum()[:-1])):
                    if len(rows):
                        for name, file in files.items():
                            values = columns[name][rows].astype(FLAT[name])
                            file.seek(free[number] * values[0].nbytes)
                            file.write(values.tobytes())
                        free[number] += len(rows)

    def _view(self, scored: NDArray[np.bool_]) -> NDArray[np.int64]:
        """What the second view says of every image, as `state.view_answers`, (N,)."""
        sure, winner = [], []
        for shard in self.shards:
            assert shard.logits is not None
            for values in read_chunks("logits", shard.logits, max(64, CHUNK_ELEMENTS // self.classes), self.classes):
                best = float_tensor(values, torch.float32, CPU).softmax(dim=1).max(dim=1)
                sure.append(best.values)
                winner.append(best.indices.int())
        confidence = torch.cat(sure)
        if len(bad := (~confidence.isfinite() & torch.from_numpy(scored)).nonzero()):
            raise InputError(f"second_view: expected finite numbers, got a non-finite one in row {int(bad[0, 0])}")
        found = np.zeros(len(scored), dtype=np.int64)
        found[scored] = leveled(torch.cat(winner)[scored], confidence[scored]).numpy()
        return found

    def _results(self, store: Store, em: EM, solution: Any, bar: tqdm[Any]) -> Path:
        """A file with what is decided about every row, by the rows' numbers."""
        path, name = store.root / "scratch" / "results", "scratch/results"
        if store.done(name) is None:
            bar.set_description("decisions")
            table = np.memmap(self._unscored(store), result_type(self.classes), "r+")
            for bucket, posterior in em.posteriors(solution.state):
                found, places = propose(posterior, bucket.given, solution.policy), bucket.numbers.numpy()
                if solution.no_class is not None:
                    found.reason[proposed(solution.no_class, bucket.numbers)] = int(Reason.NO_CLASS)
                values, classes = best_classes(posterior.clone(), min(TOP, self.classes))
                # Among equals the given label comes first, and the class in its place goes where it stood.
                classes = torch.where(classes == found.proposed[:, None], classes[:, :1], classes)
                classes[:, 0] = found.proposed
                block = np.empty(len(places), table.dtype)
                block["reason"], block["margin"] = found.reason.numpy(), found.margin.numpy()
                block["classes"], block["scores"] = classes.numpy(), values.numpy()
                table[places] = block
            table.flush()
            del table
            store.note(name, file_hash(path))
        return path

    def _unscored(self, store: Store) -> Path:
        """A file of results that says of every row that it cannot be scored."""
        path = store.root / "scratch" / "results"
        path.parent.mkdir(exist_ok=True)
        total = sum(shard.features.rows for shard in self.shards)
        table = np.memmap(path, result_type(self.classes), "w+", shape=(total,))
        table["reason"] = int(Reason.UNSCORED)
        for part in ("classes", "scores", "margin"):
            table[part] = -1 if part == "classes" else math.nan
        table.flush()
        return path


def result_type(classes: int) -> np.dtype[Any]:
    """The record of a row in the file of results."""
    top = min(TOP, classes)
    return np.dtype([("reason", "i1"), ("margin", "<f4"), ("classes", "<i4", (top,)), ("scores", "<f4", (top,))])


@dataclass(frozen=True)
class Solved:
    """A finished run: `scores` cuts a shard from its file of results."""

    path: Path
    classes: int
    diagnostics: AnchoredDiagnostics

    def scores(self, shard: Shard) -> Scores:
        """What was decided about the images of one shard."""
        kind, count = result_type(self.classes), shard.features.rows
        rows = np.fromfile(self.path, kind, count, offset=shard.first * kind.itemsize)
        given = read_given(shard, self.classes)
        reason = rows["reason"].astype(np.int64)
        changed = reason == Reason.ACCEPTED
        action = np.where(
            changed, int(Action.CHANGE), np.where(reason == Reason.SAME, int(Action.KEEP), int(Action.ABSTAIN))
        )
        refined = np.where(changed, rows["classes"][:, 0], given)
        classes, scores = (np.ascontiguousarray(rows[name]) for name in ("classes", "scores"))
        return Scores(given, refined, classes, scores, rows["margin"].copy(), action, reason)


def prepare_anchored(
    shards: list[Shard],
    synthetic_features: Array | None,
    synthetic_labels: Array | None,
    num_classes: int | None,
    text_prototypes: Array | None,
    threshold: Any,
    force: bool,
    outliers: bool,
    seed: int,
    rounds: int,
) -> Anchored:
    """Check everything that can be checked before the work."""
    assert synthetic_features is not None
    assert synthetic_labels is not None
    classes = checked_synthetic(synthetic_features, synthetic_labels, num_classes)
    check_options(threshold, seed=seed, rounds=rounds)
    text = None
    if text_prototypes is not None:
        check_array("text_prototypes", text_prototypes, (classes, synthetic_features.shape[1]))
        check_floating("text_prototypes", text_prototypes)
        check_finite("text_prototypes", text_prototypes)
        text = float_tensor(text_prototypes, torch.float32, CPU)
    synthetic = float_tensor(synthetic_features, torch.float32, CPU)
    next(read_chunks("features", shards[0].features, 1, synthetic.shape[1]))  # a wrong width fails here
    if shards[0].logits is not None:
        next(read_chunks("logits", shards[0].logits, 1, classes))
    return Anchored(
        shards, synthetic, label_tensor(synthetic_labels, CPU), classes, text, threshold, force, outliers, seed, rounds
    )
