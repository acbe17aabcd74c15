"""Curvature of models that IVON did not train: exact cases, independent sums, and its use as a posterior."""

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    GPT2ForSequenceClassification,
    PreTrainedConfig,
)

from hf_ivon import example_gradients, load_posterior, save_posterior
from hf_ivon.curvature import estimate_posterior
from hf_ivon.example_gradients import SquaredGradients
from hf_ivon.merge import merge
from tests import tiny

DELTA = 1e-3


class Linear(nn.Module):
    """Logits of a linear model, as a tensor."""

    def __init__(self, outputs, inputs=4, problem_type=None):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.config = PreTrainedConfig(problem_type=problem_type)

    def forward(self, x):
        return self.layer(x)


def batches(num=12, inputs=4, size=5):
    x = torch.randn(num, inputs, generator=torch.Generator().manual_seed(1))
    return [{"x": part} for part in x.split(size)], x


def test_linear_regression_is_exact():
    """The Gauss-Newton diagonal of a linear model is the mean squared input."""
    data, x = batches()
    posterior = estimate_posterior(Linear(1), data, estimator="ggn", weight_decay=DELTA)
    torch.testing.assert_close(posterior.hess("layer.weight")[0], x.square().mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(posterior.hess("layer.bias"), torch.ones(1), rtol=1e-4, atol=1e-6)
    assert (posterior.config.ess, posterior.config.num_examples, posterior.config.estimator) == (12.0, 12, "ggn")


def test_softmax_regression_is_exact():
    """For classes it is x² p (1 - p), averaged."""
    data, x = batches()
    model = Linear(3)
    posterior = estimate_posterior(model, data, estimator="ggn", weight_decay=DELTA)
    p = model(x).softmax(-1)
    expected = torch.einsum("nc,ni->ci", p * (1 - p), x.square()) / len(x)
    torch.testing.assert_close(posterior.hess("layer.weight"), expected.detach(), rtol=1e-4, atol=1e-6)


def test_several_numbers_are_exact():
    """With `problem_type` "regression" each output is a Gaussian of its own, and not a class."""
    data, x = batches()
    posterior = estimate_posterior(Linear(3, problem_type="regression"), data, estimator="ggn", weight_decay=DELTA)
    expected = x.square().mean(0).expand(3, -1)
    torch.testing.assert_close(posterior.hess("layer.weight"), expected, rtol=1e-4, atol=1e-6)


def test_several_labels_are_exact():
    """With `problem_type` "multi_label_classification" the outputs are a sigmoid's: x² p (1 - p) of each, averaged."""
    data, x = batches()
    model = Linear(3, problem_type="multi_label_classification")
    labels = {"labels": torch.ones(5, 3)}  # as floats, which is how Transformers wants them
    data = [{**batch, "labels": labels["labels"][: len(batch["x"])]} for batch in data]
    posterior = estimate_posterior(model, data, estimator="ggn", weight_decay=DELTA)
    p = model(x).sigmoid()
    expected = torch.einsum("nc,ni->ci", p * (1 - p), x.square()) / len(x)
    torch.testing.assert_close(posterior.hess("layer.weight"), expected.detach(), rtol=1e-4, atol=1e-6)
    model.config.problem_type = None
    with pytest.raises(
        ValueError, match=r"problem_type` must be set where `labels` are no classes, got None for torch.f"
    ):
        estimate_posterior(model, data)


@pytest.mark.parametrize(
    ("outputs", "problem"), [(1, None), (3, None), (3, "regression"), (3, "multi_label_classification")]
)
def test_squared_gradients_estimate_the_same(outputs, problem):
    """With labels drawn from the model the squared gradient is unbiased; with the data's labels it would not be.

    500 passes over 12 examples: the relative deviation of a squared normal residual's mean is sqrt(2 / 6,000) = 1.8%
    for equal inputs, and a few times that where one example has most of the sum; 5 deviations of 4%.
    """
    data, _ = batches()
    model = Linear(outputs, problem_type=problem)
    exact = estimate_posterior(model, data, estimator="ggn", weight_decay=DELTA)
    found = estimate_posterior(model, data * 500, weight_decay=DELTA)
    torch.testing.assert_close(found.hess("layer.weight"), exact.hess("layer.weight"), rtol=0.2, atol=1e-4)


@pytest.mark.parametrize("places", [[0], [1], [2, 5]])
def test_labels_of_tokens_belong_to_their_own_tokens(places):
    """Of a tagger a label is that of its token: shifted as for a language model, the curvature is that of others.

    With equal probabilities of C classes the squared residuals add up to 1 - 1/C whatever is drawn, and the squared
    gradient of the weights, over the classes, is that times the square of what the last layer sees at the token; for
    two tokens of a sequence in expectation, so here each sequence has one at a time.
    """
    model = tiny.tagger()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
    rows = torch.stack([r["input_ids"] for r in tiny.sentences(6)])
    labels = torch.full_like(rows, -100)
    for i, row in enumerate(labels):
        row[places[i % len(places)]] = 1
    mask = torch.ones_like(rows)
    mask[:3, 6:] = 0
    posterior = estimate_posterior(model, [{"input_ids": rows, "attention_mask": mask, "labels": labels}])
    seen = model.bert(rows, attention_mask=mask)[0].detach()[labels != -100]
    found = posterior.hess("classifier.weight").sum(0)
    torch.testing.assert_close(found, 0.75 * seen.square().mean(0), rtol=1e-3, atol=1e-6)
    assert (posterior.config.num_examples, posterior.config.num_tokens, posterior.config.ess) == (6, 6, 6)


def test_models_of_tokens_need_labels_for_them():
    """All tokens would count, also those that training left out; and a decoder has tokens of its own."""
    rows = torch.stack([r["input_ids"] for r in tiny.sentences(2)])
    for model in (tiny.tagger(), BertForMaskedLM(tiny.bert().config)):
        with pytest.raises(ValueError, match=r"`labels` must be one per token, of shape \(1, 8\), got none"):
            estimate_posterior(model, [{"input_ids": rows}])
    with pytest.raises(ValueError, match=r"must be one per token, of shape \(1, 8\), got \(1, 7\)"):
        estimate_posterior(tiny.gpt2(), [{"input_ids": rows, "labels": rows[:, 1:]}])
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "vocab_size": tiny.VOCABULARY}
    bart = BartForConditionalGeneration(BartConfig(**sizes, **heads, pad_token_id=0, eos_token_id=1, bos_token_id=2))
    with pytest.raises(ValueError, match="`model` must be a causal language model or classify tokens, got Bart"):
        estimate_posterior(bart, [{"input_ids": rows, "labels": rows}])


