"""What `ess=auto` counts: examples or label tokens, exactly or estimated, without a trace in the training."""

import logging
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
)

from hf_ivon import IVONTrainer
from hf_ivon.training.ess import training_size
from tests import tiny


def trainer(tmp_path, model, data, **settings):
    more = {key: settings.pop(key) for key in ("data_collator",) if key in settings}
    args = tiny.arguments(tmp_path, **{"ivon_ess": "auto", **settings})
    return IVONTrainer(model=model, args=args, train_dataset=data, **more)


def resolved(trainer):
    trainer.create_optimizer()
    return trainer.ivon.param_groups[0]["ess"]


@pytest.mark.parametrize("num_labels", [1, 3])
def test_examples_for_classification_and_regression(tmp_path, caplog, num_labels):
    """A loss over examples would get the wrong temperature."""
    caplog.set_level(logging.INFO, "hf_ivon")
    made = trainer(tmp_path, tiny.bert(num_labels), tiny.sentences(21, num_labels))
    assert resolved(made) == 21
    assert training_size(made).num_tokens is None
    assert "ess=auto: 21 training examples." in caplog.text


def test_multi_label_rows_are_examples(tmp_path):
    """A row of 0/1 targets would be counted as tokens."""
    data = [{"input_ids": row["input_ids"], "labels": torch.tensor([0.0, 1.0, 1.0])} for row in tiny.text(6)]
    assert resolved(trainer(tmp_path, tiny.bert(problem_type="multi_label_classification"), data)) == 6


def test_packed_blocks_are_counted_without_their_first_token(tmp_path, caplog):
    """A causal model never predicts position 0; counting it, or sampling at all, would make the number inexact."""
    caplog.set_level(logging.INFO, "hf_ivon")
    assert resolved(trainer(tmp_path, tiny.gpt2(), tiny.text(24))) == 24 * (tiny.LENGTH - 1)
    assert "label tokens." in caplog.text


