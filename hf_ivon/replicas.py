"""Hybrid sharding (HSDP): gradients as they are before FSDP2 averages them over its replica groups.

Each replica group holds the whole model in shards, and has a weight sample of its own. Its gradient must be multiplied
by its own noise, but FSDP2 puts only the average over the groups into `p.grad`. What a group's reduce-scatter returned
is therefore kept until the parameters' hooks run, which follow it in the order in which it was laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hf_ivon import distributed

_REDUCTION = (
    "Replica groups have weight samples of their own, which needs gradients that are averaged in fp32 or bf16, got "
    "the reduction {op}. Set `reduce_dtype=torch.float32` in the mixed-precision policy, or shard over all processes."
)
_TORN = (
    "With replica groups, the optimizer must hold all parameters of a sharded module that get gradients, and some got "
    "gradients without being in it. Freeze them, or pass `model.parameters()`."
)


def replica(p: Tensor) -> int:
    """Return the number of the replica group that this process is in; 0 if there is one, or they are as one."""
    mesh = p.device_mesh if is_replicated(p) else None  # type: ignore[attr-defined]
    return 0 if mesh is None else mesh.get_local_rank(_replicated(p))


def is_replicated(p: Tensor) -> bool:
    """Tell whether a parameter is in shards in each of several groups, whose gradients can be told apart."""
    if not distributed.is_sharded(p):
        return False
    from torch.distributed.fsdp import FSDPModule

    dim = _replicated(p)
    mesh = p.device_mesh  # type: ignore[attr-defined]
    several = dim is not None and mesh.ndim == 2 and mesh.size(1 - dim) > 1
    return several and hasattr(FSDPModule, "set_custom_reduce_scatter")  # not in older ones


def _replicated(p: Tensor) -> int | None:
    placements = p.placements  # type: ignore[attr-defined]
    return next((i for i, placement in enumerate(placements) if placement.is_replicate()), None)


def average_over_groups(params: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their averages over the replica groups, in which the parameters lie alike.

    Args:
        params: Replicated parameters.
        tensors: One per parameter, of its shard's shape.
    """
    by_group: dict[Any, list[Tensor]] = {}
    for p, tensor in zip(params, tensors, strict=True):
        by_group.setdefault(p.device_mesh.get_group(_replicated(p)), []).append(tensor)  # type: ignore[attr-defined]
    for group, together in by_group.items():
        distributed.average_(together, group)


class GroupGradients:
    """What each module's reduce-scatter returned, until the hooks of its parameters take it."""

    def __init__(self) -> None:
        self._listeners: list[_Listener] = []
        self._last: _Listener | None = None  # the hooks of its parameters run next

    def watch(self, params: Iterable[Tensor]) -> None:
        """Listen to the reductions of all modules, if a parameter is one that needs it."""
        if not any(is_replicated(p) for p in params):
            return
        for module in distributed.sharded_modules():
            for group in module._get_fsdp_state()._fsdp_param_groups:
                if not isinstance(group._reduce_scatter_comm, _Listener):
                    group._reduce_scatter_comm = _Listener(group._reduce_scatter_comm)
                group._reduce_scatter_comm.tell = self._on_reduced
                self._listeners.append(group._reduce_scatter_comm)

    def _on_reduced(self, listener: _Listener) -> None:
        self._last = listener

    def take(self, p: Tensor) -> Tensor:
        """Return this group's own gradient of a parameter, shape of its shard; in the order of the hooks."""
        shard = distributed.local(p)
        mesh = p.device_mesh  # type: ignore[attr-defined]
        shards = mesh.size(1 - (_replicated(p) or 0))
        rows = -(-p.shape[0] // shards)  # of every shard: the last ones are padded to as many
        width = p.numel() // p.shape[0] if p.shape[0] else 0
        part = None if self._last is None else self._last.next(rows * width)
        if part is None:
            raise RuntimeError(
                "The gradients of replica groups came in an unknown order. Please report this with the version of "
                "torch; sharding over all processes does without."
            )
        return part[: shard.numel()].view(shard.shape)

    def check(self) -> None:
        """Make sure that the hooks took all that was averaged over the groups.

        Raises:
            RuntimeError: If not: some of a module's parameters have no hooks, so that the others took wrong parts.
        """
        if any(listener.is_torn for listener in self._listeners):
            raise RuntimeError(_TORN)


class _Listener:
    """A reduce-scatter of FSDP2 that keeps what it returned, summed over micro-batches until hooks take it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._kept: Tensor | None = None
        self._position = 0
        self.tell: Callable[[_Listener], None] | None = None

    def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._inner.allocate(*args, **kwargs)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        if op != dist.ReduceOp.AVG:
            raise RuntimeError(_REDUCTION.format(op=op))
        work = self._inner(
            output_tensor=output_tensor, input_tensor=input_tensor, group=group, op=op, async_op=async_op
        )
        if work is not None and async_op:
            work.wait()
        taken = self._kept is None or self._position > 0
        self._kept = output_tensor.clone() if taken else self._kept.add_(output_tensor)  # type: ignore[union-attr]
        self._position = 0
        if self.tell is not None:
            self.tell(self)
        return work

    @property
    def is_torn(self) -> bool:
        """Whether only some of what is kept was taken."""
        return self._kept is not None and self._position > 0

    def next(self, numel: int) -> Tensor | None:
        """Return the next elements of what is kept, None if there are none."""
        start, self._position = self._position, self._position + numel
        if self._kept is None or self._position > self._kept.numel():
            return None
        part = self._kept[start : self._position]
        if self._position == self._kept.numel():
            self._kept = None
        return part
