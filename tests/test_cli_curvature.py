"""`hf-ivon curvature`: a posterior for models that were trained some other way."""

import re

from hf_ivon import load_posterior
from hf_ivon.merge import merge
from tests.classifiers import classifiers, invoke

__all__ = ["classifiers"]


def test_the_curvature_command(classifiers):
    """A model trained with AdamW gets a posterior by one command, which merges; a posterior there is never lost."""
    model = classifiers / "films"
    flags = ["--data", classifiers / "films.jsonl", "--text-columns", "text"]
    result = invoke("curvature", model, *flags)
    assert result.exit_code == 2
    assert "has a posterior, which would be lost" in result.output
    for file in model.glob("posterior*"):
        file.unlink()
    result = invoke("curvature", model, *flags, "--fraction", 0.5)
    assert result.exit_code == 0, result.output
    posterior = load_posterior(model)
    assert (posterior.config.num_examples, posterior.config.estimator) == (12, "squared-gradient")
    report = merge([str(model), str(classifiers / "books")], classifiers / "out", base_model=classifiers / "base")
    assert report["without_posterior"] == []
    for wrong, message in (
        (["--estimator", "other"], "`estimator` must be one of squared-gradient, ggn"),
        (["--fraction", 2], "`fraction` must be in"),
        (["--text-columns", "label"], "must be read as text, got .*label"),
    ):
        result = invoke("curvature", model, *flags[:2], "--output-dir", classifiers / "new", *wrong)
        assert result.exit_code == 2, result.output
        assert re.search(message, result.output)
    assert not (classifiers / "new").exists()
