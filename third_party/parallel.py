"""Training in several processes that torchrun started, so that it is training in one.

Every process draws all random numbers for the whole batch and works on its own rows of it. Letters in shapes: B rows of
a batch, or of the part of it that a process has, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from third_party.augment import EVERY, Places


def processes() -> tuple[int, int]:
    """Number of this process, and how many train together: what torchrun started, once the caller has called
    `torch.distributed.init_process_group`; 0 of 1 without it."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def parallel(model: nn.Module, device: torch.device, compiled: bool) -> nn.Module:
    """The network as the loops call it: itself, or wrapped so that the gradients are averaged over all processes.

    Batch normalisation is made to see the batches of all processes, and dropout to draw for them, see `set_part`. With
    `compiled` it goes through torch.compile; its weights stay those of `model`.
    """
    if processes()[1] > 1:
        model = _shared(model, device)
    return cast(nn.Module, torch.compile(model)) if compiled else model


def _shared(model: nn.Module, device: torch.device) -> nn.Module:
    _share_layers(model)
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # in place, below the top
        return DistributedDataParallel(model, device_ids=[device])
    return DistributedDataParallel(model)


def _share_layers(module: nn.Module) -> None:
    """Replace the layers below `module` that look at more than one row, or draw for each."""
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            setattr(module, name, SharedDropout(child.p))
        elif isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and child.weight.device.type == "cpu":
            shared = SharedBatchNorm(child.num_features, child.eps, child.momentum)
            for kept in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(shared, kept, getattr(child, kept))
            setattr(module, name, shared)
        else:
            _share_layers(child)


class SharedDropout(nn.Module):
    """Dropout that draws for the batch of all processes and takes its own rows, as one process would have drawn."""

    def __init__(self, chance: float) -> None:
        """Drop with a chance in [0, 1)."""
        super().__init__()
        self.chance = chance
        self.rows = 0
        self.places: Places = EVERY

    def forward(self, values: Tensor) -> Tensor:
        """Values of the same shape, (B, ...), those that are kept divided by their share."""
        if not self.training or self.chance == 0:
            return values
        kept = values.new_empty(self.rows, *values.shape[1:]).bernoulli_(1 - self.chance)
        return values * kept[self.places].div_(1 - self.chance)


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the rows of all processes, for the CPU; torch's SyncBatchNorm refuses to run there."""

    num_batches_tracked: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def _check_input_dim(self, input: Tensor) -> None:
        """Take vectors as well as images."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalised values of the same shape, (B, C, ...); B may differ between processes and be 0."""
        if not self.training or processes()[1] == 1:
            return super().forward(input)
        values = input.double()
        others = [axis for axis in range(input.ndim) if axis != 1]
        count = values.new_tensor([input.numel() / input.shape[1]])
        sums = torch.cat([values.sum(dim=others), values.square().sum(dim=others), count])
        sums = cast(Tensor, _Sum.apply(sums))
        count = sums[-1].detach()
        mean, square = (sums[:-1] / count).chunk(2)
        variance = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        shape = [1, -1] + [1] * (input.ndim - 2)
        normalised = (values - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        scaled: Tensor = normalised * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(input.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes; the gradient of each of its parts is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return summed(value.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return summed(gradient.clone())


def set_part(network: nn.Module, rows: int, places: Places) -> None:
    """Tell the dropout of a shared network that its next inputs stand at `places` in a batch of `rows` rows."""
    for module in network.modules():
        if isinstance(module, SharedDropout):
            module.rows, module.places = rows, places


def summed(value: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if processes()[1] > 1:
        distributed.all_reduce(value)
    return value


def from_first(value: Tensor) -> Tensor:
    """The value that the first process has; on the others it must have the same shape and type."""
    if processes()[1] > 1:
        value = value.clone(memory_format=torch.contiguous_format)
        distributed.broadcast(value, 0)
    return value


@contextmanager
def first_process_first() -> Iterator[None]:
    """What the first process makes and keeps in files is there when the others come to make it.

    They wait for it, no longer than the process group's timeout allows.
    """
    rank, count = processes()
    if rank > 0:
        distributed.barrier()
    yield
    if rank == 0 and count > 1:
        distributed.barrier()


def in_parts(network: nn.Module, batches: Iterable[tuple[Tensor, ...]], function: Callable[..., Tensor]) -> Tensor:
    """What `function` says of the rows of all batches; each process asks it about a part of every batch.

    Args:
        network: What the function asks.
        batches: Arguments of the function, (B, ...) each; the same on every process.
        function: Gives B rows.

    Returns:
        The rows of all batches, joined; the same on every process.
    """
    rank, count = processes()
    places = slice(rank, None, count)
    found = []
    for batch in batches:
        set_part(network, len(batch[0]), places)
        own = function(*(rows[places] for rows in batch))
        whole = own.new_zeros(len(batch[0]), *own.shape[1:])
        whole[places] = own
        found.append(whole)
    return summed(torch.cat(found))
