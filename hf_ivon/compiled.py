"""The passes of `hf_ivon.passes`, compiled into one loop each by `torch.compile`: for accelerators."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hf_ivon import passes
from hf_ivon.packs import MAX_ELEMENTS
from hf_ivon.passes import NoiseOptions, UpdateOptions, UpdateTensors

logger = logging.getLogger(__name__)

NOT_COMPILED = (
    "IVON's passes over the weights could not be compiled (%s). They run eagerly instead: the same numbers, more "
    "slowly. Install a C++ compiler such as g++, or pass `fused=False` to be silent."
)


class Compiled:
    """The passes, compiled for one kind of device when they are first called, and for tensors of any size.

    After a failure none of them runs any more: they return False, and nothing is changed.

    Attributes:
        smallest: Number of elements below which a pass costs more to call than it saves.
        narrow: Dtypes of weights, and of their gradients, whose means are kept apart in fp32.
        failed: Whether something went wrong, which is said once.
    """

    smallest = MAX_ELEMENTS
    narrow = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self) -> None:
        functions: dict[str, Callable[..., None]] = {
            "sample": sample_whole,
            "adopt": passes.adopt,
            "draw_lanes": passes.draw_lanes,
            "take_product": passes.take_product,
            "add_product": passes.add_product,
            "subtract_noise": subtract_noise_whole,
            "square": passes.square,
            "update": passes.update,
        }
        self._functions = {name: compile_pass(with_options(f)) for name, f in functions.items()}
        self.failed = False

    def sample(
        self,
        theta: Tensor,
        mean: Tensor,
        hess: Tensor,
        words: Tensor,
        ess: float,
        weight_decay: float,
        keep: bool = True,
    ) -> bool:
        """Run `passes.sample_lanes` on a whole tensor; not if its four lanes, which have one loop, differ in size."""
        if theta.numel() % 4:
            return False
        words = words.to(theta.device, non_blocking=True)
        lanes_of_each = tuple(apart(t) for t in (theta, mean, hess))
        done = self._call("sample", theta.device, (*lanes_of_each, words), (ess, weight_decay), keep)
        if done:
            torch.autograd.graph.increment_version(theta)
        return done

    def adopt(self, theta: Tensor, mean: Tensor) -> bool:
        """Run `passes.adopt`."""
        done = self._call("adopt", theta.device, map(_flat, (theta, mean)))
        if done:
            torch.autograd.graph.increment_version(mean)
        return done

    def draw_lanes(self, lanes: list[Tensor], columns: Tensor, indices: Tensor, words: Tensor) -> bool:
        """Run `passes.draw_lanes`."""
        words = words.to(columns.device, non_blocking=True)
        return self._call("draw_lanes", columns.device, (lanes, columns, indices, words))

    def take_product(self, theta: Tensor, mean: Tensor, grad: Tensor, factor: float, squared: bool) -> bool:
        """Run `passes.take_product`."""
        done = self._call("take_product", theta.device, map(_flat, (theta, mean, grad)), (factor,), squared)
        if done:
            torch.autograd.graph.increment_version((theta, mean))
        return done

    def add_product(self, total: Tensor, theta: Tensor, mean: Tensor, grad: Tensor, factor: float) -> bool:
        """Run `passes.add_product`."""
        return self._call("add_product", total.device, map(_flat, (total, theta, mean, grad)), (factor,))

    def subtract_noise(
        self, theta: Tensor, hess: Tensor, grad: Tensor | None, words: Tensor, options: NoiseOptions
    ) -> bool:
        """Run `passes.subtract_noise_lanes` on a whole tensor."""
        if theta.numel() % 4:
            return False
        grads = None if grad is None else apart(grad)
        words = words.to(theta.device, non_blocking=True)
        ess, weight_decay, beta2, factor, first = options
        tensors = apart(theta), apart(hess), grads, words, factor if isinstance(factor, Tensor) else None
        numbers = ess, weight_decay, beta2, 1.0 if isinstance(factor, Tensor) else factor
        done = self._call("subtract_noise", theta.device, tensors, numbers, first)
        if done:
            torch.autograd.graph.increment_version((theta, hess))
        return done

    def square(self, total: Tensor, grad: Tensor, factor: float, keep: bool) -> bool:
        """Run `passes.square`."""
        return self._call("square", total.device, map(_flat, (total, grad)), (factor,), keep)

    def update(self, tensors: UpdateTensors, options: UpdateOptions) -> bool:
        """Run `passes.update`."""
        mean, _, _, momentum, hess, _ = tensors
        *numbers, price, average = options
        done = self._call("update", mean.device, map(_flat, tensors), tuple(numbers), price, average)
        if done:
            torch.autograd.graph.increment_version((mean, momentum, hess))
        return done

    def _call(
        self, name: str, device: torch.device, tensors: Iterable[Any], options: tuple[float, ...] = (), *flags: bool
    ) -> bool:
        if self.failed:
            return False
        try:
            self._functions[name](tuple(tensors), on_device(options, device), *flags)
        except Exception as error:  # of any kind: compilers are not part of torch
            self.failed = True
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            logger.warning(NOT_COMPILED, reason)
            return False
        return True


def compile_pass(function: Callable[..., None]) -> Callable[..., None]:
    """Return a pass that is compiled for tensors of any size when it is first called.

    The loop runs in as many threads as torch has when it runs. Else the compiler settles that by the tensors and the
    threads of the first call, and small ones would make all later loops run in one thread.
    """
    compile_: Any = torch.compile
    return compile_(function, dynamic=True, fullgraph=True, options={"cpp.dynamic_threads": True})


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Return a pass that takes its numbers from one tensor, or from a tuple: a tensor is handed over at once."""

    @functools.wraps(function)
    def run(tensors: tuple[Any, ...], options: Tensor | tuple[float, ...], *flags: bool) -> None:
        function(*tensors, *options, *flags)

    # The compiler counts the variants of a code, and gives up after eight: each pass needs one of its own.
    made: Any = run
    made.__code__ = made.__code__.replace(co_name=function.__name__)
    return made


