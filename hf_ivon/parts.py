"""What is done with a posterior's tensors one by one: parts by name, other dtypes, other widths, draws."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_ivon.execution import Execution
from hf_ivon.philox import noise_words
from hf_ivon.posterior_config import PosteriorConfig

_LISTED = 8


def layer_of(name: str) -> str:
    """Return the layer that a tensor belongs to, for tables and figures.

    Args:
        name: The tensor's name.

    Returns:
        The name up to its first number; of a name without one, all but the last part.

    Examples:
        >>> [layer_of(name) for name in ("bert.encoder.layer.0.output.dense.bias", "classifier.weight", "scale")]
        ['bert.encoder.layer.0', 'classifier', 'scale']
    """
    numbered = re.match(r"(?:.*?\.)??\d+(?=\.)", name)
    return numbered.group() if numbered else name.rpartition(".")[0] or name


def names_below(parts: str | Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the names that are meant by names of tensors or modules.

    Args:
        parts: Names of tensors, or of modules, which stand for all tensors below them; a string is one name.
        names: All tensors' names.

    Returns:
        Those of `names` that are one of `parts` or below it, in their order.

    Raises:
        ValueError: If there are no parts, or one is not there; the message says what is.

    Examples:
        >>> names_below(["h.0", "norm"], ["h.0.bias", "h.0.weight", "h.1.bias", "norm"])
        ['h.0.bias', 'h.0.weight', 'norm']
    """
    wanted = {parts} if isinstance(parts, str) else set(parts)
    if not wanted:
        raise ValueError(
            f"`parts` must name a tensor or module, got none. There are {_beside('', names)}. Name some of them."
        )
    below: set[str] = set()
    for part in sorted(wanted):
        found = {name for name in names if name == part or name.startswith(f"{part}.")}
        if not found:
            raise ValueError(
                f"`parts` must name tensors or modules of the posterior, got {part!r}, which it lacks. "
                f"It has {_beside(part, names)}. Name some of them."
            )
        below |= found
    return [name for name in names if name in below]


def _beside(part: str, names: Sequence[str]) -> str:
    """List what is below the deepest module that exists on the way to a name."""
    parent = part
    while parent and not any(name.startswith(f"{parent}.") for name in names):
        parent = parent.rpartition(".")[0]
    depth = parent.count(".") + 2 if parent else 1
    there = {".".join(n.split(".")[:depth]): None for n in names if not parent or n.startswith(f"{parent}.")}
    more = f" and {len(there) - _LISTED} more" if len(there) > _LISTED else ""
    return ", ".join(f"`{name}`" for name in list(there)[:_LISTED]) + more


def config_of_part(config: PosteriorConfig, names: Iterable[str], mean_digest: str) -> PosteriorConfig:
    """Return the configuration of a part of a posterior.

    Args:
        config: That of the whole.
        names: The part's tensors.
        mean_digest: Digest of the mean, of the part or of the whole.

    Returns:
        A new configuration, where settings by tensor name are those of the part.
    """
    kept = set(names)

    def of_part(value: float | dict[str, float]) -> float | dict[str, float]:
        return {name: v for name, v in value.items() if name in kept} if isinstance(value, dict) else value

    return dataclasses.replace(
        config,
        ess=of_part(config.ess),
        weight_decay=of_part(config.weight_decay),
        hess_init=of_part(config.hess_init),
        mean_digest=mean_digest,
    )


def scaled_config(config: PosteriorConfig, ess_scale: float) -> PosteriorConfig:
    """Return the configuration of a posterior whose precision is multiplied by a number, and whose Hessian is not."""
    ess = {n: v * ess_scale for n, v in config.ess.items()} if isinstance(config.ess, dict) else config.ess * ess_scale
    return dataclasses.replace(config, ess=ess)


def converted(name: str, variance: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the variances of one tensor in another dtype.

    Args:
        name: The tensor's name, for the message.
        variance: Its variances, param².
        dtype: A floating-point dtype.

    Returns:
        The variances, same shape; the given tensor itself if it is of this dtype.

    Raises:
        ValueError: If `dtype` is not floating-point, or some variances are outside of its normal numbers: they would
            become 0 or inf, or lose most of their digits.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be floating-point, got {dtype!r}. Use torch.bfloat16 or torch.float32.")
    if variance.dtype == dtype:
        return variance
    if not variance.numel():
        return variance.to(dtype)
    limits = torch.finfo(dtype)
    smallest, largest = (v.item() for v in torch.aminmax(variance))
    if smallest < limits.tiny or largest > limits.max:
        raise ValueError(
            f"`dtype` must hold the variances, but `{name}` has some from {smallest:.3g} to "
            f"{largest:.3g}, and {dtype!r} holds {limits.tiny:.3g} to {limits.max:.3g}: others would become 0, "
            f"inf or inexact. Use torch.bfloat16, which has the range of float32, or torch.float32."
        )
    return variance.to(dtype)


class Draw:
    """One draw of all tensors of a posterior, the same on every device: by the passes that training samples with.

    `torch.compile` is left out: it takes longer than the draws of most predictions.

    Args:
        shapes: Shape of each tensor; more than a million weights are drawn by a fused pass, where there is one.
        generator: On the CPU; its next two numbers say which draw it is. None is torch's global one.
    """

    def __init__(self, shapes: Iterable[Sequence[int]], generator: torch.Generator | None) -> None:
        self._key = tuple(torch.randint(2**63 - 1, (2,), generator=generator).tolist())
        self._execution = Execution(foreach=False, fused=None, compiled=False)
        self._execution.plan(sum(map(math.prod, shapes)))

    @torch.no_grad()
    def tensor(self, index: int, mean: Tensor, variance: Tensor, ess_scale: float) -> Tensor:
        """Return the draw of one tensor.

        Args:
            index: Its number, which its noise is a function of.
            mean: Its mean, any shape, dtype and device.
            variance: Its variance, shape of `mean`, param².
            ess_scale: Factor on the precision.

        Returns:
            The draw, in the shape and dtype and on the device of the mean.
        """
        dtype = torch.promote_types(torch.promote_types(mean.dtype, variance.dtype), torch.float32)
        center = mean.detach().to(dtype).contiguous()
        # A Hessian without a prior, where one example counts for `ess_scale`: the pass then has this precision.
        precision = variance.to(center.device, dtype).reciprocal()
        draw = torch.empty_like(center)
        words = noise_words(self._key, index)
        self._execution.sample(draw, center, precision.contiguous(), words, ess=ess_scale, weight_decay=0.0)
        return draw.to(mean.dtype)
