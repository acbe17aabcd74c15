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


class ScoreAverage:
    """The average over weight samples of scores that a function makes of logits.

    Args:
        function: "softmax" over the last axis, "sigmoid" of each logit for itself, or "none", as for numbers.

    Examples:
        >>> average = ScoreAverage("softmax")
        >>> average.add(torch.tensor([[0.0, 0.0]]))
        >>> average.add(torch.tensor([[1.0, 0.0]]))
        >>> average.logits().softmax(-1)
        tensor([[0.6155, 0.3845]], dtype=torch.float64)
    """

    def __init__(self, function: str) -> None:
        self.function, self.count = function, 0
        self._mean = self._entropy = self._spread = torch.zeros((), dtype=torch.float64)
        self._last = self._mean

    def add(self, logits: Tensor) -> None:
        """Add one weight sample.

        Args:
            logits: Its logits, (..., classes), the same shape each time.
        """
        values = self._scores(logits.double())
        self.count += 1
        change = values - self._mean
        self._mean = self._mean + change / self.count
        self._spread = self._spread + change * (values - self._mean)
        if self.function != "none":
            self._entropy = self._entropy + (self._entropy_of(values) - self._entropy) / self.count
        self._last = logits

    def logits(self) -> Tensor:
        """Return logits whose scores are the averaged ones, (..., classes), fp64; of one sample, its own."""
        if self.count == 1:
            return self._last
        if self.function == "none":
            return self._mean
        return self._mean.log() if self.function == "softmax" else self._mean.logit()

    def uncertainties(self) -> dict[str, Tensor]:
        """Return the function's `MEASURES`: (...,) for the softmax, otherwise (..., classes), fp64, nats or score²."""
        if self.function == "none":
            return {"variance": self._spread / self.count}
        entropy = self._entropy_of(self._mean)
        return {"entropy": entropy, "mutual_information": (entropy - self._entropy).clamp_min(0.0)}

    def _scores(self, logits: Tensor) -> Tensor:
        if self.function == "none":
            return logits
        return logits.softmax(dim=-1) if self.function == "softmax" else logits.sigmoid()

    def _entropy_of(self, p: Tensor) -> Tensor:
        if self.function == "softmax":
            return torch.special.entr(p).sum(dim=-1)
        return torch.special.entr(p) + torch.special.entr(1 - p)
