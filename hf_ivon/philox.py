"""Philox4x32: normal draws that are a function of a counter and a key, the same on every device.

Nothing is drawn in sequence, so any part of the noise can be made alone: a shard's, a piece of a tensor, a tensor of a
pack. Written in torch's integer operations, the same lines run eagerly and compiled.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 7  # the fewest that pass BigCrush


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = _ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four random words for each counter.

    Args:
        counter: Four words, int64 tensors that broadcast, values in [0, 2**32).
        key: Two words, alike.
        rounds: Number of rounds.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).

    Source:
        Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # `>>` of an int64 keeps the sign: the mask comes after it. It also takes away what the other words, which are
        # the lower halves of products, have above their 32 bits.
        c0, c1 = ((p1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_MASK), p1
        c2, c3 = ((p0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_MASK), p0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent standard normal draws from two random words.

    Args:
        first: Random words, int64 in [0, 2**32), any shape.
        second: Random words, shape of `first`.

    Returns:
        Two fp32 tensors of that shape; no draw is beyond 5.9.
    """
    radius = (first >> 8).to(torch.float32).add_(0.5).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    # A quarter of the angle, in (-pi/4, pi/4): there two short polynomials give sine and cosine (Cephes' sinf, cosf),
    # and two doublings lead back. Compiled, that is faster than a library's sine and cosine of any argument.
    quarter = (second >> 8).to(torch.float32).sub_(2.0**23 - 0.5).mul_(2.0**-25 * math.pi)
    square = quarter * quarter
    sine = (square * -1.9515295891e-4).add_(8.3321608736e-3).mul_(square).sub_(1.6666654611e-1)
    sine = sine.mul_(square).add_(1.0).mul_(quarter)
    cosine = (square * 2.443315711809948e-5).sub_(1.388731625493765e-3).mul_(square).add_(4.166664568298827e-2)
    cosine = cosine.mul_(square).sub_(0.5).mul_(square).add_(1.0)
    half_sine, half_cosine = cosine.mul_(sine).mul_(2.0), (sine * sine).mul_(-2.0).add_(1.0)
    first_draw = (half_sine * half_sine).mul_(-2.0).add_(1.0).mul_(radius)
    return first_draw, half_cosine.mul_(half_sine).mul_(2.0).mul_(radius)


def normal_lanes(columns: Tensor, words: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four standard normal draws for each column of a tensor's noise.

    A tensor of n elements has ceil(n / 4) columns; flattened, its noise is the four lanes one after another.

    Args:
        columns: Column numbers, int64, shape (W,).
        words: Output of `noise_words`, int64, shape (5,); or five tensors that broadcast with `columns`, which may
            then be of several tensors.

    Returns:
        Four fp32 tensors of shape (W,).
    """
    k0, k1, c1, c2, c3 = words
    w0, w1, w2, w3 = philox4x32((columns, c1, c2, c3), (k0, k1))
    return *box_muller(w0, w1), *box_muller(w2, w3)


def noise_words(key: tuple[int, ...], index: int) -> Tensor:
    """Return what makes a tensor's noise its own: four words that are a function of the key, and its number.

    Args:
        key: 64-bit integers; keys that differ in one bit give words that differ everywhere.
        index: Number of the tensor, in [0, 2**32).

    Returns:
        Five integers in [0, 2**32), int64, on the CPU: Philox's key, and the last three words of its counter.
    """
    k0, k1, c2, c3 = _digest(key)
    return torch.tensor([k0, k1, index, c2, c3])


@functools.lru_cache(maxsize=16)
def _digest(key: tuple[int, ...]) -> tuple[int, ...]:
    return struct.unpack("<4I", hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=16).digest())


def normal_range(start: int, stop: int, total: int, words: Tensor) -> Tensor:
    """Return a range of a tensor's noise, the same whatever the range is.

    Args:
        start: First element of the range, counted in the flattened tensor.
        stop: End of the range.
        total: Number of elements of the whole tensor.
        words: Output of `noise_words`, int64, shape (5,), on the device to draw on.

    Returns:
        Standard normal draws, fp32, shape (stop - start,).
    """
    width = -(-total // 4)
    pieces = []
    for lane in range(4):
        begin, end = max(start, lane * width), min(stop, (lane + 1) * width)
        if begin < end:
            columns = torch.arange(begin - lane * width, end - lane * width, device=words.device)
            pieces.append(normal_lanes(columns, words)[lane])
    return torch.cat(pieces) if pieces else torch.empty(0, device=words.device)
