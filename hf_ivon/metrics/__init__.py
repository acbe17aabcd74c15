"""Metrics of predicted probabilities: how good, how calibrated, how near a reference, and out of the domain."""

from pathlib import Path
from typing import Any

from hf_ivon.metrics.classification import (
    accuracy,
    adaptive_calibration_error,
    area_under_risk_coverage,
    brier_decomposition,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    top_k_accuracy,
)
from hf_ivon.metrics.detection import out_of_domain_detection
from hf_ivon.metrics.reference import agreement, total_variation, wasserstein_2

__all__ = [
    "NAMES",
    "SCRIPT",
    "accuracy",
    "adaptive_calibration_error",
    "agreement",
    "area_under_risk_coverage",
    "brier_decomposition",
    "brier_score",
    "expected_calibration_error",
    "load",
    "negative_log_likelihood",
    "out_of_domain_detection",
    "top_k_accuracy",
    "total_variation",
    "wasserstein_2",
]

NAMES = tuple(name for name in __all__ if name not in ("NAMES", "SCRIPT", "load"))
SCRIPT = str(Path(__file__).with_name("evaluation.py"))  # for `evaluate.load(SCRIPT, NAME)`


def load(name: str, **options: Any) -> Any:
    """Return a metric as an `evaluate.Metric`, to add batches to, combine, or run over several processes.

    Args:
        name: One of `NAMES`, the functions here. Its `predictions` are rows of probabilities and its `references`
            class numbers, or the rows of a reference; for `out_of_domain_detection` scores, and whether the example is
            of the domain.
        options: Those of `evaluate.Metric`, such as `num_process` and `process_id`.

    Returns:
        The metric; its `compute` gives the function's value under its name, and takes the function's options.

    Raises:
        ImportError: If `evaluate` is not installed.
        ValueError: If there is no metric of that name.
    """
    try:
        from hf_ivon.metrics.evaluation import EvaluationMetric
    except ImportError as err:
        raise ImportError("Metrics as modules need `evaluate`: pip install 'hf_ivon[evaluate]'.") from err
    return EvaluationMetric(config_name=name, **options)