def test_language_models_count_tokens_and_skip_padding():
    """Padding must not count, ignored labels neither; N is what the loss averages over."""
    model = tiny.gpt2()
    rows = torch.stack([r["input_ids"] for r in tiny.text(6)])
    mask, labels = torch.ones_like(rows), rows.clone()
    mask[0, 5:] = 0
    labels[0, 5:] = -100
    labels[1, :4] = -100
    data = [{"input_ids": rows, "attention_mask": mask, "labels": labels}]
    posterior = estimate_posterior(model, data, weight_decay=DELTA)
    tokens = int((labels[:, 1:] != -100).sum())
    assert (posterior.config.num_examples, posterior.config.num_tokens, posterior.config.ess) == (6, tokens, tokens)
    rest = zip(rows[1:], labels[1:], strict=True)
    alone = [{"input_ids": rows[:1, :5]}, *({"input_ids": r[None], "labels": t[None]} for r, t in rest)]
    again = estimate_posterior(model, alone, weight_decay=DELTA)
    for name in posterior.names():
        torch.testing.assert_close(posterior.variance[name], again.variance[name], rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="must be 'squared-gradient' for a language model"):
        estimate_posterior(model, data, estimator="ggn")


def test_sum_over_tokens_equals_a_loop():
    """An independent sum: the squared gradient of each example's log-probability at the labels that were drawn."""
    model = tiny.bert(hidden_dropout_prob=0.5).train()
    rows = torch.stack([r["input_ids"] for r in tiny.sentences(5)])
    posterior = estimate_posterior(model, [{"input_ids": rows}], weight_decay=DELTA, train_size=100, seed=4)
    assert model.training
    model.eval()
    generator = torch.Generator().manual_seed(4)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        logits = model(input_ids=row[None]).logits[0]
        label = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        grads = torch.autograd.grad(logits.log_softmax(-1)[label].sum(), list(model.parameters()), allow_unused=True)
        for (name, _), g in zip(model.named_parameters(), grads, strict=True):
            total[name] += 0 if g is None else g.square()
    for name, value in total.items():
        torch.testing.assert_close(1 / (100 * (value / 5 + DELTA)), posterior.variance[name], rtol=1e-4, atol=0)
    assert posterior.config.num_examples == 100


