"""The update of all parameters of one optimizer step."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_ivon import distributed, functional
from hf_ivon.capture import GradientCapture
from hf_ivon.execution import Execution
from hf_ivon.packs import Pack
from hf_ivon.passes import UpdateOptions, UpdateTensors
from hf_ivon.sampling import WeightSampler


@dataclass(frozen=True)
class Entry:
    """One parameter to be updated.

    Args:
        p: The parameter, holding its mean, with its gradient.
        group: Options of its group.
        state: Its complete state, changed in place.
    """

    p: Tensor
    group: Mapping[str, Any]
    state: Mapping[str, Any]


def apply_updates(
    packs: Sequence[Pack],
    entries: Sequence[Entry],
    capture: GradientCapture,
    sampler: WeightSampler,
    execution: Execution,
) -> None:
    """Update means, momenta and Hessians.

    Args:
        packs: Small parameters; those without a gradient are left as they are.
        entries: All others with a gradient.
        capture: Holds what the window's contexts have shown of the curvature.
        sampler: Is told of parameters that were written to.
        execution: How the passes over memory are run.
    """
    alike: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        options = _options(entry.group, float(entry.state["step"]) + 1.0, capture.divisor)
        # Those that are cast go alone: together the copies would be as large as the model.
        alike.setdefault((options, entry.p if _is_cast(entry) else None), []).append(entry)
    for (options, _), members in alike.items():
        execution.update([_tensors(entry, capture) for entry in members], options)
        for entry in members:
            entry.state["step"].add_(1)
            if "mean" in entry.state:
                entry.p.copy_(entry.state["mean"])
                sampler.note(entry.p)
    for pack in packs:
        _update_pack(pack, capture, execution)


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
        clip_radius=min(group["clip_radius"], sys.float_info.max),  # inf would be compiled in
        lr=lr,
        divisor=divisor / group["batch_size"] if fisher else divisor,
        price=group["hess_approx"] == "price",
        average=fisher,
    )


def _is_cast(entry: Entry) -> bool:
    """Tell whether a gradient is not for the passes as it is."""
    p = entry.p
    return p.grad is not None and p.grad.dtype not in (torch.float32, torch.bfloat16, entry.state["hess"].dtype)


def _tensors(entry: Entry, capture: GradientCapture) -> UpdateTensors:
    p, state, grad, local = entry.p, entry.state, entry.p.grad, distributed.local
    assert grad is not None
    mean, curvature = state.get("mean", p.detach()), capture.products.curvature(p)
    prior_mean = local(state["prior_mean"]) if "prior_mean" in state else None
    curvature = None if curvature is None else local(curvature)
    momentum, hess = local(state["momentum"]), local(state["hess"])
    grad = grad.to(mean.dtype) if _is_cast(entry) else grad
    return local(mean), local(grad), curvature, momentum, hess, prior_mean


def _update_pack(pack: Pack, capture: GradientCapture, execution: Execution) -> None:
    """Update small parameters of one group together: all at once, if all have a gradient and made as many steps."""
    grads = [p.grad for p in pack.params]
    missing = [grad is None for grad in grads]
    if all(missing):
        return
    pack.gather("product", capture.products.of(pack.params))
    grads, run, copied = pack.plain(grads), execution.by_address(pack), False
    names = ("mean", "grad", "product", "momentum", "hess", *(["prior_mean"] if pack.has_prior else []))
    steps = pack.flat("step")
    for (without, step), members, elements in pack.runs(list(zip(missing, steps.tolist(), strict=True))):
        if without:
            continue
        steps[members].add_(1)
        options = _options(pack.group, step + 1.0, capture.divisor)
        if run is not None and run.update_pack(pack, members, grads[members], options):
            continue
        if not copied:
            pack.gather("grad", grads)
            pack.read("mean")
            copied = True
        whole = members == slice(0, len(pack.params))
        mean, grad, product, momentum, hess, *prior = (
            pack.flat(n) if whole else pack.flat(n)[elements] for n in names
        )
        execution.update([(mean, grad, product, momentum, hess, prior[0] if prior else None)], options)
    if copied:
        pack.write("mean")
