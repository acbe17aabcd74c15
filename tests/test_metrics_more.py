"""Top-k, adaptive calibration, Brier's parts, risk and coverage, detection, distances, against other libraries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve, top_k_accuracy_score

from hf_ivon import metrics
from tests.test_metrics import predictions

LABELLED = [
    metrics.top_k_accuracy,
    metrics.adaptive_calibration_error,
    metrics.brier_decomposition,
    metrics.area_under_risk_coverage,
]


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_agrees_with_scikit_learn(k):
    """ImageNet's second number; a tie must not count for all."""
    p, y = predictions(num_classes=7)
    expected = top_k_accuracy_score(y, p.double(), k=k, labels=range(7)) if k < 7 else 1.0
    assert metrics.top_k_accuracy(p, y, k=k) == pytest.approx(expected, abs=0)
    even = torch.full((7, 7), 1 / 7)
    assert metrics.top_k_accuracy(even, torch.arange(7), k=k) == pytest.approx(min(k, 7) / 7)


def test_adaptive_bins_hold_equally_many():
    """Against the definition by numpy: sorted, cut into equal parts, the gaps weighted by their sizes."""
    p, y = predictions(num_examples=503)
    confidence, predicted = (t.numpy() for t in p.double().max(1))
    hit = (predicted == y.numpy()).astype(float)
    order = np.argsort(confidence, kind="stable")
    parts = zip(np.array_split(hit[order], 15), np.array_split(confidence[order], 15), strict=True)
    expected = sum(len(h) * abs(h.mean() - c.mean()) for h, c in parts) / 503
    assert metrics.adaptive_calibration_error(p, y) == pytest.approx(expected, abs=1e-12)
    assert metrics.adaptive_calibration_error(p[:3], y[:3], num_bins=15) >= 0


def test_adaptive_bins_do_not_hang_on_the_order_of_the_data():
    """Examples of one confidence are cut anywhere into bins: sorted labels would look far worse than mixed ones."""
    tied = torch.tensor([[0.7, 0.3]] * 4)
    for labels in ([0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1]):
        found = metrics.adaptive_calibration_error(tied, torch.tensor(labels), num_bins=2)
        assert found == pytest.approx(0.2), "half are right, of all as of each bin"
    p, y = predictions(300)
    p = torch.softmax((p * 5).round(), dim=1)  # few confidences, so many ties
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    found = metrics.adaptive_calibration_error(p[order], y[order])
    assert found == pytest.approx(metrics.adaptive_calibration_error(p, y), abs=1e-12)


@given(st.integers(1, 50), st.integers(2, 5), st.integers(0, 1000), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_briers_parts_add_up(num_examples, num_classes, seed, num_bins):
    """The decomposition is exact, and its first three parts are what they are called."""
    p, y = predictions(num_examples, num_classes, seed)
    parts = metrics.brier_decomposition(p, y, num_bins=num_bins)
    total = parts["reliability"] - parts["resolution"] + parts["uncertainty"] + parts["within_bins"]
    assert total == pytest.approx(metrics.brier_score(p, y), abs=1e-9)
    rates = torch.bincount(y, minlength=num_classes).double() / num_examples
    assert parts["uncertainty"] == pytest.approx(float((rates * (1 - rates)).sum()), abs=1e-12)
    assert parts["reliability"] >= 0
    assert -1e-12 <= parts["resolution"] <= parts["uncertainty"] + 1e-12


def test_brier_of_the_base_rate_and_of_the_truth():
    """Who always says the base rate is calibrated and knows nothing; who always says the truth resolves all."""
    y = torch.tensor([0, 0, 0, 1])
    parts = metrics.brier_decomposition(torch.tensor([[0.75, 0.25]]).expand(4, 2), y)
    assert parts == pytest.approx(
        {"reliability": 0, "resolution": 0, "uncertainty": 0.375, "within_bins": 0}, abs=1e-9
    )
    parts = metrics.brier_decomposition(torch.eye(2)[y], y)
    assert parts["resolution"] == parts["uncertainty"] == 0.375


def test_risk_and_coverage_by_hand_and_with_ties():
    """The order within examples of one confidence must not matter: the data's order is an accident."""
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]])
    assert metrics.area_under_risk_coverage(p, torch.tensor([0, 1, 0])) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    tied = torch.tensor([[0.7, 0.3]] * 4)
    for labels in ([0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]):
        assert metrics.area_under_risk_coverage(tied, torch.tensor(labels)) == pytest.approx(0.25)
    p, y = predictions(300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert metrics.area_under_risk_coverage(p[order], y[order]) == pytest.approx(
        metrics.area_under_risk_coverage(p, y)
    )
    assert metrics.area_under_risk_coverage(torch.eye(3), torch.arange(3)) == 0


@pytest.mark.parametrize("digits", [9, 1])
@pytest.mark.parametrize(("num_in", "num_out"), [(200, 300), (1, 5), (7, 1)])
def test_detection_agrees_with_scikit_learn(num_in, num_out, digits):
    """Rounded to one digit, most scores are ties."""
    generator = torch.Generator().manual_seed(num_in)
    inside = (torch.rand(num_in, generator=generator, dtype=torch.float64) ** 0.5).round(decimals=digits)
    outside = torch.rand(num_out, generator=generator, dtype=torch.float64).round(decimals=digits)
    found = metrics.out_of_domain_detection(inside, outside)
    truth, scores = np.r_[np.ones(num_in), np.zeros(num_out)], torch.cat([inside, outside]).numpy()
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, scores))
    assert found["aupr_in"] == pytest.approx(average_precision_score(truth, scores))
    assert found["aupr_out"] == pytest.approx(average_precision_score(1 - truth, -scores))
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    first = int(np.argmax(tpr >= 0.95))
    assert found["fpr95"] == pytest.approx(fpr[first])
    assert found["detection_error"] == pytest.approx(0.5 * (1 - tpr[first]) + 0.5 * fpr[first])


