"""Hessians that others saved: each becomes the posterior it stands for, or is refused with the reason."""

import json
import pickle

import ivon
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, ViTConfig, ViTForImageClassification

from hf_ivon import load_posterior
from hf_ivon.convert import convert
from hf_ivon.merge import merge
from tests import tiny
from tests.classifiers import invoke
from tests.test_card import adapter

ESS, DELTA = 50.0, 1e-3


def train(model, groups, **options):
    """Take two steps with ivon-opt, whose Hessian then differs from weight to weight; return the optimizer."""
    settings = {"lr": 1e-3, "ess": ESS, "hess_init": 0.5, "weight_decay": DELTA, "beta2": 0.9, **options}
    optimizer = ivon.IVON(groups, **settings)
    batch = {"input_ids": torch.arange(8)[None] % tiny.VOCABULARY}
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            model(**batch).logits.square().mean().backward()
        optimizer.step()
    return optimizer


def trainer_groups(model, second=DELTA):
    """The groups that a Trainer makes: weights, then biases and norms."""
    decayed = Trainer.get_decay_parameter_names(None, model)
    params = dict(model.named_parameters())
    return [
        {"params": [p for n, p in params.items() if n in decayed], "weight_decay": DELTA},
        {"params": [p for n, p in params.items() if n not in decayed], "weight_decay": second},
    ]


def observed_variance(model, optimizer, num=3000):
    """Estimate each weight's variance from draws of the optimizer itself."""
    mean = {n: p.detach().clone() for n, p in model.named_parameters()}
    total = {n: torch.zeros_like(p) for n, p in mean.items()}
    for _ in range(num):
        with optimizer.sampled_params(train=False):
            for n, p in model.named_parameters():
                total[n] += (p.detach() - mean[n]).square()
    return {n: t / num for n, t in total.items()}


@pytest.mark.parametrize("grouped", [False, True])
def test_the_reference_optimizers_state_is_its_posterior(tmp_path, grouped):
    """Tensors would be cut in the wrong places, or settings of another group be used: draws tell."""
    model = tiny.bert()
    optimizer = train(model, trainer_groups(model, second=0.5) if grouped else list(model.parameters()))
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    result = invoke("convert", tmp_path / "optimizer.pt", "--trust-pickle", "--num-examples", 40)
    assert result.exit_code == 0, result.output
    found = load_posterior(tmp_path, model)
    assert found.names() == sorted(n for n, _ in model.named_parameters())
    config = found.config
    assert (config.ess, config.num_examples, config.steps, config.estimator) == (ESS, 40, 2, "ivon-opt")
    assert config.betas == (0.9, 0.9)
    assert config.of("weight_decay", "classifier.weight") == DELTA
    assert config.of("weight_decay", "classifier.bias") == (0.5 if grouped else DELTA)
    for name, variance in observed_variance(model, optimizer).items():
        ratio = variance / found.variance[name]
        assert (ratio - 1).abs().max() < 6 * (2 / 3000) ** 0.5, name  # six standard errors of a variance


def test_a_hessian_directory_is_read_by_name(tmp_path):
    """What Daheim et al.'s code leaves beside a model could not be merged with anything."""
    model = tiny.bert()
    model.save_pretrained(tmp_path / "model")
    hess = {k: torch.rand(v.shape) for k, v in load_file(tmp_path / "model" / "model.safetensors").items()}
    beside = tiny.bert()
    beside.load_state_dict(hess, strict=False)
    beside.save_pretrained(tmp_path / "model" / "hessian", max_shard_size="4KB")
    result = invoke(
        "convert",
        tmp_path / "model" / "hessian",
        "--num-examples",
        200,
        "--estimator",
        "squared-gradient",
        "--scale",
        2,
    )
    assert result.exit_code == 0, result.output
    assert "Posterior of 3,203 weights in 25 tensors" in result.output
    found = load_posterior(tmp_path / "model", model)
    assert (found.config.ess, found.config.estimator, found.config.steps) == (200, "squared-gradient", 0)
    assert found.config.hess_init == pytest.approx(1.0, rel=0.1)  # twice the average of the draws
    for name, h in hess.items():
        torch.testing.assert_close(found.variance[name], 1 / (200 * (2 * h + 1e-5)))
    again = invoke("convert", tmp_path / "model" / "hessian", "--num-examples", 200)
    assert again.exit_code == 2
    assert "has a posterior, which would be lost" in again.output
    report = merge([str(tmp_path / "model")] * 2, tmp_path / "out", method="gaussian")
    assert report["without_posterior"] == []


