"""Merging models whose tokenizers differ: what is refused, and the union of added tokens."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from hf_ivon.merge import load_head, merge
from hf_ivon.merge.plan import make_plan
from hf_ivon.merge.sweep import sweep
from tests import tiny
from tests.classifiers import invoke
from tests.test_merge import save

SENTENCES = [f"The number {i} is smaller than the number {i + 1}." for i in range(20)]
ADDED = {"a": ["<a>", "<c>"], "b": ["<c>", "<b>"]}


@pytest.fixture
def models(tmp_path):
    """A base, and two models finetuned from it with tokens of their own, in another order."""
    generator = torch.Generator().manual_seed(1)
    tiny.save_gpt2(tmp_path / "base", SENTENCES, 32)
    for name, tokens in ADDED.items():
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
        tokenizer.add_tokens(tokens[:1], special_tokens=True)
        tokenizer.add_tokens(tokens[1:])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        save(model, tmp_path / name, 100, generator)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path, [str(tmp_path / n) for n in "ab"]


def rows(directory):
    """The embedding by token."""
    tokenizer, weights = AutoTokenizer.from_pretrained(directory), load_file(directory / "model.safetensors")
    embedding = weights["transformer.wte.weight"]
    assert len(embedding) == len(tokenizer)
    return {token: embedding[place] for token, place in tokenizer.get_vocab().items()}


def test_added_tokens_are_named_and_can_be_united(models):
    """Each added token belongs to another row: averaged by place, the embedding of one is that of another."""
    directory, names = models
    with pytest.raises(
        ValueError, match=r"differ, first in '<a>' .*: pass --tokenizer union to have the tokens of all"
    ):
        merge(names, directory / "out", method="average")
    merge(names, directory / "out", method="average", tokenizer="union")
    a, b, out = (rows(directory / n) for n in ("a", "b", "out"))
    assert out.keys() == a.keys() | b.keys()
    for token, row in out.items():
        parts = [part[token] for part in (a, b) if token in part]
        torch.testing.assert_close(row, sum(parts) / len(parts))
    model, tokenizer = (
        GPT2LMHeadModel.from_pretrained(directory / "out"),
        AutoTokenizer.from_pretrained(directory / "out"),
    )
    assert model.config.vocab_size == len(tokenizer)
    ids = tokenizer("The <b>number<a> 3<c>")["input_ids"]
    assert {tokenizer.convert_tokens_to_ids(t) for t in ("<a>", "<b>", "<c>")} <= set(ids)
    assert model(torch.tensor([ids])).logits.shape[-1] == len(tokenizer)
    assert "<a>" in tokenizer.all_special_tokens or tokenizer.decode(ids, skip_special_tokens=True).count("<a>") == 0


@pytest.mark.parametrize("method", ["uncertainty", "task-arithmetic", "gaussian"])
def test_a_token_of_one_model_is_that_models(models, method):
    """The base and the others know nothing of it, and must not pull its row to nothing or to noise."""
    directory, names = models
    merge(names, directory / "out", base_model=directory / "base", method=method, tokenizer="union")
    a, b, out = (rows(directory / n) for n in ("a", "b", "out"))
    torch.testing.assert_close(out["<a>"], a["<a>"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["<b>"], b["<b>"], rtol=1e-4, atol=1e-5)
    low, high = torch.minimum(a["<c>"], b["<c>"]), torch.maximum(a["<c>"], b["<c>"])
    if method != "task-arithmetic":
        assert ((out["<c>"] >= low - 0.05) & (out["<c>"] <= high + 0.05)).all()


def test_shared_tokens_do_not_change_by_the_union(models):
    """The rows of the common tokens, and all other tensors, must be those of a merge without added tokens."""
    directory, names = models
    merge(names, directory / "out", base_model=directory / "base", tokenizer="union")
    base, out = (load_file(directory / n / "model.safetensors") for n in ("base", "out"))
    size = len(base["transformer.wte.weight"])
    for name in ("a", "b"):  # the same models, cut to the common tokens
        model = GPT2LMHeadModel.from_pretrained(directory / name)
        model.resize_token_embeddings(size)
        save_cut(model, directory, name)
    merge([str(directory / f"{n}-cut") for n in "ab"], directory / "cut", base_model=directory / "base")
    cut = load_file(directory / "cut" / "model.safetensors")
    for name, value in cut.items():
        torch.testing.assert_close(out[name][:size] if "wte" in name else out[name], value, rtol=1e-5, atol=1e-6)


def save_cut(model, directory, name):
    """Save a model whose vocabulary was cut, with the posterior's rows cut alike."""
    from hf_ivon import Posterior, load_posterior, save_posterior
    from hf_ivon.mean import mean_digest

    posterior = load_posterior(directory / name)
    params = dict(model.named_parameters())
    variance = {n: v[: params[n].shape[0]] if v.dim() else v for n, v in posterior.variance.items()}
    posterior.config.mean_digest = mean_digest(params)
    model.save_pretrained(directory / f"{name}-cut")
    save_posterior(Posterior(variance, posterior.config), directory / f"{name}-cut")


