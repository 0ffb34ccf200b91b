"""Neighbours: features in, the nearest rows of each and what labels they carry out; exact, in blocks.

Letters in shapes: n rows, K components, k neighbours, V labels kept, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_ELEMENTS = 1 << 23
"""Cosines held at once, 34 MB."""


def nearest(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest other rows of each row by cosine, nearest first, exact and in blocks.

    Args:
        features: (n, K), finite.
        count: k; fewer where there are fewer other rows.

    Returns:
        Their rows, (n, k) int64, and their cosines, (n, k) float32.
    """
    directions = F.normalize(features.float(), dim=1)
    total = len(directions)
    count = min(count, total - 1)
    rows = torch.empty((total, max(count, 0)), dtype=torch.int64, device=features.device)
    cosines = torch.empty((total, max(count, 0)), device=features.device)
    if count < 1:
        return rows, cosines
    step = min(total, max(1, BLOCK_ELEMENTS // total))
    held = torch.empty((step, total), device=features.device)
    for start in range(0, total, step):
        block = torch.mm(directions[start : start + step], directions.T, out=held[: min(step, total - start)])  # (b, n)
        own = torch.arange(len(block), device=features.device)
        block[own, start + own] = -2.0  # a row is no neighbour of itself
        best = block.topk(count, dim=1)
        rows[start : start + step], cosines[start : start + step] = best.indices, best.values
    return rows, cosines


def neighbour_labels(rows: Tensor, weights: Tensor, given: Tensor, classes: int, keep: int) -> tuple[Tensor, Tensor]:
    """The commonest given labels of each row's neighbours and their share, in chunks.

    Args:
        rows: Neighbours, (n, k) int64.
        weights: Their weights, (n, k).
        given: Given labels of all rows, (n,) int64.
        classes: C.
        keep: V, at most C; rarer labels are left out.

    Returns:
        Labels, (n, V) int64, and shares, (n, V) float32, which sum to one but for labels that are left out.
    """
    keep = min(keep, classes)
    labels = torch.empty((len(rows), keep), dtype=torch.int64, device=given.device)
    shares = torch.empty((len(rows), keep), device=given.device)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12)
    step = max(1, BLOCK_ELEMENTS // 2 // classes)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        table = weights.new_zeros((len(rows[part]), classes)).scatter_add_(1, given[rows[part]], weights[part])
        best = table.topk(keep, dim=1)
        shares[part], labels[part] = best.values, best.indices
    return labels, shares
