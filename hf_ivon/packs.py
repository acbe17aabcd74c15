"""Small tensors side by side in one: a pass over a hundred of them then costs little more than over one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ivon.philox import normal_lanes

# Larger tensors are worth a pass of their own.
MAX_ELEMENTS = 2**14


def packable(p: Tensor) -> bool:
    """Tell whether a parameter may go into a pack."""
    return type(p) in (Tensor, torch.nn.Parameter) and p.dtype == torch.float32 and 0 < p.numel() <= MAX_ELEMENTS


def pack_key(group: Mapping[str, Any], p: Tensor) -> tuple[int, torch.device]:
    """Return what parameters of one pack have in common: the options of their group, and the device."""
    return id(group), p.device


class Pack:
    """Buffers for some small parameters together, flat, with a view for each parameter.

    Args:
        params: The parameters, fp32, on one device.
        indices: Number of each, which its noise is a function of.
    """

    def __init__(self, params: Sequence[Tensor], indices: Sequence[int]) -> None:
        self.params = list(params)
        self._key = [(id(p), p.data_ptr(), index) for p, index in zip(params, indices, strict=True)]
        device = self.params[0].device
        sizes = torch.tensor([p.numel() for p in self.params])
        widths = (sizes + 3) // 4
        self.size = int(sizes.sum())
        self._flat: dict[str, Tensor] = {}
        self._views: dict[str, list[Tensor]] = {}
        total = int(widths.sum())
        starts = widths.cumsum(0) - widths
        self._columns = (torch.arange(total) - starts.repeat_interleave(widths)).to(device)
        self._indices = torch.tensor(list(indices)).repeat_interleave(widths).to(device)
        # Where each element finds its draw in the four lanes of all columns, one lane after another.
        element = torch.arange(self.size) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        width = widths.repeat_interleave(sizes)
        self._order = (element // width * total + starts.repeat_interleave(sizes) + element % width).to(device)

    def holds(self, params: Sequence[Tensor], indices: Sequence[int]) -> bool:
        """Tell whether the pack is of these parameters, where they are now."""
        return self._key == [(id(p), p.data_ptr(), index) for p, index in zip(params, indices, strict=True)]

    def noise(self, words: Tensor) -> Tensor:
        """Return the noise of all parameters, fp32, (size,): for each what it would have on its own.

        Args:
            words: Output of `hf_ivon.philox.noise_words`; the index in it is not used.
        """
        k0, k1, _, c2, c3 = words.to(self._columns.device, non_blocking=True).unsqueeze(1)
        return torch.cat(normal_lanes(self._columns, (k0, k1, self._indices, c2, c3)))[self._order]

    def flat(self, name: str) -> Tensor:
        """Return the buffer of this name, fp32, (size,); made at its first use."""
        if name not in self._flat:
            self._flat[name] = torch.empty(self.size, device=self._columns.device)
            parts = self._flat[name].split([p.numel() for p in self.params])
            self._views[name] = [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]
        return self._flat[name]

    def views(self, name: str) -> list[Tensor]:
        """Return the buffer's parts, in the shapes of the parameters."""
        self.flat(name)
        return self._views[name]

    def gather(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """Copy tensors, one for each parameter and of its shape, into a buffer; returns the buffer."""
        flat = self.flat(name)
        torch._foreach_copy_(self._views[name], list(tensors))
        return flat

    def scatter(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Copy a buffer's parts into tensors, one for each parameter and of its shape."""
        torch._foreach_copy_(list(tensors), self._views[name])
