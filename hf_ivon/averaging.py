"""Averages of scores over weight samples: logits go in one sample at a time, and logits of the average come out."""

from __future__ import annotations

import torch
from torch import Tensor

# Uncertainties by the function that makes scores of logits.
MEASURES = {
    "softmax": ("entropy", "mutual_information"),
    "sigmoid": ("entropy", "mutual_information"),
    "none": ("variance",),
}


def entropy(probabilities: Tensor) -> Tensor:
    r"""Return the entropy :math:`-\sum_c p_c \log p_c`.

    Args:
        probabilities: Class probabilities, (..., classes).

    Returns:
        Entropy, (...,), nats.

    Examples:
        >>> entropy(torch.tensor([0.5, 0.5]))
        tensor(0.6931)
    """
    return torch.special.entr(probabilities).sum(dim=-1)


class ScoreAverage:
    """The average over weight samples of scores that a function makes of logits.

    Args:
        function: "softmax" over the last axis, "sigmoid" of each logit for itself, or "none", as for numbers.

    Attributes:
        count: Number of weight samples so far.
        mean: Their average score, (..., classes), fp64; 0 of none.
        expected_entropy: The average of their entropies, (...,) for the softmax and (..., classes) for the sigmoid,
            fp64, nats.

    Examples:
        >>> average = ScoreAverage("softmax")
        >>> average.add(torch.tensor([[0.0, 0.0]]))
        >>> average.add(torch.tensor([[1.0, 0.0]]))
        >>> average.logits().softmax(-1)
        tensor([[0.6155, 0.3845]], dtype=torch.float64)
    """

    def __init__(self, function: str) -> None:
        self.function, self.count = function, 0
        self.mean = self.expected_entropy = self._spread = torch.zeros((), dtype=torch.float64)
        self._last = self.mean

    @property
    def variance(self) -> Tensor:
        """The variance over the weight samples of numbers (function "none"), (..., classes), fp64, score²."""
        return self._spread / self.count

    def add(self, logits: Tensor) -> None:
        """Add one weight sample.

        Args:
            logits: Its logits, (..., classes), the same shape each time.
        """
        values = self._scores(logits.double())
        self.count += 1
        change = values - self.mean
        self.mean = self.mean + change / self.count
        if self.function == "none":
            self._spread = self._spread + change * (values - self.mean)
        else:
            surplus = self._entropy_of(values) - self.expected_entropy
            self.expected_entropy = self.expected_entropy + surplus / self.count
        self._last = logits

    def logits(self) -> Tensor:
        """Return logits whose scores are the averaged ones, (..., classes), fp64; of one sample, its own."""
        if self.count == 1:
            return self._last
        if self.function == "none":
            return self.mean
        return self.mean.log() if self.function == "softmax" else self.mean.logit()

    def uncertainties(self) -> dict[str, Tensor]:
        """Return the function's `MEASURES`: (...,) for the softmax, otherwise (..., classes), fp64, nats or score²."""
        if self.function == "none":
            return {"variance": self.variance}
        total = self._entropy_of(self.mean)
        return {"entropy": total, "mutual_information": (total - self.expected_entropy).clamp_min(0.0)}

    def _scores(self, logits: Tensor) -> Tensor:
        if self.function == "none":
            return logits
        return logits.softmax(dim=-1) if self.function == "softmax" else logits.sigmoid()

    def _entropy_of(self, p: Tensor) -> Tensor:
        return entropy(p if self.function == "softmax" else torch.stack([p, 1 - p], dim=-1))
