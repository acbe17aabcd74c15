"""Files of examples: what a command reads is what the file says."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_ivon import load_posterior
from hf_ivon.data import evaluate, is_language_model, load_batches, load_checkpoint, load_rows
from tests import tiny
from tests.classifiers import classifiers, invoke

__all__ = ["classifiers"]


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


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_perplexity_does_not_hang_on_padding(tmp_path, side):
    """Padded on the left, first tokens would be predicted from padding, more of them in larger batches."""
    texts = ["the cat sat on the mat", "a dog", "the quick brown fox jumps over the lazy dog", "hello there"]
    tokenizer = tiny.save_gpt2(tmp_path, texts, 64)
    model = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)  # so that it matters where a token stands
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    tokenizer.padding_side = side
    data = write(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    for size in (1, 2, 32):
        batches = load_batches(data, model, tokenizer, batch_size=size)
        assert sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches) == count
        assert evaluate(model, batches)["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert tokenizer.padding_side == side


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_model_without_its_tokenizer_is_refused(tmp_path, kind):
    """Transformers makes a tokenizer of the configuration for which every word is unknown: numbers without meaning."""
    getattr(tiny, kind)().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have its tokenizer beside it, got .* knows no word"):
        load_checkpoint(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path)[1]("the film")["input_ids"]


def test_rows_without_a_text_are_named(classifiers):
    """An empty field of a table would end in a traceback of the tokenizer, and which row it is be left to find."""
    model, tokenizer = load_checkpoint(classifiers / "films")
    file = classifiers / "rows.csv"
    file.write_text("text,label\na film,0\n,1\n")
    for rows in ([{"text": "a film", "label": 0}, {"text": None, "label": 1}], [{"text": None}, {"text": "a film"}]):
        place = [row["text"] for row in rows].index(None)
        with pytest.raises(ValueError, match=f"`text` of .* must hold text in every row, got None in row {place},"):
            load_batches(write(classifiers / "rows.jsonl", rows), model, tokenizer)
    with pytest.raises(ValueError, match="got None in row 1,"):
        load_batches(file, model, tokenizer, max_examples=1)
    for command in ("evaluate", "sensitivity"):
        result = invoke(command, classifiers / "films", "--data", file)
        assert result.exit_code == 2, result.output
        assert "must hold text in every row, got None in row 1" in result.output


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ({}, [0, 2, 1], [0, 2, 1]),
        ({}, [True, False], [1, 0]),
        ({}, [0.0, 2.0], [0, 2]),
        ({}, ["LABEL_2", "LABEL_0"], [2, 0]),
        ({"label2id": {"neg": 0, "pos": 1, "none": 2}}, ["pos", "neg"], [1, 0]),
        ({}, [1, None], "must hold class numbers, got None in row 1,"),
        ({}, ["pos"], "must hold class numbers, got 'pos' in row 0,"),
        ({}, [0.5], "must hold class numbers, got 0.5 in row 0,"),
        ({}, [[0, 1]], r"must hold class numbers, got \[0, 1\] in row 0,"),
        (
            {"label2id": {"neg": 0, "pos": 1, "none": 2}},
            ["neg", "good"],
            "numbers or 'neg', 'pos', 'none', got 'good'",
        ),
        ({"num_labels": 1}, [1, 0.5], [1.0, 0.5]),
        ({"num_labels": 1}, ["LABEL_0"], "must hold numbers, got 'LABEL_0' in row 0,"),
        ({"problem_type": "multi_label_classification"}, [[0, 1, 1]], [[0.0, 1.0, 1.0]]),
        ({"problem_type": "multi_label_classification"}, [[0, 1, 1], None], "lists of numbers, got None in row 1,"),
    ],
)
def test_labels_are_what_the_model_takes(tmp_path, settings, given, expected):
    """Names and missing labels would be refused with advice about truncation, or a number be taken for a class."""
    if "label2id" in settings:
        settings = {**settings, "id2label": {i: name for name, i in settings["label2id"].items()}}
    model = tiny.bert(**settings)
    data = write(tmp_path / "rows.jsonl", [{"text": "the film", "label": label} for label in given])
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            load_batches(data, model, tiny.tokenizer())
    else:
        (batch,) = load_batches(data, model, tiny.tokenizer())
        assert torch.equal(batch["labels"], torch.tensor(expected))
    (batch,) = load_batches(data, model, tiny.tokenizer(), with_labels=False)
    assert "labels" not in batch


def roberta():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return RobertaForSequenceClassification(
        RobertaConfig(vocab_size=tiny.VOCABULARY, **sizes, max_position_embeddings=12)
    )


@pytest.mark.parametrize(("make", "length"), [(tiny.bert, 8), (tiny.gpt2, 8), (roberta, 10)])
def test_texts_are_cut_where_the_models_positions_end(tmp_path, make, length):
    """A text that is longer than the model's table of positions would end in an IndexError."""
    model, tokenizer = make().eval(), tiny.tokenizer()
    tokenizer.model_max_length = 10**30  # as a tokenizer has that was not told
    data = write(tmp_path / "rows.jsonl", [{"text": "the film is good " * 10, "label": 0}])
    (batch,) = load_batches(data, model, tokenizer)
    assert batch["input_ids"].shape == (1, length)
    assert evaluate(model, [batch])
    for other, shown in ((5, 5), (7, 5)):
        tokenizer.model_max_length = other
        (batch,) = load_batches(data, model, tokenizer, max_length=5 if other == 7 else 128)
        assert batch["input_ids"].shape == (1, shown)


def test_a_files_name_is_no_pattern(tmp_path):
    """A file with brackets in its name would not be found, without a word about why."""
    rows = [{"text": "one"}, {"text": "two"}]
    assert load_rows(write(tmp_path / "part[1]*.jsonl", rows)).to_list() == rows
    for name, content, message in (
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", "\n", "cannot be read as jsonl: ."),
        ("broken.jsonl", "{", "cannot be read as jsonl: ."),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_rows(tmp_path / name)


@pytest.mark.parametrize("cls", [GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification])
@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"])
def test_a_classifier_made_from_a_language_model_is_none(tmp_path, cls, task):
    """Its configuration still names the language model: of a LoRA classifier the text would be the labels."""
    tiny.gpt2().save_pretrained(tmp_path)
    model = cls.from_pretrained(tmp_path)
    assert model.config.architectures == ["GPT2LMHeadModel"]
    expected = cls is GPT2LMHeadModel
    assert is_language_model(model) is expected
    if task is None or (task == "CAUSAL_LM") == expected:
        assert is_language_model(get_peft_model(model, LoraConfig(task_type=task, r=2))) is expected
