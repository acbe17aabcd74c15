"""The fused passes that this machine has; they are compared with the eager ones before they are used."""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any

import torch

from hf_ivon import passes
from hf_ivon.compiled import NOT_COMPILED, Compiled, apart, lanes
from hf_ivon.native import Native
from hf_ivon.passes import NoiseOptions, UpdateOptions
from hf_ivon.philox import noise_words

logger = logging.getLogger(__name__)

_lock = threading.RLock()


def fused_passes(device_type: str) -> Native | Compiled | None:
    """Return the fused passes, after a comparison with the eager ones on a few numbers; None if they differ.

    On a CPU they are those in C++, and if these cannot be built, those of `torch.compile`, as everywhere else.
    """
    with _lock:
        run = _make_and_check(device_type)
    return None if isinstance(run, Compiled) and run.failed else run


def native_passes(device_type: str) -> Native | None:
    """Return the passes in C++, after such a comparison; None if there are none for these devices."""
    with _lock:
        return _make_native() if device_type == "cpu" else None


@functools.cache
@torch.no_grad()
def _make_native() -> Native | None:
    try:
        run = Native()
        check(run, "cpu")
    except (OSError, AttributeError, ArithmeticError) as error:
        logger.info("The passes in C++ cannot be used (%s).", error)
        return None
    return run


@functools.cache
@torch.no_grad()
def _make_and_check(device_type: str) -> Native | Compiled | None:
    if (native := native_passes(device_type)) is not None:
        return native
    run = Compiled()
    try:
        check(run, device_type)
    except ArithmeticError as error:
        logger.warning(NOT_COMPILED, error)
        return None
    return run


def check(run: Native | Compiled, device_type: str) -> None:
    """Compare the passes with the eager ones on a few numbers.

    Raises:
        ArithmeticError: If they differ.
    """
    for size in (4 * 24, 4 * 1000):
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
        prepared: Any = run.prepare(theta, mean, hess)
        ran = [
            run.sample(theta, prepared, words, 100.0, 1e-3),
            run.add_product(total, theta, mean, grad, 2.0),
            run.square(total, grad, 2.0, True),
            run.take_product(theta, mean, grad, 1.0, False),
            run.update((theta, grad, mean, momentum, hess, None), options),
        ]
        if isinstance(run, Compiled):
            drawn = torch.empty_like(start)
            ran.append(run.draw_lanes(apart(drawn), columns, columns // 8, words.to(device_type)))
            passes.draw_lanes(lanes(start), columns, columns // 8, words.to(device_type))
            tensors.append(drawn)
            expected.append(start)
        if not all(ran):
            return  # it has said why, and is not used
        if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(tensors, expected, strict=True)):
            raise ArithmeticError("the fused passes give other numbers than the eager ones")


@functools.cache
@torch.no_grad()
def redraws(run: Native | Compiled, device_type: str) -> bool:
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
def adopts(run: Native | Compiled, device_type: str, dtype: torch.dtype) -> bool:
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
