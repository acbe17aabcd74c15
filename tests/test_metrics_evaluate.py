"""The metrics as modules of `evaluate`: the same numbers as the functions, without the network."""

import json
import os
import subprocess
import sys

import evaluate
import pytest
import torch

from hf_ivon import metrics

GENERATOR = torch.Generator().manual_seed(0)
PROBABILITIES = torch.rand(40, 3, generator=GENERATOR, dtype=torch.float64).softmax(1)
LABELS = torch.randint(3, (40,), generator=GENERATOR)
REFERENCE = torch.rand(40, 3, generator=GENERATOR, dtype=torch.float64).softmax(1)
INSIDE = torch.arange(40) % 3 > 0
OPTIONS = {"expected_calibration_error": {"num_bins": 7}, "top_k_accuracy": {"k": 2}}


def inputs(name):
    """Return predictions and references of a metric, and the function's own arguments."""
    if name in ("agreement", "total_variation", "wasserstein_2"):
        return PROBABILITIES, REFERENCE, (PROBABILITIES, REFERENCE)
    if name == "out_of_domain_detection":
        scores = PROBABILITIES.amax(1)
        return scores, INSIDE, (scores[INSIDE], scores[~INSIDE])
    return PROBABILITIES, LABELS, (PROBABILITIES, LABELS)


def expected(name):
    value = getattr(metrics, name)(*inputs(name)[2], **OPTIONS.get(name, {}))
    return value if isinstance(value, dict) else {name: value}


@pytest.mark.parametrize("name", metrics.NAMES)
def test_a_module_computes_what_its_function_does(name):
    """A number in a paper's table would depend on which of two ways it was computed in; batches must not matter."""
    predictions, references, _ = inputs(name)
    module = metrics.load(name)
    assert module.compute(predictions=predictions, references=references, **OPTIONS.get(name, {})) == expected(name)
    for start in range(0, 40, 16):
        module.add_batch(predictions=predictions[start : start + 16], references=references[start : start + 16])
    assert module.compute(**OPTIONS.get(name, {})) == expected(name)
    assert module.description.startswith("Return")


def test_every_function_is_a_module():
    """A metric that is added later would be missing here."""
    assert set(metrics.NAMES) == {n for n in metrics.__all__ if n not in ("NAMES", "SCRIPT", "load")}
    assert len(metrics.NAMES) == 12
    with pytest.raises(ValueError, match="must be one of accuracy, .* got 'nonsense'"):
        metrics.load("nonsense")


def test_modules_combine():
    """`evaluate.combine` is how several metrics are computed from one pass."""
    names = ["accuracy", "brier_score", "negative_log_likelihood"]
    found = evaluate.combine([metrics.load(n) for n in names]).compute(predictions=PROBABILITIES, references=LABELS)
    assert found == {k: v for name in names for k, v in expected(name).items()}


def test_evaluate_loads_them_offline(tmp_path):
    """`evaluate.load` of the installed file would ask the Hub, or need the repository as the working directory."""
    code = (
        "import json, sys, evaluate, hf_ivon.metrics as m\n"
        "p, y = json.loads(sys.argv[1])\n"
        "found = {}\n"
        "for name in ('accuracy', 'brier_score'):\n"
        "    found |= evaluate.load(m.SCRIPT, name).compute(predictions=p, references=y)\n"
        "print(json.dumps(found))\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    paths = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    given = json.dumps([PROBABILITIES.tolist(), LABELS.tolist()])
    command = [sys.executable, "-c", code, given]
    result = subprocess.run(
        command, env={**os.environ, **offline, **paths}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {**expected("accuracy"), **expected("brier_score")}
