"""Figures, written to files; nothing here touches pyplot, a display or matplotlib's settings.

Every figure has an opaque white ground, so that it also reads on a dark screen, and tells its lines apart by dashes
and markers as well as by colours that colour-blind readers can tell apart.
"""

from hf_ivon.plots.predictions import (
    entropy_histograms,
    metric_by_samples,
    reliability_diagram,
    sensitivity_histogram,
    trade_offs,
)
from hf_ivon.plots.training import posterior_curves, sigma_per_layer, training_curves

__all__ = [
    "entropy_histograms",
    "metric_by_samples",
    "posterior_curves",
    "reliability_diagram",
    "sensitivity_histogram",
    "sigma_per_layer",
    "trade_offs",
    "training_curves",
]
