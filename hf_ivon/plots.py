"""Figures, written to files; nothing here touches pyplot, a display or matplotlib's settings.

Every figure has an opaque white ground, so that it also reads on a dark screen, and tells its lines apart by dashes
and markers as well as by colours that colour-blind readers can tell apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ivon.metrics.classification import check_bins, checked, confidence_bins
from hf_ivon.parts import layer_of

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from torch import Tensor

    from hf_ivon.posterior import Posterior

# Okabe and Ito's colours that stand out on white, each with dashes and a marker of its own.
_STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#000000", (0, (8, 2)), "v"),
    ("#56B4E9", (0, (3, 1, 1, 1)), "P"),
)
_INK = "#222222"
_ROUNDING = 1e-6  # how far below 0 an entropy may be, of probabilities that add up to a little more than 1
_MAX_ELEMENTS = 1_000_000  # weights of one layer that a quantile looks at, evenly spread


def training_curves(
    histories: Mapping[str, Sequence[tuple[float, float]]],
    path: str | PathLike[str],
    *,
    xlabel: str = "Optimizer step",
    ylabel: str = "Validation loss (nats per token)",
    title: str | None = None,
    log_y: bool = False,
) -> Path:
    """Draw how a loss or a perplexity went, one line a run, its last value in the legend.

    Args:
        histories: Name of the run to its points (step, value), in any order; values that are not finite are left out.
        path: Where to; the ending says the format, ``.png``, ``.svg`` or ``.pdf``. Missing directories are made.
        xlabel: What the steps are.
        ylabel: What the values are, with their unit.
        title: Heading; None is none.
        log_y: Whether the values' axis is logarithmic.

    Returns:
        The path.

    Raises:
        ValueError: If there is no run, or a run without a finite value.
    """
    runs = {}
    for name, points in histories.items():
        runs[name] = sorted((step, value) for step, value in points if math.isfinite(value))
    empty = sorted(name for name, points in runs.items() if not points)
    if empty or not runs:
        raise ValueError(
            f"`histories` must hold at least one run, each with a finite value, got "
            f"{'none for ' + ', '.join(map(repr, empty)) if empty else 'no run'}. Log a value before drawing."
        )
    figure, axes = _axes(width=7.0, height=4.3)
    for index, (name, points) in enumerate(runs.items()):
        colour, dashes, marker = _STYLES[index % len(_STYLES)]
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps,
            values,
            color=colour,
            linestyle=dashes,
            marker=marker,
            markersize=4.5,
            markevery=max(1, len(points) // 12),
            linewidth=1.8,
            label=f"{name} (last: {values[-1]:.4g})",
        )
    if log_y:
        axes.set_yscale("log")
        _label_log(axes.yaxis)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return _finish(figure, axes, path, title)


def sigma_per_layer(posterior: Posterior, path: str | PathLike[str], *, title: str | None = None) -> Path:
    """Draw the width of the posterior, layer by layer: the median of σ and the range of 98% of the weights.

    Tensors are one layer if their names agree up to the first number, or, without one, up to the last part.

    Args:
        posterior: What to draw.
        path: Where to; the ending says the format, ``.png``, ``.svg`` or ``.pdf``. Missing directories are made.
        title: Heading; None is none.

    Returns:
        The path.

    Raises:
        ValueError: If the posterior holds no weight.
    """
    import numpy as np
    import torch

    layers: dict[str, list[str]] = {}
    for name in sorted(posterior.names(), key=_natural):
        if posterior.variance[name].numel():
            layers.setdefault(layer_of(name), []).append(name)
    if not layers:
        raise ValueError("`posterior` must hold at least one weight, got none. Take it from a trained optimizer.")
    quantiles = []
    for names in layers.values():
        stride = math.ceil(sum(posterior.variance[name].numel() for name in names) / _MAX_ELEMENTS)
        kept = [posterior.variance[name].flatten()[::stride] for name in names]
        sigma = torch.cat([v.float().cpu().sqrt() for v in kept]).numpy()
        quantiles.append(np.quantile(sigma, (0.01, 0.5, 0.99)))
    low, middle, high = np.stack(quantiles, axis=1)
    figure, axes = _axes(width=7.0, height=1.6 + 0.27 * len(layers))
    rows = range(len(layers))
    axes.hlines(rows, low, high, color=_STYLES[0][0], linewidth=4, alpha=0.45, label="1% to 99% of the weights")
    axes.plot(middle, rows, color=_STYLES[1][0], linestyle="", marker="o", markersize=6, label="median")
    axes.set_xscale("log")
    _label_log(axes.xaxis)
    axes.set_yticks(list(rows), list(layers))
    axes.set_ylim(len(layers) - 0.4, -0.6)  # first layer on top
    axes.set_xlabel("Posterior standard deviation σ (unit of the weights)")
    if title:
        axes.set_title(title, loc="left", fontsize=12)
    figure.legend(frameon=False, loc="outside lower center", ncols=2, labelcolor=_INK)
    return _save(figure, path)


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
    figure, axes = _axes(width=4.6, height=4.4)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="calibrated")
    for (name, (probabilities, labels)), (colour, dashes, marker) in zip(
        predictions.items(), itertools.cycle(_STYLES), strict=False
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
    return _finish(figure, axes, path, title)


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
    figure, axes = _axes(width=6.0, height=3.8)
    for (name, values), (colour, dashes, _) in zip(entropies.items(), itertools.cycle(_STYLES), strict=False):
        shares = values.double().cpu().clamp_min(0.0).histc(num_bins, 0.0, highest) / len(values)
        edges = [highest * k / num_bins for k in range(num_bins + 1)]
        axes.stairs(shares.tolist(), edges, color=colour, linestyle=dashes, linewidth=1.8, label=name)
        axes.stairs(shares.tolist(), edges, color=colour, alpha=0.15, fill=True)
    axes.set_xlabel("Predictive entropy (nats)")
    axes.set_ylabel("Share of examples")
    return _finish(figure, axes, path, title)


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
    figure, axes = _axes(width=6.0, height=3.8)
    styles = itertools.cycle(_STYLES)
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
    return _finish(figure, axes, path, title)


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
    figure, axes = _axes(width=6.4, height=4.0)
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
    return _finish(figure, axes, path, title)


def _natural(name: str) -> list[tuple[int, str]]:
    """Order names so that layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _axes(*, width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of a size in inches, with axes that have a light grid and no box."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white", layout="constrained")
    axes = figure.add_subplot(facecolor="white")
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=10)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(_INK)
    return figure, axes


def _label_log(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 times each power of ten, in plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _finish(figure: Figure, axes: Axes, path: str | PathLike[str], title: str | None) -> Path:
    """Add heading and legend, and save."""
    if title:
        axes.set_title(title, loc="left", fontsize=12)
    axes.legend(frameon=False, labelcolor=_INK)
    return _save(figure, path)


def _save(figure: Figure, path: str | PathLike[str]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=False)
    return path
