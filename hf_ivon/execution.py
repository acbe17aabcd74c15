"""How the passes of `hf_ivon.passes` are run: in pieces that stay in the cache, or fused into one loop each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ivon import passes
from hf_ivon.by_address import ByAddress
from hf_ivon.compiled import Compiled, lanes
from hf_ivon.functional import cache_sized, sample
from hf_ivon.fused_passes import Fused, adopts, fused_passes, quick_passes, redraws
from hf_ivon.packs import Pack, is_plain
from hf_ivon.passes import NoiseOptions, UpdateOptions, UpdateTensors
from hf_ivon.philox import normal_range
from hf_ivon.triton_passes import TritonPasses

# Columns of noise that are made at a time: their integers stay in a processor's cache, while calling an operation
# costs little beside what it does, and has work for two threads. On an accelerator they are small beside a tensor.
_COLUMNS, _ACCELERATOR_COLUMNS = 2**16, 2**22
# A model with fewer trainable weights is trained before the compiler is done.
_MIN_MODEL = 2**20


class Execution:
    """Runs the passes as the caller chose.

    Args:
        foreach: Small tensors are worked on together, in packs; None does so.
        fused: Each pass is one loop; None does so for models of more than a million trainable weights.
        compiled: Also where a loop has to be compiled by `torch.compile`, which takes seconds.
    """

    def __init__(self, foreach: bool | None, fused: bool | None, compiled: bool = True) -> None:
        self.packs = foreach is None or foreach
        self._fused = fused
        self._compiled = compiled

    def plan(self, num_weights: int) -> None:
        """Settle what None means for `fused`, once the number of trainable weights is known."""
        if self._fused is None:
            self._fused = num_weights >= _MIN_MODEL

    def _fused_passes(self, *tensors: Tensor, narrow: tuple[Tensor, ...] = ()) -> Fused | None:
        """Return the fused passes, if they are for such tensors: fp32, or `narrow` ones of one narrower dtype."""
        first = tensors[0]
        # By address nothing else would notice that a tensor is elsewhere, or has become smaller.
        if not self._fused or not all(
            t.device == first.device and t.numel() == first.numel() and is_plain(t) for t in (*tensors, *narrow)
        ):
            return None
        run = fused_passes(first.device.type) if self._compiled else quick_passes(first.device.type)
        if run is None or first.numel() < run.smallest or any(t.dtype != torch.float32 for t in tensors):
            return None
        kinds = {t.dtype for t in narrow}
        return run if len(kinds) < 2 and kinds.issubset(run.narrow) else None

    def by_address(self, pack: Pack) -> ByAddress | None:
        """Return what works on the parameters of a pack where they are; None if they are to be copied together."""
        run = self._fused_passes(pack.flat("hess"))
        return run if isinstance(run, ByAddress) else None

    def _together(
        self,
        items: Sequence[Sequence[Tensor]],
        kinds: Sequence[Any] | None = None,
        narrow: Sequence[tuple[Tensor, ...]] | None = None,
    ) -> Iterator[tuple[Fused | None, list[int]]]:
        """Yield which tensors can be worked on in one call, and by what.

        Args:
            items: Tensors of one size each.
            kinds: What must be the same for all in a call; None is nothing.
            narrow: Other tensors of each, which may be of a narrower dtype.

        Yields:
            Fused passes, if there are any for them, and the positions of these items: of one if not by address.
        """
        groups: dict[Any, tuple[Fused | None, list[int]]] = {}
        for i, tensors in enumerate(items):
            run = self._fused_passes(*tensors, narrow=() if narrow is None else narrow[i])
            kind = None if kinds is None else kinds[i]
            key = (tensors[0].device, kind) if isinstance(run, ByAddress) else i
            groups.setdefault(key, (run, []))[1].append(i)
        yield from groups.values()

    def sample_whole(
        self,
        items: Sequence[tuple[Tensor, Tensor, Tensor]],
        numbers: Sequence[int],
        words: Tensor,
        *,
        ess: float,
        weight_decay: float,
        keep: bool,
    ) -> Iterator[list[int]]:
        """Put weight samples into whole tensors, by fused passes.

        Args:
            items: Of each a tensor that is written to, its mean, and its Hessian estimate, of one shape.
            numbers: What the noise of each is a function of, beside `words`.
            words: Output of `noise_words`; the index in it is not used.
            ess: λ, number of examples.
            weight_decay: δ, loss/param².
            keep: The tensors hold their means, and are copied first into what is given as these.

        Yields:
            Positions of those that have been done, after each call; those that are never named are not changed.
        """
        if keep:
            groups = self._together(items)
        else:
            thetas = [(theta,) for theta, _, _ in items]
            groups = self._together([(m, h) for _, m, h in items], [t.dtype for (t,) in thetas], thetas)
        for run, chosen in groups:
            done, own_numbers = False, [numbers[i] for i in chosen]
            if isinstance(run, ByAddress):
                weights, means, hesses = zip(*[items[i] for i in chosen], strict=True)
                done = run.sample_all(weights, means, hesses, own_numbers, words, ess, weight_decay, keep)
            elif run is not None:
                own_words = words.index_fill(0, torch.tensor([2]), own_numbers[0])
                done = run.sample(*items[chosen[0]], own_words, ess, weight_decay, keep)
            if done:
                yield chosen

    def sample(
        self,
        theta: Tensor,
        mean: Tensor,
        hess: Tensor,
        words: Tensor,
        *,
        ess: float,
        weight_decay: float,
        start: int = 0,
        total: int | None = None,
    ) -> None:
        """Put a weight sample into a tensor.

        Args:
            theta: Written to; of the dtype of `mean` or a narrower one.
            mean: The mean, shape of `theta`.
            hess: Hessian estimate, shape and dtype of `mean`.
            words: Output of `noise_words`.
            ess: λ, number of examples.
            weight_decay: δ, loss/param².
            start: Position of the first element in the flattened whole that this is a part of.
            total: Number of elements of the whole; None is those of `theta`.
        """
        total = theta.numel() if total is None else total
        run = self._fused_passes(mean, hess, narrow=(theta,))
        if run is not None and theta.numel() == total:
            done = run.sample(theta, mean, hess, words, ess, weight_decay, keep=False)
        else:  # the others count the noise from the tensor's beginning, which a shard does not have
            done = isinstance(run, TritonPasses) and run.sample_part(
                theta, mean, hess, words, ess, weight_decay, start, total
            )
        if done:
            return
        words = words.to(theta.device, non_blocking=True)
        if theta.dtype == mean.dtype and theta.numel() == total and theta.is_contiguous() and hess.is_contiguous():
            for begin, end, (thetas, means, hesses) in _pieces(theta, mean, hess):
                columns = torch.arange(begin, end, device=theta.device)
                passes.sample_lanes(thetas, means, hesses, columns, words, ess, weight_decay, keep=False)
            return
        for part, m, h in cache_sized(theta, mean, hess):
            noise = normal_range(start, start + m.numel(), total, words).to(m.dtype).view(m.shape)
            part.copy_(sample(m, h, noise, ess=ess, weight_decay=weight_decay))
            start += m.numel()

    def sample_pack(self, pack: Pack, words: Tensor, *, ess: float, weight_decay: float) -> None:
        """Put a weight sample into the buffer "theta" of a pack.

        Args:
            pack: Its buffers "mean" and "hess" are read.
            words: Output of `noise_words`; the index in it is not used.
            ess: λ, number of examples.
            weight_decay: δ, loss/param².
        """
        theta, mean, hess = (pack.flat(name) for name in ("theta", "mean", "hess"))
        noise, run = pack.noise, self._fused_passes(theta, mean, hess)
        if not isinstance(run, Compiled) or not run.draw_lanes(noise.lanes, noise.columns, noise.indices, words):
            words = words.to(theta.device, non_blocking=True)
            for columns, indices, *drawn in cache_sized(
                noise.columns, noise.indices, *noise.lanes, max_elements=_COLUMNS
            ):
                passes.draw_lanes(drawn, columns, indices, words)
        torch.index_select(noise.flat, 0, noise.order, out=theta)
        for t, m, h in cache_sized(theta, mean, hess):
            t.copy_(sample(m, h, t, ess=ess, weight_decay=weight_decay))

    def add_noise(
        self, theta: Tensor, hess: Tensor, words: Tensor, *, ess: float, weight_decay: float
    ) -> Iterator[int]:
        """Put a weight sample into a whole tensor, whose mean is not kept; `subtract_noise` takes the noise off again.

        Args:
            theta: Holds the mean, contiguous. Written to.
            hess: Hessian estimate, shape and dtype of `theta`, contiguous.
            words: Output of `noise_words`.
            ess: λ, number of examples.
            weight_decay: δ, loss/param².

        Yields:
            Column of the noise before which it has been added, after each piece.
        """
        run = self._fused_passes(theta, hess)
        if run is not None and redraws(run, theta.device.type):
            if run.sample(theta, theta, hess, words, ess, weight_decay, keep=False):
                yield -(-theta.numel() // 4)
                return
        words = words.to(theta.device, non_blocking=True)
        for begin, end, (thetas, hesses) in _pieces(theta, hess):
            columns = torch.arange(begin, end, device=theta.device)
            passes.sample_lanes(thetas, thetas, hesses, columns, words, ess, weight_decay, keep=False)
            yield end

    def subtract_noise(
        self,
        theta: Tensor,
        hess: Tensor,
        grad: Tensor | None,
        words: Tensor,
        options: NoiseOptions,
        begin: int = 0,
        end: int | None = None,
    ) -> Iterator[int]:
        """Take off what `add_noise` put on, and let the Hessian learn from gradient times noise.

        Args:
            theta: Holds the weight sample, contiguous. Written to.
            hess: Hessian estimate that it was drawn with, shape of `theta`, contiguous. Written to.
            grad: Gradient at the sample, shape of `theta`, contiguous; None leaves the Hessian as it is.
            words: Those of the sample.
            options: See `passes.subtract_noise_lanes`.
            begin: First column with noise, in whole pieces.
            end: End of the columns with noise; None is all.

        Yields:
            Column of the noise before which it has been taken off, after each piece.
        """
        width = -(-theta.numel() // 4)
        end = width if end is None else end
        tensors = [theta, hess, *([] if grad is None else [grad])]
        run = self._fused_passes(*tensors) if (begin, end) == (0, width) else None
        if run is not None and redraws(run, theta.device.type):
            if run.subtract_noise(theta, hess, grad, words, options):
                yield width
                return
        words = words.to(theta.device, non_blocking=True)
        for start, stop, (thetas, hesses, *grads) in _pieces(*tensors, begin=begin, end=end):
            columns = torch.arange(start, stop, device=theta.device)
            passes.subtract_noise_lanes(thetas, hesses, grads[0] if grads else None, columns, words, *options)
            yield stop

    def adopt(self, items: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Run `passes.adopt` on tensors of any size: of each its weights and its mean."""
        thetas = [(theta,) for theta, _ in items]
        for run, chosen in self._together([(mean,) for _, mean in items], [t.dtype for (t,) in thetas], thetas):
            first = items[chosen[0]]
            done = run is not None and adopts(run, first[0].device.type, first[0].dtype)
            if done and isinstance(run, ByAddress):
                done = run.adopt_all(*zip(*[items[i] for i in chosen], strict=True))
            elif done and run is not None:
                done = run.adopt(*first)
            for i in () if done else chosen:
                for t, m in cache_sized(*items[i]):
                    passes.adopt(t, m)

    def take_product(self, theta: Tensor, mean: Tensor, grad: Tensor, factor: float, squared: bool) -> None:
        """Run `passes.take_product` on tensors of any size."""
        for _ in self.take_products([(theta, mean, grad)], factor, squared):
            pass

    def take_products(
        self, items: Sequence[tuple[Tensor, Tensor, Tensor]], factor: float, squared: bool
    ) -> Iterator[list[int]]:
        """Run `passes.take_product` on several.

        Args:
            items: Of each its weights, mean and gradient.
            factor: Multiplies the gradients.
            squared: Keep squares.

        Yields:
            Positions of those that have been done, after each call.
        """
        for run, chosen in self._together(items):
            if isinstance(run, ByAddress):
                thetas, means, grads = zip(*[items[i] for i in chosen], strict=True)
                done = run.take_products(thetas, means, grads, factor, squared)
            else:
                done = run is not None and run.take_product(*items[chosen[0]], factor, squared)
            for i in () if done else chosen:
                for t, m, g in cache_sized(*items[i]):
                    passes.take_product(t, m, g, factor, squared)
            yield chosen

    def add_product(self, total: Tensor, theta: Tensor, mean: Tensor, grad: Tensor, factor: float | Tensor) -> None:
        """Run `passes.add_product` on tensors of any size; the factor may be a 0-dim tensor."""
        self.add_products([(total, theta, mean, grad)], factor)

    def add_products(self, items: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], factor: float | Tensor) -> None:
        """Run `passes.add_product` on several: of each its sum, weights, mean and gradient."""
        narrow = [(theta, grad) for _, theta, _, grad in items]
        for run, chosen in self._together([(s, m) for s, _, m, _ in items], [t.dtype for t, _ in narrow], narrow):
            done = False
            if isinstance(run, ByAddress) and isinstance(factor, float):
                totals, thetas, means, grads = zip(*[items[i] for i in chosen], strict=True)
                done = run.add_products(totals, thetas, means, grads, factor)
            elif run is not None and isinstance(factor, float):
                done = run.add_product(*items[chosen[0]], factor)
            for i in () if done else chosen:
                for s, t, m, g in cache_sized(*items[i]):
                    passes.add_product(s, t, m, g, factor)

    def add_pack_product(self, pack: Pack, grads: Sequence[Tensor | None], factor: float | Tensor) -> None:
        """Run `passes.add_product` on the parameters of a pack that have a gradient, and its buffer "product".

        Args:
            pack: Holds weight samples; its buffer "mean" is read.
            grads: Gradient of each parameter, in its shape, or None.
            factor: Multiplies them; may be a 0-dim tensor.
        """
        run = self.by_address(pack)
        if run is None or not run.add_pack_product(pack, *_scaled(pack.plain(grads), factor)):
            grad = pack.gather("grad", grads)
            self.add_product(pack.flat("product"), pack.read("theta"), pack.flat("mean"), grad, factor)

    def square(self, total: Tensor, grad: Tensor, factor: float | Tensor, keep: bool) -> None:
        """Run `passes.square` on tensors of any size; the factor may be a 0-dim tensor."""
        if isinstance(factor, float):
            run = self._fused_passes(total, grad)
            if run is not None and run.square(total, grad, factor, keep):
                return
        for s, g in cache_sized(total, grad):
            passes.square(s, g, factor, keep)

    def square_pack(self, pack: Pack, grads: Sequence[Tensor | None], factor: float | Tensor, keep: bool) -> None:
        """Run `passes.square` on the parameters of a pack that have a gradient, and its buffer "product".

        Args:
            pack: The pack.
            grads: Gradient of each parameter, in its shape, or None.
            factor: Multiplies them; may be a 0-dim tensor.
            keep: See `passes.square`.
        """
        run = self.by_address(pack)
        if run is not None and run.square_pack(pack, *_scaled(pack.plain(grads), factor), keep):
            return
        grad = pack.gather("grad", grads)
        for missing, _, elements in pack.runs([grad is None for grad in grads]):
            if not missing:
                self.square(pack.flat("product")[elements], grad[elements], factor, keep)

    def update(self, items: Sequence[UpdateTensors], options: UpdateOptions) -> None:
        """Run `passes.update` on tensors of any size.

        Args:
            items: Of each the tensors that `passes.update` takes.
            options: Those of all.
        """
        kinds, wide, narrow = [], [], []
        for item in items:
            _, grad, curvature, momentum, _, prior_mean = item
            kinds.append((curvature is None, momentum.dtype, grad.dtype, prior_mean is None))
            # Gradients and momenta may be of another dtype, which then is one.
            narrow.append(tuple(t for t in (grad, momentum) if t.dtype != torch.float32))
            wide.append([t for t in item if t is not None and all(t is not other for other in narrow[-1])])
        for run, chosen in self._together(wide, kinds, narrow):
            if isinstance(run, ByAddress):
                done = run.update_all([items[i] for i in chosen], options)
            else:
                done = run is not None and run.update(items[chosen[0]], options)
            for i in () if done else chosen:
                for piece in cache_sized(*(t for t in items[i] if t is not None)):
                    rest = iter(piece)
                    parts: list[Any] = [None if t is None else next(rest) for t in items[i]]
                    m, g, c, average, h, prior = parts
                    passes.update(m, g, c, average, h, prior, *options)


def _pieces(*tensors: Tensor, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int, list[list[Tensor]]]]:
    """Yield ranges of columns, with what each tensor's lanes have there; tensors are contiguous, of one size."""
    first, of_each = tensors[0], [lanes(t) for t in tensors]
    step = _COLUMNS if first.device.type == "cpu" else _ACCELERATOR_COLUMNS
    end = -(-first.numel() // 4) if end is None else end
    for start in range(begin, end, step):
        stop = min(start + step, end)
        yield start, stop, [[lane[start:stop] for lane in tensor] for tensor in of_each]


def _scaled(grads: list[Tensor | None], factor: float | Tensor) -> tuple[list[Tensor | None], float]:
    """Multiply by a factor that is not to be read by the host; others are left to the pass."""
    if isinstance(factor, Tensor):
        return [None if grad is None else grad * factor for grad in grads], 1.0
    return grads, factor
