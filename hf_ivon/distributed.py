"""Several processes that train one model: which one this is, and averages over all of them.

Data parallelism reduces `p.grad` by itself; what the optimizer captured beside it is averaged here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their averages over all processes, which must pass the same shapes in the same order.

    Args:
        tensors: Tensors of any shapes, changed in place. Small ones travel together, 32 MiB at a time.
    """
    num = world_size()
    for bucket in _buckets(tensors):
        flat = torch.cat([t.flatten() for t in bucket]) if len(bucket) > 1 else bucket[0].contiguous().view(-1)
        dist.all_reduce(flat)
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
