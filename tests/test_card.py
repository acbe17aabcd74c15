"""The model card: its snippet runs, its numbers are the files', and what others wrote stays."""

import json
import re

import peft
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertModel,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from hf_ivon import save_posterior
from hf_ivon.hub import push, write_card
from hf_ivon.merge import merge
from tests import tiny
from tests.classifiers import classifiers, invoke
from tests.hub_server import hub
from tests.test_merge import posterior_of

__all__ = ["classifiers", "hub"]
NAME = "me/model"
RESULTS = {
    "data": "films.jsonl",
    "mean": {"accuracy": 0.9, "nll": 0.3},
    "averaged": {"accuracy": 0.92, "nll": 0.25},
    "num_samples": 8,
}


def save_pair(model, directory, **config):
    """Save a model or an adapter with a posterior."""
    model.save_pretrained(directory)
    posterior, _ = posterior_of(model, 100, torch.Generator().manual_seed(0))
    posterior.config = type(posterior.config)(**{**vars(posterior.config), **config})
    save_posterior(posterior, directory)
    return posterior


def adapter(base, directory, task_type, **options):
    """Return a LoRA adapter of a model that is saved too, as PEFT finds its base by name."""
    base.save_pretrained(directory)
    return peft.get_peft_model(
        type(base).from_pretrained(directory), peft.LoraConfig(task_type=task_type, r=2, **options)
    )


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def plain_bert(make=BertForMaskedLM):
    return make(BertConfig(vocab_size=tiny.VOCABULARY, **SMALL))


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=tiny.VOCABULARY, **sizes))


def wav2vec():
    convolutions = {"conv_dim": (16,), "conv_stride": (2,), "conv_kernel": (2,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(vocab_size=8, **SMALL, **convolutions, **positions))


MAKE = {
    "classifier": lambda directory: tiny.bert(),
    "two classes": lambda directory: tiny.bert(num_labels=2),
    "regression": lambda directory: tiny.bert(num_labels=1),
    "tagger": lambda directory: tiny.tagger(),
    "language model": lambda directory: tiny.gpt2(),
    "another model": lambda directory: plain_bert(),
    "several labels": lambda directory: tiny.bert(problem_type="multi_label_classification"),
    "several numbers": lambda directory: tiny.bert(problem_type="regression"),
    "one text of another": lambda directory: t5(),
    "pictures": lambda directory: ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SMALL)),
    "sound": lambda directory: wav2vec(),
    "multiple choice": lambda directory: plain_bert(BertForMultipleChoice),
    "no task": lambda directory: plain_bert(BertModel),
    "adapter of a classifier": lambda directory: adapter(tiny.bert(), directory, "SEQ_CLS", target_modules=["query"]),
    "adapter of a tagger": lambda directory: adapter(tiny.tagger(), directory, "TOKEN_CLS", target_modules=["query"]),
    "adapter of a language model": lambda directory: adapter(
        tiny.gpt2(), directory, "CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True
    ),
    "adapter of no task": lambda directory: adapter(tiny.bert(), directory, None, target_modules=["query"]),
}


