"""The anchored posterior over shards: `anchored_posterior` for more images than fit into memory, resumable.

Nothing of size N x C is ever held: what the round before says of an image is computed anew from its heads whenever it
is needed. A first pass over the inputs takes mean and variance, a second one copies the features, standardised and
rotated as in memory, into scratch files of float16: dealt at random into buckets of some 65,000 rows, so that an epoch
reads whole buckets one after the other and yet sees its images in random order, however the inputs are sorted. Heads
are trained by minibatches from these buckets, the transition matrix is fitted by sums over all of them, and a last pass
over the inputs writes the shards as the paper's rule does. Every finished step leaves a file in the folder work, so
that a run that was killed goes on where it was; same seed and inputs, same bytes, however often it was killed.

What differs from the algorithm in memory: T starts from that of the round before and takes `MAXIMISATIONS` steps
instead of ten from scratch, and the fold of a row is drawn for each on its own, not as an exact half. The share of
labels that a round changed and the sharpness of the first opinion are measured on one bucket, a random sample.

Letters in shapes: N images, M synthetic images, D features, K components, C classes, n rows of a chunk.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from synth_refine._io.atomic import locked, make_folder, remove_unfinished, write_atomic
from synth_refine._io.check import Array, InputError, float_tensor, label_tensor
from synth_refine.refine.anchored import (
    ANCHOR_WEIGHT,
    COMPONENTS,
    COVARIANCE_ROWS,
    EPOCHS,
    FOLDS,
    HIDDEN,
    LIKELIER,
    SETTLED,
    STEPS_PER_EPOCH,
    TRANSITION_STEPS,
    anchor_prototypes,
    batch_rows,
    bayes,
    checked_anchors,
    components,
    descent,
    new_head,
    scales,
    sharpness,
)
from synth_refine.refine.checks import ROWS_PER_CLASS, check_row_order
from synth_refine.refine.decide import REASONS, RECOGNISED, SOFTENING, default_margin, winners
from synth_refine.refine.paper import best_classes, chunk_rows
from synth_refine.scale.shards import FORMAT, TOP, Summary, settle_config, write_shards
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

BUCKET_ROWS = 1 << 16
"""Mean rows of a bucket, which is held whole: 50 MB of 384 float16 components."""

MAXIMISATIONS = 2
"""Steps of T per round, each a pass over all rows; they go on from the T of the round before."""

SOFT_MAXIMISATIONS = 10
"""Steps of the T of softened opinions, from the last round's on. Fewer flatter the changes: on clean CIFAR-10 labels
one step finds a gain of .0001, two none, ten a loss of .0003, as thirty from scratch do."""

SAMPLE_ELEMENTS = 1 << 23
"""Scores from which the sharpness of the first opinion is chosen."""

LARGEST = 6e4
"""Standardised features are cut off there: float16 ends at 65,504."""


@dataclass(frozen=True)
class AnchoredSummary(Summary):
    """What an anchored run over shards left behind.

    Attributes:
        noise_before: Estimated fraction of the given labels that are wrong; NaN where the synthetic images are not
            recognised, as in `decide.Decision`.
        noise_after: Estimated fraction of the refined labels that are wrong; likewise.
        recognised: The fraction of the synthetic images that heads which were not trained on them name rightly.
        rounds: Rounds of expectation maximisation that were run.
        note: Why nothing was changed, one of `decide.REASONS`; empty where labels could be changed.
    """

    noise_before: float
    noise_after: float
    recognised: float
    rounds: int
    note: str


def anchored_shards(
    features: str | os.PathLike[str],
    given: str | os.PathLike[str],
    anchors: Array,
    anchor_labels: Array,
    out: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    seed: int = 0,
    rounds: int = 12,
    hidden: int = HIDDEN,
    shard_rows: int = SHARD_ROWS,
    progress: bool = False,
) -> AnchoredSummary:
    """Refine the labels of any number of images by their anchored posterior, and by `decide`'s rules.

    Memory is that of a bucket, a chunk, some matrices of C x C and the anchors; while it runs, the disk must hold a
    copy of the features with min(D, 384) float16 columns.

    Args:
        features: A .npy file of (N, D) floats, or a folder of .npy or of Parquet files, as for `refine_shards`.
        given: Given labels of the same images in the same order, as for `refine_shards`.
        anchors: Features of the synthetic images by the same encoder, (M, D), at least one per class.
        anchor_labels: The class each synthetic image was made for, (M,) integers in [0, C).
        out: Folder of the result, as that of `refine_shards`; `confidence` and `scores` are posteriors of the true
            class. Beside it model.safetensors, what the shards were scored with, and during the run the folder work.
        num_classes: C; by default the largest anchor label plus one.
        seed: Same seed, inputs and thread count, same files; not negative.
        rounds: Most rounds to run.
        hidden: Units of the heads' hidden layer; 0 makes them linear.
        shard_rows: Most rows of a .npy file that make a shard; a Parquet file is one shard.
        progress: Show progress bars on stderr.

    Returns:
        Counts over all shards, those of earlier runs included, and what the estimates say.

    Raises:
        InputError: An input has the wrong kind, type, shape or range, the given labels are independent of the images,
            or `out` holds the result of another configuration or of inputs that have changed since.
        BlockingIOError: Another process is writing to `out`.
    """
    classes = checked_anchors(anchors, anchor_labels, num_classes)
    for name, value, least in (("seed", seed, 0), ("rounds", rounds, 1), ("hidden", hidden, 0)):
        if value < least:
            raise InputError(f"{name}: expected at least {least}, got {value}")
    cpu = torch.device("cpu")
    synthetic, answers = float_tensor(anchors, torch.float32, cpu), label_tensor(anchor_labels, cpu)
    shards = cut_shards(features, given, None, shard_rows)
    next(read_chunks("features", shards[0].features, 1, synthetic.shape[1]))  # a wrong width fails here
    root = make_folder("out", out)
    config: dict[str, Any] = {
        "format": FORMAT,
        "refiner": "anchored",
        "seed": seed,
        "rounds": rounds,
        "hidden": hidden,
        "num_classes": classes,
        "anchors": digest(synthetic.numpy().tobytes()),
        "anchor_labels": digest(answers.numpy().tobytes()),
        **input_digests(shards),
    }
    key = digest(json.dumps(config, sort_keys=True).encode())  # steps of another configuration are never mistaken
    work = root / "work" / key[:16]
    with locked(root):
        settle_config(root, config)
        remove_unfinished(root)
        for other in set((root / "work").glob("*")) - {work}:  # of a configuration that was given up
            shutil.rmtree(other)
        saved = _load(root / "model.safetensors")
        if saved is None or saved.info.get("config") != key:
            with torch.random.fork_rng(devices=[]), tqdm(unit=" rows", unit_scale=True, disable=not progress) as bar:
                training = _Training(work, shards, synthetic, answers, classes, seed, rounds, hidden, bar)
                saved = training.model()
            saved.info["config"] = key
            _save(root / "model.safetensors", saved)
        if (root / "work").exists():
            shutil.rmtree(root / "work")
        done = write_shards(root, shards, config, partial(score_shard, Model.loaded(saved)), "local", None, progress)
    return AnchoredSummary(**asdict(done), **saved.info["summary"])


# ---- what reads images ----


@dataclass(frozen=True)
class Rows:
    """A few images.

    Attributes:
        features: Components, (n, K) float16.
        given: Given labels, (n,) int64.
        numbers: Their places among all images, (n,) int64.
    """

    features: Tensor
    given: Tensor
    numbers: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Rows:
        return Rows(self.features[rows], self.given[rows], self.numbers[rows])

    def chunks(self, num_classes: int) -> Iterator[Rows]:
        """The same rows, so many at a time that scores of C classes stay small."""
        step = chunk_rows(num_classes, HIDDEN)
        return (self[slice(start, start + step)] for start in range(0, len(self.given), step))


@dataclass(frozen=True)
class Frame:
    """How features become components: centred and scaled as `anchored.standardised` does, then rotated.

    Attributes:
        center: Mean of the real images, (D,).
        scale: What they are divided by, (D,).
        columns: Principal components, (D, K), or None where there are few enough features.
    """

    center: Tensor
    scale: Tensor
    columns: Tensor | None

    @property
    def width(self) -> int:
        """K."""
        return len(self.center) if self.columns is None else self.columns.shape[1]

    def __call__(self, features: Tensor) -> Tensor:
        """Components of finite float32 features, (n, K) float16."""
        values = (features - self.center) / self.scale
        values = values if self.columns is None else values @ self.columns
        return values.clamp_(-LARGEST, LARGEST).half()


class Nearest(nn.Module):
    """Logits that are sharpened cosines to prototypes: a head that needs no training."""

    def __init__(self, prototypes: Tensor) -> None:
        """Prototypes, (C, K), as long as the cosines are to be sharp."""
        super().__init__()
        self.register_buffer("prototypes", prototypes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits, (n, C)."""
        return F.linear(F.normalize(features, dim=1), self.get_buffer("prototypes"))