def test_causal_models_are_known_under_wrappers(tmp_path):
    """LoRA, `torch.compile` or a subclass would bring position 0 back in."""
    peft = pytest.importorskip("peft")

    class Own(type(tiny.gpt2())):
        pass

    lora = peft.get_peft_model(tiny.gpt2(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    for model in (lora, Own(tiny.gpt2().config), torch.compile(tiny.gpt2(), backend="eager")):
        made = trainer(tmp_path, model, tiny.text(3), remove_unused_columns=False)
        assert resolved(made) == 3 * (tiny.LENGTH - 1)


@pytest.mark.parametrize("kind", ["tagger", "masked", "seq2seq"])
def test_every_label_counts_where_nothing_is_shifted(tmp_path, kind):
    """Token classification, masked and encoder-decoder models predict position 0 too."""
    bert = tiny.bert().config
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    model = {
        "tagger": lambda: BertForTokenClassification(BertConfig(**{**bert.to_dict(), "num_labels": tiny.VOCABULARY})),
        "masked": lambda: BertForMaskedLM(bert),
        "seq2seq": lambda: BartForConditionalGeneration(
            BartConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=tiny.LENGTH, **sizes)
        ),
    }[kind]()
    data = tiny.text(12, ragged=True)
    assert resolved(trainer(tmp_path, model, data)) == sum(int((row["labels"] != -100).sum()) for row in data)


class Long(torch.utils.data.Dataset):
    """3,000 rows with as many labels as their index says, each access noted."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 3000

    def __getitem__(self, index):
        self.asked.append(index)
        labels = torch.arange(tiny.LENGTH)
        return {"input_ids": labels, "labels": labels.masked_fill(labels >= 2 + index % 7, -100)}


def draws():
    """One number of each global generator."""
    return random.random(), np.random.rand(), torch.rand(()).item()


def randomly_masking(rows):
    draws()
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def test_large_sets_are_estimated_without_a_trace(tmp_path, caplog):
    """All of a large set would be read before training, or the look at it would shift dropout and data order."""
    caplog.set_level(logging.INFO, "hf_ivon")
    data = Long()
    made = trainer(tmp_path, tiny.gpt2(), data, data_collator=randomly_masking)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    ess = resolved(made)
    assert draws() == expected
    assert len(data.asked) == len(set(data.asked)) == 1000
    assert max(data.asked) > 2900
    exact = sum(1 + index % 7 for index in range(3000))
    assert abs(ess / exact - 1) < 0.05
    assert f"ess=auto: {ess:.0f} label tokens (estimated)." in caplog.text


def test_columns_that_the_model_does_not_take(tmp_path):
    """Text columns of a data set, which the Trainer drops, would reach the collator and fail there."""
    rows = [{**{k: v.tolist() for k, v in row.items()}, "text": "a"} for row in tiny.text(5)]
    assert resolved(trainer(tmp_path, tiny.gpt2(), Dataset.from_list(rows))) == 5 * (tiny.LENGTH - 1)


def test_a_collator_may_change_its_examples(tmp_path):
    """The examples in memory would lose what the collator takes out of them, and training fail in the first batch."""

    def popping(examples):
        labels = torch.tensor([row.pop("labels") for row in examples])
        return {"input_ids": torch.stack([row["input_ids"] for row in examples]), "labels": labels}

    data = tiny.sentences(12)
    assert resolved(trainer(tmp_path, tiny.bert(), data, data_collator=popping, remove_unused_columns=False)) == 12
    assert all("labels" in row for row in data)


def test_examples_that_do_not_go_together_are_counted_one_by_one(tmp_path):
    """Training in batches of one needs no padding; counting in larger ones would stop it before it begins."""
    data = [{k: v[:n] for k, v in row.items()} for row, n in zip(tiny.text(6), (3, 4, 5, 6, 7, 8), strict=True)]
    assert resolved(trainer(tmp_path, tiny.gpt2(), data, per_device_train_batch_size=1)) == 3 + 4 + 5 + 6 + 7 + 8 - 6


class Stream(IterableDataset):
    def __iter__(self):
        yield from tiny.text(8)


class SizedStream(Stream):
    def __len__(self):
        return 8


@pytest.mark.parametrize(
    "data", [Stream(), SizedStream(), [{"input_ids": torch.ones(4), "labels": torch.ones(4)}] * 0]
)
def test_what_cannot_be_counted_needs_a_number(tmp_path, data):
    """A stream would train with a meaningless temperature, or fail with a message that does not say what to pass."""
    with pytest.raises(ValueError, match=r"`ivon_ess` must be a number.*Pass --ivon_ess: the number of training"):
        trainer(tmp_path, tiny.gpt2(), data).create_optimizer()


def test_no_label_at_all_is_an_error(tmp_path):
    """A data set whose labels are all masked would divide by nothing."""
    data = [{"input_ids": row["input_ids"], "labels": torch.full((tiny.LENGTH,), -100)} for row in tiny.text(3)]
    with pytest.raises(ValueError, match="has 0 of what the loss averages over"):
        trainer(tmp_path, tiny.gpt2(), data).create_optimizer()


def test_a_number_is_taken_as_it_is(tmp_path):
    """A stream with a given number would be refused; a given number would be overwritten."""
    made = trainer(tmp_path, tiny.gpt2(), Stream(), ivon_ess="1e6")
    made.train()
    assert made.ivon.param_groups[0]["ess"] == 1e6
    assert made.posterior().config.num_examples is None
    counted = trainer(tmp_path, tiny.gpt2(), tiny.text(6), ivon_ess=50, max_steps=1)
    counted.train()
    config = counted.posterior().config
    assert (config.ess, config.num_examples, config.num_tokens) == (50, 6, 6 * (tiny.LENGTH - 1))


def test_temperature_divides_what_is_counted(tmp_path):
    """A preset's lambda would be another than it says."""
    assert resolved(trainer(tmp_path, tiny.bert(), tiny.sentences(21), ivon_temperature=0.1)) == pytest.approx(210)


def test_the_width_of_predictions_leaves_that_of_training(tmp_path):
    """The flag would be read and ignored, or training would get the noise that is meant for averaging."""
    wide = trainer(tmp_path, tiny.bert(), tiny.sentences(21), ivon_eval_ess_scale=0.25, max_steps=1)
    wide.train()
    assert (wide.ivon.param_groups[0]["ess"], wide.posterior().config.ess) == (21, 21 * 0.25)


@pytest.mark.parametrize("approx", ["price", "fisher"])
def test_relative_sigma_is_the_widest_sigma(tmp_path, approx):
    """A preset's width would be another than it says, and one that is too wide destroys a pretrained model."""
    model = tiny.bert()
    size = torch.cat([p.detach().flatten() for p in model.parameters()]).square().mean().sqrt().item()
    settings = {"ivon_relative_sigma": 0.1, "ivon_hess_approx": approx, "ivon_ess": 1e6, "ivon_hess_init": None}
    settings |= {"weight_decay": None, "ivon_prior_on": "decay" if approx == "price" else "all"}
    made = trainer(tmp_path, model, tiny.sentences(21), **settings)
    made.create_optimizer()
    group, others = made.ivon.param_groups
    curvature = 0.0 if approx == "fisher" else group["hess_init"]
    assert (1e6 * (curvature + group["weight_decay"])) ** -0.5 == pytest.approx(0.1 * size, rel=1e-6)
    assert others["weight_decay"] == (0 if approx == "price" else group["weight_decay"])
    made.optimizer = None
    made.create_optimizer()  # again, as a second `train()` does: what was set is no reason to refuse
    assert made.ivon.param_groups[0]["weight_decay"] == group["weight_decay"]


def test_a_prior_that_lets_the_noise_destroy_the_model_is_warned_of(tmp_path, caplog):
    """AdamW's weight decay, or "tiny", beside the preset: the noise would soon be wider than the weights."""
    for weight_decay, warned in ((1e-6, True), (1e4, False)):
        caplog.clear()
        settings = {"ivon_preset": "finetuning", "weight_decay": weight_decay, "ivon_ess": None, "ivon_beta2": None}
        made = trainer(tmp_path, tiny.bert(), tiny.sentences(24), **settings, ivon_hess_init=None)
        made.create_optimizer()
        assert any("training will destroy the model" in r for r in caplog.messages) == warned


def test_the_averaging_preset_averages_over_more_than_it_trains_with(tmp_path):
    """Averaged predictions would be those of the narrow posterior of training, which are the mean's."""
    model = tiny.bert()
    size = torch.cat([p.detach().flatten() for p in model.parameters()]).square().mean().sqrt().item()
    settings = {"ivon_preset": "averaging", "learning_rate": None, "weight_decay": None, "ivon_hess_init": None}
    made = trainer(tmp_path, model, tiny.sentences(21), **settings)
    made.create_optimizer()
    group = made.ivon.param_groups[0]
    assert (group["ess"] * group["weight_decay"]) ** -0.5 == pytest.approx(0.05 * size, rel=1e-6)
    widest = made.ivon.posterior_variance(group["params"][0]).max().sqrt().item()
    assert widest == pytest.approx(0.05 / 0.05**0.5 * size, rel=1e-3)


def test_relative_sigma_that_cannot_be_is_refused(tmp_path):
    """The posterior would have no width, or a negative Hessian, and training end in NaN."""
    settings = {"ivon_relative_sigma": 0.1, "ivon_hess_init": None, "ivon_ess": 1e6}
    made = trainer(tmp_path, tiny.bert(), tiny.sentences(5), weight_decay=10.0, **settings)
    with pytest.raises(ValueError, match=r"must be below 0\.0.* with ess=1e\+06 and weight_decay=10, got 0.1"):
        made.create_optimizer()
    made = trainer(tmp_path, tiny.bert(), tiny.sentences(5), **settings)
    with torch.no_grad():
        for p in made.model.parameters():
            p.zero_()
    with pytest.raises(ValueError, match="must be 0 with trained weights that are all zero, got 0.1"):
        made.create_optimizer()


def test_fused_reaches_the_optimizer(tmp_path):
    """The warning of a missing compiler says to pass `fused=False`, which a Trainer's user could not."""
    made = trainer(tmp_path, tiny.bert(), tiny.sentences(5), ivon_fused=False, ivon_foreach=False)
    made.create_optimizer()
    assert (made.ivon.defaults["fused"], made.ivon.defaults["foreach"]) == (False, False)
