"""What the Trainer writes: a posterior beside every mean, and of the same step."""

from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, TrainerCallback

from hf_ivon import IVONTrainer, PosteriorFormatError, load_posterior
from hf_ivon.checkpoint import posterior_files
from hf_ivon.mean import posterior_keys
from tests import tiny


def lora(**config):
    torch.manual_seed(3)
    return peft.get_peft_model(
        tiny.gpt2(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, r=2, **config)
    )


def trained(directory, model=None, **settings):
    args = tiny.arguments(directory, **settings)
    trainer = IVONTrainer(model=model or tiny.gpt2(), args=args, train_dataset=tiny.text())
    trainer.train()
    return trainer


def assert_pair(directory, trainer):
    """The directory's mean and posterior are the Trainer's, bit for bit."""
    (file,) = [f for f in Path(directory).glob("*model.safetensors")]
    mean, saved, now = load_file(file), load_posterior(directory), trainer.posterior()
    parameters = posterior_keys(trainer.model)
    assert saved.names() == now.names()
    for name in saved.names():
        assert torch.equal(mean[name], parameters[name])
        assert torch.equal(saved.variance[name], now.variance[name])


@pytest.mark.parametrize("only_model", [False, True])
def test_every_directory_holds_the_pair(tmp_path, only_model):
    """A checkpoint or the final model would come without its posterior, or with that of another step."""
    saved = []

    class Check(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.append(state.global_step)
            assert_pair(tmp_path / f"checkpoint-{state.global_step}", trainer)

    args = tiny.arguments(tmp_path, save_strategy="steps", save_steps=2, save_only_model=only_model)
    trainer = IVONTrainer(model=tiny.gpt2(), args=args, train_dataset=tiny.text(), callbacks=[Check()])
    trainer.train()
    trainer.save_model()
    assert saved == [2, 4]
    assert_pair(tmp_path, trainer)
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists() is not only_model
    config = load_posterior(tmp_path, GPT2LMHeadModel.from_pretrained(tmp_path)).config
    assert (config.steps, config.estimator, config.ess, config.betas) == (4, "ivon-price", 1e4, (0.9, 0.9))
    assert (config.num_examples, config.num_tokens) == (24, 24 * (tiny.LENGTH - 1))


def test_lora_moves_and_saves_adapters_only(tmp_path):
    """The base model would be sampled or moved, or the posterior's names would not be those of the adapter's file."""
    model = lora()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trained(tmp_path, model, save_strategy="steps", save_steps=2)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is ("lora_" not in name)
        assert (p in trainer.ivon.state) is ("lora_" in name)
    trainer.save_model()
    for directory in (tmp_path, tmp_path / "checkpoint-4"):
        assert_pair(directory, trainer)
        assert set(load_posterior(directory).names()) == set(load_file(directory / "adapter_model.safetensors"))
        load_posterior(directory, peft.PeftModel.from_pretrained(tiny.gpt2(), directory))


@pytest.mark.parametrize("only_model", [False, True])
@pytest.mark.parametrize("make", [tiny.gpt2, lora])
def test_the_best_model_comes_with_its_own_posterior(tmp_path, make, only_model):
    """The final directory would pair the best mean with the last Hessian."""
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.0])
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "score", "save_only_model": only_model}
    settings |= {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    trainer = IVONTrainer(
        model=make(),
        args=tiny.arguments(tmp_path, greater_is_better=True, **settings),
        train_dataset=tiny.text(),
        eval_dataset=tiny.text(4),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    trainer.save_model()
    best, last, final = (load_posterior(tmp_path / d) for d in ("checkpoint-2", "checkpoint-4", "."))
    assert_pair(tmp_path, trainer)
    for name, p in posterior_keys(trainer.model).items():
        if name in best.variance:
            assert torch.equal(final.variance[name], best.variance[name])
            assert not torch.equal(final.variance[name], last.variance[name])
            torch.testing.assert_close(trainer.ivon.posterior_variance(p), best.variance[name], rtol=1e-5, atol=0)
    assert final.config == best.config
    assert final.config.steps == 2
    trainer.args.max_steps = 1  # training goes on from there: the posterior is that of the optimizer again
    trainer.args.load_best_model_at_end = False
    trainer.train()
    assert trainer.posterior().config.steps == 5


def test_a_best_model_without_posterior_is_an_error(tmp_path):
    """The last Hessian would be saved beside the best mean without a word."""

    class Lose(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            for file in posterior_files(tmp_path / f"checkpoint-{state.global_step}"):
                file.unlink()

    settings = {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}
    args = tiny.arguments(tmp_path, max_steps=1, **settings)
    data = {"train_dataset": tiny.text(4), "eval_dataset": tiny.text(4)}
    trainer = IVONTrainer(model=tiny.gpt2(), args=args, callbacks=[Lose()], **data)
    with pytest.raises(PosteriorFormatError, match="checkpoint-1.*is missing"):
        trainer.train()


def test_card_keeps_its_tags(tmp_path):
    """The tags that let people find models with a posterior would replace the user's, or be lost."""
    trainer = trained(tmp_path, max_steps=1)
    trainer.save_model()
    trainer.create_model_card(tags="mine", model_name="a")
    assert {"mine", "ivon", "posterior"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)
    trainer.create_model_card(None, None, ["other"], "b")
    assert {"other", "mine", "ivon"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)
    unsaved = trained(tmp_path / "unsaved", max_steps=1)
    unsaved.create_model_card()
    assert "posterior" not in ModelCard.load(tmp_path / "unsaved" / "README.md").data.tags
    plain = trained(tmp_path / "adam", optim="adamw_torch", max_steps=1)
    plain.create_model_card()
    assert "posterior" not in (ModelCard.load(tmp_path / "adam" / "README.md").data.tags or [])


def test_a_shorter_posterior_replaces_an_earlier_one(tmp_path):
    """Files of an earlier push in more shards would stay beside the new posterior."""
    from hf_ivon.checkpoint import save_posterior
    from hf_ivon.training.trainer import _replace_posterior

    posterior = trained(tmp_path, max_steps=1).posterior()
    save_posterior(posterior, tmp_path / "sharded", max_shard_size=8000)
    save_posterior(posterior, tmp_path / "single")
    assert len(posterior_files(tmp_path / "sharded")) > 3
    _replace_posterior(tmp_path / "sharded", tmp_path / "target")
    load_posterior(tmp_path / "target")
    _replace_posterior(tmp_path / "single", tmp_path / "target")
    assert {f.name for f in (tmp_path / "target").iterdir()} == {"posterior.safetensors", "posterior_config.json"}


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_adapters_that_save_something_else_are_refused_before_training(tmp_path, kind):
    """Their files hold what a network makes of the trained weights; that would show at the end, at the first save."""
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny.gpt2(), config)
    trainer = IVONTrainer(model=model, args=tiny.arguments(tmp_path), train_dataset=tiny.text())
    with pytest.raises(ValueError, match=rf"got PeftModelForCausalLM with {kind}, which saves .* such as LoRA"):
        trainer.train()
    assert trainer.state.global_step == 0