@dataclass(frozen=True)
class Reading:
    """How a round reads images and their given labels.

    Attributes:
        heads: One for all images, or one per fold, which then speaks of the images that it was not trained on.
        key: Draws the folds.
        by_given: p(given label | true class), (C, C), a row per *given* label: so a chunk gathers whole rows.
    """

    heads: list[nn.Module]
    key: int
    by_given: Tensor

    def opinion(self, rows: Rows, softening: float = 1.0) -> Tensor:
        """p(true class | image), (n, C), raised to a power and made to sum to one again."""
        features = rows.features.float()
        logits = torch.empty((len(features), len(self.by_given)))
        folds = _hashed(rows.numbers, self.key, len(self.heads))
        for fold, head in enumerate(self.heads):
            own = (folds == fold).nonzero()[:, 0]
            logits[own] = head(features[own])
        return logits.mul_(softening).softmax(dim=1)

    def belief(self, rows: Rows, softening: float = 1.0) -> Tensor:
        """p(true class | image, given label), (n, C)."""
        return bayes(self.opinion(rows, softening), self.by_given.T, rows.given)

    def packed(self) -> dict[str, Tensor]:
        """All tensors by name."""
        states = {f"{number}.{name}": value for number, head in enumerate(self.heads) for name, value in _state(head)}
        return {"by_given": self.by_given, **states}

    @staticmethod
    def unpacked(tensors: dict[str, Tensor], key: int) -> Reading:
        """What was packed."""
        heads: list[nn.Module] = []
        while own := {name[2:]: value for name, value in tensors.items() if name.startswith(f"{len(heads)}.")}:
            if "prototypes" in own:
                heads.append(Nearest(own["prototypes"]))
                continue
            first, last = own["0.weight"], own.get("3.weight")  # a linear head has one layer, another one two
            sizes = (len(first), 0) if last is None else (len(last), len(first))
            head = new_head(first.shape[1], *sizes)
            head.load_state_dict(own)
            heads.append(head.eval())
        return Reading(heads, key, tensors["by_given"])


