"""Small tensors side by side in one: a pass over a hundred of them then costs little more than over one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property
from itertools import accumulate, groupby
from operator import is_
from typing import Any

import torch
from torch import Tensor

# From this size on tensors are worth a pass of their own.
MAX_ELEMENTS = 2**15
# What the state of a parameter in a pack consists of: views on buffers of the pack.
_STATE = ("step", "momentum", "hess", "prior_mean")


def packable(p: Tensor, state: Mapping[str, Any]) -> bool:
    """Tell whether a parameter with this state may go into a pack."""
    plain = type(p) in (Tensor, torch.nn.Parameter) and p.dtype == torch.float32 and "mean" not in state
    return plain and 0 < p.numel() < MAX_ELEMENTS and p.is_contiguous()


def pack_key(group: Mapping[str, Any], p: Tensor, state: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what parameters of one pack have in common: options, device, and what their state consists of."""
    return id(group), p.device, "prior_mean" in state


def addresses_of(tensors: Sequence[Tensor | None]) -> Any:
    """Return where tensors are in memory, as an array of ctypes; of None it is 0."""
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor's numbers stand in its memory as they are, one after another."""
    return tensor.is_contiguous() and not tensor.is_neg()


class Buffer:
    """A flat tensor and its parts.

    Args:
        flat: Holds the parts one after another.
        shapes: Shape of each part.
    """

    def __init__(self, flat: Tensor, shapes: Sequence[torch.Size]) -> None:
        self.flat = flat
        self.parts = list(flat.split([shape.numel() for shape in shapes]))  # 1-D
        self.by_parameter: dict[Tensor, Tensor] | None = None  # made when it is first asked for
        self.views = [part.view(shape) for part, shape in zip(self.parts, shapes, strict=True)]

        self._addresses: tuple[int, Any] = (0, None)

    @property
    def addresses(self) -> Any:
        """Where the parts are in memory, which may have moved: into one that is shared, for example."""
        start = self.flat.data_ptr()
        if self._addresses[0] != start:
            self._addresses = start, addresses_of(self.parts)
        return self._addresses[1]


class PackNoise:
    """How the noise of many tensors is drawn at once by tensor operations.

    Args:
        sizes: Number of elements of each tensor, int64.
        indices: Number of each, which its noise is a function of.
        device: Where they are.

    Attributes:
        columns: Column numbers of the noise, each in its tensor, int64.
        indices: The number of each column's tensor, int64.
        lanes: Where the four draws of each column go.
        order: Where each element of the tensors finds its draw in `flat`, int64.
        flat: The lanes one after another.
    """

    def __init__(self, sizes: Tensor, indices: Sequence[int], device: torch.device) -> None:
        widths = (sizes + 3) // 4
        total = int(widths.sum())
        starts = widths.cumsum(0) - widths
        self.columns = (torch.arange(total) - starts.repeat_interleave(widths)).to(device)
        self.indices = torch.tensor(list(indices)).repeat_interleave(widths).to(device)
        element = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        width = widths.repeat_interleave(sizes)
        order = element // width * total + starts.repeat_interleave(sizes) + element % width
        self.order = order.to(device)
        self.flat = torch.empty(4 * total, dtype=torch.float32, device=device)
        self.lanes = [torch.from_dlpack(lane) for lane in self.flat.split(total)]