def snippet_of(card):
    (found,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return found


@pytest.mark.parametrize("kind", MAKE)
def test_the_snippet_runs(tmp_path, hub, kind, capsys):
    """The first lines that a visitor copies would fail, or would not use the posterior."""
    save_pair(MAKE[kind](tmp_path / "base"), tmp_path / "saved")
    push(tmp_path / "saved", NAME)
    snippet = snippet_of(hub.repositories[NAME].files["README.md"].decode())
    assert f'Posterior.from_pretrained("{NAME}"' in snippet
    exec(compile(snippet, kind, "exec"), {})
    printed = capsys.readouterr().out
    classes = {"classifier": 3, "adapter of a classifier": 3, "two classes": 2, "tagger": 4, "adapter of a tagger": 4}
    assert ("logits=tensor" in printed) == (kind in ("several labels", "several numbers", "another model"))
    data = ModelCard(hub.repositories[NAME].files["README.md"].decode()).data
    assert data.library_name == ("peft" if kind.startswith("adapter") else "transformers")
    without_task = ("another model", "one text of another", "pictures", "sound", "multiple choice", "no task")
    assert (data.pipeline_tag is None) == (kind in (*without_task, "adapter of no task"))
    expected = classes.get(kind)
    if expected:
        assert len(re.search(r"tensor\(\[\[(.*?)\]", printed).group(1).split(",")) == expected
    assert printed.strip()


def test_the_snippet_uses_the_tokenizer(classifiers, tmp_path, hub, capsys):
    """Someone with a sentence would have to find out how to make it tokens."""
    push(classifiers / "films", NAME)
    tiny.save_gpt2(tmp_path / "gpt2", ["one two three", "four five"], 32)
    save_pair(GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2"), tmp_path / "gpt2")
    push(tmp_path / "gpt2", "me/gpt2")
    for name in (NAME, "me/gpt2"):
        snippet = snippet_of(hub.repositories[name].files["README.md"].decode())
        assert 'tokenizer(["An example."]' in snippet
        exec(compile(snippet, name, "exec"), {})
        assert capsys.readouterr().out.strip()


def test_the_adapters_snippet_uses_the_tokenizer(tmp_path, hub, capsys):
    """An adapter's tokenizer comes from Transformers and its model from PEFT: both imports are needed."""
    tokenizer = tiny.save_gpt2(tmp_path / "gpt2", ["one two three", "four five"], 32)
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    model = adapter(base, tmp_path / "base", "CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    save_pair(model, tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    push(tmp_path / "saved", NAME)
    card = hub.repositories[NAME].files["README.md"].decode()
    exec(compile(snippet_of(card), "card", "exec"), {})
    assert float(capsys.readouterr().out) > 1
    data = ModelCard(card).data
    assert data.library_name == "peft"
    assert str(tmp_path) not in data.to_yaml(), "PEFT writes the base model's path, which the Hub refuses"


def test_numbers_of_an_evaluation_are_in_the_card(classifiers):
    """What the command measured would have to be copied by hand: metrics, and the figures beside the card."""
    model = classifiers / "films"
    flags = ["--data", classifiers / "films.jsonl", "--num-samples", 3, "--plots", model]
    result = invoke("evaluate", model, *flags, "--output", model / "results.json")
    assert result.exit_code == 0, result.output
    text = write_card(model, NAME).read_text()
    results = json.loads((model / "results.json").read_text())
    found = {(r.metric_type, r.metric_name): r.metric_value for r in ModelCard(text).data.eval_results}
    for name, value in results["mean"].items():
        assert found.pop((name, f"{name} (at the mean)")) == value
        assert found.pop((name, f"{name} (averaged over the posterior)")) == results["averaged"][name]
        assert f"| {name} | {value:.4g} | {results['averaged'][name]:.4g} |" in text
    assert not found
    assert "averaged over 3 weight samples" in text
    assert "![Reliability diagram](reliability.png)" in text
    assert "entropy.png" not in text
    assert "On films.jsonl:" in text


def test_the_card_says_what_the_posterior_was_learnt_with(tmp_path):
    """Settings, the resolved ess and N, licence and citation would be missing, or not the files'."""
    save_pair(tiny.bert(), tmp_path, base_model="google-bert/bert-base", num_tokens=12345, ess={
        **dict.fromkeys(dict(tiny.bert().named_parameters()), 50.0), "classifier.bias": 100.0})  # fmt: skip
    text = write_card(tmp_path, NAME, license="apache-2.0", training={"learning_rate": 0.1}).read_text()
    for line in (
        "| effective sample size (`ess`) | 50 to 100, by tensor |",
        "| training examples (`num_examples`) | 100 |",
        "| label tokens (`num_tokens`) | 12,345 |",
        "| `learning_rate` | 0.1 |",
        "### Licence\n\napache-2.0\n",
        "@inproceedings{shen2024variational,",
        "take 16 times as long",
    ):
        assert line in text
    data = ModelCard(text).data
    assert data.tags == ["ivon", "posterior"]
    assert (data.base_model, data.license) == ("google-bert/bert-base", "apache-2.0")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert "\n\n\n" not in text.strip()


def test_what_others_wrote_is_kept(tmp_path):
    """A person's words and metadata would be lost, or the posterior's part stand there twice."""
    save_pair(tiny.bert(), tmp_path)
    mine = ModelCardData(language="en", tags=["mine"], license="mit", datasets=["imdb"], base_model="me/base")
    (tmp_path / "README.md").write_text(
        f"---\n{mine.to_yaml()}\n---\n\n# Reviews\n\nBy me: {{{{ not a template }}}}\n"
    )
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    first = write_card(tmp_path, NAME, training={"clip_radius": "inf"}).read_text()
    edited = first.replace("<!-- /hf_ivon -->", "<!-- /hf_ivon -->\n## Limits\n\nEnglish only.")
    (tmp_path / "README.md").write_text(edited)
    save_pair(tiny.bert(seed=2), tmp_path, num_examples=77)
    second = write_card(tmp_path, NAME).read_text()
    for part in ("# Reviews\n\nBy me: {{ not a template }}\n", "## Limits\n\nEnglish only."):
        assert second.count(part) == 1
    assert second == edited.replace("| 100 |", "| 77 |")
    assert write_card(tmp_path, NAME).read_text() == second
    data = ModelCard(second).data
    assert (data.language, data.license, data.datasets, data.base_model) == ("en", "mit", ["imdb"], "me/base")
    assert data.tags == ["mine", "ivon", "posterior"]
    assert data.ivon == {"clip_radius": "inf"}
    assert len(data.eval_results) == 4


def test_a_readme_without_metadata_is_kept(tmp_path, caplog):
    """A README that only holds text would lose it, or the Hub's client complain about it."""
    save_pair(tiny.bert(), tmp_path)
    (tmp_path / "README.md").write_text("# Reviews\n\n---\n\nA rule.\n")
    text = write_card(tmp_path, NAME).read_text()
    assert "---\n\n# Reviews\n\n---\n\nA rule.\n\n<!-- hf_ivon" in text
    assert not caplog.records


def test_a_posterior_of_another_estimator_is_not_called_ivon(tmp_path):
    """A model trained with AdamW whose curvature was estimated later would be found under the optimizer's tag."""
    save_pair(tiny.bert(), tmp_path, estimator="squared-gradient")
    (tmp_path / "README.md").write_text("---\nivon:\n  learning_rate: 0.1\n---\n")
    text = write_card(tmp_path).read_text()
    assert ModelCard(text).data.tags == ["posterior"]
    assert "learning_rate` |" not in text
    assert "learnt by the optimizer" not in text
    assert f'from_pretrained("{tmp_path}")' in text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("README.md", "---\ntags: [\n---\n", "The metadata of .*README.md' cannot be read"),
        ("README.md", "---\njust text\n---\n", "The metadata of .*README.md' cannot be read"),
        ("results.json", "{", "The results .*results.json' cannot be used: results.json is not readable JSON"),
        ("results.json", '{"mean": [1]}', "must be objects of metrics"),
        ("posterior_config.json", "{", "There is no card for .*posterior_config.json is not readable JSON"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, file, content, message):
    """A slip in a README would end in a traceback of a YAML parser, and the README be lost."""
    save_pair(tiny.bert(), tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_card(tmp_path)
    assert (tmp_path / file).read_text() == content


def test_results_may_be_of_the_mean_only(tmp_path):
    """A recipe that did not sample has no second column, and its other numbers are no metrics."""
    save_pair(tiny.bert(), tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"mean": {"accuracy": 0.5, "task": "x"}, "history": [1]}))
    text = write_card(tmp_path).read_text()
    assert "| | at the mean |\n|---|---|\n| accuracy | 0.5 |\n" in text
    header = yaml.safe_load(text.split("---\n")[1])
    (result,) = header["model-index"][0]["results"]
    assert [m["name"] for m in result["metrics"]] == ["accuracy (at the mean)"]


def test_a_merge_that_has_a_posterior_keeps_its_own_card(classifiers, hub):
    """A merge's sources and shares would be lost when it is pushed."""
    names = [str(classifiers / n) for n in ("films", "books")]
    merge(names, classifiers / "out", method="gaussian")
    push(classifiers / "out", NAME)
    card = ModelCard(hub.repositories[NAME].files["README.md"].decode())
    assert f"- {names[0]}, weight 1" in card.text
    assert "| estimator | merge-gaussian |" in card.text
    assert card.data.tags == ["merge", "hf_ivon", "posterior"]
