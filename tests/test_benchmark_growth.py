"""The benchmark of growing work runs, and its lines are least squares."""

import json

import numpy as np
import pytest

from recipes import benchmark_growth


def test_every_kind_of_work_is_measured(tmp_path, monkeypatch, capsys):
    """A kind that fails, or a size that is missing, would show after minutes of measuring."""
    monkeypatch.setattr(benchmark_growth, "MILLION", 2**14)
    flags = ["--output_dir", str(tmp_path), "--weights", "1", "2", "--micro_batches", "1", "2", "--samples", "1", "2"]
    found = benchmark_growth.main([*flags, "--processes", "1", "--rounds", "2", "--device", "cpu"])
    assert list(found) == list(benchmark_growth.UNITS)
    assert {name: list(points) for name, points in found["weights"].items()} == {
        "ivon fused": [1, 2],
        "adamw fused": [1, 2],
    }
    # Not positive: what hooks add is a difference of two measurements, and these tensors are small.
    measured = [seconds for kind in found.values() for points in kind.values() for seconds in points.values()]
    assert np.isfinite(measured).all()
    assert json.loads((tmp_path / "results.json").read_text()).keys() == found.keys()
    assert (tmp_path / "growth.png").stat().st_size > 1000
    assert "explained" in capsys.readouterr().out


def test_line_is_least_squares():
    """Against NumPy: a slope of something else would say that work is free, or not in proportion."""
    points = {1: 2.0, 2: 2.9, 4: 5.2, 8: 8.9}
    slope, intercept, explained = benchmark_growth.line(points)
    expected = np.polyfit(list(points), list(points.values()), 1)
    assert (slope, intercept) == pytest.approx(tuple(expected))
    assert explained == pytest.approx(np.corrcoef(list(points), list(points.values()))[0, 1] ** 2)
