"""One training step through the Trainer: the right gradients at the right draws, whatever runs around it."""

import functools
import inspect

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_ivon import IVON, IVONTrainer, IVONTrainerMixin, load_posterior
from hf_ivon.training.accelerate import unwrap_ivon
from tests import tiny
from tests.reference.ivon_reference import Reference


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Recorder(IVONTrainer):
    """Keeps the weights, inputs and loss of every forward pass in training, and the mean and Hessian of every step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.draws, self.steps, self.scales = [], [], []
        self.start = copies(self.model)
        self.add_callback(_AfterStep(self))

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.ivon.is_sampled:
            first = loss[0] if isinstance(loss, tuple) else loss
            self.draws.append((copies(self.model), inputs, first.item()))
        return loss


class _AfterStep(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        hess = {name: self.trainer.ivon.state[p]["hess"].clone() for name, p in self.trainer.model.named_parameters()}
        self.trainer.steps.append((copies(self.trainer.model), hess))


def record(tmp_path, model=None, data=None, **settings):
    args = tiny.arguments(tmp_path, **settings)
    trainer = Recorder(model=model or tiny.gpt2(), args=args, train_dataset=data or tiny.text())
    trainer.train()
    return trainer


def assert_same_run(one, two, **tolerance):
    assert len(one.steps) == len(two.steps) > 0
    for (mean, hess), (other_mean, other_hess) in zip(one.steps, two.steps, strict=True):
        for name in mean:
            torch.testing.assert_close(mean[name], other_mean[name], **(tolerance or {"rtol": 0, "atol": 0}))
            torch.testing.assert_close(hess[name], other_hess[name], **(tolerance or {"rtol": 0, "atol": 0}))


def windows(batches, accumulation, epoch):
    """Cut the batches of all epochs into optimizer steps; the last of an epoch may be short."""
    for start in range(0, len(batches), epoch):
        part = batches[start : start + epoch]
        yield from (part[i : i + accumulation] for i in range(0, len(part), accumulation))


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
@pytest.mark.parametrize(
    ("accumulation", "samples", "bf16"), [(1, 1, False), (3, 1, False), (3, 2, False), (3, 1, True)]
)
def test_steps_equal_a_hand_written_loop(tmp_path, accumulation, samples, bf16, max_grad_norm):
    """Losses of ragged micro-batches would be weighted wrongly, averaged twice, or the Hessian would see the clip."""
    data = tiny.text(10, ragged=True)  # 5 batches an epoch: windows of 3 and of 2
    trainer = record(
        tmp_path,
        data=data,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        ivon_mc_samples=samples,
        max_grad_norm=max_grad_norm,
        lr_scheduler_type="constant",
        bf16=bf16,
    )
    model = tiny.gpt2()
    options = {**trainer.args.ivon_options(), "lr": 0.1, "weight_decay": 1e-3}
    kept = {k: v for k, v in options.items() if k in inspect.signature(Reference).parameters and k != "prior_mean"}
    reference = {name: Reference(p, **kept) for name, p in trainer.start.items()}
    batches = [trainer.draws[i : i + samples] for i in range(0, len(trainer.draws), samples)]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    epoch = 5
    for step, window in enumerate(windows(batches, accumulation, epoch)):
        grads = {name: [] for name in reference}
        noises = {name: [] for name in reference}
        # Releases before 5.12 count the first token's label too, which the model does not predict.
        first = 1 if getattr(trainer, "_loss_shifts_labels", False) else 0
        num_items = sum(int((draws[0][1]["labels"][:, first:] != -100).sum()) for draws in window)
        total = 0.0
        for draws in window:
            for theta, inputs, _ in draws:
                model.load_state_dict(theta, strict=False)
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    logits = model(inputs["input_ids"]).logits[:, :-1].float()
                targets = inputs["labels"][:, 1:].reshape(-1)
                sums = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
                loss = sums / num_items / samples
                total += loss.item()
                parameters = dict(model.named_parameters())
                for name, grad in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                    grads[name].append(grad)
                    noises[name].append(theta[name].double() - reference[name].m)
        norm = torch.stack([sum(g).norm() for g in grads.values()]).norm()
        factor = 1.0 if not max_grad_norm else min(1.0, max_grad_norm / (norm.item() + 1e-6))
        assert max_grad_norm == 0.0 or factor < 0.5  # the clip is felt
        for name, own in reference.items():
            # What the clip takes off the gradient of the mean comes with no noise, so that hhat does not see it.
            clip = -(1 - factor) * sum(grads[name])
            own.step([*grads[name], clip], [*noises[name], torch.zeros_like(clip)], average=False)
            mean, hess = trainer.steps[step]
            tolerance = {"rtol": 2e-3, "atol": 2e-6} if bf16 else {"rtol": 2e-4, "atol": 1e-6}
            torch.testing.assert_close(mean[name].double(), own.m, **tolerance)
            torch.testing.assert_close(hess[name].double(), own.h, **tolerance)
            own.m, own.h = mean[name].double(), hess[name].double()  # errors shall not add up
        assert logged[step] == pytest.approx(total, rel=1e-3 if bf16 else 1e-4)
    assert step == 3


def test_draws_are_fresh_and_of_the_posteriors_width(tmp_path):
    """Micro-batches or samples would share a draw, or the noise would not have the width that the Hessian says."""
    settings = {"gradient_accumulation_steps": 2, "ivon_mc_samples": 2, "learning_rate": 0.0, "max_steps": 2}
    trainer = record(tmp_path, per_device_train_batch_size=2, **settings)
    width = trainer.ivon.param_groups[0]
    sigma = (width["ess"] * (width["hess_init"] + width["weight_decay"])) ** -0.5
    first = [
        torch.cat([(theta[k] - trainer.start[k]).flatten() for k in theta]) / sigma for theta, *_ in trainer.draws
    ]
    noise = torch.stack(first[:4])  # one step, all at the first Hessian
    num = noise.shape[1]
    assert (noise.std(1) - 1).abs().max() < 5 / (2 * num) ** 0.5
    assert torch.corrcoef(torch.stack(first)).fill_diagonal_(0).abs().max() < 5 / num**0.5


@pytest.mark.parametrize("num_labels", [1, 3])
def test_heads_that_ignore_the_number_of_items(tmp_path, num_labels):
    """BERT's heads drop `num_items_in_batch`: with accumulation the loss, and the Hessian, would be a multiple."""

    def gradient(accumulation, batch):
        model = tiny.bert(num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        size = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": batch, "ivon_ess": 1e14}
        trainer = record(tmp_path, model, tiny.sentences(num_labels=num_labels), max_steps=1, **size)
        return trainer.state.log_history[0]["grad_norm"], trainer.state.log_history[0]["loss"]

    assert gradient(2, 2) == pytest.approx(gradient(1, 4), rel=1e-3)


def test_a_batch_without_labels_decides_nothing(tmp_path):
    """A loss of 0 looks as if it ignored the number of items; all later losses would be weighted wrongly."""
    empty = [{"input_ids": row["input_ids"], "labels": torch.full((tiny.LENGTH,), -100)} for row in tiny.text(4)]
    trainer = record(tmp_path, data=empty, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=1)
    assert trainer.model_accepts_loss_kwargs
    assert not trainer._loss_checked


def test_evaluation_and_saving_see_the_mean(tmp_path):
    """Metrics or a checkpoint would be those of a random draw, also in the middle of an accumulation window."""
    seen = []

    class Watched(Recorder):
        def prediction_step(self, model, *args, **kwargs):
            seen.append(copies(self.model))
            return super().prediction_step(model, *args, **kwargs)

    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            mean = trainer.steps[-1][0] if trainer.steps else trainer.start
            directory = tmp_path / f"substep-{state.global_step}"
            trainer.save_model(directory)
            load_posterior(directory, type(trainer.model).from_pretrained(directory))
            trainer.evaluate(tiny.text(4))
            assert all(torch.equal(seen[-1][k], mean[k]) for k in mean)

    args = tiny.arguments(tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1, max_steps=3)
    trainer = Watched(model=tiny.gpt2(), args=args, train_dataset=tiny.text(), eval_dataset=tiny.text(4))
    trainer.add_callback(Interrupt())
    trainer.train()
    assert len(seen) == 6  # in each step once in the middle and once at the end
    for step, (mean, _) in enumerate(trainer.steps):
        assert all(torch.equal(seen[2 * step + 1][k], mean[k]) for k in mean)
        assert not any(torch.equal(theta[k], mean[k]) for theta, *_ in trainer.draws for k in mean)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    """The recomputed forward pass would run at other weights, or hooks would count a gradient twice."""
    plain = record(tmp_path, tiny.gpt2(0.1))
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert_same_run(plain, record(tmp_path, tiny.gpt2(0.1), **kwargs))


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"max_grad_norm": 0.05}], ids=str)
def test_low_memory_changes_roundings_alone(tmp_path, settings):
    """Who saves memory wants the same model; clipping comes after the Hessian has learned, as it should."""
    settings = {"ivon_foreach": False, **settings}  # small tensors by themselves, which keep no mean then
    kept = record(tmp_path / "kept", tiny.gpt2(0.1), **settings)
    saved = record(tmp_path / "saved", tiny.gpt2(0.1), **settings, ivon_low_memory=True)
    assert_same_run(kept, saved, rtol=1e-3, atol=1e-5)
    assert not torch.equal(*(run.steps[-1][0]["transformer.wte.weight"] for run in (kept, saved)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_low_memory_accumulates_with_gradient_checkpointing(tmp_path, reentrant):
    """Samples are taken off in the backward pass, which checkpointing runs in parts: all must be at one sample."""
    settings = {"ivon_foreach": False, "ivon_low_memory": True, "gradient_accumulation_steps": 2}
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain = record(tmp_path / "plain", tiny.gpt2(0.1), **settings)
    assert_same_run(plain, record(tmp_path / "checkpointing", tiny.gpt2(0.1), **settings, **kwargs))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_train_alike(tmp_path, backend):
    """A compiled graph would keep weights of another draw, or bypass the gradient hooks."""
    torch._dynamo.reset()
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    compiled = record(tmp_path / "compiled", torch_compile=True, torch_compile_backend=backend, **settings)
    assert_same_run(record(tmp_path / "plain", **settings), compiled, rtol=1e-4, atol=1e-6)
    load_posterior(tmp_path / "compiled" / "checkpoint-2")


def test_tied_embeddings_are_one_parameter(tmp_path):
    """The shared matrix would be drawn twice, or saved under a name that the model's file does not have."""
    trainer = record(tmp_path, max_steps=1)
    names = trainer.posterior().names()
    assert trainer.model.lm_head.weight is trainer.model.transformer.wte.weight
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    assert len(names) == len(copies(trainer.model))


def test_prior_on_decay_leaves_biases_and_norms_flat(tmp_path):
    """The prior would miss weights by default, or fall on biases when asked not to."""
    for prior_on, expected in (("all", {1e-3}), ("decay", {1e-3, 0.0})):
        trainer = record(tmp_path, max_steps=1, ivon_prior_on=prior_on)
        by_name = {n: g["weight_decay"] for g in trainer.ivon.param_groups for n in g["param_names"]}
        assert set(by_name.values()) == expected
        flat = {name for name, decay in by_name.items() if decay == 0.0}
        assert flat == ({n for n in by_name if "bias" in n or "ln_" in n} if prior_on == "decay" else set())


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_other_optimizers_run_as_in_transformers(tmp_path, optim):
    """The baseline would not be the baseline."""
    args = tiny.arguments(tmp_path, optim=optim, learning_rate=None, save_strategy="steps", save_steps=4)
    ours = IVONTrainer(model=tiny.gpt2(0.1), args=args, train_dataset=tiny.text())
    ours.train()
    same = {f: getattr(args, f) for f in ("output_dir", "max_steps", "per_device_train_batch_size", "logging_steps")}
    plain = TrainingArguments(**same, optim=optim, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
    theirs = Trainer(model=tiny.gpt2(0.1), args=plain, train_dataset=tiny.text())
    theirs.train()
    mine, others = copies(ours.model), copies(theirs.model)
    assert all(torch.equal(mine[k], others[k]) for k in mine)
    assert ours.ivon is None
    assert not list(tmp_path.rglob("posterior*"))
    assert not any(key.startswith("ivon") for entry in ours.state.log_history for key in entry)
    with pytest.raises(RuntimeError, match="no posterior.*Train with optim='ivon'"):
        ours.posterior()


def test_a_given_optimizer_is_used_as_it_is(tmp_path):
    """`optimizers=` and `optimizer_cls_and_kwargs=` would be overridden, or IVON in them not found."""
    model = tiny.gpt2()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = IVONTrainer(
        model=model, args=tiny.arguments(tmp_path), train_dataset=tiny.text(), optimizers=(adam, None)
    )
    trainer.train()
    assert trainer.optimizer.optimizer is adam
    plain = functools.partial(TrainingArguments, tmp_path, max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    model = tiny.gpt2()
    ivon = IVON(model.parameters(), lr=0.1, ess=100.0, clip_radius=1e-3)
    for given in ({"optimizers": (ivon, None)}, {"optimizer_cls_and_kwargs": (IVON, {"lr": 0.1, "ess": 100.0})}):
        trainer = IVONTrainer(model=model, args=plain(), train_dataset=tiny.text(5), **given)
        trainer.train()
        trainer.save_model(tmp_path / "saved")
        config = load_posterior(tmp_path / "saved", model).config
        assert (config.ess, config.num_examples, config.steps) == (100.0, 5, 1)
    late = IVONTrainer(model=model, args=plain(), train_dataset=tiny.text(5), optimizers=(ivon, None))
    late.args.fsdp, late.args.fsdp_config = True, {"version": 1}
    with pytest.raises(ValueError, match="does not support FSDP1"):
        late.create_optimizer()


def test_training_log_describes_the_posterior(tmp_path):
    """A user could not see whether the settings fit; evaluation records would carry training statistics."""
    trainer = record(tmp_path, eval_strategy="no", max_steps=2)
    trainer.evaluate(tiny.text(4))
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    statistics = {f"ivon_{name}" for name in trainer.ivon.statistics()}
    assert len(losses) == 2
    assert all(statistics | {"ivon_ess"} <= set(entry) for entry in losses)
    assert losses[0]["ivon_ess"] == 1e4
    assert {"ivon_sigma_q50", "ivon_hess_rel_q50", "ivon_snr_share", "ivon_clipped_share"} <= statistics
    assert not any(
        key.startswith("ivon") for entry in trainer.state.log_history if "loss" not in entry for key in entry
    )


def test_mistakes_are_said_before_training(tmp_path, caplog):
    """AdamW's learning rate, or plain arguments, would cost a training run to find out."""
    made = functools.partial(IVONTrainer, model=tiny.gpt2(), train_dataset=tiny.text(4))
    made(args=tiny.arguments(tmp_path, learning_rate=5e-5)).create_optimizer()
    assert "no weight moves by more than 5e-08 in a step" in caplog.text
    made(args=TrainingArguments(tmp_path, use_cpu=True, report_to=[], optim="sgd")).create_optimizer()
    assert "IVONTrainer trains with 'sgd' and without a posterior" in caplog.text
    caplog.clear()
    made(args=tiny.arguments(tmp_path, optim="sgd")).create_optimizer()
    made(args=tiny.arguments(tmp_path)).create_optimizer()
    assert not caplog.text
    for p in (frozen := tiny.gpt2()).parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="must have trainable parameters, got none"):
        IVONTrainer(model=frozen, args=tiny.arguments(tmp_path), train_dataset=tiny.text(4)).create_optimizer()


def test_the_mixin_goes_with_any_trainer(tmp_path):
    """A Trainer subclass with a step of its own would train at the mean."""

    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            assert self.ivon.is_sampled
            return super().training_step(model, inputs, num_items_in_batch)

    class Mixed(IVONTrainerMixin, Own):
        pass

    trainer = Mixed(model=tiny.gpt2(), args=tiny.arguments(tmp_path, max_steps=2), train_dataset=tiny.text())
    trainer.train()
    assert unwrap_ivon(trainer.optimizer) is trainer.ivon is not trainer.optimizer
    assert unwrap_ivon(None) is None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_running_out_of_memory_leaves_the_mean(tmp_path, accumulation):
    """`auto_find_batch_size` would go on from a random draw, or from half a gradient."""
    means = []

    class Small(Recorder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training and len(inputs["input_ids"]) > 4 and len(self.draws) == accumulation - 1:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

        def get_train_dataloader(self):
            means.append(copies(self.model))
            return super().get_train_dataloader()

    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 5, "max_steps": 2}
    args = tiny.arguments(tmp_path, gradient_accumulation_steps=accumulation, **settings)
    trainer = Small(model=tiny.gpt2(), args=args, train_dataset=tiny.text(ragged=True))
    trainer.train()
    assert trainer._train_batch_size == 4
    assert len(means) == 2
    assert all(torch.equal(mean[k], trainer.start[k]) for mean in means for k in mean)
    assert trainer.state.global_step == len(trainer.steps) == 2
    assert all(trainer.ivon.state[p]["step"] == 2 for p in trainer.model.parameters())
