"""The passes of `hf_ivon.passes` in Triton, for Nvidia's and AMD's GPUs: one launch for any number of tensors."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ivon.by_address import ByAddress, counted, key_of
from hf_ivon.packs import addresses_of

logger = logging.getLogger(__name__)

FAILED = (
    "IVON's passes over the weights could not be run by Triton (%s). `torch.compile` runs them instead, or they run "
    "eagerly: the same numbers, more slowly. Install the Triton that belongs to this torch, or pass `fused=False` to "
    "be silent."
)

# Elements that one program works on, or columns of noise.
_BLOCK, _COLUMNS = 1024, 512


class TritonPasses(ByAddress):
    """The passes, compiled for a device when they are first launched there.

    Attributes:
        interpreted: Whether Triton's interpreter runs them, on the CPU, where addresses of a GPU mean nothing.

    Raises:
        ImportError: If there is no Triton.
    """

    narrow = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self) -> None:
        # Without Triton everything else can still be imported.
        from hf_ivon import triton_kernels

        self._kernels: Any = triton_kernels
        self.interpreted = not isinstance(triton_kernels.sample, triton_kernels.triton.JITFunction)

    def _run(self, name: str, device: torch.device, elements: int, count: int, sizes: Any, *arguments: Any) -> bool:
        rows, numbers = self._arguments(count, arguments)
        whole = (0, 0, 0, 0, False) if name == "sample" else ()
        return self._launch(name, device, sizes, rows, [*numbers, *whole])

    def sample_part(
        self,
        theta: Tensor,
        mean: Tensor,
        hess: Tensor,
        words: Tensor,
        ess: float,
        weight_decay: float,
        start: int,
        total: int,
    ) -> bool:
        """Run `passes.sample_lanes` on a part of a flattened whole, whose mean is kept apart.

        Args:
            theta: Written to.
            mean: The mean, shape of `theta`.
            hess: Hessian estimate, shape of `theta`.
            words: Output of `noise_words`.
            ess: λ, number of examples.
            weight_decay: δ, loss/param².
            start: Position of the first element in the whole.
            total: Number of elements of the whole.

        Returns:
            Whether it was done.
        """
        size, width = theta.numel(), -(-total // 4)
        first = start % width
        if size >= width:
            ranges = [(0, width)]
        else:  # the end of a lane, and the beginning of the next
            ranges = [(first, min(first + size, width)), (0, first + size - width)]
        places = (addresses_of([t]) for t in (theta, mean, hess))
        options = float(ess), float(weight_decay), False, theta.dtype
        index = (ctypes.c_uint32 * 1)(int(words[2]))
        rows, numbers = self._arguments(1, (*places, index, key_of(words), *options))
        done, sizes = True, (ctypes.c_int64 * 1)(size)
        for begin, end in ranges:
            if begin < end and done:
                part = start, width, begin, end, True
                done = self._launch("sample", theta.device, sizes, rows, [*numbers, *part], 4 * (end - begin))
        return counted(done, theta)

    def _arguments(self, count: int, given: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Return the rows of a kernel's table, and its numbers and flags, as `_run` is given them."""
        rows: list[Any] = []
        numbers: list[Any] = []
        for value in given:
            if value is None:
                rows.append((ctypes.c_int64 * count)())
            elif isinstance(value, ctypes.Array):
                rows.append(value if value._type_ is ctypes.c_void_p else (ctypes.c_int64 * count)(*value))
            elif isinstance(value, ctypes.Structure):
                numbers += [getattr(value, name) for name, *_ in value._fields_]
            elif isinstance(value, torch.dtype):
                numbers.append(getattr(self._kernels.tl, str(value).removeprefix("torch.")))
            else:
                numbers.append(value)
        return rows, numbers

    def _start(self, kernel: Any, programs: int, *arguments: Any) -> None:
        kernel[(programs,)](*arguments, enable_fp_fusion=False)

    def _launch(
        self,
        name: str,
        device: torch.device,
        sizes: Any,
        rows: Sequence[Any],
        numbers: Sequence[Any],
        covered: int | None = None,
    ) -> bool:
        """Launch a kernel on tensors of these sizes; `covered` elements are to be worked on, None is all."""
        if self.failed:
            return False
        noise = name in ("sample", "subtract_noise")
        block = _COLUMNS if noise else _BLOCK
        try:
            place = device, _stream(device)
            table, aligned = _table(b"".join(map(bytes, (sizes, *rows))), len(sizes), noise, *place)
            owners, blocks = _programs(tuple(sizes) if covered is None else (covered,), block, 1 + 3 * noise, *place)
            with torch.cuda.device(-1 if device.index is None else device.index):
                arguments = owners, blocks, table, len(sizes), *numbers, aligned, block
                self._start(getattr(self._kernels, name), owners.numel(), *arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: compilers are not part of torch
            self.failed = True
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            logger.warning(FAILED, reason)
            return False
        return True


def _stream(device: torch.device) -> int:
    """Return which stream of a GPU a kernel will be in; others do not wait for what was copied there in this one."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.lru_cache(maxsize=4096)  # weights and states stay where they are, and gradients often are where they were
def _table(rows: bytes, count: int, noise: bool, device: torch.device, stream: int) -> tuple[Tensor, bool]:
    """Return a kernel's table for a stream, and whether tensors are aligned; with noise, its last row numbers them."""
    table = torch.frombuffer(bytearray(rows), dtype=torch.int64)
    sizes, places = table[:count], table[count : -count if noise else None]
    aligned = not ((sizes % 64).any() or (places % 16).any())
    return table.to(device, non_blocking=True), aligned


@functools.lru_cache(maxsize=64)
def _programs(
    sizes: tuple[int, ...], block: int, lanes: int, device: torch.device, stream: int
) -> tuple[Tensor, Tensor]:
    """Return which tensor each program works on, and on which block of it, for a stream."""
    blocks = torch.tensor([-(-size // (block * lanes)) for size in sizes])
    owners = torch.arange(len(sizes)).repeat_interleave(blocks)
    numbers = torch.arange(len(owners)) - (blocks.cumsum(0) - blocks).repeat_interleave(blocks)
    return owners.int().to(device, non_blocking=True), numbers.int().to(device, non_blocking=True)
