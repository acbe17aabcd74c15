"""Which tensors of the models and of the base a merge puts together, and which it asks about."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertModel

from hf_ivon import Posterior, load_posterior, save_posterior
from hf_ivon.merge import load_head, merge
from tests import tiny
from tests.test_merge import SIZES, models, posterior_of, save, tensors

__all__ = ["models"]


def rename(directory, change):
    """Save a checkpoint's tensors by other names."""
    file = directory / "model.safetensors"
    save_file({change(name): t for name, t in load_file(file).items()}, file, {"format": "pt"})


def test_a_base_with_the_names_of_old_files(models):
    """bert-base-uncased calls a LayerNorm's weight "gamma": asked about, and left out, all norms would be random."""
    directory, names, _ = models
    merge(names, directory / "out", base_model=directory / "base")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    rename(directory / "base", lambda n: next((n.removesuffix(k) + v for k, v in old.items() if n.endswith(k)), n))
    assert any(n.endswith("gamma") for n in tensors(directory / "base"))
    merge(names, directory / "again", base_model=directory / "base")
    torch.testing.assert_close(tensors(directory / "again"), tensors(directory / "out"), rtol=0, atol=0)


def test_models_without_the_prefix_of_their_base(models, tmp_path):
    """Sentence encoders are saved as `embeddings...`, and their base, a model with a head, as `bert.embeddings...`."""
    directory, names, _ = models
    encoders = []
    for name in names:
        encoder = BertModel.from_pretrained(name)
        save(encoder, tmp_path / "encoders" / name[-1], 100, torch.Generator().manual_seed(1))
        encoders.append(str(tmp_path / "encoders" / name[-1]))
    merge(encoders, directory / "out", base_model=directory / "base", method="task-arithmetic", weights=[0.5] * 3)
    base = {n.removeprefix("bert."): t for n, t in tensors(directory / "base").items()}
    for name, found in tensors(directory / "out").items():
        parts = [load_file(f"{e}/model.safetensors")[name] for e in encoders]
        torch.testing.assert_close(found, base[name] + sum(0.5 * (p - base[name]) for p in parts))


def test_heads_of_one_shape_are_told_by_the_base(models):
    """Two tasks of three classes each: their heads look alike, and were averaged into one though kept apart."""
    directory, names, _ = models
    with pytest.raises(ValueError, match="`heads` is 'separate', but all models have all tensors .* --base-model"):
        merge(names, directory / "out", method="gaussian", heads="separate")
    with pytest.raises(ValueError, match="`heads` is 'keep:a', but all models"):
        merge(names, directory / "out", method="average", heads="keep:a")
    BertModel.from_pretrained(directory / "base").save_pretrained(directory / "encoder")
    report = merge(names, directory / "out", method="gaussian", heads="separate", base_model=directory / "encoder")
    assert report["separate"] == ["classifier.bias", "classifier.weight"]
    merge(names, directory / "all", method="gaussian")
    for name in names:
        model = load_head(directory / "out", name[-1])
        own, shared = load_file(f"{name}/model.safetensors"), tensors(directory / "all")
        for key, p in model.state_dict().items():
            assert torch.equal(p, own[key] if key.startswith("classifier") else shared[key])


def test_labels_in_another_order_are_refused(models):
    """Merged class by class, "positive" of one model would be averaged with "negative" of the other."""
    directory, names, _ = models
    orders = (["no", "maybe", "yes"], ["yes", "maybe", "no"])
    for name, labels in zip(names, orders, strict=False):
        file = directory / name / "config.json"
        config = {**json.loads(file.read_text()), "id2label": dict(enumerate(labels))}
        file.write_text(json.dumps({**config, "label2id": {v: k for k, v in enumerate(labels)}}))
    message = r"order their classes differently \(0 is 'no' in .*a, and 'yes' in .*b\)"
    with pytest.raises(ValueError, match=message):
        merge(names, directory / "out", method="average")
    BertModel.from_pretrained(directory / "base").save_pretrained(directory / "encoder")
    merge(names, directory / "apart", method="average", heads="separate", base_model=directory / "encoder")


def test_links_are_called_what_the_user_calls_them(models):
    """`sst2` may be a link to some run's `checkpoint-500`, and `rt` to another's."""
    directory, names, _ = models
    links = []
    for name, task in zip(names, ("sst2", "rt"), strict=False):
        (directory / f"runs-{task}").mkdir()
        os.rename(name, directory / f"runs-{task}" / "checkpoint-500")
        os.symlink(directory / f"runs-{task}" / "checkpoint-500", directory / task)
        links.append(str(directory / task))
    other = tiny.bert(num_labels=5)
    save(other, directory / "five", 10, torch.Generator().manual_seed(1))
    mixed = [*links, str(directory / "five")]
    merge(mixed, directory / "out", method="average", heads="separate")
    assert {p.name for p in (directory / "out" / "heads").iterdir()} == {"sst2", "rt", "five"}
    merge(mixed, directory / "kept", method="average", heads=f"keep:{directory}/five/")
    assert torch.equal(tensors(directory / "kept")["classifier.weight"], other.classifier.weight)


