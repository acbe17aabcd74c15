"""Gradients that a training context finds in `p.grad`: those of an earlier step, or taken at the mean.

A backward pass adds to them, and the sum would pass for a gradient at the weight sample.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor

from hf_ivon import distributed

STALE = (
    "Gradients of an earlier step are still in `p.grad`, so this step would add to them. "
    "Call `optimizer.zero_grad()` once per step."
)


class EarlierGradients:
    """What is in `p.grad` besides the gradients of a window.

    Attributes:
        at_mean: Parameters that got a gradient outside of training contexts.
    """

    def __init__(self) -> None:
        self.at_mean: set[Tensor] = set()
        # What parameters held when their step ended: gradients by identity, and versions; by parameter when asked for.
        self._of_step: tuple[Sequence[Tensor], list[int], list[int]] = [], [], []
        self._by_parameter: dict[Tensor, list[int]] | None = None
        # What they held when the context began. Weak references: it may be cleared, and must be free then.
        self._left: dict[Tensor, tuple[weakref.ref[Tensor], int]] = {}

    def end_step(self, params: Sequence[Tensor]) -> None:
        """Remember the gradients of a step, to recognize them if they are never cleared."""
        grads = [p.grad for p in params]
        self._of_step = params, [*map(id, grads)], [0 if grad is None else grad._version for grad in grads]
        self._by_parameter = None
        self.at_mean.clear()

    def forget(self) -> None:
        """Know of none any more: the optimizer clears them all."""
        self.end_step([])
        self._left = {}

    def is_stale(self, p: Tensor) -> bool:
        """Tell whether `p.grad` is that of the last step, unchanged."""
        if p.grad is None:
            return False
        if self._by_parameter is None:
            self._by_parameter = {q: which for q, *which in zip(*self._of_step, strict=True)}
        return self._by_parameter.get(p) == [id(p.grad), p.grad._version]

    def begin_context(self, *, whole: bool) -> None:
        """Look what is there, for gradients that will be seen only after they were added to it.

        Args:
            whole: Not only for those of sharded parameters.
        """
        left = {}
        for p, which, version in zip(*self._of_step, strict=True):
            grad = p.grad
            if grad is not None and id(grad) == which and grad._version == version:
                left[p] = grad
        if whole:
            left.update((p, p.grad) for p in self.at_mean if p.grad is not None)
            self.at_mean.intersection_update(left)
        self._left = {p: (weakref.ref(g), g._version) for p, g in left.items() if whole or distributed.is_sharded(p)}

    def check_after(self, p: Tensor, grad: Tensor) -> None:
        """Check what a gradient was added to, if that is the first one of its context.

        Args:
            p: A parameter.
            grad: What is in `p.grad` now.

        Raises:
            RuntimeError: If it was the gradient of an earlier step.
        """
        earlier, version = self._left.pop(p, (None, 0))
        if earlier is None:
            return
        if earlier() is not grad:
            self.at_mean.discard(p)
        elif p not in self.at_mean and (grad._version <= version + 1 or distributed.is_sharded(p)):
            raise RuntimeError(STALE)  # in between it was not zeroed in place, which makes a version of its own
