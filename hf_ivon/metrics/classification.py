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
    probabilities, labels = checked(probabilities, labels)
    return mean(probabilities.argmax(dim=1) == labels)


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
    probabilities, labels = checked(probabilities, labels)
    of_label = probabilities.gather(1, labels[:, None]).clamp(min=smallest, max=1.0)
    return mean(of_label.log().neg()) + 0.0  # + 0.0: not "-0.0" where every probability is 1


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
    check_bins(num_bins)
    probabilities, labels = checked(probabilities, labels)
    confidence, predicted = probabilities.max(dim=1)
    gaps = torch.zeros(num_bins, dtype=torch.float64, device=confidence.device)
    gaps.index_add_(0, confidence_bins(confidence, num_bins), (predicted == labels).double() - confidence)
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
    probabilities, labels = checked(probabilities, labels)
    errors = probabilities.scatter_add(1, labels[:, None], torch.full_like(probabilities[:, :1], -1.0))
    return mean(errors.square().sum(dim=1))


def top_k_accuracy(probabilities: Tensor, labels: Tensor, *, k: int = 5) -> float:
    """Return the share of examples whose label is among the k likeliest classes.

    Args:
        probabilities: Predicted probabilities, (N, C), any float dtype.
        labels: True classes, (N,), integers in [0, C).
        k: Number of classes, at least 1; from C on the result is 1.

    Returns:
        Top-k accuracy in [0, 1]. Of classes that are equally likely, those with a smaller number come first.

    Raises:
        ValueError: If an argument has a wrong shape, dtype or value; the message says which.

    Examples:
        >>> top_k_accuracy(torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([1]), k=2)
        1.0
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"`k` must be an integer of at least 1, got {k!r}. 5 is usual.")
    probabilities, labels = checked(probabilities, labels)
    order = probabilities.argsort(dim=1, descending=True, stable=True)
    return mean((order[:, :k] == labels[:, None]).any(dim=1))


def adaptive_calibration_error(probabilities: Tensor, labels: Tensor, *, num_bins: int = 15) -> float:
    """Return the expected calibration error with bins that hold equally many examples.

    Examples of one confidence count alike, also in different bins: each is right as often as all of them are.

    Args:
        probabilities: Predicted probabilities, (N, C), any float dtype.
        labels: True classes, (N,), integers in [0, C).
        num_bins: Number of bins; with fewer examples, one bin an example.

    Returns:
        Calibration error in [0, 1].

    Raises:
        ValueError: If an argument has a wrong shape, dtype or value; the message says which.

    Source:
        Nguyen and O'Connor, arXiv:1508.05154, Section 4 (adaptive binning).

    Examples:
        >>> p = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
        >>> round(adaptive_calibration_error(p, torch.tensor([0, 1]), num_bins=2), 4)
        0.35
    """
    check_bins(num_bins)
    probabilities, labels = checked(probabilities, labels)
    confidence, predicted = probabilities.max(dim=1)
    values, group, counts = confidence.unique(return_inverse=True, return_counts=True)
    right = torch.zeros_like(values).index_add_(0, group, (predicted == labels).double()) / counts
    gaps = (right - values).repeat_interleave(counts)  # in the order of confidence
    return sum(abs(part.sum().item()) for part in gaps.tensor_split(min(num_bins, len(gaps)))) / len(labels)


def brier_decomposition(probabilities: Tensor, labels: Tensor, *, num_bins: int = 15) -> dict[str, float]:
    r"""Return the Brier score's parts, :math:`\mathrm{reliability} - \mathrm{resolution} + \mathrm{uncertainty}`.

    The forecasts of each class are put into bins, as for one event against the others. What forecasts of one bin
    differ by is a part of its own, so that the sum is exact.

    Args:
        probabilities: Predicted probabilities, (N, C), any float dtype.
        labels: True classes, (N,), integers in [0, C).
        num_bins: Number of bins of equal width.

    Returns:
        `reliability` (0 is calibrated), `resolution` (higher is better), `uncertainty` (of the labels alone) and
        `within_bins`; reliability - resolution + uncertainty + within_bins is `brier_score`.

    Raises:
        ValueError: If an argument has a wrong shape, dtype or value; the message says which.

    Source:
        Murphy, "A new vector partition of the probability score", 1973; Stephenson et al., 2008, for the last part.
    """
    check_bins(num_bins)
    probabilities, labels = checked(probabilities, labels)
    happened = torch.zeros_like(probabilities).scatter_(1, labels[:, None], 1.0)
    bins = (probabilities * num_bins).long().clamp_max(num_bins - 1)
    bins = bins + num_bins * torch.arange(probabilities.shape[1], device=bins.device)
    size = num_bins * probabilities.shape[1]

    def mean_of_bin(values: Tensor) -> Tensor:
        sums = torch.zeros(size, dtype=torch.float64, device=bins.device).index_add_(
            0, bins.flatten(), values.flatten()
        )
        counts = torch.bincount(bins.flatten(), minlength=size).clamp_min(1)
        return (sums / counts)[bins]

    forecast, frequency = mean_of_bin(probabilities), mean_of_bin(happened)
    base_rate = happened.mean(dim=0)
    parts = {
        "reliability": (forecast - frequency).square(),
        "resolution": (frequency - base_rate).square(),
        "uncertainty": (base_rate * (1 - base_rate)).expand_as(happened),
        "within_bins": (probabilities - happened).square() - (forecast - happened).square(),
    }
    return {name: mean(value.sum(dim=1)) for name, value in parts.items()}


def area_under_risk_coverage(probabilities: Tensor, labels: Tensor) -> float:
    r"""Return the average error rate of the most confident examples, over all numbers of them.

    .. math:: \frac1N \sum_{n=1}^N \mathrm{error\ rate\ of\ the\ } n \mathrm{\ most\ confident}

    Examples of one confidence count alike: each has the error rate of all of them.

    Args:
        probabilities: Predicted probabilities, (N, C), any float dtype.
        labels: True classes, (N,), integers in [0, C).

    Returns:
        Area under the risk-coverage curve, in [0, 1]; 0 if all is right.

    Raises:
        ValueError: If an argument has a wrong shape, dtype or value; the message says which.

    Source:
        Geifman et al., arXiv:1805.08206, Section 3.

    Examples:
        >>> area_under_risk_coverage(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        0.25
    """
    probabilities, labels = checked(probabilities, labels)
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != labels).double()
    _, group = confidence.neg().unique(return_inverse=True)  # numbered from the most confident
    counts = torch.bincount(group)
    rates = torch.zeros(len(counts), dtype=torch.float64, device=wrong.device).index_add_(0, group, wrong) / counts
    expected = rates.repeat_interleave(counts)
    return mean(expected.cumsum(0) / torch.arange(1, len(labels) + 1, device=wrong.device))


def check_bins(num_bins: int) -> None:
    """Raise a ValueError unless `num_bins` is a number of bins."""
    if not isinstance(num_bins, int) or isinstance(num_bins, bool) or num_bins < 1:
        raise ValueError(f"`num_bins` must be an integer of at least 1, got {num_bins!r}. 15 is usual.")


def confidence_bins(confidence: Tensor, num_bins: int) -> Tensor:
    """Return the bin of each confidence, (N,), integers; bins divide (0, 1] evenly and hold their upper end."""
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=confidence.device)
    return torch.bucketize(confidence, edges[1:-1])


def mean(values: Tensor) -> float:
    """Return the mean in fp64, as a number."""
    return values.double().mean().item()


def checked(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
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
