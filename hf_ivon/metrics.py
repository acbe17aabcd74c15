"""How good and how honest predictions are: pure functions of probabilities and labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Return the share of examples whose most probable class is the label.

    Args:
        probabilities: Class probabilities, (N, C).
        labels: Class numbers, (N,), integer.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: If shapes do not fit, a label is out of range, or a row is not a distribution.

    Examples:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 0]))
        0.5
    """
    _check(probabilities, labels)
    return (probabilities.argmax(-1) == labels).double().mean().item()


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean negative log-probability of the labels.

    Args:
        probabilities: Class probabilities, (N, C).
        labels: Class numbers, (N,), integer.

    Returns:
        Nats per example; infinite if a label has probability 0.

    Raises:
        ValueError: If shapes do not fit, a label is out of range, or a row is not a distribution.

    Examples:
        >>> round(negative_log_likelihood(torch.tensor([[0.5, 0.5]]), torch.tensor([1])), 4)
        0.6931
    """
    _check(probabilities, labels)
    return -probabilities.double().gather(-1, labels[:, None]).log().mean().item()


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean squared distance between the probabilities and the one-hot label, summed over classes.

    Args:
        probabilities: Class probabilities, (N, C).
        labels: Class numbers, (N,), integer.

    Returns:
        Score in [0, 2].

    Raises:
        ValueError: If shapes do not fit, a label is out of range, or a row is not a distribution.

    Examples:
        >>> brier_score(torch.tensor([[0.5, 0.5]]), torch.tensor([1]))
        0.5
    """
    _check(probabilities, labels)
    one_hot = torch.nn.functional.one_hot(labels, probabilities.shape[-1])
    return (probabilities.double() - one_hot).square().sum(-1).mean().item()


def expected_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Return the mean gap between confidence and accuracy over bins of equal width, weighted by their counts.

    Args:
        probabilities: Class probabilities, (N, C).
        labels: Class numbers, (N,), integer.
        num_bins: Number of bins over [0, 1], each open at its lower end.

    Returns:
        Error in [0, 1].

    Raises:
        ValueError: If shapes do not fit, a label is out of range, a row is not a distribution, or `num_bins` is below 1.

    Source:
        Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, Equation 3.

    Examples:
        >>> round(expected_calibration_error(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1])), 4)
        0.25
    """
    _check(probabilities, labels)
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1, got {num_bins!r}. 15 is usual.")
    confidence, predicted = probabilities.double().max(-1)
    correct = (predicted == labels).double()
    bins = (confidence * num_bins).ceil().long().sub_(1).clamp_(0, num_bins - 1)
    gap = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins.cpu(), (correct - confidence).cpu())
    return (gap.abs().sum() / len(labels)).item()


def _check(probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.dim() != 2 or labels.shape != probabilities.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"`probabilities` must be (N, C) and `labels` (N,) with N > 0, got {tuple(probabilities.shape)} and "
            f"{tuple(labels.shape)}. Flatten token predictions, and drop ignored labels, first."
        )
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"`labels` must be class numbers below {probabilities.shape[1]}, got {labels.dtype} from "
            f"{labels.min().item()} to {labels.max().item()}. Check the label mapping."
        )
    total = probabilities.double().sum(-1)
    # NaN fails every comparison, so it is caught here as well; 1e-2 leaves room for bf16.
    if not bool(((total - 1.0).abs() < 1e-2).all() and (probabilities >= 0).all()):
        worst = total[(total - 1.0).abs().nan_to_num(math.inf).argmax()].item()
        raise ValueError(f"`probabilities` must sum to 1 in every row, got a sum of {worst!r}. Apply softmax.")
