"""Posterior-averaged prediction: exact cases, independence of batches, the way back to the mean, and a whole road."""

import dataclasses
import math
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, WeightedRandomSampler
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

from hf_ivon import predict
from hf_ivon.checkpoint import load_posterior
from hf_ivon.draws import sample_generator
from hf_ivon.mean import posterior_keys
from hf_ivon.optim import IVON
from hf_ivon.posterior import Posterior
from hf_ivon.posterior_config import PosteriorConfig
from hf_ivon.predict import Prediction, posterior_predict
from hf_ivon.sensitivity import estimate_sensitivity


class Linear(nn.Module):
    """A linear model with dropout that would show, and the weights of every forward."""

    def __init__(self, num_features, num_outputs):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(num_features, num_outputs)
        self.seen = []

    def forward(self, x):
        self.seen.append(self.linear.weight.detach().clone())
        return self.linear(self.dropout(x))


def batches(x, y=None, size=4):
    cuts = range(0, len(x), size)
    return [{"x": x[i : i + size]} | ({} if y is None else {"labels": y[i : i + size]}) for i in cuts]


def posterior_of(model, std=0.3):
    """A posterior of random widths around `std`."""
    generator = torch.Generator().manual_seed(7)
    variance = {
        name: (std * (0.5 + torch.rand(p.shape, generator=generator))) ** 2
        for name, p in posterior_keys(model).items()
    }
    config = PosteriorConfig(1.0, 0.0, 1.0, None, None, 1, (0.9, 0.99), "ivon-price", "")
    return Posterior(variance, config)


def test_uncertainty_is_taken_apart():
    """Against sums over the draws themselves: what is uncertain in all of them, and what they disagree about."""
    torch.manual_seed(0)
    model = Linear(3, 4)
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    posterior = posterior_of(model, std=1.0)
    found = posterior_predict(model, posterior, batches(x), num_samples=9, seed=5)
    draws = []
    for index in range(9):
        weights = posterior.sample(dict(model.named_parameters()), generator=sample_generator(5, index))
        draws.append((x @ weights["linear.weight"].T + weights["linear.bias"]).double().softmax(1))
    p = torch.stack(draws)
    entropy = -(p * p.log()).sum(-1)
    mean = p.mean(0)
    torch.testing.assert_close(found.entropy, -(mean * mean.log()).sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.expected_entropy, entropy.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mutual_information, found.entropy - entropy.mean(0), rtol=1e-5, atol=1e-6)
    votes = [max(column.tolist().count(c) for c in range(4)) for column in p.argmax(-1).T]
    assert found.variation_ratio.tolist() == pytest.approx([1 - v / 9 for v in votes])
    at_mean = posterior_predict(model, None, batches(x), num_samples=0)
    assert at_mean.mutual_information.abs().max() < 1e-12
    assert at_mean.variation_ratio.max() == 0
    with pytest.raises(ValueError, match="must be of classes to have an entropy"):
        _ = posterior_predict(Linear(3, 1), None, batches(x), num_samples=0).entropy


def test_sampling_stops_when_the_average_has_settled():
    """A narrow posterior needs few samples, a wide one many; what comes out is the average of those taken."""
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    model = Linear(3, 4)
    narrow = posterior_predict(model, posterior_of(model, 1e-4), batches(x), num_samples=50, tolerance=1e-3)
    assert narrow.num_samples == 3  # the first sample moves the average from nothing
    wide = posterior_predict(model, posterior_of(model, 2.0), batches(x), num_samples=50, tolerance=1e-3)
    assert wide.num_samples > 10
    again = posterior_predict(model, posterior_of(model, 2.0), batches(x), num_samples=wide.num_samples)
    assert torch.equal(again.probabilities, wide.probabilities)
    assert posterior_predict(model, None, batches(x), num_samples=0, tolerance=1.0).num_samples == 0
    with pytest.raises(ValueError, match="`tolerance` must be at least 0, got -1"):
        posterior_predict(model, None, batches(x), num_samples=0, tolerance=-1)