def test_sums_in_stages_are_the_sum(monkeypatch):
    """In fp32 a sum of millions of squares would stop growing; the stages must lose none."""
    data, _ = batches()
    model = Linear(3)
    whole = estimate_posterior(model, data, weight_decay=DELTA)
    monkeypatch.setattr(SquaredGradients, "_STAGE", 5)
    staged = estimate_posterior(model, data, weight_decay=DELTA)
    for name in whole.names():
        torch.testing.assert_close(whole.variance[name], staged.variance[name], rtol=1e-5, atol=0)


def test_the_result_is_a_posterior_like_any_other(tmp_path):
    """Models trained with AdamW must merge by their curvature: saved, checked against the mean, merged."""
    names = []
    tiny.bert().save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        model = tiny.bert(seed=seed)
        rows = torch.stack([r["input_ids"] for r in tiny.sentences(6)])
        model.save_pretrained(tmp_path / str(seed))
        save_posterior(estimate_posterior(model, [{"input_ids": rows}]), tmp_path / str(seed))
        load_posterior(tmp_path / str(seed), model)
        names.append(str(tmp_path / str(seed)))
    report = merge(names, tmp_path / "out", base_model=tmp_path / "base")
    assert report["without_posterior"] == []


def test_adapters_only():
    """LoRA: the base is frozen and has no posterior; names are those of the adapter's file."""
    model = peft.get_peft_model(tiny.bert(), peft.LoraConfig(target_modules=["query"], r=2))
    rows = torch.stack([r["input_ids"] for r in tiny.sentences(3)])
    posterior = estimate_posterior(model, [{"input_ids": rows}])
    assert set(posterior.names()) == set(peft.get_peft_model_state_dict(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "hutchinson"}, "`estimator` must be one of squared-gradient, ggn, got 'hutchinson'"),
        ({"weight_decay": 0.0}, "`weight_decay` must be positive and finite, got 0.0"),
        ({"weight_decay": float("inf")}, "`weight_decay` must be positive and finite, got inf"),
        ({"scale": 0.0}, "`scale` must be positive and finite, got 0.0"),
        ({"scale": float("nan")}, "`scale` must be positive and finite, got nan"),
        ({"train_size": 0}, "`train_size` must be positive and finite, got 0"),
        ({"train_size": -5}, "`train_size` must be positive and finite, got -5"),
        ({"data": [{"labels": torch.zeros(2)}]}, "Each batch must hold tensors of the model's arguments, got none"),
        ({"data": []}, "`data` must hold examples that count, got none"),
    ],
)
def test_bad_input_is_named(settings, message):
    """A posterior of nothing would be a prior that looks learnt."""
    data, _ = batches()
    with pytest.raises(ValueError, match=message):
        estimate_posterior(Linear(2), **{"data": data, **settings})


def test_a_number_in_a_batch_is_of_no_example():
    """Some collators add how many items there are: it cannot be cut into examples, and ended in a traceback."""
    model = tiny.bert()
    rows = torch.stack([r["input_ids"] for r in tiny.sentences(3)])
    expected = estimate_posterior(model, [{"input_ids": rows}])
    for batch in (
        {"num_items": torch.tensor(3), "input_ids": rows},
        {"input_ids": rows, "num_items": torch.tensor(3)},
    ):
        found = estimate_posterior(model, [batch])
        assert all(torch.equal(found.variance[n], expected.variance[n]) for n in expected.variance)


