"""How the Trainer's loss is scaled, which is looked at before the first step, and what a step's loss averages over."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_ivon import IVONTrainer, IVONTrainerMixin, functional
from tests import tiny


class Head(nn.Module):
    """A classifier that drops the number of items, has a buffer and dropout, and a loss in training only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear, self.dropout = nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Dropout(0.5)

    def forward(self, x, labels=None, **kwargs):
        logits = self.linear(self.dropout(self.norm(x)))
        loss = {"loss": nn.functional.cross_entropy(logits, labels)} if self.training else {}
        return {**loss, "logits": logits}


def rows(num=16):
    x = torch.randn(num, 3, generator=torch.Generator().manual_seed(0))
    return [{"x": x[i], "labels": int(x[i].sum() > 0)} for i in range(num)]


class Keeping(IVONTrainer):
    """Keeps numbers in `compute_loss`, as TRL's trainers do."""

    def __init__(self, *args, **kwargs):
        self._metrics, self._total_train_tokens = {"train": {"size": []}, "eval": {"size": []}}, 0
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self._metrics["train" if model.training else "eval"]["size"].append(len(inputs["x"]))
        self._total_train_tokens += len(inputs["x"])
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_the_look_at_the_loss_leaves_no_trace(tmp_path):
    """A run would go on in another mode, with other buffers, dropout or metrics than one that needs no look."""
    ends = []
    for known in (False, True):
        args = tiny.arguments(tmp_path, gradient_accumulation_steps=2)
        trainer = Keeping(model=Head(), args=args, train_dataset=rows())
        trainer.model_accepts_loss_kwargs = not known
        trainer.train()
        assert not trainer.model_accepts_loss_kwargs, "the head drops the number of items"
        assert trainer._loss_checked is not known
        assert trainer._metrics == {"train": {"size": [4] * 8}, "eval": {"size": []}}
        assert trainer._total_train_tokens == 32
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


def test_the_look_keeps_the_mode_of_every_module(tmp_path):
    """A Trainer whose own training step sets no mode would train the whole run in another one."""

    class Own(Trainer):
        modes = []

        def training_step(self, model, inputs, num_items_in_batch=None):
            Own.modes.append([module.training for module in model.modules()])
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    model = Head().train()
    model.norm.eval()  # frozen, as some train
    expected = [module.training for module in model.modules()]
    args = tiny.arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    trainer = type("Mixed", (IVONTrainerMixin, Own), {})(model=model, args=args, train_dataset=rows())
    trainer.train()
    assert trainer._loss_checked
    assert Own.modes == [expected] * 4


