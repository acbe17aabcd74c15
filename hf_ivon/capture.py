"""What the hooks see of one optimizer step: gradients at weight samples, and how its contexts are put together.

A *window* is what one optimizer step is made of: one or more training contexts (`IVON.sampled_params(train=True)`),
each with its own draw of the weights. Two ways of writing a window are told apart by what happens to `p.grad`:

- gradients zeroed inside a context: the contexts are Monte-Carlo samples of one loss, and are averaged;
- gradients left to add up: the losses carry the weights (gradient accumulation), and the contexts are summed.

Either way `p.grad` is, between contexts, the gradient of the window so far, so that clipping, scalers and reductions
find what they expect. ``gradient * (theta - mean)`` is taken from it at the end of a context that is alone in it. Else
hooks add it to a buffer in each backward pass, or keep the gradients of small parameters for the end of the context.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ivon import distributed, replicas, windows
from hf_ivon.earlier_gradients import STALE, EarlierGradients
from hf_ivon.products import Products
from hf_ivon.sampling import WeightSampler
from hf_ivon.state import parameter_names
from hf_ivon.windows import Context

logger = logging.getLogger(__name__)


class GradientCapture:
    """Hooks on the parameters, and the window that they fill.

    Args:
        sampler: Has put the weight samples into the parameters.
        squared: Initial value of the attribute.

    Attributes:
        products: What the window has shown of the curvature.
        contexts: Training contexts of this window that ended with gradients.
        entered: Training contexts of this window that were entered; numbers the draws.
        averaged: True if contexts are averaged, False if summed, None while there is only one.
        captured: Parameters that hold a gradient of this window.
        squared: Keep the squared gradient of the window, not gradient times noise; to be changed before its start.
    """

    def __init__(self, sampler: WeightSampler, *, squared: bool) -> None:
        self._sampler = sampler
        self.products = Products(sampler)
        self.squared = squared
        self._late = True
        self._context: Context | None = None
        self._attached: list[Tensor] | None = None
        self._hooked: set[Tensor] = set()
        self._unwatched: list[Tensor] = []  # whose gradients are seen only when they are in `p.grad`
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._groups = replicas.GroupGradients()
        weakref.finalize(self, _remove_all, self._handles)
        self._earlier = EarlierGradients()
        self.clear()

    def clear(self) -> None:
        """Forget the window."""
        self.products.clear()
        self.contexts = 0
        self.entered = 0
        self.averaged: bool | None = None
        self.captured: set[Tensor] = set()
        self._broken: set[Tensor] = set()

    def attach(self, params: list[Tensor]) -> None:
        """Hook the parameters that are not hooked yet; the hooks die with this object."""
        if params is self._attached:
            return
        self._attached = params
        new = [p for p in params if p not in self._hooked]
        self._groups.watch(new)
        self._hooked.update(new)
        for p in new:
            if p.grad is not None and p.grad.any():  # from before the hooks; asked once per parameter
                self._earlier.at_mean.add(p)
            if distributed.is_sharded(p):  # its gradient is of use only after its reduction
                on_accumulated = GradientCapture._on_reduced
            else:
                on_accumulated = GradientCapture._on_accumulated
                self._unwatched.append(p)
            self._handles.append(p.register_post_accumulate_grad_hook(self._hook(on_accumulated)))

    def _watch_gradients(self) -> None:
        """Hook also what backward passes add to `p.grad`: they take longer then, so not before it is needed."""
        for p in self._unwatched:
            if p.requires_grad:
                self._handles.append(p.register_hook(self._hook(GradientCapture._on_gradient, p)))
        self._unwatched = [p for p in self._unwatched if not p.requires_grad]  # frozen since they were attached

    def _hook(self, method: Callable[..., Any], *args: Tensor) -> Callable[[Tensor], Any]:
        """Return a hook that calls a method, and that does not keep this object alive."""
        reference = weakref.ref(self)

        def hook(tensor: Tensor) -> Any:
            capture = reference()
            return None if capture is None else method(capture, tensor, *args)

        return hook

    # ------------------------------------------------------------------ contexts

    def begin(self, *, weight: float, grad_scale: float | Tensor | None) -> bool:
        """Open a training context.

        Returns:
            Whether gradients had been cleared outside a context, so that an unfinished window was dropped.

        Raises:
            RuntimeError: If some of the window's gradients were cleared and others not.
        """
        cleared = {p.grad is None for p in self.captured | self._broken}
        if self._broken and False in cleared:
            raise RuntimeError(windows.BROKEN)
        if len(cleared) == 2:
            raise RuntimeError(windows.MIXED)
        dropped = cleared == {True}
        if dropped:
            self.clear()
        before = {p: (p.grad, p.grad._version) for p in self.captured if p.grad is not None}
        inverse_scale = 1.0 if grad_scale is None else 1.0 / grad_scale
        may_wait = self._late and self.contexts == 0 and distributed.world_size() == 1
        if self._unwatched and not (may_wait and weight == 1.0):
            self._watch_gradients()
        self._earlier.begin_context(whole=may_wait)
        self._context = Context(weight, inverse_scale, before, may_wait)
        self.entered += 1
        return dropped

    def take_products(self) -> None:
        """Take gradient times noise, or its square, from `p.grad`, where that is this context's and nothing else.

        The weight samples must still be in place; the parameters that this is done for hold their means afterwards.

        Raises:
            RuntimeError: If a gradient is sparse.
        """
        context = self._context
        if context is None:
            return
        if context.small:
            self._add_small(context)
        if not context.late:
            return
        grads, changed = {}, False
        for p, mark in context.late.items():
            if (grad := p.grad) is not None:
                grads[p] = grad
                changed |= mark != (id(grad), grad._version) and not grad._is_view()
                if grad.is_sparse:
                    raise RuntimeError(windows.SPARSE)
        if changed:
            self._late = False
            logger.warning(windows.changed(self.squared, bool(self._sampler.redrawn.sampled())))
        self.products.take(grads, context.inverse_scale, self.squared)

    def end(self, failed: bool) -> None:
        """Close the training context and settle how it joins the window.

        Raises:
            RuntimeError: If the context's gradients cannot be put together with the window's.
        """
        context, self._context = self._context, None
        if context is None:
            return
        context.accumulated.update(context.late)
        if failed or not context.seen.issubset(context.accumulated):
            self._broken |= context.seen | context.accumulated
            if not failed:
                raise RuntimeError(windows.AUTOGRAD_GRAD)
            return
        if not context.accumulated:
            return
        self._groups.check()
        if self.contexts:
            self._settle(context)
        with torch.no_grad():
            if self.squared:
                self._square(context)
            if self.averaged:
                windows.average_gradients(self.captured | context.accumulated, context.before, self.contexts)
        self.captured |= context.accumulated
        self.contexts += 1

    def zero_grad(self, set_to_none: bool, mc_samples: int) -> bool:
        """Note that the optimizer is about to clear its gradients.

        Returns:
            Whether an unfinished window was dropped: cleared outside a training context, or skipped by a scaler.

        Raises:
            RuntimeError: If this context has gradients already, and earlier contexts have too.
        """
        context, dropped = self._context, False
        if context is None:
            dropped = bool(self.captured or self._broken)
            self.clear()
        elif context.seen or context.accumulated or context.late:
            if self.contexts:
                raise RuntimeError(windows.MIXED)
            # The only context starts over: what it captured goes with the gradients.
            context.seen.clear()
            context.accumulated.clear()
            context.late.clear()
            context.small.clear()
            self.products.discard()
        elif self.contexts % mc_samples == 0 and windows.overflowed(context):
            dropped = True
            self.clear()
            context.before = {}
        elif self.contexts:
            context.zeroed = True
            # Zeroed in place, or views on a buffer that the next backward pass writes to: keep the earlier gradients.
            context.before = {
                p: (g.clone() if not set_to_none or g._is_view() else g, version)
                for p, (g, version) in context.before.items()
            }
        self._earlier.forget()
        return dropped

    # ------------------------------------------------------------------ the step

    def check(self, params: Sequence[Tensor], groups: Iterable[Mapping[str, Any]], mc_samples: int) -> None:
        """Make sure that every gradient was taken at weight samples.

        A gradient that this process did not see may be another process's, brought here by its reduction.

        Raises:
            RuntimeError: If not; the message says what to do.
        """
        if self._broken:
            raise RuntimeError(windows.BROKEN)
        at_mean, shared = self._earlier.at_mean, self.contexts > 0 and distributed.world_size() > 1
        for p in () if not at_mean and self.captured.issuperset(params) else params:
            if p in at_mean or not (shared or p in self.captured or windows.released(p, self.captured)):
                name = parameter_names(groups).get(p, "?")
                raise RuntimeError(STALE if self._earlier.is_stale(p) else windows.AT_MEAN.format(name=name))
        if self.contexts % mc_samples:
            raise RuntimeError(windows.CONTEXTS.format(mc_samples=mc_samples, contexts=self.contexts))

    def reduce(self, params: Sequence[Tensor]) -> None:
        """Average what the window captured over the processes, if there are several; all must call this.

        Args:
            params: All trainable parameters, in the same order everywhere; one without gradient here counts as zero.
        """
        if distributed.world_size() > 1 and not self.squared:  # squares are of reduced gradients
            self.products.average(params)

    @property
    def divisor(self) -> float:
        """What the window's buffers are to be divided by."""
        return float(self.contexts) if self.averaged else 1.0

    def finish(self, params: Sequence[Tensor]) -> None:
        """Close the window after a step, and remember its gradients to recognize them if they are never cleared."""
        self._earlier.end_step(params)
        self.clear()

    # ------------------------------------------------------------------ inside

    def _context_of(self, p: Tensor) -> Context | None:
        """Return the context that a gradient belongs to; without one it is marked as taken at the mean."""
        if self._context is not None and self._sampler.holds_sample(p):
            return self._context
        self._earlier.at_mean.add(p)
        return None

    def _on_gradient(self, grad: Tensor, p: Tensor) -> Tensor | None:
        context = self._context
        if context is None or not self._sampler.holds_sample(p):
            return None
        if context.may_wait and context.weight == 1.0:
            return None
        if grad.is_sparse:
            raise RuntimeError(windows.SPARSE)
        if p not in context.seen:
            context.seen.add(p)
            if not context.may_wait:
                self._check_first(context, p)
        if not (self.squared or context.may_wait):
            self._add_product(context, p, grad)
        return None if context.weight == 1.0 else grad * context.weight

    def _on_accumulated(self, p: Tensor) -> None:
        """Note that a backward pass has reached `p.grad`."""
        context, grad = self._context_of(p), p.grad
        if context is not None and context.may_wait and grad is not None:
            context.late[p] = id(grad), grad._version
            self._earlier.check_after(p, grad)
        elif context is not None:
            context.accumulated.add(p)

    def _on_reduced(self, p: Tensor) -> None:
        """Take in a sharded gradient, which is seen only after its reduction, and in the last micro-batch only.

        All of the window's micro-batches had the same sample, so that its whole gradient goes with that noise: what
        was captured before is in it, and is written over. A replica group's own gradient is new, and is added.

        Raises:
            RuntimeError: If contexts are weighted or averaged, or an earlier step's gradient is still there.
        """
        of_group = self._groups.take(p) if replicas.is_replicated(p) else None
        context = self._context_of(p)
        if context is None:
            return
        context.accumulated.add(p)
        if context.weight != 1.0 or context.zeroed:
            raise RuntimeError(windows.SHARDED_SAMPLES)
        if p in context.before:
            context.cleared.add(p.grad is not context.before[p][0])
        elif p.grad is not None:
            self._earlier.check_after(p, p.grad)
        if self.squared or p.grad is None:
            return
        if of_group is None:
            self.products.discard([p])
        self.products.add(p, p.grad if of_group is None else of_group, context.inverse_scale * context.weight)

    def _check_first(self, context: Context, p: Tensor) -> None:
        """Read off `p.grad`, before this context adds to it, whether the window's gradient was cleared."""
        if p.grad is None:
            self._earlier.at_mean.discard(p)
        if p in context.before:
            # Views on a common buffer, as DistributedDataParallel makes them, share one version: nothing can be told.
            changed = p.grad is not None and not p.grad._is_view() and p.grad._version != context.before[p][1]
            if changed and not context.zeroed:
                raise RuntimeError(windows.CHANGED_BEFORE)
            context.cleared.add(context.zeroed or p.grad is None)
        elif self._earlier.is_stale(p):
            raise RuntimeError(STALE)

    def _add_product(self, context: Context, p: Tensor, grad: Tensor) -> None:
        if not self._sampler.in_pack(p):
            self.products.add(p, grad, context.inverse_scale * context.weight)
            return
        if p in context.small:  # of an earlier backward pass
            self._add_small(context)
        context.small[p] = grad

    def _add_small(self, context: Context) -> None:
        """Add gradient times noise of parameters in packs, for which it is done all at once."""
        self.products.add_small(context.small, context.inverse_scale * context.weight)
        context.small.clear()

    def _settle(self, context: Context) -> None:
        """Decide between averaging and summing from what this context found in `p.grad`."""
        reached, cleared = context.accumulated, {True}
        if not context.zeroed:
            cleared = context.cleared | {p.grad is None for p in self.captured - reached}
        if len(cleared) != 1 or self.averaged not in (None, *cleared):
            self._broken |= reached
            raise RuntimeError(windows.MIXED)
        self.averaged = cleared.pop()
        sharded = any(map(distributed.is_sharded, reached))
        if self.averaged and (sharded or not reached.isdisjoint(self._sampler.redrawn.sampled())):
            self._broken |= reached
            raise RuntimeError(windows.SHARDED_SAMPLES if sharded else windows.REDRAWN_SAMPLES)

    def _square(self, context: Context) -> None:
        """Keep the squared gradient: of the sum so far, or summed over the contexts that are to be averaged."""
        # Other processes may have had a gradient where this one had none; the reduction has brought it here.
        params = context.accumulated if distributed.world_size() == 1 else self._hooked
        grads = {p: p.grad for p in params if p.grad is not None}
        if self.contexts == 0:  # some may have been taken when the mean was put back
            grads = {p: grad for p, grad in grads.items() if p not in self.products}
        if grads:
            self.products.square(grads, context.inverse_scale, bool(self.averaged))


def _remove_all(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
