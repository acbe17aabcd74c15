"""The passes of `hf_ivon.passes` in Triton, for Nvidia's and AMD's GPUs."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import torch
from torch import Tensor

from hf_ivon.passes import NoiseOptions, UpdateOptions, UpdateTensors

logger = logging.getLogger(__name__)

FAILED = (
    "IVON's passes over the weights could not be run by Triton (%s). `torch.compile` runs them instead, or they run "
    "eagerly: the same numbers, more slowly. Install the Triton that belongs to this torch, or pass `fused=False` to "
    "be silent."
)

# Elements, or columns of four, that one program works on.
_BLOCK, _COLUMNS = 1024, 512

# Means and Hessians that `TritonPasses.sample` works on.
Prepared = tuple[Tensor, Tensor]


class TritonPasses:
    """The passes, compiled for a device when they are first launched there.

    After a failure none of them runs any more: they return False, and nothing is changed.

    Attributes:
        smallest: Number of elements below which a pass costs more to call than it saves.
        narrow: Dtypes of weights, and of their gradients, whose means are kept apart in fp32.
        failed: Whether something went wrong, which is said once.

    Raises:
        ImportError: If there is no Triton.
    """

    smallest = 1
    narrow = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self) -> None:
        # Without Triton everything else can still be imported.
        from hf_ivon import triton_kernels

        self._kernels: Any = triton_kernels
        self.failed = False

    def prepare(self, theta: Tensor, mean: Tensor, hess: Tensor) -> Prepared:
        """Return what `sample` works on beside the weights."""
        return mean, hess

    def sample(
        self, theta: Tensor, prepared: Prepared, words: Tensor, ess: float, weight_decay: float, keep: bool = True
    ) -> bool:
        """Run the first pass on a whole tensor; see `Execution.sample_whole`."""
        return self.sample_part(theta, prepared, words, ess, weight_decay, 0, theta.numel(), keep)

    def sample_part(
        self,
        theta: Tensor,
        prepared: Prepared,
        words: Tensor,
        ess: float,
        weight_decay: float,
        start: int,
        total: int,
        keep: bool = False,
    ) -> bool:
        """Run the first pass on a tensor that is a part of a flattened whole, or all of it; see `Execution.sample`."""
        size, width = theta.numel(), -(-total // 4)
        first = start % width
        if size >= width:
            ranges = [(0, width)]
        else:  # the end of a lane and the beginning of the next
            ranges = [(first, min(first + size, width)), (0, first + size - width)]
        numbers = *_signed(words), float(ess), float(weight_decay)
        for begin, end in ranges:
            if begin >= end:
                continue
            places = size, start, width, begin, end
            if not self._launch(
                self._kernels.sample, end - begin, _COLUMNS, theta, *prepared, *places, *numbers, keep
            ):
                return False
        torch.autograd.graph.increment_version(theta)
        return True

    def adopt(self, theta: Tensor, mean: Tensor) -> bool:
        """Run `passes.adopt`."""
        integer = {2: self._kernels.tl.int16, 4: self._kernels.tl.int32}[theta.element_size()]
        done = self._launch(self._kernels.adopt, theta.numel(), _BLOCK, theta, mean, theta.numel(), integer)
        if done:
            torch.autograd.graph.increment_version(mean)
        return done

    def draw_lanes(self, lanes: list[Tensor], columns: Tensor, indices: Tensor, words: Tensor) -> bool:
        """Run `passes.draw_lanes`."""
        k0, k1, _, c2, c3 = _signed(words)
        size = columns.numel()
        return self._launch(self._kernels.draw_lanes, size, _COLUMNS, *lanes, columns, indices, size, k0, k1, c2, c3)

    def take_product(self, theta: Tensor, mean: Tensor, grad: Tensor, factor: float, squared: bool) -> bool:
        """Run `passes.take_product`."""
        size = theta.numel()
        done = self._launch(self._kernels.take_product, size, _BLOCK, theta, mean, grad, size, float(factor), squared)
        if done:
            torch.autograd.graph.increment_version((theta, mean))
        return done

    def add_product(self, total: Tensor, theta: Tensor, mean: Tensor, grad: Tensor, factor: float) -> bool:
        """Run `passes.add_product`."""
        size = total.numel()
        return self._launch(self._kernels.add_product, size, _BLOCK, total, theta, mean, grad, size, float(factor))

    def subtract_noise(
        self, theta: Tensor, hess: Tensor, grad: Tensor | None, words: Tensor, options: NoiseOptions
    ) -> bool:
        """Run `passes.subtract_noise_lanes` on a whole tensor."""
        o, factor = options, options.factor
        if isinstance(factor, Tensor):
            grad, factor = None if grad is None else grad * factor, 1.0
        width = -(-theta.numel() // 4)
        numbers = theta.numel(), width, *_signed(words), *map(float, (o.ess, o.weight_decay, 1.0 - o.beta2, factor))
        tensors = theta, hess, theta if grad is None else grad
        flags = o.first, grad is not None
        done = self._launch(self._kernels.subtract_noise, width, _COLUMNS, *tensors, *numbers, *flags)
        if done:
            torch.autograd.graph.increment_version((theta, hess))
        return done

    def square(self, total: Tensor, grad: Tensor, factor: float, keep: bool) -> bool:
        """Run `passes.square`."""
        return self._launch(
            self._kernels.square, total.numel(), _BLOCK, total, grad, total.numel(), float(factor), keep
        )

    def update(self, tensors: UpdateTensors, options: UpdateOptions) -> bool:
        """Run `passes.update`."""
        mean, _, curvature, momentum, hess, prior_mean = tensors
        o, size = options, mean.numel()
        given = [mean if t is None else t for t in tensors]
        rates = o.ess, o.weight_decay, 1.0 - o.beta1, 1.0 - o.beta2
        radius = ctypes.c_float(o.clip_radius).value  # the largest fp64 number is infinity
        numbers = map(float, (*rates, 1.0 / o.debias, radius, o.lr, 1.0 / o.divisor))
        flags = o.price, o.average, curvature is not None, prior_mean is not None
        done = self._launch(self._kernels.update, size, _BLOCK, *given, size, *numbers, *flags)
        if done:
            torch.autograd.graph.increment_version((mean, momentum, hess))
        return done

    def _launch(self, kernel: Any, size: int, block: int, *arguments: Any) -> bool:
        """Launch a kernel with a program for each block; the first argument is a tensor on the device to run on."""
        if self.failed:
            return False
        try:
            with torch.cuda.device_of(arguments[0]):
                kernel[(-(-size // block),)](*arguments, block, enable_fp_fusion=False)
        except Exception as error:  # of any kind: compilers are not part of torch
            self.failed = True
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            logger.warning(FAILED, reason)
            return False
        return True


def _signed(words: Tensor) -> list[int]:
    """Return what noise is a function of as integers of 32 bits: larger ones would be compiled for anew."""
    return [word - 2**32 if word >= 2**31 else word for word in words.tolist()]
