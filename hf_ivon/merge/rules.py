"""A plan's rule applied to one tensor, a few million weights at a time."""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from hf_ivon.merge import methods
from hf_ivon.merge.files import Checkpoint, row_blocks
from hf_ivon.merge.hessians import base_hessian, hessian, variances_of
from hf_ivon.merge.plan import Plan
from hf_ivon.merge.report import TensorStatistics

_BLOCK = 2**22  # weights that a thread merges at a time
_COMPUTE = 2**18  # weights of each model computed with at a time: few for the cache, many for the interpreter
_WORKERS = 8  # threads; each holds a block of all models
_REPORT = 8  # one of so many pieces is looked at for the report
# Rules in which NaN of one model is NaN in the result.
_SHOWS_NAN = ("average", "task-arithmetic", "uncertainty", "gaussian", "fisher")


class Sink(Protocol):
    """Takes merged rows, in any order, from any threads."""

    def __call__(self, name: str, rows: Tensor, start: int, variance: Tensor | None) -> None:
        """Take rows of a tensor, from row `start` on, and their variance (fp32, param²) where the rule yields one."""


def merge_tensors(
    plan: Plan, dtypes: Mapping[str, torch.dtype], sink: Sink
) -> Generator[tuple[str, int, TensorStatistics], None, None]:
    """Merge every tensor, block by block in the order of the plan's layout, several blocks side by side.

    Args:
        plan: What is merged, and how.
        dtypes: What each tensor is wanted in; rules compute in fp32, or wider.
        sink: Takes the merged rows, in the threads that made them.

    Yields:
        For each block that is done: the tensor's name, the number of weights, and what each model contributed.

    Raises:
        ValueError: If a tensor holds NaN or inf, a variance is not positive, or integers differ.
    """
    # The GNU allocator gives freed memory back to the system, and asks for it anew, until it has seen something large
    # being freed: for the temporary tensors below, that would take longer than what is computed with them.
    torch.empty(24 * 2**20, dtype=torch.uint8)
    workers = min(_WORKERS, os.cpu_count() or 1)
    # Torch's own threads wait for each other at every operation, which is slow where cores are shared.
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending: deque[tuple[str, Future[tuple[int, TensorStatistics]]]] = deque()
        try:
            for name, entry in plan.layout.items():
                trims = plan.method == "ties" and name not in plan.kept and entry.dtype.is_floating_point
                thresholds = pool.submit(_thresholds, plan, name).result() if trims else []
                for start, stop in row_blocks(entry.shape, _BLOCK):
                    _expect(plan, name, start, stop)
                    future = pool.submit(_merge_block, plan, name, start, stop, dtypes[name], thresholds, sink)
                    pending.append((name, future))
                    if len(pending) > workers:
                        first, future = pending.popleft()
                        yield (first, *future.result())
            while pending:
                first, future = pending.popleft()
                yield (first, *future.result())
        finally:
            for _, future in pending:
                future.cancel()


def _expect(plan: Plan, name: str, start: int, stop: int) -> None:
    """Let a block be read from the disk while the blocks before it are merged."""
    models = [plan.kept[name]] if name in plan.kept else plan.models
    for model in models:
        model.tensors.expect(name, start, stop)
        if plan.trusts(name) and model.posterior is not None:
            model.posterior.expect(name, start, stop)
    if plan.base is not None and name not in plan.kept:
        plan.base.tensors.expect(plan.base_name(name), start, stop)
        if plan.base_knows(name) and plan.base.posterior is not None:
            plan.base.posterior.expect(plan.base_name(name), start, stop)


def _merge_block(
    plan: Plan, name: str, start: int, stop: int, dtype: torch.dtype, thresholds: list[float], sink: Sink
) -> tuple[int, TensorStatistics]:
    """Merge a block and give it away; return its number of weights, and what each model contributed."""
    statistics = TensorStatistics(len(plan.models))
    entry = plan.layout[name]
    count = (stop - start) * math.prod(entry.shape[1:])
    if name in plan.kept:
        rows = plan.kept[name].tensors.rows(name, start, stop)
        if entry.dtype.is_floating_point:
            _check_finite(name, plan.kept[name], rows)
            rows = _cast(name, rows, dtype)
        sink(name, rows, start, None)
    elif not entry.dtype.is_floating_point:
        sink(name, methods.equal(name, [m.tensors.rows(name, start, stop) for m in plan.models]), start, None)
    else:
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        for i, (first, last) in enumerate(row_blocks(shape, _COMPUTE)):
            looks = statistics if i % _REPORT == 0 else None
            merged, precision = _merge_rows(plan, name, start + first, start + last, thresholds, looks)
            variance = None if precision is None else precision.reciprocal_().float()
            sink(name, _cast(name, merged, dtype), start + first, variance)
    return count, statistics


