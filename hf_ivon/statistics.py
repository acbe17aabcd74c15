"""A summary of the posterior for logs: how wide it is, and how far the Hessian moved from its start value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_ivon import distributed, functional

_QUANTILES = (0.01, 0.5, 0.99)


@torch.no_grad()
def posterior_statistics(
    entries: Iterable[tuple[Mapping[str, Any], Tensor, Mapping[str, Any]]], max_elements: int
) -> dict[str, float]:
    """Summarize a posterior from an even subset of its weights; of sharded ones, of this process's shard.

    Args:
        entries: Group options, parameter (holding the mean) and complete state of each trained parameter.
        max_elements: Most weights to look at, about.

    Returns:
        `sigma_q01`, `sigma_q50`, `sigma_q99` (param); `hess_rel_q01`, `hess_rel_q50`, `hess_rel_q99` (`hess` over
        `hess_init`); `snr_share`, the share of weights with |mean| > sigma; `clipped_share`, the share of the last
        step cut by `clip_radius`. Empty if there is no parameter.
    """
    entries = list(entries)
    stride = max(1, math.ceil(sum(p.numel() for _, p, _ in entries) / max_elements))
    sigmas, ratios, means, clipped = [], [], [], []
    for group, p, state in entries:

        def pick(t: Tensor) -> Tensor:
            return distributed.local(t).reshape(-1)[::stride].float()

        mean, hess = pick(state.get("mean", p.detach())), pick(state["hess"])
        delta = group["weight_decay"]
        means.append(mean)
        ratios.append(hess / group["hess_init"])
        sigmas.append(functional.posterior_variance(hess, ess=group["ess"], weight_decay=delta).sqrt_())
        clipped.append(_clipped(group, state, mean, hess, pick))
    if not entries:
        return {}
    sigma, ratio, mean = (torch.cat([t.cpu() for t in ts]) for ts in (sigmas, ratios, means))
    result = {f"sigma_q{round(100 * q):02d}": _quantile(sigma, q) for q in _QUANTILES}
    result |= {f"hess_rel_q{round(100 * q):02d}": _quantile(ratio, q) for q in _QUANTILES}
    result["snr_share"] = (mean.abs() > sigma).float().mean().item()
    result["clipped_share"] = torch.cat([t.cpu() for t in clipped]).float().mean().item()
    return result


def _clipped(group: Mapping[str, Any], state: Mapping[str, Any], mean: Tensor, hess: Tensor, pick: Any) -> Tensor:
    """Tell which entries of the last step `clip_radius` cut; the step itself is too small to change the answer."""
    if math.isinf(group["clip_radius"]) or state["step"] == 0:
        return torch.zeros_like(mean, dtype=torch.bool)
    prior = pick(state["prior_mean"]) if "prior_mean" in state else None
    debias = 1.0 - group["beta1"] ** float(state["step"]) if group["debias"] else 1.0
    direction = functional.newton_direction(
        mean,
        pick(state["momentum"]).to(mean.dtype),
        hess,
        weight_decay=group["weight_decay"],
        debias=debias,
        prior_mean=prior,
    )
    return direction.abs() > group["clip_radius"]


def _quantile(values: Tensor, q: float) -> float:
    # torch.quantile refuses more than 16 million values; a sorted position is all that a log needs.
    return values.kthvalue(1 + round(q * (values.numel() - 1))).values.item()
