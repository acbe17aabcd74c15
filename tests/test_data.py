"""Files of examples: what a command reads is what the file says."""

import pytest
import torch
from transformers import AutoTokenizer

from hf_ivon import load_posterior
from hf_ivon.data import evaluate, load_batches, load_checkpoint, load_rows
from tests import tiny
from tests.classifiers import invoke


def test_language_models_have_batches_too(tmp_path):
    """The labels of a language model are its tokens; padding does not count."""
    tiny.save_gpt2(tmp_path / "gpt2", ["one two three", "four five"], 32)
    (tmp_path / "rows.jsonl").write_text('{"text": "one two three"}\n{"text": "four"}\n')
    model, tokenizer = load_checkpoint(tmp_path / "gpt2")
    batches = load_batches(tmp_path / "rows.jsonl", model, tokenizer)
    for batch in batches:
        assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert evaluate(model, batches)["perplexity"] > 1
    result = invoke("curvature", tmp_path / "gpt2", "--data", tmp_path / "rows.jsonl")
    assert result.exit_code == 0, result.output
    tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    assert load_posterior(tmp_path / "gpt2").config.num_tokens == tokens
    result = invoke("evaluate", tmp_path / "gpt2", "--data", tmp_path / "rows.jsonl", "--num-samples", 2)
    assert result.exit_code == 0, result.output
    assert f"{evaluate(model, batches)['perplexity']:.4f}" in result.output
    assert AutoTokenizer.from_pretrained(tmp_path / "gpt2").pad_token == "<pad>"


def test_rows_may_be_given_instead_of_a_file(tmp_path):
    """A command that has counted the rows must not read a large file twice, nor get other batches for it."""
    tokenizer = tiny.save_gpt2(tmp_path / "gpt2", ["one two three", "four five"], 32)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one two three", "n": 1}\n{"text": "four", "n": 2}\n')
    model, _ = load_checkpoint(tmp_path / "gpt2")
    rows = load_rows(file)
    (one,), (other,) = (load_batches(data, model, tokenizer) for data in (file, rows))
    assert all(torch.equal(one[k], other[k]) for k in one)
    with pytest.raises(ValueError, match=r"lacks the column\(s\) body; it has text, n"):
        load_batches(rows, model, tokenizer, text_columns=["body"])
    with pytest.raises(ValueError, match="columns of the given rows must be read as text, got .*n"):
        load_batches(rows, model, tokenizer, text_columns=["n"])
