"""The benchmark of averaged predictions: that all its ways predict, and the same."""

import json

import pytest
import torch

from hf_ivon import Posterior, posterior_predict
from hf_ivon.data import load_batches, load_checkpoint
from recipes import benchmark_prediction
from tests.classifiers import classifiers

__all__ = ["classifiers"]


def test_samples_at_once_are_those_one_after_another(classifiers):
    """A faster way that predicts something else would be no comparison."""
    model, tokenizer = load_checkpoint(classifiers / "films")
    posterior = Posterior.from_pretrained(classifiers / "films", model)
    batches = load_batches(classifiers / "films.jsonl", model, tokenizer)
    found = benchmark_prediction.at_once(model, posterior, batches, 3)
    expected = posterior_predict(model, posterior, batches, num_samples=3).probabilities
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - posterior_predict(model, None, batches, num_samples=0).probabilities).abs().max() > 1e-3


def test_every_way_is_measured(classifiers, capsys):
    """A way that is left out, or is compared with another number of samples, would look free."""
    arguments = [str(classifiers / "films"), "--data", str(classifiers / "films.jsonl"), "--num_samples", "3"]
    arguments += ["--at_once", "2", "--rounds", "2", "--output_dir", str(classifiers / "out")]
    found = benchmark_prediction.main(arguments)
    assert list(found) == ["plain passes", "weight samples", "several at once"]
    assert found["plain passes"]["ratio"] == 1.0
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in found.values())
    assert json.loads((classifiers / "out" / "results.json").read_text()) == found
    assert "several at once" in capsys.readouterr().out


def test_no_samples_are_refused(classifiers):
    """It would divide by nothing, after the first round."""
    arguments = [str(classifiers / "films"), "--data", str(classifiers / "films.jsonl"), "--output_dir", "out"]
    with pytest.raises(ValueError, match="must be at least 1"):
        benchmark_prediction.main([*arguments, "--num_samples", "0"])
