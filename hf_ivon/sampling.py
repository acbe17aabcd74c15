"""Weight samples in place: the noise of each parameter, the buffers that keep the means, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_ivon import distributed
from hf_ivon.execution import Execution, Lanes
from hf_ivon.functional import sample
from hf_ivon.packs import Pack, pack_key, packable
from hf_ivon.philox import noise_words
from hf_ivon.state import state_dtype

# One for each group, and again if other parameters are trained; old ones are forgotten.
_MAX_PACKS = 64


@dataclass(frozen=True)
class Draw:
    """One parameter to be sampled.

    Args:
        p: The parameter, holding its mean.
        group: Options of its group; `ess` and `weight_decay` are read.
        state: Its complete state; `hess` is read, and `mean` where the parameter's dtype is narrower than fp32.
        key: What the noise is a function of, beside the index: 64-bit integers.
        index: Number of the parameter in its optimizer.
    """

    p: Tensor
    group: Mapping[str, Any]
    state: Mapping[str, Any]
    key: tuple[int, ...]
    index: int


class WeightSampler:
    """Puts weight samples into parameters, and the mean back, bit for bit.

    Args:
        execution: How the passes over memory are run.

    Attributes:
        means: Parameter to posterior mean, for the parameters that hold a weight sample now.
        written: Parameter whose mean is kept in its state, to its version after the last write from here; a later
            version was written by others.
    """

    def __init__(self, execution: Execution) -> None:
        self.means: dict[Tensor, Tensor] = {}
        self.written: dict[Tensor, int] = {}
        self._execution = execution
        self._packs: dict[tuple[int, ...], Pack] = {}
        self._sampled_packs: list[Pack] = []
        self._spare: dict[Tensor, list[Tensor]] = {}
        self._borrowed: set[Tensor] = set()
        self._lanes: dict[Tensor, tuple[tuple[int, ...], Lanes]] = {}

    @torch.no_grad()
    def perturb(self, draws: Sequence[Draw]) -> None:
        """Write a weight sample into parameters; into a sharded one, the shard of the sample of the whole.

        Args:
            draws: The parameters, in the order of their optimizer.
        """
        self._execution.plan(sum(draw.p.numel() for draw in draws))
        packed: dict[Any, list[Draw]] = {}
        for draw in draws:
            if self._execution.packs and packable(draw.p) and "mean" not in draw.state:
                packed.setdefault(pack_key(draw.group, draw.p), []).append(draw)
            else:
                self._perturb_one(draw)
        for members in packed.values():
            self._perturb_pack(members)

    def _perturb_one(self, draw: Draw) -> None:
        p, options = draw.p, {"ess": draw.group["ess"], "weight_decay": draw.group["weight_decay"]}
        weights, hess = distributed.local(p), distributed.local(draw.state["hess"])
        words = noise_words(draw.key, draw.index)
        if "mean" in draw.state:
            mean = distributed.local(draw.state["mean"])
        else:
            mean = self.borrow(p)
            self._borrowed.add(p)
            # A compiled pass counts the noise from the tensor's beginning, which a shard does not have.
            lanes = self._lanes_apart(p, weights, mean, hess) if weights.numel() == p.numel() else None
            if lanes is not None and self._execution.sample_compiled(weights, lanes, words, **options):
                self.means[p] = mean
                return
            mean.copy_(weights)
        self.means[p] = mean
        start = distributed.shard_start(p)
        self._execution.sample(weights, mean, hess, words, start=start, total=p.numel(), **options)

    def _lanes_apart(self, p: Tensor, *tensors: Tensor) -> Lanes | None:
        """Return what a compiled pass works on, kept from call to call while the tensors stay where they are."""
        pointers = tuple(t.data_ptr() for t in tensors)
        kept = self._lanes.get(p)
        if kept is None or kept[0] != pointers:
            lanes = self._execution.lanes_apart(*tensors)
            if lanes is None:
                return None
            kept = self._lanes[p] = (pointers, lanes)
        return kept[1]

    def _perturb_pack(self, draws: Sequence[Draw]) -> None:
        """Sample small parameters of one group together."""
        pack = self.pack([draw.p for draw in draws], [draw.index for draw in draws])
        group = draws[0].group
        theta = pack.gather("theta", pack.params)
        mean = pack.flat("mean").copy_(theta)
        hess = pack.gather("hess", [draw.state["hess"] for draw in draws])
        noise = pack.noise(noise_words(draws[0].key, 0))
        theta.copy_(sample(mean, hess, noise, ess=group["ess"], weight_decay=group["weight_decay"]))
        self._sampled_packs.append(pack)
        self.means.update(zip(pack.params, pack.views("mean"), strict=True))
        pack.scatter("theta", pack.params)

    def pack(self, params: Sequence[Tensor], indices: Sequence[int]) -> Pack:
        """Return the pack of some small parameters, kept from one call to the next while they stay where they are.

        Args:
            params: The parameters.
            indices: Their numbers in their optimizer.
        """
        key = tuple(id(p) for p in params)
        pack = self._packs.get(key)
        if pack is None or not pack.holds(params, indices):
            if len(self._packs) >= _MAX_PACKS:
                self._packs.clear()
            pack = self._packs[key] = Pack(params, indices)
        return pack

    def borrow(self, p: Tensor) -> Tensor:
        """Return a buffer for parameter `p`: of the shape of its local part, in the dtype of its state."""
        weights = distributed.local(p)
        spare = self._spare.get(p, [])
        while spare:
            buffer = spare.pop()
            if (buffer.shape, buffer.device, buffer.dtype) == (weights.shape, weights.device, state_dtype(p)):
                return buffer
        return torch.empty_like(weights, dtype=state_dtype(p))

    def give_back(self, buffers: Mapping[Tensor, Tensor]) -> None:
        """Take back what `borrow` or `take_products` returned, by parameter."""
        for p, buffer in buffers.items():
            if not buffer._is_view():  # a view is part of a pack
                self._spare.setdefault(p, []).append(buffer)

    @torch.no_grad()
    def take_products(self, grads: Mapping[Tensor, Tensor], factor: float | Tensor) -> dict[Tensor, Tensor]:
        """Put the mean back into parameters, and return gradient times noise for each.

        The product stands in the buffer that held the mean: to know both takes no more memory than one.

        Args:
            grads: Parameter that holds a weight sample, and whose mean is not in its state, to its gradient.
            factor: Multiplies the products.

        Returns:
            Parameter to product, in its shape; the caller's until they are given back. Those of packed parameters are
            overwritten by the next call.
        """
        products: dict[Tensor, Tensor] = {}
        for pack in self._sampled_packs:
            if all(p in grads for p in pack.params):
                theta, grad = pack.flat("theta"), pack.gather("grad", [grads[p] for p in pack.params])
                torch.sub(theta, pack.flat("mean"), out=pack.flat("product")).mul_(grad).mul_(factor)
                products.update(zip(pack.params, pack.views("product"), strict=True))
            else:
                for p, mean, product in zip(pack.params, pack.views("mean"), pack.views("product"), strict=True):
                    if p in grads:
                        products[p] = torch.sub(p, mean, out=product).mul_(grads[p]).mul_(factor)
        for p in [p for p in self._borrowed if p in grads]:
            weights, mean = distributed.local(p), self.means[p]
            self._execution.take_product(weights, mean, grads[p], factor if isinstance(factor, float) else 1.0)
            self._borrowed.discard(p)
            products[p] = self.means.pop(p)
            if isinstance(factor, Tensor):
                products[p].mul_(factor)
        return products

    def restore(self) -> None:
        """Write the means back; what is raised in between is raised after all of them are in place."""
        try:
            self._write_means()
        except BaseException:  # restoring twice is harmless, half is not
            self._write_means()
            raise
        finally:
            self.forget_copies()
            self.give_back({p: self.means[p] for p in self._borrowed})
            self._borrowed.clear()
            self._sampled_packs.clear()
            self.means.clear()

    def forget_copies(self) -> None:
        """Drop copies of the weights as they were: casts that autocast keeps, whole tensors that FSDP keeps."""
        torch.clear_autocast_cache()
        if any(distributed.is_sharded(p) for p in self.means):
            distributed.reshard()

    @torch.no_grad()
    def _write_means(self) -> None:
        for pack in self._sampled_packs:
            pack.scatter("mean", pack.params)
        packed = {p for pack in self._sampled_packs for p in pack.params}
        for p, mean in self.means.items():
            if p not in packed:
                weights = distributed.local(p)
                weights.copy_(mean)
                if p not in self._borrowed:
                    self.written[p] = weights._version
