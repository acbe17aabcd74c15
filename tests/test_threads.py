"""Predictions from several threads on one model: each is what it is alone, and the mean comes back."""

import sys
import threading

import pytest
import torch
from transformers import StoppingCriteriaList

from hf_ivon import Mixture, posterior_generate, posterior_perplexity, posterior_predict
from hf_ivon.mean import weights_lock
from hf_ivon.predict import evaluation_mode
from tests import tiny


@pytest.fixture(autouse=True)
def _many_switches():
    """Threads change places often, so that what they do to each other shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*calls):
    """Return what calls give that run at the same time."""
    found = {}

    def run(index, call):
        found[index] = call()

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[index] for index in range(len(calls))]


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def sentences():
    return [{"input_ids": row["input_ids"][None]} for row in tiny.sentences(6)]


def mixture_of(model):
    return Mixture([weights_of(model), weights_of(tiny.bert(seed=2))], [tiny.posterior_of(model, 0.3), None])


@pytest.mark.parametrize(
    "make", [lambda model: tiny.posterior_of(model, 0.3), mixture_of], ids=["posterior", "mixture"]
)
def test_predictions_take_turns(make):
    """One thread's weight sample would be the other's mean, and the last to leave would write it back for good."""
    model = tiny.bert(attention_probs_dropout_prob=0.5).train()
    posterior, before = make(model), weights_of(model)

    def sampled():
        return posterior_predict(model, posterior, sentences(), num_samples=4).probabilities

    def at_mean():
        return posterior_predict(model, None, sentences(), num_samples=0).probabilities

    calls = [sampled, at_mean, sampled, at_mean]
    expected = [call() for call in calls]
    assert all(map(torch.equal, together(*calls), expected))
    assert unchanged(model, before)
    assert all(module.training for module in model.modules())


def test_a_language_model_may_generate_and_be_evaluated_at_once():
    """Generation waited for its turn and everything else did not, so that each met the other's weights."""
    model = tiny.gpt2(pad_token_id=0).eval()
    posterior, before = tiny.posterior_of(model, 0.3), weights_of(model)
    batch = {"input_ids": torch.stack([row["input_ids"] for row in tiny.text(4)])}
    data = [{**batch, "labels": batch["input_ids"]}] * 4

    def generate():
        prompt = {"input_ids": batch["input_ids"][:, :3]}
        return posterior_generate(model, posterior, prompt, num_samples=3, max_new_tokens=4).tolist()

    def evaluate():
        return posterior_perplexity(model, posterior, data, num_samples=3)

    def by_hand():
        with posterior.sampled(model, torch.Generator().manual_seed(3)), torch.no_grad():
            return model(**batch).logits.tolist()

    calls = [generate, evaluate, by_hand]
    expected = [call() for call in calls]
    for _ in range(3):
        assert together(*calls) == expected
    assert unchanged(model, before)


def test_contexts_of_one_thread_stand_inside_each_other():
    """A stopping criterion that asks the posterior itself would wait for its own generation for ever."""
    model = tiny.gpt2(pad_token_id=0).eval()
    posterior, before = tiny.posterior_of(model), weights_of(model)

    def stop(ids, scores, **_):
        posterior_generate(model, posterior, {"input_ids": ids}, num_samples=1, max_new_tokens=1)
        with posterior.sampled(model), evaluation_mode(model), posterior.sampled(model):
            assert not unchanged(model, before)
        return torch.zeros(len(ids), dtype=torch.bool)

    def generate():
        prompt = {"input_ids": torch.tensor([[3, 4]])}
        criteria = StoppingCriteriaList([stop])
        return posterior_generate(
            model, posterior, prompt, num_samples=2, max_new_tokens=3, eos_token_id=None, stopping_criteria=criteria
        )

    [ids] = together(generate)
    assert ids.shape == (1, 5)
    assert unchanged(model, before)


def test_an_error_opens_the_lock():
    """One failed request would stop all threads after it."""
    model = tiny.bert()
    other = tiny.posterior_of(tiny.gpt2())
    with pytest.raises(ValueError, match="must belong to the model"), other.sampled(model):
        pass
    with pytest.raises(KeyboardInterrupt), tiny.posterior_of(model).sampled(model):
        raise KeyboardInterrupt
    assert together(lambda: weights_lock(model).acquire(timeout=0)) == [True]
