"""Posterior-averaged perplexity: labels as in Transformers, token probabilities averaged, any batch size."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ivon.draws import sample_generator
from hf_ivon.mean import posterior_keys
from hf_ivon.posterior import Posterior
from hf_ivon.posterior_config import PosteriorConfig
from hf_ivon.predict import posterior_perplexity


def posterior_of(model):
    """A posterior with a standard deviation of 0.1 for every weight."""
    config = PosteriorConfig(1.0, 0.0, 1.0, None, None, 1, (0.9, 0.99), "ivon-price", "")
    return Posterior({name: torch.full(p.shape, 0.01) for name, p in posterior_keys(model).items()}, config)


def gpt2(num_layers=1):
    torch.manual_seed(3)
    sizes = dict(vocab_size=23, n_positions=16, n_embd=16, n_layer=num_layers, n_head=2)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def tokens(num_rows=6, length=9):
    ids = torch.randint(23, (num_rows, length), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[1, 4:] = -100
    labels[3] = -100
    labels[4, :3] = -100
    return ids, labels


def token_batches(size=2, rows=slice(None)):
    ids, labels = (t[rows] for t in tokens())
    return [{"input_ids": ids[i : i + size], "labels": labels[i : i + size]} for i in range(0, len(ids), size)]


def test_perplexity_at_the_mean_is_that_of_transformers():
    """Labels would be shifted otherwise than in training, or ignored tokens counted."""
    model = gpt2()
    ids, labels = tokens()
    with torch.no_grad():
        loss = model.eval()(input_ids=ids, labels=labels).loss.item()
    result = posterior_perplexity(model, None, token_batches(size=6), num_samples=0)
    assert result["nll"] == pytest.approx(loss, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert result["num_tokens"] == int((labels[:, 1:] != -100).sum())


def test_perplexity_of_the_first_token_is_never_asked():
    """The first label of a sequence has no prediction; it would be counted against the last logits."""
    model = gpt2()
    ids, labels = tokens()
    changed = labels.clone()
    changed[:, 0] = (changed[:, 0] + 1).clamp(min=0) % 23
    a = posterior_perplexity(model, None, [{"input_ids": ids, "labels": labels}], num_samples=0)
    b = posterior_perplexity(model, None, [{"input_ids": ids, "labels": changed}], num_samples=0)
    assert a == b


def test_perplexity_averages_probabilities_of_tokens():
    """Averaging log-probabilities, logits or perplexities instead would give another number."""
    model = gpt2()
    posterior = posterior_of(model)
    ids, labels = tokens()
    kept, target = labels[:, 1:] != -100, labels[:, 1:]
    probabilities = []
    for index in range(6):
        draw = posterior.sample(posterior_keys(model), sample_generator(4, index))
        sample = copy.deepcopy(model).eval()
        sample.load_state_dict(draw | {"lm_head.weight": draw["transformer.wte.weight"]})
        with torch.no_grad():
            p = sample(input_ids=ids).logits.double().softmax(dim=-1)[:, :-1]
        probabilities.append(p[kept].gather(1, target[kept][:, None])[:, 0])
    expected = -torch.stack(probabilities).mean(0).log().mean().item()
    result = posterior_perplexity(model, posterior, token_batches(size=4), num_samples=6, seed=4)
    assert result["nll"] == pytest.approx(expected, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["nll"]), rel=1e-12)


@pytest.mark.parametrize("num_samples", [0, 3])
def test_perplexity_does_not_depend_on_batches(num_samples):
    """A mean of batch means weighs the tokens of short batches more."""
    model = gpt2()
    posterior = posterior_of(model)
    results = [
        posterior_perplexity(model, posterior, token_batches(size=size), num_samples=num_samples) for size in (1, 4, 6)
    ]
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)


def test_hopeless_model_has_infinite_perplexity():
    """A perplexity beyond the largest float would end a long run with an OverflowError."""

    class Wrong(nn.Module):
        def forward(self, x):
            return torch.tensor([5000.0, 0.0]).expand(*x.shape, 2)

    batch = {"x": torch.zeros(1, 3), "labels": torch.ones(1, 3, dtype=torch.long)}
    assert posterior_perplexity(Wrong(), None, [batch], num_samples=0) == {
        "perplexity": math.inf,
        "nll": 5000.0,
        "num_tokens": 2,
    }


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.ones(2, 4, dtype=torch.long)}, "must have `labels`, got none"),
        (
            {"input_ids": torch.ones(2, 1, dtype=torch.long), "labels": torch.ones(2, 1, dtype=torch.long)},
            "at least one token to predict",
        ),
        (
            {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.full((2, 4), -100)},
            "at least one token to predict",
        ),
        (
            {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.ones(2, 3, dtype=torch.long)},
            r"got \(2, 4, 23\) for \(2, 3\)",
        ),
    ],
)
def test_language_data_without_targets_is_refused(batch, message):
    """A perplexity of nothing would be NaN, or 1."""
    with pytest.raises(ValueError, match=message):
        posterior_perplexity(gpt2(), None, [batch], num_samples=0)