def test_other_vocabularies_cannot_be_united(models):
    """Tokenizers that split text differently have no tokens in common, whatever their strings are."""
    directory, names = models
    file = directory / "b" / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(values))
    for tokenizer in (None, "union"):
        with pytest.raises(ValueError, match="tokenizers of .* differ, first in ") as caught:
            merge(names, directory / "out", method="average", tokenizer=tokenizer)
        assert "pass --tokenizer union" not in str(caught.value)
    file.unlink()
    with pytest.raises(ValueError, match=r"b has no tokenizer.json, which a union of tokens needs"):
        merge(names, directory / "out", method="average", tokenizer="union")
    with pytest.raises(ValueError, match="`tokenizer` must be 'union' or nothing, got 'first'"):
        merge(names, directory / "out", method="average", tokenizer="first")


def save_with(model, directory, tokens, rows=None):
    """Save a model of random weights with a tokenizer that has more tokens, and as many rows or more."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(tokens)
    model.resize_token_embeddings(rows or len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(len(str(directory)) + ord(directory.name[0]))
    with torch.no_grad():
        for p in [*model.parameters(), *model.buffers()]:
            if p.is_floating_point():
                p.copy_(torch.randn(p.shape, generator=generator))
    save(model, directory, 100, generator)
    tokenizer.save_pretrained(directory)
    return str(directory)


def by_token(directory):
    """What each tensor has for each token, by name; of tensors that have a row or a column for each of them."""
    numbers = AutoTokenizer.from_pretrained(directory).get_vocab()
    size = json.loads((directory / "config.json").read_text())["vocab_size"]
    found = {}
    for name, value in load_file(directory / "model.safetensors").items():
        if size in value.shape:
            value = value.movedim(value.shape.index(size), 0)
            found[name] = {token: value[number] for token, number in numbers.items()}
    return found


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
ENDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
ARCHITECTURES = {
    "bert": lambda: BertForMaskedLM(tiny.bert().config),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, **ENDS, cls_token_id=2, sep_token_id=3)),
    "distilbert": lambda: DistilBertForMaskedLM(DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24)),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(d_model=16, **{f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in SIDE.items()}, **ENDS)
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_with_rows_for_tokens_is_united(tmp_path, architecture):
    """One that is forgotten keeps the rows by place: one token's becomes the average of two tokens', or the merge
    does not load."""
    names = [save_with(ARCHITECTURES[architecture](), tmp_path / n, [f"<{n}>"]) for n in "ab"]
    merge(names, tmp_path / "out", method="average", tokenizer="union")
    a, b, out = (by_token(tmp_path / n) for n in ("a", "b", "out"))
    assert out.keys() == a.keys() == b.keys()
    for name, tokens in out.items():
        assert tokens.keys() == a[name].keys() | b[name].keys()
        for token, row in tokens.items():
            parts = [part[name][token] for part in (a, b) if token in part[name]]
            torch.testing.assert_close(row, sum(parts) / len(parts))
    loaded = type(ARCHITECTURES[architecture]()).from_pretrained(tmp_path / "out")
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.config.vocab_size == 30


@pytest.mark.parametrize(("of_a", "of_b"), [([], []), (["<a>"], []), ([], ["<b>"]), (["<a>"], ["<b>"])])
@pytest.mark.parametrize("rows_of_b", [48, 40])
def test_rows_without_a_token_stay(tmp_path, of_a, of_b, rows_of_b):
    """Embeddings are often padded: cut to the tokens, the merge would not load by its configuration."""
    names = [save_with(tiny.gpt2(), tmp_path / "a", of_a, 48), save_with(tiny.gpt2(), tmp_path / "b", of_b, rows_of_b)]
    merge(names, tmp_path / "out", method="gaussian", tokenizer="union")
    model, tokenizer = (
        GPT2LMHeadModel.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert len(tokenizer) == 28 + len(of_a) + len(of_b)
    out = model.transformer.wte.weight.detach()
    assert len(out) == model.config.vocab_size == 48
    a, b = (load_file(tmp_path / n / "model.safetensors")["transformer.wte.weight"] for n in "ab")
    low, high = torch.minimum(a[:28], b[:28]), torch.maximum(a[:28], b[:28])
    assert ((out[:28] >= low - 1e-5) & (out[:28] <= high + 1e-5)).all()
    torch.testing.assert_close(out[40:], a[40:] if rows_of_b == 40 else out[40:])
    for token, weights in (("<a>", a), ("<b>", b)):
        if token in of_a + of_b:
            torch.testing.assert_close(out[tokenizer.convert_tokens_to_ids(token)], weights[28], rtol=1e-3, atol=1e-4)


def test_numbers_with_a_hole(tmp_path):
    """A vocabulary that leaves a number out has more rows than tokens."""
    for name, tokens in (("a", []), ("b", ["<b>"])):
        save_with(tiny.gpt2(), tmp_path / name, tokens, 31 + len(tokens))
        file = tmp_path / name / "tokenizer.json"
        values = json.loads(file.read_text())
        last = max(values["model"]["vocab"], key=values["model"]["vocab"].get)
        values["model"]["vocab"][last] = 30
        for token in values["added_tokens"]:
            token["id"] = 31 if token["content"] == "<b>" else token["id"]
        file.write_text(json.dumps(values))
    merge([str(tmp_path / n) for n in "ab"], tmp_path / "out", method="average", tokenizer="union")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    numbers, own = (AutoTokenizer.from_pretrained(tmp_path / n).get_vocab() for n in ("out", "b"))
    assert len(numbers) < max(numbers.values()) + 1 == model.config.vocab_size == 31
    weights = load_file(tmp_path / "b" / "model.safetensors")["transformer.wte.weight"]
    torch.testing.assert_close(model.transformer.wte.weight[numbers["<b>"]].detach(), weights[own["<b>"]])


@pytest.mark.parametrize("heads", ["keep:b", "separate"])
def test_the_rows_belong_to_the_tokenizer_beside_them(tmp_path, heads):
    """With another model's head and configuration, the tokens would still have the numbers of the first model."""
    for name, tokens, labels in (("a", ["<a>", "<c>"], 2), ("b", ["<b>", "<a>"], 3)):
        model = tiny.bert(num_labels=labels)
        model.config.sep_token_id = 28 if name == "b" else None  # <b>
        save_with(model, tmp_path / name, tokens)
    names = [str(tmp_path / n) for n in "ab"]
    merge(names, tmp_path / "out", method="average", tokenizer="union", heads=heads)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    kept = tmp_path / "out" / ("heads/b" if heads == "separate" else "")
    model = (
        load_head(tmp_path / "out", "b")
        if heads == "separate"
        else BertForSequenceClassification.from_pretrained(tmp_path / "out")
    )
    assert AutoConfig.from_pretrained(kept).sep_token_id == tokenizer.convert_tokens_to_ids("<b>") == 30
    assert (model.config.vocab_size, model.config.num_labels) == (31, 3)
    rows = model.bert.embeddings.word_embeddings.weight.detach()
    a, b = (by_token(tmp_path / n)["bert.embeddings.word_embeddings.weight"] for n in "ab")
    for token, number in tokenizer.get_vocab().items():
        parts = [part[token] for part in (a, b) if token in part]
        torch.testing.assert_close(rows[number], sum(parts) / len(parts))


