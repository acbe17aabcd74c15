"""Weight samples in place: the noise of each parameter, the buffers that keep the means, and the way back."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_ivon import distributed, replicas
from hf_ivon.execution import Execution
from hf_ivon.options import ess_of
from hf_ivon.packs import Pack
from hf_ivon.philox import noise_words
from hf_ivon.redraw import RedrawnSamples
from hf_ivon.state import state_dtype

logger = logging.getLogger(__name__)

NO_EFFECT = (
    "`low_memory=True` has no effect on these weights: it is for contiguous tensors in fp32 that are not sharded, of "
    "at least 2**15 weights unless `foreach=False`; others keep their means. Load the model in fp32 and train under "
    "autocast, or leave the option out."
)
# Streams of noise: the draws of training and those of prediction never meet.
_TRAIN, _EVAL = 0, 1


@dataclass(frozen=True)
class Noise:
    """Which noise a context has.

    Args:
        stream: That of training or that of predictions.
        rank: Number of the process, where each has its own sample.
        draw: Number of the context in its window.
    """

    stream: int
    rank: int
    draw: int

    def key(self, group: Mapping[str, Any], p: Tensor | None = None) -> tuple[int, ...]:
        """Return what the noise of a parameter is a function of, beside its index.

        Args:
            group: Options of its group; `seed` and `window` are read.
            p: The parameter; None for those of a pack, which are not sharded.
        """
        rank, draw = self.rank, self.draw
        if self.stream == _TRAIN and p is not None and distributed.is_sharded(p):
            # A sharded parameter is one in its replica group, and keeps its sample for the whole window.
            rank, draw = replicas.replica(p), 1
        return group["seed"], self.stream, rank, group["window"], draw


def training_noise(draw: int) -> Noise:
    """Return the noise of a training context: each process has its own."""
    return Noise(_TRAIN, distributed.rank(), draw)


def prediction_noise(draw: int) -> Noise:
    """Return the noise of a prediction: every process predicts with the same sample."""
    return Noise(_EVAL, 0, draw)


@dataclass(frozen=True)
class Draw:
    """One parameter to be sampled.

    Args:
        p: The parameter, holding its mean.
        group: Options of its group; `ess`, `eval_ess_scale` and `weight_decay` are read.
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
    """Puts weight samples into parameters, and the mean back, bit for bit; with `low_memory` up to rounding.

    Args:
        execution: How the passes over memory are run.
        low_memory: Keep no copies of large parameters' means in training, see `hf_ivon.redraw`.

    Attributes:
        execution: How the passes over memory are run.
        redrawn: The parameters whose means are not kept.
        packs: Small parameters, as the last context had them.
        means: Parameter to posterior mean, for the parameters that hold a weight sample now.
        written: Parameter whose mean is kept in its state, to its memory and version after the last write from here;
            other memory or a later version was written by others.
    """

    def __init__(self, execution: Execution, low_memory: bool = False) -> None:
        self.redrawn = RedrawnSamples(execution)
        self._low_memory = low_memory
        self.means: dict[Tensor, Tensor] = {}
        self.written: dict[Tensor, tuple[int, int]] = {}
        self.execution = execution
        self.packs: list[Pack] = []
        self._packed: set[Tensor] = set()  # their parameters
        # Packs that hold a weight sample now, to the name of the buffer with their means.
        self._sampled_packs: dict[Pack, str] = {}
        self._with_products: set[Pack] = set()
        self._alone: list[Tensor] = []
        self._sharded = False
        self._spare: dict[Tensor, list[Tensor]] = {}
        self._borrowed: set[Tensor] = set()

    @torch.no_grad()
    def perturb(self, packs: Mapping[Pack, tuple[int, ...]], draws: Sequence[Draw], train: bool) -> None:
        """Write a weight sample into parameters; into a sharded one, the shard of the sample of the whole.

        Copies of the weights as they were are dropped.

        Args:
            packs: Small parameters, to what their noise is a function of beside their indices: 64-bit integers.
            draws: All others, in the order of their optimizer.
            train: For training; samples for predictions are as much wider as `eval_ess_scale` says.
        """
        if self.packs != list(packs):
            self.packs = list(packs)
            self._packed = {p for pack in packs for p in pack.params}
        self.execution.plan(sum(pack.starts[-1] for pack in packs) + sum(draw.p.numel() for draw in draws))
        self._alone = [draw.p for draw in draws]
        self._sharded = any(map(distributed.is_sharded, self._alone))
        whole: dict[tuple[Any, ...], list[Draw]] = {}
        for draw in draws:
            if train and self._low_memory and self.redrawn.can_hold(draw.p, draw.state):
                words = noise_words(draw.key, draw.index)
                self.redrawn.perturb(draw.p, draw.group, distributed.local(draw.state["hess"]), words)
            elif distributed.local(draw.p).numel() != draw.p.numel():
                self._perturb_shard(draw, train)
            else:
                whole.setdefault((id(draw.group), draw.key, "mean" in draw.state), []).append(draw)
        for members in whole.values():
            self._perturb_whole(members, train)
        if train and self._low_memory and not self.redrawn.sampled():
            _say_once(NO_EFFECT)
        for pack, key in packs.items():
            self._perturb_pack(pack, noise_words(key, 0), train)
        self.forget_copies()

    def _perturb_whole(self, draws: Sequence[Draw], train: bool) -> None:
        """Sample whole parameters: by fused passes together, or one by one.

        Args:
            draws: Of one group and one key; the means are in the states of all, or of none.
            train: See `perturb`.
        """
        group, key, apart = draws[0].group, draws[0].key, "mean" in draws[0].state
        options = {"ess": ess_of(group, train), "weight_decay": group["weight_decay"]}
        local = distributed.local
        means = [local(draw.state["mean"]) if apart else self.borrow(draw.p) for draw in draws]
        items = [(local(draw.p), m, local(draw.state["hess"])) for draw, m in zip(draws, means, strict=True)]
        if apart:
            self.means.update(zip((draw.p for draw in draws), means, strict=True))
        left, numbers = dict(enumerate(draws)), [draw.index for draw in draws]
        for done in self.execution.sample_whole(items, numbers, noise_words(key, 0), **options, keep=not apart):
            for draw, mean in [(left.pop(i), means[i]) for i in done]:
                if not apart:
                    self._keep(draw.p, mean)
        for i, draw in left.items():
            weights, mean, hess = items[i]
            if not apart:
                self._keep(draw.p, mean.copy_(weights))
            self.execution.sample(weights, mean, hess, noise_words(key, draw.index), **options)

    def _perturb_shard(self, draw: Draw, train: bool) -> None:
        p, options = draw.p, {"ess": ess_of(draw.group, train), "weight_decay": draw.group["weight_decay"]}
        weights, hess = distributed.local(p), distributed.local(draw.state["hess"])
        if "mean" in draw.state:
            self.means[p] = distributed.local(draw.state["mean"])
        else:
            self._keep(p, self.borrow(p).copy_(weights))
        start, words = distributed.shard_start(p), noise_words(draw.key, draw.index)
        self.execution.sample(weights, self.means[p], hess, words, start=start, total=p.numel(), **options)

    def _keep(self, p: Tensor, mean: Tensor) -> None:
        """Note a borrowed buffer that holds the mean now: an error before leaves nothing to restore."""
        self.means[p] = mean
        self._borrowed.add(p)

    def _perturb_pack(self, pack: Pack, words: Tensor, train: bool) -> None:
        options = {"ess": ess_of(pack.group, train), "weight_decay": pack.group["weight_decay"]}
        run = self.execution.by_address(pack)
        in_place = run is not None and run.sample_pack(pack, words, **options)
        if not in_place:
            pack.read("mean")
            self.execution.sample_pack(pack, words, **options)
        self._sampled_packs[pack] = "mean"
        self.means.update(pack.by_parameter("mean"))
        if not in_place:
            pack.write("theta")

    @torch.no_grad()
    def follow(self, states: Mapping[Tensor, Mapping[str, Any]], again: bool = False) -> None:
        """Let means that are kept in states follow what others wrote to their parameters since the last write here.

        Args:
            states: Parameter to its complete state; there is a mean in it if its dtype is, or was, a narrower one.
            again: Do so already in this step: only what has changed a parameter's version or place may be new.
        """
        changed = [
            p
            for p, state in states.items()
            if "mean" in state and p not in self.means and not (again and self.written.get(p) == _mark(p))
        ]
        local = distributed.local
        self.execution.adopt([(local(p), local(states[p]["mean"])) for p in changed])
        for p in changed:
            self.note(p)

    def note(self, p: Tensor) -> None:
        """Remember that what a parameter holds now was written from here, and its mean is in its state."""
        self.written[p] = _mark(p)

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
            if not buffer._is_view() and not self._low_memory:  # a view is part of a pack
                self._spare.setdefault(p, []).append(buffer)

    def end_window(self, buffers: Mapping[Tensor, Tensor]) -> None:
        """Take back all that a window has kept: buffers as for `give_back`, and products in packs."""
        self.give_back(buffers)
        self.redrawn.end_window()
        for pack in self._with_products:
            pack.free("product")
        self._with_products.clear()

    @torch.no_grad()
    def take_products(
        self, grads: Mapping[Tensor, Tensor], factor: float | Tensor, squared: bool
    ) -> dict[Tensor, Tensor]:
        """Put the mean back into parameters, and return gradient times noise, or the squared gradient, for each.

        The product stands in the buffer that held the mean: to know both takes no more memory than one. Where no mean
        is kept, the Hessian learns at once, and there is none.

        Args:
            grads: Parameter that holds a weight sample, and whose mean is not in its state, to its gradient.
            factor: Multiplies the gradients.
            squared: Whether squares are wanted.

        Returns:
            Parameter to product, in its shape; the caller's until the end of the window.
        """
        products: dict[Tensor, Tensor] = {}
        for pack in list(self._sampled_packs):
            of_pack = [grads.get(p) for p in pack.params]
            if not all(grad is None for grad in of_pack):
                self._take_from_pack(pack, of_pack, factor, squared)
                products.update(pack.by_parameter("product"))
        for p in self.redrawn.sampled():
            if p in grads:
                self.redrawn.learn(p, grads[p], factor)
        taken = [p for p in self._borrowed if p in grads]
        items = [(distributed.local(p), self.means[p], grads[p]) for p in taken]
        scale = factor if isinstance(factor, float) else 1.0
        for done in self.execution.take_products(items, scale, squared):
            for p in [taken[i] for i in done]:
                self._borrowed.discard(p)
                products[p] = self.means.pop(p)
        if isinstance(factor, Tensor):  # only now, when no mean can be taken for a product
            for p in taken:
                _scale(products[p], factor, squared)
        return products

    def _take_from_pack(
        self, pack: Pack, grads: Sequence[Tensor | None], factor: float | Tensor, squared: bool
    ) -> None:
        """Take the products of a pack, and put all of its means back; of those without gradient there is none."""
        scale = factor if isinstance(factor, float) else 1.0
        run = self.execution.by_address(pack)
        in_place = run is not None and run.take_pack_product(pack, pack.plain(grads), scale, squared)
        if not in_place:
            grad = pack.gather("grad", grads)
            self.execution.take_product(pack.read("theta"), pack.flat("mean"), grad, scale, squared)
            self._sampled_packs[pack] = "theta"
        pack.rename("mean", "product")
        self._with_products.add(pack)
        if not in_place:
            pack.write_back("theta")
        del self._sampled_packs[pack]
        if in_place:  # the means are where the pack has the parameters
            pack.follow()
        if isinstance(factor, Tensor):
            _scale(pack.flat("product"), factor, squared)

    def keep_products(self, pack: Pack, products: Sequence[Tensor | None]) -> None:
        """Let a pack have the products of its parameters until the end of the window; zeros for None."""
        pack.gather("product", products)
        self._with_products.add(pack)

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

    def in_pack(self, p: Tensor) -> bool:
        """Tell whether a parameter is in a pack."""
        return p in self._packed

    def holds_sample(self, p: Tensor) -> bool:
        """Tell whether a parameter was given a weight sample in this context, or in this window with `low_memory`."""
        return p in self.means or p in self.redrawn

    def mean(self, p: Tensor) -> Tensor:
        """Return a copy of the mean of a parameter for which `holds_sample` is true."""
        return self.means[p].clone() if p in self.means else self.redrawn.mean(p)

    def forget_copies(self) -> None:
        """Drop copies of the weights as they were: casts that autocast keeps, whole tensors that FSDP keeps."""
        torch.clear_autocast_cache()
        if self._sharded:
            distributed.reshard()

    @torch.no_grad()
    def _write_means(self) -> None:
        errors = self.redrawn.restore()  # of one parameter, which must not be the others'
        # In reverse: of two parameters on one storage, the first was saved before any write.
        for pack, name in reversed(self._sampled_packs.items()):
            try:
                pack.write_back(name)
            except BaseException as error:
                errors.append(error)
        for p in [p for p in reversed(self._alone) if p in self.means]:
            try:
                distributed.local(p).copy_(self.means[p])
                if p not in self._borrowed:
                    self.note(p)
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _scale(products: Tensor, factor: Tensor, squared: bool) -> None:
    """Multiply by a factor on the gradients that is not to be read by the host."""
    products.mul_(factor)
    if squared:
        products.mul_(factor)


def _mark(p: Tensor) -> tuple[int, int]:
    weights = distributed.local(p)
    return weights.data_ptr(), weights._version
