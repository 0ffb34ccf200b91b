"""The end of the paper's score in one kernel for GPUs: softmax, sum, best classes and ties.

Each logit and each similarity is read once; step by step they would be read or written about ten times. Letters in
shapes: n images of a chunk, C classes, K classes wanted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CLASSES = 1 << 14
"""A row of scores is held in the registers of one program."""


@triton.jit  # type: ignore[untyped-decorator]
def _best_of_row(  # type: ignore[no-untyped-def]
    scores,
    logits,
    scale,
    classes,
    values,
    finite,
    num_classes,
    logits_stride,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    CLASSIFIED: tl.constexpr,
):
    """A row: `scale` times its softmax added to its scores, and the best of them, the lower class among equals.

    The sums are kept where the best score is there twice: whoever wants to know all classes that have it finds them.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_classes
    score = tl.load(scores + row * num_classes + columns, mask=inside, other=-float("inf"))
    usable = True
    if CLASSIFIED:
        output = tl.load(logits + row * logits_stride + columns, mask=inside, other=-float("inf"))
        usable = tl.sum(((output - output != 0) & inside).to(tl.int32), axis=0) == 0
        exponentials = tl.exp(output - tl.max(output, axis=0))
        score += exponentials * (tl.load(scale + row) / tl.sum(exponentials, axis=0))
    tl.store(finite + row, usable)
    equals = tl.sum((score == tl.max(score, axis=0)).to(tl.int32), axis=0)
    tl.store(scores + row * num_classes + columns, score, mask=columns < tl.where(equals > 1, num_classes, 0))
    for place in tl.static_range(TOP):
        best = tl.max(score, axis=0)
        winner = tl.min(tl.where(score == best, columns, num_classes - 1), axis=0)  # of NaN the last one
        tl.store(classes + row * TOP + place, winner.to(tl.int64))
        tl.store(values + row * TOP + place, best)
        score = tl.where(columns == winner, -float("inf"), score)


def best_of_rows(scores: Tensor, logits: Tensor | None, scale: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best classes by similarity plus `scale` times the softmax of the logits, the lower class first among equals.

    Args:
        scores: Similarities, (n, C) float32, contiguous; those of rows whose best score several classes have become
            the sums.
        logits: Classifier outputs, (n, C) float32; None for similarity alone.
        scale: Factor of the softmax, (n, 1) float32.
        count: K, the number of classes wanted.

    Returns:
        Values and classes from the best down, (n, K), and which rows have finite logits, (n, 1) bool.
    """
    num_rows, num_classes = scores.shape
    count = min(count, num_classes)
    values, classes = scores.new_empty((num_rows, count)), scores.new_empty((num_rows, count), dtype=torch.int64)
    finite = scores.new_empty((num_rows, 1), dtype=torch.bool)
    if logits is not None and logits.stride(1) != 1:
        logits = logits.contiguous()
    block = triton.next_power_of_2(num_classes)
    with torch.cuda.device_of(scores):  # type: ignore[no-untyped-call]
        _best_of_row[(num_rows,)](
            scores,
            scores if logits is None else logits,
            scale,
            classes,
            values,
            finite,
            num_classes,
            0 if logits is None else logits.stride(0),
            TOP=count,
            BLOCK=block,
            CLASSIFIED=logits is not None,
            num_warps=min(16, max(1, block // 256)),
            enable_fp_fusion=True,  # said, because the default changes with Triton 3.10
        )
    return values, classes, finite