def _state(head: nn.Module) -> list[tuple[str, Tensor]]:
    return list(head.state_dict().items())


def _key(*parts: int) -> int:
    """A number that looks random, from these; what it is for comes first, since zeros at the end change nothing."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _hashed(numbers: Tensor, key: int, values: int) -> Tensor:
    """For each row number one of so many values by splitmix64: random to all appearance, the same in every pass."""
    mixed = numbers.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed % np.uint64(values)).astype(np.int64))


# ---- the scratch copy ----

FILES = {"features": "<f2", "given": "<i4", "rows": "<i8"}
"""The scratch files, without headers, and the type of their numbers."""


@dataclass(frozen=True)
class Scratch:
    """Components, given labels and numbers of all finite rows, in random buckets.

    Attributes:
        folder: Holds the `FILES`.
        ends: Where each bucket begins, and where the last one ends.
        width: K.
        bar: Counts the rows that were read.
    """

    folder: Path
    ends: list[int]
    width: int
    bar: tqdm[Any]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.ends[-1]

    def bucket(self, number: int) -> Rows:
        """The rows of one bucket, read whole."""
        start, stop = self.ends[number], self.ends[number + 1]

        def read(name: str, columns: int) -> Tensor:
            dtype = np.dtype(FILES[name])
            place = start * columns * dtype.itemsize
            values = np.fromfile(self.folder / name, dtype, (stop - start) * columns, offset=place)
            return torch.from_numpy(values)

        self.bar.update(stop - start)
        return Rows(read("features", self.width).reshape(-1, self.width), read("given", 1).long(), read("rows", 1))

    def buckets(self) -> Iterator[Rows]:
        """All of them."""
        return map(self.bucket, range(len(self.ends) - 1))

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Rows]:
        """A pass in random order, in batches of about this size."""
        for number in torch.randperm(len(self.ends) - 1, generator=generator).tolist():
            bucket = self.bucket(number)
            order = torch.randperm(len(bucket.given), generator=generator)
            yield from (bucket[rows] for rows in order.tensor_split(_parts(len(order), size)) if len(rows))

    def count(self, size: int) -> int:
        """The batches of a pass."""
        return sum(_parts(stop - start, size) for start, stop in pairwise(self.ends) if stop > start)


def _parts(rows: int, size: int) -> int:
    return max(1, round(rows / size))


# ---- steps that were done ----


@dataclass(frozen=True)
class Saved:
    """What a step found out: tensors, and what JSON can hold."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]


