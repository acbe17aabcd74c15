"""Figures of a training run and of what it learnt: losses, the Hessian and σ as they went, σ layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ivon.parts import layer_of
from hf_ivon.plots.axes import INK, STYLES, finish, label_log, new_figure, save

if TYPE_CHECKING:
    from os import PathLike

    from hf_ivon.posterior import Posterior

_MAX_ELEMENTS = 1_000_000  # weights of one layer that a quantile looks at, evenly spread
# What a record of the log must hold to be drawn, from bottom to top of a band.
_BANDS = {
    "Hessian h over its start": [f"ivon_hess_rel_{q}" for q in ("q01", "q50", "q99")],
    "σ (unit of the weights)": [f"ivon_sigma_{q}" for q in ("q01", "q50", "q99")],
}


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
    figure, (axes,) = new_figure(width=7.0, height=4.3)
    for index, (name, points) in enumerate(runs.items()):
        colour, dashes, marker = STYLES[index % len(STYLES)]
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
        label_log(axes.yaxis)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return finish(figure, axes, path, title)


def posterior_curves(
    log_history: Sequence[Mapping[str, float]], path: str | PathLike[str], *, title: str | None = None
) -> Path:
    """Draw how a run went: the training loss, and below it the Hessian and σ, the median and 98% of the weights.

    Args:
        log_history: The records of a Trainer, as in `trainer.state.log_history` or `trainer_state.json`; those with
            `loss` and IVON's statistics are drawn.
        path: Where to; the ending says the format, ``.png``, ``.svg`` or ``.pdf``. Missing directories are made.
        title: Heading; None is none.

    Returns:
        The path.

    Raises:
        ValueError: If there is no such record.
    """
    needed = ["step", "loss", *(name for names in _BANDS.values() for name in names)]
    records = [r for r in log_history if isinstance(r, Mapping) and all(_is_finite(r.get(name)) for name in needed)]
    if not records:
        raise ValueError(
            "`log_history` must hold records with the training loss and IVON's statistics, got none. Train with "
            "optim='ivon', and log at least once."
        )
    records = sorted(records, key=lambda record: record["step"])
    steps = [record["step"] for record in records]
    marker = "o" if len(records) == 1 else ""
    figure, (top, *panels) = new_figure(width=7.0, height=6.6, rows=1 + len(_BANDS))
    colour, dashes, _ = STYLES[0]
    top.plot(steps, [record["loss"] for record in records], color=colour, linestyle=dashes, marker=marker)
    top.set_ylabel("Training loss (nats)")
    if title:
        top.set_title(title, loc="left", fontsize=12)
    for axes, (label, names) in zip(panels, _BANDS.items(), strict=True):
        low, middle, high = ([record[name] for record in records] for name in names)
        axes.fill_between(steps, low, high, color=STYLES[0][0], alpha=0.3, label="1% to 99% of the weights")
        axes.plot(steps, middle, color=STYLES[1][0], linestyle=STYLES[1][1], marker=marker, label="median")
        if min(low) <= 0:  # as a Hessian may be; around 0 the axis is linear
            axes.set_yscale("symlog", linthresh=max(max(high), 1e-12) / 1e3)
        elif max(high) > 10 * min(low):
            axes.set_yscale("log")
        axes.set_ylabel(label)
    panels[-1].set_xlabel("Optimizer step")
    panels[-1].legend(frameon=False, labelcolor=INK)
    return save(figure, path)


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
    figure, (axes,) = new_figure(width=7.0, height=1.6 + 0.27 * len(layers))
    rows = range(len(layers))
    axes.hlines(rows, low, high, color=STYLES[0][0], linewidth=4, alpha=0.45, label="1% to 99% of the weights")
    axes.plot(middle, rows, color=STYLES[1][0], linestyle="", marker="o", markersize=6, label="median")
    axes.set_xscale("log")
    label_log(axes.xaxis)
    axes.set_yticks(list(rows), list(layers))
    axes.set_ylim(len(layers) - 0.4, -0.6)  # first layer on top
    axes.set_xlabel("Posterior standard deviation σ (unit of the weights)")
    if title:
        axes.set_title(title, loc="left", fontsize=12)
    figure.legend(frameon=False, loc="outside lower center", ncols=2, labelcolor=INK)
    return save(figure, path)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _natural(name: str) -> list[tuple[int, str]]:
    """Order names so that layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
