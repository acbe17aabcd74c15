"""The passes of `hf_ivon.passes` in C++, for CPUs: built by the machine's compiler in a second, and kept for others.

What the passes work on is handed over as addresses, any number of tensors in one call. It is the caller who sees to
it that they are contiguous, of one size, of the right dtype and on the CPU; nothing here would notice.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ivon.packs import Pack, addresses_of
from hf_ivon.passes import NoiseOptions, UpdateOptions, UpdateTensors

_SOURCE = Path(__file__).with_name("passes.cpp")
_FLAGS = "-O3 -march=native -std=c++17 -fopenmp -fno-math-errno -fno-trapping-math -shared -fPIC".split()
# So many elements are worth one more thread.
_SHARE = 2**15

# What `Native.sample` works on: sizes, and addresses of weights, means and Hessians.
Prepared = tuple[Any, ...]


class _Options(ctypes.Structure):
    """`Options` of passes.cpp."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("ess", "weight_decay", "rate1", "rate2")),
        *((name, ctypes.c_float) for name in ("inverse_debias", "clip_radius", "lr", "inverse_divisor")),
        *((name, ctypes.c_int32) for name in ("price", "average")),
    ]


class Native:
    """The passes, from the library that `passes.cpp` was built to.

    Attributes:
        smallest: Number of elements below which a pass costs more to call than it saves.
        narrow: Dtypes of weights, and of their gradients, whose means are kept apart in fp32.
        failed: Whether something went wrong; nothing does once it is loaded.

    Raises:
        OSError: If the library cannot be built or loaded.
    """

    smallest = 1
    narrow = (torch.float32, torch.bfloat16)
    failed = False

    def __init__(self) -> None:
        library = build()
        number, factor, pointer, flag = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
        self._sample = library.ivon_sample
        self._sample.argtypes = [number, *[pointer] * 6, factor, factor, flag, flag, flag]
        self._adopt = library.ivon_adopt
        self._adopt.argtypes = [number, *[pointer] * 3, flag, flag]
        self._take_product = library.ivon_take_product
        self._take_product.argtypes = [number, *[pointer] * 4, factor, flag, flag]
        self._add_product = library.ivon_add_product
        self._add_product.argtypes = [number, *[pointer] * 5, factor, flag, flag]
        self._subtract_noise = library.ivon_subtract_noise
        self._subtract_noise.argtypes = [number, *[pointer] * 6, *[factor] * 4, flag, flag]
        self._square = library.ivon_square
        self._square.argtypes = [number, *[pointer] * 3, factor, flag, flag]
        self._update = library.ivon_update
        self._update.argtypes = [number, *[pointer] * 8, flag, flag]

    def prepare(self, theta: Tensor, mean: Tensor, hess: Tensor) -> Prepared:
        """Return what `sample` works on: addresses, which are good while the tensors are there."""
        return _sizes(theta), *(addresses_of([t]) for t in (theta, mean, hess))

    def sample(
        self, theta: Tensor, prepared: Prepared, words: Tensor, ess: float, weight_decay: float, keep: bool = True
    ) -> bool:
        """Run the first pass on a whole tensor; see `Execution.sample_whole`."""
        narrow, threads = theta.dtype == torch.bfloat16, _threads(theta.numel())
        self._sample(1, *prepared, *_words(words), ess, weight_decay, keep, narrow, threads)
        torch.autograd.graph.increment_version(theta)
        return True

    def sample_pack(self, pack: Pack, words: Tensor, ess: float, weight_decay: float) -> None:
        """Run the first pass on the parameters of a pack; their means go into its buffer "mean"."""
        _, key = _words(words)
        places = [pack.addresses(name) for name in ("params", "mean", "hess")]
        count, threads = len(pack.params), _threads(pack.starts[-1])
        self._sample(count, pack.sizes, *places, pack.numbers, key, ess, weight_decay, True, False, threads)
        torch.autograd.graph.increment_version(pack.weights)

    def adopt(self, theta: Tensor, mean: Tensor) -> bool:
        """Run `passes.adopt`."""
        places = (addresses_of([t]) for t in (theta, mean))
        self._adopt(1, _sizes(theta), *places, theta.dtype == torch.bfloat16, _threads(theta.numel()))
        torch.autograd.graph.increment_version(mean)
        return True

    def take_product(self, theta: Tensor, mean: Tensor, grad: Tensor, factor: float, squared: bool) -> bool:
        """Run `passes.take_product`."""
        places = (addresses_of([t]) for t in (theta, mean, grad))
        self._take_product(1, _sizes(theta), *places, factor, squared, _threads(theta.numel()))
        torch.autograd.graph.increment_version((theta, mean))
        return True

    def take_pack_product(self, pack: Pack, grads: Sequence[Tensor | None], factor: float, squared: bool) -> None:
        """Run `passes.take_product` on the parameters of a pack and its buffer "mean"; no gradient is one of zero."""
        places = pack.addresses("params"), pack.addresses("mean"), addresses_of(grads)
        threads = _threads(pack.starts[-1])
        self._take_product(len(pack.params), pack.sizes, *places, factor, squared, threads)
        torch.autograd.graph.increment_version(pack.weights)

    def add_product(self, total: Tensor, theta: Tensor, mean: Tensor, grad: Tensor, factor: float) -> bool:
        """Run `passes.add_product`; weights and gradient are of one dtype."""
        places = (addresses_of([t]) for t in (total, theta, mean, grad))
        narrow, threads = theta.dtype == torch.bfloat16, _threads(theta.numel())
        self._add_product(1, _sizes(theta), *places, factor, narrow, threads)
        return True

    def add_pack_product(self, pack: Pack, grads: Sequence[Tensor | None], factor: float) -> None:
        """Run `passes.add_product` on the parameters of a pack that have a gradient, and its buffer "product"."""
        places = [*(pack.addresses(name) for name in ("product", "params", "mean")), addresses_of(grads)]
        threads = _threads(pack.starts[-1])
        self._add_product(len(pack.params), pack.sizes, *places, factor, False, threads)

    def subtract_noise(
        self, theta: Tensor, hess: Tensor, grad: Tensor | None, words: Tensor, options: NoiseOptions
    ) -> bool:
        """Run `passes.subtract_noise_lanes` on a whole tensor."""
        if grad is not None and isinstance(options.factor, Tensor):
            grad, options = grad * options.factor, options._replace(factor=1.0)
        places = (addresses_of([t]) for t in (theta, hess, grad))
        o, threads = options, _threads(theta.numel())
        rates = o.ess, o.weight_decay, 1.0 - o.beta2, o.factor, o.first, threads
        self._subtract_noise(1, _sizes(theta), *places, *_words(words), *rates)
        torch.autograd.graph.increment_version((theta, hess))
        return True

    def square(self, total: Tensor, grad: Tensor, factor: float, keep: bool) -> bool:
        """Run `passes.square`."""
        places = (addresses_of([t]) for t in (total, grad))
        self._square(1, _sizes(total), *places, factor, keep, _threads(total.numel()))
        return True

    def square_pack(self, pack: Pack, grads: Sequence[Tensor | None], factor: float, keep: bool) -> None:
        """Run `passes.square` on the parameters of a pack that have a gradient, and its buffer "product"."""
        places, threads = (pack.addresses("product"), addresses_of(grads)), _threads(pack.starts[-1])
        self._square(len(pack.params), pack.sizes, *places, factor, keep, threads)

    def update(self, tensors: UpdateTensors, options: UpdateOptions) -> bool:
        """Run `passes.update`."""
        mean, _, _, momentum, hess, _ = tensors
        places = [None if t is None else addresses_of([t]) for t in tensors]
        narrow = momentum.dtype == torch.bfloat16
        self._update(1, _sizes(mean), *places, _options(options), narrow, _threads(mean.numel()))
        torch.autograd.graph.increment_version((mean, momentum, hess))
        return True

    def update_pack(self, pack: Pack, members: slice, grads: Sequence[Tensor | None], options: UpdateOptions) -> None:
        """Run `passes.update` on some parameters of a pack, whose products are in its buffer "product"."""
        names = ["momentum", "hess", *(["prior_mean"] if pack.has_prior else [])]
        params, products, *states = (_some(pack.addresses(name), members) for name in ("params", "product", *names))
        places = [params, addresses_of(grads), products, *states, *([] if pack.has_prior else [None])]
        threads = _threads(pack.starts[members.stop] - pack.starts[members.start])
        self._update(len(grads), _some(pack.sizes, members), *places, _options(options), False, threads)
        torch.autograd.graph.increment_version(pack.weights[members])


