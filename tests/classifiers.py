"""Small sentence classifiers with tokenizers and data, as they would be on a disk, and the `hf-ivon` command."""

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
from typer.testing import CliRunner

from hf_ivon.cli.main import app
from hf_ivon.cli.merge import spread
from tests.test_merge import save

WORDS = ["good", "bad", "film", "book", "very", "not", "a", "the", "is"]


def invoke(*arguments):
    return CliRunner().invoke(app, spread([str(a) for a in arguments]))


@pytest.fixture
def classifiers(tmp_path):
    """A base and two classifiers with tokenizers, and a file of labelled sentences for each."""
    generator = torch.Generator().manual_seed(3)
    tokenizer = BertTokenizerFast(
        vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    )
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for name in ("base", "films", "books"):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            for p in model.parameters() if name != "base" else ():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
        save(model, tmp_path / name, 100, generator)
        tokenizer.save_pretrained(tmp_path / name)
        rows = [{"text": f"the {name} is very {WORDS[i % 9]}", "label": i % 2} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path
