"""The weight samples of a prediction: in a fixed order, one at a time in the model.

Sample number i of a seed is the same draw however many samples are asked for, and whatever they are used for.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_ivon.mixture import Mixture

if TYPE_CHECKING:
    from hf_ivon.posterior import Posterior


def check_samples(posterior: Posterior | Mixture | None, num_samples: int, seed: int) -> None:
    """Check what every averaged prediction is asked with.

    Args:
        posterior: The posterior; needed unless `num_samples` is 0.
        num_samples: Number of weight samples.
        seed: Chooses them.

    Raises:
        ValueError: If a number is not a whole one in its range, or the posterior is missing.
    """
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 0:
        raise ValueError(
            f"`num_samples` must be an integer of at least 0, got {num_samples!r}. 0 is the mean, 16 is usual."
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be an integer in [0, 2**63), got {seed!r}. Pass a non-negative integer.")
    if posterior is None and num_samples:
        raise ValueError(f"`posterior` must be given for {num_samples} weight samples. Pass 0 to predict at the mean.")


def generator_seed(*key: int) -> int:
    """Return a generator's seed that is a function of a key, different in every bit for keys that differ in one.

    Args:
        key: 64-bit integers.

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_generator(seed: int, index: int) -> torch.Generator:
    """Return the source of weight sample number `index`; hashed, so that neighbouring seeds share no sample."""
    return torch.Generator().manual_seed(generator_seed(seed, index))


def weight_samples(
    model: nn.Module, posterior: Posterior | Mixture | None, *, num_samples: int, seed: int, ess_scale: float = 1.0
) -> Iterator[AbstractContextManager[Any]]:
    """Yield contexts, in each of which the model holds one weight sample; in between it holds its mean.

    Args:
        model: The model.
        posterior: Its posterior, or a mixture, whose components all have their share of the samples.
        num_samples: Number of weight samples; with 0 there is one context, at the mean.
        seed: Chooses the weight samples.
        ess_scale: Factor on the precision, see `Posterior.sampled`.

    Yields:
        Contexts to be entered once, in order.
    """
    if posterior is None or not num_samples:
        yield nullcontext()
        return
    order = posterior.allocation(num_samples) if isinstance(posterior, Mixture) else []
    for index in range(num_samples):
        # Every component of a mixture has its share of the samples, rather than what chance gives it.
        which = {"component": order[index]} if order else {}
        yield posterior.sampled(model, generator=sample_generator(seed, index), ess_scale=ess_scale, **which)
