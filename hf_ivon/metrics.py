"""How good predicted probabilities are: accuracy, likelihood, calibration. Pure functions of tensors.

Every function takes `probabilities` of shape (N, C), one row an example, and `labels` of shape (N,), class numbers.
Both are checked; logits, NaN and labels that do not fit are errors. Sums are taken in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Softmax in bfloat16 rounds every entry to 3 digits; logits miss a sum of 1 by far more than that.
_SUM_TOLERANCE = 1e-2


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Return the share of examples whose likeliest class is the label; of equally likely ones the first counts.

    Args:
        probabilities: Predicted probabilities, (N, C), any float dtype.
        labels: True classes, (N,), integers in [0, C).

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: If an argument has a wrong shape, dtype or value; the message says which.

    Examples:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 0]))
        0.5
    """
    probabilities, labels = _checked(probabilities, labels)
    return _mean(probabilities.argmax(dim=1) == labels)


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    r"""Return the average of :math:`-\log p(\text{label})`.

    A label's probability of 0 counts as the smallest normal number of the dtype of `probabilities`, so that the result
    is finite: at most 708 nats an example for fp64, 87 for fp32 and bf16, 9.7 for fp16.

    Args:
        probabilities: Predicted probabilities, (N, C), any float dtype.
        labels: True classes, (N,), integers in [0, C).

    Returns:
        Negative log-likelihood, nats per example, not negative.

    Raises:
        ValueError: If an argument has a wrong shape, dtype or value; the message says which.

    Examples:
        >>> round(negative_log_likelihood(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 0])), 4)
        1.0397
    """
    smallest = torch.finfo(probabilities.dtype).tiny if probabilities.is_floating_point() else 0.0
    probabilities, labels = _checked(probabilities, labels)
    of_label = probabilities.gather(1, labels[:, None]).clamp(min=smallest, max=1.0)
    return _mean(of_label.log().neg()) + 0.0  # + 0.0: not "-0.0" where every probability is 1


def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, num_bins: int = 15) -> float:
    r"""Return the expected calibration error of the likeliest class.

    .. math:: \sum_b \frac{n_b}{N} |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    The bins divide (0, 1] evenly and hold their upper end, so that a confidence of exactly 1 is in the last one.

    Args:
        probabilities: Predicted probabilities, (N, C), any float dtype.
        labels: True classes, (N,), integers in [0, C).
        num_bins: Number of bins.

    Returns:
        Expected calibration error in [0, 1].

    Raises:
        ValueError: If an argument has a wrong shape, dtype or value; the message says which.

    Source:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599, Equation 3.

    Examples:
        >>> round(expected_calibration_error(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1])), 4)
        0.4
    """
    if not isinstance(num_bins, int) or isinstance(num_bins, bool) or num_bins < 1:
        raise ValueError(f"`num_bins` must be an integer of at least 1, got {num_bins!r}. 15 is usual.")
    probabilities, labels = _checked(probabilities, labels)
    confidence, predicted = probabilities.max(dim=1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=confidence.device)
    bins = torch.bucketize(confidence, edges[1:-1])
    gaps = torch.zeros_like(edges[1:]).index_add_(0, bins, (predicted == labels).double() - confidence)
    return (gaps.abs().sum() / len(labels)).item()


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    r"""Return the Brier score, the average over examples of :math:`\sum_c (p_c - [c = \text{label}])^2`.

    It is the score of the original paper, summed over all classes: for two classes twice the one of
    `sklearn.metrics.brier_score_loss`.

    Args:
        probabilities: Predicted probabilities, (N, C), any float dtype.
        labels: True classes, (N,), integers in [0, C).

    Returns:
        Brier score in [0, 2].

    Raises:
        ValueError: If an argument has a wrong shape, dtype or value; the message says which.

    Source:
        Brier, "Verification of forecasts expressed in terms of probability", 1950, Equation 2.

    Examples:
        >>> brier_score(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 0]))
        0.25
    """
    probabilities, labels = _checked(probabilities, labels)
    errors = probabilities.scatter_add(1, labels[:, None], torch.full_like(probabilities[:, :1], -1.0))
    return _mean(errors.square().sum(dim=1))


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _checked(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities in fp64 and labels in int64, on one device, or say what is wrong with them."""
    shape = tuple(probabilities.shape)
    if probabilities.ndim != 2 or shape[0] < 1 or shape[1] < 2 or not probabilities.is_floating_point():
        raise ValueError(
            f"`probabilities` must be a float tensor of shape (examples, classes) with at least one example and two "
            f"classes, got {probabilities.dtype} of shape {shape}. Pass one row of class probabilities per example."
        )
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != shape[:1] or not integers:
        raise ValueError(
            f"`labels` must be integers of shape ({shape[0]},), one per row of `probabilities`, got {labels.dtype} of "
            f"shape {tuple(labels.shape)}. Pass class numbers."
        )
    probabilities, labels = probabilities.detach().double(), labels.to(probabilities.device, torch.int64)
    if probabilities.isnan().any():
        raise ValueError(
            f"`probabilities` must be free of NaN, got NaN in {int(probabilities.isnan().any(dim=1).sum())} of "
            f"{shape[0]} rows. Check the model that predicted them."
        )
    off = (probabilities.sum(dim=1) - 1).abs().max().item()
    if probabilities.min() < 0 or not off <= _SUM_TOLERANCE:
        raise ValueError(
            f"`probabilities` must be at least 0 and sum to 1 in every row, got a least value of "
            f"{probabilities.min().item():.3g} and a sum that is off by {off:.3g}. Apply `softmax` to logits first."
        )
    if labels.min() < 0 or labels.max() >= shape[1]:
        wrong = labels[(labels < 0) | (labels >= shape[1])][0].item()
        raise ValueError(
            f"`labels` must be in [0, {shape[1]}), got {wrong}. Leave out examples without a label, and check that "
            f"the model has a class for every label."
        )
    return probabilities, labels