def test_a_base_without_the_tokens_of_all(tmp_path):
    """Models that added the same tokens have nothing to unite but their base, which lacks these."""
    names = [save_with(tiny.gpt2(), tmp_path / n, ["<a>"]) for n in "ab"]
    base = save_with(tiny.gpt2(), tmp_path / "c", [])
    merge(names, tmp_path / "out", base_model=base, method="task-arithmetic", tokenizer="union", weights=[0.5, 0.5])
    a, b, out = (by_token(tmp_path / n)["transformer.wte.weight"] for n in ("a", "b", "out"))
    for token, row in out.items():
        torch.testing.assert_close(row, (a[token] + b[token]) / 2)


def test_what_cannot_be_united_is_said_before_anything_is_written(tmp_path):
    """Rows that are not known would be merged by place, and a token without a row would get that of another."""
    names = [save_with(tiny.gpt2(), tmp_path / n, [f"<{n}>"]) for n in "ab"]

    def refused():
        with pytest.raises(ValueError, match="The models cannot be merged: ") as caught:
            merge(names, tmp_path / "out", method="average", tokenizer="union", dry_run=True)
        return str(caught.value)

    file, weights = tmp_path / "a" / "model.safetensors", load_file(tmp_path / "a" / "model.safetensors")
    save_file({**weights, "extra.weight": torch.ones(3, 29)}, file)
    assert "a cannot be united: `extra.weight`, which is not known, may have a row for each of its 29" in refused()
    save_file({n: v for n, v in weights.items() if "wte" not in n}, file)
    assert "a cannot be united: no tensor is known to have a row for each of its 29" in refused()
    save_file(weights, file)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "vocab_size": None}))
    assert "a does not say its `vocab_size` in config.json, so that its tokens cannot be united" in refused()
    GPT2LMHeadModel(tiny.gpt2().config).save_pretrained(tmp_path / "a")  # 29 rows
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    tokenizer.add_tokens(["<d>"])
    tokenizer.save_pretrained(tmp_path / "a")
    assert "the tokenizer of " in (message := refused())
    assert "a has more tokens than the 29 rows of its model" in message
    for name in "ab":
        (tmp_path / name / "adapter_config.json").write_text("{}")
        save_file(weights, tmp_path / name / "adapter_model.safetensors")
    assert "a is an adapter, so that its tokens cannot be united" in refused()


