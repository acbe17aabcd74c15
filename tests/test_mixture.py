"""Mixtures of posteriors and deep ensembles: exact averages, the way back, and what is refused."""

import pytest
import torch
from torch import nn
from transformers import (
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_ivon import Mixture, posterior_predict
from hf_ivon.draws import sample_generator
from hf_ivon.posterior import Posterior
from tests import tiny
from tests.test_merge import posterior_of, save


def inputs():
    return [{"input_ids": torch.stack([r["input_ids"] for r in tiny.sentences(5)])}]


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_deep_ensemble_is_the_average_of_its_members(tmp_path):
    """Each member counts once, by its own weights; the model that lends its body is left as it was."""
    members = [tiny.bert(seed=s) for s in (1, 2, 3)]
    for i, member in enumerate(members):
        member.save_pretrained(tmp_path / str(i))
    mixture = Mixture.from_pretrained([tmp_path / str(i) for i in range(3)])
    body = tiny.bert(seed=9)
    before = weights_of(body)
    found = posterior_predict(body, mixture, inputs(), num_samples=3)
    alone = [posterior_predict(m, None, inputs(), num_samples=0).probabilities for m in members]
    torch.testing.assert_close(found.probabilities, sum(alone) / 3)
    assert all(torch.equal(p, before[n]) for n, p in body.named_parameters())
    weighted = Mixture(mixture.means, [None] * 3, weights=[2, 1, 1])
    found = posterior_predict(body, weighted, inputs(), num_samples=8)
    torch.testing.assert_close(found.probabilities, (2 * alone[0] + alone[1] + alone[2]) / 4)


def test_an_ensemble_has_the_buffers_of_its_members(tmp_path):
    """Batch normalization with the running statistics of the body is a network that nobody has trained."""
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data, alone = [{"pixel_values": pixels}], []
    for seed in range(2):
        torch.manual_seed(seed)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
        model = ResNetForImageClassification(config).train()
        with torch.no_grad():
            for _ in range(20):
                model(pixels * (1 + 3 * seed) + seed)
        model.eval().save_pretrained(tmp_path / str(seed))
        alone.append(posterior_predict(model, None, data, num_samples=0).probabilities)
    body = ResNetForImageClassification.from_pretrained(tmp_path / "0")
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    mixture = Mixture.from_pretrained([tmp_path / "0", tmp_path / "1"])
    found = posterior_predict(body, mixture, data, num_samples=2).probabilities
    torch.testing.assert_close(found, sum(alone) / 2)
    assert (alone[0] - alone[1]).abs().max() > 0.01
    assert all(torch.equal(tensor, before[name]) for name, tensor in body.state_dict().items())
    without = Mixture([weights_of(body)], [None])
    with pytest.raises(ValueError, match=r"must have all parameters and buffers.*such as `.*running_mean`"):
        posterior_predict(body, without, data, num_samples=1)


def test_buffers_are_swapped_under_the_names_of_the_file(tmp_path):
    """An adapter's file names a trained head's statistics in its own way; buffers that no file holds stay."""
    peft = pytest.importorskip("peft")

    def model():
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        net.register_buffer("scratch", torch.ones(2), persistent=False)
        return peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], r=1, modules_to_save=["1"]))

    other = model().train()
    other(torch.randn(8, 3) + 5)
    other.save_pretrained(tmp_path)
    body = model()
    [norm] = [m for n, m in body.named_modules() if isinstance(m, nn.BatchNorm1d) and "modules_to_save" in n]
    [learnt] = [m for n, m in other.named_modules() if isinstance(m, nn.BatchNorm1d) and "modules_to_save" in n]
    with Mixture.from_pretrained([tmp_path]).sampled(body):
        assert torch.equal(norm.running_mean, learnt.running_mean)
        assert norm.num_batches_tracked == 1
        norm.running_mean += 1
    assert torch.equal(norm.running_mean, torch.zeros(4))
    assert norm.num_batches_tracked == 0


def mixtral(seed):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=29, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2)).eval()


