"""How near predictions are to those of a reference, such as Hamiltonian Monte Carlo."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ivon.metrics.classification import checked, mean


def agreement(probabilities: Tensor, reference: Tensor) -> float:
    """Return the share of examples for which two predictions have the same likeliest class.

    Args:
        probabilities: Predicted probabilities, (N, C), any float dtype.
        reference: Those of a reference, such as Hamiltonian Monte Carlo, (N, C).

    Returns:
        Agreement in [0, 1].

    Raises:
        ValueError: If an argument has a wrong shape, dtype or value; the message says which.

    Source:
        arXiv:2402.17641, Appendix D.3.
    """
    ours, theirs = _pair(probabilities, reference)
    return mean(ours.argmax(dim=1) == theirs.argmax(dim=1))


def total_variation(probabilities: Tensor, reference: Tensor) -> float:
    r"""Return the average over examples of :math:`\frac12 \sum_c |p_c - q_c|`.

    Args:
        probabilities: Predicted probabilities, (N, C), any float dtype.
        reference: Those of a reference, such as Hamiltonian Monte Carlo, (N, C).

    Returns:
        Total variation in [0, 1].

    Raises:
        ValueError: If an argument has a wrong shape, dtype or value; the message says which.

    Source:
        arXiv:2402.17641, Appendix D.3.
    """
    ours, theirs = _pair(probabilities, reference)
    return mean((ours - theirs).abs().sum(dim=1) / 2)


def wasserstein_2(samples: Tensor, reference: Tensor) -> float:
    """Return the 2-Wasserstein distance between predictions of a number, averaged over the examples.

    Args:
        samples: Predictive samples, (N, S), unit of the labels.
        reference: As many samples of a reference, (N, S).

    Returns:
        Distance, unit of the labels.

    Raises:
        ValueError: If the shapes differ, or a value is not finite.

    Source:
        arXiv:2402.17641, Appendix D.3 (the distance of the NeurIPS 2021 competition).

    Examples:
        >>> wasserstein_2(torch.tensor([[1.0, 3.0]]), torch.tensor([[4.0, 2.0]]))
        1.0
    """
    if samples.shape != reference.shape or samples.ndim != 2 or not samples.numel():
        raise ValueError(
            f"`samples` and `reference` must have one shape (examples, samples), got {tuple(samples.shape)} and "
            f"{tuple(reference.shape)}. Draw as many samples of both."
        )
    if not (torch.isfinite(samples).all() and torch.isfinite(reference).all()):
        raise ValueError("`samples` and `reference` must be finite, got NaN or inf. Check the model.")
    ours, theirs = (t.detach().double().sort(dim=1).values for t in (samples, reference))
    return mean((ours - theirs).square().mean(dim=1).sqrt())


def _pair(probabilities: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tables of probabilities in fp64, checked."""
    if probabilities.shape != reference.shape:
        raise ValueError(
            f"`probabilities` and `reference` must have one shape, got {tuple(probabilities.shape)} and "
            f"{tuple(reference.shape)}. Predict the same examples with both."
        )
    zeros = torch.zeros(len(probabilities), dtype=torch.int64, device=probabilities.device)
    return checked(probabilities, zeros)[0], checked(reference, zeros.to(reference.device))[0]