def _merge_rows(
    plan: Plan, name: str, start: int, stop: int, thresholds: list[float], statistics: TensorStatistics | None
) -> tuple[Tensor, Tensor | None]:
    """Return merged rows and their precision; so few that intermediate results stay in the cache."""
    entry = plan.layout[name]
    wide = _wide(entry.dtype)
    models: Iterable[Tensor] = _means(plan, name, start, stop, wide)
    trust: Iterable[Tensor] | None = _trust(plan, name, start, stop, wide) if plan.trusts(name) else None
    shows_nan = plan.method in _SHOWS_NAN
    if statistics is not None or not shows_nan:
        models, trust = list(models), None if trust is None else list(trust)
    if not shows_nan:
        _check_models(plan, name, models)
    base = plan.base.tensors.rows(plan.base_name(name), start, stop).to(wide) if plan.base else None
    base_variance = _base_variance(plan, name, start, stop)
    prior = None if base_variance is None else base_variance.to(wide).reciprocal_()
    position = start * math.prod(entry.shape[1:])
    merged, precision = _apply(plan, name, models, base, trust, prior, thresholds, position)
    if not torch.isfinite(merged.sum()):  # of finite weights it is, unless they are very large
        _check_models(plan, name, _means(plan, name, start, stop, wide))
        if plan.base is not None and base is not None:
            _check_finite(plan.base_name(name), plan.base, base)
        if not torch.isfinite(merged).all():
            raise ValueError(f"The merge of `{name}` is too large for its dtype. Pass smaller weights.")
    if statistics is not None:
        statistics.add(merged, list(models), list(trust or ()), plan.weights)
    return merged, precision


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return what a tensor of some dtype is computed with."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _means(plan: Plan, name: str, start: int, stop: int, wide: torch.dtype) -> Iterator[Tensor]:
    """Read rows of each model, when they are asked for."""
    for model in plan.models:
        yield model.tensors.rows(name, start, stop).to(wide)


def _trust(plan: Plan, name: str, start: int, stop: int, wide: torch.dtype) -> Iterator[Tensor]:
    """Read the Hessian, or for `gaussian` the precision, of rows of each model, when it is asked for."""
    for model in plan.models:
        precision = variances_of(model, name, start, stop).to(wide).reciprocal_()
        yield precision if plan.method == "gaussian" else hessian(model.config, name, precision)


def _cast(name: str, merged: Tensor, dtype: torch.dtype) -> Tensor:
    cast = merged.to(dtype)
    if dtype.itemsize == 1 and merged.dtype.itemsize > 1 and merged.numel():  # some of which have no inf
        fits = bool(merged.abs().amax() <= torch.finfo(dtype).max)
    else:
        # bf16 reaches as far as fp32, in which the sums were looked at.
        reach = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).max
        fits = reach >= torch.finfo(merged.dtype).max or bool(torch.isfinite(cast).all())
    if not fits:
        raise ValueError(
            f"The merge of `{name}` is too large for {str(dtype).removeprefix('torch.')}. Pass --dtype bfloat16 or "
            f"float32, or smaller weights."
        )
    return cast


def _check_models(plan: Plan, name: str, models: Iterable[Tensor]) -> None:
    for model, values in zip(plan.models, models, strict=True):
        _check_finite(name, model, values)


def _check_finite(name: str, model: Checkpoint, values: Tensor) -> None:
    if values.dtype.itemsize == 1:  # for which there is no `isfinite`
        values = values.float()
    if not torch.isfinite(values).all():
        raise ValueError(f"The tensor `{name}` of {model.name} holds NaN or inf. Check that model.")


def _apply(
    plan: Plan,
    name: str,
    models: Iterable[Tensor],
    base: Tensor | None,
    trust: Iterable[Tensor] | None,
    prior: Tensor | None,
    thresholds: list[float],
    position: int,
) -> tuple[Tensor, Tensor | None]:
    """Return merged weights and their precision; `trust` is Hessians or (gaussian) precisions, None without."""
    weights, method = plan.weights, plan.method
    if method == "gaussian" and trust is not None:
        return methods.gaussian(list(models), list(trust), weights)
    if method == "fisher" and trust is not None:
        return methods.fisher(list(models), list(trust), weights), None
    if base is None:  # the average, also where a rule that needs no base has no posterior
        return methods.average(models, weights), None
    if method == "uncertainty" and trust is not None:
        return methods.uncertainty(base, models, trust, base_hessian(plan, name, prior), weights), None
    if method == "ties":
        return methods.ties(base, list(models), weights, thresholds), None
    if method == "dare":
        key = hashlib.blake2b(f"{plan.seed}\0{name}\0{position}".encode(), digest_size=8).digest()
        return methods.dare(base, list(models), weights, plan.density, int.from_bytes(key, "little") >> 1), None
    return methods.task_arithmetic(base, models, weights), None


def _base_variance(plan: Plan, name: str, start: int, stop: int) -> Tensor | None:
    if plan.method != "uncertainty" or plan.base is None or not plan.base_knows(name):
        return None
    return variances_of(plan.base, plan.base_name(name), start, stop)


def _thresholds(plan: Plan, name: str) -> list[float]:
    """Return for each model the magnitude of difference from the base from which `density` of a tensor is."""
    assert plan.base is not None  # the plan made sure
    entry, base = plan.layout[name], plan.base
    wide = _wide(entry.dtype)

    def differences(model: Checkpoint) -> Iterator[Tensor]:
        for start, stop in row_blocks(entry.shape, _BLOCK):
            own = model.tensors.rows(name, start, stop).to(wide)
            yield (own - base.tensors.rows(plan.base_name(name), start, stop).to(wide)).float()

    wanted = int(plan.density * entry.numel)
    return [methods.kth_largest_magnitude(partial(differences, m), wanted) for m in plan.models]
