"""A plan's rule applied to one tensor, a few million weights at a time."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_ivon.merge import methods
from hf_ivon.merge.files import Checkpoint, row_blocks
from hf_ivon.merge.hessians import base_hessian, hessian, variances_of
from hf_ivon.merge.plan import Plan
from hf_ivon.merge.report import TensorStatistics

_READ = 2**22  # weights of each model that are read at a time
_COMPUTE = (
    2**18
)  # weights of each model that are computed with at a time, so that intermediate results stay in the cache
_WORKERS = 8  # threads; each holds a block of all models
_REPORT = 8  # one of so many pieces is looked at for the report
_SHOWS_NAN = ("average", "task-arithmetic", "gaussian", "fisher")  # NaN of one model is NaN in the result


@dataclass
class MergedRows:
    """Rows of a merged tensor.

    Attributes:
        values: The rows, in fp32 (fp64 stays), or in their own dtype where they were only copied.
        precision: Their precision, 1/param², where the rule yields one.
    """

    values: Tensor
    precision: Tensor | None = None


def merged_blocks(plan: Plan) -> Iterator[tuple[str, MergedRows, TensorStatistics]]:
    """Yield every tensor of a merge, rows by rows in the order of the plan's layout.

    Blocks are computed side by side, one thread each, a few ahead of the one that is yielded.

    Args:
        plan: What is merged, and how.

    Yields:
        Name, rows, and what each model contributed to them.

    Raises:
        ValueError: If a tensor holds NaN or inf, a variance is not positive, or integers differ.
    """
    workers = min(_WORKERS, os.cpu_count() or 1)
    # Torch's own threads wait for each other at every operation, which is slow where cores are shared.
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending: deque[tuple[str, Future[tuple[MergedRows, TensorStatistics]]]] = deque()
        try:
            for name, entry in plan.layout.items():
                trims = plan.method == "ties" and name not in plan.kept and entry.dtype.is_floating_point
                thresholds = pool.submit(_thresholds, plan, name).result() if trims else []
                for start, stop in row_blocks(entry.shape, _READ):
                    pending.append((name, pool.submit(_merge_block, plan, name, start, stop, thresholds)))
                    if len(pending) > workers:
                        first, future = pending.popleft()
                        yield (first, *future.result())
            while pending:
                first, future = pending.popleft()
                yield (first, *future.result())
        finally:
            for _, future in pending:
                future.cancel()


def _merge_block(
    plan: Plan, name: str, start: int, stop: int, thresholds: list[float]
) -> tuple[MergedRows, TensorStatistics]:
    statistics = TensorStatistics(len(plan.models))
    if name in plan.kept:
        return MergedRows(plan.kept[name].tensors.rows(name, start, stop)), statistics
    parts = [m.tensors.rows(name, start, stop) for m in plan.models]
    if not parts[0].is_floating_point():
        return MergedRows(_equal(name, parts)), statistics
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    base = plan.base.tensors.rows(plan.base_name(name), start, stop) if plan.base else None
    variances = [variances_of(m, name, start, stop) for m in plan.models] if plan.trusts(name) else []
    base_variance = _base_variance(plan, name, start, stop)
    values = torch.empty(parts[0].shape, dtype=wide)
    precision = torch.empty_like(values) if variances and plan.method == "gaussian" else None
    width = values.numel() // max(1, stop - start)
    for i in range(0, max(1, values.numel()), _COMPUTE):

        def flat(tensor: Tensor, i: int = i) -> Tensor:
            piece = tensor.reshape(-1)[i : i + _COMPUTE]
            return piece.to(wide, copy=True)

        models = [flat(p) for p in parts]
        if plan.method not in _SHOWS_NAN:
            _check_finite(plan, name, models)
        trust = [flat(v).reciprocal_() for v in variances]
        if trust and plan.method != "gaussian":
            trust = [hessian(m.config, name, t) for m, t in zip(plan.models, trust, strict=True)]
        merged, narrow = _apply(
            plan,
            name,
            models,
            None if base is None else flat(base),
            trust,
            None if base_variance is None else flat(base_variance).reciprocal_(),
            thresholds,
            start * width + i,
        )
        if not torch.isfinite(merged.sum()):
            _check_finite(plan, name, models)
        values.view(-1)[i : i + _COMPUTE] = merged
        if precision is not None and narrow is not None:
            precision.view(-1)[i : i + _COMPUTE] = narrow
        if i // _COMPUTE % _REPORT == 0:
            statistics.add(merged, models, trust, plan.weights)
    return MergedRows(values, precision), statistics


def _check_finite(plan: Plan, name: str, models: list[Tensor]) -> None:
    for model, values in zip(plan.models, models, strict=True):
        if not torch.isfinite(values.sum()):  # the sum of finite weights is finite; of others it is not
            raise ValueError(f"The tensor `{name}` of {model.name} holds NaN or inf. Check that model.")


def _apply(
    plan: Plan,
    name: str,
    models: list[Tensor],
    base: Tensor | None,
    trust: list[Tensor],
    prior: Tensor | None,
    thresholds: list[float],
    position: int,
) -> tuple[Tensor, Tensor | None]:
    """Return merged weights and their precision; tensors are flat, `trust` is Hessians or (gaussian) precisions."""
    weights, method = plan.weights, plan.method
    if method == "gaussian" and trust:
        return methods.gaussian(models, trust, weights)
    if method == "fisher" and trust:
        return methods.fisher(models, trust, weights), None
    if base is None:  # the average, also where a rule that needs no base has no posterior
        return methods.average(models, weights), None
    if method == "uncertainty" and trust:
        return methods.uncertainty(base, models, trust, base_hessian(plan, name, prior), weights), None
    if method == "ties":
        return methods.ties(base, models, weights, thresholds), None
    if method == "dare":
        key = hashlib.blake2b(f"{plan.seed}\0{name}\0{position}".encode(), digest_size=8).digest()
        return methods.dare(base, models, weights, plan.density, int.from_bytes(key, "little") >> 1), None
    return methods.task_arithmetic(base, models, weights), None


def _equal(name: str, parts: list[Tensor]) -> Tensor:
    if any(not torch.equal(parts[0], p) for p in parts[1:]):
        raise ValueError(f"The tensor `{name}` holds no real numbers and differs between the models. Use --heads.")
    return parts[0]


def _base_variance(plan: Plan, name: str, start: int, stop: int) -> Tensor | None:
    base = plan.base
    known = plan.method == "uncertainty" and base is not None and base.posterior is not None
    if not known or base is None or plan.base_name(name) not in (base.posterior or {}):
        return None
    return variances_of(base, plan.base_name(name), start, stop)


def _thresholds(plan: Plan, name: str) -> list[float]:
    """Return for each model the magnitude of difference from the base from which `density` of a tensor is."""
    assert plan.base is not None  # the plan made sure
    entry, base = plan.layout[name], plan.base

    def differences(model: Checkpoint) -> Iterator[Tensor]:
        for start, stop in row_blocks(entry.shape, _READ):
            own = model.tensors.rows(name, start, stop).float()
            yield own - base.tensors.rows(plan.base_name(name), start, stop).float()

    wanted = int(plan.density * entry.numel)
    return [methods.kth_largest_magnitude(partial(differences, m), wanted) for m in plan.models]
