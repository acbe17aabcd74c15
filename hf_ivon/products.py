"""What the training contexts of one optimizer step have shown of the curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hf_ivon import distributed, replicas
from hf_ivon.packs import Pack
from hf_ivon.sampling import WeightSampler


class Products:
    """Sums of gradient times noise, or of squared gradients, of each parameter in a window.

    Args:
        sampler: Has put the weight samples into the parameters, and has buffers to lend.
    """

    def __init__(self, sampler: WeightSampler) -> None:
        self._sampler = sampler
        self._sums: dict[Tensor, Tensor] = {}

    def __contains__(self, p: Tensor) -> bool:
        """Tell whether there is a sum for a parameter."""
        return p in self._sums

    def of(self, params: Iterable[Tensor]) -> list[Tensor | None]:
        """Return the sums of parameters, in their shapes; None for one without."""
        return list(map(self._sums.get, params))

    def curvature(self, p: Tensor) -> Tensor | None:
        """Return the sum of a parameter that got a gradient, in its shape; None if its Hessian has learned already."""
        return None if self._sampler.redrawn.has_learned(p) else self._sums[p]

    def discard(self, params: Iterable[Tensor] | None = None) -> None:
        """Forget the sums of parameters; None is those of all."""
        given = list(self._sums if params is None else (p for p in params if p in self._sums))
        self._sampler.give_back({p: self._sums.pop(p) for p in given})

    def clear(self) -> None:
        """Forget the window; its buffers go back to the sampler."""
        self._sampler.end_window(self._sums)
        self._sums.clear()

    def take(self, grads: Mapping[Tensor, Tensor], factor: float | Tensor, squared: bool) -> None:
        """Put the mean back into parameters, and keep gradient times noise, or its square, where the mean was.

        Args:
            grads: Parameter to gradient; those whose means are in their states hold their samples afterwards.
            factor: Multiplies the gradients.
            squared: Keep squares.
        """
        self._sums.update(self._sampler.take_products(grads, factor, squared))
        if not squared:
            self._add_all({p: grads[p] for p in self._sampler.written if p in grads}, factor)

    def add(self, p: Tensor, grad: Tensor, factor: float | Tensor) -> None:
        """Add gradient times noise of a parameter that holds a weight sample.

        Args:
            p: The parameter; one without a mean learns at once, see `hf_ivon.redraw`.
            grad: Its gradient; may be sharded as it is.
            factor: Multiplies the gradient.
        """
        if p in self._sampler.redrawn:
            self._sampler.redrawn.learn(p, grad, factor)
        else:
            self._add_all({p: grad}, factor)

    @torch.no_grad()
    def _add_all(self, grads: Mapping[Tensor, Tensor], factor: float | Tensor) -> None:
        sampler, local = self._sampler, distributed.local
        for p in grads:
            if p not in self._sums:
                self._sums[p] = sampler.borrow(p).zero_()
        items = [(self._sums[p], local(p), sampler.means[p], local(grad)) for p, grad in grads.items()]
        sampler.execution.add_products(items, factor)

    def add_small(self, grads: Mapping[Tensor, Tensor], factor: float | Tensor) -> None:
        """Do what `add` does for parameters in packs, all at once."""
        run = self._sampler.execution.add_pack_product
        self._add_to_packs(grads, lambda pack, taken: run(pack, taken, factor))

    def square(self, grads: Mapping[Tensor, Tensor], factor: float | Tensor, keep: bool) -> None:
        """Keep squared gradients.

        Args:
            grads: Parameter to gradient.
            factor: Multiplies the gradients.
            keep: Add the squares to those that there are; else they take their place.
        """
        execution = self._sampler.execution
        done = self._add_to_packs(grads, lambda pack, taken: execution.square_pack(pack, taken, factor, keep))
        for p, grad in grads.items():
            if p not in done:
                known = p in self._sums
                if not known:
                    self._sums[p] = self._sampler.borrow(p)
                execution.square(self._sums[p], distributed.local(grad), factor, keep and known)

    @torch.no_grad()
    def _add_to_packs(
        self, grads: Mapping[Tensor, Tensor], add: Callable[[Pack, list[Tensor | None]], None]
    ) -> dict[Tensor, Tensor]:
        """Add to the sums of parameters in packs; returns the sums of all parameters in the packs of these."""
        sums: dict[Tensor, Tensor] = {}
        for pack in self._sampler.packs:
            taken = [grads.get(p) for p in pack.params]
            if not all(grad is None for grad in taken):
                self._sampler.keep_products(pack, self.of(pack.params))
                add(pack, taken)
                sums.update(pack.by_parameter("product"))
        self._sums.update(sums)
        return sums

    def average(self, params: Sequence[Tensor]) -> None:
        """Average over the processes what was learned of gradient times noise; all must call this.

        Args:
            params: All trainable parameters, in the same order everywhere; one without gradient here counts as zero.
        """
        redrawn = self._sampler.redrawn
        redrawn.average(params)
        groups = [p for p in params if p in self._sums and replicas.is_replicated(p)]
        replicas.average_over_groups(groups, [distributed.local(self._sums[p]) for p in groups])
        whole = [p for p in params if not (p in redrawn or distributed.is_sharded(p))]  # sharded ones come reduced
        for p in whole:
            if p not in self._sums:
                self._sums[p] = self._sampler.borrow(p).zero_()
        distributed.average_([self._sums[p] for p in whole])
