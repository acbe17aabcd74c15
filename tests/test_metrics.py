"""Accuracy, likelihood and calibration against scikit-learn, hand-computed numbers and degenerate input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from hf_ivon.metrics import accuracy, brier_score, expected_calibration_error, negative_log_likelihood

METRICS = [accuracy, brier_score, expected_calibration_error, negative_log_likelihood]


def predictions(num_examples=500, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (2 * torch.randn(num_examples, num_classes, generator=generator)).softmax(dim=1)
    return probabilities, torch.randint(num_classes, (num_examples,), generator=generator)


def ece_by_loop(probabilities, labels, num_bins):
    """The definition, example by example."""
    bins = [[] for _ in range(num_bins)]
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        index = next(b for b in range(num_bins) if confidence <= (b + 1) / num_bins or b == num_bins - 1)
        bins[index].append((float(row.index(confidence) == label), confidence))
    error = 0.0
    for members in filter(None, bins):
        hits, confidences = zip(*members, strict=True)
        error += abs(sum(hits) / len(hits) - sum(confidences) / len(hits)) * len(hits) / len(labels)
    return error


@pytest.mark.parametrize("num_classes", [2, 4, 11])
def test_agree_with_scikit_learn(num_classes):
    """Tables would not be comparable with anyone else's numbers."""
    p, y = predictions(num_classes=num_classes)
    classes = list(range(num_classes))
    rows = p.double() / p.double().sum(dim=1, keepdim=True)
    assert accuracy(p, y) == pytest.approx(accuracy_score(y, p.argmax(dim=1)), abs=0)
    assert negative_log_likelihood(p, y) == pytest.approx(log_loss(y, rows, labels=classes), rel=1e-6)
    brier = brier_score_loss(y, rows, labels=classes, scale_by_half=False)
    assert brier_score(p, y) == pytest.approx(brier, rel=1e-6)


@pytest.mark.parametrize("num_bins", [1, 7, 15])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_calibration_error_agrees_with_the_definition(num_bins, num_classes):
    """Calibration would be measured with other bins than the ones it says."""
    p, y = predictions(num_classes=num_classes)
    assert expected_calibration_error(p, y, num_bins=num_bins) == pytest.approx(ece_by_loop(p, y, num_bins), abs=1e-7)


def test_calibration_error_agrees_with_scikit_learns_curve():
    """An error shared by the function and the loop above would stay hidden."""
    p, y = predictions(num_examples=2000, num_classes=3)
    confidence, predicted = p.double().max(dim=1)
    hit = (predicted == y).numpy()
    fraction, average = calibration_curve(hit, confidence.numpy(), n_bins=15)
    sizes = np.histogram(confidence.numpy(), bins=np.linspace(0, 1, 16))[0]
    expected = float(np.sum(np.abs(fraction - average) * sizes[sizes > 0]) / len(hit))
    assert expected_calibration_error(p, y) == pytest.approx(expected, abs=1e-9)


def test_hand_computed_numbers():
    """A wrong factor (bits, mean over classes, half a Brier score) would go unnoticed."""
    p = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.1, 0.8]])
    y = torch.tensor([0, 0, 2])
    assert accuracy(p, y) == pytest.approx(2 / 3)
    assert negative_log_likelihood(p, y) == pytest.approx(-(math.log(0.7) + math.log(0.3) + math.log(0.8)) / 3)
    assert brier_score(p, y) == pytest.approx((0.14 + 0.86 + 0.06) / 3, abs=1e-6)
    # Two bins: nothing in (0, 0.5]; 0.7 right, 0.6 wrong, 0.8 right in (0.5, 1].
    assert expected_calibration_error(p, y, num_bins=2) == pytest.approx(abs(2 / 3 - 0.7), abs=1e-6)


def test_bins_hold_their_upper_end():
    """Confidences on an edge, 1 above all, would fall out of the sum or into the wrong bin."""
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    y = torch.tensor([1, 0])
    # Bins (0, 0.5] and (0.5, 1]: |1 - 0.5| and |0 - 1|, one example each. In one bin it would be |0.5 - 0.75|.
    assert expected_calibration_error(p, y, num_bins=2) == pytest.approx(0.75)
    assert expected_calibration_error(p, y, num_bins=1) == pytest.approx(0.25)


def test_certain_and_right_is_perfect():
    """A one-hot prediction would give -0, NaN or an index error."""
    p, y = torch.eye(3), torch.arange(3)
    assert accuracy(p, y) == 1.0
    for metric in (negative_log_likelihood, brier_score, expected_calibration_error):
        assert str(metric(p, y)) == "0.0"