def _save(path: Path, saved: Saved) -> Saved:
    tensors = {name: value.contiguous() for name, value in saved.tensors.items()}
    with write_atomic(path) as file:
        file.write(save(tensors, {"info": json.dumps(saved.info)}))  # one entry alone: several would come in any order
    return saved


def _load(path: Path) -> Saved | None:
    """What was saved; None where there is nothing, or something damaged, which is then done again."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()  # such a file cannot be iterated over itself
            return Saved({name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["info"]))
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None


# ---- from the inputs to a model ----


@dataclass(frozen=True)
class Sums:
    """What a pass over all images adds up.

    Attributes:
        counts: Expected images by given label and true class, (C, C).
        log_likelihood: Log p(given label | image).
        stays: Probability that the given label is right.
    """

    counts: Tensor
    log_likelihood: float
    stays: float


@dataclass(frozen=True)
class _Training:
    """The algorithm, in steps that each leave a file in the folder `work`."""

    work: Path
    shards: list[Shard]
    anchors: Tensor  # (M, D)
    anchor_labels: Tensor
    num_classes: int
    seed: int
    rounds: int
    hidden: int
    bar: tqdm[Any]

    def model(self) -> Saved:
        """What `Model.loaded` takes."""
        self.work.mkdir(parents=True, exist_ok=True)
        prepared, scratch = self._prepared()
        reference = prepared.pop("reference")
        first, least = self._first(scratch, reference)
        reading, history = self._rounds(scratch, reference, first)
        if history[-1]["log_likelihood"] < least:  # the heads never came up to the prototypes
            reading = first
        recognised = self._recognised(scratch, reference, reading, int(history[-1]["epochs"]))
        about = self._decided(scratch, reading, recognised)
        about["summary"] |= {"recognised": recognised, "rounds": len(history)}
        return Saved(prepared | reading.packed(), {"key": reading.key, "history": history, **about})

    # -- the scratch copy --

    def _prepared(self) -> tuple[dict[str, Tensor], Scratch]:
        """The frame's tensors and `reference`, the anchors' components, (M, K); and the scratch copy."""
        path = self.work / "prepared.safetensors"
        saved = _load(path)
        if saved is None or saved.info["files"] != self._stamps():
            frame, counts = self._statistics()
            ends = [0, *np.cumsum(counts).tolist()]
            self._deal(frame, ends)
            reference = (self.anchors - self.anchors.mean(dim=0)) / scales(frame.scale.square(), self.anchors)[1]
            tensors = {"center": frame.center, "scale": frame.scale}
            if frame.columns is not None:
                tensors["columns"], reference = frame.columns, reference @ frame.columns
            info = {"ends": ends, "width": frame.width, "files": self._stamps()}
            saved = _save(path, Saved({**tensors, "reference": reference}, info))
        return saved.tensors, Scratch(self.work, saved.info["ends"], saved.info["width"], self.bar)

    def _stamps(self) -> dict[str, list[int]]:
        """Size and time of change of the scratch files that are there."""
        found = {name: os.stat(self.work / name) for name in FILES if (self.work / name).is_file()}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}

    def _read(self, what: str) -> Iterator[tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]]:
        """The finite rows of the inputs chunk by chunk: features, (n, D) float32, given labels, numbers."""
        self.bar.set_description(what)
        width = self.anchors.shape[1]
        for shard in self.shards:
            given, start = read_given(shard, self.num_classes), 0
            for values in read_chunks("features", shard.features, chunk_rows(1, width), width):
                chunk = float_tensor(values, torch.float32, torch.device("cpu"))
                fine = chunk.isfinite().all(dim=1)
                places = start + fine.nonzero()[:, 0].numpy()
                yield chunk[fine], given[places], shard.first + places
                start += len(chunk)
                self.bar.update(len(chunk))

    def _bucket_of(self, numbers: NDArray[np.int64], buckets: int) -> NDArray[np.int64]:
        return _hashed(torch.from_numpy(numbers), _key(0, self.seed), buckets).numpy()

    def _statistics(self) -> tuple[Frame, NDArray[np.int64]]:
        """The frame, and how many rows each bucket gets."""
        total, width = sum(shard.features.rows for shard in self.shards), self.anchors.shape[1]
        counts = np.zeros(math.ceil(total / BUCKET_ROWS), dtype=np.int64)
        mean, squares = torch.zeros((2, width), dtype=torch.float64)  # squares of deviations from the mean
        rotated = width > COMPONENTS
        rng, few = np.random.default_rng(self.seed), min(total, COVARIANCE_ROWS) if rotated else 0
        drawn, sample = rng.choice(total, few, replace=False), [torch.empty((0, width))]
        count = 0
        for chunk, _, numbers in self._read("statistics"):
            if not len(numbers):
                continue
            counts += np.bincount(self._bucket_of(numbers, len(counts)), minlength=len(counts))
            sample.append(chunk[np.isin(numbers, drawn)])
            spread, center = (part.double() for part in torch.var_mean(chunk, dim=0, correction=0))
            count, share = count + len(chunk), len(chunk) / (count + len(chunk))
            squares += len(chunk) * (spread + (center - mean).square() * (1 - share))
            mean += (center - mean) * share
        if not count:
            raise InputError("features: expected at least one row of finite numbers, got none")
        frame = Frame(mean.float(), scales((squares / count).float(), self.anchors)[0], None)
        if not rotated:
            return frame, counts
        return Frame(frame.center, frame.scale, components((torch.cat(sample) - frame.center) / frame.scale)), counts

    def _deal(self, frame: Frame, ends: list[int]) -> None:
        """Write the scratch files: each finite row to the next free place of its bucket."""
        free = ends[:-1]
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(self.work / name, "wb")) for name in FILES}
            for chunk, given, numbers in self._read("copy"):
                columns = {"features": frame(chunk).numpy(), "given": given[:, None], "rows": numbers[:, None]}
                bucket = self._bucket_of(numbers, len(free))
                order, many = bucket.argsort(kind="stable"), np.bincount(bucket, minlength=len(free))
                for number, rows in enumerate(np.split(order, many.cumsum()[:-1])):
                    if len(rows):
                        for name, file in files.items():
                            values = columns[name][rows].astype(FILES[name])
                            file.seek(free[number] * values[0].nbytes)
                            file.write(values.tobytes())
                        free[number] += len(rows)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())

    # -- expectation maximisation --

    def _first(self, scratch: Scratch, reference: Tensor) -> tuple[Reading, float]:
        """What the prototypes say, and how likely that makes the given labels."""
        path = self.work / "first.safetensors"
        if (saved := _load(path)) is None:
            self.bar.set_description("prototypes")
            prototypes, confidence = anchor_prototypes(reference, self.anchor_labels, self.num_classes)
            bucket = scratch.bucket(0)
            self._check_order(scratch, prototypes)
            sample = bucket[slice(None, None, math.ceil(len(bucket.given) * self.num_classes / SAMPLE_ELEMENTS))]
            tau = sharpness(Nearest(prototypes)(sample.features.float()), confidence)
            # By a T that is the same everywhere the posterior is the opinion: that of the first sums.
            blank = torch.full((self.num_classes, self.num_classes), 1 / self.num_classes)
            start = Reading([Nearest(tau * prototypes)], 0, blank)
            reading, sums = self._maximised(scratch, start, 1 + TRANSITION_STEPS)
            info = {"log_likelihood": sums.log_likelihood / scratch.rows}
            saved = _save(path, Saved(reading.packed(), info))
        return Reading.unpacked(saved.tensors, 0), saved.info["log_likelihood"]

    def _check_order(self, scratch: Scratch, prototypes: Tensor) -> None:
        """Refuse labels that are independent of the images, by as many buckets as it takes; each is a sample."""
        nearest, given, classes = Nearest(prototypes), [], []
        for bucket in scratch.buckets():
            given.append(bucket.given)
            classes += [nearest(chunk.features.float()).argmax(dim=1) for chunk in bucket.chunks(self.num_classes)]
            if sum(map(len, given)) >= ROWS_PER_CLASS * self.num_classes:
                check_row_order(torch.cat(given), torch.cat(classes), self.num_classes)
                return

    def _rounds(self, scratch: Scratch, reference: Tensor, first: Reading) -> tuple[Reading, list[dict[str, float]]]:
        """The last round's reading, and an entry per round as in `anchored.Posterior`."""
        path = self.work / "rounds.safetensors"
        if (saved := _load(path)) is None:
            most = -math.inf
            for epochs in EPOCHS:
                trial = self._trial(scratch, reference, first, epochs)
                value = trial.info["history"][0]["log_likelihood"]
                if saved is None or value > most + LIKELIER:
                    saved, most = trial, value
            assert saved is not None
            _save(path, saved)
        reading, history = Reading.unpacked(saved.tensors, saved.info["key"]), saved.info["history"]
        while len(history) < self.rounds and history[-1]["changed"] >= SETTLED:
            reading, entry = self._round(scratch, reference, reading, len(history), history[0]["epochs"])
            history = [*history, entry]
            _save(path, Saved(reading.packed(), {"key": reading.key, "history": history}))
        return reading, history

    def _trial(self, scratch: Scratch, reference: Tensor, first: Reading, epochs: int) -> Saved:
        """A first round of so many epochs."""
        path = self.work / f"trial-{epochs}.safetensors"
        if (saved := _load(path)) is None:
            reading, entry = self._round(scratch, reference, first, 0, epochs)
            saved = _save(path, Saved(reading.packed(), {"key": reading.key, "history": [entry]}))
        return saved

    def _round(
        self, scratch: Scratch, reference: Tensor, before: Reading, number: int, epochs: int
    ) -> tuple[Reading, dict[str, float]]:
        self.bar.set_description(f"round {number + 1}")
        key = _key(1, self.seed, number)
        heads = self._fit(scratch, reference, before, key, epochs, [torch.arange(len(reference))] * FOLDS)
        reading, sums = self._maximised(scratch, Reading(heads, key, before.by_given), MAXIMISATIONS)
        changed, sample = 0, scratch.bucket(0)
        with torch.no_grad():
            for chunk in sample.chunks(self.num_classes):
                changed += int((reading.belief(chunk).argmax(dim=1) != before.belief(chunk).argmax(dim=1)).sum())
        entry = {
            "log_likelihood": sums.log_likelihood / scratch.rows,
            "changed": changed / max(len(sample.given), 1),
            "noise": 1 - sums.stays / scratch.rows,
            "epochs": epochs,
        }
        return reading, entry

    def _maximised(
        self, scratch: Scratch, reading: Reading, steps: int, softening: float = 1.0
    ) -> tuple[Reading, Sums]:
        """The reading after so many steps of T, and the sums that the last of them came from."""
        for _ in range(steps):
            sums = self._sums(scratch, reading, softening)
            reading = Reading(reading.heads, reading.key, F.normalize(sums.counts + 1, p=1, dim=0))
        return reading, sums

    @torch.no_grad()
    def _sums(self, scratch: Scratch, reading: Reading, softening: float) -> Sums:
        counts = torch.zeros((self.num_classes, self.num_classes))
        log_likelihood = stays = 0.0
        for bucket in scratch.buckets():
            # A sum per bucket first: float32 would lose small numbers that are added to millions one by one.
            part = torch.zeros_like(counts)
            for chunk in bucket.chunks(self.num_classes):
                joint = reading.opinion(chunk, softening).mul_(reading.by_given[chunk.given])
                likelihood = joint.sum(dim=1, keepdim=True).clamp_min_(1e-30)
                belief = joint.div_(likelihood)
                part.index_add_(0, chunk.given, belief)
                stays += float(belief.gather(1, chunk.given[:, None]).sum())
                log_likelihood += float(likelihood.log_().sum())
            counts += part
        return Sums(counts, log_likelihood, stays)

    def _fit(
        self, scratch: Scratch, reference: Tensor, before: Reading, key: int, epochs: int, anchors: list[Tensor]
    ) -> list[nn.Module]:
        """A head per fold, trained as by `fit_head` on the other folds' images and on anchors.

        Args:
            scratch: The images.
            reference: Components of the anchors, (M, K).
            before: Gives the soft targets, anew for every batch.
            key: Draws folds, weights and batches.
            epochs: Passes over the images.
            anchors: Rows of the anchors that each head is trained on.
        """
        generator = torch.Generator().manual_seed(key)
        torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=generator)))
        batch = batch_rows(scratch.rows * (FOLDS - 1) // FOLDS)
        size = batch * FOLDS // (FOLDS - 1)
        steps = epochs * max(STEPS_PER_EPOCH, scratch.count(size))
        drawn = max(round(ANCHOR_WEIGHT * batch), 1)
        heads = [new_head(reference.shape[1], self.num_classes, self.hidden) for _ in range(FOLDS)]
        descents = [descent(head, steps) for head in heads]
        done = 0
        while done < steps:
            for rows in islice(scratch.batches(size, generator), steps - done):
                with torch.no_grad():
                    targets = before.belief(rows)
                features, folds = rows.features.float(), _hashed(rows.numbers, key, FOLDS)
                for fold, (head, step) in enumerate(zip(heads, descents, strict=True)):
                    others = (folds != fold).nonzero()[:, 0]
                    picks = anchors[fold][torch.randint(len(anchors[fold]), (drawn,), generator=generator)]
                    answers = F.one_hot(self.anchor_labels[picks], self.num_classes).float()
                    scores = head(torch.cat([features[others], reference[picks]]))
                    step(F.cross_entropy(scores, torch.cat([targets[others], answers])))
                done += 1
        return [head.eval() for head in heads]

    # -- what to do about it --

    def _recognised(self, scratch: Scratch, reference: Tensor, reading: Reading, epochs: int) -> float:
        """The fraction of the anchors that heads which were not trained on them name rightly."""
        path = self.work / "recognised.safetensors"
        if (saved := _load(path)) is None:
            self.bar.set_description("held-out anchors")
            key, count = _key(2, self.seed), len(reference)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(key))
            fold_of = torch.arange(count) % FOLDS
            others = [order[fold_of != fold] if count >= FOLDS else order for fold in range(FOLDS)]
            heads = self._fit(scratch, reference, reading, key, epochs, others)
            right, step = 0, chunk_rows(self.num_classes, HIDDEN)
            with torch.no_grad():
                for fold, head in enumerate(heads):
                    held_out = order[fold_of == fold]
                    for rows in (held_out[start : start + step] for start in range(0, len(held_out), step)):
                        right += int((head(reference[rows]).argmax(dim=1) == self.anchor_labels[rows]).sum())
            saved = _save(path, Saved({}, {"recognised": right / count}))
        return float(saved.info["recognised"])

    def _decided(self, scratch: Scratch, reading: Reading, recognised: float) -> dict[str, Any]:
        """`decide` by sums: the margin, whether labels are changed at all, and what that does by the estimates."""
        self.bar.set_description("decision")
        rows, total = scratch.rows, sum(shard.features.rows for shard in self.shards)
        stays = self._sums(scratch, reading, 1.0).stays
        margin = default_margin((rows - stays) / total)
        soft, _ = self._maximised(scratch, reading, SOFT_MAXIMISATIONS, SOFTENING)
        proposed, gain, kept = 0, 0.0, 0.0
        with torch.no_grad():
            for bucket in scratch.buckets():
                for chunk in bucket.chunks(self.num_classes):
                    best, given, winner, change = changes(reading.belief(chunk), chunk.given, margin)
                    softened = soft.belief(chunk[change], SOFTENING)
                    new, old = (softened.gather(1, one[change, None]) for one in (winner, chunk.given))
                    proposed, gain = proposed + len(softened), gain + float((new - old).sum())
                    kept += float(torch.where(change, best, given).sum())
        blind = recognised < RECOGNISED
        harmful = proposed > 0 and (gain <= 0 or blind)
        noise = math.nan if blind else 1 - stays / rows
        summary = {
            "noise_before": noise,
            "noise_after": noise if blind or harmful else 1 - kept / rows,
            "note": REASONS[6 if blind else 5] if harmful else "",
        }
        return {"margin": margin, "harmful": harmful, "gain": gain / total, "summary": summary}


