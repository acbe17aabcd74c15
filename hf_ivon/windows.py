"""One training context as the hooks see it, and what is said when contexts do not fit together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MIXED = (
    "This step mixes contexts whose gradients were zeroed (averaged) with contexts whose gradients add up (summed), "
    "so its gradient has no single meaning. Call `optimizer.zero_grad()` first inside every "
    "`with optimizer.sampled_params(train=True):` to average them, or in none but the first to sum them."
)
AT_MEAN = (
    "`step()` found gradients that were not taken at a weight sample (first: {name}). "
    "Wrap forward and backward in `with optimizer.sampled_params(train=True):`, or pass a closure to `step`."
)
BROKEN = (
    "An earlier `with optimizer.sampled_params(train=True):` failed after its backward pass had begun, so `p.grad` is "
    "incomplete. Call `optimizer.zero_grad()` and repeat the step."
)
SHARDED_SAMPLES = (
    "Sharded parameters have one weight sample per step, so that contexts cannot be averaged, nor weighted. Set "
    "`mc_samples=1` and run one training context per micro-batch, or train without sharding."
)
REDRAWN_SAMPLES = (
    "With `low_memory=True` the Hessian learns from each context as it ends, so that contexts cannot be averaged "
    "afterwards. Let gradients add up, each loss weighted, or pass `low_memory=False`."
)
AUTOGRAD_GRAD = (
    "`torch.autograd.grad` with respect to parameters was called inside `sampled_params(train=True)`; where gradients "
    "are read in the backward pass, as with several contexts or processes, its gradients cannot be told from those of "
    "the training loss. Call `loss.backward()` here, and `torch.autograd.grad` outside."
)
SPARSE = "IVON needs dense gradients, got a sparse one. Build the embedding with `sparse=False`."
CHANGED_BEFORE = (
    "Gradients were changed in place inside `sampled_params(train=True)` before its backward pass. Zero them by "
    "`optimizer.zero_grad()`, and clip them after the backward pass."
)
CHANGED = (
    "Gradients were changed inside `sampled_params(train=True)` after the backward pass, and the Hessian of this step "
    "is of the changed ones. From now on they are read in the backward pass, which takes one more buffer of the "
    "model's size; to save it, clip or scale gradients after the `with` block."
)
CHANGED_SQUARES = (
    "Gradients were changed inside `sampled_params(train=True)` after the backward pass, and the Hessian is of the "
    "squares of the changed ones, in this step and in others. Clip or scale gradients after the `with` block."
)
CHANGED_REDRAWN = (
    "Gradients were changed inside `sampled_params(train=True)` after the backward pass, and the Hessian has learned "
    "from the changed ones. From now on `low_memory=True` takes each sample off in the backward pass, so that there "
    "can be one per context. Clip or scale gradients after the `with` block."
)
CONTEXTS = (
    "`mc_samples` is {mc_samples}, but this step ran {contexts} training context(s). Run a multiple of `mc_samples` "
    "contexts per step, pass a closure to `step`, or set `mc_samples` to what you run."
)
DROPPED = (
    "`zero_grad()` outside of `sampled_params` dropped gradients that no `step()` had used. That is right after a "
    "skipped step; to average several samples, call it inside each context."
)
SAVED_INSIDE = (
    "An IVON optimizer must not be saved, copied or pickled inside `sampled_params`: the parameters are a sample "
    "there, not the mean. Do it outside of the `with` block."
)
CLOSURE = (
    "The closure must call `optimizer.zero_grad()` before its backward pass when `mc_samples` is above 1, so that its "
    "samples are averaged. Add the call."
)


@dataclass
class Context:
    """One training context: which parameters got a gradient, and what `p.grad` was before it.

    Where a context may be the only one of its window, `p.grad` will be its own gradient, and the product with the
    noise may wait for its end: `late` has the gradients of such parameters as backward left them, by identity and
    version. `small` has those of parameters in packs, whose products are taken together. `seen` are those whose
    gradient was seen on its way to `p.grad`, `accumulated` those where it got there.
    """

    weight: float
    inverse_scale: float | Tensor
    before: dict[Tensor, tuple[Tensor, int]]
    may_wait: bool
    zeroed: bool = False
    seen: set[Tensor] = field(default_factory=set)
    accumulated: set[Tensor] = field(default_factory=set)
    cleared: set[bool] = field(default_factory=set)
    late: dict[Tensor, tuple[int, int]] = field(default_factory=dict)
    small: dict[Tensor, Tensor] = field(default_factory=dict)


def changed(squared: bool, redrawn: bool) -> str:
    """Return what to say of gradients that were changed inside a context, by what the Hessian is learned from."""
    if redrawn:
        return CHANGED_REDRAWN
    return CHANGED_SQUARES if squared else CHANGED


def released(p: Tensor, captured: set[Tensor]) -> bool:
    """Let go of a gradient that was zeroed in place and that a window, which has others, did not add to.

    The parameter is then one without a gradient, as where gradients are set to None.

    Returns:
        Whether it was one.
    """
    if not captured or p.grad is None or p.grad.any():
        return False
    p.grad = None
    return True


def overflowed(context: Context) -> bool:
    """Tell whether earlier gradients of a window are not finite, so that a gradient scaler has skipped their step."""
    scaled = isinstance(context.inverse_scale, Tensor) or context.inverse_scale != 1.0
    return scaled and not all(bool(torch.isfinite(grad).all()) for grad, _ in context.before.values())


def average_loss(losses: Sequence[Any], averaged: bool | None) -> Any:
    """Return the average of a closure's losses; None if it returns none.

    Args:
        losses: One for each weight sample.
        averaged: Whether their gradients were averaged, None for a single one.

    Raises:
        RuntimeError: If the gradients were summed.
    """
    if len(losses) == 1 or losses[0] is None:
        return losses[0]
    if averaged is False:
        raise RuntimeError(CLOSURE)
    return sum(losses[1:], losses[0]) / len(losses)


def average_gradients(params: Iterable[Tensor], before: Mapping[Tensor, tuple[Tensor, int]], contexts: int) -> None:
    """Make `p.grad` the running average over contexts, as it is the running sum when they add up.

    Args:
        params: Those that have had a gradient in this window.
        before: What was in `p.grad` before the last context, with its version; the average of those before it.
        contexts: How many there were before it.
    """
    share = contexts / (contexts + 1.0)
    for p in params:
        earlier = before[p][0] if p in before else None
        if p.grad is None:
            p.grad = None if earlier is None else earlier.mul_(share)
        elif earlier is None:
            p.grad.mul_(1.0 - share)
        else:
            p.grad.lerp_(earlier, share)
