"""What all figures have in common: their ground, their styles, and how they reach a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours that stand out on white, each with dashes and a marker of its own.
STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#000000", (0, (8, 2)), "v"),
    ("#56B4E9", (0, (3, 1, 1, 1)), "P"),
)
INK = "#222222"


def new_figure(*, width: float, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of a size in inches, with axes one below the other that have a light grid and no box.

    Args:
        width: Of the figure, inches.
        height: Of the figure, inches.
        rows: Number of axes; they share what is drawn along x.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white", layout="constrained")
    panels = list(figure.subplots(rows, sharex=True, squeeze=False, subplot_kw={"facecolor": "white"})[:, 0])
    for axes in panels:
        axes.grid(color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK, labelsize=10)
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
            label.set_color(INK)
    return figure, panels


def label_log(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 times each power of ten, in plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def finish(figure: Figure, axes: Axes, path: str | PathLike[str], title: str | None) -> Path:
    """Add heading and legend, and save."""
    if title:
        axes.set_title(title, loc="left", fontsize=12)
    axes.legend(frameon=False, labelcolor=INK)
    return save(figure, path)


def save(figure: Figure, path: str | PathLike[str]) -> Path:
    """Write a figure; missing directories are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=False)
    return path