def _options(options: UpdateOptions) -> Any:
    o = options
    inverse = 1.0 / o.debias, o.clip_radius, o.lr, 1.0 / o.divisor
    fields = o.ess, o.weight_decay, 1.0 - o.beta1, 1.0 - o.beta2, *inverse, o.price, o.average
    return ctypes.byref(_Options(*fields))


def _sizes(tensor: Tensor) -> Any:
    return (ctypes.c_int64 * 1)(tensor.numel())


def _words(words: Tensor) -> tuple[Any, Any]:
    """Return the number of the tensor, and what its noise is a function of beside it."""
    k0, k1, index, c2, c3 = words.tolist()
    return (ctypes.c_uint32 * 1)(index), (ctypes.c_uint32 * 4)(k0, k1, c2, c3)


def _some(array: Any, members: slice) -> Any:
    """Return a part of an array of ctypes; the array itself, if it is all."""
    taken = range(*members.indices(len(array)))
    return array if len(taken) == len(array) else (array._type_ * len(taken))(*array[members])


def _threads(elements: int) -> int:
    return min(torch.get_num_threads(), 1 + elements // _SHARE)


def build() -> ctypes.CDLL:
    """Return the library that belongs to `passes.cpp`, this processor and the compiler; it is built if there is none.

    It is kept in `$XDG_CACHE_HOME/hf_ivon`, in `~/.cache/hf_ivon` where that is not set, if one can write there.

    Raises:
        OSError: If there is no compiler, or it fails; the message is its first error.
    """
    found = [name for name in ("g++", "c++", "clang++") if shutil.which(name)]
    given = os.environ.get("CXX", "")
    try:
        compiler = shlex.split(given) or found[:1]
    except ValueError as error:
        raise OSError(f"`CXX` must be a command, got {given!r}: {error}") from error
    if not compiler:
        raise OSError("no C++ compiler found")
    command = [*compiler, *_FLAGS]
    # What the compiler defines tells its version, and the processor that `native` is here: a home is often shared.
    machine = _output([*command, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256(b"\0".join([_SOURCE.read_bytes(), " ".join(command).encode(), machine])).hexdigest()
    directory = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "hf_ivon"
    kept = directory / f"passes-{key[:16]}.so"
    if kept.exists():
        with suppress(OSError):  # damaged
            return ctypes.CDLL(str(kept))
    place = None
    if directory.is_absolute():  # else there is no home
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            place = tempfile.TemporaryDirectory(dir=directory)
    with place or tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary) / kept.name
        _output([*command, str(_SOURCE), "-o", str(built)])
        library = ctypes.CDLL(str(built))
        with suppress(OSError):  # the next process builds its own
            with built.open("rb+") as file:
                os.fsync(file.fileno())
            if place is not None:
                built.replace(kept)
    return library


def _output(command: Sequence[str]) -> bytes:
    """Return what a command writes.

    Raises:
        OSError: If it cannot be run or fails.
    """
    ran = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if ran.returncode:
        lines = ran.stderr.decode(errors="replace").splitlines() or [f"exit status {ran.returncode}"]
        raise OSError(next((line for line in lines if "error" in line), lines[0]))
    return ran.stdout
