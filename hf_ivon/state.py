"""The state of one parameter: what it holds, in which precision, and how a saved one is matched to the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

# State that holds a tensor of the parameter's shape; all of it is saved, and but for the momentum in `state_dtype`.
_TENSOR_STATE = ("momentum", "hess", "mean", "prior_mean")


def state_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype that the state of parameter `p` is kept in: fp32, or fp64 for fp64 parameters."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def saved_dtype(p: Tensor, name: str, saved: Tensor) -> torch.dtype:
    """Return the dtype that a saved tensor of the state of parameter `p` is restored in."""
    narrow = name == "momentum" and saved.dtype == torch.bfloat16
    return torch.bfloat16 if narrow else state_dtype(p)


def complete_state(p: Tensor, group: Mapping[str, Any], state: MutableMapping[str, Any]) -> None:
    """Fill in what the state of a parameter lacks; the parameter must hold its mean.

    Args:
        p: The parameter.
        group: Options of its group; `hess_init`, `prior_mean` and `momentum_dtype` are read.
        state: Its state, changed in place: `step` (0-dim), and in the shape of `p` `momentum`, `hess`, `prior_mean`
            (if not zero) and `mean` (if the dtype of `p` is narrower than fp32).
    """
    dtype = state_dtype(p)
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
    if "momentum" not in state:
        narrow = torch.bfloat16 if group.get("momentum_dtype") == "bfloat16" else dtype  # none in older states
        state["momentum"] = torch.zeros_like(p, dtype=narrow, requires_grad=False)
    if "hess" not in state:
        state["hess"] = torch.full_like(p, group["hess_init"], dtype=dtype, requires_grad=False)
    if group["prior_mean"] == "init" and "prior_mean" not in state:
        state["prior_mean"] = p.detach().to(dtype, copy=True)
    if p.dtype != dtype and "mean" not in state:
        state["mean"] = p.detach().to(dtype, copy=True)


def match_saved_state(params: Iterable[Tensor], state_dict: Mapping[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
    """Pair the tensors of a saved optimizer state with the parameters, after checking that they fit.

    Args:
        params: The optimizer's parameters, in order.
        state_dict: What `IVON.state_dict` returned.

    Returns:
        For each parameter its saved tensors by name.

    Raises:
        ValueError: If the state is another optimizer's, or a shape differs; all problems are named.
    """
    groups = state_dict["param_groups"]
    problems = [f"group {i} has no `{k}`" for i, g in enumerate(groups) for k in ("ess", "window") if k not in g]
    if problems:
        raise ValueError(
            f"`state_dict` must come from this IVON, but {problems[0]}. Resume with the optimizer that wrote it."
        )
    ids = [i for g in groups for i in g["params"]]
    params = list(params)
    if len(ids) != len(params):
        raise ValueError(
            f"`state_dict` must fit the parameters, but it is for {len(ids)} and there are {len(params)}. "
            f"Load the matching model, with the same parameters frozen."
        )
    saved: dict[Tensor, dict[str, Tensor]] = {}
    for i, p in zip(ids, params, strict=True):
        saved[p] = {k: v for k, v in state_dict["state"].get(i, {}).items() if k in _TENSOR_STATE}
        problems += [
            f"`{k}` of parameter {i} has shape {tuple(v.shape)}, the parameter {tuple(p.shape)}"
            for k, v in saved[p].items()
            if v.shape != p.shape
        ]
    if problems:
        raise ValueError(f"`state_dict` must fit the parameters, but {'; '.join(problems)}. Load the matching model.")
    return saved


def restore_precision(
    state: MutableMapping[Tensor, dict[str, Any]], saved: Mapping[Tensor, Mapping[str, Tensor]]
) -> None:
    """Put saved tensors into a state that torch has loaded, in the precision that they were saved in.

    torch casts floating-point state to the parameter's dtype; a Hessian in bf16 would stand still.

    Args:
        state: Parameter to its state, changed in place.
        saved: Output of `match_saved_state`.
    """
    for p, tensors in saved.items():
        for name, tensor in tensors.items():
            state[p][name] = tensor.to(p.device, saved_dtype(p, name, tensor))


def set_prior_means(
    params: list[Tensor], prior_means: list[Tensor], state: MutableMapping[Tensor, dict[str, Any]]
) -> None:
    """Put given prior means into the state of their parameters.

    Args:
        params: Parameters, in order.
        prior_means: One tensor per parameter, of its shape, in the same order.
        state: Parameter to its state, changed in place.

    Raises:
        ValueError: If the number of tensors, a shape or a value (not finite) is wrong; nothing is changed then.
    """
    if len(params) != len(prior_means):
        raise ValueError(
            f"`prior_mean` must hold one tensor per parameter, got {len(prior_means)} for {len(params)}. Pass "
            f"'zero' or 'init' if you do not want to choose."
        )
    for i, (p, mean) in enumerate(zip(params, prior_means, strict=True)):
        if p.shape != mean.shape:
            raise ValueError(
                f"`prior_mean` must have the parameters' shapes, got {tuple(mean.shape)} for parameter {i} of shape "
                f"{tuple(p.shape)}. Check their order."
            )
        if not torch.isfinite(mean).all():
            raise ValueError(f"`prior_mean` must be finite, got NaN or inf in tensor {i}. Check where it comes from.")
    for p, mean in zip(params, prior_means, strict=True):
        state[p]["prior_mean"] = mean.detach().to(p.device, state_dtype(p), copy=True)


def own_storage(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a parameter with tensors of their own: one that is a part of another is saved as a whole."""
    return {k: v.clone() if isinstance(v, Tensor) and v._is_view() else v for k, v in state.items()}


def parameter_names(param_groups: Iterable[Mapping[str, Any]]) -> dict[Tensor, str]:
    """Return what to call each parameter in a message: its name, if the optimizer was given names, or its place.

    Args:
        param_groups: The optimizer's parameter groups.

    Returns:
        Parameter to name.
    """
    names = {}
    for i, group in enumerate(param_groups):
        for j, p in enumerate(group["params"]):
            given = group.get("param_names")
            names[p] = given[j] if given else f"parameter {j} of group {i}, shape {tuple(p.shape)}"
    return names