def test_the_average_can_be_followed_as_it_runs():
    """Metrics by number of samples would take as many predictions from the start; each must be what that gives."""
    model, x = Linear(3, 4), torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    posterior = posterior_of(model, 0.5)
    running = []
    last = posterior_predict(model, posterior, batches(x), num_samples=4, seed=3, on_sample=running.append)
    assert torch.equal(last.probabilities, running[-1].probabilities)
    assert [prediction.num_samples for prediction in running] == [1, 2, 3, 4]
    for prediction in running:
        alone = posterior_predict(model, posterior, batches(x), num_samples=prediction.num_samples, seed=3)
        for name in ("probabilities", "expected_entropy", "variation_ratio"):
            assert torch.equal(getattr(prediction, name), getattr(alone, name))
    at_mean = []
    posterior_predict(model, None, batches(x), num_samples=0, on_sample=at_mean.append)
    assert [prediction.num_samples for prediction in at_mean] == [0]


def test_predictions_on_the_way_are_not_kept(monkeypatch):
    """Sixty-four samples of a large data set would take sixty-four times the memory of one."""
    alive, most = weakref.WeakSet(), []

    class Watched(Prediction):
        __hash__, __eq__ = object.__hash__, object.__eq__

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(predict, "Prediction", Watched)
    model, x = Linear(3, 4), torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    settings = {"num_samples": 8, "on_sample": lambda prediction: None}
    assert posterior_predict(model, posterior_of(model), batches(x), **settings).num_samples == 8
    assert len(most) == 9  # and what is returned
    assert max(most) <= 2


class TwoPoints:
    """Stands for a posterior: adds 1 to the first output in every second sample."""

    def __init__(self):
        self.calls = 0

    @contextmanager
    def sampled(self, model, generator=None, ess_scale=1.0):
        shift = float(self.calls % 2)
        self.calls += 1
        with torch.no_grad():
            model.linear.bias[0] += shift
        try:
            yield model
        finally:
            with torch.no_grad():
                model.linear.bias[0] -= shift


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def drawn(posterior, model, num_samples, seed):
    """The weight samples of a seed, side by side."""
    return [posterior.sample(posterior_keys(model), sample_generator(seed, index)) for index in range(num_samples)]


# Exact cases


def test_linear_gaussian_regression():
    """For a linear model the averaged mean and variance are known: w·x + b and Σ σ² x² + σ_b²."""
    model, x = Linear(5, 1), torch.randn(7, 5)
    posterior = posterior_of(model)
    num_samples = 3000
    result = posterior_predict(model, posterior, batches(x, x[:, 0]), num_samples=num_samples)
    with torch.no_grad():
        mean = model.eval()(x)[:, 0].double()
    variance = x.double() ** 2 @ posterior.variance["linear.weight"][0].double()
    variance += posterior.variance["linear.bias"].double()
    # Five standard errors of a mean, and of a variance, of `num_samples` Gaussian draws.
    assert (result.prediction_mean - mean).abs().le(5 * (variance / num_samples).sqrt()).all()
    assert (result.prediction_variance / variance - 1).abs().max() < 5 * math.sqrt(2 / num_samples)
    assert result.probabilities is None
    assert torch.equal(result.labels, x[:, 0])
    assert result.num_samples == num_samples


