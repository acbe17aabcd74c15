"""Evaluation and prediction by the Trainer, averaged over the posterior that it is learning."""

import pytest
import torch

from hf_ivon import IVONTrainer, load_posterior
from tests import tiny


def trained(directory, model, data, **settings):
    """A trainer after training, with a posterior wide enough to matter."""
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"count": len(prediction.label_ids)}

    options = {"ivon_ess": 1e2, "ivon_eval_num_samples": 3} | settings
    trainer = IVONTrainer(
        model=model,
        args=tiny.arguments(directory, **options),
        train_dataset=data,
        eval_dataset=data[:6],
        compute_metrics=metrics,
    )
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize(
    ("config", "function"),
    [
        ({}, lambda x: x.softmax(-1)),
        ({"num_labels": 1}, lambda x: x),
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
    ],
)
def test_evaluate_and_predict_average_scores(tmp_path, monkeypatch, config, function):
    """Metrics of the mean would pass for those of the posterior, or logits be averaged in place of probabilities."""
    model = tiny.bert(**config)
    data = tiny.sentences(24, config.get("num_labels", 3))
    if "problem_type" in config:
        data = [{**row, "labels": torch.eye(3)[row["labels"]]} for row in data]
    trainer, seen = trained(tmp_path, model, data, per_device_eval_batch_size=6)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    outputs = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    for run in (trainer.evaluate, lambda: trainer.predict(data[:6]).metrics):
        outputs.clear()
        metrics = run()
        assert len(outputs) == 3
        scores = torch.stack([function(o.logits.double()) for o in outputs])
        found = function(torch.as_tensor(seen[-1].predictions).double())
        torch.testing.assert_close(found, scores.mean(0), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(scores[0], scores[1])
        loss = next(v for k, v in metrics.items() if k.endswith("_loss"))
        assert loss == pytest.approx(sum(o.loss.item() for o in outputs) / 3, rel=1e-5)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "draws"), [({}, 3), ({"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}, 6)]
)
def test_a_sample_holds_for_a_whole_pass(tmp_path, settings, draws):
    """Each batch would draw all samples anew; or predictions be averaged that were processed before."""
    data = tiny.sentences(24)
    trainer, seen = trained(tmp_path, tiny.bert(), data, per_device_eval_batch_size=3)
    for name, value in settings.items():
        setattr(trainer, name, value)
    weights, logits = [], []

    def watch(model, args, output):
        weights.append(model.classifier.weight.detach().clone())
        logits.append(output.logits.double())

    trainer.model.register_forward_hook(watch)
    metrics = trainer.evaluate()
    assert len(weights) == 6
    assert len({tuple(w.flatten().tolist()) for w in weights}) == draws
    assert (len(seen), metrics["eval_count"]) == (1, 6)
    halves = (logits[::2], logits[1::2]) if draws == 3 else (logits[:3], logits[3:])
    expected = torch.cat([torch.stack(half).softmax(-1).mean(0) for half in halves])
    found = torch.as_tensor(seen[0].predictions)
    if settings:
        assert torch.equal(found, expected.argmax(-1))
    else:
        torch.testing.assert_close(found.double().softmax(-1), expected, rtol=1e-5, atol=1e-5)


def test_metrics_see_inputs_and_losses(tmp_path):
    """Metrics that use them would fail, or see those of the last sample alone."""
    settings = {"include_for_metrics": ["inputs", "loss"], "per_device_eval_batch_size": 3}
    trainer, seen = trained(tmp_path, tiny.bert(), tiny.sentences(24), **settings)
    losses = []
    trainer.model.register_forward_hook(lambda model, args, output: losses.append(output.loss.item()))
    loss = trainer.evaluate()["eval_loss"]
    assert len(seen) == 1
    assert seen[0].inputs.shape[0] == 6
    assert seen[0].losses.mean() == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert loss == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert trainer.compute_metrics is not None
    trainer.evaluate()
    assert len(seen) == 2, "the metrics were not put back"


def test_evaluation_does_not_change_training(tmp_path):
    """Draws for evaluation must come from noise of their own, or whether one evaluates would change the result."""
    ends = []
    for number in (0, 2):
        model = tiny.bert()
        settings = {"eval_strategy": "steps", "eval_steps": 1, "ivon_eval_num_samples": number}
        trained(tmp_path / str(number), model, tiny.sentences(), **settings)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_language_models_average_their_loss(tmp_path):
    """Only the loss is computed for them; no vocabulary of probabilities is to be kept for every token."""
    model, data = tiny.gpt2(), tiny.text()
    trainer = IVONTrainer(
        model=model,
        args=tiny.arguments(tmp_path, ivon_eval_num_samples=2, per_device_eval_batch_size=6),
        train_dataset=data,
        eval_dataset=data[:6],
    )
    trainer.train()
    losses = []
    model.register_forward_hook(lambda module, args, output: losses.append(output.loss.item()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert len(set(losses)) == len(losses) == 2


def test_what_cannot_be_averaged_is_named(tmp_path, caplog):
    """Silence would print numbers of the mean under the name of the posterior."""
    model = tiny.bert()
    settings = {"model": model, "train_dataset": tiny.sentences(), "eval_dataset": tiny.sentences(4)}
    with pytest.raises(RuntimeError, match="no posterior to average over before training"):
        IVONTrainer(args=tiny.arguments(tmp_path, ivon_eval_num_samples=2), **settings).evaluate()
    with pytest.raises(ValueError, match="`ivon_eval_num_samples` must be an integer of at least 0, got -1"):
        tiny.arguments(tmp_path, ivon_eval_num_samples=-1)
    tiny.arguments(tmp_path, optim="adamw_torch", ivon_eval_num_samples=2)
    assert "No effect with optim='adamw_torch': ivon_eval_num_samples" in caplog.text
    model.config.output_hidden_states = True
    with pytest.raises(ValueError, match="predictions are not logits alone, got 2 outputs"):
        trained(tmp_path, model, tiny.sentences())[0].evaluate()


@pytest.mark.parametrize("flag", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_in_half_precision_keeps_the_mean(tmp_path, flag):
    """The base class casts the model when evaluation begins; the model would keep a random sample, and save it."""
    kept = []
    for samples in (0, 3):
        trainer, _ = trained(
            tmp_path / str(samples), tiny.bert(), tiny.sentences(), **{flag: True}, ivon_eval_num_samples=samples
        )
        mean = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.evaluate()
        for name, p in trainer.model.named_parameters():
            assert p.dtype == (torch.bfloat16 if flag.startswith("bf16") else torch.float16)
            assert torch.equal(p, mean[name].to(p.dtype)), name
        trainer.save_model()
        kept.append({
            n: p.detach() for n, p in type(trainer.model).from_pretrained(tmp_path / str(samples)).named_parameters()
        })
        load_posterior(tmp_path / str(samples), type(trainer.model).from_pretrained(tmp_path / str(samples)))
    plain, averaged = kept
    assert all(torch.equal(plain[name], averaged[name]) for name in plain)


def test_padding_stays_padding(tmp_path):
    """Positions that the Trainer filled up with -100 would come back as predictions, equal for every class."""
    model = tiny.tagger(3)
    data = [{k: v[:n] for k, v in row.items()} for row, n in zip(tiny.text(6), (3, 3, 5, 5, 8, 8), strict=True)]
    data = [{**row, "labels": row["labels"] % 3} for row in data]
    found = []
    for samples in (0, 3):
        options = {"ivon_eval_num_samples": samples, "per_device_eval_batch_size": 2}
        args = tiny.arguments(tmp_path, per_device_train_batch_size=1, **options)
        trainer = IVONTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
        trainer.create_optimizer()
        found.append(torch.as_tensor(trainer.predict(data).predictions))
    mean, averaged = found
    assert mean.shape == averaged.shape == (6, 8, 3)
    padded = mean == -100
    assert padded.any()
    assert torch.equal(padded, averaged == -100)
    torch.testing.assert_close(averaged.softmax(-1), mean.softmax(-1), rtol=0.5, atol=0.1)
