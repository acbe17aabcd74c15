"""Many merges with different weights, each looked at in memory: which trade-offs between the tasks there are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn

from hf_ivon.merge.engine import check_pairs, merged_state_dict
from hf_ivon.merge.heads import build_model
from hf_ivon.merge.hessians import limit_prior
from hf_ivon.merge.plan import Plan

Metrics = dict[str, float]
_LOWER_IS_BETTER = ("nll", "mse", "perplexity", "loss")


def sweep(
    plan: Plan, evaluate: Mapping[str, Callable[[nn.Module], Metrics]], *, steps: int = 4, scale: float = 1.0
) -> list[dict[str, Any]]:
    """Merge with all weights on a grid, and evaluate each merge.

    Args:
        plan: What to merge; its weights are not used.
        evaluate: By name of a data set, a function from a model to its metrics, of which the first is the score. With
            separate heads the names are those of the models, and each is called with that model's head.
        steps: Weights are multiples of `scale / steps` that add up to `scale`.
        scale: Sum of the weights.

    Returns:
        One mapping a merge: `weights`; `metrics` by data set; `score`, the average over data sets, higher is better,
        and -inf where one is not a number; `pareto`, whether no other merge is at least as good everywhere and better
        somewhere.

    Raises:
        ValueError: If `steps` or `scale` is not positive, the plan cannot be swept, a posterior does not belong to its
            mean, or a name is none of the heads.
    """
    check_plan(plan, steps, scale)
    check_pairs(plan)
    plan = limit_prior(plan)  # which no weights change
    points: list[dict[str, Any]] = []
    for weights in tqdm(list(grid(len(plan.models), steps)), desc="Sweeping", unit="merge"):
        scaled = [scale * w for w in weights]
        state = merged_state_dict(dataclasses.replace(plan, weights=scaled))
        metrics, model = {}, None
        for name, function in evaluate.items():
            if model is None or plan.separate:
                model = build_model(plan, state, name)
            metrics[name] = function(model)
        scores = [_score(m) for m in metrics.values()]
        points.append({"weights": scaled, "metrics": metrics, "scores": scores, "score": sum(scores) / len(scores)})
    front = pareto([point["scores"] for point in points])
    for point, is_best in zip(points, front, strict=True):
        del point["scores"]
        point["pareto"] = is_best
    return points


def check_plan(plan: Plan, steps: int = 4, scale: float = 1.0) -> None:
    """Make sure that the merges of a plan can be evaluated.

    Args:
        plan: What to merge.
        steps: As for `sweep`.
        scale: As for `sweep`.

    Raises:
        ValueError: If they are no whole models, or a number is not positive.
    """
    if steps < 1 or not 0 < scale <= torch.finfo(torch.float32).max:
        raise ValueError(f"`steps` and `scale` must be positive, got {steps} and {scale}. 4 and 1 are usual.")
    if any(m.is_adapter for m in plan.models):
        raise ValueError(
            "Adapters cannot be merged in a sweep, which evaluates whole models. Fold each into its base model first "
            "(--into-base with one model), or give the weights."
        )
    if plan.dropped and not plan.separate and not plan.kept:
        listed = ", ".join(plan.dropped[:3])
        raise ValueError(
            f"`heads` must not be 'drop' in a sweep, whose models would have new weights at random for {listed}. "
            f"Choose separate or keep:MODEL."
        )


def grid(num: int, steps: int) -> Iterator[list[float]]:
    """Yield all lists of `num` multiples of 1 / `steps` that add up to 1.

    Examples:
        >>> list(grid(2, 2))
        [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """

    def parts(num: int, left: int) -> Iterator[list[int]]:
        if num == 1:
            yield [left]
            return
        for first in range(left, -1, -1):
            yield from ([first, *rest] for rest in parts(num - 1, left - first))

    yield from ([part / steps for part in whole] for whole in parts(num, steps))


def pareto(scores: Sequence[Sequence[float]]) -> list[bool]:
    """Return for each point whether no other is at least as good in all scores and better in one; higher is better.

    Examples:
        >>> pareto([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]])
        [True, True, False]
    """

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))

    return [not any(beats(other, point) for other in scores) for point in scores]


def main_metric(metrics: Metrics) -> tuple[str, float]:
    """Return the name and the value of the metric that a table shows, the first one."""
    return next(iter(metrics.items()))


def _score(metrics: Metrics) -> float:
    name, value = main_metric(metrics)
    if math.isnan(value):  # no comparison would beat it: the worst of all would be chosen
        return -math.inf
    return -value if name in _LOWER_IS_BETTER else value