def test_two_weight_samples_by_hand():
    """Probabilities, not logits, are averaged; the variance is divided by the number of samples."""
    model, x = Linear(2, 2), torch.randn(3, 2)
    logits = model.eval()(x).detach().double()
    result = posterior_predict(model, TwoPoints(), batches(x), num_samples=2)
    shifted = logits + torch.tensor([1.0, 0.0])
    assert torch.allclose(result.probabilities, (logits.softmax(dim=1) + shifted.softmax(dim=1)) / 2, atol=1e-6)
    assert result.labels is None
    model, x = Linear(2, 1), torch.randn(3, 2)
    mean = model.eval()(x)[:, 0].detach().double()
    result = posterior_predict(model, TwoPoints(), batches(x), num_samples=2)
    assert torch.allclose(result.prediction_mean, mean + 0.5, atol=1e-6)
    assert torch.allclose(result.prediction_variance, torch.full((3,), 0.25, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_running_average_equals_stacking(num_outputs):
    """The one-pass average would drift from the average of all samples kept side by side."""
    model, x = Linear(4, num_outputs), torch.randn(6, 4)
    posterior = posterior_of(model)
    result = posterior_predict(model, posterior, batches(x), num_samples=9, seed=2)
    draws = drawn(posterior, model, 9, seed=2)
    stacked = torch.stack([(x @ draw["linear.weight"].T + draw["linear.bias"]).double() for draw in draws])
    if num_outputs == 1:
        assert torch.allclose(result.prediction_mean, stacked.mean(0)[:, 0], atol=1e-6)
        assert torch.allclose(result.prediction_variance, stacked.var(0, unbiased=False)[:, 0], atol=1e-6)
    else:
        assert torch.allclose(result.probabilities, stacked.softmax(-1).mean(0), atol=1e-6)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_no_samples_is_the_plain_forward(num_outputs):
    """Asking for the mean would still draw weights, or need a posterior."""
    model, x = Linear(4, num_outputs), torch.randn(6, 4)
    with torch.no_grad():
        logits = model.eval()(x).double()
    result = posterior_predict(model, None, batches(x, size=6), num_samples=0)
    if num_outputs == 1:
        assert torch.equal(result.prediction_mean, logits[:, 0])
        assert torch.equal(result.prediction_variance, torch.zeros(6, dtype=torch.float64))
    else:
        assert torch.equal(result.probabilities, logits.softmax(dim=1))


# Which weights, which order, which device


def test_sample_i_is_the_same_whatever_the_number():
    """More samples would not continue fewer, and neighbouring seeds would share samples."""
    model, x = Linear(4, 3), torch.randn(2, 4)
    posterior = posterior_of(model)

    def weights_seen(num_samples, seed):
        model.seen.clear()
        posterior_predict(model, posterior, batches(x), num_samples=num_samples, seed=seed)
        return list(model.seen)

    few, many, other = weights_seen(2, seed=0), weights_seen(5, seed=0), weights_seen(5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=False))
    assert not any(torch.equal(a, b) for i, a in enumerate(many + other) for b in (many + other)[:i])


def test_ess_scale_is_a_factor_on_the_precision():
    """A posterior made wider after training would be sampled at the width that it was learnt with."""
    model = Linear(3, 2)
    mean, x, posterior = model.linear.weight.detach().clone(), torch.randn(4, 3), posterior_of(model)
    for scale in (1.0, 0.25):
        posterior_predict(model, posterior, batches(x), num_samples=1, seed=3, ess_scale=scale)
    learnt, wider = (weights - mean for weights in model.seen)
    torch.testing.assert_close(wider, 2 * learnt)
    with pytest.raises(ValueError, match="`ess_scale` must be"):
        posterior_predict(model, posterior, batches(x), num_samples=1, ess_scale=0.0)


def test_global_random_state_is_left_alone():
    """Evaluating in the middle of training would change dropout and data order after it."""
    model, x = Linear(4, 3), torch.randn(2, 4)
    before = torch.get_rng_state()
    posterior_predict(model, posterior_of(model), batches(x), num_samples=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_batch_size_does_not_change_the_result(size):
    """Every batch would get weights of its own, or ragged last batches count twice."""
    model, x = Linear(4, 3), torch.randn(10, 4)
    y = torch.arange(10) % 3
    posterior = posterior_of(model)
    whole = posterior_predict(model, posterior, batches(x, y, size=10), num_samples=4)
    parts = posterior_predict(model, posterior, batches(x, y, size=size), num_samples=4)
    assert torch.allclose(parts.probabilities, whole.probabilities, atol=1e-6)
    assert torch.equal(parts.labels, y)


def test_batches_go_to_the_models_device():
    """Every model on an accelerator would fail on its first batch."""

    class Meta(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2, device="meta"))

        def forward(self, x, note):
            assert note == "kept"
            return torch.zeros(len(x), 2) if x.device.type == "meta" else torch.ones(0)

    batch = {"x": torch.ones(3, 2), "note": "kept"}
    assert posterior_predict(Meta(), None, [batch], num_samples=0).probabilities.shape == (3, 2)
    assert set(batch) == {"x", "note"}


def test_outputs_of_every_form_are_read():
    """A tuple or a dict, as models of Transformers give, would be taken for logits."""

    class Form(Linear):
        form = staticmethod(lambda logits: logits)

        def forward(self, x):
            return self.form(super().forward(x))

    x, results = torch.randn(4, 3), []
    torch.manual_seed(1)
    model = Form(3, 1)
    for form in (lambda t: t, lambda t: t[:, 0], lambda t: (t, None), lambda t: {"loss": None, "logits": t}):
        model.form = form
        results.append(posterior_predict(model, None, batches(x), num_samples=0).prediction_mean)
    assert all(torch.equal(r, results[0]) for r in results)


# The way back


def test_modes_and_weights_are_restored():
    """Training would go on with drawn weights, without dropout, or with a frozen part unfrozen."""
    model = Linear(4, 3).train()
    model.linear.eval()
    before, modes = weights(model), [m.training for m in model.modules()]
    assert modes == [True, True, False]
    posterior_predict(model, posterior_of(model), batches(torch.randn(4, 4)), num_samples=3)
    assert same(weights(model), before)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_modes_and_weights_are_restored_after_an_error(error):
    """An interrupted evaluation would leave a weight sample in the model, even while the error is being handled."""
    model = Linear(4, 3).train()
    before = weights(model)

    def stop(module, args):
        if len(module.seen) == 3:
            raise error("stop")

    model.register_forward_pre_hook(stop)
    try:
        posterior_predict(model, posterior_of(model), batches(torch.randn(8, 4)), num_samples=5)
    except error:
        assert same(weights(model), before)
        assert model.training
    else:
        pytest.fail("the hook did not raise")


# The whole road


@pytest.mark.parametrize("lora", [False, True])
def test_train_save_load_predict(tmp_path, lora):
    """The pieces would not fit: optimizer, files, a real Transformers model, a DataLoader."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=12, num_labels=3))
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    rows = [
        {
            "input_ids": torch.full((8,), i % 3 + 1),
            "attention_mask": torch.ones(8, dtype=torch.long),
            "labels": torch.tensor(i % 3),
        }
        for i in range(10)
    ]
    data = DataLoader(rows, batch_size=4)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = IVON(trained, lr=0.1, ess=100.0, hess_init=1.0, weight_decay=1e-4)
    for batch in data:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    Posterior.from_optimizer(optimizer, model).save_pretrained(tmp_path)
    posterior = load_posterior(tmp_path, model)
    before = weights(model)
    with torch.no_grad():
        plain = torch.cat([
            model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in data
        ]).double()
    at_mean = posterior_predict(model, posterior, data, num_samples=0)
    averaged = posterior_predict(model, posterior, data, num_samples=4)
    assert torch.equal(at_mean.probabilities, plain.softmax(dim=1))
    assert averaged.labels.tolist() == [i % 3 for i in range(10)]
    assert torch.allclose(averaged.probabilities.sum(dim=1), torch.ones(10, dtype=torch.float64))
    assert not torch.allclose(averaged.probabilities, at_mean.probabilities, atol=1e-4)
    assert same(weights(model), before)


# Bad input


class Shuffled(list):
    """Batches that come in another order every time."""

    def __iter__(self):
        self.reverse()
        return super().__iter__()


X, Y = torch.arange(24.0).reshape(6, 4), torch.tensor([0, 1, 2, 0, 1, 1])
PAIRS = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (batches(X), {"num_samples": -1}, ValueError, "`num_samples` must be an integer of at least 0, got -1"),
        (batches(X), {"num_samples": 2.0}, ValueError, "`num_samples` must be an integer of at least 0, got 2.0"),
        (batches(X), {"num_samples": True}, ValueError, "`num_samples` must be an integer of at least 0, got True"),
        (batches(X), {"num_samples": 1, "seed": -1}, ValueError, r"`seed` must be an integer in \[0, 2\*\*63\)"),
        ([], {"num_samples": 1}, ValueError, "`data` must have at least one batch"),
        (iter(batches(X)), {"num_samples": 2}, ValueError, "must be readable once per weight sample, got list_iter"),
        (DataLoader(PAIRS, 2, shuffle=True), {"num_samples": 2}, ValueError, "a DataLoader that shuffles"),
        (
            DataLoader(PAIRS, 2, sampler=SubsetRandomSampler(range(6))),
            {"num_samples": 2},
            ValueError,
            "a SubsetRandomS",
        ),
        (DataLoader(PAIRS, sampler=WeightedRandomSampler([1.0], 6)), {"num_samples": 2}, ValueError, "a WeightedRand"),
        (Shuffled(batches(X, Y)), {"num_samples": 2}, ValueError, "same examples in the same order"),
        (Shuffled(batches(X[:4], size=2)), {"num_samples": 2}, ValueError, "same examples in the same order"),
        (Shuffled(batches(X, size=6) + batches(X[:5], Y[:5])), {"num_samples": 1}, ValueError, "5 labels for 11 ex"),
        (batches(X, torch.ones(6, 3)), {"num_samples": 1}, ValueError, "18 labels for 6 examples"),
        ([X], {"num_samples": 1}, TypeError, "must be a mapping of the model's arguments, got Tensor"),
        ([{"x": X[:, None, None]}], {"num_samples": 0}, ValueError, r"\(batch, tokens, classes\), got \(6, 1, 1, 3\)"),
    ],
)
def test_bad_arguments_are_named(data, options, error, message):
    """Rows of different examples would be averaged, or an empty evaluation pass for a result."""
    model = Linear(4, 3)
    before = weights(model)
    with pytest.raises(error, match=message):
        posterior_predict(model, posterior_of(model), data, **options)
    assert same(weights(model), before)


def test_samples_need_a_posterior():
    """The mean would be averaged with itself."""
    with pytest.raises(ValueError, match="`posterior` must be given for 2 weight samples"):
        posterior_predict(Linear(4, 3), None, batches(X), num_samples=2)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("multi_label_classification", "must predict one label an example"),
        ("regression", "one output for regression, got 3"),
    ],
)
def test_other_kinds_of_heads_are_refused(problem, message):
    """Softmax over independent labels or regression targets means nothing."""
    model = Linear(4, 3)
    model.config = BertConfig(problem_type=problem)
    with pytest.raises(ValueError, match=message):
        posterior_predict(model, posterior_of(model), batches(X), num_samples=1)


class Noisy:
    """A data set whose rows come with other random numbers, of every kind of tensor, each time."""

    def __init__(self, make):
        self.make, self.generator = make, torch.Generator().manual_seed(0)

    def __iter__(self):
        yield {"x": X, "more": self.make(self.generator)}


@pytest.mark.parametrize(
    "make",
    [
        lambda g: torch.randn(6, 3, 70, 70, generator=g).to(torch.bfloat16),
        lambda g: torch.randn(6, 5000, generator=g, dtype=torch.float64).T,
        lambda g: torch.randint(0, 2, (6, 40), generator=g) > 0,
        lambda g: torch.randint(0, 1000, (6,), generator=g),
        lambda g: torch.rand((), generator=g),
    ],
    ids=["bf16", "transposed", "bool", "one a row", "one"],
)
def test_other_inputs_in_the_second_pass_are_noticed(make):
    """Without labels nothing else shows that predictions for different inputs are averaged."""

    class Takes(Linear):
        def forward(self, x, more):
            return super().forward(x)

    model = Takes(4, 3)
    with pytest.raises(ValueError, match="same examples in the same order whenever it is read"):
        posterior_predict(model, posterior_of(model), Noisy(make), num_samples=2)
    fixed = [{"x": X, "more": make(torch.Generator().manual_seed(0))} for _ in range(2)]
    assert len(posterior_predict(model, posterior_of(model), fixed, num_samples=2).probabilities) == 12


def test_a_model_without_logits_is_told_what_to_do():
    """A `KeyError` says neither what the model gives, nor that there is another way."""
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertForQuestionAnswering(BertConfig(**sizes)).eval()
    message = "`model` must give `logits`, got `start_logits`, `end_logits`. Use `posterior.sampled`"
    data = [{"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}]
    with pytest.raises(ValueError, match=message):
        posterior_predict(model, None, data, num_samples=0)
    posterior = posterior_of(model)
    posterior.config = dataclasses.replace(posterior.config, num_examples=2)
    with pytest.raises(ValueError, match=message):
        estimate_sensitivity(model, posterior, data)
