"""Metrics of predicted probabilities: how good, how calibrated, how near a reference, and out of the domain."""

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
    "accuracy",
    "adaptive_calibration_error",
    "agreement",
    "area_under_risk_coverage",
    "brier_decomposition",
    "brier_score",
    "expected_calibration_error",
    "negative_log_likelihood",
    "out_of_domain_detection",
    "top_k_accuracy",
    "total_variation",
    "wasserstein_2",
]
