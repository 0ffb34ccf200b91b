"""Features with labels in, the images out that say nothing because they are copies of each other.

Letters in shapes: N real images, D features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from synth_refine._io.check import Array, ArrayT, float_tensor, label_tensor

FEWEST_COPIES = 3  # two with different labels are a photo of which one label is wrong


def same_picture(features: Array, given: Array) -> Tensor:
    """Images that say nothing: of one picture there are three or more, with different labels, (N,) bool.

    Args:
        features: Features of the real images, (N, D), equal to the last bit where the images are.
        given: Given labels, (N,) integers.
    """
    keys, finite = row_keys(features)
    labels = label_tensor(given, keys.device)
    group, counts = torch.unique(keys, return_inverse=True, return_counts=True)[1:]
    ends = labels.new_zeros((2, len(counts)))
    for end, way in zip(ends, ("amin", "amax"), strict=True):
        end.scatter_reduce_(0, group, labels, way, include_self=False)
    silent: Tensor = (counts >= FEWEST_COPIES) & (ends[0] != ends[1])
    return silent[group] & finite


def without_copies(features: ArrayT, given: Array) -> ArrayT:
    """Features in which images that say nothing cannot be scored, as if they could not be decoded.

    The front door does so; a refinement over shards does not, since copies may lie in any two of them.
    """
    same = same_picture(features, given)
    if not bool(same.any()):
        return features
    if isinstance(features, Tensor):
        return features.masked_fill(same[:, None], torch.nan)
    hidden = np.array(features)
    hidden[same.numpy()] = np.nan
    return hidden


def row_keys(features: Array) -> tuple[Tensor, Tensor]:
    """A number per row, the same for equal rows and, but for one chance in 2**64, for no others; and which are finite.

    Returns:
        Keys, (N,) int64, and whether all of a row is finite, (N,) bool.
    """
    device = features.device if isinstance(features, Tensor) else torch.device("cpu")
    width, generator = max(1, features.shape[1]), torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (features.shape[1],), generator=generator).to(device)
    step, keys, finite = max(64, (1 << 21) // width), [], []
    for start in range(0, max(1, len(features)), step):
        part = float_tensor(features[start : start + step], torch.float32, device).contiguous()
        keys.append((part.view(torch.int32).long() * factors).sum(dim=1))
        finite.append(part.isfinite().all(dim=1))
    return torch.cat(keys), torch.cat(finite)


def copies_doubts(real: Tensor, given: Tensor, synthetic: Tensor | None, intended: Tensor | None) -> Iterator[str]:
    """One line for people about real images, and one about synthetic images, that are copies of each other."""
    if count := int(same_picture(real, given).sum()):
        yield (
            f"{count} of {len(real)} images that were looked at are copies of each other with different labels; such "
            "pictures say nothing: `refine` and `run` keep their labels, `scale` may change them"
        )
    if synthetic is not None and intended is not None:
        pairs = torch.unique(torch.stack([intended, row_keys(synthetic)[0]], dim=1), dim=0)[:, 0]
        images, pictures = (torch.bincount(one, minlength=int(intended.max()) + 1) for one in (intended, pairs))
        if bad := ((images > 1) & (pictures == 1)).nonzero()[:, 0].tolist():
            yield (
                f"all synthetic images of class {', '.join(map(str, bad[:5]))} are one picture: the class is known by "
                "that alone, and the synthetic accuracy says too much"
            )
