"""`hf-ivon curvature`: a posterior for models that were trained some other way."""

import json
import re

import pytest
import torch
from transformers import BertForSequenceClassification, BertTokenizerFast, RobertaConfig, RobertaModel

from hf_ivon import load_posterior
from hf_ivon.data import number_of_positions
from hf_ivon.merge import merge
from tests import tiny
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


def test_a_model_in_another_dtype_than_its_file_is_refused(classifiers):
    """The posterior would be one of other bytes than those in the file: hours of work that no merge takes."""
    model = classifiers / "films"
    for file in model.glob("posterior*"):
        file.unlink()
    BertForSequenceClassification.from_pretrained(model).to(torch.bfloat16).save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    flags = ["--data", classifiers / "films.jsonl", "--text-columns", "text"]
    (model / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    result = invoke("curvature", model, *flags)
    assert result.exit_code == 2
    assert "is torch.bfloat16 there and was loaded as torch.float32. Set `dtype` in config.json to wh" in result.output
    (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    result = invoke("curvature", model, *flags)
    assert result.exit_code == 0, result.output
    merge([model], classifiers / "out", method="gaussian")


def test_texts_are_cut_at_what_the_model_takes(tmp_path):
    """A text longer than the model's positions would end in an error of an index, after all was loaded."""
    model = tiny.bert()
    model.save_pretrained(tmp_path / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "good " * 20, "label": 0}) + "\n")
    result = invoke("curvature", tmp_path / "model", "--data", tmp_path / "rows.jsonl")
    assert result.exit_code == 0, result.output
    assert number_of_positions(model) == tiny.LENGTH
    roberta = RobertaModel(RobertaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    ids = torch.full((1, number_of_positions(roberta)), 5)
    assert roberta(ids)[0].shape[1] == roberta.config.max_position_embeddings - 2
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, number_of_positions(roberta) + 1), 5))
