"""A plan's rule applied to one tensor, a few million weights at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_ivon.checkpoint import variance_problems
from hf_ivon.merge import methods
from hf_ivon.merge.files import Checkpoint, row_blocks
from hf_ivon.merge.plan import Plan
from hf_ivon.merge.report import TensorStatistics
from hf_ivon.posterior_config import PosteriorConfig

_READ = 2**22  # weights of each model that are read at a time
_COMPUTE = 2**18  # and that are computed with, so that what lies in between stays in the cache


@dataclass
class MergedRows:
    """Rows of a merged tensor.

    Attributes:
        values: The rows, in fp32 (fp64 stays), or in their own dtype where they were only copied.
        precision: Their precision, 1/param², where the rule yields one.
    """

    values: Tensor
    precision: Tensor | None = None


def merged_rows(plan: Plan, name: str, statistics: TensorStatistics) -> Iterator[MergedRows]:
    """Yield a merged tensor, rows by rows.

    Args:
        plan: What is merged, and how.
        name: A tensor of the plan's layout.
        statistics: Takes in what each model contributed.

    Raises:
        ValueError: If a tensor holds NaN or inf, a variance is not positive, or integers differ.
    """
    entry = plan.layout[name]
    trims = plan.method == "ties" and name not in plan.kept and entry.dtype.is_floating_point
    thresholds = _thresholds(plan, name) if trims else []
    for start, stop in row_blocks(entry.shape, _READ):
        if name in plan.kept:
            yield MergedRows(plan.kept[name].tensors.rows(name, start, stop))
            continue
        parts = [m.tensors.rows(name, start, stop) for m in plan.models]
        if not parts[0].is_floating_point():
            yield MergedRows(_equal(name, parts))
            continue
        wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
        for model, part in zip(plan.models, parts, strict=True):
            if not torch.isfinite(part if part.element_size() > 1 else part.float()).all():
                raise ValueError(f"The tensor `{name}` of {model.name} holds NaN or inf. Check that model.")
        values = torch.empty(parts[0].shape, dtype=wide)
        base = plan.base.tensors.rows(plan.base_name(name), start, stop) if plan.base else None
        variances = [_variances(m, name, start, stop) for m in plan.models] if plan.trusts(name) else []
        base_variance = _base_variance(plan, name, start, stop)
        precision = torch.empty_like(values) if variances and plan.method == "gaussian" else None
        for i in range(0, max(1, values.numel()), _COMPUTE):
            piece = slice(i, i + _COMPUTE)

            def flat(tensor: Tensor, piece: slice = piece, wide: torch.dtype = wide) -> Tensor:
                return tensor.reshape(-1)[piece].to(wide)

            models = [flat(p) for p in parts]
            precisions = [flat(v).reciprocal_() for v in variances]
            start_at = None if base is None else flat(base)
            prior = None if base_variance is None else flat(base_variance).reciprocal_()
            hessians = [] if plan.method == "gaussian" else [
                _hessian(m.config, name, p) for m, p in zip(plan.models, precisions, strict=bool(precisions))
            ]  # fmt: skip
            position = start * (values.numel() // max(1, stop - start)) + i
            merged = _apply(plan, name, models, start_at, hessians, precisions, prior, thresholds, position)
            if precision is not None and merged[1] is not None:
                precision.view(-1)[piece] = merged[1]
            values.view(-1)[piece] = merged[0]
            statistics.add(merged[0], models, hessians or precisions, plan.weights)
        yield MergedRows(values, precision)


def _apply(
    plan: Plan,
    name: str,
    models: list[Tensor],
    base: Tensor | None,
    hessians: list[Tensor],
    precisions: list[Tensor],
    prior: Tensor | None,
    thresholds: list[float],
    position: int,
) -> tuple[Tensor, Tensor | None]:
    """Return merged weights and their precision; tensors are flat."""
    weights, method = plan.weights, plan.method
    if method == "gaussian" and precisions:
        return methods.gaussian(models, precisions, weights)
    if method == "fisher" and hessians:
        return methods.fisher(models, hessians, weights), None
    if base is None:  # the average, also where a rule that needs no base has no posterior
        return methods.average(models, weights), None
    if method == "uncertainty" and hessians:
        return methods.uncertainty(base, models, hessians, _base_hessian(plan, name, prior), weights), None
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


def _variances(model: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    assert model.posterior is not None  # the plan made sure
    variance = model.posterior.rows(name, start, stop)
    if problems := variance_problems(name, variance):
        raise ValueError(f"The posterior of {model.name} cannot be used: {problems[0]}. Retrain it.")
    return variance


def _base_variance(plan: Plan, name: str, start: int, stop: int) -> Tensor | None:
    base = plan.base
    known = plan.method == "uncertainty" and base is not None and base.posterior is not None
    if not known or base is None or plan.base_name(name) not in (base.posterior or {}):
        return None
    return _variances(base, plan.base_name(name), start, stop)


def _hessian(config: PosteriorConfig | None, name: str, precision: Tensor) -> Tensor:
    """Return the Hessian of the summed loss, N * h: precision / ess is h + delta, per example. Changes `precision`."""
    assert config is not None  # the plan made sure
    per_example = precision.div_(config.of("ess", name))
    return per_example.sub_(config.of("weight_decay", name)).clamp_min_(0).mul_(size_of(config, name))


def size_of(config: PosteriorConfig, name: str) -> float:
    """Return what the training loss averaged over: label tokens, or examples; `ess` where neither is known."""
    size = config.num_tokens if config.num_tokens is not None else config.num_examples
    return float(config.of("ess", name) if size is None else size)


def _base_hessian(plan: Plan, name: str, precision: Tensor | None) -> Tensor:
    """Return the base's own Hessian if it has a posterior, else the prior's, averaged over the models."""
    if precision is not None and plan.base is not None:
        return _hessian(plan.base.config, plan.base_name(name), precision)
    configs = [m.config for m in plan.models if m.config is not None]
    prior = sum(size_of(c, name) * c.of("weight_decay", name) for c in configs) / len(configs)
    return torch.tensor(prior)


def _thresholds(plan: Plan, name: str) -> list[float]:
    """Return for each model the magnitude of difference from the base from which `density` of a tensor is."""
    assert plan.base is not None  # the plan made sure
    entry, base = plan.layout[name], plan.base
    number = 1
    for n in entry.shape:
        number *= n

    def differences(model: Checkpoint) -> Iterator[Tensor]:
        for start, stop in row_blocks(entry.shape, _READ):
            own = model.tensors.rows(name, start, stop).float()
            yield own - base.tensors.rows(plan.base_name(name), start, stop).float()

    wanted = int(plan.density * number)
    return [methods.kth_largest_magnitude(partial(differences, m), wanted) for m in plan.models]


def start_trust(plan: Plan, name: str) -> list[float]:
    """Return for each model the trust in a weight whose Hessian is that which training began with."""
    if not plan.trusts(name):
        return []
    configs = [m.config for m in plan.models if m.config is not None]
    if plan.method == "gaussian":
        return [c.of("ess", name) * (c.of("hess_init", name) + c.of("weight_decay", name)) for c in configs]
    return [size_of(c, name) * c.of("hess_init", name) for c in configs]