def test_a_row_of_padding_is_no_example():
    """Loaders with batches of one size fill the last one up: it would end in an error of torch, or count as data."""
    model = tiny.bert()
    rows = torch.stack([r["input_ids"] for r in tiny.sentences(3)])
    mask = torch.ones_like(rows)
    filled = {"input_ids": torch.cat([rows, rows[:1]]), "attention_mask": torch.cat([mask, 0 * mask[:1]])}
    expected = estimate_posterior(model, [{"input_ids": rows, "attention_mask": mask}])
    found = estimate_posterior(model, [filled])
    assert found.config.num_examples == 3
    assert all(torch.equal(found.variance[n], expected.variance[n]) for n in expected.variance)


def test_a_small_share_is_still_of_an_example():
    """With λ = 0 all variances would be infinite, and the posterior could not be saved."""
    data, _ = batches()
    posterior = estimate_posterior(Linear(2), data, scale=1e-9)
    assert posterior.config.ess == posterior.config.num_examples == 1


def lora():
    return peft.get_peft_model(tiny.bert(), peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))


@pytest.mark.parametrize(
    ("make", "estimator"),
    [
        (tiny.bert, "squared-gradient"),
        (tiny.bert, "ggn"),
        (lambda: tiny.bert(num_labels=1), "ggn"),
        (lora, "squared-gradient"),
        (tiny.gpt2, "squared-gradient"),
        (tiny.tagger, "squared-gradient"),
    ],
)
def test_vectorised_gradients_are_those_of_single_examples(make, estimator, monkeypatch, caplog):
    """Taken together by `torch.func`, of other lengths and with padding, each example's square must be its own.

    The labels are drawn from the same numbers in the same order, so that the two differ by rounding alone.
    """
    model, rows = make(), torch.stack([r["input_ids"] for r in tiny.sentences(9)])
    mask, labels = torch.ones_like(rows), rows.clone()
    mask[:4, 5:], labels[:4, 5:], labels[6, :3] = 0, -100, -100
    data = [{"input_ids": rows, "attention_mask": mask}]
    if make in (tiny.gpt2, tiny.tagger):
        data[0]["labels"] = labels
    calls = []
    each = SquaredGradients._add_one
    monkeypatch.setattr(SquaredGradients, "_add_one", lambda *args: (calls.append(1), each(*args)))
    together = estimate_posterior(model, data, estimator=estimator, weight_decay=DELTA)
    assert len(calls) == 1  # the first, which shows how much an example holds
    assert not caplog.records
    monkeypatch.setattr(example_gradients, "_BUDGET", 1)
    alone = estimate_posterior(model, data, estimator=estimator, weight_decay=DELTA)
    assert len(calls) == 10
    for name in together.names():
        torch.testing.assert_close(together.hess(name), alone.hess(name), rtol=1e-3, atol=1e-6)
    assert together.config.num_examples == alone.config.num_examples == 9
    assert together.config.num_tokens == alone.config.num_tokens


def test_activations_count_in_what_is_held_at_once(monkeypatch):
    """Sixteen gradients of an adapter are small; sixteen long texts in a large model are not: memory would run out."""
    model, together = lora(), []
    rows = torch.stack([r["input_ids"] for r in tiny.sentences(6)])
    gradients = sum(p.numel() for p in model.parameters() if p.requires_grad)
    vectorised = SquaredGradients._vectorised

    def spy(totals, function, inputs, *args):
        together.append(len(inputs["input_ids"]))
        return vectorised(totals, function, inputs, *args)

    monkeypatch.setattr(SquaredGradients, "_vectorised", spy)
    monkeypatch.setattr(example_gradients, "_BUDGET", 6 * gradients)
    estimate_posterior(model, [{"input_ids": rows}])
    assert not together
    monkeypatch.setattr(example_gradients, "_BUDGET", 10**6)
    estimate_posterior(model, [{"input_ids": rows}])
    assert set(together) == {5}


def test_a_long_example_is_not_judged_by_a_short_one():
    """What attention holds grows with the square of the length, and data is often sorted: shortest first."""
    model = lora()
    totals = SquaredGradients(model, {n: p for n, p in model.named_parameters() if p.requires_grad})
    rows = torch.stack([r["input_ids"] for r in tiny.sentences(2)])
    for length, alone in ((2, True), (2, False), (4, False), (5, True), (5, False), (8, False)):
        one = {"input_ids": rows[:1, :length]}
        assert (totals.together(one) == 1) is alone, length
        if alone:
            totals.add(one, lambda logits: torch.ones_like(logits)[None])