@pytest.mark.parametrize("heads", ["keep:b", "separate"])
def test_a_sweep_looks_at_the_merge_that_is_written(tmp_path, heads):
    """With a tokenizer of one model, or the size of its vocabulary, other merges would be compared, or none."""
    for name, tokens in (("a", ["<a>", "<c>"]), ("b", ["<b>", "<a>"])):
        model = tiny.bert(num_labels=2 + (name == "b"))
        model.config.pad_token_id = 28 if name == "b" else 0  # <b>
        save_with(model, tmp_path / name, tokens)
    names, settings = [str(tmp_path / n) for n in "ab"], {"method": "average", "tokenizer": "union", "heads": heads}
    seen = []
    plan = make_plan(names, None, **settings)
    sweep(plan, {"b": lambda model: seen.append(model) or {"accuracy": 1.0}}, steps=2)
    merge(names, tmp_path / "out", **settings)
    written = (
        load_head(tmp_path / "out", "b")
        if heads == "separate"
        else BertForSequenceClassification.from_pretrained(tmp_path / "out")
    )
    assert seen[1].config.pad_token_id == written.config.pad_token_id == 30
    for name, value in written.state_dict().items():
        torch.testing.assert_close(seen[1].state_dict()[name], value)
    rows = "\n".join(json.dumps({"text": "the film was <b>", "label": i % 2}) for i in range(4))
    (tmp_path / "rows.jsonl").write_text(rows)
    line = ["merge", "--models", *names, "--method", "average", "--heads", heads, "--output-dir", tmp_path / "best"]
    result = invoke(*line, "--tokenizer", "union", "--sweep", 1, "--data", f"b={tmp_path / 'rows.jsonl'}")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "best" / "sweep.json").exists()
