"""Images that lie in a file larger than the memory, as the tensor that the training loops read.

Letters in shapes: N images, B rows of a batch, H x W pixels.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

PART_BYTES = 1 << 26  # of pixels that are copied to a GPU at once
KEPT_BYTES = 1 << 26
"""Pages of the file that may stay mapped; the system keeps them in its cache as long as it has room."""


class MappedFile:
    """Pixels of a file, (N, H, W, 3) uint8, read-only; reading them all leaves the process small.

    Args:
        path: The file.
        shape: N, H, W, 3.
        offset: Bytes before the first pixel.
    """

    def __init__(self, path: Path, shape: Sequence[int], offset: int) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of what is read-only
        size = torch.Size(shape).numel()
        self._pixels = torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=offset).view(*shape)
        self._read = 0

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def shape(self) -> tuple[int, ...]:
        """N, 3, H, W."""
        count, height, width, channels = self._pixels.shape
        return count, channels, height, width

    def take(self, rows: Tensor, pinned: bool = False) -> Tensor:
        """A copy of these rows, (B, 3, H, W), stored channels last; pinned to be copied to a GPU in the background."""
        batch = torch.empty((len(rows), *self._pixels.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
        torch.index_select(self._pixels, 0, rows, out=batch)
        self._read += batch.numel()
        if self._read > KEPT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._read = 0
            self._map.madvise(mmap.MADV_DONTNEED)
        return batch.permute(0, 3, 1, 2)


class MappedImages(Tensor):
    """Rows of a `MappedFile` as a tensor, (N, 3, H, W) uint8.

    Rows of it are again such tensors, of which nothing is read; `index_select` and everything else that torch does with
    it reads the rows and gives ordinary tensors on its device.

    Args:
        file: Where the pixels lie.
        rows: Which of them these are, (N,) int64; None is all of them.
        device: Where batches go.
    """

    file: MappedFile
    rows: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[MappedImages], file: MappedFile, rows: Tensor | None = None, device: torch.device | None = None
    ) -> MappedImages:
        rows = torch.arange(len(file)) if rows is None else rows
        shape = (len(rows), *file.shape[1:])
        strides = (shape[1] * shape[2] * shape[3], 1, shape[1] * shape[3], shape[1])  # channels last
        made: MappedImages = Tensor._make_wrapper_subclass(
            cls, shape, strides, dtype=torch.uint8, device=device or torch.device("cpu")
        )
        made.file, made.rows = file, rows
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"MappedImages({tuple(self.shape)}, device={self.device})"

    def _of(self, rows: Tensor) -> MappedImages:
        return MappedImages(self.file, rows, self.device)

    def fetch(self, places: Tensor | None = None) -> Tensor:
        """These rows as an ordinary tensor on the device, (B, 3, H, W)."""
        rows = self.rows if places is None else self.rows[places.cpu()]
        on_gpu = self.device.type == "cuda"
        return self.file.take(rows, pinned=on_gpu).to(self.device, non_blocking=on_gpu)

    def batches(self, places: Sequence[Tensor]) -> Iterator[Tensor]:
        """The batches of these places one by one, (B, 3, H, W); the next one is read while the caller works."""
        ends = torch.tensor([len(one) for one in places]).cumsum(0)[:-1]
        here = torch.tensor_split(torch.cat(list(places)).cpu(), ends) if len(places) else ()  # one wait for the GPU
        on_gpu = self.device.type == "cuda"
        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(self.file.take, self.rows[rows], on_gpu) for rows in here[:2]]
            for rows in (*here[2:], None, None)[: len(here)]:
                batch = coming.pop(0).result()
                if rows is not None:
                    coming.append(pool.submit(self.file.take, self.rows[rows], on_gpu))
                yield batch.to(self.device, non_blocking=on_gpu)

    def on(self, device: torch.device) -> Tensor:
        """On a GPU that has room an ordinary tensor there; otherwise the same rows, whose batches go to the device."""
        if device.type != "cuda" or not fits(self.numel(), device):
            return MappedImages(self.file, self.rows, device)
        count, _, height, width = self.shape
        there = torch.empty((count, height, width, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        rows = max(1, PART_BYTES // (3 * height * width))
        for start in range(0, count, rows):
            there[start : start + rows] = self.file.take(self.rows[start : start + rows]).to(device)
        return there

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], MappedImages):
            found = handler(*args, **(kwargs or {}))
            if found is not None:
                return found
        whole = tree_map_only(MappedImages, MappedImages.fetch, (args, kwargs or {}))
        return func(*whole[0], **whole[1])


def fits(size: int, device: torch.device) -> bool:
    """Whether so many bytes of images leave half of the free memory of a GPU to the network."""
    return size <= torch.cuda.mem_get_info(device)[0] // 2


def _slice(
    images: MappedImages, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> MappedImages | None:
    return images._of(images.rows[start:end:step]) if dim == 0 else None


def _split(images: MappedImages, size: int, dim: int = 0) -> list[MappedImages] | None:
    return [images._of(rows) for rows in torch.split(images.rows, size)] if dim == 0 else None


def _index(images: MappedImages, indices: Sequence[Tensor | None]) -> MappedImages | None:
    if len(indices) > 1 or indices[0] is None or indices[0].ndim != 1:
        return None
    return images._of(images.rows[indices[0].cpu()])


def _index_select(images: MappedImages, dim: int, index: Tensor) -> Tensor | None:
    return images.fetch(index) if dim == 0 else None


def _same(images: MappedImages) -> MappedImages:
    return images._of(images.rows)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.slice.Tensor: _slice,
    torch.ops.aten.split.Tensor: _split,
    torch.ops.aten.index.Tensor: _index,
    torch.ops.aten.index_select.default: _index_select,
    torch.ops.aten.detach.default: _same,
}
