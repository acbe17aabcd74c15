"""How far a merge trusts a weight: the models' Hessians, and that of their base."""

from __future__ import annotations

import dataclasses
import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from hf_ivon.checkpoint import variance_problems
from hf_ivon.merge.files import Checkpoint, row_blocks
from hf_ivon.merge.plan import Plan
from hf_ivon.posterior_config import PosteriorConfig

_READ = 2**18  # weights that are read at a time: few for the cache, many for the interpreter
_LOOKED_AT = 2**28  # of more weights, an even part is enough for their average


def variances_of(model: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    """Return rows of a model's variances.

    Raises:
        ValueError: If one is not positive.
    """
    assert model.posterior is not None  # the plan made sure
    variance = model.posterior.rows(name, start, stop)
    if problems := variance_problems(name, variance):
        raise ValueError(f"The posterior of {model.name} cannot be used: {problems[0]}. Retrain it.")
    return variance


def hessian(config: PosteriorConfig | None, name: str, precision: Tensor) -> Tensor:
    """Return the Hessian of the summed loss, N * h: precision / ess is h + delta, per example. Changes `precision`."""
    assert config is not None  # the plan made sure
    size = size_of(config, name)
    return precision.mul_(size / config.of("ess", name)).sub_(size * config.of("weight_decay", name)).clamp_min_(0)


def size_of(config: PosteriorConfig, name: str) -> float:
    """Return what the training loss averaged over: label tokens, or examples; `ess` where neither is known."""
    return float(config.of("ess", name) if config.loss_size is None else config.loss_size)


def base_hessian(plan: Plan, name: str, precision: Tensor | None) -> Tensor:
    """Return the number that was given; else the base's own Hessian, else the prior's."""
    number = number_for_base(plan, name)
    if number is not None:
        return torch.tensor(number)
    assert plan.base is not None  # whose posterior it is
    assert precision is not None
    return hessian(plan.base.config, plan.base_name(name), precision)


def number_for_base(plan: Plan, name: str) -> float | None:
    """Return the Hessian of the base where it is one number for a tensor.

    It is the one that was given, or else that of the prior, averaged over the models, up to the plan's `prior_limit`.

    Args:
        plan: The merge.
        name: The tensor.

    Returns:
        The number, loss/param²; None if the base has a posterior of its own there, or the rule does not use it.
    """
    if plan.method != "uncertainty" or not plan.trusts(name):
        return None
    if plan.base_hessian is not None or plan.base_knows(name):
        return plan.base_hessian
    return min(_prior(plan, name), plan.prior_limit)


def _prior(plan: Plan, name: str) -> float:
    configs = [m.config for m in plan.models if m.config is not None]
    return sum(size_of(c, name) * c.of("weight_decay", name) for c in configs) / len(configs)


def limit_prior(plan: Plan) -> Plan:
    """Return the plan with its `prior_limit` set, if it has a use for it: the average Hessian of the models' weights.

    A prior that keeps the models near their base, as that of the preset for finetuning, is many thousand times what
    the data say of a weight. The rule would then add up what the models learnt, as if each had been held back from all
    of it by the prior alone, and the Hessians would not count.

    Args:
        plan: The merge.
    """
    names = _without_base_hessian(plan)
    if not names or plan.base_hessian is not None or plan.prior_limit < math.inf:
        return plan
    weights = len(plan.models) * sum(plan.layout[n].numel for n in names)
    if not weights:
        return plan
    stride = math.ceil(weights / _LOOKED_AT)
    enough = weights * max(_prior(plan, n) for n in names)
    total = 0.0
    with ThreadPoolExecutor(os.cpu_count() or 1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        sums = [pool.submit(_sum_of_hessians, model, name, stride) for name in names for model in plan.models]
        try:
            for found in sums:
                total += found.result()
                if total >= enough:  # the average is above the prior, whatever the other tensors hold
                    return plan
        finally:
            for found in sums:
                found.cancel()
    return dataclasses.replace(plan, prior_limit=total / weights or math.inf)  # without any curvature, only the prior


def limited_prior(plan: Plan) -> tuple[float, float] | None:
    """Return the prior's Hessian, the largest over the tensors, and the limit, if it is above that; else None."""
    largest = max((_prior(plan, name) for name in _without_base_hessian(plan)), default=0.0)
    return (largest, plan.prior_limit) if largest > plan.prior_limit else None


def _without_base_hessian(plan: Plan) -> list[str]:
    names = plan.layout if plan.method == "uncertainty" else ()
    return [n for n in names if plan.trusts(n) and not plan.base_knows(n)]


def _sum_of_hessians(model: Checkpoint, name: str, stride: int) -> float:
    """Return the sum over a tensor; from one of `stride` blocks of it, not the first: frequent words stand first."""
    assert model.posterior is not None  # the plan made sure
    entry = model.posterior.entries[name]
    blocks = list(row_blocks(entry.shape, _READ))
    total, count = 0.0, 0
    for start, stop in blocks[min(stride, len(blocks)) // 2 :: stride]:
        precision = variances_of(model, name, start, stop).reciprocal_()
        count += precision.numel()
        total += float(hessian(model.config, name, precision).sum(dtype=torch.float64))
    return total * entry.numel / count if count else 0.0


def start_trust(plan: Plan, name: str) -> list[float]:
    """Return for each model the trust in a weight whose Hessian is that which training began with."""
    if not plan.trusts(name):
        return []
    configs = [m.config for m in plan.models if m.config is not None]
    if plan.method == "gaussian":
        return [c.of("ess", name) * (c.of("hess_init", name) + c.of("weight_decay", name)) for c in configs]
    return [size_of(c, name) * c.of("hess_init", name) for c in configs]
