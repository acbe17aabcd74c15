"""Figures of predictions: how calibrated they are, what they are uncertain of, what more samples or weights change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ivon.metrics.classification import check_bins, checked, confidence_bins
from hf_ivon.plots.axes import STYLES, finish, new_figure

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.axes import Axes
    from torch import Tensor

_ROUNDING = 1e-6  # how far below 0 an entropy may be, of probabilities that add up to a little more than 1


def reliability_diagram(
    predictions: Mapping[str, tuple[Tensor, Tensor]],
    path: str | PathLike[str],
    *,
    num_bins: int = 15,
    title: str | None = None,
) -> Path:
    """Draw how often predictions of each confidence are right; on the diagonal they are calibrated.

    Args:
        predictions: Name to probabilities, (N, C), and labels, (N,).
        path: Where to; the ending says the format.
        num_bins: Bins of equal width over the confidence, those of `expected_calibration_error`; empty ones are left
            out.
        title: Heading; None is none.

    Returns:
        The path.

    Raises:
        ValueError: If there is nothing to draw, or probabilities, labels or `num_bins` have a wrong shape, dtype or
            value.
    """
    check_bins(num_bins)
    if not predictions:
        raise ValueError("`predictions` must hold something to draw, got nothing. Predict first.")
    figure, (axes,) = new_figure(width=4.6, height=4.4)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="calibrated")
    for (name, (probabilities, labels)), (colour, dashes, marker) in zip(
        predictions.items(), itertools.cycle(STYLES), strict=False
    ):
        probabilities, labels = checked(probabilities, labels)
        confidence, predicted = probabilities.max(dim=1)
        bins = confidence_bins(confidence, num_bins)
        counts = bins.bincount(minlength=num_bins)
        used = counts > 0
        total = counts[used].double()
        right = (predicted == labels).double()
        mean, share = (bins.bincount(weights=v, minlength=num_bins)[used] / total for v in (confidence, right))
        axes.plot(
            mean.tolist(), share.tolist(), color=colour, linestyle=dashes, marker=marker, markersize=5, label=name
        )
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("Confidence (probability of the likeliest class)")
    axes.set_ylabel("Share of right predictions")
    return finish(figure, axes, path, title)


def entropy_histograms(
    entropies: Mapping[str, Tensor], path: str | PathLike[str], *, num_bins: int = 30, title: str | None = None
) -> Path:
    """Draw how uncertain predictions are, in the domain and out of it, as in Figure 3 of the paper.

    Args:
        entropies: Name of the examples to their predictive entropies, (N,), nats.
        path: Where to; the ending says the format.
        num_bins: Bins over the whole range.
        title: Heading; None is none.

    Returns:
        The path.

    Raises:
        ValueError: If there is nothing to draw, or a value is negative or not finite.
    """
    if not entropies or not all(len(values) for values in entropies.values()):
        raise ValueError("`entropies` must hold values for every name, got none. Predict first.")
    for name, values in entropies.items():
        if not values.isfinite().all() or values.min() < -_ROUNDING:
            raise ValueError(
                f"`entropies` must be finite and at least 0, got {values.min().item():.3g} to "
                f"{values.max().item():.3g} for {name!r}. Check the model, and pass entropies, not scores."
            )
    highest = max(float(values.max()) for values in entropies.values())
    highest = highest if highest > 0 else 1.0
    figure, (axes,) = new_figure(width=6.0, height=3.8)
    for (name, values), (colour, dashes, _) in zip(entropies.items(), itertools.cycle(STYLES), strict=False):
        shares = values.double().cpu().clamp_min(0.0).histc(num_bins, 0.0, highest) / len(values)
        edges = [highest * k / num_bins for k in range(num_bins + 1)]
        _histogram(axes, shares.tolist(), edges, name, colour, dashes)
    axes.set_xlabel("Predictive entropy (nats)")
    axes.set_ylabel("Share of examples")
    return finish(figure, axes, path, title)


def sensitivity_histogram(
    scores: Mapping[str, Tensor], path: str | PathLike[str], *, num_bins: int = 40, title: str | None = None
) -> Path:
    """Draw how sensitivities to examples are spread: most are small, and a few stand out, as in Figure 6 of the paper.

    Args:
        scores: Name of the examples to their sensitivities, (N,), at least 0.
        path: Where to; the ending says the format.
        num_bins: Bins over the whole range, equal on the logarithmic scale.
        title: Heading; None is none.

    Returns:
        The path.

    Raises:
        ValueError: If there is nothing to draw, or a value is negative or not finite.
    """
    if not scores or not all(len(values) for values in scores.values()):
        raise ValueError("`scores` must hold values for every name, got none. Estimate sensitivities first.")
    for name, values in scores.items():
        if not values.isfinite().all() or values.min() < 0:
            raise ValueError(f"`scores` must be finite and at least 0, got others for {name!r}. Check the model.")
    highest = max(1e-30, *(float(values.max()) for values in scores.values()))
    lowest = max(highest * 1e-6, min(float(values.min()) for values in scores.values()))
    low, high = math.log10(lowest), math.log10(highest) + 1e-9
    figure, (axes,) = new_figure(width=6.0, height=3.8)
    edges = [10 ** (low + (high - low) * k / num_bins) for k in range(num_bins + 1)]
    for (name, values), (colour, dashes, _) in zip(scores.items(), itertools.cycle(STYLES), strict=False):
        counts = values.double().cpu().clamp_min(lowest).log10_().histc(num_bins, low, high)
        _histogram(axes, counts.tolist(), edges, name, colour, dashes)
    axes.set_xscale("log")
    axes.set_xlabel("Sensitivity (change of the outputs if the example is left out)")
    axes.set_ylabel("Examples")
    return finish(figure, axes, path, title)


def metric_by_samples(
    curves: Mapping[str, Mapping[int, float]],
    path: str | PathLike[str],
    *,
    ylabel: str,
    references: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Path:
    """Draw how a metric gets better with the number of weight samples, as in Figure 4 of the paper.

    Args:
        curves: Name to metric by number of samples, at least 1.
        path: Where to; the ending says the format.
        ylabel: The metric, with its unit.
        references: Name to the metric of what takes no samples, such as the mean; drawn as level lines.
        title: Heading; None is none.

    Returns:
        The path.

    Raises:
        ValueError: If there is nothing to draw, or a number of samples is less than 1.
    """
    if not curves or not all(curves.values()):
        raise ValueError("`curves` must hold a metric for some numbers of samples, got none. Predict first.")
    if (fewest := min(number for by_number in curves.values() for number in by_number)) < 1:
        raise ValueError(
            f"`curves` must be by numbers of samples of at least 1, got {fewest}, which has no place on a logarithmic "
            f"axis. Pass what takes no samples in `references`."
        )
    figure, (axes,) = new_figure(width=6.0, height=3.8)
    styles = itertools.cycle(STYLES)
    for (name, by_number), (colour, dashes, marker) in zip(curves.items(), styles, strict=False):
        points = sorted(by_number.items())
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, marker=marker, markersize=5, label=name)
    for (name, value), (colour, dashes, _) in zip((references or {}).items(), styles, strict=False):
        axes.axhline(value, color=colour, linestyle=dashes, linewidth=1.2, label=name)
    axes.set_xscale("log", base=2)
    numbers = sorted({number for by_number in curves.values() for number in by_number})
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel("Weight samples")
    axes.set_ylabel(ylabel)
    return finish(figure, axes, path, title)


def trade_offs(
    points: Sequence[Mapping[str, float]], best: Sequence[bool], path: str | PathLike[str], *, title: str | None = None
) -> Path:
    """Draw what merges with different weights reach on each data set; those on the Pareto front stand out.

    Two data sets are the axes; more are side by side, one line a merge.

    Args:
        points: The metric by data set, one mapping a merge.
        best: Whether a merge is on the front.
        path: The figure's file, such as `sweep.png`.
        title: Above the figure.

    Returns:
        The file.

    Raises:
        ValueError: If there is no point or no data set.
    """
    names = list(points[0]) if points else []
    if not names:
        raise ValueError("`points` must hold metrics to draw, got none. Evaluate at least one merge.")
    figure, (axes,) = new_figure(width=6.4, height=4.0)
    rows = [[point[name] for name in names] for point in points]
    others = [row for row, is_best in zip(rows, best, strict=True) if not is_best]
    front = sorted(row for row, is_best in zip(rows, best, strict=True) if is_best)
    if len(names) == 2:
        axes.scatter(*zip(*others, strict=True), color="#999999", s=18, label="dominated") if others else None
        axes.plot(*zip(*front, strict=True), "o-", color="#0072B2", markersize=5, label="Pareto front")
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
    else:
        for color, lines, label in (("#999999", others, "dominated"), ("#0072B2", front, "Pareto front")):
            for i, row in enumerate(lines):
                axes.plot(range(len(names)), row, "o-", color=color, markersize=4, label=label if i == 0 else None)
        axes.set_xticks(range(len(names)), names)
    return finish(figure, axes, path, title)


def _histogram(
    axes: Axes, heights: Sequence[float], edges: Sequence[float], name: str, colour: str, dashes: Any
) -> None:
    axes.stairs(heights, edges, color=colour, linestyle=dashes, linewidth=1.8, label=name)
    axes.stairs(heights, edges, color=colour, alpha=0.15, fill=True)
