"""Several processes that train one model: which one this is, averages over all of them, and sharded parameters.

Data parallelism reduces `p.grad` by itself; what the optimizer captured beside it is averaged here. Sharded parameters
(FSDP2's `fully_shard`) are DTensors; their state is sharded alike, and all work is done on the local shards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_BYTES = 32 * 2**20


def world_size() -> int:
    """Return the number of processes; 1 if torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number; 0 if torch.distributed is not in use."""
    return dist.get_rank() if world_size() > 1 else 0


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, as FSDP2 makes of parameters."""
    module = sys.modules.get("torch.distributed.tensor")  # no DTensor exists unless it was imported
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard, sharing memory; any other tensor as it is, detached."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, which all processes must ask for; any other tensor as it is, detached."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def copy_full_(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded.

    Args:
        target: Changed in place.
        source: Shape of `target`, on any device.
    """
    if is_sharded(target):
        start = shard_start(target)
        part = local(target)
        part.copy_(source.reshape(-1)[start : start + part.numel()].view(part.shape))
    else:
        target.copy_(source)


def reshard() -> None:
    """Free the whole copies of sharded parameters that FSDP2 keeps after a forward pass without a backward pass.

    The next forward pass would otherwise run on them, and not on what was written to the shards since.
    """
    for module in sharded_modules():
        module.reshard()


def sharded_modules() -> list[Any]:
    """Return the modules of this process that FSDP2's `fully_shard` was applied to."""
    from torch.distributed._composable_state import _module_state_mapping  # the only list of modules that there is
    from torch.distributed.fsdp import FSDPModule

    return [module for module in list(_module_state_mapping) if isinstance(module, FSDPModule)]


def shard_start(tensor: Tensor) -> int:
    """Return the position of this process's shard in the flattened whole; 0 if the tensor is not sharded.

    Raises:
        ValueError: If the shard is not a range of rows.
    """
    if not is_sharded(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements = tensor.placements  # type: ignore[attr-defined]
    if not all(type(p).__name__ == "Replicate" or (type(p).__name__ == "Shard" and p.dim == 0) for p in placements):
        raise ValueError(
            f"Sharded parameters must be sharded by rows or replicated, got {placements}. Leave tensor parallelism "
            f"out, or shard along dimension 0."
        )
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return offset[0] * (tensor.numel() // tensor.shape[0]) if tensor.dim() and tensor.shape[0] else 0


@torch.no_grad()
def average_(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace tensors by their averages over processes, which must pass the same shapes in the same order.

    Args:
        tensors: Tensors of any shapes, changed in place. Small ones travel together, 32 MiB at a time.
        group: The processes; None is all.
    """
    num = dist.get_world_size(group)
    for bucket in _buckets(tensors):
        flat = torch.cat([t.flatten() for t in bucket]) if len(bucket) > 1 else bucket[0].contiguous().view(-1)
        dist.all_reduce(flat, group=group)
        flat.div_(num)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            if tensor.data_ptr() != part.data_ptr():
                tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Group neighbours of one dtype and device up to the bucket's size."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and (not alike or size + nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += nbytes
    if bucket:
        yield bucket
