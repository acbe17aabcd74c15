"""The fused passes that this machine has; they are compared with the eager ones before they are used."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

from hf_ivon import passes
from hf_ivon.by_address import ByAddress
from hf_ivon.compiled import NOT_COMPILED, Compiled, apart, lanes
from hf_ivon.native import Native
from hf_ivon.passes import NoiseOptions, UpdateOptions
from hf_ivon.philox import noise_words
from hf_ivon.triton_passes import TritonPasses

logger = logging.getLogger(__name__)

_lock = threading.RLock()


# The ways to run the passes as one loop each.
Fused = ByAddress | Compiled


def fused_passes(device_type: str) -> Fused | None:
    """Return the fused passes, after a comparison with the eager ones on a few numbers; None if there are none.

    They are those of `quick_passes`, and where these cannot be had, those of `torch.compile`.
    """
    return quick_passes(device_type) or _working(_make_compiled, device_type)


def quick_passes(device_type: str) -> ByAddress | None:
    """Return the passes that a second is enough to build, in C++ or Triton, after such a comparison."""
    made = {"cpu": _make_native, "cuda": _make_triton}.get(device_type)
    return None if made is None else _working(made, device_type)


def _working(make: Callable[[str], Any], device_type: str) -> Any:
    with _lock:
        run = make(device_type)
    return None if run is None or run.failed else run


@functools.cache
@torch.no_grad()
def _make_native(device_type: str) -> Native | None:
    try:
        run = Native()
        check(run, device_type)
    except (OSError, AttributeError, ArithmeticError) as error:
        logger.info("The passes in C++ cannot be used (%s).", error)
        return None
    return run


@functools.cache
@torch.no_grad()
def _make_triton(device_type: str) -> TritonPasses | None:
    try:
        run = TritonPasses()
        if run.interpreted:
            return None
        check(run, device_type)
    except (ImportError, ArithmeticError) as error:
        logger.info("The passes in Triton cannot be used (%s).", error)
        return None
    return run


@functools.cache
@torch.no_grad()
def _make_compiled(device_type: str) -> Compiled | None:
    run = Compiled()
    try:
        check(run, device_type)
    except ArithmeticError as error:
        logger.warning(NOT_COMPILED, error)
        return None
    return run


def check(run: Fused, device_type: str) -> None:
    """Compare the passes with the eager ones on a few numbers.

    Raises:
        ArithmeticError: If they differ.
    """
    for size in (4 * 24, 4 * 1024):  # aligned, and not
        words = noise_words((size,), 1)
        start = torch.linspace(0.1, 1.0, size, dtype=torch.float32, device=device_type)
        expected = [start * (i + 1) for i in range(6)]
        tensors = [t.clone() for t in expected]
        options = UpdateOptions(100.0, 1e-3, 0.9, 0.999, 0.1, 1.0, 0.1, 1.0, True, False)
        theta, mean, hess, momentum, grad, total = expected
        mean.copy_(theta)
        columns = torch.arange(size // 4, device=device_type)
        of_each = lanes(theta), lanes(mean), lanes(hess)
        passes.sample_lanes(*of_each, columns, words.to(device_type), 100.0, 1e-3, keep=False)
        passes.add_product(total, theta, mean, grad, 2.0)
        passes.square(total, grad, 2.0, True)
        passes.take_product(theta, mean, grad, 1.0, False)
        passes.update(theta, grad, mean, momentum, hess, None, *options)
        theta, mean, hess, momentum, grad, total = tensors
        ran = [
            run.sample(theta, mean, hess, words, 100.0, 1e-3),
            run.add_product(total, theta, mean, grad, 2.0),
            run.square(total, grad, 2.0, True),
            run.take_product(theta, mean, grad, 1.0, False),
            run.update((theta, grad, mean, momentum, hess, None), options),
        ]
        if isinstance(run, Compiled):
            drawn = torch.empty_like(start)
            ran.append(run.draw_lanes(apart(drawn), columns, columns // 8, words))
            passes.draw_lanes(lanes(start), columns, columns // 8, words.to(device_type))
            tensors.append(drawn)
            expected.append(start)
        if not all(ran):
            return  # it has said why, and is not used
        if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(tensors, expected, strict=True)):
            raise ArithmeticError("the fused passes give other numbers than the eager ones")


@functools.cache
@torch.no_grad()
def redraws(run: Fused, device_type: str) -> bool:
    """Tell whether a fused pass takes noise off as the eager one does; else the eager one is used."""
    words, options = noise_words((0,), 1), NoiseOptions(100.0, 1e-3, 0.9, 2.0, True)
    start = torch.linspace(0.1, 1.0, 4000, dtype=torch.float32, device=device_type)
    (theta, hess), (other, learned), grad = (start, start * 2), (start.clone(), start * 2), start * 3
    columns = torch.arange(1000, device=device_type)
    drawn_with = words.to(device_type)
    passes.subtract_noise_lanes(lanes(theta), lanes(hess), lanes(grad), columns, drawn_with, *options)
    if not run.subtract_noise(other, learned, grad, words, options):
        return False
    alike = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in ((theta, other), (hess, learned)))
    if not alike:
        logger.warning(NOT_COMPILED, "that for `low_memory` gives other numbers than the eager one")
    return alike


@functools.cache
@torch.no_grad()
def adopts(run: Fused, device_type: str, dtype: torch.dtype) -> bool:
    """Tell whether a fused pass rounds means to a dtype as the eager one does; else the eager one is used."""
    mean = torch.linspace(0.1, 1.0, 4000, dtype=torch.float32, device=device_type)
    theta, expected = mean.to(dtype), mean.clone()
    theta[::2] = 2.0
    passes.adopt(theta, expected)
    if not run.adopt(theta, mean):
        return False
    alike = torch.equal(mean, expected)
    if not alike:
        logger.warning(NOT_COMPILED, f"that for weights in {dtype} rounds in another way than the eager one")
    return alike
