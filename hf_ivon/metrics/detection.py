"""Telling examples of the domain from others by how sure a model is."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ivon.metrics.classification import mean


def out_of_domain_detection(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """Return how well a score tells examples of the domain from others.

    Args:
        inside: Score of each example of the domain, (N,), higher where the model is surer, such as the largest
            probability, or the negative entropy.
        outside: Score of each other example, (M,).

    Returns:
        `fpr95`, the share of others that pass a threshold which 95% of the domain pass; `detection_error`, the
        probability of a wrong decision at that threshold if both kinds are equally likely; `auroc`; `aupr_in` and
        `aupr_out`, the average precision with the domain or the others as positives.

    Raises:
        ValueError: If a score is NaN, or there is none.

    Source:
        arXiv:2402.17641, Appendix C.3; Liang et al., arXiv:1706.02690, Section 4.
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.ndim != 1 or not len(scores) or scores.isnan().any():
            raise ValueError(
                f"`{name}` must be scores of shape (examples,) without NaN, got {tuple(scores.shape)} with "
                f"{int(scores.isnan().sum())} NaN. Pass one score an example."
            )
    ours, theirs = inside.detach().double(), outside.detach().double()
    threshold = ours.sort().values[int(0.05 * len(ours))]  # as many as 5% of the domain are below, or fewer
    missed, passed = mean(ours < threshold), mean(theirs >= threshold)
    scores = torch.cat([ours, theirs])
    is_inside = torch.cat([torch.ones_like(ours), torch.zeros_like(theirs)])
    values, group, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()  # half an integer would be fp32, which does not hold the ranks of many examples
    ranks = (last - (counts.double() - 1) / 2)[group]  # of equal scores the average rank
    auroc = (ranks[: len(ours)].sum() - len(ours) * (len(ours) + 1) / 2) / (len(ours) * len(theirs))
    return {
        "fpr95": passed,
        "detection_error": 0.5 * missed + 0.5 * passed,
        "auroc": auroc.item(),
        "aupr_in": _average_precision(group, len(values), is_inside),
        "aupr_out": _average_precision(len(values) - 1 - group, len(values), 1 - is_inside),
    }


def _average_precision(group: Tensor, num: int, positive: Tensor) -> float:
    """Return the average precision of ordered groups of equal scores, numbered from the lowest."""
    zeros = torch.zeros(num, dtype=torch.float64, device=group.device)
    hits = zeros.index_add(0, group, positive).flip(0)
    total = zeros.index_add(0, group, torch.ones_like(positive)).flip(0)
    precision = hits.cumsum(0) / total.cumsum(0)
    return ((hits * precision).sum() / hits.sum()).item()
