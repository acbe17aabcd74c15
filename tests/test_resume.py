"""`resume_from_checkpoint` continues bit for bit: weights, state, noise and logged loss."""

import peft
import pytest
import torch

from hf_ivon import IVONTrainer, load_posterior
from tests import tiny

STEPS = 6


def lora(seed=1):
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, r=2, lora_dropout=0.1)
    base = tiny.gpt2(0.1, seed=1)
    torch.manual_seed(seed)
    return peft.get_peft_model(base, config)


def full(seed=1):
    return tiny.gpt2(0.1, seed=seed)


def bf16(seed=1):
    return tiny.gpt2(0.1, seed=seed).to(torch.bfloat16)


class Drawn(IVONTrainer):
    """Keeps the weights of every forward pass in training by optimizer step."""

    def compute_loss(self, model, *args, **kwargs):
        loss = super().compute_loss(model, *args, **kwargs)
        if model.training and (self.ivon is None or self.ivon.is_sampled):
            theta = torch.cat([p.detach().flatten().float() for p in model.parameters() if p.requires_grad])
            self.__dict__.setdefault("drawn", []).append((self.state.global_step, theta))
        return loss


def run(directory, model, resume=None, **settings):
    # 10 examples in batches of 2: an epoch ends at step 5, so that the checkpoint lies in the middle of one
    defaults = {"per_device_train_batch_size": 2, "max_steps": STEPS, "save_strategy": "steps", "save_steps": 3}
    args = tiny.arguments(directory, **{**defaults, **settings})
    trainer = Drawn(model=model, args=args, train_dataset=tiny.text(10, ragged=True))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def learnt(trainer):
    """All tensors that a continuation depends on, by name."""
    result = {}
    for name, p in trainer.model.named_parameters():
        result[name] = p.detach()
        state = trainer.ivon.state[p] if p.requires_grad else {}
        result |= {f"{name}.{key}": value for key, value in state.items()}
    return result


def log(trainer, after):
    """The training log's records after a step, without durations."""
    return [e for e in trainer.state.log_history if e["step"] > after and "loss" in e]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        pytest.param(full, {}, id="full"),
        pytest.param(full, {"gradient_accumulation_steps": 2}, id="full, accumulation"),
        pytest.param(full, {"ivon_mc_samples": 2}, id="full, samples"),
        pytest.param(full, {"ivon_hess_approx": "fisher"}, id="full, Fisher"),
        pytest.param(full, {"ivon_low_memory": True, "ivon_foreach": False, "gradient_accumulation_steps": 2},
                     id="full, low memory"),
        pytest.param(full, {"gradient_accumulation_steps": 3, "ivon_mc_samples": 2, "ivon_prior_mean": "init",
                            "ivon_prior_on": "decay", "ivon_hess_approx": "gradsq"}, id="full, everything"),
        pytest.param(bf16, {"gradient_accumulation_steps": 2}, id="bf16 parameters"),
        pytest.param(full, {"bf16": True}, id="bf16 autocast"),
        pytest.param(lora, {}, id="LoRA"),
        pytest.param(lora, {"gradient_accumulation_steps": 2, "ivon_mc_samples": 2}, id="LoRA, everything"),
    ],
)  # fmt: skip
def test_interrupted_run_equals_the_straight_one(tmp_path, make, settings):
    """State outside the checkpoint (a step counter, noise, a prior mean) would make a resumed run another run."""
    straight = run(tmp_path, make(), **settings)
    # Another start and seed: everything must come from the checkpoint. LoRA's base is no part of one.
    resumed = run(tmp_path, make(seed=9), resume=str(tmp_path / "checkpoint-3"), **settings)
    expected, found = learnt(straight), learnt(resumed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name].dtype == found[name].dtype
        assert torch.equal(expected[name], found[name]), name
    windows = {trainer.ivon.param_groups[0]["window"] for trainer in (straight, resumed)}
    assert windows == {STEPS}
    draws = [theta for step, theta in straight.drawn if step >= 3]
    assert len(draws) == len(resumed.drawn) >= 3
    assert all(torch.equal(a, b) for a, (_, b) in zip(draws, resumed.drawn, strict=True))
    assert log(resumed, after=3) == log(straight, after=3)
    assert len(log(straight, after=3)) == 3


def test_resumed_run_ends_with_the_same_posterior(tmp_path):
    """The saved posterior of a resumed run would not be the one of the straight run."""
    run(tmp_path, full())
    first = load_posterior(tmp_path / "checkpoint-6").to("cpu")  # read now: the files are written again
    run(tmp_path, full(seed=9), resume=str(tmp_path / "checkpoint-3"))
    second = load_posterior(tmp_path / "checkpoint-6")
    assert all(torch.equal(first.variance[name], second.variance[name]) for name in first.names())
    assert first.config == second.config


def test_another_optimizers_checkpoint_is_refused(tmp_path):
    """Resuming an AdamW run with IVON would take AdamW's state for the posterior."""
    run(tmp_path, full(), optim="adamw_torch", max_steps=3)
    with pytest.raises(ValueError, match="Resume with the optimizer that wrote it"):
        run(tmp_path, full(), resume=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_without_state_is_told(tmp_path, caplog):
    """The Hessian would start again, silently, although a posterior lies beside the weights."""
    run(tmp_path, full(), save_only_model=True)
    resumed = run(tmp_path, full(seed=9), resume=str(tmp_path / "checkpoint-3"))
    assert "checkpoint-3' holds no state of the optimizer (`save_only_model`)" in caplog.text
    assert {int(resumed.ivon.state[p]["step"]) for p in resumed.model.parameters()} == {STEPS - 3}
    caplog.clear()
    run(tmp_path, full(), resume=str(tmp_path / "checkpoint-6"), max_steps=7)
    assert "holds no state" not in caplog.text


def test_a_resumed_run_says_which_options_it_keeps(tmp_path, caplog):
    """A run resumed with another preset would go on with the old options, and log the new ones."""
    preset = {"ivon_preset": "finetuning", "weight_decay": None, "ivon_hess_init": None, "ivon_beta2": None}
    run(tmp_path / "a", full(), max_steps=3, **preset)
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    caplog.clear()
    same = run(tmp_path / "same", full(), resume=checkpoint, **preset)
    assert not [r for r in caplog.messages if "keeps the options" in r]
    paper = {"ivon_beta1": 0.8, "ivon_eval_ess_scale": 0.5, "weight_decay": 1e-3}
    other = run(tmp_path / "other", full(), resume=checkpoint, **paper)
    (said,) = [r for r in caplog.messages if "keeps the options" in r]
    assert "hess_approx=fisher (and not price)" in said
    assert "beta1=0.9 (and not 0.8)" in said
    group = other.ivon.param_groups[0]
    assert group["eval_ess_scale"] == 0.5, "predictions do not follow what was asked for"
    assert group["batch_size"] == same.ivon.param_groups[0]["batch_size"]
    assert other._step_size is not None, "squared gradients of smaller batches would count as those of the first"
