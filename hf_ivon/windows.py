"""One training context as the hooks see it, and what is said when contexts do not fit together."""

from __future__ import annotations

from dataclasses import dataclass, field

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
STALE = (
    "Gradients of an earlier step are still in `p.grad`, so this step would add to them. "
    "Call `optimizer.zero_grad()` once per step."
)
BROKEN = (
    "An earlier `with optimizer.sampled_params(train=True):` failed after its backward pass had begun, so `p.grad` is "
    "incomplete. Call `optimizer.zero_grad()` and repeat the step."
)
SHARDED_SAMPLES = (
    "Sharded parameters have one weight sample per step, so that contexts cannot be averaged, nor weighted. Set "
    "`mc_samples=1` and run one training context per micro-batch, or train without sharding."
)
AUTOGRAD_GRAD = (
    "`torch.autograd.grad` with respect to parameters was called inside `sampled_params(train=True)`; its gradients "
    "cannot be told from those of the training loss. Call `loss.backward()` here, and `torch.autograd.grad` outside."
)
CLOSURE = (
    "The closure must call `optimizer.zero_grad()` before its backward pass when `mc_samples` is above 1, so that its "
    "samples are averaged. Add the call."
)


@dataclass
class Context:
    """One training context: which parameters got a gradient, and what `p.grad` was before it.

    For parameters whose product is taken when the context ends, `late` has their gradient as backward left it.
    """

    weight: float
    inverse_scale: float | Tensor
    before: dict[Tensor, tuple[Tensor, int]]
    stale: dict[Tensor, Tensor | None]
    zeroed: bool = False
    seen: set[Tensor] = field(default_factory=set)
    accumulated: set[Tensor] = field(default_factory=set)
    cleared: set[bool] = field(default_factory=set)
    late: dict[Tensor, tuple[int, int]] = field(default_factory=dict)
