"""The update of all parameters of one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_ivon import distributed, functional, passes
from hf_ivon.capture import GradientCapture
from hf_ivon.execution import Execution
from hf_ivon.packs import pack_key, packable
from hf_ivon.passes import UpdateOptions
from hf_ivon.sampling import WeightSampler


@dataclass(frozen=True)
class Entry:
    """One parameter to be updated.

    Args:
        p: The parameter, holding its mean.
        grad: Its gradient of the step.
        group: Options of its group.
        state: Its complete state, changed in place.
        index: Its number in its optimizer.
    """

    p: Tensor
    grad: Tensor
    group: Mapping[str, Any]
    state: Mapping[str, Any]
    index: int


def apply_updates(
    entries: Sequence[Entry], capture: GradientCapture, sampler: WeightSampler, execution: Execution
) -> None:
    """Update means, momenta and Hessians.

    Args:
        entries: The parameters with a gradient.
        capture: Holds what the window's contexts have shown of the curvature.
        sampler: Knows the packs of small parameters.
        execution: How the passes over memory are run.
    """
    torch._foreach_add_([entry.state["step"] for entry in entries], 1)
    packed: dict[tuple[Any, float, float], list[Entry]] = {}
    for entry in entries:
        steps, divisor = float(entry.state["step"]), capture.curvature(entry.p)[1]
        plain = "mean" not in entry.state and "prior_mean" not in entry.state and entry.grad.dtype == entry.p.dtype
        if execution.packs and plain and packable(entry.p):
            packed.setdefault((pack_key(entry.group, entry.p), steps, divisor), []).append(entry)
        else:
            _update_one(entry, _options(entry.group, steps, divisor), capture, sampler, execution)
    for (_, steps, divisor), members in packed.items():
        _update_pack(members, _options(members[0].group, steps, divisor), capture, sampler)


def _options(group: Mapping[str, Any], steps: float, divisor: float) -> UpdateOptions:
    lr = float(group["lr"])
    if group["rescale_lr"] and math.isinf(group["clip_radius"]):
        lr *= group["hess_init"] + group["weight_decay"]
    fisher = group["hess_approx"] == "fisher"
    return UpdateOptions(
        ess=group["ess"],
        weight_decay=group["weight_decay"],
        beta1=group["beta1"],
        beta2=functional.debiased_decay(group["beta2"], step=steps) if fisher else group["beta2"],
        debias=1.0 - group["beta1"] ** steps if group["debias"] else 1.0,
        clip_radius=group["clip_radius"],
        lr=lr,
        divisor=divisor / group["batch_size"] if fisher else divisor,
        price=group["hess_approx"] == "price",
        average=fisher,
    )


def _update_one(
    entry: Entry, options: UpdateOptions, capture: GradientCapture, sampler: WeightSampler, execution: Execution
) -> None:
    p, state = entry.p, entry.state
    mean = state.get("mean", p.detach())
    local = distributed.local
    prior_mean = local(state["prior_mean"]) if "prior_mean" in state else None
    grad, curvature = local(entry.grad.to(mean.dtype)), local(capture.curvature(p)[0])
    execution.update(local(mean), grad, curvature, local(state["momentum"]), local(state["hess"]), prior_mean, options)
    if "mean" in state:
        p.copy_(mean)
        sampler.written[p] = distributed.local(p)._version


def _update_pack(
    entries: Sequence[Entry], options: UpdateOptions, capture: GradientCapture, sampler: WeightSampler
) -> None:
    """Update small parameters of one group together."""
    pack = sampler.pack([entry.p for entry in entries], [entry.index for entry in entries])
    mean, grad = pack.gather("mean", pack.params), pack.gather("grad", [entry.grad for entry in entries])
    products = [capture.curvature(p)[0] for p in pack.params]
    own = all(product is view for product, view in zip(products, pack.views("product"), strict=True))
    curvature = pack.flat("product") if own else pack.gather("product", products)
    momenta, hesses = [entry.state["momentum"] for entry in entries], [entry.state["hess"] for entry in entries]
    momentum, hess = pack.gather("momentum", momenta), pack.gather("hess", hesses)
    passes.update(mean, grad, curvature, momentum, hess, None, *options)
    pack.scatter("mean", pack.params)
    pack.scatter("momentum", momenta)
    pack.scatter("hess", hesses)
