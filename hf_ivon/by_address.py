"""The passes of `hf_ivon.passes` by functions that are given addresses: any number of tensors in one call.

It is the caller who sees to it that tensors are contiguous, of one size, of the right dtype and on one device; nothing
here would notice.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ivon.packs import Pack, addresses_of
from hf_ivon.passes import NoiseOptions, UpdateOptions, UpdateTensors


class ByAddress(ABC):
    """The passes, on whole tensors and on packs where their parameters are.

    Each returns whether it was done; if not, nothing is changed, and none will be done any more.

    Attributes:
        smallest: Number of elements below which a pass costs more to call than it saves.
        narrow: Dtypes of weights, and of their gradients, whose means are kept apart in fp32.
        failed: Whether something went wrong, which is said once.
    """

    smallest = 1
    narrow: tuple[torch.dtype, ...]
    failed = False

    @abstractmethod
    def _run(self, name: str, device: torch.device, elements: int, count: int, sizes: Any, *arguments: Any) -> bool:
        """Run a function of `passes.cpp`.

        Args:
            name: Its name there, without the prefix.
            device: Where the tensors are.
            elements: How many they have together.
            count: How many tensors there are.
            sizes: Number of elements of each.
            arguments: The others in its order, but for the last: arrays and structures of ctypes, numbers, flags, and
                a dtype in place of whether it is a narrow one.
        """

    def sample(
        self,
        theta: Tensor,
        mean: Tensor,
        hess: Tensor,
        words: Tensor,
        ess: float,
        weight_decay: float,
        keep: bool = True,
    ) -> bool:
        """Run `passes.sample_lanes` on a whole tensor; see there."""
        return self.sample_all([theta], [mean], [hess], [int(words[2])], words, ess, weight_decay, keep)

    def sample_all(
        self,
        thetas: Sequence[Tensor],
        means: Sequence[Tensor],
        hesses: Sequence[Tensor],
        numbers: Sequence[int],
        words: Tensor,
        ess: float,
        weight_decay: float,
        keep: bool = True,
    ) -> bool:
        """Run `passes.sample_lanes` on several, with these numbers in place of the one in `words`."""
        options = float(ess), float(weight_decay), keep, thetas[0].dtype
        indices = (ctypes.c_uint32 * len(numbers))(*numbers)
        return counted(self._run_all("sample", (thetas, means, hesses), indices, key_of(words), *options), thetas)

    def sample_pack(self, pack: Pack, words: Tensor, ess: float, weight_decay: float) -> bool:
        """Run the first pass on the parameters of a pack; their means go into its buffer "mean"."""
        places = [pack.addresses(name) for name in ("params", "mean", "hess")]
        options = float(ess), float(weight_decay), True, torch.float32
        return counted(self._run_pack("sample", pack, *places, pack.numbers, key_of(words), *options), pack.weights)

    def adopt(self, theta: Tensor, mean: Tensor) -> bool:
        """Run `passes.adopt`."""
        return self.adopt_all([theta], [mean])

    def adopt_all(self, thetas: Sequence[Tensor], means: Sequence[Tensor]) -> bool:
        """Run `passes.adopt` on several, whose weights are of one dtype."""
        return counted(self._run_all("adopt", (thetas, means), thetas[0].dtype), means)

    def take_product(self, theta: Tensor, mean: Tensor, grad: Tensor, factor: float, squared: bool) -> bool:
        """Run `passes.take_product`."""
        return self.take_products([theta], [mean], [grad], factor, squared)

    def take_products(
        self,
        thetas: Sequence[Tensor],
        means: Sequence[Tensor],
        grads: Sequence[Tensor],
        factor: float,
        squared: bool,
    ) -> bool:
        """Run `passes.take_product` on several."""
        done = self._run_all("take_product", (thetas, means, grads), float(factor), squared)
        return counted(done, (*thetas, *means))

    def take_pack_product(self, pack: Pack, grads: Sequence[Tensor | None], factor: float, squared: bool) -> bool:
        """Run `passes.take_product` on the parameters of a pack and its buffer "mean"; no gradient is one of zero."""
        places = pack.addresses("params"), pack.addresses("mean"), addresses_of(grads)
        return counted(self._run_pack("take_product", pack, *places, float(factor), squared), pack.weights)

    def add_product(self, total: Tensor, theta: Tensor, mean: Tensor, grad: Tensor, factor: float) -> bool:
        """Run `passes.add_product`; weights and gradient are of one dtype."""
        return self.add_products([total], [theta], [mean], [grad], factor)

    def add_products(
        self,
        totals: Sequence[Tensor],
        thetas: Sequence[Tensor],
        means: Sequence[Tensor],
        grads: Sequence[Tensor],
        factor: float,
    ) -> bool:
        """Run `passes.add_product` on several; weights and gradients are of one dtype."""
        return self._run_all("add_product", (totals, thetas, means, grads), float(factor), thetas[0].dtype)

    def add_pack_product(self, pack: Pack, grads: Sequence[Tensor | None], factor: float) -> bool:
        """Run `passes.add_product` on the parameters of a pack that have a gradient, and its buffer "product"."""
        places = [*(pack.addresses(name) for name in ("product", "params", "mean")), addresses_of(grads)]
        return self._run_pack("add_product", pack, *places, float(factor), torch.float32)

    def subtract_noise(
        self, theta: Tensor, hess: Tensor, grad: Tensor | None, words: Tensor, options: NoiseOptions
    ) -> bool:
        """Run `passes.subtract_noise_lanes` on a whole tensor."""
        if isinstance(options.factor, Tensor):
            grad, options = None if grad is None else grad * options.factor, options._replace(factor=1.0)
        o = options
        rates = *map(float, (o.ess, o.weight_decay, 1.0 - o.beta2, o.factor)), o.first
        index = (ctypes.c_uint32 * 1)(int(words[2]))
        done = self._run_one("subtract_noise", (theta, hess, grad), index, key_of(words), *rates)
        return counted(done, (theta, hess))

    def square(self, total: Tensor, grad: Tensor, factor: float, keep: bool) -> bool:
        """Run `passes.square`."""
        return self._run_one("square", (total, grad), float(factor), keep)

    def square_pack(self, pack: Pack, grads: Sequence[Tensor | None], factor: float, keep: bool) -> bool:
        """Run `passes.square` on the parameters of a pack that have a gradient, and its buffer "product"."""
        return self._run_pack("square", pack, pack.addresses("product"), addresses_of(grads), float(factor), keep)

    def update(self, tensors: UpdateTensors, options: UpdateOptions) -> bool:
        """Run `passes.update`."""
        return self.update_all([tensors], options)

    def update_all(self, tensors: Sequence[UpdateTensors], options: UpdateOptions) -> bool:
        """Run `passes.update` on several, alike in what is None, and in the dtypes of gradients and momenta."""
        columns = list(zip(*tensors, strict=True))
        means, grads, _, momenta, hesses, _ = columns
        given = [None if column[0] is None else column for column in columns]
        done = self._run_all("update", given, reciprocal(options), momenta[0].dtype, grads[0].dtype)
        return counted(done, (*means, *momenta, *hesses))

    def update_pack(self, pack: Pack, members: slice, grads: Sequence[Tensor | None], options: UpdateOptions) -> bool:
        """Run `passes.update` on some parameters of a pack, whose products are in its buffer "product"."""
        names = ["momentum", "hess", *(["prior_mean"] if pack.has_prior else [])]
        params, products, *states = (_some(pack.addresses(name), members) for name in ("params", "product", *names))
        places = [params, addresses_of(grads), products, *states, *([] if pack.has_prior else [None])]
        elements = pack.starts[members.stop] - pack.starts[members.start]
        dtypes = torch.float32, torch.float32
        arguments = len(grads), _some(pack.sizes, members), *places, reciprocal(options), *dtypes
        return counted(self._run("update", pack.weights[0].device, elements, *arguments), pack.weights[members])

    def _run_one(self, name: str, tensors: Sequence[Tensor | None], *arguments: Any) -> bool:
        """Run a function on tensors of the size of the first."""
        return self._run_all(name, [(t,) for t in tensors], *arguments)

    def _run_all(self, name: str, columns: Sequence[Sequence[Any] | None], *arguments: Any) -> bool:
        """Run a function on several; each column has the tensors of one kind, those of the first say the sizes."""
        first = columns[0]
        assert first is not None
        sizes = [t.numel() for t in first]
        places = (None if column is None else addresses_of(column) for column in columns)
        of_each = (ctypes.c_int64 * len(sizes))(*sizes)
        return self._run(name, first[0].device, sum(sizes), len(sizes), of_each, *places, *arguments)

    def _run_pack(self, name: str, pack: Pack, *arguments: Any) -> bool:
        """Run a function on all parameters of a pack."""
        return self._run(name, pack.weights[0].device, pack.starts[-1], len(pack.params), pack.sizes, *arguments)


class Key(ctypes.Structure):
    """What noise is a function of, beside the number of its tensor and its place there: four words of 32 bits."""

    _fields_ = [(name, ctypes.c_int32) for name in ("k0", "k1", "c2", "c3")]


class Reciprocals(ctypes.Structure):
    """`Options` of passes.cpp."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("ess", "weight_decay", "rate1", "rate2")),
        *((name, ctypes.c_float) for name in ("inverse_debias", "clip_radius", "lr", "inverse_divisor")),
        *((name, ctypes.c_int32) for name in ("price", "average")),
    ]


def reciprocal(options: UpdateOptions) -> Reciprocals:
    """Return the options of an update with reciprocals in place of divisors."""
    o = options
    inverse = 1.0 / o.debias, o.clip_radius, o.lr, 1.0 / o.divisor
    return Reciprocals(o.ess, o.weight_decay, 1.0 - o.beta1, 1.0 - o.beta2, *inverse, o.price, o.average)


def counted(done: bool, tensors: Tensor | Sequence[Tensor]) -> bool:
    """Let autograd know of tensors that a pass has written to, if it was done."""
    if done:
        torch.autograd.graph.increment_version(tensors)
    return done


def key_of(words: Tensor) -> Key:
    """Return what noise is a function of beside the number of its tensor, of the output of `noise_words`."""
    k0, k1, _, c2, c3 = words.tolist()
    return Key(k0, k1, c2, c3)


def _some(array: Any, members: slice) -> Any:
    """Return a part of an array of ctypes; the array itself, if it is all."""
    taken = range(*members.indices(len(array)))
    return array if len(taken) == len(array) else (array._type_ * len(taken))(*array[members])
