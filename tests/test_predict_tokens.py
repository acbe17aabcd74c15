"""Prediction with one label a token: which tokens are rows, and what is averaged; the bar of progress."""

import pytest
import torch

from hf_ivon.draws import sample_generator
from hf_ivon.predict import posterior_perplexity, posterior_predict
from tests import tiny


def token_batches():
    """Two batches of ragged sentences, lengths 8, 5 and 6; the first token of each has no label."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for lengths in ((8, 5), (6,)):
        length = torch.tensor(lengths)[:, None]
        mask = (torch.arange(max(lengths)) < length).long()
        ids = torch.randint(1, tiny.VOCABULARY, mask.shape, generator=generator)
        labels = torch.where(mask.bool(), ids % 4, -100)
        labels[:, 0] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def test_rows_are_the_tokens_that_have_a_label():
    """Padding and special tokens would count as predictions, or labels would stand beside other tokens' rows."""
    model, batches = tiny.tagger(), token_batches()
    found = posterior_predict(model, None, batches, num_samples=0)
    expected, labels = [], []
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for i, row in enumerate(batch["labels"].tolist()):
            for t, label in enumerate(row):
                if label != -100:
                    expected.append(logits[i, t].double().softmax(-1))
                    labels.append(label)
    assert len(labels) == 8 + 5 + 6 - 3
    assert found.labels.tolist() == labels
    assert torch.equal(found.probabilities, torch.stack(expected))
    assert found.entropy.shape == (len(labels),)


def test_tokens_are_averaged_over_the_weight_samples():
    """The average must be of the probabilities at the very draws of the seed, and leave the mean as it was."""
    model, batches = tiny.tagger(), token_batches()
    posterior = tiny.posterior_of(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = posterior_predict(model, posterior, batches, num_samples=3, seed=4)
    total = 0
    for index in range(3):
        with posterior.sampled(model, sample_generator(4, index)), torch.no_grad():
            rows = [
                model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[b["labels"] != -100]
                for b in batches
            ]
        total = total + torch.cat(rows).double().softmax(-1)
    torch.testing.assert_close(found.probabilities, total / 3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_without_labels_rows_are_the_tokens_that_are_not_masked():
    """Text to be tagged has no labels yet; padding is still no prediction."""
    model = tiny.tagger()
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in token_batches()]
    found = posterior_predict(model, None, batches, num_samples=0)
    assert found.labels is None
    assert len(found.probabilities) == 8 + 5 + 6
    bare = [{"input_ids": b["input_ids"]} for b in batches]
    assert len(posterior_predict(model, None, bare, num_samples=0).probabilities) == 2 * 8 + 6


def test_labels_of_another_shape_are_refused():
    """One label a sentence for a model that tags tokens is another task."""
    batches = [{**b, "labels": b["labels"][:, 0]} for b in token_batches()]
    with pytest.raises(ValueError, match=r"`labels` must be one per token, of shape \(2, 8\), got \(2,\)"):
        posterior_predict(tiny.tagger(), None, batches, num_samples=0)


def test_a_language_model_is_sent_to_its_own_measure():
    """Its labels are shifted by one token, and a row for every token would be as wide as the vocabulary."""
    rows = [{k: torch.stack([r[k] for r in tiny.text(2)]) for k in ("input_ids", "labels")}]
    with pytest.raises(ValueError, match="For a language model use `posterior_perplexity`"):
        posterior_predict(tiny.gpt2(), None, rows, num_samples=0)


def test_progress_is_shown_only_if_asked_for(capsys):
    """A library that draws bars unasked spoils logs; one that never does looks dead for an hour."""
    model, batches = tiny.bert(), [{"input_ids": torch.stack([r["input_ids"] for r in tiny.sentences(4)])}]
    posterior = tiny.posterior_of(model)
    silent = posterior_predict(model, posterior, batches, num_samples=2)
    assert capsys.readouterr().err == ""
    shown = posterior_predict(model, posterior, batches, num_samples=2, progress=True)
    text = capsys.readouterr().err
    assert "weight sample 1 of 2" in text
    assert "weight sample 2 of 2" in text
    assert torch.equal(shown.probabilities, silent.probabilities)
    language = tiny.gpt2()
    rows = [{k: torch.stack([r[k] for r in tiny.text(2)]) for k in ("input_ids", "labels")}]
    posterior_perplexity(language, None, rows, num_samples=0, progress=True)
    assert "mean" in capsys.readouterr().err