@pytest.mark.parametrize(
    ("dtype", "nats"), [(torch.float64, 708.4), (torch.float32, 87.3), (torch.bfloat16, 87.3), (torch.float16, 9.7)]
)
def test_certain_and_wrong_is_finite(dtype, nats):
    """One probability rounded to 0 would make the NLL of a whole data set infinite."""
    p = torch.tensor([[1.0, 0.0]], dtype=dtype)
    y = torch.tensor([1])
    assert negative_log_likelihood(p, y) == pytest.approx(nats, abs=0.1)
    assert brier_score(p, y) == 2.0
    assert expected_calibration_error(p, y) == 1.0
    assert accuracy(p, y) == 0.0


def test_one_example_and_equal_probabilities():
    """A single example, or a tie, would break a squeeze or count twice."""
    p, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    assert accuracy(p, y) == 1.0
    assert accuracy(p, torch.tensor([1])) == 0.0
    assert negative_log_likelihood(p, y) == pytest.approx(math.log(2))
    assert brier_score(p, y) == 0.5
    assert expected_calibration_error(p, y) == 0.5


@given(st.integers(1, 60), st.integers(2, 8), st.integers(0, 10_000), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_ranges_and_order_of_examples(num_examples, num_classes, seed, num_bins):
    """Some shape or bin count would give a value outside its range, or depend on the order of the data."""
    p, y = predictions(num_examples, num_classes, seed)
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    ece = expected_calibration_error(p, y, num_bins=num_bins)
    assert 0 <= ece <= 1
    assert ece == pytest.approx(ece_by_loop(p, y, num_bins), abs=1e-6)
    for metric, highest in ((accuracy, 1), (brier_score, 2), (negative_log_likelihood, 88)):
        assert 0 <= metric(p, y) <= highest
        assert metric(p[order], y[order]) == pytest.approx(metric(p, y), rel=1e-12)


def test_arguments_are_left_alone():
    """Evaluating would change the predictions of the caller."""
    p, y = predictions(5)
    p_before, y_before = p.clone(), y.clone()
    for metric in METRICS:
        metric(p.requires_grad_(), y.int())
    assert torch.equal(p.detach(), p_before)
    assert torch.equal(y, y_before)


P, Y = torch.full((3, 2), 0.5), torch.tensor([0, 1, 1])
NAN = torch.tensor([[0.5, 0.5], [math.nan, 0.5], [0.5, 0.5]])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (NAN, Y, r"`probabilities` must be free of NaN, got NaN in 1 of 3 rows"),
        (P[:, 0], Y, r"`probabilities` must be a float tensor of shape \(examples, classes\).*shape \(3,\)"),
        (P[:, :1], Y, r"and two classes, got torch.float32 of shape \(3, 1\)"),
        (P[:0], Y[:0], r"at least one example"),
        (P.long(), Y, r"must be a float tensor .* got torch.int64"),
        (torch.tensor([[2.0, -1.0]]), Y[:1], r"at least 0 and sum to 1 .* least value of -1 .*Apply `softmax`"),
        (torch.tensor([[0.5, 0.9]]), Y[:1], r"a sum that is off by 0.4"),
        (torch.tensor([[math.inf, 0.0]]), Y[:1], r"a sum that is off by inf"),
        (P, Y[:2], r"`labels` must be integers of shape \(3,\).* got torch.int64 of shape \(2,\)"),
        (P, Y[:, None], r"got torch.int64 of shape \(3, 1\)"),
        (P, Y.float(), r"got torch.float32 of shape \(3,\)"),
        (P, torch.tensor([0, 1, 2]), r"`labels` must be in \[0, 2\), got 2"),
        (P, torch.tensor([0, -100, 1]), r"`labels` must be in \[0, 2\), got -100"),
    ],
)
def test_bad_arguments_are_named(metric, probabilities, labels, message):
    """Logits, NaN or misplaced labels would give a plausible number."""
    with pytest.raises(ValueError, match=message):
        metric(probabilities, labels)


@pytest.mark.parametrize("num_bins", [0, -3, 2.0, True])
def test_bad_number_of_bins(num_bins):
    """No bins would give an error of 0."""
    with pytest.raises(ValueError, match="`num_bins` must be an integer of at least 1"):
        expected_calibration_error(P, Y, num_bins=num_bins)