@functools.lru_cache(maxsize=64)  # those of a step are the same for all of its tensors
@torch.inference_mode(False)
def on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor | tuple[float, ...]:
    """Return numbers as a tensor on a device, fp64; as they are, where there may be no such tensors."""
    numbers = tuple(map(float, numbers))  # the value of an integer would be compiled in
    if device.type not in ("cpu", "cuda"):
        return numbers
    return torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)


def sample_whole(
    thetas: list[Tensor],
    means: list[Tensor],
    hesses: list[Tensor],
    words: Tensor,
    ess: float,
    weight_decay: float,
    keep: bool,
) -> None:
    """Run `passes.sample_lanes` on the four lanes of a whole tensor, whose size is a multiple of four."""
    columns = torch.arange(hesses[0].shape[0], device=hesses[0].device)
    passes.sample_lanes(thetas, means, hesses, columns, words, ess, weight_decay, keep)


def subtract_noise_whole(
    thetas: list[Tensor],
    hesses: list[Tensor],
    grads: list[Tensor] | None,
    words: Tensor,
    scale: Tensor | None,
    ess: float,
    weight_decay: float,
    beta2: float,
    factor: float,
    first: bool,
) -> None:
    """Run `passes.subtract_noise_lanes` on the four lanes of a whole tensor, whose size is a multiple of four.

    `scale` is the factor on the gradient in a 0-dim tensor, where it is not to be read by the host.
    """
    columns = torch.arange(hesses[0].shape[0], device=hesses[0].device)
    options = ess, weight_decay, beta2, factor if scale is None else scale, first
    passes.subtract_noise_lanes(thetas, hesses, grads, columns, words, *options)


def lanes(tensor: Tensor) -> list[Tensor]:
    """Return the four lanes of a contiguous tensor, as views; the last ones are shorter if it does not divide."""
    flat = tensor.view(-1)
    width = -(-flat.numel() // 4)
    return [flat[lane * width : (lane + 1) * width] for lane in range(4)]


def apart(tensor: Tensor) -> list[Tensor]:
    """Return the four lanes as tensors of their own on the same memory: the compiler must not see one tensor."""
    return [torch.from_dlpack(lane) for lane in lanes(tensor)]


def _flat(tensor: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor with one axis, and no relation to another: the passes are compiled for each rank."""
    return None if tensor is None else tensor.view(-1).data
