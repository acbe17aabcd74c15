"""Merging models whose tokenizers differ: what is refused, and the union of added tokens."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from hf_ivon.merge import merge
from tests import tiny
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