def test_components_whose_files_have_other_names(tmp_path):
    """Transformers joins the experts' matrices as it loads them: a component's own model did not fit its file."""
    for seed in (1, 2):
        model = mixtral(seed)
        model.save_pretrained(tmp_path / str(seed))
        tiny.posterior_of(model, std=0.2).save_pretrained(tmp_path / str(seed))
    mixture = Mixture.from_pretrained([tmp_path / "1", tmp_path / "2"])
    body = MixtralForCausalLM.from_pretrained(tmp_path / "1").eval()
    ids, state = torch.arange(6)[None], torch.get_rng_state()
    for component, seed in enumerate((1, 2)):
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        member = mixtral(seed)
        torch.set_rng_state(state)
        with mixture.sampled(body, generators[0], component=component), torch.no_grad():
            found = body(input_ids=ids).logits
        assert torch.equal(torch.get_rng_state(), state)
        with mixture.posteriors[component].sampled(member, generators[1]), torch.no_grad():
            torch.testing.assert_close(found, member(input_ids=ids).logits)
    with pytest.raises(ValueError, match="lacks 25, such as"), mixture.sampled(tiny.bert(), component=1):
        pass
    model = tiny.bert(num_labels=2)
    other = Mixture.from_pretrained([tmp_path / "1"])
    with pytest.raises(ValueError, match="must have all parameters"), other.sampled(model):
        pass


def test_multi_ivon_samples_each_posterior(tmp_path):
    """Samples are of the components' own posteriors, around their own means."""
    generator = torch.Generator().manual_seed(0)
    models = [tiny.bert(seed=s) for s in (1, 2)]
    for i, model in enumerate(models):
        save(model, tmp_path / str(i), 50, generator)
    mixture = Mixture.from_pretrained([tmp_path / str(i) for i in range(2)])
    found = posterior_predict(tiny.bert(seed=9), mixture, inputs(), num_samples=4, seed=3)
    expected = []
    for index, which in enumerate(mixture.allocation(4)):
        model = models[which]
        with mixture.posteriors[which].sampled(model, generator=sample_generator(3, index)), torch.no_grad():
            expected.append(model.eval()(**inputs()[0]).logits.double().softmax(1))
    torch.testing.assert_close(found.probabilities, sum(expected) / 4)


def test_a_mixture_of_one_is_its_posterior(tmp_path):
    """Code that takes a mixture must give with one component what the posterior gives."""
    model = tiny.bert()
    save(model, tmp_path, 50, torch.Generator().manual_seed(0))
    mixture = Mixture.from_pretrained([tmp_path])
    one = posterior_predict(model, mixture, inputs(), num_samples=3)
    other = posterior_predict(model, mixture.posteriors[0], inputs(), num_samples=3)
    assert torch.equal(one.probabilities, other.probabilities)
    assert BertForSequenceClassification.from_pretrained(tmp_path)


def test_an_exception_leaves_the_model_as_it_was():
    """Prediction is interrupted often; the weights of another model must not stay."""
    model, other = tiny.bert(seed=1), tiny.bert(seed=2)
    before = weights_of(model)
    posterior = posterior_of(other, 50, torch.Generator().manual_seed(0))[0]
    mixture = Mixture([weights_of(other)], [posterior])
    with pytest.raises(KeyboardInterrupt), mixture.sampled(model):
        assert not torch.equal(model.classifier.weight, before["classifier.weight"])
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_components_are_drawn_by_their_weights():
    """Outside of prediction, which deals them out evenly: 1,000 draws, the share within 5 deviations."""
    model = torch.nn.Linear(1, 1, bias=False)
    mixture = Mixture([{"weight": torch.full((1, 1), float(i))} for i in range(2)], [None, None], [3.0, 1.0])
    generator, seen = torch.Generator().manual_seed(0), 0.0
    for _ in range(1000):
        with mixture.sampled(model, generator):
            seen += model.weight.item()
    assert abs(seen - 250) < 5 * (1000 * 0.25 * 0.75) ** 0.5
    assert mixture.allocation(8) == [0, 0, 1, 0, 0, 0, 1, 0]
    assert Mixture([{}] * 5, [None] * 5).allocation(10).count(3) == 2


def test_what_does_not_fit_is_named(tmp_path):
    """A component of another model would be half of each."""
    model = tiny.bert()
    with pytest.raises(ValueError, match="must be one per component, got 2, 1 and 2"):
        Mixture([{}, {}], [None])
    with pytest.raises(ValueError, match="`weights` must be positive numbers"):
        Mixture([{}, {}], [None, None], [1.0, 0.0])
    mixture = Mixture([weights_of(tiny.bert(num_labels=5))], [None])
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"lacks 2, such as `classifier.weight`"), mixture.sampled(model):
        pass
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="cannot be used: model.safetensors is missing"):
        Mixture.from_pretrained([tmp_path])
    assert isinstance(posterior_of(model, 5, torch.Generator())[0], Posterior)