def images(kind):
    """A classifier of images: ViT has other names in its file, ResNet has buffers there."""
    torch.manual_seed(1)
    if kind == "resnet":
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
        return ResNetForImageClassification(config)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_hessian_saved_as_a_model_is_read_as_one(tmp_path, kind):
    """Names that only files have, and statistics that are no Hessian, were taken for another model's parameters."""
    model, beside = images(kind), images(kind)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in beside.parameters():
            p.copy_(torch.rand(p.shape, generator=generator))
    beside.save_pretrained(tmp_path)
    found = convert(tmp_path, model, ess=100.0, weight_decay=0.01)
    assert found.names() == sorted(name for name, _ in model.named_parameters())
    for name, h in beside.named_parameters():
        torch.testing.assert_close(found.variance[name], 1 / (100 * (h.detach() + 0.01)))
    with pytest.raises(ValueError, match="the model lacks"):
        convert(tmp_path, tiny.bert(), ess=1.0)


def test_a_renamed_hessian_may_be_of_a_part_but_not_of_more(tmp_path):
    """What the model's class made up, or had no use for, must not be taken for the Hessian."""
    images("vit").save_pretrained(tmp_path)
    model = images("vit")
    hess = load_file(tmp_path / "model.safetensors")
    hess = {name: torch.rand(h.shape) for name, h in hess.items() if not name.startswith("classifier")}
    save_file(hess, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = convert(tmp_path, model, ess=1.0)
    assert found.names() == sorted(n for n, _ in model.named_parameters() if not n.startswith("classifier"))
    save_file({**hess, "another": torch.rand(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the model lacks `another`"):
        convert(tmp_path, model, ess=1.0)


def test_a_tied_parameter_may_have_either_name(tmp_path):
    """Who saves all names that a model's state has, saves the embeddings twice."""
    model = tiny.gpt2()
    hess = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    tied = hess["transformer.wte.weight"]
    expected = convert(_saved(tmp_path / "once", hess), model, ess=1.0)
    twice = convert(_saved(tmp_path / "twice", {**hess, "lm_head.weight": tied.clone()}), model, ess=1.0)
    del hess["transformer.wte.weight"]
    other = convert(_saved(tmp_path / "other", {**hess, "lm_head.weight": tied}), model, ess=1.0)
    for found in (twice, other):
        assert found.names() == expected.names()
        assert all(torch.equal(found.variance[n], expected.variance[n]) for n in found.names())
    unlike = {**hess, "transformer.wte.weight": tied, "lm_head.weight": tied + 1}
    with pytest.raises(ValueError, match="different ones for `transformer.wte.weight` and `lm_head.weight`"):
        convert(_saved(tmp_path / "unlike", unlike), model, ess=1.0)


def _saved(directory, tensors):
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_a_flat_hessian_is_cut_in_the_models_order(tmp_path):
    """A pickled vector names nothing: weights would get the widths of others."""
    model = tiny.gpt2()
    sizes = [p.numel() for p in model.parameters()]
    flat = torch.rand(sum(sizes)) + 0.1
    expected = dict(zip((n for n, _ in model.named_parameters()), flat.split(sizes), strict=True))
    for value, options in (
        (flat, {"ess": 100.0, "weight_decay": 0.01}),
        ({"hess": flat, "ess": 100.0, "weight_decay": 0.01, "numel": len(flat)}, {}),
    ):
        torch.save(value, tmp_path / "ivon_hessian.state")
        found = convert(tmp_path / "ivon_hessian.state", model, trust_pickle=True, **options)
        for name, p in model.named_parameters():
            torch.testing.assert_close(found.hess(name), expected[name].reshape(p.shape), rtol=1e-4, atol=1e-6)


def test_an_adapters_hessian_has_the_adapters_names(tmp_path):
    """The base model's frozen weights would be taken for trained ones, or the names not be the adapter file's."""
    model = adapter(tiny.bert(), tmp_path / "base", "SEQ_CLS", target_modules=["query"])
    optimizer = train(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "adapter" / "optimizer.pt")
    result = invoke("convert", tmp_path / "adapter" / "optimizer.pt", "--trust-pickle")
    assert result.exit_code == 0, result.output
    found = load_posterior(tmp_path / "adapter", model)
    assert set(found.names()) == set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert found.config.num_examples is None


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("code was run",))


def test_a_pickle_is_opened_only_when_asked_for_and_runs_nothing(tmp_path, capsys):
    """Converting a stranger's download would run the stranger's code."""
    tiny.bert().save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(Evil()))
    result = invoke("convert", tmp_path / "optimizer.pt")
    assert result.exit_code == 2
    assert "a pickle, which can be made to run code when it is opened" in result.output
    assert "--trust-pickle" in result.output
    result = invoke("convert", tmp_path / "optimizer.pt", "--trust-pickle")
    assert result.exit_code == 2
    assert "cannot be read: it is damaged, or holds more than tensors" in result.output
    assert "code was run" not in result.output + capsys.readouterr().out


def flat(num, **known):
    return {"hess": torch.ones(num), **known}


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (flat(7), {"ess": 1.0}, r"of 7 weights, must fit the model's 3,203 in one way: .* got 0 that fit"),
        (flat(3203), {}, "`ess` or the number of examples must be given"),
        (flat(3203, ess=5.0), {"ess": 6.0}, "`ess` must be what .* says, 5, got 6"),
        (flat(3203), {"ess": -1.0}, "`ess` must be positive, got -1.0"),
        (flat(3203), {"ess": 1.0, "scale": 0.0}, "`scale` must be positive, got 0.0"),
        (
            {"hess": -torch.ones(3203)},
            {"ess": 1.0},
            "must be positive with `weight_decay` added, but is not in .* and \\d+ more",
        ),
        ({"hess": torch.full((3203,), torch.nan)}, {"ess": 1.0}, "must be finite"),
        ({"a": 1}, {}, "must hold a flat tensor, a mapping with it as `hess`, .* got dict of a"),
        (torch.ones(2, 2), {}, "must hold a flat tensor, .* got Tensor"),
        (
            {"state": {}, "param_groups": [{"params": [0], "lr": 1.0}]},
            {},
            "must be of ivon-opt, got parameter groups without",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, value, options, message):
    """A Hessian of another model, or of no known scale, would become a posterior that looks like any other."""
    torch.save(value, tmp_path / "hessian.pt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "hessian.pt", tiny.bert(), trust_pickle=True, **options)


def test_a_directory_that_does_not_fit_is_refused(tmp_path):
    """The Hessian of another model, or none at all, must be named before anything is written."""
    tiny.bert(num_labels=5).save_pretrained(tmp_path / "five")
    with pytest.raises(
        ValueError, match=r"`classifier.bias` has shape \(5,\) in the posterior and \(3,\) in the model"
    ):
        convert(tmp_path / "five", tiny.bert(), ess=1.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        convert(tmp_path / "empty", tiny.bert(), ess=1.0)
    save_file({"a": torch.ones(1, dtype=torch.int64)}, tmp_path / "empty" / "model.safetensors")
    with pytest.raises(ValueError, match="it holds no tensor"):
        convert(tmp_path / "empty", tiny.bert(), ess=1.0)
    with pytest.raises(ValueError, match="nowhere' does not exist"):
        convert(tmp_path / "nowhere", tiny.bert(), ess=1.0)
