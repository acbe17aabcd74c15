"""How the passes of `hf_ivon.passes` are run: in pieces that stay in the cache, or compiled into one loop each."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_ivon import passes
from hf_ivon.functional import cache_sized, sample
from hf_ivon.packs import MAX_ELEMENTS, Pack
from hf_ivon.passes import UpdateOptions
from hf_ivon.philox import noise_words, normal_range

logger = logging.getLogger(__name__)

# Columns of noise that are made at a time: their integers stay in a processor's cache, while calling an operation
# costs little beside what it does, and has work for two threads. On an accelerator they are small beside a tensor.
_COLUMNS, _ACCELERATOR_COLUMNS = 2**16, 2**22
# Below this size a compiled pass costs more to call than it saves.
MIN_COMPILED = MAX_ELEMENTS
# A model with fewer trainable weights is trained before the compiler is done.
_MIN_MODEL = 2**22

# The four lanes of a parameter, of its mean and of its Hessian.
Lanes = tuple[list[Tensor], ...]


class Execution:
    """Runs the passes as the caller chose.

    Args:
        foreach: Small tensors are worked on together, in packs; None does so.
        fused: Passes are compiled; None does so for models of more than 4 million trainable weights.
    """

    def __init__(self, foreach: bool | None, fused: bool | None) -> None:
        self.packs = foreach is None or foreach
        self._fused = fused

    def plan(self, num_weights: int) -> None:
        """Settle what None means for `fused`, once the number of trainable weights is known."""
        if self._fused is None:
            self._fused = num_weights >= _MIN_MODEL

    def _compiled(self, *tensors: Tensor) -> Compiled | None:
        first = tensors[0]
        if not self._fused or first.numel() < MIN_COMPILED:
            return None
        if not all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
            return None
        return compiled(first.device.type)

    def lanes_apart(self, theta: Tensor, mean: Tensor, hess: Tensor) -> Lanes | None:
        """Return what `sample_compiled` works on; None if the tensors are not for a compiled pass.

        Args:
            theta: A whole parameter.
            mean: A buffer, shape of `theta`.
            hess: Hessian estimate, shape of `theta`.
        """
        tensors = (theta, mean, hess)
        return None if theta.numel() % 4 or self._compiled(*tensors) is None else tuple(_apart(t) for t in tensors)

    def sample_compiled(self, theta: Tensor, lanes: Lanes, words: Tensor, *, ess: float, weight_decay: float) -> bool:
        """Copy a whole tensor into its buffer and put a weight sample into it, by a compiled pass.

        Args:
            theta: Holds the mean. Written to.
            lanes: Output of `lanes_apart`.
            words: Output of `noise_words`.
            ess: λ, number of examples.
            weight_decay: δ, loss/param².

        Returns:
            Whether it was done; if not, nothing is changed.
        """
        run = compiled(theta.device.type)
        return run is not None and run.sample(theta, lanes, words, ess, weight_decay)

    def sample(
        self,
        theta: Tensor,
        mean: Tensor,
        hess: Tensor,
        words: Tensor,
        *,
        ess: float,
        weight_decay: float,
        start: int = 0,
        total: int | None = None,
    ) -> None:
        """Put a weight sample into a tensor.

        Args:
            theta: Holds the mean, or, in a narrower dtype, its rounded value. Written to.
            mean: The mean, shape of `theta`.
            hess: Hessian estimate, shape and dtype of `mean`.
            words: Output of `noise_words`.
            ess: λ, number of examples.
            weight_decay: δ, loss/param².
            start: Position of the first element in the flattened whole that this is a part of.
            total: Number of elements of the whole; None is those of `theta`.
        """
        total = theta.numel() if total is None else total
        words = words.to(theta.device, non_blocking=True)
        if theta.dtype == mean.dtype and theta.numel() == total and theta.is_contiguous() and hess.is_contiguous():
            lanes = [_lanes(t) for t in (theta, mean, hess)]
            width = -(-total // 4)
            step = _COLUMNS if theta.device.type == "cpu" else _ACCELERATOR_COLUMNS
            for begin in range(0, width, step):
                columns = torch.arange(begin, min(begin + step, width), device=theta.device)
                parts = [[lane[begin : begin + step] for lane in tensor] for tensor in lanes]
                thetas, means, hesses = parts
                passes.sample_lanes(thetas, means, hesses, columns, words, ess, weight_decay)
            return
        for part, m, h in cache_sized(theta, mean, hess):
            noise = normal_range(start, start + m.numel(), total, words).to(m.dtype).view(m.shape)
            part.copy_(sample(m, h, noise, ess=ess, weight_decay=weight_decay))
            start += m.numel()

    def sample_pack(self, pack: Pack, words: Tensor, *, ess: float, weight_decay: float) -> None:
        """Put a weight sample into the buffer "theta" of a pack.

        Args:
            pack: Its buffers "mean" and "hess" are read.
            words: Output of `noise_words`; the index in it is not used.
            ess: λ, number of examples.
            weight_decay: δ, loss/param².
        """
        theta, mean, hess = (pack.flat(name) for name in ("theta", "mean", "hess"))
        words = words.to(theta.device, non_blocking=True)
        run = self._compiled(theta, mean, hess)
        if run is None or not run.call("draw_lanes", pack.lanes, pack.columns, pack.indices, words):
            for columns, indices, *lanes in cache_sized(
                pack.columns, pack.indices, *pack.lanes, max_elements=_COLUMNS
            ):
                passes.draw_lanes(lanes, columns, indices, words)
        torch.index_select(pack.noise, 0, pack.order, out=theta)
        for t, m, h in cache_sized(theta, mean, hess):
            t.copy_(sample(m, h, t, ess=ess, weight_decay=weight_decay))

    def take_product(self, theta: Tensor, mean: Tensor, grad: Tensor, factor: float, squared: bool) -> None:
        """Run `passes.take_product` on tensors of any size."""
        run = self._compiled(theta, mean, grad)
        if run is not None and run.call("take_product", *map(_flat, (theta, mean, grad)), factor, squared):
            torch.autograd.graph.increment_version((theta, mean))
            return
        for t, m, g in cache_sized(theta, mean, grad):
            passes.take_product(t, m, g, factor, squared)

    def update(
        self,
        mean: Tensor,
        grad: Tensor,
        curvature: Tensor,
        momentum: Tensor,
        hess: Tensor,
        prior_mean: Tensor | None,
        options: UpdateOptions,
    ) -> None:
        """Run `passes.update` on tensors of any size."""
        tensors = [t for t in (mean, grad, curvature, momentum, hess, prior_mean) if t is not None]
        run = self._compiled(*(t for t in tensors if t is not momentum or t.dtype != torch.bfloat16))
        if run is not None and run.call("update", *map(_flat, tensors[:5]), _flat(prior_mean), *options):
            torch.autograd.graph.increment_version((mean, momentum, hess))
            return
        for m, g, c, average, h, *prior in cache_sized(*tensors):
            passes.update(m, g, c, average, h, prior[0] if prior else None, *options)


def _flat(tensor: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor with one axis, and no relation to another: the passes are compiled for each rank."""
    return None if tensor is None else tensor.view(-1).data


