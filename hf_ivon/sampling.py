"""Weight samples in place: noise that is a function of a key alone, and the way back to the mean."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_ivon import distributed, functional

# Draws of one generator: a shard then makes no more noise than its own, and the same as in one process.
_BLOCK, _ACCELERATOR_BLOCK = 2**17, 2**24


def generator_seed(*key: int) -> int:
    """Return a generator's seed that is a function of a key, different in every bit for keys that differ in one.

    Args:
        key: 64-bit integers.

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class WeightSampler:
    """Puts weight samples into parameters, and the mean back, bit for bit.

    Attributes:
        means: Parameter to posterior mean, for the parameters that hold a weight sample now.
        written: Parameter to its version after the last write from here; a later version was written by others.
    """

    def __init__(self) -> None:
        self.means: dict[Tensor, Tensor] = {}
        self.written: dict[Tensor, int] = {}
        self._buffers: dict[Tensor, Tensor] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def perturb(self, p: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], key: tuple[int, ...]) -> None:
        """Write a weight sample into a parameter; of a sharded one, the shard of the sample of the whole.

        Args:
            p: The parameter, holding its mean.
            group: Options of its group; `ess` and `weight_decay` are read.
            state: Its complete state; `hess`, and `mean` where the parameter's dtype is narrower than fp32.
            key: What the noise is a function of: 64-bit integers.
        """
        weights = distributed.local(p)
        if "mean" in state:
            mean = distributed.local(state["mean"])
        else:
            kept = self._buffers.get(p)
            if kept is None or kept.shape != weights.shape or kept.device != weights.device:
                kept = self._buffers[p] = torch.empty_like(weights)
            mean = kept.copy_(weights)
        self.means[p] = mean
        position, total = distributed.shard_start(p), p.numel()
        for theta, m, hess in functional.cache_sized(weights, mean, distributed.local(state["hess"])):
            noise = self._noise(m, position, total, key)
            theta.copy_(functional.sample(m, hess, noise, ess=group["ess"], weight_decay=group["weight_decay"]))
            position += m.numel()

    def _noise(self, like: Tensor, start: int, total: int, key: tuple[int, ...]) -> Tensor:
        """Return standard normal draws for a range of a flattened tensor, the same however the tensor is cut."""
        size = _BLOCK if like.device.type == "cpu" else _ACCELERATOR_BLOCK
        pieces = []
        for block in range(start // size, -(-(start + like.numel()) // size)):
            begin = block * size
            generator = self._generator(like.device, (*key, block))
            draws = torch.randn(min(size, total - begin), generator=generator, device=like.device, dtype=like.dtype)
            pieces.append(draws[max(0, start - begin) : start + like.numel() - begin])
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else like.new_empty(0)).view(like.shape)

    def restore(self) -> None:
        """Write the means back; an interrupt in between is raised after all of them are in place."""
        try:
            self._write_means()
        except BaseException:  # restoring twice is harmless, half is not
            self._write_means()
            raise
        self.forget_copies()
        self.means.clear()

    def forget_copies(self) -> None:
        """Drop copies of the weights as they were: casts that autocast keeps, whole tensors that FSDP keeps."""
        torch.clear_autocast_cache()
        if any(distributed.is_sharded(p) for p in self.means):
            distributed.reshard()

    @torch.no_grad()
    def _write_means(self) -> None:
        for p, mean in self.means.items():
            weights = distributed.local(p)
            weights.copy_(mean)
            self.written[p] = weights._version

    def _generator(self, device: torch.device, key: tuple[int, ...]) -> torch.Generator:
        """Return a generator whose draws depend on the key alone: nothing of it needs to be saved."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(generator_seed(*key))
