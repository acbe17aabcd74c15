"""Trainer runs in several processes, started as users start them: `torchrun -m hf_ivon run script.py`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_ivon import load_posterior
from tests import processes
from tests.test_third_party import FLAGS, LORA, flags, script, work

__all__ = ["work"]
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent

# The arguments beside those of the Trainer: what the script prints goes to a file of each process.
SCRIPT = """
import gc, json, os, sys
import torch
from accelerate import DistributedType, PartialState
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainerCallback, TrainingArguments


class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if os.environ.get("DIE_AT") == str(state.global_step) and args.process_index == 1:
            os._exit(3)


if __name__ == "__main__":
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    if args.fsdp:  # Accelerate shards on accelerators only; this opens that road on the CPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    torch.manual_seed(0)
    sizes = dict(vocab_size=29, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    rows = torch.randint(0, 29, (38, 8))
    data = [{"input_ids": r, "labels": r} for r in rows]
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[Die()])
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
    total = sum(float(whole(p).double().sum()) for p in trainer.model.parameters())
    hess = sum(float(whole(trainer.ivon.state[p]["hess"]).double().sum()) for p in trainer.model.parameters())
    logged = [r for r in trainer.state.log_history if "loss" in r]
    with open(f"rank-{args.process_index}.json", "w") as file:
        sharded = all(hasattr(p, "full_tensor") for p in trainer.model.parameters())
        found = {"sharded": sharded, "mean": total, "hess": hess, "log": logged}
        json.dump({**found, "steps": trainer.state.global_step}, file)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        del trainer, model
        gc.collect()  # a Reducer must not outlive its group
        torch.distributed.destroy_process_group()
"""
SETTINGS = {
    "optim": "ivon",
    "optim_args": "ess=1e4,hess_init=0.1,beta2=0.9",
    "learning_rate": 0.1,
    "max_steps": 6,
    "save_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": "true",
    "output_dir": "out",
}


def train(directory, num=2, check=True, environment=None, **settings):
    directory.mkdir(exist_ok=True)
    (directory / "script.py").write_text(SCRIPT)
    command = ["run", "script.py", *flags({**SETTINGS, **settings})]
    done = processes.launch(directory, num, *command, **(environment or {}))
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(num)]
    return done


HEAD = """
import gc, json, sys
import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from tests import tiny


class Watch(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        norm = sum(float(p.grad.square().sum()) for p in trainer.model.parameters()) ** 0.5
        found.append((norm, trainer.ivon.param_groups[0]["batch_size"]))


(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
found = []
model = tiny.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
trainer = Trainer(model=model, args=args, train_dataset=tiny.sentences(20), callbacks=[Watch()])
trainer.train()
if args.process_index == 0:
    json.dump(found, open("found.json", "w"))
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    del trainer, model
    gc.collect()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("accumulation", [1, 2])
def test_processes_average_the_loss_of_heads_that_ignore_the_count(tmp_path, accumulation):
    """The Trainer multiplies their loss by the number of processes, believing that it is a share of a sum.

    Two processes must have the gradients and the batch size of one with twice the batch.
    """
    found = []
    for num in (1, 2):
        (tmp_path / str(num)).mkdir()
        (tmp_path / str(num) / "script.py").write_text(HEAD)
        settings = {"optim_args": "ess=1e14,hess_approx=fisher,clip_radius=1e-12", "max_grad_norm": 0, "max_steps": 2}
        settings |= {"per_device_train_batch_size": 8 // num // accumulation, "save_strategy": "no"}
        settings |= {"gradient_accumulation_steps": accumulation}
        done = processes.launch(tmp_path / str(num), num, "run", "script.py", *flags({**SETTINGS, **settings}))
        assert done.returncode == 0, done.stderr[-4000:]
        found += json.loads((tmp_path / str(num) / "found.json").read_text())
    assert [size for _, size in found] == [8.0] * 4
    assert [norm for norm, _ in found[:2]] == pytest.approx([norm for norm, _ in found[2:]], rel=1e-2)


def same(first, second):
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("num", [2, 4])
def test_processes_share_one_posterior(tmp_path, num):
    """Processes that drift apart would save the mean of one with a Hessian that nobody has."""
    ranks = train(tmp_path / "run", num)
    assert len({(r["mean"], r["hess"], r["steps"]) for r in ranks}) == 1
    for directory in ("checkpoint-3", "checkpoint-6", "."):
        config = load_posterior(tmp_path / "run" / "out" / directory).config
    assert (config.steps, config.num_examples, config.ess) == (6, 38, 1e4)


def test_resumed_processes_continue_bit_for_bit(tmp_path):
    """With dropout, accumulation and ragged ends: weights, posterior and logged loss of the straight run."""
    straight = train(tmp_path / "straight")
    resumed = train(tmp_path / "resumed", resume_from_checkpoint=tmp_path / "straight" / "out" / "checkpoint-3")
    for file in ("model.safetensors", "posterior.safetensors"):
        assert same(tmp_path / "straight" / "out" / file, tmp_path / "resumed" / "out" / file)

    def after(ranks):
        return [[r for r in rank["log"] if r["step"] > 3] for rank in ranks]

    assert after(straight) == after(resumed)


def test_another_number_of_processes_can_continue(tmp_path):
    """The state is the same in every process, so a run may move to a larger or smaller machine."""
    train(tmp_path / "two")
    (one,) = train(tmp_path / "one", 1, resume_from_checkpoint=tmp_path / "two" / "out" / "checkpoint-3")
    assert one["steps"] == load_posterior(tmp_path / "one" / "out").config.steps == 6


def test_a_process_that_dies_ends_the_run_with_whole_checkpoints(tmp_path):
    """The others must not hang, nor leave a checkpoint that is half written."""
    done = train(tmp_path / "run", check=False, environment={"DIE_AT": "5"})
    assert done.returncode != 0
    checkpoints = sorted(p.name for p in (tmp_path / "run" / "out").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-3"]
    load_posterior(tmp_path / "run" / "out" / "checkpoint-3")
    assert not list((tmp_path / "run" / "out").rglob("*.tmp"))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize(("name", "data"), [("sft", "text"), ("dpo", "pairs")])
def test_trl_scripts_in_two_processes(work, name, data, lora):
    """TRL's scripts with two processes: bf16 autocast and gradient checkpointing are their defaults."""
    options = {"model_name_or_path": "gpt2", "dataset_name": data, "output_dir": "out", **(LORA if lora else {})}
    done = processes.launch(work, 2, "run", script(name), *flags({**options, **FLAGS}))
    assert done.returncode == 0, done.stderr[-4000:]
    posterior = load_posterior(work / "out")
    assert posterior.config.steps == 3
    assert all("lora_" in key for key in posterior.names()) is lora


FSDP = json.dumps({"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"], "state_dict_type": "FULL_STATE_DICT"})


def test_trainer_shards_with_fsdp2(tmp_path):
    """Through the Trainer: trained, saved with the posterior in every directory, and resumed bit for bit."""
    settings = {"fsdp": "full_shard", "fsdp_config": FSDP}
    straight = train(tmp_path / "straight", **settings)
    for directory in ("checkpoint-3", "checkpoint-6", "."):
        config = load_posterior(tmp_path / "straight" / "out" / directory).config
    assert config.steps == 6
    assert straight[0]["sharded"]
    assert straight[0]["steps"] == 6
    train(tmp_path / "resumed", resume_from_checkpoint=tmp_path / "straight" / "out" / "checkpoint-3", **settings)
    for file in ("model.safetensors", "posterior.safetensors"):
        assert same(tmp_path / "straight" / "out" / file, tmp_path / "resumed" / "out" / file)