class Pack:
    """Some small parameters of one group: their state, and buffers for what is done to all of them at once.

    The state of each parameter becomes a view on buffers of the pack.

    Args:
        group: Options of the parameters.
        params: The parameters, fp32, on one device.
        indices: Number of each, which its noise is a function of.
        states: The complete state of each; its tensors are replaced.
    """

    def __init__(
        self,
        group: Mapping[str, Any],
        params: Sequence[Tensor],
        indices: Sequence[int],
        states: Sequence[MutableMapping[str, Any]],
    ) -> None:
        self.group, self.params = group, list(params)
        self.has_prior = "prior_mean" in states[0]
        self._device = params[0].device
        self._one_dimensional = all(p.dim() == 1 for p in params)
        self._indices = indices
        self._shapes = [p.shape for p in params]
        self.weights = [p.detach().view(-1) for p in params]
        self._pointers = [p.data_ptr() for p in params]
        self._addresses = addresses_of(params)
        counts = [p.numel() for p in params]
        self.starts = [0, *accumulate(counts)]
        self.sizes = (ctypes.c_int64 * len(counts))(*counts)
        self.numbers = (ctypes.c_uint32 * len(counts))(*indices)
        self._buffers: dict[str, Buffer] = {}
        self._spare: list[Buffer] = []
        self._move_in(states)

    @cached_property
    def noise(self) -> PackNoise:
        """What the noise of all parameters is drawn with, where that is done by tensor operations."""
        return PackNoise(torch.tensor(list(self.sizes)), self._indices, self._device)

    def _buffer(self, name: str) -> Buffer:
        if name == "grad":  # gradients are gathered when the noise is not needed any more
            flat = torch.from_dlpack(self.noise.flat[: self.starts[-1]])
        else:
            flat = torch.empty(self.starts[-1], dtype=torch.float32, device=self._device)
        return Buffer(flat, self._shapes)

    def _move_in(self, states: Sequence[MutableMapping[str, Any]]) -> None:
        self._buffers["step"] = Buffer(torch.stack([s["step"].cpu() for s in states]), [torch.Size()] * len(states))
        self._state = [name for name in _STATE if name in states[0]]
        for name in self._state:
            torch._foreach_copy_(self.views(name), [state[name] for state in states])
            for state, view in zip(states, self.views(name), strict=True):
                state[name] = view

    def is_current(self, state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Tell whether parameters and state are still where the pack has them.

        Args:
            state: Parameter to its state.

        Returns:
            Whether that is so; if not, the parameters need another pack.
        """
        if self._moved() or [p.shape for p in self.params] != self._shapes:
            return False
        if not all(map(Tensor.is_contiguous, self.params)):
            return False
        states = [state[p] for p in self.params]
        return all(all(map(is_, [s.get(name) for s in states], self.views(name))) for name in self._state)

    def _moved(self) -> bool:
        return [p.data_ptr() for p in self.params] != self._pointers

    def flat(self, name: str) -> Tensor:
        """Return the buffer of this name, fp32, the parameters one after another; of a new name it holds anything."""
        if name not in self._buffers:
            reused = self._spare and name != "grad"
            self._buffers[name] = self._spare.pop() if reused else self._buffer(name)
        return self._buffers[name].flat

    def views(self, name: str) -> list[Tensor]:
        """Return the buffer's parts, in the shapes of the parameters."""
        self.flat(name)
        return self._buffers[name].views

    def by_parameter(self, name: str) -> dict[Tensor, Tensor]:
        """Return what `views` does, by parameter; not to be changed."""
        self.flat(name)
        buffer = self._buffers[name]
        if buffer.by_parameter is None:
            buffer.by_parameter = dict(zip(self.params, buffer.views, strict=True))
        return buffer.by_parameter

    def addresses(self, name: str) -> Any:
        """Return where the buffer's parts are in memory, as an array of ctypes.

        Args:
            name: That of a buffer; "params" are the parameters. Where one was cast or moved since the pack was made,
                it is the memory that they had.
        """
        if name == "params":
            return addresses_of(self.weights) if self._moved() else self._addresses
        self.flat(name)
        return self._buffers[name].addresses

    def rename(self, name: str, new: str) -> None:
        """Let a buffer have another name; the one that had it is free."""
        self.free(new)
        self._buffers[new] = self._buffers.pop(name)

    def free(self, name: str) -> None:
        """Let the next buffer that is asked for have the memory of this one."""
        if name in self._buffers:
            self._spare.append(self._buffers.pop(name))

    def plain(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return tensors in the parameters' dtype, contiguous, on their device; copies of those that are not.

        Raises:
            RuntimeError: If one has not the shape of its parameter.
        """
        device, dtype = self._device, torch.float32
        plain: list[Tensor | None] = []
        for tensor, shape in zip(tensors, self._shapes, strict=True):
            if tensor is None:
                plain.append(tensor)
                continue
            if tensor.shape != shape:
                raise RuntimeError(
                    f"A gradient must have its parameter's shape {tuple(shape)}, got {tuple(tensor.shape)}. Do not "
                    f"replace the data of parameters or gradients between forward pass and step."
                )
            as_is = (
                tensor.dtype is dtype and tensor.device == device and tensor.is_contiguous() and not tensor.is_neg()
            )
            plain.append(tensor if as_is else tensor.to(device, dtype).contiguous().resolve_neg())
        return plain

    def read(self, name: str) -> Tensor:
        """Copy the parameters into a buffer; returns the buffer."""
        return torch.cat(self.weights, out=self.flat(name))

    def write(self, name: str) -> None:
        """Copy a buffer into the parameters."""
        torch._foreach_copy_(self.weights, self._buffers[name].parts)

    def write_back(self, name: str) -> None:
        """Copy a buffer into the parameters, also into those that were cast or moved since the pack was made."""
        self.write(name)
        self.follow()

    def follow(self) -> None:
        """Copy what was written to the parameters' memory into those that were cast or moved since then."""
        if self._moved():
            for p, weights in zip(self.params, self.weights, strict=True):
                p.copy_(weights.view(p.shape))

    def gather(self, name: str, tensors: Sequence[Tensor | None]) -> Tensor:
        """Copy tensors, of the parameters' shapes, into a buffer, if they are not its parts; zeros for None.

        Args:
            name: That of the buffer.
            tensors: One for each parameter.

        Returns:
            The buffer.
        """
        views = self.views(name)
        if all(map(is_, tensors, views)):
            return self.flat(name)
        given = [t for t in tensors if t is not None]
        if len(given) == len(tensors) and self._one_dimensional:
            return torch.cat(given, out=self.flat(name))
        if len(given) < len(tensors):
            torch._foreach_zero_([view for view, t in zip(views, tensors, strict=True) if t is None])
            views = [view for view, t in zip(views, tensors, strict=True) if t is not None]
        if given:
            torch._foreach_copy_(views, given)
        return self.flat(name)

    def runs(self, keys: Sequence[Any]) -> Iterator[tuple[Any, slice, slice]]:
        """Yield neighbours with the same key together.

        Args:
            keys: One for each parameter.

        Yields:
            A key, the range of the parameters, and the range of their elements in a buffer.
        """
        if len(set(keys)) == 1:
            yield keys[0], slice(0, len(keys)), slice(0, self.starts[-1])
            return
        start = 0
        for key, members in groupby(keys):
            stop = start + len(list(members))
            yield key, slice(start, stop), slice(self.starts[start], self.starts[stop])
            start = stop