def test_a_model_that_cannot_be_vectorised_is_taken_one_by_one(caplog):
    """Mixtures of experts, custom kernels: control flow that depends on the data ended in an error of `torch.func`."""

    class Gated(Linear):
        def forward(self, x):
            return self.layer(x) * (2.0 if x.sum() > 0 else 1.0)

    data, x = batches()
    model = Gated(3)
    posterior = estimate_posterior(model, data, estimator="ggn", weight_decay=DELTA)
    assert caplog.text.count("The gradients of Gated are taken one example at a time") == 1
    factor = torch.where(x.sum(1) > 0, 2.0, 1.0)
    p = torch.stack([model(row[None])[0] for row in x]).softmax(-1)
    expected = torch.einsum("n,nc,ni->ci", factor.square(), p * (1 - p), x.square()) / len(x)
    torch.testing.assert_close(posterior.hess("layer.weight"), expected.detach(), rtol=1e-4, atol=1e-6)


class Recurrent(nn.Module):
    """An LSTM, for which `torch.func` has no rule; it fails with words of its own."""

    def __init__(self):
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(tiny.VOCABULARY, 4), nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids):
        return self.head(self.recurrent(self.embedding(input_ids))[0][:, -1])


@pytest.mark.parametrize("make", [Recurrent, tiny.bert])
def test_whatever_cannot_be_vectorised_is_taken_one_by_one(make, monkeypatch):
    """Recurrent layers, layers compiled in place and others: they worked one by one, and must go on to."""
    rows = torch.stack([r["input_ids"] for r in tiny.sentences(6)])
    model = make()
    if make is tiny.bert:
        model.bert.encoder.layer[0].compile(backend="eager")
    found = estimate_posterior(model, [{"input_ids": rows}], estimator="ggn", weight_decay=DELTA)
    monkeypatch.setattr(example_gradients, "_BUDGET", 1)
    expected = estimate_posterior(model, [{"input_ids": rows}], estimator="ggn", weight_decay=DELTA)
    for name in expected.names():
        torch.testing.assert_close(found.hess(name), expected.hess(name), rtol=1e-3, atol=1e-6)


def test_other_trainable_parameters_keep_no_graph():
    """Beside an adapter a norm may be trained: the variances would carry a graph of all examples."""
    model = lora()
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "LayerNorm" in name)
    rows = torch.stack([r["input_ids"] for r in tiny.sentences(6)])
    posterior = estimate_posterior(model, [{"input_ids": rows}])
    assert not any(posterior.variance[name].requires_grad for name in posterior.names())


@pytest.mark.parametrize("outputs", [1, 3])
def test_outputs_may_be_squeezed(outputs):
    """A model of one's own may drop the batch's axis where it has one example; it was taken for several numbers."""

    class Squeezed(Linear):
        def forward(self, x):
            return self.layer(x).squeeze()

    data, _ = batches()
    model = Squeezed(outputs)
    expected = Linear(outputs)
    expected.load_state_dict(model.state_dict())
    found = estimate_posterior(model, data, estimator="ggn", weight_decay=DELTA)
    expected = estimate_posterior(expected, data, estimator="ggn", weight_decay=DELTA)
    assert found.config.num_examples == 12
    torch.testing.assert_close(found.hess("layer.weight"), expected.hess("layer.weight"))


def test_a_decoder_without_a_token_for_padding_classifies():
    """Transformers' decoders refuse batches where the configuration names no padding; examples here need none."""
    model = GPT2ForSequenceClassification(tiny.gpt2().config)
    rows = torch.stack([r["input_ids"] for r in tiny.sentences(6)])
    assert model.config.pad_token_id is None
    assert estimate_posterior(model, [{"input_ids": rows}]).config.num_examples == 6


def test_other_errors_of_a_model_are_its_own():
    """Only what `torch.func` cannot do is worked around: an error of the model must not be hidden."""

    class Broken(Linear):
        def forward(self, x):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        estimate_posterior(Broken(2), batches()[0])