def changes(belief: Tensor, given: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which labels `decide` would change: the best class's probability, the given one's, the best class, the mask."""
    best, stays, winner = winners(belief, given)
    return best, stays, winner, (winner != given) & (best / stays.clamp_min(1e-9) > margin)


# ---- from the model to shards ----


@dataclass(frozen=True)
class Model:
    """All that it takes to refine a shard.

    Attributes:
        frame: From features to components.
        reading: From components and given labels to posteriors.
        margin: Odds that a change has to exceed.
        harmful: Whether no label is changed at all.
    """

    frame: Frame
    reading: Reading
    margin: float
    harmful: bool

    @staticmethod
    def loaded(saved: Saved) -> Model:
        """What training saved."""
        frame = Frame(saved.tensors["center"], saved.tensors["scale"], saved.tensors.get("columns"))
        reading = Reading.unpacked(saved.tensors, saved.info["key"])
        return Model(frame, reading, saved.info["margin"], saved.info["harmful"])


def score_shard(model: Model, shard: Shard) -> tuple[pa.Table, int]:
    """The table of one shard, and how many of its images could not be scored."""
    width, num_classes = len(model.frame.center), len(model.reading.by_given)
    given, start = read_given(shard, num_classes), 0
    refined = given.copy()
    top = min(TOP, num_classes)
    classes = np.full((len(given), top), -1, dtype=np.int32)
    scores = np.full((len(given), top), np.nan, dtype=np.float32)
    with torch.no_grad():
        for values in read_chunks("features", shard.features, chunk_rows(num_classes, width), width):
            chunk = float_tensor(values, torch.float32, torch.device("cpu"))
            fine = chunk.isfinite().all(dim=1)
            places = start + fine.nonzero()[:, 0].numpy()
            start += len(chunk)
            labels = torch.from_numpy(given[places])
            rows = Rows(model.frame(chunk[fine]), labels, torch.from_numpy(shard.first + places))
            belief = model.reading.belief(rows)
            _, _, winner, change = changes(belief, labels, model.margin)
            if not model.harmful:
                refined[places] = torch.where(change, winner, labels).numpy()
            best, columns = best_classes(belief, top)
            scores[places], classes[places] = best.numpy(), columns.numpy()
    return shard_table(shard, given, refined, classes, scores), int((classes[:, 0] < 0).sum())