def test_detection_at_the_extremes():
    """Perfect, reversed and constant scores have known values."""
    low, high = torch.zeros(20), torch.ones(20)
    best = {"fpr95": 0, "detection_error": 0, "auroc": 1, "aupr_in": 1, "aupr_out": 1}
    assert metrics.out_of_domain_detection(high, low) == pytest.approx(best)
    assert metrics.out_of_domain_detection(low, high)["auroc"] == 0
    same = {"fpr95": 1, "detection_error": 0.5, "auroc": 0.5, "aupr_in": 0.5, "aupr_out": 0.5}
    assert metrics.out_of_domain_detection(low, low) == pytest.approx(same)
    for inside, outside in ((torch.tensor([math.nan]), low), (low, low[:0]), (low[None], low)):
        with pytest.raises(ValueError, match="must be scores of shape"):
            metrics.out_of_domain_detection(inside, outside)


def test_detection_counts_many_examples_exactly():
    """A sum of ranks in fp32 is rounded: for a million examples against ten the area was more than 1."""
    high, low = torch.linspace(1, 2, 1_000_000, dtype=torch.float64), torch.linspace(0, 0.5, 10, dtype=torch.float64)
    assert metrics.out_of_domain_detection(high, low)["auroc"] == 1
    generator = torch.Generator().manual_seed(0)
    inside, outside = torch.randn(300_000, generator=generator) + 1, torch.randn(100, generator=generator)
    labels, scores = np.repeat([1, 0], [len(inside), len(outside)]), torch.cat([inside, outside]).numpy()
    expected = roc_auc_score(labels, scores)
    assert metrics.out_of_domain_detection(inside, outside)["auroc"] == pytest.approx(expected, abs=1e-9)


def test_distances_to_a_reference():
    """Agreement and total variation by hand; the Wasserstein distance where SciPy's first order is also the second."""
    p, q = torch.tensor([[0.7, 0.3], [0.2, 0.8]]), torch.tensor([[0.6, 0.4], [0.9, 0.1]])
    assert metrics.agreement(p, q) == 0.5
    assert metrics.total_variation(p, q) == pytest.approx((0.1 + 0.7) / 2)
    assert metrics.total_variation(p, p) == 0
    samples = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert metrics.wasserstein_2(samples, samples.flip(1) + 2) == pytest.approx(2.0, rel=1e-6)
    moved = [wasserstein_distance(row, row + 2) for row in samples.numpy()]
    assert metrics.wasserstein_2(samples, samples + 2) == pytest.approx(np.mean(moved), rel=1e-6)
    # between normal samples: the distance of the sorted values, sqrt of the mean square
    other = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * 3
    expected = np.sqrt(((np.sort(samples.numpy(), 1) - np.sort(other.numpy(), 1)) ** 2).mean(1)).mean()
    assert metrics.wasserstein_2(samples, other) == pytest.approx(float(expected), rel=1e-6)
    for wrong in (samples[:2], torch.full((3, 50), math.inf)):
        with pytest.raises(ValueError, match="`samples` and `reference` must"):
            metrics.wasserstein_2(samples, wrong)
    with pytest.raises(ValueError, match="must have one shape"):
        metrics.agreement(p, q[:1])


@pytest.mark.parametrize("metric", LABELLED)
def test_bad_arguments_are_named(metric):
    """Logits, NaN or foreign labels would give a plausible number."""
    p, y = torch.full((3, 2), 0.5), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="must be free of NaN"):
        metric(torch.full((3, 2), math.nan), y)
    with pytest.raises(ValueError, match="Apply `softmax` to logits first"):
        metric(torch.tensor([[2.0, -1.0]] * 3), y)
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, 2\), got 2"):
        metric(p, y + 1)


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (metrics.top_k_accuracy, "k"),
        (metrics.adaptive_calibration_error, "num_bins"),
        (metrics.brier_decomposition, "num_bins"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_bad_numbers_are_named(metric, name, value):
    """No bins, or no class, would give a number that means nothing."""
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1"):
        metric(torch.full((3, 2), 0.5), torch.tensor([0, 1, 1]), **{name: value})