def test_a_loss_that_cannot_be_looked_at_is_believed(tmp_path, caplog):
    """A Trainer whose loss needs more than a batch would crash in a look that it did not ask for."""

    class Particular(IVONTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if not self.ivon.is_sampled:
                raise KeyError("weight")
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = tiny.arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = Particular(model=Head(), args=args, train_dataset=rows())
    trainer.train()
    assert (trainer.state.global_step, trainer.model_accepts_loss_kwargs) == (4, True)
    assert caplog.text.count("could not be found out: KeyError: 'weight'") == 1
    assert "set `trainer.model_accepts_loss_kwargs = False`" in caplog.text


@pytest.mark.parametrize(("samples", "accumulation"), [(1, 1), (2, 1), (3, 2)])
def test_a_step_may_change_its_inputs(tmp_path, samples, accumulation):
    """With several weight samples the second would miss what the first took out of the batch."""

    class Weighted(IVONTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return inputs.pop("weight").mean() * super().compute_loss(model, inputs, *args, **kwargs)

        def _prepare_inputs(self, inputs):
            return inputs

    data = [{**row, "weight": 1.0} for row in tiny.sentences()]
    settings = {"ivon_mc_samples": samples, "gradient_accumulation_steps": accumulation, "max_steps": 2}
    args = tiny.arguments(tmp_path, remove_unused_columns=False, **settings)
    trainer = Weighted(model=tiny.bert(), args=args, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 2


class _Watch(TrainerCallback):
    """Keeps the gradient of every step."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in self.trainer.model.named_parameters()})


class Counted(IVONTrainer):
    """Keeps the items of every micro-batch, in windows."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.counts = {}
        self.watch = _Watch(self)
        self.add_callback(self.watch)

    def training_step(self, model, inputs, *args, **kwargs):
        labels = inputs["labels"]
        items = int((labels[:, 1:] != -100).sum()) if labels.dim() > 1 else len(labels)
        self.counts.setdefault(self.state.global_step, []).append(items)
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("make", "data", "settings", "sizes"),
    [
        pytest.param(tiny.bert, tiny.sentences(10), {}, [4, 4, 2], id="a small last batch"),
        pytest.param(tiny.bert, tiny.sentences(10), {"gradient_accumulation_steps": 2}, [8, 2], id="a short window"),
        # Weights 1/12 for eight examples, 1/6 for two: 1 / (8/144 + 2/36)
        pytest.param(tiny.bert, tiny.sentences(10), {"gradient_accumulation_steps": 3}, [9], id="unequal parts"),
        pytest.param(tiny.gpt2, tiny.text(10, ragged=True), {"gradient_accumulation_steps": 2}, None, id="tokens"),
        pytest.param(tiny.bert, tiny.sentences(10), {"ivon_batch_size": 5}, [5, 5, 5], id="given"),
    ],
)
def test_each_step_counts_what_its_loss_averages_over(tmp_path, make, data, settings, sizes):
    """With a constant, a small last batch would count as many times as it is smaller, in every Hessian, silently."""
    shared = {"ivon_hess_approx": "fisher", "max_grad_norm": 0.0, "max_steps": 6}
    trainer = Counted(model=make(), args=tiny.arguments(tmp_path, **shared, **settings), train_dataset=data)
    trainer.train()
    counts = [trainer.counts[step] for step in range(6)]
    expected = [sum(parts) for parts in counts] if sizes is None else (sizes * 6)[:6]
    for name, p in trainer.model.named_parameters():
        hess = torch.full_like(p, 0.1)
        for t, (grads, size) in enumerate(zip(trainer.watch.steps, expected, strict=True), 1):
            decay = functional.debiased_decay(0.9, step=t)
            hess = decay * hess + (1 - decay) * size * grads[name].square()
        torch.testing.assert_close(trainer.ivon.state[p]["hess"], hess, rtol=1e-4, atol=1e-7)
    assert trainer.ivon.param_groups[0]["batch_size"] == pytest.approx(expected[-1])


def test_a_pair_is_one_example(tmp_path):
    """Rows of a batch would be counted, and a collator that makes two of an example double the Hessian."""

    def pairs(examples):
        return {"x": torch.stack([row["x"] for row in examples] * 2), "labels": torch.tensor([0, 1] * len(examples))}

    args = tiny.arguments(tmp_path, ivon_hess_approx="fisher", max_steps=3)
    trainer = IVONTrainer(model=Head(), args=args, train_dataset=rows(10), data_collator=pairs)
    trainer.train()
    assert trainer.ivon.param_groups[0]["batch_size"] == 2.0


@pytest.mark.parametrize("preset", ["finetuning", "averaging"])
def test_the_batch_size_follows_the_memory(tmp_path, preset):
    """`auto_find_batch_size` would leave the size that ran out of memory: every Hessian a multiple, silently."""

    class Small(IVONTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training and len(inputs["input_ids"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

        def _prepare_for_training(self, *args, **kwargs):
            result = super()._prepare_for_training(*args, **kwargs)
            sizes.append((self._train_batch_size, self.ivon.param_groups[0]["batch_size"]))
            return result

    sizes = []
    settings = {"ivon_preset": preset, "weight_decay": None, "ivon_hess_init": None, "ivon_ess": None, "max_steps": 2}
    args = tiny.arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=16, **settings)
    trainer = Small(model=tiny.bert(), args=args, train_dataset=tiny.sentences(64))
    trainer.train()
    assert trainer._train_batch_size == trainer.ivon.param_groups[0]["batch_size"] == 4
    assert all(used == told for used, told in sizes), "what is not counted step by step must follow too"
