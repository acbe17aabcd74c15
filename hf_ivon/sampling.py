"""Weight samples in place: noise that is a function of a key alone, and the way back to the mean."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_ivon import functional


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
        """Write a weight sample into a parameter.

        Args:
            p: The parameter, holding its mean.
            group: Options of its group; `ess` and `weight_decay` are read.
            state: Its complete state; `hess`, and `mean` where the parameter's dtype is narrower than fp32.
            key: What the noise is a function of: 64-bit integers.
        """
        mean = state.get("mean")
        if mean is None:
            mean = self._buffers.get(p)
            if mean is None or mean.shape != p.shape or mean.device != p.device:
                mean = self._buffers[p] = torch.empty_like(p, requires_grad=False)
            mean.copy_(p)
        self.means[p] = mean
        generator = self._generator(p.device, key)
        for theta, m, hess in functional.cache_sized(p.detach(), mean, state["hess"]):
            noise = torch.randn(m.shape, generator=generator, device=m.device, dtype=m.dtype)
            theta.copy_(functional.sample(m, hess, noise, ess=group["ess"], weight_decay=group["weight_decay"]))

    def restore(self) -> None:
        """Write the means back; an interrupt in between is raised after all of them are in place."""
        try:
            self._write_means()
        except BaseException:  # restoring twice is harmless, half is not
            self._write_means()
            raise
        self.means.clear()

    @torch.no_grad()
    def _write_means(self) -> None:
        for p, mean in self.means.items():
            p.copy_(mean)
            self.written[p] = p._version

    def _generator(self, device: torch.device, key: tuple[int, ...]) -> torch.Generator:
        """Return a generator whose draws depend on the key alone: nothing of it needs to be saved."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(generator_seed(*key))
