r"""The rules that make one tensor out of several, one pure function each.

Those that take iterables ask for one model at a time, so that the caller can read it then, and little is in the cache.

Notation: :math:`\theta_0` = `base`, :math:`\theta_t` = `models[t]`, :math:`\alpha_t` = `weights[t]`,
:math:`H_t` = `hessians[t]`, the Hessian of the summed loss of model t, that is N times IVON's `hess`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def average(models: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    r"""Return the weighted average, :math:`\sum_t \alpha_t \theta_t / \sum_t \alpha_t`.

    Args:
        models: Tensors of one shape.
        weights: One number per model; their sum must not be zero.

    Returns:
        Tensor of that shape.

    Examples:
        >>> average([torch.tensor([1.0]), torch.tensor([4.0])], [2.0, 1.0])
        tensor([2.])
    """
    total = float(sum(weights))
    return _sum(models, [w / total for w in weights])


def task_arithmetic(base: Tensor, models: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    r"""Return :math:`\theta_0 + \sum_t \alpha_t (\theta_t - \theta_0)`.

    Args:
        base: Weights that every model was finetuned from.
        models: Tensors of its shape.
        weights: One number per model.

    Returns:
        Tensor of that shape.

    Source:
        Ilharco et al., arXiv:2212.04089, Section 2.

    Examples:
        >>> task_arithmetic(torch.tensor([1.0]), [torch.tensor([2.0]), torch.tensor([5.0])], [1.0, 0.5])
        tensor([4.])
    """
    if _is_one(weights):
        [(_, model)] = _each(weights, models)
        return model.clone()
    return _sum((m - base for m in models), weights).add_(base)


def uncertainty(
    base: Tensor, models: Iterable[Tensor], hessians: Iterable[Tensor], base_hessian: Tensor, weights: Sequence[float]
) -> Tensor:
    r"""Return the minimizer of all losses together, to first order in what separates it from the models.

    Model t minimizes its own loss with the base's, :math:`\ell_t(\theta) + \frac12 \|\theta-\theta_0\|^2_{H_0}`, so
    that :math:`\nabla \ell_t(\theta_t) = -H_0 (\theta_t - \theta_0)`. The merge shall minimize
    :math:`\sum_t \alpha_t \ell_t(\theta) + \frac12 \|\theta-\theta_0\|^2_{H_0}`, so that
    :math:`H_0 (\theta - \theta_0) = -\sum_t \alpha_t \nabla \ell_t(\theta)`. With
    :math:`\nabla \ell_t(\theta) \approx \nabla \ell_t(\theta_t) + H_t (\theta - \theta_t)` this becomes

    .. math:: \theta = \theta_0 + \sum_t \alpha_t (H_0 + \sum_s \alpha_s H_s)^{-1} (H_0 + H_t)(\theta_t - \theta_0)

    One power of :math:`\alpha_t` stands before each model and one in the sum; for :math:`\alpha_t = 1` it is the
    equation of the paper.

    Args:
        base: Weights that every model was finetuned from.
        models: Tensors of its shape.
        hessians: One per model, of its shape, at least 0, loss/param².
        base_hessian: That of the base, of its shape or a single number, at least 0; where all are 0, the base stays.
        weights: One number per model, at least 0.

    Returns:
        Tensor of that shape.

    Source:
        Daheim et al., arXiv:2310.12808, Equation 12; arXiv:2402.17641, Appendix C.5.

    Examples:
        >>> base, one = torch.tensor([0.0]), torch.tensor([1.0])
        >>> uncertainty(base, [one, -one], [3 * one, one], one, [1.0, 1.0])
        tensor([0.4000])
    """
    total, moved = torch.zeros_like(base), torch.zeros_like(base)
    model = base
    for weight, model, hess in _each(weights, models, hessians):
        total.add_(hess, alpha=weight)
        moved.addcmul_(hess + base_hessian, model - base, value=weight)
    total.add_(base_hessian)
    if _is_one(weights):
        return torch.where(total == 0, base, model)
    # Where the total is 0, so is what was moved: the smallest number above 0 divides it, and leaves the other totals.
    limits = torch.finfo(total.dtype)
    return moved.div_(total.clamp_min_(limits.smallest_normal * limits.eps)).add_(base)


def gaussian(
    models: Sequence[Tensor], precisions: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    r"""Return mean and precision of the weighted product of Gaussians, :math:`\prod_t q_t^{\alpha_t}`.

    The precision is :math:`P = \sum_t \alpha_t P_t` and the mean :math:`P^{-1} \sum_t \alpha_t P_t \theta_t`.

    Args:
        models: Means, tensors of one shape.
        precisions: One per model, of that shape, > 0, 1/param².
        weights: One number per model, at least 0, not all 0.

    Returns:
        Mean and precision, tensors of that shape.

    Source:
        arXiv:2412.08147, Section 3.

    Examples:
        >>> one = torch.tensor([1.0])
        >>> gaussian([one, 5 * one], [3 * one, one], [1.0, 1.0])
        (tensor([2.]), tensor([4.]))
    """
    _check_lengths(weights, models, precisions)
    precision = _sum(precisions, weights)
    if _is_one(weights):
        return models[0].clone(), precision
    return _sum([p * m for p, m in zip(precisions, models, strict=True)], weights) / precision, precision


def fisher(models: Sequence[Tensor], hessians: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    r"""Return the average weighted by curvature, :math:`\sum_t \alpha_t H_t \theta_t / \sum_t \alpha_t H_t`.

    Args:
        models: Tensors of one shape.
        hessians: One per model, of that shape, at least 0, loss/param²; where all are 0 the plain average is taken.
        weights: One number per model, at least 0.

    Returns:
        Tensor of that shape.

    Source:
        Matena and Raffel, arXiv:2111.09832, Equation 5.

    Examples:
        >>> one = torch.tensor([1.0, 1.0])
        >>> fisher([one, 5 * one], [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])], [1.0, 1.0])
        tensor([2., 3.])
    """
    _check_lengths(weights, models, hessians)
    if _is_one(weights):
        return models[0].clone()
    total = _sum(hessians, weights)
    weighted = _sum([h * m for h, m in zip(hessians, models, strict=True)], weights)
    return torch.where(total > 0, weighted / total, average(models, weights))


def ties(base: Tensor, models: Sequence[Tensor], weights: Sequence[float], thresholds: Sequence[float]) -> Tensor:
    """Return the base with the models' differences trimmed, their signs elected and the agreeing ones averaged.

    A model with weight 0 has no vote.

    Args:
        base: Weights that every model was finetuned from.
        models: Tensors of its shape.
        weights: One number per model, not all 0.
        thresholds: One per model, param, fp32: smaller differences are trimmed; see `kth_largest_magnitude`.

    Returns:
        Tensor of that shape.

    Raises:
        ValueError: If there is not one weight and one threshold per model, or all weights are 0.

    Source:
        Yadav et al., arXiv:2306.01708; sign election and merge are PEFT's.
    """
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, reshape_weight_task_tensors

    _check_lengths(weights, models, thresholds)
    if not any(weights):
        raise ValueError(f"`weights` must not all be 0, got {list(weights)}: no model has a vote. Give one a weight.")
    voting = [(m - base, w, t) for m, w, t in zip(models, weights, thresholds, strict=True) if w]
    # In fp32, as the thresholds are: of wider numbers the one at the threshold may be below it.
    kept = torch.stack([torch.where(difference.abs().float() >= t, difference, 0.0) for difference, _, t in voting])
    scaled = kept * reshape_weight_task_tensors(kept, torch.tensor([w for _, w, _ in voting], dtype=base.dtype))
    return base + disjoint_merge(scaled, calculate_majority_sign_mask(kept))


def kth_largest_magnitude(blocks: Callable[[], Iterable[Tensor]], k: int) -> float:
    """Return the k-th largest absolute value of a tensor that is given in blocks, exactly, in two passes.

    Args:
        blocks: Returns the blocks, fp32, finite, the same ones in each pass.
        k: At least 1 for a value; 0 gives infinity.

    Returns:
        The value; an fp32 number.
    """
    if k < 1:
        return float("inf")
    # The bits of absolute values are ordered as the values: first the upper half is found, then the lower.
    found, remaining = 0, k
    for shift in (16, 0):
        counts = torch.zeros(2**16, dtype=torch.int64)
        for block in blocks():
            bits = block.abs().reshape(-1).view(torch.int32)
            if not shift:
                bits = bits[(bits >> 16) == found] & 0xFFFF
            counts += torch.bincount(bits >> shift, minlength=2**16)
        above = counts.flip(0).cumsum(0)
        place = int((above < remaining).sum())
        remaining -= int(above[place - 1]) if place else 0
        found = (found << 16 if not shift else 0) + 2**16 - 1 - place
    return float(torch.tensor(found, dtype=torch.int32).view(torch.float32))


def dare(base: Tensor, models: Sequence[Tensor], weights: Sequence[float], density: float, seed: int) -> Tensor:
    """Return the base with the models' differences dropped at random, rescaled and added.

    Args:
        base: Weights that every model was finetuned from.
        models: Tensors of its shape.
        weights: One number per model.
        density: Share of each difference that is kept, in (0, 1].
        seed: Of what is dropped.

    Returns:
        Tensor of that shape.

    Source:
        Yu et al., arXiv:2311.03099, Section 3.
    """
    generator = torch.Generator().manual_seed(seed)  # of its own, so that threads do not share draws
    differences = []
    for model in models:
        kept = torch.rand(base.shape, generator=generator) < density
        differences.append(torch.where(kept, model - base, 0.0).div_(density))
    return base + _sum(differences, weights)


def equal(name: str, models: Sequence[Tensor]) -> Tensor:
    """Return what all models have for a tensor that holds no real numbers, such as the numbers of positions.

    Args:
        name: The tensor's name.
        models: Tensors of one shape, of integers or booleans.

    Returns:
        The tensor; of counters of batches, which no prediction depends on, the largest.

    Raises:
        ValueError: If they differ.
    """
    if all(torch.equal(models[0], m) for m in models[1:]):
        return models[0]
    if name.rpartition(".")[2] == "num_batches_tracked":  # of BatchNorm
        return torch.stack(list(models)).amax(0)
    raise ValueError(
        f"The tensor `{name}` holds no real numbers and differs between the models, so that it cannot be merged. "
        f"Leave one of them out."
    )


def _is_one(weights: Sequence[float]) -> bool:
    """Tell whether the merge is of one model with weight 1, which is that model, to the bit."""
    return list(weights) == [1.0]


def _check_lengths(weights: Sequence[float], *others: Sequence[Any]) -> None:
    if any(len(other) != len(weights) for other in others):
        counts = ", ".join(str(len(other)) for other in others)
        raise ValueError(f"`weights` must be one per model, got {len(weights)} for {counts}. Give as many of each.")


def _sum(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    total: Tensor | None = None
    for weight, tensor in _each(weights, tensors):
        total = tensor * weight if total is None else total.add_(tensor, alpha=weight)
    if total is None:
        raise ValueError("There is nothing to merge. Give at least one model.")
    return total


def _each(weights: Sequence[float], *tensors: Iterable[Tensor]) -> Iterator[tuple[Any, ...]]:
    """Yield each model's weight and tensors; unlike `zip`, which keeps the first ones, hold none of them."""
    readers = [iter(t) for t in tensors]
    for i, weight in enumerate((*weights, None)):
        found = [next(reader, None) for reader in readers]
        if any((part is None) != (weight is None) for part in found):
            raise ValueError(
                f"`weights` must be one per model, got {len(weights)}: model {i} lacks one or the other. Give both."
            )
        if weight is not None:
            yield weight, *found
        del found