def _lanes(tensor: Tensor) -> list[Tensor]:
    """Return the four lanes of a contiguous tensor, as views; the last ones are shorter if it does not divide."""
    flat = tensor.view(-1)
    width = -(-flat.numel() // 4)
    return [flat[lane * width : (lane + 1) * width] for lane in range(4)]


def _apart(tensor: Tensor) -> list[Tensor]:
    """Return the four lanes as tensors of their own on the same memory: the compiler must not see one tensor."""
    return [torch.from_dlpack(lane) for lane in _lanes(tensor)]


def _sample_whole(
    thetas: list[Tensor], means: list[Tensor], hesses: list[Tensor], words: Tensor, ess: float, weight_decay: float
) -> None:
    columns = torch.arange(hesses[0].shape[0], device=hesses[0].device)
    passes.sample_lanes(thetas, means, hesses, columns, words, ess, weight_decay)


def compile_pass(function: Callable[..., None]) -> Callable[..., None]:
    """Return a pass that is compiled for tensors of any size when it is first called.

    The loop runs in as many threads as torch has when it runs. Else the compiler settles that by the tensors and the
    threads of the first call, and small ones would make all later loops run in one thread.
    """
    compile_: Any = torch.compile
    return compile_(function, dynamic=True, fullgraph=True, options={"cpp.dynamic_threads": True})


class Compiled:
    """The passes, compiled for one kind of device."""

    def __init__(self) -> None:
        functions: dict[str, Callable[..., None]] = {
            "sample": _sample_whole,
            "draw_lanes": passes.draw_lanes,
            "take_product": passes.take_product,
            "update": passes.update,
        }
        self._functions = {name: compile_pass(f) for name, f in functions.items()}
        self._failed = False

    def sample(self, theta: Tensor, lanes: Lanes, words: Tensor, ess: float, weight_decay: float) -> bool:
        """Run the first pass on a whole tensor, whose size is a multiple of four; see `Execution.sample_compiled`."""
        done = self.call("sample", *lanes, words.to(theta.device, non_blocking=True), ess, weight_decay)
        if done:
            torch.autograd.graph.increment_version(theta)
        return done

    def call(self, name: str, *args: Any) -> bool:
        """Run a pass; returns whether it ran: after a failure to compile, none does any more."""
        if self._failed:
            return False
        args = tuple(float(a) if type(a) is int else a for a in args)  # whose value would be compiled in
        try:
            self._functions[name](*args)
        except Exception as error:  # of any kind: compilers are not part of torch
            self._failed = True
            _warn(error)
            return False
        return True


def _warn(error: Exception) -> None:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    logger.warning(
        "IVON's passes over the weights could not be compiled (%s). They run eagerly instead: the same numbers, more "
        "slowly. Install a C++ compiler such as g++, or pass `fused=False` to be silent.",
        reason,
    )


_lock = threading.Lock()


def compiled(device_type: str) -> Compiled | None:
    """Return the compiled passes, after they have been seen to do what the eager ones do; None if they do not."""
    with _lock:
        return _compile_and_check(device_type)


@functools.cache
@torch.no_grad()
def _compile_and_check(device_type: str) -> Compiled | None:
    """Compile the passes, and compare them with the eager ones on a few numbers."""
    run, eager = Compiled(), Execution(foreach=False, fused=False)
    for size in (4 * 24, 4 * 1000):
        words = noise_words((size,), 1)
        start = torch.linspace(0.1, 1.0, size, device=device_type)
        expected = [start * (i + 1) for i in range(6)]
        tensors = [t.clone() for t in expected]
        options = UpdateOptions(100.0, 1e-3, 0.9, 0.999, 0.1, 1.0, 0.1, 1.0, True, False)
        columns = torch.arange(size // 4, device=device_type)
        indices = columns // 8
        theta, mean, hess, momentum, grad, drawn = expected
        mean.copy_(theta)
        eager.sample(theta, mean, hess, words, ess=100.0, weight_decay=1e-3)
        eager.take_product(theta, mean, grad, 1.0, False)
        eager.update(theta, grad, mean, momentum, hess, None, options)
        passes.draw_lanes(_lanes(drawn), columns, indices, words.to(device_type))
        theta, mean, hess, momentum, grad, drawn = tensors
        ran = (
            run.sample(theta, tuple(_apart(t) for t in (theta, mean, hess)), words, 100.0, 1e-3)
            and run.call("take_product", theta, mean, grad, 1.0, False)
            and run.call("update", theta, grad, mean, momentum, hess, None, *options)
            and run.call("draw_lanes", _apart(drawn), columns, indices, words.to(device_type))
        )
        if not ran:
            return None
        if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(tensors, expected, strict=True)):
            _warn(ValueError("the compiled passes give other numbers than the eager ones"))
            return None
    return run