def test_a_model_to_keep_is_named_so_that_there_is_one(models):
    """Of `r1/best` and `r2/best`, `keep:best` took the first without a word."""
    directory, names, _ = models
    mixed = []
    for i, model in enumerate((tiny.bert(num_labels=5, seed=3), tiny.bert(num_labels=4, seed=4))):
        save(model, directory / f"r{i}" / "best", 10, torch.Generator().manual_seed(1))
        mixed.append(str(directory / f"r{i}" / "best"))
    with pytest.raises(ValueError, match="`heads` names 'best', which is any of .*r0/best, .*r1/best: name one"):
        merge(mixed, directory / "out", method="average", heads="keep:best")
    merge(mixed, directory / "out", method="average", heads=f"keep:{mixed[1]}")
    assert tensors(directory / "out")["classifier.weight"].shape == (4, 16)


def sentence_encoder(directory, seed):
    """Save an encoder as a SentenceTransformer does, with a posterior by the names of the whole."""
    encoder = tiny.bert(seed=seed).bert
    encoder.save_pretrained(directory)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "t"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "p"},
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    whole = nn.Sequential(nn.ModuleDict({"model": encoder}))
    posterior, _ = posterior_of(whole, 100, torch.Generator().manual_seed(seed))
    config = dataclasses.replace(posterior.config, ess={n: 200.0 + i for i, n in enumerate(posterior.variance)})
    save_posterior(Posterior(posterior.variance, config), directory)
    return encoder, posterior.variance


def test_the_posterior_of_a_sentence_encoder_is_used(tmp_path):
    """Its names are those of the whole, `0.model.embeddings...`, and the file's are the encoder's: the rules that
    weigh by posteriors were plain averaging, and what the modules need to load was left behind."""
    kept = {n: sentence_encoder(tmp_path / n, seed) for n, seed in (("a", 1), ("b", 2))}
    names = [str(tmp_path / n) for n in kept]
    report = merge(names, tmp_path / "out", method="gaussian")
    assert report["without_posterior"] == []
    found = tensors(tmp_path / "out")
    parts = [(dict(encoder.named_parameters()), variance) for encoder, variance in kept.values()]
    for key, value in found.items():
        precisions = [1 / variance[f"0.model.{key}"] for _, variance in parts]
        weighted = sum(p * mean[key] for p, (mean, _) in zip(precisions, parts, strict=True))
        torch.testing.assert_close(value, weighted / sum(precisions))
    encoder = BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=True)
    posterior = load_posterior(tmp_path / "out", nn.Sequential(nn.ModuleDict({"model": encoder})))
    assert posterior.config.ess["0.model.embeddings.LayerNorm.bias"] == sum(
        load_posterior(n).config.ess["0.model.embeddings.LayerNorm.bias"] for n in names
    )
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    file = tmp_path / "b" / "model.safetensors"
    save_file({k: t + 1 for k, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="the posterior of .*b does not belong to the weights beside it"):
        merge(names, tmp_path / "no", method="gaussian")


def test_what_a_merge_would_lose_is_refused(tmp_path):
    """A dense layer behind the encoder has a file of its own, which would be missing, or one model's."""
    names = [str(tmp_path / n) for n in "ab"]
    for name, seed in zip(names, (1, 2), strict=True):
        sentence_encoder(tmp_path / name[-1], seed)
    save_file({"linear.weight": torch.ones(2, 2)}, tmp_path / "b" / "1_Pooling" / "model.safetensors")
    with pytest.raises(ValueError, match="b: its module 1_Pooling has weights of its own"):
        merge(names, tmp_path / "out", method="average")


def test_posteriors_by_other_names_than_the_files_are_refused(models):
    """Some models are renamed when they are loaded; merged by rules without posteriors, nobody would know."""
    directory, names, _ = models
    for name in names:
        posterior = load_posterior(name)
        other = {n.replace(".", "_"): v for n, v in posterior.variance.items()}
        save_posterior(Posterior(other, posterior.config), name)
    with pytest.raises(ValueError, match="no tensor that would be merged has a variance in every .*average"):
        merge(names, directory / "out", method="gaussian")


def test_a_weighted_product_counts_weighted_examples(models):
    """A model with weight 0 has no examples in the merge: with them, merging again would trust it too much."""
    directory, names, _ = models
    merge(names[:2], directory / "out", method="gaussian", weights=[1.0, 0.0])
    assert load_posterior(directory / "out").config.num_examples == SIZES[0]
    merge(names[:2], directory / "half", method="gaussian", weights=[0.5, 2.0])
    assert load_posterior(directory / "half").config.num_examples == round(0.5 * SIZES[0] + 2 * SIZES[1])
    rest = (names[2], "fisher")
    merge([str(directory / "out"), rest[0]], directory / "again", method=rest[1])
    merge([names[0], rest[0]], directory / "plain", method=rest[1])
    torch.testing.assert_close(tensors(directory / "again"), tensors(directory / "plain"), rtol=1e-5, atol=1e-6)
