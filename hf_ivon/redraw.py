"""Weight samples without a copy of the mean: their noise is drawn again to take it off.

The gradient times noise is not kept either: the Hessian learns from it when the noise is taken off, which is at the
end of a context whose gradients are its own, and else in the backward pass, as each parameter gets its gradient. So it
has learned also from contexts that no step uses, because a scaler skipped it or the gradients were dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_ivon import distributed, functional
from hf_ivon.execution import Execution
from hf_ivon.interrupts import interrupts_deferred
from hf_ivon.packs import is_plain
from hf_ivon.passes import NoiseOptions

TWICE = (
    "A parameter got a gradient in `with optimizer.sampled_params(train=True):` after its sample was taken off: "
    "`low_memory=True` does that with the first gradient, if those of earlier contexts are still there, if there are "
    "several processes, or after gradients were changed inside a context. Run one backward pass per context, gradient "
    "checkpointing with `use_reentrant=False`, or pass `low_memory=False`."
)
WRITTEN = (
    "Weights were written to inside `sampled_params(train=True)`: by an embedding with `max_norm`, a clipping of "
    "weights, or a checkpoint loaded there. With `low_memory=True` there is no copy of the mean to put back, and what "
    "they hold now is what was written less the noise. Write to weights outside of the block, or pass "
    "`low_memory=False`, and start from the last checkpoint."
)


@dataclass
class _Drawn:
    """The sample of one parameter: what it was drawn with, and which columns of its noise are in the weights now.

    `version` is that of the weights after the last write from here.
    """

    group: Mapping[str, Any]
    hess: Tensor
    words: Tensor
    ess: float
    weight_decay: float
    begin: int = 0
    end: int = 0
    version: int = 0


class RedrawnSamples:
    """Puts weight samples into large parameters and takes them off again, up to rounding.

    Args:
        execution: How the passes over memory are run.
    """

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._drawn: dict[Tensor, _Drawn] = {}  # in the last context of this window
        self._learned: set[Tensor] = set()  # whose Hessian has learned in this window

    def __contains__(self, p: Tensor) -> bool:
        """Tell whether a parameter has had its sample from here in this window."""
        return p in self._drawn

    def sampled(self) -> list[Tensor]:
        """Return these parameters."""
        return list(self._drawn)

    @staticmethod
    def can_hold(p: Tensor, state: Mapping[str, Any]) -> bool:
        """Tell whether a parameter's noise can be taken off: it is whole, and its mean is not kept elsewhere.

        Args:
            p: The parameter.
            state: Its complete state.

        Returns:
            Whether that is so; if not, its mean must be kept.
        """
        if "mean" in state or distributed.is_sharded(p):
            return False
        return p.numel() > 0 and is_plain(p) and is_plain(state["hess"])

    def perturb(self, p: Tensor, group: Mapping[str, Any], hess: Tensor, words: Tensor) -> None:
        """Put a weight sample for training into a parameter.

        Args:
            p: The parameter, holding its mean.
            group: Options of its group.
            hess: Its Hessian estimate.
            words: Output of `noise_words`.
        """
        options = {"ess": group["ess"], "weight_decay": group["weight_decay"]}
        drawn = self._drawn[p] = _Drawn(group, hess, words, **options)
        for end in self._execution.add_noise(p.detach(), hess, words, **options):
            drawn.end = end  # should the next piece fail, this much is known to be in the weights
        drawn.version = p._version

    def mean(self, p: Tensor) -> Tensor:
        """Return a copy of a parameter without the noise that is in it now, up to rounding."""
        mean = p.detach().clone()
        drawn = replace(self._drawn[p], version=mean._version)
        self._subtract(mean, drawn, None, self._options(drawn))
        return mean

    @torch.no_grad()
    def learn(self, p: Tensor, grad: Tensor, factor: float | Tensor) -> None:
        """Take the sample off a parameter, and let its Hessian learn from gradient times noise.

        Args:
            p: The parameter.
            grad: This context's gradient, shape of `p`.
            factor: Multiplies the gradient.

        Raises:
            RuntimeError: If that has been done in this context, or the gradient has another shape.
        """
        drawn = self._drawn[p]
        if drawn.begin == drawn.end:
            raise RuntimeError(TWICE)
        if grad.shape != p.shape:
            raise RuntimeError(
                f"A gradient must have its parameter's shape {tuple(p.shape)}, got {tuple(grad.shape)}. Do not "
                f"replace the data of parameters or gradients between forward pass and step."
            )
        grad = grad if is_plain(grad) else grad.contiguous().resolve_neg()
        first = p not in self._learned
        self._learned.add(p)
        with interrupts_deferred():
            self._subtract(p, drawn, grad, self._options(drawn, factor, first))

    def has_learned(self, p: Tensor) -> bool:
        """Tell whether a parameter's Hessian has learned in this window."""
        return p in self._learned

    def restore(self) -> list[BaseException]:
        """Take off the samples that are still in place; returns what was raised meanwhile."""
        errors: list[BaseException] = []  # of one parameter, which must not be the others'
        for p, drawn in self._drawn.items():
            try:
                self._subtract(p, drawn, None, self._options(drawn))
            except BaseException as error:
                errors.append(error)
        return errors

    @torch.no_grad()
    def average(self, params: Iterable[Tensor]) -> None:
        """Average over the processes what the Hessians have learned; all must call this.

        Each process had its own noise, and its means its own roundings: these are averaged too.

        Args:
            params: Parameters in the same order everywhere; of interest are those that had samples from here. One that
                has got a gradient from other processes alone counts as one whose own was zero.
        """
        params = [p for p in params if p in self._drawn]
        for p in params:
            if p.grad is not None and p not in self._learned:
                self._learned.add(p)
                hess, group = self._drawn[p].hess, self._drawn[p].group
                for (h,) in functional.cache_sized(hess):
                    options = {"beta2": group["beta2"], "weight_decay": group["weight_decay"]}
                    h.copy_(functional.update_hess(h, torch.zeros_like(h), **options))
        distributed.average_([t for p in params for t in (self._drawn[p].hess, p)])

    def end_window(self) -> None:
        """Forget the window, but not what is still in the weights."""
        self._drawn = {p: drawn for p, drawn in self._drawn.items() if drawn.begin < drawn.end}
        self._learned.clear()

    def _subtract(self, p: Tensor, drawn: _Drawn, grad: Tensor | None, options: NoiseOptions) -> None:
        if drawn.begin == drawn.end:
            return
        if p.shape != drawn.hess.shape:
            raise RuntimeError(
                f"A parameter must keep its shape {tuple(drawn.hess.shape)} inside `sampled_params`, got "
                f"{tuple(p.shape)}. Resize models outside of the `with` block."
            )
        written = drawn.version not in (0, p._version)  # 0 if not all of it could be perturbed
        weights = p.detach() if is_plain(p) else p.detach().contiguous()
        subtract, columns = self._execution.subtract_noise, (drawn.begin, drawn.end)
        for end in subtract(weights, drawn.hess, grad, drawn.words, options, *columns):
            drawn.begin, drawn.version = end, p._version  # should the next piece fail, this much is known to be off
        if weights.data_ptr() != p.data_ptr():
            p.detach().copy_(weights)
        if written:
            raise RuntimeError(WRITTEN)

    @staticmethod
    def _options(drawn: _Drawn, factor: float | Tensor = 1.0, first: bool = True) -> NoiseOptions:
        return NoiseOptions(drawn.ess, drawn.weight_decay, drawn.group["beta2"], factor, first)
